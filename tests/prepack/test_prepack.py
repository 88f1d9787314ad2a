"""Prepacking tiny artifacts on this machine: equal outputs, resumption, other classes, full disks, damaged folders."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from pipeline import files
from pipeline.errors import BundleError, EvaluationError, GraphError, ResourceError
from pipeline.files import read_json, write_json
from pipeline.prepack import check, device, make
from pipeline.prepack.device import PREPACK_FILE, PREPACKED, READY
from pipeline.prepack.emulator import HERE
from pipeline.prepack.slices import Merging, cut
from pipeline.quantize.cache import magnitudes
from pipeline.runtime.session import OnnxDecoder
from tests import tiny
from tests.artifact.exported import Exported, changed, child, export, finish
from tests.families import CASES, make_checkpoint
from tests.recipes import load_recipe

LIMIT = 12_000  # bytes of codes: several slices, and a head in bands
IDS = np.random.default_rng(5).integers(3, 320, 24).tolist()
Damage = Callable[[Path], object]


def make_artifact(folder: Path, case: str, recipe: str) -> Exported:
    """A written artifact of a tiny model in folder/artifact, with the least that names its graph."""
    exported = export(make_checkpoint(folder / "checkpoint", CASES[case]))
    ranges = None
    if load_recipe(recipe).kv_cache == "int8":
        rng = np.random.default_rng(2)
        architecture = exported.architecture
        shape = (architecture.kv_heads, 64, architecture.head_dim)
        names = [f"layers.{layer}.{part}" for layer in range(architecture.layers) for part in ("key", "value")]
        ranges = {name: magnitudes(rng.standard_normal(shape, np.float32), 0) for name in names}
    exported = exported.rotated(load_recipe(recipe))
    exported.write(load_recipe(recipe), folder / "artifact", ranges=ranges)
    write_json(folder / "artifact/genai_config.json", {"model": {"decoder": {"filename": "tiny.onnx"}}})
    return exported


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny artifact with what a bundle carries for this machine's kernel class; nothing is prepacked."""
    folder = tmp_path_factory.mktemp("bundle")
    make_artifact(folder, "llama-tied", "q4")
    make.prepare(folder / "artifact", LIMIT)
    make.add_classes(folder / "artifact", [HERE])
    return folder / "artifact"


@pytest.fixture
def phone(bundle: Path, tmp_path: Path) -> Path:
    """The bundle on a phone, whose files a test may change."""
    return Path(shutil.copytree(bundle, tmp_path / "phone"))


def logits(graph: Path) -> np.ndarray:
    """float32 [24, vocab]: a prompt, then tokens one by one."""
    decoder = OnnxDecoder(graph)
    rows, state = decoder.run(IDS[:16])
    found = [rows]
    for token in IDS[16:]:
        rows, state = decoder.run([token], state)
        found.append(rows)
    return np.concatenate(found)


def packed_here(folder: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[device.Outcome, list[int]]:
    """Prepack; the outcome, and the numbers of the slices that the runtime had to open."""
    opened, save = list[int](), device.save_slice

    def spied(source: Path, target: Path, number: int) -> tuple[Path, Path]:
        opened.append(number)
        return save(source, target, number)

    monkeypatch.setattr(device, "save_slice", spied)
    return device.prepack(folder, lambda _: None), opened


# --- equal outputs ---


@pytest.mark.parametrize(
    ("case", "recipe", "limit"),
    [
        ("llama-tied", "q4", LIMIT),
        ("mimo", "q3", LIMIT),
        ("phi3-longrope", "q4_k_m", LIMIT),
        ("qwen2", "q4_kv8", LIMIT),
        ("phi3-partial-tied", "q4_rotated", LIMIT),
        ("phimoe", "q4", 45_000),
    ],
)
def test_mapped_logits_are_the_private_ones_bit_for_bit(case: str, recipe: str, limit: int, tmp_path: Path) -> None:
    """But for a biased head in bands, whose last bits differ: to a whole product ONNX Runtime adds a bias inside."""
    make_artifact(tmp_path, case, recipe)
    folder = tmp_path / "artifact"
    work = make.prepare(folder, limit)
    (name,) = make.add_classes(folder, [HERE]).classes
    assert device.prepack(folder, lambda _: None) == device.choose(folder)
    outcome = device.choose(folder)
    assert outcome.kernels == name and len(work.slices) > 4
    np.testing.assert_array_equal(logits(folder / outcome.graph), logits(folder / work.graph))


def test_the_runtime_reads_packed_bytes_from_the_slices(phone: Path) -> None:
    """Were it to pack once more in private memory, other bytes in the files would change nothing."""
    outcome = device.prepack(phone, lambda _: None)
    want = logits(phone / outcome.graph)
    for path, offset, length in packed_ranges(phone / outcome.graph):
        with open(path, "r+b") as file:
            file.seek(offset)
            file.write(bytes(length))
    assert (logits(phone / outcome.graph) != want).mean() > 0.9


def packed_ranges(graph: Path) -> list[tuple[Path, int, int]]:
    """(file, offset, length) of the packed bytes that a merged graph names."""
    found = []
    for item in onnx.load(graph, load_external_data=False).graph.initializer:
        location = {entry.key: entry.value for entry in item.external_data}.get("location", "")
        values = [entry.value for entry in item.external_data if entry.key.startswith("prepacked")]
        places = [value.split("|")[1].split(";")[:2] for value in values]
        found += [(graph.parent / location, int(offset), int(length)) for offset, length in places]
    return found


def test_packed_bytes_lie_where_kernels_look_for_them(bundle: Path) -> None:
    """ONNX Runtime saves some of them elsewhere: the day that none is, this module may be simpler."""
    kernels = next(iter(device.Prepacking.read(bundle).classes.values()))
    kept = [item for packed in kernels.slices for item in packed.kept]
    assert {target % 64 for _, _, target in kept} == {0}
    assert {source % 32 for source, _, _ in kept} != {0}


def test_no_slice_and_no_product_has_more_codes_than_the_limit(bundle: Path) -> None:
    model = onnx.load(bundle / "tiny.onnx", load_external_data=False)
    sizes = []
    for part in cut(model, LIMIT):
        shapes = {item.name: item.dims for item in part.graph.initializer}
        products = [node for node in part.graph.node if node.op_type == "MatMulNBits"]
        # A band has at least 128 rows.
        sizes.append([int(np.prod(shapes[node.input[1]])) for node in products])
    assert all(sum(slice_) <= LIMIT or len(slice_) == 1 for slice_ in sizes)
    assert max(size for slice_ in sizes for size in slice_) < max(int(np.prod(item.dims)) for item in codes(model))
    assert sum(map(sum, sizes)) == sum(int(np.prod(item.dims)) for item in codes(model))


def codes(model: onnx.ModelProto) -> list[onnx.TensorProto]:
    """The codes of every product of a graph."""
    names = {node.input[1] for node in model.graph.node if node.op_type == "MatMulNBits"}
    return [item for item in model.graph.initializer if item.name in names]


def test_a_graph_that_chooses_the_last_token_before_its_head(phone: Path) -> None:
    model = onnx.load(phone / "tiny.onnx", load_external_data=False)
    head = next(node for node in model.graph.node if "logits" in node.output)
    at = list(model.graph.node).index(head)
    last = helper.make_node("Gather", [head.input[0], "last"], ["last_hidden"], name="last_hidden", axis=1)
    head.input[0] = "last_hidden"
    model.graph.node.insert(at, last)
    model.graph.initializer.append(helper.make_tensor("last", TensorProto.INT64, [1], [-1]))
    onnx.save(model, phone / "tiny.onnx")
    work = make.prepare(phone, LIMIT)
    make.add_classes(phone, [HERE])
    outcome = device.prepack(phone, lambda _: None)
    found, want = (OnnxDecoder(phone / name).run(IDS)[0] for name in (outcome.graph, work.graph))
    assert outcome.kernels and want.shape == (1, 320)
    np.testing.assert_array_equal(found, want)


def test_equal_matrices(phone: Path) -> None:
    """They pack to the same bytes, and the runtime knows packed bytes by their hash."""
    model = onnx.load(phone / "tiny.onnx", load_external_data=False)
    stored = {item.name: item for item in model.graph.initializer}
    for name, item in stored.items():
        if ".layers.0.mlp.up_proj." in name:
            for layer in ("1", "2"):
                twin = stored[name.replace(".0.", f".{layer}.", 1)]
                twin.CopyFrom(item)
                twin.name = name.replace(".0.", f".{layer}.", 1)
    onnx.save(model, phone / "tiny.onnx")
    make.prepare(phone, LIMIT)  # in slices of their own
    make.add_classes(phone, [HERE])
    outcome = device.prepack(phone, lambda _: None)
    assert outcome.kernels
    merged = onnx.load(phone / outcome.graph, load_external_data=False)
    entries = [entry for item in merged.graph.initializer for entry in item.external_data]
    keys = [entry.value.split("|")[0] for entry in entries if entry.key.startswith("prepacked")]
    assert len(keys) == len(set(keys))
    np.testing.assert_array_equal(logits(phone / outcome.graph), logits(phone / "tiny.onnx"))


def test_what_a_bundle_carries_is_enough(bundle: Path, tmp_path: Path) -> None:
    work = device.Prepacking.read(bundle)
    for path in [*make.prepack_files(bundle), bundle / work.graph, *(bundle / name for name in work.parts)]:
        shutil.copy(path, tmp_path)
    assert device.prepack(tmp_path, lambda _: None).kernels
    np.testing.assert_array_equal(logits(tmp_path / device.choose(tmp_path).graph), logits(bundle / work.graph))


def test_made_again_the_files_are_the_same(bundle: Path, phone: Path) -> None:
    """So the digests of a signed bundle hold on every phone of the class."""
    make.prepare(phone, LIMIT)
    make.add_classes(phone, [HERE])
    for path in make.prepack_files(bundle):
        assert path.read_bytes() == (phone / path.name).read_bytes(), path.name


# --- resumption ---


def prepack_and_die(folder: Path, number: int, when: str) -> None:
    """Prepack, and be killed before or after the runtime has saved slice `number`."""
    save = device.save_slice

    def deadly(source: Path, target: Path, current: int) -> Any:
        if when == "before" and current == number:
            os.kill(os.getpid(), signal.SIGKILL)
        saved = save(source, target, current)
        if when == "after" and current == number:
            os.kill(os.getpid(), signal.SIGKILL)
        return saved

    device.save_slice = deadly
    device.prepack(folder, lambda _: None)


@pytest.mark.parametrize("when", ["before", "after"])
def test_what_a_killed_phone_packed_is_not_packed_again(
    when: str, phone: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    total = len(device.Prepacking.read(phone).slices)
    assert finish(child(prepack_and_die, phone, 2, when)) == -signal.SIGKILL
    assert device.choose(phone).why == "not prepacked"
    outcome, opened = packed_here(phone, monkeypatch)
    assert outcome.kernels and opened == [0, *range(2, total)]  # the first one tells the class
    assert sorted(path.name for path in (phone / PREPACKED).iterdir()) == sorted(
        [READY, *(f"{number}.data" for number in range(total))]
    )


def test_only_a_spoilt_slice_is_packed_again(phone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    device.prepack(phone, lambda _: None)
    want, path = logits(phone / device.choose(phone).graph), phone / PREPACKED / "1.data"
    spoilt = bytearray(path.read_bytes())
    spoilt[-1] ^= 1
    path.write_bytes(spoilt)
    outcome, opened = packed_here(phone, monkeypatch)
    assert opened == [0, 1]
    np.testing.assert_array_equal(logits(phone / outcome.graph), want)


# --- other classes ---


def rewrite(folder: Path, **changes: Any) -> None:
    """Change the second slice of every class in prepack.json."""
    document = read_json(folder / PREPACK_FILE)
    for kernels in document["classes"].values():
        kernels["slices"][1] |= changes
    write_json(folder / PREPACK_FILE, document)


@pytest.mark.parametrize("change", [{"saved": "0" * 64}, {"raw": 1}, {"data": "0" * 64}])
def test_another_class_is_loaded_as_ever(change: dict[str, Any], phone: Path) -> None:
    rewrite(phone, **change)
    said: list[str] = []
    outcome = device.prepack(phone, said.append)
    assert outcome == device.Outcome("tiny.onnx", None, outcome.why)
    assert "packs tiny.slice.1.onnx as none of the bundle's 1 kernel classes does" in outcome.why
    assert "private memory" in said[-1]
    assert not (phone / PREPACKED).exists()
    assert device.choose(phone).graph == "tiny.onnx"


def test_the_class_that_fits_is_chosen_among_others(phone: Path) -> None:
    document = read_json(phone / PREPACK_FILE)
    ((name, kernels),) = document["classes"].items()
    other = json.loads(json.dumps(kernels))
    other["slices"][2]["saved"] = "0" * 64  # equal up to the third slice
    document["classes"] = {"another": other, name: kernels}
    write_json(phone / PREPACK_FILE, document)
    assert device.prepack(phone, lambda _: None).kernels == name


def test_files_of_another_processor_are_not_taken_for_its_own(phone: Path) -> None:
    """A backup of one phone, put back on another whose class is in the bundle too."""
    document = read_json(phone / PREPACK_FILE)
    ((name, kernels),) = document["classes"].items()
    other = json.loads(json.dumps(kernels))
    for number, packed in enumerate(other["slices"]):
        content = f"packed by the other phone {number}".encode()
        packed |= {"saved": "0" * 64, "data": hashlib.sha256(content).hexdigest(), "bytes": len(content)}
        (phone / PREPACKED).mkdir(exist_ok=True)
        (phone / PREPACKED / f"{number}.data").write_bytes(content)
    write_json(phone / PREPACK_FILE, document | {"classes": {"another": other, name: kernels}})
    outcome = device.prepack(phone, lambda _: None)
    assert outcome.kernels == name
    np.testing.assert_array_equal(logits(phone / outcome.graph), logits(phone / "tiny.onnx"))


def test_a_new_release_is_prepacked_again(phone: Path) -> None:
    """The stale files have the right names and sizes, and another release's weights."""
    device.prepack(phone, lambda _: None)
    document = read_json(phone / PREPACK_FILE)
    write_json(phone / PREPACK_FILE, document | {"limit": 1})
    outcome = device.choose(phone)
    assert (outcome.graph, outcome.kernels) == ("tiny.onnx", None)
    assert "another bundle" in outcome.why


# --- refusals ---


def test_a_full_disk_is_refused_before_anything_is_packed(phone: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    slices = next(iter(device.Prepacking.read(phone).classes.values())).slices
    needed = sum(item.bytes for item in slices) + max(item.raw for item in slices)
    monkeypatch.setattr(files, "free_disk", lambda _: needed - 1)
    with pytest.raises(ResourceError, match=f"{needed:,} bytes needed"):
        device.prepack(phone, lambda _: None)
    assert list((phone / PREPACKED).iterdir()) == []
    monkeypatch.setattr(files, "free_disk", lambda _: needed)
    assert device.prepack(phone, lambda _: None).kernels


def edit(**changes: Any) -> Damage:
    """Change keys of prepack.json."""
    return lambda folder: write_json(folder / PREPACK_FILE, read_json(folder / PREPACK_FILE) | changes)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda folder: (folder / "tiny.data.0").unlink(), "'tiny.data.0'"),
        (lambda folder: (folder / "tiny.slice.1.onnx").unlink(), "'tiny.slice.1.onnx'"),
        (lambda folder: (folder / PREPACK_FILE).unlink(), "not readable"),
        (lambda folder: (folder / PREPACK_FILE).write_text("[]"), "not readable"),
        (edit(version=2), "version 2"),
        (edit(parts=["../secret"]), "'../secret'"),
        (edit(slices=[]), "another number of slices"),
        (edit(more=1), "not readable"),
    ],
)  # fmt: skip
def test_a_damaged_bundle_is_refused_by_name(damage: Damage, word: str, phone: Path) -> None:
    (phone.parent / "secret").write_text("")
    damage(phone)
    with pytest.raises(BundleError, match=word.replace("[", r"\[")):
        device.prepack(phone, lambda _: None)


def test_a_part_cut_short_is_the_runtimes_refusal(phone: Path) -> None:
    for part in phone.glob("tiny.data.*"):
        os.truncate(part, 1000)
    with pytest.raises(BundleError, match=r"tiny\.slice\.0\.onnx: ONNX Runtime"):
        device.prepack(phone, lambda _: None)


@pytest.mark.parametrize(
    ("damage", "word"),
    [
        (lambda folder: (folder / "1.data").unlink(), "1.data has 0 bytes"),
        (lambda folder: os.truncate(folder / "1.data", 100), "1.data has 100 bytes"),
        (lambda folder: (folder / READY).write_text("{"), "not readable"),
        (lambda folder: (folder / READY).unlink(), "not prepacked"),
    ],
)  # fmt: skip
def test_a_phone_that_lost_files_loads_the_models_own_graph(damage: Damage, word: str, phone: Path) -> None:
    device.prepack(phone, lambda _: None)
    damage(phone / PREPACKED)
    outcome = device.choose(phone)
    assert (outcome.graph, outcome.kernels) == ("tiny.onnx", None)
    assert word in outcome.why
    assert device.prepack(phone, lambda _: None) == device.choose(phone)


def test_a_graph_without_quantized_products_is_refused(tmp_path: Path) -> None:
    exported = export(make_checkpoint(tmp_path, CASES["llama-tied"]))
    with pytest.raises(GraphError, match="no MatMulNBits"):
        cut(exported.model, LIMIT)


def test_slices_of_another_graph_are_not_merged(bundle: Path, tmp_path: Path) -> None:
    graph, _ = device.save_slice(bundle / device.Prepacking.read(bundle).slices[0], tmp_path, 0)
    saved = onnx.load(graph, load_external_data=False)
    for item in saved.graph.initializer:
        item.name = f"other.{item.name}"
    model = onnx.load(bundle / "tiny.onnx", load_external_data=False)
    with pytest.raises(GraphError, match="another graph"):
        Merging(model, LIMIT).add(saved, "prepacked/0.data")


# --- the command ---


def test_a_folder_that_is_no_model_is_an_error(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no written model"):
        check.run(tmp_path / "absent", tmp_path / "target")
    assert not (tmp_path / "target").exists()


@pytest.fixture(scope="module")
def runnable(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An artifact that onnxruntime-genai loads."""
    from pipeline.graph.genai import Generation, genai_config

    folder = tmp_path_factory.mktemp("runnable")
    checkpoint = tiny.make_model(folder / "checkpoint")
    exported = export(checkpoint, 512)
    exported.write(changed("q4", search="nearest"), folder / "artifact")
    generation = Generation((2,), 1, 2, {"do_sample": False}, ())
    settings = genai_config(exported.architecture, generation, "tiny.onnx", 512)
    write_json(folder / "artifact/genai_config.json", settings)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(checkpoint / name, folder / "artifact")
    return folder / "artifact"


def test_the_command_compares_both_ways(
    runnable: Path, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    before = sorted(path.name for path in runnable.iterdir())
    check.run(runnable, tmp_path / "to", LIMIT)
    said = capfd.readouterr().out
    assert f"{check.NEW_TOKENS} greedy tokens are equal" in said and "private at the peak" in said
    assert sorted(path.name for path in runnable.iterdir()) == before
    rewrite(tmp_path / "to", saved="0" * 64)
    check.run(tmp_path / "to", tmp_path / "other")
    assert "as none of the bundle's 1 kernel classes does. tiny.onnx loads as ever" in capfd.readouterr().out


def test_other_tokens_are_an_error() -> None:
    ways = [check.Way(1.0, (1, 1), (1, 1), tokens, 1.0) for tokens in ([1, 2, 3], [1, 5, 3])]
    check.compare(ways[0], ways[0])
    with pytest.raises(EvaluationError, match="from token 1 of 3 on: 5 in place of 2"):
        check.compare(*ways)
