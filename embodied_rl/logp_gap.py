"""How far the log-probabilities recorded at sampling are from those that training computes, and what to do then."""

from __future__ import annotations

from typing import Literal

from pydantic import Field, model_validator
from torch import Tensor

from embodied_rl.section import Section


class LogpGap(Section):
    """When the sampler's log-probabilities are not those that training computes (another precision, kernel, engine)."""

    do: Literal["nothing", "recompute", "correct"] = "nothing"
    """recompute: ratios are against the log-probabilities of the training path, so that they start at 1; correct: the
    same, and the objective is weighted by min(pi_training / pi_sampler, cap), truncated importance sampling. Either
    costs one forward pass over the rollout, except that recompute costs nothing where a rollout serves for one
    optimizer step and above is 0."""
    above: float = Field(0.05, ge=0)
    """Mean |gap| in nat per unit; up to this nothing is changed."""
    cap: float = Field(2.0, ge=1)
    """correct: largest weight; larger trusts rare samples more and is noisier."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> LogpGap:
        for name, users in (("above", ("recompute", "correct")), ("cap", ("correct",))):
            value = getattr(self, name)
            if self.do not in users and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} ({value}) does nothing with do ({self.do}): remove it, or set do: correct")
        return self


def logp_gap(logp: Tensor, sampled: Tensor, mask: Tensor | None) -> tuple[Tensor, float]:
    """Sum and count of |sampled - logp| over the units that count.

    Args:
        logp: [N, A] as the learner computes it, by the weights that sampled.
        sampled: [N, A] as recorded at sampling.
        mask: [N, A] bool, units that count; None for all.

    Returns:
        total: Scalar sum.
        count: Number of units.
    """
    gap = (logp - sampled).abs()
    if mask is not None:
        gap = gap[mask]
    return gap.sum(), float(gap.numel())
