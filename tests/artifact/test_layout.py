"""Places: pages, parts and order."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.artifact.layout import PAGE, Place, make_layout
from pipeline.errors import PlanError


def test_places_by_hand() -> None:
    layout = make_layout([("a", 100), ("b", 10), ("large", 70_000), ("c", 1)], 1 << 20)
    assert layout.places == {
        "a": Place(0, 0, 100),
        "b": Place(0, 128, 10),
        "large": Place(0, 4096, 70_000),
        "c": Place(0, 74_112, 1),  # 74,096 rounded up to 64
    }
    assert layout.parts == (74_113,)
    assert layout.bytes == 74_113


def test_a_tensor_that_does_not_fit_opens_the_next_part() -> None:
    layout = make_layout([("a", 600), ("b", 600), ("c", 200), ("d", 1000)], 1000)
    assert [(place.part, place.offset) for place in layout.places.values()] == [(0, 0), (1, 0), (1, 640), (2, 0)]
    assert layout.parts == (600, 840, 1000)


def test_a_tensor_larger_than_a_part_is_refused() -> None:
    with pytest.raises(PlanError, match=r"'head' has 1,001 bytes, a part holds 1,000: use fewer bits"):
        make_layout([("a", 1), ("head", 1001)], 1000)


@given(st.lists(st.integers(1, 300_000), max_size=40), st.integers(300_000, 1_000_000))
def test_laws(lengths: list[int], part_bytes: int) -> None:
    layout = make_layout(((str(number), length) for number, length in enumerate(lengths)), part_bytes)
    assert [place.length for place in layout.places.values()] == lengths
    end = (0, 0)
    for place in layout.places.values():
        assert place.offset % (PAGE if place.length >= 1 << 16 else 64) == 0
        assert (place.part, place.offset) >= end  # in order, never overlapping
        end = (place.part, place.offset + place.length)
        assert place.offset + place.length <= layout.parts[place.part] <= part_bytes
    assert layout.bytes == sum(layout.parts)


@given(st.lists(st.integers(65_536, 300_000), min_size=2, max_size=20), st.integers(0, 19))
def test_a_tensor_that_keeps_its_pages_moves_no_other(lengths: list[int], which: int) -> None:
    """An update that changes a large tensor's length within its last page is a small download."""
    which %= len(lengths)
    before = make_layout(((str(number), length) for number, length in enumerate(lengths)), 1 << 30)
    lengths[which] = lengths[which] // PAGE * PAGE + 1 if lengths[which] % PAGE else lengths[which]
    after = make_layout(((str(number), length) for number, length in enumerate(lengths)), 1 << 30)
    offsets = [[place.offset for place in layout.places.values()] for layout in (before, after)]
    assert offsets[0] == offsets[1]
