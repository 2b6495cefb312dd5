"""A contextual bandit: one decision, one reward; arm (context + i) mod K pays `arms[i]`."""

from __future__ import annotations

import torch
from torch import Tensor

from embodied_rl.errors import NotFoundError
from embodied_rl.section import Section
from embodied_rl.seeding import numpy_rng
from embodied_rl.types import ActionSpec, EnvSpec, Obs, State, Step, TensorSpec


class Config(Section):
    """Settings of the bandit."""

    type: str = "tests/toys/bandit.py"
    arms: tuple[float, ...] = (1.0, 0.2, 0.0)
    contexts: int = 3


class Bandit:
    """The context is drawn from the seed; the best arm is number `context`, so success is picking it."""

    def __init__(self, config: Config, num_envs: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.arms = torch.tensor(config.arms, device=device)
        self.spec = EnvSpec(
            observation={"context": TensorSpec((config.contexts,), low=0, high=1)},
            action=ActionSpec("discrete", len(config.arms)),
            num_envs=num_envs, max_steps=1, tasks=("pick",), seedable=True, has_state=True, has_success=True,
        )  # fmt: skip
        self.context = torch.zeros(num_envs, dtype=torch.int64, device=device)

    def _obs(self) -> Obs:
        return {"context": torch.nn.functional.one_hot(self.context, self.config.contexts).float()}

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        for i in mask.nonzero().flatten().tolist():
            self.context[i] = int(numpy_rng(int(seeds[i]), "bandit").integers(self.config.contexts))
        return self._obs()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        reward = self.arms[(action - self.context) % len(self.arms)]
        ended = torch.ones_like(action, dtype=torch.bool)
        return Step(self._obs(), reward, ended, ~ended, reward == self.arms.max())

    def get_state(self) -> State:
        return {"context": self.context}

    def set_state(self, state: State) -> Obs:
        self.context = state["context"].clone()
        return self._obs()

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        raise NotFoundError(f"camera '{camera}' does not exist: this env draws no pictures")

    def close(self) -> None:
        pass


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Bandit:
    return Bandit(config, num_envs, device)
