"""The toy target whose critic is also told how far along it is: an entry that only a simulator knows."""

from __future__ import annotations

from dataclasses import replace

import torch

from embodied_rl import registry
from embodied_rl.types import Obs, TensorSpec

target = registry.load("env", "target")


class Config(target.Config):
    """Settings of the target."""

    type: str = "tests/toys/whispered.py"


class Whispered(target.TargetEnv):
    def __init__(self, config: Config, num_envs: int, device: torch.device) -> None:
        super().__init__(config, num_envs, device)
        told = TensorSpec((4,), privileged=True)
        self.spec = replace(self.spec, observation=self.spec.observation | {"told": told})

    def _look(self) -> Obs:
        right = torch.stack([self._right, self._steps], dim=1).float()
        return super()._look() | {"told": torch.cat([self._target, right / self.config.max_steps], dim=1)}


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Whispered:
    return Whispered(config, num_envs, device)
