"""The bundle as bytes on a disk: equal on every machine, in parts a store takes, aligned, and it runs as it lies."""

from __future__ import annotations

import itertools
import os
import shutil
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx
import pytest

from pipeline.artifact.layout import PAGE
from pipeline.artifact.write import Draft
from pipeline.bundle import release
from pipeline.bundle.verify import verify
from pipeline.config.recipes import RecipeConfig
from pipeline.files import sha256_of, write_bytes, write_json
from pipeline.graph.genai import Generation, genai_config
from tests.artifact.exported import Exported, changed, export
from tests.bundle.conftest import CREATED
from tests.families import CASES, Case, make_checkpoint
from tests.graph.test_genai import greedy, prompt
from tests.tiny import make_tokenizer

WIDE = {"hidden_size": 512, "intermediate_size": 1536, "num_attention_heads": 8, "num_key_value_heads": 4}
CASE = Case(CASES["llama-tied"].config | WIDE | {"num_hidden_layers": 3, "head_dim": 64}, "llama")
PART_BYTES = 1 << 20
LARGE = 1 << 16  # bytes from which a tensor has pages of its own


@dataclass(frozen=True)
class Built:
    """A bundle and the draft of its artifact."""

    bundle: Path
    drafted: Draft

    @property
    def content(self) -> Path:
        return self.bundle / "content"


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = make_checkpoint(tmp_path_factory.mktemp("layout") / "checkpoint", CASE)
    make_tokenizer(folder, CASE.config["vocab_size"])
    return folder


def build(maker: Any, checkpoint: Path, where: Path, recipe: RecipeConfig) -> Built:
    """Export, quantize, assemble and sign in `where`, as the stages do."""
    exported: Exported = export(Path(shutil.copytree(checkpoint, where / "export")))
    artifact = where / "artifact"
    drafted = exported.write(recipe, artifact, part_bytes=recipe.part_bytes)
    generation = Generation((2,), 1, 2, {"do_sample": False}, ())
    settings = genai_config(exported.architecture, generation, drafted.model_file, 96)
    write_json(artifact / "genai_config.json", settings)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        write_bytes(artifact / name, (checkpoint / name).read_bytes())
    files = {file.name: file for file in artifact.iterdir()}
    (where / "sources").mkdir()
    fields = {"files": release.describe_files(files), "created": CREATED}
    release.assemble(where / "bundle/content", files, maker.document(where / "sources", **fields))
    maker.sign(where / "bundle")
    return Built(where / "bundle", drafted)


@pytest.fixture(scope="module")
def built(maker: Any, checkpoint: Path, tmp_path_factory: pytest.TempPathFactory) -> Built:
    recipe = changed("q4", search="nearest", part_bytes=PART_BYTES)
    return build(maker, checkpoint, tmp_path_factory.mktemp("built"), recipe)


# --- the same bytes --------------------------------------------------------------------------------------------------


def listing(folder: Path) -> dict[str, tuple[str, str]]:
    """Relative path → mode and SHA-256 of every entry."""
    return {
        str(path.relative_to(folder)): (oct(path.stat().st_mode), sha256_of(path) if path.is_file() else "")
        for path in sorted(folder.rglob("*"))
    }


def test_two_builds_are_equal_to_the_byte_and_the_mode(
    maker: Any, checkpoint: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another folder, day, time zone, umask and clock; the signature included."""
    recipe = changed("q4", search="nearest", part_bytes=PART_BYTES)
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1769860800")
    first = build(maker, checkpoint, tmp_path / "a", recipe)
    moved = Path(shutil.copytree(checkpoint, tmp_path / "somewhere else" / "checkpoint"))
    for path in moved.iterdir():
        os.utime(path, (86_400, 86_400))
    monkeypatch.setenv("TZ", "Asia/Kathmandu")
    before = os.umask(0o077)
    try:
        time.tzset()
        second = build(maker, moved, tmp_path / "b" / "c", recipe)
    finally:
        os.umask(before)
        monkeypatch.undo()
        time.tzset()
    assert listing(first.bundle) == listing(second.bundle)
    assert {mode for mode, _ in listing(first.bundle).values()} == {"0o100644", "0o40755"}


def test_nothing_of_the_machine_is_in_the_bundle(built: Built) -> None:
    parents = [str(folder).encode() for folder in list(built.bundle.parents)[:-2]]
    for path in built.bundle.rglob("*"):
        data = path.read_bytes() if path.is_file() else b""
        assert not any(parent in data for parent in (*parents, os.uname().nodename.encode() + b".")), path


# --- parts and alignment ---------------------------------------------------------------------------------------------


def external(model: Path) -> list[tuple[str, str, int, int]]:
    """(name, part, offset, length) of each stored tensor as the written graph says, in its order."""
    found = []
    for tensor in onnx.load(model, load_external_data=False).graph.initializer:
        entry = {item.key: item.value for item in tensor.external_data}
        if entry:
            found.append((tensor.name, entry["location"], int(entry["offset"]), int(entry["length"])))
    return found


def test_parts_have_the_planned_sizes_and_lie_beside_the_model(built: Built) -> None:
    sizes = {name: (built.content / name).stat().st_size for name in built.drafted.files}
    parts = [sizes[name] for name in built.drafted.files[1:]]
    assert parts == list(built.drafted.layout.parts) and len(parts) > 1
    assert max(parts) <= PART_BYTES
    assert sum(sizes.values()) == built.drafted.bytes
    assert {part for _, part, _, _ in external(built.content / built.drafted.model_file)} == set(sizes) - {
        built.drafted.model_file
    }


def test_the_written_graph_keeps_large_tensors_on_pages_in_a_stable_order(built: Built) -> None:
    tensors = external(built.content / built.drafted.model_file)
    large = [item for item in tensors if item[3] >= LARGE]
    assert len(large) >= 20
    assert all(offset % PAGE == 0 for _, _, offset, _ in large)
    assert all(offset % 64 == 0 for _, _, offset, _ in tensors)
    spans = sorted({(part, offset, offset + length) for _, part, offset, length in tensors})  # a tied table is one
    for (part, _, end), (following, start, _) in itertools.pairwise(spans):
        assert part != following or end <= start, "two tensors overlap"
    planned = [
        (built.drafted.files[1 + place.part], place.offset, place.offset + place.length)
        for place in built.drafted.layout.places.values()
    ]
    assert spans == planned


def test_the_shipped_parts_leave_room_in_a_pack() -> None:
    """The largest that a recipe may ask for, with the small files of a bundle, is under Play's 1.5 GB."""
    from pipeline.packs.delivery import PACK_BYTES

    limit = RecipeConfig.model_fields["part_bytes"]
    most = next(item.le for item in limit.metadata if hasattr(item, "le"))
    assert limit.default == most == 1_400_000_000 < PACK_BYTES - 50_000_000


# --- it runs ---------------------------------------------------------------------------------------------------------


def test_the_signed_content_loads_and_generates_as_it_lies(built: Built, public_key: Path) -> None:
    assert verify(built.bundle, public_key, now=CREATED).ok
    assert len(greedy(built.content, prompt(8), 4)) >= 1
    assert verify(built.bundle, public_key, now=CREATED).ok  # running wrote nothing into the folder
