"""ONNX Runtime's quantizers and onnxruntime-genai's model builder, as their users call them.

The quantizers get our exported full-precision graph with every product as the MatMul that they look for, and leave the
embedding as it is. Products run with int8 activations (accuracy_level 4), as ours and the builder's do.
The builder of onnxruntime-genai 0.18 needs transformers 5; 0.15.2's works beside Optimum's 4.57 and shares one table
between embedding and head. It is installed without dependencies into a folder of its own, before the installed runtime
in the import path of its process only.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper

from benchmarks.quality.measure import REFERENCE_GRAPH, OnnxFile
from benchmarks.quality.peer import Peer
from benchmarks.quality.subjects import Prepared
from pipeline.files import atomic_directory, link_or_copy
from pipeline.quantize.formats import TensorFormat

BUILDER = "onnxruntime-genai==0.15.2"
# Two of its combinations fail at SmolLM2's 9 blocks of 64 a row: k_quant with zero points, and a shared table with
# them. So blocks of 64 are symmetric here.
_BUILDER_OPTIONS = {
    "int4 (default, block 32 sym)": {},
    "int4, block 64 sym": {"block_size": "64"},
    "int4 rtn, block 32 sym": {"algo_config": "rtn"},
    "int4 k_quant, block 32": {"algo_config": "k_quant"},
    "int4 k_quant_mixed, block 32": {"algo_config": "k_quant_mixed"},
}
_PACKAGES = ("onnxruntime", "onnx", "transformers", "torch")
_CODE = (Path(__file__),)


def peers() -> list[Peer]:
    """Both quantizers at 4 bits (KQuant has no symmetric form); the builder's methods."""
    quantizers = [("default", "w4b32s"), ("default", "w4b64a"), ("KQuant", "w4b32a"), ("KQuant", "w4b64a")]
    found = [
        Peer("onnxruntime", f"{what} {name}", {"what": what, "format": name}, quantize, OnnxFile(), _CODE, _PACKAGES)
        for what, name in quantizers
    ]
    for name, options in _BUILDER_OPTIONS.items():
        what = {"builder": BUILDER, "options": options}
        found.append(Peer("onnxruntime-genai builder", name, what, build, OnnxFile(), _CODE, _PACKAGES))
    return found


# --- ONNX Runtime's quantizers ----------------------------------------------------------------------------------------


def quantize(prepared: Prepared, options: Mapping[str, Any], folder: Path) -> None:
    """Write the graph that MatMulNBitsQuantizer makes of ours, with what onnxruntime-genai needs beside it."""
    quantizer, fmt = (
        import_module("onnxruntime.quantization.matmul_nbits_quantizer"),
        TensorFormat.parse(options["format"]),
    )
    model = with_plain_products(_load(prepared.reference))
    algorithm = quantizer.KQuantWeightOnlyQuantConfig() if options["what"] == "KQuant" else None
    work = quantizer.MatMulNBitsQuantizer(
        model, fmt.bits, fmt.block, fmt.symmetric, accuracy_level=4, algo_config=algorithm
    )
    work.process()
    onnx.save(
        work.model.model, folder / REFERENCE_GRAPH, save_as_external_data=True, location=f"{REFERENCE_GRAPH}.data",
        size_threshold=1024,
    )  # fmt: skip
    for file in prepared.export.iterdir():
        if file.suffix == ".json":
            link_or_copy(file, folder / file.name)


def _load(folder: Path) -> onnx.ModelProto:
    """The reference with its weights in memory. onnx's own loader refuses hard links, of which the folder is made."""
    model = onnx.load(folder / REFERENCE_GRAPH, load_external_data=False)
    for tensor in model.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            place = {entry.key: entry.value for entry in tensor.external_data}
            with open(folder / place["location"], "rb") as file:
                file.seek(int(place["offset"]))
                tensor.raw_data = file.read(int(place["length"]))
            tensor.ClearField("external_data")
            tensor.data_location = onnx.TensorProto.DEFAULT
    return model


def with_plain_products(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph with every x · Wᵀ as a MatMul of a stored float32 Wᵀ: what the quantizers look for. Changes `model`."""
    stored = {tensor.name: tensor for tensor in model.graph.initializer}
    casts = {node.output[0]: node for node in model.graph.node if node.op_type == "Cast" and node.input[0] in stored}
    for node in model.graph.node:
        if node.op_type != "FusedMatMul":
            continue
        weights = casts[node.input[1]].input[0] if node.input[1] in casts else node.input[1]
        if weights not in stored:
            continue
        if {item.name: item.i for item in node.attribute} != {"transB": 1}:
            raise ValueError(f"{node.name}: a FusedMatMul with other attributes than transB is not x · Wᵀ.")
        turned = np.ascontiguousarray(numpy_helper.to_array(stored[weights]).T.astype(np.float32))
        name = f"{node.input[1]}.T"
        model.graph.initializer.append(numpy_helper.from_array(turned, name))
        node.CopyFrom(helper.make_node("MatMul", [node.input[0], name], node.output, node.name))
    read = {name for node in model.graph.node for name in node.input}
    for name, node in casts.items():
        if name not in read:
            model.graph.node.remove(node)
    read = {name for node in model.graph.node for name in node.input}
    unused = [tensor for name, tensor in stored.items() if name not in read]
    for tensor in unused:
        model.graph.initializer.remove(tensor)
    return model


# --- the model builder ------------------------------------------------------------------------------------------------


def build(prepared: Prepared, options: Mapping[str, Any], folder: Path) -> None:
    """Run the builder on the checkpoint. Raises RuntimeError with its last line when it fails."""
    packages = _install(prepared.project.work / "packages" / options["builder"].replace("==", "-"), options["builder"])
    wanted = [f"{name}={value}" for name, value in options["options"].items()]
    command = [
        *(sys.executable, "-m", "onnxruntime_genai.models.builder", "-i", prepared.reference, "-o", folder),
        *("-p", "int4", "-e", "cpu", "-c", folder / "cache", *(["--extra_options", *wanted] if wanted else [])),
    ]
    offline = {"HF_HUB_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1", "PYTHONPATH": str(packages)}
    _run(list(map(str, command)), os.environ | offline)
    shutil.rmtree(folder / "cache", ignore_errors=True)
    _name_head_size(folder / REFERENCE_GRAPH, prepared.architecture.head_dim)


def _name_head_size(path: Path, head_dim: int) -> None:
    """Write the size of keys and values where the builder leaves a symbol: an empty cache must have a shape."""
    model = onnx.load(path, load_external_data=False)
    for value in (*model.graph.input, *model.graph.output):
        for dimension in value.type.tensor_type.shape.dim:
            if dimension.dim_param == "kv_cache_dim":
                dimension.dim_value = head_dim
    onnx.save(model, path)


def _install(folder: Path, requirement: str) -> Path:
    if not folder.is_dir():
        with atomic_directory(folder) as made:
            pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(made), requirement]
            _run(pip, dict(os.environ))
    return folder


def _run(command: list[str], environment: Mapping[str, str]) -> None:
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr.strip().splitlines() or ["no message"])[-1]
        raise RuntimeError(f"{command[2]} ended with status {done.returncode}: {last}")
