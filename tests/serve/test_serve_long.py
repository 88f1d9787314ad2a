"""serve under load, and asked by lm-evaluation-harness: LM_EVAL_PYTHON may name an interpreter that has it."""

from __future__ import annotations

import importlib.util
import json
import os
import re
import subprocess
import sys
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import requests

from pipeline.machine import resident_memory
from tests.conftest import ROOT

pytestmark = pytest.mark.long
AT_ONCE = 16
HARNESS = os.environ.get("LM_EVAL_PYTHON", sys.executable if importlib.util.find_spec("lm_eval") else "")


@pytest.fixture
def server(model_folder: Path) -> Iterator[tuple[str, int]]:
    """The address and the process of a server of its own, so that its memory is nothing else's."""
    words = ["-m", "pipeline", "serve", str(model_folder), "--unverified", "--port", "0", "--queue", str(AT_ONCE)]
    with subprocess.Popen([sys.executable, *words], cwd=ROOT, stderr=subprocess.PIPE) as process:
        assert process.stderr
        try:
            found = re.search(r"http://127\.0\.0\.1:\d+", process.stderr.readline().decode())
            assert found
            yield found[0], process.pid
        finally:
            process.terminate()


def test_a_thousand_requests_lose_none_and_memory_stays_flat(server: tuple[str, int], model_folder: Path) -> None:
    url, process = server

    def ask(number: int) -> str:
        words = f"Message {number}: " + "word " * (number % 12)
        stream = bool(number % 2)
        body = {
            "model": str(model_folder), "messages": [{"role": "user", "content": words}], "stream": stream,
            "max_tokens": 1 + number % 8, "temperature": number % 3 / 2,
        }  # fmt: skip
        response = requests.post(f"{url}/v1/chat/completions", json=body, timeout=600)
        assert response.status_code == 200, response.text
        last = json.loads(response.text.split("\n\n")[-3].removeprefix("data: ")) if stream else response.json()
        return str(last["choices"][0]["finish_reason"])

    with ThreadPoolExecutor(AT_ONCE) as pool:
        endings = Counter(pool.map(ask, range(200)))
        early, _ = resident_memory(process)
        endings += Counter(pool.map(ask, range(200, 1000)))
        late, _ = resident_memory(process)
    print(f"private memory after 200 requests {early:,} bytes, after 1,000 {late:,}; endings {dict(endings)}")
    assert endings.total() == 1000
    assert set(endings) <= {"stop", "length"}
    assert late < 1.05 * early


@pytest.mark.skipif(not HARNESS, reason="no lm-evaluation-harness: pip install -r requirements-crosscheck.txt")
def test_the_harness_asks_it(server: tuple[str, int], model_folder: Path, tmp_path: Path) -> None:
    url, _ = server
    questions = [{"question": f"What is {k} and {k}?", "answer": str(2 * k)} for k in range(4)]
    (tmp_path / "questions.jsonl").write_text("".join(json.dumps(one) + "\n" for one in questions))
    task = {
        "task": "sums", "dataset_path": "json", "output_type": "generate_until", "test_split": "test",
        "dataset_kwargs": {"data_files": {"test": str(tmp_path / "questions.jsonl")}},
        "doc_to_text": "{{question}}", "doc_to_target": "{{answer}}",
        "generation_kwargs": {"until": ["\n\n"], "max_gen_toks": 8, "do_sample": False, "temperature": 0.0},
        "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    (tmp_path / "sums.yaml").write_text(json.dumps(task))
    words = [
        "--model", "local-chat-completions", "--apply_chat_template", "--tasks", "sums", "--include_path", tmp_path,
        "--model_args", f"model={model_folder},base_url={url}/v1/chat/completions,num_concurrent=2,max_retries=1",
        "--output_path", tmp_path / "results", "--log_samples",
    ]  # fmt: skip
    offline = os.environ | {"HF_HUB_OFFLINE": "1", "HF_HOME": str(tmp_path / "hub")}
    done = subprocess.run(
        [HARNESS, "-m", "lm_eval", *map(str, words)],
        env=offline,
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    (samples,) = (tmp_path / "results").rglob("samples_sums_*.jsonl")
    answers = [json.loads(line)["resps"][0][0] for line in samples.read_text().splitlines()]
    assert len(answers) == 4
    assert all(answers)
