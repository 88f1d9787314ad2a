"""What is knowable at minute 0 is said then, by `preflight` and by the first stage that runs, whichever it is."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.config.signing import load_signing
from pipeline.errors import ConfigError, PlanError
from pipeline.preflight import configuration, guard, machine, new_recipe
from pipeline.stages import sign
from tests import tiny

pytestmark = pytest.mark.usefixtures("project")


def never(*arguments: str, **options: bool) -> None:
    raise AssertionError(f"ran with {arguments} {options}")


@pytest.mark.parametrize("stage", ["calibrate", "sensitivity", "quantize"])
def test_a_variant_that_nothing_judges_is_known_before_any_stage(project: Path, stage: str) -> None:
    """A budget in the shape that docs/tuning.md shows, without a gate: it cost four minutes before it was refused."""
    recipe = project / "configs/recipes/b84.yaml"
    recipe.write_text("title: b\nversion: 1\nbudget: {bytes: 900_000}\nsearch: gptq\n")
    tiny.edit(project / "configs/pipeline.yaml", variants=["q4", "b84"])
    for run in (lambda: guard.guarded(stage, never, tiny.MODEL), machine.run):
        with pytest.raises(ConfigError, match=r"no limits for 'b84'.*name one as `gate` in configs/recipes/b84\.yaml"):
            run()
    recipe.write_text(recipe.read_text() + "gate: q4\n")
    with pytest.raises(AssertionError, match="ran with"):
        guard.guarded("export", never, tiny.MODEL)


def test_a_budget_that_nothing_fits_is_known_before_its_sensitivities_are_measured(project: Path) -> None:
    (project / "configs/recipes/mine.yaml").write_text(
        "extends: q4\ntitle: t\nversion: 1\ngate: q4\nbudget: {bytes: 9}\n"
    )
    tiny.edit(project / "configs/pipeline.yaml", variants=["mine"])
    with pytest.raises(PlanError, match=r"tiny mine: no plan fits: .* Raise the budget by [\d,]+"):
        guard.guarded("export", never, tiny.MODEL)
    (project / "configs/recipes/mine.yaml").unlink()
    new_recipe.run("mine", "q4", 900_000, None)
    with pytest.raises(AssertionError, match="ran with"):
        guard.guarded("export", never, tiny.MODEL)


def test_a_release_is_not_made_of_an_uncommitted_tree_and_the_remedy_works(project: Path) -> None:
    """A file that decides results differs from the commit; metrics, dvc.lock and outputs do not count."""
    tiny.edit(project / "configs/signing.yaml", channel="release", key_id="0" * 64)
    tiny.commit(project, "start", init=True)
    for name in ("dvc.lock", "artifacts/metrics/tiny/q4.json"):
        (project / name).parent.mkdir(parents=True, exist_ok=True)
        (project / name).write_text("{}")
    configuration.check_all()
    tiny.edit(project / "configs/recipes/q4.yaml", search="weighted")
    for stage in ("quantize", "calibrate"):
        with pytest.raises(ConfigError, match=r"1 files .* differ .*, the first is configs/recipes/q4\.yaml"):
            guard.guarded(stage, never, tiny.MODEL)
    with pytest.raises(ConfigError, match="differ from the commit"):
        sign.sign_folder(project, load_signing(), never)
    tiny.edit(project / "configs/signing.yaml", channel="development")
    configuration.check_all()
    tiny.edit(project / "configs/signing.yaml", channel="release")
    tiny.commit(project, "tuned")
    configuration.check_all()
