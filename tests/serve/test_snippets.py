"""The programs that README and the model card print: they run as they stand, where they say, and print an answer."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

from pipeline.bundle import card
from tests.bundle.dossiers import dossier
from tests.conftest import ROOT
from tests.serve.conftest import Talking


def snippet(text: str) -> str:
    """The one Python program in a document."""
    (found,) = re.findall(r"^```python\n(.*?)^```$", text, re.MULTILINE | re.DOTALL)
    return str(found)


def run(program: str, folder: Path) -> str:
    """What a program prints that is started in `folder`, where nothing of this repository can be imported."""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_card_of_a_bundle_answers_in_the_bundles_content(talking: Talking) -> None:
    content = talking.bundle / "content"
    text = (content / card.FILE).read_text()
    assert "Start Python in the folder that holds `genai_config.json`" in text
    assert "apply_chat_template" in snippet(text)
    assert run(snippet(text), content).strip()


def test_the_card_of_a_model_without_a_chat_template_continues_a_text(talking: Talking) -> None:
    text = card.build(dossier(chats=False)).decode()
    assert "apply_chat_template" not in snippet(text)
    assert run(snippet(text), talking.bundle / "content").strip()


def test_the_first_page_answers_from_the_projects_root(talking: Talking, tmp_path: Path) -> None:
    program = snippet((ROOT / "README.md").read_text())
    (place,) = re.findall(r'og\.Model\("(.*?)"\)', program)
    shutil.copytree(talking.bundle / "content", tmp_path / "root" / place)
    assert run(program, tmp_path / "root").strip()
