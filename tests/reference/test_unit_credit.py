"""Advantages of single units: token-level returns and values across the replies of an episode, worked by hand."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl import advantage
from embodied_rl.batch import as_batch, flatten
from embodied_rl.credit import Credit, CreditChain
from embodied_rl.errors import ShapeError
from embodied_rl.loss import Loss, LossFunction
from embodied_rl.types import Evaluation
from embodied_rl.value_loss import ValueLoss
from tests.kit import number, rollout_of

F64 = torch.float64
X = float("nan")

# One episode of two replies: two tokens, then one; the other units are padding or somebody else's.
MASK = torch.tensor([[[True, True, False]], [[False, True, False]]])
VALUE = torch.tensor([[[0.5, 0.6, X]], [[X, 0.7, X]]], dtype=F64)
REWARD = torch.tensor([[0.2], [1.0]], dtype=F64)
NEXT = torch.tensor([[0.7], [X]], dtype=F64)
ENDS = torch.tensor([[False], [True]])
NO = torch.zeros(2, 1, dtype=torch.bool)


def close(actual, expected):
    torch.testing.assert_close(actual.flatten(), torch.tensor(expected, dtype=F64), rtol=0, atol=1e-7)  # weights of the loss are float32


def unit_gae(reward=REWARD, next_value=NEXT, terminated=ENDS, truncated=NO, mask=MASK, *, discount=0.9, lam=0.5):
    paid = advantage.on_last_unit(reward, mask)
    return advantage.unit_gae(paid, VALUE, next_value, mask, terminated, truncated, discount=discount, lam=lam)


def test_a_decision_is_paid_on_its_last_unit_that_counts():
    close(advantage.on_last_unit(REWARD, MASK), [0, 0.2, 0, 0, 1.0, 0])
    close(advantage.on_last_unit(REWARD, torch.zeros_like(MASK)), [0.2, 0, 0, 1.0, 0, 0])


def test_token_level_gae_across_two_replies():
    # third token: 1 - 0.7 = 0.3;  second: 0.2 + 0.9 x 0.7 - 0.6 = 0.23, + 0.9 x 0.5 x 0.3 = 0.365;
    # first: 0.6 - 0.5 = 0.1, + 0.5 x 0.365 = 0.2825 (no time passes within a reply)
    close(unit_gae(), [0.2825, 0.365, 0, 0, 0.3, 0])


def test_a_time_limit_bootstraps_from_the_state_that_followed():
    # third token: 1 + 0.9 x 2 - 0.7 = 2.1;  second 0.23 + 0.45 x 2.1 = 1.175;  first 0.1 + 0.5 x 1.175 = 0.6875
    next_value = torch.tensor([[0.7], [2.0]], dtype=F64)
    close(unit_gae(next_value=next_value, terminated=NO, truncated=ENDS), [0.6875, 1.175, 0, 0, 2.1, 0])


def test_nothing_flows_back_over_the_end_of_an_episode():
    # The first reply ends its episode: 0.2 - 0.6 = -0.4;  0.1 + 0.5 x -0.4 = -0.1
    next_value = torch.tensor([[X], [X]], dtype=F64)
    close(unit_gae(next_value=next_value, terminated=~NO), [-0.1, -0.4, 0, 0, 0.3, 0])


def test_a_reply_without_own_tokens_passes_reward_and_time_on():
    # The second reply holds nothing of the policy: its state is worth 0.7, it pays 1, and the episode ends.
    # second token: 0.2 + 0.9 x 0.7 - 0.6 + 0.45 x (1 - 0.7) = 0.365, as if one token had been there
    mask = MASK.clone()
    mask[1] = False
    value = VALUE.clone()
    value[1, 0, 0] = 0.7
    paid = advantage.on_last_unit(REWARD, mask)
    found = advantage.unit_gae(paid, value, NEXT, mask, ENDS, NO, discount=0.9, lam=0.5)
    close(found, [0.2825, 0.365, 0, 0, 0, 0])


@given(st.data())
def test_masked_units_change_nothing_and_one_unit_per_decision_is_plain_gae(data):
    seed = data.draw(st.integers(0, 2**30))
    g = torch.Generator().manual_seed(seed)
    t, b, a = 5, 3, 3
    reward, value, after = (torch.randn(t, b, generator=g, dtype=F64) for _ in range(3))
    terminated, truncated = (torch.rand(t, b, generator=g) < 0.2 for _ in range(2))
    where = torch.randint(a, (t, b, 1), generator=g)
    mask = torch.zeros(t, b, a, dtype=torch.bool).scatter(-1, where, True)
    spread = torch.full((t, b, a), X, dtype=F64).scatter(-1, where, value.unsqueeze(-1))
    plain = advantage.gae(reward, value, after, terminated, truncated, discount=0.9, lam=0.7)
    found = advantage.unit_gae(
        advantage.on_last_unit(reward, mask), spread, after, mask, terminated, truncated, discount=0.9, lam=0.7
    )
    torch.testing.assert_close(found[mask].view(t, b), plain, rtol=1e-12, atol=1e-12)
    assert (found[~mask] == 0).all()


@pytest.mark.parametrize("lam", [0.0, 0.4, 1.0])
def test_tokens_in_one_long_reply_or_in_many_short_ones_have_the_same_advantages(lam):
    g = torch.Generator().manual_seed(1)
    value, reward = torch.randn(6, generator=g, dtype=F64), torch.randn(6, generator=g, dtype=F64)
    no, end = torch.zeros(6, 1, dtype=torch.bool), torch.arange(6).unsqueeze(-1) == 5
    after = torch.cat([value[1:], value.new_zeros(1)]).unsqueeze(-1)
    plain = advantage.gae(reward.unsqueeze(-1), value.unsqueeze(-1), after, end, no, discount=1.0, lam=lam).flatten()
    for a in (6, 3, 2):
        t = 6 // a
        mask = torch.ones(t, 1, a, dtype=torch.bool)
        found = advantage.unit_gae(
            reward.view(t, 1, a), value.view(t, 1, a), after[a - 1 :: a], mask, end[a - 1 :: a], no[:t], discount=1.0, lam=lam
        )
        torch.testing.assert_close(found.flatten(), plain, rtol=1e-12, atol=1e-12)


def chain(rollout, penalty=None, **credit):
    return CreditChain(Credit(**({"gamma": 1.0} | credit)))(rollout, penalty)


def episode(**given):
    fields = {"mask": MASK, "terminated": ENDS, "num_units": 3} | given
    return rollout_of(REWARD, **fields)


def test_the_return_to_go_of_a_token_holds_the_penalties_of_itself_and_all_later_ones():
    # rewards 0.2 and 1, penalties 0.1 and 0.3 | 0.05: third 0.95, second 0.2 - 0.3 + 0.95 = 0.85, first 0.85 - 0.1 = 0.75
    penalty = torch.tensor([[[0.1, 0.3, X]], [[X, 0.05, X]]], dtype=F64)
    out = chain(episode(), penalty, level="unit", returns="return_to_go", baseline="none")
    close(out.advantage, [0.75, 0.85, 0, 0, 0.95, 0])
    # and at decision level: second reply 0.95, first 0.2 - 0.4 + 0.95
    close(chain(episode(), penalty, returns="return_to_go", baseline="none").advantage, [0.75, 0.95])
    # over the episode: 1.2 - 0.45
    close(chain(episode(), penalty, returns="trajectory", baseline="none").advantage, [0.75, 0.75])


def test_reinforce_plus_plus_whitens_over_tokens():
    # returns to go 1.2, 1.2, 1: mean 3.4 / 3, unbiased deviation sqrt((2 (1/15)^2 + (2/15)^2) / 2) = 0.2 / sqrt(3)
    out = chain(episode(), level="unit", returns="return_to_go", baseline="none", whiten=True).advantage
    a = 3**-0.5
    close(out, [a, a, 0, 0, -2 * a, 0])


def test_the_critic_target_of_a_token_is_its_advantage_plus_its_value():
    rollout = episode(value=VALUE, next_value=NEXT)
    out = chain(rollout, gamma=0.9, lam=0.5, level="unit", whiten=True)
    close(out.target, [0.7825, 0.965, 0, 0, 1.0, 0])
    assert out.advantage[MASK].mean() == pytest.approx(0.0, abs=1e-12) and (out.advantage[~MASK] == 0).all()


def test_values_of_tokens_are_fitted_with_equal_weights_and_masked_ones_give_no_gradient():
    rollout = episode(value=VALUE, next_value=NEXT)
    function = LossFunction(Loss(ratio="unit", value=ValueLoss(coef=1.0)), chunk=1)
    batch = as_batch(flatten(rollout, chain(rollout, gamma=0.9, lam=0.5, level="unit")), function)
    batch.advantage.zero_()
    value = torch.tensor([[0.0, 0.0, X], [X, 0.0, X]], dtype=F64, requires_grad=True)
    total = function(Evaluation(batch.logp, value=value), batch).total
    total.backward()
    assert number(total) == pytest.approx((0.7825**2 + 0.965**2 + 1.0) / 3)
    close(value.grad, [-2 * 0.7825 / 3, -2 * 0.965 / 3, 0, 0, -2 / 3, 0])


def test_each_token_meets_its_own_advantage():
    rollout = episode(logp=torch.full((2, 1, 3), -0.5, dtype=F64))
    function = LossFunction(Loss(ratio="unit", aggregate="unit_mean", value=ValueLoss(coef=0.0)), chunk=1)
    batch = as_batch(flatten(rollout, chain(rollout, level="unit", returns="return_to_go", baseline="none")), function)
    logp = batch.logp.clone().requires_grad_()
    function(Evaluation(logp), batch).total.backward()
    close(logp.grad, [-1.2 / 3, -1.2 / 3, 0, 0, -1.0 / 3, 0])


def test_a_critic_that_values_decisions_cannot_give_units_their_own():
    rollout = episode(value=VALUE[..., 0], next_value=NEXT)
    with pytest.raises(ShapeError, match="the policy must value each unit"):
        advantage.unit_gae(VALUE[..., 0], VALUE[..., 0], NEXT, MASK, ENDS, NO, discount=1.0, lam=1.0)
    assert chain(rollout, returns="return_to_go", baseline="none").advantage.shape == (2, 1)


def test_one_number_per_episode_for_every_unit_is_refused():
    with pytest.raises(ValueError, match=r"level \(unit\) with returns \(trajectory\) and baseline \(group_mean\)"):
        Credit(level="unit", returns="trajectory", baseline="group_mean")
