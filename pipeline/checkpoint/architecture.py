"""The normalised description of a decoder, read from config.json, and the tensors that it must have.

One dataclass serves every family. A family is a row of `_FAMILIES` that names its parts: `body` and `expected_tensors`
say which tensors a part has, a method of `pipeline.graph.decoder` what it computes.
"""

from __future__ import annotations

import difflib
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, TypeVar

import numpy as np

from pipeline.checkpoint.config_keys import DEFAULTS, check_keys, unknown
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.checkpoint.untrusted import read_json, shown
from pipeline.config.phones import Shapes
from pipeline.errors import CheckpointError

# What an untrusted config may claim at most: several times the largest decoders, and small enough that nothing sized
# by it alone (lists of tensors, rotary tables) can fill the memory.
TALKING = "talking"
"""Key of config.json that marks a model of `benchmarks.synthetic --talking`, which tests machinery and nothing else."""
MAX_SIZE = 1 << 24
MAX_LAYERS = 1_000
MAX_EXPERTS = 256
MAX_HEAD_DIM = 4_096
MAX_POSITION = (1 << 31) - 1
_HEAD = "lm_head.weight"
_AGAIN = "Run the download stage again, or use another release of the model."
_CORRECT = "If the file is wrong, correct it in a copy of the source, a folder that is a source of `kind: local`."
T = TypeVar("T", int, float, bool)
_ROPE_KEYS = {
    "attention_factor", "factor", "high_freq_factor", "long_factor", "low_freq_factor",
    "original_max_position_embeddings", "partial_rotary_factor", "rope_theta", "rope_type", "short_factor", "type",
}  # fmt: skip
_EXPERT_SIZES = {"num_local_experts": MAX_EXPERTS, "intermediate_size": MAX_SIZE}
_COMPARED = 1 << 23  # float32 bytes of rows that are compared at a time


@dataclass(frozen=True)
class Family:
    """The parts of one family of decoders.

    Attributes:
        genai_type: what onnxruntime-genai calls it.
        norm: `rms`, or `layer`: LayerNorm, with a bias beside its gain.
        fused: whether one matrix makes queries, keys and values.
        head_norms: whether queries and keys take an RMSNorm in each head before they are rotated.
        biases: roles of the matrices whose products get a bias in every model.
        switched_biases: key of config.json → roles that get one where it is true.
        scaling: the kind of rope_scaling that it knows, a key of `_SCALINGS`; "" for none.
        window: when config.json's sliding_window limits attention.
        mlp: `gated` SiLU; `fused`: so, with one matrix for gate and up; `experts`: so, of which SparseMixer wakes two.
        unused_prefixes: of tensors that the forward never uses.
        mtp: what the names of its multi-token head's tensors begin with, if it may have one.
    """

    genai_type: str
    norm: Literal["rms", "layer"] = "rms"
    fused: bool = False
    head_norms: bool = False
    biases: tuple[str, ...] = ()
    switched_biases: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    scaling: Literal["", "longrope", "llama3"] = ""
    window: Literal["never", "switched", "always"] = "never"
    mlp: Literal["gated", "fused", "experts"] = "gated"
    unused_prefixes: tuple[str, ...] = ()
    mtp: str = ""


_QKV = ("q_proj", "k_proj", "v_proj")
_ATTENTION = {"attention_bias": (*_QKV, "o_proj")}
_SWITCHED = {**_ATTENTION, "mlp_bias": ("gate_proj", "up_proj", "down_proj")}
_PHIMOE = {**_ATTENTION, "lm_head_bias": ("head",)}
_SCALINGS = {"": (), "longrope": ("longrope", "su", "yarn"), "llama3": ("llama3",)}  # → its names in config.json
_FAMILIES = {
    "llama": Family("llama", switched_biases=_SWITCHED, scaling="llama3"),
    "qwen2": Family("qwen2", biases=_QKV, window="switched"),
    "qwen3": Family("qwen3", head_norms=True, switched_biases=_ATTENTION, window="switched"),
    # Qwen2 with layers that predict further tokens
    "mimo": Family(
        "qwen2", biases=_QKV, window="switched", unused_prefixes=("model.mtp_layers.",), mtp="model.mtp_layers.0"
    ),
    "phi3": Family("phi3", fused=True, scaling="longrope", window="always", mlp="fused"),
    "phimoe": Family("phimoe", norm="layer", switched_biases=_PHIMOE, window="always", mlp="experts"),
}


@dataclass(frozen=True)
class Rope:
    """Rotary embedding. `short_factor` divides the frequencies, one per channel pair; for LongRoPE up to
    `original_max_position` tokens only, beyond which `long_factor` does."""

    theta: float
    dims: int
    original_max_position: int
    attention_factor: float = 1.0
    short_factor: tuple[float, ...] | None = None
    long_factor: tuple[float, ...] | None = None


@dataclass(frozen=True)
class Matrix:
    """One weight matrix of the decoder, [rows, columns] as stored: y = x · Wᵀ, plus the tensor `bias`, [rows], if any.

    Matrices with the same `input` multiply the same activations. Those of an expert have its number, and multiply the
    tokens that it is woken by.
    """

    name: str
    role: str
    layer: int
    rows: int
    columns: int
    input: str
    bias: str | None = None
    expert: int | None = None

    @property
    def kind(self) -> str:
        """What its input is, in any layer: attention, output, mlp, down, head or tokens."""
        return self.input.rpartition(".")[2]

    @property
    def choice(self) -> str:
        """What is shared by matrices whose formats are chosen together: an input, or a layer's mixture of experts."""
        return self.input if self.expert is None else f"layers.{self.layer}.experts"


@dataclass(frozen=True)
class Architecture:
    """A decoder-only transformer with rotary embedding and grouped-query attention; its other parts are its family's.

    `biases` are roles of the matrices that get a bias in this model, not in all of its family. A mixture has `experts`
    in each layer, of which a token wakes `experts_per_token`, and a `router_jitter` (`graph.experts.sparse_mixer`).
    """

    family: str
    layers: int
    hidden: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    vocab: int
    epsilon: float
    max_position: int
    sliding_window: int | None
    rope: Rope
    tied: bool
    biases: tuple[str, ...] = ()
    experts: int = 0
    experts_per_token: int = 0
    router_jitter: float = 0.0

    @property
    def traits(self) -> Family:
        """The family's row."""
        return _FAMILIES[self.family]

    @property
    def cache_channels(self) -> int:
        """Channels of the keys of one token in one layer; values have as many."""
        return self.kv_heads * self.head_dim

    @property
    def widest(self) -> int:
        """Channels of the widest input of a layer."""
        return max(matrix.columns for matrix in self.body(0))

    def block(self, layer: int) -> str:
        """What the names of a layer's tensors begin with."""
        return f"model.layers.{layer}"

    @property
    def final_norm(self) -> str:
        """The norm before the head, without its `.weight`."""
        return "model.norm"

    def body(self, layer: int) -> list[Matrix]:
        """The quantizable matrices of one layer, in the order of execution."""
        hidden, query, key = self.hidden, self.heads * self.head_dim, self.cache_channels
        each = dict(zip(_QKV, (query, key, key), strict=True))
        first = {"qkv_proj": query + 2 * key} if self.traits.fused else each
        return [
            *(self._matrix(layer, f"self_attn.{role}", rows, hidden, "attention") for role, rows in first.items()),
            self._matrix(layer, "self_attn.o_proj", hidden, query, "output"),
            *self._mlp(layer),
        ]

    def _mlp(self, layer: int) -> list[Matrix]:
        """Those of the family's kind of MLP."""
        hidden, inner = self.hidden, self.intermediate
        if self.traits.mlp == "experts":
            return [matrix for expert in range(self.experts) for matrix in self._expert(layer, expert)]
        first = {"gate_up_proj": 2 * inner} if self.traits.mlp == "fused" else {"gate_proj": inner, "up_proj": inner}
        return [
            *(self._matrix(layer, f"mlp.{role}", rows, hidden, "mlp") for role, rows in first.items()),
            self._matrix(layer, "mlp.down_proj", hidden, inner, "down"),
        ]

    def _expert(self, layer: int, expert: int) -> list[Matrix]:
        hidden, inner = self.hidden, self.intermediate
        name, source = f"{self.block(layer)}.block_sparse_moe.experts.{expert}", f"layers.{layer}.experts.{expert}"
        return [
            Matrix(f"{name}.w1.weight", "expert_gate", layer, inner, hidden, f"{source}.mlp", expert=expert),
            Matrix(f"{name}.w3.weight", "expert_up", layer, inner, hidden, f"{source}.mlp", expert=expert),
            Matrix(f"{name}.w2.weight", "expert_down", layer, hidden, inner, f"{source}.down", expert=expert),
        ]

    def router(self, layer: int) -> str:
        """The tensor whose product with a token, [experts, hidden], decides which experts it wakes: never quantized."""
        return f"{self.block(layer)}.block_sparse_moe.gate.weight"

    def _matrix(self, layer: int, module: str, rows: int, columns: int, source: str) -> Matrix:
        """That of a layer's `module`, whose last part is its role."""
        name, role = f"{self.block(layer)}.{module}", module.rpartition(".")[2]
        return Matrix(
            f"{name}.weight", role, layer, rows, columns, f"layers.{layer}.{source}", self._bias(role, f"{name}.bias")
        )

    def _bias(self, role: str, name: str) -> str | None:
        return name if role in self.traits.biases + self.biases else None

    @property
    def head(self) -> Matrix:
        """The output projection; its name is the embedding's when they are tied."""
        name = "model.embed_tokens.weight" if self.tied else _HEAD
        bias = self._bias("head", "lm_head.bias")
        return Matrix(name, "head", self.layers, self.vocab, self.hidden, "head", bias)

    @property
    def embedding(self) -> Matrix:
        """The table of token vectors, which are looked up, not multiplied."""
        return Matrix("model.embed_tokens.weight", "embedding", -1, self.vocab, self.hidden, "tokens")

    @property
    def tables(self) -> list[Matrix]:
        """The embedding and the head; the head alone when they are one table."""
        return [self.head] if self.tied else [self.embedding, self.head]

    @property
    def matrices(self) -> list[Matrix]:
        """All matrices that multiply activations: the body's in order, then the head."""
        return [matrix for layer in range(self.layers) for matrix in self.body(layer)] + [self.head]

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name → shape of every tensor the graph reads."""
        shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for layer in range(self.layers):
            for matrix in self.body(layer):
                shapes |= _stored(matrix)
            if self.experts:
                shapes[self.router(layer)] = self.experts, self.hidden
            for norm in ("input_layernorm", "post_attention_layernorm"):
                shapes |= dict.fromkeys(self.norm(f"{self.block(layer)}.{norm}"), (self.hidden,))
            if self.traits.head_norms:
                for part in "qk":
                    shapes[f"{self.block(layer)}.self_attn.{part}_norm.weight"] = (self.head_dim,)
        shapes |= dict.fromkeys(self.norm(self.final_norm), (self.hidden,))
        return shapes | _stored(self.head)

    def norm(self, name: str) -> list[str]:
        """The tensors of a norm of the residual: its gain, and its bias where it has one."""
        return [f"{name}.weight", f"{name}.bias"] if self.traits.norm == "layer" else [f"{name}.weight"]

    @property
    def parameters(self) -> int:
        """Number of parameters that the graph reads (a tied head counted once)."""
        return sum(math.prod(shape) for shape in self.expected_tensors().values())

    @property
    def mtp(self) -> MtpHead | None:
        """The multi-token head of its family, whether or not a checkpoint has its tensors."""
        return MtpHead(**vars(self) | {"layers": 1}) if self.traits.mtp else None


class MtpHead(Architecture):
    """A decoder of one layer that drafts the token after the next: it reads a token's vector beside the hidden states
    that the decoder made before that token, and shares the decoder's embedding and output projection.

    XiaomiMiMo's MiMoMTPLayers: input_proj · [hidden_layernorm(hidden), token_layernorm(vector)], a decoder layer,
    final_layernorm. The hidden states are those before the decoder's final norm.
    """

    def block(self, layer: int) -> str:
        """What the names of its tensors begin with."""
        return self.traits.mtp

    @property
    def final_norm(self) -> str:
        """The norm before the shared output projection."""
        return f"{self.traits.mtp}.final_layernorm"

    @property
    def projection(self) -> Matrix:
        """What makes one vector of hidden states and token, in this order."""
        name = f"{self.traits.mtp}.input_proj.weight"
        return Matrix(name, "input_proj", 0, self.hidden, 2 * self.hidden, "layers.0.joined")

    @property
    def input_norms(self) -> tuple[str, str]:
        """The norms of the hidden states and of the token's vector."""
        return f"{self.traits.mtp}.hidden_layernorm", f"{self.traits.mtp}.token_layernorm"

    def body(self, layer: int) -> list[Matrix]:
        """The projection and the layer's matrices."""
        return [self.projection, *super().body(layer)]

    def expected_tensors(self) -> dict[str, tuple[int, ...]]:
        """As a decoder's, with the norms of both inputs; embedding and output projection are the decoder's."""
        return super().expected_tensors() | {f"{name}.weight": (self.hidden,) for name in self.input_norms}


def _stored(matrix: Matrix) -> dict[str, tuple[int, ...]]:
    """Name → shape of a matrix's tensors."""
    bias = {matrix.bias: (matrix.rows,)} if matrix.bias else {}
    return {matrix.name: (matrix.rows, matrix.columns), **bias}


def bias_of(matrix: Matrix, checkpoint: Checkpoint, start: int = 0, stop: int | None = None) -> np.ndarray:
    """What is added to rows of a matrix's product, float32 [rows]; [1], a zero, where it has no bias."""
    return checkpoint.rows(matrix.bias, start, stop) if matrix.bias else np.zeros(1, np.float32)


def read_config(path: Path) -> dict[str, Any]:
    """config.json as a dictionary.

    Raises:
        CheckpointError: missing, no regular file, larger than `untrusted.MAX_JSON`, or not a JSON object.
    """
    try:
        config = read_json(path, follow=True)
        if not isinstance(config, dict):
            raise ValueError("not a JSON object")
    except (OSError, ValueError) as error:
        reason = f"({error.strerror})" if isinstance(error, OSError) else f"as JSON ({error})"
        raise CheckpointError(f"{path}: cannot be read {reason}. {_AGAIN}") from None
    return config


def read_architecture(path: Path) -> Architecture:
    """Normalise a config.json of a supported family. Remote code (`auto_map`) is never run.

    Raises:
        CheckpointError: unknown architecture (with the nearest known one), a missing or absurd value, or a variation
            that the graph builder does not compute; never approximated in silence.
    """
    return parse_architecture(read_config(path), path)


def parse_architecture(values: dict[str, Any], path: Path) -> Architecture:
    """As `read_architecture`, for the values of the file at `path`."""
    return _parse(values, path)[0]


def unknown_keys(path: Path) -> list[str]:
    """Keys of a config.json that nothing here knows, neither as honoured nor as harmless; sorted."""
    values = read_config(path)
    return unknown(values, _parse(values, path)[1])


def _parse(values: dict[str, Any], path: Path) -> tuple[Architecture, set[str]]:
    """The architecture, and the keys that were read for it."""
    config = _Values(values, path)
    family = config.get("model_type")
    if not isinstance(family, str) or family not in _FAMILIES:
        near = difflib.get_close_matches(shown(family), _FAMILIES, n=1)
        hint = f" Did you mean {near[0]!r}?" if near else ""
        raise config.wrong(
            f"model_type {shown(family)} (architectures {shown(config.get('architectures'))}) is not supported.{hint} "
            f"Supported: {', '.join(_FAMILIES)}. A new family is a row in {__name__} if it shares this decoder."
        )
    config.absent, traits = DEFAULTS.get(family, {}), _FAMILIES[family]
    classes = config.get("architectures") or []
    if not isinstance(classes, list) or any(not str(one).endswith("ForCausalLM") for one in classes):
        what = f"architectures is {shown(classes)}; a list of classes that write text (…ForCausalLM) is needed"
        raise config.wrong(f"{what}. {_CORRECT}")
    heads = config.read(int, "num_attention_heads", 1, MAX_SIZE)
    hidden = config.read(int, "hidden_size", 1, MAX_SIZE)
    kv_heads = config.read(int, "num_key_value_heads", 1, MAX_SIZE, null=heads)
    head_dim = config.read(int, "head_dim", 1, MAX_HEAD_DIM, null=hidden // heads)
    if heads % kv_heads or (config.get("head_dim") is None and hidden % heads):
        uneven = f"{heads} heads do not divide over {kv_heads} KV heads or hidden size {hidden}"
        raise config.wrong(f"{uneven}. The file is damaged, or its model is of another kind.")
    layers = config.read(int, "num_hidden_layers", 1, MAX_LAYERS)
    architecture = Architecture(
        family=family,
        layers=layers,
        hidden=hidden,
        heads=heads,
        kv_heads=kv_heads,
        head_dim=head_dim,
        intermediate=config.read(int, "intermediate_size", 1, MAX_SIZE),
        vocab=config.read(int, "vocab_size", 1, MAX_SIZE),
        epsilon=config.read(float, "rms_norm_eps", 1e-30, 1.0),
        max_position=config.read(int, "max_position_embeddings", 1, MAX_POSITION),
        sliding_window=_read_window(config, traits.window, layers),
        rope=_read_rope(config, head_dim, traits.scaling),
        tied=config.read(bool, "tie_word_embeddings", False, True, null=False),
        biases=tuple(
            role
            for key, roles in traits.switched_biases.items()
            for role in roles * config.read(bool, key, False, True, null=False)
        ),
        **(_read_experts(config) if traits.mlp == "experts" else {}),
    )
    if traits.biases:  # the class of such a family has these biases whatever the file says
        config.seen |= {"attention_bias", "qkv_bias", "use_qkv_bias"}
    check_keys(values, config.seen, family, path)
    return architecture, config.seen


class _Values(dict[str, Any]):
    """A JSON object of an untrusted config.json, whose values are read with the type and range that they must have: for
    a float, one in which float32 arithmetic with it stays finite."""

    _NEEDED: ClassVar = {
        int: "an integer from {:,} to {:,}",
        float: "a number from {:g} to {:g}",
        bool: "true or false",
    }

    def __init__(self, values: dict[str, Any], path: Path, within: _Values | None = None):
        super().__init__(values)
        self.path = path
        self.seen: set[str] = within.seen if within else set()
        self.absent: dict[str, Any] = within.absent if within else {}

    def get(self, key: str, default: Any = None) -> Any:
        """The value of `key`, which counts as honoured; what absence means in this family where there is none."""
        self.seen.add(key)
        return super().get(key, self.absent.get(key, default))

    def wrong(self, what: str) -> CheckpointError:
        """The error that the file is `what`."""
        return CheckpointError(f"{self.path}: {what}")

    def read(self, kind: type[T], key: str, least: T, most: T, null: T | None = None) -> T:
        """The value of `key` from `least` to `most`, or of `null` where it is null or has no default. A number may be
        written as an integer."""
        value: Any = null if self.get(key) is None else self.get(key)
        if type(value) not in {kind, int if kind is float else kind} or not least <= value <= most:
            needed = self._NEEDED[kind].format(least, most)
            raise self.wrong(f"{key} is {shown(value)}; {needed} is needed. {_CORRECT}")
        return kind(value)


def _read_experts(config: _Values) -> dict[str, Any]:
    """What a mixture has besides; a key under another name must say the same."""
    experts, inner = (config.read(int, key, 2, most) for key, most in _EXPERT_SIZES.items())
    for key, same in (("num_experts", experts), ("moe_intermediate_size", inner)):
        config.read(int, key, same, same, null=same)
    return {
        "experts": experts,
        "experts_per_token": config.read(int, "num_experts_per_tok", 2, 2),
        "router_jitter": config.read(float, "router_jitter_noise", 0.0, 1.0),
    }


def _read_window(config: _Values, window: str, layers: int) -> int | None:
    """Positions that attention reaches back, if it is limited in some layer."""
    kinds = config.get("layer_types")
    switched_off = window == "switched" and not config.read(bool, "use_sliding_window", False, True, null=False)
    if kinds is not None and kinds != ["full_attention"] * layers:
        usual = {"full_attention", *(["sliding_attention"] if window == "switched" and not switched_off else [])}
        if not isinstance(kinds, list) or len(kinds) != layers or not all(kind in usual for kind in map(str, kinds)):
            what = (
                f"layer_types is {shown(kinds)}; a list of {layers} layers is needed, each {' or '.join(sorted(usual))}"
            )
            raise config.wrong(f"{what}. {_CORRECT}")
    if window == "switched":
        full = config.read(int, "max_window_layers", 0, MAX_POSITION, null=0)
        limited = not switched_off and (layers > full if kinds is None else "sliding_attention" in kinds)
    else:
        limited = window == "always"
    if config.get("sliding_window") is None or not limited:
        return None
    return config.read(int, "sliding_window", 1, MAX_POSITION)


def _read_rope(config: _Values, head_dim: int, known: str) -> Rope:
    scaling = _Values(_rope_values(config), config.path, config)
    values = _Values(scaling | {key: value for key, value in config.items() if value is not None}, config.path, config)
    theta = values.read(float, "rope_theta", 1.0, 1e15)
    dims = int(head_dim * values.read(float, "partial_rotary_factor", 1e-3, 1.0, null=1.0))
    if dims < 2 or dims % 2:
        what = f"{dims} of {head_dim} channels of a head are rotated (partial_rotary_factor); rotation needs pairs"
        raise config.wrong(f"{what}. {_CORRECT}")
    max_position = config.read(int, "max_position_embeddings", 1, MAX_POSITION)
    original = values.read(int, "original_max_position_embeddings", 1, MAX_POSITION, null=max_position)
    kind = scaling.get("rope_type") or scaling.get("type") or "default"
    if kind == "default":
        return Rope(theta, dims, max_position)
    if kind not in _SCALINGS[known] or (strange := sorted(scaling.keys() - _ROPE_KEYS)):
        what = f"type {shown(kind)}" if kind not in _SCALINGS[known] else f"{strange[0]} = {shown(scaling[strange[0]])}"
        supported = ", ".join(filter(None, ["default", known]))
        what = f"rope_scaling {what} is not supported for {config['model_type']}; supported: {supported}"
        raise config.wrong(f"{what}. Another kind needs its tables in pipeline/graph/rope.py.")
    if known == "llama3":
        return Rope(theta, dims, max_position, short_factor=_llama3_factors(scaling, theta, dims))
    ratio = max_position / original
    computed = math.sqrt(1 + math.log(ratio) / math.log(original)) if ratio > 1 and original > 1 else 1.0
    attention_factor = scaling.read(float, "attention_factor", 1e-3, 1e3, null=computed)
    short, long = (_factors(scaling, key, dims // 2) for key in ("short_factor", "long_factor"))
    return Rope(theta, dims, original, attention_factor, short, long)


def _llama3_factors(scaling: _Values, theta: float, dims: int) -> tuple[float, ...]:
    """What Llama 3 divides frequencies by: those of long waves by `factor`, those of short ones by 1, the others by
    what makes the frequency linear in the turns within the original context (huggingface/transformers,
    modeling_rope_utils.py)."""
    factor = scaling.read(float, "factor", 1.0, 1e6)
    low, high = (scaling.read(float, f"{name}_freq_factor", 1e-3, 1e6) for name in ("low", "high"))
    original = scaling.read(int, "original_max_position_embeddings", 1, MAX_POSITION)
    if high <= low:
        what = f"rope_scaling.high_freq_factor {high:g} is not above low_freq_factor {low:g}"
        raise scaling.wrong(f"{what}. {_CORRECT}")
    turns = original / (2 * np.pi) * theta ** (-np.arange(0, dims, 2) / dims)
    share = np.clip((turns - low) / (high - low), 0, 1)
    return tuple((1 / ((1 - share) / factor + share)).tolist())


def _rope_values(config: _Values) -> dict[str, Any]:
    """rope_scaling and rope_parameters as one: transformers 5 wrote all of rotation into the latter.

    Raises CheckpointError where config.json gives a key twice, and differently.
    """
    found: dict[str, Any] = {}
    for name in ("rope_parameters", "rope_scaling"):
        given = config.get(name) or {}
        if not isinstance(given, dict) or any(isinstance(value, dict) for value in given.values()):
            raise config.wrong(f"{name} is {shown(given)}; a JSON object of numbers is needed. {_CORRECT}")
        for key, value in given.items():
            before = found.get(key, config.get(key) if key in config and key in _ROPE_KEYS else None)
            if None not in (before, value) and before != value:
                what = f"{key} is {shown(before)} in one place and {shown(value)} in {name}; which is meant is unknown"
                raise config.wrong(f"{what}. {_CORRECT}")
            found[key] = value
    return found


def _factors(scaling: _Values, key: str, count: int) -> tuple[float, ...]:
    listed = scaling.get(key)
    if not isinstance(listed, list) or len(listed) != count:
        needed = f"must list {count} numbers, one per pair of rotated channels"
        raise scaling.wrong(f"rope_scaling.{key} {needed}, and is {shown(listed)}. {_CORRECT}")
    return tuple(_Values({key: value}, scaling.path).read(float, key, 1e-3, 1e6) for value in listed)


def shapes_of(architecture: Architecture) -> Shapes:
    """What sizes depend on. shapes_of(expected_architecture(shapes)) == shapes"""
    rope = architecture.rope
    named = {name: getattr(architecture, name) for name in Shapes.model_fields if hasattr(architecture, name)}
    original = rope.original_max_position if rope.long_factor else None
    return Shapes(**named, original_max_position=original, rotary_dims=rope.dims)


def expected_architecture(shapes: Shapes) -> Architecture:
    """An architecture of these shapes, for sizes only: what no size depends on (theta, epsilon, factors) is made up.

    Raises CheckpointError for an unknown family.
    """
    if shapes.family not in _FAMILIES:
        known = ", ".join(_FAMILIES)
        raise CheckpointError(f"family {shown(shapes.family)} of configs/shapes.yaml is unknown; there are {known}.")
    named = shapes.model_dump(exclude={"original_max_position", "rotary_dims"})
    original, dims = shapes.original_max_position, shapes.rotary_dims
    ones = (1.0,) * (dims // 2) if original else None
    rope = Rope(1e4, dims, original or MAX_POSITION, 1.0, ones, ones)
    return Architecture(**named, epsilon=1e-5, max_position=MAX_POSITION, sliding_window=None, rope=rope)


def check_shapes(architecture: Architecture, expected: Shapes, path: Path) -> None:
    """Raise CheckpointError, with every field that differs, unless config.json in `path` has the expected shapes."""
    found, wanted = shapes_of(architecture).model_dump(), expected.model_dump()
    if wrong := "; ".join(f"{key} {found[key]}, expected {wanted[key]}" for key in found if found[key] != wanted[key]):
        remedy = "If the source is right, correct that file; sizes planned from it were wrong."
        raise CheckpointError(f"{path}: not the model that configs/shapes.yaml describes: {wrong}. {remedy}")


def check_tensors(architecture: Architecture, checkpoint: Checkpoint) -> list[str]:
    """Compare a checkpoint with its architecture; return one sentence for everything that is left out on purpose.

    No value is read, except those of a head that stands beside a tied embedding: it may be left out if they are equal.

    Raises:
        CheckpointError: a tensor is missing, has another shape, or is unknown, or a tied head differs.
    """
    check_expected(architecture, checkpoint)
    expected = architecture.expected_tensors()
    return _left_out(architecture, checkpoint, [name for name in checkpoint if name not in expected])


def check_expected(architecture: Architecture, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError, as `check_tensors`, where a tensor is missing or has another shape."""
    expected = architecture.expected_tensors()
    if missing := [name for name in expected if name not in checkpoint]:
        what = f"{len(missing)} of {len(expected)} tensors are missing, the first is {missing[0]!r}"
        why = "The checkpoint is incomplete, or its config.json describes another model."
        raise CheckpointError(f"{checkpoint.folder}: {what}. {why}")
    for name, shape in expected.items():
        if checkpoint[name].shape != shape:
            raise CheckpointError(
                f"{checkpoint.folder / checkpoint[name].file}: tensor {name!r} has shape "
                f"{list(checkpoint[name].shape)}, config.json asks for {list(shape)}. Weights and config.json belong "
                f"to different models, or one of them is damaged: run the download stage again."
            )


def _left_out(architecture: Architecture, checkpoint: Checkpoint, extra: list[str]) -> list[str]:
    notes = []
    for prefix in architecture.traits.unused_prefixes:
        if dropped := [name for name in extra if name.startswith(prefix)]:
            count = sum(checkpoint[name].elements for name in dropped)
            notes.append(
                f"left out {len(dropped)} tensors under {prefix}* ({count:,} parameters): the forward never uses them"
            )
            extra = [name for name in extra if name not in dropped]
    if architecture.tied and _HEAD in extra:
        _check_tied(architecture.embedding, checkpoint)
        notes.append(f"left out {_HEAD}: it equals the embedding, to which config.json ties the head")
        extra.remove(_HEAD)
    if extra := [name for name in extra if not name.endswith("rotary_emb.inv_freq")]:
        raise CheckpointError(
            f"{checkpoint.folder}: {len(extra)} tensors are unknown to family {architecture.family!r}, the first is "
            f"{shown(extra[0])}. Dropping them in silence could change the model. If its forward never reads them, add "
            f"their prefix to the family's row in {__name__}."
        )
    return notes


def _check_tied(embedding: Matrix, checkpoint: Checkpoint) -> None:
    """Raise CheckpointError unless the head equals the embedding. Both are read once, some rows at a time."""
    step = max(1, _COMPARED // (4 * embedding.columns))

    def rows(name: str, start: int) -> np.ndarray:
        return checkpoint.rows(name, start, min(start + step, embedding.rows))

    if checkpoint[_HEAD].shape != (embedding.rows, embedding.columns) or not all(
        np.array_equal(rows(_HEAD, start), rows(embedding.name, start)) for start in range(0, embedding.rows, step)
    ):
        raise CheckpointError(
            f"{checkpoint.folder / checkpoint[_HEAD].file}: {_HEAD} differs from {embedding.name}, and "
            f"{checkpoint.folder / 'config.json'} has tie_word_embeddings true: which of the two is the head cannot be "
            f"known. Set tie_word_embeddings to false in the source's config.json (for one on the Hub: of a copy, as a "
            f"local source) if the head was trained apart; else remove {_HEAD} there."
        )
