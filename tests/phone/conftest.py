"""Compilers of the phone's languages, and what they make of phone/: once a session, kept until sources change."""

from __future__ import annotations

import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.conftest import ROOT

PHONE = ROOT / "phone"


def kotlin_compiler(java: str) -> tuple[list[str], Path | None]:
    """Command of a Kotlin compiler, and the library that its output needs if the compiler does not include it.

    $KOTLINC if set, else the compiler inside the wheel of requirements-dev.txt, else `kotlinc` of the PATH.
    """
    if os.environ.get("KOTLINC"):
        return [os.environ["KOTLINC"], "-include-runtime"], None
    wheel = importlib.util.find_spec("run_kotlin_kernel")
    if wheel is not None and wheel.submodule_search_locations:
        jars = Path(wheel.submodule_search_locations[0]) / "jars"
        library = next(iter(jars.glob("kotlin-stdlib-*.jar")))
        options = [
            "-Xmx1g",
            "-XX:TieredStopAtLevel=1",
            "-cp",
            f"{jars}/*",
            "org.jetbrains.kotlin.cli.jvm.K2JVMCompiler",
        ]
        return [java, *options, "-no-stdlib", "-no-reflect", "-classpath", str(library)], library
    if found := shutil.which("kotlinc"):
        return [found, "-include-runtime"], None
    pytest.skip("optional: no Kotlin compiler; pip install -r requirements-dev.txt, or set KOTLINC")


def compiled(compiler: list[str], sources: list[Path], name: str, output: str = "-d") -> Path:
    """What `compiler` makes of `sources`, kept in the temporary folder until they or the compiler change.

    `output`: its option that names the result.
    """
    key = hashlib.sha256("\0".join([*compiler, *(source.read_text() for source in sources)]).encode()).hexdigest()
    made = Path(tempfile.gettempdir()) / f"phone-{os.getuid()}" / f"{key}-{name}"
    if not made.exists():
        made.parent.mkdir(mode=0o700, exist_ok=True)
        unfinished = made.with_name(f"{os.getpid()}-{name}")
        subprocess.run([*compiler, *map(str, sources), output, str(unfinished)], check=True)
        unfinished.rename(made)
    return made


@pytest.fixture(scope="session")
def javascript() -> Callable[[str], list[str]]:
    """The command of a program of phone/javascript, by its name."""
    node = shutil.which("node")
    if node is None:
        pytest.skip("optional: Node 20 or later is not installed")
    return lambda name: [node, str(PHONE / f"javascript/{name}.mjs")]


@pytest.fixture(scope="session")
def kotlin() -> Callable[[str], list[str]]:
    """The command of a class of phone/kotlin, without what needs Android."""
    java = shutil.which("java")
    if java is None:
        pytest.skip("optional: no JDK is installed")
    compiler, library = kotlin_compiler(java)
    jar = compiled(compiler, sorted((PHONE / "kotlin").glob("*.kt")), "phone.jar")
    classpath = os.pathsep.join([str(jar), *([str(library)] if library else [])])
    return lambda name: [java, "-XX:TieredStopAtLevel=1", "-cp", classpath, f"modelbundle.{name}"]


@pytest.fixture(scope="session")
def swift() -> list[str]:
    """The command of phone/swift's vectors, compiled by $SWIFTC or the `swiftc` of the PATH; on Linux over OpenSSL."""
    found = os.environ.get("SWIFTC") or shutil.which("swiftc")
    if found is None:
        pytest.skip("optional: no Swift compiler is installed")
    folder, shim = PHONE / "swift", ROOT / "tests/phone/swift"
    sources = sorted([*folder.glob("*.swift"), folder / "vectors/main.swift"])
    if sys.platform == "darwin":
        return [str(compiled([found], sources, "vectors", "-o"))]
    return [str(compiled([found, "-I", str(shim / "openssl")], [*sources, shim / "Crypto.swift"], "vectors", "-o"))]
