"""What every key of tokenizer_config.json means here: the one list of them.

Written for tokenizers 0.22.2, transformers 4.57.6 and onnxruntime-genai 0.18.0. tokenizer.json has none: tokenizers
refuses keys that it does not know, and each component is honoured if the corpus proves it (`pipeline.door.parity`).
"""

from __future__ import annotations

from typing import Any

HONOURED = frozenset({
    "tokenizer_class", "chat_template", "added_tokens_decoder", "additional_special_tokens", "extra_special_tokens",
    "bos_token", "eos_token", "unk_token", "pad_token", "cls_token", "sep_token", "mask_token",
    "add_prefix_space", "add_bos_token", "add_eos_token", "legacy", "from_slow", "split_special_tokens",
})  # fmt: skip
"""Keys of tokenizer_config.json that transformers' class applies: what comes of it is what ships."""

HARMLESS = frozenset({
    "model_max_length", "max_length", "stride", "padding", "truncation", "padding_side", "truncation_side",
    "truncation_strategy", "pad_to_multiple_of", "pad_token_type_id", "model_input_names", "name_or_path",
    "processor_class", "special_tokens_map_file", "tokenizer_file", "use_fast", "sp_model_kwargs", "errors", "unk_id",
    "spaces_between_special_tokens", "clean_up_tokenization_spaces", "use_default_system_prompt", "fix_mistral_regex",
    "auto_map",  # code of the checkpoint is never run
    "backend", "is_local", "return_token_type_ids", "do_lower_case", "trust_remote_code", "init_inputs", "vocab_file",
})  # fmt: skip
"""Keys of tokenizer_config.json that change no id: lengths, sides, names, and how text looks when it is decoded."""

ONLY: dict[str, tuple[Any, ...]] = {"split_special_tokens": (False, None)}
"""Keys of tokenizer_config.json that onnxruntime-genai honours at these values only."""
