"""Denoising chains taken apart by control steps: each has the probability of its own Gaussians, and a ratio of its own."""

import numpy as np
import pytest
import torch
from scipy.stats import norm

from embodied_rl import registry
from embodied_rl.batch import as_batch, flatten
from embodied_rl.collect import Collector
from embodied_rl.loss import Loss, LossFunction
from embodied_rl.types import Advantage
from tests.kit import CPU, batch_of, evaluation_of, number, rollout_of, toy
from tests.reference.test_vla_policies import (
    CHAINS,
    F64,
    C,
    D,
    decide,
    disagreements,
    flow,
    generator,
    look,
    row,
    transition,
)

N = 4


def by_action(units):
    """[N, C, steps, 2 D + 1] of units that are ordered control step by control step."""
    return units.view(len(units), C, -1, 2 * D + 1)


def gaussians(policy, obs, units):
    """Log-probability and entropy [N, C, steps] of what each step says of each control step, in numpy."""
    table = by_action(units).numpy()
    logp, entropy = np.zeros((2, *table.shape[:3]))
    for i in range(len(table)):
        for j in range(table.shape[2]):
            x, after, k = table[i, :, j, :D], table[i, :, j, D : 2 * D], table[i, :, j, -1]
            assert len(set(k)) == 1, "all control steps of a unit's step are at the same time"
            mean, std = transition(policy, row(obs, i), x, int(k[0]))
            logp[i, :, j] = norm.logpdf(after, mean, std).sum(-1)
            entropy[i, :, j] = norm.entropy(mean, std).sum(-1)
    return logp, entropy


def moved(case, **config):
    """The same policy twice, the second after some learning."""
    old, new = flow(case, **config), flow(case, **config)
    with torch.no_grad():
        for p in new.parameters():
            p += 3e-3 * torch.randn(p.shape, generator=generator(7), dtype=F64)
    return old, new


@pytest.mark.parametrize("case", CHAINS)
def test_a_unit_is_what_a_step_says_of_a_control_step(case):
    policy, obs = flow(case, units="action"), look(N)
    units, logp, action = decide(policy, obs)
    given = policy.evaluate(obs, units)
    assert units.shape == (N, policy.num_units, 2 * D + 1) and policy.actions_per_decision == C
    expected, entropy = gaussians(policy, obs, units)
    np.testing.assert_allclose(given.logp.detach().numpy(), expected.reshape(N, -1), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(given.entropy.detach().numpy(), entropy.reshape(N, -1), rtol=1e-6)
    assert torch.equal(logp, given.logp.detach())
    # The same chain as with one unit per step, in another order.
    whole = flow(case)
    steps, _, same = decide(whole, obs)
    assert torch.equal(action, same) and policy.num_units == C * whole.num_units
    parts = by_action(units).transpose(1, 2)
    assert torch.equal(torch.cat([parts[..., :D].flatten(2), parts[..., D:-1].flatten(2), parts[:, :, 0, -1:]], -1), steps)


@pytest.mark.parametrize("case", CHAINS)
def test_mean_divides_by_the_numbers_of_a_control_step(case):
    obs = look(N)
    total, mean = (flow(case, units="action", log_prob=how) for how in ("sum", "mean"))
    units, _, _ = decide(total, obs)
    torch.testing.assert_close(total.evaluate(obs, units).logp, mean.evaluate(obs, units).logp * D)


@pytest.mark.parametrize("case", ["sde", "sde, one step", "learned", "diffusion"])
def test_ppo_takes_the_ratio_of_each_control_step(case):
    """Of the product of its Gaussians over the denoising steps; the last decision ended after its first control step."""
    (old, new), obs = moved(case, units="action"), look(N)
    units, before, _ = decide(old, obs)
    ratio = np.exp((gaussians(new, obs, units)[0] - gaussians(old, obs, units)[0]).sum(-1))
    # The first control step of each decision went where its advantage wants it, some of them further than the clip.
    far = np.abs(ratio - 1)
    advantage, clip = np.sign(ratio[:, 0] - 1) * [1.0, 2.0, 0.5, 1.5], float(np.sort(far[:, 0])[:2].mean())
    objective = np.minimum(ratio * advantage[:, None], np.clip(ratio, 1 - clip, 1 + clip) * advantage[:, None])
    cut = objective < ratio * advantage[:, None] - 1e-12
    assert 0 < cut[:-1].sum() < cut[:-1].size
    weight = np.full((N, C), 1 / (N * C))
    weight[-1] = [1 / N, 0.0]

    function = LossFunction(Loss(ratio="action", clip_low=clip, clip_high=clip), chunk=new.actions_per_decision)
    mask = torch.ones(N, C, new.num_units // C, dtype=torch.bool)
    mask[-1, 1] = False
    batch = batch_of(before, function, mask=mask.flatten(1), advantage=torch.from_numpy(advantage))
    result = function(evaluation_of(new.evaluate(obs, units).logp), batch, diagnose=True)
    assert number(result.total) == pytest.approx(-(weight * objective).sum(), rel=1e-6)
    assert number(result.metrics["actor/clip_fraction"][0]) == pytest.approx((weight * cut).sum())

    def loss():
        return function(new.evaluate(obs, units), batch).total + new.evaluate(obs, units).value.square().mean()

    assert disagreements(new, loss) == []


@pytest.mark.parametrize("level", ["decision", "trajectory"])
@pytest.mark.parametrize("case", ["sde", "sde, one step", "learned", "diffusion"])
def test_the_ratio_of_a_decision_is_the_same_with_both_units(case, level):
    obs, found = look(N), []
    for kind in ("step", "action"):
        old, new = moved(case, units=kind)
        units, before, _ = decide(old, obs)
        function = LossFunction(Loss(ratio=level, trust="none"), chunk=new.actions_per_decision)
        batch = batch_of(before, function, advantage=torch.tensor([1.0, -2.0, 0.5, -1.0], dtype=F64), trajectory=torch.tensor([0, 0, 1, 2]))
        result = function(evaluation_of(new.evaluate(obs, units).logp), batch, diagnose=True)
        result.total.backward()
        grads = torch.cat([p.grad.flatten() for p in new.parameters() if p.grad is not None])
        found.append((result.total.detach(), result.metrics["actor/ratio_max"][0], grads))
    assert abs(float(found[0][1]) - 1) > 1e-3 and float(found[0][2].norm()) > 0
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-12)


# ---- actions that were not taken -------------------------------------------------------------------------------------

SMALL = {"width": 16, "heads": 2, "layers": 1, "chunk": 3}
POLICIES = {
    "flow": ("tiny_vla_flow", {"units": "action", "denoising_steps": 2, **SMALL}),
    "tokens": ("tiny_vla_tokens", {"bins": 8, **SMALL}),
    "mlp": ("mlp", {"chunk": 3, "hidden": [8]}),
}


@pytest.mark.parametrize("name", POLICIES)
def test_actions_after_the_end_of_an_episode_have_no_ratio(name):
    """Chunks of 3 in episodes of 2 and 7 control steps: what counts and weighs, and the others' numbers stay right."""
    module, config = POLICIES[name]
    module = registry.load("policy", module)
    env = toy("lengths", 2, lengths=(2, 7))
    torch.manual_seed(0)
    policy = module.build(module.Config(**config), env=env.spec, device=CPU)
    rollout = Collector([env], policy, decisions=3, generator=generator()).collect()
    assert rollout.steps.tolist() == [[2, 3], [2, 3], [2, 1]]
    advantage, taken = Advantage(torch.ones_like(rollout.reward)), [[1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 1, 1], [1, 1, 0], [1, 0, 0]]
    function = LossFunction(Loss(ratio="action"), policy.actions_per_decision)
    flat = flatten(rollout, advantage, actions=function.actions)
    assert flat.rows["mask"].view(6, 3, -1).all(-1).tolist() == flat.rows["mask"].view(6, 3, -1).any(-1).tolist()
    assert flat.rows["mask"].view(6, 3, -1)[..., 0].int().tolist() == taken
    again = policy.evaluate(flat.full_obs(), flat.rows["units"]).logp.detach()
    assert torch.equal(again, flat.rows["logp"]) and torch.equal(flat.rows["units"], rollout.units.flatten(0, 1))
    weight = torch.tensor(taken) / torch.tensor(taken).sum(1, keepdim=True) / 6
    torch.testing.assert_close(as_batch(flat, function).weight, weight)
    # A ratio over the whole decision counts all that was sampled.
    whole = LossFunction(Loss(ratio="decision"), policy.actions_per_decision)
    assert "mask" not in flatten(rollout, advantage, actions=whole.actions).rows


def test_an_action_that_is_held_was_taken_once_it_has_begun():
    # 2 actions of 2 units, each held for 3 control steps.
    steps = torch.tensor([[1, 3, 4, 6]])
    rollout = rollout_of(torch.zeros(1, 4), chunk=6, num_units=4, steps=steps)
    mask = flatten(rollout, Advantage(rollout.reward), actions=2).rows["mask"]
    assert mask.int().tolist() == [[1, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1], [1, 1, 1, 1]]


def test_masked_units_are_masked_still():
    rollout = rollout_of(torch.zeros(1, 2), chunk=2, num_units=4, steps=torch.tensor([[1, 2]]))
    rollout.mask[0, :, 0], rollout.units[0, :, 0] = False, torch.nan
    rows = flatten(rollout, Advantage(rollout.reward), actions=2).rows
    assert rows["mask"].int().tolist() == [[0, 1, 0, 0], [0, 1, 1, 1]] and bool(rows["units"].isfinite().all())


@pytest.mark.parametrize("likelihood", ["cfm", "latent"])
def test_what_has_no_gaussian_steps_cannot_be_taken_apart(likelihood):
    message = rf"units \(action\) takes the Gaussian of a denoising step apart, and likelihood \({likelihood}\) has none"
    with pytest.raises(ValueError, match=message):
        registry.load("policy", "tiny_vla_flow").Config(likelihood=likelihood, units="action")
