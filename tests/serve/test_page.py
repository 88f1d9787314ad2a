"""The page in a real browser: two variants side by side, where they part, by keyboard, narrow and dark."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.serve.browser import PROGRAM, Page, browser
from tests.serve.conftest import CONTEXT, Played, Served, changed, serving_folders

pytestmark = [pytest.mark.long, pytest.mark.skipif(not PROGRAM, reason="no Chromium: apt-get install chromium")]


@pytest.fixture(scope="module")
def served(model_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    """The same model twice: as it is, and one that may not repeat itself."""
    other = changed(model_folder, tmp_path_factory.mktemp("page") / "m", search={"repetition_penalty": 2.0})
    with serving_folders(plain=model_folder, other=other) as found:
        yield found


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    with browser(tmp_path_factory.mktemp("profile")) as found:
        yield found


def choose(page: Page, left: str, right: str, tokens: int = 24) -> None:
    """Start a chat with two models."""
    page.until("document.querySelector('#left option')")
    for side, name in {"left": left, "right": right}.items():
        chosen = f"document.getElementById('{side}').value = '{name}'"
        page.value(f"{chosen}, document.getElementById('{side}').dispatchEvent(new Event('change'))")
    page.value(f"document.getElementById('tokens').value = {tokens}, document.getElementById('message').focus(), 0")


def ask(page: Page, text: str) -> None:
    """Type a message, send it by keyboard, and wait for both answers."""
    page.write(text)
    page.press("Enter")
    page.until("!document.getElementById('send').disabled")


def answers(page: Page) -> list[dict[str, str]]:
    """The last turn's answers."""
    shown = "box.querySelector('.text').textContent"
    more = "figures: box.querySelector('.figures').innerText, mark: box.querySelector('mark')?.textContent ?? ''"
    cells = f"({{name: box.children[0].innerText, text: {shown}, {more}}})"
    return list(page.value(f"[...[...document.querySelectorAll('.answers')].at(-1).children].map((box) => {cells})"))


def test_two_variants_answer_and_part_where_it_is_marked(page: Page, served: Served) -> None:
    page.open(served.url)
    choose(page, "plain", "other")
    ask(page, "Good morning.")
    one, two = answers(page)
    assert (one["name"], two["name"]) == ("plain", "other")
    assert one["text"] != two["text"]
    verdict = page.value("document.querySelector('.verdict').innerText")
    agreed = int(verdict.removeprefix("The same ").split()[0])
    assert verdict == f"The same {agreed} tokens, then they differ."
    assert one["mark"] and two["mark"] and one["mark"] != two["mark"]
    assert all("24 tokens: the first after" in box["figures"] and "tokens/s" in box["figures"] for box in (one, two))
    assert page.messages == []


def test_the_same_variant_twice_does_not_part_and_remembers(page: Page, served: Served) -> None:
    page.open(served.url)
    choose(page, "plain", "plain")
    ask(page, "Good morning.")
    first = answers(page)
    assert page.value("document.querySelector('.verdict').innerText") == "The same 24 tokens."
    assert first[0]["text"] == first[1]["text"]
    assert not first[0]["mark"]
    ask(page, "And then?")
    assert page.value("document.querySelectorAll('.question').length") == 2
    assert answers(page)[0]["text"] != first[0]["text"]
    assert page.messages == []


def test_escape_stops_both_and_the_chat_goes_on(page: Page, played: Played) -> None:
    page.open(played.url)
    choose(page, "plain", "plain", tokens=8)
    page.write("Good")
    page.press("Enter", shift=True)
    page.write("morning.")
    page.press("Enter")
    played.puppet.let(4)
    page.until("document.querySelector('.text')?.textContent")
    page.press("Escape")
    page.until("!document.getElementById('send').disabled")
    assert page.value("document.querySelector('.question').innerText") == "Good\nmorning."
    assert all("stopped" in box["figures"] for box in answers(page))
    assert page.value("document.getElementById('status').textContent") == ""
    played.puppet.let(100)
    ask(page, "Again.")
    one, two = answers(page)
    assert one["text"] == two["text"] != ""


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_screen_shows_all_of_it(dark: bool, page: Page, served: Served) -> None:
    page.open(served.url, width=420, height=800, dark=dark)
    choose(page, "plain", "other")
    ask(page, "Good morning. " + "w" * 80)
    assert page.value("document.documentElement.scrollWidth") <= 420
    left = page.value("[...document.querySelectorAll('article')].map((box) => box.getBoundingClientRect().left)")
    assert left[0] == left[1]  # one below the other
    inside = "[...document.querySelectorAll('button, select, input, textarea')].filter((one) => one.offsetParent)"
    edges = page.value(f"{inside}.map((one) => one.getBoundingClientRect().right)")
    assert max(edges) <= 420
    background = page.value("getComputedStyle(document.body).backgroundColor")
    assert (background == "rgb(255, 255, 255)") is not dark


def test_errors_are_said_beside_what_failed(page: Page, served: Served) -> None:
    page.open(served.url)
    choose(page, "plain", "", tokens=100)
    ask(page, "word " * CONTEXT)
    (only,) = answers(page)
    assert "leaves no room" in only["figures"] or "exceed the context" in only["figures"]
    assert page.value("document.querySelector('.figures').classList.contains('error')")
