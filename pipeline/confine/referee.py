"""Judge a program that may be hostile: the tests stay here, the program runs in a sandboxed worker.

The referee runs the test; each call the test makes travels to the worker as plain data, and so does the answer. The
worker never holds the tests or an expected value, so there is nothing to steal, and no exit code, token or printed line
means "passed": a program passes only by giving the answers. Silence, death, floods and nonsense are failures.
"""

from __future__ import annotations

import contextlib
import json
import math
import os
import signal
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass
from subprocess import DEVNULL, PIPE, Popen, TimeoutExpired
from typing import Any

from pipeline.confine.isolation import command
from pipeline.confine.worker import Plain, decode, encode
from pipeline.errors import EvaluationError

_STARTUP_SECONDS = 60.0  # a bare interpreter takes 0.05; this only tells a slow machine from a broken one
_MAX_ANSWER = 1 << 18  # bytes of one answer; the longest that a right solution gives HumanEval has 717
Test = Callable[[Callable[..., Plain]], None]
_BOOTSTRAP = "import pipeline.confine.worker as worker; worker.main()"


@dataclass(frozen=True)
class Outcome:
    """Whether a program passed its test, and why not, in one line."""

    passed: bool
    reason: str


class _Failure(BaseException):
    """The program did not answer. Not an `Exception`, so that no test can swallow it."""


def judge_program(program: str, entry_point: str, test: Test, timeout_seconds: float, level: str) -> Outcome:
    """Run `test(candidate)`, where `candidate` calls `entry_point` of `program` in a fresh sandboxed worker.

    Args:
        program: Python source; hostile.
        entry_point: the function in it that is tested.
        test: trusted; returns if the answers are right, raises `AssertionError` (or trips over them) if not.
        timeout_seconds: wall time for the program's top level and all calls together, once the worker is ready.
        level: isolation to apply, from `isolation.require_isolation`.

    Raises:
        EvaluationError: the worker could not be started or confined. Never a verdict.
    """
    channel, theirs = socket.socketpair()
    with channel:
        with theirs:
            process = _spawn(command(level, _BOOTSTRAP), theirs.fileno())
        with process:
            try:
                worker = _Worker(process, channel)
                worker.start([level, math.ceil(timeout_seconds) + 1, program, entry_point])
                return _outcome(worker, test, timeout_seconds)
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def _spawn(arguments: list[str], descriptor: int) -> Popen[bytes]:
    try:
        return Popen(arguments, stdin=descriptor, stdout=DEVNULL, stderr=PIPE, env={}, cwd="/", start_new_session=True)
    except OSError as error:
        raise EvaluationError(
            f"the sandboxed worker could not be started with {arguments[0]!r}: {error}. "
            f"Generated code was not run; free memory or processes and run the evaluation again."
        ) from error


def _outcome(worker: _Worker, test: Test, timeout_seconds: float) -> Outcome:
    try:
        worker.load(timeout_seconds)
        test(worker.call)
    except _Failure as failure:
        return Outcome(False, str(failure))
    except AssertionError:
        return Outcome(False, "wrong answer")
    except Exception as error:
        return Outcome(False, f"wrong answer: the test tripped over it ({type(error).__name__})")
    return Outcome(True, "passed")


class _Worker:
    """What is said to one worker process, and heard from it; `call` is what a test sees as the candidate."""

    def __init__(self, process: Popen[bytes], channel: socket.socket) -> None:
        self._process, self._channel = process, channel
        self._calls = 0
        self._buffer = bytearray()
        self._deadline = time.monotonic() + _STARTUP_SECONDS

    def start(self, setup: list[Any]) -> None:
        """Wait until the worker is confined. Raises EvaluationError when it cannot be."""
        try:
            self._send(setup)
            message = self._receive()
        except _Failure as failure:
            self._process.kill()
            errors = self._process.communicate()[1].decode(errors="replace").strip()
            message = ["fault", f"{failure}; standard error: {errors[-500:] or 'empty'}"]
        if message != ["ready"]:
            raise EvaluationError(f"the sandboxed worker did not start, so there is no verdict: {message[-1]}")

    def load(self, timeout_seconds: float) -> None:
        """Wait until the program's top level has run; its time begins here."""
        self._deadline = time.monotonic() + timeout_seconds
        self._answer()

    def call(self, *arguments: Plain) -> Plain:
        """The program's answer for these arguments."""
        self._calls += 1
        self._send([self._calls, encode(arguments)])
        return self._answer()

    def _answer(self) -> Plain:
        match self._receive():
            case [int(number), "value", data] if number == self._calls:
                try:
                    return decode(data)
                except (ValueError, RecursionError) as error:
                    raise _Failure(f"malformed answer: {_line(str(error))}") from error
            case [int(number), "raised", str(text)] if number == self._calls:
                raise _Failure(f"raised {_line(text)}")
        raise _Failure("malformed answer: not a reply to the call")

    def _send(self, message: list[Any]) -> None:
        self._timed(self._channel.sendall, json.dumps(message).encode() + b"\n")

    def _receive(self) -> Any:
        while (end := self._buffer.find(b"\n")) < 0:
            if len(self._buffer) > _MAX_ANSWER:
                raise _Failure(f"malformed answer: longer than {_MAX_ANSWER:,} bytes")
            if not (chunk := self._timed(self._channel.recv, 1 << 16)):
                raise _Failure(self._death())
            self._buffer += chunk
        line = bytes(self._buffer[:end])
        del self._buffer[: end + 1]
        try:
            return json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _Failure("malformed answer: not JSON") from error

    def _timed(self, act: Callable[[Any], Any], given: object) -> Any:
        """What an act on the channel returns within the time that is left."""
        remaining = self._deadline - time.monotonic()
        if remaining <= 0:
            raise _Failure("timeout")
        try:
            self._channel.settimeout(remaining)
            return act(given)
        except TimeoutError as error:
            raise _Failure("timeout") from error
        except OSError as error:
            raise _Failure(self._death()) from error

    def _death(self) -> str:
        try:
            status = self._process.wait(timeout=1)
        except TimeoutExpired:
            return "crashed: it closed its channel"
        return f"crashed: killed by signal {-status}" if status < 0 else f"crashed: exit status {status}, no answer"


def _line(text: str) -> str:
    """Hostile text as at most 200 printable characters on one line."""
    return "".join(character if character.isprintable() else " " for character in text[:200]).strip()
