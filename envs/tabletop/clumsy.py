"""A hand that errs: it grasps beside the object, and a while later it has found out.

An expert that never misses does not show what to do after a miss; one that takes over from this hand does (see
`embodied_rl.record_demos`).
"""

from __future__ import annotations

from dataclasses import replace

import torch
from torch import Tensor

from embodied_rl.envs.tabletop.env import TabletopEnv
from embodied_rl.envs.tabletop.expert import LIFTING, Expert, grasps
from embodied_rl.envs.tabletop.tasks import View

ASIDE = torch.tensor([0.04, 0.025, 0.012])
"""Largest error along x, y and the vertical, m. A camera in front tells near and far worst."""
LATE = 8
"""Control steps after closing the fingers, at most, within which the error is found out."""
STUCK = 8
"""Control steps after which a hand has come down on an object rather than around it."""


class Clumsy(Expert):
    """The expert, but it takes the object to be up to some centimetres from where it is.

    Example:
        clumsy = Clumsy(env, copies, seed); clumsy.reset(mask)
        action = torch.where(clumsy.errs[:, None], clumsy.act(), expert.act())
    """

    def __init__(self, env: TabletopEnv, copies: Tensor, seed: int) -> None:
        """Draw the errors.

        Args:
            env: As of the expert.
            copies: [B] bool, who errs, if its task is one of grasping.
            seed: Of where to and for how long.
        """
        super().__init__(env)
        self._aside, self._late = errors(len(copies), seed, self._device)
        self._copies = copies.to(self._device)
        self.errs = torch.zeros_like(self._copies)
        """[B] bool, has not found out yet."""

    def reset(self, mask: Tensor) -> None:
        """Begin to err in the masked copies [B] that are to."""
        super().reset(mask)
        family = self._family_of[self._env.episode.task]
        self.errs = torch.where(mask.to(self._device), self._copies & grasps(family), self.errs)

    def act(self) -> Tensor:
        """Actions [B, 7] of one who does not know better."""
        action = super().act()
        noticed = (self._phase >= LIFTING) & (self._waited >= self._late)
        stuck = (self._phase == LIFTING - 2) & (self._waited >= STUCK)
        # Whoever has the object in spite of all was right.
        self.errs = self.errs & ~noticed & ~stuck & ~self._seen.held
        return action

    def _start_over(self, family: Tensor, view: View) -> None:
        """Not before the error is found out."""

    def _look(self) -> View:
        self._seen = super()._look()
        return replace(self._seen, a_position=self._seen.a_position + self._aside)


def errors(copies: int, seed: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """How far aside [B, 3] (m) objects are taken to be, and for how many control steps [B] after the grasp."""
    u = torch.rand(copies, 4, generator=torch.Generator().manual_seed(seed)).to(device)
    aside = ASIDE.to(device)
    return torch.cat([(2 * u[:, :2] - 1) * aside[:2], u[:, 2:3] * aside[2:]], dim=1), (1 + u[:, 3] * LATE).long()
