"""bom.cdx.json: a CycloneDX 1.6 bill of materials of a bundle, with the model card of its model.

It is plain JSON data, because the library has no class for a model card, and is validated against the strict schema of
https://cyclonedx.org/docs/1.6/json/. Equal dossiers give equal bytes: every bom-ref is set, and the serial number is a
UUIDv5 of the content.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

from cyclonedx.schema import SchemaVersion
from cyclonedx.spdx import is_supported_id

from pipeline.bundle import licence
from pipeline.bundle.dossier import Dossier, figures, limits, measured_by, number, one_line, origin, pypi
from pipeline.files import json_bytes
from pipeline.tasks.task import Figure

FILE = "bom.cdx.json"
PIPELINE = "phone-model-pipeline"
_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, f"urn:{PIPELINE}:bom")
_MODEL = "model"


def build(dossier: Dossier) -> bytes:
    """The bill of materials of a bundle, as UTF-8 JSON."""
    components = [
        *_files("content", {name: entry.sha256 for name, entry in dossier.files.items()}),
        _runtime("onnxruntime", dossier.runtime.onnxruntime),
        _runtime("onnxruntime-genai", dossier.runtime.onnxruntime_genai),
    ]
    references = [component["bom-ref"] for component in components]
    runs = {_MODEL: {"dependsOn": [reference for reference in references if reference.startswith("runtime/")]}}
    document = {
        "$schema": "http://cyclonedx.org/schema/bom-1.6.schema.json",
        "bomFormat": "CycloneDX",
        "specVersion": "1.6",
        "version": 1,
        "metadata": {
            "timestamp": dossier.created.isoformat(),
            "tools": {"components": [_component("application", PIPELINE, PIPELINE, version=dossier.commit)]},
            "component": _model(dossier),
        },
        "components": components,
        "dependencies": [{"ref": name} | runs.get(name, {}) for name in sorted([*references, _MODEL])],
    }
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    document["serialNumber"] = uuid.uuid5(_SPACE, digest).urn
    return json_bytes(document)


def problem_of(raw: bytes) -> str | None:
    """Why `raw` is not a valid bill of materials (strict schema of CycloneDX 1.6), or None."""
    from cyclonedx.validation.json import JsonStrictValidator  # takes seconds to import

    try:
        text = raw.decode()
        document = json.loads(text)
        error = JsonStrictValidator(SchemaVersion.V1_6).validate_str(text)
    except (ValueError, RecursionError) as failure:
        return f"it is not JSON ({one_line(failure)[:200]})"
    if error:
        path = getattr(error.data, "json_path", "$")
        return f"it is not CycloneDX 1.6 at {path}: {one_line(getattr(error.data, 'message', error.data))[:200]}"
    if document["specVersion"] != "1.6":  # the schema of each version allows the names of all
        return f"it is not CycloneDX 1.6 at $.specVersion: {document['specVersion']!a}"
    return None


# --- components ------------------------------------------------------------------------------------------------------


def _component(kind: str, reference: str, name: str, **fields: Any) -> dict[str, Any]:
    """A component object of the schema, without the `fields` that are None."""
    known = {key: value for key, value in fields.items() if value is not None}
    return {"type": kind, "bom-ref": reference, "name": name} | known


def _model(dossier: Dossier) -> dict[str, Any]:
    """The quantized model, made from the checkpoint."""
    kind, title, source = "machine-learning-model", one_line(dossier.entry.title), dossier.source
    licences, purl = _licences(source.licence), origin(source)
    made_from = {"version": source.revision, "licenses": licences, "purl": str(purl) if purl else None}
    files = _files("source", {file.name: file.sha256 for file in source.files})
    ancestor = _component(kind, "source", title, components=files, **made_from)
    notes = f"Exported to ONNX and quantized ({dossier.recipe}); nothing was trained."
    described = f"{title}, quantized for ONNX Runtime: {dossier.recipe}"
    fields = {"version": str(dossier.release), "description": described, "licenses": licences}
    pedigree = {"ancestors": [ancestor], "notes": notes}
    return _component(kind, _MODEL, dossier.name, pedigree=pedigree, modelCard=_model_card(dossier), **fields)


def _runtime(name: str, version: str) -> dict[str, Any]:
    described, purl = "Runs the bundle; the lowest version, and not part of it.", str(pypi(name, version))
    reference = f"runtime/{name}"
    return _component("library", reference, name, version=version, scope="required", description=described, purl=purl)


def _files(place: str, digests: Mapping[str, str]) -> list[dict[str, Any]]:
    """A component for each file of `place`, from name → SHA-256."""
    return [
        _component("file", f"{place}/{name}", name, hashes=[{"alg": "SHA-256", "content": digest}])
        for name, digest in sorted(digests.items())
    ]


def _licences(stated: str) -> list[dict[str, Any]]:
    if (expression := licence.spdx(stated)) is None:
        return [{"license": {"name": one_line(stated) or "unknown"}}]
    return [{"license": {"id": expression}} if is_supported_id(expression) else {"expression": expression}]


# --- the model card --------------------------------------------------------------------------------------------------


def _model_card(dossier: Dossier) -> dict[str, Any]:
    """A modelCard object of the schema. Whom a model is meant for, and fairness, only its authors can say."""
    properties = {  # what the schema has no field for, in sorted order
        "context": dossier.entry.context,
        "kv-cache": dossier.plan["kv_cache"]["type"],
        "opset": dossier.runtime.opset,
        "parameters": dossier.plan["parameters"],
        "recipe": dossier.recipe,
        "variant": dossier.variant,
    }
    return {
        "modelParameters": {
            "task": "text-generation",
            "architectureFamily": "decoder-only transformer",
            "modelArchitecture": one_line((dossier.config.get("architectures") or ["unknown"])[0]),
            "inputs": [{"format": "text"}],
            "outputs": [{"format": "text"}],
        },
        "quantitativeAnalysis": {"performanceMetrics": [_metric(figure) for figure in figures(dossier)]},
        "considerations": {
            "useCases": ["Text generation on phones, with onnxruntime-genai, without a network."],
            "technicalLimitations": limits(dossier),
            "performanceTradeoffs": [
                f"{dossier.plan['bits_per_weight']:.2f} bits per weight in place of the source's; the metrics say what "
                f"that changed. Intervals are two-sided, 90 %. Measured with {measured_by(dossier)}."
            ],
        },
        "properties": [{"name": f"{PIPELINE}:{name}", "value": str(value)} for name, value in properties.items()],
    }


def _metric(figure: Figure) -> dict[str, Any]:
    """Values are strings in the schema; the unit goes with the type, since there is no field for it."""
    title, bounds = f"{figure.title} ({figure.unit})", {"lowerBound": figure.low, "upperBound": figure.high}
    interval = {name: number(bound) for name, bound in bounds.items() if bound is not None}
    metric = {"type": title, "value": number(figure.value), "slice": figure.detail}
    return metric | ({"confidenceInterval": interval} if interval else {})
