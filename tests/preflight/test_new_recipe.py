"""new-recipe: what it writes is planned and judged, or nothing is written."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.recipes import BudgetRecipe, RecipeConfig, load_recipe
from pipeline.errors import ConfigError, PipelineError, PlanError
from pipeline.preflight import new_recipe

pytestmark = pytest.mark.usefixtures("project")


@pytest.mark.parametrize(
    ("size", "tier", "kind"),
    [(None, None, RecipeConfig), (400_000, None, BudgetRecipe), (None, "android-8gb", BudgetRecipe)],
)
def test_a_recipe_from_another(
    size: int | None, tier: str | None, kind: type, capsys: pytest.CaptureFixture[str]
) -> None:
    new_recipe.run("mine", "q4", size, tier)
    recipe = load_recipe("mine")
    assert type(recipe) is kind
    assert (recipe.search, recipe.kv_cache, recipe.gate) == ("gptq", "int8", "q4")
    printed = capsys.readouterr().out
    assert "judged by random/q4" in printed and 'make repro VARIANTS="q4 q4_k_m q3 mine"' in printed


@pytest.mark.parametrize(
    ("name", "extends", "size", "tier", "said"),
    [
        ("q4", "q4", None, None, "is there already. Edit it, or take another name"),
        ("Q 9", "q4", None, None, "name"),
        ("mine", "q5", None, None, "no such file. Known here"),
        ("mine", "q4", None, "android-9gb", "Did you mean 'android-8gb'"),
        ("mine", "q4", 1_000, None, "at least 17"),
    ],
)
def test_what_cannot_be_planned_is_not_written(
    name: str, extends: str, size: int | None, tier: str | None, said: str, project: Path
) -> None:
    before = sorted((project / "configs/recipes").iterdir())
    with pytest.raises((ConfigError, PlanError), match=said):
        new_recipe.run(name, extends, size, tier)
    assert sorted((project / "configs/recipes").iterdir()) == before


def test_the_remedy_of_a_budget_that_nothing_fits_works() -> None:
    with pytest.raises(PipelineError, match="Raise the budget by") as caught:
        new_recipe.run("mine", "q4", 1_000, None)
    lacking = int(str(caught.value).partition("Raise the budget by ")[2].split()[0].replace(",", ""))
    new_recipe.run("mine", "q4", 1_000 + lacking, None)
