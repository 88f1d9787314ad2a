"""Plain data between worker and referee: exact builtin types, and nothing else."""

from __future__ import annotations

import json
from collections import Counter
from typing import Any

import pytest

from pipeline.confine.worker import decode, encode


@pytest.mark.parametrize(
    "value",
    [
        None, True, False, 0, -1, 10**400, 0.1, float("inf"), -0.0, "", "é\ud800\n", [], [1, [2.0]], (), (1, (2,)),
        set(), {1, "a"}, frozenset({1}), {}, {"a": [1], (1, 2): {3: None}},
    ],
)  # fmt: skip
def test_plain_data_survives_the_wire_with_its_types(value: Any) -> None:
    back = decode(json.loads(json.dumps(encode(value))))
    assert repr(back) == repr(value)


def test_subclasses_arrive_as_the_builtin_they_extend() -> None:
    class Liar(int):
        def __eq__(self, other: object) -> bool:
            return True

        __hash__ = int.__hash__

    class LyingList(list):
        def __iter__(self) -> Any:
            return iter([42])

    assert type(decode(encode(Liar(3)))) is int
    assert decode(encode(LyingList([Liar(1)]))) == [1] != decode(encode([2]))
    assert decode(encode(Counter("aab"))) == {"a": 2, "b": 1}
    with pytest.raises(TypeError, match="range"):
        encode([range(3)])


@pytest.mark.parametrize(
    "data",
    [
        1, 1.5, [], ["int"], ["int", 3], ["int", "x"], ["int", "f" * 30_000], ["float", "many"], ["float", "0x1p99999"],
        ["object", []], ["list", 3], ["list", [3]], ["dict", [[None]]], ["dict", [[["list", []], None]]],
        ["set", [["list", []]]], {"list": []}, [["list"], []],
    ],
)  # fmt: skip
def test_anything_else_is_not_decoded(data: Any) -> None:
    with pytest.raises(ValueError):
        decode(data)
