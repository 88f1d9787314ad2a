"""Put the figures of benchmarks/results/ into the tables of benchmarks/README.md and docs/scale.md, and its claim into
README.md.

python -m benchmarks.tables
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from benchmarks import arm64, engine, half, kernels, phone, rehearsed, simulation
from benchmarks.conversion import MODELS
from benchmarks.markdown import fill, table
from benchmarks.project import RESULTS, ROOT
from benchmarks.quality.matrices import TABLES as MATRIX_TABLES
from benchmarks.quality.tables import TABLES as QUALITY_TABLES
from benchmarks.quality.tables import claim
from benchmarks.searches import BESIDE, pooled, ratio
from pipeline.files import read_json

README = Path(__file__).with_name("README.md")


def the_machine(records: list[dict[str, Any]], searches: dict[str, Any]) -> str:
    """What the figures were measured on, but for tables that name another."""
    found = records[0]["machine"]
    packages = ", ".join(f"{name} {version}" for name, version in found["packages"].items())
    return (
        f"{_processor(records[0])}, {found['cache_bytes'] / 2**20:.0f} MiB of cache, "
        f"{found['memory_bytes'] / 2**30:.0f} GiB of memory; {found['kernel']}, Python {found['python']}, {packages}."
    )


def _processor(record: dict[str, Any]) -> str:
    found = record["machine"]
    return f"{found['cpu']}, {found['cores']} cores ({', '.join(found['vector_extensions'])})"


def conversion(records: list[dict[str, Any]], searches: dict[str, Any]) -> str:
    """Every variant of every model: time beside the floor, memory, disk."""
    head = (
        "model, variant", "bytes written", "floor: read + write, s", "quantize, s", "÷ floor", "CPU, s",
        "weights/s and core", "private, MB", "mapped, MB", "disk ÷ artifact",
    )  # fmt: skip
    return table(head, [_conversion_row(record["model"], run) for record in records for run in record["variants"]])


def _conversion_row(model: str, run: dict[str, Any]) -> list[str]:
    floor = run["floor"]
    return [
        f"{model} {run['variant']}",
        f"{run['bytes']:,}",
        f"{floor['read_seconds']:.0f} + {floor['write_seconds']:.0f}",
        f"{run['wall_seconds']:.0f}",
        f"{run['ratio_to_floor']:.2f}",
        f"{run['cpu_seconds']:.0f}",
        f"{run['weights'] / run['cpu_seconds'] / 1e6:,.0f} M",
        f"{run['private_bytes'] / 1e6:,.0f}",
        f"{run['mapped_bytes'] / 1e6:,.0f}",
        f"{run['disk_growth_over_artifact']:.3f}",
    ]


def scaling(records: list[dict[str, Any]], searches: dict[str, Any]) -> str:
    """q4 by model size and number of cores, and what a kill costs."""
    head = (
        "model",
        "parameters",
        "1 core, s",
        "private, MB",
        "2 cores, s",
        "private, MB",
        "killed after, s",
        "second run, s",
        "bytes",
    )
    rows = []
    for record in records:
        two = next(run for run in record["variants"] if run["variant"] == "q4")
        one, resume = record.get("one_thread"), record["resume"]
        same = resume["same_bytes"] and (one is None or one["sha256"] == two["sha256"])
        alone = (f"{one['wall_seconds']:.0f}", f"{one['private_bytes'] / 1e6:,.0f}") if one else ("not run", "")
        rows.append([
            record["model"], f"{two['weights']:,}", *alone, f"{two['wall_seconds']:.0f}",
            f"{two['private_bytes'] / 1e6:,.0f}", f"{resume['killed_after_seconds']:.0f}",
            f"{resume['second_run_seconds']:.0f}", "the same" if same else "DIFFERENT",
        ])  # fmt: skip
    return table(head, rows)


def stages(records: list[dict[str, Any]], searches: dict[str, Any]) -> str:
    """The stages before quantize."""
    head = (
        "model",
        "source, bytes",
        "download: copy and hash, s",
        "export, s",
        "calibrate (64 tokens), s",
        "private, MB",
        "sensitivity (16 tokens), s",
        "private, MB",
    )
    return table(head, [_stage_row(record) for record in records])


def _stage_row(record: dict[str, Any]) -> list[str]:
    found = record.get("sensitivity")
    seconds = [f"{record[stage]['wall_seconds']:.1f}" for stage in ("download", "export", "calibrate")]
    return [
        record["model"],
        f"{record['source_bytes']:,}",
        *seconds,
        f"{record['calibrate']['private_bytes'] / 1e6:,.0f}",
        *([f"{found['wall_seconds']:.1f}", f"{found['private_bytes'] / 1e6:,.0f}"] if found else ["", ""]),
    ]


def run_time(records: list[dict[str, Any]], searches: dict[str, Any]) -> str:
    """Loading and decoding, beside the roofline."""
    head = (
        "artifact", "runtime, threads", "load, s", "private + mapped after load, MB", "first token, s",
        "prefill, tokens/s", "decode, tokens/s (low–high)", "roofline", "share",
    )  # fmt: skip
    return table(head, [row for record in records for row in _run_rows(record)])


def _run_rows(record: dict[str, Any]) -> Iterator[list[str]]:
    for variant in record["variants"]:
        if "decode" in variant:
            yield _run_row(f"{record['model']} {variant['variant']}", variant["decode"])
    for run in record.get("runtime", {}).get("runs", []):
        yield _run_row(f"{record['model']} q4{', prepacked file' * (run['form'] == 'prepacked')}", run)


def _run_row(name: str, run: dict[str, Any]) -> list[str]:
    memory = f"{run['loaded_private_bytes'] / 1e6:,.0f} + {run['loaded_mapped_bytes'] / 1e6:,.0f}"
    row = [f"{name}{', cold' * run['cold']}", f"{run['engine']}, {run['threads'] or 'default'}"]
    row += [f"{run['load_seconds']:.1f}", memory, f"{run['first_token_seconds']:.2f}"]
    if run["rate"] is None:
        return [*row, "", "", "", ""]
    row += [f"{run['prefill_rate']:.1f}", f"{run['rate']:.2f} ({run['rate_low']:.2f}–{run['rate_high']:.2f})"]
    ceiling = run.get("ceiling")
    return [*row, *([f"{ceiling:.1f}", f"{run['rate'] / ceiling:.0%}"] if ceiling else ["", ""])]


def prepacked(records: list[dict[str, Any]], searches: dict[str, Any]) -> str:
    """The prepacked files and the bandwidth under the rooflines."""
    head = (
        "model",
        "artifact, bytes",
        "read per token, GB",
        "memory, GB/s (1 · 2 threads)",
        "prepacked file, bytes",
        "saved in, s",
    )
    rows = []
    for record in (record for record in records if "runtime" in record):
        found = record["runtime"]
        rates = " · ".join(f"{rate / 1e9:.1f}" for rate in found["bandwidth"]["bytes_per_second"].values())
        read, saved = found["reads"]["bytes_per_token"], found["prepacked"]
        rows.append([
            record["model"], f"{found['artifact_bytes']:,}", f"{read / 1e9:.2f}", rates,
            f"{saved['bytes']:,} ({saved['ratio']:.2f} ×)", f"{saved['save_seconds']:.0f}",
        ])  # fmt: skip
    return table(head, rows)


def quantizers(records: list[dict[str, Any]], searches: dict[str, Any]) -> str:
    """Our searches beside the peers' on the same weights."""
    pools = pooled(searches["records"])
    head = (
        "tool, format",
        "threads",
        "bits/weight",
        "M weights/s and core",
        "relative error",
        "weighted error",
        "our nearest ÷ it",
        "our weighted ÷ it",
    )
    rows = []
    for key, row in pools.items():
        ours = key[0].startswith("ours")
        beside = ["", ""] if ours else [f"{ratio(pools, what, key):.1f}" for what in BESIDE]
        rows.append([
            f"{key[0]}, {key[1]}", key[2] or "any", f"{row['bits']:.2f}", f"{row['per_core'] / 1e6:.1f}",
            f"{row['rel_error']:.4f}", f"{row['weighted_error']:.4f}", *beside,
        ])  # fmt: skip
    return table(head, rows)


def reference(found: dict[str, Any]) -> str:
    """Full-precision models measured layer by layer."""
    head = (
        "model", "in memory it would take, GB", "private, GB", "disk, GB", "tokens", "passes, s", "answers, s",
    )  # fmt: skip
    rows = []
    for record in found["records"]:
        cut = f", first {record['cut_to_layers']} layers" if record["cut_to_layers"] else ""
        gigabytes = (record[name] / 1e9 for name in ("whole_model_bytes", "private_bytes", "disk_growth_bytes"))
        rows.append([
            f"{record['model']}{cut}", *(f"{size:.2f}" for size in gigabytes), f"{record['tokens']:,}",
            f"{record['pass_seconds']:.0f}", f"{record['answer_seconds']:.0f}",
        ])  # fmt: skip
    return f"{table(head, rows)}\n\nMeasured on {_processor(found)}."


def generation(found: dict[str, Any]) -> str:
    """Passes of texts side by side, beside preflight's prediction."""
    head = (
        "model", "texts side by side", "tokens each, at most", "private, GB", "a pass, s (least–most)",
        "read from the disk in it, GB", "predicted, s", "÷ predicted",
    )  # fmt: skip
    rows = []
    for record in found["records"]:
        seconds, disk = record["pass_seconds"], record["disk_read_bytes"] / len(record["pass_seconds"])
        rows.append([
            record["model"], f"{record['texts']:,}", f"{record['tokens']:,}", f"{record['private_bytes'] / 1e9:.1f}",
            f"{record['median_seconds']:.1f} ({min(seconds):.1f}–{max(seconds):.1f})", f"{disk / 1e9:.1f}",
            f"{record['predicted_seconds']:.1f}", f"{record['measured_over_predicted']:.2f}",
        ])  # fmt: skip
    return f"{table(head, rows)}\n\nMeasured on {_processor(found)}."


TABLES = {
    "machine": the_machine, "conversion": conversion, "scaling": scaling, "stages": stages, "runtime": run_time,
    "prepacked": prepacked, "quantizers": quantizers,
}  # fmt: skip


def mmlu(found: dict[str, Any]) -> str:
    """Ours beside lm-evaluation-harness."""
    head = (
        "mode", "prompts equal", "scored by both", "largest difference, nats", "accuracy, ours · harness",
        "tokens, ours · harness", "seconds, ours · harness", "tokens ÷ ours",
    )  # fmt: skip
    rows = []
    for mode, result in found["modes"].items():
        ours, theirs, prompts = result["ours"], result["harness"], result["prompts"]
        rows.append([
            mode, f"{prompts['equal']} of {prompts['questions']}", str(result["questions"]),
            f"{result['max_difference_nats']:.1e}",
            f"{result['accuracy']['ours']:.1%} · {result['accuracy']['harness']:.1%}",
            f"{ours['tokens']:,} · {theirs['tokens']:,}", f"{ours['seconds']:.0f} · {theirs['seconds']:.0f}",
            f"{theirs['tokens'] / ours['tokens']:.1f}",
        ])  # fmt: skip
    for count, tokens in found["five_shot_tokens"].items():
        told = f"{tokens['ours']:,} · {tokens['harness']:,}"
        rows.append([f"five-shot, {int(count):,}, counted", "", "", "", "", told, "", f"{tokens['ratio']:.1f}"])
    return f"{table(head, rows)}\n\nMeasured on {_processor(found)}."


def on_arm64(found: dict[str, Any]) -> str:
    """Artifacts in the arm64 build, beside x86-64's."""
    return table(arm64.HEAD, arm64.rows(found["records"]))


BY_FILE = {
    "quality.json": QUALITY_TABLES,
    "matrices.json": MATRIX_TABLES,
    "reference.json": {"reference": reference},
    "generation.json": {"generation": generation},
    "mmlu.json": {"mmlu": mmlu},
    "arm64.json": {"arm64": on_arm64},
    "kernels.json": {"kernels": kernels.rows},
    "half.json": {"half": half.rows},
}
"""Tables of the benchmarks that run by themselves, by their file in results."""


def main() -> None:
    """Rewrite every marked table."""
    records = [read_json(file) for name in MODELS if (file := RESULTS / f"conversion-{name}.json").exists()]
    searches = read_json(RESULTS / "searches.json")
    tables = {name: render(records, searches) for name, render in TABLES.items()}
    for file, own in BY_FILE.items():
        if (RESULTS / file).exists():
            found = read_json(RESULTS / file)
            tables |= {name: render(found) for name, render in own.items()}
    if rehearsals := [read_json(file) for file in sorted(RESULTS.glob("rehearsal-*.json"))]:
        tables["rehearsal"] = rehearsed.everything(rehearsals)
    if phones := [read_json(file) for file in sorted(RESULTS.glob("phone-*.json"))]:
        tables["phone"] = phone.tables(phones)
    fill(README, tables)
    if (RESULTS / "engine.json").exists():
        fill(ROOT / "docs" / "scale.md", {"engine": engine.report(read_json(RESULTS / "engine.json"))})
    if simulation.RESULT.exists():
        fill(ROOT / "docs" / "scale.md", simulation.tables(read_json(simulation.RESULT)))
    fill(ROOT / "README.md", {"quality-claim": claim(read_json(RESULTS / "quality.json"))})


if __name__ == "__main__":
    main()
