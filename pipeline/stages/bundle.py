"""bundle: what a phone downloads, or the record of why it gets nothing."""

from __future__ import annotations

import tempfile
from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from pipeline.bundle import documents, release
from pipeline.bundle.keys import announced_key
from pipeline.bundle.tiers import way_record
from pipeline.config.models import load_model
from pipeline.config.phones import load_kernels, load_tiers
from pipeline.config.signing import load_signing
from pipeline.errors import BundleError
from pipeline.files import scratch_directory
from pipeline.graph.nodes import OPSET
from pipeline.judge.measured import judged
from pipeline.judge.policy import load_gates
from pipeline.judge.verdicts import PASS, describe_line, read_verdict
from pipeline.planning.devices import ways
from pipeline.prepack import make
from pipeline.workspace import PLAN_FILE, Workspace


def run(model: str, variant: str) -> None:
    """Write artifacts/bundles/<model>/<variant>/content: artifact, documents, release.json; or refusal.json alone."""
    entry, signing, workspace = load_model(model), load_signing(), Workspace(model)
    verdict, lock = read_verdict(workspace, variant), workspace.read_lock()
    if load_gates().classes[entry.gate_class].talking and signing.channel != "development":
        raise BundleError(
            f"{model}: gate class {entry.gate_class!r} judges machinery, so nothing of it is released. Take the model "
            f"out of `models` in configs/pipeline.yaml, or set `channel: development` in configs/signing.yaml."
        )
    common: dict[str, Any] = {
        "model": model,
        "title": entry.title,
        "variant": variant,
        "signing": signing,
        "key": announced_key(signing),
        "created": release.build_time(),
        "verdict": verdict.to_json(),
    }
    content = workspace.bundle(variant) / release.CONTENT
    if verdict.verdict != PASS:
        reasons = [describe_line(line) for line in verdict.lines if line.verdict == verdict.verdict]
        release.assemble(content, {}, release.make(release.Refusal, **common, reasons=reasons))
        print(f"{model} {variant}: {verdict.verdict}, so a refusal record in place of a bundle: {content}")
        return
    artifact = workspace.require(workspace.artifact(variant), "quantize", variant)
    plan = workspace.read(artifact / PLAN_FILE, "quantize", variant)
    measured = workspace.read(workspace.measurements(variant), "validate", variant)["identity"]
    runtime = release.Runtime(
        onnxruntime=measured["onnxruntime"], onnxruntime_genai=measured["onnxruntime-genai"], opset=OPSET
    )
    files = {file.name: file for file in sorted(artifact.iterdir())}
    entries = release.describe_files(files)
    _require_judged(artifact, entries, plan["sha256"] | {PLAN_FILE: measured.get("plan_sha256")})
    found = ways(judged(workspace, variant), load_tiers())
    with ExitStack() as stack:  # folders for what is made, until the bundle has links to it
        if any(way.weights == "mapped" for way in found.values()):
            scratch = stack.enter_context(scratch_directory(workspace.bundle(variant) / ".prepack"))
            made = _prepacking(artifact, scratch)
            files, entries = files | made, entries | release.describe_files(made)
        folder = stack.enter_context(tempfile.TemporaryDirectory())
        papers = documents.write(Path(folder), workspace, variant, runtime, common["created"], verdict, entries)
        files, entries = files | papers, entries | release.describe_files(papers)
        document = release.build_release(
            **common,
            runtime=runtime,
            source={"revision": lock.revision, "files": {file.name: file.sha256 for file in lock.files}},
            licence=lock.licence,
            context=entry.context,
            kv_cache=plan["kv_cache"]["type"],
            tiers={name: way_record(way) for name, way in found.items()},
            files=entries,
        )
        release.assemble(content, files, document)
        size = sum(file.stat().st_size for file in files.values())
    print(f"{model} {variant}: bundle of {size:,} bytes in {content}")


def _prepacking(artifact: Path, scratch: Path) -> dict[str, Path]:
    """What phones need to prepack the artifact, made in `scratch`: files by name."""
    make.link_model(artifact, scratch)
    make.prepare(scratch)
    make.add_classes(scratch, load_kernels().classes)
    return {file.name: file for file in make.prepack_files(scratch)}


def _require_judged(artifact: Path, files: Mapping[str, release.FileEntry], expected: Mapping[str, str | None]) -> None:
    """Refuse an artifact that is not, to the byte, what was quantized and measured: SHA-256 by name."""
    found = {name: entry.sha256 for name, entry in files.items()}
    if changed := sorted(name for name in {*found, *expected} if found.get(name) != expected.get(name)):
        raise BundleError(
            f"{artifact / changed[0]} and {len(changed) - 1} more are not what was quantized and measured: SHA-256 "
            f"{found.get(changed[0])}, expected {expected.get(changed[0])}. Run `dvc repro`."
        )
