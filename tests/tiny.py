"""A whole project around a random model of half a million parameters: what tests of stages and of DVC run.

Its recipes are those that ship: errors are compensated, 6 bits are two planes, q3 is solved.

The model has a real byte-level tokenizer with a chat template, so every stage runs, onnxruntime-genai included.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import yaml

from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.lock import read_lock
from pipeline.config.sources import WheelSource, load_datasets
from pipeline.files import link_or_copy
from tests.conftest import ROOT, dataset
from tests.families import CASES, Case, make_checkpoint

MODEL = "tiny"
VARIANTS = ("q4", "q4_k_m", "q3")
CONTEXT = 8192  # a byte-level tokenizer makes an MMLU question thousands of tokens
CALIBRATION = "text-multilingual"  # the smallest: a text is tokenized whole, of which windows are taken
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")  # ids 0, 1, 2, as in the cases' configs
CHATML = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n{{ message['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
CASE = Case(CASES["llama-tied"].config | {"max_position_embeddings": CONTEXT}, "llama")
# Random weights diverge far more than trained ones; q3 is meant to fail, the others to pass.
LIMITS = {"kl_mean_max": 5.0, "kl_p99_max": 50.0, "top1_min": 0.05, "perplexity_ratio_max": 100.0}
IMPOSSIBLE = {"kl_mean_max": 1e-9, "kl_p99_max": 1e-9, "top1_min": 0.99999, "perplexity_ratio_max": 1.0000001}


def make_tokenizer(folder: Path, vocab: int) -> None:
    """Write tokenizer.json (byte-level BPE of exactly `vocab` tokens) and tokenizer_config.json."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([Path(__file__).read_text(encoding="utf-8")], trainer)
    assert tokenizer.get_vocab_size() == vocab
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": SPECIAL[1],
        "eos_token": SPECIAL[2],
        "pad_token": SPECIAL[2],
        "clean_up_tokenization_spaces": False,
        "chat_template": CHATML,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))


def make_model(folder: Path, case: Case = CASE) -> Path:
    """A complete checkpoint folder: config, weights, tokenizer."""
    make_checkpoint(folder, case)
    make_tokenizer(folder, case.config["vocab_size"])
    return folder


def make_store(root: Path) -> Store:
    """A store of its own that already has the pinned datasets (hard links), so that nothing is downloaded again."""
    shared, own = Store(), Store(root)
    pinned = load_datasets().datasets
    datasets = {name: source for name, source in pinned.items() if isinstance(source, WheelSource)}
    for name in datasets:
        dataset(name)
    sources = [source.model_dump() for source in datasets.values()]
    for record in sorted((shared.root / "sources").glob("*.json")):
        lock = read_lock(record)
        if lock.source in sources and len(lock.files) == 1:
            link_or_copy(record, own.record(record.stem))
            for file in lock.files:
                digest = file.sha256
                link_or_copy(shared.path(digest), root / "sha256" / digest[:2] / digest)
    return own


def edit(path: Path, **changes: Any) -> None:
    """Change top-level keys of a YAML file; `None` removes one."""
    values = {**yaml.safe_load(path.read_text(encoding="utf-8")), **changes}
    kept = {key: value for key, value in values.items() if value is not None}
    path.write_text(yaml.safe_dump(kept, sort_keys=False), encoding="utf-8")


def model_entry(folder: Path) -> dict[str, Any]:
    """The configs/models entry of a checkpoint folder."""
    source = {"kind": "local", "path": str(folder)}
    return {
        "title": "A tiny random model",
        "source": source,
        "context": CONTEXT,
        "mmlu_mode": "cloze",
        "humaneval_prompt": "completion",
        "gate_class": "random",
    }


def configure(configs: Path, checkpoint: Path) -> None:
    """Point a copy of configs/ at the tiny model, with a suite that takes seconds."""
    for name in (MODEL, "other"):
        (configs / "models" / f"{name}.yaml").write_text(yaml.safe_dump(model_entry(checkpoint)))
    edit(configs / "pipeline.yaml", models=[MODEL], suite="seconds", variants=list(VARIANTS))
    suite = {
        "divergence": {
            "prose": {"text-wiki": 8},
            "chat": {"chat-mt-bench": 8},
            "code": {"text-bottle": 8},
            "languages": {"text-vietnamese": 8},
            "window": 41,
        },
        "mmlu": {"questions": 57},
        "humaneval": {"problems": 2, "max_new_tokens": 8, "timeout_seconds": 5},
        "speed": {"prompt_tokens": [8, 16], "new_tokens": 4, "repeats": 1},
    }
    (configs / "evaluation" / "seconds.yaml").write_text(yaml.safe_dump(suite))
    (configs / "calibration.yaml").write_text(yaml.safe_dump({"texts": {CALIBRATION: 256}, "window": 64}))
    edit(configs / "sensitivity.yaml", texts={CALIBRATION: 128}, rows=64)
    limits = {variant: IMPOSSIBLE if variant == "q3" else LIMITS for variant in VARIANTS}
    gates = {
        "ratchet": 1.25,
        "classes": {"random": {"reason": "Random weights.", "parameters": [0, 1_000_000], "variants": limits}},
    }
    (configs / "gates.yaml").write_text(yaml.safe_dump(gates))


def copy_configs(folder: Path, case: Case = CASE) -> Path:
    """configs/ and a checkpoint in `folder`: enough to run stages in this process with `folder` as directory."""
    shutil.copytree(ROOT / "configs", folder / "configs")
    shutil.copy(ROOT / "dvc.yaml", folder)
    configure(folder / "configs", make_model(folder / "checkpoint", case))
    return folder


def copy_project(folder: Path) -> Path:
    """The working tree (tracked and new files, nothing ignored) as a fresh git repository that builds the tiny model.

    Tests, measurements and locks stay behind. What numba has compiled comes along: it is valid for the same bytes with
    the same date, and costs a fresh copy a minute of compiling.
    """
    listing = ["git", "ls-files", "-co", "--exclude-standard"]
    names = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    for name in [*names, *(str(path.relative_to(ROOT)) for path in ROOT.glob("pipeline/**/*.nb[ci]"))]:
        if (ROOT / name).is_file() and not name.startswith(("tests/", "artifacts/", "dvc.lock")):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(ROOT / name, folder / name)
    configure(folder / "configs", make_model(folder.parent / "checkpoint"))
    commit(folder, "start", init=True)
    return folder


def commit(folder: Path, message: str, init: bool = False) -> None:
    """Commit everything that git does not ignore."""
    git = ["git", "-c", "user.name=test", "-c", "user.email=test@localhost"]
    steps = [[*git, "init", "-q"]] if init else []
    for step in [*steps, [*git, "add", "-A"], [*git, "commit", "-q", "--allow-empty", "-m", message]]:
        subprocess.run(step, cwd=folder, check=True, capture_output=True)
