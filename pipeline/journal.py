"""A file of finished items, one JSON line each, appended when an item is finished: a killed run does nothing twice.

A kill or a power cut leaves the last lines cut short or blank: from the first line that does not read, items count as
never finished.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from pipeline.files import atomic_file


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
        """Keep `item`, plain JSON data, under `name`, in one append: a kill cuts no line but this."""
        self.items[name] = item
        with open(self._path, "ab") as file:
            file.write(_line(name, item))

    def clear(self) -> None:
        """Forget all items. The file stays the same one: who has locked it still holds its lock."""
        self.items.clear()
        os.truncate(self._path, 0)

    def arrange(self, names: Iterable[str]) -> None:
        """Put the items in the order of `names`, others after them: the file of one history equals that of another."""
        order = list(dict.fromkeys([*names, *self.items]))
        if order == list(self.items):
            return
        self.items = {name: self.items[name] for name in order}
        with atomic_file(self._path) as file:
            file.writelines(_line(*entry) for entry in self.items.items())


def _line(name: str, item: Any) -> bytes:
    return json.dumps([name, item], ensure_ascii=False).encode() + b"\n"
