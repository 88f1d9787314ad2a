"""The tokenizer's files at the door: read and checked, resolved as transformers resolves them, and written to ship.

A checkpoint says in up to six files how text becomes tokens, and two readers disagree about which of them counts. What
transformers makes of all of them ships as two: tokenizer.json, and tokenizer_config.json with the chat template.
"""

from __future__ import annotations

import inspect
import json
import tempfile
import unicodedata
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from pipeline.checkpoint.untrusted import open_regular, parse_json, shown
from pipeline.door import keys
from pipeline.door.parity import (
    LOCAL,
    SETTINGS,
    TOKENIZER,
    genai_render,
    keeps_a_space,
    open_genai,
    prove_tokenizer,
    renders_alike,
    stub_config,
    texts,
    transformers_render,
)
from pipeline.door.template import NOW, rewrites, without_date
from pipeline.errors import CheckpointError
from pipeline.files import read_json, write_bytes, write_json

MAX_TOKENIZER = 40 << 20
"""Bytes of tokenizer.json: Gemma 3's, the largest that we know, has 33 MB."""
MAX_NESTED = 2_000_000
"""Lists and objects in it: each takes up to 64 bytes of memory. Gemma 3's has 0.5 million."""
_BESIDE = ("special_tokens_map.json", "added_tokens.json", "chat_template.json")
_JINJA = "chat_template.jinja"
_SHIPPED_CLASS = "PreTrainedTokenizerFast"
NOTES = "tokenizer_notes.json"
"""A list of sentences for the model card, where there are any."""
SHIPPED = (TOKENIZER, SETTINGS, NOTES)
_PLAIN = f'Set "tokenizer_class" to "{_SHIPPED_CLASS}"'
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
"""How ByteLevel cuts text with `use_regex`."""
_NAMED = ("bos_token", "eos_token", "unk_token", "pad_token")


def check_tokenizer(folder: Path, vocab: int) -> list[str]:
    """Whether a checkpoint's tokenizer can ship: it is made ready and proven in a folder that is thrown away.

    Returns:
        what `ship_tokenizer` notes.

    Raises:
        CheckpointError: as `ship_tokenizer` and `prove_tokenizer`.
    """
    with tempfile.TemporaryDirectory() as scratch, _said_of(scratch, folder):
        notes = ship_tokenizer(folder, Path(scratch), vocab)
        write_json(Path(scratch) / "genai_config.json", stub_config())
        prove_tokenizer(Path(scratch))
    return notes


def ship_tokenizer(source: Path, folder: Path, vocab: int) -> list[str]:
    """Write the tokenizer of the checkpoint in `source` into `folder` as it ships: `SHIPPED`.

    Args:
        vocab: rows of the embedding.

    Returns:
        one sentence for each thing in which it differs from the checkpoint's, and what an app must know of it.

    Raises:
        CheckpointError: a file is missing, malformed or too large; a token has no row in the embedding, or two have one
            id; transformers cannot read the files; the chat template cannot be used.
    """
    raw, content, settings = _read_all(source)
    _check_ids(source, content, vocab)
    resolved, notes = _resolve(source, content, settings)
    theirs = json.loads(resolved.backend_tokenizer.to_str())
    _check_ids(source, theirs, vocab)
    if changed := _changed(raw, theirs):
        content = theirs
        notes.append(f"{SETTINGS} changes {', '.join(changed)} of {TOKENIZER}: what transformers makes of both ships.")
    honoured = list(_without_what_is_not_honoured(content, resolved))
    if changed or honoured:
        raw = json.dumps(content, ensure_ascii=False).encode()
    with tempfile.TemporaryDirectory() as scratch, _said_of(scratch, source):
        made = Path(scratch)
        write_bytes(made / TOKENIZER, raw)
        shipped = _settings(content, resolved)
        write_json(made / SETTINGS, shipped)
        write_json(made / "genai_config.json", stub_config())
        phone = open_genai(made)
        template, said = _template(source, resolved, phone)
        notes += [*honoured, *said, *_decoding(made, resolved, phone)]
        _prove_same(source, resolved, made)
    write_bytes(folder / TOKENIZER, raw)
    write_json(folder / SETTINGS, shipped if template is None else shipped | {"chat_template": template})
    if notes:
        write_json(folder / NOTES, notes)
    return notes


@contextmanager
def _said_of(scratch: str, folder: Path) -> Iterator[None]:
    """An error about a file in `scratch` is one about the file in `folder` that it was made from."""
    try:
        yield
    except CheckpointError as error:
        said = str(error).replace(scratch, str(folder))
        if (folder / _JINJA).exists():
            said = said.replace(f"{SETTINGS}: chat_template", _JINJA)
        raise CheckpointError(said) from None


def read_notes(folder: Path) -> tuple[str, ...]:
    """What `ship_tokenizer` noted about the tokenizer in `folder`."""
    path = folder / NOTES
    return tuple(read_json(path)) if path.exists() else ()


# --- reading ---------------------------------------------------------------------------------------------------------


def _read(path: Path) -> dict[str, Any] | None:
    if not path.exists():
        return None
    try:
        with open_regular(path) as file:
            found = parse_json(file.read((2 << 20) + 1))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({error}). Use the file that its publisher has.") from None
    if not isinstance(found, dict):
        raise CheckpointError(f"{path}: holds {shown(found)}, not an object. Use the file that its publisher has.")
    return found


def _read_all(source: Path) -> tuple[bytes, dict[str, Any], dict[str, Any]]:
    """tokenizer.json as bytes and parsed, and tokenizer_config.json, without the keys that nobody knows."""
    path = source / TOKENIZER
    try:
        with open_regular(path) as file:
            raw = file.read(MAX_TOKENIZER + 1)
        if raw.count(b"[") + raw.count(b"{") > MAX_NESTED:
            raise ValueError(f"more than {MAX_NESTED:,} lists and objects")
        content = parse_json(raw, MAX_TOKENIZER)
        Tokenizer.from_str(raw.decode())
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(
            f"{path}: not readable as a fast tokenizer ({error}). The source must have tokenizer.json; transformers' "
            f"AutoTokenizer(...).save_pretrained writes one for a model that only has a slow tokenizer."
        ) from None
    for name in _BESIDE:
        _read(source / name)
    return raw, content, _read(source / SETTINGS) or {}


def _check_ids(source: Path, content: dict[str, Any], vocab: int) -> None:
    """Every token has an id of its own below `vocab`. Raises CheckpointError that names one that has not."""
    known = content["model"]["vocab"]
    pairs = list(known.items()) if isinstance(known, dict) else [(item[0], k) for k, item in enumerate(known)]
    added = [(token["content"], token["id"]) for token in content.get("added_tokens") or []]
    beyond = [(token, number) for token, number in pairs + added if number >= vocab]
    remedy = f"Leave it out of the file, or put the files of one model together. {LOCAL}."
    if beyond:
        count = f"{len(set(beyond)):,} of {len(set(pairs + added)):,} tokens have none"
        token, number = max(beyond, key=lambda pair: pair[1])
        raise CheckpointError(
            f"{_file_of(source, token)}: the token {shown(token)} has id {number:,}, and the embedding has {vocab:,} "
            f"rows (vocab_size of config.json): {count}. {remedy}"
        )
    owners: dict[int, str] = {}
    ids = dict(pairs)
    for token, number in pairs + added:
        if (owner := owners.setdefault(number, token)) != token or ids.get(token, number) != number:
            other = f"as {shown(owner)} has" if owner != token else f"and {ids[token]:,} too"
            where = _file_of(source, token)
            raise CheckpointError(f"{where}: the token {shown(token)} has id {number:,}, {other}. {remedy}")


def _file_of(source: Path, token: str) -> Path:
    """The file of the checkpoint that names a token."""
    spelled = {json.dumps(token), json.dumps(token, ensure_ascii=False)}
    for path in (source / name for name in (TOKENIZER, SETTINGS, *_BESIDE)):
        if path.exists() and any(spelling in path.read_text(encoding="utf-8") for spelling in spelled):
            return path
    return source / SETTINGS


# --- as transformers resolves it -------------------------------------------------------------------------------------


def _resolve(source: Path, content: dict[str, Any], settings: dict[str, Any]) -> tuple[Any, list[str]]:
    """transformers' tokenizer of the checkpoint, and notes about what it was made with."""
    for key, allowed in keys.ONLY.items():
        if key in settings and settings[key] not in allowed:
            raise CheckpointError(
                f"{source / SETTINGS}: {key} is {shown(settings[key])}; onnxruntime-genai knows "
                f"{' or '.join(map(repr, allowed))} only. Leave the key out. {LOCAL}."
            )
    notes = []
    if unknown := sorted(settings.keys() - keys.HONOURED - keys.HARMLESS):
        notes.append(f"{SETTINGS} has keys that are not known here, and not used: {', '.join(map(shown, unknown))}.")
    name = settings.get("tokenizer_class")
    if name is not None and not isinstance(name, str):
        raise CheckpointError(f"{source / SETTINGS}: tokenizer_class is {shown(name)}. {_PLAIN}. {LOCAL}.")
    kind = _class(name)
    if kind.__name__ == _SHIPPED_CLASS and name not in (_SHIPPED_CLASS, "PreTrainedTokenizer"):
        said = f"tokenizer_class {shown(name)} is none of transformers' fast ones" if name else "no tokenizer_class"
        notes.append(f"{SETTINGS}: {said}: {TOKENIZER} alone says how text is cut.")
    if settings.get("auto_map"):
        notes.append(f"{SETTINGS}: auto_map names code of the checkpoint, which is never run.")
    try:
        named = settings.keys() | (_read(source / "special_tokens_map.json") or {}).keys()
        resolved = kind.from_pretrained(source, **_without_defaults(kind, named, content))
    except Exception as error:  # whatever its constructors meet in the files
        raise CheckpointError(
            f"{source / SETTINGS}: transformers cannot read the tokenizer ({type(error).__name__}: {error}). Correct "
            f"the key that it names; where it names none, {_PLAIN[0].lower()}{_PLAIN[1:]}. {LOCAL}."
        ) from None
    resolved.backend_tokenizer.no_padding()
    resolved.backend_tokenizer.no_truncation()
    return resolved, notes


def _without_defaults(kind: Any, named: Collection[str], content: dict[str, Any]) -> dict[str, None]:
    """Special tokens that only the class names and the vocabulary lacks: transformers would add them behind it."""
    parameters = inspect.signature(kind.__init__).parameters
    defaults = {key: parameters[key].default for key in _NAMED if key in parameters and key not in named}
    vocabulary = {*content["model"]["vocab"], *(token["content"] for token in content["added_tokens"])}
    return {key: None for key, token in defaults.items() if isinstance(token, str) and token not in vocabulary}


def _class(name: object) -> Any:
    """The fast class that AutoTokenizer would take for `tokenizer_class`; the plain one where it has none."""
    import transformers
    from transformers import PreTrainedTokenizerFast

    for candidate in (f"{name}Fast", name) if isinstance(name, str) and name.isidentifier() else ():
        found = getattr(transformers, candidate, None)
        if isinstance(found, type) and issubclass(found, PreTrainedTokenizerFast):
            return found
    return PreTrainedTokenizerFast


def _changed(raw: bytes, theirs: dict[str, Any]) -> list[str]:
    """Keys of tokenizer.json that other files of the checkpoint change, as far as they reach a token's id."""
    ours = json.loads(Tokenizer.from_str(raw.decode()).to_str())
    kept = theirs.keys() - {"padding", "truncation", "post_processor"}
    return sorted(key for key in kept if ours.get(key) != theirs[key])


def _without_what_is_not_honoured(content: dict[str, Any], resolved: Any) -> Iterator[str]:
    """Take out of tokenizer.json what onnxruntime-genai leaves out too; a sentence for each."""
    for key in ("padding", "truncation"):
        if content.get(key):
            content[key] = None
            yield f"{TOKENIZER}: {key} is left out: it is never applied to a text."
    normalizer = content.get("normalizer") or {}
    if {item.get("type") for item in normalizer.get("normalizers", [normalizer])} == {"NFC"}:
        content["normalizer"] = None
        yield (
            f"{TOKENIZER}: onnxruntime-genai does not apply the normalizer NFC, so it is left out, and everything was "
            f"measured without it: an app must compose text to NFC before it encodes it."
        )
    if _spelled_out(content):
        yield f"{TOKENIZER}: the pre_tokenizer Digits is written as a pattern, which onnxruntime-genai honours."
    merges = content["model"].get("merges") or [[]]
    if isinstance(merges[0], str):
        content["model"]["merges"] = [merge.split(" ") for merge in merges]
        yield (
            f"{TOKENIZER}: merges are written as pairs: of those written as strings, onnxruntime-genai 0.18 takes some "
            f"in another order."
        )
    if content["model"].get("dropout"):
        content["model"]["dropout"] = None
        yield f"{TOKENIZER}: dropout is left out: it cuts text at random, for training."
    encode = resolved.backend_tokenizer.encode
    around = encode("a", add_special_tokens=True).tokens
    if added := [token for token in around if token not in encode("a", add_special_tokens=False).tokens]:
        content["post_processor"] = None
        yield (
            f"{TOKENIZER}: the post_processor puts {', '.join(map(shown, added))} around every text. onnxruntime-genai "
            f"does not, and nothing was measured with it: only the chat template writes it."
        )


def _settings(content: dict[str, Any], resolved: Any) -> dict[str, Any]:
    """tokenizer_config.json as it ships, but for the chat template."""
    spaced = {"add_prefix_space": True} if (content.get("pre_tokenizer") or {}).get("add_prefix_space") else {}
    named = {key: str(token) for key in _NAMED if (token := getattr(resolved, key, None)) is not None}
    return {"tokenizer_class": _SHIPPED_CLASS, **named, **spaced, "clean_up_tokenization_spaces": False}


def _spelled_out(content: dict[str, Any]) -> bool:
    """Write single Digits, and what follows them, as patterns that onnxruntime-genai honours; whether there were."""
    members = (content.get("pre_tokenizer") or {}).get("pretokenizers") or []
    if not any(member.get("type") == "Digits" and member.get("individual_digits") for member in members):
        return False
    written = []
    for member in members:
        if member.get("type") == "Digits":
            written.append(_split(r"\p{N}"))
        elif member.get("type") == "ByteLevel" and member.get("use_regex", True):
            written += [_split(_GPT2), {**member, "use_regex": False}]
        else:
            written.append(member)
    content["pre_tokenizer"]["pretokenizers"] = written
    return True


def _split(pattern: str) -> dict[str, Any]:
    return {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False}


def _prove_same(source: Path, resolved: Any, made: Path) -> None:
    """What ships cuts the corpus as the checkpoint does, composed to NFC where an app must do that."""
    if hasattr(resolved.backend_tokenizer.model, "dropout"):
        resolved.backend_tokenizer.model.dropout = None
    ships = Tokenizer.from_file(str(made / TOKENIZER))
    composes = resolved.backend_tokenizer.normalizer is not None and ships.normalizer is None
    for name, text in texts(str(token) for token in resolved.added_tokens_decoder.values()):
        expected = resolved.encode(text, add_special_tokens=False)
        given = unicodedata.normalize("NFC", text) if composes else text
        if ships.encode(given, add_special_tokens=False).ids != expected:
            raise CheckpointError(
                f"{source / TOKENIZER}: as it would ship, {name} is not cut as transformers cuts it: {shown(text)}. "
                f"Use a tokenizer.json that is laid out as its family's is. {LOCAL}."
            )


def _decoding(made: Path, resolved: Any, phone: Any) -> Iterator[str]:
    from transformers import PreTrainedTokenizerFast

    if resolved.clean_up_tokenization_spaces:
        yield f"{SETTINGS}: clean_up_tokenization_spaces is off: text is decoded as the model wrote it."
    if keeps_a_space(phone, PreTrainedTokenizerFast.from_pretrained(made)):
        yield f"{TOKENIZER}: decoded text begins with a space that transformers takes away; an app may do so too."


# --- the chat template -----------------------------------------------------------------------------------------------


def _template(source: Path, resolved: Any, phone: Any) -> tuple[str | None, list[str]]:
    """The chat template that ships, and notes; None without one.

    The checkpoint's own if onnxruntime-genai renders it as transformers does, else the first of its `rewrites` that it
    does. Where none is, the checkpoint's own: `prove_tokenizer` says what differs.
    """
    from jinja2 import TemplateError

    given, notes = _chosen(source, resolved)
    if given is None:
        return None, notes
    try:
        given, said = _undated(source, given, resolved)
        candidates = [given, *rewrites(given)]
    except TemplateError as error:
        raise CheckpointError(f"{source}: the chat template is no Jinja: {error}. Correct it. {LOCAL}.") from None
    want = transformers_render(resolved, given)
    for candidate in candidates:
        readers = [genai_render(phone, candidate)]
        readers += [transformers_render(resolved, candidate)] * (candidate != given)
        if all(renders_alike(given, reader, want) is None for reader in readers):
            said += ["The chat template is written otherwise, so that onnxruntime-genai renders it alike."] * (
                candidate != given
            )
            return candidate, notes + said
    return given, notes + said


def _chosen(source: Path, resolved: Any) -> tuple[str | None, list[str]]:
    """The template that transformers takes for a chat without tools."""
    given = resolved.chat_template
    if isinstance(given, dict):
        names = ", ".join(map(shown, sorted(given)))
        if "default" not in given:
            raise CheckpointError(
                f"{source}: chat_template has the names {names} and no 'default', which transformers and phones take. "
                f"Name one of them so. {LOCAL}."
            )
        return given["default"], [f"Of the chat templates {names}, 'default' ships."]
    if given is None and (other := _read(source / "chat_template.json")):
        given = other.get("chat_template")
        return given, ["chat_template.json, which transformers reads for processors only, is the chat template."]
    if given is not None and not isinstance(given, str):
        raise CheckpointError(f"{source / SETTINGS}: chat_template is {shown(given)}, not a text. Correct it. {LOCAL}.")
    return given, []


def _undated(source: Path, given: str, resolved: Any) -> tuple[str, list[str]]:
    """The template without today's date. Raises CheckpointError where it has no other."""
    if NOW not in given:
        return given, []
    fixed = without_date(given)
    never = fixed.replace(f"{NOW}(", "raise_exception(")
    if renders_alike(fixed, transformers_render(resolved, fixed), transformers_render(resolved, never)):
        raise CheckpointError(
            f"{source}: the chat template writes today's date ({NOW}), so that no measurement could be made again. "
            f"Write a fixed date in its place. {LOCAL}."
        )
    return fixed, ["The chat template writes the fixed date that it has, not today's."]
