"""Chat templates in the words that onnxruntime-genai's template engine reads as Jinja does.

Three things that many templates use, and that onnxruntime-genai 0.18 does not do: it keeps the line ends and indents
around blocks that transformers trims, finds no text in a text (`'a' in b` is always false), and has no `replace`. All
three can be said otherwise; whether that renders alike is proven on chats before it ships (`pipeline.door.tokenizer`).
"""

from __future__ import annotations

import ast
from collections.abc import Callable
from contextlib import suppress

NOW = "strftime_now"
_OPENING, _CLOSING = {"(": ")", "[": "]"}, {")": "(", "]": "["}
Render = Callable[[list[dict[str, str]], bool], str]
"""Messages, and whether a reply is to begin → text. Raises whatever the engine raises."""
Tokens = list[tuple[str, str]]
"""Kind and text of each token of a template, as jinja2's lexer has them."""


def literals(template: str) -> list[str]:
    """Texts that a template compares with, splits by or writes: its string constants of at most 40 characters."""
    found: dict[str, None] = {}
    for kind, text in _tokens(template):
        if kind == "string":
            with suppress(ValueError, SyntaxError):  # escapes that only Jinja knows
                found[ast.literal_eval(text)] = None
    return [text for text in found if 0 < len(text) <= 40]


def without_date(template: str) -> str:
    """A template that no longer asks for today's date where it has a fixed one for machines without a clock."""
    return template.replace(f"{NOW} is defined", "false")


def rewrites(template: str) -> list[str]:
    """The template said otherwise, the least change first. Raises jinja2.TemplateSyntaxError where it is none."""
    trimmed = _joined(_tokens(template))
    tokens = _tokens(trimmed)
    for rewrite in (_without_in, _without_replace):
        position = 0
        while position < len(tokens):
            tokens, position = rewrite(tokens, position)
    return [trimmed, _joined(tokens)]


def _tokens(template: str) -> Tokens:
    """A template's tokens, with white space trimmed as transformers trims it, and without comments."""
    from jinja2 import Environment

    found: Tokens = []
    for _, kind, text in Environment(trim_blocks=True, lstrip_blocks=True).lex(template):
        shortened = "" if kind.startswith("comment") else text.rstrip("\n") if kind == "block_end" else text
        found.append((kind, text if text.startswith("-") else shortened))
    return found


def _joined(tokens: Tokens) -> str:
    return "".join(text for _, text in tokens)


def _without_in(tokens: Tokens, position: int) -> tuple[Tokens, int]:
    """`'a' in b.c` as `(b.c.split('a')|length > 1)`, where the token at `position` is the `in`."""
    words = [index for index, (kind, _) in enumerate(tokens) if kind != "whitespace"]
    if tokens[position] != ("name", "in") or position not in words:
        return tokens, position + 1
    at = words.index(position)
    negated = tokens[words[at - 1]] == ("name", "not")
    left = words[at - 1 - negated]
    end = _chain_end(tokens, words[at + 1])
    if tokens[left][0] != "string" or tokens[words[at - 2 - negated]][1] in ("+", "~", ",") or end is None:
        return tokens, position + 1
    chain, literal = _joined(tokens[words[at + 1] : end]), tokens[left][1]
    said = f"({chain}.split({literal})|length {'==' if negated else '>'} 1)"
    return [*tokens[:left], ("name", said), *tokens[end:]], left + 1


def _without_replace(tokens: Tokens, position: int) -> tuple[Tokens, int]:
    """`b.c.replace(x, y)` or `b.c|replace(x, y)` as `(b.c.split(x)|join(y))`; `replace` is the token at `position`."""
    before = [index for index in range(position) if tokens[index][0] != "whitespace"][-2:]
    if tokens[position] != ("name", "replace") or len(before) < 2 or tokens[before[1]][1] not in (".", "|"):
        return tokens, position + 1
    start, end = _chain_start(tokens, before[0]), _chain_end(tokens, position, dotted=False)
    inside = tokens[position + 2 : (end or 0) - 1]
    commas = [index for index, token in enumerate(inside) if token[1] == "," and _depth(inside[:index]) == 0]
    if start is None or end is None or len(commas) != 1:
        return tokens, position + 1
    chain, old, new = _joined(tokens[start : before[0] + 1]), _joined(inside[: commas[0]]), inside[commas[0] + 1 :]
    said = _tokens("{{(" + f"{chain}.split({old.strip()})|join({_joined(new).strip()})" + ")}}")[1:-1]
    return [*tokens[:start], *said, *tokens[end:]], start


def _depth(tokens: Tokens) -> int:
    return sum((text in _OPENING) - (text in _CLOSING) for kind, text in tokens if kind == "operator")


def _chain_end(tokens: Tokens, start: int, dotted: bool = True) -> int | None:
    """Behind a name and its `.name`, `[…]` and `(…)`; None where no name begins. Not `dotted`: behind one `(…)`."""
    if tokens[start][0] != "name":
        return None
    end = start + 1
    while end < len(tokens) and (tokens[end][1] in _OPENING or (dotted and tokens[end][1] == ".")):
        step = _matching(tokens, end, 1) if tokens[end][1] in _OPENING else end + 1
        if step is None:
            return None
        end = step + 1
        if not dotted:
            break
    return end


def _chain_start(tokens: Tokens, last: int) -> int | None:
    """Where the chain begins that ends with the token at `last`."""
    while True:
        if tokens[last][1] in _CLOSING:
            opening = _matching(tokens, last, -1)
            if opening is None:
                return None
            before = tokens[opening - 1]
            if before[0] not in ("name", "string") and before[1] not in _CLOSING:
                return opening
            last = opening - 1
            continue
        if tokens[last][0] not in ("name", "string", "integer"):
            return None
        if tokens[last - 1][1] != ".":
            return None if tokens[last - 1][1] == "|" else last
        last -= 2


def _matching(tokens: Tokens, at: int, step: int) -> int | None:
    """The bracket that closes the one at `at` (`step` 1), or opens it (-1)."""
    depth, opens = 0, _OPENING if step == 1 else _CLOSING
    closes = _CLOSING if step == 1 else _OPENING
    while 0 <= at < len(tokens):
        depth += (tokens[at][1] in opens) - (tokens[at][1] in closes)
        if depth == 0:
            return at
        at += step
    return None
