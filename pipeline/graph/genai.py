"""genai_config.json: how onnxruntime-genai loads a folder and samples from it.

Schema: https://onnxruntime.ai/docs/genai/reference/config.html
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from pipeline.checkpoint.architecture import Architecture, read_config
from pipeline.checkpoint.untrusted import shown
from pipeline.config.models import ModelConfig
from pipeline.config.phones import PREFILL_CHUNKS
from pipeline.errors import CheckpointError


def _token_id(value: Any, key: str, path: Path) -> int:
    if type(value) is not int or not 0 <= value < 1 << 24:
        raise CheckpointError(f"{path}: {key} is {shown(value)}, not a token id. Run the download stage again.")
    return value


def _number(value: Any, key: str, path: Path) -> float:
    if type(value) not in {int, float} or not 0 <= value <= 1000:
        raise CheckpointError(
            f"{path}: {key} is {shown(value)}; a number from 0 to 1,000 is needed. Correct the file, or set {key} in "
            f"the model's entry."
        )
    return value


def genai_config(
    architecture: Architecture, folder: Path, model_file: str, entry: ModelConfig, context: int
) -> dict[str, Any]:
    """The configuration for a graph of `architecture` whose tokenizer and configs lie in `folder`.

    Raises CheckpointError when nothing says where the model stops.
    """
    where = folder / "generation_config.json"
    config, defaults = read_config(folder / "config.json"), read_config(where) if where.exists() else {}
    found: list[int] = []
    for path, values in ((where, defaults), (folder / "config.json", config)):
        named = values.get("eos_token_id")
        ids = named if isinstance(named, list) else [] if named is None else [named]
        found += [_token_id(token, "eos_token_id", path) for token in ids]
    if not (stops := list(dict.fromkeys([*found, *entry.extra_stop_ids]))):
        raise CheckpointError(
            f"{folder}: neither generation_config.json nor config.json has an eos_token_id: generation would never "
            f"stop. Set `extra_stop_ids` in the model's entry."
        )
    given = {key: defaults.get(key, config.get(key)) for key in ("bos_token_id", "pad_token_id")}
    tokens = {key: stops[0] if value is None else _token_id(value, key, where) for key, value in given.items()}
    chosen = {"temperature": entry.temperature, "top_p": entry.top_p}
    sampling = {key: defaults.get(key, 1.0) if value is None else value for key, value in chosen.items()}
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
        "eos_token_id": stops,
        "type": architecture.traits.genai_type,
        "vocab_size": architecture.vocab,
        **tokens,
    }
    # A prompt beyond LongRoPE's switch of factors must be rotated with the long ones from its first token on; chunks
    # before the switch would still take the short ones, so whole prompts are run where the context reaches it.
    switches = architecture.rope.long_factor and context > architecture.rope.original_max_position
    search = {
        "chunk_size": 0 if switches else PREFILL_CHUNKS[0],
        "do_sample": bool(entry.temperature or defaults.get("do_sample", False)),
        "max_length": context,
        "past_present_share_buffer": True,
        "top_k": int(_number(defaults.get("top_k", 50), "top_k", where)),
        **{key: _number(value, key, where) for key, value in sampling.items()},
    }
    return {"model": model, "search": search}
