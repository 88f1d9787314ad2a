"""All files of one subject: made, measured, compared."""

from __future__ import annotations

import hashlib
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.project import SMALL
from benchmarks.quality import measure, ours, peers_llama, peers_onnx, sizes, targets
from benchmarks.quality.cache import Cache
from benchmarks.quality.compare import KINDS, excess
from benchmarks.quality.measure import Measured, OnnxFile, Runtime, Text
from benchmarks.quality.ours import By, Written
from benchmarks.quality.peer import Peer
from benchmarks.quality.subjects import Prepared, digest_of
from benchmarks.searches import alone
from pipeline import keys
from pipeline.checkpoint.blobs import Store
from pipeline.errors import PipelineError
from pipeline.files import atomic_directory, read_json, scratch_directory, write_json
from pipeline.tasks.held_out import scored_ids

Row = dict[str, Any]
Opened = Callable[[], AbstractContextManager[Path]]
_SCORING = ("pipeline.tasks.divergence_scores", "pipeline.runtime.session", "pipeline.tasks.statistics")
_TIMING = ("pipeline.runtime.speed",)
_SIZING = ("pipeline.quantize.formats",)
BRIEF = {
    SMALL: (
        peers_llama.SOURCE, "Q4_K_M, imatrix", "Q3_K_M, imatrix", "int4 (default, block 32 sym)",
        "int4 k_quant_mixed, block 32",
    ),
}  # fmt: skip
"""Subjects with few rows: the peers' files that are enough there. llama.cpp's formats fall back on SmolLM2's width."""


class Bench:
    """The rows of one subject, as they are measured.

    Args:
        timed: whether decoding speed is measured too.
        report: is told of every row.
    """

    def __init__(self, prepared: Prepared, timed: bool, report: Callable[[str], None]):
        self.prepared, self.timed, self.report = prepared, timed, report
        self.brief = BRIEF.get(prepared.subject.model)
        self.cache = Cache(prepared.project.work / "measured")
        self.rows: list[Row] = []
        self.missing: dict[str, str] = {}
        self._kl: dict[str, np.ndarray] = {}
        self._windows = scored_ids(
            measure.TEXT.by_kind, measure.TEXT.window, prepared.reference, Store(prepared.project.store)
        )
        self._text_key = self._text_identity()
        self.text, self.perplexity = self._reference()

    def _text_identity(self) -> dict[str, Any]:
        return {
            "windows": [hashlib.sha256(ids.tobytes()).hexdigest() for ids in self._windows],
            "model": self.prepared.identity,
            "code": _code(_SCORING),
        }

    def _reference(self) -> tuple[Text, dict[str, float]]:
        """The recorded reference, and its perplexity by kind of text."""
        folder = self.prepared.project.work / "recorded" / self.prepared.subject.model
        vocab = self.prepared.architecture.vocab
        stamp = folder / "made_from.json"
        if not stamp.exists() or read_json(stamp)["inputs"] != self._text_key:
            with atomic_directory(folder) as made:
                graph = self.prepared.reference / measure.REFERENCE_GRAPH
                perplexity = alone(measure.record_reference, graph, self._windows, made)
                write_json(made / stamp.name, {"inputs": self._text_key, "perplexity": perplexity})
        return Text(self._windows, folder, vocab), read_json(stamp)["perplexity"]

    def run(self) -> None:
        """Measure everything, then set ours beside each peer's."""
        for peer in (*peers_llama.peers(), *peers_onnx.peers()):
            if self.brief is None or peer.name in self.brief:
                self._attempt(peer.tool, peer.name, lambda peer=peer: self._peer(peer))
        for name, recipe in ours.recipes(self.prepared).items():
            if self.brief is not None and "learn" in recipe:
                continue  # it takes minutes
            self._attempt("ours", name, lambda name=name, recipe=recipe: self._ours(self._write(name, recipe)))
        for by in ours.SIZES if self.brief is None else ():
            self._attempt("ours", f"budgets by {by}", lambda by=by: self._budgets(by))
        for row in self.rows:
            if row["tool"] != "ours":
                row["ours"] = {by: self._beside(row, by) for by in ours.SIZES}

    def _attempt(self, tool: str, name: str, work: Callable[[], None]) -> None:
        """Do it, or note why there is no such row: not installed, refused, or its process died."""
        try:
            work()
        except (ImportError, RuntimeError, ValueError, PipelineError) as error:
            self.missing[f"{tool} {name}"] = f"{type(error).__name__}: {str(error).splitlines()[0][:200]}"
            self.report(f"{tool} {name}: missing ({self.missing[f'{tool} {name}']})")

    # --- peers

    def _peer(self, peer: Peer) -> None:
        @contextmanager
        def made() -> Iterator[Path]:
            with scratch_directory(self.prepared.project.work / "peer") as folder:
                alone(peer.make, self.prepared, peer.options, folder)
                yield folder

        found = self._measured(peer.key(self.prepared), peer.runtime, made)
        self._add({"tool": peer.tool, "name": peer.name}, found)

    def _measured(self, file: Mapping[str, Any], runtime: Runtime, opened: Opened) -> Measured:
        """What is kept of the file that `file` identifies; it is made and opened only if something is missing."""
        with ExitStack() as stack:
            folder = cache(lambda: stack.enter_context(opened()))

            def kept(what: str, key: Any, measure: Callable[[], Measured]) -> Measured:
                return self.cache.get({"file": file, what: key}, measure)

            def figures(measure: Callable[[Path], dict[str, Any]]) -> Measured:
                return Measured(alone(measure, folder()), np.empty(0))

            found = kept("text", self._text_key, lambda: alone(runtime.score, folder(), self.text))
            size = kept("size", _code(_SIZING, sizes.__file__), lambda: figures(runtime.size))
            rates = (
                kept("speed", _code(_TIMING), lambda: figures(runtime.speed)) if self.timed else Measured({}, found.kl)
            )
            return Measured({**size.figures, **found.figures, **rates.figures}, found.kl)

    # --- ours

    def _write(self, name: str, recipe: Mapping[str, Any]) -> Written:
        return ours.write(self.prepared, name, recipe)

    def _ours(self, written: Written) -> None:
        found = self._measured(dict(written.sha256), OnnxFile(), lambda: nullcontext(written.folder))
        self._add({"tool": "ours", "name": written.variant, "body_bits": written.body_bits}, found)

    def _budgets(self, by: By) -> None:
        """Plans solved at the size of every file that a target names."""
        named = [row for row in self.rows if any(target.by == by and target.peers(row) for target in targets.TARGETS)]
        used = set()
        for written in ours.budgets(self.prepared, by, (row[by] for row in named)):
            self._ours(written)
            used.add(written.variant)
        for folder in self.prepared.project.artifact(self.prepared.subject.model, "").glob(f"{by}_*"):
            if folder.name not in used:  # of an earlier run
                shutil.rmtree(folder)

    def _beside(self, peer: Row, by: By) -> dict[str, Any] | None:
        """The best of our files that is no larger than a peer's, and what it loses beyond that, in all and by kind."""
        best = targets.best_within(self.rows, by, peer[by])
        if best is None:
            return None
        kinds = {kind: self._excess(best["name"], peer["name"], kind=kind) for kind in dict.fromkeys(KINDS)}
        return {"name": best["name"], **self._excess(best["name"], peer["name"]), "kinds": kinds}

    def _excess(self, own: str, peer: str, factor: float = 1.0, kind: str | None = None) -> dict[str, float]:
        return excess(self._kl[own], self._kl[peer], factor, kind)

    # --- rows

    def _add(self, row: Row, found: Measured) -> None:
        bits = 8 * found.figures["bytes"] / self.prepared.architecture.parameters
        self.rows.append({**row, "bits_per_weight": bits, **found.figures})
        self._kl[row["name"]] = found.kl
        self.report(f"{row['tool']} {row['name']}: {found.figures['bytes']:,} bytes, KL {found.figures['kl_mean']:.4f}")

    def record(self) -> dict[str, Any]:
        """The subject's part of the results."""
        subject = self.prepared.subject
        return {
            "model": subject.model,
            "title": subject.title,
            "note": subject.note,
            "parameters": self.prepared.architecture.parameters,
            "reference_perplexity": self.perplexity,
            "rows": self.rows,
            "missing": self.missing,
            "brief": self.brief is not None,
            "targets": [] if self.brief else targets.evaluate(self.rows, self._excess),
        }


def _code(modules: tuple[str, ...], file: str = measure.__file__) -> str:
    return keys.digest([digest_of([Path(file)]), keys.code(*modules)])
