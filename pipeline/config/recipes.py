"""configs/recipes/<variant>.yaml"""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import Field, StringConstraints, model_validator

from pipeline.config.phones import Weights
from pipeline.config.typed_yaml import CONFIGS, Frozen, Name, check, read
from pipeline.errors import ConfigError

# A name that `pipeline.quantize.formats` reads; a plan refuses one that it does not know.
FormatName = Annotated[str, StringConstraints(pattern=r"^[a-z0-9_]+$")]
KvCache = Literal["float32", "int8"]
LOST_MAX = 1e-4
"""Far below what rounding to 4 bits adds (about 1e-2 of the energy), far above what stray tiny blocks hold."""
Role = Literal[
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj",
    "expert_gate", "expert_up", "expert_down",
]  # fmt: skip


class SplitFormat(Frozen):
    """A matrix split along its input channels: the most important ones in `high`, the rest in `low`."""

    high: FormatName
    low: FormatName
    high_fraction: float = Field(gt=0, lt=1, description="share of input channels in `high`, before block rounding")


class RecipeRule(Frozen):
    """A format for some roles, optionally only where a layer rule holds. The first matching rule wins."""

    roles: tuple[Role, ...] = Field(min_length=1)
    layers: Literal["all", "use_more_bits"] = "all"
    format: FormatName | SplitFormat


class Pin(Frozen):
    """Tensors whose format an engineer decides, whatever the budget: a shell pattern on their names."""

    tensors: str = Field(description="such as model.layers.0.*, *.v_proj.weight or lm_head.weight")
    format: FormatName | SplitFormat


class Budget(Frozen):
    """What an artifact may take, one limit at least, and the formats that may be chosen to stay within it.

    `memory` and `tier` count the peak in use: weights as loaded, the KV cache at `context`, activations, loading; and,
    for a tier, `runtime_bytes` of configs/tiers.yaml. Where `weights` are mapped, a tier's limit is what may stay in
    RAM, and weights count as the kernels keep them.
    """

    bytes: int | None = Field(default=None, gt=0, description="graph and parts on disk, exactly as written")
    body_bits: float | None = Field(default=None, gt=0, description="bits per weight of the body, scales included")
    memory: int | None = Field(default=None, gt=0, description="peak private bytes in use")
    packed: int | None = Field(default=None, gt=0, description="bytes of the weights as kernels keep them")
    tier: Name | None = Field(
        default=None,
        description="row of configs/tiers.yaml: its memory is the limit; `smallest`: the row of least RAM that leaves "
        "the body 3.2 bits per weight in its kernels' memory",
    )
    weights: Weights = Field(default="private", description="how the tier's app holds them: private or mapped")
    context: int | None = Field(default=None, gt=0, description="tokens of KV cache; configs/tiers.yaml's by default")
    formats: tuple[FormatName, ...] = Field(
        default=("w2b64a8", "w4b64a8", "w4b32a8", "w6b64a8", "w8b32s8"), min_length=1
    )
    tables: tuple[FormatName, ...] = Field(default=("w4b32a8", "w6b64a8", "w8b32s8"), min_length=1)
    embedding: FormatName | None = Field(default=None, description="of an embedding that is not the head's table too")
    splits: bool = Field(default=True, description="may split matrices along their input channels")
    pin: tuple[Pin, ...] = ()

    @model_validator(mode="after")
    def _is_limited(self) -> Budget:
        if all(limit is None for limit in (self.bytes, self.body_bits, self.memory, self.packed, self.tier)):
            raise ValueError("no limit is given; name one or more of bytes, body_bits, memory, packed, tier")
        return self


class Learning(Frozen):
    """How scales and norms are learned once the artifact is written (docs/tuning.md)."""

    steps: int = Field(default=80, gt=0)
    tokens: int = Field(default=1024, gt=0, description="of one step, in whole windows of configs/calibration.yaml")
    rate: float = Field(default=1e-3, gt=0, lt=1, description="how far a step may move a value, as a share of it")
    seed: int = Field(default=0, ge=0)


MOST_DRAFTED = 16
"""What onnxruntime-genai 0.18 verifies at most in one pass."""


class Speculative(Frozen):
    """How a variant may be decoded speculatively: its artifact gets graphs and settings for it, and apps decode plainly
    unless they ask for it (docs/tuning.md)."""

    tokens: int = Field(default=3, ge=1, le=MOST_DRAFTED, description="drafted at most, verified in one pass")
    ngram: int = Field(default=3, ge=2, le=16, description="last tokens that are looked up in the text for a draft")
    head: FormatName | None = Field(
        default=None, description="format of the checkpoint's multi-token head, which then drafts; none: n-grams do"
    )


Run = Literal[0, 32, 64, 128]


class Rotation(Frozen):
    """What is rotated before it is quantized, so that no channel stands out (`pipeline.quantize.rotation`).

    `residual` and `values` are folded into the weights. The others are inputs of products: a small product of its own
    rotates each whenever it runs, in runs of at most so many channels; 0: not at all.
    """

    residual: Run | Literal["all"] = Field(default=0, description="the residual stream, in such runs or as a whole")
    values: bool = Field(default=False, description="values, by heads")
    attention: Run = Field(default=0, description="what queries, keys and values are made of")
    output: Run = Field(default=0, description="what o_proj multiplies; `values` rotates it for nothing")
    mlp: Run = Field(default=0, description="what gate and up are made of")
    down: Run = Field(default=0, description="what down_proj multiplies")

    @property
    def inputs(self) -> dict[str, int]:
        """Runs of the inputs that are rotated when they run, by the end of the input's name."""
        runs = {"attention": self.attention, "output": self.output, "mlp": self.mlp, "down": self.down}
        return {kind: run for kind, run in runs.items() if run}

    def run(self, hidden: int) -> int:
        """Channels of the residual stream that are mixed with each other; 0: it is not rotated."""
        return hidden if self.residual == "all" else math.gcd(self.residual, hidden) if self.residual else 0


UNROTATED = Rotation()


class RecipeBase(Frozen):
    """What every recipe has."""

    extends: Name | None = Field(default=None, description="the recipe whose keys hold where this file has none")
    version: int = Field(gt=0)
    title: str
    search: Literal["nearest", "weighted", "gptq"] = "weighted"
    kv_cache: KvCache = "float32"
    rotation: Rotation = UNROTATED
    part_bytes: int = Field(default=1_400_000_000, ge=1 << 20, le=1_400_000_000)
    gate: Name | None = Field(default=None, description="row of configs/gates.yaml; by default the variant's own name")
    speculative: Speculative | None = Field(default=None, description="no graphs for it without; {} for n-grams")
    learn: Learning | None = Field(default=None, description="nothing is learned without it; {} for the defaults")
    lost_max: float = Field(
        default=LOST_MAX, ge=0, le=1, description="share of a tensor's energy (its sum of squares) that may become zero"
    )


class RecipeConfig(RecipeBase):
    """A recipe: a rule from tensor roles and layer numbers to tensor formats."""

    embedding: FormatName
    head: FormatName
    body: tuple[RecipeRule, ...] = Field(min_length=1)


class BudgetRecipe(RecipeBase):
    """A recipe that is solved for: the formats that lose least within a budget."""

    budget: Budget


Recipe = RecipeConfig | BudgetRecipe
_RULE = {"embedding", "head", "body"}


def load_recipe(variant: str) -> Recipe:
    """configs/recipes/<variant>.yaml over the recipes that it extends: its keys replace theirs, whole, and a budget
    replaces formats. Its title and version are its own.

    Raises ConfigError, which names every file that was read, when one of them is missing or extends itself, or when
    they are no recipe together.
    """
    chain = _read_chain(variant)
    data: dict[str, Any] = {}
    for own in reversed(chain.values()):
        replaced = {"title", "version"} | (_RULE if "budget" in own else set())
        data = {key: value for key, value in data.items() if key not in replaced} | own
    kind: type[Recipe] = BudgetRecipe if "budget" in data else RecipeConfig
    return check(kind, data, _extends(chain))


def _read_chain(variant: str) -> dict[Path, dict[str, Any]]:
    found: dict[Path, dict[str, Any]] = {}
    name: str | None = variant
    while name is not None:
        path = CONFIGS / "recipes" / f"{name}.yaml"
        if path in found:
            raise ConfigError(f"{_extends([*found, path])}: it cannot extend itself. Remove one `extends`.")
        try:
            content = read(path)
        except ConfigError as error:
            raise ConfigError(f"{_extends(found)}: `extends`: {error}" if found else str(error)) from None
        if not isinstance(content, dict):
            raise ConfigError(f"{_extends([*found, path])}: a recipe is a mapping of keys to values.")
        found[path], name = content, content.get("extends")
    return found


def _extends(paths: Iterable[Path]) -> str:
    return " extends ".join(map(str, paths))


def has_budget(variants: Iterable[str]) -> bool:
    """Whether any of these recipes is solved for, from what the sensitivity stage measures."""
    return any(isinstance(load_recipe(variant), BudgetRecipe) for variant in variants)


def recipe_names() -> list[str]:
    """Every recipe of configs/recipes, sorted."""
    return sorted(path.stem for path in (CONFIGS / "recipes").glob("*.yaml"))
