"""configs/evaluation/<suite>.yaml, configs/parity.yaml"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import Field, model_validator

from pipeline.config.models import ModelConfig
from pipeline.config.typed_yaml import CONFIGS, Frozen, Name, load


class DivergenceConfig(Frozen):
    """KL divergence, top-1 agreement and perplexity on held-out text. `tokens` counts scored positions."""

    texts: dict[Name, Annotated[int, Field(gt=0)]] = Field(min_length=1)
    window: int = Field(gt=1)


class MmluConfig(Frozen):
    """MMLU subset: `questions` stratified over the 57 subjects, and what five-shot prompts show before each."""

    questions: int = Field(ge=57, le=14_042)
    seed: int = 0
    exemplars: Literal["held-out", "dev"] = Field(
        default="held-out",
        description="held-out: test questions that are never asked; dev: the official development split, from the Hub",
    )


class HumanEvalConfig(Frozen):
    """HumanEval subset: how many solutions of each problem are drawn and how long they may be, run in the sandbox."""

    problems: int = Field(ge=2, le=164)
    samples: int = Field(default=1, ge=1, le=1000, description="solutions of each problem")
    temperature: float = Field(default=0, ge=0, description="0: greedy")
    top_p: float = Field(default=1, gt=0, le=1)
    seed: int = 0
    k: tuple[Annotated[int, Field(ge=1)], ...] = Field(default=(1,), description="pass@k to report beside pass@1")
    max_new_tokens: int = Field(gt=0, description="of a completion, which ends with the function's body")
    max_chat_tokens: int = Field(default=768, gt=0, description="of a chat answer: the whole function, and prose")
    max_think_tokens: int = Field(default=2048, gt=0, description="of the thinking before a chat answer")
    timeout_seconds: float = Field(gt=0)
    allow_unsafe: bool = Field(default=False, description="run generated code even where nothing contains it")

    @model_validator(mode="after")
    def _can_be_estimated(self) -> HumanEvalConfig:
        if self.samples > 1 and self.temperature == 0:
            raise ValueError(f"{self.samples} greedy samples are {self.samples} times the same: raise `temperature`")
        if max(self.k, default=1) > self.samples:
            raise ValueError(f"pass@{max(self.k)} needs {max(self.k)} samples of each problem, not {self.samples}")
        return self

    def answer_tokens(self, entry: ModelConfig) -> int:
        """The limit of an answer, by how the model is asked."""
        return self.max_new_tokens if entry.humaneval_prompt == "completion" else self.max_chat_tokens

    def thinking_tokens(self, entry: ModelConfig) -> int:
        """The limit of what comes before the answer: 0 for a model that does not think."""
        return self.max_think_tokens if entry.humaneval_prompt == "thinking" else 0


class SpeedConfig(Frozen):
    """Speed and memory, measured in fresh processes through onnxruntime-genai."""

    prompt_tokens: tuple[Annotated[int, Field(gt=0)], ...] = Field(
        min_length=1, description="prompt lengths; the context caps them"
    )
    new_tokens: int = Field(gt=1)
    repeats: int = Field(gt=0)


class EvaluationConfig(Frozen):
    """One evaluation suite, and how a machine runs the full-precision reference through it."""

    reference: Literal["auto", "memory", "layers"] = Field(
        default="auto",
        description="whole in memory; layer by layer, without HumanEval and speed; auto: in memory where it fits",
    )
    divergence: DivergenceConfig
    mmlu: MmluConfig
    humaneval: HumanEvalConfig
    speed: SpeedConfig


class ParityConfig(Frozen):
    """How the exported graph is compared with Optimum's export of the same checkpoint."""

    max_relative_error: float = Field(gt=0)
    memory_bytes: int = Field(gt=0, description="peak memory that the reference export may take")
    prompt_tokens: int = Field(gt=1)


def load_suite(suite: str) -> EvaluationConfig:
    """configs/evaluation/<name>.yaml"""
    return load(EvaluationConfig, CONFIGS / "evaluation" / f"{suite}.yaml")


def load_parity() -> ParityConfig:
    """configs/parity.yaml"""
    return load(ParityConfig, CONFIGS / "parity.yaml")
