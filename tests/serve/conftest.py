"""A tiny model that talks, nonsense but with stops and a chat template, and a signed bundle of it."""

from __future__ import annotations

import shutil
from dataclasses import dataclass
from pathlib import Path

import pytest

from pipeline.bundle import card, keys, release
from pipeline.checkpoint.blobs import Store
from pipeline.stages import download, export
from pipeline.workspace import Workspace
from tests import tiny
from tests.bundle.conftest import RELEASE, Maker, maker, stranger  # noqa: F401  # two are fixtures
from tests.bundle.dossiers import dossier
from tests.conftest import ROOT
from tests.families import CASES

CONTEXT = 192


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
