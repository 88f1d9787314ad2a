"""Links, anchors and paths of the documents lead somewhere, and the first page stays one page."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from tests.conftest import ROOT
from tests.documented import PAGES, QUIET, blocks

_PATH = re.compile(r"`((?:pipeline|configs|tests|benchmarks|docs|phone|\.github)/[\w./-]*)`")


def anchors(page: Path) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page.read_text(), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_and_paths_lead_somewhere(page: Path) -> None:
    text = page.read_text()
    lost = []
    for link in re.findall(r"\]\(([^)]+)\)", re.sub(r"```.*?```", "", text, flags=re.DOTALL)):
        path, _, anchor = link.partition("#")
        target = page.parent / path if path else page
        if not link.startswith("http") and (not target.exists() or (anchor and anchor not in anchors(target))):
            lost.append(link)
    lost += [path for path in _PATH.findall(text) if "NAME" not in path and not (ROOT / path).exists()]
    assert not lost


def test_the_first_page_is_one_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert text.count("\n") <= 140
    prose = [line for line in text.splitlines() if not line.startswith("|")]
    assert len(" ".join(prose).split()) <= 1_150


def test_every_block_says_whether_a_test_runs_it() -> None:
    known = re.compile(rf"sh (run|long|shown: .+)|{'|'.join(sorted(QUIET))}")
    assert [f"{block.place}: ```{block.mark}" for block in blocks() if not known.fullmatch(block.mark)] == []
