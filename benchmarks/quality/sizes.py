"""What a written file takes, from the file alone: bytes on disk, bytes of memory, and what its tensors really are.

Memory is what products read of a loaded model. ONNX Runtime packs a weight anew: codes, and 64 bits or more of a block
(`pipeline.quantize.formats`); a table that is only looked up counts nothing, because a token reads one row of it.
llama.cpp computes with the blocks of the file: its memory is the file, mapped.
"""

from __future__ import annotations

from collections import Counter
from pathlib import Path
from typing import Any

import gguf
import onnx

from benchmarks.quality.gguf_file import tokenizer_bytes
from pipeline.quantize.formats import FORMATS

_FLOATS = {onnx.TensorProto.FLOAT: 4, onnx.TensorProto.FLOAT16: 2, onnx.TensorProto.BFLOAT16: 2}
_PRODUCTS = {"MatMul", "FusedMatMul", "Gemm"}
_SUPERBLOCK = 256  # channels of a block of every K- and IQ-type but IQ4_NL
MIXTURES = {
    "Q4_K_M": "Q4_K", "Q4_K_S": "Q4_K", "IQ4_XS": "IQ4_XS", "IQ4_NL": "IQ4_NL", "Q3_K_M": "Q3_K", "IQ3_M": "IQ3_S",
    "IQ3_S": "IQ3_S", "IQ3_XXS": "IQ3_XXS", "Q2_K": "Q2_K",
}  # fmt: skip
"""llama.cpp's mixtures that users pick, and the type that each gives to most of its matrices."""


def onnx_bytes(folder: Path) -> int:
    """Bytes of the graph and of the data files beside it: what is neither tokenizer nor configuration."""
    kept = (".onnx", ".data")
    return sum(file.stat().st_size for file in folder.iterdir() if any(part in kept for part in file.suffixes))


def onnx_memory(graph: onnx.GraphProto) -> int:
    """Bytes of the weights that products read: packed ones, and matrices of floats as they are."""
    return sum(map(_packed, graph.node)) + sum(_floats(graph).values())


def _packed(node: onnx.NodeProto) -> int:
    if node.op_type != "MatMulNBits":
        return 0
    found = {item.name: item.i for item in node.attribute}
    return FORMATS[found["bits"]](found["block_size"], False).packed_bytes(found["N"] * found["K"])


def _floats(graph: onnx.GraphProto) -> dict[str, int]:
    """Bytes of each matrix of floats that a product reads, by name."""
    read = {name for node in graph.node if node.op_type in _PRODUCTS for name in node.input}
    sizes = {}
    for tensor in graph.initializer:
        if tensor.name in read and tensor.data_type in _FLOATS and len(tensor.dims) > 1:
            sizes[tensor.name] = _FLOATS[tensor.data_type] * tensor.dims[0] * tensor.dims[1]
    return sizes


def onnx_size(folder: Path) -> dict[str, Any]:
    """`bytes` and `memory` of the one graph in a folder."""
    (path,) = folder.glob("*.onnx")
    return {"bytes": onnx_bytes(folder), "memory": onnx_memory(onnx.load(path, load_external_data=False).graph)}


def gguf_size(path: Path) -> dict[str, Any]:
    """`bytes`, without the tokenizer, which ONNX has beside the model, and `memory`, the same; `file_bytes` as it lies.

    `types` is the share of all matrices' weights by type; `body_bits` the bits per weight of the layers' matrices;
    `promised` the share of their weights that has the type of the file's name; `fallback` the share of all weights in
    tensors that llama.cpp gave a smaller block because super-blocks of 256 channels do not fit their width.
    """
    reader, whole = gguf.GGUFReader(path), path.stat().st_size
    matrices = [tensor for tensor in reader.tensors if len(tensor.shape) > 1]
    body = [tensor for tensor in matrices if tensor.name.startswith("blk.")]
    wanted = _promised(reader)
    weights, layers = _weights(matrices), _weights(body)
    types: Counter[str] = Counter()
    for tensor in matrices:
        types[tensor.tensor_type.name] += int(tensor.n_elements)
    return {
        "bytes": whole - tokenizer_bytes(path),
        "memory": whole - tokenizer_bytes(path),
        "file_bytes": whole,
        "types": {name: count / weights for name, count in types.most_common()},
        "body_bits": 8 * sum(int(tensor.n_bytes) for tensor in body) / layers,
        "promised": _weights([tensor for tensor in body if tensor.tensor_type.name == wanted]) / layers,
        "fallback": _weights([tensor for tensor in matrices if _fell_back(tensor, wanted)]) / weights,
    }


def _promised(reader: gguf.GGUFReader) -> str:
    """The type that a file's own metadata promises."""
    field = reader.get_field("general.file_type")
    name = gguf.LlamaFileType(field.contents()).name.removeprefix("MOSTLY_") if field else "F16"
    return MIXTURES.get(name, name)


def _fell_back(tensor: gguf.ReaderTensor, wanted: str) -> bool:
    block, _ = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
    return int(tensor.shape[0]) % _SUPERBLOCK != 0 and 1 < block < _SUPERBLOCK and tensor.tensor_type.name != wanted


def _weights(tensors: list[gguf.ReaderTensor]) -> int:
    return sum(int(tensor.n_elements) for tensor in tensors)
