"""Our files, written by the pipeline's own commands (`quantize`, and `learn` before it where a recipe learns): recipes
by name, and budgets at the peers' sizes.

- A row of `RECIPES` is a recipe of configs/recipes with some keys replaced: a new option is one more row.
- The control is q4 with `search: nearest`: ONNX Runtime's default quantizer (the same rounding, see
  tests/benchmarks/test_searches.py) in q4's formats with q4's table, so at the same bytes but for its longer file name.
- A budget is solved at exactly the bytes of a peer's file, on disk or in memory, with q4's way to search and every
  other option at its default. What a budget by memory chose is learned as `q4_learned` is.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from benchmarks.quality.subjects import LARGER_BLOCKS, Prepared
from pipeline.files import read_json

CONTROLLED, CONTROL = "q4", "q4_nearest"
LEARN = {"steps": 20}
"""How far what is learned is learned: about five minutes of 2 busy cores a file."""
RECIPES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "q4": ("q4", {}),
    "q4_k_m": ("q4_k_m", {}),
    "q3": ("q3", {}),
    "q4_learned": ("q4", {"learn": LEARN}),
    CONTROL: (CONTROLLED, {"search": "nearest"}),
}
"""What is measured beside the budgets: the shipped recipe, and the keys that replace its own."""
By = Literal["bytes", "memory"]
SIZES: tuple[By, ...] = ("bytes", "memory")
"""What files are compared at: bytes on disk, and bytes of memory."""
_SEARCHED = ("search", "rotation")  # keys of q4 that say how, not what: a budget takes them over
_PACKED = ("w4b64a8", "w4b128a8", "w6b64a8", "w8b64s8", *LARGER_BLOCKS)
_BY_MEMORY = {"formats": ["w2b64a8", "w2b128a8", *_PACKED], "tables": list(_PACKED)}
_NEAR = 0.99
"""A size less than 1 % above the next smaller one is answered by the file for that one, which is learned once."""


@dataclass(frozen=True)
class Written:
    """One of our artifacts: its folder and what its plan says of it, `memory` being its packed bytes."""

    variant: str
    folder: Path
    bytes: int
    memory: int
    body_bits: float
    sha256: Mapping[str, str]


def recipes(prepared: Prepared) -> dict[str, dict[str, Any]]:
    """The recipes of `RECIPES`, whole."""
    return {name: {**prepared.project.read(f"recipes/{base}.yaml"), **own} for name, (base, own) in RECIPES.items()}


def write(prepared: Prepared, variant: str, recipe: Mapping[str, Any]) -> Written:
    """The artifact of a recipe, made unless it is there. Raises PipelineError when the recipe cannot be applied."""
    prepared.project.write(f"recipes/{variant}.yaml", recipe)
    for stage in ("learn", "quantize") if recipe.get("learn") is not None else ("quantize",):
        prepared.project.run(stage, prepared.subject.model, variant)
    folder = prepared.project.artifact(prepared.subject.model, variant)
    plan = read_json(folder / "plan.json")
    return Written(variant, folder, plan["bytes"], plan["packed_bytes"], plan["body_bits_per_weight"], plan["sha256"])


def budgets(prepared: Prepared, by: By, sizes: Iterable[int]) -> Iterator[Written]:
    """The plans that budgets of so many bytes give, the largest first.

    The best plan for a larger budget that fits a smaller one is the best for that too, so it is not solved again.
    """
    base = prepared.project.read(f"recipes/{CONTROLLED}.yaml")
    searched = {key: base[key] for key in _SEARCHED if key in base}
    last: Written | None = None
    ordered = sorted(set(sizes), reverse=True)
    for size, smaller in zip(ordered, [*ordered[1:], 0], strict=True):
        if smaller <= _NEAR * size and (last is None or getattr(last, by) > size):
            recipe = {"title": f"At most {size} bytes ({by})", "version": 1, **_within(by, size), **searched}
            last = write(prepared, f"{by}_{size}", recipe)
            yield last


def _within(by: By, size: int) -> dict[str, Any]:
    if by == "bytes":
        return {"budget": {"bytes": size}}
    return {"budget": {"packed": size, **_BY_MEMORY}, "learn": LEARN}
