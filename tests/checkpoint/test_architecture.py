"""config.json of the supported families, at full size and with everything that can be wrong in it."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.checkpoint import architecture as module
from pipeline.checkpoint.architecture import Architecture, check_tensors, read_architecture, unknown_keys
from pipeline.checkpoint.config_keys import DEFAULTS
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.door.generation import KEYS
from pipeline.errors import CheckpointError
from tests.families import CASES, LLAMA3, make_checkpoint
from tests.real_configs import REAL_CONFIGS


def architecture_of(config: Any, tmp_path: Path) -> Architecture:
    (tmp_path / "config.json").write_text(config if isinstance(config, str) else json.dumps(config))
    return read_architecture(tmp_path / "config.json")


def refusal(config: Any, tmp_path: Path) -> str:
    with pytest.raises(CheckpointError) as caught:
        architecture_of(config, tmp_path)
    message = str(caught.value)
    assert "config.json" in message
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("name", "parameters", "tensors"),
    [
        ("mimo-8b", 7_622_619_136, 435),
        ("phi-4", 14_659_507_200, 243),
        ("phi-4-mini", 3_836_021_760, 194),
        ("phi-tiny-moe", 3_755_220_288, 1957),
        ("phi-mini-moe", 7_647_632_704, 1957),
        ("smollm2-135m", 134_515_008, 272),
        ("llama-3-2-1b", 1_235_814_400, 146),
        ("llama-3-2-3b", 3_212_749_824, 254),
        ("llama-3-1-8b", 8_030_261_248, 291),
        ("qwen3-0-6b", 596_049_920, 310),
        ("qwen3-1-7b", 1_720_574_976, 310),
        ("qwen3-4b", 4_022_468_096, 398),
        ("qwen3-8b", 8_190_735_360, 399),
    ],
)
def test_parameters_of_the_real_models(name: str, parameters: int, tensors: int, tmp_path: Path) -> None:
    architecture = architecture_of(REAL_CONFIGS[name], tmp_path)
    assert architecture.parameters == parameters
    assert len(architecture.expected_tensors()) == tensors


def test_qwen3_norms_the_queries_and_keys_of_each_head(tmp_path: Path) -> None:
    shapes = architecture_of(REAL_CONFIGS["qwen3-4b"], tmp_path).expected_tensors()
    assert shapes["model.layers.35.self_attn.q_proj.weight"] == (4096, 2560)
    assert (
        shapes["model.layers.35.self_attn.q_norm.weight"] == shapes["model.layers.0.self_attn.k_norm.weight"] == (128,)
    )
    assert not any(name.endswith(".bias") for name in shapes)


def test_biases_are_where_config_json_puts_them(tmp_path: Path) -> None:
    """And layer norms have them always."""
    dense = CASES["phimoe"].config
    plain = architecture_of(dense | {"attention_bias": False, "lm_head_bias": None}, tmp_path)
    norms = {name for name in plain.expected_tensors() if name.endswith("bias")}
    assert norms == {name.replace("weight", "bias") for name in plain.expected_tensors() if "norm.weight" in name}
    biased = architecture_of(dense, tmp_path).expected_tensors()
    assert biased["lm_head.bias"] == (320,) and biased["model.layers.2.self_attn.o_proj.bias"] == (128,)
    assert len(biased) == len(plain.expected_tensors()) + 3 * 4 + 1


def test_a_mixture_is_its_experts_and_a_router_that_nobody_quantizes(tmp_path: Path) -> None:
    architecture = architecture_of(REAL_CONFIGS["phi-tiny-moe"], tmp_path)
    assert (architecture.experts, architecture.experts_per_token, architecture.router_jitter) == (16, 2, 0.01)
    body = {matrix.name: matrix for matrix in architecture.body(31)}
    shapes = architecture.expected_tensors()
    assert len(body) == 4 + 16 * 3 and architecture.router(31) not in body
    assert shapes[architecture.router(31)] == (16, 4096)
    gate, down = (body[f"model.layers.31.block_sparse_moe.experts.15.{part}.weight"] for part in ("w1", "w2"))
    assert (gate.role, gate.rows, gate.columns, gate.expert) == ("expert_gate", 448, 4096, 15)
    assert (down.role, down.rows, down.columns, down.input) == ("expert_down", 4096, 448, "layers.31.experts.15.down")
    assert len({matrix.input for matrix in body.values()}) == 2 + 16 * 2
    assert architecture.sliding_window == 2047


def test_mimo_is_qwen2_with_biases(tmp_path: Path) -> None:
    architecture = architecture_of(REAL_CONFIGS["mimo-8b"], tmp_path)
    shapes = architecture.expected_tensors()
    assert shapes["model.layers.35.self_attn.k_proj.bias"] == (1024,)
    assert "model.layers.0.self_attn.o_proj.bias" not in shapes
    assert architecture.head.name == "lm_head.weight"
    assert architecture.traits.genai_type == "qwen2"
    assert architecture.rope.theta == 640_000
    assert architecture.sliding_window is None


def test_phi3_is_fused(tmp_path: Path) -> None:
    architecture = architecture_of(REAL_CONFIGS["phi-4"], tmp_path)
    matrices = {matrix.role: matrix for matrix in architecture.body(39)}
    assert list(matrices) == ["qkv_proj", "o_proj", "gate_up_proj", "down_proj"]
    assert (matrices["qkv_proj"].rows, matrices["qkv_proj"].columns) == (7680, 5120)
    assert (matrices["gate_up_proj"].rows, matrices["gate_up_proj"].columns) == (35840, 5120)
    assert len(architecture.matrices) == 4 * 40 + 1


def test_phi4_mini_has_longrope_on_part_of_the_channels(tmp_path: Path) -> None:
    rope = architecture_of(REAL_CONFIGS["phi-4-mini"], tmp_path).rope
    assert rope.dims == 96
    assert rope.original_max_position == 4096
    assert rope.attention_factor == pytest.approx(math.sqrt(1 + math.log(32) / math.log(4096)))
    assert rope.short_factor is not None
    assert len(rope.short_factor) == 48


def test_a_stated_attention_factor_wins(tmp_path: Path) -> None:
    config = REAL_CONFIGS["phi-4-mini"]
    scaling = config["rope_scaling"] | {"attention_factor": 1.5}
    assert architecture_of(config | {"rope_scaling": scaling}, tmp_path).rope.attention_factor == 1.5


def test_newer_configs_keep_rope_in_one_object(tmp_path: Path) -> None:
    """transformers 5 writes rope_parameters: its theta must not fall back to 10,000 in silence."""
    config = {key: value for key, value in CASES["qwen2"].config.items() if key != "rope_theta"}
    config["rope_parameters"] = {"rope_type": "default", "rope_theta": 5e5}
    assert architecture_of(config, tmp_path).rope.theta == 5e5


def test_tying(tmp_path: Path) -> None:
    tied = architecture_of(CASES["llama-tied"].config, tmp_path)
    untied = architecture_of(CASES["llama-tied"].config | {"tie_word_embeddings": False}, tmp_path)
    assert tied.head.name == "model.embed_tokens.weight"
    assert untied.parameters - tied.parameters == 320 * 128
    default = {key: value for key, value in CASES["qwen2"].config.items() if key != "tie_word_embeddings"}
    assert not architecture_of(default, tmp_path).tied


def test_sliding_window_only_where_it_is_used(tmp_path: Path) -> None:
    qwen = CASES["qwen2"].config | {"sliding_window": 128}
    assert architecture_of(qwen, tmp_path).sliding_window is None
    used = qwen | {"use_sliding_window": True}
    assert architecture_of(used, tmp_path).sliding_window is None  # 28 layers see everything, this model has 3
    assert architecture_of(used | {"max_window_layers": 2}, tmp_path).sliding_window == 128
    assert architecture_of(used | {"max_window_layers": 3}, tmp_path).sliding_window is None
    full, one = ["full_attention"] * 3, ["full_attention", "sliding_attention", "full_attention"]
    assert architecture_of(used | {"max_window_layers": 0, "layer_types": full}, tmp_path).sliding_window is None
    assert architecture_of(used | {"layer_types": one}, tmp_path).sliding_window == 128
    assert architecture_of(LLAMA | {"sliding_window": 16, "layer_types": full}, tmp_path).sliding_window is None
    assert architecture_of(CASES["phi3"].config | {"sliding_window": 64}, tmp_path).sliding_window == 64


LLAMA, LONGROPE, PHIMOE = (CASES[name].config for name in ("llama-tied", "phi3-longrope", "phimoe"))


@pytest.mark.parametrize(
    ("config", "parts"),
    [
        (
            LLAMA | {"model_type": "lama"},
            ["'lama'", "Did you mean 'llama'", "Supported: llama, qwen2, qwen3, mimo, phi3"],
        ),
        (LLAMA | {"model_type": "mixtral", "auto_map": {"AutoModel": "evil.py"}}, ["'mixtral'", "not supported"]),
        (LLAMA | {"model_type": ["llama"]}, ["not supported"]),
        (LLAMA | {"model_type": None}, ["None", "not supported"]),
        (LLAMA | {"num_hidden_layers": None}, ["num_hidden_layers is None"]),
        (LLAMA | {"hidden_size": -5}, ["hidden_size is -5"]),
        (LLAMA | {"hidden_size": "128"}, ["hidden_size is '128'"]),
        (LLAMA | {"vocab_size": True}, ["vocab_size is True"]),
        (LLAMA | {"intermediate_size": 1 << 40}, ["intermediate_size"]),
        (LLAMA | {"num_attention_heads": 3}, ["3 heads do not divide"]),
        (LLAMA | {"num_key_value_heads": 3}, ["3 KV heads"]),
        (LLAMA | {"num_key_value_heads": "two"}, ["num_key_value_heads is 'two'"]),
        (LLAMA | {"head_dim": 0}, ["head_dim is 0"]),
        (LLAMA | {"rms_norm_eps": "tiny"}, ["rms_norm_eps is 'tiny'"]),
        (LLAMA | {"rope_theta": float("nan")}, ["rope_theta is nan"]),
        (LLAMA | {"hidden_act": "gelu"}, ["hidden_act = 'gelu' is not supported for llama"]),
        (LLAMA | {"attention_bias": "all"}, ["attention_bias is 'all'; true or false"]),
        (CASES["phi3"].config | {"mlp_bias": True}, ["mlp_bias"]),
        (LLAMA | {"quantization_config": {"bits": 4}}, ["quantization_config", "original checkpoint"]),
        (LLAMA | {"rope_scaling": {"rope_type": "llama3", "factor": 8.0}}, ["low_freq_factor is None; a number"]),
        (LLAMA | {"rope_scaling": LLAMA3 | {"original_max_position_embeddings": None}}, ["is None; an integer"]),
        (LLAMA | {"rope_scaling": LLAMA3 | {"high_freq_factor": 1.0}}, ["high_freq_factor 1 is not above", "factor 1"]),
        (LLAMA | {"rope_scaling": LLAMA3 | {"long_mscale": 1.2}}, ["long_mscale = 1.2", "supported: default, llama3"]),
        (CASES["qwen3"].config | {"rope_scaling": LLAMA3}, ["'llama3'", "for qwen3; supported: default."]),
        (LLAMA | {"rope_scaling": [1]}, ["rope_scaling"]),
        (LLAMA | {"rope_scaling": LONGROPE["rope_scaling"]}, ["'longrope'", "for llama"]),
        (LLAMA | {"rope_parameters": {"rope_theta": 5e5}}, ["rope_theta is 10000.0 in one place and 500000.0"]),
        (LLAMA | {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}}, ["rope_parameters is", "of numbers"]),
        (LONGROPE | {"rope_scaling": LONGROPE["rope_scaling"] | {"long_mscale": 1.2}}, ["long_mscale = 1.2"]),
        (LLAMA | {"architectures": ["LlamaForSequenceClassification"]}, ["architectures is", "…ForCausalLM"]),
        (LLAMA | {"layer_types": ["sliding_attention"] * 3}, ["layer_types is", "each full_attention"]),
        (
            CASES["qwen2"].config | {"layer_types": ["sliding_attention"] * 3},
            ["layer_types is", "each full_attention"],
        ),
        (LLAMA | {"logits_scaling": 8.0}, ["logits_scaling = 8.0", "computes the model of 1, null", "kind: local"]),
        (LLAMA | {"num_local_experts": 8}, ["num_local_experts = 8"]),
        (PHIMOE | {"num_experts_per_tok": 4}, ["num_experts_per_tok is 4; an integer from 2 to 2"]),
        (PHIMOE | {"num_experts": 8}, ["num_experts is 8; an integer from 6 to 6"]),
        (PHIMOE | {"moe_intermediate_size": 32}, ["moe_intermediate_size is 32"]),
        (PHIMOE | {"num_local_experts": 1000}, ["num_local_experts is 1000; an integer from 2 to 256"]),
        (PHIMOE | {"router_jitter_noise": -1.0}, ["router_jitter_noise is -1.0"]),
        (PHIMOE | {"mlp_bias": True}, ["mlp_bias"]),
        (PHIMOE | {"rope_scaling": LONGROPE["rope_scaling"]}, ["'longrope'", "for phimoe"]),
        (LLAMA | {"vision_config": {}}, ["vision_config = {}"]),
        (LONGROPE | {"rope_scaling": {"type": "longrope", "short_factor": [1.0]}}, ["short_factor", "16 numbers"]),
        (
            LONGROPE | {"rope_scaling": LONGROPE["rope_scaling"] | {"long_factor": ["a"] * 16}},
            ["long_factor is 'a'"],
        ),
        (
            LONGROPE | {"rope_scaling": LONGROPE["rope_scaling"] | {"long_factor": [0.0] * 16}},
            ["long_factor is 0.0"],
        ),
        (CASES["phi3"].config | {"sliding_window": "wide"}, ["sliding_window is 'wide'"]),
        ("[1]", ["not a JSON object"]),
        ("{", ["cannot be read as JSON"]),
        ("[" * 100_000, ["cannot be read as JSON"]),
    ],
)
def test_bad_configs(config: Any, parts: list[str], tmp_path: Path) -> None:
    message = refusal(config, tmp_path)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("family", DEFAULTS)
def test_an_absent_key_means_what_transformers_means(family: str, tmp_path: Path) -> None:
    """Every key that an architecture is made of, against the family's own class; MiMo's extends Qwen2's."""
    from transformers import AutoConfig

    theirs = AutoConfig.for_model("qwen2" if family == "mimo" else family)
    # sliding_window is an argument's default, which the class forgets where it is switched off
    for key in DEFAULTS[family].keys() - {"sliding_window"}:
        assert getattr(theirs, key) == DEFAULTS[family][key], key
    ours = architecture_of({"model_type": family}, tmp_path)
    assert ours == architecture_of(theirs.to_dict() | {"model_type": family}, tmp_path)


@pytest.mark.parametrize("family", DEFAULTS)
def test_every_key_that_transformers_writes_is_known(family: str, tmp_path: Path) -> None:
    from transformers import AutoConfig

    written = AutoConfig.for_model("qwen2" if family == "mimo" else family).to_dict() | {"model_type": family}
    (tmp_path / "config.json").write_text(json.dumps(written | {"sizzle": 1, "attn_temperature": 2.0}))
    assert set(unknown_keys(tmp_path / "config.json")) - KEYS == {"sizzle", "attn_temperature"}


def test_harmless_spellings(tmp_path: Path) -> None:
    plain = architecture_of(LLAMA, tmp_path)
    for harmless in (
        {"hidden_act": "swish"},
        {"rope_scaling": {}},
        {"rope_scaling": {"type": None, "rope_type": "default", "factor": 4.0}},
        {"rope_parameters": {"rope_theta": 1e4, "rope_type": "default"}},
        {"attention_bias": None, "mlp_bias": False, "num_experts": 0, "logits_scaling": 1.0},
        {"architectures": ["LlamaForCausalLM"], "torch_dtype": "float16", "auto_map": {"AutoConfig": "x--y.Z"}},
    ):
        assert architecture_of(LLAMA | harmless, tmp_path) == plain
    assert architecture_of(CASES["qwen2"].config | {"attention_bias": True}, tmp_path).traits.biases


def test_missing_config(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="Run the download stage again"):
        read_architecture(tmp_path / "config.json")


def stored(case: str, tmp_path: Path, **changes: np.ndarray | None) -> tuple[Architecture, Checkpoint]:
    """A tiny checkpoint with tensors added, replaced or (None) removed."""
    make_checkpoint(tmp_path, CASES[case])
    before = Checkpoint(tmp_path)
    tensors = {name: before.rows(name) for name in before} | changes
    save_file({name: value for name, value in tensors.items() if value is not None}, tmp_path / "model.safetensors")
    return read_architecture(tmp_path / "config.json"), Checkpoint(tmp_path)


@pytest.mark.parametrize("case", CASES)
def test_complete_checkpoints_pass(case: str, tmp_path: Path) -> None:
    notes = check_tensors(*stored(case, tmp_path))
    if case != "mimo":
        assert notes == []


def test_mtp_tensors_are_dropped_with_a_sentence(tmp_path: Path) -> None:
    (note,) = check_tensors(*stored("mimo", tmp_path))
    assert note == ("left out 2 tensors under model.mtp_layers.* (2,048 parameters): the forward never uses them")


def test_an_equal_head_beside_a_tied_embedding_is_left_out_with_a_sentence(tmp_path: Path) -> None:
    _, before = stored("llama-tied", tmp_path)
    parts = stored("llama-tied", tmp_path, **{"lm_head.weight": before.rows("model.embed_tokens.weight")})
    assert check_tensors(*parts) == [
        "left out lm_head.weight: it equals the embedding, to which config.json ties the head"
    ]


@pytest.mark.parametrize("rows", [320, 319])
def test_another_head_beside_a_tied_embedding_is_refused_and_the_remedy_works(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, rows: int
) -> None:
    monkeypatch.setattr(module, "_COMPARED", 7 * 4 * 128)  # some rows at a time, and fewer at the end
    _, before = stored("llama-tied", tmp_path)
    head = before.rows("model.embed_tokens.weight", 0, rows)
    head[-1, -1] += 1e-3
    architecture, checkpoint = stored("llama-tied", tmp_path, **{"lm_head.weight": head})
    with pytest.raises(CheckpointError) as caught:
        check_tensors(architecture, checkpoint)
    parts = (str(tmp_path / "model.safetensors"), "lm_head.weight differs", str(tmp_path / "config.json"))
    assert all(part in str(caught.value) for part in (*parts, "Set tie_word_embeddings to false"))
    config = json.loads((tmp_path / "config.json").read_text()) | {"tie_word_embeddings": False}
    (tmp_path / "config.json").write_text(json.dumps(config))
    if rows == 320:
        assert check_tensors(read_architecture(tmp_path / "config.json"), checkpoint) == []


@pytest.mark.parametrize(
    ("name", "value", "parts"),
    [
        ("model.layers.1.mlp.up_proj.weight", None, ["1 of", "missing", "'model.layers.1.mlp.up_proj.weight'"]),
        ("model.norm.weight", np.ones(64, np.float32), ["'model.norm.weight'", "[64]", "[128]"]),
        ("lm_head.weight", np.ones((319, 128), np.float32), ["'lm_head.weight'", "[319, 128]", "[320, 128]"]),
        ("model.mtp_layers.0.x", np.ones(2, np.float32), ["unknown to family 'llama'", "'model.mtp_layers.0.x'"]),
        ("model.layers.0.self_attn.q_norm.weight", np.ones(2, np.float32), ["q_norm", "could change the model"]),
    ],
)
def test_wrong_tensors(name: str, value: np.ndarray | None, parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(CheckpointError) as caught:
        check_tensors(*stored("llama-untied", tmp_path, **{name: value}))
    message = str(caught.value)
    assert all(part in message for part in [*parts, str(tmp_path)]), message
    assert "\n" not in message
