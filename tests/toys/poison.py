"""Another toy whose numbers go bad: at chosen control steps, copy 0 shows or pays what no env should."""

from __future__ import annotations

import math
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import JsonValue
from torch import Tensor

from embodied_rl import registry
from embodied_rl.section import Section
from embodied_rl.types import Obs, State, Step


class Config(Section):
    """What goes bad, and when."""

    type: str = "tests/toys/poison.py"
    inner: dict[str, JsonValue] = {"type": "point.py"}
    """Toy beside this file, with its settings."""
    what: Literal["reward", "obs", "start"] = "reward"
    value: Literal["nan", "inf", "1e30"] = "nan"
    first: int = 0
    """First bad control step, counted over the whole life of the env."""
    last: int | None = None
    """Last one; null: for ever."""


class Poison:
    """Forwards everything but the bad numbers."""

    def __init__(self, config: Config, inner: Any) -> None:
        self.config, self.inner = config, inner
        self.spec, self.device = inner.spec, inner.device
        self.now = -1
        self.value = math.nan if config.value == "nan" else float(config.value)

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        obs = self.inner.reset(mask, seeds, tasks)
        return self._spoiled(obs) if self._bad("start" if mask[0] else "obs") else obs

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        step, self.now = self.inner.step(action, active), self.now + 1
        if self._bad("reward"):
            reward = step.reward.clone()
            reward[0] = self.value
            step = replace(step, reward=reward)
        return replace(step, obs=self._spoiled(step.obs)) if self._bad("obs") else step

    def _bad(self, what: str) -> bool:
        last = self.now if self.config.last is None else self.config.last
        return self.config.what == what and self.config.first <= self.now <= last

    def _spoiled(self, obs: Obs) -> Obs:
        obs = {k: v.clone() for k, v in obs.items()}
        name = next(k for k, v in obs.items() if v.is_floating_point())
        obs[name][0] = self.value
        return obs

    def get_state(self) -> State:
        return {"inner": self.inner.get_state(), "now": self.now}

    def set_state(self, state: State) -> Obs:
        self.now = state["now"]
        return self.inner.set_state(state["inner"])

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        return self.inner.render(copies, camera, height, width)

    def close(self) -> None:
        self.inner.close()


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Poison:
    settings = dict(config.inner)
    module = registry.load("env", str(Path(__file__).with_name(str(settings.pop("type")))))
    inner = module.build(module.Config(**settings), num_envs=num_envs, device=device, split=split, seed=seed)
    return Poison(config, inner)
