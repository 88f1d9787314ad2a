"""A dossier of a variant that passed, to be changed by tests."""

from __future__ import annotations

from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from pipeline.bundle.dossier import Dossier
from pipeline.bundle.release import FileEntry, Runtime
from pipeline.checkpoint.blobs import LockedFile
from pipeline.checkpoint.lock import SourceLock
from pipeline.config.models import ModelConfig
from pipeline.config.sources import LocalSource
from pipeline.judge.verdicts import PASS, REPORTED, GateLine, Verdict

REVISION = "c" * 40
NOTE = "gates nothing: the reference has 25.0 %, no more than chance"
METRICS = {
    "size": {
        "bytes_on_disk": 10**6,
        "kv_cache": {"type": "float32", "bytes_per_token": 512},
        "prompt_token_bytes": 100,
    },
    "speed": {
        "tokens_per_second": 123.456,
        "peak_memory_bytes": 10**7,
        "load_peak_private_bytes": 10**6,
        "load_peak_mapped_bytes": 10**6,
    },
    "divergence": {
        "kl_mean": 0.16460672274,
        "kl_mean_low": 0.14,
        "kl_mean_high": 0.19,
        "kl_mean_detectable": 0.0353,
        "top1": 0.806,
        "perplexity_ratio": 1.122,
        "tokens": 3000,
    },
    "mmlu": {"accuracy": 0.25, "accuracy_low": 0.2, "accuracy_high": 0.3, "n": 114, "mode": "cloze"},
    "humaneval": {"pass_at_1": 0.0, "n": 20, "prompt": "chat", "temperature": 0},
    "identity": {"onnxruntime": "1.31.1", "onnxruntime-genai": "0.18.0", "system": "Linux x86_64"},
}
PLAN = {
    "recipe": {"title": "Q4", "version": 2, "search": "gptq"},
    "bits_per_weight": 5.26,
    "bytes": 88_466_426,
    "parameters": 134_515_008,
    "kv_cache": {"type": "float32"},
    "tensors": {"a": {"format": "w4b64a", "bytes": 10}, "b": {"format": "w4b64a", "bytes": 5}},
}


def source(licence: str = "apache-2.0", **changes: Any) -> SourceLock:
    """The lock of a Hub repository without a licence text."""
    files = (LockedFile("config.json", 10, "1" * 64), LockedFile("model.safetensors", 20, "2" * 64))
    hub = {"kind": "hub", "repo": "owner/demo", "revision": REVISION}
    return replace(SourceLock("demo", hub, REVISION, licence, files), **changes)


def dossier(**changes: Any) -> Dossier:
    """What is known of demo's q4; `changes` are to its fields, or to those of the model's entry."""
    entry = ModelConfig(
        title="Demo",
        source=LocalSource(kind="local", path="weights"),
        base_model="owner/demo",
        context=2048,
        gate_class="demo",
        mmlu_mode="cloze",
        note="A caveat.",
    )
    ours = {name: changes.pop(name) for name in list(changes) if name in ModelConfig.model_fields.keys() - {"source"}}
    made = Dossier(
        entry=entry.model_copy(update=ours),
        variant="q4",
        release=7,
        created=datetime(2026, 1, 31, 12, tzinfo=UTC),
        source=source(),
        runtime=Runtime(onnxruntime="1.31.1", onnxruntime_genai="0.18.0", opset=21),
        config={"architectures": ["LlamaForCausalLM"]},
        plan=PLAN,
        metrics=METRICS,
        verdict=Verdict(PASS, (GateLine("kl_mean", PASS), GateLine("mmlu", REPORTED, note=NOTE)), "demo/q4"),
        texts=("text-wiki",),
        commit="d" * 40,
        files={"demo_q4.onnx": FileEntry(size=3, sha256="3" * 64), "LICENSE": FileEntry(size=4, sha256="4" * 64)},
        chats=True,
    )
    return replace(made, **changes)
