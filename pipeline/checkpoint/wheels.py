"""One file out of a wheel that is pinned by SHA-256. The wheel is never installed or imported.

pip does the transfer, because it already honours the user's own index, proxy, certificates and credentials.
"""

from __future__ import annotations

import email.parser
import re
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from pathlib import Path, PurePosixPath
from typing import IO

from pipeline.checkpoint.blobs import LARGER_STORE, LockedFile, Store
from pipeline.config.sources import WheelSource
from pipeline.errors import SourceError
from pipeline.files import require_free_space

_OFFLINE = re.compile(
    r"Retrying \(|Could not fetch URL|ConnectionError|NameResolutionError|ProxyError|SSLError|timed out"
)
_CREDENTIALS = re.compile(r"(?<=://)[^/@\s]+@")
_LICENCE_FILE = re.compile(r"^[^/]+\.dist-info/(?:licenses/)?(LICEN[CS]E[^/]*)$", re.IGNORECASE)


def fetch_wheel(source: WheelSource, store: Store) -> Path:
    """Path of the wheel's bytes in the store, downloaded with pip on first use.

    Raises:
        SourceError: offline, no such package or version, or other bytes than the pinned ones.
    """
    key = f"wheel-{source.sha256}"
    with store.exclusive(key):
        if not store.find(label(source), source.sha256):
            try:
                store.clear(key)  # pip cannot resume what an interrupted run left here
                pinned = f"{source.package}=={source.version} --hash=sha256:{source.sha256}\n"
                wheel = _download(source, store.workspace(key), pinned)
                store.adopt(wheel, wheel.name, source.sha256)
            finally:
                store.clear(key)
    return store.path(source.sha256)


def resolve(package: str, version: str, store: Store) -> WheelSource:
    """The one .gguf file of a wheel, pinned by the bytes that the index serves now.

    Raises SourceError as `fetch_wheel`, and for a wheel without such a file, or with several.
    """
    source = WheelSource(kind="pypi", package=package, version=version, sha256="0" * 64, member="")
    key = f"wheel-{package}-{version}"
    with store.exclusive(key):
        try:
            store.clear(key)
            path = _download(source, store.workspace(key), f"{package}=={version}\n")
            with _archive(path, source) as archive:
                found = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(found) != 1:
                what = f"{len(found)} .gguf files, and a model is one: {', '.join(found) or 'none'}"
                raise SourceError(f"{label(source)}: {what}. Write the entry by hand, with `member`.")
            adopted = store.adopt(path, path.name)
        finally:
            store.clear(key)
    return source.model_copy(update={"sha256": adopted.sha256, "member": found[0]})


def label(source: WheelSource) -> str:
    """The source in a message."""
    return f"wheel {source.package}=={source.version}"


def revision(source: WheelSource) -> str:
    """The source in a lock file."""
    return f"{source.package}=={source.version} sha256:{source.sha256}"


def _download(source: WheelSource, folder: Path, requirement: str) -> Path:
    requirements = folder / "requirements.txt"
    requirements.write_text(requirement)
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary=:all:"]
    command += ["--no-input", "--disable-pip-version-check", "--dest", str(folder), "--requirement", str(requirements)]
    # pip's progress goes to our standard error (descriptor 2): standard output belongs to the command's own answer.
    done = subprocess.run(command, stdout=2, stderr=subprocess.PIPE, text=True, errors="replace", check=False)
    if done.returncode != 0:
        raise SourceError(f"{label(source)}: {_explain_pip(done.stderr)}")
    wheels = sorted(folder.glob("*.whl"))
    if len(wheels) != 1:
        raise SourceError(f"{label(source)}: pip reported success but left {len(wheels)} wheels. Run it again.")
    return wheels[0]


def _explain_pip(stderr: str) -> str:
    """One clear sentence for pip's many lines."""
    if "No module named pip" in stderr:
        return f"this Python has no pip ({sys.executable}). Install it with `python -m ensurepip`."
    if "DO NOT MATCH THE HASHES" in stderr:
        got = re.search(r"Got\s+([0-9a-f]{64})", stderr)
        what = f"the index serves other bytes than the pinned ones (got sha256 {got[1] if got else 'unknown'})"
        return f"{what}. Nothing was kept. Do not change the pin before you know why the file changed."
    versions = re.search(r"\(from versions: ([^)]*)\)", stderr)
    if _OFFLINE.search(stderr) and (versions is None or versions[1] == "none"):
        settings = "pip's settings (`python -m pip config list`: index, proxy, certificates)"
        return f"the package index cannot be reached. Check the network and {settings}, then run the command again."
    if versions is not None:
        there = f"versions there: {versions[1]}" if versions[1] != "none" else "it shows no version at all"
        remedy = "Check package and version in the configuration, and pip's index in `python -m pip config list`."
        return f"the package index has no such wheel for this Python and machine ({there}). {remedy}"
    errors = [line.removeprefix("ERROR:").strip() for line in stderr.splitlines() if line.startswith("ERROR:")]
    return "pip failed: " + (_CREDENTIALS.sub("", " ".join(errors or stderr.split()[-40:])) or "without saying why")


@contextmanager
def _archive(wheel: Path, source: WheelSource) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(wheel) as archive:
            yield archive
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, EOFError) as error:
        raise SourceError(f"{label(source)}: the archive cannot be read ({type(error).__name__}: {error}).") from error


@contextmanager
def open_member(wheel: Path, source: WheelSource) -> Iterator[IO[bytes]]:
    """The member's decompressed bytes as a stream. Nothing in the archive chooses a path on disk.

    Raises:
        SourceError: no such member (naming the nearest), or a damaged archive, also while reading.
    """
    with _archive(wheel, source) as archive:
        names = archive.namelist()
        if source.member not in names:
            near = get_close_matches(source.member, names, n=3, cutoff=0.3)
            raise SourceError(f"{label(source)}: no member {source.member!r}. Nearest: {', '.join(near) or 'none'}.")
        require_free_space(
            wheel.parent, archive.getinfo(source.member).file_size, f"unpack {source.member}", LARGER_STORE
        )
        with archive.open(source.member) as stream:
            yield stream


def licence(wheel: Path, source: WheelSource) -> str:
    """The licence that the wheel states: expression, field, classifiers or its licence file's title; else "unknown"."""
    with _archive(wheel, source) as archive:
        metadata = [name for name in archive.namelist() if re.fullmatch(r"[^/]+\.dist-info/METADATA", name)]
        if metadata and (stated := _stated_licence(archive.read(metadata[0]))):
            return stated
        for name in filter(_LICENCE_FILE.match, archive.namelist()):
            lines = [line.strip() for line in archive.read(name).decode("utf-8", "replace").splitlines()]
            return next((f"{PurePosixPath(name).name}: {line[:80]}" for line in lines if line), "unknown")
    return "unknown"


def _stated_licence(metadata: bytes) -> str | None:
    fields = email.parser.BytesParser().parsebytes(metadata, headersonly=True)
    for key in ("License-Expression", "License"):
        value = str(fields.get(key, "")).strip()
        if value and value.upper() != "UNKNOWN" and "\n" not in value and len(value) <= 80:
            return value
    classifiers = [str(value).strip() for value in fields.get_all("Classifier", [])]
    licences = [value.split("::")[-1].strip() for value in classifiers if value.startswith("License ::")]
    return "; ".join(licences) or None


def store_licence_files(wheel: Path, source: WheelSource, store: Store) -> list[LockedFile]:
    """Put the wheel's own licence texts into the store: weights may be passed on only together with them."""
    files = []
    with _archive(wheel, source) as archive:
        for name in filter(_LICENCE_FILE.match, sorted(archive.namelist())):
            with archive.open(name) as stream:
                files.append(store.add(stream, PurePosixPath(name).name))
    return files
