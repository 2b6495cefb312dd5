"""The toy of given lengths with a judge that fails: episodes whose seed is a multiple of `every` end in NaN, unjudged."""

from __future__ import annotations

from pathlib import Path

import torch
from pydantic import Field
from torch import Tensor

from embodied_rl import registry
from embodied_rl.types import Step

lengths = registry.load("env", str(Path(__file__).with_name("lengths.py")))


class Config(lengths.Config):
    """Settings."""

    type: str = "tests/toys/failing.py"
    every: int = Field(3, ge=1)


class Failing(lengths.Lengths):
    """A void episode pays NaN and claims success in its last step, which nobody may believe."""

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        step = super().step(action, active)
        invalid = (self.t == self.length) & fails(self.name, self.config.every)
        step.reward[invalid] = torch.nan
        step.success = step.success | invalid
        step.terminated, step.truncated = step.terminated & ~invalid, step.truncated | invalid
        step.invalid = invalid
        return step


def fails(name: Tensor, every: int) -> Tensor:
    """Whether an episode of this name (seed mod 1000) fails; seeds of one split share their last bit."""
    return (name // 2) % every == 0


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Failing:
    return Failing(config, num_envs, device)
