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

from benchmarks.quality import measure, ours, peers_llama, peers_onnx, simulated, targets
from benchmarks.quality.cache import Cache
from benchmarks.quality.measure import Measured, OnnxFile, Runtime, Text, excess
from benchmarks.quality.ours import Written
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


class Bench:
    """The rows of one subject, as they are measured.

    Args:
        timed: whether decoding speed is measured too.
        report: is told of every row.
    """

    def __init__(self, prepared: Prepared, timed: bool, report: Callable[[str], None]):
        self.prepared, self.timed, self.report = prepared, timed, report
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

    def _reference(self) -> tuple[Text, float]:
        """The recorded reference, and its perplexity."""
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
        """Measure everything."""
        for peer in (*peers_llama.peers(), *peers_onnx.peers(), *simulated.peers()):
            self._attempt(peer.tool, peer.name, lambda peer=peer: self._peer(peer))
        for name, recipe in ours.recipes(self.prepared).items():
            self._attempt("ours", name, lambda name=name, recipe=recipe: self._ours(self._write(name, recipe)))
        self._attempt("ours", "budgets", self._budgets)
        if ours.CONTROLLED in self._kl and ours.CONTROL in self._kl:
            mine, control = self._kl[ours.CONTROLLED], self._kl[ours.CONTROL]
            gap = excess(mine, control, self._windows, targets.NEAREST_SHARE)
            self._row(ours.CONTROLLED)["control"] = {"name": ours.CONTROL, "gap": gap}

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

            def score() -> Measured:
                found = alone(runtime.score, folder(), self.text)
                return Measured({**runtime.size(folder()), **found.figures}, found.kl)

            def speed() -> Measured:
                return Measured(alone(runtime.speed, folder()), np.empty(0))

            found = self.cache.get({"file": file, "text": self._text_key}, score)
            if not self.timed:
                return found
            rates = self.cache.get({"file": file, "speed": _code(_TIMING)}, speed)
            return Measured({**found.figures, **rates.figures}, found.kl)

    # --- ours

    def _write(self, name: str, recipe: Mapping[str, Any]) -> Written:
        return ours.write(self.prepared, name, recipe)

    def _ours(self, written: Written) -> None:
        found = self._measured(dict(written.sha256), OnnxFile(), lambda: nullcontext(written.folder))
        self._add({"tool": "ours", "name": written.variant, "body_bits": written.body_bits}, found)

    def _budgets(self) -> None:
        peers = [row for row in self.rows if row["tool"] not in {"ours", "simulated"}]
        peers = [row for row in peers if row["name"] != peers_llama.SOURCE]
        used = set()
        for size, written in ours.budgets(self.prepared, (row["bytes"] for row in peers)):
            if written.variant not in self._kl:
                self._ours(written)
            row = self._row(written.variant)
            for peer in (peer for peer in peers if peer["bytes"] == size):
                gap = excess(self._kl[written.variant], self._kl[peer["name"]], self._windows)
                row.setdefault("beside", {})[peer["name"]] = gap
            used.add(written.variant)
        self._drop_budgets(used)

    def _drop_budgets(self, used: set[str]) -> None:
        """Remove what budgets of earlier runs wrote."""
        for folder in self.prepared.project.artifact(self.prepared.subject.model, "").glob("budget_*"):
            if folder.name not in used:
                shutil.rmtree(folder)

    # --- rows

    def _add(self, row: Row, found: Measured) -> None:
        bits = 8 * found.figures["bytes"] / self.prepared.architecture.parameters
        self.rows.append({**row, "bits_per_weight": bits, **found.figures})
        self._kl[row["name"]] = found.kl
        self.report(f"{row['tool']} {row['name']}: {found.figures['bytes']:,} bytes, KL {found.figures['kl_mean']:.4f}")

    def _row(self, name: str) -> Row:
        return next(row for row in self.rows if row["name"] == name)

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
            "targets": targets.evaluate(self.rows),
        }


def _code(modules: tuple[str, ...]) -> str:
    return keys.digest([digest_of([Path(measure.__file__)]), keys.code(*modules)])
