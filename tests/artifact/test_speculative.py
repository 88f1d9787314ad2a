"""What an artifact has for speculative decoding: the decoder's bytes as they were, a head that shares its tables."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from pydantic import ValidationError

from pipeline.artifact.quantizers import Search
from pipeline.artifact.speculative import SETTINGS_FILE, Speculation, speculation
from pipeline.artifact.write import Draft, write_artifact
from pipeline.config.phones import load_tiers
from pipeline.config.recipes import RecipeConfig, Rotation, Speculative
from pipeline.errors import PlanError
from pipeline.files import write_bytes, write_json
from pipeline.graph.genai import Generation, genai_config
from pipeline.graph.speculative import HIDDEN, MTP_FILE, build_mtp
from pipeline.judge import speculative as gate
from pipeline.partial import open_partial
from pipeline.planning.devices import Figure, Footprint, budget_bytes, speculates
from pipeline.planning.memory import plan_memory, speculative_memory, weight_memory
from pipeline.runtime.speculative import Greedily
from tests.artifact.exported import PART_BYTES, Exported, changed, contents, export
from tests.families import CASES, add_mtp, make_checkpoint
from tests.tiny import make_tokenizer

CONTEXT = 96
HEAD = Speculative(tokens=2, head="w4b32a")
RECIPE: RecipeConfig = changed("q4", search="weighted", rotation={"values": True}, kv_cache="float32", speculative=None)


def made(folder: Path, case: str = "mimo") -> Exported:
    """A checkpoint with its head where its family has one, exported in its own folder."""
    make_checkpoint(folder, CASES[case])
    if case == "mimo":
        add_mtp(folder)
    found = export(folder, CONTEXT)
    if found.architecture.mtp:
        write_bytes(folder / MTP_FILE, build_mtp(found.architecture.mtp, found.checkpoint, CONTEXT).SerializeToString())
    return found


def added(found: Exported, drafted: Draft, chosen: Speculative = HEAD) -> Speculation:
    return speculation(chosen, drafted, found.architecture, CONTEXT, found.folder, PART_BYTES)


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> tuple[Exported, Draft, Speculation, Path]:
    """A whole artifact with a head, that onnxruntime-genai loads."""
    root = tmp_path_factory.mktemp("speculative")
    found = made(root / "model").rotated(RECIPE)
    drafted, target = found.draft(RECIPE), root / "artifact"
    more = added(found, drafted)
    with open_partial(root / "partial", "key") as growing:
        write_artifact(growing, drafted, found.checkpoint, found.folder, Search(found.moments))
        more.write(growing, found.folder, found.folder, RECIPE)
        growing.finish(target)
    settings = genai_config(found.architecture, Generation((2,), 1, 2, {}, ()), "tiny.onnx", CONTEXT)
    write_json(target / "genai_config.json", settings)
    write_bytes(target / "config.json", (found.folder / "config.json").read_bytes())
    make_tokenizer(target, found.architecture.vocab)
    return found, drafted, more, target


def test_files_have_the_planned_bytes(written: tuple[Exported, Draft, Speculation, Path]) -> None:
    _, drafted, more, target = written
    sizes = {name: (target / name).stat().st_size for name in (*drafted.files, *more.files)}
    assert sum(sizes.values()) == drafted.bytes + more.bytes
    assert json.loads((target / SETTINGS_FILE).read_text()) == more.settings
    record = more.record()
    assert record["drafts"] == "mtp"
    assert next(iter(record["tensors"])) == "model.mtp_layers.0.input_proj.weight"


def test_the_decoder_is_what_it_is_without_a_head(
    written: tuple[Exported, Draft, Speculation, Path], tmp_path: Path
) -> None:
    found, drafted, _, target = written
    found.write(RECIPE, tmp_path / "plain")
    plain = contents(tmp_path / "plain")
    assert plain == {name: (target / name).read_bytes() for name in drafted.files}


def test_a_head_reads_the_decoders_tables(written: tuple[Exported, Draft, Speculation, Path]) -> None:
    _, drafted, more, target = written
    graph = onnx.load(target / more.files[1], load_external_data=False).graph
    files = {
        tensor.name: {item.key: item.value for item in tensor.external_data}["location"]
        for tensor in graph.initializer
        if tensor.data_location == onnx.TensorProto.EXTERNAL
    }
    shared = {name for name, file in files.items() if file in drafted.files}
    assert shared >= {name for name in files if name.startswith(("model.embed_tokens", "lm_head", "cos_", "sin_"))}
    assert all(name.startswith("model.mtp_layers.0.") for name in files.keys() - shared)
    assert HIDDEN in {value.name for value in graph.input}


def test_drafts_of_written_files_pass_the_gate(
    written: tuple[Exported, Draft, Speculation, Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """By the head, and by n-grams."""
    _, _, more, target = written
    monkeypatch.setattr(gate, "PROMPT", 24)
    rng = np.random.default_rng(2)
    prompts = [rng.integers(3, 320, 24) for _ in range(6)]
    monkeypatch.setattr(gate.held_out, "scored_ids", lambda wanted, window, folder, store: prompts)
    for settings in (
        more.settings,
        {"ngram": more.settings["mtp"]["decoder"] | {"speculative": {"max_draft_tokens": 2, "ngram_size": 2}}},
    ):
        found = gate.judge(target, target / "tiny.onnx", settings, 24, 2, 1.0)
        assert found.passed, found.wrong
        assert [line.texts for line in found.lines] == [2, 2, 2]
        assert 0 <= found.kl_rows < 0.1
    assert not gate.judge(target, target / "tiny.onnx", settings, 24, 2, found.kl_rows / 2).passed or not found.kl_rows


def test_memory_counts_a_second_copy_of_the_shared_tables(written: tuple[Exported, Draft, Speculation, Path]) -> None:
    found, drafted, more, _ = written
    assert more.head is not None
    grams = speculative_memory(drafted.plan, found.architecture, CONTEXT, None)
    own = sum(map(weight_memory, more.head.plan.body)) + sum(map(weight_memory, drafted.plan.tables_alone))
    assert more.memory - grams == own + more.head.plan.cache.bytes * CONTEXT


def test_a_tier_holds_drafts_only_where_both_fit(written: tuple[Exported, Draft, Speculation, Path]) -> None:
    found, drafted, _, _ = written
    tiers = load_tiers()
    tier = next(iter(tiers.tiers.values()))
    memory = plan_memory(drafted.plan, found.architecture, CONTEXT)
    figures = {key: Figure(getattr(memory, key), "computed") for key in ("weights", "activations", "loading")}
    sizes = {"download": Figure(1, "computed"), "packed": Figure(1, "computed")} | figures
    footprint = Footprint("q4", **sizes, prompt_token=0, kv_cache="int8", cache_bytes=1)
    room = budget_bytes(tier) - memory.weights - memory.activations - CONTEXT - tiers.runtime_bytes
    assert speculates(replace(footprint, speculative=room), tier, tiers, CONTEXT)
    assert not speculates(replace(footprint, speculative=room + 1), tier, tiers, CONTEXT)
    assert not speculates(footprint, tier, tiers, CONTEXT)


def test_a_model_without_a_head_says_so(tmp_path: Path) -> None:
    found = made(tmp_path, "llama-untied")
    with pytest.raises(PlanError, match=r"'llama' has none.*n-grams of the text are drafted"):
        added(found, found.draft(RECIPE))
    assert "ngram" in added(found, found.draft(RECIPE), Speculative()).settings


def test_a_checkpoint_whose_export_has_no_head_says_so(tmp_path: Path) -> None:
    found = made(tmp_path)
    (tmp_path / MTP_FILE).unlink()
    with pytest.raises(PlanError, match=f"its export wrote no {MTP_FILE}"):
        added(found, found.draft(RECIPE))


def test_before_an_export_a_plan_has_the_bytes_that_it_will_have(
    written: tuple[Exported, Draft, Speculation, Path],
) -> None:
    found, drafted, more, _ = written
    early = speculation(HEAD, drafted, found.architecture, CONTEXT, Path("nothing is here"), PART_BYTES)
    assert early.head is not None and more.head is not None
    assert early.head.layout.parts == more.head.layout.parts


def test_a_rotated_residual_is_refused(tmp_path: Path) -> None:
    found, recipe = made(tmp_path), RECIPE.model_copy(update={"rotation": Rotation(residual="all")})
    with pytest.raises(PlanError, match="cannot rotate the residual stream"):
        added(found, found.draft(recipe))


@pytest.mark.parametrize("values", [{"tokens": 0}, {"tokens": 17}, {"ngram": 1}, {"ngram": 17}, {"heads": "w4b64a"}])
def test_options_out_of_range_are_refused(values: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        Speculative(**values)


def test_settings_keep_the_texts_end(written: tuple[Exported, Draft, Speculation, Path]) -> None:
    """An end-of-text token is no part of a text, with drafts and without."""
    _, _, more, target = written
    prompt = np.random.default_rng(4).integers(3, 320, 24).tolist()
    plain = Greedily(target).write(prompt, 16)
    stop = plain.ids[8]
    shorter = [Greedily(target, settings).write(prompt, 16, [plain.ids[-1]]).ids for settings in (None, more.settings)]
    assert shorter[0] == shorter[1] == plain.ids[: len(shorter[0])]
    assert stop in plain.ids
