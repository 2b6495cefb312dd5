"""The point with a picture, an instruction in words, and a scripted expert: what demonstrations are made of."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from embodied_rl import registry
from embodied_rl.types import Obs, Step, TensorSpec

point = registry.load("env", str(Path(__file__).with_name("point.py")))
TEXTS = ("gehe zum ersten Ziel", "zweites Ziel, schön langsam — 慢慢来")
H, W = 6, 8


class Config(point.Config):
    """Settings of the point with pictures."""

    type: str = "tests/toys/shown.py"
    end_on_success: bool = True
    on_demand: bool = False
    pictures: bool = True
    text: str | None = None
    """Instruction of every episode instead of those in TEXTS."""
    clumsy: bool = False
    """The expert never moves."""
    broken: bool = False
    """The second position of an episode is not finite."""


class Shown(point.Point):
    """Episodes end on success, so that they differ in length."""

    def __init__(self, config: Config, num_envs: int, device: torch.device) -> None:
        super().__init__(config, num_envs, device)
        observation = dict(self.spec.observation)
        if config.pictures:
            observation["camera"] = TensorSpec((H, W, 3), torch.uint8, low=0, high=255)
        vars_ = {f: getattr(self.spec, f) for f in self.spec.__dataclass_fields__}
        self.spec = type(self.spec)(**vars_ | {"observation": observation, "on_demand": config.on_demand, "control_hz": 10.0})
        self.looked = 0

    def _see(self) -> Obs:
        obs = super()._obs()
        if self.config.broken:
            obs["position"] = torch.where((self.t == 1)[:, None], torch.nan, obs["position"])
        if self.config.pictures:
            pixel = torch.arange(H * W * 3).view(H, W, 3)
            shade = (self.position * 40).round().long().sum(1) + 7 * self.t
            obs["camera"] = ((pixel[None] + shade.view(-1, 1, 1, 1)) % 256).to(torch.uint8)
        return obs

    def _obs(self) -> Obs:
        return {} if self.config.on_demand else self._see()

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        super().reset(mask, seeds, tasks)
        return self._see()

    def observe(self) -> Obs:
        self.looked += 1
        return self._see()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        before, t = self.position.clone(), self.t.clone()
        step = super().step(action, active)
        if active is not None:
            self.position = torch.where(active[:, None], self.position, before)
            self.t = torch.where(active, self.t, t)
            step.obs = self._obs()
        return step

    def instructions(self) -> list[str]:
        return [TEXTS[int(w) - 1] if self.config.text is None else self.config.text for w in self.word[:, 0]]

    def expert(self) -> Expert:
        return Expert(self)

    def clumsy(self, copies: Tensor, seed: int) -> Clumsy:
        return Clumsy(self, copies, seed)


class Expert:
    """Straight to the goal."""

    def __init__(self, env: Shown) -> None:
        self.env = env

    def reset(self, mask: Tensor) -> None:
        pass

    def act(self) -> Tensor:
        env = self.env
        goal = env.goals[torch.arange(env.spec.num_envs), env.word[:, 0] - 1, :2]
        return (0.0 if env.config.clumsy else 1.0) * (goal - env.position) / 0.3


class Clumsy:
    """Away from the goal for one or two steps."""

    def __init__(self, env: Shown, copies: Tensor, seed: int) -> None:
        self.env, self.copies = env, copies
        self.left = 1 + torch.randint(2, copies.shape, generator=torch.Generator().manual_seed(seed))

    @property
    def errs(self) -> Tensor:
        return self.copies & (self.left > 0)

    def reset(self, mask: Tensor) -> None:
        pass

    def act(self) -> Tensor:
        self.left = self.left - 1
        return -self.env.expert().act()


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Shown:
    return Shown(config, num_envs, device)
