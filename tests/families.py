"""Small seeded checkpoints with the real configs' proportions, one per decoder family and rotary variant."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint.architecture import read_architecture


@dataclass(frozen=True)
class Case:
    """A family's tiny config, and what transformers calls it (MiMo is Qwen2 once its MTP tensors are dropped).

    `extra` are tensors that it has besides; `optimum` says whether Optimum exports it, `own` whether our own reference
    stands in for transformers.
    """

    config: dict[str, Any]
    transformers_type: str
    extra: tuple[str, ...] = ()
    optimum: bool = True
    own: bool = False


def _base(model_type: str, **changes: Any) -> dict[str, Any]:
    config = {
        "model_type": model_type,
        "hidden_size": 128,
        "intermediate_size": 320,
        "num_hidden_layers": 3,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "vocab_size": 320,
        "max_position_embeddings": 256,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "bos_token_id": 1,
        "eos_token_id": 2,
        "pad_token_id": 2,
    }
    return config | changes


def _phimoe(**changes: Any) -> dict[str, Any]:
    biases = {"attention_bias": True, "lm_head_bias": True}
    return _base("phimoe", intermediate_size=64, num_local_experts=6, num_experts_per_tok=2, **biases, **changes)


def _longrope(dims: int) -> dict[str, Any]:
    pairs = dims // 2
    return {
        "type": "longrope",
        "short_factor": [1.0 + 0.02 * pair for pair in range(pairs)],
        "long_factor": [1.5 + 0.3 * pair for pair in range(pairs)],
    }


# Of the first 32 pairs of channels, some keep their frequency, some are interpolated, some are slowed down.
LLAMA3 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}

CASES = {
    "llama-tied": Case(_base("llama", tie_word_embeddings=True), "llama"),
    "llama-untied": Case(_base("llama", num_key_value_heads=1), "llama"),
    "llama3": Case(
        _base("llama", rope_theta=500000.0, tie_word_embeddings=True, head_dim=64, rope_scaling=LLAMA3), "llama"
    ),
    "llama-biased": Case(_base("llama", attention_bias=True, mlp_bias=True, head_dim=48), "llama"),
    "qwen2": Case(_base("qwen2", rope_theta=1e6), "qwen2"),
    "qwen2-tied": Case(_base("qwen2", tie_word_embeddings=True, num_key_value_heads=4), "qwen2"),
    "qwen3": Case(_base("qwen3", rope_theta=1e6, head_dim=48, tie_word_embeddings=True), "qwen3"),
    "qwen3-biased": Case(_base("qwen3", head_dim=64, rope_theta=1e6, attention_bias=True), "qwen3"),
    "mimo": Case(
        _base("mimo", rope_theta=640000.0, num_nextn_predict_layers=1, head_dim=32),
        "qwen2",
        extra=("model.mtp_layers.0.self_attn.q_proj.weight", "model.mtp_layers.0.input_proj.weight"),
    ),
    "phi3": Case(_base("phi3", rope_theta=250000.0, original_max_position_embeddings=256), "phi3"),
    "phi3-partial-tied": Case(
        _base(
            "phi3",
            num_attention_heads=2,
            num_key_value_heads=1,
            partial_rotary_factor=0.75,
            tie_word_embeddings=True,
            original_max_position_embeddings=256,
        ),
        "phi3",
    ),
    "phimoe": Case(_phimoe(), "phimoe", optimum=False),
    # as Phi-tiny-MoE, whose heads transformers' class takes to be hidden / heads wide
    "phimoe-wide-heads": Case(_phimoe(head_dim=48), "phimoe", optimum=False, own=True),
    # 40 prompt tokens + 32 decode steps cross the switch from the short to the long factors at 64.
    "phi3-longrope": Case(_base("phi3", original_max_position_embeddings=64, rope_scaling=_longrope(32)), "phi3"),
    "phi3-longrope-partial": Case(
        _base(
            "phi3",
            num_attention_heads=2,
            num_key_value_heads=1,
            original_max_position_embeddings=64,
            partial_rotary_factor=0.75,
            rope_scaling=_longrope(48),
            tie_word_embeddings=True,
        ),
        "phi3",
    ),
}


def make_checkpoint(folder: Path, case: Case, seed: int = 0, dtype: str = "F32") -> Path:
    """Write config.json and model.safetensors with seeded weights of a trained model's scale."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(case.config))
    shapes = read_architecture(folder / "config.json").expected_tensors() | {name: (8, 128) for name in case.extra}
    rng = np.random.default_rng(seed)
    tensors = {}
    for name, shape in shapes.items():
        values = rng.standard_normal(shape).astype(np.float32)
        if name.endswith("norm.weight"):
            values = 1 + 0.1 * values
        elif len(shape) == 2:
            values *= 1.2 / np.sqrt(shape[1]) if "embed" not in name else 1.0
        else:
            values *= 0.3
        tensors[name] = values.astype({"F32": np.float32, "F16": np.float16, "BF16": bfloat16}[dtype])
    save_file(tensors, folder / "model.safetensors")
    return folder


def add_mtp(folder: Path) -> None:
    """Give the checkpoint of a family that has one a whole multi-token head, seeded like the rest."""
    head = read_architecture(folder / "config.json").mtp
    assert head is not None
    tensors, rng = load_file(folder / "model.safetensors"), np.random.default_rng(1)
    for name, shape in head.expected_tensors().items():
        if name.startswith(head.block(0)):
            values = rng.standard_normal(shape).astype(np.float32)
            tensors[name] = 1 + 0.1 * values if name.endswith("norm.weight") else values * np.float32(shape[-1] ** -0.5)
    save_file(tensors, folder / "model.safetensors")


def transformers_model(folder: Path, case: Case) -> Any:
    """The reference implementation over the same weights; MiMo's config is patched to Qwen2 (FP differences: none)."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    values = {key: value for key, value in case.config.items() if key != "model_type"}
    config = AutoConfig.for_model(case.transformers_type, **values)
    if case.own:
        from pipeline.parity.phimoe import PhiMoE

        return PhiMoE(folder, config)
    config._attn_implementation = "eager"
    model = AutoModelForCausalLM.from_pretrained(folder, config=config, dtype=torch.float32)
    return model.eval()
