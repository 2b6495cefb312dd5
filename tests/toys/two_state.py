"""A Markov decision process small enough to enumerate: two states, two actions, a few steps, nothing random.

    state 0: action 0 pays 1 and stays,     action 1 pays 0 and moves to state 1
    state 1: action 0 pays 0.5 and moves to state 0, action 1 pays 3 and ends the episode

So patience is better than greed, and episodes have different lengths.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from embodied_rl.errors import NotFoundError
from embodied_rl.section import Section
from embodied_rl.types import ActionSpec, EnvSpec, Obs, State, Step, TensorSpec

REWARD = torch.tensor([[1.0, 0.0], [0.5, 3.0]])
"""[state, action]"""
NEXT = torch.tensor([[0, 1], [0, 1]])
"""[state, action]"""
ENDS = torch.tensor([[False, False], [False, True]])
"""[state, action]"""


class Config(Section):
    """Settings."""

    type: str = "tests/toys/two_state.py"
    max_steps: int = Field(3, ge=1)


class TwoState:
    """Starts in state 0; the observation is the state and the number of steps made, both one-hot."""

    def __init__(self, config: Config, num_envs: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.spec = EnvSpec(
            observation={"state": TensorSpec((2 + config.max_steps + 1,), low=0, high=1)}, action=ActionSpec("discrete", 2),
            num_envs=num_envs, max_steps=config.max_steps, tasks=("walk",), seedable=True, has_state=True,
        )  # fmt: skip
        self.state = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.t = torch.zeros_like(self.state)

    def _obs(self) -> Obs:
        hot = torch.nn.functional.one_hot
        clock = hot(self.t.clamp(max=self.config.max_steps), self.config.max_steps + 1)
        return {"state": torch.cat([hot(self.state, 2), clock], dim=-1).float()}

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        self.state, self.t = (torch.where(mask, 0, x) for x in (self.state, self.t))
        return self._obs()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        here = (self.state, action)
        reward, terminated = REWARD[here], ENDS[here]
        self.state, self.t = NEXT[here], self.t + 1
        return Step(self._obs(), reward, terminated, (self.t >= self.config.max_steps) & ~terminated)

    def get_state(self) -> State:
        return {"state": self.state, "t": self.t}

    def set_state(self, state: State) -> Obs:
        self.state, self.t = state["state"].clone(), state["t"].clone()
        return self._obs()

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        raise NotFoundError(f"camera '{camera}' does not exist: this env draws no pictures")

    def close(self) -> None:
        pass


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> TwoState:
    return TwoState(config, num_envs, device)
