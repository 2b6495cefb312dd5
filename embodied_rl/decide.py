"""Asking a policy for decisions: of the active copies only, and of some of them greedily."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

from embodied_rl.types import Obs, Policy, PolicyOutput


def decide(
    policy: Policy, obs: Obs, active: Tensor | None, *, generator: torch.Generator | None, greedy: bool = False
) -> PolicyOutput:
    """Ask the policy for the active copies only: those that wait cost no inference and can leak nothing into the env.

    Args:
        policy: Decides.
        obs: [b, ...] of all copies.
        active: [b] bool with at least one True; None for all, which saves the gather.
        generator: See `Policy.act`; how much is drawn from it depends on how many are active.
        greedy: See `Policy.act`.

    Returns:
        output: [b, ...] for all copies, zeros for those that wait.
    """
    if active is None:
        return policy.act(obs, generator=generator, greedy=greedy)
    rows = active.nonzero().squeeze(-1)
    out = policy.act(_rows(obs, rows), generator=generator, greedy=greedy)

    def spread(x: Tensor) -> Tensor:
        return x.new_zeros((len(active), *x.shape[1:])).index_copy_(0, rows, x)

    return _each(spread, out)


def _each(change: Callable[..., Tensor], *outputs: PolicyOutput) -> PolicyOutput:
    """Apply a function to every tensor of decisions of equal form."""
    columns = {f.name: [getattr(out, f.name) for out in outputs] for f in fields(PolicyOutput)}
    changed: dict[str, Any] = {name: None if x[0] is None else change(*x) for name, x in columns.items()}
    return PolicyOutput(**changed)


def decide_mixed(
    policy: Policy, obs: Obs, active: Tensor, greedy: Tensor, *, generator: torch.Generator | None
) -> PolicyOutput:
    """`decide` where some copies take the mode and the others sample.

    Args:
        policy: Decides.
        obs: [b, ...] of all copies.
        active: [b] bool with at least one True.
        greedy: [b] bool.
        generator: Of the samples.

    Returns:
        output: [b, ...] for all copies; what it holds for those that wait means nothing.
    """
    if not bool((active & greedy).any()):
        return decide(policy, obs, active, generator=generator)
    modes = decide(policy, obs, active & greedy, generator=None, greedy=True)
    if not bool((active & ~greedy).any()):
        return modes
    samples = decide(policy, obs, active & ~greedy, generator=generator)
    return _each(lambda a, b: torch.where(greedy.view(-1, *[1] * (a.ndim - 1)), a, b), modes, samples)


def _rows(obs: Obs, rows: Tensor) -> Obs:
    return {k: v.index_select(0, rows) for k, v in obs.items()}
