"""Whether a variant may be decoded speculatively, and whether it should: `python -m pipeline speculate`.

Two gates. A text written with drafts is the text written without, or leaves it at a near tie: at two tokens that lie
no further apart than `TIE` times what passes over several tokens move the two likeliest, at 99 of 100 tokens of the
same texts. And such passes diverge from passes over one token by no more than the variant does from its full-precision
model. Speed decides nothing: it is shown, with the advice that follows from it.
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx

from pipeline.artifact.speculative import SETTINGS_FILE
from pipeline.checkpoint.architecture import read_architecture
from pipeline.checkpoint.blobs import Store
from pipeline.config.recipes import Speculative
from pipeline.errors import EvaluationError
from pipeline.files import link_or_copy, read_json, scratch_directory
from pipeline.graph.speculative import ngram_settings, verifying
from pipeline.runtime.generate import Prompter
from pipeline.runtime.session import OnnxDecoder
from pipeline.runtime.speculative import Greedily, Greedy, Rounding, first_difference, rounding
from pipeline.tasks import held_out
from pipeline.workspace import Workspace

TIE = 2.0
_USUAL = 0.99
PROMPT = 128  # tokens of held-out text that a model goes on from
TEXTS = {"chat": {"chat-mt-bench": 1}, "code": {"text-bottle": 1}, "languages": {"text-vietnamese": 1}}


@dataclass(frozen=True)
class Line:
    """Texts of one kind: how many, how many equal without and with drafts and how many that differ at a near tie; the
    share of drafted tokens that was accepted; tokens per second without and with."""

    kind: str
    texts: int
    equal: int
    near_ties: int
    accepted: float
    plain: float
    drafted: float

    @property
    def speedup(self) -> float:
        """With over without."""
        return self.drafted / self.plain if self.plain else 1.0


@dataclass(frozen=True)
class Judged:
    """The figures of both gates, in nats. `wrong`: what differs and is no near tie, in words; `parted`: the most by
    which a plain text's token was likelier where a text left it, of at most `tie`; `kl_rows` and `kl_own`: the mean
    divergence of passes over several tokens, and the variant's."""

    drafts: str
    lines: tuple[Line, ...]
    wrong: tuple[str, ...]
    parted: float
    tie: float
    kl_rows: float
    kl_own: float

    @property
    def passed(self) -> bool:
        """Both gates."""
        return not self.wrong and self.kl_rows <= self.kl_own


def run(model: str, variant: str, tokens: int | None, ngram: int | None, new: int, count: int, as_json: bool) -> int:
    """Measure, print, and return 1 where a gate fails.

    `tokens` or `ngram` ask for n-grams of these sizes, whatever the recipe says. `new` tokens are written of `count`
    texts of each kind.
    """
    workspace = Workspace(model)
    artifact = workspace.require(workspace.artifact(variant), "quantize", variant)
    measured = workspace.read(workspace.measurements(variant), "validate", variant)
    if "divergence" not in measured:
        raise EvaluationError(f"{model} {variant}: its divergence was not measured; use a suite that has `divergence`.")
    graph = artifact / f"{workspace.file_stem(variant)}.onnx"
    with scratch_directory(workspace.partial(f"{variant}.speculative")) as folder:
        for file in artifact.iterdir():
            link_or_copy(file, folder / file.name)
        settings = _settings(folder, graph, tokens, ngram)
        found = judge(folder, folder / graph.name, settings, new, count, measured["divergence"]["kl_mean"])
    print(json.dumps(asdict(found) | {"passed": found.passed}, indent=2) if as_json else describe(found))
    return 0 if found.passed else 1


def _settings(folder: Path, graph: Path, tokens: int | None, ngram: int | None) -> dict[str, Any]:
    """The artifact's own, or those of n-grams over a verifying graph that is made in `folder`."""
    own = folder / SETTINGS_FILE
    if own.exists() and tokens is None and ngram is None:
        return read_json(own)
    name, default = f"{graph.stem}.verify.onnx", Speculative()
    model, architecture = onnx.load(graph, load_external_data=False), read_architecture(folder / "config.json")
    (folder / name).unlink(missing_ok=True)  # a second name of the artifact's, which is not to be written through
    onnx.save(verifying(model, architecture), folder / name)
    return {"ngram": ngram_settings(name, tokens or default.tokens, ngram or default.ngram)}


def judge(folder: Path, graph: Path, settings: Mapping[str, Any], new: int, count: int, kl_own: float) -> Judged:
    """Both gates on a folder that onnxruntime-genai loads. `kl_own`: the variant's mean KL divergence, in nats.

    One model is in memory at a time. Raises EvaluationError when the context does not hold prompt and text.
    """
    prompter = Prompter(folder)
    if PROMPT + new > prompter.context:
        raise EvaluationError(
            f"{folder}: prompts of {PROMPT} tokens and {new:,} new ones exceed the context of {prompter.context:,}. "
            f"Lower --new-tokens."
        )
    wanted = {kind: dict.fromkeys(texts, count) for kind, texts in TEXTS.items()}
    prompts = [ids.tolist() for ids in held_out.scored_ids(wanted, PROMPT, folder, Store())]
    kinds = [kind for kind in wanted for _ in range(count)]
    plain = _texts(Greedily(folder), prompts, new, prompter)
    drafted = _texts(Greedily(folder, settings), prompts, new, prompter)
    ((drafts, told),) = settings.items()
    rows = 1 + (told["decoder"] if drafts == "mtp" else told)["speculative"]["max_draft_tokens"]
    decoder = OnnxDecoder(graph)
    read = [rounding(decoder, prompt, text.ids, rows) for prompt, text in zip(prompts, plain, strict=True)]
    tie = TIE * float(np.quantile(np.concatenate([one.moved for one in read]), _USUAL))
    lines, wrong, parted = list[Line](), list[str](), 0.0
    for kind in wanted:
        chosen = [number for number, own in enumerate(kinds) if own == kind]
        margins = {number: _margin(plain[number], drafted[number], read[number]) for number in chosen}
        far = {number: margin for number, margin in margins.items() if margin is not None and margin > tie}
        wrong += [f"text {number} ({kind}) leaves the plain one where its token is {margin:.3f} nats likelier" for
                  number, margin in far.items()]  # fmt: skip
        parted = max([parted, *(margin for margin in margins.values() if margin is not None)])
        equal = sum(margin is None for margin in margins.values())
        with_drafts, without = [drafted[number] for number in chosen], [plain[number] for number in chosen]
        evaluated = sum(text.evaluated for text in with_drafts)
        accepted = sum(text.accepted for text in with_drafts) / max(evaluated, 1)
        rates = _rate(without), _rate(with_drafts)
        lines.append(Line(kind, len(chosen), equal, len(chosen) - equal - len(far), accepted, *rates))
    kl_rows = float(np.mean(np.concatenate([one.kl for one in read])))
    return Judged(drafts, tuple(lines), tuple(wrong), parted, tie, kl_rows, kl_own)


def _texts(model: Greedily, prompts: Sequence[Sequence[int]], new: int, prompter: Prompter) -> list[Greedy]:
    model.write(prompts[0], 8)  # what a first run sets up is not a text's
    return [model.write(prompt, new, prompter.stop_ids) for prompt in prompts]


def _margin(plain: Greedy, drafted: Greedy, read: Rounding) -> float | None:
    """By how many nats the plain text's token is likelier where the texts part; None where they do not."""
    place = first_difference(plain.ids, drafted.ids)
    return None if place is None else read.margin(place, plain.ids[place], drafted.ids[place])


def _rate(texts: Sequence[Greedy]) -> float:
    return sum(len(text.ids) for text in texts) / sum(text.seconds for text in texts)


def describe(found: Judged) -> str:
    """A table and both gates, for people."""
    return "\n".join(_describe(found))


def _describe(found: Judged) -> Iterator[str]:
    yield f"{'text':<10} {'equal':>7} {'near ties':>10} {'accepted':>9} {'plain':>8} {'drafts':>8} tokens/s"
    for line in found.lines:
        yield (
            f"{line.kind:<10} {line.equal:>3}/{line.texts:<3} {line.near_ties:>10} {line.accepted:>9.0%} "
            f"{line.plain:>8.1f} {line.drafted:>8.1f} ({line.speedup:.2f} ×)"
        )
    verdict = "PASS" if not found.wrong else "FAIL"
    yield f"{verdict}: texts differ where tokens lie at most {found.parted:.3f} nats apart; {found.tie:.3f} are allowed"
    yield from (f"  {what}" for what in found.wrong)
    verdict = "PASS" if found.kl_rows <= found.kl_own else "FAIL"
    both = f"{found.kl_rows:.5f} nats, the variant by {found.kl_own:.5f}"
    yield f"{verdict}: passes over several tokens diverge by {both}"
    slow = [line.kind for line in found.lines if line.speedup < 1]
    yield (
        f"slower on {', '.join(slow)}: leave it off there"
        if slow
        else "faster on every kind of text that was measured here"
    )
