"""What an env or a policy may offer beside `Env` and `Policy`; the engine asks for it by `isinstance`.

Axis letters are those of types.py.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

import torch
from torch import Tensor

from embodied_rl.spec import Obs


@runtime_checkable
class Speaking(Protocol):
    """What an env offers beside `Env` when it knows in words what its copies are asked for."""

    def instructions(self) -> list[str]:
        """The present instruction of each copy [B] as text, once the first reset has begun its episode."""
        ...


@runtime_checkable
class Sparing(Protocol):
    """What an env with `spec.on_demand` offers beside `Env` when it need not draw what nobody is going to look at."""

    def spare(self, copies: Tensor) -> None:
        """Until their next reset these copies may show anything, except in privileged entries, which stay true.

        Args:
            copies: [B] bool, copies whose episode has ended.
        """
        ...


@runtime_checkable
class Restarting(Protocol):
    """What an env offers beside `Env` when its simulators are processes that it replaces where it loses them."""

    @property
    def restarts(self) -> int | None:
        """Processes replaced since the env was built; None where no part of it has any."""
        ...


@runtime_checkable
class Hinting(Protocol):
    """What an env offers beside `Env` when it can make its tasks easier by showing a part of the solution."""

    def hint(self, share: float) -> None:
        """Show the first `share` of the solution, 0 to 1, in the episodes that the next resets begin."""
        ...


@runtime_checkable
class Relabelling(Protocol):
    """What an env offers beside `Env` when it knows which of its instructions an episode fulfilled unasked."""

    def watch(self) -> None:
        """From here on, note it."""
        ...

    def achieved(self, copies: Tensor) -> tuple[Tensor, Obs]:
        """What the present episodes of some copies have achieved; asked when they have ended, before they are reset.

        Args:
            copies: [B] bool, those asked for.

        Returns:
            since: [B] int64, control steps of the episode after which it first held; 0 for nothing, and for others.
            told: Entries of the observation [B, ...] that would have asked for it; only rows with `since` count.
        """
        ...


@runtime_checkable
class Imitator(Protocol):
    """What a policy offers beside `Policy` when it can learn from demonstrations.

    It may also have `imitates() -> None`, called before reinforcement learning with self-imitation: what only the
    imitation loss reads becomes trainable.
    """

    chunk: int

    def fit_actions(self, low: Tensor, high: Tensor) -> None:
        """Take over the range [D] of demonstrated actions; it is part of the policy's state."""
        ...

    def fit_vectors(self, statistics: dict[str, dict[str, Tensor]]) -> None:
        """Take over mean and std of the observation's vectors (name -> "mean", "std" -> [D])."""
        ...

    def imitation_loss(self, obs: Obs, action: Tensor, last: Obs, generator: torch.Generator) -> Tensor:
        """Loss of each demonstrated control step, with gradients.

        Args:
            obs: [N, ...]
            action: [N, C, D] what the demonstrator did next.
            last: The observation's vectors [N, D] at the end of the demonstration.
            generator: Of any noise, on the policy's device.

        Returns:
            loss: [N, C]
        """
        ...


@runtime_checkable
class Foreseeing(Protocol):
    """What an imitating policy offers beside when it predicts where episodes end."""

    @property
    def foresees(self) -> bool:
        """Whether its settings let it."""
        ...

    def foresight_loss(self, obs: Obs, last: Obs) -> Tensor:
        """That part of the imitation loss, with gradients.

        Args:
            obs: [N, ...]
            last: The observation's vectors [N, D] at the end of the episode.

        Returns:
            loss: [N]
        """
        ...


@runtime_checkable
class Demonstrating(Protocol):
    """What an env offers beside `Env` when it knows good first actions."""

    def demonstrate(self) -> tuple[Tensor, Tensor]:
        """A good action for each copy as its episode began.

        Returns:
            action: [B, *spec.action.shape]
            known: [B] bool, copies for which there is one; the others' actions mean nothing.
        """
        ...


@runtime_checkable
class Encoding(Protocol):
    """What a policy offers beside `Policy` when somebody else's action can be written in its own units."""

    def encode(self, action: Tensor) -> tuple[Tensor, Tensor]:
        """The units that stand for actions [N, C, *shape]: units [N, A, ...] and mask [N, A] bool."""
        ...


@runtime_checkable
class Annealed(Protocol):
    """What a policy offers beside `Policy` when its sampling temperature can be given unit by unit."""

    def anneal(self, temperature: Tensor | None) -> None:
        """Divide the logits of each unit by `temperature` [A], in `act` and `evaluate`, until the next call.

        It comes in place of the policy's own temperature; None returns to that. Greedy decisions do not depend on it.
        """
        ...
