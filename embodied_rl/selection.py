"""Which of the collected decisions are learned from: those up to success, and those of groups with contrast."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
from torch import Tensor

from embodied_rl.types import Rollout

CLEARED = ("valid", "mask", "reward", "steps", "terminated", "truncated", "invalid", "relabelled")
"""Fields that are zero beyond the end of a rollout; the others repeat their last row."""

LISTED = ("constants", "finished", "final_obs", "relabels", "instructions")
"""Fields with one row per episode instead of [T, B]."""


def until_success(rollout: Rollout) -> Rollout:
    """The rollout as if every episode had ended with the decision in which its goal first held.

    That decision counts whole, also where the goal was reached in the middle of its chunk. Later ones are not valid:
    they change no return, no advantage and no loss.

    Args:
        rollout: With `solved`.

    Returns:
        rollout: The same tensors, but `valid` and `terminated`.

    Source: Li et al. 2025 (SimpleVLA-RL, arXiv:2509.09674) mask action tokens after success in the loss. Differs: the
        returns end there as well.
    """
    assert rollout.solved is not None
    return replace(
        rollout, valid=rollout.valid & (rollout.solved < 2), terminated=rollout.terminated | (rollout.solved == 1)
    )


def refill(
    collect: Callable[[], Rollout], contrast: Callable[[Rollout], Tensor], *, groups: int, max_attempts: int
) -> tuple[Rollout, int]:
    """Collect until enough groups have returns that differ.

    Groups that all succeed or all fail have no advantage; at 90 % success most of a rollout is of that kind, and an
    update learns from the few groups that are left. Here further groups take their place.

    Args:
        collect: Makes one rollout, all of its groups from starts of their own.
        contrast: rollout -> [B] bool, copies whose group has returns that differ (`CreditChain.contrast`).
        groups: Wanted number of groups with contrast.
        max_attempts: Most rollouts; whatever contrast there is then has to do.

    Returns:
        rollout: Everything that was collected, side by side; credit leaves out the groups without contrast.
        attempts: Number of rollouts in it.

    Source: Yu et al. 2025, section 3.2 (DAPO, arXiv:2503.14476). Differs: groups beyond the wanted number are learned
        from as well, not thrown away.
    """
    rollouts: list[Rollout] = []
    found = 0
    while found < groups and len(rollouts) < max_attempts:
        rollouts.append(collect())
        found += len(rollouts[-1].group[0][contrast(rollouts[-1])].unique())
    return join(rollouts), len(rollouts)


def with_hints(
    collect: Callable[[], Rollout], again: Callable[[Tensor, float], Rollout], shares: Sequence[float]
) -> tuple[Rollout, float]:
    """Collect, and play what no copy of a group has solved once more with a hint, then with a larger one.

    What was tried before the last hint stays in the rollout: nobody in it succeeded, so that group-relative credit
    makes nothing of it, and `dynamic_sampling: drop` takes it out.

    Args:
        collect: Makes one rollout of copies [B].
        again: (copies [B] bool, share) -> rollout of these copies from the same starts (`Collector.again`).
        shares: Of the solution, one after the other.

    Returns:
        rollout: Everything, side by side; `finished` tells the episodes without a hint only.
        hinted: Share of the groups that were played again.

    Source: Liu et al. 2025 (GHPO, arXiv:2507.10628).
    """
    rollouts = [collect()]
    left = unsolved(rollouts[0]).cpu()
    hinted = float(left.float().mean())
    for share in shares:
        if not bool(left.any()):
            break
        rollouts.append(replace(again(left, share), finished={}))
        still = left.clone()
        still[left] = unsolved(rollouts[-1]).cpu()
        left = still
    return join(rollouts), hinted


def unsolved(rollout: Rollout) -> Tensor:
    """[B] bool, copies in whose group the goal has held in no episode."""
    assert rollout.solved is not None
    success = ((rollout.solved > 0) & rollout.valid).any(0)
    _, member = torch.unique(rollout.group[0], return_inverse=True)
    total = torch.zeros(int(member.max()) + 1, device=member.device).index_add(0, member, success.float())
    return (total == 0)[member]


def columns(rollout: Rollout, copies: Tensor) -> Rollout:
    """The rollout of some copies alone.

    Args:
        rollout: [T, B].
        copies: [b] int64 indices.

    Returns:
        rollout: [T, b]; per-episode entries and `metrics` are those of all, `finished` is empty.
    """
    changed: dict[str, Any] = {"obs": {k: x[:, copies] for k, x in rollout.obs.items()}, "finished": {}}
    for f in fields(Rollout):
        if isinstance(x := getattr(rollout, f.name), Tensor):
            changed[f.name] = x[:, copies]
    return replace(rollout, **changed)


def join(rollouts: Sequence[Rollout]) -> Rollout:
    """Put rollouts of whole episodes side by side, as if their copies had run at once.

    Args:
        rollouts: [T_i, B_i] each, by one policy.

    Returns:
        rollout: [max T_i, sum B_i]; episodes, groups, rows of `final_obs` and `finished["copy"]` are renumbered,
            decisions beyond the end of a shorter rollout are not valid.
    """
    if len(rollouts) == 1:
        return rollouts[0]
    longest = max(len(r.reward) for r in rollouts)
    parts: list[Rollout] = []
    episodes = groups = copies = ends = 0
    for r in rollouts:
        r = _extended(r, longest)
        finished = dict(r.finished)
        if finished:
            finished["copy"] = finished["copy"] + copies
        final = None if r.final is None else torch.where(r.final < 0, r.final, r.final + ends)
        parts.append(replace(r, episode=r.episode + episodes, group=r.group + groups, finished=finished, final=final))
        # One row of constants per episode, also of one that was begun after the last decision.
        lengths = [len(x) for x in r.constants.values()] + [len(r.instructions or [])]
        episodes += max([int(r.episode.max()) + 1, *lengths])
        groups += int(r.group.max()) + 1
        copies += r.reward.shape[1]
        ends += max([0, *(len(x) for x in r.final_obs.values())])
    joined = {
        name: _side_by_side([getattr(r, name) for r in parts], axis)
        for name, axis in [(f.name, 0 if f.name in LISTED else 1) for f in fields(Rollout)]
        if name not in ("chunk", "metrics")
    }
    return Rollout(**joined, chunk=parts[0].chunk, metrics=_added([r.metrics for r in parts]))


def _extended(rollout: Rollout, decisions: int) -> Rollout:
    """The rollout with decisions appended that do not count."""
    made = len(rollout.reward)
    if made == decisions:
        return rollout
    rows = torch.arange(decisions, device=rollout.reward.device).clamp(max=made - 1)
    changed: dict[str, Any] = {"obs": {k: x[rows] for k, x in rollout.obs.items()}}
    for f in fields(Rollout):
        if isinstance(x := getattr(rollout, f.name), Tensor):
            changed[f.name] = x[rows]
            if f.name in CLEARED:
                changed[f.name][made:] = 0
    return replace(rollout, **changed)


def _side_by_side(values: list[Any], axis: int) -> Any:
    if isinstance(values[0], dict):
        names = dict.fromkeys(name for x in values for name in x)
        return {name: torch.cat([x[name] for x in values if name in x], dim=axis) for name in names}
    if isinstance(values[0], list):
        return [x for part in values for x in part]
    return None if values[0] is None else torch.cat(values, dim=axis)


def _added(parts: list[dict[str, tuple[float, float]]]) -> dict[str, tuple[float, float]]:
    out: dict[str, tuple[float, float]] = {}
    for name, (total, count) in (pair for part in parts for pair in part.items()):
        s, n = out.get(name, (0.0, 0.0))
        out[name] = (s + total, n + count)
    return out
