"""README.md: a Hugging Face model card whose model-index holds what was measured, and nothing else.

https://huggingface.co/docs/hub/model-cards. The front matter is written and read by huggingface_hub's own classes; the
Hub's online validation is not asked.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import yaml
from huggingface_hub import EvalResult, ModelCard, ModelCardData

from pipeline.bundle import licence
from pipeline.bundle.dossier import Dossier, figures, limits, measured_by, number, one_line
from pipeline.bundle.release import TELEMETRY
from pipeline.bundle.template import render
from pipeline.tasks.task import Figure

FILE = "README.md"
_TASK = "text-generation"


def build(dossier: Dossier) -> bytes:
    """The model card of a bundle, as UTF-8 Markdown with YAML front matter."""
    sentences = {"telemetry": TELEMETRY, "measured_by": measured_by(dossier), "limits": limits(dossier)}
    lists = {"plan": dossier.plan, "licence_files": _licence_files(dossier), "figures": figures(dossier)}
    body = render(Path(__file__).with_name("card.md.j2"), dossier=dossier, one_line=one_line, **sentences, **lists)
    return f"---\n{_front_matter(dossier)}\n---\n\n".encode() + body


def problem_of(raw: bytes) -> str | None:
    """Why `raw` is not a model card with licence, library, tags, text and a readable model-index; or None."""
    try:
        card = ModelCard(raw.decode())
    except (ValueError, TypeError, KeyError, AttributeError, RecursionError, yaml.YAMLError) as error:
        return f"it is not a model card ({one_line(error)[:200]})"
    if missing := [name for name in ("license", "library_name", "tags") if not getattr(card.data, name)]:
        return f"its front matter lacks {', '.join(missing)}"
    return None if card.text.strip() else "it has no text"


def _front_matter(dossier: Dossier) -> str:
    results = [EvalResult(**_result(figure)) for figure in figures(dossier) if figure.hub]
    data = ModelCardData(
        **_licence(dossier),
        base_model=dossier.entry.hub_name,
        base_model_relation="quantized" if dossier.entry.hub_name else None,
        library_name="onnxruntime-genai",
        pipeline_tag=_TASK,
        tags=["onnx", "onnxruntime", "quantized", dossier.variant],
        model_name=dossier.name,
        eval_results=results or None,
    )
    return data.to_yaml(line_break="\n")


def _licence(dossier: Dossier) -> dict[str, Any]:
    """The Hub knows lower-case SPDX ids; everything else is `other` with a name and, where a text is here, a link."""
    stated = dossier.source.licence
    if (expression := licence.spdx(stated)) and len(expression.split()) == 1:
        return {"license": expression.lower()}
    texts = _licence_files(dossier)
    link = {"license_link": texts[0]} if texts else {}
    return {"license": "other", "license_name": one_line(stated) or "unknown", **link}


def _licence_files(dossier: Dossier) -> list[str]:
    return [name for name in sorted(dossier.files) if licence.is_text(name)]


def _result(figure: Figure) -> dict[str, Any]:
    """One entry of the model-index. How it was asked goes with it: accuracies of other modes do not compare."""
    return {
        "task_type": _TASK,
        "dataset_type": figure.hub_dataset or figure.dataset,
        "dataset_name": figure.detail,
        "dataset_split": "test" if figure.hub_dataset else None,
        "dataset_args": {"n": figure.n} if figure.n is not None else None,
        "metric_type": figure.hub,
        "metric_name": f"{figure.title} ({figure.unit}), {figure.detail}",
        "metric_value": float(number(figure.value)),
    }
