"""Where a model stops and how it is sampled, by generation_config.json, config.json, the tokenizer and the template.

generation_keys.yaml says what each key means here. The model's entry lays `generation` over the file, so that whatever
is refused can be set there.
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pipeline.calibrate.texts import read_tokenizer
from pipeline.checkpoint.architecture import read_config
from pipeline.checkpoint.config_keys import read_table
from pipeline.checkpoint.untrusted import shown
from pipeline.config.models import ModelConfig
from pipeline.config.typed_yaml import known_name
from pipeline.errors import CheckpointError, EvaluationError
from pipeline.graph.genai import Generation
from pipeline.runtime.chat import rendered

_TABLE, _NEUTRAL = read_table(Path(__file__).with_name("generation_keys.yaml"))
_IDS = _TABLE["ids"].split()
KEYS = frozenset([*_TABLE["carried"], *_IDS, *_NEUTRAL, *_TABLE["harmless"].split()])
"""Every key of generation_config.json that is known here."""
_KINDS = {"boolean": (bool,), "integer": (int,), "number": (int, float)}
_REPLY = "A reply, whose end is looked for."


def read_generation(folder: Path, entry: ModelConfig, vocab: int, shipped: Path | None = None) -> Generation:
    """What `folder` and the model's entry say about generation, for a vocabulary of `vocab` tokens.

    `shipped` is the folder of the tokenizer that ships, if another.

    Raises:
        CheckpointError: a value that onnxruntime-genai cannot honour, an id that is none, or nothing says where the
            model stops.
    """
    where = folder / "generation_config.json"
    config = read_config(folder / "config.json")
    given = read_config(where) if where.exists() else None
    # Without that file transformers takes such keys from config.json.
    values = {key: config[key] for key in KEYS & config.keys()} if given is None else given
    where = folder / "config.json" if given is None else where
    for key in entry.generation:
        known_name(key, sorted(KEYS), "`generation` of the model's entry", "generation_config.json's keys")
    values = {key: value for key, value in (values | entry.generation).items() if value is not None}
    reader = _Reader(values, where, vocab)
    if not (stops := _stops(reader, shipped or folder, entry, config)):
        raise CheckpointError(
            f"{folder}: neither generation_config.json nor config.json has an eos_token_id, and neither tokenizer nor "
            f"chat template names an end: generation would never stop. Set `extra_stop_ids` in the model's entry."
        )
    bos, pad = (
        next(iter(reader.ids(key, values.get(key, config.get(key)), strict=False)), stops[0])
        for key in ("bos_token_id", "pad_token_id")
    )
    search = {"do_sample": False, "temperature": 1.0, "top_k": 50, "top_p": 1.0, **reader.carried()}
    search["top_k"] = min(search["top_k"] or vocab, vocab)  # 0 is "all", which onnxruntime-genai takes for greedy
    if unknown := sorted(values.keys() - KEYS):
        reader.notes.append(f"{where.name} has keys that are unknown here and change nothing: {', '.join(unknown)}")
    return Generation(tuple(stops), bos, pad, search, tuple(reader.notes))


class _Reader:
    """The values of a generation_config.json with what the entry lays over them."""

    def __init__(self, values: dict[str, Any], path: Path, vocab: int):
        self.values, self.path, self.vocab = values, path, vocab
        self.notes: list[str] = []

    def wrong(self, key: str, value: Any, needed: str) -> CheckpointError:
        """The error that `key` is not what is needed."""
        return CheckpointError(
            f"{self.path}: {key} is {shown(value)}{needed}. Set `generation: {{{key}: null}}` in the model's entry (or "
            f"another value), which is laid over the file; null is its default."
        )

    def carried(self) -> dict[str, Any]:
        """Values that genai_config.json takes over. Raises CheckpointError for one that it, or genai, cannot take."""
        found = {}
        for key, value in self.values.items():
            if key in _TABLE["carried"]:
                if key == "early_stopping" and value == "never":  # of beam search, which is refused below
                    continue
                kind, *limits = _TABLE["carried"][key]
                if type(value) not in _KINDS[kind] or (limits and not limits[0] <= value <= limits[1]):
                    within = f" from {limits[0]:,} to {limits[1]:,}" if limits else ""
                    raise self.wrong(key, value, f"; a{'n' * (kind[0] == 'i')} {kind}{within} is needed")
                found[key] = value
            elif key in _NEUTRAL and value not in _NEUTRAL[key]:
                raise self.wrong(key, value, ", which onnxruntime-genai cannot do")
        return found

    def ids(self, key: str, value: Any, strict: bool = True) -> Iterator[int]:
        """Token ids of a value: one, a list of them, or none (null, or -1).

        Those outside the vocabulary are refused if `strict`, else left out with a note.
        """
        for token in value if isinstance(value, list) else [value]:
            if token is None or token == -1:
                continue
            if type(token) is not int or token < 0:
                raise self.wrong(key, token, ", not a token id")
            if token < self.vocab:
                yield token
            elif strict:
                raise self.wrong(key, token, f", beyond the {self.vocab:,} ids of the vocabulary")
            else:
                self.notes.append(f"left out {key} {token}: the vocabulary has {self.vocab:,} ids")


def _stops(reader: _Reader, folder: Path, entry: ModelConfig, config: dict[str, Any]) -> list[int]:
    """Every id that ends a text, once: by the files, the tokenizer, the template's end of turn, the entry."""
    named = [
        reader.values.get("eos_token_id"),
        None if "eos_token_id" in entry.generation else config.get("eos_token_id"),
    ]
    found = [token for value in named for token in reader.ids("eos_token_id", value)]
    found += [token for token in _spoken_ends(folder) if token < reader.vocab]
    if beyond := [token for token in entry.extra_stop_ids if not 0 <= token < reader.vocab]:
        what = f"extra_stop_ids of the model's entry has {beyond[0]}, and the vocabulary ids below {reader.vocab:,}"
        raise CheckpointError(f"{folder}: {what}. Correct it there.")
    found += entry.extra_stop_ids
    return list(dict.fromkeys(found))


def _spoken_ends(folder: Path) -> list[int]:
    """Ids of the tokenizer's eos_token, and of what the chat template writes behind a reply."""
    tokenizer, path = read_tokenizer(folder), folder / "tokenizer_config.json"
    named = (read_config(path) if path.exists() else {}).get("eos_token")
    texts = [named.get("content") if isinstance(named, dict) else named]
    try:
        behind = rendered(folder, [("A question.", _REPLY)]).partition(_REPLY)[2].lstrip()
    except EvaluationError:  # a template that cannot be rendered is refused where it is proven
        behind = ""
    added = sorted((token.content for token in tokenizer.get_added_tokens_decoder().values()), key=len)
    texts += [content for content in added if behind.startswith(content)][-1:]
    ids = (tokenizer.token_to_id(text) for text in texts if isinstance(text, str))
    return [token for token in ids if token is not None]
