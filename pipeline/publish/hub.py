"""push to a Hugging Face Hub repository: one commit with the whole folder, then a tag that never moves.

    <variant>/content/…, <variant>/model.sig    a bundle as it lies here; tiers/ the same for tiers.json
    README.md                                   a copy of the bundle's own, where the Hub looks for the model's card
    tag <variant>-r<release>                    variants share a repository, so a tag says which one it releases

`huggingface_hub.snapshot_download(repo, revision=tag, allow_patterns="q4/*")` gives a folder that `verify` accepts and
whose content/ onnxruntime-genai loads. The token comes from HF_TOKEN or `hf auth login`, and is never shown.
"""

from __future__ import annotations

import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cached_property
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.bundle.release import CONTENT, SIGNATURE
from pipeline.checkpoint.hub import connect
from pipeline.errors import BundleError
from pipeline.publish.verified import Verified

CARD = "README.md"
TIERS = "tiers"  # stands where a variant's name does
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def _sources(wanted: Verified, place: str) -> dict[str, Path]:
    """Path in the repository → file here."""
    names = [SIGNATURE, *(f"{CONTENT}/{name}" for name in wanted.digests)]
    card = {CARD: wanted.directory / CONTENT / CARD} if CARD in wanted.digests else {}
    return dict(sorted((card | {f"{place}/{name}": wanted.directory / name for name in names}).items()))


class Hub:
    """One model repository, as a `push.Destination`.

    Raises:
        BundleError: `repository` is no owner/name; and, from every method, no such repository or no access.
    """

    def __init__(self, repository: str) -> None:
        if not _REPOSITORY.fullmatch(repository):
            raise BundleError(f"hf://{repository!a} names no repository: expected hf://owner/name.")
        self.api, address = connect()
        self.repository, self.shown = repository, f"{address}/{repository}"

    def releases(self, model: str, variant: str | None) -> list[int]:
        """As `push.Destination` says."""
        pattern = re.compile(rf"{re.escape(variant or TIERS)}-r([0-9]+)")
        return [int(found[1]) for name in self._refs[0] if (found := pattern.fullmatch(name))]

    def signature(self, model: str, variant: str | None, release: int) -> bytes | None:
        """As `push.Destination` says."""
        from huggingface_hub.errors import EntryNotFoundError

        place, tag = variant or TIERS, f"{variant or TIERS}-r{release}"
        if tag not in self._refs[0]:
            return None
        with self._errors(f"reading {tag}"), tempfile.TemporaryDirectory() as folder:
            try:
                file = self.api.hf_hub_download(self.repository, f"{place}/{SIGNATURE}", revision=tag, local_dir=folder)
            except EntryNotFoundError:
                return b""  # somebody else's tag
            return Path(file).read_bytes()

    def publish(self, wanted: Verified) -> str:
        """Commit a verified folder and tag the commit.

        Raises:
            BundleError: the Hub holds other bytes after the commit than were sent.
        """
        place = wanted.variant or TIERS
        tag, (tags, head) = f"{place}-r{wanted.document.release}", self._refs
        if tag in tags:
            return f"{wanted.document.label}: tag {tag} of {self.shown} holds it already"
        sources = _sources(wanted, place)
        # Files of an earlier release that this one does not have: beside it they would make the folder fail.
        stale = sorted(path for path in self._files("main") if path.startswith(f"{place}/") and path not in sources)
        commit = head  # the commit of an earlier run, if it was cut off before the tag
        if stale or self._differing(head, sources):
            commit = self._commit(sources, stale, head, f"{wanted.document.label}, signed")
        if wrong := ", ".join(self._differing(commit, sources)):
            raise BundleError(f"{self.shown}@{commit}: {wrong} is not there as it was sent. It was not tagged.")
        with self._errors("the tag"):
            self.api.create_tag(self.repository, tag=tag, revision=commit)
        return f"{wanted.document.label}: {len(sources)} files in {self.shown}, tag {tag}, commit {commit}"

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        from huggingface_hub import errors

        try:
            yield
        except errors.RepositoryNotFoundError:
            make = f"`hf repo create {self.repository}`, --private if nobody else may see it yet"
            remedy = f"Make it first ({make}), and set HF_TOKEN to a token that may write to it."
            raise BundleError(f"{self.shown} is not there for this account. {remedy}") from None
        except OSError as error:  # requests' and huggingface_hub's are; their texts hold addresses and request ids
            status = getattr(getattr(error, "response", None), "status_code", None)
            answer = f"HTTP {status}" if status else type(error).__name__
            hint = "set HF_TOKEN to a token that may write to it" if status in (401, 403) else "try again"
            raise BundleError(f"{self.shown}: {what} failed ({answer}); {hint}. Files that arrived are kept.") from None
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            reason = f"it does not answer like a Hub ({type(error).__name__})"
            raise BundleError(f"{self.shown}: {what}: {reason}.") from None

    @cached_property
    def _refs(self) -> tuple[list[str], str]:
        """Names of all tags, and the commit that main was at."""
        with self._errors("listing tags"):
            refs = self.api.list_repo_refs(self.repository)
            head = next((branch.target_commit for branch in refs.branches if branch.name == "main"), None)
        if head is None:
            raise BundleError(f"{self.shown} has no branch main.")
        return [tag.name for tag in refs.tags], head

    def _files(self, revision: str) -> dict[str, Any]:
        with self._errors("listing files"):
            info = self.api.repo_info(self.repository, revision=revision, files_metadata=True)
            return {sibling.rfilename: sibling for sibling in info.siblings or []}

    def _differing(self, revision: str, sources: dict[str, Path]) -> list[str]:
        """The paths of `sources` that the Hub does not state with the right hash (SHA-256 in LFS, else git's)."""
        from huggingface_hub.utils.sha import git_hash

        def is_stated(stated: Any, source: Path) -> bool:
            if stated.lfs:
                return stated.lfs.sha256 == files.sha256_of(source)
            # Outside LFS files are small.
            return stated.size == source.stat().st_size and stated.blob_id == git_hash(source.read_bytes())

        there = self._files(revision)
        return [path for path, it in sources.items() if path not in there or not is_stated(there[path], it)]

    def _commit(self, sources: dict[str, Path], stale: list[str], parent: str, message: str) -> str:
        """One commit on top of `parent`; its id. Large files that the Hub holds already are not sent again."""
        from huggingface_hub import CommitOperationAdd, CommitOperationDelete

        operations: list[Any] = [CommitOperationAdd(path, str(source)) for path, source in sources.items()]
        operations += [CommitOperationDelete(path) for path in stale]
        options: dict[str, Any] = {"commit_message": message, "parent_commit": parent, "revision": "main"}
        with self._errors("the commit"):
            return self.api.create_commit(self.repository, operations, **options).oid
