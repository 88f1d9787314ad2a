"""download: bring a model's checkpoint into the store; lock what was found."""

from __future__ import annotations

import sys

from pipeline.checkpoint.architecture import check_shapes, check_tensors, read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.lock import write_lock
from pipeline.checkpoint.sources import fetch_model
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.models import load_model
from pipeline.config.phones import load_shapes
from pipeline.door.tokenizer import check_tokenizer
from pipeline.workspace import Workspace


def run(model: str) -> None:
    """Fetch, check and lock one model.

    The checkpoint's tensors and tokenizer are compared with its config.json, so that an unsupported model is not found
    hours later.
    """
    entry = load_model(model)
    store, workspace = Store(), Workspace(model)
    lock = fetch_model(model, entry, store)
    folder = workspace.link(lock, store)
    checkpoint = Checkpoint(folder)
    architecture = read_architecture(folder / "config.json")
    if expected := load_shapes().models.get(model):
        check_shapes(architecture, expected, folder / "config.json")
    notes = check_tensors(architecture, checkpoint)
    notes += check_tokenizer(folder, architecture.vocab)
    write_lock(workspace.lock, lock)  # last: no later stage starts on a checkpoint that was refused
    print(
        f"{model}: {entry.title}, {lock.revision}, licence {lock.licence}: {len(lock.files)} files, "
        f"{len(checkpoint)} tensors, {checkpoint.weight_bytes:,} bytes of weights"
    )
    for note in notes:
        print(f"{model}: {note}", file=sys.stderr)
