"""Sampling and training that disagree about log-probabilities: measured always, mended when asked and when it matters."""

import math

import pytest
import torch

from embodied_rl import registry
from embodied_rl.loss import Loss, LossFunction
from embodied_rl.metrics import Partials
from embodied_rl.types import ActionSpec, Advantage, TensorSpec
from embodied_rl.update import LogpGap, Update, Updater
from tests.kit import TOYS, algorithm, batch_of, evaluation_of, mlp, number, rollout_of, spec, toy, wire

F64 = torch.float64
ENV = spec({"x": TensorSpec((3,))}, ActionSpec("continuous", 2))
HONEST = 0.0


def experience(tilt, *, t=6, b=4, masked=False):
    """Decisions of a fresh policy, whose log-probabilities are off by up to `tilt`; and that policy."""
    module = registry.load("policy", str(TOYS / "tilted.py"))
    torch.manual_seed(0)
    policy = module.build(module.Config(hidden=(16,), tilt=tilt), env=ENV, device=torch.device("cpu"))
    g = torch.Generator().manual_seed(1)
    x = torch.randn(t, b, 3, generator=g)
    out = policy.act({"x": x.flatten(0, 1)}, generator=g)
    mask = torch.rand(t, b, 2, generator=g) < 0.7 if masked else torch.ones(t, b, 2, dtype=torch.bool)
    rollout = rollout_of(
        torch.zeros(t, b), obs={"x": x}, units=out.units.view(t, b, 2).clone(), logp=out.logp.view(t, b, 2).clone(),
        value=out.value.view(t, b).clone(), mask=mask,
    )  # fmt: skip
    return policy, rollout, Advantage(torch.randn(t, b, generator=g), torch.randn(t, b, generator=g))


def learn(tilt, gap=None, *, loss=None, masked=False, **update):
    """Weights after one update, and its metrics."""
    policy, rollout, advantage = experience(tilt, masked=masked)
    config = Update(**{"epochs": 2, "minibatches": 3, "lr": 1e-2} | update, logp_gap=gap or LogpGap())
    updater = Updater(policy, LossFunction(loss or Loss(ratio="unit"), 1), config, seed=0, max_bad_updates=1)
    metrics = updater.update(rollout, advantage, progress=0.0).reduce()
    return torch.cat([p.detach().flatten() for p in policy.parameters()]), metrics


# ---- measured -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("method", "mode"), [("ppo", "stream"), ("grpo", "episodes"), ("reinforce", "episodes")])
def test_the_gap_is_logged_in_every_update(method, mode):
    envs = [toy("point", 16, end_on_success=True, max_steps=5)]
    policy = mlp(envs[0].spec, hidden=(16,), critic={"kind": "none" if method != "ppo" else "scalar"})
    run = wire(envs, policy, algorithm(method), decisions=6, mode=mode, group_size=4 if mode == "episodes" else 1)
    assert [run.iterate()[1].reduce()["sync/logp_gap_mean"] for _ in range(4)] == [0.0] * 4


def test_the_gap_is_logged_by_the_first_minibatch_that_has_anything_to_learn_from():
    """Minibatches without an advantage make no step, so the weights are still those that sampled."""
    policy, rollout, advantage = experience(0.2)
    advantage.advantage[:] = 0.0
    advantage.advantage[3, 2] = 1.0
    loss = LossFunction(Loss(ratio="unit", value={"coef": 0.0}), 1)
    updater = Updater(policy, loss, Update(epochs=1, minibatches=24, lr=1e-2), seed=0, max_bad_updates=1)
    honest = policy.evaluate({"x": rollout.obs["x"][3, 2:3]}, rollout.units[3, 2:3]).logp[0].detach()
    found = updater.update(rollout, Advantage(advantage.advantage), progress=0.0).reduce()
    assert found["sync/logp_gap_mean"] == pytest.approx(float((rollout.logp[3, 2] - honest).abs().mean()), rel=1e-4)
    assert number(updater.optimizer.moments["step"]) == 1, "one step, for the one decision that has an advantage"
    assert updater.bad_in_a_row == 0


BLIND = Loss(ratio="unit", value={"coef": 0.0})
"""Learns from advantages and from nothing else."""


@pytest.mark.parametrize("micro", [{}, {"micro_batch": 5}, {"micro_units": 10}])
@pytest.mark.parametrize("gap", [LogpGap(), LogpGap(do="recompute", above=0.0)])
@pytest.mark.parametrize("left", ["all, without an advantage", "nothing"])
def test_the_gap_is_logged_when_there_is_nothing_to_learn_from(left, gap, micro):
    policy, rollout, advantage = experience(0.2)
    counts = torch.zeros(6, 4, dtype=torch.bool) if left == "nothing" else None
    honest = policy.evaluate({"x": rollout.obs["x"].flatten(0, 1)}, rollout.units.flatten(0, 1)).logp.detach()
    update = Update(epochs=1, minibatches=1 if gap.above == 0 else 3, lr=1e-2, logp_gap=gap, **micro)
    updater = Updater(policy, LossFunction(BLIND, 1), update, seed=0, max_bad_updates=1)
    rows, calls, evaluate = (5 if micro else 24 // update.minibatches), [], policy.evaluate
    policy.evaluate = lambda obs, units, **given: calls.append((len(units), torch.is_grad_enabled())) or evaluate(obs, units, **given)
    metrics = updater.update(rollout, Advantage(torch.zeros(6, 4), counts=counts), progress=0.0).reduce()
    expected = float((rollout.logp.flatten(0, 1) - honest)[:rows].abs().mean())
    assert metrics["sync/logp_gap_mean"] == pytest.approx(expected, rel=1e-4) and expected > 0.01
    assert calls == [(rows, False)], "one micro-batch, without gradients"
    assert number(updater.optimizer.moments["step"]) == 0 and updater.bad_in_a_row == 0


class Pull:
    """Learn something else in each step, whatever the rollout says."""

    def begin(self, rollout, logp, version):
        return Partials()

    def losses(self, policy, shuffle):
        yield sum(p.square().sum() for p in policy.parameters()), {}


def test_the_gap_is_that_of_the_weights_that_sampled_where_something_else_makes_the_first_step():
    policy, rollout, advantage = experience(HONEST)
    update = Update(epochs=2, minibatches=24, lr=1e-1)
    updater = Updater(policy, LossFunction(BLIND, 1), update, seed=0, max_bad_updates=1, extras=[Pull()])
    first = torch.randperm(24, generator=torch.Generator().manual_seed(0))[0]  # the row of the first minibatch
    advantage.advantage.flatten()[first] = 0.0
    metrics = updater.update(rollout, Advantage(advantage.advantage), progress=0.0).reduce()
    assert metrics["sync/logp_gap_mean"] == 0.0
    assert metrics["actor/skipped_rows_rate"] == pytest.approx(1 / 24) and metrics["actor/kl_k3"] > 0


# ---- recomputed -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("micro", [{}, {"micro_batch": 5}, {"micro_units": 7}])
def test_with_one_step_per_rollout_recomputing_costs_no_pass_of_its_own(micro, monkeypatch):
    one = {"masked": True, "epochs": 1, "minibatches": 1} | micro
    monkeypatch.setattr(Updater, "_logp", lambda *args: pytest.fail("an extra pass"))
    honest, _ = learn(HONEST, **one)
    mended, metrics = learn(0.2, LogpGap(do="recompute", above=0.0), **one)
    left, plain = learn(0.2, **one)
    torch.testing.assert_close(mended, honest, rtol=0, atol=1e-6)
    assert (left - honest).norm() > 100 * (mended - honest).norm()
    assert metrics["sync/logp_gap_mean"] == pytest.approx(plain["sync/logp_gap_mean"]) and metrics["sync/logp_gap_mean"] > 0.01
    assert metrics["actor/ratio_max"] == 1.0 and metrics["sync/logp_mended_rate"] == 1.0


def test_with_more_steps_or_a_threshold_the_pass_is_made(monkeypatch):
    monkeypatch.setattr(Updater, "_logp", lambda *args: (_ for _ in ()).throw(RuntimeError("a pass")))
    for gap, update in ((LogpGap(do="recompute", above=0.0), {"epochs": 2, "minibatches": 1}), (LogpGap(do="recompute"), {"epochs": 1, "minibatches": 1})):
        with pytest.raises(RuntimeError, match="a pass"):
            learn(0.2, gap, **update)


@pytest.mark.parametrize("micro_batch", [None, 5])
@pytest.mark.parametrize("masked", [False, True])
def test_recomputing_gives_the_update_of_an_honest_sampler_bit_for_bit(masked, micro_batch):
    honest, _ = learn(HONEST, masked=masked, micro_batch=micro_batch)
    mended, metrics = learn(0.2, LogpGap(do="recompute"), masked=masked, micro_batch=micro_batch)
    left, _ = learn(0.2, masked=masked, micro_batch=micro_batch)
    assert torch.equal(mended, honest) and not torch.equal(left, honest)
    assert metrics["sync/logp_mended_rate"] == 1.0


@pytest.mark.parametrize("do", ["recompute", "correct"])
def test_up_to_the_threshold_nothing_is_changed(do):
    plain, _ = learn(0.2)
    _, rollout, _ = experience(0.2)
    policy, honest, _ = experience(HONEST)
    gap = float((rollout.logp - honest.logp).abs().mean())
    same, metrics = learn(0.2, LogpGap(do=do, above=gap * 1.001))
    assert torch.equal(same, plain)
    assert metrics["sync/logp_mended_rate"] == 0.0 and "sync/correction_capped_rate" not in metrics
    assert metrics["sync/logp_gap_mean"] == pytest.approx(gap, rel=1e-5)
    other, metrics = learn(0.2, LogpGap(do=do, above=gap * 0.999))
    assert not torch.equal(other, plain) and metrics["sync/logp_mended_rate"] == 1.0


def test_a_gap_of_exactly_zero_is_never_mended():
    honest, _ = learn(HONEST)
    same, metrics = learn(HONEST, LogpGap(do="correct", above=0.0))
    assert torch.equal(same, honest) and metrics["sync/logp_gap_mean"] == metrics["sync/logp_mended_rate"] == 0.0


# ---- corrected ------------------------------------------------------------------------------------------------------


def test_the_objective_is_weighted_and_nothing_else_is():
    # Ratio 1, advantages 2 and 4, factors 1.5 and 0.5: the objective is (1.5 x 2 + 0.5 x 4) / 2 = 2.5, and the slope of
    # cell i is -k_i A_i / 2. The entropy bonus keeps its weight: (1 + 3) / 2.
    function = LossFunction(Loss(entropy_coef=0.1), 1)
    logp = torch.zeros(2, 1, dtype=F64, requires_grad=True)
    factor, advantage = torch.tensor([[1.5], [0.5]], dtype=F64), torch.tensor([2.0, 4.0], dtype=F64)
    batch = batch_of(torch.zeros(2, 1, dtype=F64), function, advantage=advantage, correction=factor)
    total = function(evaluation_of(logp, entropy=torch.tensor([[1.0], [3.0]], dtype=F64)), batch).total
    total.backward()
    assert number(total) == pytest.approx(-2.5 - 0.1 * 2.0)
    assert logp.grad.flatten().tolist() == pytest.approx([-1.5, -1.0])


@pytest.mark.parametrize(
    ("level", "reduce", "expected"),
    [
        # Units of one decision whose training probability is 1.5 and 3 times the sampler's; the other decision agrees.
        ("unit", "sum", [[1.5, 2.0], [1.0, 1.0]]),
        ("decision", "sum", [[2.0], [1.0]]),
        ("decision", "mean", [[2.0], [1.0]]),
        ("trajectory", "mean", [[4.5**0.25]] * 2),
    ],
)
def test_weights_belong_to_the_cells_of_the_ratio_and_are_capped(level, reduce, expected):
    policy, rollout, advantage = experience(HONEST, t=2, b=1)
    rollout.logp[0, 0] -= torch.tensor([1.5, 3.0]).log()
    seen = []

    class Spy(LossFunction):
        def __call__(self, evaluation, batch, **given):
            seen.append(batch)
            return super().__call__(evaluation, batch, **given)

    gap = LogpGap(do="correct", cap=2.0)
    updater = Updater(policy, Spy(Loss(ratio=level, reduce=reduce), 1), Update(epochs=1, minibatches=1, logp_gap=gap), seed=0, max_bad_updates=1)
    metrics = updater.update(rollout, advantage, progress=0.0).reduce()
    found = seen[0].correction[seen[0].advantage.argsort(descending=bool(advantage.advantage[0, 0] > advantage.advantage[1, 0]))]
    torch.testing.assert_close(found, torch.tensor(expected), rtol=1e-5, atol=0)
    capped = {("unit", "sum"): 1 / 4, ("decision", "sum"): 1 / 2, ("decision", "mean"): 1 / 2, ("trajectory", "mean"): 0.0}
    assert metrics["sync/correction_capped_rate"] == capped[level, reduce]
    assert metrics["sync/logp_gap_mean"] == pytest.approx((math.log(1.5) + math.log(3)) / 4, rel=1e-5)
    assert metrics["actor/ratio_max"] == pytest.approx(1.0), "ratios are against the training path"


def action_gradient(logp_of_sampler, counts, gap):
    """d (expected objective) / d logits of a softmax over 3 actions at logits 0, from samples in these proportions."""
    env = spec({"x": TensorSpec((1,))}, ActionSpec("discrete", 3))
    policy = mlp(env, hidden=(), normalize_obs=False, critic={"kind": "none"})
    with torch.no_grad():
        for p in policy.parameters():
            p.zero_()
    n = sum(counts)
    units = torch.repeat_interleave(torch.arange(3), torch.tensor(counts)).view(n, 1, 1)
    rollout = rollout_of(torch.zeros(n, 1), obs={"x": torch.zeros(n, 1, 1)}, units=units, logp=logp_of_sampler[units])
    advantage = Advantage(torch.tensor([1.0, -0.5, 2.0])[units[..., 0]])
    loss = LossFunction(Loss(ratio="unit", value={"coef": 0.0}), 1)
    update = Update(epochs=1, minibatches=1, max_grad_norm=1e9, logp_gap=gap)
    updater = Updater(policy, loss, update, seed=0, max_bad_updates=1)
    updater.update(rollout, advantage, progress=0.0)
    return -policy.actor_head.bias.grad


def test_correcting_gives_the_gradient_under_the_policy_itself():
    # The sampler draws from (1/2, 1/4, 1/4) and says so, training computes 1/3 each. By hand, sum_a p(a) A(a) grad log p(a)
    # with grad_j log p(a) = [j = a] - 1/3 and A = (1, -0.5, 2): component j is (A_j - 5/6) / 3.
    q = torch.tensor([0.5, 0.25, 0.25])
    expected = torch.tensor([1 - 5 / 6, -0.5 - 5 / 6, 2 - 5 / 6]) / 3
    corrected = action_gradient(q.log(), (2, 1, 1), LogpGap(do="correct"))
    torch.testing.assert_close(corrected, expected, rtol=1e-5, atol=1e-6)
    # Ratios of 4/3 are clipped without it (two of the three actions lose their gradient or its size) ...
    assert float((action_gradient(q.log(), (2, 1, 1), LogpGap()) - expected).norm()) > 0.2
    # ... and new ratios alone leave the proportions of the sampler: sum_a q(a) A(a) grad log p(a).
    qa = q * torch.tensor([1.0, -0.5, 2.0])
    recomputed = action_gradient(q.log(), (2, 1, 1), LogpGap(do="recompute"))
    torch.testing.assert_close(recomputed, qa - qa.sum() / 3, rtol=1e-5, atol=1e-6)
    # A cap of 1 cuts the weights 4/3: 2/3 of action 0, the others as they were drawn.
    capped = torch.tensor([1 / 3, -0.5 / 4, 2 / 4])
    found = action_gradient(q.log(), (2, 1, 1), LogpGap(do="correct", cap=1.0))
    torch.testing.assert_close(found, capped - capped.sum() / 3, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("given", [{"above": 0.1}, {"cap": 3.0}, {"do": "recompute", "cap": 3.0}])
def test_settings_that_would_do_nothing_are_refused(given):
    with pytest.raises(ValueError, match=r"does nothing with do \((nothing|recompute)\): remove it, or set do: correct"):
        LogpGap(**given)
