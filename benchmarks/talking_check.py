"""A talking model beside the small one whose function it holds: logits, padded ids, greedy text.

    python -m benchmarks.talking_check talking-mimo smollm2-135m

Both are models of the pipeline that the export stage has run for. The small one, rounded to bfloat16, answers some
requests greedily in memory; then requests and answers pass the large one layer by layer, in the memory of one layer.
Comparing each step's best token is comparing greedy texts up to where they first differ, and beyond.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path

import click
import numpy as np
from ml_dtypes import bfloat16
from safetensors.numpy import save_file

from pipeline.calibrate.texts import encoder
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.tensors import SINGLE, Checkpoint
from pipeline.errors import PipelineError
from pipeline.files import read_json, write_json
from pipeline.graph.decoder import build_decoder, save_decoder
from pipeline.runtime.layered import LayeredDecoder
from pipeline.runtime.session import OnnxDecoder
from pipeline.workspace import MODEL_FILE, Workspace

NEAR = 2e-3  # logits between the two best tokens of a step that is a near tie: twice what logits may differ by
REQUESTS = (
    "<|im_start|>user\nWhat is the capital of France, and what is it known for?<|im_end|>\n<|im_start|>assistant\n",
    "<|im_start|>user\nWrite a Python function that adds two numbers.<|im_end|>\n<|im_start|>assistant\n",
    "The quick brown fox",
    "Kể tên ba thành phố lớn của Việt Nam:",
)
Logits = Callable[[Sequence[int]], np.ndarray]


def write_rounded(folder: Path, out: Path, context: int, layers: int | None = None) -> None:
    """Write a checkpoint rounded to bfloat16, and its graph for `context` tokens; `layers`: only the first so many."""
    checkpoint, config = Checkpoint(folder), read_json(folder / "config.json")
    count = min(layers or config["num_hidden_layers"], config["num_hidden_layers"])
    write_json(out / "config.json", config | {"num_hidden_layers": count})
    later = tuple(f"model.layers.{number}." for number in range(count, config["num_hidden_layers"]))
    kept = [name for name in checkpoint if not name.startswith(later)]
    save_file({name: checkpoint.rows(name).astype(bfloat16) for name in kept}, out / SINGLE)
    graph, rope = build_decoder(read_architecture(out / "config.json"), Checkpoint(out), context)
    save_decoder(out, graph, rope, MODEL_FILE)


def greedy(decoder: OnnxDecoder, ids: Sequence[int], tokens: int) -> list[int]:
    """`ids` and the `tokens` most likely ones after them."""
    text, state = list(ids), None
    for _ in range(tokens):
        logits, state = decoder.run(text[-1:] if state else text, state)
        text.append(int(logits[-1].argmax()))
    return text


def compare(small: Logits, large: Logits, texts: Sequence[Sequence[int]]) -> dict[str, float]:
    """What two models say of the same texts, the small one's ids coming first in the large one's vocabulary.

    `largest_difference` is one of logits, `padded` the most that the other ids take of a step's probability.
    `other_token` counts steps whose best tokens differ, `near_ties` those of them where the small one's two best lie
    closer than `NEAR`.
    """
    found = {"tokens": 0, "largest_difference": 0.0, "padded": 0.0, "other_token": 0, "near_ties": 0}
    for text in texts:
        ours, theirs = large(text).astype(np.float64), small(text)
        vocab = theirs.shape[1]
        difference = np.abs(ours[:, :vocab] - theirs).max()
        powers = np.exp(ours - ours.max(axis=1, keepdims=True))
        padded = (powers[:, vocab:].sum(axis=1) / powers.sum(axis=1)).max()
        other = ours.argmax(axis=1) != theirs.argmax(axis=1)
        best = np.sort(theirs[other], axis=1)[:, -2:]
        found["tokens"] += len(text)
        found["largest_difference"] = max(found["largest_difference"], float(difference))
        found["padded"] = max(found["padded"], float(padded))
        found["other_token"] += int(other.sum())
        found["near_ties"] += int((best[:, 1] - best[:, 0] < NEAR).sum())
    return found


def check(large: Path, small: Path, tokens: int) -> dict[str, float]:
    """`compare` for the graphs in two folders, on requests and `tokens` of the small one's answer to each.

    `rounding_alone` and `rounding_other_token` compare the small one with itself before it was rounded.
    """
    encode = encoder(large)
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as scratch:
        rounded = Path(scratch) / "rounded"
        rounded.mkdir()
        prompts = [encode(request) for request in REQUESTS]
        write_rounded(small, rounded, max(map(len, prompts)) + tokens)
        decoder = OnnxDecoder(rounded / MODEL_FILE)
        texts = [greedy(decoder, ids, tokens) for ids in prompts]
        architecture = read_architecture(large / "config.json")
        layered = LayeredDecoder(large / MODEL_FILE, architecture, Path(scratch) / "states", large.parent.name)
        layered.prepare(lambda some: [some.run(text) for text in texts])
        original = OnnxDecoder(small / MODEL_FILE)
        moved = compare(lambda ids: decoder.run(ids)[0], lambda ids: original.run(ids)[0], texts)
        figures = compare(lambda ids: decoder.run(ids)[0], lambda ids: layered.run(ids)[0], texts)
    return figures | {"rounding_alone": moved["largest_difference"], "rounding_other_token": moved["other_token"]}


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("large")
@click.argument("small")
@click.option("--tokens", default=64, show_default=True, help="Length of each of the four answers.")
def main(large: str, small: str, tokens: int) -> None:
    """Compare LARGE, a talking model, with SMALL, whose function it holds."""
    try:
        large_folder, small_folder = (Workspace(name).reference(Store()) for name in (large, small))
        click.echo(json.dumps(check(large_folder, small_folder, tokens), indent=2))
    except PipelineError as error:
        raise click.ClickException(str(error)) from None


if __name__ == "__main__":
    main()
