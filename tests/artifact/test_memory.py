"""Memory while an artifact is written: that of a few units of work, and of one layer's quantizers."""

from __future__ import annotations

import re
import time
import weakref
from contextlib import suppress
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from pipeline.artifact import work, write
from pipeline.artifact.quantizers import Channels, Quantizer, Search
from pipeline.partial import open_partial
from pipeline.planning.recipes import PlannedMatrix
from pipeline.quantize.formats import Quantized
from tests.artifact.exported import Exported, child, export, finish, grow, make_bfloat16
from tests.families import CASES, make_checkpoint
from tests.recipes import load_recipe

WIDTHS = {"hidden_size": 2048, "intermediate_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 4}
SLACK = 32 << 20  # what the allocator keeps differs between runs by a few MB; six layers more are 280 MB in bfloat16


def written(folder: Path, layers: int) -> tuple[Exported, int]:
    """Write the q3 artifact of a model with so many layers; return it and the peak of private bytes."""
    config = CASES["llama-untied"].config | WIDTHS | {"num_hidden_layers": layers, "vocab_size": 1024}
    make_bfloat16(folder / "checkpoint", config)
    process = child(grow, folder / "checkpoint", "q3", folder / "artifact", folder / "log", work.UNIT_BYTES, 2)
    status, peak = Path(f"/proc/{process.pid}/status"), 0
    while process.is_alive():
        text = ""
        with suppress(FileNotFoundError, ProcessLookupError):  # it may end before it is opened or read
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


class LargeQuantizers(Search):
    """Rounding to nearest, with an eye on the quantizers of other layers that are alive when one is asked for."""

    def __init__(self, by_layer: bool) -> None:
        super().__init__()
        self.by_layer = by_layer
        self.made: list[tuple[int, weakref.ref[Quantizer]]] = []
        self.kept: list[int] = []

    def of(self, planned: PlannedMatrix, channels: Channels) -> Quantizer:
        """The function of a matrix, slow enough that its units are still under way when the next matrix is due."""
        layer, nearest = planned.matrix.layer, super().of(planned, channels)

        def quantize(weights: np.ndarray) -> list[Quantized]:
            time.sleep(0.002)
            return nearest(weights)

        self.kept += [owner for owner, made in self.made if owner != layer and made() is not None]
        self.made.append((layer, weakref.ref(quantize)))
        return quantize


@pytest.mark.parametrize("by_layer", [True, False])
def test_a_layer_s_quantizers_go_before_the_next_layer_s_come(
    by_layer: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """GPTQ's hold second moments: without, those of a layer would lie beside the next layer's weights."""
    make_checkpoint(tmp_path / "checkpoint", CASES["llama-untied"])
    exported = export(tmp_path / "checkpoint")
    monkeypatch.setattr(write, "units", partial(work.units, unit_bytes=8 * 4 * 128))
    search = LargeQuantizers(by_layer)
    with open_partial(tmp_path / "partial", "key") as growing:
        write.write_artifact(growing, exported.draft(load_recipe("q4")), exported.checkpoint, exported.folder, search)
    assert len({layer for layer, _ in search.made}) > 2
    assert bool(search.kept) is not by_layer
