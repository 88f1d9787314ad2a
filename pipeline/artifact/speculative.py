"""What an artifact has for speculative decoding: a verifying graph, settings, and a model's multi-token head.

The verifying graph reads the same data as the decoder's, and the head reads its embedding and output projection there:
a download grows by two graphs and the head's own matrices.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from pipeline.artifact.graph import QuantizedGraph
from pipeline.artifact.layout import Layout, Place, make_layout
from pipeline.artifact.quantizers import evenly
from pipeline.artifact.write import Draft, write_artifact
from pipeline.checkpoint.architecture import Architecture, MtpHead
from pipeline.checkpoint.tensors import Checkpoint, TensorRef
from pipeline.config.recipes import Recipe, Speculative
from pipeline.errors import PlanError
from pipeline.files import write_bytes, write_json
from pipeline.graph.speculative import MTP_FILE, build_mtp, mtp_settings, ngram_settings, verifying
from pipeline.partial import Partial
from pipeline.planning.memory import speculative_memory
from pipeline.planning.recipes import MtpPlan, plan_mtp

SETTINGS_FILE = "speculative.json"


@dataclass(frozen=True)
class Speculation:
    """The files before they are written.

    Attributes:
        verifying: the decoder's graph that judges every token, and `name`, its file.
        head: the multi-token head, if it drafts; else n-grams do.
        settings: what `SETTINGS_FILE` holds: under `ngram` or `mtp`, what is laid over genai_config.json.
        memory: private bytes that it adds on a phone.
    """

    verifying: onnx.ModelProto
    name: str
    head: Draft | None
    settings: dict[str, Any]
    memory: int

    @property
    def bytes(self) -> int:
        """Bytes of the graphs and of the head's data."""
        return self.verifying.ByteSize() + (self.head.bytes if self.head else 0)

    @property
    def files(self) -> tuple[str, ...]:
        """Names of the files that `bytes` counts."""
        return (self.name, *(self.head.files if self.head else ()))

    def record(self) -> dict[str, Any]:
        """For plan.json."""
        tensors = self.head.plan.body if self.head else ()
        return {
            "drafts": next(iter(self.settings)),
            "bytes": self.bytes,
            "memory": self.memory,
            "tensors": {item.matrix.name: {"format": item.formats, "bytes": item.bytes} for item in tensors},
        }

    def write(self, partial: Partial, folder: Path, export: Path, recipe: Recipe) -> None:
        """Write them beside the decoder's in `partial.folder`; `folder` holds the checkpoint.

        Raises as `write_artifact`.
        """
        if self.head:
            search = evenly(self.head.plan)
            write_artifact(partial, self.head, Checkpoint(folder), export, search, lost_max=recipe.lost_max)
        write_bytes(partial.folder / self.name, self.verifying.SerializeToString(deterministic=True))
        write_json(partial.folder / SETTINGS_FILE, self.settings)


def speculation(
    chosen: Speculative, drafted: Draft, architecture: Architecture, context: int, export: Path, part_bytes: int
) -> Speculation:
    """What a recipe's `speculative` adds to a drafted artifact. `context`, in tokens, counts for memory.

    Raises PlanError for a head that the model lacks, or that its decoder's rotation excludes.
    """
    name, graph = f"{drafted.stem}.verify.onnx", verifying(drafted.model, architecture)
    if chosen.head is None:
        settings = {"ngram": ngram_settings(name, chosen.tokens, chosen.ngram)}
        return Speculation(graph, name, None, settings, speculative_memory(drafted.plan, architecture, context, None))
    head, source = _head(architecture, drafted, export)
    plan = plan_mtp(head, drafted.plan, chosen.head)
    head_draft = _draft(source, plan, drafted, part_bytes)
    settings = {"mtp": mtp_settings(name, head_draft.model_file, architecture, chosen.tokens)}
    return Speculation(graph, name, head_draft, settings, speculative_memory(drafted.plan, architecture, context, plan))


def _head(architecture: Architecture, decoder: Draft, export: Path) -> tuple[MtpHead, onnx.ModelProto]:
    """The model's head, and its exported graph, or before an export one without places."""
    head, exported = architecture.mtp, export / MTP_FILE
    if head is None or (export.exists() and not exported.exists()):
        raise PlanError(
            f"`speculative: head` needs a multi-token head, and this model of family {architecture.family!r} has "
            f"none: its export wrote no {MTP_FILE}. Leave `head` out, and n-grams of the text are drafted."
        )
    if exported.exists():
        return head, onnx.load(exported, load_external_data=False)
    shapes = head.expected_tensors()
    references = {name: TensorRef(name, "BF16", shape, "", 0, 0) for name, shape in shapes.items()}
    positions = next(tensor.dims[0] for tensor in decoder.model.graph.initializer if tensor.name == "cos_cache")
    return head, build_mtp(head, references, positions)


def _draft(source: onnx.ModelProto, plan: MtpPlan, decoder: Draft, part_bytes: int) -> Draft:
    """Lay the head out: its own tensors in files of its own, what it shares where the decoder has it."""
    graph, stem = QuantizedGraph(source, plan), f"{decoder.stem}.mtp"
    shared = decoder.layout.places
    own = make_layout(((name, item.bytes) for name, item in graph.stored.items() if name not in shared), part_bytes)
    parts = [f"{stem}.data.{number}" for number in range(len(own.parts))]
    moved = {name: Place(place.part + len(parts), place.offset, place.length) for name, place in shared.items()}
    both = Layout(moved | own.places, (*own.parts, *decoder.layout.parts))
    return Draft(plan, graph.place(both, [*parts, *decoder.files[1:]]), own, stem, (f"{stem}.onnx", *parts))
