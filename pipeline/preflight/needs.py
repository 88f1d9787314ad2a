"""What a stage takes in memory, disk and time, from shapes alone: arithmetic that knows no machine and reads no file.

Memory is private memory (bytes that no file backs). Mapped weights come on top where the kernel has room for them and
cost only speed where it has not. Times are estimates from one measured rate; constants say where they come from.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from pipeline.artifact.quantizers import WEIGHTS_PER_CORE_SECOND
from pipeline.artifact.work import TABLE_UNITS, UNIT_BYTES
from pipeline.calibrate.correlations import stored_bytes
from pipeline.calibrate.damage import BATCH_TOKENS, HEAD_COPIES, UNIT_TOKENS, damaged_together
from pipeline.checkpoint.architecture import Architecture, Matrix
from pipeline.config.calibration import CalibrationConfig, SensitivityConfig
from pipeline.config.models import ModelConfig
from pipeline.config.recipes import UNROTATED, Learning, Rotation
from pipeline.graph.decoder import activation_bytes
from pipeline.preflight.rounds import Round, Units, Workers, here, on
from pipeline.runtime import stream
from pipeline.runtime.session import memory_needed, widened_bytes
from pipeline.runtime.side_by_side import fitting_texts, most_threads, token_bytes, working_bytes
from pipeline.tasks.mmlu import EXAMPLES
from pipeline.tasks.registry import Suite
from pipeline.tasks.task import Cost, Task

PROCESS_BYTES = 250_000_000
"""A stage before any model: 70 MB of interpreter and libraries, measured; kernels, text, the allocator's slack."""
TOKENIZER_BYTES = 900_000_000
"""A stage that proves a tokenizer: 710 MB measured with Qwen's 151,643 tokens, 340 of them transformers itself."""
MEASURING_BYTES = 700_000_000
"""The same where tasks run: their data, tokenizers and results, and what two runtimes keep (a rehearsal of MiMo)."""
QUANTIZE_BYTES = 300_000_000
"""The whole quantize stage but for GPTQ's statistics: its peak of 217 MB at Phi-4's shapes (q3), and a third more."""
EXPORTER_BYTES = 16
"""Peak bytes of Optimum's export for each float32 parameter, measured on 507 million."""
PREPACKED = 1.18
"""Private bytes per byte of MatMulNBits data after loading (1.0 GB of it, ONNX Runtime 1.31, x86-64)."""
TORCH_BYTES = 400_000_000
"""Torch once it has multiplied."""
LEARNING_LOGITS = 6
"""Of a window the full-precision model's, the variant's, their logarithms and gradients."""
WIDENED_PER_SECOND = 0.08e9
"""Half-precision weights read, widened and packed by the runtime per second, on one core (a layer of MiMo's shapes)."""
ADDED_PER_SECOND, PACKED_PER_SECOND, WRITTEN_PER_SECOND = 12e9, 320e6, 380e6
"""On one core, of 11,008 channels: bytes of a batch's products that are added; of correlations that are mirrored and
packed, and that are hashed and written."""
PASS_TOKENS = 64
"""What a pass of `pipeline.runtime.side_by_side` takes beside its texts' products, in tokens of such products: every
weight is widened, and read as float32 by a product of few rows (20 seconds of a core with MiMo's shapes)."""
READ_PER_SECOND = 0.6e9
"""Bytes of weights that come from the disk, where memory does not keep them."""
DECODE_COST = 1.5
"""A decoded token in tokens of prefill (q4 with MiMo's shapes: 5.9 tokens/s where the product rate promises 8.6)."""
GPTQ_SECONDS, GPTQ_COLUMN_SECONDS = 363e-9, 0.0865e-9
"""Of a weight on one core: on no more than that core, and in products, for each column of its matrix. A line through
what whole stages took: SmolLM2's q4 434 ns (816 columns in the mean; docs/scale.md), and 870 ns for MiMo's second layer
(5,854; CPU seconds of three variants, the factors taken off, benchmarks/results/rehearsal-mimo-8b-*layers.json)."""
FACTOR_RATE = 0.6
"""Share of the rate of products at which a core factors second moments (8,192 channels)."""
LOGIT_COPIES = 3
"""Of a variant's logits the runtime holds so many at once: a head of 6 bits is two products and their sum."""
SMALL_FILES_BYTES = 32 << 20
"""Graph, tokenizer, configuration, JSON."""
START_SECONDS, LAYER_SECONDS, TASK_SECONDS = 13.0, 0.6, 4.0
"""Beside its work, of a stage that measures or computes: process, guard, texts, tokenizer, DVC's own; of each layer
that it passes: graph, files, hashes; of each task: model, data, tokenizer. What the demo's stages took on 2 cores
beyond their products: 11 s `quantize`, 15 s `calibrate` and 0.6 s each of its layers, 24 s 5 tasks of `validate`."""
ENGINE_SECONDS = 10.0
"""Until Ray's workers have begun: assumed, not measured."""


@dataclass(frozen=True)
class Writing:
    """What a task's texts take at most where the model runs layer by layer.

    Attributes:
        title: of the task.
        texts: that run side by side.
        passes: over all weights, one for each token of those.
        read: bytes of weights that all passes read, from memory where they stay there.
        memory: bytes beside the process's own.
    """

    title: str
    texts: int
    passes: int
    read: int
    memory: int
    seconds: float


@dataclass(frozen=True)
class Needs:
    """What one stage takes.

    Attributes:
        memory: bytes of private memory at its peak, all its processes together.
        disk: bytes it writes on the file system of `artifacts/`.
        why: what the figures are made of, for people.
        variant: None for a stage that runs once per model.
        seconds: of its work on this machine's cores, estimated; not a number where only the network, or nothing
            measured, could tell.
        store_disk: bytes it writes on the file system of the store.
        scratch: whether what it writes is gone when it ends.
        writing: texts that it writes layer by layer, task by task.
        work: what `seconds` are made of; empty where they are not a number.
        fixed: seconds on top, whatever the work.
    """

    stage: str
    memory: int
    disk: int
    why: str
    variant: str | None = None
    seconds: float = math.nan
    store_disk: int = 0
    scratch: bool = False
    writing: tuple[Writing, ...] = ()
    work: tuple[Round, ...] = ()
    fixed: float = START_SECONDS

    def expected(self, workers: Workers | None = None) -> float:
        """Seconds of the whole stage: on this machine's cores, or with workers elsewhere."""
        if workers is None or not self.spread:
            return self.fixed + self.seconds
        return self.fixed + ENGINE_SECONDS + on(self.work, workers)

    @property
    def spread(self) -> bool:
        """Whether workers elsewhere do some of it."""
        return any(one.units for one in self.work)


@dataclass(frozen=True)
class Rates:
    """What times are estimated from: float32 operations per second in products on all cores, and the cores."""

    flops: float
    cores: int

    @property
    def of_core(self) -> float:
        """Operations per second of one core."""
        return self.flops / self.cores

    def of(self, cores: int) -> Rates:
        """Those of so many such cores."""
        return Rates(self.of_core * cores, cores)


UNMEASURED = Rates(math.nan, 1)
"""Times that are estimated from it are not numbers."""


def download(missing_bytes: int, copied_bytes: int) -> Needs:
    """Fetch `missing_bytes` into the store; `copied_bytes`: the weights again where no hard link reaches, else 0."""
    why = "what the store lacks of the checkpoint" + ", and a copy: store and artifacts lie apart" * bool(copied_bytes)
    return Needs("download", TOKENIZER_BYTES, copied_bytes + SMALL_FILES_BYTES, why, store_disk=missing_bytes)


def export(architecture: Architecture, context: int) -> Needs:
    """The graph and its rotary tables (cos and sin, twice for LongRoPE); no weight is read."""
    tables = 2 if architecture.rope.long_factor else 1
    rope = tables * 2 * context * (architecture.rope.dims // 2) * 4
    return Needs("export", TOKENIZER_BYTES + rope, rope + SMALL_FILES_BYTES, "graph, rotary tables, tokenizer")


def calibrate(architecture: Architecture, calibration: CalibrationConfig, rates: Rates = UNMEASURED) -> Needs:
    """The text run through the model layer by layer (`pipeline.runtime.stream`): one layer's weights in float32."""
    window, tokens = calibration.window, calibration.grown(architecture.widest).tokens
    widths, body = _input_widths(architecture), _body_weights(architecture)
    seen = {matrix.input: _share(architecture, matrix) * matrix.columns for matrix in architecture.body(0)}
    products, stored = sum(4 * columns**2 for columns in widths), sum(map(stored_bytes, widths))
    batch = min(tokens, window * -(-stream.batch_tokens(architecture) // window))
    batches = -(-tokens // batch)
    woken = sum(matrix.rows * seen[matrix.input] for matrix in architecture.body(0))
    # Half of each Σ x·xᵀ is multiplied and added; dampings are tried side by side, of enough tokens.
    summed = sum(share * columns for share, columns in zip(seen.values(), widths, strict=True))
    tried = [columns for columns in widths if columns <= tokens]
    units = [
        Units(
            1,
            first=_factor_seconds([columns] * (columns <= tokens), rates) + stored_bytes(columns) / PACKED_PER_SECOND,
            moved=4 * columns**2 + stored_bytes(columns),
        )
        for columns in sorted(widths, reverse=True)
    ]
    passing = (2 * woken + summed) * tokens / rates.of_core
    moved = 8 * architecture.hidden * tokens / batches + products / 2
    units.append(Units(batches, passing / batches, moved=moved))
    alone = batches * products / 2 / ADDED_PER_SECOND + stored / WRITTEN_PER_SECOND
    alone += body / architecture.layers / WIDENED_PER_SECOND
    work = (Round(tuple(units), alone, times=architecture.layers),)
    taken = 4 * batch * (sum(seen.values()) + 2 * architecture.hidden) + (rates.cores + 1) * stream.PANEL_BYTES
    return Needs(
        "calibrate",
        PROCESS_BYTES
        + products
        + round(4 * stream.SAMPLE_TOKENS * sum(seen.values()))
        + max(round(taken) + _layer_bytes(architecture, window), stored + 8 * max(tried, default=0) ** 2),
        2 * 4 * tokens * architecture.hidden + architecture.layers * stored + SMALL_FILES_BYTES,
        f"its inputs' second moments; one layer in float32 and the inputs of {batch:,} tokens, or correlations; hidden "
        f"states of {tokens:,} tokens",
        seconds=here(work, rates.cores),
        work=work,
        fixed=START_SECONDS + architecture.layers * LAYER_SECONDS,
    )


def sensitivity(architecture: Architecture, wanted: SensitivityConfig, rates: Rates = UNMEASURED) -> Needs:
    """One layer in float32, and on each core a quantized matrix of it and the activations of a batch of copies.

    There is a copy for every matrix, and one for a layer's experts; their hidden states are held before a layer and
    after it.
    """
    damaged = damaged_together(architecture.body(0)).values()
    sizes = [sum(matrix.rows * matrix.columns for matrix in together) for together in damaged]
    tokens = wanted.tokens
    copies = 2 + architecture.layers * len(damaged)
    states = 4 * copies * tokens * architecture.hidden
    head = 2 * 4 * (1 + HEAD_COPIES) * tokens * architecture.hidden
    activations = rates.cores * max(activation_bytes(architecture, max(wanted.window, BATCH_TOKENS)), head)
    hurt = 4 * sum(sorted(sizes)[-rates.cores :])
    matrices, passed = len(architecture.matrices), tokens * copies / 2
    batches, heads = math.ceil(passed / UNIT_TOKENS), math.ceil(copies / HEAD_COPIES)
    layer, top = (_multiplied(architecture, some) for some in (architecture.body(0), [architecture.head]))
    units = Units(
        batches, 2 * layer * passed / batches / rates.of_core, moved=8 * architecture.hidden * passed / batches
    )
    ends = Units(heads, 2 * top * (1 + HEAD_COPIES) * tokens / rates.of_core, moved=states / heads)
    errors = Units(matrices, narrow=architecture.parameters / WEIGHTS_PER_CORE_SECOND["weighted"] / matrices)
    work = (
        Round((units,), architecture.parameters / WIDENED_PER_SECOND / architecture.layers, times=architecture.layers),
        Round((ends,)),
        Round((errors,)),
    )
    return Needs(
        "sensitivity",
        PROCESS_BYTES + 4 * sum(sizes) + hurt + activations + 2 * states,
        2 * states + SMALL_FILES_BYTES,
        f"one layer in float32 and hidden states of {copies:,} copies of {tokens:,} tokens, twice",
        seconds=here(work, rates.cores),
        scratch=True,
        work=work,
        fixed=START_SECONDS + architecture.layers * LAYER_SECONDS,
    )


def parity(parameters: int, weight_bytes: int) -> Needs:
    """Optimum's export of the part that is compared: `parameters`, `weight_bytes` of float32 or half precision.

    Its export lies on the disk twice while the exporter gathers it into one file.
    """
    return Needs(
        "parity",
        PROCESS_BYTES + max(EXPORTER_BYTES * parameters, widened_bytes(weight_bytes, parameters)),
        2 * 4 * parameters + SMALL_FILES_BYTES,
        f"Optimum's float32 export of {parameters:,} parameters, {EXPORTER_BYTES} bytes each at its peak",
        scratch=True,
    )


def learn(
    variant: str, size: int, architecture: Architecture, wanted: Learning, window: int, rates: Rates = UNMEASURED
) -> Needs:
    """Scales and norms of an artifact of `size` bytes trained on the CPU, a window at a time; both models' weights stay
    mapped.

    Products of a token: the full-precision model's, the variant's, and two for its gradients.
    """
    widths = 12 * architecture.hidden + 6 * architecture.intermediate
    kept = 4 * window * (architecture.layers * widths + LEARNING_LOGITS * architecture.vocab)
    widest = 3 * 4 * architecture.vocab * architecture.hidden
    values = architecture.parameters // 32
    tokens = wanted.steps * max(wanted.tokens, window)
    seconds = _product_seconds(architecture, 4 * tokens, rates)
    return Needs(
        "learn",
        PROCESS_BYTES + TORCH_BYTES + kept + widest + 6 * 4 * values,
        2 * size + SMALL_FILES_BYTES,
        f"activations of all layers and logits of {window:,} tokens, the head three times, what training keeps",
        variant,
        seconds,
        work=(Round(alone=seconds / wanted.steps, times=wanted.steps),),
    )


def quantize(
    variant: str, size: int, architecture: Architecture, search: str, rates: Rates = UNMEASURED,
    rotation: Rotation = UNROTATED,
) -> Needs:  # fmt: skip
    """A recipe applied: `size` is the plan's exact bytes.

    GPTQ holds the widest input's second moments as they were read, in the plan's order, and as a factor. Where the
    residual is one run, a matrix that writes to it is held whole. Elsewhere, matrices of one input are a unit.
    """
    searched = 1 / WEIGHTS_PER_CORE_SECOND["weighted" if search == "gptq" else search] + 0 * rates.flops
    inputs: dict[str, list[Matrix]] = {}
    for matrix in architecture.body(0):
        inputs.setdefault(matrix.input, []).append(matrix)
    layer = []
    for sharing in inputs.values():
        weights, columns = sum(matrix.rows * matrix.columns for matrix in sharing), sharing[0].columns
        wide, narrow, first = 0.0, weights * searched, 0.0
        if search == "gptq":
            wide, narrow = weights * columns * GPTQ_COLUMN_SECONDS, weights * GPTQ_SECONDS
            first = _factor_seconds([columns], rates)
        layer.append(Units(1, wide, narrow, first))
    tables = architecture.parameters - _body_weights(architecture)
    count = math.ceil(4 * tables / (TABLE_UNITS * UNIT_BYTES))
    work = (Round((*layer * architecture.layers, Units(count, narrow=tables * searched / count))),)
    memory, why = QUANTIZE_BYTES, "the plan's exact bytes, the tokenizer; memory does not grow with the model"
    if search == "gptq":
        memory += 3 * 4 * architecture.widest**2 + stored_bytes(architecture.widest)
        why = "the widest input's second moments three times; the plan's exact bytes"
    if rotation.residual == "all":
        memory += 4 * architecture.hidden * max(architecture.intermediate, architecture.heads * architecture.head_dim)
        why += "; a matrix that writes to the residual"
    return Needs("quantize", memory, size + SMALL_FILES_BYTES, why, variant, here(work, rates.cores), work=work)


def reference(
    architecture: Architecture, weight_bytes: int, suite: Suite, entry: ModelConfig, rates: Rates = UNMEASURED
) -> Needs:
    """The full-precision model measured: its weights in float32 beside their file, and its log-probabilities kept."""
    costs, work = _costs(suite, entry), _suite_work(architecture, suite, entry, weight_bytes, rates, 2)
    return Needs(
        "reference",
        memory_needed(weight_bytes, architecture.parameters),
        _codes_bytes(architecture, costs) + SMALL_FILES_BYTES,
        "weights in float32 beside their file and a third more to spare; 2 bytes per token and vocabulary entry kept",
        seconds=here(work, rates.cores),
        work=work,
        fixed=START_SECONDS + len(costs) * TASK_SECONDS,
    )


def layered_reference(
    architecture: Architecture, weight_bytes: int, suite: Suite, entry: ModelConfig, memory: int,
    rates: Rates = UNMEASURED,
) -> Needs:  # fmt: skip
    """The same layer by layer, where `memory` bytes are available: a layer or the head in float32, or what texts take.

    On top of a layer as in `calibrate`; on top of the head its stored half while it is read, or a window's logits.
    """
    reading = [(task, part) for task, part in suite.by_task() if task.runs_graph and not task.reads]
    asked = [task.cost(part, entry) for task, part in reading]
    texts = [(task.title, task.cost(part, entry)) for task, part in suite.by_task() if task.writes]
    writing = tuple(_writing(architecture, weight_bytes, *text, memory, rates) for text in texts)
    window, longest = _most(asked, "window"), _most(asked, "read")
    logits = 2 * 4 * architecture.vocab * window  # with their codes and a mask
    head = architecture.vocab * architecture.hidden
    decoding = max(_layer_bytes(architecture, window), 4 * head + max(2 * head, logits))

    def read(cost: Cost, items: int, count: int, cores: int) -> float:
        return _pass_seconds(architecture, cost.read * count / items, rates.of(cores))

    def write(title: str, cost: Cost, count: int, cores: int) -> float:
        own = replace(
            cost, texts=count, written=cost.written * count // cost.texts, read=cost.read * count // cost.texts
        )
        return _writing(architecture, weight_bytes, title, own, memory, rates.of(cores)).seconds

    work = list[Round]()
    for (task, part), cost in zip(reading, asked, strict=True):
        items = _items(task, part, cost)
        kept = 2 * architecture.vocab * cost.kept / items
        work.append(Round((Units(items, moved=kept, batched=True, layered=partial(read, cost, items)),)))
    for title, cost in texts:
        work.append(Round((Units(cost.texts, batched=True, layered=partial(write, title, cost)),)))
    return Needs(
        "reference",
        MEASURING_BYTES + max(decoding, *(one.memory for one in writing), 0),
        2 * 4 * architecture.hidden * longest + _codes_bytes(architecture, asked) + SMALL_FILES_BYTES,
        f"one layer or the head in float32, or keys and values of texts; hidden states of {longest:,} tokens; 2 bytes "
        f"per token and vocabulary entry kept",
        seconds=here(work, rates.cores),
        writing=writing,
        work=(Round(alone=here(work, rates.cores)),) if architecture.experts else tuple(work),  # as `Subject.engine`
        fixed=START_SECONDS + len(work) * TASK_SECONDS,
    )


def _writing(
    architecture: Architecture, weight_bytes: int, title: str, cost: Cost, memory: int, rates: Rates
) -> Writing:
    """All texts at their limit: a pass for every token of as many as run side by side."""
    texts = fitting_texts(architecture, cost.texts, cost.cached, memory)
    passes = math.ceil(cost.texts / texts) * cost.written // cost.texts
    held = working_bytes(architecture, texts) + texts * cost.cached * token_bytes(architecture)
    every = side_by_side_seconds(architecture, weight_bytes, texts, memory - held, rates)
    seconds = passes * every + _product_seconds(architecture, cost.read, rates)
    return Writing(title, texts, passes, passes * weight_bytes, held, seconds)


def side_by_side_seconds(architecture: Architecture, weight_bytes: int, texts: int, left: int, rates: Rates) -> float:
    """A pass that gives one token to each of so many texts, beside which `left` bytes of memory can keep weights.

    The disk reads ahead while a layer multiplies: the slower of the two counts.
    """
    disk = weight_bytes / READ_PER_SECOND if weight_bytes > left else 0
    used = rates.of(min(rates.cores, most_threads(architecture)))
    return max(_product_seconds(architecture, texts + PASS_TOKENS, used), disk)


def validate(
    architecture: Architecture, variant: str, size: int, cache: int, suite: Suite, entry: ModelConfig, rates: Rates
) -> Needs:
    """A variant measured: prepacked weights, logits, and an MMLU prompt's cache or that of a text that is written.

    `size` is the artifact's bytes, `cache` those of one token's keys and values in all layers.
    """
    costs, work = _costs(suite, entry), _suite_work(architecture, suite, entry, size, rates)
    logits = (LOGIT_COPIES + 1) * 4 * architecture.vocab * _most(costs, "window")  # and numpy's
    return Needs(
        "validate",
        MEASURING_BYTES + round(PREPACKED * size) + logits + _most(costs, "cached") * cache,
        SMALL_FILES_BYTES,
        f"prepacked weights, logits and the longest text's KV cache; {sum(cost.read for cost in costs):,} tokens read",
        variant,
        here(work, rates.cores),
        work=work,
        fixed=START_SECONDS + len(costs) * TASK_SECONDS,
    )


def bundle(variant: str) -> Needs:
    """Hard links of the artifact and a JSON file: no second copy of the weights."""
    return Needs("bundle", PROCESS_BYTES, SMALL_FILES_BYTES, "hard links; every byte is hashed once", variant)


def _costs(suite: Suite, entry: ModelConfig) -> list[Cost]:
    return [task.cost(part, entry) for task, part in suite.by_task()]


def _most(costs: Iterable[Cost], what: str) -> int:
    return max((getattr(cost, what) for cost in costs), default=0)


def _codes_bytes(architecture: Architecture, costs: Iterable[Cost]) -> int:
    """The reference's kept log-probabilities."""
    return 2 * architecture.vocab * sum(cost.kept for cost in costs)


def _body_weights(architecture: Architecture) -> int:
    """Weights of all layers' matrices."""
    return architecture.layers * sum(matrix.rows * matrix.columns for matrix in architecture.body(0))


def _input_widths(architecture: Architecture) -> list[int]:
    """Channels of each input of a layer's matrices."""
    return list({matrix.input: matrix.columns for matrix in architecture.body(0)}.values())


def _share(architecture: Architecture, matrix: Matrix) -> float:
    """Of all tokens, those that a matrix multiplies."""
    return 1 if matrix.expert is None else architecture.experts_per_token / architecture.experts


def _factor_seconds(widths: Iterable[int], rates: Rates) -> float:
    """Second moments of so many channels factored, one after another on one core."""
    return sum(columns**3 / 3 for columns in widths) / (FACTOR_RATE * rates.flops / rates.cores)


def _layer_bytes(architecture: Architecture, window: int) -> int:
    """A layer in float32; on top the widest matrix once more, while it is widened, or a window's activations."""
    sizes = [4 * matrix.rows * matrix.columns for matrix in architecture.body(0)]
    return sum(sizes) + max(*sizes, activation_bytes(architecture, window))


def _pass_seconds(architecture: Architecture, tokens: float, rates: Rates) -> float:
    """All layers widened from half precision, and their products with so many tokens."""
    return _product_seconds(architecture, tokens, rates) + architecture.parameters / WIDENED_PER_SECOND


def _product_seconds(architecture: Architecture, tokens: float, rates: Rates) -> float:
    """Two operations per weight and token, of experts for those that it wakes; an embedding is looked up."""
    return 2 * _multiplied(architecture, architecture.matrices) * tokens / rates.flops


def _multiplied(architecture: Architecture, matrices: Iterable[Matrix]) -> float:
    """Weights that a token multiplies."""
    return sum(matrix.rows * matrix.columns * _share(architecture, matrix) for matrix in matrices)


def _items(task: Task, part: Any, cost: Cost) -> int:
    """How many a task asks at most."""
    return cost.texts or (task.stops(part)[-1] if task.stops else max(1, round(cost.read / cost.window)))


def _suite_work(
    architecture: Architecture, suite: Suite, entry: ModelConfig, weights: int, rates: Rates, kept: int = 0
) -> tuple[Round, ...]:
    """Tokens read, and tokens written: at most the limit for each text. A round for each task, whose items are units;
    speed is this machine's. Every worker loads `weights` bytes for a task; `kept`: bytes that an item brings for each
    token and vocabulary entry whose log-probability is kept."""
    found, costs = [], {task.name: task.cost(part, entry) for task, part in suite.by_task()}
    for task, part in suite.by_task():
        cost = costs[task.name]
        seconds = _product_seconds(architecture, cost.read + DECODE_COST * cost.written, rates)
        if task.whole:
            found.append(Round(alone=seconds))
            continue
        items = costs[task.reads].texts if task.reads else _items(task, part, cost)
        read = EXAMPLES.get(entry.mmlu_mode, 0) * (task.name == "mmlu")
        again = _product_seconds(architecture, read, rates) * rates.cores  # a batch begins with its subject's examples
        moved = kept * architecture.vocab * cost.kept / items
        found.append(Round((Units(items, seconds * rates.cores / items, 0, 0, moved, True, again),), read=weights))
    return tuple(found)
