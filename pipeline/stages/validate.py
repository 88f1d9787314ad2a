"""validate: measure the written files of a variant, or of the full-precision reference, in the runtimes that ship.

Per-item results are kept, so that gates and reports never run a model again. Gates are the verdict stage's.
"""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np

from pipeline import config
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.store import Store
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.evaluate import divergence, humaneval, mmlu, statistics
from pipeline.evaluate.generate import Writer
from pipeline.evaluate.runtime import OnnxDecoder
from pipeline.evaluate.sandbox import require_isolation
from pipeline.evaluate.speed import measure
from pipeline.files import atomic_directory, write_json
from pipeline.progress import track
from pipeline.stages import needs
from pipeline.stages.preflight import require
from pipeline.stages.quantize import PLAN_FILE
from pipeline.stages.texts import dataset, encoder, scored_ids
from pipeline.stages.workspace import MODEL_FILE, REFERENCE, Workspace

ITEMS = "items.json"


def run(model: str, variant: str) -> None:
    """Measure one variant (or `REFERENCE`) and write its per-item results and metrics."""
    suite, store, workspace = config.load_suite(config.load_pipeline().suite), Store(), Workspace(model)
    mode = config.load_model(model).mmlu_mode
    isolation = require_isolation()  # before an hour of measuring, not after it
    is_reference = variant == REFERENCE
    if is_reference:
        export = workspace.reference(store)
        architecture, weight_bytes = read_architecture(export / "config.json"), Checkpoint(export).weight_bytes
        require(model, needs.reference(architecture, weight_bytes, suite, mode))
    else:
        export = workspace.require(workspace.artifact(variant), "quantize", variant)
        plan = workspace.read(export / PLAN_FILE, "quantize", variant)
        architecture, cache = read_architecture(export / "config.json"), plan["kv_cache"]["bytes_per_token"]
        require(model, needs.validate(architecture, variant, plan["bytes"], cache, suite, mode))
    graph = export / (MODEL_FILE if is_reference else f"{workspace.file_stem(variant)}.onnx")
    reference = None if is_reference else workspace.read(workspace.evaluation(REFERENCE) / ITEMS, "validate", REFERENCE)
    with atomic_directory(workspace.evaluation(variant)) as folder:
        decoder = OnnxDecoder(graph)
        items = {"mmlu": _mmlu(suite.mmlu, mode, decoder, export, store)}
        metrics = {
            "size": _size(workspace, variant, graph, store),
            "divergence": _divergence(suite.divergence, decoder, export, folder, workspace, variant, store),
        }
        del decoder
        items["humaneval"] = _humaneval(suite.humaneval, export, store, f"{model} {variant}")
        write_json(folder / ITEMS, items)
        metrics["mmlu"] = statistics.summarise_mmlu(_correct(items, "mmlu"), _correct(reference, "mmlu"), mode)
        metrics["humaneval"] = statistics.summarise_humaneval(
            _correct(items, "humaneval"), _correct(reference, "humaneval"), isolation
        )
        metrics["speed"] = measure(export, suite.speed)
    write_json(workspace.metrics(variant), metrics)
    print(f"{model} {variant}: measured; metrics in {workspace.metrics(variant)}")


def _correct(items: dict[str, Any] | None, task: str) -> np.ndarray | None:
    return None if items is None else np.array([item["correct"] for item in items[task]], dtype=np.bool_)


def _size(workspace: Workspace, variant: str, graph: Path, store: Store) -> dict[str, Any]:
    if variant != REFERENCE:
        plan = workspace.read(graph.parent / PLAN_FILE, "quantize", variant)
        copied = {key: plan[key] for key in ("bits_per_weight", "parameters", "kv_cache")}
        return {"bytes_on_disk": plan["bytes"], **copied}
    weights = workspace.weights(store)
    parameters = read_architecture(weights / "config.json").parameters
    total = graph.stat().st_size + Checkpoint(weights).weight_bytes
    return {"bytes_on_disk": total, "bits_per_weight": 8 * total / parameters, "parameters": parameters}


def _divergence(
    wanted: config.DivergenceConfig,
    decoder: OnnxDecoder,
    export: Path,
    folder: Path,
    workspace: Workspace,
    variant: str,
    store: Store,
) -> dict[str, Any]:
    def logits(ids: np.ndarray) -> np.ndarray:
        return decoder.run(ids)[0]

    windows = scored_ids(wanted, export, store)
    name = f"{workspace.model} {variant}"
    if variant == REFERENCE:
        vocab = read_architecture(export / "config.json").vocab
        scores = divergence.record_reference(logits, windows, vocab, folder)
        return statistics.summarise_reference_divergence(scores.logprob.astype(np.float64), scores.window_id)
    reference = workspace.evaluation(REFERENCE)
    scores, kl = divergence.compare(logits, windows, reference, name)
    own = divergence.read_reference(reference)
    np.savez(folder / "tokens.npz", kl=kl, top=scores.top, logprob=scores.logprob, window_id=scores.window_id)
    return statistics.summarise_divergence(
        kl, scores.top == own.top, scores.logprob.astype(np.float64), own.logprob.astype(np.float64), scores.window_id
    )


def _mmlu(
    wanted: config.MmluConfig, mode: mmlu.Mode, decoder: OnnxDecoder, export: Path, store: Store
) -> list[dict[str, Any]]:
    questions = mmlu.subset(mmlu.load_questions(dataset("mmlu", store)), wanted.questions, wanted.seed)
    encode = encoder(export)
    items = []
    for question in track(questions, "MMLU", len(questions)):
        result = mmlu.score([question], mode, encode, decoder)
        items.append(
            {
                "subject": question.subject,
                "scores": result.choice_scores[0].tolist(),
                "answer": question.answer,
                "correct": bool(result.correct[0]),
            }
        )
    return items


def _humaneval(wanted: config.HumanEvalConfig, export: Path, store: Store, name: str) -> list[dict[str, Any]]:
    problems = humaneval.spread(humaneval.load_problems(dataset("humaneval", store)), wanted.problems)
    writer = Writer(export)
    prompts = [humaneval.completion_prompt(problem) for problem in problems]
    texts = [""] * len(prompts)
    batches = list(writer.batches(prompts))
    for batch in track(batches, f"HumanEval {name}", len(batches)):
        written = writer.continuations([prompts[row] for row in batch], wanted.max_new_tokens, humaneval.should_stop)
        for row, text in zip(batch, written, strict=True):
            texts[row] = text
    pairs = [
        (problem, humaneval.extract_completion(problem, text)) for problem, text in zip(problems, texts, strict=True)
    ]
    outcomes = humaneval.judge_all(pairs, wanted.timeout_seconds)
    return [
        {"task": problem.task_id, "completion": completion, "correct": outcome.passed, **asdict(outcome)}
        for (problem, completion), outcome in zip(pairs, outcomes, strict=True)
    ]
