"""README.md and the licence statement: read back with huggingface_hub's classes, with measured numbers only."""

from __future__ import annotations

from typing import Any

import pytest
from huggingface_hub import ModelCard

from pipeline.bundle import card, licence
from tests.bundle.dossiers import METRICS, NOTE, dossier, source


def read(**changes: Any) -> ModelCard:
    return ModelCard(card.build(dossier(**changes)).decode())


def test_equal_dossiers_give_equal_bytes() -> None:
    assert card.build(dossier()) == card.build(dossier())


def test_the_model_index_holds_what_was_measured() -> None:
    results = {result.metric_type: result for result in read().data.eval_results}
    assert {name: result.metric_value for name, result in results.items()} == {
        "kl_divergence": 0.164607,
        "top1_agreement": 0.806,
        "perplexity_ratio": 1.122,
        "accuracy": 0.25,
        "pass@1": 0.0,
    }
    assert (results["accuracy"].dataset_type, results["accuracy"].dataset_args) == ("cais/mmlu", {"n": 114})
    assert "mode cloze, 114 questions" in results["accuracy"].metric_name
    assert results["pass@1"].dataset_args == {"n": 20}


def test_what_was_not_measured_is_not_in_the_index() -> None:
    made = read(metrics={})
    assert made.data.eval_results is None
    assert "Nothing was measured." in made.text
    assert "MMLU was not measured." in made.text
    assert [item.metric_type for item in read(metrics={"mmlu": METRICS["mmlu"]}).data.eval_results] == ["accuracy"]


def test_the_text_tells_figures_limits_and_how_to_verify() -> None:
    text = read().text
    assert "| 0.165 | 0.14 to 0.19 | 3,000 tokens of text-wiki |" in text
    for part in (NOTE, "No phone was used", "A caveat.", "ORT_DISABLE_TELEMETRY", "model_signing verify key"):
        assert part in text
    assert "| w4b64a | 2 | 15 |" in text


def test_the_text_tells_what_an_app_must_know_of_the_tokenizer() -> None:
    note = "An app must compose text to NFC\nbefore it encodes it."
    assert "- An app must compose text to NFC before it encodes it." in read(notes=(note,)).text


def test_the_base_is_named_where_it_is_known() -> None:
    known, unknown = read().data, read(base_model=None).data
    assert (known.base_model, known["base_model_relation"]) == ("owner/demo", "quantized")
    assert (unknown.base_model, unknown.get("base_model_relation")) == (None, None)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("Apache-2.0", ("apache-2.0", None, None)),
        ("mit", ("mit", None, None)),
        ("see LICENSE", ("other", "see LICENSE", "LICENSE")),
        ("MIT OR Apache-2.0", ("other", "MIT OR Apache-2.0", "LICENSE")),
        ("", ("other", "unknown", "LICENSE")),
    ],
)
def test_the_licence_is_one_that_the_hub_knows_or_other(stated: str, expected: tuple[str, Any, Any]) -> None:
    data = read(source=source(stated)).data
    assert (data.license, data.license_name, data.license_link) == expected


def test_hostile_text_stays_in_its_line() -> None:
    made = read(title="A\n---\nlicense: mit\n---", note="x\n## Safe\nall good", source=source("b\n---\nc"))
    assert made.data.license == "other"
    assert "\n## Safe" not in made.text
    assert "\n---\n" not in made.text


@pytest.mark.parametrize("raw", [b"", b"\xff", b"no front matter", b"---\nlicense: mit\n---\n", b"---\n- 1\n---\ntext"])
def test_what_is_no_card_is_found(raw: bytes) -> None:
    assert card.problem_of(raw)


def test_a_spoilt_index_is_found() -> None:
    raw = card.build(dossier())
    assert card.problem_of(raw) is None
    assert card.problem_of(raw.replace(b"  results:", b"  resluts:"))
    assert card.problem_of(raw.replace(b"license:", b"licence:"))


def test_a_statement_stands_only_where_no_text_is() -> None:
    assert licence.statement("Demo", "r", "mit", ["LICENSE.txt", "config.json"]) is None
    text = (licence.statement("Demo", "r", "mit OR apache-2.0", ["config.json"]) or b"").decode()
    assert "states the licence MIT OR Apache-2.0 (SPDX), and ships no text of it" in text
    assert "https://spdx.org/licenses/Apache-2.0.html\nhttps://spdx.org/licenses/MIT.html\n" in text
    unknown = (licence.statement("Demo", "r", "my terms", []) or b"").decode()
    assert "my terms" in unknown
    assert "spdx.org" not in unknown
