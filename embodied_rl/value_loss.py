"""How the critic is fitted: squared error, clipped, or classification over bins.

Source: Schulman et al. 2017 (clipped values, arXiv:1707.06347); Farebrother et al. 2024 (HL-Gauss, arXiv:2403.03950).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from embodied_rl.errors import ShapeError
from embodied_rl.section import Section
from embodied_rl.types import Batch, Evaluation


class ValueLoss(Section):
    """How the critic is fitted."""

    kind: Literal["mse", "clipped", "hl_gauss"] = "mse"
    """mse; clipped: the larger of the errors with and without the step clipped; hl_gauss: classification over bins."""
    coef: float = Field(0.5, ge=0)
    """Weight of the value loss; mse and clipped carry no factor 1/2 of their own."""
    clip: float = Field(0.2, gt=0)
    """Largest move of a value per update for `clipped`, in the critic's units."""


def hl_gauss_targets(target: Tensor, low: float, high: float, bins: int, sigma_bins: float = 0.75) -> Tensor:
    """Histogram of a Gaussian around each target: the soft labels of a classifying critic.

    p_i is proportional to Phi((e_{i+1} - y) / sigma) - Phi((e_i - y) / sigma) over edges e of `bins` equal bins.

    Args:
        target: [...] regression targets; values outside [low, high] are moved to the border.
        low: Lower edge of the first bin.
        high: Upper edge of the last bin.
        bins: Number of bins.
        sigma_bins: Standard deviation in widths of a bin.

    Returns:
        probabilities: [..., bins], rows add up to 1.

    Source: Farebrother et al. 2024, section 3.1 (arXiv:2403.03950).
    """
    width = (high - low) / bins
    edges = torch.linspace(low, high, bins + 1, dtype=target.dtype, device=target.device)
    z = (edges - target.clamp(low, high).unsqueeze(-1)) / (sigma_bins * width * 2**0.5)
    cdf = torch.erf(z)
    return cdf.diff(dim=-1) / (cdf[..., -1:] - cdf[..., :1])


def value_loss(
    evaluation: Evaluation, batch: Batch, config: ValueLoss, value_range: tuple[float, float] | None
) -> Tensor:
    """Critic loss of each decision, or of each unit where every unit is valued.

    mse: (v - y)^2;  clipped: max((v - y)^2, (v_old + clip(v - v_old, +-c) - y)^2);  hl_gauss: cross-entropy.

    Args:
        evaluation: With `value` [N] or [N, A], and `value_logits` [..., bins] for hl_gauss.
        batch: With `target` and `value` of the same shape.
        config: The switches.
        value_range: (low, high) of the classifying critic's bins; None for a scalar critic.

    Returns:
        loss: [N] or [N, A], without `coef` and without weights; finite where masked.

    Raises:
        ShapeError: The policy now values something else than when it sampled.
    """
    assert evaluation.value is not None and batch.target is not None
    if evaluation.value.shape != batch.target.shape:
        raise ShapeError(
            f"the policy's evaluate gave values of shape {list(evaluation.value.shape)}, expected "
            f"{list(batch.target.shape)} as from its act: value every unit in both or in neither"
        )
    value = evaluation.value
    if batch.target.ndim == 2 and batch.mask is not None:
        value = torch.where(batch.mask, value, batch.target)
    if config.kind == "hl_gauss":
        assert evaluation.value_logits is not None and value_range is not None
        logits = evaluation.value_logits
        labels = hl_gauss_targets(batch.target, *value_range, bins=logits.shape[-1])
        return -(labels * torch.log_softmax(logits, dim=-1)).sum(-1)
    error = (value - batch.target).square()
    if config.kind == "clipped":
        assert batch.value is not None
        near = batch.value + (value - batch.value).clamp(-config.clip, config.clip)
        error = torch.maximum(error, (near - batch.target).square())
    return error


def value_clipped(evaluation: Evaluation, batch: Batch, clip: float) -> Tensor:
    """[N] or [N, A] bool, values without a gradient by the clipped loss: the clipped error is the larger one."""
    assert evaluation.value is not None and batch.value is not None and batch.target is not None
    move = evaluation.value - batch.value
    near = batch.value + move.clamp(-clip, clip)
    return (move.abs() > clip) & ((near - batch.target).abs() > (evaluation.value - batch.target).abs())
