"""The two-state walk told in words: what was done in each step."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

from embodied_rl import registry
from embodied_rl.types import Obs, Step

two_state = registry.load("env", str(Path(__file__).with_name("two_state.py")))


class Config(two_state.Config):
    """Settings of the walk."""

    type: str = "tests/toys/told.py"


class Told(two_state.TwoState):
    """Success is to have ended the episode by oneself."""

    def __init__(self, config: Config, num_envs: int, device: torch.device) -> None:
        super().__init__(config, num_envs, device)
        self.spec = replace(self.spec, has_success=True)
        self.words: list[list[str]] = [[] for _ in range(num_envs)]

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        for i in mask.nonzero().flatten().tolist():
            self.words[i] = [f"start {int(seeds[i]) % 1000} <of all>"]
        return super().reset(mask, seeds, tasks)

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        for i in range(len(action)) if active is None else active.nonzero().flatten().tolist():
            self.words[i].append(f"do {int(action[i])} in {int(self.state[i])}")
        step = super().step(action, active)
        step.success = step.terminated
        return step

    def transcript(self, copies: Tensor) -> list[str]:
        return ["\n".join(self.words[i]) for i in copies.tolist()]


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Told:
    return Told(config, num_envs, device)
