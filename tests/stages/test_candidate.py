"""The tiers stage: what a variant needs on a device."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.evaluate.gates import PASS, GateLine, Verdict
from pipeline.files import write_json
from pipeline.stages.candidate import candidate
from pipeline.stages.workspace import Workspace


def test_the_cache_counts_in_the_variants_own_type(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    workspace = Workspace("tiny")
    needed = {}
    for variant, kind, bytes_per_token in (("q4", "float32", 1536), ("q4_kv8", "int8", 384)):
        metrics = {
            "size": {"bytes_on_disk": 10**6, "kv_cache": {"type": kind, "bytes_per_token": bytes_per_token}},
            "speed": {"peak_memory_bytes": 2 * 10**6},
            "divergence": {"kl_mean": 0.1},
        }
        write_json(workspace.metrics(variant), metrics)
        write_json(
            workspace.verdict(variant), Verdict(PASS, (GateLine("kl_mean", PASS),), f"random/{variant}").to_json()
        )
        needed[variant] = candidate(workspace, variant, 4096).memory_bytes
    assert needed == {"q4": 2 * 10**6 + 4096 * 1536, "q4_kv8": 2 * 10**6 + 4096 * 384}
