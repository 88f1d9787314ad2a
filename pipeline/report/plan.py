"""plan: what each class of phones gets of each model, or why nothing and what would fit; for people or as JSON.

`--json` prints one object. Sizes are bytes, contexts tokens, speeds tokens per second; a FIGURE is {"bytes", "basis"},
its basis one of measured, computed, bound, assumed (`pipeline.planning.devices.Figure`):

    schema          4; raised when a key changes its meaning or goes
    context         tokens that everything is planned for
    runtime_bytes   what counts for runtime, tokenizer and app
    efficiency      {low, high}: shares of the roofline that speeds are expected between
    tiers           name → {platform, ram_bytes, budget_bytes, resident_bytes}
    models          name → {title, parameters, shapes, variants, forbidden, tiers, devices}
      variants      name → {download, weights, activations, loading, packed, read: FIGURE,
                    kv_cache: {type, bytes_per_token}, ways: "private" or "mapped" → NEED, verdict, kl_mean}; the last
                    two are null where nothing was measured
      forbidden     name → why configs/gates.yaml lets no such variant of this model be released, or its recipe has no
                    plan for it; it stands nowhere else
      tiers         name → {decision: "bundle" or "refuse", chosen, closest, instead: CHOICE or null, lacks_bytes};
                    closest comes nearest to fitting and lacks so many bytes, instead is a smaller model; all three are
                    null for a bundle
      devices       name → {title, tier, memory_bandwidth, runs, tokens_per_second, measured}; runs is a CHOICE; it and
                    the speeds are null where nothing runs; measured are the phone's rows of configs/measured.yaml
    NEED            {way: {context, kv_cache, weights, prefill_chunk, threads}, private_bytes, mapped_bytes, basis,
                    parts: name → FIGURE}
    CHOICE          {model, variant, need: NEED}
    tokens_per_second   {most_empty, most_full, low, high}: the roofline with an empty and a full cache, and the range
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from pipeline.config.models import load_model, load_pipeline, model_names
from pipeline.config.phones import Device, Tier, TiersConfig, load_devices, load_measured, load_tiers
from pipeline.config.typed_yaml import known_name
from pipeline.errors import ConfigError, PipelineError, PlanError
from pipeline.planning import devices as planning
from pipeline.preflight.chance import forbidden
from pipeline.preflight.footprints import Known, candidate, known
from pipeline.report.phones import lines

SCHEMA = 4
Built = Mapping[str, tuple[Known, list[planning.Candidate], dict[str, str]]]
"""Models, each with its variants, and why there are no more."""


def run(models: Sequence[str], tier: str | None, device: str | None, context: int | None, as_json: bool) -> None:
    """Print the answer for `models` (none: all of configs/models) on all phones, on a tier's or on one.

    Raises:
        ConfigError: a name that is not configured, with the nearest; a context beyond a model's cap.
        PlanError: a model of unknown shapes, or a recipe that cannot be planned.
    """
    found = answer(models, tier, device, context)
    print(json.dumps(found, indent=2, sort_keys=True) if as_json else "\n".join(lines(found)))


def answer(
    models: Sequence[str] = (), tier: str | None = None, device: str | None = None, context: int | None = None
) -> dict[str, Any]:
    """The document that this module's head describes. Reads configurations, graphs and metrics, never a weight."""
    tiers, devices = _selected(tier, device)
    tokens, efficiency = context or tiers.context, load_devices().efficiency
    caps = {name: load_model(name).context for name in model_names()}
    for name in models:
        known_name(name, caps, "model", "configs/models")
    asked = models or [name for name, cap in caps.items() if cap >= tokens]
    if over := [f"{name} {caps[name]:,}" for name in asked or caps if tokens > caps[name]]:
        where = "`context` of configs/tiers.yaml" if context is None else "--context"
        raise ConfigError(
            f"{where} is {tokens:,} tokens, more than graphs are exported for: {', '.join(over)}. Ask for less, or "
            f"raise `context` in configs/models."
        )
    built = {}
    for name in caps:
        try:
            found = known(name)
            built[name] = found, *_variants(found, tokens)
        except PipelineError:
            if name in asked:
                raise
    return {
        "schema": SCHEMA,
        "context": tokens,
        "runtime_bytes": tiers.runtime_bytes,
        "efficiency": {"low": efficiency.low, "high": efficiency.high},
        "tiers": {
            name: item.model_dump(include={"platform", "ram_bytes"})
            | {"budget_bytes": planning.budget_bytes(item), "resident_bytes": planning.resident_bytes(item, tiers)}
            for name, item in tiers.tiers.items()
        },
        "models": {name: _model(name, built, tiers, tokens, devices) for name in asked},
    }


def _selected(tier: str | None, device: str | None) -> tuple[TiersConfig, dict[str, Device]]:
    """The tiers and phones that are asked about."""
    tiers, devices = load_tiers(), load_devices().devices
    if device is not None:
        known_name(device, devices, "device", "configs/devices.yaml")
        tier, devices = devices[device].tier, {device: devices[device]}
    if tier is not None:
        known_name(tier, tiers.tiers, "tier", "configs/tiers.yaml")
        devices = {name: item for name, item in devices.items() if item.tier == tier}
        tiers = tiers.model_copy(update={"tiers": {tier: tiers.tiers[tier]}})
    return tiers, devices


def _variants(found: Known, tokens: int) -> tuple[list[planning.Candidate], dict[str, str]]:
    candidates, refused = [], {}
    for variant in load_pipeline().variants:
        if why := forbidden(found.model, variant):
            refused[variant] = why
            continue
        try:
            candidates.append(candidate(found, variant, tokens))
        except PlanError as error:
            refused[variant] = str(error).removesuffix(".")
    return candidates, refused


def _model(model: str, built: Built, tiers: TiersConfig, tokens: int, devices: Mapping[str, Device]) -> dict[str, Any]:
    """Models that have fewer parameters and hold the context are what a tier falls back to."""
    found, variants, refused = built[model]
    sizes = {name: one.architecture.parameters for name, (one, *_) in built.items() if one.context_cap >= tokens}
    smaller = sorted((name for name in sizes if sizes[name] < found.architecture.parameters), key=lambda n: -sizes[n])
    fallbacks = {name: built[name][1] for name in smaller}
    decisions = {name: planning.decide(variants, tier, tiers, tokens, fallbacks) for name, tier in tiers.tiers.items()}
    measured = load_measured().rows
    return {
        "title": load_model(model).title,
        "parameters": found.architecture.parameters,
        "shapes": found.origin,
        "variants": {one.variant: _variant(one, tiers, tokens) for one in variants},
        "forbidden": refused,
        "tiers": {name: _tier(one, model, tiers.tiers[name], tiers) for name, one in decisions.items()},
        "devices": {
            name: _device(device, decisions[device.tier].runs, model)
            | {"measured": [row.model_dump() for row in measured if (row.device, row.model) == (name, model)]}
            for name, device in devices.items()
        },
    }


def _variant(found: planning.Candidate, tiers: TiersConfig, tokens: int) -> dict[str, Any]:
    footprint, tier = found.footprint, next(iter(tiers.tiers.values()))
    # Of each kind of weights the last, with the shortest chunks.
    ways = {one.way.weights: _need(one) for one in planning.needs(footprint, tier, tiers, tokens)}
    figures = ("download", "weights", "activations", "loading", "packed", "read")
    return {
        **{name: asdict(getattr(footprint, name)) for name in figures},
        "kv_cache": {"type": footprint.kv_cache, "bytes_per_token": footprint.cache_bytes},
        "ways": ways,
        "verdict": found.verdict,
        "kl_mean": found.kl_mean,
    }


def _tier(found: planning.Decision, model: str, tier: Tier, tiers: TiersConfig) -> dict[str, Any]:
    choices = {name: _choice(getattr(found, name), model) for name in ("chosen", "closest", "instead")}
    lacks = planning.excess(found.closest.need, tier, tiers) if found.closest else None
    return {"decision": "bundle" if found.chosen else "refuse", **choices, "lacks_bytes": lacks}


def _device(device: Device, runs: planning.Choice | None, model: str) -> dict[str, Any]:
    speed = runs and planning.decode_speed(
        runs.candidate.footprint, runs.need.way.context, device.memory_bandwidth, load_devices().efficiency
    )
    return {
        **device.model_dump(include={"title", "tier", "memory_bandwidth"}),
        "runs": _choice(runs, model),
        "tokens_per_second": speed and asdict(speed),
    }


def _need(found: planning.Need) -> dict[str, Any]:
    parts = {name: asdict(figure) for name, figure in found.parts.items()}
    sizes = {"private_bytes": found.private, "mapped_bytes": found.mapped, "basis": found.basis}
    return {"way": asdict(found.way), **sizes, "parts": parts}


def _choice(found: planning.Choice | None, model: str) -> dict[str, Any] | None:
    if found is None:
        return None
    return {"model": found.model or model, "variant": found.candidate.variant, "need": _need(found.need)}
