"""Episodes of given or random lengths whose every number tells where it comes from; nasty where the contract allows it.

Step t (1, 2, ...) of an episode pays t and is observed as (t, seed mod 1000). After its end a copy pays NaN and shows
1e9, because "its later outputs are ignored"; and with `reuse` all results live in the same arrays from step to step.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from embodied_rl.errors import NotFoundError
from embodied_rl.section import Section
from embodied_rl.seeding import numpy_rng
from embodied_rl.types import ActionSpec, EnvSpec, Obs, State, Step, TensorSpec


class Config(Section):
    """Settings."""

    type: str = "tests/toys/lengths.py"
    lengths: tuple[int, ...] = ()
    """Length of every episode of copy i is lengths[i mod len]; empty: 1 to `longest`, drawn from the seed."""
    longest: int = Field(6, ge=1)
    reuse: bool = True


class Lengths:
    """Even lengths are cut by a time limit (truncated), odd ones terminate; success holds exactly at t = 2."""

    def __init__(self, config: Config, num_envs: int, device: torch.device) -> None:
        self.config, self.device = config, device
        self.spec = EnvSpec(
            observation={
                "t": TensorSpec((2,), meaning="step and seed mod 1000"),
                "name": TensorSpec((1,), torch.int64, low=0, high=999, constant=True),
            },
            action=ActionSpec("continuous", 1), num_envs=num_envs, max_steps=max(config.lengths, default=config.longest),
            tasks=("a", "b"), seedable=True, has_state=True, has_success=True,
        )  # fmt: skip
        b = num_envs
        self.t = torch.zeros(b, dtype=torch.int64, device=device)
        self.length = torch.ones(b, dtype=torch.int64, device=device)
        self.name = torch.zeros(b, dtype=torch.int64, device=device)
        self.arrays = {"t": torch.zeros(b, 2, device=device), "name": torch.zeros(b, 1, dtype=torch.int64, device=device)}
        self.reward = torch.zeros(b, device=device)
        self.flags = torch.zeros(3, b, dtype=torch.bool, device=device)
        self.calls: list[Tensor] = []
        """Of every `step`: [3, B] first action value, steps made before, length of the episode."""

    def _obs(self) -> Obs:
        over = self.t > self.length
        self.arrays["t"][:, 0] = torch.where(over, torch.full_like(self.reward, 1e9), self.t.float())
        self.arrays["t"][:, 1] = self.name
        self.arrays["name"][:, 0] = self.name
        return self.arrays if self.config.reuse else {k: v.clone() for k, v in self.arrays.items()}

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        for i in mask.nonzero().flatten().tolist():
            seed, given = int(seeds[i]), self.config.lengths
            self.t[i], self.name[i] = 0, seed % 1000
            drawn = int(numpy_rng(seed, "lengths").integers(1, self.config.longest + 1))
            self.length[i] = given[i % len(given)] if given else drawn
        return self._obs()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        self.calls.append(torch.stack([action[:, 0], self.t.float(), self.length.float()]))
        self.t += 1
        self.reward[:] = torch.where(self.t > self.length, torch.nan, self.t.float())
        over = self.t >= self.length
        self.flags[0] = over & (self.length % 2 == 1)
        self.flags[1] = over & (self.length % 2 == 0)
        self.flags[2] = self.t == 2
        out = (self.reward, *self.flags) if self.config.reuse else (self.reward.clone(), *self.flags.clone())
        return Step(self._obs(), *out, metrics={"paid": out[0]})

    def get_state(self) -> State:
        return {"t": self.t.clone(), "length": self.length.clone(), "name": self.name.clone()}

    def set_state(self, state: State) -> Obs:
        self.t, self.length, self.name = (state[k].clone() for k in ("t", "length", "name"))
        return self._obs()

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        raise NotFoundError(f"camera '{camera}' does not exist: this env draws no pictures")

    def close(self) -> None:
        pass


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Lengths:
    return Lengths(config, num_envs, device)
