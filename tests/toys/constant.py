"""One state that pays 1 for ever; its value is 1 / (1 - gamma), unless the time limit is taken for an end."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from embodied_rl.errors import NotFoundError
from embodied_rl.section import Section
from embodied_rl.types import ActionSpec, EnvSpec, Obs, State, Step, TensorSpec


class Config(Section):
    """Settings."""

    type: str = "tests/toys/constant.py"
    max_steps: int = Field(5, ge=1)
    limit: Literal["truncates", "terminates"] = "truncates"


class Constant:
    """The observation is always 1; episodes last `max_steps`."""

    def __init__(self, config: Config, num_envs: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.spec = EnvSpec(
            observation={"one": TensorSpec((1,), low=1, high=1)}, action=ActionSpec("continuous", 1),
            num_envs=num_envs, max_steps=config.max_steps, tasks=("wait",), seedable=True, has_state=True,
        )  # fmt: skip
        self.t = torch.zeros(num_envs, dtype=torch.int64, device=device)

    def _obs(self) -> Obs:
        return {"one": torch.ones(len(self.t), 1, device=self.device)}

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        self.t = torch.where(mask, 0, self.t)
        return self._obs()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        self.t = self.t + 1
        ended = self.t >= self.config.max_steps
        never = torch.zeros_like(ended)
        terminated, truncated = (never, ended) if self.config.limit == "truncates" else (ended, never)
        return Step(self._obs(), torch.ones(len(self.t), device=self.device), terminated, truncated)

    def get_state(self) -> State:
        return {"t": self.t}

    def set_state(self, state: State) -> Obs:
        self.t = state["t"].clone()
        return self._obs()

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        raise NotFoundError(f"camera '{camera}' does not exist: this env draws no pictures")

    def close(self) -> None:
        pass


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Constant:
    return Constant(config, num_envs, device)
