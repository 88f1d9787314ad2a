"""What a bundle says about itself: release.json, or refusal.json in its place, and the folder that holds it.

A signature proves who made the bytes; it says nothing about which release they are or how long they are good for.
These documents say that, and are signed with everything else. Builders and the verifier use the same strict classes,
so a field that one side does not know is an error on the other.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterable, Mapping
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, ClassVar, Literal, TypeVar

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    ValidationError,
    WithJsonSchema,
    model_validator,
)

from pipeline import files as file_tools
from pipeline.checkpoint.untrusted import parse_json
from pipeline.config.phones import Weights
from pipeline.config.recipes import KvCache
from pipeline.config.signing import SigningConfig
from pipeline.config.typed_yaml import Name, Sha256
from pipeline.errors import BundleError
from pipeline.keys.commit import git

CONTENT = "content"
SIGNATURE = "model.sig"
FORMAT = 2  # of the signed documents; raised when a field changes its meaning, appears or goes
SMALL = 16 << 20  # bytes; no signature and no document of ours comes near it
SAFE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,199}")
TELEMETRY = (
    "ONNX Runtime 1.29 and later sends telemetry by default on Linux, macOS, Android and iOS. "
    "Set ORT_DISABLE_TELEMETRY=1 in the environment before the runtime is loaded."
)
# onnxruntime-genai takes a folder with manifest.json for an ORT model package; the others are written by us alone.
_RESERVED = ("manifest.json", "release.json", "refusal.json", "tiers.json", SIGNATURE)
_TIME = "%Y-%m-%dT%H:%M:%SZ"


def parse_time(text: str) -> datetime:
    """Read the one form of RFC 3339 time used here, `2026-01-31T12:00:00Z`; ValueError otherwise."""
    moment = datetime.strptime(text, _TIME).replace(tzinfo=UTC)
    if moment.strftime(_TIME) != text:
        raise ValueError(f"{text!r} is not written as YYYY-MM-DDThh:mm:ssZ")
    return moment


_TIME_SCHEMA = {"type": "string", "format": "date-time", "pattern": r"^\d{4}-\d{2}-\d{2}T\d{2}:\d{2}:\d{2}Z$"}
Time = Annotated[str, AfterValidator(lambda text: parse_time(text).strftime(_TIME)), WithJsonSchema(_TIME_SCHEMA)]
FileName = Annotated[str, Field(pattern=rf"^{SAFE_NAME.pattern}$")]


class Record(BaseModel):
    """Base of everything signed: immutable, unknown fields refused, no conversion of types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True, allow_inf_nan=False)


class KeyIdentity(Record):
    """A signing key: the SHA-256 of its DER SubjectPublicKeyInfo, and whether it may sign a release."""

    id: Sha256
    kind: Literal["development", "release"]


class Runtime(Record):
    """Lowest versions that run the bundle, and the ONNX opset of its graph."""

    onnxruntime: str
    onnxruntime_genai: str
    opset: int = Field(gt=0)


class FileEntry(Record):
    """One file of the content folder. `size` is in bytes."""

    size: int = Field(ge=0)
    sha256: Sha256


class SourceRecord(Record):
    """Where the weights came from: an immutable revision and the hashes of the files taken from it."""

    revision: str
    files: dict[str, Sha256]


class WayRecord(Record):
    """How an app runs a variant on a class of devices.

    `context` and `prefill_chunk` are in tokens; mapped weights are those that the phone has prepacked. `genai` is what
    onnxruntime-genai's Config.overlay takes to make it so.
    """

    context: int = Field(gt=0)
    kv_cache: KvCache
    weights: Weights
    prefill_chunk: int = Field(gt=0)
    threads: int = Field(gt=0)
    genai: dict[str, JsonValue]


class Stamp(Record):
    """What every signed document carries, so that an old, foreign or development one is recognised.

    `release` only ever grows: the app stores the highest number it has accepted of a subject and refuses a lower one.
    `next_key_id` names the key that will follow `key`, so that an app can pin it before it signs anything.
    """

    file_name: ClassVar[str]

    format: Literal[2]
    model: Name
    release: int = Field(ge=1)
    channel: Literal["development", "release"]
    created: Time
    expires: Time
    min_app_version: int = Field(ge=0)
    max_app_version: int | None
    key: KeyIdentity
    next_key_id: Sha256 | None = None

    @model_validator(mode="before")
    @classmethod
    def _is_of_this_format(cls, data: Any) -> Any:
        """Say what an old document is, rather than list the fields that differ."""
        if isinstance(data, dict) and (found := data.get("format", 1)) != FORMAT:
            raise ValueError(f"it is of format {found!a}; this verifier reads {FORMAT}: fetch a release made for it")
        return data

    @property
    def subject(self) -> str:
        """What it is a release of: MODEL/VARIANT, or MODEL for its tiers."""
        return f"{self.model}/{self.variant}" if hasattr(self, "variant") else self.model

    @property
    def label(self) -> str:
        """Such as `demo q4 release 7`, or `demo tiers release 7`."""
        return f"{self.model} {getattr(self, 'variant', 'tiers')} release {self.release}"


class Release(Stamp):
    """release.json: one variant of one model, fit to ship. `context` is in tokens; `files` is all but this file.

    `kv_cache` is the type of the graph's keys and values, which an app without onnxruntime-genai must feed. `tiers`
    names the classes of devices (configs/tiers.yaml) whose memory holds this variant, each with the way.
    """

    file_name: ClassVar[str] = "release.json"

    kind: Literal["release"] = "release"
    title: str
    variant: Name
    runtime: Runtime
    source: SourceRecord
    licence: str
    context: int = Field(gt=0)
    kv_cache: KvCache
    tiers: dict[Name, WayRecord]
    verdict: dict[str, JsonValue]
    files: dict[FileName, FileEntry] = Field(min_length=1)
    telemetry: str


class Refusal(Stamp):
    """refusal.json: why a variant is not shipped, with the figures. It stands where a bundle would."""

    file_name: ClassVar[str] = "refusal.json"

    kind: Literal["refusal"] = "refusal"
    title: str
    variant: Name
    verdict: dict[str, JsonValue]
    reasons: list[str] = Field(min_length=1)


Document = TypeVar("Document", bound=Stamp)
Model = TypeVar("Model", bound=BaseModel)


def problems(error: ValidationError) -> str:
    """Every place that is wrong and how, on one line that quotes no values."""
    found = error.errors(include_input=False, include_url=False)
    return "; ".join(f"{'.'.join(map(str, item['loc'])) or 'the whole'}: {item['msg']}" for item in found)


def parse(kind: type[Model], raw: bytes) -> Model:
    """UTF-8 JSON as `kind`, by its own rules; no object in it has a key twice.

    JSON leaves open what a repeated key means: a verifier that takes the last value and an app that takes the first
    would not see the same document.

    Raises:
        ValueError: not JSON, a repeated key, or not of `kind`; the text is ASCII, names the places, quotes no values.
    """
    try:
        value = kind.model_validate_json(raw)  # first: its parser bounds the nesting
        parse_json(raw, len(raw))
    except ValueError as error:
        reason = problems(error) if isinstance(error, ValidationError) else str(error)
        raise ValueError(reason.encode("ascii", "backslashreplace").decode()) from None
    return value


def build_time() -> datetime:
    """The moment that documents are dated with, in UTC: SOURCE_DATE_EPOCH (seconds) if set, else when the configuration
    in use was committed, the same for every build of a tag, else the clock's.

    Raises BundleError where SOURCE_DATE_EPOCH is not a number of seconds.
    """
    text = os.environ.get("SOURCE_DATE_EPOCH", git("log", "-1", "--format=%ct"))
    try:
        return datetime.fromtimestamp(int(text), UTC) if text else datetime.now(UTC)
    except (ValueError, OverflowError, OSError):
        remedy = "Set it to the output of `git log -1 --format=%ct`, or unset it."
        raise BundleError(f"SOURCE_DATE_EPOCH={text!r} is not a number of seconds since 1970. {remedy}") from None


def make(
    kind: type[Document], *, model: str, signing: SigningConfig, key: KeyIdentity, created: datetime, **fields: Any
) -> Document:
    """A document of `kind` for `model`, signed under `signing` with `key`, with the other `fields` that `kind` has.

    `created` must be the same for every build of the same inputs (see `build_time`).

    Raises:
        BundleError: a field is missing, unknown, of another type, or holds NaN or infinity (which JSON cannot); or
            `created` has no time zone, or the expiry lies beyond the year 9999.
    """
    if created.tzinfo is None:
        raise BundleError(f"model {model}: creation time {created.isoformat()} has no time zone; pass one in UTC.")
    try:
        expires = created.astimezone(UTC) + timedelta(days=signing.expires_days)
        times = {"created": created.astimezone(UTC).strftime(_TIME), "expires": expires.strftime(_TIME)}
        signed = {"model": model, "key": key} | signing.model_dump(include=set(Stamp.model_fields))
        return kind.model_validate(signed | times | fields | {"format": FORMAT})
    except OverflowError:
        late = f"{signing.expires_days} days after {created.isoformat()} is beyond the year 9999"
        raise BundleError(f"model {model}: {late}. Lower expires_days in configs/signing.yaml.") from None
    except ValidationError as error:
        raise BundleError(f"{kind.file_name} of {model} cannot be written: {problems(error)}.") from None


def describe_files(files: Mapping[str, Path]) -> dict[str, FileEntry]:
    """Size and SHA-256 of each file, keyed by its name in the bundle; read in bounded memory.

    Raises:
        BundleError: a file is missing or unreadable.
    """
    entries = {}
    for name, path in sorted(files.items()):
        try:
            entries[name] = FileEntry(size=path.stat().st_size, sha256=file_tools.sha256_of(path))
        except OSError as error:
            what = f"{path}, wanted in the bundle as {name}, cannot be read: {error.strerror}"
            raise BundleError(f"{what}. Run the stage that writes it again.") from None
    return entries


def build_release(**fields: Any) -> Release:
    """release.json for a variant that passed its gates: `make` with the fields of `Release`, except for `telemetry`.

    `source` holds `revision` and `files` (name → SHA-256), `tiers` are those whose memory holds the variant (see
    `planning.devices.ways`), `verdict` is the gates' as plain JSON, without timings.

    Raises:
        BundleError: as `make`.
    """
    return make(Release, telemetry=TELEMETRY, **fields)


def _check_names(names: Iterable[str], content: Path) -> None:
    seen: dict[str, str] = {}
    rule = "Names are letters, digits, '.', '_' and '-', do not start with '.', hold no folder, and are none of"
    for name in names:
        if not SAFE_NAME.fullmatch(name) or name in _RESERVED:
            raise BundleError(f"{content}: {name!r} cannot be a file of a bundle. {rule} {', '.join(_RESERVED)}.")
        if (twin := seen.setdefault(name.casefold(), name)) != name:
            clash = "on a phone whose file system ignores case one would replace the other"
            raise BundleError(f"{content}: {name!r} and {twin!r} differ only in case; {clash}. Rename one.")


def assemble(content: Path, files: Mapping[str, Path], document: Stamp) -> None:
    """Make the folder `content`: hard links of `files` under their bundle names, then the document, written last.

    The folder appears whole or not at all, and replaces an earlier one. A refusal or tiers.json has no `files`.

    Raises:
        BundleError: a name is unsafe, a file is missing or has another size than the document says, or the document
            lists other files than those given.
    """
    _check_names(files, content)
    entries = document.files if isinstance(document, Release) else {}
    if entries.keys() != files.keys():
        different = ", ".join(sorted(entries.keys() ^ files.keys()))
        disagree = f"{content}: {document.file_name} and the files given disagree about {different}"
        raise BundleError(f"{disagree}. Build the document from describe_files() of the same files.")
    with file_tools.atomic_directory(content) as temporary:
        for name, path in sorted(files.items()):
            size = path.stat().st_size if path.is_file() else None
            if size != entries[name].size:
                found = "is missing" if size is None else f"has {size:,} bytes"
                promised = f"{document.file_name} promises {entries[name].size:,} bytes for {name}"
                changed = "It changed while the bundle was made; run the stage again."
                raise BundleError(f"{path} {found}, but {promised}. {changed}")
            file_tools.link_or_copy(path, temporary / name)
        file_tools.write_json(temporary / document.file_name, document.model_dump(mode="json"))
