"""The configurations of real models, as far as an architecture is made of them, and checkpoints without weights."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.checkpoint.architecture import Architecture, read_architecture
from pipeline.checkpoint.tensors import TensorRef
from tests.families import CASES

# The real models' configurations, as far as an architecture is made of them.
REAL_CONFIGS: dict[str, dict[str, Any]] = {
    "mimo-8b": {
        "model_type": "mimo",
        "hidden_size": 4096,
        "intermediate_size": 11008,
        "num_hidden_layers": 36,
        "num_attention_heads": 32,
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151680,
        "max_position_embeddings": 32768,
        "rms_norm_eps": 1e-5,
        "rope_theta": 640000,
        "attention_bias": True,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "num_nextn_predict_layers": 1,
        "use_sliding_window": False,
        "sliding_window": 32768,
        "rope_scaling": None,
    },
    "phi-4": {
        "model_type": "phi3",
        "hidden_size": 5120,
        "intermediate_size": 17920,
        "num_hidden_layers": 40,
        "num_attention_heads": 40,
        "num_key_value_heads": 10,
        "vocab_size": 100352,
        "max_position_embeddings": 16384,
        "original_max_position_embeddings": 16384,
        "rms_norm_eps": 1e-5,
        "rope_theta": 250000,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
        "sliding_window": None,
        "rope_scaling": None,
    },
    "phi-4-mini": {
        "model_type": "phi3",
        "hidden_size": 3072,
        "intermediate_size": 8192,
        "num_hidden_layers": 32,
        "num_attention_heads": 24,
        "num_key_value_heads": 8,
        "vocab_size": 200064,
        "max_position_embeddings": 131072,
        "original_max_position_embeddings": 4096,
        "partial_rotary_factor": 0.75,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "rope_scaling": {"type": "longrope", "short_factor": [1.0] * 48, "long_factor": [2.0] * 48},
        "tie_word_embeddings": True,
        "hidden_act": "silu",
        "sliding_window": 262144,
    },
    "phi-tiny-moe": {
        "model_type": "phimoe",
        "hidden_size": 4096,
        "intermediate_size": 448,
        "num_hidden_layers": 32,
        "num_attention_heads": 16,
        "num_key_value_heads": 4,
        "head_dim": 128,
        "num_local_experts": 16,
        "num_experts_per_tok": 2,
        "vocab_size": 32064,
        "max_position_embeddings": 4096,
        "rms_norm_eps": 1e-5,
        "rope_theta": 10000.0,
        "attention_bias": True,
        "lm_head_bias": True,
        "router_jitter_noise": 0.01,
        "sliding_window": 2047,
        "tie_word_embeddings": False,
        "hidden_act": "silu",
    },
    "smollm2-135m": {
        "model_type": "llama",
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "hidden_act": "silu",
    },
}
_LLAMA3 = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}


def _llama3(factor: float, **shapes: Any) -> dict[str, Any]:
    return {
        "model_type": "llama",
        "num_key_value_heads": 8,
        "vocab_size": 128256,
        "max_position_embeddings": 131072,
        "rms_norm_eps": 1e-5,
        "rope_theta": 500000.0,
        "rope_scaling": _LLAMA3 | {"factor": factor, "original_max_position_embeddings": 8192},
        "attention_bias": False,
        "mlp_bias": False,
        "hidden_act": "silu",
        **shapes,
    }


def _qwen3(**shapes: Any) -> dict[str, Any]:
    return {
        "model_type": "qwen3",
        "num_key_value_heads": 8,
        "head_dim": 128,
        "vocab_size": 151936,
        "max_position_embeddings": 40960,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1000000,
        "rope_scaling": None,
        "attention_bias": False,
        "hidden_act": "silu",
        "use_sliding_window": False,
        "sliding_window": None,
        "max_window_layers": shapes["num_hidden_layers"],
        **shapes,
    }


def _shapes(layers: int, hidden: int, heads: int, intermediate: int, tied: bool) -> dict[str, Any]:
    return {
        "num_hidden_layers": layers,
        "hidden_size": hidden,
        "num_attention_heads": heads,
        "intermediate_size": intermediate,
        "tie_word_embeddings": tied,
    }


_REASONING = {"max_position_embeddings": 32768, "original_max_position_embeddings": 32768, "rope_theta": 500000}
REAL_CONFIGS |= {
    "phi-4-reasoning": REAL_CONFIGS["phi-4"] | _REASONING,
    "phi-4-reasoning-plus": REAL_CONFIGS["phi-4"] | _REASONING,
    "phi-4-mini-reasoning": REAL_CONFIGS["phi-4-mini"],
    "llama-3-2-1b": _llama3(32.0, head_dim=64, **_shapes(16, 2048, 32, 8192, True)),
    "llama-3-2-3b": _llama3(32.0, head_dim=128, **_shapes(28, 3072, 24, 8192, True)),
    "llama-3-1-8b": _llama3(8.0, **_shapes(32, 4096, 32, 14336, False)),
    "qwen3-0-6b": _qwen3(**_shapes(28, 1024, 16, 3072, True)),
    "qwen3-1-7b": _qwen3(**_shapes(28, 2048, 16, 6144, True)),
    "qwen3-4b": _qwen3(**_shapes(36, 2560, 32, 9728, True)),
    "qwen3-8b": _qwen3(**_shapes(36, 4096, 32, 12288, False)),
}


REAL_CONFIGS["phi-mini-moe"] = REAL_CONFIGS["phi-tiny-moe"] | {
    "intermediate_size": 960, "num_attention_heads": 32, "num_key_value_heads": 8,
}  # fmt: skip


def architecture_of(name: str, folder: Path) -> Architecture:
    """The architecture of a real model or of a tiny case, read from a config.json written to `folder`."""
    config = REAL_CONFIGS[name] if name in REAL_CONFIGS else CASES[name].config
    (folder / "config.json").write_text(json.dumps(config))
    return read_architecture(folder / "config.json")


def references(architecture: Architecture) -> dict[str, TensorRef]:
    """A bf16 checkpoint's references: enough to build a graph and plan an artifact, to the byte, with no weights."""
    refs, offset = {}, 0
    for name, shape in architecture.expected_tensors().items():
        ref = TensorRef(name, "BF16", shape, "model.safetensors", offset, 0)
        refs[name] = TensorRef(name, "BF16", shape, "model.safetensors", offset, 2 * ref.elements)
        offset += 2 * ref.elements
    return refs
