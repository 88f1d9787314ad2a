"""Chat templates: one ships, and onnxruntime-genai renders it as transformers renders the checkpoint's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai
import pytest

from pipeline.door import tokenizer as door
from pipeline.door.parity import stub_config
from pipeline.door.template import rewrites
from pipeline.errors import CheckpointError
from pipeline.files import read_json, write_json
from tests.door.checkpoints import VOCAB, make, put, without

CHAT = [{"role": "user", "content": "a</think>\nbanana\n"}]
EACH = "{% for m in messages %}"
OTHERWISE = "written otherwise"
HONOURED: dict[str, tuple[dict[str, Any], str, str]] = {
    "none": ({"settings": without("chat_template")}, "", ""),
    "null": ({"settings": put(chat_template=None)}, "", ""),
    "replace": (
        {
            "settings": put(
                chat_template=EACH + "{{ m.content.strip().rstrip('\\n').replace('a', 'o') + '|' }}{% endfor %}"
            )
        },
        OTHERWISE,
        "o</think>\nbonono|",
    ),
    "replace as a filter": (
        {"settings": put(chat_template="{{ messages[0]['content'] | replace('an', 'AN') | trim }}")},
        OTHERWISE,
        "a</think>\nbANANa",
    ),
    "a text in a text": (
        {
            "settings": put(
                chat_template=EACH + "{% if '</think>' in m.content and 'x' not in m['content'] %}"
                "{{ m.content.split('</think>')[-1] }}{% else %}{{ m.content }}{% endif %}{% endfor %}"
            )
        },
        OTHERWISE,
        "\nbanana\n",
    ),
    "lines around blocks": (
        {"settings": put(chat_template=EACH + "\n  {{ m.content }}\n  {% endfor %}\n  {% if true %}b{% endif %}\n")},
        OTHERWISE,
        "  a</think>\nbanana\n\nb",
    ),
    "a list": (
        {
            "settings": put(
                chat_template=[
                    {"name": "default", "template": "D{{ messages[0].content }}"},
                    {"name": "tool_use", "template": "U"},
                ]
            )
        },
        "'default' ships",
        "Da</think>\nbanana\n",
    ),
    "chat_template.jinja, which comes first": ({"files": {"chat_template.jinja": "J"}}, "", "J"),
    "chat_template.jinja alone": (
        {"settings": without("chat_template"), "files": {"chat_template.jinja": "J"}},
        "",
        "J",
    ),
    "chat_template.json, which comes last": (
        {"settings": put(chat_template="T"), "files": {"chat_template.json": '{"chat_template": "J"}'}},
        "",
        "T",
    ),
    "chat_template.json alone": (
        {"settings": without("chat_template"), "files": {"chat_template.json": '{"chat_template": "J"}'}},
        "chat_template.json",
        "J",
    ),
    "no system message": (
        {
            "settings": put(
                chat_template=EACH + "{% if m.role == 'system' %}{{ raise_exception('none') }}{% endif %}"
                "{{ m.content }}{% endfor %}"
            )
        },
        "",
        "a</think>\nbanana\n",
    ),
    "a date where there is a clock": (
        {
            "settings": put(
                chat_template="{% if strftime_now is defined %}{% set d = strftime_now('%d %b %Y') %}"
                "{% else %}{% set d = '26 Jul 2024' %}{% endif %}{{ d }}"
            )
        },
        "fixed date",
        "26 Jul 2024",
    ),
    "a BOS of the template's": (
        {"settings": put(chat_template="{{ bos_token }}{{ messages[0].content }}")},
        "",
        "<|im_start|>a</think>\nbanana\n",
    ),
}


@pytest.mark.parametrize("name", HONOURED)
def test_honoured(name: str, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    changes, note, expected = HONOURED[name]
    source, ships = make(tmp_path / "source", **changes), tmp_path / "ships"
    notes = door.check_tokenizer(source, VOCAB)
    assert note in " ".join(notes) and bool(note) == bool(notes)
    ships.mkdir()
    door.ship_tokenizer(source, ships, VOCAB)
    write_json(ships / "genai_config.json", stub_config())
    if not expected:
        assert "chat_template" not in read_json(ships / "tokenizer_config.json")
        return
    assert genai.Tokenizer(str(ships)).apply_chat_template(json.dumps(CHAT)) == expected
    theirs = AutoTokenizer.from_pretrained(ships)
    assert theirs.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True) == expected
    ids = genai.Tokenizer(str(ships)).encode(expected).tolist()
    assert ids == theirs.apply_chat_template(CHAT, add_generation_prompt=True)  # one BOS, if any


GOOD = "{{ messages[0].content }}"
REFUSED: dict[str, tuple[Any, str]] = {
    "a method": ("{{ messages[0].content.upper() }}", r"tokenizer_config.json: chat_template: .*Unknown method: upper"),
    "a filter": ("{{ messages[0].content|title }}", "Value is not callable"),
    "a word that only transformers has": ("{{ pad_token }}" + GOOD, "do not render"),
    "no Jinja": ("{% if %}", "renders no chat"),
    "a refusal of everything": ("{{ raise_exception('never') }}", "renders no chat: never"),
    "today": ("{{ strftime_now('%Y') }}" + GOOD, "writes today's date"),
    "a number": (3, "chat_template is 3"),
    "a list without a default": ([{"name": "rag", "template": "R"}], "no 'default'"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_until_it_is_said_otherwise(name: str, tmp_path: Path) -> None:
    template, message = REFUSED[name]
    with pytest.raises(CheckpointError, match=message):
        door.check_tokenizer(make(tmp_path, settings=put(chat_template=template)), VOCAB)
    door.check_tokenizer(make(tmp_path, settings=put(chat_template=GOOD)), VOCAB)


def test_the_file_that_holds_the_template_is_named(tmp_path: Path) -> None:
    files = {"chat_template.jinja": "{{ messages[0].content.upper() }}"}
    with pytest.raises(CheckpointError, match=r"/chat_template\.jinja: .*upper"):
        door.check_tokenizer(make(tmp_path, files=files), VOCAB)


def test_what_cannot_be_said_otherwise_stays() -> None:
    for template in ("{{ a|trim|replace('x', 'y') }}", "{{ 'a' + 'b' in c }}", "{% for a in b %}{% endfor %}"):
        assert rewrites(template) == [template, template]
    assert rewrites("{{ f(a).b['c'].replace('x', g(1, 2)).strip() }}")[1] == (
        "{{ (f(a).b['c'].split('x')|join(g(1, 2))).strip() }}"
    )
    assert rewrites("{% if not 'x' in a.b %}")[1] == "{% if not (a.b.split('x')|length > 1) %}"
