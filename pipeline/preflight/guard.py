"""What must hold before a stage spends anything: its configuration, this machine's room, text that nothing judges.

The command line asks; no result depends on the answer, so stages import none of it and its code is in none of their
keys.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import replace

from pipeline.calibrate.texts import input_ids
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.sources import fetch_dataset
from pipeline.config.calibration import load_calibration, load_sensitivity
from pipeline.config.models import load_model, load_pipeline
from pipeline.config.recipes import has_budget
from pipeline.errors import PipelineError
from pipeline.preflight.check import check_all, needed_datasets
from pipeline.preflight.machine import find_source, misfits, require, require_download, room, stage_needs
from pipeline.preflight.needs import UNMEASURED
from pipeline.tasks.registry import load_suite
from pipeline.tasks.unseen import check_unseen
from pipeline.workspace import GENAI_CONFIG, REFERENCE, Workspace

_GUARDED = ("download", "calibrate", "sensitivity", "parity", "quantize", "validate")
_TUNED = {"calibrate": (load_calibration,), "sensitivity": (load_sensitivity,)}


def guarded(
    stage: str,
    run: Callable[..., None],
    model: str | None = None,
    variant: str | None = None,
    dry_run: bool = False,
    if_needed: bool = False,
) -> None:
    """Run a stage for a model and a variant, as its matrix has them, once nothing speaks against it.

    `dry_run`: of quantize, which then writes nothing; `if_needed`: of sensitivity, which then measures only for recipes
    with a budget.
    """
    if dry_run:
        run(model, variant, dry_run=True)
    elif if_needed and not has_budget(load_pipeline().variants):
        Workspace(model or "").sensitivity.mkdir(parents=True, exist_ok=True)
        print(f"{model}: no variant has a budget, so nothing was measured")
    else:
        if model and stage in _GUARDED:
            before(stage, model, variant)
        run(*filter(None, (model, variant)))
        if stage == "download":
            for sentence in misfits(model or ""):
                print(f"{model}: will not run here: {sentence}", file=sys.stderr)


def before(stage: str, model: str, variant: str | None = None) -> None:
    """Refuse what cannot end well, before the first byte.

    Raises:
        ConfigError: before `download`, for anything in the configuration of the whole run.
        ResourceError: this machine has too little memory or disk for the stage.
        PipelineError: the model was made for another context than its entry has.
        EvaluationError: what the stage tunes by, or before the reference all that tunes, is text that judges.
    """
    store = Store()
    if stage == "download":
        check_all()
        require_download(model, store)
    for name, source in needed_datasets().items():  # what is in the store is not fetched again
        fetch_dataset(name, source, store)
    if stage == "download":
        return
    _require_context(Workspace(model), variant if stage in ("validate", "bundle") else None)
    _require_room(stage, model, variant, store)
    if stage in _TUNED or variant == REFERENCE:
        folder, suite = Workspace(model).reference(store), load_suite(load_pipeline().suite)
        tuned = _TUNED.get(stage, (load_calibration, load_sensitivity))
        windows = [ids for load in tuned for ids in input_ids(load(), folder, store)]
        check_unseen(windows, folder, suite, store)


def _require_context(workspace: Workspace, variant: str | None) -> None:
    """Refuse a model that was made for another context than its entry has by now: rotary tables and the cache are made
    for one. Raises PipelineError."""
    made = {workspace.export: ("export",)}
    if variant not in (None, REFERENCE):
        made[workspace.artifact(variant)] = ("quantize", variant)
    wanted = load_model(workspace.model).context
    for folder, (stage, *rest) in made.items():
        if not (folder / GENAI_CONFIG).exists():  # the stage itself says what has not run
            continue
        if (context := workspace.read(folder / GENAI_CONFIG, stage, *rest)["model"]["context_length"]) != wanted:
            again = (" ".join(("python -m pipeline", name, workspace.model, *of)) for name, *of in made.values())
            raise PipelineError(
                f"{folder} was made for a context of {context:,} tokens, and `context` in the model's entry is "
                f"{wanted:,}. Run `{'` and `'.join(again)}` again, or `dvc repro` for everything."
            )


def _require_room(stage: str, model: str, variant: str | None, store: Store) -> None:
    """Nothing is asked of a model that was not downloaded: the stage itself says so."""
    source, name = find_source(model, store), "reference" if variant == REFERENCE else stage
    if source is None:
        return
    own = () if variant in (None, REFERENCE) else (variant,)
    wanted = stage_needs(model, source, own or _budgets(name), room().memory, UNMEASURED)
    found = next((item for item in wanted if item.stage == name), None)
    if found and stage == "quantize":  # what a killed run wrote is there already
        begun = Workspace(model).partial(variant or "").glob("*")
        found = replace(found, disk=max(0, found.disk - sum(512 * file.stat().st_blocks for file in begun)))
    if found:
        require(model, found)


def _budgets(stage: str) -> tuple[str, ...]:
    return load_pipeline().variants if stage == "sensitivity" else ()
