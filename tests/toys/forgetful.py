"""An env that can neither be seeded nor saved: it ends with probability 1/4 at every step, by its own dice."""

from __future__ import annotations

import torch
from torch import Tensor

from embodied_rl.errors import CapabilityError, NotFoundError
from embodied_rl.section import Section
from embodied_rl.types import ActionSpec, EnvSpec, Obs, State, Step, TensorSpec


class Config(Section):
    """Settings."""

    type: str = "tests/toys/forgetful.py"


class Forgetful:
    """The observation is noise; every step pays 1."""

    def __init__(self, num_envs: int, device: torch.device, seed: int) -> None:
        self.device = device
        self.spec = EnvSpec(
            observation={"noise": TensorSpec((1,))}, action=ActionSpec("continuous", 1), num_envs=num_envs, max_steps=None,
            tasks=("wander",), seedable=False, has_state=False,
        )  # fmt: skip
        self.dice = torch.Generator(device).manual_seed(seed)

    def _obs(self) -> Obs:
        return {"noise": torch.rand(self.spec.num_envs, 1, generator=self.dice, device=self.device)}

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        return self._obs()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        ended = torch.rand(self.spec.num_envs, generator=self.dice, device=self.device) < 0.25
        return Step(self._obs(), torch.ones(self.spec.num_envs, device=self.device), ended, torch.zeros_like(ended))

    def get_state(self) -> State:
        raise CapabilityError("forgetful cannot save its state")

    def set_state(self, state: State) -> Obs:
        raise CapabilityError("forgetful cannot restore its state")

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        raise NotFoundError(f"camera '{camera}' does not exist: this env draws no pictures")

    def close(self) -> None:
        pass


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Forgetful:
    return Forgetful(num_envs, device, seed)
