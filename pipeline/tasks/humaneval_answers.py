"""What a model is asked to write for a HumanEval problem, and how the solution is found in what it wrote.

A solution is a text to be appended to `problem.prompt`, so the prompt's own imports and helper functions always come
before it. A base model continues the prompt; a chat model is asked for the whole function, which then replaces the
prompt's. What it writes is hostile: it is parsed here, never run.
"""

from __future__ import annotations

import ast
import re
import textwrap
from collections.abc import Iterator
from dataclasses import dataclass

from pipeline.tasks.humaneval_problems import Problem
from pipeline.tasks.humaneval_slice import Statement, error_line, lines_of, missing, needed, parse, statements

_INSTRUCTION = (
    "Complete the following Python function. Answer with the complete function, its imports and any helper functions, "
    "in one Python code block.\n\n```python\n{prompt}\n```"
)


# --- asking ----------------------------------------------------------------------------------------------------------


def completion_prompt(problem: Problem) -> str:
    """What a model is asked to continue; with the trailing newline most models would stop after two tokens."""
    return problem.prompt.rstrip("\n")


def chat_request(problem: Problem) -> str:
    """What the user says to a chat model, to be put into its own chat template."""
    return _INSTRUCTION.format(prompt=problem.prompt.rstrip("\n"))


def _plain(text: str) -> str:
    """Text with Python's line ends made one, and without marks of byte order before a line."""
    return re.sub("^\ufeff+", "", "\n".join(lines_of(text)), flags=re.MULTILINE)


# --- completions -----------------------------------------------------------------------------------------------------

# What the scanner must step over or count, in this order; text between matches is irrelevant.
_TOKENS = re.compile(
    r"""
    (?P<text> \"{3} (?:\\.|[^\\])*? (?:\"{3}|\\?\Z) | '{3} (?:\\.|[^\\])*? (?:'{3}|\\?\Z)
            | "(?:\\.|[^"\\\n])*"? | '(?:\\.|[^'\\\n])*'? | \#[^\n]* )
  | (?P<open> [(\[{] ) | (?P<close> [)\]}] )
  | (?P<line> \n (?=[^\s)\]}]) )
    """,
    re.VERBOSE | re.DOTALL,
)
_NEW_DEFINITION = re.compile(r"\n(?:(?:async\s+)?def|class)\b|\n@|\n```|\n<")


def extract_completion(text: str) -> str:
    """The body in a raw continuation of `completion_prompt`, to be appended to `problem.prompt`.

    The body ends before the first line that starts in column 0, as the usual stop sequences (`\\ndef`, `\\nclass`,
    `\\nif`, `\\nprint`, `\\n#`, a code fence) would have it, unless that line is inside a string or a bracket.
    Every prompt ends after its docstring, so all continuations are cut alike.
    """
    text = _plain(text)
    text = text if text.startswith("\n") else "\n" + text
    return text[: _body_end(text)].lstrip("\n").rstrip() + "\n"


def should_stop(text: str) -> bool:
    """Whether a continuation, as far as it is generated, already holds its whole body."""
    return _body_end(plain := _plain(text)) < len(plain)


def _body_end(text: str) -> int:
    """Offset of the newline before the first column-0 line outside strings and brackets, or `len(text)`."""
    depth = 0
    for token in _TOKENS.finditer(text):
        if token["open"]:
            depth += 1
        elif token["close"]:
            depth = max(0, depth - 1)
        elif token["line"] and (depth == 0 or _NEW_DEFINITION.match(text, token.start())):
            return token.start()
    return len(text)


# --- chat answers ----------------------------------------------------------------------------------------------------

# A fenced block (CommonMark 4.5), in a list or a quotation too; the closing fence is at most three columns further in
# than the opening one. A block that a budget has cut ends with the text.
_FENCED = re.compile(
    r"^(?P<indent>[ \t>]*)(?P<fence>`{3,}|~{3,})[^\n`]*\n"
    r"(?P<code>.*?)(?:^(?P=indent)[ ]{0,3}(?P=fence)[`~]*[ \t]*$|(?P<cut>\Z))",
    re.MULTILINE | re.DOTALL,
)

_TRIES = 1_000  # to parse a part of one text: lines of prose above code, several times over


@dataclass(frozen=True)
class _Block:
    """Code of an answer; `cut`: it may go on with what is no code, or with code that a budget has cut."""

    code: str
    cut: bool


def extract_answer(problem: Problem, text: str) -> str:
    """The solution in a chat answer without its thinking, to be appended to `problem.prompt`.

    In this order: the last fenced block that binds the function's name; where none holds its definition, the longest
    stretch of lines that does and can be parsed; the first block that is a body for the prompt's own signature. Of
    the module that the function was found in, what it needs is kept (`humaneval_slice`), with what it misses from
    other blocks. An answer without any of it is given back as it is, and fails.
    """
    text = _plain(text)
    blocks, name = list(_blocks(text)), problem.entry_point
    defines = re.compile(rf"^[ \t]*(?:(?:async\s+)?def\s+{name}\b|{name}\s*=)", re.MULTILINE)
    found = blocks if any(defines.search(block.code) for block in blocks) else [*blocks, _Block(text, True)]
    for block in reversed(found):
        for code in _readings(block, defines):
            module = statements(code)
            if any(name in item.binds and not isinstance(item.node, ast.ImportFrom) for item in module):
                kept = needed([*_borrowed(problem, module, blocks), *module], name)
                return "".join(f"\n\n{statement.source}\n" for statement in kept)
    for code in [block.code.strip("\n") for block in blocks] or [text.strip("\n")]:
        for body in [code] * code[:1].isspace() + [textwrap.indent(textwrap.dedent(code), "    ")]:
            if body.strip() and parse(problem.prompt + body):
                return f"{body}\n"
    return text


def _blocks(text: str) -> Iterator[_Block]:
    """Fenced blocks; a block that holds fences, such as an answer in Markdown, is followed by those inside it."""
    for found in _FENCED.finditer(text):
        indent = re.escape(found["indent"])
        code = re.sub(f"^(?:{indent}|{re.escape(found['indent'].rstrip())}$)", "", found["code"], flags=re.MULTILINE)
        yield _Block(code, found["cut"] is not None)
        yield from _blocks(code)


def _readings(block: _Block, defines: re.Pattern[str]) -> Iterator[str]:
    """What a block may mean as a module: as it stands, at the margin, a session of the interpreter, until it is cut."""
    code = textwrap.dedent(block.code)
    yield from dict.fromkeys([block.code, code])
    if session := re.search("^>>>", code, re.MULTILINE):
        yield code[: session.start()]
        yield "\n".join(line[4:] for line in code.split("\n") if line.startswith((">>>", "...")))
    if block.cut:
        yield re.split("```|~~~", block.code)[0]
        yield from _stretches(block.code.split("\n"), defines)


def _stretches(lines: list[str], defines: re.Pattern[str]) -> Iterator[str]:
    """For each line that defines, from the last: the longest stretch around it that can be parsed, as far as the
    places of errors tell."""
    tries = _TRIES
    for target in reversed([place for place, line in enumerate(lines) if defines.match(line)]):
        start, end = 0, len(lines)
        while start <= target < end and (tries := tries - 1) > 0:
            place = error_line("\n".join(lines[start:end]))
            if place is None:
                yield "\n".join(lines[start:end])
                break
            place += start
            if place < target or place == target > start:  # above the line, or what stands there does not end above it
                start = place + 1 if place < target else start + 1
            else:
                end = min(end - 1, place)


def _borrowed(problem: Problem, module: list[Statement], blocks: list[_Block]) -> list[Statement]:
    """Statements of other blocks that bind what a module reads and neither it nor the prompt has."""
    given = frozenset[str]().union(*(statement.binds for statement in statements(problem.prompt)))
    found: list[Statement] = []
    while lacking := missing(needed([*found, *module], problem.entry_point)) - given:
        others = [
            [item for item in statements(block.code) if problem.entry_point not in item.binds] for block in blocks
        ]
        sources = {item.source for item in found}
        new = [items for items in others if any(lacking & item.binds and item.source not in sources for item in items)]
        if not new:
            break
        found = new[-1] + found
    return found
