"""The independent reference: a checkpoint exported by Optimum's own exporter, through transformers and torch.

Runs in a process of its own, because it is the one place that imports torch, and so that its memory is given back:

    python -m pipeline.parity.optimum_export WEIGHTS LAYERS VOCAB OUTPUT

exports the first LAYERS layers with the first VOCAB rows of embedding and head. Weights are read by the safetensors
library, not by our reader.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Any

from pipeline.errors import GraphError

MODEL_FILE = "model.onnx"
# transformers has no `mimo`; without its MTP tensors it is Qwen2 (logits differ by exactly 0). No remote code.
_TRANSFORMERS_TYPE = {"mimo": "qwen2"}


def export_reference(weights: Path, layers: int, vocab: int, output: Path) -> Path:
    """Export with Optimum in a fresh process; returns the ONNX file.

    Raises GraphError with the exporter's last line when it fails.
    """
    run_alone("pipeline.parity.optimum_export", weights, layers, vocab, output)
    return output / MODEL_FILE


def run_alone(module: str, weights: Path, *arguments: Path | int) -> None:
    """Run a module in a process of its own, on a folder of weights.

    Raises GraphError with its last line when it fails.
    """
    command = [sys.executable, "-m", module, str(weights), *map(str, arguments)]
    # The exporter copies all weights several times: with huge pages that takes a fifth less time (glibc only).
    settings = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_VERBOSITY": "error", "USE_TORCH": "1"}
    settings["GLIBC_TUNABLES"] = "glibc.malloc.hugetlb=1"
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ | settings, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise GraphError(f"{weights}: {module} failed with status {done.returncode}: {last}")


def reference_config(weights: Path, layers: int, vocab: int) -> Any:
    """transformers' configuration of the cut model."""
    from transformers import AutoConfig

    values = json.loads((weights / "config.json").read_text(encoding="utf-8"))
    model_type = values.pop("model_type")
    values = {key: value for key, value in values.items() if key not in {"auto_map", "architectures"}}
    values |= {"num_hidden_layers": layers, "vocab_size": vocab}
    if rope := values.pop("rope_parameters", None):  # transformers 5's spelling, which 4.57 does not know
        named = {key: rope[key] for key in ("rope_theta", "partial_rotary_factor") if key in rope}
        if (kind := rope.get("rope_type", "default")) != "default":  # by the keys that its class takes, and no others
            kept = ("short_factor", "long_factor") if "long_factor" in rope else rope.keys() - named - {"rope_type"}
            named["rope_scaling"] = {"type": kind} | {key: rope[key] for key in kept}
        values = named | values
    if values.get("layer_types"):
        values["layer_types"] = values["layer_types"][:layers]
    for key in ("bos_token_id", "eos_token_id", "pad_token_id"):
        values[key] = None  # ids beyond a cut vocabulary are refused, and nothing is generated here
    return AutoConfig.for_model(_TRANSFORMERS_TYPE.get(model_type, model_type), **values)


def load_reference(weights: Path, layers: int, vocab: int) -> Any:
    """The cut model as a torch module in float32 with the checkpoint's weights."""
    import torch
    from safetensors import safe_open
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_config(reference_config(weights, layers, vocab), dtype=torch.float32).eval()
    state = model.state_dict()
    if model.config.tie_word_embeddings:
        del state["lm_head.weight"]  # the embedding's own memory, which a head in the files must not overwrite
    missing = set(state)
    for path in sorted(weights.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in filter(state.__contains__, file.keys()):
                values = file.get_slice(name)
                state[name].copy_(values[: len(state[name])] if len(values.get_shape()) else values[:])
                missing.discard(name)
    if missing:
        raise GraphError(f"{weights}: transformers wants {len(missing)} absent tensors, such as {min(missing)!r}.")
    return model


def main(weights: Path, layers: int, vocab: int, output: Path) -> None:
    """Export in this process."""
    from optimum.exporters.onnx import onnx_export_from_model

    warnings.filterwarnings("ignore")
    model, task = load_reference(weights, layers, vocab), "text-generation-with-past"
    onnx_export_from_model(model, output, task=task, do_validation=False, no_post_process=True, device="cpu")


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]), Path(sys.argv[4]))
