"""What workers bring: SmolLM2 quantized by threads of this process, and by one and two Ray nodes of one core here.

`python -m benchmarks.engine q4` also says what a unit costs besides its work. Needs requirements-ray.txt and the demo.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import onnx

from pipeline import keys
from pipeline.artifact.learned import digests_of
from pipeline.artifact.plans import plan_recipe
from pipeline.artifact.rotated import Rotated
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.config.engine import VARIABLE
from pipeline.config.recipes import load_recipe
from pipeline.engine import chosen
from pipeline.partial import open_partial
from pipeline.stages.quantize import write_files
from pipeline.workspace import MODEL_FILE, Workspace

MODEL, UNITS = "smollm2-135m", 500


def nothing(unit: int) -> int:
    """The smallest unit."""
    return unit


def measure(nodes: int, variant: str) -> None:
    """Print one line: seconds of quantizing, milliseconds of an empty unit, and a digest of the artifact's files."""
    if nodes:
        os.environ[VARIABLE], os.environ["RAY_ENABLE_WINDOWS_OR_OSX_CLUSTER"] = "ray", "0"
        from ray.cluster_utils import Cluster

        own = {"num_cpus": 1, "node_ip_address": "127.0.0.1", "object_store_memory": 500 << 20}
        cluster = Cluster(True, head_node_args={**own, "include_dashboard": False})
        for _ in range(nodes - 1):
            cluster.add_node(**own)
        os.environ["RAY_ADDRESS"] = cluster.address
    workspace, recipe, engine = Workspace(MODEL), load_recipe(variant), chosen()
    weights = workspace.weights(Store())
    architecture = read_architecture(weights / "config.json")
    planned = plan_recipe(
        recipe, architecture, onnx.load(workspace.export / MODEL_FILE, load_external_data=False), variant, MODEL
    )
    engine.run(nothing, range(4 * engine.workers), lambda *_: None)  # workers have started
    started = time.perf_counter()
    engine.run(nothing, range(UNITS), lambda *_: None)
    each = (time.perf_counter() - started) / UNITS
    with (
        tempfile.TemporaryDirectory(dir=workspace.root) as scratch,
        open_partial(Path(scratch) / "a", "key") as growing,
    ):
        started = time.perf_counter()
        write_files(growing, recipe, planned, Rotated(weights, architecture, recipe.rotation), workspace)
        spent = time.perf_counter() - started
        name = f"{nodes} nodes" if nodes else f"{engine.workers} threads"
        print(
            f"{name}: {spent:.1f} s, {1000 * each:.2f} ms a unit, files {keys.digest(digests_of(growing.folder))[:16]}"
        )
    sys.stdout.flush()


if __name__ == "__main__":
    if len(sys.argv) == 3:
        measure(int(sys.argv[2]), sys.argv[1])
    else:
        for count in (0, 1, 2):
            subprocess.run([sys.executable, "-m", "benchmarks.engine", sys.argv[1], str(count)], check=True)
