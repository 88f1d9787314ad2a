"""Texts written layer by layer are those of the model in memory, token for token."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint.architecture import read_architecture
from pipeline.errors import EvaluationError
from pipeline.files import read_json, write_json
from pipeline.runtime import device
from pipeline.runtime.generate import Limits, Request, Sampling, Writer, Written
from pipeline.runtime.layered_writer import LayeredWriter, draw
from pipeline.runtime.session import OnnxDecoder
from pipeline.runtime.side_by_side import SideBySide, token_bytes, working_bytes
from tests import tiny
from tests.graph.test_genai import export

pytest_plugins = ["tests.smollm2"]

NEAR_TIE = 1e-4
"""Of the larger logit: two that are closer are decided by the order in which a product adds."""


def never(_: str) -> bool:
    return False


def requests(limits: Sequence[int], prompts: Sequence[str]) -> dict[str, Request]:
    pairs = zip(limits, prompts, strict=True)
    return {f"text {number}": Request(prompt, Limits(most), never) for number, (most, prompt) in enumerate(pairs)}


SHORT = requests((9, 40, 17, 3, 33), ["def add(a, b):", "import numpy as np\n" * 12, "x", "Once upon a time", "yes"])


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny model, as onnxruntime-genai loads it."""
    folder = export(tmp_path_factory.mktemp("tiny"), tiny.CASE, 512)
    tiny.make_tokenizer(folder, tiny.CASE.config["vocab_size"])
    return folder


def writer(folder: Path, states: Path) -> LayeredWriter:
    """As after a restart, with what lies in `states`."""
    return LayeredWriter(folder / "model.onnx", read_architecture(folder / "config.json"), states, "tiny")


def room_for(texts: int, folder: Path, monkeypatch: pytest.MonkeyPatch, wanted: dict[str, Request]) -> None:
    """Memory for so many of the texts."""
    architecture, begun = read_architecture(folder / "config.json"), Writer(folder)
    longest = max(len(begun.begin(request)[0]) + request.limits.total for request in wanted.values())
    memory = working_bytes(architecture, len(wanted)) + texts * longest * token_bytes(architecture)
    monkeypatch.setattr(device.machine, "available_memory", lambda: 4 * memory // 3 + 1)


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """How many tokens each text ran, pass by pass."""
    found: list[list[int]] = []
    one = SideBySide.run

    def spy(self: SideBySide, ids: Sequence[Sequence[int]]) -> np.ndarray:
        found.append([len(row) for row in ids])
        return one(self, ids)

    monkeypatch.setattr(SideBySide, "run", spy)
    return found


@pytest.mark.parametrize("texts", [1, 2, 5])
def test_the_same_texts_whatever_runs_beside_them(
    texts: int, folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[list[int]]
) -> None:
    """And a text that ends makes room for the next, in the same pass."""
    room_for(texts, folder, monkeypatch, SHORT)
    got = list(writer(folder, tmp_path).continuations(SHORT))
    assert got == list(Writer(folder).continuations(SHORT))
    limits = [request.limits.total for request in SHORT.values()]
    assert max(map(len, passes)) == texts
    assert sum(map(len, passes)) == sum(limits), "no text ran longer than it had to"
    assert len(passes) == {1: sum(limits), 2: 9 + 17 + 3 + 33, 5: max(limits)}[texts]


def test_a_killed_run_goes_on_in_the_middle_of_its_texts(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, passes: list[list[int]]
) -> None:
    room_for(2, folder, monkeypatch, SHORT)
    want = list(Writer(folder).continuations(SHORT))
    kept: list[Written] = []
    for kills in range(1, 5):
        with pytest.raises(InterruptedError):
            _until(writer(folder, tmp_path), 11 * kills, kept, passes, monkeypatch)
    kept += writer(folder, tmp_path).continuations(dict(list(SHORT.items())[len(kept) :]))
    assert kept == want
    assert sum(map(len, passes)) <= sum(request.limits.total for request in SHORT.values()) + 4 * 2


def _until(
    one: LayeredWriter, passed: int, kept: list[Written], passes: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Write until so many passes were made in all; texts that are given out are the caller's."""
    run = SideBySide.run

    def dying(self: SideBySide, ids: Sequence[Sequence[int]]) -> np.ndarray:
        if len(passes) == passed:
            raise InterruptedError
        return run(self, ids)

    with monkeypatch.context() as patch:
        patch.setattr(SideBySide, "run", dying)
        kept.extend(one.continuations(dict(list(SHORT.items())[len(kept) :])))


def test_a_text_ends_where_it_is_complete_or_says_so(folder: Path, tmp_path: Path) -> None:
    """By the rules of the model in memory: a look every 8 tokens, an end-of-text token, limits of thinking."""
    settings = read_json(folder / "genai_config.json")
    plain = Writer(folder).continuation("x", Limits(40), never)
    stop = plain.ids[20]
    try:
        write_json(folder / "genai_config.json", settings | {"model": settings["model"] | {"eos_token_id": [2, stop]}})
        asked = {
            "complete": Request("x", Limits(40), lambda text: len(text) >= 3),
            "stopped": Request("x", Limits(40), never),
            "thinking": Request("x<think>", Limits(8, thinking=12), never),
        }
        got = list(writer(folder, tmp_path).continuations(asked))
        assert got == list(Writer(folder).continuations(asked))
        assert [one.cut for one in got] == ["", "", "thinking"]
        assert (len(got[0].ids) % 8, got[1].ids[-1], len(got[2].ids)) == (0, stop, 12)
    finally:
        write_json(folder / "genai_config.json", settings)


def test_more_than_the_context_is_refused_before_anything_is_written(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(EvaluationError, match=r"exceeds the context of 512"):
        next(writer(folder, tmp_path).continuations({"long": Request("x", Limits(600), never)}))


# --- sampling ---------------------------------------------------------------------------------------------------------


def test_a_seed_gives_the_same_text_whatever_runs_beside_it(folder: Path, tmp_path: Path) -> None:
    def drawn(name: str, *seeds: int) -> list[Written]:
        asked = {str(seed): Request("Once", Limits(24), never, Sampling(1.0, 0.9, seed)) for seed in seeds}
        return list(writer(folder, tmp_path / name).continuations(asked))

    together = drawn("together", 1, 2, 3)
    assert drawn("alone", 2) == [together[1]]
    assert len({one.ids for one in together}) == 3


def test_draws_follow_the_probabilities_within_top_p() -> None:
    logits = np.log(np.array([0.1, 0.5, 0.15, 0.25], np.float32))
    assert draw(logits, None, 0) == 1
    for sampling in (Sampling(1.0, 0.5, 3), Sampling(0.01, 1.0, 3)):
        assert {draw(logits, sampling, place) for place in range(100)} == {1}
    counts = Counter(draw(logits, Sampling(1.0, 0.7, 3), place) for place in range(6000))
    assert counts.keys() == {1, 3}
    assert counts[1] / 6000 == pytest.approx(2 / 3, abs=0.03)
    counts = Counter(draw(logits, Sampling(0.5, 1.0, 3), place) for place in range(6000))
    squares = np.array([0.1, 0.5, 0.15, 0.25]) ** 2
    np.testing.assert_allclose([counts[n] / 6000 for n in range(4)], squares / squares.sum(), atol=0.03)


# --- the real small model ---------------------------------------------------------------------------------------------


@pytest.mark.long
def test_smollm2_writes_what_it_writes_in_memory(smollm2_export: Path, tmp_path: Path) -> None:
    """But for near ties, where texts part and stay apart. Here, 144 tokens, none was seen."""
    whole = Writer(smollm2_export)
    prompts = [
        'def add(a, b):\n    """Add two numbers."""\n',
        "Water boils at a temperature of",
        whole.chat("Write a function that reverses a list."),
        "Once upon a time there was a little girl who lived in a village near the forest, and every day she",
    ]
    asked = requests((40, 24, 48, 32), prompts)
    got = list(writer(smollm2_export, tmp_path).continuations(asked))
    want = list(whole.continuations(asked))
    decoder = OnnxDecoder(smollm2_export / "model.onnx")
    assert sum(_near_tie(decoder, whole, *pair) for pair in zip(prompts, got, want, strict=True)) <= 1


def _near_tie(decoder: OnnxDecoder, whole: Writer, prompt: str, got: Written, want: Written) -> bool:
    """Whether two texts part where both tokens are about equally likely. Fails where they part otherwise."""
    place = next((n for n, pair in enumerate(zip(got.ids, want.ids, strict=False)) if pair[0] != pair[1]), None)
    if place is None:
        return False
    ids = [*map(int, whole.tokenizer.encode(prompt)), *want.ids[:place]]
    logits = decoder.run(ids)[0][-1]
    margin = abs(logits[got.ids[place]] - logits[want.ids[place]]) / np.abs(logits).max()
    assert margin < NEAR_TIE, f"token {place}: {got.ids[place]} in place of {want.ids[place]}"
    return True
