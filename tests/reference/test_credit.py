"""Returns, baselines and scales on small groups worked by hand."""

import math

import pytest
import torch

from embodied_rl import advantage
from embodied_rl.credit import Credit, CreditChain, fit_metrics
from embodied_rl.errors import CapabilityError
from tests.kit import rollout_of

F64 = torch.float64
ONE_GROUP = torch.zeros(4, dtype=torch.int64)
VALID = torch.ones(1, 4, dtype=torch.bool)
SCORES = torch.tensor([[1.0, 2.0, 3.0, 6.0]], dtype=F64)
# mean 3, unbiased variance (4 + 1 + 0 + 9) / 3 = 14 / 3


def close(actual, expected, atol=1e-12):
    torch.testing.assert_close(actual, torch.as_tensor(expected, dtype=actual.dtype).view_as(actual), rtol=0, atol=atol)


def baseline(score, kind, group=ONE_GROUP, valid=None):
    valid = torch.ones_like(score, dtype=torch.bool) if valid is None else valid
    return advantage.subtract_baseline(score, group, valid, kind)


def scaled(score, kind, floor=1e-3, base="group_mean", group=ONE_GROUP):
    valid = torch.ones_like(score, dtype=torch.bool)
    return advantage.scale(baseline(score, base, group), score, group, valid, kind, floor)


def test_return_to_go_discounts_backwards_and_stops_at_the_end_of_an_episode():
    # gamma 0.5: 4; 3 (end) ; 2 + 0.5 x 3 = 3.5; 1 + 0.5 x 3.5 = 2.75
    reward = torch.tensor([[1.0], [2.0], [3.0], [4.0]], dtype=F64)
    done = torch.tensor([[False], [False], [True], [False]])
    close(advantage.return_to_go(reward, done, discount=0.5), [2.75, 3.5, 3.0, 4.0])


def test_return_to_go_takes_a_discount_per_decision():
    # discounts 0.25 (two steps), 0.5: 2 + 0.5 x 3 = 3.5; 1 + 0.25 x 3.5 = 1.875
    reward = torch.tensor([[1.0], [2.0], [3.0]], dtype=F64)
    discount = torch.tensor([[0.25], [0.5], [0.5]], dtype=F64)
    close(advantage.return_to_go(reward, torch.zeros(3, 1, dtype=torch.bool), discount=discount), [1.875, 3.5, 3.0])


def test_group_mean_subtracts_the_mean():
    close(baseline(SCORES, "group_mean"), [-2.0, -1.0, 0.0, 3.0])


def test_leave_one_out_subtracts_the_mean_of_the_others():
    # others of 1: (2 + 3 + 6) / 3 = 11/3; of 2: 10/3; of 3: 3; of 6: 2
    close(baseline(SCORES, "leave_one_out"), [1 - 11 / 3, 2 - 10 / 3, 0.0, 4.0])


def test_leave_one_out_is_g_over_g_minus_1_times_the_group_mean_form():
    g = torch.Generator().manual_seed(0)
    score = torch.randn(3, 12, generator=g, dtype=F64)
    group = torch.tensor([0, 1, 2] * 4)
    torch.testing.assert_close(baseline(score, "leave_one_out", group), 4 / 3 * baseline(score, "group_mean", group))


def test_batch_mean_subtracts_the_mean_of_everything_valid():
    score = torch.tensor([[1.0, 2.0], [6.0, 100.0]], dtype=F64)
    valid = torch.tensor([[True, True], [True, False]])
    close(baseline(score, "batch_mean", torch.arange(2), valid)[valid], [-2.0, -1.0, 3.0])


def test_grpo_divides_by_the_unbiased_standard_deviation_of_the_group():
    s = math.sqrt(14 / 3)
    close(scaled(SCORES, "group_std"), [-2 / s, -1 / s, 0.0, 3 / s])


def test_max_rl_divides_by_the_mean_of_the_group():
    close(scaled(SCORES, "group_mean"), [-2 / 3, -1 / 3, 0.0, 1.0])


def test_lite_ppo_centres_in_the_group_and_divides_by_the_deviation_of_the_batch():
    # groups (1, 3) and (2, 6): centred -1, -2, 1, 2; the batch has variance 14 / 3
    s = math.sqrt(14 / 3)
    close(scaled(SCORES, "batch_std", group=torch.tensor([0, 1, 0, 1])), [-1 / s, -2 / s, 1 / s, 2 / s])


def test_dr_grpo_leaves_the_centred_scores_alone():
    close(scaled(SCORES, "none"), [-2.0, -1.0, 0.0, 3.0])


def test_one_success_of_four_keeps_all_four_samples():
    # mean 0.25, unbiased variance (0.5625 + 3 x 0.0625) / 3 = 0.25, deviation 0.5
    score = torch.tensor([[1.0, 0.0, 0.0, 0.0]], dtype=F64)
    close(scaled(score, "group_std"), [1.5, -0.5, -0.5, -0.5])
    close(baseline(score, "leave_one_out"), [1.0, -1 / 3, -1 / 3, -1 / 3])


@pytest.mark.parametrize("kind", ["batch_mean", "group_mean", "leave_one_out"])
@pytest.mark.parametrize("reward", [0.35, 0.1, 1 / 3, 1e-8, 7.7e6])
@pytest.mark.parametrize("size", [2, 3, 7, 10])
def test_equal_scores_give_exactly_zero_though_their_mean_rounds(reward, size, kind):
    for dtype in (torch.float32, F64):
        score = torch.full((1, size), reward, dtype=dtype)
        group = torch.zeros(size, dtype=torch.int64)
        for scale in ("none", "group_std", "batch_std", "group_mean"):
            out = scaled(score, scale, floor=1e-12, base=kind, group=group)
            assert torch.equal(out, torch.zeros_like(out))


def test_the_floor_bounds_the_divisor():
    # deviation of (0, 1e-6) is 7.07e-7, below the floor: +-5e-7 / 1e-3 = +-5e-4
    score = torch.tensor([[0.0, 1e-6]], dtype=F64)
    close(scaled(score, "group_std", group=torch.zeros(2, dtype=torch.int64)), [-5e-4, 5e-4], atol=1e-15)


def test_a_group_of_one_cannot_leave_one_out():
    with pytest.raises(CapabilityError, match="group_size of at least 2"):
        baseline(SCORES, "leave_one_out", torch.tensor([0, 0, 0, 1]))


def test_whitening_brings_mean_0_and_unbiased_deviation_1():
    s = math.sqrt(14 / 3)
    close(advantage.whiten(SCORES, VALID), [-2 / s, -1 / s, 0.0, 3 / s])


def test_whitening_looks_at_valid_numbers_only_and_zeroes_the_rest():
    x = torch.tensor([[1.0, 2.0], [6.0, float("nan")]], dtype=F64)
    valid = torch.tensor([[True, True], [True, False]])
    s = math.sqrt(7.0)  # (4 + 1 + 9) / 2
    close(advantage.whiten(x, valid), [-2 / s, -1 / s, 3 / s, 0.0])


def test_whitening_of_equal_or_single_numbers_is_exactly_zero():
    for x in (torch.full((2, 3), 0.35), torch.full((1, 1), 5.0)):
        assert torch.equal(advantage.whiten(x, torch.ones_like(x, dtype=torch.bool)), torch.zeros_like(x))


def test_explained_variance_by_hand():
    # targets 1, 2, 3, 6 (variance 14/3), residuals 0, 1, 0, 1 (mean 1/2, variance 1/3): 1 - (1/3) / (14/3) = 13/14
    value = torch.tensor([[1.0, 1.0, 3.0, 5.0]], dtype=F64)
    metrics = fit_metrics(value, SCORES, VALID)
    total, count = metrics["critic/explained_variance"]
    assert total / count == pytest.approx(13 / 14, abs=1e-12)
    assert metrics["critic/value_mean"][0] / metrics["critic/value_mean"][1] == pytest.approx(2.5)
    assert metrics["critic/target_mean"][0] / metrics["critic/target_mean"][1] == pytest.approx(3.0)


def test_explained_variance_of_constant_targets_is_absent():
    assert "critic/explained_variance" not in fit_metrics(SCORES, torch.ones_like(SCORES), VALID)


def chain(rollout, **credit):
    return CreditChain(Credit(**credit))(rollout)


def test_trajectory_scores_do_not_weigh_long_episodes_more():
    # Episodes of 3 and 1 decisions with returns 3 and 1. The mean over episodes is 2, over decisions 2.5;
    # the deviation over episodes is sqrt(2), over decisions 1.
    reward = torch.tensor([[1.0, 1.0], [1.0, 0.0], [1.0, 0.0]], dtype=F64)
    valid = torch.tensor([[True, True], [True, False], [True, False]])
    done = torch.tensor([[False, True], [False, False], [True, False]])
    rollout = rollout_of(reward, valid=valid, terminated=done)
    out = chain(rollout, gamma=1.0, returns="trajectory", baseline="batch_mean", scale="batch_std").advantage
    a = 1 / math.sqrt(2)
    close(out, [a, -a, a, 0.0, a, 0.0])


def test_a_trajectory_score_is_the_discounted_return_at_every_decision():
    # gamma 0.5: 1 + 0.5 x 2 + 0.25 x 4 = 3 and 2 (ended): group mean 2.5
    reward = torch.tensor([[1.0, 2.0], [2.0, 0.0], [4.0, 0.0]], dtype=F64)
    valid = torch.tensor([[True, True], [True, False], [True, False]])
    done = torch.tensor([[False, True], [False, False], [True, False]])
    rollout = rollout_of(reward, valid=valid, terminated=done, group=torch.zeros(3, 2, dtype=torch.int64))
    out = chain(rollout, gamma=0.5, returns="trajectory", baseline="group_mean").advantage
    close(out, [0.5, -0.5, 0.5, 0.0, 0.5, 0.0])


def test_positive_and_negative_weights_and_the_clamp_come_last():
    rollout = rollout_of(SCORES, group=ONE_GROUP.expand(1, 4), terminated=torch.ones(1, 4, dtype=torch.bool))
    credit = dict(gamma=1.0, returns="trajectory", baseline="group_mean")
    close(chain(rollout, **credit, clip=2.5).advantage, [-2.0, -1.0, 0.0, 2.5])
    close(chain(rollout, **credit, negative_weight=0.0).advantage, [0.0, 0.0, 0.0, 3.0])
    close(chain(rollout, **credit, positive_weight=0.5, negative_weight=2.0).advantage, [-4.0, -2.0, 0.0, 1.5])


def test_the_critic_target_is_the_unprocessed_advantage_plus_the_value():
    value = torch.tensor([[1.0], [2.0]], dtype=F64)
    next_value = torch.tensor([[2.0], [4.0]], dtype=F64)
    rollout = rollout_of(torch.ones(2, 1, dtype=F64), value=value, next_value=next_value)
    # gamma 0.5, lambda 0: targets r + gamma v' = 2 and 3, though whitening changes the advantages 1 and 1 to 0
    out = chain(rollout, gamma=0.5, lam=0.0, whiten=True)
    close(out.target, [2.0, 3.0])
    close(out.advantage, [0.0, 0.0])


def test_a_chunk_is_discounted_by_the_steps_it_really_executed():
    # gamma 0.9, chunk 3; the first decision executed 3 steps, the second 1: targets 1 + 0.729 x 2 and 1 + 0.9 x 4
    value, next_value = torch.zeros(2, 1, dtype=F64), torch.tensor([[2.0], [4.0]], dtype=F64)
    rollout = rollout_of(torch.ones(2, 1, dtype=F64), value=value, next_value=next_value, chunk=3, steps=torch.tensor([[3], [1]]))
    close(chain(rollout, gamma=0.9, lam=0.0).target, [2.458, 4.6])


def running_returns(rewards, dones, gamma):
    """R after every step, straight from its definition, over all rollouts in a row."""
    out, running = [], torch.zeros(rewards[0].shape[1], dtype=F64)
    for reward, done in zip(rewards, dones, strict=True):
        for r, d in zip(reward, done, strict=True):
            running = gamma * running + r
            out.append(running)
            running = torch.where(d, 0.0, running)
    return torch.stack(out)


def test_the_running_reward_scale_is_the_deviation_of_all_discounted_returns_so_far():
    g = torch.Generator().manual_seed(3)
    rewards = [5 * torch.randn(6, 3, generator=g, dtype=F64) + 2 for _ in range(4)]
    dones = [torch.rand(6, 3, generator=g) < 0.2 for _ in range(4)]
    zero = torch.zeros(6, 3, dtype=F64)
    credit = CreditChain(Credit(gamma=0.9, lam=0.0, reward_scale="running_return_std"))
    for i in range(4):
        rollout = rollout_of(rewards[i], terminated=dones[i], value=zero, next_value=zero)
        expected = rewards[i] / running_returns(rewards[: i + 1], dones[: i + 1], 0.9).std(unbiased=False)
        torch.testing.assert_close(credit(rollout).advantage, expected, rtol=1e-10, atol=0)


def test_the_memory_of_the_reward_scale_survives_a_save():
    g = torch.Generator().manual_seed(4)
    zero = torch.zeros(5, 2)
    rollouts = [rollout_of(torch.randn(5, 2, generator=g), value=zero, next_value=zero) for _ in range(3)]
    config = Credit(reward_scale="running_return_std")
    whole, first, second = (CreditChain(config) for _ in range(3))
    expected = [whole(r).advantage for r in rollouts]
    first(rollouts[0])
    second.load_state_dict(first.state_dict())
    for rollout, e in zip(rollouts[1:], expected[1:], strict=True):
        assert torch.equal(second(rollout).advantage, e)


def test_a_scale_that_gae_would_ignore_is_refused():
    with pytest.raises(ValueError, match=r"scale \(batch_std\) does nothing with returns gae"):
        Credit(returns="gae", baseline="critic", scale="batch_std")


@pytest.mark.parametrize(("baseline", "scale"), [("none", "batch_std"), ("none", "group_std"), ("batch_mean", "group_std")])
def test_a_scale_that_would_divide_equal_scores_by_its_floor_is_refused(baseline, scale):
    with pytest.raises(ValueError, match=rf"scale \({scale}\) with baseline \({baseline}\) would blow up"):
        Credit(returns="trajectory", baseline=baseline, scale=scale)


def test_the_running_reward_scale_skips_decisions_after_the_end_of_an_episode():
    # One decision of reward 2 and one of 4, each the whole episode: R = 2, 4, deviation 1, whatever padding follows.
    zero = torch.zeros(3, 2, dtype=F64)
    reward = torch.tensor([[2.0, 4.0], [float("nan")] * 2, [0.0, 0.0]], dtype=F64)
    valid = torch.tensor([[True, True], [False, False], [False, False]])
    rollout = rollout_of(reward, valid=valid, terminated=valid, value=zero, next_value=zero)
    out = chain(rollout, reward_scale="running_return_std", lam=0.0).advantage
    close(out, [2.0, 4.0, 0.0, 0.0, 0.0, 0.0])


def group_rollout(reward, **given):
    """One decision of one group of copies."""
    n = len(reward)
    ends, group = torch.ones(1, n, dtype=torch.bool), torch.zeros(1, n, dtype=torch.int64)
    return rollout_of(torch.tensor([reward], dtype=F64), terminated=ends, group=group, **given)


def test_a_made_up_best_member_makes_a_group_that_failed_learn():
    # NGRPO: (0, 0, 0 | 1) has mean 1/4 and deviation 1/2, so every member gets -1/2; (1, 1, 1 | 1) nothing
    ngrpo = {"gamma": 1.0, "returns": "trajectory", "baseline": "group_mean", "scale": "group_std", "virtual_return": 1.0}
    close(chain(group_rollout([0.0, 0.0, 0.0]), **ngrpo).advantage, [-0.5] * 3)
    close(chain(group_rollout([1.0, 1.0, 1.0]), **ngrpo).advantage, [0.0] * 3)
    # (1, 0 | 1): mean 2/3, deviation 1/sqrt(3)
    close(chain(group_rollout([1.0, 0.0]), **ngrpo).advantage, [1 / math.sqrt(3), -2 / math.sqrt(3)])
    credit = CreditChain(Credit(**ngrpo))
    assert credit.contrast(group_rollout([0.0, 0.0])).tolist() == [True, True]
    assert credit.contrast(group_rollout([1.0, 1.0])).tolist() == [False, False]


def test_canon_by_hand():
    # Lengths 1, 3, 2, 3 of returns 1, 0, 0.5, 1
    mask = torch.arange(3) < torch.tensor([1, 3, 2, 3]).view(1, 4, 1)
    rollout = group_rollout([1.0, 0.0, 0.5, 1.0], mask=mask, num_units=3)
    # short half {0, 2}: mean 0.75;  long half {1, 3}: mean 0.5
    canon = {"gamma": 1.0, "returns": "trajectory", "baseline": "other_half"}
    close(chain(rollout, **canon, between=1.0).advantage, [0.5, -0.75, 0.0, 0.25])
    close(chain(rollout, **canon, between=0.0).advantage, [0.25, -0.5, -0.25, 0.5])
    close(chain(rollout, **canon, between=0.25).advantage, [0.3125, -0.5625, -0.1875, 0.4375])


def test_canon_with_a_preferred_half_by_hand():
    # As above with alpha 1/2: short 1 - 0.25 and 0.5 - 0.25, long 0 - 0.75 and 0.5 - 0.75; equal returns differ by length.
    mask = torch.arange(3) < torch.tensor([1, 3, 2, 3]).view(1, 4, 1)
    canon = {"gamma": 1.0, "returns": "trajectory", "baseline": "other_half", "between": 1.0, "larger": 0.5}
    close(chain(group_rollout([1.0, 0.0, 0.5, 1.0], mask=mask, num_units=3), **canon).advantage, [0.75, -0.75, 0.25, -0.25])
    close(chain(group_rollout([1.0] * 4, mask=mask, num_units=3), **canon).advantage, [0.5, -0.5, 0.5, -0.5])
    close(chain(group_rollout([0.0] * 4, mask=mask, num_units=3), **canon).advantage, [0.0] * 4)
    with pytest.raises(ValueError, match=r"larger \(0.5\) does nothing with baseline \(group_mean\)"):
        Credit(returns="trajectory", baseline="group_mean", larger=0.5)


def test_canon_by_surprise():
    # Mean -log pi per unit 2, 1, 3, 1.5: halves {1, 3} and {0, 2}
    logp = -torch.tensor([[[2.0, 9.0], [0.5, 1.5], [3.0, 9.0], [1.0, 2.0]]], dtype=F64)
    mask = torch.tensor([[[True, False], [True, True], [True, False], [True, True]]])
    rollout = group_rollout([1.0, 0.0, 0.5, 1.0], logp=logp, mask=mask, num_units=2)
    found = chain(rollout, gamma=1.0, returns="trajectory", baseline="other_half", between=1.0, split_by="surprise")
    close(found.advantage, [0.5, -0.75, 0.0, 0.25])


def test_a_greedy_copy_is_the_baseline_of_its_group_and_leaves():
    greedy = torch.tensor([[True, False, False]])
    out = chain(group_rollout([0.4, 1.0, 0.0], greedy=greedy), gamma=1.0, returns="trajectory", baseline="greedy", whiten=True)
    assert out.counts.tolist() == [[False, True, True]]
    close(out.advantage, [0.0, math.sqrt(0.5), -math.sqrt(0.5)])
    out = chain(group_rollout([0.4, 1.0, 0.0], greedy=greedy), gamma=1.0, returns="return_to_go", baseline="greedy")
    close(out.advantage, [0.0, 0.6, -0.4])


@pytest.mark.parametrize(
    "given",
    [{"constant": 0.5}, {"between": 0.7}, {"split_by": "surprise"}, {"baseline": "none", "virtual_return": 1.0}],
)
def test_settings_of_another_baseline_are_refused(given):
    with pytest.raises(ValueError, match="does nothing with baseline"):
        Credit(**({"returns": "trajectory", "baseline": "group_mean"} | given))


def test_a_constant_baseline_needs_its_constant():
    with pytest.raises(ValueError, match="constant is null"):
        Credit(returns="trajectory", baseline="constant")
