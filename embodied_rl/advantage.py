"""Steps of credit assignment as pure functions: returns, baseline, scale, post-process (`credit.py` chains them).

All tensors are [T, B]. Rewards are never patched to bootstrap a time limit: `next_value` is the value of the state that
really followed, and delta = r + discount (1 - terminated) v' - v is cut at `terminated | truncated`.
"""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from embodied_rl.errors import CapabilityError, ShapeError

Baseline = Literal[
    "none", "constant", "critic", "batch_mean", "group_mean", "leave_one_out", "other_half", "greedy"
]  # fmt: skip
Scale = Literal["none", "batch_std", "group_std", "group_mean"]


def gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    discount: Tensor | float,
    lam: float,
) -> Tensor:
    """Generalised advantage estimates, ended by termination and by time limits.

    delta_t = r_t + discount_t (1 - terminated_t) v'_t - v_t
    A_t     = delta_t + discount_t lam (1 - terminated_t)(1 - truncated_t) A_{t+1}

    Args:
        reward: [T, B] reward of each decision, task units, unscaled.
        value: [T, B] value of the state the decision was taken in.
        next_value: [T, B] value of the state that really followed, before any reset; may be anything, NaN
            included, where terminated.
        terminated: [T, B] bool, the task ended; nothing follows.
        truncated: [T, B] bool, cut by a limit; `next_value` still counts.
        discount: [T, B] or a number, gamma ** executed steps, in [0, 1].
        lam: In [0, 1].

    Returns:
        advantage: [T, B].

    Raises:
        ShapeError: The tensors do not share one [T, B].

    Source: Schulman et al. 2016, eq. 16 (arXiv:1506.02438). The paper has no time limits; they enter by
        `next_value`, never by changed rewards.
    """
    shapes = {tuple(x.shape) for x in (reward, value, next_value, terminated, truncated)}
    if len(shapes) != 1 or reward.ndim != 2:
        raise ShapeError(
            f"gae: reward, value, next_value, terminated, truncated must share one [T, B], got {sorted(shapes)}"
        )
    zero = torch.zeros((), dtype=value.dtype, device=value.device)
    delta = reward + discount * torch.where(terminated, zero, next_value) - value
    carry = (discount * lam) * (~(terminated | truncated)).to(value.dtype)
    advantage = torch.empty_like(delta)
    ahead = torch.zeros_like(delta[0])
    for t in range(len(delta) - 1, -1, -1):
        ahead = torch.addcmul(delta[t], carry[t], ahead, out=advantage[t])
    return advantage


def on_last_unit(x: Tensor, mask: Tensor) -> Tensor:
    """Give each decision's number to the last of its units that count; the others get 0.

    Args:
        x: [T, B].
        mask: [T, B, A] bool.

    Returns:
        spread: [T, B, A]; a decision without any counting unit keeps its number on its first one.
    """
    last = mask.flip(-1).to(torch.int8).argmax(-1, keepdim=True)
    index = torch.where(mask.any(-1, keepdim=True), mask.shape[-1] - 1 - last, 0)
    return x.new_zeros(mask.shape).scatter_(-1, index, x.unsqueeze(-1))


def unit_gae(
    reward: Tensor,
    value: Tensor,
    next_value: Tensor,
    mask: Tensor,
    terminated: Tensor,
    truncated: Tensor,
    *,
    discount: Tensor | float,
    lam: float,
) -> Tensor:
    """`gae` over the units of an episode, one after the other through all its decisions.

    A unit's successor is the next one that counts, in this decision or in a later one of the episode; what lies
    between (another speaker's tokens, padding) neither discounts nor resets anything. No time passes within a decision,
    so `discount` acts on the step from a decision's last unit only; lam acts on every step.

    Args:
        reward: [T, B, A] reward of each unit (`on_last_unit` for one that a whole decision earned).
        value: [T, B, A] value of what each unit was chosen in; may be anything, NaN included, where masked, except on
            the first unit of a decision that emitted nothing: there it is that of the state.
        next_value: [T, B] value of the state that really followed the decision, as in `gae`.
        mask: [T, B, A] bool, units that count.
        terminated: [T, B] bool.
        truncated: [T, B] bool.
        discount: [T, B] or a number.
        lam: In [0, 1].

    Returns:
        advantage: [T, B, A], 0 where masked. With values of 0 and lam 1 it is the return to go.

    Raises:
        ShapeError: reward, value and mask do not share one [T, B, A].

    Source: Schulman et al. 2016, eq. 16 (arXiv:1506.02438), one unit as one time step. Differs: the paper has no
        decisions.
    """
    if len({tuple(x.shape) for x in (reward, value, mask)}) != 1 or reward.ndim != 3:
        raise ShapeError(
            f"unit_gae: reward, value and mask must share one [T, B, A], got {list(reward.shape)}, "
            f"{list(value.shape)}, {list(mask.shape)}: the policy must value each unit"
        )
    zero = torch.zeros((), dtype=value.dtype, device=value.device)
    one = torch.ones_like(zero)
    # A decision that emitted nothing still passes reward and time on.
    acts = mask.clone()
    acts[..., 0] |= ~mask.any(-1)
    value = torch.where(acts, value, zero)
    follows = torch.where(terminated, zero, next_value)
    goes_on = (~(terminated | truncated)).to(value.dtype)
    advantage = torch.zeros_like(value)
    ahead = torch.zeros_like(follows[0])
    for t in range(len(reward) - 1, -1, -1):
        after, ahead = follows[t], ahead * goes_on[t]
        step = (discount[t] if isinstance(discount, Tensor) else discount) * one
        for a in range(reward.shape[2] - 1, -1, -1):
            delta = reward[t, :, a] + step * after - value[t, :, a]
            ahead = torch.where(acts[t, :, a], delta + step * lam * ahead, ahead)
            after = torch.where(acts[t, :, a], value[t, :, a], after)
            step = torch.where(acts[t, :, a], one, step)
            advantage[t, :, a] = ahead
    return torch.where(mask, advantage, zero)


def return_to_go(reward: Tensor, done: Tensor, *, discount: Tensor | float) -> Tensor:
    """Discounted sum of the rewards from each decision to the end of its episode (or of the rollout).

    G_t = r_t + discount_t (1 - done_t) G_{t+1}

    Args:
        reward: [T, B].
        done: [T, B] bool, last decision of an episode.
        discount: [T, B] or a number.

    Returns:
        returns: [T, B].
    """
    carry = discount * (~done).to(reward.dtype)
    out = torch.empty_like(reward)
    ahead = torch.zeros_like(reward[0])
    for t in range(len(reward) - 1, -1, -1):
        ahead = torch.addcmul(reward[t], carry[t], ahead, out=out[t])
    return out


def group_sums(x: Tensor, group: Tensor, member: Tensor) -> tuple[Tensor, Tensor]:
    """Sum and count over the copies of each group, decision by decision.

    Args:
        x: [T, B]; may be anything, NaN included, where a copy is no member.
        group: [B] int64 ids in any order.
        member: [B] bool, copies that count; the others' episodes are void.

    Returns:
        total: [T, B] sum over the members of the copy's group.
        count: [B] number of members.
    """
    ids, inverse = torch.unique(group, return_inverse=True)
    counted = torch.where(member, x, torch.zeros_like(x))
    total = x.new_zeros(x.shape[0], len(ids)).index_add_(1, inverse, counted)
    count = torch.bincount(inverse[member], minlength=len(ids)).to(x.dtype)
    return total[:, inverse], count[inverse]


def equal_in_group(x: Tensor, group: Tensor, member: Tensor) -> Tensor:
    """[T, B] bool, True where all members of the copy's group have exactly the same score (no rounding involved).

    A group with fewer than two members tells nothing either.
    """
    ids, inverse = torch.unique(group, return_inverse=True)
    inverse_of, among = inverse[member], x[:, member]
    index = inverse_of.expand_as(among)
    low = x.new_full((x.shape[0], len(ids)), float("inf")).scatter_reduce_(1, index, among, "amin")
    high = x.new_full((x.shape[0], len(ids)), float("-inf")).scatter_reduce_(1, index, among, "amax")
    return (low >= high)[:, inverse]


def subtract_baseline(score: Tensor, group: Tensor, valid: Tensor, kind: Baseline) -> Tensor:
    """Centre scores.

    group_mean: s - mean of the group;  leave_one_out: s - mean of the OTHER members;  batch_mean: s - mean of valid.

    Args:
        score: [T, B] the same number at every decision of an episode, or the return to go (0 after its end).
        group: [B] int64.
        valid: [T, B] bool; a copy whose first decision is not valid is in no group.
        kind: Which baseline; "none" returns the scores.

    Returns:
        centred: [T, B], exactly 0 for groups whose scores are all equal.

    Raises:
        CapabilityError: leave_one_out with a group of one.

    Source: Kool et al. 2019 (leave one out); Shao et al. 2024, section 4.1 (group mean, arXiv:2402.03300).
    """
    if kind == "none":
        return score
    if kind == "batch_mean":
        chosen = score[valid]
        # The mean of equal numbers rounds, and a scale would blow the rest up.
        equal = chosen.numel() == 0 or bool((chosen == chosen[0]).all())
        return torch.zeros_like(score) if equal else score - chosen.mean()
    member = valid[0]
    total, count = group_sums(score, group, member)
    if kind == "leave_one_out":
        if bool((torch.bincount(group.unique(return_inverse=True)[1]) < 2).any()):
            raise CapabilityError("baseline leave_one_out needs collect.group_size of at least 2, found a group of 1")
        centred = score - (total - score) / (count - 1)
    else:
        centred = score - total / count
    return torch.where(equal_in_group(score, group, member), torch.zeros_like(score), centred)


def other_half(
    score: Tensor, metric: Tensor, group: Tensor, valid: Tensor, between: float, larger: float = 1.0
) -> Tensor:
    """Compare each score with the two halves that a metric splits its group into.

    A_i = between (w_i s_i - w mean of the other half) + (1 - between)(s_i - mean of the own half), where the halves are
    those of the smaller and of the larger metric (equal ones by their order; of an odd number the larger half has one
    more), and w is `larger` for scores of the larger half, else 1.

    Args:
        score: [T, B].
        metric: [B] what the group is split by.
        group: [B] int64.
        valid: [B] bool, copies that are compared.
        between: mu in [0, 1].
        larger: alpha; below 1, of two equal scores that of the smaller metric is the better one.

    Returns:
        centred: [T, B], 0 for copies without company and, with `larger` 1, for groups whose scores are all equal.

    Source: Chen et al. 2025 (CANON, arXiv:2509.23962, eq. 5 with mu and eq. 8 with alpha). Differs: their estimator by
        length weighs the longer half with alpha, as here, and that by entropy the smaller one.
    """
    centred = torch.zeros_like(score)
    for name in group[valid].unique():
        members = (valid & (group == name)).nonzero().squeeze(-1)
        ranked = members[metric[members].argsort(stable=True)]
        if len(ranked) < 2:
            continue
        halves = ranked[: len(ranked) // 2], ranked[len(ranked) // 2 :]
        means = [score[:, half].mean(1, keepdim=True) for half in halves]
        small, large = means
        for half, own, weight, other in ((halves[0], small, 1.0, larger * large), (halves[1], large, larger, small)):
            s = score[:, half]
            centred[:, half] = between * (weight * s - other) + (1 - between) * (s - own)
    if larger != 1:
        return centred
    return torch.where(equal_in_group(score, group, valid), torch.zeros_like(score), centred)


def greedy_score(score: Tensor, group: Tensor, greedy: Tensor) -> Tensor:
    """Score of the greedy copy of each copy's group.

    Args:
        score: [B].
        group: [B] int64.
        greedy: [B] bool, exactly one copy of each group.

    Returns:
        baseline: [B].

    Source: Li et al. 2024 (ReMax, arXiv:2310.10505).
    """
    same = group.unsqueeze(1) == group[greedy].unsqueeze(0)
    assert bool((same.sum(1) == 1).all()), "one greedy copy per group"
    return score[greedy][same.to(torch.int8).argmax(1)]


def scale(centred: Tensor, score: Tensor, group: Tensor, valid: Tensor, kind: Scale, floor: float) -> Tensor:
    """Divide centred scores; zero stays exactly zero.

    group_std: unbiased standard deviation of the group's scores (GRPO);  batch_std: of all episodes' scores (Lite PPO);
    group_mean: of the group's mean score (MaxRL).

    Args:
        centred: [T, B].
        score: [T, B] before centring.
        group: [B] int64.
        valid: [T, B] bool.
        kind: Which divisor; "none" returns `centred`.
        floor: Smallest divisor.

    Returns:
        scaled: [T, B].
    """
    if kind == "none":
        return centred
    if kind == "batch_std":
        return centred / score[valid].std().clamp(min=floor) if int(valid.sum()) > 1 else torch.zeros_like(centred)
    member = valid[0]
    total, count = group_sums(score, group, member)
    mean = total / count.clamp(min=1)
    if kind == "group_mean":
        return centred / mean.abs().clamp(min=floor)
    squares, _ = group_sums((score - mean).square(), group, member)
    return centred / (squares / (count - 1).clamp(min=1)).sqrt().clamp(min=floor)


def whiten(x: Tensor, valid: Tensor, floor: float = 1e-8) -> Tensor:
    """Bring x to mean 0 and unbiased standard deviation 1 over the valid decisions; all-equal values become 0.

    Args:
        x: [T, B].
        valid: [T, B] bool.
        floor: Smallest divisor.

    Returns:
        whitened: [T, B], 0 where not valid.
    """
    # Without this the usual case (all valid) would pay for a gather of the whole rollout.
    chosen = x if bool(valid.all()) else x[valid]
    if chosen.numel() < 2 or bool((chosen == chosen.flatten()[0]).all()):
        return torch.zeros_like(x)
    std, mean = torch.std_mean(chosen)
    return torch.where(valid, (x - mean) / std.clamp(min=floor), torch.zeros_like(x))
