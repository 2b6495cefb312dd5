"""What an optimizer step can learn from beside the rollout: each with its own loss and its own denominators."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Protocol

import torch
from torch import Tensor

from embodied_rl.batch import Flat
from embodied_rl.metrics import Partials
from embodied_rl.types import Policy, Rollout, State


class Extra(Protocol):
    """`begin` before the epochs of an update, `losses` in each optimizer step, `end` after the update."""

    def begin(self, rollout: Rollout, logp: Callable[[Flat], Tensor], version: int) -> Partials:
        """Prepare for an update.

        Args:
            rollout: Collected by the current weights.
            logp: Log-probabilities [N, A] of rows by these weights, without gradients.
            version: Finished updates.
        """
        ...

    def losses(self, policy: Policy, shuffle: torch.Generator) -> Iterator[tuple[Tensor, dict[str, Any]]]:
        """Scalars to call backward on, each before the next is asked for, with metrics name -> (sum, count)."""
        ...

    def end(self, rollout: Rollout) -> None:
        """Take note of a rollout that has been learned from."""
        ...

    def state_dict(self) -> State:
        """What an exact resume needs."""
        ...

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`."""
        ...
