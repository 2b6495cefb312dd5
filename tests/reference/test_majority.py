"""Rewards by majority vote (TTRL) and with novelty (EVOL-RL), worked by hand."""

import pytest
import torch

from embodied_rl.credit import Credit, CreditChain
from embodied_rl.rewards import majority
from embodied_rl.rewards.majority import Config, similarities, winner, with_novelty
from embodied_rl.shaping import Shaping
from embodied_rl.types import ActionSpec, TensorSpec
from tests.kit import rollout_of, spec

CREDIT = Credit(gamma=1.0, returns="trajectory", baseline="group_mean")


def judged(results, group, units=None, **config):
    """One decision per copy, paid 7 by the env."""
    b = len(results)
    ends = torch.ones(1, b, dtype=torch.bool)
    rows = torch.tensor([units]) if units else torch.zeros(1, b, 2, dtype=torch.int64)
    rollout = rollout_of(
        torch.full((1, b), 7.0), terminated=ends, group=torch.tensor([group]), result=torch.tensor([results]), units=rows,
        logp=torch.zeros(rows.shape), final=torch.arange(b)[None], final_obs={"x": torch.zeros(b, 1)}, solved=torch.tensor([[int(r == 5) for r in results]]),
    )  # fmt: skip
    env = spec({"x": TensorSpec((1,))}, ActionSpec("tokens", 9, length=rows.shape[-1]))
    config = Config(**config)
    return Shaping(majority.build(config, env=env, device=torch.device("cpu")), config, CREDIT)(rollout)


def test_who_agrees_with_most_of_the_group_is_right():
    # Group 0: 5 three times; group 1: a tie of 8 and 9, 8 came first; group 2: nobody has an answer; the env's 7 is not read.
    rollout, metrics = judged([5, 4, 5, 5, 8, 9, -1, -1], [0, 0, 0, 0, 1, 1, 2, 2])
    assert rollout.reward.tolist() == [[1.0, 0.0, 1.0, 1.0, 1.0, 0.0, 0.0, 0.0]]
    assert metrics["rollout/majority_share"] == (0.75 + 0.5 + 0.0, 3.0) and metrics["rollout/majority_right_rate"] == (1.0, 3.0)
    advantage = CreditChain(CREDIT)(rollout).advantage
    assert advantage.tolist() == [[0.25, -0.75, 0.25, 0.25, 0.5, -0.5, 0.0, 0.0]]


def test_void_episodes_have_no_vote():
    assert winner([-1, -1, 3]) == 3 and winner([2, 3, 3, 2, -1, -1, -1]) == 2 and winner([-1]) is None and winner([]) is None


def test_similarity_by_hand():
    # (1, 2): {1, 2, 12}; (1, 2, 1): {1: 2, 2, 12, 21}: product 2 + 1 + 1 = 4, lengths sqrt 3 and sqrt 7.
    s = similarities([[1, 2], [1, 2, 1], [7], []])
    assert s[0][1] == s[1][0] == pytest.approx(4 / 21**0.5) and s[0][0] == pytest.approx(1.0)
    assert s[0][2] == s[0][3] == s[3][3] == 0.0


def test_novelty_by_hand():
    # Three agree, two do not. Side means / largest: 0: (0.5 + 0.1) / 2 = 0.3 and 0.9; 1: (0.5 + 0.3) / 2 = 0.4 and 0.5;
    # 2: 0.2 and 0.3. Novelty 0.4, 0.55, 0.75: scaled 0, 3/7, 1. The others are alike: 0.2 and 0.9 | 0.2 and 0.4.
    s = [[1.0, 0.5, 0.1, 0.9, 0.0], [0.5, 1.0, 0.3, 0.0, 0.0], [0.1, 0.3, 1.0, 0.0, 0.0], [0.9, 0.0, 0.0, 1.0, 0.2], [0.0, 0.0, 0.0, 0.2, 1.0]]
    found = with_novelty([True, True, True, False, False], s)
    assert found == pytest.approx([0.75, 0.75 + 0.25 * 3 / 7, 1.0, 0.0, 0.25])
    assert with_novelty([True, True], [[1.0, 0.4], [0.4, 1.0]]) == pytest.approx([0.875, 0.875]) and with_novelty([False], [[1.0]]) == [0.125]


def test_novelty_is_paid_and_no_answer_is_the_worst():
    rollout, _ = judged([5, 5, 5, -1], [0] * 4, [[1, 2], [1, 2], [3, 4], [8, 8]], novelty=True, coef=2.0)
    assert rollout.reward.tolist() == [[1.5, 1.5, 2.0, 0.0]]


def test_masked_units_are_not_compared():
    config = Config(novelty=True)
    env = spec({"x": TensorSpec((1,))}, ActionSpec("tokens", 9, length=2))
    episode = majority.Episode({"x": torch.zeros(2, 1)}, None, True, False, 0, 0, 0, 0, torch.tensor([[3, 4]]), torch.tensor([[True, False]]), 1)
    assert majority._units(episode) == [3] and majority.build(config, env=env, device=torch.device("cpu"))
