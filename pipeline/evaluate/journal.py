"""Finished items of a measurement, so that a run that was killed asks nothing twice.

One JSON line per item, appended when it is finished. A kill or a power cut leaves the last lines cut short or blank:
from the first line that does not read, items count as never measured.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


class Journal:
    """The items in one file, by name.

    Attributes:
        items: what is finished, plain JSON data by name, in the order of recording.
    """

    def __init__(self, path: Path):
        self._path = path
        self.items: dict[str, Any] = {}
        content = path.read_bytes() if path.exists() else b""
        kept = 0
        for line in content.split(b"\n")[:-1]:
            try:
                match json.loads(line):
                    case [str(name), item]:
                        self.items[name] = item
                    case _:
                        break
            except ValueError:
                break
            kept += len(line) + 1
        if kept < len(content):  # a whole journal is only read: DVC makes those in its cache read-only
            os.truncate(path, kept)

    def record(self, name: str, item: Any) -> None:
        """Keep `item`, plain JSON data, under `name`."""
        self.items[name] = item
        with open(self._path, "ab") as file:
            file.write(json.dumps([name, item], ensure_ascii=False).encode() + b"\n")
