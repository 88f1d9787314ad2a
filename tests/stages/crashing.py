"""The quantize stage in a child process that dies at a chosen call to the system."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

from pipeline.stages import quantize
from tests.artifact.exported import spy

CALLS = ("open", "truncate", "posix_fallocate", "pwrite", "fsync", "mkdir", "rename", "replace", "unlink", "rmdir")


def run(folder: Path, store: Path, variant: str, die_at: int | None) -> None:
    """Quantize the tiny model in `folder`, dying before call number `die_at`.

    What is computed goes to `folder`/computed, the calls to `folder`/calls, each line by line.
    """
    os.chdir(folder)
    os.environ["PIPELINE_STORE"] = str(store)
    spy(folder / "computed")
    trace = open(folder / "calls", "wb", buffering=0)  # noqa: SIM115 (open until the process ends)
    count = 0

    def counted(name: str, call: Callable[..., Any]) -> Callable[..., Any]:
        def made(*arguments: Any, **options: Any) -> Any:
            nonlocal count
            count += 1
            if count == die_at:
                os.kill(os.getpid(), signal.SIGKILL)
            trace.write(f"{name}\n".encode())
            return call(*arguments, **options)

        return made

    for name in CALLS:
        setattr(os, name, counted(name, getattr(os, name)))
    quantize.run("tiny", variant)
