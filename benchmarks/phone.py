"""A phone's memory, rehearsed: a model folder runs under a hard limit of memory, from an empty page cache.

    python -m benchmarks.phone artifacts/mimo-8b/variants/q4 --tier android-12gb --half

A tier has two limits: its budget, which counts private bytes, and its resident share, which counts private and mapped
ones. Under each, a process of its own loads the folder, reads 512 tokens and decodes 64. The kernel kills it when its
private bytes do not fit. File pages do not lead to that: the kernel drops them and reads them again. So mapped weights
that do not fit make a run slow, which the bytes read from storage show, until its time is over. `--half` runs
everything again at half the limit.

The limit is the app's as a whole. The process stands for the app: it holds `runtime_bytes` of configs/tiers.yaml before
it loads the model, Python's own private bytes as a part of them. Pages of libraries that other processes have read
before are not counted. Figures go to benchmarks/results/;
`python -m benchmarks.tables` puts them into README.md. Linux, as root or in a scope of your own: benchmarks/cgroups.py.
"""

from __future__ import annotations

import json
import os
import re
import signal
import sys
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import click

from benchmarks import cgroups, machine, project
from benchmarks.engines import settings
from benchmarks.limited import STEPS, Request
from benchmarks.markdown import table
from pipeline.config.phones import load_tiers
from pipeline.config.typed_yaml import known_name
from pipeline.errors import EvaluationError, PipelineError, ResourceError
from pipeline.files import scratch_directory, write_json
from pipeline.planning.devices import budget_bytes, resident_bytes
from pipeline.prepack import device, make
from pipeline.prepack.emulator import HERE
from pipeline.runtime.pagecache import evict

PROMPT_TOKENS, NEW_TOKENS = 512, 64
SECONDS = 1200  # of one run: weights that are read from storage at every token take long
FULL_SIZE = {("mimo-8b", "q3"): "android-8gb", ("mimo-8b", "q4"): "android-12gb"}
"""What `make bench` rehearses, and on which tier."""


@dataclass(frozen=True)
class Run:
    """One process under one limit.

    Attributes:
        ended: "finished", "killed" by the kernel for memory, or "out of time".
        step: the step in which it ended; None when it finished.
        private_bytes, mapped_bytes: peaks, looked at every 50 ms.
        charged_bytes: the peak of what the kernel counted against the limit, file pages included.
        steps: what each finished step took (`benchmarks.limited.Step`), by its name.
    """

    limit: int | None
    ended: str
    step: str | None
    private_bytes: int
    mapped_bytes: int
    charged_bytes: int | None
    steps: dict[str, dict[str, Any]]

    @property
    def way(self) -> str:
        """How the runtime held the weights: "mapped" when loading mapped more of the folder than it made private."""
        before, load = self.steps["reserve"], self.steps.get("load")
        if load:
            mapped = load["model_addresses"] > load["private"] - before["private"]
        else:
            mapped = self.mapped_bytes - before["mapped"] > self.private_bytes - before["private"]
        return "mapped" if mapped else "private"


def run(request: Request, limit: int | None) -> Run:
    """Run a folder that the page cache does not hold, in a group with this limit, or without a group.

    Raises ResourceError where no group can be made, EvaluationError when the folder's files stay in the page cache or
    the process ends by itself.
    """
    if stayed := evict(Path(request.folder)):
        raise EvaluationError(
            f"{request.folder}: {stayed:,} bytes stay in the page cache, where no limit counts them: some process maps "
            f"these files. End it and measure again."
        )
    command = [sys.executable, "-m", "benchmarks.limited", json.dumps(asdict(request))]
    with cgroups.limited(limit) if limit else nullcontext() as group:
        used = machine.watch(group.command(command) if group else command, cwd=project.ROOT)
        kills, charged = (group.kills, group.peak_bytes) if group else (0, None)
    lines = (json.loads(line) for line in used.output.splitlines() if line.startswith("{"))
    steps = {line["name"]: line for line in lines}
    ended = _ended(used.status, kills, f"{request.folder} under {limit or 'no'} bytes")
    during = None if ended == "finished" else STEPS[len(steps)]
    return Run(limit, ended, during, used.private_bytes, used.mapped_bytes, charged, steps)


def _ended(status: int, kills: int, what: str) -> str:
    """The word for an end. The kernel's own count tells a kill for memory from one that somebody sent."""
    if status == 0:
        return "finished"
    if status == -signal.SIGKILL and kills:
        return "killed"
    if status == -signal.SIGALRM:
        return "out of time"
    raise EvaluationError(
        f"{what}: ended with status {status} and {kills} kills for memory, which says nothing about the limit; its own "
        f"message stands above."
    )


def rehearse(request: Request, limits: Mapping[str, int], half: bool) -> list[dict[str, Any]]:
    """A row for each limit, in bytes by its name: the run under it, and the run under half of it if asked for."""
    rows = []
    for name, limit in limits.items():
        at = run(request, limit)
        row: dict[str, Any] = {"limit": name, "way": at.way, "run": asdict(at)}
        rows.append(row | {"half": asdict(run(request, limit // 2)) if half else None})
    return rows


def limits_of(tier: str) -> dict[str, int]:
    """The tier's budget and its resident share. Raises ConfigError for a tier that configs/tiers.yaml lacks."""
    tiers = load_tiers()
    known_name(tier, tiers.tiers, "--tier", "configs/tiers.yaml")
    return {"budget": budget_bytes(tiers.tiers[tier]), "resident": resident_bytes(tiers.tiers[tier], tiers)}


def measure(
    folder: Path,
    name: str,
    tier: str,
    limits: Mapping[str, int] | None = None,
    half: bool = True,
    **changes: Any,
) -> dict[str, Any]:
    """Rehearse a folder on a tier and write what came out to benchmarks/results/.

    Args:
        name: model and variant, and what an overlay changes; for the table and the file's name.
        limits: bytes by name, in place of the tier's.
        changes: of what each process does (`Request`), in place of a phone's: 512 tokens, 64 more, `runtime_bytes`.
    """
    request = replace(_usual(folder), **changes)
    rows = rehearse(request, limits or limits_of(tier), half)
    record = {
        "name": name,
        "tier": tier,
        "request": {key: value for key, value in asdict(request).items() if key != "folder"},
        "read_ahead_bytes": read_ahead(folder),
        "rows": rows,
        "machine": machine.describe(),
    }
    words = [name, rows[0]["way"], tier, *(str(size) for size in (limits or {}).values())]
    write_json(project.RESULTS / f"phone-{re.sub(r'[^a-z0-9_.]+', '-', ' '.join(words).lower())}.json", record)
    return record


def _usual(folder: Path) -> Request:
    """What a phone does with a folder."""
    return Request(str(folder.resolve()), {}, load_tiers().runtime_bytes, PROMPT_TOKENS, NEW_TOKENS, SECONDS)


def read_ahead(folder: Path) -> int | None:
    """Bytes that the kernel reads around a page that is missing, on the folder's disk; None where it does not say.

    Phones read some 128 KiB. Where it is much more, weights that do not fit are read several times over.
    """
    device = folder.stat().st_dev
    path = Path(f"/sys/class/bdi/{os.major(device)}:{os.minor(device)}/read_ahead_kb")
    return int(path.read_text()) * 1024 if path.exists() else None


def bench(folder: Path, model: str, variant: str, scratch: Path) -> None:
    """For `make bench`: a full-size artifact as it is made and prepacked in slices, on its tier of `FULL_SIZE`.

    Says so and leaves it out where this machine cannot do it; other models and variants are left out silently.
    """
    tier = FULL_SIZE.get((model, variant))
    if tier is None:
        return
    try:
        measure(folder, f"{model} {variant}", tier)
        with scratch_directory(scratch / f"{model}-{variant}") as mapped:
            make.link_model(folder, mapped)
            make.prepare(mapped)
            make.add_classes(mapped, [HERE])
            graph = device.prepack(mapped, lambda _: None).graph
            overlay = {"model": {"decoder": {"filename": graph}}}
            measure(mapped, f"{model} {variant}", tier, half=False, overlay=overlay)
    except ResourceError as error:
        click.echo(f"{model} {variant} on {tier} is not rehearsed: {error}", err=True)


# --- the table ---

HEAD = (
    "model, variant, weights", "tier", "limit, GB", "private, MB", "mapped, MB", "load, s", "prefill, s",
    "decode, tokens/s", "read per decoded token, MB", "end", "at half the limit (tokens/s)",
)  # fmt: skip


def rows_of(record: dict[str, Any]) -> Iterator[list[str]]:
    """Cells of README.md's table."""
    for row in record["rows"]:
        found, tokens = row["run"], record["request"]["new_tokens"]
        app = "" if record["request"]["reserve"] else ", no app"
        seconds = {name: f"{step['seconds']:.1f}" for name, step in found["steps"].items()}
        yield [
            f"{record['name']}, {row['way']}",
            record["tier"],
            f"{row['limit']}: {found['limit'] / 1e9:.3f}{app}",
            *(f"{found[name] / 1e6:,.0f}" for name in ("private_bytes", "mapped_bytes")),
            *(seconds.get(name, "") for name in ("load", "prefill")),
            *_decoded(found, tokens),
            _end(found),
            " at ".join(filter(None, [_end(row["half"]), _decoded(row["half"], tokens)[0]]))
            if row["half"]
            else "not run",
        ]


def _decoded(found: dict[str, Any], tokens: int) -> tuple[str, str]:
    """Tokens per second, and megabytes read from storage for each; empty where the run did not come so far."""
    if "decode" not in found["steps"]:
        return "", ""
    decode = found["steps"]["decode"]
    return f"{tokens / decode['seconds']:.2f}", f"{decode['read'] / tokens / 1e6:,.1f}"


def _end(found: dict[str, Any]) -> str:
    """`finished`, or `killed in prefill`."""
    return f"{found['ended']} in {found['step']}" if found["step"] else found["ended"]


def tables(records: list[dict[str, Any]]) -> str:
    """All rehearsals."""
    return table(HEAD, [cells for record in records for cells in rows_of(record)])


# --- the command ---


def _overlay(context: click.Context, option: click.Parameter, text: str | None) -> dict[str, Any]:
    """JSON as it stands, or from the file that is named."""
    if not text:
        return {}
    try:
        return json.loads(text if text.startswith("{") else Path(text).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise click.BadParameter(f"neither a JSON object nor a file that holds one: {error}") from None


def _graph_name(folder: Path) -> str:
    """The name of the graph that the folder runs, without its ending."""
    try:
        return Path(settings(folder)["decoder"]["filename"]).stem
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise EvaluationError(
            f"{folder}: not a folder that onnxruntime-genai loads, whose genai_config.json names a graph: {error!r}. "
            f"Give an artifact or the content of a bundle."
        ) from None


@click.command()
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--tier", required=True, help="A row of configs/tiers.yaml.")
@click.option("--limit", type=click.IntRange(1), help="Bytes, in place of the tier's two limits.")
@click.option("--half", is_flag=True, help="Also run at half of each limit.")
@click.option("--name", help="Model, variant, and what the overlay changes, for the table; else the graph's name.")
@click.option("--overlay", callback=_overlay, help="JSON, or a file of it, laid over genai_config.json.")
@click.option(
    "--reserve", type=click.IntRange(0), help="The app's bytes beside the model; else the tiers' runtime_bytes."
)
@click.option("--prompt-tokens", type=click.IntRange(1), help=f"Of the prompt; else {PROMPT_TOKENS}.")
@click.option("--new-tokens", type=click.IntRange(1), help=f"Decoded; else {NEW_TOKENS}.")
@click.option("--seconds", type=click.IntRange(1), help=f"A run may take; else {SECONDS}.")
def main(folder: Path, tier: str, limit: int | None, half: bool, name: str | None, **changes: Any) -> None:
    """Run FOLDER under the memory limits of a tier of phones."""
    try:
        given = {key: value for key, value in changes.items() if value is not None}
        limits = {"given": limit} if limit else None
        click.echo(tables([measure(folder, name or _graph_name(folder), tier, limits, half, **given)]))
    except PipelineError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
