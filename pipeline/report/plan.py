"""plan: what each class of phones gets of each model, or why nothing and what would fit; for people or as JSON.

`--json` prints one object. Sizes are bytes, contexts tokens, speeds tokens per second; a FIGURE is {"bytes", "basis"},
its basis one of measured, computed, bound, assumed (`pipeline.planning.devices.Figure`):

    schema          2; raised when a key changes its meaning or goes
    context         tokens that everything is planned for
    runtime_bytes   what counts for runtime, tokenizer and app
    efficiency      {low, high}: shares of the roofline that speeds are expected between
    tiers           name → {platform, ram_bytes, budget_bytes, resident_bytes}
    models          name → {title, parameters, shapes, variants, tiers, devices}
      variants      name → {download, weights, activations, loading, packed, read: FIGURE,
                    kv_cache: {type, bytes_per_token}, permitted, verdict, kl_mean}; permitted: configs/gates.yaml lets
                    it be released for this model; the last two are null where nothing was measured
      tiers         name → {decision: "bundle" or "refuse", variant, needs, closest, suggestions}
                    needs: variant → NEED; variant is null for a refusal, closest (the variant of the smallest need that
                    may be released) for a bundle
      devices       name → {title, tier, memory_bandwidth, runs, tokens_per_second}; runs, a SUGGESTION with no changes
                    for a bundle, and the speeds are null where nothing runs
    NEED            {private_bytes, mapped_bytes, basis, parts: name → FIGURE}
    SUGGESTION      {model, variant, changes, context, kv_cache, prepacked, need: NEED}
    tokens_per_second   {most_empty, most_full, low, high}: the roofline with an empty and a full cache, and the range
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from pipeline.config.models import load_model, load_pipeline, model_names
from pipeline.config.phones import Device, TiersConfig, load_devices, load_tiers
from pipeline.config.typed_yaml import known_name
from pipeline.errors import ConfigError, PipelineError
from pipeline.judge.policy import gate_row
from pipeline.planning.devices import (
    Candidate,
    Decision,
    Need,
    Suggestion,
    budget_bytes,
    decide,
    decode_speed,
    resident_bytes,
)
from pipeline.preflight.footprints import Known, candidates, known
from pipeline.report.phones import Answer, DeviceAnswer, ModelAnswer, lines

SCHEMA = 2
_Built = tuple[Known, list[Candidate]]
"""A model and its variants."""


def run(models: Sequence[str], tier: str | None, device: str | None, context: int | None, as_json: bool) -> None:
    """Print the answer for `models` (none: all of configs/models) on all phones, on a tier's or on one.

    Raises:
        ConfigError: a name that is not configured, with the nearest; a context beyond a model's cap.
        PlanError: a model of unknown shapes, or a recipe that cannot be planned.
    """
    found = answer(models, tier, device, context)
    print(json.dumps(record(found), indent=2, sort_keys=True) if as_json else "\n".join(lines(found)))


def answer(
    models: Sequence[str] = (), tier: str | None = None, device: str | None = None, context: int | None = None
) -> Answer:
    """What `run` prints. Reads configurations, graphs and metrics, never a weight."""
    tiers, devices = _selected(tier, device)
    tokens = context or tiers.context
    all_models = model_names()
    for name in models:
        known_name(name, all_models, "model", "configs/models")
    caps = {name: load_model(name).context for name in all_models}
    asked = models or [name for name in all_models if caps[name] >= tokens]
    _check_context({name: caps[name] for name in asked or all_models}, tokens, given=context is not None)
    built: dict[str, _Built] = {}
    for name in all_models:
        try:
            found = known(name)
            built[name] = found, candidates(found, load_pipeline().variants, tokens)
        except PipelineError:
            if name in asked:
                raise
    answers = [_model(built[name], _decisions(name, built, tiers, tokens), devices) for name in asked]
    return Answer(tokens, tiers, load_devices().efficiency, answers)


def _decisions(model: str, built: dict[str, _Built], tiers: TiersConfig, tokens: int) -> dict[str, Decision]:
    """Every tier's, with the models that have fewer parameters and hold the context to fall back to."""
    sizes = {name: found.architecture.parameters for name, (found, _) in built.items()}
    smaller = [name for name in sizes if sizes[name] < sizes[model] and built[name][0].context_cap >= tokens]
    fallbacks = {name: built[name][1] for name in sorted(smaller, key=lambda name: -sizes[name])}
    return {name: decide(built[model][1], tier, tiers, tokens, fallbacks) for name, tier in tiers.tiers.items()}


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


def _check_context(caps: dict[str, int], tokens: int, given: bool) -> None:
    if over := [f"{name} {cap:,}" for name, cap in caps.items() if tokens > cap]:
        where = "--context" if given else "`context` of configs/tiers.yaml"
        raise ConfigError(
            f"{where} is {tokens:,} tokens, more than graphs are exported for: {', '.join(over)}. Ask for less, or "
            f"raise `context` in configs/models."
        )


def _model(item: _Built, decisions: dict[str, Decision], devices: dict[str, Device]) -> ModelAnswer:
    (found, variants), efficiency = item, load_devices().efficiency
    phones = {}
    for name, device in devices.items():
        runs = decisions[device.tier].runs
        speed = runs and decode_speed(runs.candidate.footprint, runs.way, device.memory_bandwidth, efficiency)
        phones[name] = DeviceAnswer(device, runs, speed)
    title, parameters = load_model(found.model).title, found.architecture.parameters
    permitted = frozenset(one.variant for one in variants if _permitted(found.model, one.variant))
    return ModelAnswer(found.model, title, parameters, found.origin, variants, permitted, decisions, phones)


def _permitted(model: str, variant: str) -> bool:
    """Whether configs/gates.yaml has limits for a variant and lets it be released for this model."""
    try:
        allowed = gate_row(model, variant)[1].opt_in
    except ConfigError:
        return False
    return allowed is None or model in allowed


# --- JSON ------------------------------------------------------------------------------------------------------------


def record(found: Answer) -> dict[str, Any]:
    """The answer for machines, as this module's head describes it."""
    return {
        "schema": SCHEMA,
        "context": found.context,
        "runtime_bytes": found.tiers.runtime_bytes,
        "efficiency": {"low": found.efficiency.low, "high": found.efficiency.high},
        "tiers": {
            name: {
                "platform": tier.platform,
                "ram_bytes": tier.ram_bytes,
                "budget_bytes": budget_bytes(tier),
                "resident_bytes": resident_bytes(tier, found.tiers),
            }
            for name, tier in found.tiers.tiers.items()
        },
        "models": {item.model: _model_record(item) for item in found.models},
    }


def _model_record(item: ModelAnswer) -> dict[str, Any]:
    return {
        "title": item.title,
        "parameters": item.parameters,
        "shapes": item.origin,
        "variants": {one.variant: _variant_record(one, one.variant in item.permitted) for one in item.candidates},
        "tiers": {
            name: {
                "decision": "bundle" if decision.chosen else "refuse",
                "variant": decision.chosen.variant if decision.chosen else None,
                "needs": {variant: _need_record(need) for variant, need in decision.needs.items()},
                "closest": decision.closest.variant if decision.closest else None,
                "suggestions": [_suggestion_record(one, item.model) for one in decision.suggestions],
            }
            for name, decision in item.decisions.items()
        },
        "devices": {
            name: {
                "title": phone.device.title,
                "tier": phone.device.tier,
                "memory_bandwidth": phone.device.memory_bandwidth,
                "runs": phone.runs and _suggestion_record(phone.runs, item.model),
                "tokens_per_second": phone.speed and asdict(phone.speed),
            }
            for name, phone in item.devices.items()
        },
    }


def _variant_record(found: Candidate, permitted: bool) -> dict[str, Any]:
    footprint = found.footprint
    figures = ("download", "weights", "activations", "loading", "packed", "read")
    return {
        **{name: asdict(getattr(footprint, name)) for name in figures},
        "kv_cache": {"type": footprint.kv_cache, "bytes_per_token": footprint.cache_bytes},
        "permitted": permitted,
        "verdict": found.verdict,
        "kl_mean": found.kl_mean,
    }


def _need_record(need: Need) -> dict[str, Any]:
    return {
        "private_bytes": need.private,
        "mapped_bytes": need.mapped,
        "basis": need.basis,
        "parts": {name: asdict(figure) for name, figure in need.parts.items()},
    }


def _suggestion_record(found: Suggestion, model: str) -> dict[str, Any]:
    return {
        "model": found.model or model,
        "variant": found.candidate.variant,
        "changes": list(found.changes),
        **asdict(found.way),
        "need": _need_record(found.need),
    }
