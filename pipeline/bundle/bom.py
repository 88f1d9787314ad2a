"""bom.cdx.json: a CycloneDX 1.6 bill of materials of a bundle, with the model card of its model.

The library has no class for a model card (and drops one on reading), so the card is put into its JSON, and the whole is
validated against the strict schema of https://cyclonedx.org/docs/1.6/json/. Equal dossiers give equal bytes: every
bom-ref is set, and the serial number is a UUIDv5 of the content.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any

from cyclonedx.model import HashAlgorithm, HashType
from cyclonedx.model.bom import Bom, BomMetaData
from cyclonedx.model.component import Component, ComponentScope, ComponentType, Pedigree
from cyclonedx.model.license import DisjunctiveLicense, License, LicenseExpression
from cyclonedx.model.tool import ToolRepository
from cyclonedx.output.json import JsonV1Dot6
from cyclonedx.schema import SchemaVersion
from cyclonedx.spdx import is_supported_id

from pipeline.bundle import licence, origin
from pipeline.bundle.dossier import Dossier, figures, limits, measured_by, number, one_line
from pipeline.errors import BundleError
from pipeline.files import json_bytes
from pipeline.tasks.task import Figure

FILE = "bom.cdx.json"
PIPELINE = "phone-model-pipeline"
_SPACE = uuid.uuid5(uuid.NAMESPACE_URL, f"urn:{PIPELINE}:bom")
_MODEL = "model"


def build(dossier: Dossier) -> bytes:
    """The bill of materials of a bundle, as UTF-8 JSON.

    Raises:
        BundleError: what was made is not valid CycloneDX.
    """
    document = json.loads(_skeleton(dossier))
    document["metadata"]["component"]["modelCard"] = _model_card(dossier)
    document.pop("serialNumber", None)
    digest = hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()
    document["serialNumber"] = uuid.uuid5(_SPACE, digest).urn
    raw = json_bytes(document)
    if problem := problem_of(raw):
        raise BundleError(f"{dossier.name}: {FILE} cannot be written: {problem}.")
    return raw


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


def _skeleton(dossier: Dossier) -> str:
    """Everything but the model card, as the library writes it."""
    tool = Component(name=PIPELINE, type=ComponentType.APPLICATION, bom_ref=PIPELINE, version=dossier.commit)
    model, runtimes = _model(dossier), _runtimes(dossier)
    metadata = BomMetaData(component=model, timestamp=dossier.created, tools=ToolRepository(components=[tool]))
    content = _files("content", {name: entry.sha256 for name, entry in dossier.files.items()})
    bom = Bom(components=[*runtimes, *content], metadata=metadata, serial_number=uuid.UUID(int=0))
    bom.register_dependency(model, runtimes)
    return JsonV1Dot6(bom).output_as_string()


def _model(dossier: Dossier) -> Component:
    return Component(
        name=dossier.name,
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref=_MODEL,
        version=str(dossier.release),
        description=f"{one_line(dossier.title)}, quantized for ONNX Runtime: {dossier.recipe}",
        licenses=_licences(dossier.source.licence),
        pedigree=Pedigree(
            ancestors=[_ancestor(dossier)],
            notes=f"Exported to ONNX and quantized ({dossier.recipe}); nothing was trained.",
        ),
    )


def _ancestor(dossier: Dossier) -> Component:
    """The checkpoint, with the hash of every file that was taken from it."""
    return Component(
        name=one_line(dossier.title),
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="source",
        version=dossier.source.revision,
        licenses=_licences(dossier.source.licence),
        purl=origin.source(dossier.source),
        components=_files("source", {file.name: file.sha256 for file in dossier.source.files}),
    )


def _runtimes(dossier: Dossier) -> list[Component]:
    versions = {"onnxruntime": dossier.runtime.onnxruntime, "onnxruntime-genai": dossier.runtime.onnxruntime_genai}
    return [
        Component(
            name=name,
            type=ComponentType.LIBRARY,
            bom_ref=f"runtime/{name}",
            version=version,
            scope=ComponentScope.REQUIRED,
            description="Runs the bundle; the lowest version, and not part of it.",
            purl=origin.pypi(name, version),
        )
        for name, version in versions.items()
    ]


def _files(place: str, digests: Mapping[str, str]) -> list[Component]:
    """A component for each file of `place`, from name → SHA-256."""
    return [
        Component(
            name=name,
            type=ComponentType.FILE,
            bom_ref=f"{place}/{name}",
            hashes=[HashType(alg=HashAlgorithm.SHA_256, content=digest)],
        )
        for name, digest in sorted(digests.items())
    ]


def _licences(stated: str) -> list[License]:
    expression = licence.spdx(stated)
    if expression is None:
        return [DisjunctiveLicense(name=one_line(stated) or "unknown")]
    return [DisjunctiveLicense(id=expression)] if is_supported_id(expression) else [LicenseExpression(expression)]


# --- the model card --------------------------------------------------------------------------------------------------


def _model_card(dossier: Dossier) -> dict[str, Any]:
    """A modelCard object of the schema. Whom a model is meant for, and fairness, only its authors can say."""
    properties = {  # what the schema has no field for, in sorted order
        "context": dossier.context,
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
    metric: dict[str, Any] = {
        "type": f"{figure.title} ({figure.unit})",
        "value": number(figure.value),
        "slice": figure.detail,
    }
    bounds = {"lowerBound": figure.low, "upperBound": figure.high}
    if interval := {name: number(bound) for name, bound in bounds.items() if bound is not None}:
        metric["confidenceInterval"] = interval
    return metric
