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

from huggingface_hub import ModelCard

from pipeline.bundle import bom, card, licence, provenance
from pipeline.bundle.dossier import Dossier
from pipeline.bundle.materials import gather
from pipeline.bundle.release import CONTENT, SMALL, FileEntry, Refusal, Release, Runtime, describe_files, parse
from pipeline.config.models import load_model, load_pipeline
from pipeline.config.signing import load_signing
from pipeline.door.tokenizer import read_notes
from pipeline.errors import BundleError
from pipeline.files import read_json, write_bytes
from pipeline.judge.verdicts import Verdict
from pipeline.tasks.registry import load_suite
from pipeline.workspace import PLAN_FILE, Workspace


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
        BundleError: the artifact holds a file of the same name, dvc.lock says that a file is another than it was, or
            a document is not valid in its format.
    """
    artifact, entry, lock = workspace.artifact(variant), load_model(workspace.model), workspace.read_lock()
    external, internal, items, commit = gather(workspace, variant, lock)
    dossier = Dossier(
        entry=entry,
        variant=variant,
        release=load_signing().release,
        created=created,
        source=lock,
        runtime=runtime,
        config=workspace.read(artifact / "config.json", "quantize", variant),
        plan=workspace.read(artifact / PLAN_FILE, "quantize", variant),
        metrics=workspace.read(workspace.measurements(variant), "validate", variant),
        verdict=verdict,
        texts=load_suite(load_pipeline().suite).texts(),
        commit=commit,
        files=files,
        notes=read_notes(artifact),
        chats=_chats(artifact),
    )
    builders = {
        card.FILE: card.build,
        bom.FILE: bom.build,
        provenance.FILE: lambda known: provenance.build(known.files, external, internal, items),
    }
    if taken := sorted(builders.keys() & files.keys()):
        raise BundleError(f"{artifact / taken[0]} has the name of a document that the bundle stage writes. Rename it.")
    paths: dict[str, Path] = {}
    if statement := licence.statement(entry.title, lock.revision, lock.licence, files):
        paths[licence.STATEMENT] = folder / licence.STATEMENT
        write_bytes(paths[licence.STATEMENT], statement)
    for name, build in builders.items():
        # Each knows those before it: the bill of materials cannot hold its own hash, nor that of what names it.
        content = build(replace(dossier, files={**files, **describe_files(paths)}))
        if problem := _FACTS[name][0](content):
            raise BundleError(f"{dossier.name}: {name} cannot be written: {problem}.")
        paths[name] = folder / name
        write_bytes(paths[name], content)
    return paths


def _chats(artifact: Path) -> bool:
    """Whether the tokenizer has a chat template, in its own file or among its settings."""
    settings = artifact / "tokenizer_config.json"
    return (artifact / "chat_template.jinja").exists() or (
        settings.exists() and bool(read_json(settings).get("chat_template"))
    )


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
    for name, (problem_of, facts) in _FACTS.items():
        raw, problem = _read(content / name)
        problem = problem or problem_of(raw)
        status |= problem is not None
        lines = [f"INVALID: {problem}"] if problem else facts(raw)
        # of a file that somebody else may have written: safe to print
        print(f"{name}\n  " + "\n  ".join(line if line.isprintable() else ascii(line) for line in lines))
    return int(status)


def _read(path: Path) -> tuple[bytes, str | None]:
    if path.is_symlink() or not path.is_file():
        return b"", "there is no such file"
    if path.stat().st_size > SMALL:
        return b"", f"it has {path.stat().st_size:,} bytes, more than any document of ours"
    return path.read_bytes(), None


def _release_problem(raw: bytes) -> str | None:
    try:
        parse(Release, raw)
    except ValueError as error:
        return str(error)
    return None


def _release_facts(raw: bytes) -> list[str]:
    found = parse(Release, raw)
    made = f"{found.model}/{found.variant} release {found.release}, channel {found.channel}"
    return [f"{made}, made {found.created}, fresh until {found.expires}", f"{len(found.files)} files"]


def _bom_facts(raw: bytes) -> list[str]:
    document = json.loads(raw)
    component = document.get("metadata", {}).get("component", {})
    licences = [entry.get("license", {}) | entry for entry in component.get("licenses", [])]
    named = [str(entry.get("expression") or entry.get("id") or entry.get("name")) for entry in licences]
    form = f"CycloneDX {document.get('specVersion')}, {document.get('serialNumber')}"
    lines = [f"{form}, licence {', '.join(named) or 'unknown'}", f"{component.get('name')} {component.get('version')}"]
    analysis = component.get("modelCard", {}).get("quantitativeAnalysis", {})
    for metric in analysis.get("performanceMetrics", []):
        bounds = metric.get("confidenceInterval")
        interval = f" ({bounds.get('lowerBound', '?')} to {bounds.get('upperBound', '?')})" if bounds else ""
        lines.append(f"{metric.get('type')}: {metric.get('value')}{interval}; {metric.get('slice')}")
    return lines


def _provenance_facts(raw: bytes) -> list[str]:
    statement = provenance.read(raw)
    definition = statement["predicate"]["buildDefinition"]
    materials = definition["resolvedDependencies"]
    hashed = sum("sha256" in material.get("digest", ()) for material in materials)
    lines = [
        f"{definition['buildType']} of {json.dumps(definition['externalParameters'])}",
        f"{len(statement['subject'])} files from {len(materials)} materials, {hashed} of them by SHA-256",
    ]
    for item in (item for item in materials if item.get("name") == bom.PIPELINE):
        changed = ", with uncommitted changes" if item.get("annotations", {}).get("uncommittedChanges") else ""
        lines.append(f"pipeline at {item.get('digest', {}).get('gitCommit')}{changed}")
    return [*lines, f"internal parameters: {json.dumps(definition.get('internalParameters', {}))}"]


def _card_facts(raw: bytes) -> list[str]:
    data = ModelCard(raw.decode()).data
    results = [f"{result.metric_name}: {result.metric_value}" for result in data.get("eval_results") or []]
    base = data.get("base_model") or "no base model"
    return [f"{data.get('model_name')}, licence {data.get('license')}, made from {base}", *results]


_FACTS: dict[str, tuple[Callable[[bytes], str | None], Callable[[bytes], list[str]]]] = {
    Release.file_name: (_release_problem, _release_facts),
    bom.FILE: (bom.problem_of, _bom_facts),
    provenance.FILE: (provenance.problem_of, _provenance_facts),
    card.FILE: (card.problem_of, _card_facts),
}
