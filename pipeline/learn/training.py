"""What is learned of an artifact, and how: factors on its scales, norms and biases, by AdamW on the KL divergence from
the full-precision model.

A learned value is the written one times (1 + factor), rounded as it is stored before every use, so training sees the
file's own numbers; gradients pass the rounding as if it were not there. Codes and zero points stay. Factors make one
rate fit all: scales of a model lie decades apart. The idea is EfficientQAT's end-to-end phase (arXiv 2407.11062), with
the full-precision model's logits in place of text, as in mlx-lm's DWQ.

The bytes are the same for the same inputs, seed, device and number of threads, interrupted or not.
"""

from __future__ import annotations

import io
import math
import os
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from onnx import TensorProto
from torch.nn import functional

from pipeline.config.recipes import Learning
from pipeline.errors import EvaluationError, ResourceError
from pipeline.files import write_bytes
from pipeline.machine import cores
from pipeline.progress import Progress
from pipeline.runtime.interpreter import Interpreter, Tensor

SAVE_SECONDS = 60.0
_WARMUP = 0.1  # share of the steps in which the rate grows to its full height; then it falls as a cosine
_BETAS = (0.9, 0.99)  # hundreds of steps, not the tens of thousands that 0.999 averages over


@dataclass(frozen=True)
class Learned:
    """What came of it.

    Attributes:
        values: the tensors to be written, by name, as they are stored; empty if learning did not help.
        before, after: mean KL divergence in nats of the checked windows, as written and with `values`.
        losses: of every step, in nats.
    """

    values: dict[str, np.ndarray]
    before: float
    after: float
    losses: list[float]


def precision(kind: str) -> torch.dtype:
    """Of products on a device: everything else is float32."""
    return torch.float32 if kind == "cpu" else torch.bfloat16


def learn(
    student: Interpreter, teacher: Interpreter, windows: Sequence[np.ndarray], checked: Sequence[np.ndarray],
    wanted: Learning, state: Path, label: str,
) -> Learned:  # fmt: skip
    """Learn from `windows`, int64 [window] each and all of one length; those that are `checked` judge.

    `state`: a file in which training is kept; a run that was killed goes on there, to the same values.

    Raises:
        EvaluationError: the loss is no number.
        ResourceError: the device's memory does not hold it.
    """
    texts, judging = (torch.from_numpy(np.stack(some)) for some in (windows, checked))
    with _settled(), _fitting():
        training = _Training(student, teacher, wanted, state)
        if training.before is None:
            training.before = training.divergence(judging)
        with Progress(f"learn {label}", wanted.steps, "steps") as progress:
            progress.advance(len(training.losses), kept=True)
            for chosen in _batches(len(texts), max(1, wanted.tokens // texts.shape[1]), wanted, len(training.losses)):
                training.step(texts[chosen])
                progress.advance()
        training.save()
        after = training.divergence(judging)
        values = training.values() if after < training.before else {}
        arrays = {name: value.detach().to(student.stored[name].dtype).cpu().numpy() for name, value in values.items()}
        return Learned(arrays, training.before, after if values else training.before, training.losses)


class _Training:
    """Factors, their optimizer and the history of one artifact."""

    def __init__(self, student: Interpreter, teacher: Interpreter, wanted: Learning, state: Path):
        self._student, self._teacher, self._wanted, self._file = student, teacher, wanted, state
        self._written = {name: student.stored[name] for name in learnable(student)}
        self._factors = {name: torch.zeros_like(value, dtype=torch.float32) for name, value in self._written.items()}
        for factor in self._factors.values():
            factor.requires_grad_()
        self._optimizer = torch.optim.AdamW(self._factors.values(), wanted.rate, _BETAS, weight_decay=0, foreach=False)
        self.before: float | None = None
        self.losses: list[float] = []
        self._saved = time.monotonic()
        if state.exists():
            self._restore(torch.load(state, weights_only=True, map_location=student.device))

    def values(self) -> dict[str, Tensor]:
        """The learned tensors as they would be stored, float16 or float32; gradients reach the factors."""
        return {name: _stored(written, self._factors[name]) for name, written in self._written.items()}

    @torch.no_grad()
    def divergence(self, windows: Tensor) -> float:
        """Mean KL divergence over some windows, one at a time."""
        values = self.values()
        return sum(self._divergence(one[None], values).item() for one in windows) / len(windows)

    def step(self, windows: Tensor) -> None:
        """One step down the gradient of some windows' divergence. Raises EvaluationError where it is no number."""
        for group in self._optimizer.param_groups:
            group["lr"] = self._wanted.rate * _height(len(self.losses), self._wanted.steps)
        loss = 0.0
        for one in windows:  # one at a time: memory is that of a window, however many make a step
            share = self._divergence(one[None], self.values()) / len(windows)
            share.backward()
            loss += share.item()
        self.losses.append(loss)
        if not math.isfinite(self.losses[-1]):
            raise EvaluationError(
                f"learning: the loss of step {len(self.losses)} is {self.losses[-1]}. Lower `rate` of `learn` in the "
                f"recipe (it is {self._wanted.rate})."
            )
        self._optimizer.step()
        self._optimizer.zero_grad()
        if time.monotonic() - self._saved > SAVE_SECONDS:
            self.save()

    def save(self) -> None:
        """Keep all that training goes on from."""
        data = io.BytesIO()
        kept = {"factors": self._factors, "optimizer": self._optimizer.state_dict()}
        torch.save(kept | {"losses": self.losses, "before": self.before}, data)
        write_bytes(self._file, data.getvalue())
        self._saved = time.monotonic()

    def _restore(self, kept: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, factor in self._factors.items():
                factor.copy_(kept["factors"][name])
        self._optimizer.load_state_dict(kept["optimizer"])
        self.losses, self.before = kept["losses"], kept["before"]

    def _divergence(self, windows: Tensor, values: dict[str, Tensor]) -> Tensor:
        with torch.no_grad():
            wanted = functional.log_softmax(self._teacher.logits(windows), -1)
        found = functional.log_softmax(self._student.logits(windows, values), -1)
        return functional.kl_div(found, wanted, reduction="sum", log_target=True) / windows.numel()


def learnable(student: Interpreter) -> list[str]:
    """Names of the stored tensors that are learned: scales; norms and biases, float32 vectors."""
    return [
        name
        for name, item in student.external.items()
        if (len(item.dims) == 1 if item.data_type == TensorProto.FLOAT else name.endswith((".scales", ".largest")))
    ]


def _stored(written: Tensor, factor: Tensor) -> Tensor:
    """Float32, as the type of `written` holds it. A short scale is a share of its row's largest: both are learned."""
    value = written.float() * (1 + factor)
    if written.dtype == torch.float32:
        return value
    if written.dtype == torch.float16:
        return value + (value.half().float() - value).detach()
    most = torch.iinfo(written.dtype).max
    return value + (value.round().clamp(-most, most) - value).detach()


def _height(step: int, steps: int) -> float:
    """Of the rate at a step from 0 on, as a share of the whole."""
    rising = max(1, round(_WARMUP * steps))
    return min((step + 1) / rising, 0.5 * (1 + math.cos(math.pi * step / steps)))


def _batches(windows: int, size: int, wanted: Learning, done: int) -> Iterator[np.ndarray]:
    """The windows of each step after `done`: all of them in one seeded order, then in another."""
    rng, queue = np.random.default_rng(wanted.seed), np.empty(0, np.int64)
    for step in range(wanted.steps):
        while len(queue) < size:
            queue = np.concatenate([queue, rng.permutation(windows)])
        chosen, queue = queue[:size], queue[size:]
        if step >= done:
            yield chosen


@contextmanager
def _settled() -> Iterator[None]:
    """Torch computing the same bytes every time, on this process's cores. Nothing here reads memory before it writes
    it, so torch need not fill it first, which took an eighth of a step."""
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    settings: Any = torch.utils.deterministic  # a module that types do not know
    before, threads = torch.are_deterministic_algorithms_enabled(), torch.get_num_threads()
    filling, settings.fill_uninitialized_memory = settings.fill_uninitialized_memory, False
    torch.use_deterministic_algorithms(True)
    torch.set_num_threads(cores())
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)
        torch.set_num_threads(threads)
        settings.fill_uninitialized_memory = filling


@contextmanager
def _fitting() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        if not isinstance(error, torch.OutOfMemoryError) and "can't allocate memory" not in str(error):
            raise
        raise ResourceError(
            f"learning: the device's memory does not hold the model and a window's activations ({error}). Shorten "
            f"`window` in configs/calibration.yaml, or learn on the CPU (PIPELINE_DEVICE=cpu)."
        ) from None
