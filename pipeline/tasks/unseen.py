"""What quantization is tuned on is never what judges: both are compared by word 13-grams, when either changes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np

from pipeline.calibrate.texts import dataset, read_text, read_tokenizer
from pipeline.calibrate.windows import overlap
from pipeline.checkpoint.blobs import Store
from pipeline.config.evaluation import EvaluationConfig
from pipeline.errors import EvaluationError
from pipeline.tasks.humaneval_problems import load_problems
from pipeline.tasks.mmlu_questions import load_questions


def evaluation_texts(suite: EvaluationConfig, store: Store) -> Iterator[tuple[str, list[str]]]:
    """What judges, by dataset: held-out text, every MMLU question with its choices, HumanEval with its solutions."""
    for name in suite.divergence.texts:
        yield name, [read_text(name, store)]
    yield "mmlu", [" ".join((item.question, *item.choices)) for item in load_questions(dataset("mmlu", store))]
    yield "humaneval", [item.prompt + item.canonical_solution for item in load_problems(dataset("humaneval", store))]


def check_unseen(windows: Sequence[np.ndarray], folder: Path, suite: EvaluationConfig, store: Store) -> None:
    """Raise EvaluationError when windows that quantization is tuned on share a 13-gram of words with what judges."""
    decode = read_tokenizer(folder).decode
    texts = [decode(ids.tolist(), skip_special_tokens=False) for ids in windows]
    for name, judging in evaluation_texts(suite, store):
        if shared := overlap(texts, judging):
            raise EvaluationError(
                f"the text that quantization is tuned on shares {shared} 13-grams with {name}, which judges: results "
                f"would flatter. Choose other text, or another number of tokens, in configs/calibration.yaml, "
                f"configs/sensitivity.yaml or the suite."
            )
