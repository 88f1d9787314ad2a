"""Speculative decoding in the runtime that ships: drafts change how fast a text is written, not the text.

The multi-token head's graph is compared with MiMo's own equations over transformers' Qwen2 layer, which is what
XiaomiMiMo's code is made of. Its acceptance is checked with a head that must know the next token: in a decoder without
layers the next token depends on the last one only.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort
import onnxruntime_genai as genai
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint.architecture import Architecture, read_architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.graph.speculative import FED_BACK, HIDDEN, build_mtp, mtp_settings, ngram_settings, verifying
from tests.families import CASES, add_mtp, transformers_model
from tests.graph.test_genai import CONTEXT, NEW, PROMPT, export, greedy, prompt

MIMO = CASES["mimo"]


def exported(folder: Path, **changes: float) -> Architecture:
    """A tiny MiMo with its head, as graphs; `changes` multiply the tensors whose names hold a key."""
    export(folder, MIMO, CONTEXT)
    add_mtp(folder)
    weights = load_file(folder / "model.safetensors")
    for part, factor in changes.items():
        weights |= {name: values * np.float32(factor) for name, values in weights.items() if part in name}
    save_file(weights, folder / "model.safetensors")
    return graphs(folder)


def graphs(folder: Path) -> Architecture:
    architecture, checkpoint = read_architecture(folder / "config.json"), Checkpoint(folder)
    assert architecture.mtp is not None
    decoder = onnx.load(folder / "model.onnx", load_external_data=False)
    for tensor in decoder.graph.initializer:  # weights may have moved within the file
        if tensor.name in checkpoint:
            place = {item.key: item for item in tensor.external_data}
            place["offset"].value = str(checkpoint[tensor.name].offset)
    onnx.save(decoder, folder / "model.onnx")
    onnx.save(verifying(decoder, architecture), folder / "verify.onnx")
    onnx.save(build_mtp(architecture.mtp, checkpoint, CONTEXT), folder / "mtp.onnx")
    return architecture


def open_model(folder: Path, overlay: dict[str, Any]) -> genai.Model:
    settings = genai.Config(str(folder))
    settings.overlay(json.dumps(overlay))
    return genai.Model(settings)


def params(model: genai.Model, new: int = NEW) -> genai.GeneratorParams:
    found = genai.GeneratorParams(model)
    found.set_search_options(max_length=PROMPT + new, do_sample=False)
    return found


def with_head(folder: Path, architecture: Architecture, tokens: int) -> tuple[list[int], dict[str, Any]]:
    """The greedy text of an MtpGenerator, and its statistics."""
    settings = mtp_settings("verify.onnx", "mtp.onnx", architecture, tokens)
    decoder, head = (open_model(folder, settings[name]) for name in ("decoder", "head"))
    generator = genai.MtpGenerator(decoder, head, params(decoder))
    generator.append_tokens(np.array(prompt(PROMPT), np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence()[PROMPT:]], generator.get_stats()


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_head_that_errs_leaves_the_text_as_it_is(tokens: int, tmp_path: Path) -> None:
    architecture = exported(tmp_path)
    text, stats = with_head(tmp_path, architecture, tokens)
    assert text == greedy(tmp_path, prompt(PROMPT), NEW)
    assert stats["draft_tokens_proposed"] > stats["draft_tokens_accepted"]


@pytest.mark.parametrize("tokens", [1, 3])
def test_a_head_that_knows_saves_passes(tokens: int, tmp_path: Path) -> None:
    architecture = exported(tmp_path, o_proj=0, down_proj=0)
    weights = load_file(tmp_path / "model.safetensors")
    hidden, names = architecture.hidden, architecture.mtp.input_norms
    projection = np.hstack([np.zeros((hidden, hidden)), np.eye(hidden)])  # the token's vector only
    weights["model.mtp_layers.0.input_proj.weight"] = projection.astype(np.float32)
    for name in names:
        weights[f"{name}.weight"] = np.ones(hidden, np.float32)
    weights["model.mtp_layers.0.final_layernorm.weight"] = weights["model.norm.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    architecture = graphs(tmp_path)
    text, stats = with_head(tmp_path, architecture, tokens)
    assert text == greedy(tmp_path, prompt(PROMPT), NEW)
    assert stats["draft_tokens_accepted"] == stats["draft_tokens_evaluated"] > 0
    assert stats["target_forward_passes"] <= NEW / (tokens + 1)


def test_ngrams_of_the_text_are_drafts(tmp_path: Path) -> None:
    exported(tmp_path, o_proj=0, down_proj=0)  # a text that soon goes round in a circle
    model = open_model(tmp_path, ngram_settings("verify.onnx", 4, 2))
    generator = genai.Generator(model, params(model, 48))
    generator.append_tokens(np.array([prompt(PROMPT)], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    assert generator.get_sequence(0)[PROMPT:].tolist() == greedy(tmp_path, prompt(PROMPT), 48)
    assert generator.get_speculative_stats()["draft_tokens_accepted"] > 0


def test_logits_are_those_of_the_decoder_below_their_largest(tmp_path: Path) -> None:
    exported(tmp_path)
    sessions = [ort.InferenceSession(tmp_path / name, providers=["CPUExecutionProvider"]) for name in
                ("model.onnx", "verify.onnx")]  # fmt: skip
    ids = prompt(PROMPT)
    feeds = {"input_ids": np.array([ids], np.int64), "attention_mask": np.ones((1, PROMPT), np.int64)}
    for value in sessions[0].get_inputs():
        if value.name.startswith("past"):
            feeds[value.name] = np.zeros((1, value.shape[1], 0, value.shape[3]), np.float32)
    (plain,), (judged, hidden) = (
        session.run(names, feeds) for session, names in zip(sessions, (["logits"], ["logits", HIDDEN]), strict=True)
    )
    below = plain - plain.max(axis=-1, keepdims=True)
    assert judged.dtype == np.float16
    np.testing.assert_allclose(judged.astype(np.float32), below, rtol=2**-11, atol=1e-7)
    assert hidden.shape == (1, PROMPT, MIMO.config["hidden_size"])


def test_the_runtime_still_refuses_float32_logits_of_a_decoder_with_a_head(tmp_path: Path) -> None:
    """Once it takes them, `verifying` needs no float16."""
    architecture = exported(tmp_path)
    graph = onnx.load(tmp_path / "verify.onnx", load_external_data=False)
    cast = next(node for node in graph.graph.node if node.name == "logits/float16")
    cast.attribute[0].i = onnx.TensorProto.FLOAT
    graph.graph.output[0].type.tensor_type.elem_type = onnx.TensorProto.FLOAT
    onnx.save(graph, tmp_path / "verify.onnx")
    with pytest.raises(RuntimeError, match="Cast - input and output types are the same"):
        with_head(tmp_path, architecture, 1)


def test_the_head_computes_what_mimo_publishes(tmp_path: Path) -> None:
    """Logits and what is fed back, against input_proj · [norm(h), norm(e)], transformers' Qwen2 layer, final norm."""
    import torch
    from transformers.models.qwen2.modeling_qwen2 import Qwen2DecoderLayer, Qwen2RMSNorm

    exported(tmp_path)
    tensors = {name: torch.tensor(values) for name, values in load_file(tmp_path / "model.safetensors").items()}
    prefix, reference = "model.mtp_layers.0.", transformers_model(tmp_path, MIMO)
    layer = Qwen2DecoderLayer(reference.config, 0).eval()
    own = {name.removeprefix(prefix): values for name, values in tensors.items() if name.startswith(prefix)}
    layer.load_state_dict(
        {name: values for name, values in own.items() if name.startswith(("self_attn.", "mlp.", "input_l", "post_"))}
    )

    def norm(values: torch.Tensor, name: str) -> torch.Tensor:
        made = Qwen2RMSNorm(values.shape[-1], reference.config.rms_norm_eps)
        made.weight.data = own[f"{name}.weight"]
        return made(values)

    ids = torch.tensor([prompt(PROMPT)])
    hidden = torch.tensor(
        np.random.default_rng(5).standard_normal((1, PROMPT, reference.config.hidden_size)), dtype=torch.float32
    )
    with torch.no_grad():
        both = [norm(hidden, "hidden_layernorm"), norm(tensors["model.embed_tokens.weight"][ids], "token_layernorm")]
        joined = torch.cat(both, -1) @ own["input_proj.weight"].T
        position = torch.arange(PROMPT)[None]
        mask = torch.full((PROMPT, PROMPT), float("-inf")).triu(1)[None, None]
        made = layer(joined, attention_mask=mask, position_embeddings=reference.model.rotary_emb(joined, position))
        made = norm(made[0] if isinstance(made, tuple) else made, "final_layernorm")
        logits = made @ tensors["lm_head.weight"].T
    session = ort.InferenceSession(tmp_path / "mtp.onnx", providers=["CPUExecutionProvider"])
    feeds = {"input_ids": ids.numpy(), "attention_mask": np.ones((1, PROMPT), np.int64), HIDDEN: hidden.numpy()}
    feeds |= {f"past_key_values.0.{part}": np.zeros((1, 2, 0, 32), np.float32) for part in ("key", "value")}
    for got, want in zip(session.run(["logits", FED_BACK], feeds), (logits, made), strict=True):
        assert np.abs(got - want.numpy()).max() <= 1e-4 * np.abs(want.numpy()).max()
