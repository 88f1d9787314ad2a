"""Verdicts: a referee that no trick of a solution turns into a pass; workers that hold and leave nothing."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pipeline.confine import isolation, referee, sandbox
from pipeline.confine.referee import Outcome, judge_program
from pipeline.errors import EvaluationError
from pipeline.tasks import humaneval as judging
from pipeline.tasks.humaneval_problems import Problem, load_problems
from pipeline.tasks.written import spread

LEVEL = isolation.isolation_level()
LEVELS = [level for level in isolation.SAFE_LEVELS if not isolation.obstacle(level)]

needs_sandbox = pytest.mark.skipif(not LEVELS, reason="this machine cannot contain hostile code")
SECONDS = 20.0  # generous: these programs answer at once, and the machine may be busy


@pytest.fixture(scope="session")
def problems(humaneval_path: Path) -> list[Problem]:
    return load_problems(humaneval_path)


def judge(problem: Problem, completion: str, seconds: float, level: str = LEVEL) -> Outcome:
    return judging.judge(problem, completion, seconds, level)


def judge_all(pairs: list[tuple[Problem, str]], seconds: float, workers: int = 2) -> list[Outcome]:
    return list(judging.judge_all(pairs, seconds, LEVEL, workers))


def number(problems: list[Problem], n: int) -> Problem:
    return next(problem for problem in problems if problem.task_id == f"HumanEval/{n}")


# --- verdicts --------------------------------------------------------------------------------------------------------


@needs_sandbox
def test_every_canonical_solution_passes(problems: list[Problem]) -> None:
    outcomes = judge_all([(problem, problem.canonical_solution) for problem in problems], SECONDS)
    failed = [(p.task_id, o.reason) for p, o in zip(problems, outcomes, strict=True) if not o.passed]
    assert failed == []


@pytest.mark.parametrize("level", [*LEVELS, sandbox.RLIMITS])
def test_every_level_gives_the_same_verdicts(problems: list[Problem], level: str) -> None:
    for problem in [number(problems, n) for n in (32, 38, 53, 115, 162)]:
        assert judge(problem, problem.canonical_solution, SECONDS, level).passed
        assert not judge(problem, "    return 1\n", SECONDS, level).passed


@needs_sandbox
@pytest.mark.parametrize("body", ["    pass\n", "    return True\n", "    return 0\n"])
def test_trivial_bodies_pass_nothing(problems: list[Problem], body: str) -> None:
    outcomes = judge_all([(problem, body) for problem in spread(problems, 24, "problems")], SECONDS)
    assert not any(outcome.passed for outcome in outcomes)


@needs_sandbox
@pytest.mark.parametrize(
    ("body", "reason"),
    [
        ("    return x - y\n", "wrong answer"),
        ("    return str(x + y)\n", "wrong answer"),
        ("    return [x, y].pop(7)\n", "raised IndexError: pop index out of range"),
        ("    return x +\n", "raised SyntaxError"),
        ("    return lambda: x\n", "raised TypeError: a function is not plain data"),
        ("    import numpy\n", "raised ModuleNotFoundError"),
        ("    while True: pass\n", "timeout"),
        ("    import time; time.sleep(60)\n", "timeout"),
        ("    import os; os._exit(0)\n", "crashed: exit status 0"),
        ("    import sys; sys.exit(0)\n", "raised SystemExit"),
        ("    raise KeyboardInterrupt\n", "raised KeyboardInterrupt"),
        ("    import ctypes; ctypes.string_at(0)\n", "crashed: killed by signal 11"),
        ("    yield x + y\n", "raised TypeError: a generator is not plain data"),
        ("    return map(int, [x, y])\n", "raised TypeError: a map is not plain data"),
        ("    return range(10**12)\n", "raised TypeError: a range is not plain data"),
        ("    return 'x' * (1 << 22)\n", "malformed answer: longer"),
        ("    return [0] * (1 << 18)\n", "malformed answer: longer"),
        ("    return 1 << (1 << 20)\n", "malformed answer"),
        ("    return bytearray(1 << 30)\n", "raised MemoryError"),
        ("    a = []\n    a.append(a)\n    return a\n", "raised RecursionError"),
        ("    raise ValueError('two\\nlines \\x1b[31m' + 'x' * 9999)\n", "raised ValueError: two lines  [31mxxx"),
        ("    class E(Exception):\n        def __str__(self): raise self\n    raise E\n", "raised an exception that"),
    ],
)
def test_a_failure_names_its_reason_in_one_line(problems: list[Problem], body: str, reason: str) -> None:
    timeout = 0.5 if reason == "timeout" else SECONDS
    outcome = judge(number(problems, 53), body, timeout)
    assert not outcome.passed
    assert outcome.reason.startswith(reason)
    assert len(outcome.reason) < 250 and outcome.reason.isprintable()


@needs_sandbox
def test_prints_and_input_do_not_disturb_a_right_answer(problems: list[Problem]) -> None:
    body = """
    print("[1, 'value', null]" * 10000)
    import sys
    print("noise", file=sys.stderr)
    try:
        input()
    except EOFError:
        return x + y
"""
    assert judge(number(problems, 53), body, SECONDS).passed


@needs_sandbox
@pytest.mark.parametrize("module", ["math", "re", "collections", "itertools", "hashlib", "decimal", "unicodedata"])
def test_computing_modules_can_be_imported(problems: list[Problem], module: str) -> None:
    assert judge(number(problems, 53), f"    import {module}\n    return x + y\n", SECONDS).passed


@needs_sandbox
def test_dates_can_be_parsed() -> None:
    program = "from datetime import datetime\ndef f(s): return datetime.strptime(s, '%m-%d-%Y').year"
    assert collect(program, "03-11-2000") == [2000]


def test_tests_draw_the_same_random_inputs_every_time(problems: list[Problem]) -> None:
    runs: list[list[tuple[int, int]]] = [[], []]
    for drawn in runs:
        judging._check(number(problems, 53), lambda x, y, drawn=drawn: drawn.append((x, y)) or x + y)
    assert runs[0] == runs[1]
    assert len(set(runs[0])) > 50


@needs_sandbox
def test_order_is_kept_with_several_workers(problems: list[Problem]) -> None:
    problem = number(problems, 53)
    slow = "    import time; time.sleep(.3)\n    return [][1]\n"
    outcomes = judge_all([(problem, slow), (problem, "    return x + y\n"), (problem, "    return 0\n")], SECONDS, 3)
    assert [outcome.reason.split()[0] for outcome in outcomes] == ["raised", "passed", "wrong"]


# --- cheats ----------------------------------------------------------------------------------------------------------

ALWAYS_EQUAL = """
class Same{base}:
    def __eq__(self, other): return True
    def __ne__(self, other): return False
    def __hash__(self): return 0
    def __bool__(self): return True
"""

FLOAT_ARITHMETIC = """
    def __sub__(self, other): return self
    def __abs__(self): return self
    def __lt__(self, other): return True
def truncate_number(number): return Same()
"""

# name → (problem, completion); {data} is the path of HumanEval's own file. Each passes a naive executor.
CHEATS = {
    "an object equal to everything": (53, ALWAYS_EQUAL.format(base="") + "def add(x, y): return Same()\n"),
    "an integer equal to everything": (53, ALWAYS_EQUAL.format(base="(int)") + "def add(x, y): return Same(7)\n"),
    "a list equal to everything": (34, ALWAYS_EQUAL.format(base="(list)") + "def unique(l): return Same(l)\n"),
    "a float equal to everything": (2, ALWAYS_EQUAL.format(base="(float)") + FLOAT_ARITHMETIC),
    "a text equal to everything": (38, ALWAYS_EQUAL.format(base="(str)") + "def decode_cyclic(s): return Same('x')\n"),
    "a dictionary equal to everything": (111, ALWAYS_EQUAL.format(base="(dict)") + "def histogram(t): return Same()\n"),
    "a tuple equal to everything": (8, ALWAYS_EQUAL.format(base="(tuple)") + "def sum_product(n): return Same()\n"),
    "an object whose class lies": (
        53,
        ALWAYS_EQUAL.format(base="") + "    __class__ = int\ndef add(x, y): return Same()\n",
    ),
    "sys.exit(0)": (53, "    import sys; sys.exit(0)\n"),
    "sys.exit(0) at the top": (53, "    pass\nimport sys; sys.exit(0)\n"),
    "os._exit(0)": (53, "    import os; os._exit(0)\n"),
    "os._exit(0) at the top": (53, "    pass\nimport os; os._exit(0)\n"),
    "exit status replaced": (53, "    pass\nimport sys, os; sys.excepthook = lambda *a: os._exit(0)\n"),
    "exit status replaced at exit": (53, "    pass\nimport atexit, os; atexit.register(lambda: os._exit(0))\n"),
    "the caller's frame": (38, "    import sys; return sys._getframe(1).f_locals['str']\n"),
    "the caller's frame by a traceback": (
        38,
        """
    try:
        raise ValueError
    except ValueError as error:
        return error.__traceback__.tb_frame.f_back.f_locals["str"]
""",
    ),
    "the test found by the garbage collector": (
        38,
        """
    import gc, sys
    for thing in gc.get_objects():
        if getattr(thing, "__name__", "") == "check":
            return sys._getframe(1).f_locals[thing.__code__.co_varnames[-2]]
""",
    ),
    "the test ended by a tracer": (
        53,
        "    pass\nimport os, sys\nsys.settrace(lambda f, *a: os._exit(0) if f.f_code.co_name == 'check' else None)\n",
    ),
    "the answer found by its type": (
        38,
        """
    import gc, types
    for frame in (thing for thing in gc.get_objects() if isinstance(thing, types.FrameType)):
        if frame.f_code.co_name == "check" and "str" in frame.f_locals:
            return frame.f_locals["str"]
    import sys
    return sys._getframe(1).f_locals["str"]
""",
    ),
    "builtins patched": (
        4,
        "    pass\nimport builtins\nbuiltins.abs = lambda value: 0\ndef mean_absolute_deviation(numbers): return 7.0\n",
    ),
    "the answers in a process's memory": (
        53,
        """
    import re
    maps = open("/proc/self/maps").read()
    for start, end in re.findall(r"^([0-9a-f]+)-([0-9a-f]+) rw", maps, re.MULTILINE):
        memory = open("/proc/self/mem", "rb", buffering=0)
        memory.seek(int(start, 16))
        if b"assert candidate" in (memory.read(int(end, 16) - int(start, 16)) or b""):
            import os; os._exit(0)
""",
    ),
    "the answers on disk": (
        53,
        """
    import gzip, json
    for line in gzip.open({data!r}):
        problem = json.loads(line)
        if problem["entry_point"] == "add":
            found = dict()
            exec(problem["prompt"] + problem["canonical_solution"], found)
            return found["add"](x, y)
""",
    ),
}


def completion_of(cheat: str, data: Path) -> tuple[int, str]:
    n, completion = CHEATS[cheat]
    return n, completion.replace("{data!r}", repr(str(data)))


@pytest.mark.parametrize("cheat", CHEATS)
def test_cheat_fools_a_naive_executor(problems: list[Problem], humaneval_path: Path, cheat: str) -> None:
    """The control: one process runs solution and test, and its exit status is the verdict."""
    n, completion = completion_of(cheat, humaneval_path)
    problem = number(problems, n)
    program = f"{problem.prompt}{completion}\n{problem.test}\ncheck({problem.entry_point})\n"
    assert subprocess.run([sys.executable, "-c", program], capture_output=True, check=False).returncode == 0


@needs_sandbox
@pytest.mark.parametrize("cheat", CHEATS)
def test_cheat_never_passes(problems: list[Problem], humaneval_path: Path, cheat: str) -> None:
    n, completion = completion_of(cheat, humaneval_path)
    assert not judge(number(problems, n), completion, SECONDS).passed


FORGERY = """
import os
def forge(text):
    for descriptor in range(64):
        try: os.write(descriptor, text.encode())
        except OSError: pass
"""


@needs_sandbox
@pytest.mark.parametrize(
    "messages",
    [
        '["passed"]\\n',
        "true\\n",
        "[1, 'value', true]\\n",
        '[0, "value", null]\\n' * 9,
        '[1, "value", ["int", "1"]]\\n' * 9,
        "".join(f'[{n}, "value", ["int", "1"]]\\n' for n in range(200)),
        "".join(f'[{n}, "value", ["int", "1"]]\\n' for n in (-1, 2, 999)),
        '[1, "value", ["object", {"__eq__": true}]]\\n',
        '["ready"]\\n["fault", "x"]\\n',
        '[1, "value", ["dict", [[["list", []], 1]]]]\\n',
        "[" * 50_000 + "\\n",
        "1" * 50_000 + "\\n",
        "\\xff\\n",
        "\\0",
        "\\n" * 100,
        "x" * 500_000,
    ],
)
@pytest.mark.parametrize("place", ["at the top", "in the call", "then dies"])
def test_forged_messages_never_pass(problems: list[Problem], messages: str, place: str) -> None:
    forge = f"forge({messages!r}.encode().decode('unicode_escape'))"
    after = {"at the top": "", "in the call": f"    {forge}\n", "then dies": f"    {forge}; os._exit(0)\n"}[place]
    top = f"{forge}\n" if place == "at the top" else ""
    completion = f"    pass\n{FORGERY}{top}def add(x, y):\n{after}    return x - y\n"
    outcome = judge(number(problems, 53), completion, 2.0)
    assert not outcome.passed


@needs_sandbox
def test_patched_builtins_and_json_change_nothing(problems: list[Problem]) -> None:
    completion = ALWAYS_EQUAL.format(base="") + (
        "import builtins, json, sys\n"
        "def add(x, y): return Same()\n"
        "json.dumps = lambda *a, **k: '[1, \"value\", true]'\n"
        "json.loads = lambda *a, **k: [1, ['tuple', []]]\n"
        "for name in ('isinstance', 'type', 'len', 'print', 'AssertionError', 'abs', 'all'):\n"
        "    setattr(builtins, name, lambda *a, **k: True)\n"
        "sys.modules['pipeline.confine.worker'].encode = lambda value: True\n"
    )
    for body in (completion, completion.replace("json.dumps", "json.unused").replace("json.loads", "json.unused")):
        assert not judge(number(problems, 53), "    pass\n" + body, 2.0).passed


# --- containment of the worker that really runs ----------------------------------------------------------------------


def collect(program: str, *arguments: Any, level: str = LEVEL) -> list[Any]:
    """What a program's `f` answers, in its worker."""
    answers: list[Any] = []
    outcome = judge_program(program, "f", lambda call: answers.append(call(*arguments)), SECONDS, level)
    return answers or [outcome.reason]


@needs_sandbox
def test_worker_holds_neither_the_test_nor_our_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PIPELINE_TEST_SECRET", "swordfish")
    assert collect("import os\ndef f(): return [k for k in os.environ ]") == [[]]
    hunt = """
import gc, sys
def f():
    seen, frame = [], sys._getframe()
    while frame:
        seen += [repr(frame.f_locals), repr(frame.f_globals)]
        frame = frame.f_back
    seen += [repr(o) for o in gc.get_objects() if isinstance(o, (dict, list, tuple))]
    marks = ["".join(["sword", "fish"]), "".join(["assert ", "candidate"])]  # not in this program's own constants
    return [mark for mark in marks if any(mark in text for text in seen)]
"""
    control = f"{hunt}\ntraces = ['swordfish', 'assert candidate(0, 1) == 1']\nprint(len(f()))"
    free = subprocess.run([sys.executable, "-c", control], capture_output=True, check=True)
    assert int(free.stdout) == 2
    assert collect(hunt) == [[]]


@pytest.mark.parametrize("level", LEVELS)
def test_worker_has_no_descriptor_but_its_channel(level: str) -> None:
    program = """
import os
def f():
    found = {}
    for descriptor in range(1024):
        try:
            found[descriptor] = os.lseek(descriptor, 0, os.SEEK_CUR)
        except OSError as error:
            if error.strerror != "Bad file descriptor":
                found[descriptor] = error.strerror
    return found
"""
    with socket.create_server(("127.0.0.1", 0)) as server, open(__file__) as file:
        for inherited in (server, file):
            os.set_inheritable(inherited.fileno(), True)
        control = [sys.executable, "-c", f"{program}\nprint(len(f()))"]
        free = subprocess.run(control, close_fds=False, capture_output=True, check=True)
        assert int(free.stdout) >= 5  # three of its own, and these two
        # /dev/null three times, and the channel
        assert collect(program, level=level) == [{0: 0, 1: 0, 2: 0, 3: "Illegal seek"}]


@needs_sandbox
@pytest.mark.parametrize(
    "attack",
    [
        "open({path!r}, 'w')",
        "open({data!r})",
        "os.listdir('/')",
        "os.fork()",
        "os.kill(os.getpid(), 9)",
        "os.system('true') and 1 / 0",
        "__import__('threading').Thread(target=print).start()",
        "__import__('_socket').socket()",
    ],
)
def test_attack_by_a_completion_raises(tmp_path: Path, humaneval_path: Path, attack: str) -> None:
    path = tmp_path / "effect"
    (answer,) = collect(f"import os\ndef f():\n    {attack.format(path=str(path), data=str(humaneval_path))}")
    assert str(answer).startswith("raised "), answer
    assert not path.exists()


@needs_sandbox
def test_no_worker_survives_its_verdict(monkeypatch: pytest.MonkeyPatch) -> None:
    started = []
    real = referee.Popen

    def remember(*arguments: Any, **options: Any) -> Any:
        started.append(real(*arguments, **options))
        return started[-1]

    monkeypatch.setattr(referee, "Popen", remember)
    for program in ("def f(): return 1", "def f():\n    while True: pass", "import os; os._exit(3)", "def f(: 1"):
        judge_program(program, "f", lambda call: call(), 0.5, LEVEL)
    assert len(started) == 4
    assert all(process.returncode is not None for process in started)


@needs_sandbox
def test_a_test_cannot_swallow_a_failure() -> None:
    def lenient(call: Any) -> None:
        try:
            call()
        except Exception:
            return

    outcome = judge_program("def f(): 1 / 0", "f", lenient, SECONDS, LEVEL)
    assert outcome.reason.startswith("raised ZeroDivisionError")


# --- infrastructure faults are never verdicts ------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("bootstrap", "message"),
    [
        ("import sys; print('no such module', file=sys.stderr); sys.exit(1)", "no such module"),
        ("print()", "exit status 0"),
        (
            "from pipeline.confine import sandbox, worker; sandbox.MEMORY_LIMIT = None; worker.main()",
            "TypeError",
        ),
    ],
)
def test_worker_that_cannot_start_gives_no_verdict(
    problems: list[Problem], monkeypatch: pytest.MonkeyPatch, bootstrap: str, message: str
) -> None:
    monkeypatch.setattr(referee, "_BOOTSTRAP", bootstrap)
    with pytest.raises(EvaluationError, match=message):
        judge_all([(problems[53], problems[53].canonical_solution)] * 3, SECONDS)


def test_missing_interpreter_gives_no_verdict(problems: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(referee, "command", lambda level, code: ["/nowhere/python"])
    with pytest.raises(EvaluationError, match="could not be started"):
        judge(problems[53], "    return x + y\n", SECONDS)


def test_silent_start_gives_no_verdict(problems: list[Problem], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(referee, "_BOOTSTRAP", "import time; time.sleep(60)")
    monkeypatch.setattr(referee, "_STARTUP_SECONDS", 0.3)
    with pytest.raises(EvaluationError, match="timeout"):
        judge(problems[53], "    return x + y\n", SECONDS)
