"""provenance.json: an in-toto statement with SLSA provenance that others' classes read; equal bytes every time."""

from __future__ import annotations

import json
from collections.abc import Callable
from typing import Any

import pytest

from pipeline.bundle import provenance
from pipeline.bundle.provenance import Material
from pipeline.bundle.release import FileEntry

SUBJECTS = {"b.onnx": FileEntry(size=1, sha256="b" * 64), "a.json": FileEntry(size=2, sha256="a" * 64)}
MATERIALS = (
    Material(name="configs/gates.yaml", digest={"sha256": "1" * 64}),
    Material(uri="pkg:pypi/onnx@1.23.2"),
    Material(name="pipeline", uri="git+https://host/x@" + "c" * 40, digest={"gitCommit": "c" * 40}),
)
EXTERNAL = {"model": "demo", "variant": "q4", "recipe": "Q4", "suite": "demo"}


def build(subjects: Any = SUBJECTS, external: Any = EXTERNAL, materials: Any = MATERIALS) -> bytes:
    return provenance.build(subjects, external, {"recordedStages": []}, materials)


def test_order_does_not_matter() -> None:
    turned = dict(reversed(SUBJECTS.items())), dict(reversed(EXTERNAL.items())), tuple(reversed(MATERIALS))
    assert build() == build(*turned)


def test_the_statement_names_every_file_and_every_material() -> None:
    made = json.loads(build())
    assert made["subject"] == [
        {"name": "a.json", "digest": {"sha256": "a" * 64}},
        {"name": "b.onnx", "digest": {"sha256": "b" * 64}},
    ]
    definition = made["predicate"]["buildDefinition"]
    assert definition["externalParameters"] == EXTERNAL
    assert [item.get("name", item.get("uri")) for item in definition["resolvedDependencies"]] == [
        "configs/gates.yaml",
        "pipeline",
        "pkg:pypi/onnx@1.23.2",
    ]


def test_the_invocation_is_derived_and_no_time_is_told() -> None:
    def invocation(raw: bytes) -> dict[str, str]:
        return json.loads(raw)["predicate"]["runDetails"]["metadata"]

    assert set(invocation(build())) == {"invocationId"}
    others = [
        build(subjects={"a.json": SUBJECTS["a.json"]}),
        build(external=EXTERNAL | {"suite": "full"}),
        build(materials=MATERIALS[:1]),
    ]
    assert len({invocation(raw)["invocationId"] for raw in [build(), *others]}) == 4


@pytest.mark.parametrize(
    "spoil",
    [
        lambda made: made.update(subject=[]),
        lambda made: made.update(_type="https://in-toto.io/Statement/v0.1"),
        lambda made: made.update(predicateType="https://slsa.dev/provenance/v0.2"),
        lambda made: made.update(invented=1),
        lambda made: made["subject"][0].pop("digest"),
        lambda made: made.pop("predicate"),
        lambda made: made["predicate"].update(invented=1),
        lambda made: made["predicate"]["buildDefinition"].update(buildType="https://elsewhere"),
        lambda made: made["predicate"]["buildDefinition"].update(resolvedDependencies=[]),
        lambda made: made["predicate"]["buildDefinition"].update(resolvedDependencies=[{}]),
        lambda made: made["predicate"]["buildDefinition"].pop("externalParameters"),
        lambda made: made["predicate"]["runDetails"].update(builder={"id": "https://elsewhere"}),
    ],
)
def test_a_spoilt_statement_is_found(spoil: Callable[[dict[str, Any]], object]) -> None:
    made = json.loads(build())
    assert provenance.problem_of(json.dumps(made).encode()) is None
    spoil(made)
    assert provenance.problem_of(json.dumps(made).encode())


@pytest.mark.parametrize("raw", [b"", b"\xff", b"[]", b"null", b'{"a":' * 5000])
def test_what_is_no_statement_is_found(raw: bytes) -> None:
    assert provenance.problem_of(raw)


def test_the_build_type_is_documented() -> None:
    from tests.conftest import ROOT

    text = (ROOT / "docs/provenance.md").read_text()
    assert provenance.BUILD_TYPE in text
    assert provenance.BUILDER in text
