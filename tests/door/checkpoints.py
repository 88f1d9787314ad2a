"""The tiny tokenizer with one thing changed, as checkpoints have it."""

from __future__ import annotations

import functools
import json
import shutil
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from tests import tiny

VOCAB = 320
Change = Callable[[dict[str, Any]], object]


@functools.cache
def _base() -> Path:
    folder = Path(tempfile.mkdtemp())
    tiny.make_tokenizer(folder, VOCAB)
    return folder


def make(
    folder: Path,
    tokenizer: Change = lambda content: None,
    settings: Change = lambda content: None,
    files: Mapping[str, str | None] | None = None,
) -> Path:
    """Write the tokenizer's files; `files` replaces one by its text, or removes it (None)."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, change in (("tokenizer.json", tokenizer), ("tokenizer_config.json", settings)):
        content = json.loads((_base() / name).read_text(encoding="utf-8"))
        change(content)
        (folder / name).write_text(json.dumps(content, ensure_ascii=False), encoding="utf-8")
    for name, text in (files or {}).items():
        (folder / name).unlink() if text is None else (folder / name).write_text(text, encoding="utf-8")
    return folder


def put(**values: Any) -> Change:
    """Set top-level keys."""
    return lambda content: content.update(values)


def without(key: str) -> Change:
    """Remove a top-level key."""
    return lambda content: content.pop(key)


def model(**values: Any) -> Change:
    """Set keys of the BPE model."""
    return lambda content: content["model"].update(values)


def token(content: str = tiny.SPECIAL[2], **values: Any) -> Change:
    """Set keys of an added token."""
    return lambda file: next(item for item in file["added_tokens"] if item["content"] == content).update(values)


def added(number: int, content: str = "<x>") -> Change:
    """One more added token."""
    return lambda file: file["added_tokens"].append({**file["added_tokens"][0], "id": number, "content": content})


def before_bytes(*members: dict[str, Any], use_regex: bool = True) -> Change:
    """A pre_tokenizer of `members` and ByteLevel."""
    level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": use_regex}
    return put(pre_tokenizer={"type": "Sequence", "pretokenizers": [*members, level]})


def split(pattern: str) -> dict[str, Any]:
    """A pre_tokenizer that cuts text by a regular expression."""
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def begins_with(name: str, number: int) -> Change:
    """A post_processor that puts a token before every text."""
    first = [{"SpecialToken": {"id": name, "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}]
    pair = [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}]
    tokens = {name: {"id": name, "ids": [number], "tokens": [name]}}
    return put(post_processor={"type": "TemplateProcessing", "single": first, "pair": pair, "special_tokens": tokens})


def copy(source: Path, folder: Path) -> Path:
    """A copy to be changed."""
    return Path(shutil.copytree(source, folder))
