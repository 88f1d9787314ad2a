"""What the publishers' config.json, generation_config.json and tokenizer files say: the facts behind `synthetic`.

Configurations are the published values, as public copies of the files give them. The tokenizers' layouts are those of
the published tokenizer.json: number of tokens, added tokens by id, splitting pattern. Chat templates are shortened to
what makes a plain conversation the same.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Vocabulary:
    """Layout of a tokenizer: `base` tokens made by merges, then added ones up to `size`.

    `special` names added tokens by id; the rest are reserved. `plain` are those of them that decoding keeps.
    """

    base: int
    size: int
    special: dict[int, str]
    pattern: str
    settings: dict[str, Any]
    plain: tuple[str, ...] = ()
    normalizer: dict[str, str] | None = None


@dataclass(frozen=True)
class Model:
    """A published checkpoint: what its config.json, generation_config.json and tokenizer say."""

    config: dict[str, Any]
    generation: dict[str, Any]
    vocabulary: Vocabulary


_SUFFIX = "(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_OTHER = r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_QWEN2_PLAIN = (
    "<tool_call>", "</tool_call>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|fim_pad|>",
    "<|repo_name|>", "<|file_sep|>",
)  # fmt: skip
_QWEN2_ADDED = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|object_ref_start|>", "<|object_ref_end|>", "<|box_start|>",
    "<|box_end|>", "<|quad_start|>", "<|quad_end|>", "<|vision_start|>", "<|vision_end|>", "<|vision_pad|>",
    "<|image_pad|>", "<|video_pad|>", *_QWEN2_PLAIN,
)  # fmt: skip
_QWEN2 = Vocabulary(
    base=151643,
    size=151665,
    special=dict(enumerate(_QWEN2_ADDED, 151643)),
    plain=_QWEN2_PLAIN,
    normalizer={"type": "NFC"},
    pattern=rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}|{_OTHER}",
    settings={
        "tokenizer_class": "Qwen2Tokenizer",
        "bos_token": None,
        "eos_token": "<|im_end|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 32768,
        "chat_template": (
            "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + "
            "'<|im_end|>' + '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
        ),
    },
)
_CL100K = Vocabulary(
    base=100256,
    size=100352,
    special={
        100257: "<|endoftext|>",
        100258: "<|fim_prefix|>",
        100259: "<|fim_middle|>",
        100260: "<|fim_suffix|>",
        100264: "<|im_start|>",
        100265: "<|im_end|>",
        100266: "<|im_sep|>",
        100276: "<|endofprompt|>",
    },
    pattern=rf"{_SUFFIX}|[^\r\n\p{{L}}\p{{N}}]?\p{{L}}+|\p{{N}}{{1,3}}|{_OTHER}",
    settings={
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|im_end|>",
        "pad_token": "<|dummy_85|>",
        "model_max_length": 16384,
        "chat_template": (
            "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '<|im_sep|>' + message['content'] + "
            "'<|im_end|>' }}{% endfor %}"
            "{% if add_generation_prompt %}{{ '<|im_start|>assistant<|im_sep|>' }}{% endif %}"
        ),
    },
)
_O200K = Vocabulary(
    base=199998,
    size=200029,
    special={
        199999: "<|endoftext|>",
        200018: "<|endofprompt|>",
        200019: "<|assistant|>",
        200020: "<|end|>",
        200021: "<|user|>",
        200022: "<|system|>",
    },
    pattern=(
        rf"[^\r\n\p{{L}}\p{{N}}]?{_UPPER}*{_LOWER}+{_SUFFIX}?|[^\r\n\p{{L}}\p{{N}}]?{_UPPER}+{_LOWER}*{_SUFFIX}?"
        rf"|\p{{N}}{{1,3}}| ?[^\s\p{{L}}\p{{N}}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
    ),
    settings={
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 131072,
        "chat_template": (
            "{% for message in messages %}{{ '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>' }}{% endif %}"
        ),
    },
)
_MIMO_CONFIG = {
    "architectures": ["MiMoForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_mimo.MiMoConfig",
        "AutoModel": "modeling_mimo.MiMoModel",
        "AutoModelForCausalLM": "modeling_mimo.MiMoForCausalLM",
    },
    "model_type": "mimo",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": 151643,
    "eos_token_id": 151645,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "intermediate_size": 11008,
    "max_position_embeddings": 32768,
    "max_window_layers": 32,
    "num_attention_heads": 32,
    "num_hidden_layers": 36,
    "num_key_value_heads": 8,
    "num_nextn_predict_layers": 1,
    "rms_norm_eps": 1e-05,
    "rope_theta": 640000,
    "sliding_window": 32768,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.40.1",
    "use_cache": True,
    "use_mrope": False,
    "use_sliding_window": False,
    "vocab_size": 151680,
}
_PHI_4_CONFIG = {
    "architectures": ["Phi3ForCausalLM"],
    "model_type": "phi3",
    "attention_bias": False,
    "attention_dropout": 0.0,
    "bos_token_id": 100257,
    "embd_pdrop": 0.0,
    "eos_token_id": 100265,
    "hidden_act": "silu",
    "hidden_size": 5120,
    "initializer_range": 0.02,
    "intermediate_size": 17920,
    "max_position_embeddings": 16384,
    "num_attention_heads": 40,
    "num_hidden_layers": 40,
    "num_key_value_heads": 10,
    "original_max_position_embeddings": 16384,
    "pad_token_id": 100349,
    "resid_pdrop": 0.0,
    "rms_norm_eps": 1e-05,
    "rope_scaling": None,
    "rope_theta": 250000,
    "sliding_window": None,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.47.0",
    "use_cache": True,
    "vocab_size": 100352,
}
_LONG_FACTOR = [
    1, 1.118320672, 1.250641126, 1.398617824, 1.564103225, 1.74916897, 1.956131817, 2.187582649, 2.446418898,
    2.735880826, 3.059592084, 3.421605075, 3.826451687, 4.279200023, 4.785517845, 5.351743533, 5.984965424, 6.693110555,
    7.485043894, 8.370679318, 9.36110372, 10.4687158, 11.70738129, 13.09260651, 14.64173252, 16.37415215, 18.31155283,
    20.47818807, 22.90118105, 25.61086418, 28.64115884, 32.03, 32.1, 32.13, 32.23, 32.6, 32.61, 32.64, 32.66, 32.7,
    32.71, 32.93, 32.97, 33.28, 33.49, 33.5, 44.16, 47.77,
]  # fmt: skip
_PHI_4_MINI_CONFIG = _PHI_4_CONFIG | {
    "bos_token_id": 199999,
    "eos_token_id": 199999,
    "hidden_size": 3072,
    "intermediate_size": 8192,
    "max_position_embeddings": 131072,
    "num_attention_heads": 24,
    "num_hidden_layers": 32,
    "num_key_value_heads": 8,
    "original_max_position_embeddings": 4096,
    "pad_token_id": 199999,
    "partial_rotary_factor": 0.75,
    "rope_scaling": {"type": "longrope", "long_factor": _LONG_FACTOR, "short_factor": [1.0] * 48},
    "rope_theta": 10000.0,
    "sliding_window": 262144,
    "tie_word_embeddings": True,
    "transformers_version": "4.45.0",
    "vocab_size": 200064,
}
# Special tokens as Phi-3's. The published pieces are SentencePiece's; those here are made of bytes.
_PHI_3_TOKENS = Vocabulary(
    base=32000,
    size=32011,
    special={
        32000: "<|endoftext|>",
        32001: "<|assistant|>",
        32006: "<|system|>",
        32007: "<|end|>",
        32010: "<|user|>",
    },
    pattern=_CL100K.pattern,
    settings={
        "tokenizer_class": "GPT2Tokenizer",
        "bos_token": "<|endoftext|>",
        "eos_token": "<|endoftext|>",
        "pad_token": "<|endoftext|>",
        "model_max_length": 4096,
        "chat_template": (
            "{% for message in messages %}{{ '<|' + message['role'] + '|>\n' + message['content'] + '<|end|>\n' }}"
            "{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\n' }}{% endif %}"
        ),
    },
)
_PHI_TINY_MOE_CONFIG = {
    "architectures": ["PhiMoEForCausalLM"],
    "auto_map": {
        "AutoConfig": "configuration_slimmoe.PhiMoEConfig",
        "AutoModelForCausalLM": "modeling_slimmoe.PhiMoEForCausalLM",
    },
    "model_type": "phimoe",
    "attention_bias": True,
    "attention_dropout": 0.0,
    "bos_token_id": 1,
    "eos_token_id": 32000,
    "expert_dropout": 0.0,
    "head_dim": 128,
    "hidden_act": "silu",
    "hidden_dropout": 0.0,
    "hidden_size": 4096,
    "initializer_range": 0.02,
    "input_jitter_noise": 0.01,
    "intermediate_size": 448,
    "lm_head_bias": True,
    "max_position_embeddings": 4096,
    "num_attention_heads": 16,
    "num_experts_per_tok": 2,
    "num_hidden_layers": 32,
    "num_key_value_heads": 4,
    "num_local_experts": 16,
    "output_router_logits": False,
    "rms_norm_eps": 1e-05,
    "rope_theta": 10000.0,
    "router_aux_loss_coef": 0.0,
    "router_jitter_noise": 0.01,
    "sliding_window": 2047,
    "tie_word_embeddings": False,
    "torch_dtype": "bfloat16",
    "transformers_version": "4.43.3",
    "use_cache": True,
    "vocab_size": 32064,
}
MODELS = {
    "mimo-8b": Model(_MIMO_CONFIG, {"bos_token_id": 151643, "eos_token_id": [151645, 151643]}, _QWEN2),
    "phi-4": Model(
        _PHI_4_CONFIG, {"bos_token_id": 100257, "eos_token_id": [100257, 100265], "pad_token_id": 100349}, _CL100K
    ),
    "phi-tiny-moe": Model(
        _PHI_TINY_MOE_CONFIG,
        {"bos_token_id": 1, "eos_token_id": [32000, 32007], "pad_token_id": 32000},
        _PHI_3_TOKENS,
    ),
    "phi-4-mini": Model(
        _PHI_4_MINI_CONFIG, {"bos_token_id": 199999, "eos_token_id": [200020, 199999], "pad_token_id": 199999}, _O200K
    ),
}
