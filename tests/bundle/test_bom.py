"""bom.cdx.json: valid by the strict schema, the same bytes every time, and nothing in it that was not measured."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.bundle import bom
from pipeline.bundle.release import FileEntry
from tests.bundle.dossiers import METRICS, NOTE, REVISION, dossier, source


def document(**changes: Any) -> dict[str, Any]:
    return json.loads(bom.build(dossier(**changes)))


def card(**changes: Any) -> dict[str, Any]:
    return document(**changes)["metadata"]["component"]["modelCard"]


def test_equal_dossiers_give_equal_bytes() -> None:
    turned = dict(reversed(dossier().files.items()))
    assert bom.build(dossier()) == bom.build(dossier(files=turned))


def test_the_serial_number_names_the_content() -> None:
    changed = document(files={"demo_q4.onnx": FileEntry(size=3, sha256="5" * 64)})
    assert document()["serialNumber"] != changed["serialNumber"]
    assert document()["metadata"]["timestamp"] == "2026-01-31T12:00:00+00:00"


def test_every_file_and_every_file_of_the_source_is_named_with_its_hash() -> None:
    made = document()
    listed = {item["name"]: item["hashes"][0]["content"] for item in made["components"] if item["type"] == "file"}
    assert listed == {"LICENSE": "4" * 64, "demo_q4.onnx": "3" * 64}
    (ancestor,) = made["metadata"]["component"]["pedigree"]["ancestors"]
    assert (ancestor["version"], ancestor["purl"]) == (REVISION, f"pkg:huggingface/owner/demo@{REVISION}")
    assert {item["name"]: item["hashes"][0]["content"] for item in ancestor["components"]} == {
        "config.json": "1" * 64,
        "model.safetensors": "2" * 64,
    }


def test_runtimes_and_the_pipeline_are_components() -> None:
    made = document()
    assert {item["purl"] for item in made["components"] if item["type"] == "library"} == {
        "pkg:pypi/onnxruntime@1.31.1",
        "pkg:pypi/onnxruntime-genai@0.18.0",
    }
    (tool,) = made["metadata"]["tools"]["components"]
    assert (tool["name"], tool["version"]) == (bom.PIPELINE, "d" * 40)


def test_metrics_are_strings_with_their_intervals() -> None:
    metrics = card()["quantitativeAnalysis"]["performanceMetrics"]
    kl, top1, *_ = metrics
    assert kl["value"] == "0.164607"
    assert kl["confidenceInterval"] == {"lowerBound": "0.14", "upperBound": "0.19"}
    assert kl["slice"] == "3,000 tokens of text-wiki"
    assert (top1["value"], "confidenceInterval" in top1) == ("0.806", False)
    assert [item["slice"] for item in metrics if "MMLU" in item["type"]] == ["MMLU, mode cloze, 114 questions"]
    assert "123.456" not in json.dumps(document()), "speed belongs to the machine that measured"


def test_limits_are_told() -> None:
    told = card()["considerations"]["technicalLimitations"]
    assert "No phone was used" in told[0]
    assert f"MMLU graded drop: {NOTE}." in told
    assert "A caveat." in told
    assert [sentence for sentence in told if "was not measured." in sentence] == ["IFBench was not measured."]


def test_what_was_not_measured_is_a_limit_and_no_metric() -> None:
    made = card(metrics={"mmlu": METRICS["mmlu"]})
    assert [item["type"] for item in made["quantitativeAnalysis"]["performanceMetrics"]] == ["MMLU accuracy (share)"]
    told = made["considerations"]["technicalLimitations"]
    assert {"Divergence was not measured.", "HumanEval was not measured."} <= set(told)


@pytest.mark.parametrize(
    ("stated", "expected"),
    [
        ("apache-2.0", {"license": {"id": "Apache-2.0"}}),
        ("mit", {"license": {"id": "MIT"}}),
        ("MIT OR apache-2.0", {"expression": "MIT OR Apache-2.0"}),
        ("see LICENSE", {"license": {"name": "see LICENSE"}}),
        ("two\nlines", {"license": {"name": "two lines"}}),
        ("", {"license": {"name": "unknown"}}),
    ],
)
def test_licences_are_spdx_where_they_can_be(stated: str, expected: dict[str, Any]) -> None:
    made = document(source=source(stated))["metadata"]["component"]
    (found,) = made["licenses"]
    assert {key: found[key] for key in expected} == expected


def test_a_folder_of_somebodys_machine_is_not_named() -> None:
    raw = bom.build(dossier(source=source(source={"kind": "local", "path": "/home/somebody/weights"})))
    assert b"somebody" not in raw
    assert "purl" not in json.loads(raw)["metadata"]["component"]["pedigree"]["ancestors"][0]


@pytest.mark.parametrize(
    "spoil",
    [
        lambda made: made.update(invented=1),
        lambda made: made.update(specVersion="1.5"),
        lambda made: made["components"][0]["hashes"][0].update(content="abc"),
        lambda made: made["metadata"]["component"]["modelCard"]["quantitativeAnalysis"]["performanceMetrics"][0].update(
            value=0.16
        ),
        lambda made: made["metadata"]["component"].update(type="model"),
        lambda made: made["metadata"].update(timestamp="yesterday"),
    ],
    ids=["field", "version", "hash", "number", "type", "time"],
)
def test_an_invalid_document_is_found(spoil: Callable[[dict[str, Any]], object]) -> None:
    made = document()
    assert bom.problem_of(json.dumps(made).encode()) is None
    spoil(made)
    assert "it is not CycloneDX 1.6 at $" in (bom.problem_of(json.dumps(made).encode()) or "")


@pytest.mark.parametrize("raw", [b"", b"\xff", b"{", b"[]", b"null"])
def test_what_is_no_document_is_found(raw: bytes) -> None:
    assert bom.problem_of(raw)
