"""An arm64 Linux with Python, numpy and ONNX Runtime in a folder, run by QEMU's user emulation. Needs no root.

Debian's packages are fetched with apt-get into a package database of their own, so that the system's is neither read
nor changed, and unpacked, not installed; numpy and onnxruntime are PyPI's arm64 wheels of the releases installed here.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import get_args

from pipeline.checkpoint.blobs import Store
from pipeline.config.phones import Processor
from pipeline.errors import EvaluationError, ResourceError
from pipeline.machine import cores

HERE, *CPUS = get_args(Processor)
"""The first has dotprod, as phones since about 2018; QEMU's best adds i8mm and SVE2, as phones since 2022, and more."""
_QEMU = "qemu-aarch64-static"
_PACKAGES = ("onnxruntime", "numpy")
_WHEEL_PLATFORMS = ("manylinux2014_aarch64", "manylinux_2_27_aarch64", "manylinux_2_28_aarch64")
_SPACE = 1 << 30  # bytes; 0.7 GB while packages are unpacked, 0.2 GB in the end
_PATIENCE = 3600  # seconds until an emulated process is given up
# QEMU before 8 shows the guest this machine's /proc/cpuinfo, at which ONNX Runtime's detection of an arm64 processor
# crashes. This text is a Cortex-A72's, which has no dotprod: only the emulated processor's feature words can add it.
_CPUINFO = (
    "processor\t: {}\nFeatures\t: fp asimd\nCPU implementer\t: 0x41\nCPU architecture: 8\nCPU variant\t: 0x3\n"
    "CPU part\t: 0xd08\nCPU revision\t: 1\n\n"
)


@dataclass(frozen=True)
class Emulator:
    """An installed emulator. `cpu` is QEMU's name of the processor."""

    folder: Path
    cpu: str

    def run(self, arguments: Sequence[str], paths: Sequence[Path]) -> str:
        """Standard output of `python ARGUMENTS` on the emulated processor; `paths` are importable there.

        Raises EvaluationError with the last line of its errors when it fails.
        """
        return _output(self.command(arguments, paths), f"emulated {self.cpu}", _PATIENCE)

    def command(self, arguments: Sequence[str], paths: Sequence[Path]) -> list[str]:
        """What `run` runs."""
        root = self.folder.resolve()
        importable = os.pathsep.join(map(str, (*paths, root / "site")))
        return [
            *(str(root / _QEMU), "-cpu", self.cpu, "-L", str(root / "system")),
            *("-E", f"PYTHONPATH={importable}", "-E", "ORT_DISABLE_TELEMETRY=1", "-E", "PYTHONDONTWRITEBYTECODE=1"),
            *(str(root / "system" / "usr" / "bin" / f"python{_python(root)}"), *arguments),
        ]


def place() -> Path:
    """Where it is unpacked: in the store, so that a larger disk holds it and projects that share one share it."""
    return Store().root / "arm64"


def install(folder: Path | None = None) -> None:
    """Fetch and unpack everything into `folder`, or `place()`, unless it is there.

    Raises:
        ResourceError: this is no x86-64 Debian or Ubuntu, or the disk is full.
        EvaluationError: a package cannot be fetched.
    """
    ready, wanted = (folder := folder or place()) / "ready.json", {name: version(name) for name in _PACKAGES}
    if ready.exists() and json.loads(ready.read_text(encoding="utf-8")) == wanted:
        return
    _require_tools(folder)
    shutil.rmtree(folder, ignore_errors=True)
    host = _output(["dpkg", "--print-architecture"], "dpkg").strip()
    for package in _fetch_packages(folder / "apt", host):
        target = "host" if package.stem.endswith(f"_{host}") else "system"
        _output(["dpkg-deb", "--extract", str(package), str(folder / target)], f"unpacking {package.name}")
    shutil.copy2(folder / "host" / "usr" / "bin" / _QEMU, folder)
    _write_cpuinfo(folder / "system" / "proc" / "cpuinfo")
    _fetch_wheels(folder, wanted)
    for scratch in ("apt", "host"):
        shutil.rmtree(folder / scratch)
    ready.write_text(json.dumps(wanted), encoding="utf-8")  # last, so its existence means that all is there


def release() -> str:
    """QEMU's own words on its version."""
    return _output([str(place() / _QEMU), "--version"], _QEMU).splitlines()[0]


def require_host() -> None:
    """Raise ResourceError where QEMU and an arm64 system cannot be unpacked: this is no x86-64 Debian or Ubuntu."""
    missing = [tool for tool in ("apt-get", "dpkg", "dpkg-deb") if not shutil.which(tool)]
    if missing or os.uname().machine != "x86_64":
        raise ResourceError(
            f"arm64 is emulated on x86-64 Debian or Ubuntu, whose packages are unpacked; this is {os.uname().machine}"
            f"{' without ' + ', '.join(missing) if missing else ''}. Run it there, or in a Debian container (it needs "
            f"no root), or leave only `here` in `classes` of configs/kernels.yaml."
        )


def _require_tools(folder: Path) -> None:
    require_host()
    folder.mkdir(parents=True, exist_ok=True)
    if (free := shutil.disk_usage(folder).free) < _SPACE:
        raise ResourceError(f"{folder}: {free:,} bytes free, an emulated arm64 needs {_SPACE:,} while it unpacks.")


def _fetch_packages(state: Path, host: str) -> list[Path]:
    """Python for arm64 and QEMU for `host` with all that they depend on, from the system's package sources."""
    cache = state / "cache" / "archives"
    for part in (state / "lists" / "partial", cache / "partial"):
        part.mkdir(parents=True)
    (state / "status").touch()  # nothing is installed: dependencies are resolved down to the C library
    settings = {
        "APT::Architecture": "arm64",
        "Dir::State": state.resolve(),
        "Dir::State::lists": (state / "lists").resolve(),
        "Dir::State::status": (state / "status").resolve(),
        "Dir::Cache": (state / "cache").resolve(),
        "Debug::NoLocking": 1,
        "APT::Sandbox::User": "",
    }
    options = [f"-o{key}={value}" for key, value in settings.items()]
    options += [f"-oAPT::Architectures::={name}" for name in ("arm64", host)]
    _output(["apt-get", "-q", *options, "update"], "apt-get update (arm64 needs its place in the package sources)")
    wanted = ["python3", "libstdc++6", f"qemu-user-static:{host}"]
    command = ["apt-get", "-q", "-y", *options, "install", "--download-only", "--no-install-recommends", *wanted]
    _output(command, "apt-get install --download-only")
    return sorted(cache.glob("*.deb"))


def _fetch_wheels(folder: Path, wanted: dict[str, str]) -> None:
    """The releases installed here, built for arm64. What else onnxruntime names is not needed to run a model."""
    platforms = [f"--platform={name}" for name in _WHEEL_PLATFORMS]
    command = [
        *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-deps"),
        *("--only-binary=:all:", f"--python-version={_python(folder)}", *platforms, f"--target={folder / 'site'}"),
        *(f"{name}=={release}" for name, release in wanted.items()),
    ]
    _output(command, "pip install --platform manylinux_aarch64")


def _python(folder: Path) -> str:
    """Version of the unpacked Python, 3.11."""
    found = sorted((folder / "system" / "usr" / "bin").glob("python3.*[0-9]"))
    if not found:
        raise EvaluationError(f"{folder}: no Python there. Remove the folder and run `make arm64` again.")
    return found[-1].name.removeprefix("python")


def _write_cpuinfo(path: Path) -> None:
    """What the guest reads as /proc/cpuinfo: QEMU looks below the unpacked system first."""
    path.parent.mkdir(parents=True)
    path.write_text("".join(_CPUINFO.format(number) for number in range(os.cpu_count() or cores())), encoding="ascii")


def _output(command: Sequence[str], what: str, patience: float | None = None) -> str:
    """Standard output of a command. Raises EvaluationError with the last line of its errors when it fails."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=patience)
    except subprocess.TimeoutExpired:
        raise EvaluationError(f"{what}: not done after {patience:,.0f} seconds.") from None
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EvaluationError(f"{what}: failed with status {done.returncode}: {last}")
    return done.stdout
