"""The objective that predicts outcomes (PACS): by hand, against RLOO, and split into pieces."""

import math

import pytest
import torch

from embodied_rl import outcome
from embodied_rl.batch import as_batch, flatten, micro_batches, minibatches
from embodied_rl.credit import Credit, CreditChain
from embodied_rl.loss import Loss, LossFunction
from embodied_rl.types import Evaluation
from embodied_rl.value_loss import ValueLoss
from tests.kit import algorithm, number, rollout_of

F64 = torch.float64


def function(beta=1.0, balance=False):
    form = {"ratio": "trajectory", "trust": "none", "aggregate": "trajectory_mean", "value": ValueLoss(coef=0.0)}
    return LossFunction(Loss(objective="outcome", outcome=outcome.Outcome(beta=beta, balance=balance), **form), chunk=1)


def rollout(t=1, groups=1):
    """Groups of three episodes of t decisions of two units; returns 1, 0, 1 in every group."""
    b = 3 * groups
    reward = torch.zeros(t, b, dtype=F64)
    reward[-1] = torch.tensor([1.0, 0.0, 1.0], dtype=F64).repeat(groups)
    ends = torch.zeros(t, b, dtype=torch.bool)
    ends[-1] = True
    group = (torch.arange(b) // 3).expand(t, -1)
    g = torch.Generator().manual_seed(0)
    return rollout_of(reward, terminated=ends, group=group, num_units=2, logp=torch.randn(t, b, 2, generator=g, dtype=F64))


def flat(of):
    return flatten(of, CreditChain(Credit(gamma=1.0, returns="trajectory", baseline="none"))(of), groups=True)


def loss_and_slope(batch, f, move):
    logp = (batch.logp + move).requires_grad_()
    total = f(Evaluation(logp), batch).total
    total.backward()
    return number(total), logp.grad


def test_scores_are_compared_with_the_others_of_the_group():
    # Two rows of episode 5 (score 1), episodes 7 and 8 (3, 8) in group 0; episode 6 alone in group 1.
    score = torch.tensor([1.0, 3.0, 1.0, 2.0, 8.0], dtype=F64)
    psi = outcome.against_others(score, torch.tensor([5, 7, 5, 6, 8]), torch.tensor([0, 0, 0, 1, 0]))
    assert psi.tolist() == [1 - 5.5, 3 - 4.5, 1 - 5.5, 2.0, 8 - 2.0]


def test_the_loss_by_hand():
    # Log-ratios of the three replies 0.2, 0.4, 0 and beta 2: s = 0.4, 0.8, 0; psi = 0, 0.6, -0.6; labels 1, 0, 1
    f = function(beta=2.0)
    batch = as_batch(flat(rollout()), f)
    loss, _ = loss_and_slope(batch, f, torch.tensor([[0.1, 0.1], [0.3, 0.1], [0.2, -0.2]], dtype=F64))
    wanted = (math.log(2) + math.log(1 + math.exp(0.6)) + math.log(1 + math.exp(0.6))) / 3
    assert loss == pytest.approx(wanted, abs=1e-6)


@pytest.mark.parametrize("t", [1, 2])
def test_before_the_first_step_it_is_rloo_times_beta(t):
    f = function(beta=0.7)
    _, slope = loss_and_slope(as_batch(flat(rollout(t)), f), f, 0.0)
    # y - mean of the others = 1/2, -1, 1/2, over three episodes, on every unit alike
    wanted = -0.7 / 3 * torch.tensor([0.5, -1.0, 0.5], dtype=F64)
    torch.testing.assert_close(slope, wanted.repeat(t).unsqueeze(-1).expand(-1, 2), rtol=1e-6, atol=1e-7)


def test_balanced_good_and_bad_replies_weigh_half_each():
    weight = torch.tensor([[0.1], [0.2], [0.3], [0.4]])
    out = outcome.balanced(weight, torch.tensor([1.0, 0.0, 1.0, 0.0]))
    torch.testing.assert_close(out.flatten(), torch.tensor([0.125, 1 / 6, 0.375, 1 / 3]))
    assert torch.equal(outcome.balanced(weight, torch.ones(4)), weight)
    assert as_batch(flat(rollout()), function(balance=True)).weight.flatten().tolist() == pytest.approx([0.25, 0.5, 0.25])


def test_groups_stay_whole_and_pieces_add_up():
    f = function(balance=True)
    of = flat(rollout(t=2, groups=4))
    seen = []
    for batch in minibatches(of, 2, f, torch.Generator().manual_seed(1)):
        assert len(batch) == 12 and len(batch.group.unique()) == 2
        seen += batch.group.unique().tolist()
        move = 0.3 * torch.randn(12, 2, generator=torch.Generator().manual_seed(2), dtype=F64)
        whole, slope = loss_and_slope(batch, f, move)
        start, total, pieces = 0, 0.0, []
        for piece in micro_batches(batch, 4, True):
            loss, part = loss_and_slope(piece, f, move[start : start + len(piece)])
            start, total = start + len(piece), total + loss
            pieces.append(part)
        assert len(pieces) == 2 and total == pytest.approx(whole)
        torch.testing.assert_close(torch.cat(pieces), slope)
    assert sorted(seen) == [0, 1, 2, 3]


def test_what_it_cannot_work_with_is_refused():
    with pytest.raises(ValueError, match=r"objective \(outcome\) scores whole episodes"):
        Loss(objective="outcome")
    with pytest.raises(ValueError, match=r"outcome does nothing with objective \(ratio\)"):
        Loss(outcome=outcome.Outcome(beta=2.0))
    with pytest.raises(ValueError, match="predicts plain returns"):
        algorithm("grpo", loss={"objective": "outcome", "ratio": "trajectory", "trust": "none"})
