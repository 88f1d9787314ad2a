"""How often a cloud would be asked: by hand on few answers, and the label where the model knows nothing."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from pipeline.errors import EvaluationError
from pipeline.files import write_json
from pipeline.journal import Journal
from pipeline.report.cascade import Sure, needed, point, run
from pipeline.tasks.mmlu import ITEMS
from pipeline.tasks.sections import RECORD
from tests.conftest import ROOT

REFERENCE = Sure(np.array([-0.1, -0.2, -0.3, -2.0]), np.array([True, True, True, False]))
QUANTIZED = Sure(np.array([-0.1, -0.9, -1.5, -2.0]), np.array([True, True, False, False]))


def test_a_threshold_by_hand() -> None:
    found = point("q4", QUANTIZED, REFERENCE, -1.0)
    assert (found.asked, found.more[0], found.kept, found.right) == (0.5, 0.25, 1.0, 1.0)
    assert point("q4", QUANTIZED, REFERENCE, -9.0).right == 0.5
    assert point("q4", QUANTIZED, REFERENCE, 0.0).kept is None


def test_the_price_of_quantization_by_hand() -> None:
    """q4 has 2 of 4 right; its least sure answer, asked of the cloud, makes 3 of 4: a quarter of the questions."""
    assert (needed(REFERENCE, 0.75), needed(QUANTIZED, 0.75), needed(QUANTIZED, 1.0)) == (0.0, 0.25, 0.5)
    unsure = Sure(QUANTIZED.confidence[::-1], QUANTIZED.correct)
    assert needed(unsure, 0.75) == 0.75, "where confidence misleads, right answers are asked first"


def _project(folder: Path, accuracies: dict[str, float], monkeypatch: pytest.MonkeyPatch, n: int = 200) -> None:
    (folder / "configs").symlink_to(ROOT / "configs")
    monkeypatch.chdir(folder)
    rng = np.random.default_rng(0)
    for name, accuracy in accuracies.items():
        own = folder / "artifacts/smollm2-135m/evaluation" / name / "mmlu"
        own.mkdir(parents=True)
        journal = Journal(own / ITEMS)
        for number in range(n):
            scores = rng.normal(-3, 1, 4).tolist()
            journal.record(f"{number:032x}", {"scores": scores, "correct": number < accuracy * n, "answer": 0})
        write_json(own / RECORD, {"items": {}, "metrics": {"accuracy": accuracy}})


@pytest.mark.parametrize(("accuracy", "label"), [(0.7, False), (0.27, True)])
def test_a_model_at_chance_shows_the_machinery_only(
    accuracy: float, label: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    _project(tmp_path, {"reference": accuracy, "q3": 0.2}, monkeypatch)
    run("smollm2-135m", False)
    text = capsys.readouterr().out
    assert text.startswith("A check of the machinery, no result") == label and "q3" in text
    run("smollm2-135m", True)
    document = json.loads(capsys.readouterr().out)
    assert document["above_chance"] != label
    asked = [row["asked"] for row in document["thresholds"] if row["variant"] == "reference"]
    assert asked == pytest.approx([0.1, 0.25, 0.5])


def test_without_a_variant_there_is_nothing_to_compare(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _project(tmp_path, {"reference": 0.5}, monkeypatch)
    with pytest.raises(EvaluationError, match="needs those of reference and of a variant"):
        run("smollm2-135m", False)
