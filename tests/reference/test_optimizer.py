"""The updater against a plain loop with torch.optim.AdamW, and its schedules against their rules."""

import copy

import pytest
import torch

from embodied_rl.batch import flatten, minibatches
from embodied_rl.loss import Loss, LossFunction
from embodied_rl.types import ActionSpec, Advantage, TensorSpec
from embodied_rl.update import Update, Updater
from tests.kit import mlp, number, rollout_of, spec

ENV = spec({"x": TensorSpec((3,))}, ActionSpec("continuous", 2))


def experience(policy, seed=0, t=8, b=4, spread=1.0):
    """Decisions of the policy on random observations, with random advantages of the given spread and random targets."""
    g = torch.Generator().manual_seed(seed)
    x = torch.randn(t, b, 3, generator=g)
    out = policy.act({"x": x.flatten(0, 1)}, generator=g)
    rollout = rollout_of(
        torch.zeros(t, b), obs={"x": x}, units=out.units.view(t, b, 2).clone(), logp=out.logp.view(t, b, 2).clone(),
        value=out.value.view(t, b).clone(),
    )  # fmt: skip
    return rollout, Advantage(spread * torch.randn(t, b, generator=g), torch.randn(t, b, generator=g))


def build(loss=None, **update):
    policy = mlp(ENV, hidden=(16,), shake=0.1)
    function = LossFunction(loss or Loss(entropy_coef=0.01), 1)
    return policy, Updater(policy, function, Update(**update), seed=5, max_bad_updates=1)


@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
@pytest.mark.parametrize("max_grad_norm", [0.05, 100.0])
def test_an_update_is_adamw_with_a_clipped_gradient_over_epochs_of_minibatches(max_grad_norm, weight_decay):
    policy, updater = build(epochs=3, minibatches=4, lr=2e-3, max_grad_norm=max_grad_norm, weight_decay=weight_decay)
    plain = copy.deepcopy(policy)
    optimizer = torch.optim.AdamW(plain.parameters(), lr=2e-3, eps=1e-5, weight_decay=weight_decay)
    shuffle = torch.Generator().manual_seed(5)
    norms = []
    for i in range(2):
        rollout, advantage = experience(policy, seed=i)
        for _ in range(3):
            for batch in minibatches(flatten(rollout, advantage), 4, updater.loss, shuffle):
                optimizer.zero_grad()
                updater.loss(plain.evaluate(batch.obs, batch.units), batch).total.backward()
                norms.append(float(torch.nn.utils.clip_grad_norm_(plain.parameters(), max_grad_norm)))
                optimizer.step()
        metrics = updater.update(rollout, advantage, progress=0.0).reduce()
        for ours, theirs in zip(policy.parameters(), plain.parameters(), strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=2e-6)
        assert metrics["actor/grad_norm"] == pytest.approx(sum(norms[-4:]) / 4, rel=1e-3)
        assert updater.version == i + 1
    assert (min(norms) > 0.05) and (max(norms) < 100), "one setting clips every step, the other none"


def step_size(updater, progress, seed=0, **given):
    """The step size reported by one update."""
    return updater.update(*experience(updater.policy, seed, **given), progress=progress).reduce()["actor/lr"]


def test_the_linear_schedule_ends_at_zero():
    _, updater = build(lr=1e-3, lr_schedule="linear")
    assert [step_size(updater, p) for p in (0.0, 0.25, 0.9)] == pytest.approx([1e-3, 7.5e-4, 1e-4])
    before = [p.detach().clone() for p in updater.policy.parameters()]
    assert step_size(updater, 1.0) == 0.0
    assert all(torch.equal(a, b) for a, b in zip(before, updater.policy.parameters(), strict=True))


def test_the_constant_schedule_does_not_care():
    _, updater = build(lr=1e-3)
    assert [step_size(updater, p) for p in (0.0, 0.9)] == [1e-3, 1e-3]


def test_the_step_rises_over_the_updates_of_its_warm_up_and_then_follows_its_schedule():
    _, updater = build(lr=1e-3, lr_warmup=4)
    assert [step_size(updater, 0.0) for _ in range(6)] == pytest.approx([2.5e-4, 5e-4, 7.5e-4, 1e-3, 1e-3, 1e-3])
    _, updater = build(lr=1e-3, lr_warmup=2, lr_schedule="linear")
    assert [step_size(updater, p) for p in (0.0, 0.5, 0.75)] == pytest.approx([5e-4, 5e-4, 2.5e-4])


def test_the_step_rises_once_more_when_the_critic_has_warmed_up():
    _, updater = build(lr=1e-3, lr_warmup=2, critic_warmup=3)
    assert [step_size(updater, 0.0) for _ in range(6)] == pytest.approx([5e-4, 1e-3, 1e-3, 5e-4, 1e-3, 1e-3])


def test_the_adaptive_step_shrinks_when_the_policy_moves_too_far_and_grows_when_it_hardly_moves():
    # One change by 1.5 after each of the 2 epochs.
    _, updater = build(lr=1e-3, epochs=2, lr_schedule="adaptive_kl", target_kl=1e-9)
    assert step_size(updater, 0.0, spread=3.0) == pytest.approx(1e-3 / 1.5**2)
    _, updater = build(lr=1e-3, epochs=2, lr_schedule="adaptive_kl", target_kl=10.0)
    assert step_size(updater, 0.0) == pytest.approx(1e-3 * 1.5**2)


@pytest.mark.parametrize(("lr", "target_kl"), [(1e-6, 1e-12), (0.05, 1e3)])
def test_the_adaptive_step_never_turns_the_wrong_way(lr, target_kl):
    # A step below the usual floor must not be raised when the KL is too large, nor one above the ceiling lowered.
    _, updater = build(lr=lr, epochs=3, lr_schedule="adaptive_kl", target_kl=target_kl)
    found = step_size(updater, 0.0, spread=3.0)
    assert found <= lr if target_kl < 1 else found >= lr


def test_the_update_stops_after_the_epoch_that_moved_too_far():
    steps = {}
    for target in (None, 1e-9):
        _, updater = build(lr=1e-2, epochs=4, minibatches=2, target_kl=target)
        step_size(updater, 0.0)
        steps[target] = number(updater.state_dict()["moments"]["step"])
    assert steps == {None: 8, 1e-9: 2}


def test_during_the_warm_up_only_the_critic_learns():
    policy, updater = build(Loss(), lr=1e-2, critic_warmup=2)
    for update in range(3):
        before = {n: p.detach().clone() for n, p in policy.named_parameters()}
        step_size(updater, 0.0, seed=update)
        moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
        actor = {n for n in before if n.startswith(("actor", "log_std"))}
        assert actor and moved == (set(before) if update == 2 else set(before) - actor)


def test_the_reference_is_the_policy_at_the_start_and_never_moves():
    policy, updater = build(Loss(kl={"kind": "k3", "coef": 0.5}), lr=1e-2, epochs=2, minibatches=1)
    start = copy.deepcopy(policy)
    for i in range(3):
        rollout, advantage = experience(policy, seed=i)
        updater.update(rollout, advantage, progress=0.0)
        policy.observe({"x": 5 + rollout.obs["x"].flatten(0, 1)})
    # A step too small to move anything measures the KL between the weights of now and those of the start.
    updater.config = updater.config.model_copy(update={"lr": 1e-12, "epochs": 1})
    updater.lr = 1e-12
    rollout, advantage = experience(policy, seed=9)
    metrics = updater.update(rollout, advantage, progress=0.0).reduce()
    obs, units = {"x": rollout.obs["x"].flatten(0, 1)}, rollout.units.flatten(0, 1)
    with torch.no_grad():
        d = (policy.evaluate(obs, units).logp - start.evaluate(obs, units).logp).sum(-1)
    assert metrics["actor/kl_to_reference"] == pytest.approx(float((torch.exp(-d) + d - 1).mean()), rel=1e-4)
    assert metrics["actor/kl_to_reference"] > 1e-4
