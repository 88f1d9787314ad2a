"""A model's own chat template, and the think block that some models write before they answer."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from pipeline.errors import EvaluationError

Render = Callable[[str, str], str]
"""The system's and the user's message → text up to where the reply begins."""
_OPEN, _CLOSE = "<think>", "</think>"


def read_template(folder: Path) -> Render:
    """The chat template in the tokenizer's files, rendered by transformers in its sandbox.

    Raises:
        EvaluationError: there is none, or (when it is rendered) it refuses the messages.
    """
    from jinja2 import TemplateError
    from transformers import PreTrainedTokenizerFast

    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)  # this class runs no code from the folder
    if not tokenizer.chat_template:
        raise EvaluationError(
            f"{folder} has no chat template (chat_template of tokenizer_config.json, or chat_template.jinja), so its "
            f"model is not asked as in a chat. Set `mmlu_mode` in its entry in configs/models/ to five-shot."
        )

    def render(system: str, user: str) -> str:
        messages = [{"role": "system", "content": system}, {"role": "user", "content": user}]
        try:
            return tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        except (TemplateError, TypeError, ValueError) as error:
            raise EvaluationError(f"{folder}: its chat template cannot be rendered: {error}") from error

    return render


def without_thought(text: str, thinks: bool) -> str:
    """A rendered chat whose reply begins after a think block that is closed and empty, where the model thinks.

    Some templates open the block, some open and close it, some leave both to the model: `thinks` says that it does.
    """
    if has_thought(text):
        return text
    if text.rfind(_OPEN) > text.rfind(_CLOSE):
        return f"{text.rstrip()}\n\n{_CLOSE}\n\n"
    return f"{text}{_OPEN}\n\n{_CLOSE}\n\n" if thinks else text


def has_thought(text: str) -> bool:
    """Whether a rendered chat's reply begins after a closed think block."""
    return text.rstrip().endswith(_CLOSE)
