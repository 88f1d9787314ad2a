"""Held-out text of four kinds, as a model reads it. Quantization is never tuned on it (`pipeline.tasks.unseen`).

One kind does not speak for the others: SmolLM2's q4 diverges by 0.16 nats a token on prose, 0.12 on chat, 0.13 on code,
0.40 on Vietnamese and 0.22 on Chinese (smoke suite).
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Iterator, Mapping
from itertools import chain
from pathlib import Path

import numpy as np

from pipeline.calibrate.texts import dataset, encoder
from pipeline.calibrate.windows import scored_windows
from pipeline.checkpoint.blobs import Store
from pipeline.config.sources import load_datasets
from pipeline.runtime.chat import rendered

_MOST, _PIECES = 128_000, 16  # characters that are tokenized of a text, in so many pieces
CHAT = "chat"
KINDS = ("prose", CHAT, "code", "languages")
"""Kinds of text. A chat is written by the model's own template; `languages` are others than English."""
Wanted = Mapping[str, Mapping[str, int]]
"""Windows by dataset, by kind."""


def pins(wanted: Wanted) -> list[str]:
    """The entries of configs/datasets.yaml that hold these texts. A chat's questions have one of their own."""
    return [*(name for texts in wanted.values() for name in texts), *map(_questions, wanted.get(CHAT, ()))]


def scored_ids(wanted: Wanted, window: int, folder: Path, store: Store) -> list[np.ndarray]:
    """Windows, int64 [window], kind by kind; each scores window − 1 positions."""
    encode, found = encoder(folder), []
    for kind, texts in wanted.items():
        for name, count in texts.items():
            text = rendered(folder, _conversations(name, store)) if kind == CHAT else _text(name, store)
            found += scored_windows(_excerpt(text), encode, count * (window - 1), window)
    return found


def texts(wanted: Wanted, store: Store) -> Iterator[tuple[str, list[str]]]:
    """What judges, by dataset: a text, or the messages of a chat."""
    for kind, named in wanted.items():
        for name in named:
            yield name, [*chain(*_conversations(name, store))] if kind == CHAT else [_text(name, store)]


def _excerpt(text: str) -> str:
    """At most `_MOST` characters, in pieces at even distances: a novel takes longer to tokenize than to judge."""
    if len(text) <= _MOST:
        return text
    piece, last = _MOST // _PIECES, _PIECES - 1
    starts = [number * (len(text) - piece) // last for number in range(_PIECES)]
    return "\n".join(text[start : start + piece] for start in starts)


def _text(name: str, store: Store) -> str:
    """A pinned file's text: the file, or in JSON a list of chapters or what `raw_text` holds."""
    data = dataset(name, store).read_bytes()
    text = (gzip.decompress(data) if data.startswith(b"\x1f\x8b") else data).decode("utf-8")
    if ".json" not in load_datasets().datasets[name].member:
        return text
    found = json.loads(text)
    return found["raw_text"] if isinstance(found, dict) else "\n".join(found)


def _questions(name: str) -> str:
    return f"{name}-questions"


def _conversations(name: str, store: Store) -> list[list[str]]:
    """Messages in turns, the user's first, from files of MT-bench: https://github.com/lm-sys/FastChat, llm_judge."""

    def rows(pin: str) -> Iterator[dict]:
        return map(json.loads, filter(None, dataset(pin, store).read_text(encoding="utf-8").splitlines()))

    asked = {row["question_id"]: row["turns"] for row in rows(_questions(name))}
    turns = ((asked[row["question_id"]], row["choices"][0]["turns"]) for row in rows(name))
    return [[message for pair in zip(*both, strict=True) for message in pair] for both in turns]
