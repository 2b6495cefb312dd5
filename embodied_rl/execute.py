"""One chunk of actions, played: what came of it in each copy, and whose episodes it ended."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from embodied_rl.observation import check_observation, name_of, not_finite
from embodied_rl.types import Env, Obs, Sparing

log = logging.getLogger(__name__)

Ends = Literal["all", "truncated", "none"]
"""Whose last observation of an episode somebody reads, privileged entries apart."""


@dataclass
class Executed:
    """What came of one chunk in one part's copies."""

    obs: Obs
    reward: Tensor
    steps: Tensor
    terminated: Tensor
    truncated: Tensor
    success_once: Tensor | None
    success: Tensor | None
    metrics: dict[str, tuple[Tensor, Tensor]]
    """name -> (sum [b], count [b]) over the executed control steps."""
    invalid: Tensor | None = None
    """[b] bool, see `Step.invalid`; None when nothing can fail."""
    result: Tensor | None = None
    """[b] int64, see `Step.result`; None when the env has none."""
    starting: Tensor | None = None
    """[b] bool, see `Step.starting`: nothing was decided here; None when there is none."""


def execute(env: Env, action: Tensor, active: Tensor | None, ends: Ends = "all", *, first: int = 0) -> Executed:
    """Run one action chunk; a copy stops where its episode ends, and later actions of its chunk are dropped.

    Args:
        env: b copies.
        action: [b, C, ...].
        active: [b] bool, copies in an unfinished episode; None for all.
        ends: See `Ends`; what nobody reads need not be drawn (`Sparing`).
        first: Number of copy 0 in what is told of copies that go wrong.

    Returns:
        executed: Sums over the executed control steps; `obs` is where each copy really stopped. An episode that was
            paid or, unless it is terminated, showed a number that is not finite has ended there, invalid.
    """
    chunk = action.shape[1]
    metrics: dict[str, tuple[Tensor, Tensor]] = {}
    total: Executed | None = None
    for c in range(chunk):
        step = env.step(action[:, c], active)
        everyone = active is None
        mask = torch.ones_like(step.terminated) if active is None else active
        if step.starting is not None:
            mask, everyone = mask & ~step.starting, False
        terminated, truncated, reward, success = step.terminated, step.truncated, step.reward, step.success
        invalid = None if step.invalid is None else step.invalid & mask
        if not everyone:
            terminated, truncated = terminated & mask, truncated & mask
            reward = torch.where(mask, reward, torch.zeros_like(reward))
        for name, x in step.metrics.items():
            x = x if everyone else torch.where(mask, x, torch.zeros_like(x))
            s, n = metrics.get(name, (torch.zeros_like(x), torch.zeros_like(x)))
            metrics[name] = (s + x, n + mask)
        if total is None:
            once = None if success is None else success & mask
            steps = mask.to(torch.int64)
            total = Executed(step.obs, reward, steps, terminated, truncated, once, success, metrics, invalid)
            total.result, total.starting = step.result, step.starting
            if chunk > 1:
                # An env may reuse its arrays from step to step.
                total.reward, total.terminated, total.truncated = reward.clone(), terminated.clone(), truncated.clone()
                total.success = None if success is None else success.clone()
        else:
            total.obs = _where(mask, step.obs, total.obs)
            total.reward = total.reward + reward
            total.steps = total.steps + mask
            total.terminated = total.terminated | terminated
            total.truncated = total.truncated | truncated
            if invalid is not None and total.invalid is not None:
                total.invalid = total.invalid | invalid
            if step.result is not None and total.result is not None:
                total.result = torch.where(mask, step.result, total.result)
            if success is not None and total.success is not None and total.success_once is not None:
                total.success_once = total.success_once | (success & mask)
                total.success = torch.where(mask, success, total.success)
        if c + 1 < chunk:
            done = terminated | truncated
            if bool(done.any()):
                active = mask & ~done
                if not bool(active.any()):
                    break
                # Copies that have stopped must keep what they saw last.
                total.obs = {k: v.clone() for k, v in total.obs.items()}
    assert total is not None
    total.metrics = metrics
    if env.spec.on_demand:
        if ends != "all" and isinstance(env, Sparing):
            env.spare(total.terminated if ends == "truncated" else total.terminated | total.truncated)
        total.obs = env.observe()
    check_observation(total.obs, env.spec)
    _void(total, env, first)
    if total.invalid is not None:
        # Whatever the env paid there is not known to mean anything.
        total.reward = torch.where(total.invalid, torch.zeros_like(total.reward), total.reward)
    return total


def _void(total: Executed, env: Env, first: int) -> None:
    """End, as invalid, the episodes that met numbers that are not finite; those of other copies go on.

    A terminated episode may show anything: nothing is decided there, and nothing valued.
    """
    played = total.steps > 0
    if total.invalid is not None:
        played &= ~total.invalid
    shown = played & ~total.terminated
    unsound = {"the reward": not_finite(total.reward, played)}
    unsound |= {f"observation '{name}'": not_finite(x, shown) for name, x in total.obs.items()}
    found = {what: rows for what, rows in unsound.items() if rows is not None}
    for what, rows in found.items():
        log.warning(
            "%s: %s is not finite in copies %s: their episodes do not count", name_of(env), what,
            (rows.nonzero().flatten() + first).tolist(),
        )  # fmt: skip
    if not found:
        return
    rows = torch.stack(list(found.values())).any(0)
    total.invalid = rows if total.invalid is None else total.invalid | rows
    total.truncated = total.truncated | rows & ~total.terminated
    # What such an episode showed last is still looked at, in a batch with sound ones.
    total.obs = {name: torch.where(_wide(rows, x), torch.zeros_like(x), x) for name, x in total.obs.items()}


def _where(mask: Tensor, new: Obs, old: Obs) -> Obs:
    """New observations for the masked copies, old ones for the others."""
    if bool(mask.all()):
        return new
    return {k: torch.where(_wide(mask, v), v, old[k]) for k, v in new.items()}


def _wide(mask: Tensor, x: Tensor) -> Tensor:
    """A mask [b] in the form of x [b, ...]."""
    return mask.view(-1, *[1] * (x.ndim - 1))
