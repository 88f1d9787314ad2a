"""Who answers: the vectors that ports run, the table that people read, and the code agree."""

from __future__ import annotations

import itertools
import json
from dataclasses import asdict
from typing import Any, get_args

import pytest

from pipeline.config.hybrid import Cascade, Limits, Mode
from pipeline.serve.hybrid.policy import RULES, Asked, Situation, decide, doubts, is_private
from tests.conftest import ROOT

VECTORS = json.loads((ROOT / "phone/vectors/policy.json").read_text())


@pytest.mark.parametrize("vector", VECTORS["decisions"], ids=lambda vector: vector["name"])
def test_decisions(vector: Any) -> None:
    asked = Asked(vector["tokens"], vector["turns"], vector["private"])
    decision = decide(vector["mode"], asked, Situation(**vector["situation"]), Limits(**vector["limits"]))
    assert asdict(decision) == vector["expect"]


def test_vectors_cover_every_rule_and_name_the_defaults() -> None:
    assert {vector["expect"]["rule"] for vector in VECTORS["decisions"]} == {rule.name for rule in RULES}
    assert VECTORS["defaults"] == {"limits": Limits().model_dump(), "situation": Situation().model_dump()}


def test_doubts_and_tags() -> None:
    for vector in VECTORS["doubts"]:
        cascade = Cascade(tokens=vector["tokens"], threshold=vector["threshold"])
        assert doubts(vector["logprobs"], cascade) == vector["expect"], vector["name"]
    for vector in VECTORS["tags"]:
        assert is_private(vector["tags"], vector["known"]) == vector["expect"], vector["name"]


def test_no_situation_sends_what_is_private_or_asks_whom_the_mode_forbids() -> None:
    choices = itertools.product(
        get_args(Mode), (50, 120, 300, 900), (1, 9), (False, True), ("none", "metered", "unmetered"),
        (None, 0.1), ("nominal", "critical"), (False, True), (False, True),
    )  # fmt: skip
    for mode, tokens, turns, private, network, battery, heat, ready, metered in choices:
        situation = Situation(network=network, battery=battery, heat=heat, device_ready=ready)
        found = decide(mode, Asked(tokens, turns, private), situation, Limits(metered=metered))
        places = {found.first, found.then}
        reachable = network == "unmetered" or (network == "metered" and metered)
        if private or mode == "only_device" or not reachable:
            assert "cloud" not in places
        if mode == "only_cloud" or not ready:
            assert "device" not in places
        able = (ready and mode != "only_cloud") or (reachable and mode != "only_device" and not private)
        assert (found.first is None) == (not able)


def test_the_table_in_the_docs_is_the_table_of_the_code() -> None:
    lines = (ROOT / "docs/hybrid.md").read_text().splitlines()
    rows = [
        [cell.strip().strip("`") for cell in line.strip("|").split("|")] for line in lines if line.startswith("| `")
    ]
    shown = {None: "–", "device": "device", "cloud": "cloud"}
    expected = [
        [rule.name, rule.when, shown[rule.first] if rule.first else "refused", shown[rule.then]] for rule in RULES
    ]
    assert [row for row in rows if row[0] in {rule.name for rule in RULES}] == expected
