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
from functools import cache
from typing import TYPE_CHECKING, Any

from pipeline.bundle import licence, origin
from pipeline.bundle.dossier import Dossier, figures, limits, measured_by, number, one_line
from pipeline.errors import BundleError
from pipeline.tasks.task import Figure

if TYPE_CHECKING:
    from cyclonedx.model import HashType
    from cyclonedx.model.component import Component
    from cyclonedx.model.license import License
    from cyclonedx.validation.json import JsonStrictValidator

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
    document["serialNumber"] = uuid.uuid5(_SPACE, _digest(document)).urn
    raw = (json.dumps(document, indent=2, sort_keys=True, ensure_ascii=False) + "\n").encode()
    if problem := problem_of(raw):
        raise BundleError(f"{dossier.name}: {FILE} cannot be written: {problem}.")
    return raw


def problem_of(raw: bytes) -> str | None:
    """Why `raw` is not a valid bill of materials (strict schema of CycloneDX 1.6), or None."""
    try:
        text = raw.decode()
        document = json.loads(text)
        error = _validator().validate_str(text)
    except (ValueError, RecursionError) as failure:
        return f"it is not JSON ({one_line(failure)[:200]})"
    if error:
        path = getattr(error.data, "json_path", "$")
        return f"it is not CycloneDX 1.6 at {path}: {one_line(getattr(error.data, 'message', error.data))[:200]}"
    if document["specVersion"] != "1.6":  # the schema of each version allows the names of all
        return f"it is not CycloneDX 1.6 at $.specVersion: {document['specVersion']!a}"
    return None


@cache
def _validator() -> JsonStrictValidator:
    from cyclonedx.schema import SchemaVersion
    from cyclonedx.validation.json import JsonStrictValidator

    return JsonStrictValidator(SchemaVersion.V1_6)


def _digest(document: Mapping[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True).encode()).hexdigest()


# --- components ------------------------------------------------------------------------------------------------------


def _skeleton(dossier: Dossier) -> str:
    """Everything but the model card, as the library writes it."""
    from cyclonedx.model.bom import Bom, BomMetaData
    from cyclonedx.model.component import Component, ComponentType
    from cyclonedx.model.tool import ToolRepository
    from cyclonedx.output.json import JsonV1Dot6

    tool = Component(name=PIPELINE, type=ComponentType.APPLICATION, bom_ref=PIPELINE, version=dossier.commit)
    model, runtimes = _model(dossier), _runtimes(dossier)
    metadata = BomMetaData(component=model, timestamp=dossier.created, tools=ToolRepository(components=[tool]))
    bom = Bom(components=[*runtimes, *_files(dossier)], metadata=metadata, serial_number=uuid.UUID(int=0))
    bom.register_dependency(model, runtimes)
    return JsonV1Dot6(bom).output_as_string()


def _model(dossier: Dossier) -> Component:
    from cyclonedx.model.component import Component, ComponentType, Pedigree

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
    from cyclonedx.model.component import Component, ComponentType

    files = [
        Component(name=file.name, type=ComponentType.FILE, bom_ref=f"source/{file.name}", hashes=[_sha256(file.sha256)])
        for file in dossier.source.files
    ]
    return Component(
        name=one_line(dossier.title),
        type=ComponentType.MACHINE_LEARNING_MODEL,
        bom_ref="source",
        version=dossier.source.revision,
        licenses=_licences(dossier.source.licence),
        purl=origin.source(dossier.source),
        components=files,
    )


def _runtimes(dossier: Dossier) -> list[Component]:
    from cyclonedx.model.component import Component, ComponentScope, ComponentType

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


def _files(dossier: Dossier) -> list[Component]:
    from cyclonedx.model.component import Component, ComponentType

    return [
        Component(name=name, type=ComponentType.FILE, bom_ref=f"content/{name}", hashes=[_sha256(entry.sha256)])
        for name, entry in sorted(dossier.files.items())
    ]


def _sha256(digest: str) -> HashType:
    from cyclonedx.model import HashAlgorithm, HashType

    return HashType(alg=HashAlgorithm.SHA_256, content=digest)


def _licences(stated: str) -> list[License]:
    from cyclonedx.model.license import DisjunctiveLicense, LicenseExpression
    from cyclonedx.spdx import is_supported_id

    expression = licence.spdx(stated)
    if expression is None:
        return [DisjunctiveLicense(name=one_line(stated) or "unknown")]
    return [DisjunctiveLicense(id=expression)] if is_supported_id(expression) else [LicenseExpression(expression)]


# --- the model card --------------------------------------------------------------------------------------------------


def _model_card(dossier: Dossier) -> dict[str, Any]:
    """A modelCard object of the schema. Whom a model is meant for, and fairness, only its authors can say."""
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
        "properties": [{"name": f"{PIPELINE}:{name}", "value": value} for name, value in _properties(dossier).items()],
    }


def _properties(dossier: Dossier) -> dict[str, str]:
    """What the schema has no field for, by name in sorted order."""
    return {
        "context": str(dossier.context),
        "kv-cache": str(dossier.plan["kv_cache"]["type"]),
        "opset": str(dossier.runtime.opset),
        "parameters": str(dossier.plan["parameters"]),
        "recipe": dossier.recipe,
        "variant": dossier.variant,
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
