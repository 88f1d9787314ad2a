"""A cut loses nothing where there is nothing to lose; a short distillation brings the student nearer."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from benchmarks.quality import native
from benchmarks.quality.decoder import EMBEDDING, FINAL_NORM, Shape, Weights, hidden_states, logits, matrix, norm_gain
from benchmarks.quality.distil import Schedule, distil
from benchmarks.quality.narrow import choose_channels, cut, drop_head, sites, solved
from pipeline.checkpoint.blobs import Store
from pipeline.files import read_json, write_json

CHANNELS, MIDDLE, HEAD, VOCABULARY = 12, 24, 4, 40
WIDE = Shape(layers=2, heads=3, kv_heads=1, eps=1e-6, theta=10_000.0)


@pytest.fixture
def weights() -> Weights:
    """A random decoder, float32."""
    torch.manual_seed(0)
    rows = {"q": 3 * HEAD, "k": HEAD, "v": HEAD, "gate": MIDDLE, "up": MIDDLE}
    found = {EMBEDDING: torch.randn(VOCABULARY, CHANNELS), FINAL_NORM: torch.ones(CHANNELS)}
    for layer in range(WIDE.layers):
        found |= {norm_gain(layer, part): torch.ones(CHANNELS) for part in ("attention", "mlp")}
        found |= {matrix(layer, name): torch.randn(count, CHANNELS) / 3 for name, count in rows.items()}
        found |= {matrix(layer, "o"): torch.randn(CHANNELS, 3 * HEAD) / 3}
        found |= {matrix(layer, "down"): torch.randn(CHANNELS, MIDDLE) / 3}
    return found


@pytest.fixture
def ids() -> Tensor:
    """Four windows."""
    return torch.randint(0, VOCABULARY, (4, 64), generator=torch.Generator().manual_seed(1))


def dependent(weights: Weights) -> Weights:
    """The same, but all over the residual stream channel 11 is channel 4 with its sign turned, and channel 2 is 7."""
    found = dict(weights)
    for name, values in weights.items():
        if name == EMBEDDING or name.endswith(("o_proj.weight", "down_proj.weight")):
            table = values.clone() if name == EMBEDDING else values.T.clone()
            table[:, 11], table[:, 2] = -table[:, 4], table[:, 7]
            found[name] = table if name == EMBEDDING else table.T.contiguous()
    return found


def test_channels_that_others_give_are_the_ones_to_go(weights: Weights, ids: Tensor) -> None:
    kept = choose_channels(list(sites(ids, dependent(weights), WIDE)), CHANNELS - 2).tolist()
    assert len(kept) == CHANNELS - 2 and len({4, 11} & set(kept)) == len({2, 7} & set(kept)) == 1


def test_least_squares_gives_products_back_from_fewer_channels(weights: Weights) -> None:
    x = torch.randn(4, 64, 6)
    full = torch.cat([x, x @ torch.randn(6, 3)], -1)  # three channels are linear in the others
    wide = torch.randn(5, 9)
    narrow = solved(x, full @ wide.T, wide[:, :6])
    assert torch.allclose(x @ narrow.T, full @ wide.T, atol=1e-4)


def test_keys_and_values_of_its_own_change_nothing(weights: Weights, ids: Tensor) -> None:
    found, shape = cut(ids, weights, WIDE, torch.arange(CHANNELS), WIDE.heads)
    assert shape.kv_heads == 3 and found[matrix(0, "k")].shape == (3 * HEAD, CHANNELS)
    assert torch.allclose(found[matrix(0, "v")][:HEAD], found[matrix(0, "v")][-HEAD:], atol=1e-5)
    assert_same(found, shape, weights, ids)


def test_a_silent_head_is_dropped_and_nothing_changes(weights: Weights, ids: Tensor) -> None:
    for layer, silent in enumerate((1, 2)):
        weights[matrix(layer, "o")][:, silent * HEAD : (silent + 1) * HEAD] = 0
    found, shape = cut(ids, weights, WIDE, torch.arange(CHANNELS), 2)
    assert shape.kv_heads == 2
    assert found[matrix(0, "o")].shape == (CHANNELS, 2 * HEAD)
    assert_same(found, shape, weights, ids)


def test_the_head_that_others_give_back_is_dropped() -> None:
    torch.manual_seed(0)
    outputs, projection = torch.randn(200, 12), torch.randn(5, 12)
    outputs[:, 8:] = 2 * outputs[:, :4]  # loud, but it says what the first says; the second is quiet
    outputs[:, 4:8] /= 3
    assert drop_head(outputs, projection, 3, 2).tolist() in ([0, 1], [1, 2])


def assert_same(found: Weights, shape: Shape, weights: Weights, ids: Tensor) -> None:
    """Both models' logits are equal to 1e-4 of the largest."""
    wanted = logits(hidden_states(ids, weights, WIDE)[-1], weights, WIDE)
    own = logits(hidden_states(ids, found, shape)[-1], found, shape)
    assert (own - wanted).abs().max() < 1e-4 * wanted.abs().max()


def test_distillation_brings_the_student_nearer_and_leaves_what_it_got(weights: Weights, ids: Tensor) -> None:
    kept = torch.arange(CHANNELS - 3)
    student = cut(ids, weights, WIDE, kept, 2)
    before, told = {name: values.clone() for name, values in student[0].items()}, []
    schedule = Schedule(steps=8, windows=4, rate=2e-2, warm=1, every=1)
    runs = [distil(student, (weights, WIDE), kept, ids, schedule, lambda *line: told.append(line)) for _ in range(2)]
    assert np.mean([kl for _, kl, _ in told[-2:]]) < 0.7 * np.mean([kl for _, kl, _ in told[:1]])
    assert all(torch.equal(student[0][name], values) for name, values in before.items())
    assert all(torch.equal(runs[0][name], values) for name, values in runs[1].items())


def test_windows_that_share_text_with_what_judges_are_left_out() -> None:
    words = [f"word{number}" for number in range(60)]
    texts = np.array([" ".join(words[at : at + 15]) for at in (0, 15, 30, 45)], dtype=object)
    judging = ["before " + " ".join(words[31:44]) + " after"]
    assert native._apart(texts, judging, np.arange(4)).tolist() == [0, 1, 3]


def test_the_checkpoint_is_made_once(
    weights: Weights, ids: Tensor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder, lines = tmp_path / "source", tmp_path / "made", []
    source.mkdir()
    save_file(weights, source / "model.safetensors")
    config: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 3, "num_key_value_heads": 1}
    write_json(source / "config.json", config | {"rms_norm_eps": 1e-6, "rope_theta": 1e4, "hidden_size": CHANNELS})
    monkeypatch.setattr(native, "CHANNELS", 8)
    monkeypatch.setattr(native, "HEADS", 2)
    monkeypatch.setattr(native, "_windows", lambda *_: ids)
    monkeypatch.setattr(native, "_unseen", lambda windows, *_: windows)
    making = native.Making(closed=4, training=Schedule(steps=2, windows=2, warm=1))
    native.make(source, folder, Store(tmp_path), lines.append, making)
    made = load_file(folder / "model.safetensors")
    assert made[matrix(1, "k")].shape == (8, 8) and made[EMBEDDING].dtype == torch.bfloat16
    assert read_json(folder / "config.json")["num_key_value_heads"] == 2
    told = len(lines)
    native.make(source, folder, Store(tmp_path), lines.append, making)
    assert len(lines) == told  # nothing was done
