"""Progress: silent when short, lines in a log, a bar on a terminal that leaves nothing behind."""

from __future__ import annotations

import os
import pty
import re
import subprocess
import sys

import pytest

from pipeline import progress
from pipeline.progress import Progress
from tests.conftest import ROOT


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """One number: what the clock shows."""
    shown = [1000.0]
    monkeypatch.setattr(progress.time, "monotonic", lambda: shown[0])
    monkeypatch.setattr(progress, "resident_memory", lambda: (309_700_000, 0))
    return shown


def test_short_work_is_silent(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("quantize", 3, "tensors", 100) as shown:
        for _ in range(3):
            clock[0] += 4.9
            shown.advance(1, 33)
    assert capsys.readouterr() == ("", "")


def test_lines_in_a_log(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    """Every 15 seconds at most: tensors, bytes, speed, private memory, time left."""
    with Progress("quantize mimo_q4", 1500, "tensors", 15_000_000_000) as shown:
        for _ in range(40):
            clock[0] += 1
            shown.advance(30, 300_000_000)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "  quantize mimo_q4: 480 of 1,500 tensors · 4.8 of 15.0 GB · 0.30 GB/s · 310 MB private · about 34 s left",
        "  quantize mimo_q4: 960 of 1,500 tensors · 9.6 of 15.0 GB · 0.30 GB/s · 310 MB private · about 18 s left",
    ]


def test_what_an_earlier_run_did_is_no_sign_of_speed(clock: list[float]) -> None:
    with Progress("quantize", 100, "tensors", 10_000_000_000) as shown:
        shown.advance(50, 5_000_000_000, kept=True)
        clock[0] += 1
        assert shown.figures() == "50 of 100 tensors · 5.0 of 10.0 GB · 0.00 GB/s · 310 MB private"
        for _ in range(2):  # a speed takes two
            clock[0] += 10
            shown.advance(10, 1_000_000_000)
        assert shown.figures().endswith("0.10 GB/s · 310 MB private · about 30 s left")


def test_items_without_bytes(clock: list[float], capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("measure", 4) as shown:
        for _ in range(4):
            clock[0] += 16
            shown.advance()
    assert capsys.readouterr().err.splitlines() == [
        "  measure: 1 of 4 · 310 MB private",
        "  measure: 2 of 4 · 310 MB private · about 32 s left",
        "  measure: 3 of 4 · 310 MB private · about 16 s left",
        "  measure: 4 of 4 · 310 MB private · about 0 s left",
    ]


def test_a_worker_s_burst_is_one_sign_of_speed(clock: list[float]) -> None:
    """Ten items every ten seconds are one a second, not the thousands that come in the same instant."""
    with Progress("validate", 100, "questions", workers=4) as shown:
        for burst in range(5):
            clock[0] += 10
            for _ in range(10):
                clock[0] += 0.0001
                shown.advance()
            if burst > 1:
                left = int(shown.figures().split("about ")[1].split()[0])
                assert abs(left - (100 - shown.done)) <= 10
        assert shown.figures().startswith("50 of 100 questions · 4 workers · 310 MB private · about ")
        for _ in range(50):
            shown.advance()
        assert shown.figures().endswith("about 0 s left")


def on_a_terminal(body: str) -> str:
    """What a program writes to a terminal of 120 columns."""
    program = f"import time\nfrom pipeline.progress import Progress\n{body}"
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-c", program], cwd=ROOT, stderr=theirs, env=os.environ | {"COLUMNS": "120", "TERM": "xterm"}
    )
    os.close(theirs)
    written = b""
    try:
        while data := os.read(ours, 4096):
            written += data
    except OSError:  # Linux' end of a terminal
        pass
    os.close(ours)
    process.wait()
    return written.decode()


def screen(written: str) -> str:
    """What stays on the screen: a terminal of cursor movements and erasures, as far as bars use them."""
    rows, row, column = [""], 0, 0
    for token in re.findall(r"\x1b\[[?\d;]*[A-Za-z]|[^\x1b]", written):
        if token.startswith("\x1b"):
            count, kind = int(re.sub(r"\D", "", token) or 1), token[-1]
            if kind == "A":
                row = max(0, row - count)
            elif kind == "K":
                rows[row] = rows[row][:column] if "2" not in token else ""
        elif token == "\r":
            column = 0
        elif token == "\n":
            row += 1
            rows += [""] * (row + 1 - len(rows))
        else:
            rows[row] = rows[row][:column].ljust(column) + token + rows[row][column + 1 :]
            column += 1
    return "\n".join(rows).strip()


WORK = """
with Progress('quantize mimo_q4', 4, 'tensors', 4_000_000_000) as shown:
    for _ in range(3):
        shown.advance(1, 1_000_000_000)
        time.sleep(0.15)
"""


def test_a_bar_on_a_terminal_that_is_gone_at_the_end() -> None:
    written = on_a_terminal(WORK)
    assert "quantize mimo_q4" in written
    assert re.search("[123] of 4 tensors", written), "what is shown depends on when the terminal's thread runs"
    assert re.search(r"\d+\.\d\d GB/s · \d+ MB private · about \d+ s left", written)
    assert screen("left over\n") == "left over"
    assert screen(written) == ""
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h"), "the cursor is visible again"


def test_a_bar_does_not_survive_an_error() -> None:
    written = on_a_terminal(WORK + "    raise SystemExit('the disk is full')")
    assert screen(written) == "the disk is full"
    assert written.count("\x1b[?25l") == written.count("\x1b[?25h")
