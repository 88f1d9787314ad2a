"""What it costs: the request's figures by hand, and the ledger's sums."""

from __future__ import annotations

import calendar
import json
from pathlib import Path

import pytest
import yaml

from pipeline.config.cost import load_cost
from pipeline.config.hybrid import load_hybrid
from pipeline.errors import ConfigError, PipelineError
from pipeline.serve.hybrid.cost import break_even, rows, run
from pipeline.serve.hybrid.ledger import Attempt, Ledger
from tests.conftest import ROOT

CONFIGS = ROOT / "configs"


def test_the_request_s_figures_by_hand() -> None:
    """10 M tokens: 150 $ at 15, 4.20 $ at 0.42; 30 % of them at 8 are 24 $, and 20 besides."""
    found = rows(load_cost())
    assert [(row.setup, pytest.approx(row.monthly), row.claimed) for row in found] == [
        (5_000, 150.00, 2_500), (3_000, 4.20, 125), (25_000, 44.00, 100), (50_000, 0, 0),
    ]  # fmt: skip
    claims = [row.why for row in found]
    assert "166,666,667 tokens at this price, 16.7 times" in claims[0]  # 2,500 / 15
    assert "297,619,048 tokens at this price, 29.8 times" in claims[1]  # 125 / 0.42
    assert "by the claim, the device answers nothing" in claims[2]  # 80 $ = 10 M × 8 $/M
    assert claims[3] == ""


def test_break_even_by_hand() -> None:
    months = {(pair.first, pair.second): (pair.months, pair.claimed) for pair in break_even(rows(load_cost()))}
    dear, cheap, both, device = "cloud only, 15 $/M", "cloud only, 0.42 $/M", "hybrid, 8 $/M", "device only"
    by_hand = {
        (cheap, dear): (None, None),  # dearer to set up and dearer a month
        (cheap, both): (None, 22_000 / 25),
        (cheap, device): (47_000 / 4.20, 47_000 / 125),
        (dear, both): (20_000 / 106, 20_000 / 2_400),
        (dear, device): (300, 18),
        (both, device): (25_000 / 44, 250),
    }
    assert months == {pair: pytest.approx(both_ways) for pair, both_ways in by_hand.items()}


def test_prompts_cost_too(tmp_path: Path) -> None:
    plain = yaml.safe_load((CONFIGS / "cost.yaml").read_text())
    plain["input_tokens"]["value"] = 40_000_000
    plain["prices"]["at-8"]["input"] = 2
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(plain))
    (hybrid,) = (row for row in rows(load_cost(path)) if row.title.startswith("hybrid"))
    assert hybrid.monthly == pytest.approx(0.3 * 40 * 2 + 24 + 20)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"price": None}, "so tokens go to a cloud: name its `price`"),
        ({"price": "at-9"}, r"options.hybrid.price: 'at-9' is not in prices. Did you mean 'at-8'\?"),
        ({"share_locally": 1}, "unknown key; did you mean 'share_local'"),
    ],
)
def test_parameters_that_cannot_be_meant(change: dict[str, object], message: str, tmp_path: Path) -> None:
    plain = yaml.safe_load((CONFIGS / "cost.yaml").read_text())
    plain["options"]["hybrid"] |= change
    path = tmp_path / "own.yaml"
    path.write_text(yaml.safe_dump(plain))
    with pytest.raises(ConfigError, match=message):
        load_cost(path)


def test_what_the_ledger_says(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "ledger.sqlite"
    november, december = (calendar.timegm((2026, month, 1, 0, 0, 1)) for month in (11, 12))
    book = Ledger(path)
    for at, place, outcome, usage, cost in (
        (november, "cloud", "answered", "reported", 0.5), (november, "cloud", "HTTP 500", "estimated", 0.0),
        (november, "device", "answered", "counted", 0.0), (december, "cloud", "answered", "disputed", 0.25),
    ):  # fmt: skip
        row = Attempt("r", 1, place, place, "m", "prefer_cloud", "low", "LOW", 9, usage, 10, cost, 5, at=at)  # type: ignore[arg-type]
        with book.attempt(row):
            row.outcome = outcome
    run(None, str(path), True)
    sums = json.loads(capsys.readouterr().out)
    assert [(one["month"], one["place"], one["attempts"], one["answered"], one["cost"]) for one in sums] == [
        ("2026-11", "cloud", 2, 1, 0.5), ("2026-11", "device", 1, 1, 0.0), ("2026-12", "cloud", 1, 1, 0.25),
    ]  # fmt: skip
    assert (sums[0]["estimated"], sums[2]["disputed"], sums[0]["prompt_tokens"]) == (1, 1, 20)
    run(None, str(path), False)
    assert "2026-11: 50.0% of 2 answers came from the device; 0.500000 $." in capsys.readouterr().out
    with pytest.raises(PipelineError, match="nothing was asked yet"):
        run(None, str(tmp_path / "none"), False)


def test_the_shipped_policy_loads_and_says_what_the_defaults_are(tmp_path: Path) -> None:
    shipped = load_hybrid()
    plain = yaml.safe_load((CONFIGS / "hybrid.yaml").read_text())
    path = tmp_path / "short.yaml"
    path.write_text(yaml.safe_dump({key: plain[key] for key in ("provider", "providers", "tags")}))
    assert load_hybrid(path) == shipped
    for change, message in (
        ({"modes": "only_device"}, "unknown key; did you mean 'mode'"),
        ({"mode": "prefer_devise"}, "did you mean 'prefer_device'"),
        ({"provider": "nobody"}, "provider 'nobody' is not in providers"),
        ({"limits": {"low": 600}}, r"low \(600\) is above high \(500\)"),
        ({"providers": {"a": plain["providers"]["here"] | {"base_url": "http://example.com/v1"}}}, "base_url"),
    ):
        path.write_text(yaml.safe_dump(plain | change))
        with pytest.raises(ConfigError, match=message):
            load_hybrid(path)
