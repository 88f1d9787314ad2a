"""A copy of the configuration with a store of its own, where benchmarks run the pipeline's own commands."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

import yaml

from benchmarks import machine
from pipeline.checkpoint.blobs import Store
from pipeline.errors import PipelineError
from pipeline.files import link_or_copy

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
SMALL = "smollm2-135m"
_CODE = ("pipeline", "configs", "dvc.yaml", ".dvc/config", ".dvc/.gitignore", ".dvcignore", ".gitignore")


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
        """Give the store what the pipeline's own store has, by hard links: datasets are not downloaded again."""
        if (own := ROOT / Store().root).is_dir() and not self.store.exists():
            shutil.copytree(own, self.store, copy_function=lambda old, new: link_or_copy(Path(old), Path(new)))

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


class DvcProject(Project):
    """A project that `dvc repro` runs: a git repository of its own with the code and the configuration as they were
    when it was made. A later start goes on with these, whatever the repository has become meanwhile."""

    def __init__(self, work: Path):
        self.work, self.folder, self.store = work, work / "project", work / "store"
        self.new = not (self.folder / ".git").exists()
        if self.new:
            shutil.rmtree(self.folder, ignore_errors=True)
            for name in _CODE:
                target = self.folder / name
                target.parent.mkdir(parents=True, exist_ok=True)
                (shutil.copytree if (ROOT / name).is_dir() else shutil.copy2)(ROOT / name, target)

    def commit(self) -> None:
        """Make the repository, when everything is written: its existence means that the project is complete."""
        git = ["git", "-c", "user.name=rehearsal", "-c", "user.email=rehearsal@localhost"]
        for step in (["init", "-q"], ["add", "-A"], ["commit", "-q", "-m", "The project of a rehearsal"]):
            subprocess.run([*git, *step], cwd=self.folder, check=True, capture_output=True)

    @property
    def environment(self) -> dict[str, str]:
        """As a project's; dvc.yaml says `python`."""
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
        return super().environment | {"PATH": path, "ORT_DISABLE_TELEMETRY": "1"}

    def repro(self, target: str) -> list[str]:
        """The command that brings a stage and all that it depends on up to date."""
        return [sys.executable, "-m", "dvc", "repro", target]

    def kill_group(self, command: Sequence[str], after: float) -> int | None:
        """Start a command and SIGKILL it and all that it started `after` so many seconds; its status if it ended."""
        process = subprocess.Popen(
            command, cwd=self.folder, env=self.environment, stdout=subprocess.DEVNULL, start_new_session=True
        )
        try:
            return process.wait(after)
        except subprocess.TimeoutExpired:
            return None
        finally:
            with suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
