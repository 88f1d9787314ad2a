"""Whether drafts may be used: what counts as a near tie, and what the command refuses and says."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner

from pipeline.cli import cli
from pipeline.errors import EvaluationError, PipelineError
from pipeline.files import write_json
from pipeline.judge import speculative as gate
from pipeline.judge.speculative import Judged, Line, describe
from pipeline.runtime.speculative import Greedy, Rounding, first_difference, rounding
from pipeline.workspace import Workspace

VOCAB = 5
LINES = Line("chat", 2, 1, 1, 0.5, 10.0, 12.0), Line("code", 2, 2, 0, 0.9, 10.0, 8.0)
JUDGED = Judged("ngram", LINES, (), 0.1, 0.2, 0.01, 0.1)


class Rows:
    """A decoder whose logits move by `moved` for token 1 in passes over several tokens after the prompt."""

    def __init__(self, moved: float):
        self.moved = moved

    def run(self, ids: list[int], past: Any = None) -> tuple[np.ndarray, Any]:
        logits = np.tile(np.array([0.0, 2.0, 1.0, -3.0, -4.0], np.float32), (len(ids), 1))
        if past is not None and len(ids) > 1:
            logits[:, 1] += self.moved
        return logits, "after"


def test_passes_that_round_alike_do_not_diverge() -> None:
    found = rounding(Rows(0.0), [1, 2], [1, 1, 1, 1, 1], 2)  # type: ignore[arg-type]
    assert found.alone.shape == (5, VOCAB)
    assert found.kl.tolist() == found.moved.tolist() == [0.0] * 5


def test_what_passes_move_is_told_for_each_token() -> None:
    found = rounding(Rows(0.5), [1, 2], [1, 1, 1, 1, 1], 2)  # type: ignore[arg-type]
    np.testing.assert_allclose(found.moved, [0, 0.5, 0.5, 0.5, 0.5], atol=1e-6)  # the prompt gives the first
    before = np.array([0.0, 2.0, 1.0, -3.0, -4.0])
    after = before + np.array([0, 0.5, 0, 0, 0])
    p, q = (np.exp(values) / np.exp(values).sum() for values in (before, after))
    np.testing.assert_allclose(found.kl[1:], (p * np.log(p / q)).sum(), rtol=1e-5)
    assert found.margin(2, 1, 2) == pytest.approx(1.0, abs=1e-6)


def test_texts_part_at_the_first_other_token() -> None:
    assert first_difference([1, 2, 3], [1, 2, 4]) == 2
    assert first_difference([1, 2, 3], [1, 2]) is None


class Texts:
    """A model that writes what it is told, in place of one on disk."""

    def __init__(self, ids: tuple[int, ...], seconds: float):
        self.text = Greedy(ids, seconds, 4, 3)

    def write(self, prompt: Any, new: int, stops: Any = ()) -> Greedy:
        return self.text


@pytest.mark.parametrize(("moved", "passes"), [(0.6, True), (0.4, False)])
def test_a_text_may_leave_the_plain_one_at_a_near_tie_only(
    moved: float, passes: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Tokens 1 and 2 lie one nat apart: within twice 0.6, not within twice 0.4."""
    models = {None: Texts((1, 1, 1, 1), 2.0), "drafts": Texts((1, 1, 2, 1), 1.0)}
    monkeypatch.setattr(gate, "Greedily", lambda folder, settings=None: models[settings and "drafts"])
    monkeypatch.setattr(gate, "Prompter", lambda folder: SimpleNamespace(context=1000, stop_ids={0}))
    monkeypatch.setattr(gate, "OnnxDecoder", lambda graph: Rows(moved))
    monkeypatch.setattr(gate.held_out, "scored_ids", lambda *_: [np.array([1, 2])] * 6)
    settings = {"ngram": {"speculative": {"max_draft_tokens": 3}}}
    found = gate.judge(Path(), Path(), settings, 4, 2, kl_own=1.0)
    assert found.passed is passes
    assert found.parted == pytest.approx(1.0)
    assert {line.near_ties for line in found.lines} == {2 * passes}
    assert len(found.wrong) == 6 * (not passes)
    assert {(line.equal, line.accepted, line.speedup) for line in found.lines} == {(0, 0.75, 2.0)}


def test_passes_may_not_diverge_further_than_the_variant() -> None:
    assert JUDGED.passed
    assert not replace(JUDGED, kl_rows=0.11).passed
    assert not replace(JUDGED, wrong=("text 0",)).passed


def test_the_table_says_where_drafts_are_slower() -> None:
    text = describe(JUDGED)
    assert "1/2            1       50%     10.0     12.0 (1.20 ×)" in text
    assert text.count("PASS") == 2
    assert text.endswith("slower on code: leave it off there")
    assert "FAIL: passes" in describe(replace(JUDGED, kl_rows=0.11))


def test_a_context_that_is_too_short_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gate, "Prompter", lambda folder: SimpleNamespace(context=200))
    with pytest.raises(EvaluationError, match=r"128 tokens and 128 new ones exceed the context of 200\. Lower --new"):
        gate.judge(Path(), Path(), {}, 128, 2, 1.0)


def test_a_plain_text_leaves_no_margin() -> None:
    read = Rounding(np.zeros(2), np.zeros(2), np.zeros((2, VOCAB), np.float32))
    assert gate._margin(Greedy((1, 2), 1.0), Greedy((1, 2), 1.0), read) is None


def test_what_has_to_run_before_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace("tiny")
    with pytest.raises(PipelineError, match="pipeline quantize tiny q4"):
        gate.run("tiny", "q4", None, None, 8, 2, False)
    workspace.artifact("q4").mkdir(parents=True)
    with pytest.raises(PipelineError, match="pipeline validate tiny q4"):
        gate.run("tiny", "q4", None, None, 8, 2, False)
    write_json(workspace.measurements("q4"), {"speed": {}})
    with pytest.raises(EvaluationError, match="tiny q4: its divergence was not measured; use a suite that has"):
        gate.run("tiny", "q4", None, None, 8, 2, False)


@pytest.mark.parametrize("option", [("--tokens", "17"), ("--tokens", "0"), ("--ngram", "1"), ("--texts", "1")])
def test_options_out_of_range_are_refused(option: tuple[str, str]) -> None:
    found = CliRunner().invoke(cli, ["speculate", "smollm2-135m", "q4", *option])
    assert found.exit_code == 2
    assert f"Invalid value for '{option[0]}'" in found.output
