"""Credit does not depend on names, order or constants: groups, copies, auto-reset or padding."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl import advantage
from embodied_rl.credit import Credit, CreditChain
from tests.kit import rollout_of

F64 = torch.float64
GROUP_CREDITS = [
    Credit(gamma=1.0, returns="trajectory", baseline="group_mean"),
    Credit(gamma=1.0, returns="trajectory", baseline="group_mean", scale="group_std"),
    Credit(gamma=1.0, returns="trajectory", baseline="leave_one_out"),
    Credit(gamma=1.0, returns="return_to_go", baseline="group_mean", scale="group_std"),
    Credit(gamma=0.9, returns="return_to_go", baseline="leave_one_out"),
]
ALL_CREDITS = [
    *GROUP_CREDITS,
    Credit(gamma=0.9, whiten=True),
    Credit(gamma=0.9, lam=0.5, reward_scale="running_return_std"),
    Credit(gamma=0.9, returns="return_to_go", baseline="batch_mean", scale="batch_std", clip=1.0),
]


def name(credit):
    return f"{credit.returns}-{credit.baseline}-{credit.scale}-{credit.reward_scale}"


def one_episode_each(seed, t=4, groups=3, size=4, offset=None):
    """Whole episodes of t decisions in `groups` interleaved groups; `offset` [groups] is added to the last reward."""
    g = torch.Generator().manual_seed(seed)
    b = groups * size
    reward, value = (torch.randn(t, b, generator=g, dtype=F64) for _ in range(2))
    group = torch.arange(b) % groups
    if offset is not None:
        reward[-1] += offset[group]
    end = torch.zeros(t, b, dtype=torch.bool)
    end[-1] = True
    next_value = torch.cat([value[1:], value[:1]])
    return rollout_of(reward, terminated=end, value=value, next_value=next_value, group=group.expand(t, b))


def permuted(rollout, order):
    """The same rollout with its copies in another order."""
    pick = lambda x: x[:, order] if isinstance(x, torch.Tensor) else x  # noqa: E731
    fields = {k: pick(v) for k, v in vars(rollout).items() if k != "obs"}
    return type(rollout)(obs={k: pick(v) for k, v in rollout.obs.items()}, **fields)


@pytest.mark.parametrize("credit", GROUP_CREDITS[:3], ids=name)
@given(st.integers(0, 10**6), st.lists(st.floats(-100, 100), min_size=3, max_size=3))
def test_a_constant_added_to_the_rewards_of_a_group_changes_no_advantage(credit, seed, constants):
    plain = CreditChain(credit)(one_episode_each(seed)).advantage
    moved = CreditChain(credit)(one_episode_each(seed, offset=torch.tensor(constants, dtype=F64))).advantage
    torch.testing.assert_close(moved, plain, rtol=0, atol=1e-10)


@pytest.mark.parametrize("credit", ALL_CREDITS, ids=name)
@given(st.integers(0, 10**6))
def test_permuting_the_copies_permutes_the_advantages(credit, seed):
    rollout = one_episode_each(seed)
    order = torch.randperm(12, generator=torch.Generator().manual_seed(seed))
    expected = CreditChain(credit)(rollout)
    found = CreditChain(credit)(permuted(rollout, order))
    torch.testing.assert_close(found.advantage, expected.advantage[:, order], rtol=0, atol=1e-12)
    if expected.target is not None:
        torch.testing.assert_close(found.target, expected.target[:, order], rtol=0, atol=1e-12)


@pytest.mark.parametrize("credit", GROUP_CREDITS, ids=name)
@given(st.integers(0, 10**6), st.permutations([3, 17, 8]))
def test_the_names_of_the_groups_do_not_matter(credit, seed, names):
    rollout = one_episode_each(seed)
    renamed = permuted(rollout, torch.arange(12))
    renamed.group = torch.tensor(names)[rollout.group]
    assert torch.equal(CreditChain(credit)(renamed).advantage, CreditChain(credit)(rollout).advantage)


@pytest.mark.parametrize("credit", GROUP_CREDITS, ids=name)
@given(st.integers(0, 10**6))
def test_a_group_is_not_touched_by_the_others(credit, seed):
    rollout = one_episode_each(seed)
    alone = rollout.group[0] == 1
    expected = CreditChain(credit)(rollout).advantage[:, alone]
    found = CreditChain(credit)(permuted(rollout, alone.nonzero().squeeze(-1))).advantage
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


@given(st.integers(0, 10**6), st.integers(1, 6), st.floats(0, 1))
def test_lambda_1_telescopes_to_the_monte_carlo_return_minus_the_value(seed, t, gamma):
    rollout = one_episode_each(seed, t=t)
    returns = advantage.return_to_go(rollout.reward, rollout.done, discount=gamma)
    found = CreditChain(Credit(gamma=gamma, lam=1.0))(rollout)
    torch.testing.assert_close(found.advantage, returns - rollout.value, rtol=0, atol=1e-12)
    torch.testing.assert_close(found.target, returns, rtol=0, atol=1e-12)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 5), min_size=1, max_size=4), st.integers(2, 4), st.floats(0, 1))
def test_lambda_1_telescopes_over_chunks_that_executed_fewer_steps_than_they_hold(seed, lengths, chunk, gamma):
    """Episodes of unequal lengths side by side, ended by success or by a time limit, whose last state has a value."""
    g = torch.Generator().manual_seed(seed)
    t, b = max(lengths), len(lengths)
    reward, value, next_value = (torch.randn(t, b, generator=g, dtype=F64) for _ in range(3))
    next_value[:-1] = value[1:]
    steps = torch.randint(1, chunk + 1, (t, b), generator=g)
    ends = torch.arange(t).unsqueeze(1) == torch.tensor(lengths) - 1
    by_limit = torch.rand(b, generator=g) < 0.5
    valid = torch.arange(t).unsqueeze(1) < torch.tensor(lengths)
    rollout = rollout_of(
        reward, chunk=chunk, steps=steps, value=value, next_value=next_value, valid=valid,
        terminated=ends & ~by_limit, truncated=ends & by_limit,
    )  # fmt: skip
    found = CreditChain(Credit(gamma=gamma, lam=1.0))(rollout)
    for i, n in enumerate(lengths):
        for k in range(n):
            away = [int(steps[k:j, i].sum()) for j in range(k, n + 1)]  # control steps from decision k to decision j
            expected = sum(gamma ** away[j - k] * reward[j, i] for j in range(k, n))
            if by_limit[i]:
                expected = expected + gamma ** away[-1] * next_value[n - 1, i]
            torch.testing.assert_close(found.advantage[k, i], expected - value[k, i], rtol=0, atol=1e-12)
            torch.testing.assert_close(found.target[k, i], expected, rtol=0, atol=1e-12)


@given(st.integers(0, 10**6), st.lists(st.integers(1, 4), min_size=1, max_size=4), st.floats(0, 1), st.sampled_from([0.0, 0.7, 1.0]))
def test_episodes_have_the_same_advantages_in_a_stream_as_padded_side_by_side(seed, lengths, gamma, lam):
    g = torch.Generator().manual_seed(seed)
    total, longest = sum(lengths), max(lengths)
    reward, value, next_value = (torch.randn(total, 1, generator=g, dtype=F64) for _ in range(3))
    last = torch.tensor(lengths).cumsum(0) - 1
    by_limit = torch.rand(len(lengths), generator=g) < 0.5
    terminated, truncated = torch.zeros(total, 1, dtype=torch.bool), torch.zeros(total, 1, dtype=torch.bool)
    terminated[last, 0], truncated[last, 0] = ~by_limit, by_limit
    flat = {"reward": reward, "value": value, "next_value": next_value, "terminated": terminated, "truncated": truncated}

    side = {k: torch.zeros(longest, len(lengths), dtype=v.dtype) for k, v in flat.items()}
    valid = torch.zeros(longest, len(lengths), dtype=torch.bool)
    for b, n in enumerate(lengths):
        valid[:n, b] = True
        for k, v in flat.items():
            side[k][:n, b] = v[last[b] - n + 1 : last[b] + 1, 0]
    stream, padded = (
        CreditChain(Credit(gamma=gamma, lam=lam))(rollout_of(x.pop("reward"), **x)) for x in (flat, side | {"valid": valid})
    )
    order = valid.T.flatten()
    for a, b in ((stream.advantage, padded.advantage), (stream.target, padded.target)):
        torch.testing.assert_close(b.T.flatten()[order], a.flatten(), rtol=0, atol=1e-12)


@given(st.integers(1, 5), st.integers(1, 5), st.integers(0, 10**6))
def test_any_shape_of_rollout_gives_finite_advantages(t, b, seed):
    g = torch.Generator().manual_seed(seed)
    reward, value = torch.randn(t, b, generator=g), torch.randn(t, b, generator=g)
    everything = torch.ones(t, b, dtype=torch.bool)
    for ends in ({}, {"terminated": everything}, {"truncated": everything}):
        for credit in (Credit(whiten=True), Credit(returns="return_to_go", baseline="batch_mean", scale="batch_std")):
            out = CreditChain(credit)(rollout_of(reward, value=value, next_value=value, **ends)).advantage
            assert out.shape == (t, b) and bool(torch.isfinite(out).all())
