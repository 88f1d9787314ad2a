"""What computes full-precision passes: this machine's cores with ONNX Runtime, or a GPU with torch.

On a GPU the same graphs run node by node (`pipeline.runtime.interpreter`). Weights lie there as the checkpoint has
them, in 16 bits; a product widens its matrix for as long as it takes, so products are float32 on both devices.

ONNX Runtime's CUDA provider cannot do this: its GroupQueryAttention takes 16-bit activations only
(contrib_ops/cuda/bert/group_query_attention.cc), so every layer would go back to the CPU in its middle; and its package
puts other libraries in the place of those that ship. Quantized artifacts are opened by `pipeline.runtime.session`,
which knows no device: they are judged on the CPU's kernels.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from pipeline import machine
from pipeline.config.models import load_device
from pipeline.engine import Engine, Here, chosen, narrow
from pipeline.errors import ConfigError
from pipeline.runtime.session import SliceRun, check_weights, open_slice

if TYPE_CHECKING:
    import onnx

T = TypeVar("T")
Array = Any
"""numpy's on the CPU, torch's on a GPU: of what both call alike (`Device.xp`) code for both is written."""
INSTALL = (
    "PyPI's torch for Linux computes on NVIDIA's: python -m pip install --force-reinstall -r requirements.txt "
    "-c constraints.txt, without the index of CPU builds. nvidia-smi says whether the driver sees the GPU"
)


class Device:
    """The CPU.

    Attributes:
        kind: "cpu" or torch's name of a device.
        name: what results are recorded under: those of two names are not put together.
        xp: the module of its arrays.
    """

    kind = name = "cpu"
    xp: Any = np

    def put(self, values: np.ndarray) -> Array:
        """An array as the device's own."""
        return values

    def get(self, values: Array) -> np.ndarray:
        """The device's array as numpy's."""
        return values

    def open(self, model: onnx.ModelProto, folder: Path, threads: int = 0) -> SliceRun:
        """`session.open_slice`; what runs may be given arrays of the device too."""
        return open_slice(model, folder, threads)

    def memory(self, weight_bytes: int) -> int:
        """Bytes free for what a model works on, `weight_bytes` of weights being there where a device keeps them."""
        return machine.available_memory()


class Gpu(Device):
    """A device of torch's, which keeps the weights of what it opened.

    Attributes:
        fallen: what it could not compute, by name: the CPU did.
    """

    def __init__(self, kind: str, label: str):
        import torch

        torch.set_float32_matmul_precision("highest")  # containers switch TF32 on by the environment
        self.kind, self.name, self.xp = kind, f"{kind} {label}", torch
        self.fallen: set[str] = set()

    def put(self, values: np.ndarray) -> Array:
        """A copy."""
        return self.xp.tensor(values, device=self.kind)

    def get(self, values: Array) -> np.ndarray:
        """A copy."""
        return values.cpu().numpy()

    def open(self, model: onnx.ModelProto, folder: Path, threads: int = 0) -> SliceRun:
        """As `session.open_slice`, without threads. A past that has room for what comes is written in its place."""
        from pipeline.runtime.interpreter import Interpreter

        check_weights(model, folder)
        interpreter, taken = Interpreter(model, folder, self.kind), {value.name for value in model.graph.input}

        def run(outputs: Sequence[str], arrays: Mapping[Any, Array]) -> list[np.ndarray]:
            feeds = {name: arrays[name] for name in taken & arrays.keys()}
            put = {name: self.put(one) if isinstance(one, np.ndarray) else one for name, one in feeds.items()}
            with self.xp.no_grad():
                return [self.get(one) for one in interpreter.run(outputs, put)]

        return run

    def memory(self, weight_bytes: int) -> int:
        """Of the GPU, unless its memory does not hold the weights: most of the work is the CPU's then."""
        free, _ = self.xp.cuda.mem_get_info()
        return free - weight_bytes if free > weight_bytes else super().memory(weight_bytes)


CPU = Device()


def chosen_device() -> Device:
    """The configured device (`load_device`). Raises ConfigError where it is to be a GPU and torch has none."""
    return _device(_configured())


@cache
def _configured() -> str:
    """Read once: what is edited while a stage runs is for the next one."""
    return load_device()


@cache
def _device(wanted: str) -> Device:
    if wanted == "cpu":
        return CPU
    try:
        import torch

        if torch.cuda.is_available():
            return Gpu("cuda", torch.cuda.get_device_name())
        problem = f"torch {torch.__version__} computes on no GPU here"
    except ImportError as error:
        problem = f"torch does not load ({error})"
    if wanted == "cuda":
        raise ConfigError(f"device: cuda: {problem}. {INSTALL}. Or set `device: cpu` in configs/pipeline.yaml.")
    print(f"device: {wanted}: {problem}, so the CPU computes. {INSTALL}.", file=sys.stderr)
    return CPU


def engine_of(where: Device, wide: bool = True) -> Engine:
    """Who does the units of a pass: the configured engine on CPUs, this process on its GPU. `wide`: units take all
    cores themselves, others one."""
    return Here() if where is not CPU else chosen(wide=True) if wide else narrow()


def computed_by() -> str:
    """The chosen device's name, and what fell back from it in this process, for the record of a result."""
    where = chosen_device()
    fallen = sorted(where.fallen) if isinstance(where, Gpu) else []
    return f"{where.name}; on the CPU: {', '.join(fallen)}" if fallen else where.name


def passing(what: str, work: Callable[[Device], T]) -> T:
    """`work` on the chosen device. If its memory ends or it lacks a kernel, the CPU does the work from its start, this
    time and whenever it is `what` again; a line says so.

    What `work` writes, it must be able to write twice.
    """
    where = chosen_device()
    if isinstance(where, Gpu) and what not in where.fallen:
        try:
            return work(where)
        except RuntimeError as error:  # torch's; most have no class of their own
            if "CUDA" not in str(error):
                raise
            reason = str(error).splitlines()[0]
        where.fallen.add(what)
        where.xp.cuda.empty_cache()  # only now: the error's traceback held the tensors
        print(f"{what}: {where.name} does not compute it ({reason}); the CPU does", file=sys.stderr)
    return work(CPU)
