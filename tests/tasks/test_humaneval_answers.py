"""What a model is asked, and how its solution is found in completions and in chat answers."""

from __future__ import annotations

import ast
import contextlib
from pathlib import Path
from typing import Any

import pytest

from pipeline.runtime.chat import END_OF_THINKING, is_thinking, opens_thinking, without_thinking
from pipeline.tasks.humaneval_answers import (
    chat_request,
    completion_prompt,
    extract_answer,
    extract_completion,
    should_stop,
)
from pipeline.tasks.humaneval_problems import Problem, load_problems


@pytest.fixture(scope="module")
def problems(humaneval_path: Path) -> list[Problem]:
    return load_problems(humaneval_path)


# --- completions -----------------------------------------------------------------------------------------------------


def test_prompt_has_no_trailing_newline(problems: list[Problem]) -> None:
    assert all(problem.prompt == completion_prompt(problem) + "\n" for problem in problems)


AFTERWARDS = [
    "def other():\n    pass\n",
    "async def other():\n    pass\n",
    "class Other:\n    pass\n",
    "@decorator\ndef other(): pass\n",
    "if __name__ == '__main__':\n    main()\n",
    "print(add(1, 2))\n",
    "# Test\n",
    "```\nThis function adds.\n",
    "assert add(1, 2) == 3\n",
    "This doesn't compile.\n",
    "<|im_end|>",
    '"""Another docstring."""\n',
]


@pytest.mark.parametrize("after", AFTERWARDS)
def test_body_ends_at_the_first_top_level_line(after: str) -> None:
    body = "    # don't stop (here\n\n    total = x + y\n\n\n    return total\n"
    text = "\n" + body + "\n\n" + after
    assert extract_completion(text) == body
    assert should_stop(text)
    stopping = next(n for n in range(len(text) + 1) if should_stop(text[:n]))
    assert text[: stopping - 1].strip("\n") == body.strip("\n")  # as soon as the line's first character appears


@pytest.mark.parametrize(
    "body",
    [
        "    text = '''\ndef inside():\n\\'''\n# still inside\n'''\n    return text\n",
        '    text = """\nclass Inside: """\n    return text\n',
        "    table = [\n1,\n2,\n]\n    return table\n",
        "    value = f(\n    1,\n)\n    return value\n",
        "    s = '(' + \"'\" + '#'\n    return s\n",
        "    return 1\n",
        "\treturn 1\n",
    ],
)
def test_strings_and_brackets_do_not_end_a_body(body: str) -> None:
    assert extract_completion("\n" + body) == body
    assert extract_completion("\n" + body + "\ndef more(): pass") == body
    assert not any(should_stop(("\n" + body)[:n]) for n in range(len(body) + 2))


def test_an_open_bracket_does_not_hide_the_next_definition() -> None:
    assert extract_completion("\n    return max((x,\n\ndef more(): pass") == "    return max((x,\n"


@pytest.mark.parametrize("end", ["\r\n", "\r"])
def test_other_line_ends_are_line_ends(end: str) -> None:
    text = "\n    # the sum\n    return x + y\n\nprint(1)\n".replace("\n", end)
    assert extract_completion(text) == "    # the sum\n    return x + y\n"
    assert should_stop(text) and not should_stop(text.partition("print")[0])


def test_continuation_without_a_newline_and_empty_one() -> None:
    assert extract_completion("    return x + y") == "    return x + y\n"
    assert extract_completion("") == "\n"
    assert not should_stop("")


def test_canonical_solutions_survive_extraction(problems: list[Problem]) -> None:
    for problem in problems:
        text = "\n" + problem.canonical_solution + "\n\ndef unrelated():\n    pass\n"
        assert extract_completion(text).strip() == problem.canonical_solution.strip()


# --- chat answers ----------------------------------------------------------------------------------------------------


def solution(problem: Problem, text: str, *arguments: Any) -> Any:
    """What the extracted solution of these (trusted) texts answers."""
    namespace: dict[str, Any] = {"__name__": "solution"}
    exec(problem.prompt + extract_answer(problem, text), namespace)
    return namespace[problem.entry_point](*arguments)


GOOD = "def add(x: int, y: int):\n    return x + y"
BAD = "def add(x: int, y: int):\n    return 0"
BROKEN = "def add(x, y):\n    return x +"


def fenced(code: str, language: str = "python", fence: str = "```") -> str:
    return f"{fence}{language}\n{code}\n{fence}"


ANSWERS = {
    "one block": f"Sure!\n\n{fenced(GOOD)}\n\nIt adds.",
    "no language": fenced(GOOD, ""),
    "tildes": fenced(GOOD, fence="~~~"),
    "four ticks": fenced(f'{GOOD}  # see "```"', fence="````"),
    "the last of two": f"First try:\n{fenced(BAD)}\nBetter:\n{fenced(GOOD)}",
    "the last that defines it": f"{fenced(GOOD)}\nUse it so:\n{fenced('print(add(1, 2))')}",
    "the last that can be parsed": f"{fenced(GOOD)}\nor\n{fenced(BROKEN)}",
    "cut by the budget": f"Here:\n```python\n{GOOD}\n",
    "inside a list": "1. So:\n\n   ```python\n" + "\n".join(f"   {line}" for line in GOOD.split("\n")) + "\n   ```\n",
    "a fence inside the docstring": fenced(
        'def add(x, y):\n    """\n    ```\n    add(1, 2)\n    ```\n    """\n    return x + y'
    ),
    "Windows lines": fenced(GOOD).replace("\n", "\r\n"),
    "examples that fail": fenced(f"{GOOD}\n\nassert add(1, 1) == 3\nprint(add('a'))\nfor i in 1: add(i)\ninput()"),
    "a main guard": fenced(f"{GOOD}\n\nif __name__ == '__main__':\n    raise SystemExit"),
    "imports, helpers, constants, classes": fenced(
        "import operator\nfrom functools import reduce\nZERO = 0\n\n"
        "class Adder:\n    add = staticmethod(operator.add)\n\n"
        "def helper(numbers):\n    return reduce(Adder.add, numbers, ZERO)\n\n"
        "def add(x, y):\n    return helper([x, y])"
    ),
    "a decorator": fenced(f"import functools\n\n@functools.cache\n{GOOD}"),
    "an import that may fail": fenced(f"try:\n    import numpy\nexcept ImportError:\n    numpy = None\n{GOOD}"),
    "no fence": GOOD,
    "no fence, prose around": f"Here is the function.\n\nimport math\n\n{GOOD}\n\nIt returns the sum of x and y.",
    "no fence, one word after": f"{GOOD}\nDone",
    "the body alone": fenced("    return x + y"),
    "the body alone at the margin": fenced("total = x + y\nreturn total"),
    "the body alone, after a broken block": f"{fenced('def (')}\n{fenced('    return x + y')}",
    "the body alone, no fence": "return x + y",
    "form feeds and separators": fenced(f"MARK = '\u2028\x85'\n\x0c\n{GOOD}"),
}


@pytest.mark.parametrize("name", ANSWERS)
def test_the_function_is_found(problems: list[Problem], name: str) -> None:
    assert solution(problems[53], ANSWERS[name], 20, 22) == 42


def test_helpers_of_the_prompt_stay(problems: list[Problem]) -> None:
    cyclic = next(problem for problem in problems if problem.entry_point == "decode_cyclic")
    answer = fenced("def decode_cyclic(s: str):\n    return encode_cyclic(encode_cyclic(s))")
    assert solution(cyclic, answer, "bcaefd") == "abcdef"


@pytest.mark.parametrize(
    "text",
    [
        "", "I cannot do that.", fenced("print(1)"), fenced("def other(): pass"), fenced("def add(x, y:"),
        "```", "```\n",
        "`" * 9999, "~~~python", fenced("class A:\n    def add(self, x, y): return x + y"), "\0", fenced("\0"),
    ],
)  # fmt: skip
def test_an_answer_without_the_function_solves_nothing(problems: list[Problem], text: str) -> None:
    with contextlib.suppress(SyntaxError, ValueError, NameError):
        assert solution(problems[53], text, 20, 22) != 42


@pytest.mark.parametrize(
    "bomb",
    [
        "(" * 99_999,
        "-" * 99_999 + "1",
        "x" + ".x" * 99_999,
        "2**" * 9_999 + "2",
        "if 1: pass\n" + "elif 1: pass\n" * 9_999,
    ],
    ids=["brackets", "signs", "attributes", "powers", "branches"],
)
def test_source_that_exhausts_a_parser_is_no_solution(problems: list[Problem], bomb: str) -> None:
    answer = fenced(f"{GOOD}\n{bomb}")
    assert GOOD not in extract_answer(problems[53], answer).split("```")[0]


def last_definition(tree: ast.Module, problem: Problem) -> str:
    return ast.dump([node for node in tree.body if getattr(node, "name", "") == problem.entry_point][-1])


def test_every_canonical_solution_is_found_in_a_chat_answer(problems: list[Problem]) -> None:
    for problem in problems:
        function = problem.prompt + problem.canonical_solution
        for text in (f"Of course.\n\n{fenced(function)}\n\nHope it helps!", f"{function}\n\nThis is the function."):
            found = ast.parse(problem.prompt + extract_answer(problem, text))
            assert last_definition(found, problem) == last_definition(ast.parse(function), problem)


def test_a_request_shows_the_whole_prompt(problems: list[Problem]) -> None:
    assert all(problem.prompt.rstrip() in chat_request(problem) for problem in problems)
    assert chat_request(problems[0]).endswith("\n```")


# --- thinking --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "opened", "inside", "rest"),
    [
        ("", False, True, ""),
        ("  <thi", False, True, ""),
        ("<think>I would\n```python\ndef add", False, True, ""),
        ("<think>so</think>\nthe answer", False, False, "\nthe answer"),
        ("so</think>the answer", True, False, "the answer"),
        ("still", True, True, ""),
        ("no thought", False, False, "no thought"),
        ("<think></think>", False, False, ""),
        ("<think>a</think>b<think>c</think>d", False, False, "d"),
        ("it says </think> here", False, False, " here"),
    ],
)
def test_thinking_is_told_from_the_answer(text: str, opened: bool, inside: bool, rest: str) -> None:
    assert is_thinking(text, opened) is inside
    assert without_thinking(text, opened) == rest


def test_a_template_may_open_the_thinking() -> None:
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<|im_start|>assistant\n")
    assert END_OF_THINKING == "</think>"
