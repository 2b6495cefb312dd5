"""Sampling temperature that falls from the first unit of a decision to the last: explore first, then say what follows.

tau_t = max(1 + start - exp(t / delay), floor), and 1 for the first `plain` units; delay = min(delay_start + growth s,
delay_max) at update s, so that the fall comes later as replies grow longer.

Log-probabilities are those of the annealed policy, at sampling as in training, so that ratios begin at 1.

Source: Yang et al. 2025 (EAD, Let it Calm, arXiv:2510.05251). The delay is that of the authors' code, 20 min(25 + 5 s,
40000); the paper writes it without the 20.
"""

from __future__ import annotations

import torch
from pydantic import Field, model_validator
from torch import Tensor

from embodied_rl.section import Section


class Anneal(Section):
    """How the temperature falls within a decision."""

    start: float = Field(1.2, gt=0)
    """Temperature where the fall begins."""
    floor: float = Field(0.1, gt=0)
    """Lowest temperature."""
    plain: int = Field(10, ge=0)
    """First units, which are sampled at temperature 1."""
    delay: float = Field(500.0, gt=0)
    """Units after which the temperature has fallen by 1.7 in the first update; larger anneals later."""
    delay_growth: float = Field(100.0, ge=0)
    """Added to the delay with every update."""
    delay_max: float = Field(800000.0, gt=0)
    """Longest delay."""

    @model_validator(mode="after")
    def _falls(self) -> Anneal:
        if self.floor >= self.start:
            raise ValueError(f"floor ({self.floor}) must be below start ({self.start}), or nothing is annealed")
        if self.delay > self.delay_max:
            raise ValueError(f"delay ({self.delay}) must not be above delay_max ({self.delay_max})")
        return self

    def temperatures(self, units: int, update: int) -> Tensor:
        """[A] float32 temperature of each of `units` units, for the rollout of an update (0 is the first)."""
        delay = min(self.delay + self.delay_growth * update, self.delay_max)
        t = torch.arange(units, dtype=torch.float64)
        tau = (1 + self.start - torch.exp(t / delay)).clamp(min=self.floor)
        tau[: self.plain] = 1.0
        return tau.float()
