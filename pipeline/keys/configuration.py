"""The configuration that code loads, resolved: what its loading functions give, less the fields that it never reads."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from typing import Any

from pydantic import BaseModel

from pipeline.config.models import load_model, load_pipeline, model_names
from pipeline.config.recipes import load_recipe, recipe_names
from pipeline.config.sources import load_datasets
from pipeline.config.typed_yaml import CONFIGS, read
from pipeline.keys.closure import Closure, modules, source_of

_CONFIGS = "pipeline.config.typed_yaml.CONFIGS"  # a module that imports it reads files there
_BY_VALUE = "load_datasets"  # its entries count where their name is mentioned


@dataclass(frozen=True)
class Item:
    """A model and a variant that a stage runs for; None for a stage that runs for all of them, "" for one that runs for
    the reference, which no recipe decides."""

    model: str | None
    variant: str | None


def resolved(closure: Closure, item: Item) -> dict[str, Any]:
    """What each loading function in a closure gives for an item, as JSON data, by the function's name.

    A function takes `model`, `variant`, `variants` or `suite`, or nothing. Of mappings by model, gate class, gate row
    or dataset only the entries that the item can reach count. Beside the values stands the source of the
    configuration's own properties and methods that are read.
    """
    found: dict[str, Any] = {}
    loaders = dict(sorted(_loaders(closure)))
    reach = _Reach(item, closure)
    for name in sorted(loaders, key=lambda name: name == _BY_VALUE):  # the last: the others mention datasets
        values = [reach.cut(fields_read(value, closure.attributes)) for value in _calls(loaders[name], item)]
        found[name] = values[0] if len(values) == 1 else values
        reach.mentioned |= set(_strings(found[name]))
    own = {"models": bool(item.model), "variants": item.variant is not None}
    for name in (name for name, one in own.items() if one):  # others change nothing for it
        found.get("load_pipeline", {}).pop(name, None)
    return found | closure.methods()


def _loaders(closure: Closure) -> Iterator[tuple[str, Callable[..., Any]]]:
    for name in closure.names:
        module, _, function = name.rpartition(".")
        if function.startswith(("load_", "has_")) and module in modules() and _CONFIGS in source_of(module).imports:
            yield function, getattr(import_module(module), function)


def _calls(loader: Callable[..., Any], item: Item) -> list[Any]:
    """What a loader gives: for the item's model and variant, or for each that is selected."""
    selected = value_of(load_pipeline)
    variants = selected.variants if item.variant is None else tuple(filter(None, [item.variant]))
    choices: dict[str, Iterable[Any]] = {
        "model": [item.model] if item.model else selected.models,
        "variant": variants,
        "variants": [variants],
        "suite": [selected.suite],
    }
    parameter = next(iter(inspect.signature(loader).parameters), None)
    return [value_of(loader)] if parameter is None else [value_of(loader, choice) for choice in choices[parameter]]


@cache
def value_of(loader: Callable[..., Any], *arguments: Any) -> Any:
    """What a loader gives, read once: a run of all stages asks for few values, many times."""
    return loader(*arguments)


def fields_read(value: Any, attributes: frozenset[str]) -> Any:
    """JSON data of a value; of configuration objects only the fields that are read as attributes."""
    if isinstance(value, BaseModel):
        whole = getattr(value, "read_by_name", False)
        fields = (name for name in type(value).model_fields if whole or name in attributes)
        return {name: fields_read(getattr(value, name), attributes) for name in fields}
    if isinstance(value, Mapping):
        return {str(key): fields_read(entry, attributes) for key, entry in value.items()}
    if isinstance(value, list | tuple | set | frozenset):
        entries = [fields_read(entry, attributes) for entry in value]
        return entries if isinstance(value, list | tuple) else sorted(entries)
    return value


class _Reach:
    """Which entries of mappings an item can read; `mentioned`: names that its code and configuration say."""

    def __init__(self, item: Item, closure: Closure):
        gates = value_of(read, CONFIGS / "gates.yaml")["classes"]
        rows = {row for gate_class in gates.values() for row in gate_class["variants"]}
        recipe = value_of(load_recipe, item.variant) if item.variant else None
        self.mentioned = set(closure.strings)
        self._datasets = set(value_of(load_datasets).datasets)
        self._kinds: list[tuple[set[str], str | None]] = [
            (set(model_names()), item.model),
            (set(gates), value_of(load_model, item.model).gate_class if item.model else None),
            ({*rows, *recipe_names()}, recipe and (recipe.gate or item.variant)),
        ]

    def cut(self, value: Any) -> Any:
        """The value without what the item cannot reach."""
        if isinstance(value, list):
            return [self.cut(entry) for entry in value]
        if not isinstance(value, dict):
            return value
        keys = set(value)
        for names, own in self._kinds:
            if own and keys <= names:
                keys &= {own}
        if keys <= self._datasets and keys and not all(isinstance(entry, int) for entry in value.values()):
            keys &= self.mentioned
        return {key: self.cut(entry) for key, entry in value.items() if key in keys}


def _strings(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict | list):
        for entry in (*value, *value.values()) if isinstance(value, dict) else value:
            yield from _strings(entry)
