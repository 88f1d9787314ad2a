"""The subject whose every matrix is a multiple of 256 wide, where llama.cpp's K- and IQ-quants are themselves.

512 of SmolLM2's 576 channels and 8 of its 9 heads a layer, each with keys and values of its own (`narrow`), then a
short distillation (`distil`). The channels are SmolLM2's own, unrotated: a trained model with its outliers. Nothing was
widened, so no input has a null space, and training moves every weight off the 4-bit grid. It is a worse model than
SmolLM2 (its perplexity is reported) and its own reference. Making it takes minutes; it is kept by the hash of all that
decides it.
"""

from __future__ import annotations

import shutil
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality import decoder, distil, narrow
from benchmarks.quality.decoder import Shape, Weights
from pipeline import keys
from pipeline.calibrate.texts import encoder, read_text, read_tokenizer
from pipeline.calibrate.windows import overlap
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.tensors import SINGLE
from pipeline.config.sources import load_datasets
from pipeline.files import atomic_directory, read_json, sha256_of, write_json
from pipeline.tasks import held_out

CHANNELS, HEADS, WINDOW = 512, 8, 256
_MADE_FROM = "made_from.json"
_JUDGES = {
    "prose": {"text-wiki": 1},
    "chat": {"chat-mt-bench": 1},
    "code": {"text-bottle": 1},
    "languages": {"text-vietnamese": 1, "text-chinese": 1},
}


@dataclass(frozen=True)
class Making:
    """How the model is made.

    Attributes:
        text: share of each pinned text in the windows; none judges.
        packages, python: these installed packages' sources, and their share: a tenth of text-code is Python.
        closed: windows that choose the channels and that least squares sees, the first of training.
    """

    text: Mapping[str, float] = field(
        default_factory=lambda: {"text-c4": 0.4, "text-code": 0.2, "text-technical": 0.05, "text-multilingual": 0.05}
    )
    packages: tuple[str, ...] = ("click", "fsspec", "Jinja2", "requests", "urllib3")
    python: float = 0.3
    closed: int = 32
    training: distil.Schedule = field(default_factory=lambda: distil.Schedule(steps=240, rate=8e-4))
    seed: int = 20_261_130

    @property
    def windows(self) -> int:
        """All that is read."""
        return max(self.closed, self.training.steps * self.training.windows)


def make(source: Path, folder: Path, store: Store, report: Callable[[str], None], making: Making | None = None) -> None:
    """Write the checkpoint into `folder`, unless what lies there was made of the same by the same code.

    Args:
        source: SmolLM2's reference folder.
        folder: the checkpoint in bfloat16: weights, config.json, tokenizer. It appears in one step, when it is whole.
        report: called with lines on what is going on.
    """
    making = making or Making()
    decided = _decided_by(making, source)
    if folder.is_dir() and read_json(folder / _MADE_FROM)["decided_by"] == decided:
        return
    teacher = {name: values.float() for name, values in load_file(source / SINGLE).items()}
    shape = Shape.of(read_json(source / "config.json"))
    windows = _unseen(_windows(making, source, store), source, store)
    report(f"cutting with {making.closed * WINDOW:,} tokens")
    with torch.no_grad():
        kept = narrow.choose_channels(list(narrow.sites(windows[: making.closed], teacher, shape)), CHANNELS)
        student = narrow.cut(windows[: making.closed], teacher, shape, kept, HEADS)
    report(f"distilling on {making.training.steps * making.training.windows * WINDOW:,} tokens")
    weights = distil.distil(student, (teacher, shape), kept, windows, making.training, _told(making, report))
    with atomic_directory(folder) as made:
        _write(weights, student[1], source, made)
        write_json(made / _MADE_FROM, {"decided_by": decided, "channels": kept.tolist()})


def _decided_by(making: Making, source: Path) -> str:
    """SHA-256 of what decides the weights on one kind of machine."""
    modules = (decoder.__file__, distil.__file__, narrow.__file__, __file__)
    pins = {name: load_datasets().datasets[name].model_dump(mode="json") for name in making.text}
    code = [sha256_of(Path(module)) for module in modules]
    versions = [metadata.version(package) for package in (*making.packages, "torch")]
    return keys.digest([code, versions, asdict(making), pins, sha256_of(source / SINGLE)])


def _windows(making: Making, source: Path, store: Store) -> Tensor:
    """Token ids, int64 [windows, tokens], of all texts in their shares, shuffled."""
    encode, generator = encoder(source), np.random.default_rng(making.seed)
    texts = [(read_text(name, store), share) for name, share in making.text.items()]
    parts = []
    for text, share in [*texts, ("\n".join(map(_python, making.packages)), making.python)]:
        ids = np.asarray(encode(text))
        ids = ids[: len(ids) // WINDOW * WINDOW].reshape(-1, WINDOW)
        parts.append(generator.permutation(ids)[: round(share * making.windows)])
    return torch.from_numpy(generator.permutation(np.concatenate(parts)))


def _python(package: str) -> str:
    """An installed package's sources, in the order of their names."""
    files = sorted(file for file in metadata.files(package) or () if file.suffix == ".py")
    return "\n".join(file.read_text() for file in files)


def _unseen(windows: Tensor, source: Path, store: Store) -> Tensor:
    """The windows without those that share a 13-gram of words with what judges."""
    decode = read_tokenizer(source).decode
    texts = np.array([decode(ids.tolist(), skip_special_tokens=False) for ids in windows], dtype=object)
    judging = [text for _, judged in held_out.texts(_JUDGES, store) for text in judged]
    return windows[_apart(texts, judging, np.arange(len(texts)))]


def _apart(texts: np.ndarray, judging: list[str], among: np.ndarray) -> np.ndarray:
    """The numbers, of those `among`, of texts that share nothing: halved until a half is clean or a single text."""
    if not overlap(texts[among], judging):
        return among
    if len(among) == 1:
        return among[:0]
    return np.concatenate([_apart(texts, judging, half) for half in np.array_split(among, 2)])


def _told(making: Making, report: Callable[[str], None]) -> Callable[[int, float, float], None]:
    def tell(step: int, kl: float, stream: float) -> None:
        if step % 10 == 0:
            report(f"step {step} of {making.training.steps}: KL {kl:.3f} nats, stream off by {stream:.3f}")

    return tell


def _write(weights: Weights, shape: Shape, source: Path, folder: Path) -> None:
    for file in source.iterdir():
        if (file.suffix == ".json" and file.name != "genai_config.json") or file.name == "LICENSE":
            shutil.copyfile(file, folder / file.name)
    config: dict[str, Any] = read_json(source / "config.json") | {
        "hidden_size": CHANNELS,
        "num_attention_heads": shape.heads,
        "num_key_value_heads": shape.kv_heads,
        "torch_dtype": "bfloat16",
    }
    write_json(folder / "config.json", config)
    # A checkpoint is bfloat16, as those that the pipeline is made for are.
    halves = {name: values.bfloat16().contiguous() for name, values in weights.items()}
    save_file(halves, folder / SINGLE, metadata={"format": "pt"})
