"""An objective without advantages: predict each episode's outcome from how much likelier the policy made it.

s_i   = beta sum_t (log pi - log pi_old) of episode i
psi_i = s_i - mean of the others of its group
L     = - mean_i [y_i log sigmoid(psi_i) + (1 - y_i) log sigmoid(-psi_i)],  y_i the return in [0, 1]

The score is policy and critic in one. Before the first step, without balancing, the gradient is beta times RLOO's.

Source: Li et al. 2025 (PACS, arXiv:2509.02522).
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor
from torch.nn.functional import binary_cross_entropy_with_logits

from embodied_rl.section import Section


class Outcome(Section):
    """The objective `outcome`."""

    beta: float = Field(1.0, gt=0)
    """Scale of the score; larger trusts a change of the log-probability more."""
    balance: bool = True
    """Good episodes (return above 0.5) and bad ones weigh half each, however many there are of either."""


def against_others(score: Tensor, trajectory: Tensor, group: Tensor) -> Tensor:
    """Score of each episode minus the mean score of the others of its group.

    Args:
        score: [N] the same number on every row of a trajectory.
        trajectory: [N] int64.
        group: [N] int64; the rows of a group must all be present.

    Returns:
        psi: [N]; an episode without others keeps its score.
    """
    _, rows = torch.unique(trajectory, return_inverse=True)
    episodes = int(rows.max()) + 1
    # All rows of a trajectory say the same, so it does not matter which of them is kept.
    first = torch.zeros(episodes, dtype=torch.int64, device=rows.device)
    first.scatter_(0, rows, torch.arange(len(rows), device=rows.device))
    own, (_, member) = score[first], torch.unique(group[first], return_inverse=True)
    groups = int(member.max()) + 1
    total = own.new_zeros(groups).index_add(0, member, own)[member]
    count = own.new_zeros(groups).index_add(0, member, torch.ones_like(own))[member]
    return (own - (total - own) / (count - 1).clamp(min=1))[rows]


def outcome_objective(log_ratio: Tensor, label: Tensor, trajectory: Tensor, group: Tensor, beta: float) -> Tensor:
    """Log-likelihood of each episode's outcome, to be maximised.

    Args:
        log_ratio: [N, 1] sum over the trajectory, on each of its rows.
        label: [N, 1] return in [0, 1].
        trajectory: [N] int64.
        group: [N] int64.
        beta: Scale of the score.

    Returns:
        objective: [N, 1].
    """
    psi = against_others(beta * log_ratio.squeeze(-1), trajectory, group).unsqueeze(-1)
    return -binary_cross_entropy_with_logits(psi, label.to(psi.dtype), reduction="none")


def balanced(weight: Tensor, label: Tensor) -> Tensor:
    """Weights of the same total in which labels above 0.5 and the others have half each; unchanged if one is missing.

    Args:
        weight: [N, 1] over the whole optimizer step.
        label: [N]

    Returns:
        weight: [N, 1].
    """
    good = (label > 0.5).unsqueeze(-1)
    total, share = weight.sum(), (weight * good).sum()
    if not bool((share > 0) & (share < total)):
        return weight
    return torch.where(good, weight * total / (2 * share), weight * total / (2 * (total - share)))
