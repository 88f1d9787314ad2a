"""Artifacts in the arm64 build of ONNX Runtime, under emulation, against the x86-64 build on the same token ids.

    python -m benchmarks.arm64 artifacts/smollm2-135m/variants/q4 [FOLDER ...] --out benchmarks/results/arm64.json

The two builds have kernels of their own, and both round activations to int8: their logits differ by about what that
rounding costs either of them. So each is compared with the same file computed with activations in float, and arm64 may
be off by `LIMIT` times what x86-64 is. `kernels` says which kernels ran: the relative error of one product in each
format, some 5e-3 with int8 activations, 1e-7 in the fallback with float ones, which is 20 to 400 times slower.

An emulator says what arm64 computes, and nothing about its speed.
"""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click
import numpy as np
import onnx
from google.protobuf.message import DecodeError
from rich.console import Console
from rich.table import Table

from benchmarks import probes
from benchmarks.foreign import Request
from benchmarks.probes import Probe
from pipeline.errors import EvaluationError, PipelineError
from pipeline.files import link_or_copy, read_json, scratch_directory, write_json
from pipeline.graph.last_token import every_token
from pipeline.prepack import emulator
from pipeline.prepack.emulator import CPUS, Emulator
from pipeline.tasks.divergence_scores import log_normalisers

ROOT = Path(__file__).resolve().parents[1]
LIMIT = 1.6
"""Error of arm64 over that of x86-64, both against float activations. A product differs from float by 5e-3 to 7e-3 on
both; by up to 8e-3 on arm64 where KleidiAI's kernels run, which round a whole row of activations under one scale
(symmetric 4-bit formats; measured with ONNX Runtime 1.31.1)."""
_TEXT = (
    "The river was the only road through the forest, and for many years the people of the town carried everything they "
    "needed by boat, from flour and salt to the bells of their church."
)
_PROMPT, _DECODED = 24, 8  # tokens read at once, then one at a time
_WIDTH = 160  # characters of the table where there is no terminal

Arrays = dict[str, np.ndarray]
Run = Callable[[Path], str]


@dataclass(frozen=True)
class Gap:
    """How far logits are from others, both float32 [positions, vocab].

    Attributes:
        error: root mean square of the difference over that of the others; the mean of each position, which no
            probability depends on, is taken off both.
        kl: mean KL divergence from the others, nats per position.
        top1: share of positions with the same largest logit.
    """

    error: float
    kl: float
    top1: float


def gap(mine: np.ndarray, others: np.ndarray) -> Gap:
    """Compare logits. Raises EvaluationError when they are not finite or of different shapes."""
    if mine.shape != others.shape or not (np.isfinite(mine).all() and np.isfinite(others).all()):
        bad = [int((~np.isfinite(values)).sum()) for values in (mine, others)]
        raise EvaluationError(
            f"logits of shapes {list(mine.shape)} and {list(others.shape)}, {bad[0]:,} and {bad[1]:,} of them not "
            f"finite: the two builds do not compute the same model."
        )
    a, b = (values - values.mean(axis=1, keepdims=True, dtype=np.float64) for values in (mine, others))
    log_a, log_b = (values - log_normalisers(values)[:, None] for values in (mine, others))
    return Gap(
        error=float(np.sqrt(np.square(a - b).mean() / np.square(b).mean())),
        kl=float((np.exp(log_b) * (log_b - log_a)).sum(axis=1).mean()),
        top1=float((mine.argmax(axis=1) == others.argmax(axis=1)).mean()),
    )


# --- what is computed ---


def open_artifact(folder: Path) -> tuple[Path, onnx.ModelProto]:
    """The graph of an artifact: its file, and itself without weights. Raises EvaluationError when there is none."""
    try:
        path = folder.resolve() / read_json(folder / "genai_config.json")["model"]["decoder"]["filename"]
        model = onnx.load(path, load_external_data=False)
    except (OSError, ValueError, KeyError, TypeError, DecodeError) as error:
        raise EvaluationError(f"{folder}: not a written artifact ({error!r}). Run the quantize stage.") from None
    if not probes.products(model):
        raise EvaluationError(f"{folder}: {path.name} has no quantized product: nothing differs between processors.")
    return path, model


def every_tokens(path: Path, model: onnx.ModelProto, folder: Path) -> Path:
    """The same model in `folder`, on the same data files, with the logits of every token."""
    return _saved(path, every_token(model), folder)


def with_float_activations(path: Path, model: onnx.ModelProto, folder: Path) -> Path:
    """As `every_tokens`, with float activations in every product."""
    plain = onnx.ModelProto()
    plain.CopyFrom(every_token(model))
    for node in probes.products(plain):
        for attribute in node.attribute:
            if attribute.name == "accuracy_level":
                attribute.i = 0
    return _saved(path, plain, folder)


def _saved(path: Path, model: onnx.ModelProto, folder: Path) -> Path:
    entries = (item for tensor in model.graph.initializer for item in tensor.external_data)
    for name in {item.value for item in entries if item.key == "location"}:
        link_or_copy(path.parent / name, folder / name)
    target = folder / path.name
    onnx.save(model, target)
    return target


def token_ids(folder: Path, count: int) -> tuple[int, ...]:
    """The first `count` ids of a text in the artifact's own tokenizer."""
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(_TEXT, add_special_tokens=False).ids
    return tuple((ids * -(-count // len(ids)))[:count])


# --- where it is computed ---


def here(request: Path) -> str:
    """Compute a request with the ONNX Runtime installed here."""
    command = [sys.executable, "-m", "benchmarks.foreign", str(request)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise EvaluationError(f"x86-64: failed with status {done.returncode}: {last}")
    return done.stdout


def emulated(machine: Emulator, request: Path) -> str:
    """Compute a request with the arm64 build."""
    return machine.run(["-m", "benchmarks.foreign", str(request)], [ROOT])


def ask(run: Run, request: Request) -> tuple[dict[str, Any], Arrays]:
    """What the process says of its processor, and the arrays that it computed."""
    path = Path(request.target).with_suffix(".json")
    write_json(path, asdict(request))
    said = json.loads(run(path).strip().splitlines()[-1])
    with np.load(request.target, allow_pickle=False) as arrays:
        return said, dict(arrays)


def probe_request(target: Path, made: Sequence[Probe]) -> Request:
    """Compute the probes; their inputs are written beside `target`."""
    inputs = target.with_name("probe-inputs.npz")
    np.savez(inputs, **{str(probe.path): probe.x for probe in made})
    return Request(str(target), probes=tuple(str(probe.path) for probe in made), probe_inputs=str(inputs))


def check(folder: Path, machines: Sequence[Emulator]) -> dict[str, Any]:
    """All figures of one artifact, JSON-ready; `passed` is False where arm64 computes something else, or slowly."""
    path, model = open_artifact(folder)
    with scratch_directory(path.parent.with_name(f".{path.parent.name}.arm64")) as work:  # near the data, for links
        made = probes.make_probes(probes.formats(model), work)
        decoder = every_tokens(path, model, work / "every")
        decoding = {"decoder": str(decoder), "ids": token_ids(folder, _PROMPT + _DECODED), "prompt": _PROMPT}
        request = replace(probe_request(work / "x86-64.npz", made), **decoding)
        _, ours = ask(here, request)
        plain = Request(
            str(work / "float.npz"), **decoding | {"decoder": str(with_float_activations(path, model, work / "float"))}
        )
        exact = ask(here, plain)[1]["logits"]
        base = gap(ours["logits"], exact)
        runs = []
        for machine in machines:
            said, theirs = ask(partial(emulated, machine), replace(request, target=str(work / f"{machine.cpu}.npz")))
            figures = judge(theirs["logits"], ours["logits"], exact, probes.errors(theirs, made))
            runs.append({"cpu": machine.cpu, **said, **figures})
    return {
        "model": path.stem,
        "prompt_tokens": _PROMPT,
        "decoded_tokens": _DECODED,
        "x86_64": {"to_float": asdict(base), "kernels": probes.errors(ours, made)},
        "arm64": runs,
        "passed": all(run["passed"] for run in runs),
    }


def judge(theirs: np.ndarray, ours: np.ndarray, exact: np.ndarray, kernels: dict[str, float]) -> dict[str, Any]:
    """arm64's logits against x86-64's and against those of float activations; `kernels` are arm64's probes' errors."""
    to_float = gap(theirs, exact)
    ratio = to_float.error / gap(ours, exact).error
    slow = probes.not_int8(kernels)
    return {
        "to_x86_64": asdict(gap(theirs, ours)),
        "to_float": asdict(to_float),
        "error_ratio": ratio,
        "kernels": kernels,
        "not_int8": slow,
        "passed": ratio <= LIMIT and not slow,
    }


# --- the report ---

HEAD = (
    "artifact", "processor, arm64", "products' error", "error to float: x86-64", "arm64", "ratio",
    "error to x86-64", "KL", "top-1", "verdict",
)  # fmt: skip


def rows(records: Sequence[dict[str, Any]]) -> list[list[str]]:
    """The text for each of `HEAD`, by artifact and processor."""
    return [_row(record, run) for record in records for run in record["arm64"]]


def _row(record: dict[str, Any], run: dict[str, Any]) -> list[str]:
    kernels, other = run["kernels"].values(), run["to_x86_64"]
    return [
        record["model"],
        f"{run['cpu']} ({', '.join(run['features']) or 'no dotprod'})",
        f"{min(kernels):.1e} to {max(kernels):.1e}",
        f"{record['x86_64']['to_float']['error']:.4f}",
        f"{run['to_float']['error']:.4f}",
        f"{run['error_ratio']:.2f}",
        f"{other['error']:.4f}",
        f"{other['kl']:.4f}",
        f"{100 * other['top1']:.0f} %",
        "PASS" if run["passed"] else f"FAIL{': float kernels' if run['not_int8'] else ''}",
    ]


def show(records: Sequence[dict[str, Any]], console: Console) -> None:
    """Print every artifact on every processor."""
    table = Table()
    for number, name in enumerate(HEAD):
        table.add_column(name, justify="left" if number < 2 else "right")
    for row in rows(records):
        table.add_row(*row)
    console.print(table)
    console.print(
        f"arm64 passes when its error is at most {LIMIT} times that of x86-64 and every product ran with int8 "
        f"activations. Errors are relative, KL in nats per token."
    )


@click.command()
@click.argument("artifacts", nargs=-1, type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--out", type=click.Path(path_type=Path, dir_okay=False), help="Write the records to this JSON file.")
def main(artifacts: tuple[Path, ...], out: Path | None) -> None:
    """Run artifacts in the arm64 build of ONNX Runtime under emulation and compare with x86-64."""
    if not artifacts:
        raise click.ClickException("no artifact to run: `make demo`, or `python -m pipeline quantize smollm2-135m q4`.")
    try:
        emulator.install()
        records = [check(folder, [Emulator(emulator.place(), cpu) for cpu in CPUS]) for folder in artifacts]
        if out:
            write_json(out, {"emulator": emulator.release(), "records": records})
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    console = Console()
    show(records, console if console.is_terminal else Console(width=_WIDTH))
    sys.exit(0 if all(record["passed"] for record in records) else 1)


if __name__ == "__main__":
    main()
