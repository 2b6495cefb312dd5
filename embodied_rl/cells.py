"""Cells: what one importance ratio belongs to, and how much each of them weighs.

A *cell* is a unit, an action (one control step of the chunk), a decision, or a whole trajectory. A quantity of a cell
is the sum (or mean) over its units, so that one formula serves all four levels. Weights are computed over the whole
optimizer step before the first micro-batch is cut from it.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

Level = Literal["unit", "action", "decision", "trajectory"]
Aggregate = Literal["unit_mean", "decision_mean", "trajectory_mean", "constant"]


def by_cell(x: Tensor, mask: Tensor | None, level: Level, reduce: str, chunk: int, trajectory: Tensor) -> Tensor:
    """Bring a per-unit quantity to the cells of a ratio level.

    Args:
        x: [N, A] quantity per unit.
        mask: [N, A] bool, units that count; None for all. Masked entries may hold anything, NaN included.
        level: unit gives [N, A], action [N, C], decision and trajectory [N, 1].
        reduce: "sum" or "mean" over the counting units of the cell.
        chunk: C; units of a decision are ordered control step by control step.
        trajectory: [N] int64 trajectory of each row; rows of one trajectory must all be present.

    Returns:
        cells: [N, L]; at trajectory level every row of a trajectory carries the trajectory's number.
    """
    if mask is not None:
        x = torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))
    if level == "unit":
        return x
    n, a = x.shape
    shape = (n, chunk, a // chunk) if level == "action" else (n, 1, a)
    total = x.view(shape).sum(-1)
    count: Tensor | float = float(shape[-1])
    if mask is not None and reduce == "mean":
        count = mask.view(shape).sum(-1).to(x.dtype)
    if level == "trajectory":
        ids, rows = torch.unique(trajectory, return_inverse=True)
        total = total.new_zeros(len(ids), 1).index_add(0, rows, total)[rows]
        if reduce == "mean":
            per_row = count if isinstance(count, Tensor) else x.new_full((n, 1), count)
            count = per_row.new_zeros(len(ids), 1).index_add(0, rows, per_row)[rows]
    if reduce == "mean":
        total = total / (count.clamp(min=1) if isinstance(count, Tensor) else count)
    return total


def cell_weights(
    mask: Tensor | None,
    trajectory: Tensor,
    num_units: int,
    chunk: int,
    level: Level,
    aggregate: Aggregate,
    constant_units: int | None = None,
) -> Tensor:
    """Weight of each cell, counted over the whole optimizer step.

    The weight of one unit is
        unit_mean        1 / U                        U units of the step that count
        decision_mean    1 / (U_row n)                U_row units of the decision, n decisions that have any
        trajectory_mean  1 / (U_traj m)               U_traj units of the trajectory, m trajectories that have any
        constant         1 / (constant_units m)
    and a cell weighs as much as its units together, so all weights of a step add up to 1 (except with `constant`).

    Args:
        mask: [N, A] bool over ALL rows of the step; None when every unit counts.
        trajectory: [N] int64.
        num_units: A.
        chunk: C.
        level: Ratio level that decides the shape of the result.
        aggregate: Which mean.
        constant_units: Denominator of `constant`.

    Returns:
        weight: [N, L] float32 with L as in `by_cell`; 0 for cells without a counting unit.
    """
    n = len(trajectory)
    device = trajectory.device
    if mask is None and aggregate in ("unit_mean", "decision_mean"):
        # Every unit counts, so all cells weigh the same.
        cells = {"unit": num_units, "action": chunk}.get(level, 1)
        return torch.full((n, cells), 1.0 / (n * cells), device=device)
    counts = torch.ones(n, num_units, device=device) if mask is None else mask.to(torch.float32)
    per_row = counts.sum(-1, keepdim=True)
    if aggregate == "unit_mean":
        unit = counts / per_row.sum().clamp(min=1)
    elif aggregate == "decision_mean":
        unit = counts / (per_row.clamp(min=1) * (per_row > 0).sum().clamp(min=1))
    else:
        ids, rows = torch.unique(trajectory, return_inverse=True)
        per_trajectory = per_row.new_zeros(len(ids), 1).index_add(0, rows, per_row)
        present = (per_trajectory > 0).sum().clamp(min=1)
        length = per_trajectory[rows].clamp(min=1) if aggregate == "trajectory_mean" else float(constant_units or 1)
        unit = counts / (length * present)
    if level == "unit":
        return unit
    return unit.view(n, chunk if level == "action" else 1, -1).sum(-1)


def weighted_sum(x: Tensor, weight: Tensor, *, everywhere: bool = False) -> Tensor:
    """Sum of x times weight over cells with a weight; cells of weight 0 may hold anything, NaN included.

    Args:
        x: [N] or [N, L].
        weight: Same shape, not negative.
        everywhere: All weights are known to be positive, which saves looking.

    Returns:
        total: Scalar.
    """
    if not everywhere:
        x = torch.where(weight > 0, x, torch.zeros((), dtype=x.dtype, device=x.device))
    return x.flatten().dot(weight.flatten().to(x.dtype))
