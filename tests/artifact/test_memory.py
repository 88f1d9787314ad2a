"""Private memory while an artifact is written: that of a few units of work, however many layers there are."""

from __future__ import annotations

import re
from contextlib import suppress
from pathlib import Path

import pytest

from pipeline.artifact import work
from tests.artifact.exported import Exported, child, export, finish, grow, make_bfloat16
from tests.families import CASES
from tests.recipes import load_recipe

WIDTHS = {"hidden_size": 2048, "intermediate_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4}
SLACK = 32 << 20  # what the allocator keeps differs between runs by a few MB; six layers more are 280 MB in bfloat16


def written(folder: Path, layers: int) -> tuple[Exported, int]:
    """Write the q3 artifact of a model with so many layers; return it and the peak of private bytes."""
    config = CASES["llama-untied"].config | WIDTHS | {"num_hidden_layers": layers, "vocab_size": 1024}
    make_bfloat16(folder / "checkpoint", config)
    process = child(grow, folder / "checkpoint", "q3", folder / "artifact", folder / "log", work._UNIT_BYTES, 2)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.is_alive():
        text = ""
        with suppress(ProcessLookupError):  # it may end between opening and reading
            text = status.read_text()
        if found := re.search(r"RssAnon:\s+(\d+) kB", text):
            peak = max(peak, int(found[1]) * 1024)
        process.join(0.003)
    assert finish(process) == 0
    return export(folder / "checkpoint"), peak


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="RssAnon is Linux'")
def test_memory_does_not_grow_with_layers_and_sizes_are_as_planned(tmp_path: Path) -> None:
    peaks = {}
    for layers in (2, 8):
        folder = tmp_path / str(layers)
        exported, peaks[layers] = written(folder, layers)
        planned = exported.draft(load_recipe("q3"), part_bytes=1 << 23).bytes
        assert sum(file.stat().st_size for file in (folder / "artifact").iterdir()) == planned
    assert exported.checkpoint.weight_bytes > 350e6
    assert peaks[8] - peaks[2] < SLACK
    assert peaks[8] < 1 << 30
    assert peaks[2] > 30e6, "nothing was measured"
