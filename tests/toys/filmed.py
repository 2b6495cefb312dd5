"""The point with a camera that shows where it is: a white dot on black."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import torch
from torch import Tensor

from embodied_rl import registry

point = registry.load("env", str(Path(__file__).with_name("point.py")))


class Config(point.Config):
    """Settings of the filmed point."""

    type: str = "tests/toys/filmed.py"


class Filmed(point.Point):
    """See the module docstring."""

    def __init__(self, config: Config, num_envs: int, device: torch.device) -> None:
        super().__init__(config, num_envs, device)
        self.spec = dataclasses.replace(self.spec, cameras=("top",), control_hz=10.0)

    def instructions(self) -> list[str]:
        return [("to the first", "to the second")[int(word) - 1] for word in self.word[:, 0]]

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        pictures = torch.zeros(len(copies), height, width, 3, dtype=torch.uint8)
        for picture, (x, y) in zip(pictures, self.position[copies].clamp(-2, 2).tolist(), strict=True):
            row, column = (int((v + 2) / 4 * (n - 17)) for v, n in ((y, height), (x, width)))
            picture[row : row + 16, column : column + 16] = 255
        return pictures


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Filmed:
    return Filmed(config, num_envs, device)
