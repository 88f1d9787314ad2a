"""The process that runs one generated solution, and the plain data it exchanges with the referee.

One JSON list per line in each direction over one socket, which the worker finds as descriptor 0:

    referee → worker   [level, cpu_seconds, program, entry_point]      once
    worker → referee   ["ready"] or ["fault", text]                    from trusted code, before the program runs
    worker → referee   [0, "value", null] or [0, "raised", text]       the program's top level has run
    referee → worker   [n, arguments]                                  call n = 1, 2, …
    worker → referee   [n, "value", data] or [n, "raised", text]

Values travel as plain data with their types spelled out (`encode`, `decode`), never pickled: whatever object a solution
returns, the referee only ever sees exact builtin types. Once `["ready"]` is sent everything in this process is hostile.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any, BinaryIO

from pipeline.confine.sandbox import lock_down

_MAX_INTEGER_DIGITS = 20_000  # hexadecimal; the referee's tests compute with what they are given
_SEQUENCES = {"list": list, "tuple": tuple, "set": set, "frozenset": frozenset}

_MODULES = """
abc array ast base64 binascii bisect calendar cmath codecs collections contextlib copy csv dataclasses datetime decimal
difflib enum fractions functools hashlib heapq html inspect io itertools json keyword locale logging math numbers
operator os pprint queue random re secrets statistics string struct textwrap threading time timeit tokenize traceback
types typing unicodedata uuid warnings weakref zlib
"""
# Inside the sandbox no file can be opened, so what a program may import is imported before: word in it → module.
_IMPORTABLE = {"strptime": "_strptime"} | {name: name for name in _MODULES.split()}

Plain = Any  # None, bool, int, float, str, and lists, tuples, sets, frozensets and dicts of them


def encode(value: Plain) -> Any:
    """Spell out a value for JSON; subclasses of builtin types are reduced to the builtin they extend.

    Raises:
        TypeError: the value is, or contains, something else.
    """
    if value is None or value is True or value is False:
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, int):
        return ["int", int.__format__(value, "x")]
    if isinstance(value, float):
        return ["float", float.hex(value)]
    if isinstance(value, dict):
        return ["dict", [[encode(key), encode(item)] for key, item in dict.items(value)]]
    for name, kind in _SEQUENCES.items():
        if isinstance(value, kind):
            return [name, [encode(item) for item in kind.__iter__(value)]]
    raise TypeError(f"a {type(value).__name__} is not plain data")


def decode(data: Any) -> Plain:
    """The value that `encode` spelled out.

    Raises:
        ValueError: anything else (any other JSON, an unhashable key, an absurdly long integer).
    """
    if data is None or data is True or data is False or isinstance(data, str):
        return data
    try:
        match data:
            case ["int", str(digits)] if len(digits) <= _MAX_INTEGER_DIGITS:
                return int(digits, 16)
            case ["float", str(digits)]:
                return float.fromhex(digits)
            case [("list" | "tuple" | "set" | "frozenset") as kind, list(items)]:
                return _SEQUENCES[kind](decode(item) for item in items)
            case ["dict", list(items)] if all(isinstance(item, list) and len(item) == 2 for item in items):
                return {decode(key): decode(item) for key, item in items}
    except (OverflowError, TypeError) as error:
        raise ValueError(str(error)) from error
    raise ValueError("not plain data")


def main() -> None:
    """Serve one solution on descriptor 0 until the referee closes it."""
    channel, silence = os.dup(0), os.open(os.devnull, os.O_RDWR)
    for standard in (0, 1, 2):
        os.dup2(silence, standard)
    os.close(silence)
    os.environ.clear()  # the referee passes none, but importing us may have set some
    with open(channel, "rb") as requests, open(channel, "wb", closefd=False) as replies:
        _serve(requests, replies)


def _serve(requests: BinaryIO, replies: BinaryIO) -> None:
    level, cpu_seconds, program, entry_point = json.loads(next(requests))
    try:
        _import_named(program)
        lock_down(level, cpu_seconds)
    except Exception as error:
        _send(replies, ["fault", f"{type(error).__name__}: {error}"])
        return
    _send(replies, ["ready"])
    # A name that keeps a program's main guard shut; dataclasses look their module up by it.
    namespace = vars(sys.modules.setdefault("solution", ModuleType("solution")))
    # Hints are not evaluated: they decide no answer, and the import that says so cannot stand behind a prompt.
    flags = annotations.compiler_flag
    _send(replies, [0, *_attempt(lambda: exec(compile(program, "<solution>", "exec", flags, True), namespace))])
    for line in requests:
        number, arguments = json.loads(line)
        _send(replies, [number, *_attempt(lambda given: namespace[entry_point](*decode(given)), arguments)])


def _attempt(action: Callable[..., Any], *arguments: Any) -> list[Any]:
    """Run hostile code; every way it can return or raise becomes a reply (`SystemExit` included)."""
    try:
        return ["value", encode(action(*arguments))]
    except BaseException as error:
        try:
            return ["raised", f"{type(error).__name__}: {error}"[:200]]
        except BaseException:
            return ["raised", "an exception that cannot be printed"]


def _import_named(program: str) -> None:
    """Import every importable module whose name occurs in the program; more than needed does no harm. The compiler
    itself imports one for names beyond ASCII."""
    words = {*re.findall(r"\w+", program), *(["unicodedata"] if not program.isascii() else [])}
    for word in words & _IMPORTABLE.keys():
        with contextlib.suppress(ImportError):
            importlib.import_module(_IMPORTABLE[word])


def _send(replies: BinaryIO, message: list[Any]) -> None:
    replies.write(json.dumps(message).encode() + b"\n")
    replies.flush()
