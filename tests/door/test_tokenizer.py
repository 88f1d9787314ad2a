"""Every word of the tokenizer's files is honoured by what ships, or refused with a remedy that works."""

from __future__ import annotations

import json
import shutil
import tracemalloc
import unicodedata
from collections.abc import Callable
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai
import pytest

from pipeline.calibrate.texts import encoder, read_tokenizer
from pipeline.door import tokenizer as door
from pipeline.door.parity import prove_tokenizer, stub_config
from pipeline.errors import CheckpointError
from pipeline.files import read_json, write_json
from tests.door.checkpoints import (
    VOCAB,
    added,
    before_bytes,
    begins_with,
    copy,
    make,
    model,
    put,
    split,
    token,
    without,
)

DECOMPOSED = "Tie\u0302\u0301ng Vie\u0323\u0302t"
PADDING = {
    "strategy": {"Fixed": 1024},
    "direction": "Right",
    "pad_to_multiple_of": None,
    "pad_id": 2,
    "pad_type_id": 0,
    "pad_token": "<|im_end|>",
}
TRUNCATION = {"direction": "Right", "max_length": 2, "strategy": "LongestFirst", "stride": 0}
NFC, LOWER = {"type": "NFC"}, {"type": "Lowercase"}
DIGITS = {"type": "Digits", "individual_digits": True}


def ship(source: Path, folder: Path) -> tuple[Any, Any, list[str]]:
    """What ships from a checkpoint: onnxruntime-genai's tokenizer of it, transformers', and the notes."""
    from transformers import AutoTokenizer

    folder.mkdir()
    notes = door.ship_tokenizer(source, folder, VOCAB)
    write_json(folder / "genai_config.json", stub_config())
    prove_tokenizer(folder)
    return genai.Tokenizer(str(folder)), AutoTokenizer.from_pretrained(folder), notes


HONOURED: dict[str, tuple[dict[str, Any], str]] = {
    "as it is": ({}, ""),
    "padding": ({"tokenizer": put(padding=PADDING)}, "padding is left out"),
    "truncation": ({"tokenizer": put(truncation=TRUNCATION)}, "truncation is left out"),
    "NFC": ({"tokenizer": put(normalizer=NFC)}, "must compose text to NFC"),
    "a sequence of NFC": ({"tokenizer": put(normalizer={"type": "Sequence", "normalizers": [NFC]})}, "NFC"),
    "an empty sequence": ({"tokenizer": put(normalizer={"type": "Sequence", "normalizers": []})}, ""),
    "a class of its own": ({"settings": put(tokenizer_class="MyTokenizer")}, "'MyTokenizer' is none of"),
    "code of its own": ({"settings": put(auto_map={"AutoTokenizer": ["a.B", None]})}, "never run"),
    "no class": ({"settings": without("tokenizer_class")}, "no tokenizer_class"),
    "class null": ({"settings": put(tokenizer_class=None)}, "no tokenizer_class"),
    "no settings": ({"files": {"tokenizer_config.json": None}}, "no tokenizer_class"),
    "Llama's class": ({"settings": put(tokenizer_class="LlamaTokenizer")}, "puts '<|im_start|>' around every text"),
    "Qwen2's class": ({"settings": put(tokenizer_class="Qwen2Tokenizer")}, ""),
    "GPT-2's class": ({"settings": put(tokenizer_class="GPT2Tokenizer")}, ""),
    "a BOS": ({"tokenizer": begins_with("<|im_start|>", 1)}, "puts '<|im_start|>' around every text"),
    "rstrip": ({"tokenizer": token(rstrip=True)}, ""),
    "normalized": ({"tokenizer": token(normalized=True)}, ""),
    "not special": ({"tokenizer": token(special=False)}, "changes added_tokens"),
    "special, but not listed": ({"tokenizer": lambda file: file["added_tokens"].pop()}, "changes added_tokens"),
    "cleaned up": ({"settings": put(clean_up_tokenization_spaces=True)}, "clean_up_tokenization_spaces is off"),
    "dropout": ({"tokenizer": model(dropout=0.5)}, "dropout is left out"),
    "ignore_merges": ({"tokenizer": model(ignore_merges=True)}, ""),
    "merges as strings": (
        {"tokenizer": lambda file: file["model"].update(merges=[" ".join(pair) for pair in file["model"]["merges"]])},
        "merges are written as pairs",
    ),
    "digits": ({"tokenizer": before_bytes(DIGITS)}, "Digits is written as a pattern"),
    "a pattern": ({"tokenizer": before_bytes(split(r"\p{N}{1,3}"), use_regex=False)}, ""),
    "a prefix space that the settings switch off": (
        {"tokenizer": lambda file: file["pre_tokenizer"].update(add_prefix_space=True)},
        "changes pre_tokenizer",
    ),
    "a bos_token with flags": ({"settings": put(bos_token={"__type": "AddedToken", "content": "<|im_start|>"})}, ""),
    "a key that nobody knows": ({"settings": put(frobnicate=1)}, "not known here, and not used: 'frobnicate'"),
}


@pytest.mark.parametrize("name", HONOURED)
def test_honoured(name: str, tmp_path: Path) -> None:
    changes, note = HONOURED[name]
    source = make(tmp_path / "source", **changes)
    phone, fast, notes = ship(source, tmp_path / "ships")
    assert note in " ".join(notes) and bool(note) == bool(notes)
    assert notes == list(door.read_notes(tmp_path / "ships")) == door.check_tokenizer(source, VOCAB)
    encode = encoder(tmp_path / "ships")
    for text in ("Hello <|im_end|> World  42", "Tiếng Việt", DECOMPOSED, "½ ①", ""):
        assert phone.encode(text).tolist() == fast(text)["input_ids"] == encode(text)
    assert {file.name for file in (tmp_path / "ships").iterdir()} <= {*door.SHIPPED, "genai_config.json"}


def test_what_is_right_already_ships_to_the_byte(tmp_path: Path) -> None:
    source = make(tmp_path / "source")
    ship(source, tmp_path / "ships")
    assert (tmp_path / "ships/tokenizer.json").read_bytes() == (source / "tokenizer.json").read_bytes()


def test_composed_text_has_the_ids_that_the_checkpoint_gives_it(tmp_path: Path) -> None:
    source = make(tmp_path / "source", put(normalizer=NFC))
    phone, _, _ = ship(source, tmp_path / "ships")
    trained = read_tokenizer(source).encode(DECOMPOSED).ids
    assert phone.encode(unicodedata.normalize("NFC", DECOMPOSED)).tolist() == trained
    assert phone.encode(DECOMPOSED).tolist() != trained


def test_padding_and_truncation_reach_no_measurement(tmp_path: Path) -> None:
    source = make(tmp_path / "source", put(padding=PADDING, truncation=TRUNCATION))
    text = "a text of more than two tokens"
    plain = encoder(make(tmp_path / "plain"))(text)
    assert encoder(source)(text) == plain == read_tokenizer(source).encode(text, add_special_tokens=False).ids
    ship(source, tmp_path / "ships")
    content = read_json(tmp_path / "ships/tokenizer.json")
    assert content["padding"] is None and content["truncation"] is None


def edit(name: str, change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    """A remedy: a file of the checkpoint is changed as the error says."""

    def apply(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        change(content)
        (folder / name).write_text(json.dumps(content))

    return apply


_FILE, _SETTINGS = "tokenizer.json", "tokenizer_config.json"
_drop_added = edit(_FILE, lambda file: file["added_tokens"].pop())
_no_normalizer = edit(_FILE, put(normalizer=None))
_no_first = edit(_FILE, lambda file: file["pre_tokenizer"]["pretokenizers"].pop(0))
_no_prefix = edit(_FILE, lambda file: file["pre_tokenizer"].update(add_prefix_space=False))
_plain_class = edit(_SETTINGS, put(tokenizer_class="PreTrainedTokenizerFast"))
_byte_decoder = edit(
    _FILE,
    put(decoder={"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}),
)


def _settings_prefix(folder: Path) -> None:
    _no_prefix(folder)
    edit(_SETTINGS, put(add_prefix_space=False))(folder)


NEW = {"content": "<x>", "lstrip": False, "rstrip": False, "normalized": False, "single_word": False, "special": True}
REFUSED: dict[str, tuple[dict[str, Any], str, Callable[[Path], Any]]] = {
    "id = vocab_size": ({"tokenizer": added(VOCAB)}, r"tokenizer.json: .*'<x>' has id 320, .* 320 rows", _drop_added),
    "an id far beyond": ({"tokenizer": added(5000)}, r"'<x>' has id 5,000", _drop_added),
    "an id of two added tokens": ({"tokenizer": added(2)}, r"'<x>' has id 2, as '<\|im_end\|>' has", _drop_added),
    "an id of a token of the model": ({"tokenizer": added(50)}, r"'<x>' has id 50, as 'P' has", _drop_added),
    "another id than the model's": (
        {"tokenizer": token(id=7)},
        r"'<\|im_end\|>' has id 7, as '%' has",
        edit(_FILE, token(id=2)),
    ),
    "an id of the model beyond": (
        {"tokenizer": lambda file: file["model"]["vocab"].update(zzz=999)},
        "'zzz' has id 999",
        edit(_FILE, lambda file: file["model"]["vocab"].pop("zzz")),
    ),
    "an id of the model twice": (
        {"tokenizer": lambda file: file["model"]["vocab"].update(zzz=5)},
        "'zzz' has id 5, as '#' has",
        edit(_FILE, lambda file: file["model"]["vocab"].pop("zzz")),
    ),
    "added_tokens_decoder": (
        {"settings": put(added_tokens_decoder={"320": NEW})},
        r"tokenizer_config.json: the token '<x>' has id 320",
        edit(_SETTINGS, without("added_tokens_decoder")),
    ),
    "added_tokens.json": (
        {"files": {"added_tokens.json": '{"<x>": 320}'}},
        r"added_tokens.json: the token '<x>' has id 320",
        lambda folder: (folder / "added_tokens.json").unlink(),
    ),
    "special_tokens_map.json": (
        {"files": {"special_tokens_map.json": '{"additional_special_tokens": ["<x>"]}'}},
        r"special_tokens_map.json: the token '<x>' has id 320",
        lambda folder: (folder / "special_tokens_map.json").unlink(),
    ),
    "a pad_token of its own": (
        {"settings": put(pad_token="[PAD]")},
        r"tokenizer_config.json: the token '\[PAD\]' has id 320",
        edit(_SETTINGS, without("pad_token")),
    ),
    "NFKC": ({"tokenizer": put(normalizer={"type": "NFKC"})}, "does not honour the normalizer NFKC", _no_normalizer),
    "NFD": ({"tokenizer": put(normalizer={"type": "NFD"})}, "does not honour the normalizer NFD", _no_normalizer),
    "Lowercase": ({"tokenizer": put(normalizer=LOWER)}, "does not honour the normalizer Lowercase", _no_normalizer),
    "NFC and Lowercase": (
        {"tokenizer": put(normalizer={"type": "Sequence", "normalizers": [NFC, LOWER]})},
        r"does not honour the normalizer Sequence\['NFC', 'Lowercase'\]",
        _no_normalizer,
    ),
    "Prepend": (
        {"tokenizer": put(normalizer={"type": "Prepend", "prepend": "x"})},
        "does not honour the normalizer Prepend",
        _no_normalizer,
    ),
    "Strip": (
        {"tokenizer": put(normalizer={"type": "Strip", "strip_left": True, "strip_right": True})},
        "does not honour the normalizer Strip",
        _no_normalizer,
    ),
    "lstrip": (
        {"tokenizer": token(lstrip=True)},
        r"does not honour lstrip of the added token '<\|im_end\|>'",
        edit(_FILE, token(lstrip=False)),
    ),
    "single_word": (
        {"tokenizer": token(single_word=True)},
        r"does not honour single_word of the added token '<\|im_end\|>'",
        edit(_FILE, token(single_word=False)),
    ),
    "a prefix space": (
        {
            "tokenizer": lambda file: file["pre_tokenizer"].update(add_prefix_space=True),
            "settings": put(add_prefix_space=True),
        },
        "does not honour add_prefix_space",
        _settings_prefix,
    ),
    "Whitespace": (
        {"tokenizer": before_bytes({"type": "Whitespace"})},
        "does not honour the pre_tokenizer Whitespace",
        _no_first,
    ),
    "Digits together": (
        {"tokenizer": before_bytes({"type": "Digits", "individual_digits": False})},
        "does not honour the pre_tokenizer Digits",
        _no_first,
    ),
    "a pattern that it cannot read": (
        {"tokenizer": before_bytes(split(r"\d{1,3}"), use_regex=False)},
        r"fails \(.*\) on the pre_tokenizer Sequence\['Split', 'ByteLevel'\]",
        edit(_FILE, before_bytes(split(r"\p{N}{1,3}"), use_regex=False)),
    ),
    "use_regex": (
        {"tokenizer": lambda file: file["pre_tokenizer"].update(use_regex=False)},
        "does not honour use_regex: false",
        edit(_FILE, lambda file: file["pre_tokenizer"].update(use_regex=True)),
    ),
    "no decoder": ({"tokenizer": put(decoder=None)}, r"the decoder \(none\)", _byte_decoder),
    "another decoder": (
        {"tokenizer": put(decoder={"type": "Metaspace", "replacement": "▁", "prepend_scheme": "always"})},
        r"the decoder \(Metaspace\)",
        _byte_decoder,
    ),
    "split_special_tokens": (
        {"settings": put(split_special_tokens=True)},
        "split_special_tokens is True",
        edit(_SETTINGS, without("split_special_tokens")),
    ),
    "a class of other files": ({"settings": put(tokenizer_class="BertTokenizer")}, "cannot read the", _plain_class),
    "a class that is no name": ({"settings": put(tokenizer_class=5)}, "tokenizer_class is 5", _plain_class),
    "a bos_token that is no text": (
        {"settings": put(bos_token=5)},
        "bos_token",
        edit(_SETTINGS, put(bos_token="<|im_start|>")),
    ),
    "settings that are a list": (
        {"files": {"tokenizer_config.json": "[1]"}},
        r"holds \[1\], not an object",
        make,
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_a_remedy_that_works(name: str, tmp_path: Path) -> None:
    changes, message, remedy = REFUSED[name]
    source = make(tmp_path / "source", **changes)
    with pytest.raises(CheckpointError, match=message) as refused:
        door.check_tokenizer(source, VOCAB)
    assert str(source) in str(refused.value) and "/tmp/tmp" not in str(refused.value).replace(str(tmp_path), "")
    mended = copy(source, tmp_path / "mended")
    remedy(mended)
    door.check_tokenizer(mended, VOCAB)


@pytest.mark.parametrize(
    "text", ["[" * 200_000, '{"a":"' + "x" * (45 << 20) + '"}', '{"a":[' + "[]," * 3_000_000 + "1]}", "{", '"x"', "{}"]
)
def test_a_hostile_file_is_refused_in_little_memory(text: str, tmp_path: Path) -> None:
    source = make(tmp_path / "source", files={"tokenizer.json": text})
    tracemalloc.start()
    try:
        with pytest.raises(CheckpointError, match=r"tokenizer\.json: not readable as a fast tokenizer"):
            door.check_tokenizer(source, VOCAB)
        assert tracemalloc.get_traced_memory()[1] < 100 << 20
    finally:
        tracemalloc.stop()


def test_without_tokenizer_json_the_remedy_is_named(tmp_path: Path) -> None:
    source = make(tmp_path / "source", files={"tokenizer.json": None})
    with pytest.raises(CheckpointError, match="save_pretrained writes one"):
        door.check_tokenizer(source, VOCAB)
    shutil.copy(make(tmp_path / "other") / "tokenizer.json", source)
    door.check_tokenizer(source, VOCAB)
