"""Two promises about imports: layers look down only, and core stages need neither torch nor optimum."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

# Lowest first. A module may import its own layer and those before it.
LAYERS = [
    ("compiled", "config", "errors", "files", "machine", "progress"),
    ("checkpoint",),
    ("graph",),
    ("quantize",),
    ("planning",),
    ("artifact",),
    ("evaluate",),
    ("bundle", "report"),
    ("stores", "publish"),
    ("stages",),
    ("cli", "__main__"),
]
RANK = {name: rank for rank, names in enumerate(LAYERS) for name in names}
MODULES = sorted(Path("pipeline").rglob("*.py"))
CORE = ["download", "export", "calibrate", "quantize", "verdict", "bundle", "sign", "tiers", "packs", "plan", "report"]


def imported(path: Path) -> set[str]:
    """Names right below `pipeline` that a module imports."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module == "pipeline":
            names |= {alias.name for alias in node.names if alias.name in RANK}
        elif isinstance(node, ast.ImportFrom) and node.module and node.module.startswith("pipeline."):
            names.add(node.module.split(".")[1])
        elif isinstance(node, ast.Import):
            names |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("pipeline.")}
    return names


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_layers_import_downwards_only(path: Path) -> None:
    own = path.with_suffix("").parts[1]
    if own == "__init__":
        return
    upwards = {name for name in imported(path) if RANK[name] > RANK[own]}
    assert not upwards, f"{path} ({own}) imports {upwards}"


def test_core_stages_import_neither_torch_nor_optimum() -> None:
    code = "import importlib, sys\n"
    code += "".join(f"importlib.import_module('pipeline.stages.{name}')\n" for name in CORE)
    code += "print([name for name in ('torch', 'optimum', 'transformers') if name in sys.modules])"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
