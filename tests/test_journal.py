"""Items of an interrupted measurement: what is whole is kept, what is cut is measured again."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from pipeline.journal import Journal


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A journal of three items."""
    journal = Journal(tmp_path / "items.jsonl")
    for name, item in (("a", {"score": [0.1, -1e-300]}), ("b", "é\n"), ("c", None)):
        journal.record(name, item)
    return tmp_path / "items.jsonl"


def test_items_come_back_in_their_order(path: Path) -> None:
    assert list(Journal(path).items.items()) == [("a", {"score": [0.1, -1e-300]}), ("b", "é\n"), ("c", None)]


def test_no_cut_loses_more_than_the_items_it_hits(path: Path) -> None:
    whole = path.read_bytes()
    ends = [index for index in range(len(whole)) if whole[index : index + 1] == b"\n"]
    for size in range(len(whole)):
        path.write_bytes(whole[:size])
        journal = Journal(path)
        assert len(journal.items) == sum(end < size for end in ends)
        journal.record("d", 4)
        assert list(Journal(path).items) == ["abc"[i] for i in range(len(journal.items) - 1)] + ["d"]


def test_a_whole_journal_is_only_read(path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One in DVC's cache is read-only."""
    monkeypatch.setattr(os, "truncate", lambda *_: pytest.fail("written to"))
    assert len(Journal(path).items) == 3


@pytest.mark.parametrize(
    "blank", [b"\0" * 40, b"\0\0\n", b"null\n", b'["a"]\n', b"[1, 2]\n", b"{}\n", b'["c", 1, 2]\n']
)
def test_blocks_that_a_power_cut_left_blank_end_the_journal(path: Path, blank: bytes) -> None:
    with open(path, "ab") as file:
        file.write(blank)
    assert list(Journal(path).items) == ["a", "b", "c"]


def test_items_recorded_in_another_order_make_the_same_file_once_arranged(tmp_path: Path) -> None:
    files = []
    for order in ("abc", "cab"):
        journal = Journal(tmp_path / order)
        for name in order:
            journal.record(name, {"é": name})
        journal.arrange("ab")  # c follows
        assert list(journal.items) == list(Journal(tmp_path / order).items) == ["a", "b", "c"]
        files.append((tmp_path / order).read_bytes())
    assert files[0] == files[1]


def test_a_journal_in_order_is_not_written_again(tmp_path: Path) -> None:
    journal = Journal(tmp_path / "items")
    journal.record("a", 1)
    (tmp_path / "items").chmod(0o444)
    before = (tmp_path / "items").stat().st_ino
    journal.arrange("a")
    assert (tmp_path / "items").stat().st_ino == before
