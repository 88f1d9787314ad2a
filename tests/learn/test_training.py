"""Learning lowers the divergence, touches scales and norms alone, and gives the same values, interrupted or not."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from pipeline.config.recipes import Learning
from pipeline.errors import EvaluationError
from pipeline.learn import training
from pipeline.learn.training import Learned, learn
from pipeline.runtime.interpreter import Interpreter
from tests.artifact.exported import Exported, export
from tests.families import CASES, make_checkpoint
from tests.recipes import load_recipe

WANTED = Learning(steps=12, tokens=96, rate=3e-3)


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    folder = tmp_path_factory.mktemp("training")
    one = export(make_checkpoint(folder / "checkpoint", CASES["qwen2-tied"], dtype="BF16"))
    one.write(load_recipe("q3"), folder / "artifact")
    return one


@pytest.fixture(autouse=True, scope="module")
def _one_thread() -> Iterator[None]:
    """Threads wait for one another longer than so small a model computes."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(training, "cores", lambda: 1)
        yield


def windows(seed: int, count: int) -> list[np.ndarray]:
    return list(np.random.default_rng(seed).integers(0, 320, (count, 48)))


def student(one: Exported) -> Interpreter:
    return Interpreter(one.draft(load_recipe("q3")).model, one.folder.parent / "artifact")


def learned(one: Exported, state: Path, wanted: Learning = WANTED) -> Learned:
    teacher = Interpreter(one.model, one.folder)
    return learn(student(one), teacher, windows(1, 16), windows(2, 4), wanted, state, "tiny")


@pytest.fixture(scope="module")
def whole(exported: Exported, tmp_path_factory: pytest.TempPathFactory) -> Learned:
    return learned(exported, tmp_path_factory.mktemp("whole") / "state")


def test_divergence_falls_on_text_that_was_not_learned_from(whole: Learned) -> None:
    assert whole.after < 0.98 * whole.before
    assert len(whole.losses) == WANTED.steps


def test_scales_norms_and_biases_alone_are_learned_in_their_types(exported: Exported, whole: Learned) -> None:
    stored = student(exported).stored
    kinds = {(value.dtype.name, value.ndim) for value in whole.values.values()}
    assert kinds == {("float16", 2), ("float32", 1)}
    for name, value in whole.values.items():
        before = stored[name].numpy()
        assert name.endswith((".scales", "norm.weight/float32", ".bias/float32"))
        assert (value.shape, value.dtype) == (before.shape, before.dtype)
        assert 0 < np.abs(value.astype(float) - before).max() < 0.1 * np.abs(before).max()
    assert sum(name.endswith(".scales") for name in whole.values) == sum(name.endswith(".scales") for name in stored)


def test_a_run_interrupted_anywhere_goes_on_to_the_same_values(
    exported: Exported, whole: Learned, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(training, "SAVE_SECONDS", 0.0)
    step, left = training._Training.step, [5, 1, 4]

    def interrupted(self: training._Training, some: torch.Tensor) -> None:
        if left and left[0] == 0:
            left.pop(0)
            raise KeyboardInterrupt
        if left:
            left[0] -= 1
        step(self, some)

    monkeypatch.setattr(training._Training, "step", interrupted)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            learned(exported, tmp_path / "state")
    found = learned(exported, tmp_path / "state")
    assert (found.before, found.after, found.losses) == (whole.before, whole.after, whole.losses)
    assert found.values.keys() == whole.values.keys()
    assert all(value.tobytes() == whole.values[name].tobytes() for name, value in found.values.items())


def test_torch_is_left_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    def settings() -> tuple[object, ...]:
        filling = torch.utils.deterministic.fill_uninitialized_memory
        return torch.are_deterministic_algorithms_enabled(), filling, torch.get_num_threads()

    before = settings()
    monkeypatch.setattr(training, "cores", lambda: before[-1] + 1)
    with pytest.raises(KeyError), training._settled():
        assert settings() == (True, False, before[-1] + 1)
        raise KeyError
    assert settings() == before


def test_products_in_bfloat16_have_the_same_gradients_up_to_their_rounding(exported: Exported) -> None:
    """What a GPU computes with, here on the CPU."""
    found = []
    for precision in (torch.float32, torch.bfloat16):
        drafted, folder = exported.draft(load_recipe("q3")).model, exported.folder.parent / "artifact"
        one = Interpreter(drafted, folder, precision=precision)
        scales = {name: one.stored[name].float().requires_grad_() for name in training.learnable(one)}
        one.logits(torch.from_numpy(np.stack(windows(1, 2))), scales).square().mean().backward()
        found.append(torch.cat([value.grad.flatten() for value in scales.values()]))
    assert torch.nn.functional.cosine_similarity(*found, dim=0) > 0.99


def test_another_seed_learns_from_other_text_first(exported: Exported, whole: Learned, tmp_path: Path) -> None:
    wanted = WANTED.model_copy(update={"seed": 1})
    assert learned(exported, tmp_path / "state", wanted).losses[0] != whole.losses[0]


def test_what_does_not_help_is_not_taken(exported: Exported, tmp_path: Path) -> None:
    found = learned(exported, tmp_path / "state", Learning(steps=2, tokens=48, rate=0.9))
    assert found.values == {}
    assert found.after == found.before


def test_a_loss_that_is_no_number_is_an_error_with_a_remedy(exported: Exported, tmp_path: Path) -> None:
    broken = Interpreter(exported.model, exported.folder)
    broken.stored["model.norm.weight"] = broken.stored["model.norm.weight"] * float("nan")
    with pytest.raises(EvaluationError, match=r"loss of step 1 is nan.*Lower `rate`"):
        learn(student(exported), broken, windows(1, 4), windows(2, 2), WANTED, tmp_path / "state", "tiny")
