"""An arm that shows what it was told: the observation is the action it took last; it says what its numbers mean."""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from embodied_rl.convention import Convention
from embodied_rl.errors import NotFoundError
from embodied_rl.section import Section
from embodied_rl.types import ActionSpec, EnvSpec, Obs, State, Step, TensorSpec


class Config(Section):
    """Settings of the arm."""

    type: str = "tests/toys/arm.py"
    numbers: int = Field(7, ge=1)
    """Of an action."""
    convention: Convention | None = None
    cameras: dict[str, int] = {}
    """Name -> pixels of a side of a black picture."""
    vocabulary: str = ""
    """Of its word."""
    words: int = Field(1, ge=1)
    """Ids that there is room for; it says one."""
    tasks: tuple[str, ...] = ("easy", "hard")
    """Success comes at the first step, of `hard` never."""
    max_steps: int = Field(2, ge=1)


class Arm:
    """See the module docstring; the reward is 1 with success."""

    def __init__(self, config: Config, num_envs: int, device: torch.device) -> None:
        self.config, self.device = config, device
        pictures = {
            name: TensorSpec((side, side, 3), torch.uint8, 0, 255) for name, side in config.cameras.items()
        }
        self.spec = EnvSpec(
            observation={
                "taken": TensorSpec((config.numbers,), low=-1, high=1),
                "word": TensorSpec((config.words,), torch.int64, 0, 9, vocabulary=config.vocabulary),
            }
            | pictures,
            action=ActionSpec("continuous", config.numbers, convention=config.convention),
            num_envs=num_envs, max_steps=config.max_steps, tasks=config.tasks, seedable=True, has_state=True,
            has_success=True, control_hz=20.0,
        )  # fmt: skip
        self.taken = torch.zeros(num_envs, config.numbers, device=device)
        self.word = torch.zeros(num_envs, config.words, dtype=torch.int64, device=device)
        self.t = torch.zeros(num_envs, dtype=torch.int64, device=device)

    def _obs(self) -> Obs:
        b = self.spec.num_envs
        black = {name: torch.zeros(b, s, s, 3, dtype=torch.uint8, device=self.device) for name, s in self.config.cameras.items()}
        return {"taken": self.taken.clone(), "word": self.word.clone(), **black}

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        self.taken[mask], self.t[mask] = (seeds[mask, None] % 997 / 997).expand(-1, self.config.numbers).float(), 0
        self.word[mask, 0] = tasks[mask] + 1
        return self._obs()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        self.spec.action.check(action, self.spec.num_envs, self.device, "arm")
        go = torch.ones_like(self.t, dtype=torch.bool) if active is None else active
        self.taken = torch.where(go[:, None], action.clamp(-1, 1), self.taken)
        self.t = self.t + go
        hard = torch.tensor([name == "hard" for name in self.config.tasks], device=self.device)[self.word[:, 0] - 1]
        success = ~hard & (self.t > 0)
        return Step(self._obs(), success.float(), torch.zeros_like(success), self.t >= self.config.max_steps, success)

    def get_state(self) -> State:
        return {k: getattr(self, k).clone() for k in ("taken", "word", "t")}

    def set_state(self, state: State) -> Obs:
        self.taken, self.word, self.t = (state[k].clone() for k in ("taken", "word", "t"))
        return self._obs()

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        raise NotFoundError(f"camera '{camera}' does not exist: this env draws no pictures")

    def close(self) -> None:
        pass


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Arm:
    return Arm(config, num_envs, device)
