"""What git says of the files that decide results: a release is made of a commit, not of somebody's working tree."""

from __future__ import annotations

import shutil
import subprocess

from pipeline.config.signing import SigningConfig
from pipeline.errors import ConfigError

DECIDING = ("configs", "pipeline", "dvc.yaml", "constraints.txt")
"""What code keys and parameters read. dvc.lock, metrics and outputs follow from it."""


def git(*arguments: str) -> str:
    """What a command of git prints about the working tree; nothing outside a repository, and where git is missing."""
    if shutil.which("git") is None:
        return ""
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.rstrip()


def uncommitted() -> list[str]:
    """The deciding files that differ from the commit; none outside a repository."""
    return [line[3:] for line in git("status", "--porcelain", "--", *DECIDING).splitlines()]


def require_committed(signing: SigningConfig) -> None:
    """Raise ConfigError where a release would be signed of files that no commit has."""
    if signing.channel == "release" and (changed := uncommitted()):
        raise ConfigError(
            f"configs/signing.yaml: `channel: release`, and {len(changed)} files that decide results differ from the "
            f"commit, the first is {changed[0]}: nobody could make this release again. Commit them (`git add "
            f"{' '.join(changed[:3])}`), or set `channel: development`."
        )
