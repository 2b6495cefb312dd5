"""One decision: a direction is shown, and the point of the circle that it names is to be hit. What generative heads learn on."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from embodied_rl.errors import NotFoundError
from embodied_rl.section import Section
from embodied_rl.seeding import numpy_rng
from embodied_rl.types import ActionSpec, EnvSpec, Obs, State, Step, TensorSpec

RADIUS, NEAR = 0.7, 0.3


class Config(Section):
    """Settings."""

    type: str = "tests/toys/aim.py"


class Aim:
    """Reward 1 - distance from the action to the target; success within NEAR of it."""

    def __init__(self, num_envs: int, device: torch.device) -> None:
        self.device = device
        self.spec = EnvSpec(
            observation={"target": TensorSpec((2,), low=-RADIUS, high=RADIUS)}, action=ActionSpec("continuous", 2),
            num_envs=num_envs, max_steps=1, tasks=("aim",), seedable=True, has_state=True, has_success=True,
        )  # fmt: skip
        self.target = torch.zeros(num_envs, 2, device=device)

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        for i in mask.nonzero().flatten().tolist():
            angle = numpy_rng(int(seeds[i]), "aim").uniform(0, 2 * math.pi)
            self.target[i] = RADIUS * torch.tensor([math.cos(angle), math.sin(angle)])
        return self.get_state()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        distance = (action - self.target).norm(dim=-1)
        ended = torch.ones_like(distance, dtype=torch.bool)
        return Step(self.get_state(), 1 - distance, ended, ~ended, distance < NEAR)

    def get_state(self) -> State:
        return {"target": self.target.clone()}

    def set_state(self, state: State) -> Obs:
        self.target = state["target"].clone()
        return self.get_state()

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        raise NotFoundError(f"camera '{camera}' does not exist: this env draws no pictures")

    def close(self) -> None:
        pass


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Aim:
    return Aim(num_envs, device)
