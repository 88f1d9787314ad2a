"""What a model is asked to write for a HumanEval problem, and how the solution is found in what it wrote.

A solution is a text to be appended to `problem.prompt`, so the prompt's own imports and helper functions always come
before it. A base model continues the prompt; a chat model is asked for the whole function, which then replaces the
prompt's. What it writes is hostile: it is parsed here, never run.
"""

from __future__ import annotations

import ast
import re
import textwrap
import warnings
from collections.abc import Iterator

from pipeline.tasks.humaneval_problems import Problem

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
    text = text if text.startswith("\n") else "\n" + text
    return text[: _body_end(text)].lstrip("\n").rstrip() + "\n"


def should_stop(text: str) -> bool:
    """Whether a continuation, as far as it is generated, already holds its whole body."""
    return _body_end(text) < len(text)


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

# A fenced block (CommonMark 4.5); the closing fence is at most three columns further in than the opening one. A block
# that a budget has cut ends with the text.
_FENCED = re.compile(
    r"^(?P<indent>[ \t]*)(?P<fence>`{3,}|~{3,})[^\n`]*\n(?P<code>.*?)(?:^(?P=indent)[ ]{0,3}(?P=fence)[`~]*[ \t]*$|\Z)",
    re.MULTILINE | re.DOTALL,
)
_CODE_BEGINS = re.compile(r"(?:async\s+)?def\s|class\s|import\s|from\s|@")
_KEPT = (
    ast.Import, ast.ImportFrom, ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef, ast.Assign, ast.AnnAssign,
    ast.AugAssign, ast.Try, ast.If,
)  # fmt: skip


def extract_answer(problem: Problem, text: str) -> str:
    """The solution in a chat answer without its thinking, to be appended to `problem.prompt`.

    In this order: the last fenced block that defines the function; where nothing is fenced, the text from its first
    line of code to its last; the first block that is a body for the prompt's own signature. With a definition its
    helpers, imports and constants are kept, while what only runs (examples, assertions) goes. An answer without any of
    it is given back as it is, and fails.
    """
    blocks = [re.sub(f"^{at['indent']}", "", at["code"], flags=re.MULTILINE) for at in _FENCED.finditer(text)]
    for code in reversed(blocks) if blocks else _unfenced(text):
        if definitions := _definitions(code, problem.entry_point):
            return f"\n\n{definitions}"
    for block in blocks or [text]:
        body = block if block[:1].isspace() else textwrap.indent(block, "    ")
        if body.strip() and _parse(problem.prompt + body):
            return body
    return text


def _unfenced(text: str) -> Iterator[str]:
    """Stretches of lines that begin like code and can be parsed, the longest first."""
    lines = _lines(text)
    start = next((i for i, line in enumerate(lines) if _CODE_BEGINS.match(line)), len(lines))
    for end in range(len(lines), start, -1):
        if _parse(code := "\n".join(lines[start:end])):
            yield code


def _definitions(code: str, entry_point: str) -> str:
    """What a block defines, as source; "" where it cannot be parsed or does not define `entry_point`."""
    tree = _parse(code)
    functions = (ast.FunctionDef, ast.AsyncFunctionDef)
    if tree is None or not any(isinstance(node, functions) and node.name == entry_point for node in tree.body):
        return ""
    lines = _lines(code)
    kept = [node for node in tree.body if isinstance(node, _KEPT)]
    return "".join("\n".join(lines[_first_line(node) - 1 : node.end_lineno]) + "\n\n" for node in kept)


def _lines(code: str) -> list[str]:
    """Lines as Python counts them: form feeds and Unicode's separators end none."""
    return re.split(r"\r\n?|\n", code)


def _first_line(node: ast.stmt) -> int:
    """A statement's first line, counted from 1; decorators stand above what they decorate."""
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])


def _parse(code: str) -> ast.Module | None:
    """The syntax tree of hostile source, or None where it has none (or is made to exhaust a parser)."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # odd escapes in strings
            return ast.parse(code)
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        return None
