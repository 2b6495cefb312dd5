"""A point in the plane moves to a goal; two tasks name which of two goals counts, by one instruction word."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from embodied_rl.errors import NotFoundError, ShapeError
from embodied_rl.section import Section
from embodied_rl.seeding import numpy_rng
from embodied_rl.types import ActionSpec, EnvSpec, Obs, State, Step, TensorSpec


class Config(Section):
    """Settings of the point."""

    type: str = "tests/toys/point.py"
    max_steps: int = Field(10, ge=1)
    reward: Literal["dense", "sparse"] = "dense"
    end_on_success: bool = False
    fixed_goals: bool = False
    """The goals of every episode lie at (0.7, 0.7) and (-0.7, -0.7) instead of anywhere."""


class Point:
    """Position + 0.3 x action per step; reward 1 - distance; success within 0.25."""

    def __init__(self, config: Config, num_envs: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.spec = EnvSpec(
            observation={
                "position": TensorSpec((2,)),
                "goals": TensorSpec((2, 3)),
                "word": TensorSpec((1,), torch.int64, low=0, high=2, constant=True),
            },
            action=ActionSpec("continuous", 2, ("dx", "dy")),
            num_envs=num_envs, max_steps=config.max_steps, tasks=("first", "second"), seedable=True, has_state=True, has_success=True,
        )  # fmt: skip
        b = num_envs
        self.position = torch.zeros(b, 2, device=device)
        self.goals = torch.zeros(b, 2, 3, device=device)
        self.goals[..., 2] = torch.tensor([-1.0, 1.0])
        self.word = torch.ones(b, 1, dtype=torch.int64, device=device)
        self.t = torch.zeros(b, dtype=torch.int64, device=device)

    def _obs(self) -> Obs:
        return {"position": self.position.clone(), "goals": self.goals.clone(), "word": self.word.clone()}

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        for i in mask.nonzero().flatten().tolist():
            rng = numpy_rng(int(seeds[i]), "point")
            numbers = torch.tensor(rng.uniform(-1, 1, 6), dtype=torch.float32)
            self.position[i] = numbers[:2]
            self.goals[i, :, :2] = torch.tensor([[0.7, 0.7], [-0.7, -0.7]]) if self.config.fixed_goals else numbers[2:].view(2, 2)
            self.word[i] = int(tasks[i]) + 1
            self.t[i] = 0
        return self._obs()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        if action.shape != (self.spec.num_envs, 2) or action.dtype != torch.float32:
            raise ShapeError(f"action must be [{self.spec.num_envs}, 2] float32, got {list(action.shape)} {action.dtype}")
        if not bool(torch.isfinite(action).all()):
            raise ShapeError(f"action is not finite in copies {(~torch.isfinite(action)).any(1).nonzero().flatten().tolist()}")
        self.position = (self.position + 0.3 * action.clamp(-1, 1)).clamp(-1.5, 1.5)
        self.t = self.t + 1
        goal = self.goals[torch.arange(self.spec.num_envs), self.word[:, 0] - 1, :2]
        distance = (self.position - goal).norm(dim=-1)
        success = distance < 0.25
        reward = success.float() if self.config.reward == "sparse" else 1 - distance
        terminated = success & self.config.end_on_success
        truncated = (self.t >= self.config.max_steps) & ~terminated
        return Step(self._obs(), reward, terminated, truncated, success, {"distance": distance})

    def get_state(self) -> State:
        return {k: getattr(self, k).clone() for k in ("position", "goals", "word", "t")}

    def set_state(self, state: State) -> Obs:
        self.position, self.goals, self.word, self.t = (state[k].clone() for k in ("position", "goals", "word", "t"))
        return self._obs()

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        raise NotFoundError(f"camera '{camera}' does not exist: this env draws no pictures")

    def close(self) -> None:
        pass


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Point:
    return Point(config, num_envs, device)
