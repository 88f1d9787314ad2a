"""learn: the scales and norms of an artifact learned against the full-precision model, for recipes with `learn`.

It stands before `quantize`, which adopts what is learned: later stages see one artifact, whether it was learned or not.
A killed run goes on at its last saved step.
"""

from __future__ import annotations

import hashlib
import shutil
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import onnx

from pipeline import keys, machine
from pipeline.artifact.learned import RECORD, digests_of, read_learned
from pipeline.artifact.plans import Planned, plan_recipe
from pipeline.artifact.rotated import Rotated
from pipeline.artifact.work import Range
from pipeline.artifact.write import PartWriter
from pipeline.calibrate.texts import input_ids
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.config.calibration import CalibrationConfig, load_calibration
from pipeline.config.recipes import Learning, load_recipe
from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.partial import Partial, discard, open_partial
from pipeline.runtime.device import chosen_device
from pipeline.runtime.session import check_weights
from pipeline.stages.quantize import artifact_key, write_files
from pipeline.workspace import MODEL_FILE, Workspace

if TYPE_CHECKING:
    from pipeline.learn.training import Learned

CHECKED = 8
"""Windows that judge what was learned and are not learned from."""
_TEXT_TOKENS = 400_000  # the shipped calibration texts, in their proportions, hold 450,000
_STATE = "training.state"


def run(model: str, variant: str) -> None:
    """Write artifacts/<model>/learned/<variant>: the artifact's files and learned.json; nothing for other recipes.

    Raises as `quantize`, and:
        PipelineError: torch is missing.
        EvaluationError: the loss is no number.
        ResourceError: the device's memory does not hold the training.
    """
    recipe, workspace = load_recipe(variant), Workspace(model)
    folder = workspace.learned(variant)
    if recipe.learn is None:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        print(f"{model} {variant}: its recipe has no `learn`, so nothing was learned")
        return
    store = Store()
    reference = workspace.reference(store)
    source = onnx.load(reference / MODEL_FILE, load_external_data=False)
    architecture = read_architecture(reference / "config.json")
    planned = plan_recipe(recipe, architecture, source, variant, model)
    windows = _windows(learning_text(recipe.learn, load_calibration()), recipe.learn, reference, store)
    quantized = artifact_key(workspace, recipe, planned)
    key = _key(quantized, recipe.learn, windows)
    grown = workspace.partial(f"{variant}.learned")
    if (record := read_learned(folder)) and record["key"] == key:
        discard(grown)
        print(f"{model} {variant}: learned before from the same plan, weights, text and code; kept")
        return
    with open_partial(grown, key) as partial:
        lost = write_files(partial, recipe, planned, Rotated(reference, architecture, recipe.rotation), workspace)
        learned = _learn(partial, planned, reference, windows, recipe.learn)
        record = {"key": key, "quantized": quantized, "sha256": digests_of(partial.folder)}
        record |= {"lost": {name: item._asdict() for name, item in lost.items()}}
        write_json(partial.folder / RECORD, record | {"learned": _summary(learned, recipe.learn)})
        partial.finish(folder)
    kept = "" if learned.values else ". Nothing was gained, so the values of before are kept"
    print(
        f"{model} {variant}: KL divergence on {CHECKED} windows of calibration text that were not learned from "
        f"{learned.before:.4f} nats, after {recipe.learn.steps} steps {learned.after:.4f}{kept}"
    )


def learning_text(wanted: Learning, calibration: CalibrationConfig) -> CalibrationConfig:
    """The calibration text, more of it: every step reads other text while there is any."""
    tokens = wanted.steps * max(wanted.tokens, calibration.window)
    return calibration.holding(min(tokens, _TEXT_TOKENS) + CHECKED * calibration.window)


def _windows(text: CalibrationConfig, wanted: Learning, folder: Path, store: Store) -> list[np.ndarray]:
    """Whole windows, int64 [window], of all texts in one seeded order: the first of them judge."""
    whole = [ids for ids in input_ids(text, folder, store) if len(ids) == text.window]
    return [whole[place] for place in np.random.default_rng(wanted.seed).permutation(len(whole))]


def _key(quantized: str, wanted: Learning, windows: list[np.ndarray]) -> str:
    """What decides the bytes, 64 hex digits: sums of another number of threads round otherwise."""
    text = hashlib.sha256(b"".join(ids.tobytes() for ids in windows)).hexdigest()
    by = [machine.cores(), chosen_device().name]
    return keys.digest([quantized, keys.code(__name__), by, wanted.model_dump(mode="json"), text])


def _learn(partial: Partial, planned: Planned, reference: Path, windows: list[np.ndarray], wanted: Learning) -> Learned:
    """Train what was written in `partial.folder`, and write what was learned in its place."""
    try:
        from pipeline.learn.training import learn, precision
        from pipeline.runtime.interpreter import Interpreter
    except ImportError as error:
        raise PipelineError(
            f"a recipe with `learn` needs torch, which does not load ({error}). Install it (`pip install -r "
            f"requirements.txt`), or remove `learn` from the recipe."
        ) from None
    check_weights(reference / MODEL_FILE, reference)
    drafted, state, where = planned.draft, partial.folder / _STATE, chosen_device().kind
    teacher = onnx.load(reference / MODEL_FILE, load_external_data=False)
    folders = ((drafted.model, partial.folder), (teacher, reference))
    student, full = (Interpreter(model, folder, where, precision(where)) for model, folder in folders)
    learned = learn(student, full, windows[CHECKED:], windows[:CHECKED], wanted, state, drafted.stem)
    with ExitStack() as stack:
        writer = PartWriter(partial.folder, drafted, stack)
        for name, values in learned.values.items():
            writer.put(Range(name, 0, values.nbytes), values)
        writer.flush()
    state.unlink()
    return learned


def _summary(learned: Learned, wanted: Learning) -> dict[str, Any]:
    """For plan.json: how it was trained, and the mean KL divergence in nats at both ends."""
    return wanted.model_dump(mode="json") | {
        "device": chosen_device().name,
        "helped": bool(learned.values),
        "kl_before": learned.before,
        "kl_after": learned.after,
        "losses": learned.losses,
    }
