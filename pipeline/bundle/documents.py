"""The documents inside a bundle: bill of materials, provenance, model card, and a licence statement where no text is.

The bundle stage writes them beside the artifact's files, so that release.json lists and the signature covers them.
`inspect` reads them back.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import replace
from datetime import datetime
from pathlib import Path
from typing import Any

from pipeline.bundle import bom, card, licence, provenance
from pipeline.bundle.dossier import Dossier
from pipeline.bundle.materials import gather
from pipeline.bundle.release import CONTENT, FileEntry, Refusal, Runtime, describe_files
from pipeline.config.models import load_model, load_pipeline
from pipeline.config.signing import load_signing
from pipeline.errors import BundleError
from pipeline.files import write_bytes
from pipeline.judge.gates import Verdict
from pipeline.tasks.registry import load_suite
from pipeline.workspace import PLAN_FILE, Workspace

_MOST_BYTES = 16 << 20  # no document of ours comes near it


def write(
    folder: Path,
    workspace: Workspace,
    variant: str,
    runtime: Runtime,
    created: datetime,
    verdict: Verdict,
    files: Mapping[str, FileEntry],
) -> dict[str, Path]:
    """Write the documents of a passing variant, whose artifact's files are `files`; their paths by bundle name.

    Raises:
        BundleError: the artifact holds a file of the same name, or dvc.lock says that a file is another than it was.
    """
    artifact, entry, lock = workspace.artifact(variant), load_model(workspace.model), workspace.read_lock()
    materials = gather(workspace, variant, lock)
    dossier = Dossier(
        model=workspace.model,
        title=entry.title,
        variant=variant,
        release=load_signing().release,
        created=created,
        source=lock,
        base_model=entry.hub_name,
        context=entry.context,
        runtime=runtime,
        config=workspace.read(artifact / "config.json", "quantize", variant),
        plan=workspace.read(artifact / PLAN_FILE, "quantize", variant),
        metrics=workspace.read(workspace.metrics(variant), "validate", variant),
        verdict=verdict,
        texts=load_suite(load_pipeline().suite).texts(),
        note=entry.note,
        commit=materials.commit,
        files=files,
    )
    paths: dict[str, Path] = {}

    def present() -> Dossier:
        return replace(dossier, files={**files, **describe_files(paths)})

    def add(name: str, content: bytes | None) -> None:
        if content is not None:
            if name in files:
                raise BundleError(
                    f"{artifact / name} has the name of a document that the bundle stage writes. Rename it."
                )
            paths[name] = folder / name
            write_bytes(paths[name], content)

    # Each knows those before it: the bill of materials cannot hold its own hash, nor that of what names it.
    add(licence.STATEMENT, licence.statement(entry.title, lock.revision, lock.licence, files))
    add(card.FILE, card.build(present()))
    add(bom.FILE, bom.build(present()))
    build = (present().files, materials.external, materials.internal, materials.items)
    add(provenance.FILE, provenance.build(*build))
    return paths


# --- reading ---------------------------------------------------------------------------------------------------------


def inspect(bundle: Path) -> int:
    """Print the main facts of a bundle's documents and what is wrong with them; 0 if nothing is, else 1.

    It says whether they are valid in form, not who wrote them: `verify` does.
    """
    content = bundle / CONTENT
    if not content.is_dir():
        raise BundleError(f"{content} is not there: {bundle} is no bundle. Name the folder that holds {CONTENT}/.")
    if (content / Refusal.file_name).exists():
        print(f"{bundle}: a refusal, which has no documents")
        return 0
    status = 0
    checks: tuple[tuple[str, Callable[[bytes], str | None], Callable[[bytes], list[str]]], ...] = (
        (bom.FILE, bom.problem_of, _bom_facts),
        (provenance.FILE, provenance.problem_of, _provenance_facts),
        (card.FILE, card.problem_of, _card_facts),
    )
    for name, problem_of, facts in checks:
        raw, problem = _read(content / name)
        problem = problem or problem_of(raw)
        lines = [f"INVALID: {problem}"] if problem else facts(raw)
        status |= problem is not None
        print(f"{name}\n  " + "\n  ".join(lines))
    return int(status)


def _read(path: Path) -> tuple[bytes, str | None]:
    if path.is_symlink() or not path.is_file():
        return b"", "there is no such file"
    if path.stat().st_size > _MOST_BYTES:
        return b"", f"it has {path.stat().st_size:,} bytes, more than any document of ours"
    return path.read_bytes(), None


def _bom_facts(raw: bytes) -> list[str]:
    document = json.loads(raw)
    component = document.get("metadata", {}).get("component", {})
    analysis = component.get("modelCard", {}).get("quantitativeAnalysis", {})
    metrics = [
        f"{metric.get('type')}: {metric.get('value')}{_bounds(metric)}; {metric.get('slice')}"
        for metric in analysis.get("performanceMetrics", [])
    ]
    first = f"CycloneDX {document.get('specVersion')}, {document.get('serialNumber')}, {_licence_of(component)}"
    return _printable([first, f"{component.get('name')} {component.get('version')}", *metrics])


def _bounds(metric: dict[str, Any]) -> str:
    interval = metric.get("confidenceInterval")
    return f" ({interval.get('lowerBound', '?')} to {interval.get('upperBound', '?')})" if interval else ""


def _licence_of(component: dict[str, Any]) -> str:
    licences = [entry.get("license", {}) | entry for entry in component.get("licenses", [])]
    found = [entry.get("expression") or entry.get("id") or entry.get("name") for entry in licences]
    return f"licence {', '.join(map(str, found)) or 'unknown'}"


def _provenance_facts(raw: bytes) -> list[str]:
    statement = provenance.read(raw)
    definition = statement["predicate"]["buildDefinition"]
    materials = definition["resolvedDependencies"]
    hashed = sum("sha256" in material.get("digest", ()) for material in materials)
    commits = [material for material in materials if material.get("name") == bom.PIPELINE]
    lines = [
        f"{definition['buildType']} of {json.dumps(definition['externalParameters'])}",
        f"{len(statement['subject'])} files from {len(materials)} materials, {hashed} of them by SHA-256",
        *[f"pipeline at {item.get('digest', {}).get('gitCommit')}{_changed(item)}" for item in commits],
        f"internal parameters: {json.dumps(definition.get('internalParameters', {}))}",
    ]
    return _printable(lines)


def _changed(material: dict[str, Any]) -> str:
    return ", with uncommitted changes" if material.get("annotations", {}).get("uncommittedChanges") else ""


def _card_facts(raw: bytes) -> list[str]:
    from huggingface_hub import ModelCard

    data = ModelCard(raw.decode()).data
    results = [f"{result.metric_name}: {result.metric_value}" for result in data.eval_results or []]
    base = data.get("base_model") or "no base model"
    return _printable([f"{data.model_name}, licence {data.license}, made from {base}", *results])


def _printable(lines: list[str]) -> list[str]:
    """Lines of a file that somebody else may have written, safe to print."""
    return [line if line.isprintable() else ascii(line) for line in lines]
