"""genai_config.json: how onnxruntime-genai loads a folder and samples from it.

Schema: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from pipeline.checkpoint.architecture import Architecture
from pipeline.config.phones import PREFILL_CHUNKS
from pipeline.errors import CheckpointError


@dataclass(frozen=True)
class Generation:
    """How a phone generates.

    Attributes:
        stops: ids that end a text, at least one.
        bos, pad: ids for onnxruntime-genai.
        search: genai_config.json's `search`, as far as the checkpoint and the entry decide it.
        notes: a sentence for whatever was left out.
    """

    stops: tuple[int, ...]
    bos: int
    pad: int
    search: dict[str, Any]
    notes: tuple[str, ...]


SWITCH = 4_096
"""Tokens after which onnxruntime-genai 0.18 computes the cache of a LongRoPE model again, whatever its config says."""


def genai_config(architecture: Architecture, generation: Generation, model_file: str, context: int) -> dict[str, Any]:
    """The configuration for a graph of `architecture` that generates as `generation` says.

    Raises CheckpointError where LongRoPE changes its factors within the context, at a length that the runtime does not
    know.
    """
    # A prompt beyond LongRoPE's switch of factors must be rotated with the long ones from its first token on; chunks
    # before the switch would still take the short ones, so whole prompts are run where the context reaches it.
    original = architecture.rope.original_max_position
    switches = bool(architecture.rope.long_factor) and context > original
    if switches and original != SWITCH:
        raise CheckpointError(
            f"config.json: original_max_position_embeddings is {original:,}, where LongRoPE changes its factors; "
            f"onnxruntime-genai computes the cache again at {SWITCH:,} only, so texts would be wrong from there on. "
            f"Set `context` in the model's entry to at most {original:,}."
        )
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
        "context_length": context,
        "decoder": decoder,
        "bos_token_id": generation.bos,
        "eos_token_id": list(generation.stops),
        "pad_token_id": generation.pad,
        "type": architecture.traits.genai_type,
        "vocab_size": architecture.vocab,
    }
    search = {
        **generation.search,
        "chunk_size": 0 if switches else PREFILL_CHUNKS[0],
        "max_length": context,
        "past_present_share_buffer": True,
    }
    return {"model": model, "search": search}
