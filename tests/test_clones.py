"""Two clones and one DVC remote: each runs a model, and the union of their locks is what both ran (docs/scale.md)."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from tests.documented import blocks

STAGES = """\
stages:
  weigh:
    matrix:
      model: [a, b]
    cmd: echo ${item.model} >> runs && echo ${item.model} > weights-${item.model}
    outs: ["weights-${item.model}"]
  measure:
    matrix:
      model: [a, b]
    cmd: echo measured >> runs && cat weights-${item.model} > measured-${item.model}
    deps: ["weights-${item.model}"]
    outs: ["measured-${item.model}"]
  report:
    cmd: cat measured-a measured-b > report
    deps: [measured-a, measured-b]
    outs: [report]
"""


def run(folder: Path, command: str) -> str:
    """Output of a shell command that must succeed."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    names = {f"GIT_{role}_{what}": "x@example.org" for role in ("AUTHOR", "COMMITTER") for what in ("NAME", "EMAIL")}
    done = subprocess.run(
        ["bash", "-ec", command], cwd=folder, env={**os.environ, **names, "PATH": path}, capture_output=True, text=True,
        check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def test_the_union_of_two_locks_is_what_both_clones_ran(tmp_path: Path) -> None:
    first, second = tmp_path / "first", tmp_path / "second"
    first.mkdir()
    (first / "dvc.yaml").write_text(STAGES)
    run(
        first, f"git init -q && dvc init -q && dvc remote add -q -d shared {tmp_path}/remote && echo /runs > .gitignore"
    )
    run(first, "git add -A && git commit -qm begin && git clone -q . ../second")
    run(first, "dvc repro --glob '*@a' && dvc push")
    run(second, "dvc repro --glob '*@b' && dvc push && git add -A && git commit -qm b")
    run(second, "git push -q origin HEAD:refs/heads/OTHER")
    run(first, "git update-ref refs/remotes/origin/OTHER refs/heads/OTHER")
    (documented,) = (block.text for block in blocks() if "other.lock" in block.text)
    run(first, documented)
    assert [(first / f"measured-{model}").read_text() for model in "ab"] == ["a\n", "b\n"]
    run(first, "dvc repro")
    assert (first / "report").read_text() == "a\nb\n"
    assert (first / "runs").read_text() == "a\nmeasured\n", "the other clone's stages did not run again"
    assert run(first, "dvc status") == "Data and pipelines are up to date.\n"
