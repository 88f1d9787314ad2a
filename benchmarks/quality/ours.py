"""Our files, written by the pipeline's own `quantize` command: the recipes as shipped, q4's control, and budgets.

- The control is q4 with `search: nearest`: ONNX Runtime's default quantizer (the same rounding, see
  tests/benchmarks/test_searches.py) in q4's formats with q4's table, so at the same bytes but for its longer file name.
- A budget is solved at exactly the bytes of a peer's file, with q4's search and every other option at its default.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.quality.subjects import Prepared
from pipeline.files import read_json

SHIPPED = ("q4", "q4_k_m", "q3")
CONTROLLED, CONTROL = "q4", "q4_nearest"


@dataclass(frozen=True)
class Written:
    """One of our artifacts: its folder and what its plan says of it."""

    variant: str
    folder: Path
    bytes: int
    body_bits: float
    sha256: Mapping[str, str]


def recipes(prepared: Prepared) -> dict[str, dict[str, Any]]:
    """What is measured beside the budgets: recipes by name."""
    shipped = {name: prepared.project.read(f"recipes/{name}.yaml") for name in SHIPPED}
    return shipped | {CONTROL: shipped[CONTROLLED] | {"search": "nearest"}}


def write(prepared: Prepared, variant: str, recipe: Mapping[str, Any]) -> Written:
    """The artifact of a recipe, made unless it is there. Raises PipelineError when the recipe cannot be applied."""
    prepared.project.write(f"recipes/{variant}.yaml", recipe)
    prepared.project.run("quantize", prepared.subject.model, variant)
    folder = prepared.project.artifact(prepared.subject.model, variant)
    plan = read_json(folder / "plan.json")
    return Written(variant, folder, plan["bytes"], plan["body_bits_per_weight"], plan["sha256"])


def budgets(prepared: Prepared, sizes: Iterable[int]) -> Iterator[tuple[int, Written]]:
    """For each size in bytes, the largest first, the plan that a budget of so much gives.

    The best plan for a larger budget that fits a smaller one is the best for that too, so it is not solved again.
    """
    search = prepared.project.read(f"recipes/{CONTROLLED}.yaml")["search"]
    last: Written | None = None
    for size in sorted(set(sizes), reverse=True):
        if last is None or last.bytes > size:
            recipe = {"title": f"At most {size} bytes", "version": 1, "search": search, "budget": {"bytes": size}}
            last = write(prepared, f"budget_{size}", recipe)
        yield size, last
