"""Good episodes replayed (SPEAR): what is kept, the advantage of then and now, and the loss, worked by hand."""

import math

import pytest
import torch

from embodied_rl.errors import CapabilityError
from embodied_rl.loss import Loss, LossFunction
from embodied_rl.measure import Clock
from embodied_rl.replay import Replay, ReplayBuffer
from embodied_rl.session import Session
from embodied_rl.types import Evaluation
from embodied_rl.value_loss import ValueLoss
from tests.kit import number, rollout_of
from tests.resume import lab

LOSS = {"ratio": "unit", "aggregate": "unit_mean", "value": ValueLoss(coef=0.0)}


class Fixed:
    """A policy that gives every decision these log-probabilities."""

    def __init__(self, logp):
        self.logp = torch.tensor(logp, requires_grad=True)

    def evaluate(self, obs, units, *, entropy=True):
        assert torch.equal(obs["x"][:, 0], units[:, 0]), "rows stay together"
        return Evaluation(self.logp[units[:, 0].long()])


def played(returns, first=0, **given):
    """One decision of two units per copy; observation and units tell which copy it was."""
    b = len(returns)
    name = torch.arange(first, first + b, dtype=torch.float32).view(1, b, 1)
    ends = torch.ones(1, b, dtype=torch.bool)
    return rollout_of(
        torch.tensor([returns]), obs={"x": name}, units=name.expand(1, b, 2).clone(), logp=torch.zeros(1, b, 2), terminated=ends, **given
    )


def buffer(loss=None, **given):
    return ReplayBuffer(Replay(**({"coef": 1.0, "ramp": 0} | given)), LossFunction(Loss(**LOSS | (loss or {})), 1))


def kept(b):
    return b.data["rows"]["units"][:, 0].tolist() if b.data else []


def losses(b, policy, version=0):
    metrics = b.begin(played([0.0]), None, version)
    return list(b.losses(policy, torch.Generator().manual_seed(0))), metrics.reduce()["rollout/replayed_decisions"]


def test_episodes_above_the_quantile_of_recent_returns_are_kept_and_the_oldest_leave():
    b = buffer(episodes=3, recent=6)
    b.end(played([0.0, 1.0, 0.0]))  # median 0
    assert kept(b) == [1] and b.baseline == 0.0
    b.end(played([1.0, 1.0, 0.0], 3))  # recent 0 1 0 1 1 0: median 0.5
    assert kept(b) == [1, 3, 4] and b.baseline == 0.5
    b.end(played([1.0, 0.0, 0.0], 6))  # the latest six: 1 1 0 1 0 0
    assert kept(b) == [3, 4, 6]
    b.end(played([1.0, 1.0, 1.0], 9))  # 1 0 0 1 1 1: median 1, and nothing is above
    assert kept(b) == [3, 4, 6] and b.baseline == 1.0
    assert losses(b, None) == ([], 0.0), "what is usual by now has no advantage left"


def test_void_and_greedy_episodes_are_neither_kept_nor_counted():
    b = buffer()
    b.end(played([0.0, 5.0, 5.0], valid=torch.tensor([[True, False, True]]), greedy=torch.tensor([[False, False, True]])))
    assert b.returns.tolist() == [0.0] and kept(b) == []


def test_the_loss_by_hand():
    # Returns 0, 0, 2, kept: 2 with advantage 2 - 0. Ratios of its units e^0.1 and e^0.5, the latter clipped at 1.2; the second
    # has no gradient: -(1.1052 + 1.2) x 2 / 2 and d/d logp = -e^0.1.
    b, policy = buffer(rows=3), Fixed([[0.0, 0.0], [0.0, 0.0], [0.1, 0.5]])
    b.end(played([0.0, 0.0, 2.0]))
    ((loss, told),), count = losses(b, policy)
    assert number(loss) == pytest.approx(-(math.exp(0.1) + 1.2)) and count == 1.0
    loss.backward()
    assert policy.logp.grad[2].tolist() == pytest.approx([-math.exp(0.1), 0.0])
    assert number(told["actor/replay_clip_fraction"][0]) == pytest.approx(0.5)


def test_masked_units_count_for_nothing():
    b, policy = buffer(rows=4), Fixed([[0.0, 0.0], [0.1, 9.0]])
    b.end(played([0.0, 1.0], mask=torch.tensor([[[True, True], [True, False]]])))
    ((loss, _),), _ = losses(b, policy)  # advantage 1 - 0.5
    assert number(loss) == pytest.approx(-0.5 * math.exp(0.1))


@pytest.mark.parametrize(("version", "share"), [(1, (1 - math.cos(math.pi / 4)) / 2), (2, 0.5), (4, 1.0), (9, 1.0)])
def test_the_weight_rises(version, share):
    b, policy = buffer(ramp=4, coef=0.8), Fixed([[0.0, 0.0], [0.0, 0.0], [0.0, 0.0]])
    b.end(played([0.0, 0.0, 1.0]))
    assert losses(b, policy) == ([], 1.0), "0 in the first update"
    ((loss, _),), _ = losses(b, policy, version)
    assert number(loss) == pytest.approx(-0.8 * share)


def test_a_session_replays_what_earlier_rollouts_found():
    s = Session.build(lab.recipe("replay and demonstrations"))
    rows = [s.iterate(Clock()).reduce() for _ in range(6)]
    assert rows[0]["rollout/replayed_decisions"] == 0 and "actor/replay_loss" not in rows[0]
    assert any("actor/replay_loss" in row for row in rows[1:])
    s.close()


def test_what_cannot_replay_is_refused():
    replay = {"replay": {"coef": 1.0}}
    with pytest.raises(CapabilityError, match="whole episodes, and collect.mode is stream"):
        Session.build(lab.recipe(algorithm=replay))
    with pytest.raises(ValueError, match=r"draws single decisions, and loss.ratio \(trajectory\)"):
        lab.recipe("groups", algorithm=replay | {"loss": {"ratio": "trajectory"}})
    with pytest.raises(ValueError, match=r"replay.rows \(8\) does nothing with replay.coef \(0\)"):
        lab.recipe("groups", algorithm={"replay": {"rows": 8}})
