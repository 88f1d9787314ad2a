"""Chat answers as models write them, through the real judging: a right solution passes, a wrong one does not.

A row is an answer to HumanEval/53, `add(x, y)`, unless it says otherwise. The next bug report is one row.
"""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from pipeline.confine import isolation
from pipeline.confine.referee import Outcome
from pipeline.tasks import humaneval as judging
from pipeline.tasks.humaneval_answers import extract_answer
from pipeline.tasks.humaneval_problems import Problem, load_problems
from pipeline.tasks.humaneval_slice import needed, statements

needs_sandbox = pytest.mark.skipif(
    all(isolation.obstacle(level) for level in isolation.SAFE_LEVELS), reason="this machine cannot contain hostile code"
)
SECONDS = 20.0
GOOD = "def add(x: int, y: int):\n    return x + y\n"
FILLED = "def add(x, y):\n    return SUMS[x, y] if (x, y) in SUMS else x + y if SUMS else None\n"


def fenced(code: str, language: str = "python") -> str:
    return f"Sure!\n\n```{language}\n{code.strip(chr(10))}\n```\n\nIt adds."


RIGHT = {
    # --- imports from __future__ ---
    "a future import": fenced(f"from __future__ import annotations\n\n{GOOD}"),
    "a future import behind a docstring": fenced(f'"""Adds."""\nfrom __future__ import annotations, division\n{GOOD}'),
    "a future import behind a comment": fenced(f"# -*- coding: utf-8 -*-\nfrom __future__ import annotations\n{GOOD}"),
    "a future import and a name that is defined later": fenced(
        "from __future__ import annotations\ndef add(x: Number, y: Number) -> Number:\n    return x + y\nNumber = int"
    ),
    "a future import on a line with others": fenced(f"from __future__ import annotations; import math\n{GOOD}"),
    # --- line ends and marks ---
    "CRLF": fenced(GOOD).replace("\n", "\r\n"),
    "CRLF in the fence only": fenced(GOOD.replace("\n", "\r\n")),
    "CRLF, tildes, a list": fenced(GOOD).replace("```", "~~~").replace("\n", "\r\n   "),
    "CR": fenced(GOOD).replace("\n", "\r"),
    "CR in a comment": fenced("def add(x, y):\n    # the sum\r    return x + y"),
    "CRLF without a fence": f"Here:\n\n{GOOD}\nDone.".replace("\n", "\r\n"),
    "a byte order mark": "\ufeff" + f"```python\n{GOOD}```",
    "a byte order mark in the fence": f"```python\n\ufeff{GOOD}```",
    "tabs": fenced("def add(x, y):\n\ttotal = x\n\ttotal += y\n\treturn total"),
    "form feeds": fenced(f"import math\n\x0c\n{GOOD}"),
    # --- data that is prepared ---
    "a loop fills a table": fenced("SUMS = {}\nfor i in range(100):\n    SUMS[i, i] = i + i\n" + FILLED),
    "a while loop": fenced("SUMS = {}\ni = 0\nwhile i < 9:\n    SUMS[i, 0] = i\n    i += 1\n" + FILLED),
    "update": fenced("SUMS = dict()\nSUMS.update({(1, 1): 2})\n" + FILLED),
    "a method of a part": fenced(
        "DATA = {'sums': {}}\nDATA['sums'].update({(1, 1): 2})\ndef add(x, y):\n"
        "    return DATA['sums'].get((x, y), x + y) if DATA['sums'] else 0"
    ),
    "a comprehension for its effect": fenced("SUMS = {}\n[SUMS.setdefault((i, 0), i) for i in range(9)]\n" + FILLED),
    "a method that is mapped": fenced("S = []\nlist(map(S.append, [1]))\ndef add(x, y):\n    return x * S[0] + y"),
    "a helper fills it": fenced(
        "SUMS = {}\ndef fill():\n    for i in range(9):\n        SUMS[i, 0] = i\nfill()\n" + FILLED
    ),
    "a helper fills what it is given": fenced(
        "SUMS = {}\ndef fill(table):\n    for i in range(9):\n        table[i, 0] = i\nfill(SUMS)\n" + FILLED
    ),
    "a helper of a helper": fenced(
        "SUMS = {}\ndef put(i):\n    SUMS[i, 0] = i\ndef fill():\n    for i in range(9):\n        put(i)\nfill()\n"
        + FILLED
    ),
    "a global that a helper binds": fenced(
        "def setup():\n    global ZERO\n    ZERO = 0\nsetup()\ndef add(x, y):\n    return x + y + ZERO"
    ),
    "global": fenced("COUNT = 0\ndef add(x, y):\n    global COUNT\n    COUNT += 1\n    return x + y"),
    "a loop's variable is the data": fenced(
        "ROWS = [[], []]\nfor row in ROWS:\n    row.append(1)\n"
        "def add(x, y):\n    return x * ROWS[0][0] + y * ROWS[1][0]"
    ),
    "another name of the data": fenced(
        "memo = SUMS = {}\nfor i in range(9):\n    memo[i, 0] = i\n" + FILLED
    ),
    "two statements on a line": fenced("SUMS = {}; SUMS[0, 0] = 0\n" + FILLED),
    "a statement that shares the line of an example": fenced(
        "ONE = 1; print(undefined)\ndef add(x, y): return x * ONE + y"
    ),
    "del": fenced("PARTS = [7, 1]\ndel PARTS[0]\ndef add(x, y):\n    return x * PARTS[0] + y"),
    "with": fenced(
        "import contextlib\nwith contextlib.suppress(ValueError):\n    ONE = 1\ndef add(x, y):\n    return x * ONE + y"
    ),
    "match": fenced("match (1, 2):\n    case (one, _):\n        pass\ndef add(x, y):\n    return x * one + y"),
    "walrus": fenced("(one := 1)\nif (zero := 0) == 0:\n    pass\ndef add(x, y):\n    return x * one + y + zero"),
    "augmented": fenced("one = 0\none += 1\ndef add(x, y):\n    return x * one + y"),
    "try": fenced("try:\n    import numpy as np\n    one = 2\nexcept ImportError:\n    one = 1\n"
                  "def add(x, y):\n    return x * one + y"),
    "a recursion limit": fenced(
        "import sys\nsys.setrecursionlimit(10**5)\ndef add(x, y):\n"
        "    def deep(n):\n        return 0 if n == 0 else deep(n - 1)\n    return x + y + deep(5000)"
    ),
    "a recursion limit by its name": fenced(
        "from sys import setrecursionlimit as limit, setrecursionlimit\nsetrecursionlimit(10**5)\ndef add(x, y):\n"
        "    def deep(n):\n        return 0 if n == 0 else deep(n - 1)\n    return x + y + deep(5000)"
    ),
    "a precision": fenced(
        "from decimal import Decimal, getcontext\ngetcontext().prec = 60\ndef add(x, y):\n"
        "    return x + y if len(str(Decimal(1) / 3)) > 50 else 0"
    ),
    "a heap": fenced("import heapq\nH = [3, 1]\nheapq.heapify(H)\ndef add(x, y):\n    return x * H[0] + y"),
    "a registry filled by a decorator": fenced(
        "KNOWN = {}\ndef known(f):\n    KNOWN[f.__name__] = f\n    return f\n"
        "@known\ndef plus(a, b):\n    return a + b\ndef add(x, y):\n    return KNOWN['plus'](x, y)"
    ),
    "a class that fills itself": fenced(
        "class Sums:\n    one = 0\n    @classmethod\n    def fill(cls):\n        cls.one = 1\nSums.fill()\n"
        "def add(x, y):\n    return x * Sums.one + y"
    ),
    "an attribute of the function": fenced(f"{GOOD.replace('x + y', 'x * add.one + y')}\nadd.one = 1"),
    "an attribute of the function, filled": fenced(
        f"{GOOD.replace('x + y', 'x * add.memo[0] + y')}\nadd.memo = {{}}\nadd.memo.update({{0: 1}})"
    ),
    "names that are looked up": fenced(
        "def plus(x, y):\n    return x + y\ndef add(x, y):\n    return globals()['plus'](x, y)"
    ),
    "everything of a module": fenced("from operator import *\nplus = sub\nfrom math import *\n"
                                     "def add(x, y):\n    return x + y + floor(0.5)"),
    "a dataclass": fenced(
        "from dataclasses import dataclass, field\n@dataclass\nclass Pair:\n    x: int\n    y: int = 0\n"
        "    def total(self) -> int:\n        return self.x + self.y\ndef add(x, y):\n    return Pair(x, y).total()"
    ),
    # --- examples ---
    "a wrong assertion": fenced(f"{GOOD}\nassert add(1, 1) == 3"),
    "a wrong assertion in a try": fenced(f"{GOOD}\ntry:\n    assert add(1, 1) == 3\nexcept ValueError:\n    pass"),
    "a wrong assertion in a loop": fenced(
        f"CASES = [(1, 1, 3)]\n{GOOD}\nfor a, b, c in CASES:\n    assert add(a, b) == c"
    ),
    "a wrong assertion in a helper": fenced(f"{GOOD}\ndef test():\n    assert add(1, 1) == 3\ntest()"),
    "an example that raises, kept in a name": fenced(f"{GOOD}\nresult = add(1, 'a')\nprint(result)"),
    "input kept in a name": fenced(f"{GOOD}\nx = int(input())\ny = int(input())\nprint(add(x, y))"),
    "an endless loop of input": fenced(
        f"{GOOD}\nwhile True:\n    try:\n        print(add(int(input()), 1))\n    except Exception:\n        continue"
    ),
    "an endless loop that shares a name": fenced(
        "one = 1\nfor i in range(2):\n    one = i\n" + GOOD.replace("x + y", "x * one + y")
        + "\ni = 0\nwhile True:\n    i += add(i, 1)"
    ),
    "main": fenced(
        f"def _add(x, y):\n    return x + y\n{GOOD.replace('x + y', '_add(x, y)')}\n"
        "def main():\n    seen = []\n    seen.append(_add(int(input()), 1))\n    print(seen)\nmain()"
    ),
    "main with a status": fenced(f"import sys\n{GOOD}\ndef main():\n    print(add(1, 2))\nsys.exit(main())"),
    "a main guard with an error": fenced(f"{GOOD}\nif __name__ == '__main__':\n    assert add(1, 1) == 3"),
    "a main guard that is not one": fenced(f"{GOOD}\nif add(1, 1) != 3:\n    raise ValueError"),
    "unittest": fenced(
        f"import unittest\n{GOOD}\nclass TestAdd(unittest.TestCase):\n    def test(self):\n"
        "        self.assertEqual(add(1, 1), 3)\nunittest.main()"
    ),
    "doctest": fenced(f"{GOOD}\nimport doctest\ndoctest.testmod()"),
    "an import that nothing needs": fenced(f"import numpy as np\nimport pytest\n{GOOD}"),
    "a cache that is looked at": fenced(
        f"from functools import lru_cache\n@lru_cache(maxsize=None)\n{GOOD}\nprint(add.cache_info().nothing)"
    ),
    "an example under a table's name": fenced(
        "SUMS = {(1, 1): 2}\n" + FILLED + "\nfor key in [1]:\n    print(SUMS[key])\n"
    ),
    "a session behind the function": fenced(f"{GOOD}\n>>> add(1, 2)\n3"),
    "a session": fenced(">>> def add(x, y):\n...     return x + y\n...\n>>> add(1, 2)\n3", "pycon"),
    "a doctest in the docstring": fenced(
        'def add(x, y):\n    """Adds.\n\n    >>> add(1, 2)\n    4\n    """\n    return x + y'
    ),
    # --- where the code is ---
    "a helper in an earlier block": fenced("def plus(a, b):\n    return a + b") + fenced(
        "def add(x, y):\n    return plus(x, y)"
    ),
    "a helper in a later block": fenced("def add(x, y):\n    return plus(x, y)") + fenced(
        "from operator import add as total\ndef plus(a, b):\n    return total(a, b)\nprint(add(1, 2))"
    ),
    "an import in a block of its own": fenced("import math") + fenced("def add(x, y):\n    return math.floor(x + y)"),
    "a usage block that imports it": fenced(GOOD) + fenced("from solution import add\nprint(add(1, 2))"),
    "a block of shell": fenced(GOOD) + fenced("python add.py\n# add = 3 (output)", "sh"),
    "a table of output": fenced(GOOD) + fenced("add(1, 2) = 3", ""),
    "a quotation": "> ```python\n> import math\n>\n> def add(x, y):\n>\n>     return x + y\n> ```\n",
    "a list": "1. So:\n\n    ```python\n    def add(x, y):\n\n        return x + y\n    ```\n",
    "Markdown in a fence": f"````markdown\n# Answer\n\n```python\n{GOOD}```\n````\n",
    "Markdown in a fence that is not longer": f"~~~\nText\n```python\n{GOOD}```\n~~~\n",
    "a fence behind words": f"Here it is:```python\n{GOOD}```\nIt adds.",
    "a fence that ends behind code": f"```python\n{GOOD.rstrip()}```\nIt adds.",
    "cut inside an example": f"```python\n{GOOD}\nprint(add(1,",
    "cut inside a text": f'```python\n{GOOD}\nprint("""The sum',
    "cut inside another function": f"```python\n{GOOD}\ndef test():\n    if add(",
    "indented in its fence": fenced("    import math\n    def add(x, y):\n        return x + y"),
    "a constant above, no fence": "So\nONE = 1\nfor i in [1]:\n    ONE = i\ndef add(x, y): return x * ONE + y\nDone.",
    "words that begin like code, no fence": f"from the task:\nfor all\nclass of sums (see below\n{GOOD}\nIt's it.",
    "the second try, no fence": f"def add(x, y):\n    return 0\n\nBetter:\n\n{GOOD}\nIt adds.",
    "the body, two spaces": fenced("  total = x + y\n  return total"),
    "the body, tabs": fenced("\ttotal = x + y\n\treturn total"),
    # --- what the function is ---
    "a lambda": fenced("add = lambda x, y: x + y"),
    "a lambda with a hint": fenced("from typing import Callable\nadd: Callable = lambda x, y: x + y"),
    "a partial": fenced(
        "from functools import partial\ndef plus(z, x, y):\n    return x + y + z\nadd = partial(plus, 0)"
    ),
    "wrapped": fenced(f"from functools import lru_cache\n{GOOD}\nadd = lru_cache(None)(add)"),
    "a method that is bound": fenced(
        "class Solution:\n    def add(self, x, y):\n        return x + y\nadd = Solution().add"
    ),
    "twice": fenced(f"def add(x, y):\n    return 0\n{GOOD}"),
    "in a branch": fenced("if True:\n    def add(x, y):\n        return x + y\nelse:\n    add = None"),
    "in a try": fenced("try:\n    def add(x, y):\n        return x + y\nfinally:\n    pass"),
    "under another letter": fenced("def add(ﬁrst, y):\n    return first + y\nℯ = 1"),
    "a name under another letter": fenced("def 𝐚𝐝𝐝(x, y):\n    return x + y"),
    "names of Python's own": fenced(
        "sum = 0\nlist = [0]\ndef add(x, y):\n    max = x\n    return max + y + sum + list[0]"
    ),
    "the name of a local is an example's": fenced(
        "def add(x, y):\n    total = x + y\n    return total\ntotal = add(1, 'a')"
    ),
    "another thing of the same name in a local scope": fenced(
        "def helper(add):\n    return add\ndef add(x, y):\n    add = helper(x)\n    return add + y\nhelper(add(1, 'a'))"
    ),
    "a generator expression that runs later": fenced(
        "BASE = [0]\ndef add(x, y):\n    return sum(part for part in (x, y, *BASE))"
    ),
    "async around it": fenced(f"async def unused():\n    await unused()\n{GOOD}"),
    "a hint without its import": fenced("def add(x: Optional[int], y: Union[int, float]) -> Num:\n    return x + y"),
}  # fmt: skip

WRONG = {
    "another result": fenced("def add(x, y):\n    return x - y"),
    "a table that an example fills": fenced("SUMS = {}\ndef add(x, y):\n    return SUMS[x, y]\nprint(SUMS)"),
    "a table that is filled wrongly": fenced(
        "SUMS = {(x, y): 0 for x in range(9) for y in range(9)}\nfor i in range(9):\n    SUMS[i, 0] = -1\n" + FILLED
    ),
    "preparation that raises": fenced("SUMS = {}\nSUMS[1, 1] = 1 / 0\n" + FILLED),
    "preparation that never ends": fenced("one = 1\nwhile one:\n    one += 1\ndef add(x, y):\n    return x * one + y"),
    "a later definition is wrong": fenced(f"{GOOD}\ndef add(x, y):\n    return 0"),
    "a later block is wrong": fenced(GOOD) + "\nNo, better:\n" + fenced("def add(x, y):\n    return 0"),
    "replaced": fenced(f"{GOOD}\nadd = lambda x, y: 0"),
    "deleted": fenced(f"{GOOD}\ndel add"),
    "a closed block that is no Python": fenced(f"{GOOD}\nprint(add(1,"),
    "cut inside the function": "```python\ndef add(x, y):\n    total = x +",
    "a method": fenced("class Solution:\n    def add(self, x, y):\n        return x + y"),
    "a helper that nowhere is": fenced("def add(x, y):\n    return plus(x, y)"),
    "inside another function": fenced("def outer():\n    def add(x, y):\n        return x + y"),
    "prose": "add x and y.",
}


@pytest.fixture(scope="module")
def problems(humaneval_path: Path) -> list[Problem]:
    return load_problems(humaneval_path)


def judged(problem: Problem, texts: dict[str, str], seconds: float = SECONDS) -> dict[str, Outcome]:
    pairs = [(problem, extract_answer(problem, text)) for text in texts.values()]
    outcomes = judging.judge_all(pairs, seconds, isolation.isolation_level())
    return dict(zip(texts, outcomes, strict=True))


@needs_sandbox
def test_a_right_solution_passes(problems: list[Problem]) -> None:
    assert {name: row.reason for name, row in judged(problems[53], RIGHT).items() if not row.passed} == {}


@needs_sandbox
def test_a_wrong_solution_does_not(problems: list[Problem]) -> None:
    assert [name for name, row in judged(problems[53], WRONG, 2).items() if row.passed] == []


@needs_sandbox
def test_the_table_of_a_real_problem(problems: list[Problem]) -> None:
    """HumanEval/77, whose cubes a module-level loop prepares, with examples around it that would fail or hang."""
    (problem,) = (problem for problem in problems if problem.entry_point == "iscube")
    text = (
        "from __future__ import annotations\n\nCUBES = set()\n"
        "for i in range(1000):\n    CUBES |= {i ** 3, -(i ** 3)}\n\n"
        "def iscube(a: int) -> bool:\n    return a in CUBES\n\n"
        "for i in [1, 2]:\n    assert iscube(i), i\nwhile True:\n    print(iscube(int(input())))\n"
    )
    assert judged(problem, {"cubes": fenced(text).replace("\n", "\r\n")})["cubes"].passed


@needs_sandbox
def test_every_canonical_solution_passes_as_a_chat_answer(problems: list[Problem]) -> None:
    """With a constant and examples of their own; the prompt's imports and helpers are written again, as models do."""
    pairs = []
    for problem in problems:
        module = (
            f"from __future__ import annotations\n{problem.text}\nresult = {problem.entry_point}()\nprint(result)\n"
        )
        pairs.append((problem, extract_answer(problem, fenced(module).replace("\n", "\r\n"))))
    outcomes = list(judging.judge_all(pairs, SECONDS, isolation.isolation_level()))
    failed = [(p.task_id, o.reason) for (p, _), o in zip(pairs, outcomes, strict=True) if not o.passed]
    assert failed == []


def test_only_what_is_needed_is_kept() -> None:
    module = statements(
        "import math, os\nimport re\nA = 1\nB = {}\nfor i in range(3): B[i] = A\nC = 2\ndef g(): return B\n"
        "def f(): return g(), math\nprint(f())\ni = f()\nassert f() == i\nh = g()\n"
    )
    assert [item.source.split("\n")[0] for item in needed(module, "f")] == [
        "import math, os", "A = 1", "B = {}", "for i in range(3): B[i] = A", "def g(): return B",
        "def f(): return g(), math",
    ]  # fmt: skip


@pytest.mark.parametrize("count", [400])
def test_long_modules_take_no_time(count: int, problems: list[Problem]) -> None:
    chain = "x0 = 0\n" + "".join(f"x{i} = x{i - 1}\ndef f{i}(): return f{i - 1}(x{i})\n" for i in range(1, count))
    answer = extract_answer(problems[53], fenced(f"{chain}def add(x, y): return x + y + x{count - 1} * 0"))
    assert len(ast.parse(answer).body) == count + 1


@pytest.mark.parametrize(
    "piece", ["@\n", "from x\n", "add = (\n", "```\n> ~~~\n", "def add(x):\n", "x = add\n", ">>> \n"]
)
def test_hostile_texts_take_no_time(piece: str, problems: list[Problem]) -> None:
    extract_answer(problems[53], piece * 600)
