"""Several `dvc repro` in one project, each of one variant: docs/scale.md's command runs them side by side."""

from __future__ import annotations

from pathlib import Path

import yaml

from tests.documented import blocks
from tests.test_clones import run

VARIANTS = ["q3", "q4", "q4_k_m"]
# A quantize ends when all three have begun.
STAGES = """\
stages:
  sensitivity:
    matrix: {model: [mimo-8b]}
    cmd: echo sensitivity >> runs && echo measured > damage
    outs: [damage]
  learn:
    matrix: {model: [mimo-8b], variant: [q4, q4_k_m, q3]}
    cmd: echo learn >> runs && cat damage > learned-${item.variant}
    deps: [damage]
    outs: ["learned-${item.variant}"]
  quantize:
    matrix: {model: [mimo-8b], variant: [q4, q4_k_m, q3]}
    cmd: >-
      echo quantize >> runs && touch begun-${item.variant} && timeout 100 sh -c 'until [ -e begun-q4 -a -e begun-q4_k_m
      -a -e begun-q3 ]; do sleep 0.1; done' && echo ${item.variant} > artifact-${item.variant}
    deps: [damage, "learned-${item.variant}"]
    outs: ["artifact-${item.variant}"]
  validate:
    matrix: {model: [mimo-8b], variant: [q4, q4_k_m, q3]}
    cmd: echo validate >> runs && cat artifact-${item.variant} > measured-${item.variant}
    deps: ["artifact-${item.variant}"]
    outs: ["measured-${item.variant}"]
"""


def test_variants_run_side_by_side_and_all_are_recorded(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_text(STAGES)
    run(tmp_path, "git init -q && dvc init -q")
    (documented,) = (block.text for block in blocks() if "--wait-for-lock" in block.text)
    run(tmp_path, documented)
    ran = (tmp_path / "runs").read_text().split()
    assert sorted(ran) == ["learn"] * 3 + ["quantize"] * 3 + ["sensitivity"] + ["validate"] * 3
    assert ran[-3:] == ["validate"] * 3, "the last line runs the rest alone"
    assert [(tmp_path / f"measured-{name}").read_text().strip() for name in VARIANTS] == VARIANTS
    assert len(yaml.safe_load((tmp_path / "dvc.lock").read_text())["stages"]) == len(ran)
    assert run(tmp_path, "dvc status") == "Data and pipelines are up to date.\n"
