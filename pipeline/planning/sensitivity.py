"""What the sensitivity stage measured of a model: the error of every format, and the damage of one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file

from pipeline.calibrate.results import ERRORS, ORDER
from pipeline.checkpoint.architecture import Matrix
from pipeline.errors import PipelineError, PlanError
from pipeline.planning.recipes import PlannedMatrix
from pipeline.workspace import Workspace


@dataclass(frozen=True)
class Sensitivity:
    """What was measured of a model.

    Attributes:
        errors: matrix → format → E[x²]·Σ(w − ŵ)² of each input channel, float32 [columns].
        order: input → its channels, the most important first, int32 [columns].
        nats: matrix → mean KL divergence, nats per token, with it alone in the format `damage[matrix]`.
        damage: matrix → that format.
    """

    errors: Mapping[str, Mapping[str, np.ndarray]]
    order: Mapping[str, np.ndarray]
    nats: Mapping[str, float]
    damage: Mapping[str, str]

    def cost(self, planned: PlannedMatrix) -> float:
        """Predicted KL divergence of one planned matrix, nats per token. Raises PlanError for a format not measured."""
        matrix = planned.matrix
        kinds = [self._columns(matrix, str(piece.format)) for piece in planned.pieces]
        if planned.split:
            order, high = self.order[matrix.input], planned.pieces[0].columns
            error = kinds[0][order[:high]].sum() + kinds[1][order[high:]].sum()
        else:
            error = kinds[0].sum()
        measured = float(self._columns(matrix, self.damage[matrix.name]).sum(dtype=np.float64))
        return max(self.nats[matrix.name], 0.0) * float(error) / measured if measured else 0.0

    def check(self, matrices: Sequence[Matrix]) -> None:
        """Raise PlanError unless these matrices were measured, with the columns that they have."""
        for matrix in matrices:
            sizes = {len(found) for found in self.errors.get(matrix.name, {}).values()}
            ordered = matrix.role == "embedding" or len(self.order.get(matrix.input, ())) == matrix.columns
            known = matrix.name in self.nats and matrix.name in self.damage
            if not (known and ordered and sizes == {matrix.columns}):
                raise PlanError(
                    f"tensor {matrix.name} [{matrix.rows}, {matrix.columns}] is not what the sensitivity stage "
                    f"measured (channels: {', '.join(map(str, sorted(sizes))) or 'none'}). Run it for this model again."
                )

    def _columns(self, matrix: Matrix, fmt: str) -> np.ndarray:
        found = self.errors[matrix.name].get(fmt)
        if found is None:
            raise PlanError(
                f"tensor {matrix.name}: no error was measured for {fmt} (measured: "
                f"{', '.join(self.errors[matrix.name])}). Add it to `formats` in configs/sensitivity.yaml."
            )
        return found


def read_sensitivity(workspace: Workspace) -> Sensitivity:
    """What the stage wrote. Raises PipelineError when it is missing or damaged."""
    path = workspace.require(workspace.sensitivity / ERRORS, "sensitivity")
    try:
        stored = load_file(path)
    except SafetensorError as error:
        raise PipelineError(f"{path} is damaged ({error}). Remove it and run `dvc repro`.") from None
    errors: dict[str, dict[str, np.ndarray]] = {}
    for key, values in stored.items():
        name, _, kind = key.rpartition("/")
        errors.setdefault(name, {})[kind] = values
    order = {name: found.pop(ORDER) for name, found in errors.items() if ORDER in found}
    rows = workspace.read(workspace.nats, "sensitivity")["tensors"]
    nats, damage = ({name: row[key] for name, row in rows.items()} for key in ("nats", "format"))
    return Sensitivity(errors, order, nats, damage)
