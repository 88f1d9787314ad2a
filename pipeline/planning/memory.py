"""What a model takes in a phone's memory, from shapes alone: the figures that a memory budget is checked against.

Private bytes, which no file backs and which count against an app: weights as the kernels keep them, the KV cache,
activations. Mapped files come on top only where there is room for them.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import asdict, dataclass

from pipeline.checkpoint.architecture import Architecture
from pipeline.config.phones import PREFILL_CHUNKS
from pipeline.config.recipes import KvCache
from pipeline.graph.decoder import activation_bytes
from pipeline.graph.speculative import CHUNK
from pipeline.planning.recipes import MtpPlan, Plan, PlannedMatrix, cache_of

_JUDGED = 10  # bytes of a logit in a verifying graph besides: its difference in float32 and float16, and widened again


def weight_memory(planned: PlannedMatrix) -> int:
    """Private bytes of a matrix after loading: packed for its product, and its scales, which the runtime widens to
    float32 once for every plane and keeps. Codes stay in the mapped file: a table is looked up there.

    MiMo's q4, packed and saved, has 5,163,351,892 bytes (benchmarks/README.md); this counts 5,163 million.
    """
    scales = sum(len(piece.format.planes) * piece.columns // piece.format.block for piece in planned.pieces)
    return packed_memory(planned) + 4 * planned.matrix.rows * scales


def packed_memory(planned: PlannedMatrix) -> int:
    """Bytes of a matrix as its product reads them; 0 for an embedding, of which a token reads one row."""
    if planned.matrix.role == "embedding":
        return 0
    return sum(piece.format.packed_bytes(planned.matrix.rows * piece.columns) for piece in planned.pieces)


@dataclass(frozen=True)
class Memory:
    """Private bytes at the peak of use: `weights` as loaded, `cache` of keys and values at the context, `activations`
    of a chunk of prefill with its last token's logits, of which `prompt_token` for each token of the chunk, `loading`
    what packing holds twice for a moment."""

    weights: int
    cache: int
    activations: int
    prompt_token: int
    loading: int

    @property
    def peak(self) -> int:
        """The larger of loading and of use."""
        return self.weights + max(self.cache + self.activations, self.loading)

    def record(self) -> dict[str, int]:
        """For the plan file."""
        return asdict(self) | {"peak": self.peak}


def plan_memory(plan: Plan, architecture: Architecture, context: int) -> Memory:
    """`context` in tokens."""
    weights = sum(map(weight_memory, plan.tables))
    used = use_memory(architecture, context, plan.cache.type, plan.head.pieces[0].format.results)
    packed = Counter[str]()  # of what a kernel packs at once: a matrix, or all experts of a layer
    for item in plan.tables:
        packed[item.matrix.name if item.matrix.expert is None else item.matrix.choice] += item.bytes
    return Memory(weights, *used, max(packed.values()))


def speculative_memory(plan: Plan, architecture: Architecture, context: int, mtp: MtpPlan | None) -> int:
    """Private bytes that speculative decoding adds: logits of every token of a chunk, less what shorter chunks save;
    and a head's weights as loaded, with a copy of the tables that it shares, and its cache. `context` in tokens."""
    head = plan.head
    rows = CHUNK * head.matrix.rows * (4 * head.pieces[0].format.results + _JUDGED)
    saved = activation_bytes(architecture, max(0, min(PREFILL_CHUNKS[0], context) - CHUNK))
    own = 0 if mtp is None else sum(map(weight_memory, (*mtp.body, *plan.tables_alone))) + mtp.cache.bytes * context
    return max(0, rows - saved) + own


def use_memory(
    architecture: Architecture, context: int, kv_cache: KvCache = "float32", results: int = 3
) -> tuple[int, int, int]:
    """Bytes of the KV cache at `context` tokens, of the activations of a chunk of prefill with its last token's logits,
    and of these for each token of the chunk.

    The head's format holds `results` times the logits; three, of two products and their sum, is the most.
    """
    cache = cache_of(architecture, kv_cache).bytes * context
    tokens, logits = min(PREFILL_CHUNKS[0], context), 4 * architecture.vocab * results
    return cache, activation_bytes(architecture, tokens) + logits, activation_bytes(architecture, 1)
