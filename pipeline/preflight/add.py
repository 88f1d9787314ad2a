"""add: a model of one's own into the line. It reads config, tokenizer and headers, and writes the model's entry."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from pipeline.checkpoint import hub, wheels
from pipeline.checkpoint.architecture import Architecture, read_architecture, shapes_of
from pipeline.checkpoint.blobs import Store
from pipeline.checkpoint.sources import peek
from pipeline.checkpoint.tensors import Checkpoint
from pipeline.config.models import ModelConfig
from pipeline.config.phones import load_shapes
from pipeline.config.sources import HubSource, LocalSource, Source, WheelSource
from pipeline.config.typed_yaml import CONFIGS, check
from pipeline.door.check import check_checkpoint
from pipeline.errors import ConfigError
from pipeline.files import write_bytes
from pipeline.graph.genai import Generation
from pipeline.graph.limits import longest_context
from pipeline.judge.policy import load_gates
from pipeline.preflight import machine
from pipeline.preflight.configuration import require_name
from pipeline.runtime.chat import THINK, template_text

CONTEXT = 4_096
_HUB = re.compile(r"hf://(?P<repo>[\w.-]+/[\w.-]+?)(?:@(?P<revision>[\w./-]+))?/?")
_WHEEL = re.compile(r"pypi://(?P<package>[\w.-]+)@(?P<version>[\w.!+-]+)")
_LETTERS_FROM = 1_000_000_000
"""Parameters from which models answer MMLU with a letter; smaller ones are near chance, and are asked by cloze."""


class Choice(NamedTuple):
    """A key of an entry, and why it has its value."""

    value: Any
    reason: str = ""


def run(name: str, place: str) -> int:
    """Write configs/models/`name`.yaml for the checkpoint at `place`, then print the preflight; its status.

    Args:
        place: hf://OWNER/REPOSITORY[@REVISION], pypi://PACKAGE@VERSION (a wheel with a .gguf file), or a folder.

    Raises:
        ConfigError: the name is taken or is none, or no class of gates judges a model of this size.
        SourceError, CheckpointError, GraphError: as the download stage. Nothing is written then.
    """
    file, shapes_file, store = CONFIGS / "models" / f"{name}.yaml", CONFIGS / "shapes.yaml", Store()
    require_name(name, "add")
    if file.exists():
        raise ConfigError(f"{file} is there already. Remove it, or add the model under another name.")
    source = find_source(place, store)

    def look(folder: Path) -> tuple[dict[str, Choice], Architecture, Checkpoint, Generation, list[str]]:
        choices = propose(source, place, read_architecture(folder / "config.json"))
        entry = check(ModelConfig, {key: choice.value for key, choice in choices.items()}, file)
        found = check_checkpoint(name, entry, folder)  # before its template is read, which may be none
        return choices | propose_asking(template_text(folder), found[0].parameters), *found

    choices, architecture, checkpoint, generation, notes = peek(source, store, look)
    write_bytes(file, _written(choices).encode())
    if not isinstance(source, LocalSource) and name not in load_shapes().models:
        shapes = {name: shapes_of(architecture).model_dump(exclude_defaults=True)}
        indented = textwrap.indent(yaml.safe_dump(shapes, sort_keys=False), "  ")
        write_bytes(shapes_file, shapes_file.read_bytes().rstrip(b"\n") + b"\n" + indented.encode())
    for note in notes:
        print(f"{name}: {note}")
    print(
        f"{name}: {architecture.family}, {architecture.parameters:,} parameters, {len(checkpoint)} tensors, "
        f"{checkpoint.weight_bytes:,} bytes of weights; a text ends at {', '.join(map(str, generation.stops))}"
    )
    print(f"\n{file}\n{_written(choices)}")
    status = machine.run((name,))
    print(f'\nNext: make repro MODELS={name} (VARIANTS="q4 q4_k_m" SUITE=release for a release)')
    return status


def find_source(place: str, store: Store) -> Source:
    """A place as a source that cannot move: a branch as its commit, a wheel by its hash.

    Raises SourceError as the download stage, ConfigError for a place of no kind.
    """
    if match := _HUB.fullmatch(place):
        return hub.resolve(match["repo"], match["revision"], store)
    if match := _WHEEL.fullmatch(place):
        return wheels.resolve(match["package"], match["version"], store)
    if "://" in place:
        kinds = "hf://OWNER/REPOSITORY[@REVISION], pypi://PACKAGE@VERSION or a folder"
        raise ConfigError(f"{place!r} is no place of a checkpoint; {kinds} is needed.")
    return LocalSource(kind="local", path=place)


def propose(source: Source, place: str, architecture: Architecture) -> dict[str, Choice]:
    """What an entry needs, with its reasons. Raises ConfigError where no class of gates judges such a size."""
    size, longest = architecture.parameters, longest_context(architecture)
    mode = ("cloze", "too small for letters") if size < _LETTERS_FROM else ("five-shot", "the field's default")
    return {
        "title": Choice(_title(source, place)),
        "source": Choice(source.model_dump()),
        "context": Choice(min(CONTEXT, longest), f"the model allows {longest:,}; phones pay for what is kept"),
        "gate_class": Choice(_gate_class(size), f"{size:,} parameters"),
        "mmlu_mode": Choice(*mode),
    }


def propose_asking(template: str, parameters: int) -> dict[str, Choice]:
    """How a model with this chat template is asked for code, with reasons."""
    if THINK in template:
        closed = Choice("closed", "its thoughts would meet any limit that can be paid")
        return {"mmlu_close_think": Choice(True, "its template thinks"), "humaneval_prompt": closed}
    if template and parameters >= _LETTERS_FROM:
        return {"humaneval_prompt": Choice("chat", "it has a chat template")}
    return {"humaneval_prompt": Choice("completion", "a small model" if template else "it has no chat template")}


def _title(source: Source, place: str) -> str:
    if isinstance(source, HubSource):
        return source.repo.partition("/")[2]
    return source.package if isinstance(source, WheelSource) else Path(place).resolve().name


def _gate_class(parameters: int) -> str:
    classes = {name: one.parameters for name, one in load_gates().classes.items() if not one.talking}
    for name, (least, most) in classes.items():
        if least <= parameters <= most:
            return name
    there = ", ".join(f"{name} {least:,} to {most:,}" for name, (least, most) in classes.items())
    raise ConfigError(
        f"no class of configs/gates.yaml judges a model of {parameters:,} parameters (there: {there}). Add a class."
    )


def _written(choices: dict[str, Choice]) -> str:
    """An entry as YAML, each key with its reason."""
    lines = []
    for key, (value, reason) in choices.items():
        text = yaml.safe_dump({key: value}, sort_keys=False, allow_unicode=True).rstrip("\n")
        lines.append(f"{text}  # {reason}" if reason else text)
    return "\n".join(lines) + "\n"
