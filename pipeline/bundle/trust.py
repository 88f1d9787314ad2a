"""The highest release of each model that was accepted here, so that an older one is recognised as a rollback."""

from __future__ import annotations

from pathlib import Path

from pydantic import RootModel, ValidationError

from pipeline import files
from pipeline.config import Name
from pipeline.errors import BundleError


class _Highest(RootModel[dict[Name, int]]):
    pass


class State:
    """A small JSON file, model → release number. No file means that nothing was accepted yet."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def _read(self) -> dict[str, int]:
        try:
            return _Highest.model_validate_json(self.path.read_bytes(), strict=True).root
        except FileNotFoundError:
            return {}
        except (OSError, ValidationError):
            raise BundleError(
                f"{self.path} is not a record of accepted releases. Restore it; without it an old release would be "
                f"taken for a new one."
            ) from None

    def highest(self, model: str) -> int | None:
        """The highest release of `model` accepted so far. Raises BundleError when the file is damaged."""
        return self._read().get(model)

    def record(self, model: str, release: int) -> None:
        """Note that `release` was accepted; a lower one than before changes nothing."""
        known = self._read()
        if release > known.get(model, 0):
            files.write_json(self.path, known | {model: release})
