"""A section's folder: what a run leaves, and what the next one makes of it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from pipeline.files import read_json
from pipeline.journal import Journal
from pipeline.tasks import kept
from pipeline.tasks.sections import RECORD, Key

KEY = Key({"files": "1", "suite": "1"}, {"number": "3"})
MORE = Key(KEY.items, {"number": "5"})
OTHER = Key({"files": "1", "suite": "2"}, {"number": "3"})


class Killed(Exception):
    """Stands for a kill."""


class Items:
    """Measures squares of the first numbers, as far as they are not in the journal."""

    def __init__(self, number: int, dies_at: int | None = None):
        self.number, self.dies_at = number, dies_at
        self.asked: list[int] = []
        self.found = False

    def __call__(self, folder: Path) -> dict[str, Any]:
        self.found = (folder / kept.STATES).exists()
        (folder / kept.STATES).mkdir(exist_ok=True)
        journal = Journal(folder / "items.jsonl")
        for item in range(self.number):
            if item == self.dies_at:
                raise Killed
            if str(item) not in journal.items:
                self.asked.append(item)
                journal.record(str(item), item**2)
        return {"sum": sum(journal.items[str(item)] for item in range(self.number))}


@pytest.fixture
def run(tmp_path: Path) -> Any:
    """One validation with one section, in the way of the stage."""

    def validate(key: Key, items: Items) -> tuple[str, dict[str, Any]]:
        folder, earlier = tmp_path / "partial", tmp_path / "finished"
        said = kept.adopt(folder, earlier, key)
        metrics = kept.measured(folder, key, items)
        if earlier.exists():
            for file in earlier.iterdir():
                file.unlink()
            earlier.rmdir()
        os.rename(folder, earlier)
        return said, metrics

    return validate


def test_nothing_changed_measures_nothing(run: Any, tmp_path: Path) -> None:
    assert run(KEY, first := Items(3)) == ("measured", {"sum": 5})
    assert first.asked == [0, 1, 2]
    assert run(KEY, second := Items(3)) == ("kept as measured before", {"sum": 5})
    assert second.asked == []
    record = read_json(tmp_path / "finished" / RECORD)
    assert (record["metrics"], list(record["sha256"])) == ({"sum": 5}, ["items.jsonl"])


def test_more_items_add_to_those_that_are_there_in_a_file_of_its_own(run: Any, tmp_path: Path) -> None:
    """DVC's cache holds the same file under another name: it must not grow."""
    run(KEY, Items(3))
    os.link(tmp_path / "finished/items.jsonl", tmp_path / "cached")
    before = (tmp_path / "cached").read_bytes()
    assert run(MORE, items := Items(5)) == ("3 items kept", {"sum": 30})
    assert items.asked == [3, 4]
    assert (tmp_path / "cached").read_bytes() == before
    assert (tmp_path / "finished/items.jsonl").read_bytes().startswith(before)


def test_fewer_items_are_the_first_of_those_that_are_there(run: Any) -> None:
    run(MORE, Items(5))
    assert run(KEY, items := Items(3)) == ("5 items kept", {"sum": 5})
    assert items.asked == []


def test_another_key_measures_again_and_says_what_changed(run: Any) -> None:
    run(KEY, Items(3))
    assert run(OTHER, items := Items(3)) == ("measured again: suite changed", {"sum": 5})
    assert items.asked == [0, 1, 2]


def test_a_killed_run_goes_on_at_its_item(run: Any, tmp_path: Path) -> None:
    with pytest.raises(Killed):
        run(KEY, Items(3, dies_at=2))
    (tmp_path / "partial/.items.half").write_text("what a kill left")
    (tmp_path / "partial/.linked").mkdir()
    assert run(KEY, items := Items(3)) == ("2 items kept", {"sum": 5})
    assert items.asked == [2]
    assert {file.name for file in (tmp_path / "finished").iterdir()} == {RECORD, "items.jsonl"}


def test_a_finished_validation_beats_an_unfinished_one_of_another_key(run: Any) -> None:
    run(KEY, Items(3))
    with pytest.raises(Killed):
        run(OTHER, Items(3, dies_at=2))
    assert run(KEY, Items(3))[0] == "kept as measured before"


def test_unfinished_items_are_not_those_of_another_key(run: Any) -> None:
    with pytest.raises(Killed):
        run(KEY, Items(3, dies_at=2))
    assert run(OTHER, items := Items(3))[0] == "measured again: suite changed"
    assert items.asked == [0, 1, 2]


def test_a_kill_while_files_are_taken_over_takes_them_over_again(
    run: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run(KEY, Items(3))
    whole, linked = kept.link_or_copy, list[Path]()

    def dying(source: Path, target: Path) -> None:
        if linked:
            raise Killed
        linked.append(source)
        whole(source, target)

    monkeypatch.setattr(kept, "link_or_copy", dying)
    with pytest.raises(Killed):
        run(KEY, Items(3))
    monkeypatch.setattr(kept, "link_or_copy", whole)
    assert run(KEY, Items(3)) == ("kept as measured before", {"sum": 5})
    assert (tmp_path / "finished/items.jsonl").exists()


@pytest.mark.parametrize("record", ["", "{", "[]", "{}", '{"items": 1}', '{"metrics": {}}'])
def test_a_damaged_record_is_none(run: Any, tmp_path: Path, record: str) -> None:
    run(KEY, Items(3))
    (tmp_path / "finished" / RECORD).write_text(record)
    assert run(KEY, items := Items(3)) == ("measured", {"sum": 5})
    assert items.asked == [0, 1, 2]


@pytest.mark.parametrize(("key", "found"), [(KEY, True), (MORE, True), (OTHER, False)])
def test_what_an_item_has_on_its_way_lives_as_long_as_the_items(run: Any, key: Key, found: bool) -> None:
    """And is gone when they are whole."""
    with pytest.raises(Killed):
        run(KEY, Items(3, dies_at=2))
    run(key, again := Items(3))
    assert again.found == found
