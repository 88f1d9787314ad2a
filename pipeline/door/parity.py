"""One tokenizer, two readers: onnxruntime-genai, which runs on phones, and transformers, which everything is measured
with, must cut, join and render the fixed corpus alike.

Special tokens that a post-processor would put around a text (a BOS) are left out on both sides: onnxruntime-genai never
adds them, and neither does any measurement. No model is loaded: the tokenizer's files and genai_config.json are enough.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml
from tokenizers import Tokenizer

from pipeline.checkpoint.untrusted import shown
from pipeline.door.template import Render, literals
from pipeline.errors import CheckpointError

TOKENIZER, SETTINGS = "tokenizer.json", "tokenizer_config.json"
LOCAL = "Change it in a copy of the checkpoint on this machine, and name that folder as the model's source"
_BYTES = {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True}
_LITERALS = 40
"""Texts of a template that are put into messages."""
Chat = list[dict[str, str]]


def stub_config() -> dict[str, Any]:
    """A genai_config.json with which onnxruntime-genai reads a tokenizer where there is no model yet."""
    names = {"inputs": {"input_ids": "input_ids"}, "outputs": {"logits": "logits"}}
    counts = ("head_size", "hidden_size", "num_attention_heads", "num_hidden_layers", "num_key_value_heads")
    decoder = {"filename": "model.onnx", **names, **dict.fromkeys(counts, 1)}
    ids = {"bos_token_id": 0, "eos_token_id": 0, "pad_token_id": 0, "vocab_size": 1, "context_length": 1}
    return {"model": {"type": "llama", **ids, "decoder": decoder}, "search": {"max_length": 1}}


def open_genai(folder: Path) -> Any:
    """onnxruntime-genai's tokenizer of a folder. Raises CheckpointError when it refuses the files."""
    import onnxruntime_genai as genai

    try:
        return genai.Tokenizer(str(folder))
    except Exception as error:  # the bindings raise RuntimeError and their own types
        raise CheckpointError(
            f"{folder / TOKENIZER}: onnxruntime-genai cannot read the tokenizer ({_line(error)}). Use a "
            f"tokenizer.json of type BPE whose pre_tokenizer has the patterns of its family. {LOCAL}."
        ) from None


def genai_render(tokenizer: Any, template: str | None = None) -> Render:
    """Chats by onnxruntime-genai; `template` in place of the folder's own."""
    given = {} if template is None else {"template_str": template}
    return lambda chat, reply: tokenizer.apply_chat_template(json.dumps(chat), add_generation_prompt=reply, **given)


def transformers_render(tokenizer: Any, template: str | None = None) -> Render:
    """Chats by transformers; `template` in place of the tokenizer's own."""
    return lambda chat, reply: tokenizer.apply_chat_template(
        chat, chat_template=template, tokenize=False, add_generation_prompt=reply
    )


def prove_tokenizer(folder: Path) -> None:
    """Compare both readers over the folder that ships.

    Raises:
        CheckpointError: one of them refuses the files, or the first text or chat that they treat differently.
    """
    from transformers import PreTrainedTokenizerFast

    theirs = PreTrainedTokenizerFast.from_pretrained(folder)
    ours = open_genai(folder)
    _prove_texts(folder, ours, theirs)
    if theirs.chat_template:
        _prove_chats(folder, theirs.chat_template, genai_render(ours), transformers_render(theirs))


@cache
def _corpus() -> dict[str, Any]:
    return yaml.safe_load(Path(__file__).with_name("corpus.yaml").read_text(encoding="utf-8"))


def texts(added: Iterable[str]) -> Iterator[tuple[str, str]]:
    """Names and texts: the corpus, then every added token alone, between words, with spaces, and twice."""
    yield from _corpus()["texts"].items()
    for token in added:
        for text in (token, f"a{token}b", f"a {token} b", f"{token}\n{token}{token}", f" {token}  é"):
            yield f"the added token {shown(token)}", text


def chats(template: str) -> Iterator[Chat]:
    """Chats of one to three turns, then one around each text that the template compares with."""
    for turns in _corpus()["chats"].values():
        yield [{"role": role, "content": content} for turn in turns for role, content in turn.items()]
    for text in literals(template)[:_LITERALS]:
        contents = (f"x{text}y", f"{text} p{text}q{text}r", text)
        roles = ("user", "assistant", "user")
        yield [{"role": role, "content": content} for role, content in zip(roles, contents, strict=True)]


def renders_alike(template: str, one: Render, other: Render) -> tuple[Chat, str | Exception, str | Exception] | None:
    """The first chat that two renderers write differently, with what each made of it; None where there is none.

    A chat that both refuse is alike: templates may refuse a system message.
    """
    for number, chat in enumerate(chats(template)):
        for reply in (True, False)[: 2 if number < len(_corpus()["chats"]) else 1]:
            ours, theirs = _tried(one, chat, reply), _tried(other, chat, reply)
            refused = isinstance(ours, Exception) and isinstance(theirs, Exception)
            if not refused and ours != theirs:
                return chat, ours, theirs
    return None


def _tried(render: Render, chat: Chat, reply: bool) -> str | Exception:
    try:
        return render(chat, reply)
    except Exception as error:  # two engines with their own types
        return error


def _prove_chats(folder: Path, template: str, ours: Render, theirs: Render) -> None:
    made = [_tried(theirs, chat, True) for chat in chats(template)]
    where = f"{folder / SETTINGS}: chat_template"
    if all(isinstance(text, Exception) for text in made):
        raise CheckpointError(f"{where} renders no chat: {_line(made[0])}. Correct it. {LOCAL}; or leave it out.")
    if found := renders_alike(template, ours, theirs):
        chat, one, other = found
        raise CheckpointError(
            f"{where}: onnxruntime-genai and transformers do not render {shown(chat)} alike. onnxruntime-genai: "
            f"{_apart(one, other)}; transformers: {_apart(other, one)}. Say it with what onnxruntime-genai's "
            f"engine has: split, join, strip, startswith, trim, tojson, loops, namespaces. {LOCAL}."
        )


def _prove_texts(folder: Path, ours: Any, theirs: Any) -> None:
    """Ids of every text, and the text of these ids, whole and token by token."""
    added = [str(token) for token in theirs.added_tokens_decoder.values()]
    spaced = keeps_a_space(ours, theirs)
    for name, text in texts(added):
        ids, expected = _ids(ours, text), theirs.encode(text, add_special_tokens=False)
        if ids != expected:
            raise CheckpointError(_difference(folder, name, text, ids, expected))
        stream = ours.create_stream()
        want = theirs.decode(ids, skip_special_tokens=True, clean_up_tokenization_spaces=False)
        loose = any(token in text for token in added)
        for how, got in (("decodes", ours.decode(ids)), ("streams", "".join(map(stream.decode, ids)))):
            if not _reads_alike(got, want, spaced, loose):
                raise CheckpointError(
                    f"{folder / TOKENIZER}: the decoder ({_named(folder, 'decoder')}): onnxruntime-genai {how} {name} "
                    f"as {_apart(got, want)}, transformers as {_apart(want, got)}. Use the decoder that belongs to the "
                    f"model; for byte-level BPE {json.dumps(_BYTES)}. {LOCAL}."
                )


def _reads_alike(got: str, want: str, spaced: bool, loose: bool) -> bool:
    """Whether a reader sees the same text.

    Args:
        spaced: a space more at the beginning is known (`keeps_a_space`).
        loose: special tokens were left out of it: spaces beside them may differ, and what consists of nothing else is
            U+FFFD in onnxruntime-genai 0.18.
    """
    if loose:
        return "".join(got.split()) == "".join(want.split()) or (not want.strip() and got == "\ufffd")
    return got == want or (spaced and got == f" {want}")


def keeps_a_space(ours: Any, theirs: Any) -> bool:
    """Whether onnxruntime-genai keeps a space at the beginning that transformers' decoder takes away."""
    ids = theirs.encode("a", add_special_tokens=False)
    return bool(ours.decode(ids) == " a" and theirs.decode(ids) == "a")


def _ids(tokenizer: Any, text: str) -> list[int] | str:
    try:
        return list(map(int, tokenizer.encode(text)))
    except Exception as error:  # as in `open_genai`
        return _line(error)


def _difference(folder: Path, name: str, text: str, ids: list[int] | str, expected: list[int]) -> str:
    cause, remedy = _cause(json.loads((folder / TOKENIZER).read_text(encoding="utf-8")), text, ids)
    return (
        f"{folder / TOKENIZER}: onnxruntime-genai and transformers do not cut {name} alike: {shown(text)} becomes "
        f"{_apart(ids, expected)} in onnxruntime-genai and {_apart(expected, ids)} in transformers. Cause: {cause}. "
        f"{remedy}"
    )


def _cause(content: dict[str, Any], text: str, ids: list[int] | str) -> tuple[str, str]:
    """What makes the difference, and the remedy: the first part without which transformers has genai's ids too."""
    if isinstance(ids, str):
        what = f"onnxruntime-genai fails ({ids}) on the pre_tokenizer {_type(content['pre_tokenizer'])}"
        return what, rf"Write its patterns with \p{{L}}, \p{{N}} and \s only: \p{{N}} for \d. {LOCAL}."
    for part, remedy, change in _parts(content):
        changed = json.loads(json.dumps(content))
        change(changed)
        try:
            without = Tokenizer.from_str(json.dumps(changed)).encode(text, add_special_tokens=False).ids
        except Exception:  # the part cannot be left out
            continue
        if without == ids:
            return f"onnxruntime-genai does not honour {part}", f"{remedy}, if the model can do without. {LOCAL}."
    named = ", ".join(f"{key} {_type(content.get(key))}" for key in ("normalizer", "pre_tokenizer", "model"))
    return f"not a single part of it ({named})", f"Use a tokenizer.json that is laid out as its family's is. {LOCAL}."


def _parts(content: dict[str, Any]) -> Iterator[tuple[str, str, Callable[[dict[str, Any]], object]]]:
    normalizer, before = content.get("normalizer"), content.get("pre_tokenizer") or {}
    if normalizer:
        remedy = 'Set "normalizer" to null, and have the app normalize text before it is encoded'
        yield f"the normalizer {_type(normalizer)}", remedy, lambda changed: changed.update(normalizer=None)
    for flag in ("lstrip", "rstrip", "single_word", "normalized"):
        holders = [token["content"] for token in content["added_tokens"] if token.get(flag)]
        if holders:
            part = f"{flag} of the added token {shown(holders[0])} and {len(holders) - 1} more"
            yield (
                part,
                f'Set "{flag}" to false there',
                lambda changed, flag=flag: [  # type: ignore[misc]
                    token.update({flag: False}) for token in changed["added_tokens"]
                ],
            )
    if before.get("add_prefix_space"):
        change = lambda changed: changed["pre_tokenizer"].update(add_prefix_space=False)  # noqa: E731
        yield (
            "add_prefix_space of the pre_tokenizer",
            f'Set "add_prefix_space" to false there and in {SETTINGS}',
            change,
        )
    for number, item in enumerate(before.get("pretokenizers", [])):
        yield (
            f"the pre_tokenizer {item.get('type')}",
            f'Leave it out of "pretokenizers" (number {number})',
            lambda changed, number=number: changed["pre_tokenizer"]["pretokenizers"].pop(number),  # type: ignore[misc]
        )
    if before.get("use_regex") is False:
        change = lambda changed: changed["pre_tokenizer"].update(use_regex=True)  # noqa: E731
        yield "use_regex: false of the pre_tokenizer", 'Set "use_regex" to true', change


def _type(part: Any) -> str:
    """A component of tokenizer.json by its type, and a sequence by those of its members."""
    if not isinstance(part, dict):
        return "none"
    members = part.get("normalizers") or part.get("pretokenizers") or part.get("decoders") or []
    return f"{part.get('type')}{[member.get('type') for member in members] if members else ''}"


def _named(folder: Path, key: str) -> str:
    return _type(json.loads((folder / TOKENIZER).read_text(encoding="utf-8")).get(key))


def _apart(one: Any, other: Any) -> str:
    """`one` around the first place where it differs from `other`."""
    if not isinstance(one, Sequence) or type(one) is not type(other):
        return _line(one) if isinstance(one, Exception | str) else shown(one[:12])
    same = next((k for k, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
    start = max(0, same - 4)
    part = one[start : same + 12]
    before, after = "…" * bool(start), "…" * (same + 12 < len(one))
    return f"{before}{part!r}{after}"


def _line(error: object) -> str:
    """An error of either library on one line."""
    text = " ".join(str(error).split())
    return text if len(text) <= 300 else f"{text[:300]}…"
