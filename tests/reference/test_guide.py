"""Demonstrations in the update (RL-PLUS, ReLIFT): which are taken, their advantage, loss and gradient, worked by hand."""

import pytest
import torch

from embodied_rl.errors import CapabilityError
from embodied_rl.guide import Guide, Guided
from embodied_rl.measure import Clock
from embodied_rl.session import Session
from embodied_rl.types import Evaluation
from tests.kit import number, rollout_of
from tests.resume import lab


class Copying:
    """Units are the action's numbers; log-probabilities are given, one row per copy."""

    def __init__(self, probability):
        self.logp = torch.tensor(probability, dtype=torch.float64).log().requires_grad_()

    def encode(self, action):
        return action[:, 0], action[:, 0] >= 0

    def evaluate(self, obs, units, *, entropy=True):
        return Evaluation(self.logp[obs["x"][:, 0].long()])


def rollout(rewards=(0.0, 0.0, 1.0, 0.0, 0.0, 0.0), known=(True,) * 6):
    """Three groups of two copies; only the second has a success. The first group's demonstration has one unit."""
    b = len(rewards)
    action = torch.tensor([[[5, -1], [5, -1], [6, 7], [6, 7], [8, 9], [8, 9]]])
    return rollout_of(
        torch.tensor([rewards], dtype=torch.float64), obs={"x": torch.arange(b, dtype=torch.float64).view(1, b, 1)}, units=action,
        logp=torch.zeros(1, b, 2), terminated=torch.ones(1, b, dtype=torch.bool), group=torch.arange(b)[None] // 2,
        solved=torch.tensor([rewards]).long(), demonstration=action, demonstrated=torch.tensor([known]),
    )  # fmt: skip


HALF = [[0.5, 1.0], [0.5, 0.5], [0.25, 0.5], [0.5, 0.5], [0.8, 0.4], [0.5, 0.5]]


def shown(given, probability=HALF, known=(True,) * 6, size=None, **config):
    policy = Copying(probability)
    guided = Guided(Guide(**config), policy, size=size, units=None)
    metrics = guided.begin(given if given is not None else rollout(known=known), lambda flat: policy.evaluate(flat.obs, flat.rows["units"]).logp.detach(), 0)
    return guided, policy, metrics.reduce()["rollout/demonstrated_starts"]


def total(guided, policy):
    values = [value for value, _ in guided.losses(policy, torch.Generator())]
    for value in values:
        value.backward()
    return sum(number(v) for v in values)


def test_starts_that_nobody_solved_are_imitated_over_their_units():
    # Units 0.5 | 0.8, 0.4 of the copies 0 and 4: the mean of three.
    guided, policy, count = shown(None, kind="imitate", coef=2.0)
    assert count == 2.0
    logs = torch.tensor([0.5, 0.8, 0.4], dtype=torch.float64).log()
    assert total(guided, policy) == pytest.approx(-2 * float(logs.mean()))
    expected = torch.zeros(6, 2, dtype=torch.float64)
    expected[0, 0] = expected[4, 0] = expected[4, 1] = -2 / 3
    torch.testing.assert_close(policy.logp.grad, expected)


@pytest.mark.parametrize("size", [None, 1])
def test_multiple_importance_sampling_by_hand(size):
    # r = 2 p / (q + (q + 1) / 2), at p = q: 0.5 -> 0.8; 0.25 -> 0.5 / 0.875; 0.8 -> 1.6 / 1.7; 0.4 -> 0.8 / 1.1.
    # A = 1 - mean: 1, 0.5, 1. Each unit: r A sqrt(1 - p), five units in all; the gradient by log p is the same number.
    guided, policy, count = shown(None, kind="importance", starts="all", size=size)
    assert count == 3.0
    gain = {(0, 0): 0.8 * 0.5**0.5, (2, 0): 4 / 7 * 0.5 * 0.75**0.5, (2, 1): 0.8 * 0.5 * 0.5**0.5, (4, 0): 16 / 17 * 0.2**0.5, (4, 1): 8 / 11 * 0.6**0.5}
    assert total(guided, policy) == pytest.approx(-sum(gain.values()) / 5)
    for at, x in gain.items():
        assert number(policy.logp.grad[at]) == pytest.approx(-x / 5)
    assert int((policy.logp.grad != 0).sum()) == 5


def test_the_ratio_is_to_the_policy_before_the_update():
    guided, policy, _ = shown(None, kind="importance", focus=0.0)
    policy.logp.data[0, 0] = torch.tensor(0.7).log()  # was 0.5: 1.4 / 1.25
    assert total(guided, policy) == pytest.approx(-(1.4 / 1.25 + 16 / 17 + 8 / 11) / 3)


def test_what_is_not_known_or_not_better_is_left_out():
    guided, policy, count = shown(None, kind="imitate", known=(False, True, True, True, False, False))
    assert count == 1.0 and total(guided, policy) == pytest.approx(-float(torch.tensor([0.5, 0.5]).log().mean()))
    guided, policy, count = shown(None, kind="imitate", known=(False,) * 6)
    assert count == 0.0 and total(guided, policy) == 0.0
    guided, policy, _ = shown(rollout((3.0, 3.0, 1.0, 1.0, 1.0, 1.0)), kind="importance", starts="all")
    assert guided.shown.advantage.tolist() == [0.0, 0.0, 0.0], "a group that does better than the demonstration does not flee it"


def test_void_episodes_set_no_baseline():
    # The second group: 1 and a void 0, so that its mean is 1 and the demonstration is no better.
    given = rollout()
    given.valid[0, 3] = False
    guided, _, _ = shown(given, kind="importance", starts="all")
    assert guided.shown.advantage.tolist() == [1.0, 0.0, 1.0]


def test_an_update_learns_from_demonstrations_alone():
    # Nobody succeeds, so that the method itself has nothing to learn from.
    changes = {"guide": {"kind": "imitate", "coef": 1.0}, "replay": {"coef": 0.0, "rows": 64, "episodes": 256, "recent": 1024, "ramp": 200}}
    s = Session.build(lab.recipe("replay and demonstrations", algorithm=changes, env={"length": 3, "letters": 20}))
    rows = [s.iterate(Clock()).reduce() for _ in range(3)]
    assert rows[0]["rollout/success_once_rate"] == 0.0 and rows[0]["rollout/demonstrated_starts"] == 2
    assert rows[2]["actor/demonstration_logp"] > rows[0]["actor/demonstration_logp"]
    s.close()


def test_what_cannot_be_guided_is_refused():
    guide = {"guide": {"kind": "imitate"}}
    with pytest.raises(CapabilityError, match="the env cannot demonstrate"):
        Session.build(lab.recipe("groups", algorithm=guide))
    with pytest.raises(CapabilityError, match="collect.hints shows solutions as well"):
        Session.build(lab.recipe("hints", algorithm=guide))
    with pytest.raises(ValueError, match=r"best \(2.0\) does nothing with kind \(imitate\)"):
        Guide(kind="imitate", best=2.0)
