"""Pinned text as token windows of a model, for calibration and for judging."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
from tokenizers import Tokenizer

from pipeline.calibrate.windows import scored_windows
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.lock import dataset_path
from pipeline.config.calibration import CalibrationConfig
from pipeline.config.sources import load_datasets
from pipeline.errors import CheckpointError
from pipeline.runtime.chat import transcript


def dataset(name: str, store: Store) -> Path:
    """Path of a pinned dataset's file."""
    return dataset_path(name, load_datasets().datasets[name], store)


def read_tokenizer(folder: Path) -> Tokenizer:
    """The folder's tokenizer.json without padding and truncation, which belong to training and are never measured with.

    Raises CheckpointError when it is missing or is none.
    """
    path = folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
        tokenizer.no_padding()
        tokenizer.no_truncation()
        return tokenizer
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{path}: not readable as a tokenizer ({error}). Run the export stage again.") from None


def encoder(folder: Path) -> Callable[[str], list[int]]:
    """Text → token ids by the folder's tokenizer.json, special tokens not added."""
    tokenizer = read_tokenizer(folder)
    return lambda text: tokenizer.encode(text, add_special_tokens=False).ids


def read_text(name: str, store: Store) -> str:
    """A pinned text dataset."""
    return dataset(name, store).read_text(encoding="utf-8")


def input_ids(calibration: CalibrationConfig, folder: Path, store: Store) -> list[np.ndarray]:
    """Calibration windows, int64 [window], as many as the model in `folder` is wide (`CalibrationConfig.grown`)."""
    calibration = calibration.grown(read_architecture(folder / "config.json").widest)
    encode = encoder(folder)
    sources = [(read_text(name, store), tokens) for name, tokens in calibration.texts.items()]
    sources += [(transcript(folder, dataset(name, store)), tokens) for name, tokens in calibration.chats.items()]
    return [ids for text, tokens in sources for ids in scored_windows(text, encode, tokens, calibration.window, 0)]
