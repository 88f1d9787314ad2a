"""What a GPU computes of full-precision passes beside the CPU: the same, and how much sooner.

    make gpu-check

Each device runs the pipeline's own passes in a process of its own, on SmolLM2 and on one layer of MiMo's shapes with
synthetic weights: calibration with its sums, recorded logits, texts side by side and the first steps of learning. All
tokens are random, of one seed. Sums and logits must agree up to rounding; learning multiplies in bfloat16 on a GPU, so
there only its first loss must. Exits with 1 where they do not agree, or where torch has no GPU.
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx

from benchmarks import machine, synthetic
from benchmarks.project import RESULTS, ROOT, SMALL
from pipeline.checkpoint.architecture import Architecture, read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.models import DEVICE
from pipeline.config.recipes import Learning
from pipeline.errors import PipelineError
from pipeline.files import write_json
from pipeline.graph.decoder import build_decoder, save_decoder
from pipeline.graph.slices import DecoderSlices
from pipeline.runtime.device import chosen_device, computed_by
from pipeline.runtime.layered import LayeredDecoder
from pipeline.runtime.side_by_side import SideBySide
from pipeline.runtime.stream import LayerStream
from pipeline.workspace import MODEL_FILE, Workspace

VARIANT = "q4"
LIMITS = {"calibration": 1e-3, "logits": 1e-5, "writing": 0.02, "learning": 0.05}
"""The most that devices may differ, as `difference` has it."""
Arrays = dict[str, np.ndarray]


class Passes:
    """The passes over one model on the chosen device.

    Args:
        folder: its full-precision graph and weights.
        scratch: an existing folder for hidden states.
        windows, tokens: of the text.
        artifact: a written variant of it, or None: then nothing is learned.
    """

    def __init__(self, folder: Path, scratch: Path, windows: int, tokens: int, artifact: Path | None):
        self.folder, self.scratch, self.artifact = folder, scratch, artifact
        self.architecture: Architecture = read_architecture(folder / "config.json")
        self.ids = np.random.default_rng(0).integers(0, self.architecture.vocab, (windows, tokens))

    def run(self) -> Arrays:
        """What each pass gives by `<pass>/<name>`, and its `<pass>.seconds`."""
        found: Arrays = {}
        chosen_device().get(chosen_device().put(self.ids))  # a GPU's first use takes seconds
        works: dict[str, Callable[[], Arrays]] = {
            "calibration": self.calibration, "logits": self.logits, "writing": self.writing, "learning": self.learning,
        }  # fmt: skip
        for name, work in works.items():
            start = time.monotonic()
            if values := work():
                found |= {f"{name}/{key}": value for key, value in values.items()}
                found[f"{name}.seconds"] = np.array(time.monotonic() - start)
        return found

    def calibration(self) -> Arrays:
        """Sums of each input."""
        slices = DecoderSlices(onnx.load(self.folder / MODEL_FILE, load_external_data=False), self.architecture, True)
        stream, found = LayerStream(slices, self.folder, list(self.ids), self.scratch), dict[str, np.ndarray]()
        while stream.layer <= self.architecture.layers:
            found |= {name: total.diagonal().copy() for name, total in stream.advance().products.items()}
        return found

    def logits(self) -> Arrays:
        """Of two windows, float32 [tokens, vocab]."""
        decoder = LayeredDecoder(self.folder / MODEL_FILE, self.architecture, self.scratch / "states", "check")
        decoder.prepare(lambda asked: [asked.run(row) for row in self.ids[:2]])
        return {"logits": np.concatenate([decoder.run(row)[0] for row in self.ids[:2]])}

    def writing(self) -> Arrays:
        """What follows the beginnings of all windows, 16 tokens each, the likeliest ones."""
        model = SideBySide(self.folder / MODEL_FILE, self.architecture, len(self.ids), 48)
        texts = [self.ids[:, :32]]
        for _ in range(16):
            texts.append(model.run(texts[-1].tolist()).argmax(axis=1)[:, None])
        return {"ids": np.concatenate(texts[1:], axis=1)}

    def learning(self) -> Arrays:
        """The loss of three steps, and the divergence before them."""
        if self.artifact is None:
            return {}
        from pipeline.learn.training import learn, precision
        from pipeline.runtime.interpreter import Interpreter

        kind, (graph,) = chosen_device().kind, self.artifact.glob("*.onnx")
        student, teacher = (
            Interpreter(onnx.load(path, load_external_data=False), path.parent, kind, precision(kind))
            for path in (graph, self.folder / MODEL_FILE)
        )
        wanted = Learning(steps=3, tokens=2 * self.ids.shape[1])
        state = self.scratch / "training"
        learned = learn(student, teacher, list(self.ids[2:]), list(self.ids[:2]), wanted, state, "check")
        return {"losses": np.array([learned.before, *learned.losses])}


def difference(name: str, cpu: Mapping[str, np.ndarray], gpu: Mapping[str, np.ndarray]) -> float:
    """Of sums, the greatest as a share of an input's greatest; of logits, mean KL in nats; of texts, the share that is
    not the same up to its end; of learning, the first divergence's, as a share."""
    pairs = [(cpu[key], gpu[key]) for key in cpu if key.startswith(f"{name}/")]
    if name == "calibration":
        return float(max(np.abs(ours - theirs).max() / ours.max() for ours, theirs in pairs))
    ((ours, theirs),) = pairs
    if name == "logits":
        logs = [x - np.logaddexp.reduce(x, axis=1, keepdims=True) for x in (ours.astype(float), theirs.astype(float))]
        return float((np.exp(logs[0]) * (logs[0] - logs[1])).sum(axis=1).mean())
    if name == "writing":
        return float((ours != theirs).mean())
    return float(abs(theirs[0] / ours[0] - 1))


def compared(subject: str, cpu: Mapping[str, np.ndarray], gpu: Mapping[str, np.ndarray]) -> list[dict[str, Any]]:
    """A row for each pass: seconds, their ratio, and `difference`."""
    rows: list[dict[str, Any]] = []
    for name, limit in LIMITS.items():
        if (seconds := f"{name}.seconds") in cpu:
            ours, theirs, gap = float(cpu[seconds]), float(gpu[seconds]), difference(name, cpu, gpu)
            row = {"subject": subject, "pass": name, "cpu_seconds": ours, "gpu_seconds": theirs, "ratio": ours / theirs}
            rows.append(row | {"difference": gap, "limit": limit, "agrees": gap <= limit})
    return rows


def _both(folder: Path, scratch: Path, windows: int, tokens: int, artifact: Path | None) -> list[Arrays]:
    """The passes on the CPU and on the GPU."""
    found = []
    for device in ("cpu", "cuda"):
        with tempfile.TemporaryDirectory(dir=scratch) as own:
            command = [
                sys.executable,
                "-m",
                "benchmarks.gpu_check",
                "once",
                str(folder),
                own,
                str(windows),
                str(tokens),
            ]
            subprocess.run([*command, str(artifact or "")], cwd=ROOT, env=os.environ | {DEVICE: device}, check=True)
            with np.load(Path(own) / "found.npz") as arrays:
                found.append(dict(arrays))
    return found


@click.group(invoke_without_command=True)
@click.pass_context
def main(context: click.Context) -> None:
    """Compare the devices; write benchmarks/results/gpu_check.json."""
    if context.invoked_subcommand:
        return
    os.environ[DEVICE] = "cuda"
    try:
        name, workspace = chosen_device().name, Workspace(SMALL)
        artifact = workspace.require(workspace.artifact(VARIANT), "quantize", VARIANT)
        with tempfile.TemporaryDirectory(dir=ROOT) as scratch:
            rows = compared(SMALL, *_both(workspace.reference(Store()), Path(scratch), 8, 256, artifact))
            mimo = Path(scratch) / "mimo-8b"
            synthetic.write_checkpoint(mimo, "mimo-8b", layers=1)
            graph, rope = build_decoder(read_architecture(mimo / "config.json"), Checkpoint(mimo), 512)
            save_decoder(mimo, graph, rope, MODEL_FILE)
            rows += compared("mimo-8b, 1 layer", *_both(mimo, Path(scratch), 8, 512, None))
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    for row in rows:
        click.echo(
            "{subject:<18} {pass:<12} cpu {cpu_seconds:8.2f} s  gpu {gpu_seconds:8.2f} s  {ratio:6.1f} ×  "
            "difference {difference:.2g} of at most {limit:g}".format(**row)
        )
    write_json(RESULTS / "gpu_check.json", {"machine": machine.describe(), "gpu": name, "rows": rows})
    sys.exit(not all(row["agrees"] for row in rows))


@main.command(hidden=True)
@click.argument("folder", type=click.Path(path_type=Path))
@click.argument("scratch", type=click.Path(path_type=Path))
@click.argument("windows", type=int)
@click.argument("tokens", type=int)
@click.argument("artifact")
def once(folder: Path, scratch: Path, windows: int, tokens: int, artifact: str) -> None:
    """Run the passes on the chosen device, and keep what they give."""
    found = Passes(folder, scratch, windows, tokens, Path(artifact) if artifact else None).run()
    np.savez(scratch / "found.npz", **found)  # type: ignore[arg-type]  # numpy's stub takes them for `allow_pickle`
    click.echo(f"{folder.name}: {computed_by()}")


if __name__ == "__main__":
    main()
