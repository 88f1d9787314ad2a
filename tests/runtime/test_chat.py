"""Chat templates from real tokenizer files, and think blocks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from pipeline.errors import EvaluationError
from pipeline.runtime.chat import has_thought, read_template, transcript, without_thought
from tests import tiny


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.make_tokenizer(tmp_path, 384)
    return tmp_path


def set_template(folder: Path, template: str | None) -> None:
    path = folder / "tokenizer_config.json"
    settings = {**json.loads(path.read_text()), "chat_template": template}
    path.write_text(json.dumps({key: value for key, value in settings.items() if value is not None}))


def test_the_folder_s_template_is_rendered_up_to_the_reply(folder: Path) -> None:
    assert read_template(folder)("Be brief.", "Hello?") == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHello?<|im_end|>\n<|im_start|>assistant\n"
    )


def test_a_template_in_a_file_of_its_own_is_read(folder: Path) -> None:
    set_template(folder, None)
    (folder / "chat_template.jinja").write_text("{{ messages[1]['content'] }}|{{ bos_token }}")
    assert read_template(folder)("s", "u") == "u|<|im_start|>"


def test_no_template_is_an_error_that_names_the_way_out(folder: Path) -> None:
    set_template(folder, None)
    with pytest.raises(EvaluationError, match=r"no chat template .* five-shot"):
        read_template(folder)


@pytest.mark.parametrize(
    "template", ["{{ raise_exception('no system role') }}", "{% broken", "{{ messages.__class__.__mro__[1] }}"]
)
def test_a_template_that_cannot_be_rendered_is_an_error_in_words(folder: Path, template: str) -> None:
    set_template(folder, template)
    with pytest.raises(EvaluationError, match="chat template cannot be rendered"):
        read_template(folder)("s", "u")


@pytest.mark.parametrize(
    ("reply", "thinks", "expected"),
    [
        ("<a>\n", False, "<a>\n"),
        ("<a>\n", True, "<a>\n<think>\n\n</think>\n\n"),
        ("<a>\n<think>\n", False, "<a>\n<think>\n\n</think>\n\n"),
        ("<a>\n<think>\n", True, "<a>\n<think>\n\n</think>\n\n"),
        ("<a>\n<think>\n\n</think>\n\n", True, "<a>\n<think>\n\n</think>\n\n"),
        ("Write <think> and </think>.<a>", True, "Write <think> and </think>.<a><think>\n\n</think>\n\n"),
        ("Write <think> and </think>.<a>", False, "Write <think> and </think>.<a>"),
    ],
    ids=["no thought", "unasked", "opened", "opened and unasked", "closed", "described", "described, none"],
)
def test_a_reply_begins_after_a_closed_think_block(reply: str, thinks: bool, expected: str) -> None:
    assert without_thought(reply, thinks) == expected
    assert has_thought(expected) == expected.endswith("</think>\n\n")
    assert without_thought(expected, thinks) == expected


CONVERSATIONS = """
categories: [greetings]
conversations:
- - Hello?
  - Hi.
  - 'Yes'
- ['What is 1 + 1?', '2']
- ['What is 1 + 1?', '2']
"""


def test_a_transcript_is_the_template_s_in_turns_each_conversation_once(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.yml"
    path.write_text(CONVERSATIONS)
    set_template(folder, "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}{{ add_generation_prompt }};")
    assert transcript(folder, path) == (
        "<user>Hello?<assistant>Hi.<user>YesFalse;<user>What is 1 + 1?<assistant>2False;"
    )


def test_without_a_template_messages_are_paragraphs(folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "chat.yml"
    path.write_text(CONVERSATIONS)
    set_template(folder, None)
    assert transcript(folder, path) == "Hello?\n\nHi.\n\nYes\n\nWhat is 1 + 1?\n\n2\n\n"


@pytest.mark.parametrize("text", ["conversations: []", "conversations: [[1, 2]]", "- a", "prose", "a: [", ""])
def test_a_file_without_conversations_is_named(folder: Path, tmp_path: Path, text: str) -> None:
    path = tmp_path / "chat.yml"
    path.write_text(text)
    with pytest.raises(EvaluationError, match=r"chat\.yml is not a YAML file of conversations"):
        transcript(folder, path)
