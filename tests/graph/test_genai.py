"""Level of parity: generation. Greedy tokens through onnxruntime-genai against transformers' forward.

Every token that onnxruntime-genai wrote is compared with transformers' choice after the same tokens. Where the two
differ and transformers' logits of both lie within `NEAR_TIE` of the largest logit, it is a near-tie and only reported.

The reference is transformers' forward, not its `generate`: where a sequence crosses from LongRoPE's short factors to
its long ones, `generate` (4.57) computes the prompt again with the last token's cache position only, and so without a
causal mask. Its next tokens differ from those of a forward over the same text.
"""

from __future__ import annotations

import json
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime_genai as genai
import pytest
from safetensors.numpy import load_file, save_file

from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.phones import PREFILL_CHUNKS
from pipeline.errors import CheckpointError
from pipeline.files import write_json
from pipeline.graph.decoder import build_decoder, save_decoder
from pipeline.graph.genai import Generation, genai_config
from pipeline.parity.compare import NEAR_TIE
from tests.families import CASES, Case, make_checkpoint, transformers_model

PROMPT, NEW, CONTEXT = 40, 32, 96
SWITCH = 4096  # onnxruntime-genai computes the cache of model type phi3 again at token 4097, whatever the config says
LONGROPE = CASES["phi3-longrope"]


def export(folder: Path, case: Case, context: int) -> Path:
    """A folder that onnxruntime-genai loads, whose greedy text neither ends nor merely repeats its last token."""
    make_checkpoint(folder, case)
    weights = load_file(folder / "model.safetensors")
    # A tied random embedding of size 1 outweighs the layers, and the likeliest next token is the last one again.
    weights["model.embed_tokens.weight"] *= np.float32(0.1)
    head = "model.embed_tokens.weight" if case.config["tie_word_embeddings"] else "lm_head.weight"
    weights[head][case.config["eos_token_id"]] = 0  # the logit is 0, never the largest
    save_file(weights, folder / "model.safetensors")
    architecture = read_architecture(folder / "config.json")
    save_decoder(folder, *build_decoder(architecture, Checkpoint(folder), context), "model.onnx")
    settings = genai_config(architecture, Generation((2,), 1, 2, {"do_sample": False}, ()), "model.onnx", context)
    write_json(folder / "genai_config.json", settings)
    return folder


def longer(case: Case, positions: int) -> Case:
    """The case with room for `positions` tokens before any switch of factors."""
    changed = ("max_position_embeddings", "original_max_position_embeddings")
    return replace(case, config=case.config | {key: positions for key in changed if key in case.config})


def prompt(length: int) -> list[int]:
    return np.random.default_rng(3).integers(3, 320, length).tolist()


def greedy(folder: Path, ids: list[int], new: int, chunk: int | None = None) -> list[int]:
    """Tokens that onnxruntime-genai writes after `ids`; `chunk` replaces genai_config.json's chunk_size."""
    settings = genai.Config(str(folder))
    if chunk is not None:
        settings.overlay(json.dumps({"search": {"chunk_size": chunk}}))
    model = genai.Model(settings)
    params = genai.GeneratorParams(model)
    params.set_search_options(max_length=len(ids) + new, do_sample=False)
    generator = genai.Generator(model, params)
    generator.append_tokens(np.array([ids], np.int32))
    while not generator.is_done():
        generator.generate_next_token()
    return [int(token) for token in generator.get_sequence(0)[len(ids) :]]


def logits_before_each(model: Any, ids: list[int], written: list[int]) -> np.ndarray:
    """transformers' logits, float32 [len(written), vocab], after ids + written[:n]: one forward over all of it."""
    import torch

    with torch.no_grad():
        return model(torch.tensor([ids + written[:-1]]), logits_to_keep=len(written)).logits[0].numpy()


def logits_with_kept_cache(model: Any, ids: list[int], written: list[int]) -> np.ndarray:
    """The same, token by token: LongRoPE's switch changes the factors of new tokens only, cached keys stay."""
    import torch

    with torch.no_grad():
        out = model(torch.tensor([ids]), use_cache=True, logits_to_keep=1)
        rows = [out.logits[0, -1].numpy()]
        for token in written[:-1]:
            out = model(torch.tensor([[token]]), past_key_values=out.past_key_values, use_cache=True)
            rows.append(out.logits[0, -1].numpy())
    return np.stack(rows)


def assert_greedy(written: list[int], logits: np.ndarray) -> None:
    """Each token is the likeliest, or nearly; near-ties are reported."""
    positions = np.arange(len(written))
    best = logits.argmax(axis=1)
    gaps = (logits[positions, best] - logits[positions, written]) / np.abs(logits).max()
    wrong = {int(n): (written[n], int(best[n]), float(gaps[n])) for n in positions[gaps > NEAR_TIE]}
    assert not wrong, f"position: (onnxruntime-genai, transformers, gap of logits): {wrong}"
    if near := int((gaps > 0).sum()):
        warnings.warn(f"{near} of {len(written)} tokens are near-ties", stacklevel=2)


@pytest.mark.parametrize("name", CASES)
def test_greedy_tokens_equal_transformers(name: str, tmp_path: Path) -> None:
    """A prompt in one piece, and in chunks. LongRoPE stays below its switch here."""
    case = longer(CASES[name], 256)
    folder, ids = export(tmp_path, case, CONTEXT), prompt(PROMPT)
    written = greedy(folder, ids, NEW)
    assert len(written) == NEW and len(set(written)) > NEW // 4
    assert_greedy(written, logits_before_each(transformers_model(folder, case), ids, written))
    assert greedy(folder, ids, NEW, chunk=16) == written


@pytest.mark.parametrize("name", ["llama-untied", "mimo", "phi3-partial-tied"])
def test_a_prompt_longer_than_the_chunk(name: str, tmp_path: Path) -> None:
    length = PREFILL_CHUNKS[0] + 50
    case = longer(CASES[name], 512)
    folder, ids = export(tmp_path, case, 512), prompt(length)
    written = greedy(folder, ids, NEW)
    assert len(written) == NEW
    assert_greedy(written, logits_before_each(transformers_model(folder, case), ids, written))


def longrope_at_4096(folder: Path) -> tuple[Path, Any]:
    """The LongRoPE case with real Phi models' switch: the exported folder, and transformers' model of it."""
    changes = {"max_position_embeddings": 2 * SWITCH, "original_max_position_embeddings": SWITCH}
    case = replace(LONGROPE, config=LONGROPE.config | changes | {"num_hidden_layers": 2})
    folder = export(folder, case, SWITCH + 256)
    model = transformers_model(folder, case)
    model.set_attn_implementation("sdpa")  # eager attention holds 4096 × 4096 scores per head
    return folder, model


def test_the_cache_is_computed_again_where_longrope_switches(tmp_path: Path) -> None:
    """At 4,097 tokens onnxruntime-genai rewinds and computes all tokens with the long factors, as training meant it."""
    folder, model = longrope_at_4096(tmp_path)
    before, new = 5, 12  # the first `before` tokens follow texts of at most SWITCH tokens
    ids = prompt(SWITCH - before + 1)
    written = greedy(folder, ids, new)
    assert_greedy(written[:before], logits_before_each(model, ids, written[:before]))
    again = logits_before_each(model, ids, written)[before:]
    assert_greedy(written[before:], again)
    kept = logits_with_kept_cache(model, ids, written)[before:]
    assert (kept.argmax(axis=1) != again.argmax(axis=1)).any(), "this prompt cannot tell one from the other"


def test_a_prompt_beyond_the_longrope_switch(tmp_path: Path) -> None:
    """Such a prompt may not be run in chunks: the first chunks' keys would be rotated by the short factors."""
    folder, model = longrope_at_4096(tmp_path)
    ids = prompt(SWITCH + 20)
    written = greedy(folder, ids, 8)
    assert_greedy(written, logits_before_each(model, ids, written))


def test_a_switch_elsewhere_than_4096_is_not_noticed_and_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A limit of onnxruntime-genai: at another `original_max_position_embeddings` the cache is kept as it is.

    Its tokens are then those of a forward with the old cache. No published Phi of this graph switches elsewhere.
    """
    with pytest.raises(CheckpointError, match=r"at 4,096 only.*Set `context` .* at most 64"):
        export(tmp_path / "refused", LONGROPE, CONTEXT)
    export(tmp_path / "shorter", LONGROPE, 64)
    monkeypatch.setattr("pipeline.graph.genai.SWITCH", 64)
    folder, ids = export(tmp_path, LONGROPE, CONTEXT), prompt(PROMPT)
    written = greedy(folder, ids, NEW)
    model = transformers_model(folder, LONGROPE)
    assert_greedy(written, logits_with_kept_cache(model, ids, written))
    after = LONGROPE.config["original_max_position_embeddings"] - PROMPT + 1
    again = logits_before_each(model, ids, written)[after:]
    assert (again.argmax(axis=1) != written[after:]).any()
