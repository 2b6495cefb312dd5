"""Spelling: the context is a number, the reply that is paid for is the word of that number, letter by letter.

Ids below `letters` are letters, id `letters` ends a reply. `turns` replies make an episode; the context counts the turns.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor

from embodied_rl.errors import NotFoundError
from embodied_rl.section import Section
from embodied_rl.seeding import numpy_rng
from embodied_rl.types import PAD, ActionSpec, EnvSpec, Obs, State, Step, TensorSpec, Vocabulary


class Config(Section):
    """Settings."""

    type: str = "tests/toys/words.py"
    letters: int = Field(4, ge=2)
    length: int = Field(3, ge=1)
    """Longest reply, end included."""
    words: int = Field(3, ge=1)
    turns: int = Field(1, ge=1)
    partial: bool = False
    """Pay the share of right ids instead of all or nothing."""
    told: bool = True
    """The context says whether a hint was given, as if it were another task; false: what is learned under hints holds without."""


def word(number: int, config: Config) -> list[int]:
    """The reply that is right: length - 1 letters (one less for every second number), the end, PAD."""
    letters = [(number + 2 * i + 1) % config.letters for i in range(max(1, config.length - 1 - number % 2))]
    reply = [*letters, config.letters][: config.length]
    return reply + [PAD] * (config.length - len(reply))


class Words:
    """See the module docstring. Under a hint the first letters are given."""

    def __init__(self, config: Config, num_envs: int, device: torch.device) -> None:
        self.config, self.device = config, device
        contexts = config.words * config.turns
        self.share, self.shown = 0.0, torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.target = torch.tensor([word(i % config.words, config) for i in range(contexts)], device=device)
        self.spec = EnvSpec(
            observation={"context": TensorSpec((1,), torch.int64, low=PAD, high=2 * contexts - 1, constant=config.turns == 1)},
            action=ActionSpec("tokens", config.letters + 1, length=config.length),
            num_envs=num_envs, max_steps=config.turns, tasks=("spell",), seedable=True, has_state=True, has_success=True, has_results=True,
            vocabulary=Vocabulary("letters", config.letters + 1, "letters", (config.letters,)),
        )  # fmt: skip
        self.number = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self.turn = torch.zeros_like(self.number)
        self.right = torch.ones(num_envs, dtype=torch.bool, device=device)

    def _context(self) -> Tensor:
        return self.turn.clamp(max=self.config.turns - 1) * self.config.words + self.number

    def _obs(self) -> Obs:
        contexts = self.config.words * self.config.turns
        return {"context": (self._context() + contexts * ((self.shown > 0) & self.config.told)).unsqueeze(-1)}

    def hint(self, share: float) -> None:
        self.share = share

    def demonstrate(self) -> tuple[Tensor, Tensor]:
        return self.target[self.number], torch.ones_like(self.number, dtype=torch.bool)

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        for i in mask.nonzero().flatten().tolist():
            self.number[i] = int(numpy_rng(int(seeds[i]), "word").integers(self.config.words))
        self.turn = torch.where(mask, 0, self.turn)
        self.shown = torch.where(mask, round(self.share * self.config.length), self.shown)
        self.right = self.right | mask
        return self._obs()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        self.spec.action.check(action if active is None else action[active], int(action.shape[0] if active is None else active.sum()),
                               self.device, "words")  # fmt: skip
        given = torch.arange(self.config.length, device=self.device) < self.shown.unsqueeze(-1)
        same = (action == self.target[self._context()]) | given
        right = same.all(-1)
        reward = same.float().mean(-1) if self.config.partial else right.float()
        self.turn, self.right = self.turn + 1, self.right & right
        ended = self.turn >= self.config.turns
        places = (self.config.letters + 2) ** torch.arange(self.config.length, device=self.device)
        result = ((action + 1) * places).sum(-1)
        return Step(self._obs(), reward, ended, torch.zeros_like(ended), self.right & ended, result=result)

    def get_state(self) -> State:
        return {"number": self.number, "turn": self.turn, "right": self.right, "shown": self.shown}

    def set_state(self, state: State) -> Obs:
        self.number, self.turn, self.right, self.shown = (state[k].clone() for k in ("number", "turn", "right", "shown"))
        return self._obs()

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        raise NotFoundError(f"camera '{camera}' does not exist: this env draws no pictures")

    def close(self) -> None:
        pass


def build(config: Config, *, num_envs: int, device: torch.device, split: str, seed: int) -> Words:
    return Words(config, num_envs, device)
