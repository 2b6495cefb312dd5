"""Every estimator against the exact gradient of a language model whose replies can all be listed.

Replies have at most two tokens of {0, 1, end}: seven of them. Nothing is sampled: each group of replies goes through
CreditChain and LossFunction, and the gradients are averaged with the exact probabilities of the groups. So an equality
holds to the rounding of the loss's float32 weights.
"""

from functools import cache
from itertools import combinations_with_replacement
from math import factorial, prod

import pytest
import torch
from torch import Tensor

from embodied_rl.batch import as_batch, flatten
from embodied_rl.credit import Credit, CreditChain
from embodied_rl.loss import Kl, Loss, LossFunction, kl_estimate
from embodied_rl.outcome import Outcome
from embodied_rl.types import PAD
from embodied_rl.value_loss import ValueLoss
from tests.kit import rollout_of, toy
from tests.toys.table import Config, Table

F64 = torch.float64
END = 2
REPLIES = torch.tensor([[END, PAD], *[[a, b] for a in (0, 1) for b in (0, 1, END)]])
MASK = REPLIES != PAD
LENGTH = MASK.sum(1)
REWARD = torch.tensor([0.3, 1.0, 0.0, 0.0, 1.0, 0.5, 0.0], dtype=F64)
CONTEXT = {"context": torch.zeros(len(REPLIES), 1, dtype=torch.int64)}


def table(seed: int, critic: str = "none") -> Table:
    torch.manual_seed(seed)
    env = toy("words", 1, letters=2, length=2, words=1)
    policy = Table(Config(spread=0.8, critic=critic), env.spec).double()
    if policy.values is not None:
        torch.nn.init.normal_(policy.values)
    return policy


POLICY, REFERENCE = table(1), table(2)


def logs(policy: Table) -> Tensor:
    """[7, 2] log-probability of every token of every reply, with gradients."""
    logp = policy.evaluate(CONTEXT, REPLIES, entropy=False).logp
    return torch.where(MASK, logp, 0.0)


def slope_of(score: Tensor, policy: Table = POLICY) -> Tensor:
    """Gradient of a scalar by the logits."""
    return torch.autograd.grad(score, policy.logits)[0]


@cache
def probability() -> Tensor:
    return logs(POLICY).sum(1).exp().detach()


@cache
def slopes() -> list[Tensor]:
    """Of each reply: [2, ...] gradient of the log-probability of each of its tokens."""
    rows = logs(POLICY)
    zero = torch.zeros_like(POLICY.logits)
    return [
        torch.stack([torch.autograd.grad(x, POLICY.logits, retain_graph=True)[0] if m else zero for x, m in zip(row, mask, strict=True)])
        for row, mask in zip(rows, MASK, strict=True)
    ]


def exact(reward: Tensor = REWARD) -> Tensor:
    """Gradient of the expected reward."""
    return slope_of((logs(POLICY).sum(1).exp() * reward).sum())


def kl_slope() -> Tensor:
    """Gradient of KL(policy || reference) over whole replies."""
    logp = logs(POLICY).sum(1)
    return slope_of((logp.exp() * (logp - logs(REFERENCE).detach().sum(1))).sum())


def group_of(replies: tuple[int, ...], policy: Table = POLICY, **given):
    """The rollout of one group that said these."""
    index = torch.tensor(replies)
    b = len(replies)
    value = {}
    if policy.has_critic:
        out = policy.evaluate({"context": CONTEXT["context"][index]}, REPLIES[index]).value.detach()
        value = {"value": out.unsqueeze(0), "next_value": torch.zeros(1, b, dtype=F64)}
    fields = {
        "units": REPLIES[index].unsqueeze(0), "logp": logs(POLICY).detach()[index].unsqueeze(0), "mask": MASK[index].unsqueeze(0),
        "terminated": torch.ones(1, b, dtype=torch.bool), "group": torch.zeros(1, b, dtype=torch.int64), "num_units": 2,
        "obs": {"context": torch.zeros(1, b, 1, dtype=torch.int64)}, "solved": (REWARD[index] == 1).long().unsqueeze(0),
    } | value | given  # fmt: skip
    return rollout_of(REWARD[index].unsqueeze(0), **fields)


def estimate(rollout, credit: Credit, loss: Loss, policy: Table = POLICY, penalty: Tensor | None = None) -> Tensor:
    """What the engine would add to the gradient ascent direction for this rollout, before the first step."""
    function = LossFunction(loss, chunk=1)
    flat = flatten(rollout, CreditChain(credit)(rollout, penalty), groups=loss.objective == "outcome")
    if loss.kl.in_loss:
        with torch.no_grad():
            flat.rows["logp_ref"] = REFERENCE.evaluate(flat.full_obs(), flat.rows["units"], entropy=False).logp
    batch = as_batch(flat, function)
    evaluation = policy.evaluate(batch.obs, batch.units, entropy=function.reads_entropy)
    policy.zero_grad()
    function(evaluation, batch).total.backward()
    return -policy.logits.grad


def groups(size: int):
    """Every multiset of replies with the number of its orders and its probability."""
    for chosen in combinations_with_replacement(range(len(REPLIES)), size):
        orders = factorial(size) / prod(factorial(chosen.count(i)) for i in set(chosen))
        yield chosen, orders * float(prod(probability()[i] for i in chosen))


def expected(credit: Credit, loss: Loss, size: int = 1, policy: Table = POLICY, penalised: str | None = None) -> Tensor:
    """The estimate averaged over all groups of independent replies."""
    total = torch.zeros_like(POLICY.logits)
    for chosen, p in groups(size):
        rollout, penalty = group_of(chosen, policy), None
        if penalised is not None:
            d = (logs(POLICY) - logs(REFERENCE)).detach()[list(chosen)]
            penalty = 0.3 * kl_estimate(d, penalised).unsqueeze(0)
        total += p * estimate(rollout, credit, loss, policy, penalty)
    return total


def by_definition(size: int, coefficients) -> Tensor:
    """Mean over groups of the mean over members of sum_t coefficient_t grad log p_t; `coefficients(group)` is [size, 2]."""
    total = torch.zeros_like(POLICY.logits)
    for chosen, p in groups(size):
        for i, c in zip(chosen, coefficients(list(chosen)), strict=True):
            total += p / size * (c[0] * slopes()[i][0] + c[1] * slopes()[i][1])
    return total


def spread(score: Tensor) -> Tensor:
    """[g] -> [g, 2], the same for both tokens."""
    return score.unsqueeze(-1).expand(-1, 2)


def close(actual: Tensor, wanted: Tensor) -> None:
    assert float(wanted.norm()) > 1e-3
    torch.testing.assert_close(actual, wanted, rtol=1e-5, atol=1e-6)


NO_CRITIC = ValueLoss(coef=0.0)


def loss(**given) -> Loss:
    """The sum over the tokens of each reply, averaged over replies, unless something else is given."""
    return Loss(**({"ratio": "unit", "aggregate": "constant", "constant_units": 1, "value": NO_CRITIC} | given))


def trajectory(**given) -> Credit:
    return Credit(**({"gamma": 1.0, "returns": "trajectory", "baseline": "none"} | given))


def units(**given) -> Credit:
    return Credit(**({"gamma": 1.0, "returns": "return_to_go", "baseline": "none", "level": "unit"} | given))


MEAN = {"aggregate": "trajectory_mean", "constant_units": None}


def test_the_listed_replies_are_all_there_are():
    assert float(probability().sum()) == pytest.approx(1.0)
    assert float(exact().norm()) > 0.05


@pytest.mark.parametrize("credit", [trajectory(), units()], ids=["one number per reply", "return to go of each token"])
@pytest.mark.parametrize("trust", ["none", "clip"])
def test_reinforce_is_unbiased(credit, trust):
    close(expected(credit, loss(trust=trust)), exact())


@pytest.mark.parametrize("size", [2, 3])
def test_rloo_is_unbiased(size):
    close(expected(trajectory(baseline="leave_one_out"), loss(trust="none"), size), exact())


@pytest.mark.parametrize("size", [2, 3])
def test_pacs_is_unbiased_up_to_beta(size):
    form = {"objective": "outcome", "ratio": "trajectory", "trust": "none"} | MEAN
    close(expected(trajectory(), loss(outcome=Outcome(beta=0.7, balance=False), **form), size), 0.7 * exact())


def test_pacs_balanced_weighs_right_and_wrong_replies_half_each():
    form = {"objective": "outcome", "ratio": "trajectory", "trust": "none"} | MEAN

    def coefficients(chosen):
        label = REWARD[chosen]
        good = label > 0.5
        share = good.double().mean()
        weight = torch.where(good, 0.5 / share, 0.5 / (1 - share)) if 0 < share < 1 else torch.ones(3, dtype=F64)
        slope = weight * (label - 0.5)  # of a score before the first step, where every prediction is one half
        return spread(slope - (slope.sum() - slope) / 2)

    close(expected(trajectory(), loss(outcome=Outcome(), **form), 3), by_definition(3, coefficients))


def test_dr_grpo_is_unbiased_up_to_one_part_in_g():
    close(expected(trajectory(baseline="group_mean"), loss(), 3), exact() * 2 / 3)


def standardised(r: Tensor) -> Tensor:
    return torch.zeros_like(r) if (r == r[0]).all() else (r - r.mean()) / r.std().clamp(min=1e-3)


def test_grpo():
    grpo = trajectory(baseline="group_mean", scale="group_std")
    wanted = by_definition(3, lambda i: spread(standardised(REWARD[i])) / LENGTH[i].unsqueeze(-1))
    close(expected(grpo, loss(**MEAN), 3), wanted)
    gspo = loss(**MEAN, ratio="trajectory", reduce="mean", clip_low=3e-4, clip_high=4e-4)
    close(expected(grpo, gspo, 3), wanted)


def test_dapo_averages_over_the_tokens_of_the_group():
    wanted = by_definition(3, lambda i: spread(standardised(REWARD[i])) * 3 / LENGTH[i].sum())
    dapo = loss(aggregate="unit_mean", constant_units=None, clip_high=0.28)
    close(expected(trajectory(baseline="group_mean", scale="group_std"), dapo, 3), wanted)


def test_lite_ppo_divides_by_the_deviation_of_the_batch():
    # One group is the whole batch here, so that its deviation is the batch's.
    lite = trajectory(baseline="group_mean", scale="batch_std")
    wanted = by_definition(3, lambda i: spread(standardised(REWARD[i])) * 3 / LENGTH[i].sum())
    close(expected(lite, loss(aggregate="unit_mean", constant_units=None), 3), wanted)


def test_reinforce_plus_plus_whitens_the_returns_to_go_of_all_tokens():
    def whitened(i: list[int]) -> Tensor:
        tokens = spread(REWARD[i])[MASK[i]]
        if (tokens == tokens[0]).all():
            return torch.zeros(len(i), 2, dtype=F64)
        return (spread(REWARD[i]) - tokens.mean()) / tokens.std()

    close(expected(units(whiten=True), loss(), 2), by_definition(2, whitened))


def test_reinforce_plus_plus_baseline_whitens_what_is_left_of_the_mean_of_the_group():
    # Two groups of two: the mean is that of the group, the deviation that of both together.
    credit, aggregate = trajectory(baseline="group_mean", whiten=True), loss(aggregate="unit_mean", constant_units=None)
    found, wanted = torch.zeros_like(POLICY.logits), torch.zeros_like(POLICY.logits)
    for (one, p), (other, q) in combinations_with_replacement(list(groups(2)), 2):
        i, share = [*one, *other], p * q * (1 if one == other else 2)
        found += share * estimate(group_of(tuple(i), group=torch.tensor([[0, 0, 1, 1]])), credit, aggregate)
        left = REWARD[i] - REWARD[i].view(2, 2).mean(1, keepdim=True).expand(2, 2).flatten()
        if left.any():
            for k, a in zip(i, left / left.std() / LENGTH[i].sum(), strict=True):
                wanted += share * a * slopes()[k].sum(0)
    close(found, wanted)


@pytest.mark.parametrize("lam", [0.0, 0.5, 1.0])
def test_ppo_with_an_exact_critic_of_every_token_is_unbiased(lam):
    policy = table(1, "unit")
    p = logs(POLICY).detach().exp()
    with torch.no_grad():
        # The value of having said a is the mean reward of what can follow; before the first token that of everything.
        policy.values[0, 0] = (probability() * REWARD).sum()
        for a in (0, 1):
            rows = (REPLIES[:, 0] == a).nonzero().squeeze(-1)
            policy.values[0, 1, a] = (p[rows, 1] * REWARD[rows]).sum()
    gae = Credit(gamma=1.0, lam=lam, level="unit")
    close(expected(gae, loss(), policy=policy), exact())


def test_ppo_with_lambda_1_is_unbiased_however_wrong_the_critic_and_biased_below():
    policy = table(1, "unit")
    close(expected(Credit(gamma=1.0, lam=1.0, level="unit"), loss(), policy=policy), exact())
    found = expected(Credit(gamma=1.0, lam=0.5, level="unit"), loss(), policy=policy)
    assert float((found - exact()).norm()) > 0.1 * float(exact().norm())


@pytest.mark.parametrize("credit", [trajectory(), units()], ids=["one number per reply", "return to go of each token"])
def test_k1_in_the_reward_has_the_gradient_of_the_kl(credit):
    # Also where each token is charged with its own and the later ones only: the earlier ones cost nothing on average.
    close(expected(credit, loss(trust="none"), penalised="k1"), exact() - 0.3 * kl_slope())


def test_k2_in_the_loss_has_the_gradient_of_the_kl_of_each_token():
    # Per token given those before it: its own log-ratio times its own slope, under the policy's own distribution.
    d = (logs(POLICY) - logs(REFERENCE)).detach()
    wanted = by_definition(1, lambda i: torch.where(MASK[i], REWARD[i].unsqueeze(-1) - 0.3 * d[i], 0.0))
    close(expected(trajectory(), loss(kl=Kl(kind="k2", coef=0.3))), wanted)


def test_k2_over_whole_replies_has_the_gradient_of_the_kl():
    whole = loss(ratio="trajectory", trust="none", kl=Kl(kind="k2", coef=0.3), aggregate="decision_mean", constant_units=None)
    close(expected(trajectory(), whole), exact() - 0.3 * kl_slope())


def test_k3_in_the_loss_has_another_gradient():
    # grad k3 = (1 - exp(-d)) grad log p: in expectation that of the forward KL
    whole = loss(ratio="trajectory", trust="none", kl=Kl(kind="k3", coef=0.3), aggregate="decision_mean", constant_units=None)
    ref = logs(REFERENCE).detach().sum(1).exp()
    forward = slope_of(-(ref * logs(POLICY).sum(1)).sum())
    close(expected(trajectory(), whole), exact() - 0.3 * forward)


@pytest.mark.parametrize("credit", [trajectory(baseline="greedy"), units(baseline="greedy")], ids=["per reply", "per token"])
def test_remax_is_unbiased_and_does_not_learn_from_the_greedy_reply(credit):
    greedy = torch.tensor([[True, False]])
    total = sum(p * estimate(group_of((4, i), greedy=greedy), credit, loss(trust="none")) for (i,), p in groups(1))
    close(total, exact())


def test_remax_has_less_variance_where_the_greedy_reply_is_like_the_sample():
    same = estimate(group_of((4, 1), greedy=torch.tensor([[True, False]])), trajectory(baseline="greedy"), loss())
    assert float(same.abs().max()) == 0.0


@pytest.mark.parametrize(("name", "right", "wrong"), [("psr", 1.0, 0.0), ("nsr", 0.0, -1.0), ("weighted", 0.1, -1.0)])
def test_positive_and_negative_reinforcement(name, right, wrong):
    # 1 - 0.5 = 0.5 times 2 x right;  a reply paid below 0.5 counts as wrong by how far it is below
    credit = trajectory(baseline="constant", constant=0.5, positive_weight=2 * right, negative_weight=-2 * wrong)

    def coefficients(i: list[int]) -> Tensor:
        r = REWARD[i] - 0.5
        return spread(torch.where(r > 0, 2 * right * r, -2 * wrong * r))

    close(expected(credit, loss()), by_definition(1, coefficients))


def test_ngrpo_learns_from_groups_that_failed():
    def coefficients(i: list[int]) -> Tensor:
        r = torch.cat([REWARD[i], torch.ones(1, dtype=F64)])
        return spread(((r - r.mean()) / r.std())[:-1] if (r != 1).any() else torch.zeros(len(i), dtype=F64))

    ngrpo = trajectory(baseline="group_mean", scale="group_std", virtual_return=1.0)
    close(expected(ngrpo, loss(clip_low=0.16, clip_high=0.24), 2), by_definition(2, coefficients))


@pytest.mark.parametrize("between", [0.0, 0.3, 1.0])
def test_canon_compares_with_the_other_half(between):
    def coefficients(i: list[int]) -> Tensor:
        short, long = sorted(range(3), key=lambda k: int(LENGTH[i[k]]))[:1], sorted(range(3), key=lambda k: int(LENGTH[i[k]]))[1:]
        out = torch.zeros(3, dtype=F64)
        if len({float(REWARD[k]) for k in i}) == 1:
            return spread(out)
        for own, other in ((short, long), (long, short)):
            for k in own:
                mean = [REWARD[[i[j] for j in half]].mean() for half in (own, other)]
                out[k] = REWARD[i[k]] - between * mean[1] - (1 - between) * mean[0]
        return spread(out)

    credit = trajectory(baseline="other_half", between=between)
    close(expected(credit, loss(), 3), by_definition(3, coefficients))


def test_the_entropy_bonus_has_the_gradient_of_the_entropies_of_the_tokens():
    # What a token does to the tokens after it is not in it, else it would be the gradient of the entropy of whole replies.
    entropy = torch.where(MASK, POLICY.evaluate(CONTEXT, REPLIES).entropy, 0.0).sum(1)
    bonus = slope_of((probability() * entropy).sum())
    close(expected(trajectory(), loss(entropy_coef=0.3)), exact() + 0.3 * bonus)
    p = logs(POLICY).sum(1)
    assert float((bonus - slope_of(-(p.exp() * p).sum())).norm()) > 0.1 * float(bonus.norm())


def test_cispo_has_the_policy_gradient_before_the_first_step():
    close(expected(trajectory(), loss(trust="weight", clip_low=1.0, clip_high=4.0)), exact())


def test_the_exact_gradient_is_that_of_the_listed_slopes():
    # Guards by_definition: two ways to the same number.
    close(by_definition(1, lambda i: spread(REWARD[i])), exact())
