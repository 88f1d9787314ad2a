"""A phone gets its bundle through every store that misbehaves, and never anything else."""

from __future__ import annotations

import hashlib
import json
import os
import random
import shutil
from collections import namedtuple
from collections.abc import Iterator
from dataclasses import replace
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest
import requests
from click.testing import CliRunner

from pipeline import cli
from pipeline.bundle.verify import verify
from pipeline.errors import BundleError, ResourceError
from pipeline.publish.fetch import Fetched, fetch
from pipeline.publish.http import _Session
from pipeline.publish.push import push
from tests.bundle.conftest import Maker
from tests.publish.conftest import NOW, PARTS, SMALL, Line
from tests.publish.web import Web, serve

TOTAL = sum(map(len, (PARTS | SMALL).values()))


@pytest.fixture
def web(store: Path) -> Iterator[Web]:
    """The store behind a web server."""
    with serve(store) as served:
        yield served


@pytest.fixture
def target(tmp_path: Path) -> Path:
    """Where the bundle goes."""
    (tmp_path / "app").mkdir()
    return tmp_path / "app" / "bundle"


@pytest.fixture
def get(web: Web, target: Path, public_key: Path) -> Any:
    """Fetch demo's q4 from the web server into `target`."""

    def run(address: str | None = None, **options: Any) -> Fetched:
        chosen = {} if "tier" in options else {"variant": "q4"}
        return fetch(address or web.url, "demo", target, public_key, **(chosen | {"now": NOW} | options))

    return run


def blob_of(store: Path, part: int) -> str:
    """Path in the store of a part of release 7."""
    data = PARTS[f"demo_q4.onnx.data.{part}"]
    return next(f"blobs/sha256/{path.name}" for path in store.glob("blobs/sha256/*") if path.read_bytes() == data)


def assert_installed(target: Path, public_key: Path) -> None:
    report = verify(target, public_key, now=NOW, model="demo", variant="q4")
    assert report.ok, report.describe()
    assert {name: (target / "content" / name).read_bytes() for name in PARTS} == PARTS
    assert sorted(path.name for path in target.parent.glob("[!.]*")) == ["bundle", "releases.json"]


# --- stores that misbehave -------------------------------------------------------------------------------------------


def test_a_bundle_is_installed_and_its_release_recorded(get: Any, target: Path, public_key: Path) -> None:
    fetched = get()
    assert_installed(target, public_key)
    assert (fetched.downloaded, fetched.reused) == (TOTAL, 0)
    assert json.loads((target.parent / "releases.json").read_text())["releases"] == {"demo/q4": 7}


@pytest.mark.parametrize("form", ["{}", "file://{}"])
def test_a_folder_is_a_store_too(form: str, get: Any, store: Path, target: Path, public_key: Path) -> None:
    get(form.format(store))
    assert_installed(target, public_key)


def test_a_store_that_breaks_every_connection_is_resumed(web: Web, get: Any, target: Path, public_key: Path) -> None:
    web.cut = lambda: random.Random(len(web.requests)).randrange(1, 3000)
    get()
    assert_installed(target, public_key)
    assert len(web.requests) > 60
    assert (
        sum(request.sent for request in web.to("blobs/")) <= TOTAL + 20_000
    )  # nothing was fetched from its start again


def test_busy_answers_are_waited_out(web: Web, get: Any, target: Path, public_key: Path) -> None:
    web.statuses = [500, 429, 503, 502, 504, 429]
    get()
    assert_installed(target, public_key)


def test_a_server_cannot_make_us_wait_for_ever(web: Web, get: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    waited: list[float] = []
    monkeypatch.setattr("urllib3.util.retry.time.sleep", waited.append)
    web.statuses, web.headers = [503], {"Retry-After": "86400"}
    get()
    assert waited == [60]


def test_a_copy_that_is_too_short_is_refused(web: Web, get: Any, store: Path, target: Path) -> None:
    os.truncate(store / blob_of(store, 1), 10_000)
    with pytest.raises(BundleError, match=r"ends before byte 10,000: its copy is shorter than"):
        get()
    assert not target.exists()


def test_a_store_without_range_is_read_past_what_is_here(web: Web, get: Any, target: Path, public_key: Path) -> None:
    web.ranges = False
    web.cut = lambda: 500 * len(web.requests)
    get()
    assert_installed(target, public_key)


def test_a_store_that_never_gets_further_is_given_up(web: Web, get: Any, target: Path) -> None:
    web.ranges = False
    web.cut = lambda: 20_000
    with pytest.raises(BundleError, match=r"8 attempts in a row brought nothing beyond byte 20,000"):
        get()
    assert not target.exists()


def test_a_store_that_is_down_is_given_up(web: Web, get: Any) -> None:
    web.statuses = [503] * 100
    with pytest.raises(BundleError, match="the last: HTTP 503"):
        get()
    assert len(web.requests) == 8


def test_no_server_at_all(web: Web, get: Any) -> None:
    with pytest.raises(BundleError, match="the last: ConnectionError"):
        get("http://127.0.0.1:9")


def test_wrong_bytes_are_refused_by_name_and_not_kept(web: Web, get: Any, store: Path, target: Path) -> None:
    web.corrupt = {blob_of(store, 1)}
    with pytest.raises(BundleError, match=r"demo_q4\.onnx\.data\.1: wrong bytes from http.*\(30,001 bytes\), got"):
        get()
    assert not target.exists()
    bad = Path(blob_of(store, 1)).name
    assert not list(target.parent.rglob(f"{bad}*"))


def test_wrong_bytes_leave_the_installed_release(
    web: Web, get: Any, line: Line, store: Path, target: Path, public_key: Path
) -> None:
    get()
    push(line.bundle(8, part_1=b"x" * 50_000), str(store), public_key, now=NOW)
    changed = next(path for path in store.glob("blobs/sha256/*") if path.read_bytes() == b"x" * 50_000)
    web.corrupt = {f"blobs/sha256/{changed.name}"}
    with pytest.raises(BundleError, match="wrong bytes"):
        get()
    shutil.rmtree(target.parent / "bundle.partial")
    assert_installed(target, public_key)


def test_a_body_longer_than_promised_is_read_to_its_promised_end(
    web: Web, get: Any, store: Path, target: Path, public_key: Path
) -> None:
    web.endless = {blob_of(store, part) for part in range(3)}
    get()
    assert_installed(target, public_key)
    assert all(request.sent < 16 << 20 for request in web.requests)  # what lay in buffers when we hung up


def test_a_document_that_does_not_end_is_given_up(web: Web, get: Any) -> None:
    web.endless = {"bundles/demo/q4/latest.sig"}
    with pytest.raises(BundleError, match=r"latest\.sig has more than 16,777,216 bytes"):
        get()


@pytest.mark.parametrize(
    ("headers", "message"),
    [
        ({"Content-Encoding": "gzip"}, "turn compression off"),
        (
            {"Content-Length": "9000000", "Connection": "close"},
            "shorter than it should be",
        ),  # promises more than it sends
    ],
)
def test_answers_that_are_not_the_file(headers: dict[str, str], message: str, web: Web, get: Any) -> None:
    web.headers = headers
    with pytest.raises(BundleError, match=message):
        get()


def test_another_range_than_asked_for_is_refused(web: Web, get: Any) -> None:
    web.cut = lambda: 700
    web.headers = {"Content-Range": "bytes 5-9/10"}
    with pytest.raises(BundleError, match=r"asked for byte 700 on, got 'bytes 5-9/10'"):
        get()


@pytest.mark.parametrize(("status", "message"), [(404, "is not there"), (403, "needs a login"), (302, "HTTP 302")])
def test_answers_that_will_not_change_are_not_asked_for_again(status: int, message: str, web: Web, get: Any) -> None:
    web.statuses = [status] * 100
    with pytest.raises(BundleError, match=message):
        get()
    assert len(web.requests) == 1


# --- interrupted runs ------------------------------------------------------------------------------------------------


def interrupt(web: Web, get: Any) -> None:
    """A run that gets the documents, and of the parts only the beginning of the first."""
    cuts = iter([10**6] * 4 + [9_000] + [0] * 100)
    web.cut = lambda: next(cuts)
    with pytest.raises(BundleError, match="run the same command again"):
        get()
    web.cut = None
    web.requests.clear()


def test_the_next_run_goes_on_where_one_was_interrupted(web: Web, get: Any, target: Path, public_key: Path) -> None:
    interrupt(web, get)
    fetched = get()
    assert_installed(target, public_key)
    assert fetched.downloaded + fetched.reused == TOTAL
    first = web.to(Path(blob_of(web.root, 0)).name)
    assert fetched.reused > 9_000 and [request.start for request in first] == [9_000]


def spoil(partial: Path) -> None:
    data = bytearray(partial.read_bytes())
    data[100] ^= 1
    partial.write_bytes(data)


@pytest.mark.parametrize("harm", [spoil, lambda path: os.truncate(path, 99_999), lambda path: os.truncate(path, 0)])
def test_what_an_interrupted_run_left_is_not_believed(
    harm: Any, web: Web, get: Any, target: Path, public_key: Path
) -> None:
    interrupt(web, get)
    harm(next(target.parent.glob("bundle.partial/parts/*.partial")))
    get()
    assert_installed(target, public_key)


def test_a_whole_part_that_went_bad_meanwhile_is_found(web: Web, get: Any, target: Path, public_key: Path) -> None:
    interrupt(web, get)
    whole = next(path for path in target.parent.glob("bundle.partial/parts/*") if path.suffix != ".partial")
    whole.chmod(0o644)
    spoil_first = bytearray(whole.read_bytes())
    spoil_first[0] ^= 1
    whole.write_bytes(spoil_first)
    with pytest.raises(BundleError, match="not accepted: modified: content/"):
        get()
    assert not target.exists()
    get()
    assert_installed(target, public_key)


def test_a_superseded_release_leaves_nothing(
    web: Web, get: Any, line: Line, store: Path, target: Path, public_key: Path
) -> None:
    interrupt(web, get)
    push(line.bundle(8, part_0=b"new"), str(store), public_key, now=NOW)
    old, new = (f"blobs/sha256/{hashlib.sha256(data).hexdigest()}" for data in (PARTS["demo_q4.onnx.data.0"], b"new"))
    web.corrupt = {new}
    assert list(target.parent.rglob(f"{Path(old).name}*"))
    with pytest.raises(BundleError, match="wrong bytes"):
        get()
    assert not list(target.parent.rglob(f"{Path(old).name}*"))
    web.corrupt = set()
    get()
    assert sorted(path.name for path in target.parent.glob("[!.]*")) == ["bundle", "releases.json"]
    assert (target / "content" / "demo_q4.onnx.data.0").read_bytes() == b"new"


def test_a_run_killed_between_two_renames_loses_nothing(web: Web, get: Any, target: Path, public_key: Path) -> None:
    get()
    target.rename(target.parent / ".bundle.old.abc")  # moved aside, and then the power went
    web.statuses = [403]
    with pytest.raises(BundleError, match="needs a login"):
        get()
    assert verify(target, public_key, now=NOW).ok


# --- updates ---------------------------------------------------------------------------------------------------------


def test_unchanged_parts_of_the_installed_release_are_not_downloaded_again(
    web: Web, get: Any, line: Line, store: Path, target: Path, public_key: Path
) -> None:
    get()
    before = (target / "content" / "demo_q4.onnx.data.0").stat().st_ino
    push(line.bundle(8, part_1=b"x" * 50_000), str(store), public_key, now=NOW)
    web.requests.clear()
    fetched = get()
    assert (fetched.document.release, fetched.downloaded) == (8, 50_000)
    assert (target / "content" / "demo_q4.onnx.data.0").stat().st_ino == before
    assert len(web.to("blobs/")) == 2  # release.json and the part
    assert json.loads((target.parent / "releases.json").read_text())["releases"] == {"demo/q4": 8}


def test_nothing_is_downloaded_twice(web: Web, get: Any, target: Path, public_key: Path) -> None:
    get()
    web.requests.clear()
    fetched = get()
    assert (fetched.downloaded, fetched.reused) == (0, TOTAL)
    assert [request.path.split("/")[0] for request in web.requests] == ["bundles", "blobs"]


def test_an_installed_bundle_that_went_bad_is_mended(web: Web, get: Any, target: Path, public_key: Path) -> None:
    get()
    (target / "content" / "demo_q4.onnx.data.0").unlink()
    assert get().downloaded == 30_000
    assert_installed(target, public_key)


# --- trust -----------------------------------------------------------------------------------------------------------


def test_an_older_release_than_accepted_is_refused(web: Web, get: Any, target: Path) -> None:
    (target.parent / "releases.json").write_text('{"releases": {"demo/q4": 8}}')
    with pytest.raises(BundleError, match=r"downgraded: .*expected release 8 or later, found 7"):
        get()
    assert not target.exists()
    assert len(web.to("blobs/")) == 1  # release.json, and no part


def test_the_newest_release_of_a_variant_is_accepted_though_another_is_ahead(get: Any, target: Path) -> None:
    """Release 8 held q4_k_m only, because q4 failed its gate: q4's newest is still 7."""
    state = target.parent / "releases.json"
    state.write_text('{"releases": {"demo": 8, "demo/q4_k_m": 8}}')
    assert get().document.release == 7
    assert json.loads(state.read_text())["releases"] == {"demo": 8, "demo/q4": 7, "demo/q4_k_m": 8}


def test_a_damaged_record_is_not_taken_for_a_fresh_start(get: Any, target: Path) -> None:
    (target.parent / "releases.json").write_text('{"releases": {"demo": "x"}}')
    with pytest.raises(BundleError, match="is no record of releases"):
        get()


def test_another_key_gets_no_further_than_the_signature(web: Web, get: Any, target: Path, other_key: Path) -> None:
    with pytest.raises(BundleError, match=r"latest\.sig: signed with the key"):
        fetch(web.url, "demo", target, other_key, variant="q4", now=NOW)
    assert len(web.requests) == 1 and not target.exists()


def test_an_expired_release_is_refused(get: Any) -> None:
    with pytest.raises(BundleError, match="expired: "):
        get(now=NOW + timedelta(days=400))


def test_another_variants_signature_is_refused(get: Any, line: Line, store: Path, public_key: Path) -> None:
    push(line.bundle(variant="q4_k_m"), str(store), public_key, now=NOW)
    shutil.copy(store / "bundles/demo/q4_k_m/latest.sig", store / "bundles/demo/q4/latest.sig")
    with pytest.raises(BundleError, match=r"swapped: .*expected variant 'q4', found 'q4_k_m'"):
        get()


def test_a_tiers_signature_in_a_bundles_place_is_refused(get: Any, line: Line, store: Path) -> None:
    shutil.copy(line.tiers(line.bundle()) / "model.sig", store / "bundles/demo/q4/latest.sig")
    with pytest.raises(BundleError, match=r"signs no release\.json"):
        get()


def test_a_changed_document_is_refused(web: Web, get: Any, store: Path) -> None:
    web.corrupt = {
        f"blobs/sha256/{path.name}"
        for path in store.glob("blobs/sha256/*")
        if b'"kind": "release"' in path.read_bytes()
    }
    with pytest.raises(BundleError, match=r"wrong bytes for release\.json"):
        get()


# --- tiers -----------------------------------------------------------------------------------------------------------


@pytest.fixture
def tiers(line: Line, store: Path, public_key: Path) -> Path:
    """The published tiers of a published release 8."""
    bundle = line.bundle(8)
    folder = line.tiers(bundle, 8)
    push(bundle, str(store), public_key, now=NOW)
    push(folder, str(store), public_key, now=NOW)
    return folder


def test_a_tier_gets_its_bundle(tiers: Path, get: Any, target: Path) -> None:
    fetched = get(tier="big")
    assert fetched.document.variant == "q4"
    said = replace(fetched, tier="android-8gb").describe()
    assert said.endswith("; android-8gb runs it with weights private at 2,048 tokens")


def test_a_tier_without_a_bundle_is_refused_with_the_figures(tiers: Path, store: Path, target: Path) -> None:
    with pytest.raises(BundleError, match="may use 4,000,000,000 of its") as refused:
        fetch(str(store), "demo", target, target.parents[1] / "public.pem", tier="small", now=NOW)
    assert "lacks 500,000,000 bytes" in str(refused.value) and "q4: too big" in str(refused.value)


def test_an_unknown_tier_is_answered_with_those_there_are(tiers: Path, get: Any) -> None:
    with pytest.raises(BundleError, match=r"no tier 'huge'\. Its tiers: big, small"):
        get(tier="huge")


def test_a_bundle_signed_again_is_not_the_one_that_tiers_pin(
    tiers: Path, get: Any, line: Line, store: Path, maker: Maker
) -> None:
    again = line.bundle(8, part_0=b"other")
    shutil.copy(again / "model.sig", store / "bundles/demo/q4/8/model.sig")
    with pytest.raises(BundleError, match=r"is not the signature that tiers\.json pins"):
        get(tier="big")


# --- folders, addresses, space ---------------------------------------------------------------------------------------


def test_a_folder_that_holds_other_things_is_left_alone(get: Any, target: Path) -> None:
    target.mkdir()
    (target / "thesis.txt").write_text("dear")
    with pytest.raises(BundleError, match="holds other things than a bundle"):
        get()
    assert (target / "thesis.txt").read_text() == "dear"


def test_a_full_disk_is_known_before_the_first_part(web: Web, get: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    usage = namedtuple("usage", "total used free")
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage(10, 9, TOTAL - 1))
    with pytest.raises(ResourceError, match=f"{TOTAL:,} bytes needed"):
        get()
    assert len(web.to("blobs/")) == 1


@pytest.mark.parametrize(
    ("address", "message"),
    [
        ("ftp://host/x", "is no place to publish"),
        ("hf://owner/name", "is no place to publish"),
        ("file://host/x", "is no place to publish"),
        ("gopher://me:secret@host/x", "is no place to publish"),
        ("s3://me:secret@bucket/x", "holds no key and no password"),
        ("http://me:secret@127.0.0.1:9/x", "attempts in a row"),
        ("https://me:secret@host/x?token=secret", "without"),
    ],
)
def test_addresses_that_are_none_are_refused_without_their_secrets(address: str, message: str, get: Any) -> None:
    with pytest.raises(BundleError, match=message) as refused:
        get(address)
    assert "secret" not in str(refused.value)


@pytest.mark.parametrize("name", ["../x", "/etc", "a/b", "", "A", "x" * 41])
def test_names_never_leave_their_folder(name: str, store: Path, target: Path, public_key: Path) -> None:
    with pytest.raises(BundleError, match="cannot be the name of a model"):
        fetch(str(store), name, target, public_key, variant="q4")


def test_https_is_never_left() -> None:
    answer = requests.Response()
    answer.status_code, answer.url, answer.headers["Location"] = (
        302,
        "https://store.example/a",
        "http://store.example/a",
    )
    with pytest.raises(BundleError, match="which is not https: refused"):
        _Session().get_redirect_target(answer)
    answer.headers["Location"] = "//cdn.example/a"
    assert _Session().get_redirect_target(answer) == "//cdn.example/a"


def test_a_redirect_to_another_scheme_is_refused(web: Web, get: Any) -> None:
    web.redirect = "file:///etc/passwd"
    with pytest.raises(BundleError, match="InvalidSchema"):
        get()


def test_two_fetches_into_one_folder_do_not_meet(get: Any, target: Path) -> None:
    import fcntl

    (target.parent / "bundle.partial").mkdir()
    with open(target.parent / "bundle.partial" / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        with pytest.raises(BundleError, match="another fetch into"):
            get()


def test_s3_without_its_package_says_what_to_install(get: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import sys

    monkeypatch.setitem(sys.modules, "s3fs", None)
    with pytest.raises(BundleError, match=r"needs the package s3fs\. Install it with `pip install -r requirements-s3"):
        get("s3://bucket/folder")


def test_the_command_says_where_the_bundle_is(line: Line, target: Path, tmp_path: Path, public_key: Path) -> None:
    store, trust = str(tmp_path / "now"), ["--public-key", str(public_key)]
    pushed = CliRunner().invoke(cli.cli, ["push", str(line.bundle(created=datetime.now(UTC))), store, *trust])
    assert pushed.exit_code == 0 and "demo q4 release 7: 7 of 7 files" in pushed.output
    arguments = ["fetch", store, "demo", "--variant", "q4", *trust, "--to", str(target)]
    done = CliRunner().invoke(cli.cli, arguments)
    assert done.exit_code == 0 and f"{target}: demo q4 release 7, verified" in done.output
