"""A model's own chat template, conversations written by it, and the think block that some models begin with."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from pathlib import Path

import yaml
from pydantic import BaseModel, Field

from pipeline.errors import EvaluationError

Render = Callable[[str, str], str]
"""The system's and the user's message → text up to where the reply begins."""
_Template = Callable[[list[dict[str, str]], bool], str]
"""Messages → text; with True, up to where the reply begins."""
THINK, END_OF_THINKING = "<think>", "</think>"


class Conversations(BaseModel):
    """A file of conversations, YAML: each a list of messages, the user's first, then in turns.

    The format of chatterbot-corpus, whose other keys are left alone: https://github.com/gunthercox/chatterbot-corpus
    """

    conversations: list[list[str]] = Field(min_length=1)


def read_template(folder: Path) -> Render:
    """The chat template in the tokenizer's files, rendered by transformers in its sandbox.

    Raises:
        EvaluationError: there is none, or (when it is rendered) it refuses the messages.
    """
    template = _template(folder)
    if not template:
        raise EvaluationError(
            f"{folder} has no chat template (chat_template of tokenizer_config.json, or chat_template.jinja), so its "
            f"model is not asked as in a chat. Set `mmlu_mode` in its entry in configs/models/ to five-shot."
        )
    return lambda system, user: template([_message("system", system), _message("user", user)], True)


def transcript(folder: Path, path: Path) -> str:
    """A file of conversations, `rendered`; repeated ones once.

    Raises:
        EvaluationError: the file holds no conversations, or the template refuses them.
    """
    try:
        found = Conversations.model_validate(yaml.safe_load(path.read_text(encoding="utf-8"))).conversations
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise EvaluationError(f"{path} is not a YAML file of conversations: {error}") from None
    return rendered(folder, dict.fromkeys(map(tuple, found)))


def rendered(folder: Path, conversations: Iterable[Sequence[str]]) -> str:
    """Conversations as the model's chat template writes them, one behind the other.

    Each is its messages in turns, the user's first. A model without a chat template reads messages as paragraphs.
    Raises EvaluationError when the template refuses them.
    """
    template, roles = _template(folder), ("user", "assistant")
    texts = []
    for messages in conversations:
        if template:
            texts.append(template([_message(roles[k % 2], text) for k, text in enumerate(messages)], False))
        else:
            texts.append("".join(f"{text}\n\n" for text in messages))
    return "".join(texts)


def template_text(folder: Path) -> str:
    """The chat template itself; "" without one."""
    from transformers import PreTrainedTokenizerFast

    return PreTrainedTokenizerFast.from_pretrained(folder).chat_template or ""


def _message(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def _template(folder: Path) -> _Template | None:
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # this class runs no code from the folder

    def render(messages: list[dict[str, str]], reply: bool) -> str:
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=reply)
        except (TemplateError, TypeError, ValueError) as error:
            raise EvaluationError(f"{folder}: its chat template cannot be rendered: {error}") from error

    return render if tokenizer.chat_template else None


def without_thought(text: str, thinks: bool) -> str:
    """A rendered chat whose reply begins after a think block that is closed and empty, where the model thinks.

    Some templates open the block, some open and close it, some leave both to the model: `thinks` says that it does.
    """
    if has_thought(text):
        return text
    if text.rfind(THINK) > text.rfind(END_OF_THINKING):
        return f"{text.rstrip()}\n\n{END_OF_THINKING}\n\n"
    return f"{text}{THINK}\n\n{END_OF_THINKING}\n\n" if thinks else text


def has_thought(text: str) -> bool:
    """Whether a rendered chat's reply begins after a closed think block."""
    return text.rstrip().endswith(END_OF_THINKING)


def opens_thinking(prompt: str) -> bool:
    """Whether a chat template has already opened the thinking that the model is to go on with."""
    return prompt.rstrip().endswith(THINK)


def is_thinking(text: str, opened: bool) -> bool:
    """Whether a text, as far as it is generated, is still inside its thinking (or may be about to begin it)."""
    start = text.lstrip()
    begun = opened or start.startswith(THINK) or THINK.startswith(start)
    return begun and END_OF_THINKING not in text


def without_thinking(text: str, opened: bool) -> str:
    """What follows the thinking; nothing where it never ended."""
    if is_thinking(text, opened):
        return ""
    return text.rpartition(END_OF_THINKING)[2]
