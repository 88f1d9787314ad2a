"""The HumanEval section: what is written is kept before it is judged, and a killed run repeats neither."""

from __future__ import annotations

import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.blobs import Store
from pipeline.config.models import load_model
from pipeline.confine.referee import Outcome
from pipeline.errors import EvaluationError
from pipeline.files import write_json
from pipeline.graph.genai import Generation, genai_config
from pipeline.journal import Journal
from pipeline.runtime.generate import Limits, Request, Sampling, Writer, Written, derived_seed
from pipeline.tasks import humaneval, written
from pipeline.tasks.humaneval import HumanEvalConfig
from pipeline.tasks.humaneval_problems import Problem, load_problems, problems_of
from pipeline.tasks.registry import load_suite
from pipeline.tasks.subject import Subject
from pipeline.workspace import REFERENCE
from tests import tiny
from tests.artifact.exported import changed, export
from tests.real_configs import architecture_of


class Killed(Exception):
    """Stands for a kill."""


class FakeWriter:
    """Solves every problem whose number is even, and where it draws, the samples whose seed is."""

    asked: list[str]
    answer: Callable[[Problem], str]
    cut: str

    def __init__(self, folder: Path) -> None:
        del folder

    def chat(self, request: str) -> str:
        return f"<user>{request}<model><think>\n"

    def continuations(self, requests: Mapping[str, Request]) -> Iterator[Written]:
        return (self.continuation(*request) for request in requests.values())

    def continuation(
        self, prompt: str, limits: Limits, complete: Callable[[str], bool], sampling: Sampling | None = None
    ) -> Written:
        problem = next(problem for problem in BY_TASK.values() if problem.prompt.rstrip("\n") in prompt)
        self.asked.append(problem.task_id)
        number = sampling.seed if sampling else int(problem.task_id.split("/")[1])
        text = type(self).answer(problem) if number % 2 == 0 else "    pass\n"
        return Written((number,), text, type(self).cut)


BY_TASK: dict[str, Problem] = {}


@pytest.fixture(autouse=True)
def writer(monkeypatch: pytest.MonkeyPatch, humaneval_path: Path) -> type[FakeWriter]:
    BY_TASK.update((problem.task_id, problem) for problem in load_problems(humaneval_path))
    monkeypatch.setattr(FakeWriter, "asked", [], raising=False)
    monkeypatch.setattr(FakeWriter, "answer", lambda problem: "\n" + problem.canonical_solution, raising=False)
    monkeypatch.setattr(FakeWriter, "cut", "", raising=False)
    return FakeWriter


@pytest.fixture
def judged(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Task ids in the order of being judged; a solution is right if it is the canonical one."""
    found: list[str] = []

    def judge_all(pairs: Sequence[tuple[Problem, str]], seconds: float, level: str) -> Iterator[Outcome]:
        for problem, completion in pairs:
            found.append(problem.task_id)
            right = problem.canonical_solution.strip() in completion
            yield Outcome(right, "passed" if right else "wrong answer")

    monkeypatch.setattr(humaneval, "judge_all", judge_all)
    return found


def subject(tmp_path: Path, prompt: str = "completion", variant: str = REFERENCE, **changes: Any) -> Subject:
    entry = load_model("mimo-8b").model_copy(update={"humaneval_prompt": prompt})
    wanted = HumanEvalConfig(**(load_suite("smoke").humaneval.model_dump() | {"problems": 8} | changes))
    architecture = architecture_of("mimo-8b", tmp_path)
    paths = tmp_path, tmp_path / "x.onnx"
    return Subject(
        "mimo-8b", variant, *paths, architecture, entry, Store(),
        open_writer=lambda one: FakeWriter(one.folder), wanted=wanted,
    )  # fmt: skip


def kept(folder: Path) -> dict[str, Any]:
    return {name: Journal(folder / name).items for name in (written.ITEMS, humaneval.VERDICTS)}


def test_greedy_solutions_are_written_judged_and_counted(tmp_path: Path, judged: list[str], writer: Any) -> None:
    found = humaneval.measure(subject(tmp_path), tmp_path)
    tasks = [problem.task_id for problem in problems_of(subject(tmp_path))]
    assert judged == tasks
    even = sum(int(task.split("/")[1]) % 2 == 0 for task in tasks)
    assert (found["n"], found["pass_at_1"], found["samples"]) == (8, even / 8, 1)
    assert writer.asked == tasks
    assert {name: found[name] for name in ("prompt", "temperature", "answer_tokens", "thinking_tokens")} == {
        "prompt": "completion", "temperature": 0, "answer_tokens": 160, "thinking_tokens": 0,
    }  # fmt: skip
    verdict = kept(tmp_path)[humaneval.VERDICTS][written.name_of(tasks[0])]
    assert verdict.keys() == {"completion", "correct", "reason"}


@pytest.mark.parametrize(("prompt", "closed"), [("chat", False), ("closed", True), ("thinking", False)])
def test_a_thought_is_closed_where_the_entry_says_so(
    tmp_path: Path, judged: list[str], writer: Any, prompt: str, closed: bool
) -> None:
    found = humaneval.measure(subject(tmp_path, prompt), tmp_path)
    prompts = [item["prompt"] for item in kept(tmp_path)[written.ITEMS].values()]
    assert found["prompt"] == prompt
    assert {text.endswith("<think>\n\n</think>\n\n") for text in prompts} == {closed}


def test_a_kill_while_judging_loses_no_text_and_no_verdict(
    tmp_path: Path, judged: list[str], writer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = humaneval.judge_all

    def dying(*arguments: Any) -> Iterator[Outcome]:
        for number, outcome in enumerate(whole(*arguments)):
            if number == 5:
                raise Killed
            yield outcome

    monkeypatch.setattr(humaneval, "judge_all", dying)
    with pytest.raises(Killed):
        humaneval.measure(subject(tmp_path), tmp_path)
    items = kept(tmp_path)
    assert (len(items[written.ITEMS]), len(items[humaneval.VERDICTS])) == (8, 5)
    monkeypatch.setattr(humaneval, "judge_all", whole)
    judged.clear()
    writer.asked.clear()
    humaneval.measure(subject(tmp_path), tmp_path)
    assert writer.asked == []
    assert len(judged) == 3


SAMPLED = {"samples": 5, "temperature": 0.8, "top_p": 0.95, "k": (1, 5)}


@pytest.mark.parametrize("drawn", [{}, SAMPLED])
def test_a_kill_while_writing_repeats_no_text_and_changes_none(
    tmp_path: Path, judged: list[str], writer: Any, monkeypatch: pytest.MonkeyPatch, drawn: dict[str, Any]
) -> None:
    undisturbed, killed = tmp_path / "a", tmp_path / "b"
    undisturbed.mkdir()
    killed.mkdir()
    found = humaneval.measure(subject(tmp_path, **drawn), undisturbed)
    asked, whole = list(writer.asked), FakeWriter.continuation

    def dying(self: FakeWriter, *arguments: Any) -> Written:
        if len(self.asked) == 3:
            raise Killed
        return whole(self, *arguments)

    writer.asked.clear()
    judged.clear()
    monkeypatch.setattr(FakeWriter, "continuation", dying)
    with pytest.raises(Killed):
        humaneval.measure(subject(tmp_path, **drawn), killed)
    assert len(kept(killed)[written.ITEMS]) == 3
    assert judged == []
    monkeypatch.setattr(FakeWriter, "continuation", whole)
    assert humaneval.measure(subject(tmp_path, **drawn), killed) == found
    assert writer.asked == asked
    assert kept(killed) == kept(undisturbed)


def test_samples_are_drawn_each_by_a_seed_of_its_own(tmp_path: Path, judged: list[str], writer: Any) -> None:
    found = humaneval.measure(subject(tmp_path, **SAMPLED), tmp_path)
    assert len(writer.asked) == 8 * 5
    assert (found["samples"], found["temperature"], found["top_p"], found["seed"]) == (5, 0.8, 0.95, 0)
    assert 0 < found["pass_at_1"] < found["pass_at_5"] <= 1
    drawn = {name: item["ids"] for name, item in kept(tmp_path)[written.ITEMS].items()}
    assert drawn == {name: [derived_seed(0, name)] for name in drawn}


@pytest.fixture(scope="module")
def quantized(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model's q4 files, as onnxruntime-genai loads them."""
    folder = tmp_path_factory.mktemp("quantized")
    made, target = export(tiny.make_model(folder / "checkpoint"), tiny.CONTEXT), folder / "q4"
    drafted = made.write(changed("q4", search="nearest"), target, part_bytes=1 << 24)
    generation = Generation((2,), 1, 2, {"do_sample": False}, ())
    config = genai_config(made.architecture, generation, drafted.model_file, tiny.CONTEXT)
    write_json(target / "genai_config.json", config)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy2(made.folder / name, target)
    return target


@pytest.mark.parametrize("drawn", [{}, SAMPLED | {"samples": 2, "k": (1, 2)}])
def test_a_quantized_model_writes_each_text_alike_whatever_else_is_asked_and_written_before(
    tmp_path: Path, quantized: Path, judged: list[str], monkeypatch: pytest.MonkeyPatch, drawn: dict[str, Any]
) -> None:
    runs = {"folder": quantized, "open_writer": lambda one: Writer(one.folder)}
    wanted = {"max_new_tokens": 24, **drawn}
    texts = {}
    for n in (8, 3):
        (tmp_path / str(n)).mkdir()
        humaneval.measure(replace(subject(tmp_path, problems=n, **wanted), **runs), tmp_path / str(n))
        texts[n] = kept(tmp_path / str(n))[written.ITEMS]
    assert texts[3].items() <= texts[8].items()
    (tmp_path / "resumed").mkdir()
    journal = Journal(tmp_path / "resumed" / written.ITEMS)
    for name in list(texts[8])[1::2]:
        journal.record(name, texts[8][name])
    humaneval.measure(replace(subject(tmp_path, problems=8, **wanted), **runs), tmp_path / "resumed")
    assert kept(tmp_path / "resumed")[written.ITEMS] == texts[8]


def test_another_seed_draws_others(tmp_path: Path, judged: list[str]) -> None:
    ids = []
    for seed in (0, 1):
        folder = tmp_path / str(seed)
        folder.mkdir()
        humaneval.measure(subject(tmp_path, seed=seed, **SAMPLED), folder)
        ids.append([item["ids"] for item in kept(folder)[written.ITEMS].values()])
    assert ids[0] != ids[1]


def test_thinking_is_left_out_and_the_function_is_found(
    tmp_path: Path, judged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def answer(problem: Problem) -> str:
        return (
            f"Hm.\n```python\ndef {problem.entry_point}(): wrong\n```\n</think>\nSo:\n```python\n{problem.prompt}"
            + (f"{problem.canonical_solution}\n```\n")
        )

    monkeypatch.setattr(FakeWriter, "answer", answer)
    found = humaneval.measure(subject(tmp_path, "thinking"), tmp_path)
    assert (found["prompt"], found["answer_tokens"], found["thinking_tokens"]) == ("thinking", 512, 1024)
    right = [item for item in kept(tmp_path)[humaneval.VERDICTS].values() if item["correct"]]
    assert len(right) == 8 * found["pass_at_1"] > 0
    assert not any("wrong" in item["completion"] for item in right)
    prompts = [item["prompt"] for item in kept(tmp_path)[written.ITEMS].values()]
    assert all(prompt.startswith("<user>Complete the following Python function.") for prompt in prompts)


@pytest.mark.parametrize(("cut", "counts"), [("answer", (8, 0)), ("thinking", (0, 8)), ("", (0, 0))])
def test_solutions_that_met_a_limit_are_counted(
    tmp_path: Path, judged: list[str], monkeypatch: pytest.MonkeyPatch, cut: str, counts: tuple[int, int]
) -> None:
    monkeypatch.setattr(FakeWriter, "cut", cut)
    found = humaneval.measure(subject(tmp_path), tmp_path)
    assert (found["cut_answers"], found["cut_thinking"]) == counts


def test_a_variant_is_paired_by_problem_and_fewer_problems_count_only_themselves(
    tmp_path: Path, judged: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    own, theirs = tmp_path / "q4", tmp_path / "reference"
    own.mkdir()
    theirs.mkdir()
    humaneval.measure(subject(tmp_path, problems=12), theirs)
    monkeypatch.setattr(FakeWriter, "answer", lambda problem: "    pass\n")
    variant = replace(subject(tmp_path, variant="q4"), reference=theirs)
    found = humaneval.measure(variant, own)
    assert found["n"] == 8
    assert found["drop_points"] == 100 * found["reference_pass_at_1"] > 0
    fewer = replace(subject(tmp_path, variant="q4", problems=4), reference=theirs)
    assert humaneval.measure(fewer, own)["n"] == 4
    more = replace(subject(tmp_path, variant="q4", problems=16), reference=theirs)
    with pytest.raises(EvaluationError, match="16 items of the variant do not pair"):
        humaneval.measure(more, own)


def test_no_verdict_is_an_error_and_is_not_recorded(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from pipeline.confine import referee

    monkeypatch.setattr(referee, "_BOOTSTRAP", "raise SystemExit('broken')")
    with pytest.raises(EvaluationError, match=r"there is no verdict: .*broken"):
        humaneval.measure(subject(tmp_path), tmp_path)
    assert kept(tmp_path)[humaneval.VERDICTS] == {}


@pytest.mark.parametrize(("level", "contained"), [("landlock+seccomp+rlimits", True), ("rlimits", False)])
def test_the_level_of_isolation_is_recorded(
    tmp_path: Path, judged: list[str], monkeypatch: pytest.MonkeyPatch, level: str, contained: bool
) -> None:
    monkeypatch.setattr(humaneval, "require_isolation", lambda allow_unsafe: level)
    found = humaneval.measure(subject(tmp_path), tmp_path)
    assert (found["isolation"], found["contained"]) == (level, contained)
