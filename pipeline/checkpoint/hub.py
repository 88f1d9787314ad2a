"""Checkpoints and dataset files from the Hugging Face Hub at an immutable revision, each checked against the hash
that the Hub declares: SHA-256 for large (LFS) files, git's blob SHA-1 for small ones.

Settings come from huggingface_hub's own variables: HF_ENDPOINT (another hub), HF_TOKEN (gated and private models),
HF_HUB_OFFLINE, and the usual proxy and certificate variables. The token is never logged or stored.
"""

from __future__ import annotations

import errno
import logging
import os
import re
import shutil
import time
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from difflib import get_close_matches
from functools import partial
from http import HTTPStatus
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from pipeline.checkpoint import complete
from pipeline.checkpoint.blobs import LARGER_STORE, LockedFile, Store, checked_name
from pipeline.config.sources import UNPINNED, HubFile, HubSource
from pipeline.errors import PipelineError, ResourceError, SourceError
from pipeline.files import require_free_space

log = logging.getLogger(__name__)

_ATTEMPTS = 5
_PAUSE_SECONDS = 1.0
_INFO_TIMEOUT_SECONDS = 30.0
_REMEDY = "Run the same command again. If it happens twice, a proxy or mirror changes the file."


def connect() -> tuple[Any, str]:
    """A client for the hub that huggingface_hub's own variables name, and that hub's address for messages."""
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is first imported
    from huggingface_hub import HfApi, constants

    endpoint = (os.environ.get("HF_ENDPOINT") or constants.ENDPOINT).rstrip("/")
    # A mirror's address may carry a password.
    return HfApi(endpoint, library_name="phone-model-pipeline"), re.sub(r"(?<=://)[^/@]+@", "", endpoint)


class _Repository:
    """One repository at one revision. `declared` is what the Hub says about each file: its size in bytes, and either a
    SHA-256 (LFS) or git's blob SHA-1."""

    def __init__(self, source: HubSource, licence_page: str | None, store: Store, key: str) -> None:
        if source.revision == UNPINNED:
            raise SourceError(
                f"hub {source.repo}: no commit is pinned. Write the 40-hex id from https://huggingface.co/{source.repo}/"
                f"commits/main as `revision` into the model's file in configs/models."
            )
        # Read by huggingface_hub when it is first imported. Plain HTTP, because a Xet transfer starts again from zero
        # after an interruption; HF_HUB_DISABLE_XET=0 in the environment brings Xet back.
        os.environ.setdefault("HF_HUB_DISABLE_XET", "1")
        self.api, self.shown = connect()
        self.store, self.key = store, key
        self.kind = "dataset" if isinstance(source, HubFile) else "model"
        self.place: dict[str, Any] = {"repo_id": source.repo, "revision": source.revision, "repo_type": self.kind}
        self.page = f"{self.shown}/{'datasets/' * (self.kind == 'dataset')}{source.repo}"
        self.where = f"hub {source.repo}@{source.revision[:12]}"
        self.licence_page = licence_page or self.page
        self.declared: dict[str, Any] = {}

    @contextmanager
    def _answering(self) -> Iterator[None]:
        """Explain whatever goes wrong while the Hub is asked."""
        try:
            yield
        except (ValueError, TypeError, KeyError, AttributeError) as error:  # ValueError: no JSON, or no usable address
            what = f"{self.shown} does not answer like a Hub ({type(error).__name__})"
            remedy = "Check HF_ENDPOINT, the proxy, and whether a login page is in the way."
            raise SourceError(f"{self.where}: {what}. {remedy}") from error
        except OSError as error:  # every other failure of requests and huggingface_hub
            raise self._explain(error) from error

    def describe(self) -> str:
        """Ask what the Hub declares about each file; return the licence it states."""
        with self._answering():
            info = self.api.repo_info(**self.place, files_metadata=True, timeout=_INFO_TIMEOUT_SECONDS)
            if info.sha != self.place["revision"]:
                answer = f"the Hub answered with revision {_line(info.sha)}"
                raise SourceError(f"{self.where}: {answer}. Pin that, or another.")
            self.declared = {file.rfilename: file for file in info.siblings or []}
            for name, file in self.declared.items():
                hashed = re.fullmatch(r"[0-9a-f]{64}", file.lfs.sha256) if file.lfs else file.blob_id
                if type(file.size) is not int or not hashed:
                    what = f"the Hub declares no usable size or hash for {name}: it cannot be checked"
                    raise SourceError(f"{self.where}: {what}. Check HF_ENDPOINT: a mirror may leave this out.")
            return _licence(info, self.declared)

    def commit(self) -> str:
        """The commit that the revision, a branch or a tag, names now."""
        with self._answering():
            return str(self.api.repo_info(**self.place, timeout=_INFO_TIMEOUT_SECONDS).sha)

    def fetch_headers(self, names: list[str], folder: Path) -> None:
        """Write the declared safetensors files to `folder` as far as their headers, as `complete.write_hollow` does."""
        from huggingface_hub import hf_hub_url
        from huggingface_hub.utils import build_hf_headers, get_session

        def read(name: str, start: int, count: int) -> bytes:
            asked = build_hf_headers() | {"Range": f"bytes={start}-{start + count - 1}", "Accept-Encoding": "identity"}
            address = hf_hub_url(**self.place, filename=name, endpoint=self.api.endpoint)
            with get_session().get(address, headers=asked, stream=True, timeout=_INFO_TIMEOUT_SECONDS) as answer:
                answer.raise_for_status()
                whole = answer.status_code != HTTPStatus.PARTIAL_CONTENT  # a mirror that knows no ranges
                return bytes(answer.raw.read(start + count if whole else count)[start if whole else 0 :])

        with self._answering():
            for name in names:
                complete.write_hollow(folder / name, self.declared[name].size, partial(read, name))

    def fetch(self, names: list[str]) -> list[LockedFile]:
        """The declared files, in the store. Refuses before the first byte if what is still to come does not fit."""
        store, wanted = self.store, [self.declared[name] for name in names]
        missing = sum(file.size for file in wanted if not (file.lfs and store.has(file.lfs.sha256, file.size)))
        folder = store.workspace(self.key)
        waiting = sum(path.stat().st_size for path in folder.rglob("*.incomplete"))  # interrupted: as good as there
        require_free_space(store.root, max(missing - waiting, 0), f"download {self.where}", LARGER_STORE)
        return [self._fetch_file(file, folder) for file in wanted]

    def _fetch_file(self, file: Any, folder: Path) -> LockedFile:
        """An interrupted transfer stays in the workspace; wrong bytes do not."""
        from huggingface_hub.utils.sha import git_hash

        name, sha256 = file.rfilename, file.lfs.sha256 if file.lfs else None
        if sha256 and (present := self.store.find(name, sha256)):
            return present
        path = self._download(name, folder)
        try:
            complete.check_file(path, name, self.where)
            if not sha256 and (digest := git_hash(path.read_bytes())) != file.blob_id:
                got = f"wrong bytes. Expected git blob {file.blob_id}, got {digest}. Nothing was kept"
                raise SourceError(f"{self.where}: {name}: {got}. {_REMEDY}")
            return self.store.adopt(path, name, sha256)
        except SourceError:
            path.unlink(missing_ok=True)
            raise

    def _download(self, name: str, folder: Path, attempt: int = 1) -> Path:
        """Download one file into `folder`, resuming what an earlier attempt or run left there."""
        from requests.exceptions import ChunkedEncodingError

        try:
            return Path(self.api.hf_hub_download(**self.place, filename=name, local_dir=folder))
        except ChunkedEncodingError as error:  # the one interruption that huggingface_hub does not resume itself
            if attempt == _ATTEMPTS:
                raise self._explain(error, name) from error
        except (OSError, ValueError, RuntimeError) as error:  # also a refused name, and what fails inside Xet
            raise self._refused(error, name, folder) from error
        log.warning("%s: the transfer of %s was interrupted; resuming", self.where, name)
        time.sleep(_PAUSE_SECONDS * attempt)
        return self._download(name, folder, attempt + 1)

    def _refused(self, error: Exception, name: str, folder: Path) -> PipelineError:
        """Explain a failed transfer; remove what it left if resuming from that could never succeed."""
        wrong_size = type(error) is OSError and error.errno is None  # huggingface_hub's check of the final length
        if not wrong_size and _status(error) != 416:  # 416: what is left is longer than the real file
            return self._explain(error, name)
        left = max(folder.rglob("*.incomplete"), key=lambda path: path.stat().st_mtime_ns, default=None)
        size = left.stat().st_size if left else 0
        try:
            if left:
                complete.refuse_pointer(left, name, self.where)
        finally:
            shutil.rmtree(folder, ignore_errors=True)
        what = f"{name} is truncated or changed: {size:,} bytes arrived, not what the Hub declares. They were removed"
        return SourceError(f"{self.where}: {what}. {_REMEDY}")

    def _explain(self, error: BaseException, name: str | None = None) -> PipelineError:
        """The error a user can act on, for whatever huggingface_hub or requests raised."""
        from huggingface_hub import errors, get_token
        from requests.exceptions import RequestException

        if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
            error = error.__cause__  # a wrapper around the real reason
        what, status = f"{self.where}: {name}" if name else self.where, _status(error)
        if getattr(error, "errno", None) in (errno.ENOSPC, errno.EDQUOT):
            return ResourceError(f"{what}: the disk filled up. Free space and run again; finished files are kept.")
        if isinstance(error, errors.GatedRepoError) or status in (401, 403):
            why = f"The {self.kind} is gated or private"
            how = "make a read token in that account's settings, and set the environment variable HF_TOKEN to it"
            if get_token():
                why = "The token in use has no access"
                how = "with the token's account, or set HF_TOKEN to another one that may read it"
            way = f"accept its licence at {self.licence_page}, {how}"
            return SourceError(f"{what}: access refused (HTTP {status}). {why}: {way}.")
        meanings = {  # the first that fits
            errors.RevisionNotFoundError: f"no such revision. Take a commit id from {self.page}.",
            errors.RepositoryNotFoundError: (
                f"no such repository at {self.shown}. Check its name; a private one needs HF_TOKEN."
            ),
            errors.EntryNotFoundError: "the Hub lists this file but does not serve it. Try later or another revision.",
            errors.HfHubHTTPError: f"{self.shown} answered HTTP {status}. Try again later; finished files are kept.",
            errors.OfflineModeIsEnabled: "HF_HUB_OFFLINE is set and the store does not hold it. Unset it to download.",
            RequestException: (
                f"{self.shown} cannot be reached or the connection broke ({type(error).__name__}). Check network, "
                f"proxy and HF_ENDPOINT, then run the same command again: it resumes where it stopped."
            ),
            BaseException: f"the transfer failed: {_line(error)}",
        }
        return SourceError(f"{what}: {next(text for kind, text in meanings.items() if isinstance(error, kind))}")


def fetch_hub(
    source: HubSource, licence_page: str | None, store: Store, key: str, admit: Callable[[Path], object] | None = None
) -> tuple[str, str, list[LockedFile]]:
    """Bring the needed files of a Hub repository into the store; return its revision, the licence that its card states,
    and the files. Of a `HubFile`, a dataset repository, that is one file.

    Files that the store already holds are not transferred again, and an interrupted one is resumed; `key` names the
    workspace where it waits. `admit` is shown a folder of the small files and the weights' headers before weights move.

    Raises:
        SourceError: offline, gated, no such repository, revision or file (naming the nearest), an incomplete or
            pickle-only checkpoint, or bytes that are not those the Hub declares (then they are deleted).
        ResourceError: the disk is too small, known before any weights move.
    """
    member = checked_name(source.member) if isinstance(source, HubFile) else None
    repository = _Repository(source, licence_page, store, key)
    licence, where, names = repository.describe(), repository.where, repository.declared.keys()
    if member is not None:
        if member not in names:
            near = get_close_matches(member, names, n=3, cutoff=0.3)
            raise SourceError(f"{where}: no file {member!r}. Nearest: {', '.join(near) or 'none'}.")
        return source.revision, licence, repository.fetch([member])
    files = repository.fetch(complete.small_files(names, where))
    index = next((store.path(file.sha256).read_bytes() for file in files if file.name == complete.INDEX), None)
    shards = complete.shard_names(names, index, where)
    if admit:
        with TemporaryDirectory(dir=store.workspace(key)) as folder:
            store.link(files, Path(folder))
            repository.fetch_headers(shards, Path(folder))
            complete.admit_shown(admit, Path(folder), where)
    return source.revision, licence, files + repository.fetch(shards)


def resolve(repo: str, revision: str | None, store: Store) -> HubSource:
    """A repository at the commit that a branch or tag names now; of its main branch without one.

    Raises SourceError as `fetch_hub`.
    """
    branch = HubSource.model_construct(kind="hub", repo=repo, revision=revision or "main")
    return HubSource(kind="hub", repo=repo, revision=_Repository(branch, None, store, "").commit())


def _licence(info: Any, names: Collection[str]) -> str:
    """The licence in the repository's card or tags, else the name of its licence file, else "unknown"."""
    card = info.card_data or {}
    stated = card.get("license")
    if stated == "other":
        detail = " ".join(str(card.get(key)) for key in ("license_name", "license_link") if card.get(key))
        stated = f"other ({detail})" if detail else stated
    tags = [tag.removeprefix("license:") for tag in info.tags or [] if tag.startswith("license:")]
    return _line(stated or next(iter(tags), complete.licence(names)))


def _status(error: BaseException) -> int | None:
    """HTTP status code behind an exception, if a response caused it."""
    return getattr(getattr(error, "response", None), "status_code", None)


def _line(value: object) -> str:
    """`value` as one line of at most 300 characters."""
    return " ".join(str(value).split())[:300]
