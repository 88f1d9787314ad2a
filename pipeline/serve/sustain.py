"""sustain: a bundle generates for minutes on end, on this machine; and the import of what a phone recorded.

Cold and warm start first, then one answer after the other, each as long as the power profile allows. Every second is
looked at. Threads and chunk are set when a model is loaded, so here only pauses and lengths change with the heat.
"""

from __future__ import annotations

import io
import json
import math
import platform
import time
from collections.abc import Callable, Iterator, Sequence
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import onnxruntime_genai as genai
import yaml
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from pipeline import files
from pipeline.bundle.release import CONTENT, Release, parse
from pipeline.config.phones import MeasuredConfig, load_measured
from pipeline.config.typed_yaml import CONFIGS
from pipeline.errors import BundleError, ConfigError
from pipeline.machine import resident_memory
from pipeline.runtime.generate import Prompter, load
from pipeline.runtime.heat import Governor, load_profile, replayed
from pipeline.runtime.pagecache import evict
from pipeline.runtime.sustained import Sample, Sustained, rates, summary
from pipeline.serve.bundles import verified

_PROMPT = "Write a long history of a town at a river, from its first bridge on."
_INTERVAL = 1.0  # seconds between two looks
_SYSTEM = Path("/sys")
_HEAD = """\
# What phones showed under sustained load. `python -m pipeline sustain --import FILE` writes this file; docs/phone.md
# says how a phone makes FILE.
"""


def _highest(pattern: str, scale: float) -> float | None:
    """The highest of the system's readings; None where it shows none."""
    readings = []
    for path in _SYSTEM.glob(pattern):
        try:
            readings.append(int(path.read_text()) * scale)
        except (OSError, ValueError):  # a sensor that is switched off
            continue
    return max(readings, default=None)


def _readings() -> dict[str, float | None]:
    """Hottest zone in °C, fastest core in hertz."""
    celsius = _highest("class/thermal/thermal_zone*/temp", 1e-3)
    return {"celsius": celsius, "hertz": _highest("devices/system/cpu/cpu*/cpufreq/scaling_cur_freq", 1e3)}


def _started(folder: Path) -> tuple[genai.Model, float | None, float]:
    """A loaded model, and the seconds that loading took cold (None where the page cache kept some of it) and warm."""
    kept, begin = evict(folder), time.monotonic()
    load(folder)
    cold, begin = time.monotonic() - begin, time.monotonic()
    model = load(folder)
    return model, None if kept else cold, time.monotonic() - begin


def _answers(model: genai.Model, folder: Path, governor: Governor) -> Iterator[int]:
    """Tokens written, one by one, without end; 0 where the profile lets nothing be written now."""
    prompter = Prompter(folder)
    ids = list(map(int, prompter.tokenizer.encode(_PROMPT)))
    while True:
        if governor.row.answer_tokens == 0:
            yield 0
            continue
        params = genai.GeneratorParams(model)
        params.set_search_options(max_length=prompter.context, do_sample=False)
        generator = genai.Generator(model, params)
        generator.append_tokens(ids)
        for written in range(prompter.context - len(ids)):
            most = governor.row.answer_tokens
            if most is not None and written >= most:
                break
            generator.generate_next_token()
            yield 1
            if int(generator.get_next_tokens()[0]) in prompter.stop_ids:
                break


def observe(
    answers: Iterator[int], governor: Governor, seconds: float, celsius: Callable[[float], float | None]
) -> list[Sample]:
    """Follow `answers` for so long. `celsius`: the temperature that the profile follows, by the share of the run."""
    begin = last = time.monotonic()
    samples: list[Sample] = []
    tokens = 0
    while (now := time.monotonic()) - begin < seconds:
        if now - last >= _INTERVAL or not samples:
            heat = celsius((now - begin) / seconds)
            private, mapped = resident_memory()
            seen = _readings() | ({} if heat is None else {"celsius": heat})
            step = governor.observe({"celsius": seen["celsius"]})
            samples.append(
                Sample(
                    seconds=now - begin, tokens=tokens, step=step, private_bytes=private, mapped_bytes=mapped, **seen
                )
            )
            last, tokens = now, 0
        written = next(answers)
        tokens += written
        time.sleep(governor.row.pause_ms / 1000 if written else _INTERVAL / 10)
    return samples


def run(
    bundle: Path,
    public_keys: Sequence[Path] = (),
    minutes: float = 10.0,
    celsius: str | None = None,
    device: str = "this-machine",
    target: Path = Path(".bench/sustained"),
    unverified: bool = False,
) -> None:
    """Measure `bundle`, write `target`/sustained.json and .png, and print what they say.

    Raises:
        BundleError: it does not verify. ConfigError: the trace is none. EvaluationError: it cannot be loaded, or the
        run was too short to say anything.
    """
    trace, profile = _trace(celsius), load_profile()
    if not unverified:
        verified(bundle, public_keys)
    folder = bundle if unverified else bundle / CONTENT
    said = _said(folder)
    model, cold, warm = _started(folder)
    governor, begun = Governor(profile), datetime.now(UTC)
    samples = observe(_answers(model, folder, governor), governor, 60 * minutes, lambda share: replayed(trace, share))
    found = Sustained(
        format=1, kind="sustained", device=device, system=platform.platform(), **said, way={"weights": "private"},
        runtime=f"onnxruntime-genai {genai.__version__}", started=begun.strftime("%Y-%m-%dT%H:%M:%SZ"),
        cold_start_seconds=cold, warm_start_seconds=warm, samples=samples,
    )  # fmt: skip
    row = summary(found)
    files.write_json(target / Sustained.file_name, found.model_dump(mode="json"))
    files.write_bytes(target / "sustained.png", draw(found))
    print(f"{target / Sustained.file_name}: {json.dumps(row.model_dump(), indent=2)}")


def _trace(text: str | None) -> list[float]:
    try:
        trace = [] if text is None else [float(one) for one in text.split(",")]
    except ValueError:
        trace = [math.nan]
    if not all(map(math.isfinite, trace)):
        raise ConfigError(f"--celsius {text!a} is no list of temperatures, such as 30,36,43.")
    return trace


def _said(folder: Path) -> dict[str, Any]:
    """Model, variant and release of a bundle's content; of another folder its name."""
    if (path := folder / Release.file_name).is_file():
        return parse(Release, path.read_bytes()).model_dump(include={"model", "variant", "release"})
    return {"model": "unknown", "variant": folder.name.lower()[:40], "release": None}


def draw(record: Sustained) -> bytes:
    """Tokens per second, memory and heat over time, as PNG."""
    figure = Figure(figsize=(8.6, 6.4), layout="constrained")
    speed, memory, heat = figure.subplots(3, 1, sharex=True)
    speed.step(*zip(*rates(record), strict=True), where="pre", color="#1a7f37")
    speed.set(ylabel="tokens/s", ylim=(0, None), title=f"{record.device}: {record.model} {record.variant}")
    seconds = [one.seconds for one in record.samples]
    for name, colour in (("private_bytes", "#0969da"), ("mapped_bytes", "#8250df")):
        memory.plot(
            seconds, [(getattr(one, name) or 0) / 1e6 for one in record.samples], label=name.split("_")[0], color=colour
        )
    memory.set(ylabel="MB", ylim=(0, None))
    memory.legend(frameon=False)
    heat.plot(seconds, [one.celsius for one in record.samples], color="#cf222e")
    heat.set(ylabel="°C", xlabel="seconds")
    if any(one.hertz for one in record.samples):
        clock = speed.twinx()
        clock.plot(seconds, [one.hertz and one.hertz / 1e9 for one in record.samples], color="#6e7781")
        clock.set(ylabel="GHz", ylim=(0, None))
    steps = heat.twinx()
    steps.step(seconds, [one.step for one in record.samples], where="post", color="#9a6700")
    steps.set(ylabel="step", ylim=(-0.2, 3.2), yticks=range(4))
    image = io.BytesIO()
    FigureCanvasAgg(figure).print_png(image, metadata={"Software": None})
    return image.getvalue()


def take_over(path: Path) -> None:
    """Put a phone's record into configs/measured.yaml, in place of an earlier one of the same phone, variant and way.

    Raises:
        BundleError: the file is no record. EvaluationError: it was too short.
    """
    try:
        row = summary(parse(Sustained, path.read_bytes()))
    except OSError as error:
        raise BundleError(f"{path} cannot be read: {error.strerror}.") from None
    except ValueError as error:
        raise BundleError(
            f"{path} is no record of sustained load (docs/schemas/sustained.schema.json): {error}."
        ) from None
    rows = [one for one in load_measured().rows if one.key != row.key] + [row]
    document = MeasuredConfig(rows=tuple(sorted(rows, key=lambda one: one.key))).model_dump(mode="json")
    text = _HEAD + yaml.safe_dump(document, sort_keys=False, allow_unicode=True)
    files.write_bytes(CONFIGS / "measured.yaml", text.encode())
    what = f"{row.device} runs {row.model} {row.variant} at {row.sustained_tokens_per_second} tokens/s"
    print(f"configs/measured.yaml: {what}")
