"""HumanEval's data and its subsets."""

from __future__ import annotations

import gzip
import itertools
import json
from pathlib import Path

import pytest

from pipeline.errors import EvaluationError
from pipeline.tasks.humaneval_problems import Problem, load_problems
from pipeline.tasks.written import spread


@pytest.fixture(scope="module")
def problems(humaneval_path: Path) -> list[Problem]:
    return load_problems(humaneval_path)


def test_all_problems_are_read(problems: list[Problem]) -> None:
    assert [problem.task_id for problem in problems] == [f"HumanEval/{n}" for n in range(164)]
    assert all(f"def {problem.entry_point}(" in problem.prompt for problem in problems)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not gzip",
        gzip.compress(b""),
        gzip.compress(b"{}\n"),
        gzip.compress(b"[1]\n"),
        gzip.compress(b'{"task_id": 3}\n'),
        gzip.compress(b"{broken\n"),
        gzip.compress(b"\xff\xfe\n"),
        gzip.compress(b'{"task_id": "a"}\n' * 500)[:-9],
    ],
    ids=["empty", "plain", "no lines", "no fields", "a list", "a number", "no JSON", "no text", "cut"],
)
def test_damaged_data_is_refused_by_name(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "HumanEval.jsonl.gz"
    path.write_bytes(content)
    with pytest.raises(EvaluationError, match=r"HumanEval\.jsonl\.gz"):
        load_problems(path)


def test_missing_and_repeated_data_are_refused(tmp_path: Path, problems: list[Problem]) -> None:
    with pytest.raises(EvaluationError, match="absent"):
        load_problems(tmp_path / "absent.gz")
    line = json.dumps(vars(problems[0])).encode() + b"\n"
    path = tmp_path / "twice.gz"
    path.write_bytes(gzip.compress(line * 2))
    with pytest.raises(EvaluationError, match="repeated"):
        load_problems(path)


def test_spread_is_even_nested_and_ordered(problems: list[Problem]) -> None:
    position = {problem.task_id: i for i, problem in enumerate(problems)}
    smaller: set[str] = set()
    for n in range(1, 165):
        chosen = [problem.task_id for problem in spread(problems, n, "problems")]
        assert len(chosen) == n and smaller <= set(chosen)
        assert chosen == sorted(chosen, key=position.__getitem__)
        smaller = set(chosen)
    sixteen = [position[problem.task_id] for problem in spread(problems, 16, "problems")]
    assert {after - before for before, after in itertools.pairwise(sixteen)} <= {10, 11}
    for n in (0, 165):
        with pytest.raises(EvaluationError, match="164"):
            spread(problems, n, "problems")
