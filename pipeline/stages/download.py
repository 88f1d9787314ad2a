"""download: bring a model's checkpoint into the store; lock what was found."""

from __future__ import annotations

import sys
from functools import partial

from pipeline.checkpoint.architecture import check_tensors, read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.lock import write_lock
from pipeline.checkpoint.sources import fetch_model
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.models import load_model
from pipeline.door.check import check_small_files
from pipeline.workspace import Workspace


def run(model: str) -> None:
    """Fetch, check and lock one model.

    Its small files are read as the product will read them before its weights are fetched, so that an unsupported model
    is not found hours later.
    """
    entry = load_model(model)
    store, workspace = Store(), Workspace(model)
    check = partial(check_small_files, model, entry)
    lock = fetch_model(model, entry, store, check)
    folder = workspace.link(lock, store)
    checkpoint = Checkpoint(folder)
    notes = check(folder) + check_tensors(read_architecture(folder / "config.json"), checkpoint)
    write_lock(workspace.lock, lock)  # last: no later stage starts on a checkpoint that was refused
    print(
        f"{model}: {entry.title}, {lock.revision}, licence {lock.licence}: {len(lock.files)} files, "
        f"{len(checkpoint)} tensors, {checkpoint.weight_bytes:,} bytes of weights"
    )
    for note in notes:
        print(f"{model}: {note}", file=sys.stderr)
