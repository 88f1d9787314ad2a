"""Numbers that vanish in float16 are counted per tensor while an artifact is written, and refused above a threshold."""

from __future__ import annotations

import re
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file

from pipeline.artifact import lost as module
from pipeline.artifact import write
from pipeline.artifact.lost import sentence
from pipeline.artifact.quantizers import Search
from pipeline.artifact.write import write_artifact
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.recipes import LOST_MAX, RecipeConfig
from pipeline.errors import CheckpointError
from pipeline.partial import open_partial
from pipeline.quantize.lost import Lost
from tests.artifact.exported import Exported, changed, export
from tests.families import CASES, make_checkpoint
from tests.recipes import load_recipe

UP = "model.layers.1.mlp.up_proj.weight"
RECIPES = {name: load_recipe(name) for name in ("q4", "q4_k_m", "q3")}


def odd(tmp_path: Path, **changes: np.ndarray | float) -> Exported:
    """A model whose tensors, by name with `_` in place of `.` in keywords, are multiplied by something."""
    folder = make_checkpoint(tmp_path / "odd", CASES["llama-untied"])
    before = Checkpoint(folder)
    tensors = {name: before.rows(name) for name in before}
    for name, factor in changes.items():
        tensors[name] = (tensors[name] * factor).astype(np.float32)
    save_file(tensors, folder / "model.safetensors")
    return export(folder)


def written(exported: Exported, recipe: RecipeConfig, folder: Path, lost_max: float = LOST_MAX) -> dict[str, Lost]:
    drafted = exported.draft(recipe)
    search = Search(exported.moments if recipe.search == "weighted" else None)
    with open_partial(folder.parent / "partial" / folder.name, repr(recipe)) as growing:
        found = write_artifact(growing, drafted, exported.checkpoint, exported.folder, search, lost_max=lost_max)
        growing.finish(folder)
    return found


@pytest.mark.parametrize("name", RECIPES)
def test_nothing_is_lost_of_a_plain_model_and_no_weight_is_read_twice(
    name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "_vanished", None)
    assert written(odd(tmp_path), RECIPES[name], tmp_path / "artifact") == {}


def rows(count: int, factor: float) -> np.ndarray:
    """Factors for a matrix of 320 rows: those of the first `count` rows, 1 for the others."""
    return np.where(np.arange(320)[:, None] < count, factor, 1).astype(np.float32)


@pytest.mark.parametrize("name", RECIPES)
def test_a_few_tiny_rows_are_counted_and_reported(name: str, tmp_path: Path) -> None:
    exported = odd(tmp_path, **{"model.embed_tokens.weight": rows(3, 1e-9), UP: 1.0})
    found = written(exported, RECIPES[name], tmp_path / "artifact")
    assert found.keys() == {"model.embed_tokens.weight"}
    (lost,) = found.values()
    columns = exported.architecture.hidden
    assert lost.weights == 3 * columns and lost.blocks * 3 == lost.vanished * 320
    assert 0 < lost.share < 1e-15
    said = sentence("x", lost)
    assert f"{lost.vanished:,} of {lost.blocks:,} blocks become zero, with {lost.weights:,} weights" in said


def test_zeros_that_were_zeros_are_none_lost(tmp_path: Path) -> None:
    assert (
        written(odd(tmp_path, **{UP: 0.0, "model.embed_tokens.weight": rows(9, 0)}), RECIPES["q3"], tmp_path / "a")
        == {}
    )


def test_subnormal_scales_are_counted(tmp_path: Path) -> None:
    found = written(odd(tmp_path, **{UP: 1e-5}), RECIPES["q4"], tmp_path / "artifact")
    assert found.keys() == {UP}
    assert found[UP].vanished == 0 and found[UP].subnormal == found[UP].blocks
    assert "scales are below 6.1e-05" in sentence(UP, found[UP])


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("factor", [1e-9, 1e-25, 1e-43])
def test_a_tensor_that_vanishes_is_refused_and_the_remedy_lets_it_go_on(
    name: str, factor: float, tmp_path: Path
) -> None:
    exported, target = odd(tmp_path, **{UP: factor}), tmp_path / "artifact"
    with pytest.raises(CheckpointError) as caught:
        written(exported, RECIPES[name], target)
    message = str(caught.value)
    assert repr(UP) in message and "100.00% of the tensor's energy" in message and "0.01% may vanish" in message
    assert not target.exists() and not (tmp_path / "partial/artifact/tiny.onnx").exists()
    (asked,) = re.findall(r"`lost_max: ([\d.e-]+)`", message)
    found = written(exported, RECIPES[name], target, RecipeConfig.model_validate(
        RECIPES[name].model_dump() | {"lost_max": float(asked)}).lost_max)  # fmt: skip
    assert found[UP].share == 1 and target.exists()


def test_half_of_a_tensor_is_refused_with_its_share(tmp_path: Path) -> None:
    """Its weights are small as a whole, so those that vanish are much of it."""
    exported = odd(tmp_path, **{UP: np.where(np.arange(odd_rows())[:, None] % 2, 1e-7, 1e-5)})
    with pytest.raises(
        CheckpointError, match=r"blocks with [\d,]+ weights become zero.* 0\.\d+% of the tensor"
    ) as caught:
        written(exported, RECIPES["q4"], tmp_path / "artifact", 1e-9)
    (asked,) = re.findall(r"`lost_max: ([\d.e-]+)`", str(caught.value))
    assert 1e-9 < float(asked) < 1e-2
    written(exported, RECIPES["q4"], tmp_path / "artifact", float(asked))


def odd_rows() -> int:
    return int(CASES["llama-untied"].config["intermediate_size"])


@pytest.mark.parametrize("name", RECIPES)
def test_a_run_that_continues_counts_the_same(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    exported = odd(tmp_path, **{"model.embed_tokens.weight": rows(5, 1e-9), UP: 1e-5})
    expected = written(exported, RECIPES[name], tmp_path / "whole")
    assert len(expected) == 2
    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_copies", lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            written(exported, RECIPES[name], tmp_path / "artifact")
    monkeypatch.setattr(write, "quantize_unit", None)  # everything is finished
    assert written(exported, RECIPES[name], tmp_path / "artifact") == expected


# --- beyond float16 --------------------------------------------------------------------------------------------------


def outlier(value: float) -> np.ndarray:
    factors = np.ones((odd_rows(), 1), np.float32)
    factors[5] = value
    return factors


def test_small_blocks_keep_more_in_8_bits_than_in_4(tmp_path: Path) -> None:
    """Steps are not made so short that float16 rounds them to 0, though the range would be divided into 255."""
    exported = odd(tmp_path, **{UP: 2e-5})
    for bits in (2, 4, 6, 8):
        body = [{"roles": [matrix.role], "format": f"w{bits}b32a"} for matrix in exported.architecture.matrices[:7]]
        found = written(exported, changed("q4", body=body), tmp_path / f"w{bits}")
        assert found[UP].vanished == 0, bits


@pytest.mark.parametrize("name", RECIPES)
def test_a_scale_beyond_float16_is_refused_and_more_bits_let_it_go_on(name: str, tmp_path: Path) -> None:
    exported, target = odd(tmp_path, **{UP: outlier(1e7)}), tmp_path / "artifact"
    with pytest.raises(CheckpointError, match="exceeds float16's 65,504") as caught:
        written(exported, RECIPES[name], target)
    message = str(caught.value)
    assert repr(UP) in message and not target.exists()
    ((role, fmt),) = re.findall(r"give (\S+) .*the format (\S+) in the recipe", message)
    roles = ["gate_proj", "up_proj"] if "and the roles that share its input" in message else [role]
    rule = {"roles": roles, "format": fmt}
    mended = changed(name, body=[rule, *(item.model_dump() for item in RECIPES[name].body)])
    assert written(exported, mended, target) == {}


def test_a_weight_that_no_format_holds_says_so(tmp_path: Path) -> None:
    exported = odd(tmp_path, **{UP: outlier(1e12)})
    with pytest.raises(CheckpointError, match=r"No format holds it: the checkpoint is damaged"):
        written(exported, RECIPES["q4"], tmp_path / "artifact")


def test_norms_beyond_float16_are_kept_to_the_bit(tmp_path: Path) -> None:
    """They are stored in float32."""
    exported = odd(tmp_path, **{"model.norm.weight": 1e-30, "model.layers.0.input_layernorm.weight": 1e30})
    drafted, target = exported.draft(RECIPES["q4"]), tmp_path / "artifact"
    assert written(exported, RECIPES["q4"], target) == {}
    for name in ("model.norm.weight", "model.layers.0.input_layernorm.weight"):
        place = drafted.layout.places[name]
        data = np.fromfile(target / drafted.files[1 + place.part], np.uint8)[place.offset :][: place.length]
        np.testing.assert_array_equal(data.view(np.float32), exported.checkpoint.rows(name))
