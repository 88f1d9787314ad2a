"""Where products read: the values are what transformers' linear layers see, family by family."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from pipeline.graph.taps import product_inputs
from tests.activations import make_decoder, run_whole
from tests.families import CASES, transformers_model


@pytest.mark.parametrize(("name", "dtype"), [*((name, "F32") for name in CASES), ("phi3", "F16")])
def test_inputs_of_every_product(name: str, dtype: str, tmp_path: Path) -> None:
    """transformers' linear layers, hooked, see the same inputs."""
    import torch

    model, architecture = make_decoder(tmp_path, name, dtype)
    taps = product_inputs(model, architecture)
    ids = np.random.default_rng(0).integers(3, 320, 24)
    got = run_whole(tmp_path, model, dict.fromkeys(taps.values()), ids)

    want: dict[str, np.ndarray] = {}

    def remember(name: str) -> Callable[..., None]:
        def hook(_: object, inputs: tuple[torch.Tensor], __: object) -> None:
            want[name] = inputs[0][0].numpy()

        return hook

    reference = transformers_model(tmp_path, CASES[name])
    modules = dict(reference.named_modules())
    for matrix in architecture.matrices:
        module = modules["lm_head" if matrix.role == "head" else matrix.name.removesuffix(".weight")]
        module.register_forward_hook(remember(matrix.input))
    with torch.no_grad():
        reference(torch.tensor(ids[None]))
    assert taps.keys() == want.keys()
    for key, value in want.items():
        np.testing.assert_allclose(got[taps[key]], value, rtol=1e-3, atol=1e-4 * np.abs(value).max())


def test_in_the_order_of_execution(tmp_path: Path) -> None:
    parts = ("attention", "output", "mlp", "down")
    body = [f"layers.{layer}.{part}" for layer in range(3) for part in parts]
    assert list(product_inputs(*make_decoder(tmp_path, "qwen2"))) == [*body, "head"]
