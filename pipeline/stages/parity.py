"""parity: our full-precision graph against an independent one of the same checkpoint, on logits. Part of every run."""

from __future__ import annotations

from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.calibration import load_parity
from pipeline.files import link_or_copy, scratch_directory, write_json
from pipeline.graph.decoder import build_decoder, save_decoder
from pipeline.parity.compare import compare, cut, cut_references, optimums, own
from pipeline.parity.optimum_export import export_reference
from pipeline.workspace import MODEL_FILE, Workspace

DECODE_STEPS = 8


def run(model: str) -> None:
    """Write artifacts/<model>/parity.json. A disagreement is recorded, not raised: the verdict stage refuses it."""
    wanted, workspace = load_parity(), Workspace(model)
    reference = workspace.reference(Store())
    architecture, checkpoint = read_architecture(reference / "config.json"), Checkpoint(reference)
    part = cut(architecture, wanted.memory_bytes)
    with scratch_directory(workspace.root / ".parity") as folder:
        if part == architecture:
            ours = reference / MODEL_FILE  # the very graph that was exported
        else:
            tokens = wanted.prompt_tokens + DECODE_STEPS
            save_decoder(folder, *build_decoder(part, cut_references(part, checkpoint), tokens), MODEL_FILE)
            for file in reference.glob("*.safetensors*"):  # with the lists of their chunks
                link_or_copy(file, folder / file.name)
            ours = folder / MODEL_FILE
        if part.experts:  # which Optimum does not export
            theirs = own(reference, part, folder)
        else:
            theirs = optimums(export_reference(reference, part.layers, part.vocab, folder / "optimum"), part)
        measured = compare(ours, theirs, part, wanted.prompt_tokens, DECODE_STEPS, seed=0)
    error = measured["max_relative_error"]
    result = measured | {
        "passed": bool(error <= wanted.max_relative_error and measured["mismatches"] == 0),
        "limit": wanted.max_relative_error,
        "layers": part.layers,
        "of_layers": architecture.layers,
        "vocab": part.vocab,
        "of_vocab": architecture.vocab,
    }
    write_json(workspace.parity, result)
    print(
        f"{model}: {'agrees' if result['passed'] else 'DISAGREES'} with {result['exporter']} on {part.layers} of "
        f"{architecture.layers} layers: relative error of logits {error:.2g} (limit {wanted.max_relative_error:.0e})"
    )
