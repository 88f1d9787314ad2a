"""Held-out text of four kinds: what is read, what a model reads of it, and that calibration never does."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from pipeline.calibrate.texts import read_tokenizer
from pipeline.checkpoint.blobs import Store
from pipeline.config.calibration import load_calibration, load_sensitivity
from pipeline.config.typed_yaml import check
from pipeline.errors import ConfigError
from pipeline.tasks import held_out
from pipeline.tasks.divergence import DivergenceConfig
from pipeline.tasks.registry import load_suite
from pipeline.tasks.statistics import WINDOW_LOOKS
from tests import tiny
from tests.conftest import dataset

SUITES = ("smoke", "release")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tiny.make_tokenizer(tmp_path, 384)
    return tmp_path


def _texts(kind: str) -> dict[str, list[str]]:
    wanted = load_suite("smoke").divergence.by_kind
    for name in held_out.pins(wanted):
        dataset(name)
    return dict(held_out.texts({kind: wanted[kind]}, Store()))


@pytest.mark.parametrize("suite", SUITES)
def test_a_shipped_suite_judges_four_kinds_alike_that_calibration_never_reads(suite: str) -> None:
    part = load_suite(suite).divergence
    windows = {kind: sum(texts.values()) for kind, texts in part.by_kind.items()}
    assert tuple(windows) == held_out.KINDS and len(set(windows.values())) == 1
    assert len(part.windows) in WINDOW_LOOKS
    assert not {*held_out.pins(part.by_kind)} & {*load_calibration().datasets, *load_sensitivity().datasets}


def test_suites_are_looks_of_their_own() -> None:
    """Both at the same look would be two chances for the error of one."""
    assert sorted(len(load_suite(suite).divergence.windows) for suite in SUITES) == sorted(WINDOW_LOOKS)


def test_a_chat_is_read_through_the_model_s_template(folder: Path) -> None:
    messages = _texts("chat")["chat-mt-bench"]
    assert len(messages) == 30 * 4 and messages[0].startswith("Imagine you are participating in a race")
    ids = held_out.scored_ids({"chat": {"chat-mt-bench": 200}}, 64, folder, Store())
    text = "".join(read_tokenizer(folder).decode(window.tolist(), skip_special_tokens=False) for window in ids)
    assert f"<|im_start|>user\n{messages[0]}"[:40] in text and "<|im_start|>assistant\n" in text


def test_other_languages_are_sentences_with_their_own_letters() -> None:
    found = {name: text for name, (text,) in _texts("languages").items()}
    assert "Người lao động có quyền" in found["text-vietnamese"] and "话说天下大势" in found["text-chinese"]
    assert all(len(text) > 100_000 and "\\u" not in text for text in found.values())


def test_code_is_one_file_of_python() -> None:
    (source,) = _texts("code")["text-bottle"]
    compile(source, "bottle.py", "exec")


@pytest.mark.parametrize(
    ("texts", "problem"),
    [
        (
            {"prose": {"text-wiki": 33}},
            "33 windows in all: divergence is judged at 32 or 64",
        ),
        ({"prose": {"text-wiki": 31}, "code": {"text-bottle": 1}}, "text-bottle has fewer than two windows"),
        ({}, "all text has fewer than two windows"),
        ({"texts": {"text-wiki": 32}}, "texts"),
    ],
)
def test_windows_that_cannot_be_judged_are_refused_before_anything_runs(texts: dict, problem: str) -> None:
    with pytest.raises(ConfigError, match=problem):
        check(DivergenceConfig, yaml.safe_load(yaml.safe_dump(texts | {"window": 192})), "suite")


def test_windows_come_kind_by_kind() -> None:
    part = DivergenceConfig(languages={"text-vietnamese": 2}, prose={"text-wiki": 3}, window=65)
    assert part.windows == [("prose", "text-wiki")] * 3 + [("languages", "text-vietnamese")] * 2
    assert (part.texts, part.tokens) == ({"text-wiki": 3, "text-vietnamese": 2}, 5 * 64)
