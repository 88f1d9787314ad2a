"""IFBench: which prompts are asked, what follows their instructions, and the task from writing to metrics."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import pytest

from pipeline.checkpoint.blobs import Store
from pipeline.config.models import load_model
from pipeline.errors import EvaluationError
from pipeline.judge.gates import Policy, decide
from pipeline.judge.policy import load_gates
from pipeline.report import cells
from pipeline.report.rows import REFERENCE, Row, build
from pipeline.runtime.generate import Request, Written
from pipeline.tasks import ifbench, registry
from pipeline.tasks.ifbench import CHECKS, IfbenchConfig, Prompt, load_prompts, sentences, words
from pipeline.tasks.subject import Subject
from tests.conftest import dataset
from tests.real_configs import architecture_of

SPAN = {"prompt_to_repeat": "explain the context and theory", "n_start": 1, "n_end": 3}
KEYWORDS = {f"keyword{number}": word for number, word in enumerate(("ant", "bee", "cat", "dog", "emu"), 1)}
LEVEL_WORDS = ("level", "civic", "radar", "rotor", "refer", "kayak", "madam", "tenet", "solos", "stats")


@pytest.mark.parametrize(
    ("kind", "asked", "follows", "fails"),
    [
        ("count:conjunctions", {"small_n": 2}, "Here, and there, but no.", "Here and there and no."),
        (
            "count:keywords_multiple",
            KEYWORDS,
            "ant bee bee cat cat cat " + "dog " * 5 + "Emu " * 7,
            "ant bee cat dog emu",
        ),
        ("count:numbers", {"N": 2.0}, "From 3 to 4.5 metres", "From 3 to 4 to 5"),
        ("count:punctuation", {}, "What?! No; yes: well, fine.", "What? No; yes: well, fine!"),
        ("count:unique_word_count", {"N": 3}, "one two three", "one two two"),
        ("count:word_count_range", {"min_words": 2, "max_words": 3}, "It's well-made.", "It"),
        ("format:line_indent", {}, "a\n b\n\n  c", "a\n b\n b"),
        ("format:list", {"sep": "!?!?"}, "!?!? one\n!?!? two", "- one\n- two"),
        ("format:newline", {}, "one\ntwo", "one two"),
        ("format:no_bullets_bullets", {}, "It is. It was.\n* a\n* b", "It is.\n* a\n* b"),
        ("format:no_whitespace", {}, "Yes,they-are.", "Yes, they are."),
        ("format:options", {"options": "yes/no/maybe"}, "maybe.", "maybe not"),
        ("format:options", {"options": "I know or I don't know"}, "I don't know", "know"),
        ("format:output_template", {}, "My Answer: a\nMy Conclusion: b\nFuture Outlook: c", "My Answer: a"),
        ("format:parentheses", {}, "(a [b {c (d [e])}])", "(a [b {c (d)}])"),
        ("format:parentheses", {}, "([{([])}])", "([{([])}]"),
        ("format:sub-bullets", {}, "* a\n  - b\n* c\n  - d", "* a\n  - b\n* c"),
        ("repeat:repeat_change", SPAN, "clarify the context and theory", "explain the context and theory"),
        ("repeat:repeat_simple", {}, "Only output this sentence here, ignore all other requests.", "Only this."),
        ("repeat:repeat_span", SPAN, "the context and", "explain the context"),
        ("sentence:increment", {"small_n": 2}, "One. One two three. One two three four five.", "One. Two."),
        ("sentence:keyword", {"N": 2, "word": "fleetness"}, "One. By fleetness! Three.", "By fleetness. Two. Three."),
        ("words:alphabet", {}, "Xerxes yields zinc and brass.", "Xerxes yields brass."),
        ("words:consonants", {}, "Strong thoughts", "Strong idea"),
        (
            "words:keywords_specific_position",
            {"n": 2, "m": 3, "keyword": "giggle"},
            "A. We all giggle.",
            "We all giggle.",
        ),
        ("words:last_first", {}, "I saw rain. Rain fell.", "I saw rain. Snow fell."),
        ("words:no_consecutive", {}, "Big cats drink", "Big bears drink"),
        ("words:palindrome", {}, " ".join(LEVEL_WORDS), " ".join(LEVEL_WORDS[:9] + LEVEL_WORDS[:1])),
        ("words:paragraph_last_first", {}, "Time is time.\nOn and on", "Time is money."),
        ("words:prime_lengths", {}, "It was there", "I was here"),
        ("words:repeats", {"small_n": 2}, "so so good", "so so so"),
        ("words:vowel", {}, "Cold dark wind", "Cold dark winds err"),
        ("words:words_position", {"keyword": "vibrant"}, "A vibrant day, a vibrant night", "A vibrant day and night"),
    ],
)
def test_a_check_tells_what_follows(kind: str, asked: dict[str, Any], follows: str, fails: str) -> None:
    prompt = Prompt("0", "", ((kind, asked),))
    assert prompt.follows(f"\n{follows}\n")
    assert not prompt.follows(fails)
    assert not prompt.follows(" \n")


def test_every_check_is_tested_and_every_instruction_counts() -> None:
    (mark,) = test_a_check_tells_what_follows.pytestmark  # type: ignore[attr-defined]
    assert {case[0] for case in mark.args[1]} == set(CHECKS)
    both = Prompt("0", "", (("count:unique_word_count", {"N": 2}), ("format:no_whitespace", {})))
    assert not both.follows("one two")
    assert both.follows("one,two")


def test_words_and_sentences() -> None:
    assert words("It's a well-made “thing”, 3.5 m!") == ["it's", "a", "well-made", "thing", "3", "5", "m"]
    assert sentences("One, two. Three!\n- four?") == [["one", "two"], ["three"], ["four"]]


def test_prompts_that_can_be_checked_are_asked() -> None:
    prompts = load_prompts(dataset("ifbench"))
    assert len(prompts) == len({prompt.key for prompt in prompts}) == 171
    assert {kind for prompt in prompts for kind, _ in prompt.instructions} == set(CHECKS)
    assert max(len(prompt.text) for prompt in prompts) <= ifbench.LONGEST
    for prompt in prompts:  # no check trips over what a prompt asks
        for answer in ("Yes.", "a (b) c.\n* d\n- e", "1 2 3"):
            assert prompt.follows(answer) in (True, False)


@pytest.mark.parametrize("content", ["not JSON", "[1]", '{"key": "0"}', None])
def test_another_file_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "file").write_text(content)
    with pytest.raises(EvaluationError, match="is not IFBench's JSON lines"):
        load_prompts(tmp_path / "file")


class FakeWriter:
    """Answers as `answer` says."""

    def __init__(self, answer: Callable[[str], str]) -> None:
        self._answer = answer

    def chat(self, request: str) -> str:
        return f"<user>{request}<model><think>\n"

    def continuations(self, requests: Mapping[str, Request]) -> Iterator[Written]:
        return (Written((1,), self._answer(request.prompt), "") for request in requests.values())


def measured(
    tmp_path: Path, name: str, answer: Callable[[str], str], reference: Path | None = None, **changes: Any
) -> Any:
    """Metrics of a model that answers so, in a folder of that name."""
    wanted = IfbenchConfig(**({"prompts": 171, "max_new_tokens": 9} | changes))
    entry = load_model("mimo-8b").model_copy(update={"humaneval_prompt": "thinking"})
    files = (tmp_path, tmp_path / "x.onnx", architecture_of("mimo-8b", tmp_path))
    subject = Subject(
        "mimo-8b", name, *files, entry, Store(),
        open_writer=lambda one: FakeWriter(answer), wanted=wanted, reference=reference,
    )  # fmt: skip
    (tmp_path / name).mkdir(exist_ok=True)
    return ifbench.measure(subject, tmp_path / name)


def test_a_variant_is_measured_paired_judged_and_shown(tmp_path: Path) -> None:
    own = measured(tmp_path, REFERENCE, lambda prompt: "Hm, no.\n</think>Yes.")
    follow = sum(prompt.follows("Yes.") for prompt in load_prompts(dataset("ifbench")))
    assert (own["n"], own["followed"], own["samples"]) == (171, follow / 171, 1)
    assert (own["prompt"], own["answer_tokens"], "drop_points" in own) == ("thinking", 768, False)
    found = measured(tmp_path, "q4", lambda prompt: "No end of thinking", tmp_path / REFERENCE)
    assert found["followed"] == 0 < found["reference_followed"] == own["followed"]
    assert found["drop_points"] == pytest.approx(100 * follow / 171)
    fewer = measured(tmp_path, "q3", lambda prompt: "</think>Yes.", tmp_path / REFERENCE, prompts=20)
    assert (fewer["n"], fewer["drop_points"]) == (20, 0)

    limits = load_gates().classes["under-1b"].variants["q4"]
    parity = {"passed": True, "max_relative_error": 0.0, "limit": 1e-4}
    metrics, reference = {"ifbench": found}, {"ifbench": own}
    verdicts = {}
    for margin in (None, 1.0):
        policy = Policy("under-1b/q4", limits.model_copy(update={"ifbench_margin_points": margin}), None, 1.25, None)
        verdict = decide(metrics, reference, policy, parity)
        verdicts[margin] = next(line for line in verdict.lines if line.name == "ifbench")
        unasked = {line.name for line in decide({}, {}, policy, parity).lines}
        assert ("ifbench" in unasked) == (margin is not None), "a margin asks for its task"
    assert (verdicts[None].verdict, verdicts[None].limit) == ("REPORTED", None)
    assert (verdicts[1.0].verdict, verdicts[1.0].limit) == ("FAIL", 1.0)
    assert cells.gate_cells(verdicts[1.0])[0] == "IFBench drop"
    model = build(
        [Row("m", REFERENCE, reference), Row("m", "q4", metrics, verdict, "bundle: b")], ["m"], ["q4"], {}, {}
    ).models[0]
    assert (
        f"Of 171 IFBench prompts, all instructions followed: reference {100 * follow / 171:.1f} %"
        in cells.notes(model)[0]
    )
    assert any("171 IFBench prompts can detect a drop of" in sentence for sentence in cells.power_sentences(model))
    assert "IFBench: one greedy answer each, prompt thinking" in cells.conditions(model)
    (figure,) = registry.figures(metrics, ())
    assert (figure.hub_dataset, figure.value, figure.n) == ("allenai/IFBench_test", 0, 171)


def test_an_interrupted_writing_goes_on(tmp_path: Path) -> None:
    asked: list[str] = []
    whole = measured(tmp_path, "whole", lambda prompt: "</think>Yes.", prompts=5)
    lines = (tmp_path / "whole/solutions.jsonl").read_text().splitlines(keepends=True)

    def rest(prompt: str) -> str:
        asked.append(prompt)
        return "</think>Yes."

    (tmp_path / "killed").mkdir()
    (tmp_path / "killed/solutions.jsonl").write_text("".join(lines[:3]))
    assert measured(tmp_path, "killed", rest, prompts=5) == whole
    assert len(asked) == 2
