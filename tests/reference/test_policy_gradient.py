"""Every estimator against the exact policy gradient of a decision process whose trajectories can all be listed.

Nothing is sampled: each trajectory (or tuple of trajectories, for groups) goes through Collector, CreditChain and
LossFunction, and the gradients are averaged with their exact probabilities.
"""

from dataclasses import fields, replace
from functools import cache
from itertools import combinations_with_replacement, product
from math import factorial, prod

import pytest
import torch
from torch import Tensor

from embodied_rl.batch import as_batch, flatten
from embodied_rl.collect import Collector
from embodied_rl.credit import Credit, CreditChain
from embodied_rl.loss import Loss, LossFunction, ValueLoss
from embodied_rl.types import Evaluation, Rollout, TensorSpec
from tests.kit import Scripted, toy
from tests.toys.two_state import ENDS, NEXT, REWARD

F64 = torch.float64
STEPS = 3
PATHS = 2**STEPS
WEIGHTS = torch.randn(2 + STEPS + 1, 2, generator=torch.Generator().manual_seed(5), dtype=F64)
"""Logits of the two actions are (one-hot state, one-hot time) @ WEIGHTS: every (state, time) decides differently."""


def log_policy(weights: Tensor, obs: Tensor) -> Tensor:
    return torch.log_softmax(obs.to(F64) @ weights, -1)


def one_hot(state: int, t: int) -> Tensor:
    x = torch.zeros(2 + STEPS + 1, dtype=F64)
    x[state], x[2 + t] = 1.0, 1.0
    return x


def values(weights: Tensor, gamma: float = 1.0) -> Tensor:
    """[2, STEPS + 1] exact values by dynamic programming; nothing is worth anything after the last step."""
    out = [[torch.zeros((), dtype=F64)] * 2]
    for t in range(STEPS - 1, -1, -1):
        row = []
        for s in (0, 1):
            p = log_policy(weights, one_hot(s, t)).exp()
            ahead = [torch.zeros((), dtype=F64) if ENDS[s, a] else out[0][int(NEXT[s, a])] for a in (0, 1)]
            row.append(sum(p[a] * (float(REWARD[s, a]) + gamma * ahead[a]) for a in (0, 1)))
        out.insert(0, row)
    return torch.stack([torch.stack(row) for row in out], dim=1)


def exact_gradient() -> Tensor:
    """Gradient of the expected undiscounted return from state 0, by differentiating the dynamic programme."""
    weights = WEIGHTS.clone().requires_grad_()
    values(weights)[0, 0].backward()
    return weights.grad


def collect(critic: Tensor | None) -> Rollout:
    """All 2^STEPS action sequences at once, copy b taking bit t of b at time t; `critic` is a table [2, STEPS + 1]."""

    def time(obs):
        return obs["state"][:, 2:].argmax(-1)

    def action(obs):
        return ((obs["copy"] >> time(obs)) & 1).unsqueeze(-1)

    def value(obs):
        return critic[obs["state"][:, :2].argmax(-1), time(obs)].float()

    policy = Scripted(action, value, has_critic=critic is not None)
    env = toy("two_state", PATHS, max_steps=STEPS)
    look = env._obs
    env._obs = lambda: look() | {"copy": torch.arange(PATHS)}
    env.spec.observation["copy"] = TensorSpec((), torch.int64)
    return Collector([env], policy, decisions=STEPS, mode="episodes").collect()


def columns(rollout: Rollout, copies: tuple[int, ...]) -> Rollout:
    """The rollout that these copies alone would have made, in one group, in float64."""
    index = torch.tensor(copies)
    t = len(rollout.reward)

    def pick(x):
        if not isinstance(x, Tensor):
            return x
        x = x[:, index]
        return x.to(F64) if x.is_floating_point() else x

    chosen = {f.name: pick(getattr(rollout, f.name)) for f in fields(rollout) if f.name != "obs"}
    chosen["obs"] = {k: pick(v) for k, v in rollout.obs.items()}
    # Drawing the same path twice makes two trajectories all the same.
    chosen["episode"] = torch.arange(len(copies)).expand(t, -1)
    chosen["group"] = torch.zeros(t, len(copies), dtype=torch.int64)
    return replace(rollout, **chosen)


@cache
def paths() -> tuple[list[float], list[Tensor], list[list[float]]]:
    """Of each copy: probability of its trajectory, gradients of log pi_t, rewards.

    A copy that ends early leaves later bits unused: of equal trajectories all but the first get probability 0.
    """
    rollout = collect(None)
    probability, slopes, rewards = [], [], []
    for b in range(PATHS):
        length = int(rollout.valid[:, b].sum())
        weights = WEIGHTS.clone().requires_grad_()
        logp = log_policy(weights, rollout.obs["state"][:length, b]).gather(-1, rollout.units[:length, b])[:, 0]
        probability.append(float(logp.detach().sum().exp()) if b < 2**length else 0.0)
        slopes.append(torch.stack([torch.autograd.grad(x, weights, retain_graph=True)[0] for x in logp]))
        rewards.append(rollout.reward[:length, b].tolist())
    return probability, slopes, rewards


def estimate(rollout: Rollout, credit: Credit, loss: Loss) -> Tensor:
    """What the engine would add to the gradient ascent direction for this rollout, before the first step."""
    function = LossFunction(loss, chunk=1)
    batch = as_batch(flatten(rollout, CreditChain(credit)(rollout)), function)
    weights = WEIGHTS.clone().requires_grad_()
    logp = log_policy(weights, batch.obs["state"]).gather(-1, batch.units)
    batch.logp = logp.detach()
    function(Evaluation(logp), batch).total.backward()
    return -weights.grad


def expected_estimate(credit: Credit, loss: Loss, group: int = 1, critic: Tensor | None = None) -> Tensor:
    """The estimate averaged over all tuples of `group` independent trajectories; their order does not matter."""
    rollout = collect(critic)
    probability = paths()[0]
    total = torch.zeros_like(WEIGHTS)
    for copies in combinations_with_replacement([b for b in range(PATHS) if probability[b]], group):
        orders = factorial(group) / prod(factorial(copies.count(b)) for b in set(copies))
        total += orders * prod(probability[b] for b in copies) * estimate(columns(rollout, copies), credit, loss)
    return total


def close(actual: Tensor, expected: Tensor) -> None:
    # Weights of the loss are float32.
    torch.testing.assert_close(actual, expected, rtol=1e-5, atol=1e-6)


PER_TRAJECTORY = Loss(ratio="unit", aggregate="constant", constant_units=1, value=ValueLoss(coef=0.0))
"""Clipped unit ratios; the sum over each trajectory, averaged over trajectories."""
PLAIN = PER_TRAJECTORY.model_copy(update={"trust": "none"})


def credit(**given) -> Credit:
    return Credit(**({"gamma": 1.0, "returns": "trajectory", "baseline": "none"} | given))


def gae(**given) -> Credit:
    return Credit(**({"gamma": 1.0, "returns": "gae", "baseline": "critic"} | given))


def test_the_listed_trajectories_are_all_there_are():
    probability, _, rewards = paths()
    assert sum(probability) == pytest.approx(1.0)
    expected_return = sum(p * sum(r) for p, r in zip(probability, rewards, strict=True))
    assert expected_return == pytest.approx(float(values(WEIGHTS)[0, 0]))
    assert sorted({len(r) for r in rewards}) == [2, 3]


@pytest.mark.parametrize("returns", ["trajectory", "return_to_go"])
@pytest.mark.parametrize("loss", [PLAIN, PER_TRAJECTORY], ids=["plain", "clip"])
def test_reinforce_is_unbiased(returns, loss):
    close(expected_estimate(credit(returns=returns), loss), exact_gradient())


@pytest.mark.parametrize("returns", ["trajectory", "return_to_go"])
def test_rloo_is_unbiased(returns):
    close(expected_estimate(credit(returns=returns, baseline="leave_one_out"), PLAIN, group=2), exact_gradient())


def test_rloo_with_three_copies_is_unbiased():
    close(expected_estimate(credit(baseline="leave_one_out"), PLAIN, group=3), exact_gradient())


@pytest.mark.parametrize(("baseline", "g"), [("group_mean", 2), ("batch_mean", 3)])
def test_a_mean_that_contains_the_sample_itself_shrinks_the_gradient_by_one_part_in_g(baseline, g):
    close(expected_estimate(credit(baseline=baseline), PLAIN, group=g), exact_gradient() * (g - 1) / g)


def by_definition(weight_of) -> Tensor:
    """Expectation over pairs of the mean of weight_of(own return, other return, own length) x grad log p(trajectory)."""
    probability, slopes, rewards = paths()
    total = torch.zeros_like(WEIGHTS)
    for i, j in product(range(PATHS), repeat=2):
        a, b = sum(rewards[i]), sum(rewards[j])
        for own, other, slope in ((a, b, slopes[i]), (b, a, slopes[j])):
            total += probability[i] * probability[j] / 2 * weight_of(own, other, len(slope)) * slope.sum(0)
    return total


def standardised(own: float, other: float) -> float:
    """(r - mean) / std of a pair: +-|r - r'|/2 over |r - r'|/sqrt(2)."""
    return 0.0 if own == other else (own > other) * 2**0.5 - 0.5**0.5


def test_grpo_is_the_mean_of_standardised_scores_per_unit():
    grpo = credit(baseline="group_mean", scale="group_std")
    loss = Loss(ratio="unit", aggregate="trajectory_mean", value=ValueLoss(coef=0.0))
    close(expected_estimate(grpo, loss, group=2), by_definition(lambda own, other, n: standardised(own, other) / n))


def test_gspo_has_the_gradient_of_grpo_before_the_first_step():
    grpo = credit(baseline="group_mean", scale="group_std")
    loss = Loss(
        ratio="trajectory", reduce="mean", aggregate="trajectory_mean", clip_low=3e-4, clip_high=4e-4, value=ValueLoss(coef=0.0)
    )
    close(expected_estimate(grpo, loss, group=2), by_definition(lambda own, other, n: standardised(own, other) / n))


def test_max_rl_divides_by_the_mean_of_the_group():
    max_rl = credit(baseline="group_mean", scale="group_mean")
    close(expected_estimate(max_rl, PLAIN, group=2), by_definition(lambda own, other, n: (own - other) / (own + other)))


WRONG = torch.tensor([[0.3, -2.0, 5.0, 0.0], [1.0, 0.7, -1.5, 0.0]], dtype=F64)
"""A critic that knows nothing, except that the last step is the last."""


def test_ppo_is_unbiased_with_lambda_1_however_wrong_the_critic():
    close(expected_estimate(gae(lam=1.0), PER_TRAJECTORY, critic=WRONG), exact_gradient())


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_ppo_is_unbiased_for_every_lambda_with_an_exact_critic(lam):
    exact = values(WEIGHTS)
    close(expected_estimate(gae(lam=lam), PER_TRAJECTORY, critic=exact), exact_gradient())


def test_ppo_with_a_wrong_critic_and_lambda_below_1_is_biased():
    # Guards the two tests above: an estimator that ignored its critic would pass them.
    found = expected_estimate(gae(lam=0.5), PER_TRAJECTORY, critic=WRONG)
    assert float((found - exact_gradient()).norm()) > 0.1 * float(exact_gradient().norm())


def discounted_gradient(gamma: float) -> Tensor:
    """Sum over t of E[grad log pi_t x (r_t + gamma r_{t+1} + ...)]."""
    total = torch.zeros_like(WEIGHTS)
    for p, slopes, rewards in zip(*paths(), strict=True):
        for t in range(len(rewards)):
            total += p * slopes[t] * sum(gamma**k * r for k, r in enumerate(rewards[t:]))
    return total


def test_discounting_starts_at_each_decision_not_at_the_start_of_the_episode():
    close(expected_estimate(credit(gamma=0.8, returns="return_to_go"), PLAIN), discounted_gradient(0.8))
    close(expected_estimate(gae(gamma=0.8, lam=1.0), PER_TRAJECTORY, critic=WRONG), discounted_gradient(0.8))
    close(expected_estimate(gae(gamma=0.8, lam=0.3), PER_TRAJECTORY, critic=values(WEIGHTS, 0.8)), discounted_gradient(0.8))


def test_off_policy_the_plain_importance_ratio_still_gives_the_gradient_of_the_current_policy():
    # Sampled by another policy; one trajectory ratio corrects the whole trajectory exactly.
    loss = Loss(ratio="trajectory", trust="none", aggregate="constant", constant_units=1, value=ValueLoss(coef=0.0))
    sampler = WEIGHTS + 0.5 * torch.randn(WEIGHTS.shape, generator=torch.Generator().manual_seed(9), dtype=F64)
    rollout, function = collect(None), LossFunction(loss, chunk=1)
    total = torch.zeros_like(WEIGHTS)
    for b in range(PATHS):
        own = columns(rollout, (b,))
        batch = as_batch(flatten(own, CreditChain(credit())(own)), function)
        # Every row of a trajectory carries its ratio, so its weights (one per unit) must be brought to a sum of 1.
        batch.weight = batch.weight / len(batch)
        weights = WEIGHTS.clone().requires_grad_()
        logp = log_policy(weights, batch.obs["state"]).gather(-1, batch.units)
        batch.logp = log_policy(sampler, batch.obs["state"]).gather(-1, batch.units)
        probability = float(batch.logp.sum().exp()) if b < 2 ** len(batch) else 0.0
        function(Evaluation(logp), batch).total.backward()
        total -= probability * weights.grad
    close(total, exact_gradient())
