"""What GPTQ will make of a model's calibration text: the damping that it uses, and whether it pays.

On SmolLM2's layer 10, whose widest input has 2.7 times the model's width as MiMo's has, errors moved under the damping
that `quantize.factor.held_out_damping` chooses leave this share of the output error of a plain search on held-out text
(4 bits, blocks of 64; `python -m benchmarks.width`):

    tokens a channel    0.67  1    2    4    8    16
    error left, %       92    91   89   85   84   77
"""

from __future__ import annotations

from collections.abc import Sequence

from safetensors import safe_open

from pipeline.calibrate.results import DAMPING
from pipeline.config.calibration import load_calibration
from pipeline.config.recipes import load_recipe
from pipeline.preflight.footprints import known
from pipeline.quantize.factor import expected_damping
from pipeline.workspace import Workspace


def damping(model: str, variants: Sequence[str]) -> str | None:
    """A sentence: the text and the damping, measured where `calibrate` has run; None where no variant uses GPTQ."""
    if not _compensated(variants):
        return None
    architecture = known(model).architecture
    widest, tokens = architecture.widest, load_calibration().grown(architecture.widest).tokens
    if found := _measured(model):
        told = f"{min(found):.2g} to {max(found):.2g}, chosen on held-out windows"
    else:
        told = f"about {expected_damping(architecture.hidden, tokens):.2g} to {expected_damping(widest, tokens):.2g}"
    return (
        f"{model}, GPTQ: {tokens:,} tokens, {tokens / widest:.1f} for each of the {widest:,} channels of the widest "
        f"input; damping {told}"
    )


def futile(model: str, variants: Sequence[str]) -> str | None:
    """Why GPTQ's hours would compensate next to nothing; None where they do not."""
    widest = known(model).architecture.widest
    tokens, used = load_calibration().grown(widest).tokens, _compensated(variants)
    if not used or tokens >= widest:
        return None
    return (
        f"{model} {', '.join(used)}: GPTQ would compensate next to nothing: {tokens:,} calibration tokens for the "
        f"{widest:,} channels of the widest input (damping about {expected_damping(widest, tokens):.2g}). Set "
        f"`per_channel: 4` in configs/calibration.yaml, or `search: weighted` in the recipe, which takes minutes."
    )


def _compensated(variants: Sequence[str]) -> list[str]:
    return [variant for variant in variants if load_recipe(variant).search == "gptq"]


def _measured(model: str) -> list[float]:
    """The damping of every input that `calibrate` wrote."""
    found = []
    for path in Workspace(model).moments.parent.glob("layers.*.safetensors"):
        with safe_open(path, "numpy") as file:
            found += [float(file.get_tensor(name)) for name in file.keys() if name.endswith(f".{DAMPING}")]  # noqa: SIM118
    return found
