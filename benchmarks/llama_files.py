"""llama.cpp's files by size: bytes of a model in each of its usual mixtures, and the best that a phone's memory admits.

The mixtures are those of `llama_tensor_get_type` in llama.cpp's src/llama-quant.cpp (rules as of 2025-03, without an
importance matrix), in bits per weight. They are counted from shapes; a GGUF header (vocabulary, some MB) is left out.
The rule that admits a file is PocketPal's, an app on llama.cpp, which maps its weights.
"""

from __future__ import annotations

from pipeline.checkpoint.architecture import Architecture, Matrix
from pipeline.planning.recipes import use_more_bits

BITS = {"Q3_K": 3.4375, "Q4_K": 4.5, "Q4_0": 4.5, "Q5_K": 5.5, "Q6_K": 6.5625, "Q8_0": 8.5}
BASES = {
    "Q8_0": "Q8_0", "Q6_K": "Q6_K", "Q5_K_M": "Q5_K", "Q4_K_M": "Q4_K", "Q4_0": "Q4_0", "Q3_K_M": "Q3_K",
    "Q3_K_S": "Q3_K",
}  # fmt: skip
"""Mixtures of at least three bits, the best first, and the type of most of their matrices."""
_RUNTIME, _SHARE, _LEFT = (
    430_000_000,
    0.92,
    1_200_000_000,
)  # bytes of the app; of the file in memory; left to the system


def kind(mixture: str, matrix: Matrix, layers: int) -> str:
    """The type of a matrix of the body."""
    base, layer, role = BASES[mixture], matrix.layer or 0, matrix.role
    value, down = role in {"v_proj", "qkv_proj"}, role in {"down_proj", "expert_down"}
    if mixture in {"Q4_K_M", "Q5_K_M"} and (value or down) and use_more_bits(layer, layers):
        return "Q6_K"
    if mixture == "Q3_K_M":
        if role == "v_proj":
            return "Q5_K" if layer < 2 else "Q4_K"
        if down:
            return "Q5_K" if layer < layers / 16 else "Q4_K"
        if role in {"qkv_proj", "o_proj"}:
            return "Q4_K"
    return base


def file_bytes(mixture: str, architecture: Architecture) -> int:
    """Bytes of the file without its header; norms and biases are float32."""
    output = "Q8_0" if mixture == "Q8_0" else "Q6_K"
    matrices = [(matrix, kind(mixture, matrix, architecture.layers)) for matrix in architecture.matrices[:-1]]
    matrices.append((architecture.head, output))
    if not architecture.tied:
        matrices.append((architecture.embedding, BASES[mixture]))
    counts = [(matrix.rows * matrix.columns, BITS[chosen]) for matrix, chosen in matrices]
    vectors = architecture.parameters - sum(count for count, _ in counts)
    return round(sum(count * bits for count, bits in counts) / 8) + 4 * vectors


def admitted(architecture: Architecture, ram_bytes: int) -> tuple[str, int] | None:
    """The best mixture that the rule lets a phone with so much RAM map, and its bytes; None where there is none."""
    room = min(0.65 * ram_bytes, ram_bytes - _LEFT)
    for mixture in BASES:
        size = file_bytes(mixture, architecture)
        if _SHARE * size + _RUNTIME <= room:
            return mixture, size
    return None
