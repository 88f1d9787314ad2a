"""push to a Hub repository with the real huggingface_hub, over commits, LFS uploads and tags on loopback."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import huggingface_hub
import pytest

from pipeline.bundle.verify import verify
from pipeline.errors import BundleError
from pipeline.publish.push import push
from tests.publish.conftest import NOW, PARTS, SMALL, Line
from tests.publish.writable_hub import REPO, TOKEN, Hub, serve


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """An empty repository, and an account that may write to it."""
    with serve() as served:
        monkeypatch.setenv("HF_ENDPOINT", served.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield served


@pytest.fixture
def send(hub: Hub, public_key: Path) -> Callable[..., str]:
    """Push to the repository."""
    return lambda bundle, repository=REPO: push(bundle, f"hf://{repository}", public_key, now=NOW)


def paths(bundle: Path, place: str) -> dict[str, bytes]:
    """What a bundle looks like in a repository."""
    files = (file for file in bundle.rglob("*") if file.is_file())
    return {f"{place}/{file.relative_to(bundle)}": file.read_bytes() for file in files}


def test_one_commit_holds_the_bundle_and_a_tag_names_it(hub: Hub, send: Callable[..., str], line: Line) -> None:
    bundle = line.bundle()
    said = send(bundle)
    assert len(hub.commits) == 2 and hub.tags == {"q4-r7": hub.head}
    files = dict(hub.commits[hub.head])
    del files[".gitattributes"]
    assert files.pop("README.md") == SMALL["README.md"]
    assert files == paths(bundle, "q4")
    assert set(hub.lfs.values()) == set(PARTS.values())
    assert "tag q4-r7" in said and hub.head in said


def test_what_the_hub_gives_back_verifies(
    hub: Hub, send: Callable[..., str], line: Line, tmp_path: Path, public_key: Path
) -> None:
    send(line.bundle())
    send(line.bundle(variant="q3"))
    got = huggingface_hub.snapshot_download(
        REPO, revision="q4-r7", allow_patterns="q4/*", local_dir=tmp_path / "got", endpoint=hub.url
    )
    report = verify(Path(got) / "q4", public_key, now=NOW, model="demo", variant="q4")
    assert report.ok, report.describe()


def test_a_published_release_is_left_alone(hub: Hub, send: Callable[..., str], line: Line) -> None:
    bundle = line.bundle()
    send(bundle)
    assert "holds it already" in send(bundle)
    assert len(hub.commits) == 2
    with pytest.raises(BundleError, match="published with another signature"):
        send(line.bundle(part_1=b"other"))
    send(line.bundle(9))
    with pytest.raises(BundleError, match="older than what is published, release 9"):
        send(line.bundle(8))
    assert sorted(hub.tags) == ["q4-r7", "q4-r9"]


def test_the_next_release_sends_what_changed_and_removes_what_is_gone(
    hub: Hub, send: Callable[..., str], line: Line
) -> None:
    send(line.bundle())
    send(line.bundle(variant="q3"))
    hub.requests.clear()
    following = line.bundle(8, part_1=b"x" * 20_000, part_2=None)
    send(following)
    files = hub.commits[hub.head]
    assert {name: data for name, data in files.items() if name.startswith("q4/")} == paths(following, "q4")
    assert any(name.startswith("q3/") for name in files)
    assert len([path for method, path in hub.requests if method == "PUT"]) == 1


def test_a_push_that_was_cut_off_before_the_tag_goes_on(hub: Hub, send: Callable[..., str], line: Line) -> None:
    bundle = line.bundle()
    hub.status = ("/tag/", 500)
    with pytest.raises(BundleError, match=r"the tag failed \(HTTP 500\); try again"):
        send(bundle)
    assert hub.tags == {}
    hub.status = None
    send(bundle)
    assert hub.tags == {"q4-r7": hub.head} and len(hub.commits) == 2


def test_a_commit_that_lost_a_file_is_not_tagged(hub: Hub, send: Callable[..., str], line: Line) -> None:
    hub.loses = "q4/content/demo_q4.onnx.data.1"
    with pytest.raises(BundleError, match=r"data\.1 is not there as it was sent. It was not tagged"):
        send(line.bundle())
    assert hub.tags == {}


def test_tiers_have_a_folder_of_their_own(hub: Hub, send: Callable[..., str], line: Line) -> None:
    bundle = line.bundle()
    tiers = line.tiers(bundle)
    with pytest.raises(BundleError, match="names q4 release 7, which is not published"):
        send(tiers)
    send(bundle)
    with pytest.raises(BundleError, match="is published with another signature"):
        send(line.tiers(line.bundle(part_1=b"other")))
    send(tiers)
    assert hub.tags["tiers-r7"] == hub.head
    assert paths(tiers, "tiers").items() <= hub.commits[hub.head].items()


@pytest.mark.parametrize(
    ("repository", "message"),
    [
        ("acme/absent", "Make it first"),
        ("acme", "names no repository"),
        ("acme/../x", "names no repository"),
        ("a/b?token=x", "names no repository"),
    ],
)
def test_repositories_that_are_none(repository: str, message: str, send: Callable[..., str], line: Line) -> None:
    with pytest.raises(BundleError, match=message):
        send(line.bundle(), repository)


def test_no_access_is_said_without_the_token(
    hub: Hub, send: Callable[..., str], line: Line, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_wrong_secret")
    with pytest.raises(BundleError, match="set HF_TOKEN to a token that may write") as refused:
        send(line.bundle())
    assert "secret" not in str(refused.value) and len(hub.commits) == 1
