"""What must hold before a stage spends anything: its configuration, this machine's room, text that nothing judges.

The command line asks; no result depends on the answer, so stages import none of it and its code is in none of their
keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

from pipeline.artifact.plans import budget_bound
from pipeline.calibrate.texts import input_ids
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.sources import fetch_dataset
from pipeline.config.calibration import load_calibration, load_sensitivity
from pipeline.config.models import load_model, load_pipeline
from pipeline.config.phones import load_kernels, load_tiers
from pipeline.config.recipes import BudgetRecipe, has_budget, load_recipe
from pipeline.errors import PipelineError, PlanError
from pipeline.planning.devices import ways
from pipeline.preflight.chance import hopeless, outlook
from pipeline.preflight.compensation import futile
from pipeline.preflight.configuration import check_all, needed_datasets
from pipeline.preflight.footprints import candidate, find_source, known
from pipeline.preflight.machine import download_needs, misfits, require, room, stage_needs
from pipeline.prepack.emulator import HERE, require_host
from pipeline.tasks.registry import load_suite
from pipeline.tasks.unseen import check_unseen
from pipeline.workspace import GENAI_CONFIG, REFERENCE, Workspace

HOURS_FROM = 1_000_000_000
"""Parameters of a model whose stages take hours; smaller ones are shown even where they are refused."""
_TUNED = {"calibrate": (load_calibration,), "sensitivity": (load_sensitivity,)}


def guarded(
    stage: str,
    run: Callable[..., None],
    model: str,
    variant: str = "",
    dry_run: bool = False,
    if_needed: bool = False,
) -> None:
    """Run a stage for a model and a variant, as its matrix has them, once nothing speaks against it.

    `dry_run`: of quantize, which then writes nothing; `if_needed`: of sensitivity, which then measures only for recipes
    with a budget.
    """
    if dry_run:
        run(model, variant, dry_run=True)
    elif stage == "learn" and not load_recipe(variant).learn:
        run(model, variant)
    elif if_needed and not has_budget(load_pipeline().variants):
        Workspace(model).sensitivity.mkdir(parents=True, exist_ok=True)
        print(f"{model}: no variant has a budget, so nothing was measured")
    else:
        before(stage, model, variant)
        run(*filter(None, (model, variant)))
        if stage == "download":
            for one in load_pipeline().variants:
                print(outlook(model, one, load_pipeline().suite))
            for sentence in misfits(model):
                print(f"{model}: will not run here: {sentence}", file=sys.stderr)


def before(stage: str, model: str, variant: str = "") -> None:
    """Refuse what cannot end well, before the first byte.

    Raises:
        ConfigError: anything in the run's configuration; the suite is not for the run's models.
        PlanError: a budget of the run that no plan fits.
        ResourceError: this machine has too little memory or disk for the stage.
        PipelineError: the model was made for another context than its entry has, or takes hours that can only end in a
            refusal: before its download if its shapes are known.
        EvaluationError: what the stage tunes by, or before the reference all that tunes, is text that judges.
    """
    store = Store()
    check_all()
    _require_budgets(model)
    if stage == "download":
        _require_kernels()
    _require_decision(model, variant)
    if stage == "download":
        wanted = download_needs(find_source(model, store), room())
        require(model, replace(wanted, store_disk=0))  # fetching checks the store's share: it knows what is there
    for source in needed_datasets().values():  # what is in the store is not fetched again
        fetch_dataset(source, store)
    if stage == "download":
        return
    _require_context(Workspace(model), variant if stage in ("validate", "bundle") else "")
    _require_room(stage, model, variant, store)
    if stage in _TUNED or variant == REFERENCE:
        folder, suite = Workspace(model).reference(store), load_suite(load_pipeline().suite)
        tuned = _TUNED.get(stage, (load_calibration, load_sensitivity))
        windows = [ids for load in tuned for ids in input_ids(load(), folder, store)]
        check_unseen(windows, folder, suite, store)


def _require_context(workspace: Workspace, variant: str) -> None:
    """Refuse a model that was made for another context than its entry has by now: rotary tables and the cache are made
    for one. Raises PipelineError."""
    made = {workspace.export: ["export", workspace.model]}
    if variant and variant != REFERENCE:
        made[workspace.artifact(variant)] = ["quantize", workspace.model, variant]
    wanted = load_model(workspace.model).context
    for folder, (stage, _, *of) in made.items():
        if not (folder / GENAI_CONFIG).exists():  # the stage itself says what has not run
            continue
        if (context := workspace.read(folder / GENAI_CONFIG, stage, *of)["model"]["context_length"]) != wanted:
            again = "` and `".join(" ".join(("python -m pipeline", *command)) for command in made.values())
            raise PipelineError(
                f"{folder} was made for a context of {context:,} tokens, and `context` in the model's entry is "
                f"{wanted:,}. Run `{again}` again, or `dvc repro` for everything."
            )


def _require_budgets(model: str) -> None:
    """Refuse a budget of the run that no plan fits, before its sensitivities are measured. Raises PlanError."""
    for variant in load_pipeline().variants:
        recipe = load_recipe(variant)
        if isinstance(recipe, BudgetRecipe) and find_source(model, Store()):
            try:
                budget_bound(recipe, known(model).architecture)
            except PlanError as error:
                raise PlanError(f"{model} {variant}: {error}") from None


def _require_kernels() -> None:
    """Refuse kernel classes that this machine cannot make, where a phone would map a variant of the run: `bundle` would
    after hours. Raises ResourceError."""
    if not any(name != HERE for name in load_kernels().classes):
        return
    run, tiers = load_pipeline(), load_tiers()
    for model in run.models:
        try:
            found = [ways(candidate(known(model), variant, tiers.context), tiers) for variant in run.variants]
        except PipelineError:  # unknown shapes: the stage itself says so
            continue
        if any(way.weights == "mapped" for one in found for way in one.values()):
            require_host()


def _require_decision(model: str, variant: str) -> None:
    """Refuse work on a model of `HOURS_FROM` parameters that no measurement can end in PASS, or that compensates
    nothing: of the stage's variant, or of any in the run, so that a run ends before its download, where shapes are
    known, or after it, and not at that variant's stages. Raises PipelineError."""
    run = load_pipeline()
    try:
        if run.undecided or known(model).architecture.parameters < HOURS_FROM:
            return
    except PipelineError:  # unknown shapes or a damaged config.json: the stage says so, or mends it
        return
    variants = (variant,) if variant and variant != REFERENCE else run.variants
    if reasons := list(filter(None, (*(hopeless(model, one, run.suite) for one in variants), futile(model, variants)))):
        raise PipelineError(
            f"{' '.join(reasons)} To do this work all the same, set `undecided: true` in configs/pipeline.yaml."
        )


def _require_room(stage: str, model: str, variant: str, store: Store) -> None:
    """Nothing is asked of a model of unknown shapes: the stage itself says that it was not downloaded."""
    if find_source(model, store) is None:
        return
    name = "reference" if variant == REFERENCE else stage
    own = (variant,) if variant and variant != REFERENCE else ()
    wanted = stage_needs(model, own or load_pipeline().variants * (name == "sensitivity"), room().memory)
    found = next((item for item in wanted if item.stage == name), None)
    if found and stage == "quantize":  # what a killed run wrote is there already
        begun = Workspace(model).partial(variant).glob("*")
        found = replace(found, disk=max(0, found.disk - sum(512 * file.stat().st_blocks for file in begun)))
    if found:
        require(model, found)
