"""What a fetched bundle of a talking model says, beside what the model says at full precision.

    python -m benchmarks.speaking BUNDLE/content

prints greedy answers to `talking_check.REQUESTS` as JSON: the bundle in onnxruntime-genai, as an app loads it. The
full-precision text is the small model's, rounded to bfloat16, which a talking model computes (`talking_check`).
"""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import click

from benchmarks.talking_check import REQUESTS, greedy, write_rounded
from pipeline.calibrate.texts import encoder, read_tokenizer
from pipeline.runtime.session import OnnxDecoder
from pipeline.workspace import MODEL_FILE

TOKENS = 48  # of an answer


def answers(folder: Path, tokens: int = TOKENS) -> dict[str, Any]:
    """Token ids of a greedy answer to each request, seconds to load the folder and tokens decoded per second."""
    import onnxruntime_genai as genai

    encode, start, found, spent = encoder(folder), time.monotonic(), [], 0.0
    model = genai.Model(str(folder))
    loaded = time.monotonic() - start
    for prompt in map(encode, REQUESTS):
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=len(prompt) + tokens, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(prompt)
        generator.generate_next_token()
        text, start = [int(generator.get_next_tokens()[0])], time.monotonic()
        while not generator.is_done():
            generator.generate_next_token()
            text.append(int(generator.get_next_tokens()[0]))
        spent += time.monotonic() - start
        found.append(text)
    decoded = sum(len(text) - 1 for text in found)
    return {"load_seconds": loaded, "tokens_per_second": decoded / spent if spent else None, "answers": found}


@dataclass(frozen=True)
class Answer:
    """A bundle's answer beside the full-precision one.

    Attributes:
        tokens: of the bundle's answer, the end of text included.
        same: tokens before the first that differs; all of them if none does.
        margin: logits of the full-precision model there, its own token's over the bundle's; None if none differs, or
            if the bundle's token is one that the small model does not have.
    """

    request: str
    bundle: str
    full_precision: str
    tokens: int
    same: int
    margin: float | None


def beside(
    small: Path, folder: Path, found: Sequence[Sequence[int]], work: Path, layers: int | None = None
) -> list[dict[str, Any]]:
    """The answers of the bundle in `folder` as `Answer`s; `work`: for files meanwhile; `layers`: of a cut model."""
    encode, tokenizer = encoder(folder), read_tokenizer(folder)
    prompts = [encode(request) for request in REQUESTS]
    with tempfile.TemporaryDirectory(dir=work) as scratch:
        longest = max(len(prompt) + len(text) for prompt, text in zip(prompts, found, strict=True))
        write_rounded(small, Path(scratch), longest, layers)
        decoder = OnnxDecoder(Path(scratch) / MODEL_FILE)
        rows = []
        for request, prompt, ours in zip(REQUESTS, prompts, found, strict=True):
            theirs = greedy(decoder, prompt, len(ours))[len(prompt) :]
            same = next((place for place, pair in enumerate(zip(ours, theirs, strict=True)) if len({*pair}) > 1), None)
            margin = None if same is None else _margin(decoder, [*prompt, *theirs[:same]], theirs[same], ours[same])
            texts = (tokenizer.decode(ids, skip_special_tokens=True) for ids in (ours, theirs))
            rows.append(asdict(Answer(request, *texts, len(ours), len(ours) if same is None else same, margin)))
    return rows


def _margin(decoder: OnnxDecoder, text: Sequence[int], best: int, other: int) -> float | None:
    logits = decoder.run(text)[0][-1]
    return float(logits[best] - logits[other]) if other < len(logits) else None


@click.command(context_settings={"help_option_names": ["-h", "--help"]})
@click.argument("folder", type=click.Path(path_type=Path, exists=True, file_okay=False))
@click.option("--tokens", default=TOKENS, show_default=True, help="Length of each answer.")
def main(folder: Path, tokens: int) -> None:
    """Print the greedy answers of the bundle whose content lies in FOLDER."""
    click.echo(json.dumps(answers(folder, tokens)))


if __name__ == "__main__":
    main()
