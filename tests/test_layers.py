"""Promises about imports: rooms look down only, no two modules import each other, core stages need no torch."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

# Lowest first. A module may import its own room and those before it.
ROOMS = [
    ("compiled", "config", "errors", "files", "journal", "machine", "partial", "progress"),
    ("keys",),
    ("checkpoint",),
    ("workspace",),
    ("engine",),
    ("graph",),
    ("quantize",),
    ("runtime",),
    ("calibrate",),
    ("door",),
    ("parity",),
    ("planning",),
    ("artifact",),
    ("learn",),
    ("prepack",),
    ("confine",),
    ("tasks",),
    ("judge",),
    ("preflight",),
    ("bundle", "report"),
    ("packs", "publish", "serve"),
    ("stages",),
    ("cli", "__main__"),
]
RANK = {name: rank for rank, names in enumerate(ROOMS) for name in names}
MODULES = {
    ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in Path("pipeline").rglob("*.py")
}
CORE = ["download", "export", "calibrate", "learn", "quantize", "verdict", "bundle", "sign", "tiers", "packs", "report"]


def imported(name: str) -> set[str]:
    """Our modules that a module imports, wherever in it: `from a import b` may mean a.b."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(MODULES[name].read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    return (found & MODULES.keys()) - {name, "pipeline"}


@pytest.mark.parametrize("name", sorted(MODULES.keys() - {"pipeline"}))
def test_rooms_import_downwards_only(name: str) -> None:
    own = RANK[name.split(".")[1]]
    upwards = {other for other in imported(name) if RANK[other.split(".")[1]] > own}
    assert not upwards


def test_no_modules_import_each_other() -> None:
    """Round by round, modules that import nothing but what is done are done; what is left over is in a cycle."""
    left = {name: imported(name) for name in MODULES}
    while done := {name for name, needed in left.items() if not needed & left.keys()}:
        left = {name: needed for name, needed in left.items() if name not in done}
    assert not left


def test_only_what_learns_or_runs_on_a_gpu_and_references_import_torch() -> None:
    """When a recipe or the configuration asks for them: all core stages load without torch."""
    found = {name for name, path in MODULES.items() if re.search("(import|from) torch", path.read_text())}
    expected = {
        "learn.training", "parity.optimum_export", "parity.phimoe", "runtime.device", "runtime.interpreter",
    }  # fmt: skip
    assert {name.removeprefix("pipeline.") for name in found} == expected


def test_core_stages_import_neither_torch_nor_optimum() -> None:
    code = "import importlib, sys\n"
    code += "".join(f"importlib.import_module('pipeline.stages.{name}')\n" for name in CORE)
    code += "print([name for name in ('torch', 'optimum', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
