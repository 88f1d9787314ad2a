"""An artifact whose writing is killed, again and again, is the artifact of a run that nobody disturbed, to the byte."""

from __future__ import annotations

import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any

import pytest

from pipeline.artifact import write
from pipeline.artifact.work import quantize_unit
from pipeline.engine.units import AHEAD, Threads
from pipeline.errors import ResourceError
from tests.artifact.exported import (
    PATIENCE,
    Exported,
    child,
    contents,
    export,
    finish,
    finished_units,
    grow,
    lines,
    make_bfloat16,
)
from tests.families import CASES, make_checkpoint
from tests.recipes import load_recipe

# 72 million weights: 300 units of 256 thousand, computed in one to two seconds.
MIDDLE = CASES["llama-untied"].config | {
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 6,
    "num_attention_heads": 16,
    "num_key_value_heads": 4,
    "vocab_size": 2048,
}
UNIT_BYTES = 1 << 20
KILLS = 25


@pytest.fixture(scope="module")
def middle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A checkpoint of 72 million weights in bfloat16."""
    return make_bfloat16(tmp_path_factory.mktemp("middle") / "checkpoint", MIDDLE)


@pytest.fixture(autouse=True)
def _no_child_survives() -> Iterator[None]:
    yield
    for process in multiprocessing.active_children():
        process.kill()


def recorded(artifact: Path) -> set[str]:
    """The units that the journal says are finished."""
    return finished_units(artifact.parent / "partial" / f"{artifact.name}.journal")


def wait_for(condition: Callable[[], bool], process: BaseProcess) -> None:
    deadline = time.monotonic() + PATIENCE
    while not condition():
        assert process.is_alive()
        assert time.monotonic() < deadline
        time.sleep(0.001)


@pytest.mark.long
@pytest.mark.parametrize("recipe", ["q4", "q3"])
def test_killed_many_times(recipe: str, middle: Path, tmp_path: Path) -> None:
    """SIGKILL at random moments: each run continues, none computes what the journal had, the bytes are the same."""
    log = tmp_path / "log"
    assert finish(child(grow, middle, recipe, tmp_path / "whole", log, UNIT_BYTES)) == 0
    units = len(lines(log))
    assert units > 250
    log.unlink()

    chance, artifact = random.Random(recipe), tmp_path / "artifact"
    computed = 0
    for count in [*sorted(chance.sample(range(units - 10), KILLS)), None]:
        before = recorded(artifact)
        process = child(grow, middle, recipe, artifact, log, UNIT_BYTES, chance.choice([1, 2, 5]))
        if count is None:
            assert finish(process) == 0
        else:
            wait_for(lambda count=count: len(recorded(artifact)) >= count, process)
            time.sleep(chance.random() * 0.01)
            process.kill()
            assert finish(process) == -signal.SIGKILL
            assert not artifact.exists()
            assert recorded(artifact) >= before
        done = lines(log)
        computed += len(done)
        assert not before & set(done), "finished units were computed again"
        log.unlink(missing_ok=True)
    under_way = 5 + AHEAD + 2  # for 5 threads, with the unit that was to be recorded and a channel order
    assert computed <= units + KILLS * under_way
    assert contents(artifact) == contents(tmp_path / "whole")
    assert not (tmp_path / "partial").exists()


def test_the_bytes_do_not_depend_on_cores_or_threads(middle: Path, tmp_path: Path) -> None:
    ways = {"one core": (run_on_one_core, ()), "one": (grow, (1,)), "five": (grow, (5,)), "again": (grow, (5,))}
    for name, (function, threads) in ways.items():
        process = child(function, middle, "q3", tmp_path / name, tmp_path / "log", UNIT_BYTES, *threads)
        assert finish(process) == 0
    first, *others = (contents(tmp_path / name) for name in ways)
    assert all(other == first for other in others)


def run_on_one_core(*arguments: Any) -> None:
    """`grow` with as many threads as it finds cores: one."""
    os.sched_setaffinity(0, {min(os.sched_getaffinity(0))})
    assert Threads().workers == 1
    grow(*arguments)


def test_two_processes_at_once(middle: Path, tmp_path: Path) -> None:
    """The second is refused and changes nothing; the first, stopped for the moment, finishes."""
    process = child(grow, middle, "q4", tmp_path / "artifact", tmp_path / "log", UNIT_BYTES)
    wait_for(lambda: len(recorded(tmp_path / "artifact")) > 10, process)
    os.kill(process.pid, signal.SIGSTOP)
    before = contents(tmp_path / "partial" / "artifact")
    with pytest.raises(ResourceError, match=r"another process is writing .*partial/artifact\. Wait for it, or stop"):
        export(middle).write(load_recipe("q4"), tmp_path / "artifact", part_bytes=1 << 23)
    assert contents(tmp_path / "partial" / "artifact") == before
    os.kill(process.pid, signal.SIGCONT)
    assert finish(process) == 0
    assert len(lines(tmp_path / "log")) == len(set(lines(tmp_path / "log")))


def test_control_c(middle: Path, tmp_path: Path) -> None:
    """The interrupt ends the run with an error; the work stays, and nothing that the journal has is computed again."""
    artifact, log = tmp_path / "artifact", tmp_path / "log"
    process = child(grow, middle, "q3", artifact, log, UNIT_BYTES)
    wait_for(lambda: len(recorded(artifact)) > 50, process)
    os.kill(process.pid, signal.SIGINT)
    assert finish(process) == 1
    before = recorded(artifact)
    assert 50 < len(before) < 280
    log.unlink()
    assert finish(child(grow, middle, "q3", artifact, log, UNIT_BYTES)) == 0
    assert not before & set(lines(log))


# --- damage between two runs, on a tiny model ------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    """A tiny exported model."""
    return export(make_checkpoint(tmp_path_factory.mktemp("tiny") / "checkpoint", CASES["qwen2"]))


@pytest.fixture
def spy(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the units that are computed, and `channels` for every channel order."""
    seen: list[str] = []
    split_channels = write.split_channels

    def unit(item: Any, *rest: Any) -> Any:
        seen.append(item.name)
        return quantize_unit(item, *rest)

    def split(*arguments: Any) -> Any:
        seen.append("channels")
        return split_channels(*arguments)

    monkeypatch.setattr(write, "quantize_unit", unit)
    monkeypatch.setattr(write, "split_channels", split)
    return seen


@pytest.fixture
def unfinished(tiny: Exported, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The folder of a q3 artifact that was interrupted (Ctrl-C) when all units were done, before the rest was."""

    def interrupt(*_: Any) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(write, "_write_copies", interrupt)
        with pytest.raises(KeyboardInterrupt):
            tiny.write(load_recipe("q3"), tmp_path / "artifact")
    tiny.write(load_recipe("q3"), tmp_path / "whole")
    assert not (tmp_path / "artifact").exists()
    return tmp_path / "partial" / "artifact"


def check_whole(tiny: Exported, unfinished: Path) -> None:
    tiny.write(load_recipe("q3"), unfinished.parents[1] / "artifact")
    assert contents(unfinished.parents[1] / "artifact") == contents(unfinished.parents[1] / "whole")


def test_nothing_is_done_twice(tiny: Exported, unfinished: Path, spy: list[str]) -> None:
    check_whole(tiny, unfinished)
    assert spy == []


@pytest.mark.parametrize(
    ("tensor", "redone"),
    [
        ("model.layers.1.mlp.up_proj.high.codes", "model.layers.1.mlp.up_proj.weight[0:320]"),
        ("model.layers.0.self_attn.q_proj.low.scales", "model.layers.0.self_attn.q_proj.weight[0:128]"),
        ("model.layers.2.mlp.down_proj.low.zeros", "model.layers.2.mlp.down_proj.weight[0:128]"),
        ("lm_head.codes", "lm_head.weight[0:320]"),
        ("layers.1.mlp.low.channels", "channels"),
        ("model.norm.weight", None),  # copied again in any case
    ],
)
def test_a_flipped_bit_is_found(
    tensor: str, redone: str | None, tiny: Exported, unfinished: Path, spy: list[str]
) -> None:
    drafted = tiny.draft(load_recipe("q3"))
    place = drafted.layout.places[tensor]
    file = unfinished / drafted.files[1 + place.part]
    data = bytearray(file.read_bytes())
    data[place.offset + place.length // 2] ^= 0x10
    file.write_bytes(data)
    check_whole(tiny, unfinished)
    assert spy == ([redone] if redone else [])


@pytest.mark.parametrize("cut", [1, 30, 64, 65, 80])
def test_a_torn_last_line_is_a_unit_to_do(cut: int, tiny: Exported, unfinished: Path, spy: list[str]) -> None:
    journal = unfinished.with_name("artifact.journal")
    content = journal.read_bytes()
    journal.write_bytes(content[:-cut])
    check_whole(tiny, unfinished)
    assert spy == ["lm_head.weight[0:320]"]


@pytest.mark.parametrize(
    "noise", [b"\0" * 100, b"\0" * 99 + b"\n", b"x\n y\n\n", b'["lm_head.weight[0:320]", "00"]\n', b"\xff \xfe\n"]
)
def test_noise_in_the_journal_is_never_trusted(noise: bytes, tiny: Exported, unfinished: Path, spy: list[str]) -> None:
    """What a power cut can leave. The last line on a unit counts."""
    with unfinished.with_name("artifact.journal").open("ab") as journal:
        journal.write(noise)
    check_whole(tiny, unfinished)
    assert spy == (["lm_head.weight[0:320]"] if b"lm_head" in noise else [])


def test_a_missing_or_short_part_is_filled_again(tiny: Exported, unfinished: Path, spy: list[str]) -> None:
    (unfinished / "tiny.data.0").unlink()
    os.truncate(unfinished / "tiny.data.1", 1000)
    check_whole(tiny, unfinished)
    assert 0 < len(spy) < 26


def test_half_written_files_do_not_reach_the_artifact(tiny: Exported, unfinished: Path, spy: list[str]) -> None:
    (unfinished / ".tiny.onnx.abc123").write_bytes(b"half")
    (unfinished / "tiny.onnx").write_bytes(b"an older graph")
    check_whole(tiny, unfinished)
    assert spy == []


def test_an_old_artifact_moved_aside_does_not_stay(tiny: Exported, unfinished: Path) -> None:
    """A kill between the two renames that put a new artifact in an old one's place."""
    aside = unfinished.parents[1] / ".artifact.old.abc123"
    aside.mkdir()
    (aside / "tiny.data.0").write_bytes(b"gigabytes")
    check_whole(tiny, unfinished)
    assert not aside.exists()
