"""Where each stage writes and reads: one place for all paths under `artifacts/`.

Everything is a DVC output except `reference/`, a folder of hard links (graph, tokenizer and weights side by side, as
ONNX Runtime wants them) that any stage can make again from the export and the store, and `partial/`, where artifacts
grow.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.chunks import SUFFIX
from pipeline.checkpoint.complete import TOKENIZER_FILES
from pipeline.checkpoint.lock import SourceLock, read_lock
from pipeline.errors import PipelineError
from pipeline.files import link_or_copy, read_json

ARTIFACTS = Path("artifacts")
REFERENCE = "reference"  # the full-precision model, in the places where a variant's name stands otherwise
MODEL_FILE = "model.onnx"
GENAI_CONFIG = "genai_config.json"
PLAN_FILE = "plan.json"  # how an artifact came about; its bytes are in the other files


def public_key_path(key_id: str) -> Path:
    """Where the public half of a key that signed here is kept, for `verify`."""
    return ARTIFACTS / "keys" / f"{key_id}.pem"


class Workspace:
    """The paths of one model.

    Attributes:
        root: everything of the model that is not released or measured.
        lock: the source lock.
        export: the full-precision graph, genai_config.json and tokenizer; no weights.
        moments: second moments of activations.
        ranges: ranges of cached keys and values.
        sensitivity: errors of every format and damage of every matrix; an empty folder while no recipe needs them.
        nats: damage of every matrix.
        parity: the comparison with Optimum's export.
        tiers: the signed tiers.json: content/ and model.sig.
        packs: store-ready folders: android/ and ios/.
    """

    def __init__(self, model: str):
        self.model = model
        self.root = root = ARTIFACTS / model
        self.lock = root / "source.json"
        self.export = root / "export"
        self.moments = root / "calibration" / "moments.safetensors"
        self.ranges = root / "calibration" / "ranges.safetensors"
        self.sensitivity = root / "sensitivity"
        self.nats = root / "sensitivity" / "nats.json"
        self.parity = root / "parity.json"
        self.tiers = ARTIFACTS / "tiers" / model
        self.packs = ARTIFACTS / "packs" / model

    def correlations(self, name: str) -> Path:
        """Correlations of the inputs of a layer, `layers.0`, or of the layer of an input, `layers.0.mlp`."""
        return self.moments.with_name(".".join(name.split(".")[:2]) + ".safetensors")

    def artifact(self, variant: str) -> Path:
        """Folder of a variant's quantized graph and data."""
        return self.root / "variants" / variant

    def learned(self, variant: str) -> Path:
        """Folder of the files of a variant whose recipe learns, before `quantize` adopts them; empty for others."""
        return self.root / "learned" / variant

    def partial(self, variant: str) -> Path:
        """A variant's artifact while it is written: no output of a stage, so that `dvc repro` lets it be."""
        return self.root / "partial" / variant

    def evaluation(self, variant: str) -> Path:
        """Folder of a variant's per-item results (`REFERENCE`: the full-precision model's)."""
        return self.root / "evaluation" / variant

    def verdict(self, variant: str) -> Path:
        """The gates' decision on a variant."""
        return ARTIFACTS / "verdicts" / self.model / f"{variant}.json"

    def measurements(self, variant: str) -> Path:
        """All that was measured of a variant (`REFERENCE`: of the full-precision model), on the machine at hand."""
        return ARTIFACTS / "measurements" / self.model / f"{variant}.json"

    def metrics(self, variant: str) -> Path:
        """The figures of a variant that DVC compares and git tracks (`pipeline.judge.summary`)."""
        return ARTIFACTS / "metrics" / self.model / f"{variant}.json"

    def speed(self, variant: str) -> Path:
        """Those that belong to the machine that measured: DVC compares them too, git does not track them."""
        return ARTIFACTS / "speed" / self.model / f"{variant}.json"

    def bundle(self, variant: str) -> Path:
        """The bundle: content/ and model.sig."""
        return ARTIFACTS / "bundles" / self.model / variant

    def file_stem(self, variant: str) -> str:
        """Name of an artifact's files, as apps name them: mimo_8b_q4."""
        return f"{self.model}_{variant}".replace("-", "_")

    def require(self, path: Path, stage: str, *variant: str) -> Path:
        """`path`, an output of `stage`. Raises PipelineError that names the command to run when it is not there."""
        if not path.exists():
            command = " ".join(("python -m pipeline", stage, self.model, *variant))
            raise PipelineError(
                f"{path} is not there: the {stage} stage has not run for {' '.join((self.model, *variant))}. "
                f"Run `{command}` first, or `dvc repro` for everything."
            )
        return path

    def read(self, path: Path, stage: str, *variant: str) -> Any:
        """The JSON that `stage` wrote to `path`. Raises PipelineError when it is missing or damaged."""
        try:
            return read_json(self.require(path, stage, *variant))
        except ValueError as error:
            raise PipelineError(f"{path} is damaged ({error}). Remove it and run `dvc repro`.") from None

    def read_lock(self) -> SourceLock:
        """The source lock. Raises SourceError when the download stage has not run."""
        return read_lock(self.lock)

    def weights(self, store: Store) -> Path:
        """A folder with the checkpoint's files under their own names (hard links into the store)."""
        return self.link(self.read_lock(), store)

    def link(self, lock: SourceLock, store: Store) -> Path:
        """As `weights`, for a lock that is not written yet. Files of an earlier source under this name disappear:
        its generation_config.json would give the new model the old one's stop ids."""
        folder = self.root / REFERENCE
        store.link(lock.files, folder)
        names = {name for file in lock.files for name in (file.name, file.name + SUFFIX)}
        for file in folder.iterdir():
            ours = file.name == GENAI_CONFIG or file.suffix in {".onnx", ".data"}
            if file.is_file() and not ours and file.name not in names:
                file.unlink(missing_ok=True)
        return folder

    def reference(self, store: Store) -> Path:
        """The full-precision model as ONNX Runtime and onnxruntime-genai load it: export and weights side by side."""
        folder = self.weights(store)
        for name in TOKENIZER_FILES:  # those that ship take their place, and no other may be read beside them
            (folder / name).unlink(missing_ok=True)
        for file in self.require(self.export, "export").iterdir():
            link_or_copy(file, folder / file.name)
        return folder
