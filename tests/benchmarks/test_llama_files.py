"""llama.cpp's files by arithmetic, beside the sizes that were published; and the rule that admits them."""

from __future__ import annotations

from pathlib import Path

import pytest

from benchmarks.llama_files import BASES, admitted, file_bytes
from tests.real_configs import architecture_of

# GB of bartowski's phi-4-GGUF, as its model card lists them. Its Q4_0, 8.41, has Q4_1 in some matrices, and its Q5_K_M,
# 10.60, has 6 bits in every fused qkv, as the rules of January 2025 had it.
PUBLISHED = {"Q8_0": 15.58, "Q6_K": 12.03, "Q4_K_M": 9.05, "Q3_K_M": 7.36, "Q3_K_S": 6.50}


@pytest.mark.parametrize("mixture", PUBLISHED)
def test_sizes_are_the_published_ones(mixture: str, tmp_path: Path) -> None:
    """Within .2 %: a header has some MB."""
    found = file_bytes(mixture, architecture_of("phi-4", tmp_path))
    assert found / 1e9 == pytest.approx(PUBLISHED[mixture], rel=0.002)


def test_better_mixtures_are_larger(tmp_path: Path) -> None:
    for model in ("mimo-8b", "phi-4", "phi-4-mini"):
        sizes = [file_bytes(mixture, architecture_of(model, tmp_path)) for mixture in BASES]
        assert sizes == sorted(sizes, reverse=True)


def test_the_rule_admits_what_its_app_runs(tmp_path: Path) -> None:
    """MiMo's Q4_0 on 8 GB and its Q4_K_M on 12, by the lower edges of configs/tiers.yaml; nothing on 4."""
    architecture = architecture_of("mimo-8b", tmp_path)
    found = {ram: admitted(architecture, round(ram * 1e9)) for ram in (3.5, 7.0, 10.5)}
    assert found[3.5] is None
    assert [found[ram][0] for ram in (7.0, 10.5)] == ["Q4_0", "Q6_K"]
