"""export: the full-precision graph over the checkpoint's own bytes, with genai_config.json and tokenizer."""

from __future__ import annotations

import hashlib
import shutil
import sys

from pipeline.checkpoint.architecture import check_expected, check_tensors, read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.complete import TOKENIZER_FILES
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.models import load_model
from pipeline.door.generation import read_generation
from pipeline.door.parity import prove_tokenizer
from pipeline.door.tokenizer import ship_tokenizer
from pipeline.files import atomic_directory, write_bytes, write_json
from pipeline.graph.decoder import build_decoder, save_decoder
from pipeline.graph.genai import genai_config
from pipeline.graph.speculative import MTP_FILE, build_mtp
from pipeline.workspace import GENAI_CONFIG, MODEL_FILE, Workspace


def run(model: str) -> None:
    """Write artifacts/<model>/export. No weight is read or copied."""
    entry = load_model(model)
    workspace = Workspace(model)
    weights = workspace.weights(Store())
    architecture = read_architecture(weights / "config.json")
    checkpoint = Checkpoint(weights)
    check_tensors(architecture, checkpoint)
    graph, rope_data = build_decoder(architecture, checkpoint, entry.context)
    lock = workspace.read_lock()
    # Names and hashes of the checkpoint's files: the same wherever they came from.
    listing = "".join(f"{file.sha256}  {file.name}\n" for file in sorted(lock.files, key=lambda file: file.name))
    # The graph only points at weights: without their digest in it, other weights would be the same export to DVC, and
    # what was calibrated, quantized and measured on the old ones would be shipped as the new.
    graph.metadata_props.add(key="checkpoint_sha256", value=hashlib.sha256(listing.encode()).hexdigest())
    with atomic_directory(workspace.export) as folder:
        save_decoder(folder, graph, rope_data, MODEL_FILE)
        head = architecture.mtp
        if head and head.expected_tensors().keys() <= checkpoint.keys():
            check_expected(head, checkpoint)
            mtp = build_mtp(head, checkpoint, entry.context)
            write_bytes(folder / MTP_FILE, mtp.SerializeToString(deterministic=True))
        for file in lock.files:
            if not file.name.endswith((".safetensors", ".safetensors.index.json")) and file.name not in TOKENIZER_FILES:
                shutil.copyfile(weights / file.name, folder / file.name)
        notes = ship_tokenizer(weights, folder, architecture.vocab)
        generation = read_generation(weights, entry, architecture.vocab, folder)
        write_json(folder / GENAI_CONFIG, genai_config(architecture, generation, MODEL_FILE, entry.context))
        prove_tokenizer(folder)
    print(
        f"{model}: {architecture.family}, {architecture.layers} layers, {architecture.parameters:,} parameters, "
        f"context {entry.context:,}: graph of {graph.ByteSize():,} bytes over {len(checkpoint)} tensors in place"
    )
    for note in notes:
        print(f"{model}: {note}", file=sys.stderr)
