"""Bundles on this machine as engines: one thread runs them, one answer at a time, and few may wait for it.

Weights are loaded when they are asked for, and those that were used longest ago make room for others.
"""

from __future__ import annotations

import asyncio
import time
from collections.abc import AsyncGenerator, AsyncIterator, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

from pipeline.errors import EvaluationError, ResourceError
from pipeline.files import read_json
from pipeline.machine import available_memory
from pipeline.serve.engine import Busy, FinishReason, Message, Piece, Settings, TooLong, Unsupported, Usage
from pipeline.serve.model import Chats, Model
from pipeline.workspace import GENAI_CONFIG

_P = ParamSpec("_P")
_R = TypeVar("_R")
_HEADROOM = 4 / 3  # weights in the kernels' own layout, activations, the runtime: on top of the files' bytes
_NEWEST = 0.2  # share of the newest answer in the mean time that one takes


class Line:
    """Who waits for the engine, and the one thread that runs it."""

    def __init__(self, waiting: int):
        """`waiting`: how many may wait beside the one whose turn it is."""
        self._most, self._places, self._turn = waiting + 1, 0, asyncio.Lock()
        self._thread = ThreadPoolExecutor(1, "engine")
        self._mean, self._since = 0.0, time.monotonic()

    @property
    def waiting(self) -> int:
        """How many have a place and not yet their turn."""
        return self._places - self._turn.locked()

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """A place in the line. Raises Busy when all are taken."""
        if self._places >= self._most:
            # The next place is free when the answer ends that is being written.
            raise Busy(max(1.0, self._since + self._mean - time.monotonic()), f"{self._places} requests are in line")
        self._places += 1
        try:
            yield
        finally:
            self._places -= 1

    @asynccontextmanager
    async def turn(self) -> AsyncIterator[None]:
        """The engine alone, after all that came before; for who has a place."""
        async with self._turn:
            self._since = time.monotonic()
            try:
                yield
            finally:
                took = time.monotonic() - self._since
                self._mean = self._mean + _NEWEST * (took - self._mean) if self._mean else took

    async def run(self, function: Callable[_P, _R], *args: _P.args, **kwargs: _P.kwargs) -> _R:
        """Call in the engine's thread, after all calls before. A cancelled caller does not stop a call that runs."""
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*args, **kwargs))


@dataclass(frozen=True)
class Source:
    """A model folder that is served. `check` is called before its weights are loaded, and raises if it was changed."""

    folder: Path
    check: Callable[[], object]


def memory_needed(folder: Path) -> int:
    """Bytes that a loaded folder takes, about: its files with headroom, keys and values of a whole context."""
    model = read_json(folder / GENAI_CONFIG)["model"]
    decoder = model["decoder"]
    heads, layers = decoder["num_key_value_heads"], decoder["num_hidden_layers"]
    cache = 2 * 4 * layers * heads * decoder["head_size"] * model["context_length"]
    return round(_HEADROOM * sum(path.stat().st_size for path in folder.iterdir())) + cache


class Shelf:
    """Models by name, of which as many are loaded as memory holds. To be used from one thread."""

    def __init__(self, sources: Mapping[str, Source]):
        """Raises EvaluationError when a tokenizer cannot be loaded."""
        self._sources = sources
        self.chats = {name: Chats(source.folder) for name, source in sources.items()}
        self._loaded: dict[str, Model] = {}  # the one used last is last

    @property
    def loaded(self) -> int:
        """How many are in memory."""
        return len(self._loaded)

    def model(self, name: str) -> Model:
        """A model with its weights in memory.

        Raises:
            BundleError: its files have changed since they were verified.
            ResourceError: they do not fit, even alone.
            EvaluationError: the runtime refuses them.
        """
        if name not in self._loaded:
            self._sources[name].check()
            self._make_room(name)
            self._loaded[name] = Model(self.chats[name])
        self._loaded[name] = self._loaded.pop(name)
        return self._loaded[name]

    def _make_room(self, name: str) -> None:
        needed = memory_needed(self._sources[name].folder)
        while self._loaded and available_memory() < needed:
            del self._loaded[next(iter(self._loaded))]
        if (free := available_memory()) < needed:
            raise ResourceError(
                f"{name} takes about {needed:,} bytes of memory, and {free:,} are available. End other programs, or "
                f"serve a smaller variant."
            )


class Local:
    """A model of a shelf as an engine (`pipeline.serve.engine.Engine`)."""

    def __init__(self, name: str, shelf: Shelf, line: Line):
        self._name, self._shelf, self._line = name, shelf, line
        self._chats = shelf.chats[name]

    @property
    def model(self) -> str:
        """Its id."""
        return self._name

    @property
    def context(self) -> int:
        """Tokens that a prompt and its answer may have together."""
        return self._chats.context

    def count(self, messages: Sequence[Message]) -> int:
        """Tokens of the prompt that these messages become. Raises EvaluationError where they cannot be rendered."""
        return len(self._chats.encode(messages))

    async def stream(
        self, messages: Sequence[Message], settings: Settings, tags: Sequence[str] = ()
    ) -> AsyncGenerator[Piece, None]:
        """The answer piece by piece, as `pipeline.serve.engine.Engine.stream`. Nothing leaves, whatever `tags` say."""
        async with self._line.place():
            try:
                ids = await self._line.run(self._chats.encode, messages)
            except EvaluationError as error:
                raise Unsupported("messages", str(error)) from None
            if len(ids) + (settings.max_tokens or 1) > self.context:
                raise TooLong(self._name, len(ids), self.context, settings.max_tokens)
            async with self._line.turn():
                async for piece in self._write(ids, settings):
                    yield piece

    async def _write(self, ids: list[int], settings: Settings) -> AsyncGenerator[Piece, None]:
        run, text, written = self._line.run, Ending(settings.stop), 0
        most = settings.max_tokens or self.context - len(ids)
        model = await run(self._shelf.model, self._name)
        for part in await run(model.begin, ids, search_options(settings, self._chats.vocab), settings.seed is not None):
            await run(model.read, part)
        reason: FinishReason | None = None
        while reason is None:
            step = await run(model.step, settings.logprobs)
            written += 1
            shown, met = text.add(step.text)
            reason = "stop" if met or step.stops else "length" if written == most else None
            if reason and not met:
                shown += text.held
            yield Piece(shown, step.token, step.logprob, reason, Usage(len(ids), written) if reason else None)


def search_options(settings: Settings, vocab: int) -> dict[str, Any]:
    """onnxruntime-genai's search options for `settings`; what they leave open is as genai_config.json says."""
    if settings.temperature == 0:
        return {"do_sample": False}
    asked = {"temperature": settings.temperature, "top_p": settings.top_p, "random_seed": settings.seed}
    search = {name: value for name, value in asked.items() if value is not None}
    if search.keys() & {"temperature", "top_p"}:
        # The model's own top_k would limit the draw; with 0 the runtime does not honour top_p.
        search |= {"do_sample": True, "top_k": vocab}
    return search


class Ending:
    """A text that ends before the first of `stops`. What may still become one is `held`."""

    def __init__(self, stops: Sequence[str]):
        self._stops, self.held = stops, ""

    def add(self, text: str) -> tuple[str, bool]:
        """More text: what of it all is sure to belong to the answer, and whether a stop was met."""
        whole = self.held + text
        found = [at for stop in self._stops if (at := whole.find(stop)) >= 0]
        if found:
            return whole[: min(found)], True
        sizes = [size for stop in self._stops for size in range(1, len(stop)) if whole.endswith(stop[:size])]
        sure = len(whole) - max(sizes, default=0)
        self.held = whole[sure:]
        return whole[:sure], False
