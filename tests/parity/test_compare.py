"""Parity with Optimum: what part of a model is compared, how it is cut, and what counts as agreement."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.checkpoint.architecture import Architecture, Rope, read_architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import EvaluationError, GraphError, ResourceError
from pipeline.files import link_or_copy
from pipeline.graph.decoder import build_decoder, save_decoder
from pipeline.parity import optimum_export
from pipeline.parity.compare import NEAR_TIE, Reference, compare, cut, cut_references, judge, optimums, own
from tests.families import CASES, make_checkpoint

PROMPT, STEPS = 12, 6
MIMO = Architecture(
    "mimo", 36, 4096, 32, 8, 128, 11008, 151680, 1e-5, 32768, None, Rope(640000.0, 128, 32768), tied=False
)
PHI4 = Architecture(
    "phi3", 40, 5120, 40, 10, 128, 17920, 100352, 1e-5, 16384, None, Rope(250000.0, 128, 16384), tied=False
)
SMOLLM2 = Architecture("llama", 30, 576, 9, 3, 64, 1536, 49152, 1e-5, 8192, None, Rope(1e5, 64, 8192), tied=True)


def peak(part: Architecture) -> int:
    return 16 * part.parameters


# --- what part ---


def test_a_model_that_fits_is_compared_whole() -> None:
    exact = 16 * SMOLLM2.parameters
    assert cut(SMOLLM2, exact) == SMOLLM2
    assert cut(SMOLLM2, exact - 1) == replace(SMOLLM2, layers=29)


@pytest.mark.parametrize(
    ("architecture", "memory", "layers", "whole_vocabulary"),
    [
        (MIMO, 8_000_000_000, 2, False),  # embedding and head alone: 19.9 GB
        (MIMO, 64_000_000_000, 15, True),
        (PHI4, 8_000_000_000, 1, False),  # two layers alone: 10.9 GB
        (PHI4, 64_000_000_000, 8, True),
        (SMOLLM2, 100_000_000, 1, False),
    ],
)
def test_the_largest_part_that_fits(
    architecture: Architecture, memory: int, layers: int, whole_vocabulary: bool
) -> None:
    part = cut(architecture, memory)
    assert part.layers == layers
    assert (part.vocab == architecture.vocab) == whole_vocabulary
    assert part.vocab >= 1024
    assert peak(part) <= memory
    larger = replace(part, layers=layers + 1) if whole_vocabulary else replace(part, vocab=part.vocab + 1)
    assert peak(larger) > memory


def test_too_little_memory_is_an_error_with_the_numbers() -> None:
    with pytest.raises(ResourceError, match=r"phi3 layer of width 5,120 .* peaks at 5,620,613,120 bytes"):
        cut(PHI4, 5_000_000_000)


# --- the cut model ---


@pytest.mark.parametrize("name", ["llama-tied", "mimo", "phi3"])
def test_a_cut_refers_to_the_first_rows(name: str, tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, CASES[name])
    architecture, whole = read_architecture(folder / "config.json"), Checkpoint(folder)
    smaller = replace(architecture, layers=2, vocab=100)
    refs = cut_references(smaller, whole)
    assert set(refs) == set(smaller.expected_tensors())
    for key, shape in smaller.expected_tensors().items():
        ref = refs[key]
        raw = (folder / ref.file).read_bytes()[ref.offset : ref.offset + ref.length]
        values = np.frombuffer(raw, np.float32).reshape(shape)
        assert ref.shape == shape and (values == whole.rows(key)[: shape[0]]).all()


# --- agreement ---


def test_judge_counts_equal_ids_near_ties_and_mismatches() -> None:
    reference = np.array([[100, 0, 0], [50, 50, 0], [60, 50, 0], [9, 0, 1]], np.float32)
    mine = reference.copy()
    mine[1] = [50, 50 + 100 * NEAR_TIE, 0]
    mine[2] = [50, 60, 0]
    found = judge(mine, reference)
    assert (found["top1_equal"], found["near_ties"], found["mismatches"]) == (0.5, 1, 1)
    assert found["max_relative_error"] == pytest.approx(0.1)
    assert judge(reference, reference) == {
        "max_relative_error": 0.0,
        "top1_equal": 1.0,
        "near_ties": 0,
        "mismatches": 0,
    }


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[Path, Reference, Architecture]]:
    """Our graph and Optimum's of the same cut of one checkpoint, and the cut architecture."""
    folder = make_checkpoint(tmp_path_factory.mktemp("parity"), CASES["mimo"])
    smaller = replace(read_architecture(folder / "config.json"), layers=2, vocab=100)
    refs = cut_references(smaller, Checkpoint(folder))
    save_decoder(folder, *build_decoder(smaller, refs, PROMPT + STEPS), "model.onnx")
    optimum_export.main(folder, 2, 100, folder / "optimum")
    yield folder / "model.onnx", optimums(folder / "optimum" / "model.onnx", smaller), smaller


def test_a_cut_of_ours_equals_optimums_export_of_it(exported: tuple[Path, Reference, Architecture]) -> None:
    found = compare(*exported, PROMPT, STEPS, seed=0)
    assert found.pop("max_relative_error") <= 1e-5
    assert found.pop("exporter").startswith("optimum-onnx ")
    assert found == {"prompt_tokens": 12, "decode_steps": 6, "top1_equal": 1.0, "near_ties": 0, "mismatches": 0}


def test_a_cut_mixture_equals_our_own_reference(tmp_path: Path) -> None:
    """Which Optimum does not export; one whose jitter is another is told apart."""
    folder = make_checkpoint(tmp_path, CASES["phimoe-wide-heads"], dtype="BF16")
    smaller = replace(read_architecture(folder / "config.json"), layers=2, vocab=100)
    theirs = own(folder, smaller, folder)
    errors = []
    for part in (smaller, replace(smaller, router_jitter=0.1)):
        save_decoder(
            folder, *build_decoder(part, cut_references(part, Checkpoint(folder)), PROMPT + STEPS), "model.onnx"
        )
        found = compare(folder / "model.onnx", theirs, part, PROMPT, STEPS, seed=0)
        errors.append(found["max_relative_error"])
        assert found["exporter"].startswith("a reference of our own, torch ")
    assert errors[0] <= 1e-5 and errors[1] > 1e-3


@pytest.mark.parametrize("change", ["epsilon", "theta"])
def test_a_wrong_graph_disagrees(change: str, exported: tuple[Path, Reference, Architecture], tmp_path: Path) -> None:
    """Small mistakes of a graph builder are far outside the limit of 1e-4."""
    ours, theirs, architecture = exported
    wrong = {
        "epsilon": replace(architecture, epsilon=1e-2),
        "theta": replace(architecture, rope=replace(architecture.rope, theta=500000.0)),
    }[change]
    link_or_copy(ours.parent / "model.safetensors", tmp_path / "model.safetensors")
    refs = cut_references(wrong, Checkpoint(tmp_path))
    save_decoder(tmp_path, *build_decoder(wrong, refs, PROMPT + STEPS), "model.onnx")
    assert compare(tmp_path / "model.onnx", theirs, architecture, PROMPT, STEPS, seed=0)["max_relative_error"] > 1e-3


def test_logits_that_are_not_finite_are_an_error(
    exported: tuple[Path, Reference, Architecture], tmp_path: Path
) -> None:
    ours, theirs, architecture = exported
    for file in ours.parent.glob("*.*"):
        (tmp_path / file.name).write_bytes(file.read_bytes())
    norm = Checkpoint(tmp_path)["model.norm.weight"]
    with open(tmp_path / norm.file, "r+b") as file:
        file.seek(norm.offset)
        file.write(np.full(norm.shape, np.nan, np.float32).tobytes())
    with pytest.raises(EvaluationError, match=r"model.onnx: logits of shape \[18, 100\], 1,800 of them not finite"):
        compare(tmp_path / "model.onnx", theirs, architecture, PROMPT, STEPS, seed=0)


def test_another_vocabulary_is_an_error(exported: tuple[Path, Reference, Architecture]) -> None:
    ours, theirs, architecture = exported
    with pytest.raises(EvaluationError, match=r"logits of shape \[18, 100\].*\[18, 90\]"):
        compare(ours, theirs, replace(architecture, vocab=90), PROMPT, STEPS, seed=0)


def test_an_absent_export_is_an_error(exported: tuple[Path, Reference, Architecture], tmp_path: Path) -> None:
    ours, _, architecture = exported
    with pytest.raises(EvaluationError, match=r"absent.onnx: ONNX Runtime .* cannot load it"):
        compare(ours, optimums(tmp_path / "absent.onnx", architecture), architecture, PROMPT, STEPS, seed=0)


def test_a_checkpoint_with_missing_tensors_is_refused_by_the_reference(tmp_path: Path) -> None:
    """Random weights must never stand in for missing ones: transformers would fill them in silence."""
    folder = make_checkpoint(tmp_path, CASES["llama-untied"])
    with pytest.raises(GraphError, match=r"transformers wants \d+ absent tensors, such as"):
        optimum_export.load_reference(folder, 4, 320)


def test_a_head_beside_a_tied_embedding_never_takes_its_place_in_the_reference(tmp_path: Path) -> None:
    folder = make_checkpoint(tmp_path, CASES["llama-tied"])
    before = Checkpoint(folder)
    tensors = {name: before.rows(name) for name in before}
    embedding = tensors["model.embed_tokens.weight"]
    save_file(tensors | {"lm_head.weight": embedding + 1}, folder / "model.safetensors")
    model = optimum_export.load_reference(folder, CASES["llama-tied"].config["num_hidden_layers"], 320)
    np.testing.assert_array_equal(model.get_input_embeddings().weight.detach().numpy(), embedding)


def test_the_reference_knows_rotation_as_transformers_5_writes_it(tmp_path: Path) -> None:
    """4.57 does not know the key: its theta would be 10,000, and parity would always disagree."""
    for case in ("llama-tied", "llama3", "phi3-longrope"):
        extra = CASES[case].config.get("rope_scaling", {})
        values = {key: one for key, one in CASES[case].config.items() if key not in {"rope_theta", "rope_scaling"}}
        kind = extra.get("type", extra.get("rope_type", "default"))
        rope = {**extra, "rope_type": kind, "rope_theta": 5e5, "partial_rotary_factor": 1.0}
        (tmp_path / "config.json").write_text(json.dumps(values | {"rope_parameters": rope}))
        config = optimum_export.reference_config(tmp_path, 2, 320)
        assert config.rope_theta == 5e5
        assert {key: config.rope_scaling[key] for key in extra} == extra
