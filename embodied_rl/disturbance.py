"""What pushes a demonstrating hand about, so that a set shows how to come back to the path."""

from __future__ import annotations

import math

import torch
from torch import Tensor

CORRELATION = 0.85
"""Of the disturbance from one control step to the next: it pushes one way for a while, which moves a hand."""
FADE = 20
"""Control steps within which the disturbance fades out, so that it spoils neither a grasp nor the end of an episode."""


class Disturbance:
    """What is added to the actions of one batch of attempts, from their first control step on.

    n_0 = std e_0,  n_t = rho n_{t-1} + std sqrt(1 - rho^2) e_t,  e_t ~ N(0, 1);  added at t: max(0, 1 - t / F) n_t

    So n_t has standard deviation std at every t. Differs from DART, where the noise is white and its covariance is
    fitted to the imitator's errors: white noise averages out over the steps in which a hand moves by centimetres.

    Source: Laskey, Lee, Fox, Dragan, Goldberg 2017, DART, arXiv:1703.09327, algorithm 1 (the noise is executed, and the
    supervisor's own action is what is learned).
    """

    def __init__(self, std: float, disturbed: Tensor, copies: int, seed: int) -> None:
        """Draw the first one.

        Args:
            std: In action units.
            disturbed: [D] bool; the other dimensions are left alone.
            copies: B.
            seed: Of everything that is drawn.
        """
        self._std, self._disturbed = std, disturbed
        self._generator = torch.Generator().manual_seed(seed)
        self._step = 0
        self._now = std * torch.randn(copies, len(disturbed), generator=self._generator)

    def draw(self) -> Tensor:
        """What to add at this control step [B, D], and on to the next."""
        added = max(0.0, 1 - self._step / FADE) * self._now * self._disturbed
        fresh = torch.randn(self._now.shape, generator=self._generator)
        self._now = CORRELATION * self._now + math.sqrt(1 - CORRELATION**2) * self._std * fresh
        self._step += 1
        return added
