"""Shaping against small decision processes that are solved exactly: no preference between policies may change."""

import itertools

import pytest
import torch

from embodied_rl import advantage, shaping

F64 = torch.float64
STATES, ACTIONS, END, GAMMA = 4, 2, 4, 0.8
"""Four states and an end; a decision is a chunk of two actions and may stop after the first."""


def world(seed):
    """Transitions [S, A, S + 1] and rewards [S, A, S + 1]; every state ends with some probability."""
    g = torch.Generator().manual_seed(seed)
    p = torch.rand(STATES, ACTIONS, STATES + 1, generator=g, dtype=F64) ** 3 + 0.01
    return p / p.sum(-1, keepdim=True), torch.randn(STATES, ACTIONS, STATES + 1, generator=g, dtype=F64)


def branches(p, r, s, chunk):
    """All that can come of a chunk of two actions in state s: (probability, steps, next state, reward)."""
    for first in range(STATES + 1):
        if first == END:
            yield float(p[s, chunk[0], END]), 1, END, float(r[s, chunk[0], END])
            continue
        for second in range(STATES + 1):
            probability = p[s, chunk[0], first] * p[first, chunk[1], second]
            yield float(probability), 2, second, float(r[s, chunk[0], first] + GAMMA * r[first, chunk[1], second])


def paid(potential, s, steps, after, *, bootstraps=True, cut=False):
    """What the program adds to one decision."""
    now, then = (torch.tensor([[x]], dtype=F64) for x in (potential[s], potential[after]))
    ends = [torch.tensor([[x]]) for x in (after == END, cut)]
    discount = torch.tensor([[GAMMA**steps]], dtype=F64)
    return float(shaping.potential_reward(now, then, *ends, discount=discount, bootstraps=bootstraps))


def values(p, r, policy, potential=None):
    """V [S] of a policy (state -> chunk) by solving V = r + P V, with the shaping of a potential [S + 1] added."""
    a, b = torch.eye(STATES, dtype=F64), torch.zeros(STATES, dtype=F64)
    for s in range(STATES):
        for probability, steps, after, reward in branches(p, r, s, policy[s]):
            extra = 0.0 if potential is None else paid(potential, s, steps, after)
            b[s] += probability * (reward + extra)
            if after != END:
                a[s, after] -= probability * GAMMA**steps
    return torch.linalg.solve(a, b)


POLICIES = [
    tuple(zip(first, second, strict=True))
    for first in itertools.product(range(ACTIONS), repeat=STATES)
    for second in itertools.product(range(ACTIONS), repeat=STATES)
][::9]


@pytest.mark.parametrize("seed", range(3))
def test_every_policy_loses_the_potential_of_the_state_and_nothing_else(seed):
    """V with shaping = V - Phi for every policy: so their order, and the best one, stay what they were in every state."""
    p, r = world(seed)
    potential = torch.rand(STATES + 1, generator=torch.Generator().manual_seed(100 + seed), dtype=F64).tolist()
    plain = torch.stack([values(p, r, policy) for policy in POLICIES])
    shaped = torch.stack([values(p, r, policy, potential) for policy in POLICIES])
    torch.testing.assert_close(shaped, plain - torch.tensor(potential[:STATES], dtype=F64), rtol=0, atol=1e-10)
    assert torch.equal(shaped.argmax(0), plain.argmax(0))
    assert len(plain[:, 0].unique()) == len(POLICIES)  # otherwise there would be no order to keep


@pytest.mark.parametrize("seed", range(3))
def test_with_a_time_limit_and_no_critic_every_policy_loses_the_potential_of_the_start(seed):
    """Three decisions and then the end of all that is counted; policies may look at the clock."""
    p, r = world(seed)
    g = torch.Generator().manual_seed(200 + seed)
    potential = torch.rand(STATES + 1, generator=g, dtype=F64).tolist()

    def value(policy, shaped):
        ahead = [0.0] * (STATES + 1)
        for t in (2, 1, 0):
            now = [0.0] * (STATES + 1)
            for s in range(STATES):
                for probability, steps, after, reward in branches(p, r, s, policy[t][s]):
                    cut = t == 2 and after != END
                    extra = paid(potential, s, steps, after, bootstraps=False, cut=cut) if shaped else 0.0
                    now[s] += probability * (reward + extra + GAMMA**steps * ahead[after])
            ahead = now
        return torch.tensor(ahead[:STATES])

    for _ in range(6):
        policy = torch.randint(0, ACTIONS, (3, STATES, 2), generator=g).tolist()
        lost = value(policy, False) - value(policy, True)
        torch.testing.assert_close(lost, torch.tensor(potential[:STATES]), rtol=0, atol=1e-6)


def rollout(seed, t=7, b=5):
    """Rewards, potentials, values, ends and steps of made-up episodes; ends of both kinds, chunks that stop early."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(t, b, generator=g, dtype=F64)  # noqa: E731
    x = {"reward": draw(), "value": draw(), "now": torch.rand(t, b, generator=g, dtype=F64)}
    end = torch.randint(0, 5, (t, b), generator=g)
    x["terminated"], x["truncated"] = end == 0, end == 1
    x["steps"] = torch.randint(1, 4, (t, b), generator=g)
    done = x["terminated"] | x["truncated"]
    for name, source in (("next_value", "value"), ("after", "now")):
        following = torch.cat([x[source][1:], draw()[:1].abs()])
        x[name] = torch.where(done, draw().abs(), following)  # the next row is another episode
    return x


@pytest.mark.parametrize("lam", [0.0, 0.7, 1.0])
def test_advantages_are_the_same_for_a_critic_that_knows_the_shaping(lam):
    """A critic of the shaped task is V - Phi; then no advantage differs, at ends, time limits and rollout borders alike."""
    x = rollout(0)
    discount = GAMMA ** x["steps"].to(F64)
    ends = x["terminated"], x["truncated"]
    extra = shaping.potential_reward(x["now"], x["after"], *ends, discount=discount, bootstraps=True)
    plain = advantage.gae(x["reward"], x["value"], x["next_value"], *ends, discount=discount, lam=lam)
    shaped = advantage.gae(
        x["reward"] + extra, x["value"] - x["now"], x["next_value"] - x["after"], *ends, discount=discount, lam=lam
    )
    torch.testing.assert_close(shaped, plain, rtol=0, atol=1e-12)


def test_returns_to_go_lose_the_potential_of_the_state_they_start_from():
    x = rollout(1)
    discount = GAMMA ** x["steps"].to(F64)
    x["truncated"][-1] = ~x["terminated"][-1]  # whole episodes
    ends = x["terminated"], x["truncated"]
    extra = shaping.potential_reward(x["now"], x["after"], *ends, discount=discount, bootstraps=False)
    done = ends[0] | ends[1]
    plain = advantage.return_to_go(x["reward"], done, discount=discount)
    shaped = advantage.return_to_go(x["reward"] + extra, done, discount=discount)
    torch.testing.assert_close(shaped, plain - x["now"], rtol=0, atol=1e-12)


def test_shaping_by_hand():
    # gamma 0.5; two steps, one step, one step to a time limit, one step to the end
    now, after = torch.tensor([[0.1], [0.5], [0.9], [0.4]]), torch.tensor([[0.5], [0.9], [0.8], [1.0]])
    terminated, truncated = torch.tensor([[False], [False], [False], [True]]), torch.tensor([[False], [False], [True], [False]])
    discount = torch.tensor([[0.25], [0.5], [0.5], [0.5]])
    given = now, after, terminated, truncated
    kept = shaping.potential_reward(*given, discount=discount, bootstraps=True)
    torch.testing.assert_close(kept[:, 0], torch.tensor([0.025, -0.05, -0.5, -0.4]))
    over = shaping.potential_reward(*given, discount=discount, bootstraps=False)
    torch.testing.assert_close(over[:, 0], torch.tensor([0.025, -0.05, -0.9, -0.4]))
