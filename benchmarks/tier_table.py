"""What every class of phones gets of every model, beside llama.cpp's best file there: README.md and docs/devices.md,
with a picture of two ways.

    python -m benchmarks.tier_table

Ours is what `python -m pipeline plan` answers, measured where a variant was measured, else computed from shapes;
llama.cpp's is counted by `benchmarks.llama_files`.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from benchmarks.llama_files import admitted
from benchmarks.markdown import fill, table
from pipeline.config.models import load_model
from pipeline.config.phones import load_tiers
from pipeline.preflight.footprints import known
from pipeline.report import plan

MODELS = ("mimo-8b", "phi-4", "phi-4-mini", "phi-tiny-moe")
NOTHING = "\N{EN DASH}"
README, DETAIL, PICTURE = Path("README.md"), Path("docs/devices.md"), Path("docs/images/ways.png")
DRAWN = ("mimo-8b", "q4_k_m", "android-12gb")
_COLOURS = {
    "weights": "#4269d0", "kv_cache": "#efb118", "activations": "#ff725c", "runtime": "#9c9ca3", "mapped": "#c3d0f2"
}  # fmt: skip


def theirs(model: str, ram_bytes: int) -> tuple[str, str]:
    """The mixture that llama.cpp's rule admits, and GB of its file."""
    found = admitted(known(model).architecture, ram_bytes)
    return (found[0], f"{found[1] / 1e9:.2f}") if found else (NOTHING, "")


def overview(answer: dict[str, Any]) -> str:
    """A row for each class; in a model's columns what runs of ours, and llama.cpp's file."""
    rows = []
    for tier, limits in answer["tiers"].items():
        cells = []
        for model in MODELS:
            chosen = answer["models"][model]["tiers"][tier]["chosen"]
            cells += [_ours(chosen), theirs(model, limits["ram_bytes"])[0]]
        rows.append([tier, *cells])
    heads = [head for model in MODELS for head in (model, "llama.cpp")]
    return table(["class", *heads], rows)


def _ours(chosen: dict[str, Any] | None) -> str:
    if chosen is None:
        return NOTHING
    way = chosen["need"]["way"]
    return f"{chosen['variant']} {way['weights']}"


def details(answer: dict[str, Any]) -> str:
    """A row for each model and class."""
    head = (
        "model, class", "ours", "context", "download, GB", "private, GB", "mapped, GB", "of GB", "read a token, GB",
        "KL, nats", "basis",
        "llama.cpp", "file, GB",
    )  # fmt: skip
    rows = []
    for model in MODELS:
        found = answer["models"][model]
        for tier, row in found["tiers"].items():
            beside, limits = theirs(model, answer["tiers"][tier]["ram_bytes"]), answer["tiers"][tier]
            rows.append([f"{model}, {tier}", *_detail(found["variants"], row["chosen"], limits), *beside])
    return table(head, rows)


def _detail(variants: dict[str, Any], chosen: dict[str, Any] | None, limits: dict[str, Any]) -> list[str]:
    if chosen is None:
        return [NOTHING, *[""] * 8]
    variant, need = variants[chosen["variant"]], chosen["need"]
    way = need["way"]
    room = limits["resident_bytes" if way["weights"] == "mapped" else "budget_bytes"]
    quality = "not measured" if variant["kl_mean"] is None else f"{variant['kl_mean']:.3f}"
    at_most = "≤ " if variant["download"]["basis"] == "bound" else ""
    return [
        _ours(chosen), f"{way['context']:,}", f"{at_most}{variant['download']['bytes'] / 1e9:.2f}",
        *(f"{need[key] / 1e9:.2f}" for key in ("private_bytes", "mapped_bytes")), f"{room / 1e9:.2f}",
        f"{variant['read']['bytes'] / 1e9:.2f}", quality,
        need["basis"],
    ]  # fmt: skip


def draw(answer: dict[str, Any]) -> None:
    """Both ways of one variant beside what the class allows."""
    model, variant, tier = DRAWN
    ways, limits = answer["models"][model]["variants"][variant]["ways"], answer["tiers"][tier]
    figure = Figure((7.2, 3.2), dpi=160, layout="constrained")
    axes = figure.subplots()
    for weights, need in ways.items():
        left = 0.0
        for part, colour in _COLOURS.items():
            size = need["parts"][part]["bytes"] / 1e9
            label = part.replace("_", " ") if weights == "mapped" else None
            axes.barh(f"weights {weights}", size, 0.55, left, color=colour, label=label)
            left += size
        peak = (need["private_bytes"] + need["mapped_bytes"]) / 1e9
        loading = ", as it loads" if weights == "private" else ""
        axes.text(
            left + 0.06, f"weights {weights}", f"{peak:.2f} GB{loading}", va="center", fontsize=8, backgroundcolor="w"
        )
    for key, word in (("budget_bytes", "private memory of an app"), ("resident_bytes", "stays in RAM")):
        axes.axvline(limits[key] / 1e9, color="#1f2328", linestyle="--", linewidth=1)
        side = "right" if key == "budget_bytes" else "left"
        axes.text(limits[key] / 1e9, 1.55, f" {word}: {limits[key] / 1e9:.2f} GB ", ha=side, fontsize=8)
    axes.set(xlabel="GB", xlim=(0, limits["resident_bytes"] / 1e9 + 1.7), ylim=(-0.5, 1.9))
    axes.set_title(f"{variant} of {model} on {tier}, 2,048 tokens", loc="left", fontsize=10)
    figure.legend(ncols=5, loc="outside lower center", frameon=False, fontsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(PICTURE, metadata={"Software": None})


def main() -> None:
    """Rewrite both tables and the picture."""
    tokens = load_tiers().context
    found = [plan.answer([model], context=min(tokens, load_model(model).context)) for model in MODELS]
    answer = found[0] | {"models": {name: item for one in found for name, item in one["models"].items()}}
    draw(answer)
    fill(README, {"tiers": overview(answer)})
    fill(DETAIL, {"tiers": details(answer)})


if __name__ == "__main__":
    main()
