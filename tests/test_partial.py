"""Unfinished work: who may go on with it, who may not, and when it disappears."""

from __future__ import annotations

import errno
import fcntl
import os
from pathlib import Path

import pytest

from pipeline.errors import ResourceError
from pipeline.partial import open_partial

DROPPED = "q4: what an earlier run left belongs to another source, recipe or code: dropped\n"


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Where work on q4 lies."""
    return tmp_path / "partial" / "q4"


def begin(folder: Path, key: str = "key") -> None:
    """One finished unit, and an error."""
    with pytest.raises(ZeroDivisionError), open_partial(folder, key) as partial:
        (partial.folder / "data").write_bytes(bytes(10_000))
        partial.record("model.norm.weight[0:7]", "0a1b")
        raise ZeroDivisionError


def test_work_goes_on_under_the_same_key(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(folder)
    with open_partial(folder, "key") as partial:
        assert partial.digests == {"model.norm.weight[0:7]": "0a1b"}
        partial.record("another unit", "2c")
        partial.record("model.norm.weight[0:7]", "3d")
    with open_partial(folder, "key") as partial:
        assert partial.digests == {"model.norm.weight[0:7]": "3d", "another unit": "2c"}
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("key", ["other", "ke", "key2", ""])
def test_work_under_another_key_is_dropped(key: str, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    begin(folder)
    with open_partial(folder, key) as partial:
        assert partial.digests == {}
        assert [*folder.iterdir()] == []
    assert capsys.readouterr().err == DROPPED
    with open_partial(folder, "key") as partial:  # and does not come back
        assert partial.digests == {}
    assert capsys.readouterr().err == ""  # there was nothing to drop


@pytest.mark.parametrize(
    "journal",
    [b"", b'["", "ke', b'["", "key"]', b'\0\0\0\0\n["model.norm.weight[0:7]", "0a1b"]\n', b'["a", "0a1b"]\n', None],
)
def test_a_journal_without_its_head_is_worth_nothing(
    journal: bytes | None, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    begin(folder)
    path = folder.with_name("q4.journal")
    path.unlink() if journal is None else path.write_bytes(journal)
    with open_partial(folder, "key") as partial:
        assert partial.digests == {}
        assert [*folder.iterdir()] == []
    assert capsys.readouterr().err == DROPPED


def test_a_journal_without_its_folder_is_worth_nothing(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """What a kill leaves right after the artifact has got its name."""
    begin(folder)
    folder.rename(folder.with_name("elsewhere"))
    with open_partial(folder, "key") as partial:
        assert partial.digests == {}
    assert capsys.readouterr().err == ""


def test_finished_work_replaces_the_old_and_leaves_nothing(folder: Path, tmp_path: Path) -> None:
    target = tmp_path / "variants" / "q4"
    for content in (b"old", b"new"):
        with open_partial(folder, "key") as partial:
            (partial.folder / "data").write_bytes(content)
            partial.finish(target)
        assert [(file.name, file.read_bytes()) for file in target.iterdir()] == [("data", content)]
        assert [path.name for path in tmp_path.iterdir()] == ["variants"]
    assert [path.name for path in target.parent.iterdir()] == ["q4"]


def test_other_variants_are_left_alone(folder: Path, tmp_path: Path) -> None:
    begin(folder.with_name("q4_k_m"))
    for other in (".q4_k_m.old.x", "q4_k_m"):
        (tmp_path / "variants" / other).mkdir(parents=True)
    with open_partial(folder, "key") as partial:
        partial.finish(tmp_path / "variants" / "q4")
    assert sorted(path.name for path in folder.parent.iterdir()) == ["q4_k_m", "q4_k_m.journal"]
    assert sorted(path.name for path in (tmp_path / "variants").iterdir()) == [".q4_k_m.old.x", "q4", "q4_k_m"]


@pytest.mark.parametrize("key", ["key", "other"])
def test_one_at_a_time(key: str, folder: Path, tmp_path: Path) -> None:
    begin(folder)
    with open_partial(folder, "key") as first:
        with pytest.raises(ResourceError, match=rf"another process is writing {folder}\. Wait for it, or stop it"):
            open_partial(folder, key).__enter__()
        with open_partial(folder.with_name("q3"), key):
            first.record("unit", "1f")
    with open_partial(folder, "key") as partial:
        assert set(partial.digests) == {"model.norm.weight[0:7]", "unit"}


def test_a_lock_on_a_file_that_is_gone_is_no_lock(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another process finishes between this one's opening the journal and its locking it."""
    real, calls = fcntl.flock, []

    def flock(*arguments: int) -> None:
        calls.append(arguments)
        if len(calls) == 1:
            folder.with_name("q4.journal").unlink()
            folder.parent.rmdir()
        real(*arguments)

    monkeypatch.setattr(fcntl, "flock", flock)
    with open_partial(folder, "key") as partial:
        monkeypatch.undo()
        with pytest.raises(ResourceError, match="another process"):
            open_partial(folder, "key").__enter__()
        partial.record("unit", "1f")
    assert len(calls) == 2


@pytest.mark.parametrize("code", [errno.ENOSPC, errno.EFBIG, errno.EDQUOT, errno.EROFS])
def test_a_full_disk_is_said_and_keeps_the_work(code: int, folder: Path) -> None:
    begin(folder)
    with pytest.raises(ResourceError, match=f"write {folder}"), open_partial(folder, "key"):
        raise OSError(code, os.strerror(code))
    with open_partial(folder, "key") as partial:
        assert partial.digests == {"model.norm.weight[0:7]": "0a1b"}


@pytest.mark.parametrize("tail", [b'["unit", "1', b"\0" * 40, b"\0\0\n", b'["unit"]\n'])
def test_a_line_that_a_kill_cut_is_dropped_and_never_joined_to_the_next(tail: bytes, folder: Path) -> None:
    begin(folder)
    with open(folder.with_name("q4.journal"), "ab") as file:
        file.write(tail)
    with open_partial(folder, "key") as partial:
        assert partial.digests == {"model.norm.weight[0:7]": "0a1b"}
        partial.record("another", "2c")
    with open_partial(folder, "key") as partial:
        assert partial.digests == {"model.norm.weight[0:7]": "0a1b", "another": "2c"}


def test_an_error_of_the_work_is_not_taken_for_one_of_the_lock(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match="weights"), open_partial(folder, "key"):
        raise FileNotFoundError("weights")
