"""phone/vectors decide: JavaScript, the JVM, Swift where a compiler is, and the pipeline's code where it has any."""

from __future__ import annotations

import hashlib
import json
import subprocess
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from urllib3.util import Retry

from pipeline.bundle.release import FileEntry
from pipeline.bundle.tiers import assign
from pipeline.bundle.trust import ReleaseMemory
from pipeline.config.phones import TiersConfig, load_tiers
from pipeline.errors import BundleError, ResourceError
from pipeline.planning.devices import budget_bytes
from pipeline.preflight.footprints import candidate, known
from pipeline.prepack import device
from pipeline.progress import Progress
from pipeline.publish import fetch as fetching
from pipeline.publish.http import _body
from pipeline.publish.places import Interrupted
from pipeline.runtime.heat import Governor, Profile, load_profile
from tests.phone.conftest import PHONE

VECTORS = PHONE / "vectors"
Program = Callable[[str], list[str]]


def cases(kind: str, keep: Callable[[dict[str, Any]], bool] = lambda case: True) -> list[Any]:
    """The cases of a file of vectors, as pytest's parameters."""
    found = json.loads((VECTORS / f"{kind}.json").read_text())["cases"]
    return [pytest.param(case, id=case["name"].replace(" ", "-")) for case in found if keep(case)]


def run_all(command: list[str], folder: Path) -> None:
    """`command` agrees with every case, and says so when it does not."""
    done = subprocess.run([*command, str(VECTORS)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
    agree, _, of, *_ = done.stdout.split()
    assert agree == of and int(of) >= 150, done.stdout
    wrong = json.loads((VECTORS / "releases.json").read_text())
    wrong["cases"] = [case | {"expect": {"outcomes": ["ok"], "releases": {}}} for case in wrong["cases"][:1]]
    (folder / "releases.json").write_text(json.dumps(wrong))
    done = subprocess.run([*command, str(folder)], capture_output=True, text=True, check=False)
    assert (
        done.returncode == 1 and "0 of 1 cases agree" in done.stdout and "releases: the first: expected" in done.stdout
    )


def test_javascript_agrees(javascript: Program, tmp_path: Path) -> None:
    run_all(javascript("behaviour"), tmp_path)


def test_the_jvm_agrees(kotlin: Program, tmp_path: Path) -> None:
    run_all(kotlin("Behaviour"), tmp_path)


def test_swift_agrees(swift: list[str], tmp_path: Path) -> None:
    run_all(swift, tmp_path)


@pytest.mark.parametrize("model", ["mimo-8b", "phi-4", "phi-4-mini"])
def test_a_phone_at_the_edge_of_its_class_gets_what_was_planned(
    javascript: Program, model: str, tmp_path: Path
) -> None:
    """With as much memory as its class counts on, and no more, `choose` is the tiers' own decision."""
    tiers, found = load_tiers(), known(model)
    variants = [candidate(found, variant, tiers.context) for variant in ("q3", "q4", "q4_k_m")]
    judged = [replace(one, verdict="PASS", kl_mean=0.3 / (1 + rank)) for rank, one in enumerate(variants)]
    decisions = assign(tiers, judged)
    shared = {"tiers": {name: one.model_dump(mode="json") for name, one in decisions.items()}}
    shared["bundles"] = {one.variant: {"signature_sha256": "e" * 64, "release": 7} for one in judged}
    cases = [expected(name, decisions[name], tiers) for name in decisions]
    (tmp_path / "choose.json").write_text(json.dumps(shared | {"cases": cases}))
    done = subprocess.run([*javascript("behaviour"), str(tmp_path)], capture_output=True, text=True, check=False)
    assert done.stdout == f"{len(cases)} of {len(cases)} cases agree\n", done.stdout + done.stderr


def expected(name: str, decision: Any, tiers: TiersConfig) -> dict[str, Any]:
    """A case of choose.json: the smallest phone of a class, and the decision of the signed tiers."""
    tier = tiers.tiers[name]
    memory = {"available_bytes": budget_bytes(tier), "resident_bytes": None, "maps": True}
    device = {"platform": tier.platform, "ram_bytes": tier.ram_bytes} | memory
    if decision.decision == "refuse":
        return {
            "name": name,
            "device": device,
            "expect": {"refused": "refused", "missing_bytes": decision.shortfall_bytes},
        }
    found = {"variant": decision.variant, "tier": name, "weights": decision.way.weights}
    return {"name": name, "device": device, "expect": found}


# --- the pipeline's own code -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", cases("releases"))
def test_the_record_of_releases_agrees(case: dict[str, Any], tmp_path: Path) -> None:
    state, outcomes = tmp_path / "releases.json", []
    if case["file"] is not None:
        state.write_text(case["file"])
    for subject, release in case["record"]:
        try:
            ReleaseMemory(state).record(subject, release)
            outcomes.append("ok")
        except BundleError as error:
            outcomes.append("rollback" if "rollback and" in str(error) else "unreadable")
    assert outcomes == case["expect"]["outcomes"]
    if case["expect"]["releases"] is not None:
        assert json.loads(state.read_text())["releases"] == case["expect"]["releases"]


class Told:
    """A place that answers as a case says, through the pipeline's own reading of HTTP."""

    shown = "told"

    def __init__(self, case: dict[str, Any]) -> None:
        self.requests: list[list[Any]] = []
        self.blobs: dict[str, tuple[str, bytes, list[dict[str, Any]]]] = {}
        for name, file in case["files"].items():
            steps = [step for step in case.get("answers", {}).get(name, []) for _ in range(step.get("times", 1))]
            path = f"blobs/sha256/{hashlib.sha256(bytes_of(file)).hexdigest()}"
            self.blobs.setdefault(path, (name, bytes_of(file), steps))

    @contextmanager
    def open(self, path: str, start: int) -> Any:
        name, data, steps = self.blobs[path]
        self.requests.append([name, start])
        step = steps.pop(0) if steps else {}
        if step.get("silent"):
            raise Interrupted("no connection")
        begin, body = 0 if step.get("no_range") else start, bytearray(data)
        if "flip" in step:
            body[step["flip"]] ^= 1
        left = [bytes(body[begin:])[: step.get("cut")]]

        def read1(count: int, **_: Any) -> bytes:
            if not left[0] and "cut" in step:
                raise OSError("cut")
            given, left[0] = left[0][:count], left[0][count:]
            return given

        status = step.get("status", 206 if begin > 0 or "range" in step else 200)
        headers = {"Content-Length": str(len(data) - begin)}
        if status == 206:
            headers["Content-Range"] = step.get("range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
        yield _body(SimpleNamespace(status_code=status, headers=headers, raw=SimpleNamespace(read1=read1)), name, start)


def bytes_of(file: dict[str, Any]) -> bytes:
    """A file of a vector."""
    return (file["text"] * file["times"]).encode()


def lay(folder: Path, case: dict[str, Any]) -> None:
    """What lies there before: an installed release, and what an earlier run left."""
    for name in ("installed", "parts"):
        (folder / name).mkdir()
    for name, file in case.get("installed", {}).items():
        (folder / "installed" / name).write_bytes(bytes_of(file))
    for name, left in case.get("left", {}).items():
        if name in case["files"]:
            whole = bytes_of(case["files"][name])
            kept = bytes(
                byte ^ left.get("spoilt", False) for byte in whole.ljust(left["bytes"], b"\0")[: left["bytes"]]
            )
            (folder / "parts" / f"{hashlib.sha256(whole).hexdigest()}.partial").write_bytes(kept)


def comparable(case: dict[str, Any]) -> bool:
    """Whether the pipeline's `fetch` decides the same question.

    It knows no metered networks, links in place of copying, and lets the digest find what a phone finds by the size.
    """
    return case["expect"]["outcome"] not in ("disk", "metered", "wrong-size") and case.get("metered") is None


@pytest.mark.parametrize("case", cases("fetch", comparable))
def test_fetching_agrees(case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Retry, "sleep", lambda self, response=None: None)
    lay(tmp_path, case)
    place, parts = Told(case), tmp_path / "parts"
    entries = {name: FileEntry(size=len(data), sha256=hashlib.sha256(data).hexdigest()) for name, data in
               ((name, bytes_of(file)) for name, file in case["files"].items())}  # fmt: skip
    wanted = {entry.sha256: entry for entry in entries.values()}
    fetching._reuse(tmp_path / "installed", wanted, parts)
    kept = {digest: fetching._kept(parts, digest) for digest in wanted}
    download = sum(entry.size - kept[digest] * (kept[digest] <= entry.size) for digest, entry in wanted.items())
    outcome = "ok"
    try:
        with Progress("fetch", 1, "files", 1) as progress:
            for name, entry in sorted(entries.items()):
                if not (parts / entry.sha256).is_file():
                    fetching._download(place, name, entry, parts, progress)
    except BundleError:
        outcome = "failed"
    expected = case["expect"]
    assert (outcome == "ok") == (expected["outcome"] == "ok")
    assert place.requests == expected["requests"]
    names = {entry.sha256: name for name, entry in entries.items()}
    assert {names[path.stem]: path.stat().st_size for path in parts.glob("*.partial")} == expected["left"]
    assert download == expected["download"]


@pytest.mark.parametrize("case", cases("heat"))
def test_the_power_profile_agrees(case: dict[str, Any]) -> None:
    profile = Profile.model_validate(json.loads((VECTORS / "heat.json").read_text())["profile"])
    governor = Governor(profile)
    assert [governor.observe(reading) for reading in case["readings"]] == case["expect"]["steps"]
    assert governor.row.pause_ms == case["expect"]["settings"]["pause_ms"]
    assert profile == load_profile()


@pytest.mark.parametrize("case", cases("prepare"))
def test_preparing_agrees(case: dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    work = json.loads((VECTORS / "prepare.json").read_text())["prepack"]
    (tmp_path / "prepack.json").write_text(json.dumps(work))
    for name in [work["graph"], *work["parts"], *work["slices"], *(one["graph"] for one in work["classes"].values())]:
        (tmp_path / name).touch()
    (tmp_path / "prepacked").mkdir()
    for name, text in case["before"].items():
        (tmp_path / "prepacked" / name).write_bytes(text.encode("latin-1"))
    packs = []

    def save(_source: Path, target: Path, number: int) -> tuple[Path, Path]:
        packs.append(number)
        graph, raw = device.saved_files(target, number)
        graph.write_text(case["saves"][number]["graph"])
        raw.write_text(case["saves"][number]["raw"])
        return graph, raw

    monkeypatch.setattr(device, "save_slice", save)
    monkeypatch.setattr("pipeline.files.free_disk", lambda path: case["free"])
    found = {"graph": None, "kernels": None}
    try:
        outcome = device.prepack(tmp_path, lambda line: None)
        found = {"graph": outcome.graph, "kernels": outcome.kernels}
    except ResourceError:
        pass
    left = (tmp_path / "prepacked").iterdir() if (tmp_path / "prepacked").is_dir() else []
    files = {path.name: path.read_bytes().decode("latin-1") for path in left if path.name != device.READY}
    then = device.choose(tmp_path).graph
    assert found | {"packs": packs, "files": files, "then": then} == case["expect"]
