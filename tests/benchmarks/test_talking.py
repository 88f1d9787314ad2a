"""A talking model of a large family's shapes computes the small one's function, through the pipeline's own graph."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from click.testing import CliRunner
from safetensors.numpy import load_file, save_file

from benchmarks import synthetic, talking, talking_check
from benchmarks.published import MODELS
from benchmarks.synthetic import main, tensors, write_checkpoint
from benchmarks.talking import Talking
from benchmarks.talking_check import compare, write_rounded
from pipeline.checkpoint.architecture import TALKING, check_tensors, parse_architecture, read_architecture
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.errors import CheckpointError, ConfigError
from pipeline.graph.decoder import build_decoder, save_decoder
from pipeline.runtime.session import OnnxDecoder
from pipeline.stages import download, export
from tests import tiny
from tests.families import CASES, Case
from tests.real_configs import REAL_CONFIGS

REAL = {name: model.config for name, model in MODELS.items() if "num_local_experts" not in model.config}
CONTEXT = 64
TEXTS = np.random.default_rng(7).integers(3, 320, (3, CONTEXT)).tolist()
# The small model: 128 channels, 4 heads of 32, 2 of keys, 3 layers. Sizes are no multiples of its own.
WIDER = {
    "hidden_size": 366,
    "intermediate_size": 700,
    "num_attention_heads": 12,
    "num_key_value_heads": 3,
    "num_hidden_layers": 5,
    "max_position_embeddings": 256,
    "vocab_size": 500,
    "head_dim": 64,
}
ONES = {"short_factor": [1.0] * 24, "long_factor": [2.0] * 24}
SHAPES: dict[str, dict[str, Any]] = {
    "mimo-8b": WIDER,
    "phi-4": WIDER | {"hidden_size": 468, "original_max_position_embeddings": 256},
    # 48 of 64 channels are rotated: pairs lie side by side, theta changes. Tied, scaled, and one head a key too many.
    "phi-4-mini": WIDER | {"original_max_position_embeddings": 128, "rope_scaling": {"type": "longrope"} | ONES},
}


@pytest.fixture(scope="module")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint with a tokenizer whose epsilon counts, and whose logits are so small that those of other ids do."""
    folder = tmp_path_factory.mktemp("small")
    config = CASES["llama-tied"].config | {"rms_norm_eps": 0.3}
    tiny.make_model(folder, Case(config, "llama"))
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"] *= 0.1
    save_file(weights, folder / "model.safetensors")
    (folder / "generation_config.json").write_text('{"eos_token_id": 2}')
    (folder / "LICENSE").write_text("the small one's terms")
    return folder


@pytest.fixture(autouse=True)
def wider(monkeypatch: pytest.MonkeyPatch) -> None:
    for name, changes in SHAPES.items():
        monkeypatch.setitem(MODELS, name, replace(MODELS[name], config=MODELS[name].config | changes))


def decoder(folder: Path) -> OnnxDecoder:
    """A checkpoint's full-precision graph as the export stage builds it."""
    graph, rope = build_decoder(read_architecture(folder / "config.json"), Checkpoint(folder), CONTEXT)
    save_decoder(folder, graph, rope, "model.onnx")
    return OnnxDecoder(folder / "model.onnx")


def figures(small: Path, folder: Path, rounded: Path) -> dict[str, float]:
    rounded.mkdir()
    write_rounded(small, rounded, CONTEXT)
    ours, theirs = decoder(folder), OnnxDecoder(rounded / "model.onnx")
    return compare(lambda ids: theirs.run(ids)[0], lambda ids: ours.run(ids)[0], TEXTS)


@pytest.mark.parametrize("model", SHAPES)
def test_logits_are_those_of_the_small_model(model: str, small: Path, tmp_path: Path) -> None:
    write_checkpoint(tmp_path / "out", model, small=small)
    checkpoint, architecture = Checkpoint(tmp_path / "out"), read_architecture(tmp_path / "out" / "config.json")
    check_tensors(architecture, checkpoint)
    assert {name: ref.shape for name, ref in checkpoint.items()} == tensors(model)
    assert {ref.dtype for ref in checkpoint.values()} == {"BF16"}
    found = figures(small, tmp_path / "out", tmp_path / "rounded")
    assert found["tokens"] == 3 * CONTEXT
    assert found["largest_difference"] < 1e-3
    assert found["padded"] < 1e-6
    assert found["other_token"] == found["near_ties"]


@pytest.mark.parametrize("damage", ["rms_norm_eps", "rope_theta", "_reading", "rest", "_SILENCE"])
def test_each_correction_is_needed(damage: str, small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What the map makes up for is seen in the logits when it is left out."""
    start, spread = Talking.__init__, Talking._spread

    def damaged(self: Talking, folder: Path, config: dict[str, Any]) -> None:
        start(self, folder, config)
        if damage == "_reading":
            self._reading = 1.0
        elif damage in config:
            self.config[damage] = config[damage]

    def without_rest(self: Talking, values: np.ndarray, ballast: Any = 0.0) -> np.ndarray:
        wide = spread(self, values, ballast)
        wide[:, (self._copies - 1) * values.shape[1] : self._copies * values.shape[1]] = 0
        return wide

    monkeypatch.setattr(Talking, "__init__", damaged)
    if damage == "rest":
        monkeypatch.setattr(Talking, "_spread", without_rest)
    elif damage == "_SILENCE":
        monkeypatch.setattr(talking, damage, 0.0)
    write_checkpoint(tmp_path / "out", "mimo-8b", small=small)
    found = figures(small, tmp_path / "out", tmp_path / "rounded")
    assert found["padded"] > 1e-6 if damage == "_SILENCE" else found["largest_difference"] > 3e-3


def test_a_cut_computes_the_first_layers_and_says_that_it_does_not_talk(small: Path, tmp_path: Path) -> None:
    command = ["phi-4", str(tmp_path / "cut"), "--layers", "2", "--talking", str(small)]
    done = CliRunner().invoke(main, command)
    assert done.exit_code == 0, done.output
    assert "With 2 of 3 layers" in done.output and "does not talk" in done.output
    config = json.loads((small / "config.json").read_text()) | {"num_hidden_layers": 2}
    (tmp_path / "two").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "two" / name).write_bytes((small / name).read_bytes())
    (tmp_path / "two" / "config.json").write_text(json.dumps(config))
    assert figures(tmp_path / "two", tmp_path / "cut", tmp_path / "rounded")["largest_difference"] < 1e-3


def test_shares_are_powers_of_two_that_sum_to_one() -> None:
    index = np.array([0, 1, 2, 0, -1, 1, 0, 0, 0, 1, 0])
    shares = talking._shares(index)
    assert shares[4] == 0 and set(np.log2(shares[index >= 0]) % 1) == {0.0}
    assert [shares[index == channel].sum() for channel in range(3)] == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("model", REAL)
def test_the_real_shapes_fit_and_turn_at_the_same_frequencies(model: str) -> None:
    small, wide = parse_architecture(REAL_CONFIGS["smollm2-135m"], Path()), parse_architecture(REAL[model], Path())
    talking._refuse(small, wide)
    index, theta = talking._rotary(small, wide), talking._theta(small, wide)
    for place, channel in enumerate(index):
        if channel >= 0:
            pair, dims = place % (wide.rope.dims // 2), wide.rope.dims
            assert theta ** (-2 * pair / dims) == pytest.approx(1e5 ** (-2 * (channel % 32) / 64), rel=1e-12)
            assert place // (dims // 2) == channel // 32
    assert sorted(index[index >= 0]) == list(range(64))
    assert (theta == 1e5) == (model != "phi-4-mini")


def test_what_does_not_fit_is_refused_with_every_reason(small: Path, tmp_path: Path) -> None:
    config = MODELS["mimo-8b"].config | {"hidden_size": 300, "vocab_size": 319}
    with pytest.raises(ConfigError, match=r"vocab 319 is less than 320; hidden 300 is less than 2 × 128 \+ 64"):
        Talking(small, config)
    (tmp_path / "small").mkdir()
    for name in ("config.json", "model.safetensors"):
        (tmp_path / "small" / name).hardlink_to(small / name)
    with pytest.raises(CheckpointError, match=r"generation_config\.json, tokenizer\.json, .* must be there"):
        write_checkpoint(tmp_path / "out", "mimo-8b", small=tmp_path / "small")
    assert not (tmp_path / "out").exists()


def test_it_is_marked_speaks_the_small_ones_tokens_and_bears_its_licence(small: Path, tmp_path: Path) -> None:
    assert write_checkpoint(tmp_path, "mimo-8b", small=small)
    config = json.loads((tmp_path / "config.json").read_text())
    assert "no measure of quality" in config[TALKING] and "3 layers of 128 channels" in config[TALKING]
    assert (config["bos_token_id"], config["eos_token_id"]) == (1, 2)
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        assert (tmp_path / name).read_bytes() == (small / name).read_bytes()
    assert (tmp_path / "LICENSE").read_bytes().endswith(b"the small one's terms")
    assert not write_checkpoint(tmp_path, "mimo-8b", small=small)
    assert write_checkpoint(tmp_path, "mimo-8b")
    assert TALKING not in json.loads((tmp_path / "config.json").read_text())
    assert json.loads((tmp_path / "tokenizer.json").read_text())["model"]["merges"][0] == "Ġ e"


def test_what_it_adds_does_not_depend_on_how_it_is_cut(
    small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_checkpoint(tmp_path / "a", "phi-4", small=small)
    monkeypatch.setattr(synthetic, "_CHUNK", 12345)
    write_checkpoint(tmp_path / "b", "phi-4", small=small)
    for file in (tmp_path / "a").iterdir():
        assert file.read_bytes() == (tmp_path / "b" / file.name).read_bytes()


def test_the_check_of_two_exported_models(small: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_checkpoint(tmp_path / "large", "mimo-8b", small=small)
    monkeypatch.setenv("PIPELINE_STORE", str(tmp_path / "store"))
    monkeypatch.chdir(tiny.copy_configs(tmp_path))
    for name, folder in (("small", small), ("large", tmp_path / "large")):
        entry = tiny.model_entry(folder) | {"context": 256}
        Path("configs/models", f"{name}.yaml").write_text(json.dumps(entry))
        download.run(name)
        export.run(name)
    done = CliRunner().invoke(talking_check.main, ["large", "small", "--tokens", "5"])
    found = json.loads(done.output)
    assert found["tokens"] > 4 * 5 and found["largest_difference"] < 1e-3 < found["rounding_alone"]
    assert found["padded"] < 1e-6 and found["other_token"] == found["near_ties"]
