"""Recipes become plans: llama.cpp's layer sets, splits, exact sizes of full-size models before any weight exists."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.artifact.write import draft
from pipeline.checkpoint.architecture import Architecture
from pipeline.config.recipes import RecipeConfig
from pipeline.errors import PlanError
from pipeline.graph.decoder import build_decoder
from pipeline.planning.recipes import Plan, make_plan, use_more_bits
from tests.real_configs import architecture_of, references
from tests.recipes import load_recipe


def changed(variant: str, **changes: object) -> RecipeConfig:
    return RecipeConfig.model_validate(load_recipe(variant).model_dump() | changes)


def rule(roles: list[str], chosen: object, layers: str = "all") -> dict[str, object]:
    return {"roles": roles, "format": chosen, "layers": layers}


LLAMA_ROLES = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@pytest.mark.parametrize(
    ("layers", "chosen"),
    [
        # llama.cpp's integer rule: the first and last eighth, every third between.
        (30, [0, 1, 2, 5, 8, 11, 14, 17, 20, 23, *range(26, 30)]),
        (32, [*range(4), 6, 9, 12, 15, 18, 21, 24, 27, *range(28, 32)]),
        (36, [*range(4), 6, 9, 12, 15, 18, 21, 24, 27, 30, *range(31, 36)]),
        (40, [*range(5), 7, 10, 13, 16, 19, 22, 25, 28, 31, 34, *range(35, 40)]),
    ],
)
def test_use_more_bits(layers: int, chosen: list[int]) -> None:
    assert [layer for layer in range(layers) if use_more_bits(layer, layers)] == chosen


def formats(plan: Plan, role: str) -> dict[int, str]:
    return {item.matrix.layer: item.formats for item in plan.body if item.matrix.role == role}


def test_q4_k_m_follows_llama_cpp(tmp_path: Path) -> None:
    mimo = make_plan(architecture_of("mimo-8b", tmp_path), load_recipe("q4_k_m"))
    more = {layer for layer in range(36) if use_more_bits(layer, 36)}
    for role in LLAMA_ROLES:
        expected = more if role in {"v_proj", "down_proj"} else set()
        assert {layer for layer, name in formats(mimo, role).items() if name == "w8b32s"} == expected
    phi = make_plan(architecture_of("phi-4", tmp_path), load_recipe("q4_k_m"))
    assert formats(phi, "qkv_proj")[39] == formats(phi, "down_proj")[0] == "w8b32s"
    assert set(formats(phi, "o_proj").values()) == {"w4b32a"}


def test_q3_splits_every_matrix_alike(tmp_path: Path) -> None:
    plan = make_plan(architecture_of("mimo-8b", tmp_path), load_recipe("q3"))
    assert set(formats(plan, "gate_proj").values()) == {"w4b64a:2432+w2b64a:1664"}
    assert {sum(piece.columns for piece in item.pieces) - item.matrix.columns for item in plan.body} == {0}
    assert 3.2 < plan.body_bits < 3.6


def test_a_tied_table_is_planned_once_in_the_heads_format(tmp_path: Path) -> None:
    recipe = changed("q4", embedding="w4b32s", head="w8b64s")
    tied = make_plan(architecture_of("smollm2-135m", tmp_path), recipe)
    assert tied.embedding.formats == tied.head.formats == "w8b64s"
    assert [item.matrix.role for item in tied.tables][:2] == ["head", "q_proj"]
    untied = make_plan(architecture_of("mimo-8b", tmp_path), recipe)
    assert untied.embedding.formats == "w4b32s"
    assert [item.matrix.role for item in untied.tables][:1] == ["embedding"]
    assert untied.tables[-1] is untied.head


def test_blocks_follow_the_width(tmp_path: Path) -> None:
    plan = make_plan(architecture_of("smollm2-135m", tmp_path), changed("q4", body=[rule(LLAMA_ROLES, "w4b128a")]))
    assert set(formats(plan, "q_proj").values()) == {"w4b64a"}  # 576 channels
    assert set(formats(plan, "down_proj").values()) == {"w4b128a"}  # 1,536


@pytest.mark.parametrize(
    ("body", "parts"),
    [
        ([rule(LLAMA_ROLES, "w3b32a")], ["model.layers.0.self_attn.q_proj.weight [576, 576]", "not 3", "q3.yaml"]),
        ([rule(LLAMA_ROLES, "w2b256a")], ["2-bit blocks of 256"]),
        ([rule(LLAMA_ROLES[:-1], "w4b32a")], ["no rule", "'down_proj'", "model.layers.0.mlp.down_proj.weight"]),
        ([rule(LLAMA_ROLES, "w4b32a", "use_more_bits")], ["no rule", "layer 3 of 30", "`layers: all`"]),
        (
            [rule(LLAMA_ROLES, {"high": "w2b64a", "low": "w4b64a", "high_fraction": 0.5})],
            ["high (w2b64a)", "more bits than low (w4b64a)"],
        ),
        (
            [rule(LLAMA_ROLES, {"high": "w4b64a", "low": "w2b64a", "high_fraction": 0.01})],
            ["share of 0.01 of 576", "is 0 in blocks of 64"],
        ),
        (
            [
                rule(["q_proj"], {"high": "w4b64a", "low": "w2b64a", "high_fraction": 0.5}),
                rule(LLAMA_ROLES[1:], {"high": "w4b64a", "low": "w2b64a", "high_fraction": 0.25}),
            ],
            ["q_proj.weight (w4b64a:256+w2b64a:320)", "k_proj.weight (w4b64a:128+w2b64a:448)", "split alike"],
        ),
        (
            [
                rule(["q_proj"], {"high": "w4b64a", "low": "w2b64a", "high_fraction": 0.5}),
                rule(LLAMA_ROLES[1:], "w4b64a"),
            ],
            ["split alike"],
        ),
    ],
)
def test_impossible_recipes(body: list[object], parts: list[str], tmp_path: Path) -> None:
    with pytest.raises(PlanError) as caught:
        make_plan(architecture_of("smollm2-135m", tmp_path), changed("q4", body=body))
    message = str(caught.value)
    assert all(part in message for part in parts), message
    assert "\n" not in message


def size_by_hand(architecture: Architecture, bits_of: dict[str, float], table_bits: float) -> float:
    """Bytes of all weights from their bits each, scales and zero points included."""
    body = sum(
        matrix.rows * matrix.columns * bits_of.get(matrix.role, bits_of["other"])
        for layer in range(architecture.layers)
        for matrix in architecture.body(layer)
    )
    tables = (1 if architecture.tied else 2) * architecture.vocab * architecture.hidden * table_bits
    return (body + tables) / 8


@pytest.mark.parametrize("name", ["mimo-8b", "phi-4", "phi-4-mini"])
@pytest.mark.parametrize("variant", ["q4", "q4_k_m", "q3"])
def test_exact_size_of_full_size_models(name: str, variant: str, tmp_path: Path) -> None:
    """Known to the byte from config.json alone: no part above the stores' limit, large tensors on pages."""
    architecture, recipe = architecture_of(name, tmp_path), load_recipe(variant)
    source, _ = build_decoder(architecture, references(architecture), 4096)
    drafted = draft(source, make_plan(architecture, recipe), "stem", recipe.part_bytes)
    assert max(drafted.layout.parts) <= 1_400_000_000
    assert drafted.bytes == sum(drafted.layout.parts) + len(drafted.model.SerializeToString(deterministic=True))
    assert drafted.model.ByteSize() < 2_000_000
    for place in drafted.layout.places.values():
        assert place.offset % (4096 if place.length >= 65536 else 64) == 0
    tables = sum(item.bytes for item in drafted.plan.tables)
    stored = sum(place.length for place in drafted.layout.places.values())
    assert stored <= drafted.layout.bytes < stored * 1.0005
    assert tables < stored < tables * 1.003  # norms, biases, channel orders, rotary tables
    if variant == "q4":  # 4-bit codes, a float16 scale and a 4-bit zero per 32; tables of 8 bits with a scale
        assert tables == size_by_hand(architecture, {"other": 4 + 20 / 32}, 8.5)
    print(f"{name} {variant}: {drafted.bytes:,} bytes, {len(drafted.layout.parts)} parts")


@pytest.mark.parametrize(
    ("name", "floats"),
    [("mimo-8b", 2 * 36 * 8 * 128), ("phi-4", 2 * 40 * 10 * 128), ("phi-4-mini", 2 * 32 * 8 * 128)],
)
def test_an_int8_cache_takes_a_quarter_and_its_scales(name: str, floats: int, tmp_path: Path) -> None:
    architecture = architecture_of(name, tmp_path)
    source, _ = build_decoder(architecture, references(architecture), 4096)
    plans = [make_plan(architecture, load_recipe(variant)) for variant in ("q4", "q4_kv8")]
    assert [plan.cache.bytes for plan in plans] == [4 * floats, floats]
    stored = [
        sum(place.length for place in draft(source, plan, "stem", 1_400_000_000).layout.places.values())
        for plan in plans
    ]
    assert stored[1] - stored[0] == 4 * floats  # a float32 scale per channel


def test_q4_size_is_in_the_known_range(tmp_path: Path) -> None:
    """MiMo at 4.625 bits with 8-bit tables lies just above llama.cpp's Q4_K_M (4.68 GB)."""
    plan = make_plan(architecture_of("mimo-8b", tmp_path), load_recipe("q4"))
    assert 4.6e9 < sum(item.bytes for item in plan.tables) < 5.1e9
