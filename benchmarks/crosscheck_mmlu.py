"""MMLU beside lm-evaluation-harness, on the same artifact: its prompts, its log-likelihoods, and what both cost.

    python -m benchmarks.crosscheck_mmlu artifacts/smollm2-135m/reference --out benchmarks/results/mmlu.json

The harness works on its own: its task files (of which only the dataset is replaced, by the same questions in local
files), its prompt construction, its requests, its onnxruntime-genai backend. Four things are compared:

- prompts and answers, byte for byte, of 570 questions in each mode;
- the log-likelihood of every answer, on questions that both score, within 1e-4;
- accuracy on them, by the summed log-likelihoods that the harness compares;
- tokens run and seconds on the same questions; and the tokens that whole subsets take, counted without a model.

The artifact is one with float activations, the full-precision one: with int8 activations a product of one row rounds
otherwise than one of many, so scores differ by how a prompt is cut (SmolLM2 q4: by up to 1.6 nats).

Exit status 1 when a prompt differs, a log-likelihood is further away, or the accuracies are not equal. Nothing is
downloaded: the harness runs offline.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
import numpy as np
import yaml
from rich.console import Console
from rich.table import Table

from benchmarks import machine
from benchmarks.engines import settings
from pipeline.calibrate.texts import dataset, encoder
from pipeline.checkpoint.blobs import Store
from pipeline.errors import PipelineError
from pipeline.files import link_or_copy, read_json, write_json
from pipeline.runtime.session import OnnxDecoder
from pipeline.tasks import mmlu_questions as mmlu
from pipeline.tasks.mmlu_questions import Mode, Prompt, asker
from pipeline.tasks.mmlu_scoring import Encode, Scorer
from pipeline.workspace import GENAI_CONFIG

MODES: dict[Mode, tuple[str, int]] = {
    "letter": ("default", 0),
    "five-shot": ("default", 5),
    "cloze": ("continuation", 0),
}
"""Mode → folder of the harness's task files, examples."""
TOLERANCE = 1e-4  # nats
PROMPTS = 570  # questions whose prompts are compared
SUBSETS = (570, 1_425, 2_850)  # whose tokens are counted
SEED = 0


@dataclass(frozen=True)
class Asked:
    """One question as the harness put it to a model: prompt, answers, and the four log-likelihoods that came back."""

    prompt: str
    answers: tuple[str, ...]
    scores: tuple[float, ...]


class Counter:
    """A decoder that counts the tokens it is given; without a model, one whose logits mean nothing."""

    def __init__(self, decoder: OnnxDecoder | None, vocabulary: int = 0):
        self._decoder, self._zeros = decoder, np.broadcast_to(np.float32(0), (1, vocabulary))
        self.tokens = 0

    def run(self, ids: Sequence[int], past: Any = None) -> tuple[np.ndarray, Any]:
        """As `OnnxDecoder.run`."""
        self.tokens += len(ids)
        if self._decoder:
            return self._decoder.run(ids, past)
        return np.broadcast_to(self._zeros, (len(ids), self._zeros.shape[1])), None


# --- the harness ------------------------------------------------------------------------------------------------------


class Harness:
    """lm-evaluation-harness with its own MMLU tasks over local files below `folder`."""

    def __init__(self, folder: Path, examples: mmlu.Examples):
        self._folder, self._examples = folder, examples

    def ask(self, model: Any, mode: Mode, questions: Sequence[mmlu.Question]) -> list[Asked]:
        """What the harness asks of `model` about each question, in the order given."""
        from lm_eval import simple_evaluate
        from lm_eval.tasks import TaskManager

        work = Path(tempfile.mkdtemp(dir=self._folder))
        tasks = self._write_tasks(work, mode, questions)
        found = simple_evaluate(
            model,
            tasks=list(tasks),
            num_fewshot=MODES[mode][1],
            task_manager=TaskManager(include_path=str(work), include_defaults=False),
            bootstrap_iters=0,
        )
        asked: dict[int, Asked] = {}
        for task, numbers in tasks.items():
            for sample in found["samples"][task]:
                prompts, answers = zip(*sample["arguments"], strict=True)
                scores = tuple(response[0][0] for response in sample["resps"])
                asked[numbers[sample["doc_id"]]] = Asked(prompts[0], answers, scores)
        return [asked[number] for number in range(len(questions))]

    def _write_tasks(self, work: Path, mode: Mode, questions: Sequence[mmlu.Question]) -> dict[str, list[int]]:
        """One task per subject: the harness's file with another dataset. Task → numbers of its questions."""
        import lm_eval

        originals = Path(lm_eval.__file__).parent / "tasks" / "mmlu" / MODES[mode][0]
        numbers: dict[str, list[int]] = defaultdict(list)
        for number, question in enumerate(questions):
            numbers[question.subject].append(number)
        tasks = {}
        for subject, own in numbers.items():
            name = subject.replace(" ", "_")
            files = {"test": [questions[number] for number in own], "dev": self._examples[subject]}
            for split, rows in files.items():
                _write_rows(work / f"{name}.{split}.jsonl", rows)
            task = {
                "include": str(originals / f"mmlu_{name}.yaml"),
                "task": f"crosscheck_{name}",
                "tag": None,
                "dataset_path": "json",
                "dataset_name": None,
                "dataset_kwargs": {"data_files": {split: str(work / f"{name}.{split}.jsonl") for split in files}},
            }
            (work / f"{name}.yaml").write_text(yaml.safe_dump(task))
            tasks[task["task"]] = own
        return tasks


def _write_rows(path: Path, questions: Sequence[mmlu.Question]) -> None:
    """As `cais/mmlu` spells them."""
    rows = [{"question": q.question, "choices": q.choices, "answer": q.answer} for q in questions]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def _counting_backend(folder: Path) -> Any:
    """The harness's onnxruntime-genai backend, counting the tokens it runs in `tokens`."""
    from lm_eval.models.onnxruntime_genai import ONNXRuntimeGenAILM

    class Counting(ONNXRuntimeGenAILM):
        tokens = 0

        def _forward_logits(self, tokens: list[int]) -> np.ndarray:
            self.tokens += len(tokens)
            return super()._forward_logits(tokens)

    return Counting(str(folder))


def _unchunked(artifact: Path, folder: Path) -> Path:
    """The artifact with prompts run in one piece: the backend reads logits after them, which are the last piece's."""
    folder.mkdir()
    for file in artifact.iterdir():
        if file.name != GENAI_CONFIG:
            link_or_copy(file, folder / file.name)
    found = read_json(artifact / GENAI_CONFIG)
    del found["search"]["chunk_size"]
    write_json(folder / GENAI_CONFIG, found)
    return folder


def _listener(encode: Encode) -> Any:
    """A model for the harness that scores nothing and counts, in `tokens`, what its backend would run."""
    from lm_eval.api.model import LM

    class Listener(LM):
        tokens = 0

        def loglikelihood(self, requests: list[Any]) -> list[tuple[float, bool]]:
            self.tokens += sum(len(encode("".join(request.args))) for request in requests)
            return [(0.0, False)] * len(requests)

        def loglikelihood_rolling(self, requests: list[Any]) -> list[float]:
            raise NotImplementedError

        def generate_until(self, requests: list[Any]) -> list[str]:
            raise NotImplementedError

    return Listener()


# --- comparisons ------------------------------------------------------------------------------------------------------


class Crosscheck:
    """Both sides on one artifact, and the same questions."""

    def __init__(self, artifact: Path, work: Path):
        model = settings(artifact)
        self._artifact, self._context = artifact, model["context_length"]
        self._graph, self._vocabulary = artifact / model["decoder"]["filename"], model["vocab_size"]
        self._encode = encoder(artifact)
        self._split = mmlu.load_questions(dataset("mmlu", Store()))
        self._examples = mmlu.held_out_examples(self._split, max(SUBSETS), SEED)
        self._harness = Harness(work, self._examples)
        self._unchunked = _unchunked(artifact, work / "unchunked")

    def prompts(self, mode: Mode) -> dict[str, int]:
        """How many prompts, with their answers, are the harness's to the byte."""
        questions = mmlu.subset(self._split, PROMPTS, SEED)
        asked = self._harness.ask(_listener(self._encode), mode, questions)
        ours = [self._ask(mode, question) for question in questions]
        equal = sum((own.text, own.answers) == (a.prompt, a.answers) for own, a in zip(ours, asked, strict=True))
        return {"questions": len(questions), "equal": equal}

    def tokens(self, mode: Mode) -> dict[int, dict[str, float]]:
        """Tokens that each of `SUBSETS` takes, by whom."""
        return {n: self._tokens(mode, mmlu.subset(self._split, n, SEED)) for n in SUBSETS}

    def scores(self, mode: Mode, questions: Sequence[mmlu.Question]) -> dict[str, Any]:
        """Log-likelihoods, accuracy and cost on questions that both score. They lie within the model's context."""
        backend = _counting_backend(self._unchunked)
        started = time.perf_counter()
        asked = self._harness.ask(backend, mode, questions)
        theirs = {"tokens": backend.tokens, "seconds": time.perf_counter() - started}
        decoder = Counter(OnnxDecoder(self._graph))
        started = time.perf_counter()
        found = self._score(decoder, mode, questions)
        ours = {"tokens": decoder.tokens, "seconds": time.perf_counter() - started}
        want = np.array([a.scores for a in asked])
        answers = np.array([question.answer for question in questions])
        return {
            "questions": len(questions),
            "subjects": len({question.subject for question in questions}),
            "max_difference_nats": float(np.abs(found - want).max()),
            "accuracy": {
                name: float((values.argmax(axis=1) == answers).mean())
                for name, values in (("ours", found), ("harness", want))
            },
            "ours": ours,
            "harness": theirs,
        }

    def sample(self, mode: Mode, count: int) -> list[mmlu.Question]:
        """`count` questions of the smallest of `SUBSETS`, none longer than the model's context.

        In its order; for five-shot subject by subject, so that as many follow the same examples as in the subset.
        """
        subset = mmlu.subset(self._split, SUBSETS[0], SEED)
        if mode == "five-shot":
            subset = sorted(subset, key=lambda question: question.subject)
        return [question for question in subset if self._fits(mode, question)][:count]

    def _ask(self, mode: Mode, question: mmlu.Question) -> Prompt:
        """Summed log-likelihoods, as the harness compares them, in cloze mode too."""
        return replace(asker(mode, self._examples)(question), per_token=False)

    def _fits(self, mode: Mode, question: mmlu.Question) -> bool:
        prompt = self._ask(mode, question)
        return all(len(self._encode(prompt.text + answer)) <= self._context for answer in prompt.answers)

    def _score(self, decoder: Counter, mode: Mode, questions: Sequence[mmlu.Question]) -> np.ndarray:
        """float64 [questions, 4], asked subject by subject."""
        scorer = Scorer(self._encode, decoder, sys.maxsize)
        order = sorted(range(len(questions)), key=lambda number: (questions[number].subject, number))
        found = {number: scorer.scores(self._ask(mode, questions[number])) for number in order}
        return np.array([found[number] for number in range(len(questions))])

    def _tokens(self, mode: Mode, questions: Sequence[mmlu.Question]) -> dict[str, float]:
        ours, theirs = Counter(None, self._vocabulary), _listener(self._encode)
        self._score(ours, mode, questions)
        self._harness.ask(theirs, mode, questions)
        return {"ours": ours.tokens, "harness": theirs.tokens, "ratio": theirs.tokens / ours.tokens}


def run(artifact: Path, count: int, note: Callable[[str], None]) -> dict[str, Any]:
    """The record of all comparisons; `count` questions are scored in each mode."""
    with tempfile.TemporaryDirectory() as work:
        os.environ |= {"HF_HUB_OFFLINE": "1", "HF_HOME": work}  # read when the harness is imported
        import lm_eval

        check = Crosscheck(artifact, Path(work))
        modes: dict[str, Any] = {}
        for mode in MODES:
            note(f"{mode}: prompts of {PROMPTS} questions")
            modes[mode] = {"prompts": check.prompts(mode)}
            note(f"{mode}: {count} questions scored by both")
            modes[mode] |= check.scores(mode, check.sample(mode, count))
        note(f"five-shot: tokens of subsets {', '.join(map(str, SUBSETS))}")
        counted = check.tokens("five-shot")
    return {
        "machine": machine.describe(),
        "harness": f"lm-eval {lm_eval.__version__}, onnxruntime-genai backend",
        "artifact": artifact.name,
        "modes": modes,
        "five_shot_tokens": counted,
    }


def failures(record: dict[str, Any]) -> list[str]:
    """Where the two sides disagree, in words."""
    found = []
    for mode, result in record["modes"].items():
        prompts, accuracy = result["prompts"], result["accuracy"]
        if prompts["equal"] != prompts["questions"]:
            found.append(f"{mode}: {prompts['questions'] - prompts['equal']} of {prompts['questions']} prompts differ")
        if not result["max_difference_nats"] <= TOLERANCE:
            found.append(f"{mode}: a log-likelihood differs by {result['max_difference_nats']:.2g} nats")
        if accuracy["ours"] != accuracy["harness"]:
            found.append(f"{mode}: accuracy {accuracy['ours']:.4f}, the harness has {accuracy['harness']:.4f}")
    return found


def table(record: dict[str, Any]) -> Table:
    """The record for people."""
    shown = Table("mode", "prompts equal", "scored", "largest difference", "accuracy", "tokens", "seconds", "tokens ÷")
    for mode, result in record["modes"].items():
        ours, theirs = result["ours"], result["harness"]
        shown.add_row(
            mode,
            f"{result['prompts']['equal']} of {result['prompts']['questions']}",
            f"{result['questions']}",
            f"{result['max_difference_nats']:.1e} nats",
            f"{100 * result['accuracy']['ours']:.1f} · {100 * result['accuracy']['harness']:.1f} %",
            f"{ours['tokens']:,} · {theirs['tokens']:,}",
            f"{ours['seconds']:.1f} · {theirs['seconds']:.1f}",
            f"{theirs['tokens'] / ours['tokens']:.1f}",
        )
    for n, counts in record["five_shot_tokens"].items():
        tokens = f"{counts['ours']:,} · {counts['harness']:,}"
        shown.add_row(f"five-shot, {n:,} counted", "", "", "", "", tokens, "", f"{counts['ratio']:.1f}")
    return shown


@click.command(help=__doc__)
@click.argument("artifact", type=click.Path(exists=True, file_okay=False, path_type=Path))
@click.option("--questions", default=40, show_default=True, help="Scored by both, in each mode.")
@click.option("--out", type=click.Path(dir_okay=False, path_type=Path), help="JSON file for the record.")
def main(artifact: Path, questions: int, out: Path | None) -> None:
    """Compare, print, and say where both disagree."""
    console = Console(stderr=True)
    try:
        record = run(artifact, questions, console.print)
    except ImportError as error:
        raise click.ClickException(
            f"{error}. Install the harness: pip install -r requirements-crosscheck.txt"
        ) from None
    except PipelineError as error:
        raise click.ClickException(str(error)) from None
    Console(width=160).print("ours · the harness's", table(record))
    if out:
        write_json(out, record)
    for failure in (found := failures(record)):
        console.print(failure, style="red")
    sys.exit(bool(found))


if __name__ == "__main__":
    main()
