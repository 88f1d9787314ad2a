"""Does on this machine what a phone does, and compares the two ways of loading: weights private, and mapped.

    python -m pipeline.prepack.check '{"folder": "…", "graph": "….onnx", "new_tokens": 64}'

is the process that loads and generates; it imports the runtime and nothing heavy, because its memory is measured.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from pipeline.errors import EvaluationError
from pipeline.machine import resident_memory

_TEXT = "The history of the town goes back to the time when the river was the only road through the forest."
NEW_TOKENS = 64


@dataclass(frozen=True)
class Way:
    """One way of loading, as its process saw it.

    Attributes:
        loaded, used: (private, mapped) bytes, of the interpreter too, after loading and after generating twice.
        tokens: greedy.
        rate: tokens per second of the second generation, whose pages are in memory.
    """

    seconds: float
    loaded: Sequence[int]
    used: Sequence[int]
    tokens: Sequence[int]
    rate: float

    def describe(self) -> str:
        """One line, for people."""
        (private, mapped), (later, paged) = self.loaded, self.used
        return (
            f"loaded in {self.seconds:.1f} s, {private:,} bytes private and {mapped:,} mapped; in use {later:,} and "
            f"{paged:,}; {self.rate:.1f} tokens/s"
        )


def observe(folder: str, graph: str, new_tokens: int) -> Way:
    """Load `graph` of a folder through onnxruntime-genai, and continue a text twice."""
    import onnxruntime_genai as genai

    settings = genai.Config(folder)
    settings.overlay(json.dumps({"model": {"decoder": {"filename": graph}}}))
    start = time.monotonic()
    model = genai.Model(settings)
    seconds, loaded = time.monotonic() - start, resident_memory()
    ids = [int(token) for token in genai.Tokenizer(model).encode(_TEXT)]
    for _ in range(2):  # a mapped file is read while the first text is written
        params = genai.GeneratorParams(model)
        length = len(ids) + new_tokens
        params.set_search_options(max_length=length, min_length=length, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(ids)
        generator.generate_next_token()
        start = time.monotonic()
        for _ in range(new_tokens - 1):
            generator.generate_next_token()
        rate = (new_tokens - 1) / (time.monotonic() - start)
    tokens = [int(token) for token in generator.get_sequence(0)[len(ids) :]]
    return Way(seconds, loaded, resident_memory(), tokens, rate)


def run(folder: Path, target: Path, limit: int | None = None) -> None:
    """Prepack `folder`, an artifact or a fetched bundle's content, in `target`; print what it takes, and compare.

    Of an artifact, what a bundle would carry is made first. `limit`: bytes of codes in one of its slices.

    Raises:
        BundleError: a file is missing or refused.
        ResourceError: the disk has too little room.
        EvaluationError: the two ways do not write the same tokens.
    """
    from pipeline.prepack import make
    from pipeline.prepack.device import PREPACK_FILE, PREPACKED
    from pipeline.prepack.emulator import HERE
    from pipeline.prepack.slices import LIMIT
    from pipeline.runtime.speed import watch

    make.graph_name(folder)
    target.mkdir(parents=True, exist_ok=True)
    make.link_model(folder, target)
    if not (folder / PREPACK_FILE).exists():
        make.prepare(target, limit or LIMIT)
        work = make.add_classes(target, [HERE])
        print(f"{target}: {len(work.slices)} slices; kernel class {', '.join(work.classes)!r}", flush=True)
    here = str(target.resolve())
    said, looks = watch([sys.executable, "-m", "pipeline.prepack.device", here], f"{target}: prepacking")
    outcome = json.loads(said)
    if not outcome["kernels"]:
        print(f"not prepacked: {outcome['why']}. {outcome['graph']} loads as ever, its weights in private memory.")
        return
    peak, disk = (
        max(look.private for look in looks),
        sum(file.stat().st_size for file in (target / PREPACKED).iterdir()),
    )
    print(f"prepacked in {outcome['seconds']:.1f} s, {peak:,} bytes private at the peak; {disk:,} bytes on disk")
    ways: list[Way] = []
    for name, graph in (("private", make.graph_name(target)), ("mapped", outcome["graph"])):
        task = json.dumps({"folder": here, "graph": graph, "new_tokens": NEW_TOKENS})
        said, looks = watch([sys.executable, "-m", "pipeline.prepack.check", task], f"{target}: {graph}")
        ways.append(Way(**json.loads(said)))
        print(f"{name}: {ways[-1].describe()}; at the peak {max(look.private for look in looks):,} private", flush=True)
    compare(*ways)
    print(f"{len(ways[0].tokens)} greedy tokens are equal")


def compare(private: Way, mapped: Way) -> None:
    """Raise EvaluationError unless both wrote the same tokens."""
    if private.tokens == mapped.tokens:
        return
    pairs = list(zip(private.tokens, mapped.tokens, strict=True))
    at = next(number for number, (one, other) in enumerate(pairs) if one != other)
    raise EvaluationError(
        f"mapped weights write other tokens than private ones, from token {at} of {len(pairs)} on: {mapped.tokens[at]} "
        f"in place of {private.tokens[at]}. Do not map: this ONNX Runtime saves packed bytes otherwise than "
        f"pipeline/prepack/device.py describes."
    )


if __name__ == "__main__":
    print(json.dumps(asdict(observe(**json.loads(sys.argv[1])))))
