"""A tiny model that talks, nonsense but with stops and a chat template, and a signed bundle of it."""

from __future__ import annotations

import shutil
import threading
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import uvicorn

from pipeline.bundle import card, keys, release
from pipeline.checkpoint.blobs import Store
from pipeline.errors import EvaluationError
from pipeline.files import read_json, write_json
from pipeline.serve.app import build
from pipeline.serve.engine import Engine
from pipeline.serve.guard import Door
from pipeline.serve.local import Line, Local, Shelf, Source
from pipeline.serve.model import Chats, Step
from pipeline.serve.server import gauges, listen
from pipeline.stages import download, export
from pipeline.workspace import Workspace
from tests import tiny
from tests.bundle.conftest import RELEASE, Maker, maker, stranger  # noqa: F401  # two are fixtures
from tests.bundle.dossiers import dossier
from tests.conftest import ROOT
from tests.families import CASES

CONTEXT = 192
_HERE = Door("127.0.0.1", None)


@pytest.fixture(scope="session")
def model_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The full-precision graph, weights, tokenizer and genai_config.json. Never changed by a test."""
    folder = tmp_path_factory.mktemp("talking")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(ROOT)
        store = tiny.make_store(folder / "store")
        patch.setenv("PIPELINE_STORE", str(store.root))
        patch.chdir(tiny.copy_configs(folder))
        shutil.rmtree(folder / "checkpoint")  # with tied embeddings, random weights repeat their last token
        tiny.make_model(folder / "checkpoint", CASES["llama-untied"])
        tiny.edit(folder / "configs/models/tiny.yaml", context=CONTEXT)
        download.run(tiny.MODEL)
        export.run(tiny.MODEL)
        reference = Workspace(tiny.MODEL).reference(Store())
        # The folder is links into the store: a test that wrote to one would damage it.
        shutil.copytree(reference, folder / "model")
    return folder / "model"


def changed(folder: Path, where: Path, **settings: Any) -> Path:
    """A copy of a model's folder with other keys in a section of genai_config.json: `search={"do_sample": True}`."""
    shutil.copytree(folder, where)
    config = read_json(where / "genai_config.json")
    for section, values in settings.items():
        config[section] |= values
    write_json(where / "genai_config.json", config)
    return where


@dataclass(frozen=True)
class Talking:
    """A signed bundle, and the public key that it verifies with."""

    bundle: Path
    public_key: Path


@pytest.fixture
def talking(model_folder: Path, maker: Maker, tmp_path: Path) -> Talking:  # noqa: F811
    """A bundle of the tiny model with its card, made anew for each test."""
    papers = tmp_path / "papers"
    papers.mkdir()
    (papers / card.FILE).write_bytes(card.build(dossier()))
    files = {path.name: path for path in [*model_folder.iterdir(), papers / card.FILE]}
    fields = maker.stamp | RELEASE | {"files": release.describe_files(files)}
    bundle = maker.write(tmp_path / "bundle", release.build_release(**fields), files)
    for path in (bundle / "content").iterdir():  # assembled as hard links
        shutil.copy(path, papers / "copy")
        (papers / "copy").replace(path)
    keys.export_public_key(maker.key, tmp_path / "public.pem")
    return Talking(bundle, tmp_path / "public.pem")


@contextmanager
def serving(engines: Mapping[str, Engine], door: Door = _HERE, **more: Any) -> Iterator[str]:
    """The address of a server of `engines` in this process."""
    listening = listen("127.0.0.1", 0)
    config = uvicorn.Config(build(engines, door, **more), log_level="warning", timeout_graceful_shutdown=1)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
    thread.start()
    try:
        yield f"http://127.0.0.1:{listening.getsockname()[1]}"
    finally:
        server.should_exit = True
        thread.join()


@dataclass(frozen=True)
class Served:
    """A server of models' folders, by the names that were given to them."""

    url: str
    line: Line
    shelf: Shelf


@contextmanager
def serving_folders(queue: int = 16, **folders: Path) -> Iterator[Served]:
    """A server of folders as they lie."""
    shelf, line = Shelf({name: Source(folder, lambda: None) for name, folder in folders.items()}), Line(queue)
    engines = {name: Local(name, shelf, line) for name in folders}
    with serving(engines, gauges=gauges(line, shelf)) as url:
        yield Served(url, line, shelf)


def until(condition: Any, seconds: float = 60) -> None:
    """Wait for something that is about to happen."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.005)


class Puppet:
    """Stands for a model in memory: it writes the tokens of `text` again and again, each when it is let."""

    def __init__(self, chats: Chats, text: str, steps: int = 0):
        self._chats, self._ids = chats, [int(token) for token in chats.tokenizer.encode(text)]
        self._allowed, self.asked, self.broken = threading.Semaphore(steps), 0, False

    def let(self, steps: int) -> None:
        self._allowed.release(steps)

    def begin(self, ids: Sequence[int], search: dict[str, Any], fresh: bool) -> list[Sequence[int]]:
        self._at, self._stream = 0, self._chats.tokenizer.create_stream()
        return [ids]

    def read(self, ids: Sequence[int]) -> None:
        if self.broken:
            raise EvaluationError("the runtime is out of order")

    def step(self, logprobs: bool) -> Step:
        self.asked += 1
        assert self._allowed.acquire(timeout=60)
        token = self._ids[self._at % len(self._ids)]
        self._at += 1
        return Step(token, self._stream.decode(token), False, None)


SAID = "Xin chào, tiếng Việt 😀 👩‍👩‍👧 漢字 🇻🇳 "


@dataclass(frozen=True)
class Played(Served):
    """A server whose model is a puppet."""

    puppet: Puppet


@pytest.fixture
def played(model_folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Played]:
    with serving_folders(queue=1, plain=model_folder) as found:
        puppet = Puppet(found.shelf.chats["plain"], SAID)
        monkeypatch.setattr(found.shelf, "model", lambda name: puppet)
        yield Played(found.url, found.line, found.shelf, puppet)
        puppet.let(1000)
