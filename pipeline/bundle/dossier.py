"""What is known about a bundle, in figures and sentences: what its bill of materials and its model card say alike.

Figures are those of the measurements, with their intervals; speed and memory are left out, because they belong to the
machine that measured and differ from run to run. Limits are sentences about what was not measured, or not well enough.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from packageurl import PackageURL

from pipeline.bundle.release import FileEntry, Runtime
from pipeline.checkpoint.lock import SourceLock
from pipeline.config.models import ModelConfig
from pipeline.judge.verdicts import REPORTED, Verdict
from pipeline.tasks import registry
from pipeline.tasks.task import RATCHET, Figure


@dataclass(frozen=True)
class Dossier:
    """One variant that passed its gates, before release.json lists its files.

    `entry` is the model's configuration, `config` the checkpoint's config.json, `plan` the artifact's plan, `metrics`
    the variant's measurements, `texts` the names of the held-out text that judged it, `commit` the pipeline's. `files`
    are the artifact's, without the documents made from this. `notes`: in what the tokenizer that ships differs from the
    checkpoint's, a sentence each.
    """

    entry: ModelConfig
    variant: str
    release: int
    created: datetime
    source: SourceLock
    runtime: Runtime
    config: Mapping[str, Any]
    plan: Mapping[str, Any]
    metrics: Mapping[str, Any]
    verdict: Verdict
    texts: tuple[str, ...]
    commit: str | None
    files: Mapping[str, FileEntry]
    notes: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The bundle's name: mimo-8b-q4."""
        return f"{self.source.model}-{self.variant}"

    @property
    def recipe(self) -> str:
        """How the weights were quantized, in a line."""
        recipe = self.plan["recipe"]
        return f"{one_line(recipe['title'])}, recipe version {recipe['version']}, search {recipe['search']}"


def one_line(text: object) -> str:
    """Text of a checkpoint or a configuration on one line, so that it cannot break out of a list or a table."""
    return " ".join(str(text).split())


def number(value: float) -> str:
    """Six significant digits for machines: more than any sample here supports, and the same text everywhere."""
    return f"{value:.6g}"


def figures(dossier: Dossier) -> list[Figure]:
    """What was measured, in a fixed order; what was not is left out."""
    return registry.figures(dossier.metrics, dossier.texts)


def pypi(name: str, version: str) -> PackageURL:
    """The package URL (https://github.com/package-url/purl-spec) of a release of a package on PyPI."""
    return PackageURL("pypi", None, name.lower().replace("_", "-"), version)


def origin(lock: SourceLock) -> PackageURL | None:
    """Where a checkpoint came from; None for a folder of somebody's machine, whose path is nobody's business."""
    source = lock.source
    if source.get("kind") == "hub":
        owner, name = source["repo"].split("/")
        return PackageURL("huggingface", owner, name, source["revision"])
    return pypi(source["package"], source["version"]) if source.get("kind") == "pypi" else None


def measured_by(dossier: Dossier) -> str:
    """The system and runtimes that measured: "onnxruntime 1.31.1, onnxruntime-genai 0.18.0 on Linux x86_64"."""
    identity = dossier.metrics.get("identity", {})
    runtimes = [f"{name} {identity[name]}" for name in ("onnxruntime", "onnxruntime-genai") if name in identity]
    return f"{', '.join(runtimes) or 'unknown runtimes'} on {identity.get('system', 'an unrecorded system')}"


def limits(dossier: Dossier) -> list[str]:
    """What a user must know that the figures do not say, a sentence each."""
    sentences = [
        f"No phone was used: everything was measured with {measured_by(dossier)}. A phone's kernels round otherwise, "
        f"and its speed and memory are its own.",
        "Compared with the full-precision model only. Safety, bias, truthfulness and languages were not measured; "
        "expect at least that model's weaknesses.",
        f"The graph holds at most {dossier.entry.context:,} tokens. Quality was measured in short windows, not near "
        f"that length.",
    ]
    divergence = dossier.metrics.get("divergence", {})
    if (detectable := divergence.get("kl_mean_detectable")) is not None:
        power = f"{divergence['tokens']:,} tokens detect a mean KL of {detectable:.2g} nats above its limit"
        sentences.append(f"{power}; a smaller excess can go unseen.")
    for line in dossier.verdict.lines:
        gate = registry.gates().get(line.name)
        if gate and gate.kind != RATCHET and line.verdict == REPORTED and line.note:
            sentences.append(f"{gate.title}: {one_line(line.note)}.")
    judging = [task for task in registry.tasks() if task.gates]
    sentences += [f"{task.title} was not measured." for task in judging if not dossier.metrics.get(task.name)]
    sentences += map(one_line, dossier.notes)
    return [*sentences, one_line(dossier.entry.note)] if dossier.entry.note else sentences
