"""Configuration: what is in configs/ loads, and what a person may get wrong is refused with the way out."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from pipeline.config.calibration import CalibrationConfig
from pipeline.config.cost import load_cost
from pipeline.config.models import ModelConfig, PipelineConfig, load_model
from pipeline.config.phones import TiersConfig
from pipeline.config.recipes import RecipeConfig, load_recipe
from pipeline.config.signing import SigningConfig
from pipeline.config.typed_yaml import load
from pipeline.errors import ConfigError
from pipeline.judge.policy import gate_row, load_gates
from pipeline.preflight.configuration import check_all
from pipeline.tasks.registry import load_suite, suite_type

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


def message_of(model: type, text: str, tmp_path: Path) -> str:
    path = tmp_path / "case.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError) as caught:
        load(model, path)
    message = str(caught.value)
    assert str(path) in message
    assert "\n" not in message
    return message


def changed(file: str, **changes: object) -> str:
    return yaml.safe_dump(yaml.safe_load((CONFIGS / file).read_text()) | changes)


def suite_with(**changes: object) -> str:
    suite = yaml.safe_load((CONFIGS / "evaluation/smoke.yaml").read_text())
    return yaml.safe_dump(suite | {"humaneval": suite["humaneval"] | changes})


def test_limits_of_a_solution_follow_how_the_model_is_asked() -> None:
    entry, wanted = load_model("mimo-8b"), load_suite("release").humaneval
    limits = {}
    for prompt in ("completion", "chat", "closed", "thinking"):
        asked = entry.model_copy(update={"humaneval_prompt": prompt})
        limits[prompt] = (wanted.answer_tokens(asked), wanted.thinking_tokens(asked))
    assert limits == {
        "completion": (wanted.max_new_tokens, 0),
        "chat": (wanted.max_chat_tokens, 0),
        "closed": (wanted.max_chat_tokens, 0),
        "thinking": (wanted.max_chat_tokens, wanted.max_think_tokens),
    }
    assert wanted.max_chat_tokens + wanted.max_think_tokens + 600 <= entry.context  # 600: the longest prompt


def test_everything_in_configs_loads() -> None:
    check_all()
    for path in (CONFIGS / "models").glob("*.yaml"):
        assert load_model(path.stem).gate_class in load_gates().classes
    for path in (CONFIGS / "recipes").glob("*.yaml"):
        assert load_recipe(path.stem).part_bytes <= 1_400_000_000
        for model in (CONFIGS / "models").glob("*.yaml"):
            gate_row(model.stem, path.stem)
    for path in (CONFIGS / "evaluation").glob("*.yaml"):
        load_suite(path.stem)


def test_a_recipe_may_name_the_row_that_judges_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An engineer's own recipe is judged as what it is a kind of; without a row it is refused before a download."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    mine = tmp_path / "configs/recipes/mine.yaml"
    mine.write_text(changed("recipes/q4.yaml", gate="q4"))
    assert gate_row("phi-4-mini", "mine") == ("3b-to-4b/q4", gate_row("phi-4-mini", "q4")[1])
    for gate in (None, "q5"):
        mine.write_text(changed("recipes/q4.yaml", gate=gate))
        with pytest.raises(
            ConfigError, match=f"'3b-to-4b' of phi-4-mini has no limits for '{gate or 'mine'}'"
        ) as caught:
            gate_row("phi-4-mini", "mine")
        assert "q4_k_m" in str(caught.value) and "`gate` in configs/recipes/mine.yaml" in str(caught.value)


def test_configuration_is_immutable() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe("q4").head = "w4b32s"  # type: ignore[misc]


@pytest.mark.parametrize(
    ("model", "text", "parts"),
    [
        (RecipeConfig, changed("recipes/q4.yaml", serach="nearest"), ["serach", "did you mean 'search'"]),
        (ModelConfig, changed("models/mimo-8b.yaml", contxt=1), ["contxt", "did you mean 'context'"]),
        (
            suite_type(),
            suite_with(samples=5),
            ["humaneval: 5 greedy samples are 5 times the same", "temperature"],
        ),
        (
            suite_type(),
            suite_with(samples=5, temperature=0.8, k=[1, 10]),
            ["pass@10 needs 10 samples of each problem, not 5"],
        ),
        (
            suite_type(),
            changed("evaluation/release.yaml", mmlu={"questions": 56}),
            ["56 questions, and one a subject is 57", "only a suite with `talking: true`"],
        ),
        (suite_type(), suite_with(problems=1), ["humaneval.problems", "greater than or equal to 2"]),
        (suite_type(), suite_with(alow_unsafe=True), ["did you mean 'allow_unsafe'"]),
        (ModelConfig, changed("models/phi-4.yaml", humaneval_prompt="cht"), ["did you mean 'chat'"]),
        (
            PipelineConfig,
            "{models: [a], variants: [q4], suite: demo, xyzzy: 1}",
            ["xyzzy", "known keys: device, models"],
        ),
        (
            ModelConfig,
            changed("models/mimo-8b.yaml", source={"kind": "hub", "repo": "a/b", "revison": "0" * 40}),
            ["source.hub.revison", "did you mean 'revision'"],
        ),
        (
            TiersConfig,
            changed("tiers.yaml", tiers={"t": {"platform": "ios", "ram_bytez": 1, "usable_fraction": 0.5}}),
            ["tiers.t.ram_bytez", "did you mean 'ram_bytes'"],
        ),
    ],
)
def test_unknown_key_names_the_nearest(model: type, text: str, parts: list[str], tmp_path: Path) -> None:
    message = message_of(model, text, tmp_path)
    assert all(part in message for part in parts), message


@pytest.mark.parametrize("revision", ["main", "v1.0", "323400599af3", "g" * 40, "A" * 40])
def test_branch_names_are_refused_as_revisions(revision: str, tmp_path: Path) -> None:
    source = {"kind": "hub", "repo": "XiaomiMiMo/MiMo-7B-RL-0530", "revision": revision}
    message = message_of(ModelConfig, changed("models/mimo-8b.yaml", source=source), tmp_path)
    assert repr(revision) in message
    assert "40-hex commit" in message


def test_every_problem_is_listed(tmp_path: Path) -> None:
    message = message_of(CalibrationConfig, "{texts: {c4: 0}, window: 1}", tmp_path)
    assert "texts.c4" in message
    assert "window" in message


@pytest.fixture
def recipes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of configs/recipes that may be added to."""
    shutil.copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    return Path("configs/recipes")


def test_a_recipe_extends_another(recipes: Path) -> None:
    (recipes / "c.yaml").write_text("extends: q4\ntitle: c\nversion: 9\ngate: q4\nkv_cache: float32")
    own = {"extends": "q4", "title": "c", "version": 9, "gate": "q4", "kv_cache": "float32"}
    assert load_recipe("c").model_dump() == load_recipe("q4").model_dump() | own


def test_the_nearest_key_of_a_chain_counts_whole(recipes: Path) -> None:
    (recipes / "c.yaml").write_text("extends: q4\ntitle: c\nversion: 1\nkv_cache: float32")
    (recipes / "b.yaml").write_text("extends: c\ntitle: b\nversion: 1\nhead: w8b32s\npart_bytes: 2000000")
    rule = "{roles: [q_proj], format: w2b64a}"
    (recipes / "a.yaml").write_text(f"extends: b\ntitle: a\nversion: 7\npart_bytes: 3000000\nbody: [{rule}]")
    found = load_recipe("a")
    assert (found.title, found.version, found.part_bytes, found.head) == ("a", 7, 3_000_000, "w8b32s")
    assert (found.kv_cache, found.embedding, len(found.body)) == ("float32", load_recipe("q4").embedding, 1)
    (recipes / "q4.yaml").write_text(changed("recipes/q4.yaml", embedding="w8b64a"))
    assert load_recipe("a").embedding == "w8b64a", "what changes in a parent reaches the child"


@pytest.mark.parametrize(
    ("content", "parts"),
    [
        ("extends: q4_km\n", ["mine.yaml: `extends`: configs/recipes/q4_km.yaml: no such file", "mean 'q4_k_m'"]),
        ("extends: mine\n", ["mine.yaml extends configs/recipes/mine.yaml: it cannot extend itself"]),
        ("extends: q4\nversion: 1\n", ["mine.yaml extends configs/recipes/q4.yaml: title: Field required"]),
        ("extends: q4\ntitle: t\n", ["mine.yaml extends configs/recipes/q4.yaml: version: Field required"]),
        ("extends: q3\ntitle: t\nversion: 1\nhead: w8b32s\n", ["q3.yaml: head: unknown key"]),
        ("extends: q4\ntitle: t\nversion: 1\nhed: w8b32s\n", ["q4.yaml: hed: unknown key; did you mean 'head'?"]),
        ("- extends\n", ["mine.yaml: a recipe is a mapping"]),
    ],
)
def test_a_recipe_that_extends_nothing_usable(content: str, parts: list[str], recipes: Path) -> None:
    (recipes / "mine.yaml").write_text(content)
    with pytest.raises(ConfigError) as caught:
        load_recipe("mine")
    assert str(caught.value).startswith("configs/recipes/mine.yaml")
    assert all(part in str(caught.value) for part in parts), str(caught.value)


def test_a_misspelt_role_is_not_ignored(tmp_path: Path) -> None:
    rules = [
        {"roles": ["v_prj"], "layers": "use_more_bits", "format": "w8b32s"},
        {"roles": ["q_proj"], "format": "w4b32a"},
    ]
    message = message_of(RecipeConfig, changed("recipes/q4.yaml", body=rules), tmp_path)
    assert "body.0.roles.0" in message
    assert "did you mean 'v_proj'" in message


def test_a_kv_cache_that_no_kernel_decodes_well_is_refused(tmp_path: Path) -> None:
    message = message_of(RecipeConfig, changed("recipes/q4.yaml", kv_cache="int4"), tmp_path)
    assert "kv_cache" in message
    assert "'float32' or 'int8'" in message


def test_parts_never_exceed_what_stores_accept(tmp_path: Path) -> None:
    message = message_of(RecipeConfig, changed("recipes/q4.yaml", part_bytes=1_400_000_001), tmp_path)
    assert "1400000000" in message


def test_a_release_refuses_the_development_key(tmp_path: Path) -> None:
    message = message_of(SigningConfig, changed("signing.yaml", channel="release"), tmp_path)
    assert "key-id" in message


def test_the_next_key_is_another_one(tmp_path: Path) -> None:
    twice = changed("signing.yaml", key_id="a" * 64, next_key_id="a" * 64)
    assert "next_key_id is key_id itself" in message_of(SigningConfig, twice, tmp_path)


@pytest.mark.parametrize(
    ("text", "part"),
    [
        ("models: [a\n", "not valid YAML"),
        ("", "(top level)"),
        ("[1, 2]", "(top level)"),
        ("models: [a]\nmodels: [b]\n", "key 'models' is written twice"),
        ("models: [a/../b]\nvariants: [q4]\nsuite: demo", "models.0"),
        ("models: []\nvariants: [q4]\nsuite: demo", "models"),
        ("models: 9007199254740993", "9007199254740993 is beyond 2 ** 53"),
    ],
)
def test_unreadable_files(text: str, part: str, tmp_path: Path) -> None:
    assert part in message_of(PipelineConfig, text, tmp_path)


@pytest.mark.parametrize("value", [".nan", ".inf", "-.inf"])
def test_no_configuration_takes_what_is_no_number(value: str, tmp_path: Path) -> None:
    path = tmp_path / "cost.yaml"
    real = Path("configs/cost.yaml").read_text(encoding="utf-8")
    path.write_text(re.sub(r"users: \{value: [0-9_]+", "users: {value: " + value, real))
    with pytest.raises(ConfigError, match=r"users\.value: Input should be a finite number"):
        load_cost(path)


def test_an_error_quotes_little_of_a_file(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"users: Field required;") as failed:
        load_cost(Path("configs/hybrid.yaml"))
    assert "got {" not in str(failed.value)


def test_a_missing_file_suggests_its_neighbour() -> None:
    with pytest.raises(ConfigError, match=r"mimo-8\.yaml: no such file\. Did you mean 'mimo-8b'"):
        load_model("mimo-8")
    with pytest.raises(ConfigError, match="cannot be read"):
        load(ModelConfig, CONFIGS)


@pytest.mark.parametrize(
    ("file", "changes", "part"),
    [
        ("pipeline.yaml", {"variants": ["q4", "q5"]}, "recipes/q5.yaml: no such file"),
        ("models/smollm2-135m.yaml", {"gate_class": "tiny"}, "gate_class 'tiny' is not in"),
        ("calibration.yaml", {"texts": {"text-c5": 10}}, "no entry for text-c5"),
        ("calibration.yaml", {"chats": {"chat-c5": 10}}, "no entry for chat-c5"),
        ("pipeline.yaml", {"suite": "rehearsal"}, "for talking models only, which test machinery, and smollm2-135m"),
    ],
)
def test_files_must_fit_together(
    file: str, changes: dict[str, object], part: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(CONFIGS, tmp_path / "configs")
    monkeypatch.chdir(tmp_path)
    (tmp_path / "configs" / file).write_text(changed(file, **changes))
    with pytest.raises(ConfigError) as caught:
        check_all()
    assert part in str(caught.value)
