"""provenance.json: an in-toto Statement v1 with a SLSA v1 provenance predicate, described in docs/provenance.md.

It binds every file of a bundle to the materials it was made from, by SHA-256: checkpoint, data, configuration, code,
packages. No time and no place of the build is in it, so equal materials and files give equal bytes; the bundle's own
signature covers it like any other file. Formats: https://in-toto.io/Statement/v1, https://slsa.dev/provenance/v1.
"""

from __future__ import annotations

import hashlib
import json
import uuid
from collections.abc import Mapping
from typing import Any, TypedDict

from google.protobuf.json_format import MessageToDict, Parse, ParseDict, ParseError
from in_toto_attestation.predicates.provenance.v1.provenance_pb2 import Provenance
from in_toto_attestation.v1.resource_descriptor import ResourceDescriptor
from in_toto_attestation.v1.statement import Statement
from in_toto_attestation.v1.statement_pb2 import Statement as StatementMessage

from pipeline.bundle.dossier import one_line
from pipeline.bundle.release import FileEntry
from pipeline.files import json_bytes

FILE = "provenance.json"
BUILD_TYPE = "urn:phone-model-pipeline:build-type:bundle:1"
BUILDER = "urn:phone-model-pipeline:builder:unisolated:1"  # whoever holds the signing key: SLSA Build L1, no more
_STATEMENT = "https://in-toto.io/Statement/v1"
_PREDICATE = "https://slsa.dev/provenance/v1"


class Material(TypedDict, total=False):
    """Something that decided the bundle's bytes: an in-toto ResourceDescriptor with a name, a URI or both.

    `digest` is by algorithm (`sha256`, or `gitCommit` for a commit); a package that is known by name and version only
    has none. Fields that say nothing are left out of the statement.
    """

    name: str | None
    uri: str | None
    digest: dict[str, str]
    annotations: dict[str, Any]


def build(
    subjects: Mapping[str, FileEntry], external: dict[str, Any], internal: dict[str, Any], materials: list[Material]
) -> bytes:
    """The statement about `subjects`, as UTF-8 JSON. Independent of the order of its arguments' items.

    `external` are the parameters that the user of the pipeline chose, `internal` what else is to be known of the build.
    """
    dependencies = [{key: value for key, value in material.items() if value} for material in materials]
    definition = {
        "buildType": BUILD_TYPE,
        "externalParameters": external,
        "internalParameters": internal,
        "resolvedDependencies": sorted(dependencies, key=_order),
    }
    subject = [{"name": name, "digest": {"sha256": entry.sha256}} for name, entry in sorted(subjects.items())]
    identity = hashlib.sha256(json.dumps([definition, subject], sort_keys=True).encode()).hexdigest()
    invocation = uuid.uuid5(uuid.NAMESPACE_URL, f"{BUILD_TYPE}:{identity}").urn
    details = {"builder": {"id": BUILDER}, "metadata": {"invocationId": invocation}}
    predicate = {"buildDefinition": definition, "runDetails": details}
    statement = {"_type": _STATEMENT, "subject": subject, "predicateType": _PREDICATE, "predicate": predicate}
    return json_bytes(statement)


def _order(dependency: Mapping[str, Any]) -> tuple[str, str]:
    """By name, packages without one last and by URI; equal ones by all that they say."""
    return dependency.get("name", "~"), json.dumps(dependency, sort_keys=True)


def problem_of(raw: bytes) -> str | None:
    """Why `raw` is not a statement of ours, or None.

    The formats' own protocol buffers refuse unknown fields and other types; what SLSA and our build type ask for beyond
    that is checked here.
    """
    try:
        parsed, provenance = _parse(raw)
        Statement.copy_from_pb(parsed).validate()
        for dependency in provenance.build_definition.resolved_dependencies:
            ResourceDescriptor.copy_from_pb(dependency).validate()
    except (ParseError, ValueError, UnicodeDecodeError, RecursionError) as error:
        return f"it is not an in-toto statement with SLSA provenance ({one_line(error)[:200]})"
    definition, builder = provenance.build_definition, provenance.run_details.builder.id
    if parsed.predicate_type != _PREDICATE:
        return f"its predicate is {parsed.predicate_type!a}, not {_PREDICATE}"
    if (definition.build_type, builder) != (BUILD_TYPE, BUILDER):
        return f"its build type is {definition.build_type!a} by {builder!a}, not {BUILD_TYPE} by {BUILDER}"
    if not definition.external_parameters or not definition.resolved_dependencies:
        return "it names no parameters, or no material"
    return None


def read(raw: bytes) -> dict[str, Any]:
    """The statement in the formats' own spelling, without empty fields: for bytes that have no problem."""
    statement, provenance = _parse(raw)
    return MessageToDict(statement) | {"predicate": MessageToDict(provenance)}


def _parse(raw: bytes) -> tuple[StatementMessage, Provenance]:
    statement = Parse(raw, StatementMessage())
    return statement, ParseDict(MessageToDict(statement).get("predicate", {}), Provenance())
