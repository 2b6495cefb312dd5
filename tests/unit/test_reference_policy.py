"""The policy that a KL penalty pulls towards: in the reward or in the loss, and how it is moved."""

import pytest
import torch

from embodied_rl.loss import Kl
from tests.kit import algorithm, toy, wire
from tests.toys.table import Config, Table


def run(**kl):
    torch.manual_seed(0)
    envs = [toy("words", 16, partial=True)]
    policy = Table(Config(spread=0.5), envs[0].spec)
    sections = {"credit": {"scale": "none", "baseline": "group_mean"}, "loss": {"kl": kl}, "update": {"lr": 0.05}}
    return wire(envs, policy, algorithm("grpo", **sections), decisions=1, mode="episodes", group_size=4)


ESTIMATORS = {"k1": lambda d: d, "k2": lambda d: d.square() / 2, "k3": lambda d: (-d).exp() + d - 1}


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_the_penalty_of_a_token_is_the_estimator_of_its_log_ratio_to_the_reference(kind):
    r = run(where="reward", kind=kind, coef=0.5)
    rollout, _ = r.iterate()
    assert not r.updater.penalty(r.collector.collect())[0].eq(0).all()
    rollout = r.collector.collect()
    penalty, metrics = r.updater.penalty(rollout)
    rows = rollout.mask[0]
    with torch.no_grad():
        ref = r.updater.reference.evaluate({"context": rollout.constants["context"][rollout.episode[0]]}, rollout.units[0])
    wanted = 0.5 * ESTIMATORS[kind](rollout.logp[0] - ref.logp)
    torch.testing.assert_close(penalty[0][rows], wanted[rows], rtol=1e-4, atol=1e-7)
    assert (penalty[0][~rows] == 0).all()
    assert metrics.value("actor/kl_to_reference") == pytest.approx(float(2 * wanted[rows].mean()), rel=1e-4)


def test_before_the_first_update_there_is_no_penalty():
    r = run(where="reward", kind="k1", coef=0.5)
    assert float(r.updater.penalty(r.collector.collect())[0].abs().max()) < 1e-6


def test_a_penalty_in_the_loss_leaves_the_reward_alone():
    r = run(kind="k2", coef=0.5)
    _, metrics = r.iterate()
    assert r.updater.penalty(r.collector.collect())[0] is None
    assert metrics.value("actor/kl_to_reference") is not None


def test_every_so_many_updates_the_policy_becomes_its_own_reference():
    r = run(where="reward", kind="k1", coef=0.5, reset_every=2)
    far = []
    for _ in range(4):
        r.iterate()
        own, ref = r.policy.logits.detach(), r.updater.reference.logits.detach()
        far.append(float((own - ref).abs().max()))
        moved = float(r.updater.optimizer.moments["exp_avg"].abs().max())
        assert (moved == 0) == (far[-1] == 0)
    assert far[0] > 0 and far[1] == 0 and far[2] > 0 and far[3] == 0


@pytest.mark.parametrize("given", [{"where": "reward"}, {"reset_every": 3}])
def test_settings_of_a_penalty_that_is_not_there_are_refused(given):
    with pytest.raises(ValueError, match="does nothing with coef 0.0"):
        Kl(**given)


def test_scaling_by_a_deviation_that_only_the_penalty_made_is_refused():
    with pytest.raises(ValueError, match="would blow that up"):
        algorithm("grpo", loss={"kl": {"where": "reward", "coef": 0.1, "kind": "k1"}})


def test_an_advantage_per_unit_needs_a_ratio_per_unit():
    with pytest.raises(ValueError, match=r"credit.level \(unit\) gives every unit an advantage of its own"):
        algorithm("ppo", credit={"level": "unit"})
