"""Knowledge distillation on the CPU: a student that was cut from its teacher learns to give the teacher's logits.

https://arxiv.org/abs/1503.02531. Beside the KL divergence over the whole vocabulary, the residual stream after every
few layers is compared with the teacher's on the channels that both have: what a layer gets wrong is told there, not
through all layers above it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from benchmarks.quality.decoder import EMBEDDING, Shape, Weights, hidden_states, logits


@dataclass(frozen=True)
class Schedule:
    """How long and how fast: AdamW, a linear warm-up, then a cosine down to a tenth."""

    steps: int
    windows: int = 4  # a step
    rate: float = 5e-4
    warm: int = 20  # steps
    every: int = 5  # layers between two comparisons of the stream
    stream: float = 1.0  # what a relative squared error of 1 costs, in nats

    def factor(self, step: int) -> float:
        """Of the rate, at a step."""
        done = max(0, step - self.warm) / max(1, self.steps - self.warm)
        return min(1.0, (step + 1) / self.warm) * (0.55 + 0.45 * math.cos(math.pi * min(1.0, done)))


def distil(
    student: tuple[Weights, Shape],
    teacher: tuple[Weights, Shape],
    kept: Tensor,
    windows: Tensor,
    schedule: Schedule,
    report: Callable[[int, float, float], None] = lambda step, kl, stream: None,
) -> Weights:
    """The student's weights after training, float32. Products are computed in bfloat16.

    Args:
        student, teacher: float32 weights and shape; the student's are left as they are.
        kept: the teacher's channels that the student has, int64 [channels].
        windows: token ids, int64 [windows, tokens], in the order of training; begun again where they end.
        report: called after each step with its number and both parts of the loss before it.
    """
    weights = {name: values.clone().requires_grad_() for name, values in student[0].items()}
    fixed = {name: values.bfloat16() if values.ndim == 2 else values for name, values in teacher[0].items()}
    fixed[EMBEDDING] = teacher[0][EMBEDDING]  # the stream stays in float32
    optimizer = torch.optim.AdamW(weights.values(), schedule.rate, (0.9, 0.95), weight_decay=0.0, fused=True)
    cosine = torch.optim.lr_scheduler.LambdaLR(optimizer, schedule.factor)
    for step in range(schedule.steps):
        chosen = torch.arange(step * schedule.windows, (step + 1) * schedule.windows) % len(windows)
        with torch.autocast("cpu", torch.bfloat16):
            kl, stream = _losses(windows[chosen], (weights, student[1]), (fixed, teacher[1]), kept, schedule.every)
        (kl + schedule.stream * stream).backward()
        torch.nn.utils.clip_grad_norm_(weights.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        cosine.step()
        report(step, kl.item(), stream.item())
    return {name: values.detach() for name, values in weights.items()}


def _losses(
    ids: Tensor, student: tuple[Weights, Shape], teacher: tuple[Weights, Shape], kept: Tensor, every: int
) -> tuple[Tensor, Tensor]:
    """Mean KL divergence, and mean relative squared error of the stream, of one step's windows."""
    with torch.no_grad():
        wanted = hidden_states(ids, *teacher)
        target = F.log_softmax(logits(wanted[-1], *teacher).float(), -1)
    found = hidden_states(ids, *student)
    own = F.log_softmax(logits(found[-1], *student).float(), -1)
    kl = F.kl_div(own.flatten(0, 1), target.flatten(0, 1), reduction="batchmean", log_target=True)
    errors = [_stray(found[at], wanted[at][..., kept]) for at in range(every, len(found) - 1, every)]
    return kl, torch.stack(errors).mean() if errors else torch.zeros(())


def _stray(found: Tensor, wanted: Tensor) -> Tensor:
    """Mean log(1 + relative squared error) of the tokens: few are a thousand times off, and would decide otherwise."""
    return ((found - wanted).square().mean(-1) / wanted.square().mean(-1)).log1p().mean()
