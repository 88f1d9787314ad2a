"""The door: what a checkpoint says of itself, read before its weights are fetched, and again before they are used."""

from __future__ import annotations

from pathlib import Path

from pipeline.checkpoint.architecture import Architecture, check_shapes, check_tensors, read_architecture, unknown_keys
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.models import ModelConfig
from pipeline.config.phones import load_shapes
from pipeline.door.generation import KEYS, read_generation
from pipeline.door.tokenizer import check_tokenizer
from pipeline.graph.genai import Generation, genai_config
from pipeline.graph.limits import check_context


def check_checkpoint(
    model: str, entry: ModelConfig, folder: Path
) -> tuple[Architecture, Checkpoint, Generation, list[str]]:
    """Read everything but weights of the checkpoint in `folder` as the product will; holes may stand for the weights.

    Returns:
        what it is, its tensors, how it generates, and a sentence for whatever is left out, or unknown and not honoured.

    Raises:
        CheckpointError, GraphError: something that changes ids, logits, stops or sampling would not be honoured by what
            ships; with file, key, value and a remedy.
    """
    path = folder / "config.json"
    architecture = read_architecture(path)
    if expected := load_shapes().models.get(model):
        check_shapes(architecture, expected, path)
    check_context(architecture, entry.context)
    notes = check_tokenizer(folder, architecture.vocab)
    generation = read_generation(folder, entry, architecture.vocab)
    genai_config(architecture, generation, "model.onnx", entry.context)
    if unknown := sorted(set(unknown_keys(path)) - KEYS):
        notes.append(f"config.json has keys that are unknown here and change nothing: {', '.join(unknown)}")
    checkpoint = Checkpoint(folder)
    notes += [*generation.notes, *check_tensors(architecture, checkpoint)]
    return architecture, checkpoint, generation, notes
