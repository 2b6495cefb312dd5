"""Reward without a checker: an episode is right when it came to what most of its group came to.

    vote     1 for the most frequent result of the group, 0 for any other and for none (TTRL)
    novelty  within [3/4, 1] for the most frequent result and [0, 1/4] for the others, the more the less an episode
             resembles the others; 0 for no result (EVOL-RL)

Of two results that are equally frequent the one that came first counts.

Source: Zuo et al. 2025 (TTRL, arXiv:2504.16084); Zhou et al. 2025 (EVOL-RL, arXiv:2509.15194), whose rewards in
[-1, 1] are r = 2 reward - 1: with `coef: 2` a baseline within the group sees the same differences. Differs: all members
vote and are learned from (TTRL votes with 64 and trains on 32), and episodes are compared by their units and pairs of
units, not by the vectors of a sentence encoder.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor

from embodied_rl.errors import CapabilityError
from embodied_rl.rewards import Episode, RewardConfig, RewardModel
from embodied_rl.types import EnvSpec


class Config(RewardConfig):
    """Settings of the vote."""

    type: Literal["majority"] = "majority"
    use: Literal["alone"] = "alone"
    """alone: pays every episode in place of the env's reward, which nothing learns from then."""
    novelty: bool = False
    """Pay episodes more that differ from the others of their group, so that agreeing is not all that counts."""

    @property
    def needs_groups(self) -> bool:
        """Only copies of one start can agree."""
        return True

    @property
    def needs_results(self) -> bool:
        """The vote is on results."""
        return True


class Majority(RewardModel):
    """See the module docstring."""

    def __init__(self, config: Config) -> None:
        """Keep the settings."""
        self.config = config
        self._metrics: dict[str, tuple[float, float]] = {}

    def judge(self, episodes: Sequence[Episode]) -> Sequence[Tensor | None]:
        """0 in all states of an episode but the last, in which it is the reward."""
        answers: list[Tensor | None] = [None] * len(episodes)
        share: list[float] = []
        right: list[float] = []
        for group in {e.group: None for e in episodes}:
            members = [i for i, e in enumerate(episodes) if e.group == group]
            chosen = winner([_result(episodes[i]) for i in members])
            agree = [chosen is not None and episodes[i].result == chosen for i in members]
            share.append(sum(agree) / len(agree))
            right.append(float(any(a and episodes[i].succeeded for a, i in zip(agree, members, strict=True))))
            paid = [float(a) for a in agree]
            if self.config.novelty:
                paid = with_novelty(agree, similarities([_units(episodes[i]) for i in members]))
            for i, x in zip(members, paid, strict=True):
                answer = torch.zeros(len(episodes[i]) + 1)
                answer[-1] = x if _result(episodes[i]) >= 0 else 0.0
                answers[i] = answer
        n = float(len(share))
        self._metrics = {"rollout/majority_share": (sum(share), n), "rollout/majority_right_rate": (sum(right), n)}
        return answers

    def metrics(self) -> dict[str, tuple[float, float]]:
        """How much the groups of the latest rollout agreed, and on what."""
        return self._metrics


def winner(results: Sequence[int]) -> int | None:
    """The most frequent result >= 0, the earliest of equally frequent ones; None when there is none."""
    votes = Counter(r for r in results if r >= 0)
    return votes.most_common(1)[0][0] if votes else None


def similarities(rows: Sequence[Sequence[int]]) -> list[list[float]]:
    """Cosines between rows of ids, each counted as its ids and its pairs of neighbours.

    Args:
        rows: G rows.

    Returns:
        similarity: [G, G] in [0, 1]; 0 with an empty row.
    """
    counts: list[Counter[object]] = [Counter([*row, *zip(row, row[1:], strict=False)]) for row in rows]
    norms = [sum(n * n for n in c.values()) ** 0.5 for c in counts]
    return [
        [sum(n * b[k] for k, n in a.items()) / (x * y) if x and y else 0.0 for b, y in zip(counts, norms, strict=True)]
        for a, x in zip(counts, norms, strict=True)
    ]


def with_novelty(agree: Sequence[bool], similarity: Sequence[Sequence[float]]) -> list[float]:
    """Rewards that lift what is new among those that agree, and among those that do not.

    novelty_i = 1 - (mean over the others of its side + largest over all others of s_ij) / 2
    reward_i  = (3 if it agrees else 0) / 4 + u_i / 4, u_i = novelty scaled to [0, 1] over its side (1/2 if all equal)

    Args:
        agree: [G], whose result is the most frequent one.
        similarity: [G, G].

    Returns:
        reward: [G] in [0, 1].

    Source: Zhou et al. 2025 (EVOL-RL, arXiv:2509.15194).
    """
    everyone = range(len(agree))
    novelty = []
    for i in everyone:
        side = [similarity[i][j] for j in everyone if j != i and agree[j] == agree[i]]
        others = [similarity[i][j] for j in everyone if j != i]
        novelty.append(1 - (sum(side) / len(side) if side else 0.0) / 2 - max(others, default=0.0) / 2)
    out = []
    for i in everyone:
        side = [novelty[j] for j in everyone if agree[j] == agree[i]]
        low, high = min(side), max(side)
        out.append(0.75 * agree[i] + 0.25 * ((novelty[i] - low) / (high - low) if high > low else 0.5))
    return out


def _result(episode: Episode) -> int:
    assert episode.result is not None, "shaping.check_reward has asked for results"
    return episode.result


def _units(episode: Episode) -> list[int]:
    assert episode.units is not None and episode.mask is not None
    return [int(x) for x in episode.units[episode.mask].flatten()]


def build(config: Config, *, env: EnvSpec, device: torch.device) -> Majority:
    """Make the model.

    Raises:
        CapabilityError: Novelty of actions that are no whole numbers.
    """
    if config.novelty and env.action.kind == "continuous":
        raise CapabilityError(
            "reward.novelty compares rows of whole numbers, and this env's actions are continuous: set reward.novelty: "
            "false"
        )
    return Majority(config)
