"""Graphs for speculative decoding: several drafted tokens are verified in one pass over the weights.

Drafts are n-grams of the text itself, or come from a model's own multi-token head. Both graphs are for
onnxruntime-genai 0.18: its Generator looks n-grams up, its MtpGenerator runs a head beside the decoder.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import onnx
from onnx import TensorProto, helper

from pipeline.checkpoint.architecture import Architecture, MtpHead
from pipeline.checkpoint.tensors import TensorRef
from pipeline.graph.decoder import Decoder
from pipeline.graph.last_token import every_token
from pipeline.graph.limits import check_context
from pipeline.graph.nodes import value_info

MTP_FILE = "mtp.onnx"
HIDDEN, FED_BACK = "hidden_states", "hidden_states_out"
CHUNK = 64
"""Tokens of a prompt that are read at a time: every one of them has logits here."""
_LOGITS = "logits/float32"


def verifying(model: onnx.ModelProto, architecture: Architecture) -> onnx.ModelProto:
    """A decoder graph whose pass over several tokens judges each of them.

    It gives the logits of every token, float16 [batch, sequence, vocab], as differences from the token's largest: the
    MtpGenerator of onnxruntime-genai 0.18 refuses float32 on a CPU ("Cast - input and output types are the same"), and
    float16 tells logits near 0 apart as finely as float32 does large ones. Greedy choices and probabilities are those
    of `model`; a repetition penalty, which looks at the sign, is not. It also gives `HIDDEN`, float32 [batch, sequence,
    hidden]: the states before the final norm.
    """
    found = onnx.ModelProto()
    found.CopyFrom(every_token(model))
    graph = found.graph
    for node in graph.node:
        node.output[:] = [_LOGITS if name == "logits" else name for name in node.output]
    graph.initializer.append(onnx.numpy_helper.from_array(np.array([-1], np.int64), "last_axis"))
    largest, below = "logits/largest", "logits/below"
    graph.node.extend(
        [
            helper.make_node("ReduceMax", [_LOGITS, "last_axis"], [largest], name=largest, keepdims=1),
            helper.make_node("Sub", [_LOGITS, largest], [below], name=below),
            helper.make_node("Cast", [below], ["logits"], name="logits/float16", to=TensorProto.FLOAT16),
            _named(_before(graph, architecture.final_norm), HIDDEN),
        ]
    )
    logits = next(value for value in graph.output if value.name == "logits")
    logits.type.tensor_type.elem_type = TensorProto.FLOAT16
    graph.output.append(value_info(HIDDEN, TensorProto.FLOAT, ["batch", "sequence", architecture.hidden]))
    return found


def build_mtp(head: MtpHead, checkpoint: Mapping[str, TensorRef], context: int) -> onnx.ModelProto:
    """The full-precision graph of a multi-token head, over the decoder's rotary tables (`decoder.ROPE_FILE`).

    Beside a decoder's inputs it takes `HIDDEN`, float32 [batch, sequence, hidden]: for each token the decoder's state
    from which it was predicted. Its logits are of the token after. `FED_BACK` is what takes the place of `HIDDEN` where
    it drafts on from its own token. Raises GraphError as `check_context`.
    """
    check_context(head, context)
    return _Mtp(head, checkpoint, context).write()


class _Mtp(Decoder):
    """The decoder's parts between other ends."""

    arch: MtpHead

    def write(self) -> onnx.ModelProto:
        shape: list[int | str] = ["batch", "sequence", self.arch.hidden]
        self.inputs.append(value_info(HIDDEN, TensorProto.FLOAT, shape))
        model = super().write()
        model.graph.node.append(_named(self.arch.final_norm, FED_BACK))
        model.graph.output.append(value_info(FED_BACK, TensorProto.FLOAT, shape))
        return model

    def embedding(self) -> str:
        normed = [
            self.norm(x, None, name)[0]
            for x, name in zip((HIDDEN, super().embedding()), self.arch.input_norms, strict=True)
        ]
        return self.linear(self.node("Concat", normed, "joined", axis=-1), self.arch.projection, "projected")


def _before(graph: onnx.GraphProto, norm: str) -> str:
    """The states that a norm of residual and block reads: their sum."""
    return next(node.output[3] for node in graph.node if node.name == norm)


def _named(source: str, name: str) -> onnx.NodeProto:
    return helper.make_node("Identity", [source], [name], name=name)


# --- what onnxruntime-genai is to be told ----------------------------------------------------------------------------


def ngram_settings(graph: str, tokens: int, ngram: int) -> dict[str, Any]:
    """Laid over genai_config.json (genai's Config.overlay): a Generator drafts up to `tokens` that followed the last
    `ngram` tokens where they stood before."""
    return _verified(graph, tokens) | {"speculative": {"max_draft_tokens": tokens, "ngram_size": ngram}}


def mtp_settings(graph: str, head: str, architecture: Architecture, tokens: int) -> dict[str, dict[str, Any]]:
    """Laid over genai_config.json for both models of an MtpGenerator, `decoder` and `head`: graphs of these names."""
    decoder = _verified(graph, tokens)
    decoder["model"]["mtp"] = {
        "filename": head,
        "num_hidden_layers": 1,
        "num_key_value_heads": architecture.kv_heads,
        "head_size": architecture.head_dim,
        "main_hidden_states": HIDDEN,
        "outputs": {"hidden_states": FED_BACK},
    }
    own = {"filename": head, "num_hidden_layers": 1, "inputs": {"hidden_states": HIDDEN}}
    return {"decoder": decoder, "head": {"model": {"decoder": own | {"outputs": {"hidden_states": FED_BACK}}}}}


def _verified(graph: str, tokens: int) -> dict[str, Any]:
    decoder = {"filename": graph, "outputs": {"hidden_states": HIDDEN}}
    search, drafts = {"chunk_size": CHUNK}, {"max_draft_tokens": tokens}
    return {"model": {"decoder": decoder}, "search": search, "speculative": drafts}
