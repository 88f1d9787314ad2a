"""Byte budgets: the solver against every plan there is, what may be chosen, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from functools import reduce
from itertools import groupby, pairwise, product
from pathlib import Path

import numpy as np
import pytest

from pipeline.checkpoint.architecture import Architecture, Matrix
from pipeline.config.recipes import Budget, Pin, SplitFormat
from pipeline.errors import PlanError
from pipeline.planning.budget import Option, Solution, _front, groups, smallest, solve
from pipeline.planning.memory import weight_memory
from pipeline.planning.recipes import Piece, Plan, PlannedMatrix
from pipeline.planning.sensitivity import Sensitivity
from pipeline.quantize.formats import TensorFormat
from tests.planning.measured import measured, stored
from tests.real_configs import architecture_of

FIGURES = ("bytes", "body", "memory")
GAP = 1e-4  # of the solver
# Pairs of tied and untied, of fused and separate matrices; small enough for every plan to be listed.
SMALL = {
    "llama-tied": ("w2b64a8", "w8b32s8"),
    "qwen2": ("w2b64a8", "w4b32a8"),
    "phi3": ("w2b64a8", "w4b64a8", "w4b32a8"),
}


def budget(**changes: object) -> Budget:
    return Budget.model_validate({"bytes": 1 << 40} | changes)


def damage_of(planned: PlannedMatrix, sensitivity: Sensitivity) -> float:
    """The definition, channel by channel: important ones suffer the first piece's errors, the others the second's."""
    name = planned.matrix.name
    kinds = [sensitivity.errors[name][str(piece.format)].astype(np.float64) for piece in planned.pieces]
    ranks = {channel: rank for rank, channel in enumerate(sensitivity.order.get(planned.matrix.input, []))}
    error = sum(
        kinds[planned.split and ranks[channel] >= planned.pieces[0].columns][channel]
        for channel in range(planned.matrix.columns)
    )
    return sensitivity.nats[name] * error / sensitivity.errors[name][sensitivity.damage[name]].sum(dtype=np.float64)


def figures(plan: list[PlannedMatrix]) -> np.ndarray:
    """Bytes on disk, of them the body's, and in memory; a channel order is stored once for each input."""
    orders = 4 * sum(item.columns for item in {plan.matrix.input: plan.matrix for plan in plan if plan.split}.values())
    body = sum(item.bytes for item in plan if item.matrix.role not in {"embedding", "head"})
    return np.array([sum(item.bytes for item in plan) + orders, body, sum(map(weight_memory, plan)) + orders])


def all_ways(matrices: list[Matrix], formats: tuple[str, ...], splits: bool) -> list[list[PlannedMatrix]]:
    """Every way to store matrices with one input: any format each, or all split in whole blocks at the same place."""
    columns = matrices[0].columns
    kinds = [TensorFormat.parse(name).fitted(columns) for name in formats]
    ways = [
        [PlannedMatrix(matrix, (Piece(kind, columns),)) for matrix, kind in zip(matrices, choice, strict=True)]
        for choice in product(kinds, repeat=len(matrices))
    ]
    for high, low in product(kinds, kinds) if splits else ():
        step = max(high.block, low.block)
        for count in range(step, columns, step) if high.bits > low.bits else ():
            pieces = (Piece(high, count), Piece(low, columns - count))
            ways.append([PlannedMatrix(matrix, pieces) for matrix in matrices])
    return ways


def every_plan(architecture: Architecture, wanted: Budget, sensitivity: Sensitivity) -> tuple[np.ndarray, np.ndarray]:
    """Figures, [3, …], and damage, […], of every plan."""
    found: list[tuple[np.ndarray, np.ndarray]] = []
    for _, sharing in groupby(stored(architecture), key=lambda matrix: matrix.input):
        matrices = list(sharing)
        table = matrices[0].role in {"embedding", "head"}
        ways = all_ways(matrices, wanted.tables if table else wanted.formats, wanted.splits and not table)
        sizes = np.array([figures(way) for way in ways]).T
        found.append((sizes, np.array([sum(damage_of(item, sensitivity) for item in way) for way in ways])))

    def add(a: np.ndarray, b: np.ndarray) -> np.ndarray:
        return (a[..., :, None] + b[..., None, :]).reshape(*a.shape[:-1], -1)

    return reduce(add, [sizes for sizes, _ in found]), reduce(add, [costs for _, costs in found])


def solved(architecture: Architecture, wanted: Budget, sensitivity: Sensitivity, limits: Mapping[str, int]) -> Solution:
    return solve(architecture, groups(architecture, wanted, sensitivity), limits)


def one_layer(name: str, folder: Path) -> Architecture:
    return replace(architecture_of(name, folder), layers=1)


def formats_of(plan: Plan, *names: str) -> list[str]:
    return [item.formats for item in plan.tables if item.matrix.name.endswith(names)]


# --- the least of all ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("name", SMALL)
def test_no_plan_within_the_limits_loses_less(name: str, seed: int, tmp_path: Path) -> None:
    """Under one limit, any two, all three; where nothing fits, that is said."""
    architecture, chance = one_layer(name, tmp_path), np.random.default_rng(seed)
    sensitivity = measured(architecture, seed)
    wanted = budget(formats=SMALL[name], tables=("w4b32a8", "w8b32s8"))
    sizes, costs = every_plan(architecture, wanted, sensitivity)
    choices = groups(architecture, wanted, sensitivity)
    for names in (FIGURES[:1], FIGURES[1:2], FIGURES[2:], FIGURES[::2], FIGURES[:2], FIGURES):
        places = [FIGURES.index(figure) for figure in names]
        some = sizes[:, chance.integers(sizes.shape[1])] if chance.random() < 0.5 else sizes.min(axis=1) * 1.1
        limits = {figure: int(some[place]) for figure, place in zip(names, places, strict=True)}
        fits = (sizes[places] <= np.array(list(limits.values()))[:, None]).all(axis=0)
        if not fits.any():
            with pytest.raises(PlanError, match="no plan fits"):
                solve(architecture, choices, limits)
            continue
        least = costs[fits].min()
        found = solve(architecture, choices, limits)
        plan = [found.plan.head, *found.plan.body] if architecture.tied else list(found.plan.tables)
        assert (figures(plan)[places] <= list(limits.values())).all()
        assert sum(damage_of(item, sensitivity) for item in plan) == pytest.approx(found.cost, rel=1e-5)
        assert least * (1 - 1e-5) <= found.cost <= least * (1 + GAP + 1e-5)
        assert found.bound <= least * (1 + 1e-5)
        assert found.gap <= GAP


def test_only_what_another_option_beats_in_everything_is_left_out(tmp_path: Path) -> None:
    architecture = one_layer("phi3", tmp_path)
    sensitivity, wanted = measured(architecture), budget(formats=SMALL["phi3"])
    found = groups(architecture, wanted, sensitivity)
    by_input = [list(sharing) for _, sharing in groupby(stored(architecture), key=lambda matrix: matrix.input)]
    for options, matrices in zip(found[2:], by_input[2:], strict=True):
        offered = {tuple(item.formats for item in option.planned) for option in options}
        ways = all_ways(matrices, wanted.formats, True)
        values = [(*figures(way), sum(damage_of(item, sensitivity) for item in way)) for way in ways]
        for way, mine in zip(ways, values, strict=True):
            beaten = any(other != mine and all(a <= b for a, b in zip(other, mine, strict=True)) for other in values)
            assert (tuple(item.formats for item in way) in offered) is not beaten


def test_a_body_limit_counts_no_channel_orders(tmp_path: Path) -> None:
    """A split of fewer body bytes than whole matrices, though its channel order makes it larger on the disk."""
    architecture = one_layer("phi3", tmp_path)
    whole = groups(architecture, budget(splits=False), measured(architecture))[3][0]
    larger = replace(whole, bytes=whole.bytes + 400, body=whole.body - 100)
    assert _front([larger, whole]) == [whole, larger]


@pytest.mark.parametrize("name", ["smollm2-135m", "phi-4"])
def test_more_room_never_loses_more(name: str, tmp_path: Path) -> None:
    architecture = replace(architecture_of(name, tmp_path), layers=8)
    choices = groups(architecture, budget(), measured(architecture))
    least = int(figures(list(smallest(architecture, choices).tables))[0])
    costs = [solve(architecture, choices, {"bytes": int(least * factor)}).cost for factor in (1, 1.1, 1.3, 1.7, 2.5, 9)]
    assert all(more <= less * (1 + GAP) for less, more in pairwise(costs))
    best = sum(min(option.cost for option in options) for options in choices)
    assert costs[-1] == pytest.approx(best, rel=GAP)


def test_the_same_plan_every_time(tmp_path: Path) -> None:
    architecture = replace(architecture_of("smollm2-135m", tmp_path), layers=6)
    first, second = (
        solved(architecture, budget(), measured(architecture), {"bytes": 40_000_000, "memory": 80_000_000})
        for _ in range(2)
    )
    assert first == second


def test_a_limit_holds_to_the_byte(tmp_path: Path) -> None:
    """Fifty bytes too many are nothing to a solver whose tolerance is a millionth."""
    architecture = one_layer("llama-tied", tmp_path)
    found = groups(architecture, budget(), measured(architecture))
    free = [[replace(options[0], bytes=0, cost=0.0)] for options in found[1:]]
    large, small = (replace(found[0][0], bytes=size, cost=cost) for size, cost in ((10**9 + 50, 0.0), (10**8, 1.0)))
    assert solve(architecture, [[small, large], *free], {"bytes": 10**9}).cost == 1.0
    assert solve(architecture, [[small, large], *free], {"bytes": 10**9 + 50}).cost == 0.0


# --- what may be chosen ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["smollm2-135m", "mimo-8b", "phi-4"])
def test_splits_are_shared_by_an_input_and_whole_blocks(name: str, tmp_path: Path) -> None:
    """Of two formats with different bits; every place and pair that is offered is somewhere the best."""
    architecture = replace(architecture_of(name, tmp_path), layers=2)
    found = groups(architecture, budget(formats=("w2b64a8", "w4b128a8", "w8b32s8"), tables=("w8b32s8",)),
                   measured(architecture, formats=("w2b64a8", "w4b128a8", "w8b32s8")))  # fmt: skip
    split = [option for options in found for option in options if option.planned[0].split]
    assert len(split) > 10
    for option in split:
        assert len({item.pieces for item in option.planned}) == 1
        assert len({item.matrix.input for item in option.planned}) == 1
        high, low = option.planned[0].pieces
        assert high.format.bits > low.format.bits
        assert high.columns + low.columns == option.planned[0].matrix.columns
        assert high.columns % high.format.block == low.columns % low.format.block == 0
        assert high.columns % low.format.block == low.columns % high.format.block == 0
    tables = len(architecture.tables)
    assert not any(option.planned[0].split for options in found[:tables] for option in options)
    shared = [[item.matrix.input for item in option.planned] for options in found[tables:] for option in options[:1]]
    assert [names[0] for names in shared] == [
        f"layers.{layer}.{part}" for layer in (0, 1) for part in ("attention", "output", "mlp", "down")
    ]


def test_the_cost_of_a_split_is_the_errors_of_its_channels(tmp_path: Path) -> None:
    architecture = one_layer("qwen2", tmp_path)
    sensitivity = measured(architecture)
    for matrix in architecture.body(0):
        high, low = TensorFormat.parse("w8b32s8"), TensorFormat.parse("w2b64a8")
        for count in range(64, matrix.columns, 64):
            planned = PlannedMatrix(matrix, (Piece(high, count), Piece(low, matrix.columns - count)))
            assert sensitivity.cost(planned) == pytest.approx(damage_of(planned, sensitivity), rel=1e-5)
        chosen = TensorFormat.parse(sensitivity.damage[matrix.name])
        alone = PlannedMatrix(matrix, (Piece(chosen, matrix.columns),))
        assert sensitivity.cost(alone) == pytest.approx(sensitivity.nats[matrix.name])  # as measured


def test_a_matrix_without_damage_costs_nothing(tmp_path: Path) -> None:
    """Noise around nothing may be negative; an all-zero matrix has no error to scale by."""
    architecture = one_layer("qwen2", tmp_path)
    sensitivity = measured(architecture)
    first, second = architecture.body(0)[:2]
    nats = {**sensitivity.nats, first.name: -1e-9}
    errors = {**sensitivity.errors, second.name: {k: 0 * v for k, v in sensitivity.errors[second.name].items()}}
    edited = replace(sensitivity, nats=nats, errors=errors)
    fmt = TensorFormat.parse("w2b64a8")
    assert edited.cost(PlannedMatrix(first, (Piece(fmt, first.columns),))) == 0
    assert edited.cost(PlannedMatrix(second, (Piece(fmt, second.columns),))) == 0


# --- pins ------------------------------------------------------------------------------------------------------------

LAYER_SPLIT = SplitFormat(high="w4b64a8", low="w2b64a8", high_fraction=0.5)


def pinned(architecture: Architecture, *pins: Pin) -> Plan:
    wanted = budget(pin=pins)
    found = groups(architecture, wanted, measured(architecture))
    return solve(architecture, found, {"bytes": 1 << 40}).plan


def test_pins_are_kept_and_the_first_that_matches_counts(tmp_path: Path) -> None:
    architecture = replace(architecture_of("mimo", tmp_path), layers=2)
    plan = pinned(
        architecture,
        Pin(tensors="model.layers.1.*.k_proj.weight", format="w4b32a8"),
        Pin(tensors="model.layers.1.self_attn.*", format="w2b64a8"),
        Pin(tensors="lm_head.weight", format="w4b64a8"),
    )
    attention = [item for item in plan.body if "1.self_attn" in item.matrix.name]
    assert [item.formats for item in attention] == ["w2b64a8", "w4b32a8", "w2b64a8", "w2b64a8"]
    assert plan.head.formats == "w4b64a8"
    rest = {item.formats for item in plan.body if item not in attention} | {plan.embedding.formats}
    assert rest == {"w8b32s8"}  # there is room


def test_all_matrices_of_an_input_may_be_pinned_to_a_split(tmp_path: Path) -> None:
    architecture = replace(architecture_of("smollm2-135m", tmp_path), layers=2)
    plan = pinned(architecture, Pin(tensors="*.1.mlp.*", format=LAYER_SPLIT))
    assert formats_of(plan, "1.mlp.gate_proj.weight", "1.mlp.up_proj.weight") == ["w4b64a8:256+w2b64a8:320"] * 2
    assert formats_of(plan, "1.mlp.down_proj.weight") == ["w4b64a8:768+w2b64a8:768"]
    assert formats_of(plan, "0.mlp.up_proj.weight") == ["w8b32s8"]


@pytest.mark.parametrize(
    ("pins", "parts"),
    [
        ([Pin(tensors="model.layers.7.*", format="w4b32a8")], ["'model.layers.7.*' matches no tensor", "down_proj"]),
        ([Pin(tensors="*.q_proj.weight", format=LAYER_SPLIT)], ["q_proj.weight", "v_proj.weight", "the same split"]),
        (
            [
                Pin(tensors="*.gate_proj.weight", format=LAYER_SPLIT),
                Pin(tensors="*.up_proj.weight", format=LAYER_SPLIT.model_copy(update={"high_fraction": 0.25})),
            ],
            ["gate_proj.weight", "up_proj.weight", "the same split"],
        ),
        ([Pin(tensors="*", format=LAYER_SPLIT)], ["'*' splits model.embed_tokens.weight", "stored whole"]),
        ([Pin(tensors="*.o_proj.weight", format="w4b16a8")], ["o_proj.weight", "w4b16a8", "configs/sensitivity.yaml"]),
        ([Pin(tensors="*.o_proj.weight", format="w3b32a")], ["o_proj.weight", "w3b32a", "not 3"]),
    ],
    ids=["unmatched", "half of an input", "two splits", "table", "not measured", "no kernel"],
)
@pytest.mark.parametrize("name", ["smollm2-135m", "mimo-8b"])
def test_pins_that_cannot_be_kept(name: str, pins: list[Pin], parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        pinned(one_layer(name, tmp_path), *pins)
    assert all(part in str(caught.value) for part in parts), caught.value
    assert "\n" not in str(caught.value)


# --- what is refused -------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("figure", FIGURES)
def test_what_cannot_fit_is_told_with_the_least_possible(figure: str, tmp_path: Path) -> None:
    architecture = one_layer("qwen2", tmp_path)
    sensitivity, wanted = measured(architecture), budget(formats=SMALL["qwen2"])
    least = int(every_plan(architecture, wanted, sensitivity)[0][FIGURES.index(figure)].min())
    found = solved(architecture, wanted, sensitivity, {figure: least})
    assert figures(list(found.plan.tables))[FIGURES.index(figure)] == least
    with pytest.raises(PlanError, match=rf"at least {least:,} bytes.*, {least - 1:,} are left for them.* by 1 or more"):
        solved(architecture, wanted, sensitivity, {figure: least - 1})


def test_limits_that_only_conflict_together(tmp_path: Path) -> None:
    """The option of fewest bytes takes most memory here: each limit can be met, both cannot."""
    architecture = one_layer("llama-tied", tmp_path)
    found = groups(architecture, budget(), measured(architecture))
    free = [[replace(options[0], bytes=0, memory=0)] for options in found[1:]]

    def option(size: int, memory: int) -> Option:
        return replace(found[0][0], bytes=size, memory=memory)

    choices = [[option(10, 100), option(100, 10)], *free]
    with pytest.raises(PlanError, match="no plan fits bytes and memory at once"):
        solve(architecture, choices, {"bytes": 50, "memory": 50})


@pytest.mark.parametrize("field", ["formats", "tables"])
def test_a_format_that_was_not_measured(field: str, tmp_path: Path) -> None:
    architecture = one_layer("qwen2", tmp_path)
    with pytest.raises(PlanError, match=r"no error was measured for w4b16a8 .*w8b32s8.*configs/sensitivity\.yaml"):
        groups(architecture, budget(**{field: ("w8b32s8", "w4b16a8")}), measured(architecture))


@pytest.mark.parametrize("other", ["qwen2", "phi3", "smollm2-135m"])
def test_measurements_of_another_model(other: str, tmp_path: Path) -> None:
    """More layers, other matrices, other widths."""
    architecture = architecture_of("llama-untied", tmp_path)
    theirs = measured(replace(architecture_of(other, tmp_path), layers=2))
    with pytest.raises(PlanError, match="not what the sensitivity stage measured"):
        groups(architecture, budget(), theirs)


@pytest.mark.parametrize(("case", "embedding"), [("mimo-8b", "w4b32a8"), ("phi-4-mini", "w8b32s8")])
def test_an_embedding_of_its_own_has_its_own_format(case: str, embedding: str, tmp_path: Path) -> None:
    """A tied table is multiplied as the head, and chosen as the head is."""
    architecture = architecture_of(case, tmp_path)
    sensitivity = measured(architecture)
    wanted = budget(tables=["w8b32s8"], embedding="w4b32a8", formats=["w4b32a8"], splits=False)
    plan = smallest(architecture, groups(architecture, wanted, sensitivity))
    assert (plan.embedding.formats, plan.head.formats) == (embedding, "w8b32s8")
