"""The programs that docs/phone.md explains, against a place of publication: first release, update, faults, removal."""

from __future__ import annotations

import json
import re
import subprocess
from collections.abc import Callable, Iterator
from datetime import UTC, datetime
from pathlib import Path

import pytest

from pipeline.publish.push import push
from pipeline.runtime.sustained import Sustained
from tests.bundle import conftest as bundles
from tests.bundle.conftest import maker, public_key, stranger  # noqa: F401 (fixtures)
from tests.conftest import ROOT
from tests.documented import blocks
from tests.phone.conftest import PHONE
from tests.publish.conftest import PARTS, SMALL, Line, line  # noqa: F401 (fixtures)
from tests.publish.web import Web, serve

RAM = 16 << 30  # bytes; the made-up tiers begin at 8 GiB
Run = Callable[..., subprocess.CompletedProcess[str]]


@pytest.fixture(autouse=True)
def _now(monkeypatch: pytest.MonkeyPatch) -> None:
    """Documents that are valid by this machine's clock, as a program sees it."""
    monkeypatch.setattr(bundles, "CREATED", datetime.now(UTC).replace(microsecond=0))
    monkeypatch.setitem(SMALL, "genai_config.json", b'{"model": {"decoder": {"filename": "demo_q4.onnx"}}}\n')


@pytest.fixture
def web(tmp_path: Path) -> Iterator[Web]:
    """A place of publication behind a web server."""
    (tmp_path / "store").mkdir()
    with serve(tmp_path / "store") as served:
        served.headers["Connection"] = "close"  # Node ends when its connections do: else 5 seconds after the program
        yield served


@pytest.fixture(params=["javascript", "kotlin"])
def example(request: pytest.FixtureRequest, web: Web, public_key: Path, tmp_path: Path) -> Run:  # noqa: F811
    """Runs the example of a language, on a phone of `ram` bytes, in tmp_path/phone."""
    program = request.getfixturevalue(request.param)("example" if request.param == "javascript" else "Example")
    key = "".join(public_key.read_text().splitlines()[1:-1])

    def run(*more: str, ram: int = RAM) -> subprocess.CompletedProcess[str]:
        command = [*program, web.url, str(tmp_path / "phone"), key, "demo", str(ram), *more]
        return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)

    return run


def release(line: Line, web: Web, key: Path, number: int, **parts: bytes) -> Path:  # noqa: F811
    """Publish a bundle and the tiers that give it to the bigger class."""
    bundle = line.bundle(number, created=bundles.CREATED, **parts)
    for folder in (bundle, line.tiers(bundle, number)):
        push(folder, str(web.root), key)
    return bundle


def test_a_phone_gets_its_bundle_updates_and_removes_it(
    example: Run, line: Line, web: Web, public_key: Path, tmp_path: Path  # noqa: F811
) -> None:  # fmt: skip
    release(line, web, public_key, 7)
    total = sum(map(len, (PARTS | SMALL).values()))
    web.statuses = [503]
    first = example()
    assert first.returncode == 0, first.stdout + first.stderr
    assert f"q4 release 7: {total} downloaded, 0 reused" in first.stdout
    assert "answered by device\nsay this back to me (end)" in first.stdout
    written = Sustained.model_validate_json((tmp_path / "phone/sustained.json").read_bytes())
    assert written.variant == "q4" and sum(sample.tokens for sample in written.samples) == 5
    if (overlaid := tmp_path / "phone/run/genai_config.json").exists():  # Kotlin: for a runtime without Config.overlay
        decoder = json.loads(overlaid.read_text())["model"]["decoder"]
        assert decoder["filename"] == "content/demo_q4.onnx"
        assert (overlaid.parent / "content/demo_q4.onnx").is_file()
        assert decoder["session_options"]["intra_op_num_threads"] == 4

    again = example()
    assert "q4 release 7: 0 downloaded, 0 reused" in again.stdout

    new = b"changed" * 1000
    bundle = release(line, web, public_key, 8, part_1=new)
    blob = next(path for path in (web.root / "blobs/sha256").iterdir() if path.read_bytes() == new)
    web.corrupt = {blob.relative_to(web.root).as_posix()}
    spoilt = example()
    assert spoilt.returncode == 1 and "wrong-bytes: demo_q4.onnx.data.1" in spoilt.stdout
    assert json.loads((tmp_path / "phone/demo/q4/content/release.json").read_text())["release"] == 7
    web.corrupt = set()
    update = example()
    assert update.returncode == 0, update.stdout + update.stderr
    assert f"q4 release 8: {len(new)} downloaded, {total - len(PARTS['demo_q4.onnx.data.1'])} reused" in update.stdout
    installed = tmp_path / "phone/demo/q4"
    assert {path.name: path.read_bytes() for path in (installed / "content").iterdir()} == {
        path.name: path.read_bytes() for path in (bundle / "content").iterdir()
    }
    assert sorted(path.name for path in installed.parent.iterdir()) == [".tiers", "q4"]

    removed = example("remove")
    assert removed.returncode == 0 and not installed.exists()
    assert json.loads((tmp_path / "phone/releases.json").read_text()) == {"releases": {"demo": 8, "demo/q4": 8}}


def test_what_a_phone_does_not_take(example: Run, line: Line, web: Web, public_key: Path, tmp_path: Path) -> None:  # noqa: F811
    release(line, web, public_key, 7)
    assert "refused: no class of devices begins at 4 bytes" in example(ram=4).stdout
    release(line, web, public_key, 8)
    assert example().returncode == 0
    latest = web.root / "tiers/demo/latest.sig"
    latest.write_bytes((web.root / "tiers/demo/7/model.sig").read_bytes())
    old = example()
    assert old.returncode == 1 and "not-accepted: downgraded: content/tiers.json" in old.stdout
    latest.write_bytes(b"{}")
    assert "not-accepted: tiers/demo/latest.sig" in example().stdout
    latest.unlink()
    assert "missing: tiers/demo/latest.sig" in example().stdout
    assert (tmp_path / "phone/demo/q4/model.sig").is_file()


# --- the page --------------------------------------------------------------------------------------------------------


def code(text: str) -> list[str]:
    """Lines without indentation and empty ones."""
    return [found for row in text.splitlines() if (found := row.strip())]


def test_the_page_shows_programs_that_ran() -> None:
    """Each block of docs/phone.md stands, line after line, in a file of phone/."""
    sources = {path: code(path.read_text()) for path in PHONE.rglob("*") if path.suffix in (".kt", ".mjs", ".swift")}
    shown = [block for block in blocks() if block.page.name == "phone.md" and block.mark in ("kotlin", "js", "swift")]
    assert shown
    for block in shown:
        wanted = code(block.text)
        starts = [
            (lines, at)
            for lines in sources.values()
            for at in range(len(lines))
            if lines[at : at + len(wanted)] == wanted
        ]
        assert starts, f"{block.place}: no file of phone/ has these lines"


def test_the_page_names_what_is_there() -> None:
    page = (ROOT / "docs/phone.md").read_text()
    for name in re.findall(r"`((?:kotlin|javascript|swift|vectors)/[\w./-]+)`", page):
        assert (PHONE / name).exists(), name
