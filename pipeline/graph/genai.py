"""genai_config.json: how onnxruntime-genai loads a folder and samples from it.

Schema: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from pipeline.checkpoint.architecture import Architecture, read_config
from pipeline.config import ModelConfig
from pipeline.errors import CheckpointError

# A prompt is run in chunks, so that its logits (chunk × vocabulary × 4 bytes) stay small on a phone.
PREFILL_CHUNK = 256


def stop_ids(folder: Path, extra: tuple[int, ...]) -> list[int]:
    """End-of-text ids from generation_config.json and config.json (their union), then the model entry's extras."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        if not (folder / name).exists():
            continue
        value = read_config(folder / name).get("eos_token_id")
        found += value if isinstance(value, list) else [] if value is None else [value]
    return list(dict.fromkeys([*found, *extra]))


def _chunk_size(architecture: Architecture, context: int) -> int:
    """`PREFILL_CHUNK`, or 0 (whole prompts) where LongRoPE switches factors inside the context.

    A prompt beyond the switch must be rotated with the long factors from its first token on; chunks before the switch
    would still take the short ones.
    """
    rope = architecture.rope
    return 0 if rope.long_factor and context > rope.original_max_position else PREFILL_CHUNK


def genai_config(
    architecture: Architecture, folder: Path, model_file: str, entry: ModelConfig, context: int
) -> dict[str, Any]:
    """The configuration for a graph of `architecture` whose tokenizer and configs lie in `folder`.

    Raises CheckpointError when nothing says where the model stops.
    """
    config = read_config(folder / "config.json")
    defaults = {}
    if (folder / "generation_config.json").exists():
        defaults = read_config(folder / "generation_config.json")
    stops = stop_ids(folder, entry.extra_stop_ids)
    if not stops:
        raise CheckpointError(
            f"{folder}: neither generation_config.json nor config.json has an eos_token_id: generation would never "
            f"stop. Set `extra_stop_ids` in the model's entry."
        )
    bos, pad = (defaults.get(key, config.get(key)) for key in ("bos_token_id", "pad_token_id"))
    temperature = entry.temperature if entry.temperature is not None else defaults.get("temperature", 1.0)
    top_p = entry.top_p if entry.top_p is not None else defaults.get("top_p", 1.0)
    decoder = {
        "session_options": {"log_id": "onnxruntime-genai", "provider_options": []},
        "filename": model_file,
        "head_size": architecture.head_dim,
        "hidden_size": architecture.hidden,
        "inputs": {
            "input_ids": "input_ids",
            "attention_mask": "attention_mask",
            "past_key_names": "past_key_values.%d.key",
            "past_value_names": "past_key_values.%d.value",
        },
        "outputs": {
            "logits": "logits",
            "present_key_names": "present.%d.key",
            "present_value_names": "present.%d.value",
        },
        "num_attention_heads": architecture.heads,
        "num_hidden_layers": architecture.layers,
        "num_key_value_heads": architecture.kv_heads,
    }
    model = {
        "bos_token_id": bos if bos is not None else stops[0],
        "context_length": context,
        "decoder": decoder,
        "eos_token_id": stops,
        "pad_token_id": pad if pad is not None else stops[0],
        "type": architecture.traits.genai_type,
        "vocab_size": architecture.vocab,
    }
    search = {
        "chunk_size": _chunk_size(architecture, context),
        "do_sample": bool(entry.temperature or defaults.get("do_sample", False)),
        "max_length": context,
        "past_present_share_buffer": True,
        "temperature": temperature,
        "top_k": defaults.get("top_k", 50),
        "top_p": top_p,
    }
    return {"model": model, "search": search}


def dumps(config: dict[str, Any]) -> bytes:
    """Deterministic JSON bytes."""
    return (json.dumps(config, indent=2, sort_keys=True) + "\n").encode()
