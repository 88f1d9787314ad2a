"""push to a Hugging Face Hub repository: one commit with the whole folder, then a tag that never moves.

    <variant>/content/…, <variant>/model.sig    a bundle as it lies here; tiers/ the same for tiers.json
    README.md                                   a copy of the bundle's own, where the Hub looks for the model's card
    tag <variant>-r<release>                    variants share a repository, so a tag says which one it releases

`huggingface_hub.snapshot_download(repo, revision=tag, allow_patterns="q4/*")` gives a folder that `verify` accepts and
whose content/ onnxruntime-genai loads. The token comes from HF_TOKEN or `hf auth login`, and is never shown.
"""

from __future__ import annotations

import hashlib
import os
import re
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from pipeline import files
from pipeline.bundle.release import CONTENT, SIGNATURE, Release
from pipeline.bundle.tiers import TiersDocument
from pipeline.errors import BundleError
from pipeline.publish.places import shown
from pipeline.publish.push import Verified, require_bundle, require_next

CARD = "README.md"
_REPOSITORY = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", re.ASCII)


def push_to_hub(verified: Verified, repository: str) -> str:
    """Commit a verified folder to `owner/name` and tag the commit; says what it did.

    Raises:
        BundleError: no such repository or no access, a release that may not follow what is published, or the Hub holds
            other bytes after the commit than were sent.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise BundleError(f"hf://{repository!a} names no repository: expected hf://owner/name.")
    hub = _Hub(repository)
    place = verified.document.variant if isinstance(verified.document, Release) else "tiers"
    tag = f"{place}-r{verified.document.release}"
    sources = _sources(verified, place)
    tags, head = hub.refs()
    published = [int(found[1]) for name in tags if (found := re.fullmatch(rf"{re.escape(place)}-r([0-9]+)", name))]
    same = None
    if tag in tags:
        path = f"{place}/{SIGNATURE}"
        same = hub.differs(tag, {path: sources[path]}) == []
    require_next(verified, published, same)
    if isinstance(verified.document, TiersDocument):
        hub.require_bundles(verified.document, tags)
    if same:
        return f"{verified.title}: tag {tag} of {hub.shown} holds it already"
    stale, commit = hub.stale(place, sources), head
    if stale or hub.differs(head, sources):  # else an earlier run made the commit, and was cut off before the tag
        commit = hub.commit(sources, stale, head, f"{verified.title}, signed")
    if wrong := hub.differs(commit, sources):
        raise BundleError(f"{hub.shown}@{commit}: {', '.join(wrong)} is not there as it was sent. It was not tagged.")
    hub.tag(tag, commit)
    return f"{verified.title}: {len(sources)} files in {hub.shown}, tag {tag}, commit {commit}"


def _sources(verified: Verified, place: str) -> dict[str, Path]:
    """Path in the repository → file here."""
    content = verified.directory / CONTENT
    sources = {f"{place}/{CONTENT}/{name}": content / name for name in verified.digests}
    sources[f"{place}/{SIGNATURE}"] = verified.directory / SIGNATURE
    if CARD in verified.digests:
        sources[CARD] = content / CARD
    return dict(sorted(sources.items()))


def _git_sha1(path: Path) -> str:
    """git's name for a file's bytes, which is what the Hub states for a file outside LFS; such files are small."""
    data = path.read_bytes()
    return hashlib.sha1(b"blob %d\0" % len(data) + data, usedforsecurity=False).hexdigest()


class _Hub:
    """One model repository: the only place here that talks to huggingface_hub."""

    def __init__(self, repository: str) -> None:
        os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")  # read when huggingface_hub is first imported
        import huggingface_hub
        from huggingface_hub.constants import ENDPOINT

        endpoint = (os.environ.get("HF_ENDPOINT") or ENDPOINT).rstrip("/")
        self.hub, self.repository, self.shown = huggingface_hub, repository, f"{shown(endpoint)}/{repository}"
        self.api = huggingface_hub.HfApi(endpoint=endpoint, library_name="phone-model-pipeline")

    @contextmanager
    def _errors(self, what: str) -> Iterator[None]:
        from huggingface_hub import errors

        try:
            yield
        except errors.RepositoryNotFoundError:
            raise BundleError(
                f"{self.shown} is not there for this account. Make it first (`hf repo create {self.repository}`, "
                f"--private if nobody else may see it yet), and set HF_TOKEN to a token that may write to it."
            ) from None
        except OSError as error:  # requests' and huggingface_hub's are; their texts hold addresses and request ids
            status = getattr(getattr(error, "response", None), "status_code", None)
            answer = f"HTTP {status}" if status else type(error).__name__
            hint = "set HF_TOKEN to a token that may write to it" if status in (401, 403) else "try again"
            raise BundleError(f"{self.shown}: {what} failed ({answer}); {hint}. Files that arrived are kept.") from None
        except (ValueError, KeyError, TypeError, RuntimeError) as error:
            raise BundleError(
                f"{self.shown}: {what}: it does not answer like a Hub ({type(error).__name__})."
            ) from None

    def refs(self) -> tuple[list[str], str]:
        """Names of all tags, and the commit that main is at."""
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

    def differs(self, revision: str, sources: dict[str, Path]) -> list[str]:
        """The paths of `sources` that the Hub does not state with the right hash (SHA-256 in LFS, else git's)."""
        there, wrong = self._files(revision), []
        for path, source in sources.items():
            found = there.get(path)
            if found is not None and found.lfs:
                right = found.lfs.sha256 == files.sha256_of(source)
            else:
                right = found is not None and found.size == source.stat().st_size and found.blob_id == _git_sha1(source)
            if not right:
                wrong.append(path)
        return wrong

    def require_bundles(self, document: TiersDocument, tags: list[str]) -> None:
        """Refuse tiers that pin a bundle which is not published here, or not with that signature."""
        for variant, reference in sorted(document.bundles.items()):
            tag = f"{variant}-r{reference.release}"
            there = None
            if tag in tags:
                with self._errors(f"reading {tag}"), tempfile.TemporaryDirectory() as folder:
                    path = f"{variant}/{SIGNATURE}"
                    there = Path(
                        self.api.hf_hub_download(self.repository, path, revision=tag, local_dir=folder)
                    ).read_bytes()
            require_bundle(document, variant, there, self.shown)

    def stale(self, place: str, sources: dict[str, Path]) -> list[str]:
        """Files of an earlier release that this one does not have: beside it they would make the folder fail."""
        return sorted(path for path in self._files("main") if path.startswith(f"{place}/") and path not in sources)

    def commit(self, sources: dict[str, Path], stale: list[str], parent: str, message: str) -> str:
        """One commit on top of `parent`; its id. Large files that the Hub holds already are not sent again."""
        operations = [self.hub.CommitOperationAdd(path, str(source)) for path, source in sources.items()]
        operations += [self.hub.CommitOperationDelete(path) for path in stale]
        with self._errors("the commit"):
            made = self.api.create_commit(
                self.repository, operations, commit_message=message, parent_commit=parent, revision="main"
            )
            return made.oid

    def tag(self, name: str, commit: str) -> None:
        """Tag a commit."""
        with self._errors("the tag"):
            self.api.create_tag(self.repository, tag=name, revision=commit)
