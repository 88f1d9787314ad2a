"""download: bring a model's checkpoint into the store; lock what was found."""

from __future__ import annotations

import sys
from functools import partial

from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.lock import write_lock
from pipeline.checkpoint.sources import fetch_model
from pipeline.config.models import load_model
from pipeline.door.check import check_checkpoint
from pipeline.workspace import Workspace


def run(model: str) -> None:
    """Fetch, check and lock one model.

    Its small files and the headers of its weights are read as the product will read them before the weights are
    fetched, so that an unsupported model is not found hours later.
    """
    entry = load_model(model)
    store, workspace = Store(), Workspace(model)
    check = partial(check_checkpoint, model, entry)
    lock = fetch_model(model, entry, store, check)
    _, checkpoint, _, notes = check(workspace.link(lock, store))
    checkpoint.require_finite()
    write_lock(workspace.lock, lock)  # last: no later stage starts on a checkpoint that was refused
    print(
        f"{model}: {entry.title}, {lock.revision}, licence {lock.licence}: {len(lock.files)} files, "
        f"{len(checkpoint)} tensors, {checkpoint.weight_bytes:,} bytes of weights"
    )
    for note in notes:
        print(f"{model}: {note}", file=sys.stderr)
