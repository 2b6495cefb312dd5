"""How many copies each start gets: more where a further try is likely to tell something."""

from __future__ import annotations

import heapq

import torch
from pydantic import Field, model_validator
from torch import Tensor

from embodied_rl.section import Section


class Budget(Section):
    """Bounds of the number of copies of one start; all of them together are `collect.copies`."""

    low: int = Field(2, ge=2)
    """Copies that every start gets."""
    high: int = Field(32, ge=2)
    """Most copies of one start."""

    @model_validator(mode="after")
    def _in_order(self) -> Budget:
        if self.low > self.high:
            raise ValueError(f"low ({self.low}) must not be above high ({self.high})")
        return self


def share_out(rate: Tensor, total: int, budget: Budget) -> Tensor:
    """Divide copies among starts so that the sum of their values is as large as possible.

    value(n, p) = (1 - p^n - (1 - p)^n) p (1 - p)^2

    is the probability that n tries differ, times how much the success rate p can be expected to rise. A further copy is
    worth (p^n (1 - p) + (1 - p)^n p) p (1 - p)^2, which falls with n: giving each copy to whom it is worth most is
    optimal. Copies that are worth nothing to anybody go to the starts of the lowest rates.

    Args:
        rate: [G] success rates p in [0, 1].
        total: Copies in all, between low G and high G.
        budget: The bounds.

    Returns:
        copies: [G] int64, adds up to `total`.

    Source: Li et al. 2025 (Knapsack RL, arXiv:2509.25849). Differs: they solve the same problem by dynamic programming.
    """
    rates = rate.tolist()
    assert budget.low * len(rates) <= total <= budget.high * len(rates), "recipe.Collect has checked it"

    def entry(start: int, n: int) -> tuple[float, float, int]:
        p = rates[start]
        worth = (p**n * (1 - p) + (1 - p) ** n * p) * p * (1 - p) ** 2
        return -worth, p, start

    copies = [budget.low] * len(rates)
    heap = [entry(i, budget.low) for i in range(len(rates))] if budget.high > budget.low else []
    heapq.heapify(heap)
    for _ in range(total - sum(copies)):
        start = heap[0][2]
        copies[start] += 1
        if copies[start] < budget.high:
            heapq.heapreplace(heap, entry(start, copies[start]))
        else:
            heapq.heappop(heap)
    return torch.tensor(copies, dtype=torch.int64)
