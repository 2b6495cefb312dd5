"""Generalised advantage estimates against arithmetic done by hand and against their definition as a double sum."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl import advantage
from embodied_rl.errors import ShapeError

R = torch.tensor([[1.0], [2.0], [3.0]], dtype=torch.float64)
V = torch.tensor([[0.5], [1.0], [1.5]], dtype=torch.float64)
NEXT = torch.tensor([[1.0], [1.5], [2.0]], dtype=torch.float64)
NO = torch.zeros(3, 1, dtype=torch.bool)
AT_1 = torch.tensor([[False], [True], [False]])


def run(reward=R, value=V, next_value=NEXT, terminated=NO, truncated=NO, *, discount=0.9, lam=0.7):
    return advantage.gae(reward, value, next_value, terminated, truncated, discount=discount, lam=lam)


def close(actual, expected):
    torch.testing.assert_close(actual.flatten(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=1e-12)


def test_lambda_0_gives_one_step_errors():
    # 1 + 0.9 x 1.0 - 0.5 = 1.4    2 + 0.9 x 1.5 - 1.0 = 2.35    3 + 0.9 x 2.0 - 1.5 = 3.3
    close(run(lam=0.0), [1.4, 2.35, 3.3])


def test_lambda_0_7_carries_0_63_of_what_lies_ahead():
    # gamma lam = 0.63:  2.35 + 0.63 x 3.3 = 4.429    1.4 + 0.63 x 4.429 = 4.19027
    close(run(lam=0.7), [4.19027, 4.429, 3.3])


def test_lambda_1_gives_the_discounted_return_minus_the_value():
    # 1 + 0.9 x 2 + 0.81 x 3 + 0.729 x 2 - 0.5 = 6.188    2 + 0.9 x 3 + 0.81 x 2 - 1 = 5.32
    close(run(lam=1.0), [6.188, 5.32, 3.3])


def test_nothing_follows_a_termination_whatever_its_next_value_says():
    # delta_1 = 2 - 1 = 1    A_0 = 1.4 + 0.63 x 1 = 2.03
    for nonsense in (1e9, float("nan"), float("inf")):
        next_value = NEXT.clone()
        next_value[1] = nonsense
        close(run(next_value=next_value, terminated=AT_1), [2.03, 1.0, 3.3])


def test_a_truncation_bootstraps_from_the_state_that_followed_and_stops_the_sum():
    # V of the cut state is 20:  delta_1 = 2 + 18 - 1 = 19    A_0 = 1.4 + 0.63 x 19 = 13.37
    next_value = NEXT.clone()
    next_value[1] = 20.0
    close(run(next_value=next_value, truncated=AT_1), [13.37, 19.0, 3.3])


def test_both_flags_at_once_count_as_a_termination():
    close(run(terminated=AT_1, truncated=AT_1), [2.03, 1.0, 3.3])


def test_one_time_limit_has_one_answer():
    # Reward 1, V = 10 everywhere, the time limit strikes at step 1 in a state worth 20; gamma 0.99, lambda 0.95.
    # Six code bases give -9, 0.9, 10.8, 11, 0 and "depends" at step 1; 1 + 0.99 x 20 - 10 = 10.8 is the definition.
    ten = torch.full((3, 1), 10.0, dtype=torch.float64)
    next_value = ten.clone()
    next_value[1] = 20.0
    # A_2 = 1 + 9.9 - 10 = 0.9    A_0 = 0.9 + 0.9405 x 10.8 = 11.0574
    close(run(torch.ones_like(ten), ten, next_value, NO, AT_1, discount=0.99, lam=0.95), [11.0574, 10.8, 0.9])


def test_each_decision_has_its_own_discount():
    # A chunk that executed 2, 1 and 3 steps at gamma 0.9: discounts 0.81, 0.9, 0.729.
    # deltas 1 + 0.81 - 0.5 = 1.31    2 + 1.35 - 1 = 2.35    3 + 1.458 - 1.5 = 2.958
    # A_1 = 2.35 + 0.9 x 0.7 x 2.958 = 4.21354    A_0 = 1.31 + 0.81 x 0.7 x 4.21354 = 3.69907718
    discount = torch.tensor([[0.81], [0.9], [0.729]], dtype=torch.float64)
    close(run(discount=discount), [3.69907718, 4.21354, 2.958])


def test_the_tensors_must_share_one_shape():
    with pytest.raises(ShapeError, match=r"must share one \[T, B\]"):
        run(value=V[:2])
    with pytest.raises(ShapeError, match=r"must share one \[T, B\]"):
        run(*(x[:, 0] for x in (R, V, NEXT, NO, NO)))


def double_sum(reward, value, next_value, terminated, truncated, discount, lam):
    """A_t = sum over k >= t of (product over t <= j < k of discount_j lam continues_j) delta_k, term by term."""
    t_max, b_max = reward.shape
    out = torch.zeros_like(reward)
    for b in range(b_max):
        for t in range(t_max):
            factor = 1.0
            for k in range(t, t_max):
                bootstrap = 0.0 if terminated[k, b] else float(discount[k, b] * next_value[k, b])
                out[t, b] += factor * (float(reward[k, b]) + bootstrap - float(value[k, b]))
                if terminated[k, b] or truncated[k, b]:
                    break
                factor *= float(discount[k, b]) * lam
    return out


cases = st.tuples(st.integers(1, 7), st.integers(1, 4), st.integers(0, 2**31), st.sampled_from([0.0, 0.3, 0.95, 1.0]))


def random_case(t, b, seed):
    g = torch.Generator().manual_seed(seed)
    numbers = [torch.randn(t, b, generator=g, dtype=torch.float64) for _ in range(3)]
    flags = [torch.rand(t, b, generator=g) < 0.25 for _ in range(2)]
    steps = torch.randint(1, 4, (t, b), generator=g)
    return *numbers, *flags, 0.9 ** steps.double()


@given(cases)
def test_the_recursion_is_the_double_sum(case):
    t, b, seed, lam = case
    *arguments, discount = random_case(t, b, seed)
    expected = double_sum(*arguments, discount, lam)
    actual = advantage.gae(*arguments, discount=discount, lam=lam)
    torch.testing.assert_close(actual, expected, rtol=0, atol=1e-12)


@given(cases)
def test_exact_values_leave_no_advantage_under_any_truncation(case):
    # Values that fulfil v = r + gamma v' exactly: every delta is 0, so no pattern of time limits may create one.
    t, b, seed, lam = case
    _, _, next_value, terminated, truncated, discount = random_case(t, b, seed)
    reward = torch.randn(t, b, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    value = reward + discount * torch.where(terminated, 0.0, next_value)
    actual = advantage.gae(reward, value, next_value, terminated, truncated, discount=discount, lam=lam)
    torch.testing.assert_close(actual, torch.zeros_like(actual), rtol=0, atol=1e-14)
