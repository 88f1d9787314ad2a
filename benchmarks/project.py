"""A copy of the configuration with a store of its own, where benchmarks run the pipeline's own commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from benchmarks import machine
from pipeline.errors import PipelineError

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SMALL = "smollm2-135m"


class Project:
    """A copy of the configuration in a folder of its own, with a store of its own, where the commands run."""

    def __init__(self, work: Path):
        self.work, self.folder, self.store = work, work / "project", work / "store"
        shutil.rmtree(self.folder / "configs", ignore_errors=True)
        shutil.copytree(ROOT / "configs", self.folder / "configs")

    def read(self, name: str) -> dict[str, Any]:
        """A configuration file, such as recipes/q4.yaml."""
        return yaml.safe_load((self.folder / "configs" / name).read_text(encoding="utf-8"))

    def write(self, name: str, values: Mapping[str, Any]) -> None:
        """Write a configuration file."""
        (self.folder / "configs" / name).write_text(yaml.safe_dump(dict(values), sort_keys=False), encoding="utf-8")

    def use_source(self, model: str, source: Path) -> None:
        """Take the model from a folder of synthetic weights."""
        entry = f"models/{model}.yaml"
        self.write(entry, self.read(entry) | {"source": {"kind": "local", "path": str(source)}})

    def seed_store(self) -> None:
        """Give the store what the repository's own store has, by hard links: datasets are not downloaded again."""
        if (ROOT / "store").is_dir() and not self.store.exists():
            shutil.copytree(ROOT / "store", self.store, copy_function=os.link)

    def command(self, *arguments: str, threads: int | None = None) -> list[str]:
        """`python -m pipeline ARGUMENTS`, on so many cores."""
        pin = ["taskset", "-c", ",".join(map(str, range(threads)))] if threads else []
        return [*pin, sys.executable, "-m", "pipeline", *arguments]

    @property
    def environment(self) -> dict[str, str]:
        """Where the package and the store are."""
        return os.environ | {"PYTHONPATH": str(ROOT), "PIPELINE_STORE": str(self.store)}

    def run(self, *arguments: str, threads: int | None = None) -> machine.Usage:
        """Run a pipeline command to its end, watched. Raises PipelineError if it fails."""
        used = machine.watch(self.command(*arguments, threads=threads), self.environment, self.folder, self.work)
        if used.status:
            raise PipelineError(f"`python -m pipeline {' '.join(arguments)}` ended with status {used.status}.")
        return used

    def kill(self, *arguments: str, after: float) -> None:
        """Start a pipeline command and SIGKILL it `after` so many seconds."""
        process = subprocess.Popen(
            self.command(*arguments), cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL
        )
        time.sleep(after)
        process.send_signal(signal.SIGKILL)
        process.wait()

    def artifact(self, model: str, variant: str) -> Path:
        """Where a variant lies."""
        return self.folder / "artifacts" / model / "variants" / variant

    def weights(self, model: str) -> Path:
        """The checkpoint's files as the pipeline reads them: hard links into the store."""
        return self.folder / "artifacts" / model / "reference"
