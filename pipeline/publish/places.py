"""Places to publish to and to fetch from: a folder, and an object store, both through fsspec.

Both take whole files only. A file of a folder appears under its name when it is complete; an object store promises that
itself. Credentials come from the environment, as the store's own tools read them, never from an address.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol
from urllib.parse import unquote, urlsplit

from pipeline import files
from pipeline.errors import BundleError


class Interrupted(Exception):
    """A transfer that broke and may be tried again. `response`: the server's answer (urllib3), if there was one."""

    def __init__(self, message: str, response: Any = None) -> None:
        super().__init__(message)
        self.response = response


class Missing(BundleError):
    """The place does not have this file."""


@dataclass(frozen=True)
class Body:
    """A file's bytes from `start` on. `total` is the whole file's size in bytes, None if the server does not say.

    `read(n)` gives at most n bytes, none at the end, and raises `Interrupted` where the transfer breaks.
    """

    start: int
    total: int | None
    read: Callable[[int], bytes]


class Reader(Protocol):
    """What `fetch` reads from. `shown` is its address for messages."""

    shown: str

    def open(self, path: str, start: int) -> Any:
        """A context manager that gives the `Body` of `path` from `start` on, or from an earlier byte.

        Raises:
            Interrupted: it did not answer; it may when asked again.
            BundleError: it never will; `Missing` if it has no such file.
        """


class Place:
    """Behind an fsspec file system whose files appear whole: s3:// with s3fs.

    What the library raises is a BundleError; its messages name addresses and keys' ids, never a secret.
    """

    hint = "Check the bucket's name, AWS_ENDPOINT_URL and the credentials in the environment"

    def __init__(self, filesystem: Any, root: str, shown: str) -> None:
        self.filesystem, self.root, self.shown = filesystem, root.rstrip("/"), shown

    def _key(self, path: str) -> str:
        return f"{self.root}/{path}"

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError:
            raise Missing(f"{self.shown}/{what} is not there.") from None
        except Exception as error:  # botocore's and aiohttp's have no common base
            reason = " ".join(str(error).split())[:200]
            failed = f"{self.shown}: {what} failed ({type(error).__name__}: {reason})"
            raise BundleError(f"{failed}. {self.hint}, then run the same command again.") from None

    def _ask(self, method: str, path: str, missing: Any = None, **options: Any) -> Any:
        """What a method of the file system says of `path`; `missing` if nothing is there."""
        try:
            with self._errors(path):
                return getattr(self.filesystem, method)(self._key(path), **options)
        except Missing:
            return missing

    @contextmanager
    def open(self, path: str, start: int) -> Iterator[Body]:
        """As `Reader.open`."""
        with self._errors(path):
            file = self.filesystem.open(self._key(path), "rb")

        def read(count: int) -> bytes:
            try:
                return file.read(count)
            except Exception as error:
                raise Interrupted(f"{type(error).__name__}") from None

        with file:
            file.seek(start)
            yield Body(start, file.size, read)

    def size(self, path: str) -> int | None:
        """Bytes of `path`; None if there is no such file."""
        return self._ask("info", path, {"size": None})["size"]

    def read(self, path: str) -> bytes | None:
        """All bytes of a small file; None if there is no such file."""
        return self._ask("cat_file", path)

    def children(self, folder: str) -> list[str]:
        """Names of what lies in `folder`; none if there is no such folder."""
        return sorted(name.rstrip("/").rsplit("/", 1)[-1] for name in self._ask("ls", folder, [], detail=False))

    def put(self, source: Path, path: str, sha256: str) -> None:
        """Write `source`, whose bytes have `sha256`, as `path`, which must not be there."""
        try:
            with self._errors(path):
                self.filesystem.put_file(str(source), self._key(path))
        except Missing:  # said of a bucket: the object itself is not expected
            raise BundleError(f"{self.shown}: there is no such bucket. Make it first.") from None
        wanted, found = source.stat().st_size, self.size(path)
        if found != wanted:
            raise BundleError(f"{self.shown}/{path} has {found} bytes after the upload, {source.name} has {wanted:,}.")

    def write(self, path: str, data: bytes) -> None:
        """Write a small file, in place of one that is there."""
        with self._errors(path):
            self.filesystem.pipe_file(self._key(path), data)


class Folder(Place):
    """A folder, on this machine or mounted: what is written is on the disk, whole, and was read back."""

    hint = "Check who may read it"

    def __init__(self, root: Path) -> None:
        from fsspec.implementations.local import LocalFileSystem

        if root.exists() and not root.is_dir():
            raise BundleError(f"{root} is a file, and a place to publish to is a folder.")
        super().__init__(LocalFileSystem(), str(root.absolute()), str(root))

    def put(self, source: Path, path: str, sha256: str) -> None:
        """As `Place.put`."""
        target = Path(self._key(path))
        for left in target.parent.glob(f".{target.name}.*"):  # of a killed run: gigabytes otherwise stay for ever
            left.unlink(missing_ok=True)
        files.require_free_space(Path(self.root), source.stat().st_size, f"publish {source.name}")
        with open(source, "rb") as stream, files.atomic_file(target) as copy:
            digest = files.copy_stream(stream, copy)
            if digest != sha256:
                raise BundleError(f"{source} changed while it was published: sha256 {digest}, signed is {sha256}.")
        if (found := files.sha256_of(target)) != sha256:
            target.unlink()
            raise BundleError(f"{target} reads back with sha256 {found}, written was {sha256}: check that disk.")

    def write(self, path: str, data: bytes) -> None:
        """As `Place.write`."""
        files.write_bytes(Path(self._key(path)), data)


def open_place(address: str) -> Place:
    """The place at a folder's path, a file:// or an s3:// address.

    Raises:
        BundleError: another scheme, a password in the address, or s3fs is not installed.
    """
    parts = urlsplit(address)
    if not parts.scheme:
        return Folder(Path(address))
    if parts.scheme == "file" and parts.netloc in ("", "localhost"):
        return Folder(Path(unquote(parts.path)))
    if parts.scheme == "s3" and parts.netloc:
        if "@" in parts.netloc or ":" in parts.netloc:
            raise BundleError("an s3:// address holds no key and no password: set AWS_PROFILE or other AWS variables.")
        try:
            import s3fs
        except ImportError:
            install = "`pip install -r requirements-s3.txt -c constraints.txt`"
            raise BundleError(f"s3:// needs the package s3fs. Install it with {install}.") from None
        root = f"{parts.netloc}/{parts.path.strip('/')}".rstrip("/")
        return Place(s3fs.S3FileSystem(use_listings_cache=False), root, f"s3://{root}")
    raise BundleError(
        f"{shown(address)} is no place to publish to or to fetch from: name a folder, file:///folder or "
        f"s3://bucket/folder; `fetch` also reads https:// and http://, `push` also writes to a Hub repository, "
        f"hf://owner/name."
    )


def shown(address: str) -> str:
    """The address without user name, password, query and fragment, for messages and logs."""
    parts = urlsplit(address)
    return parts._replace(netloc=parts.netloc.rpartition("@")[2], query="", fragment="").geturl()
