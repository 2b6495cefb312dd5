"""A sampling temperature that falls within a decision."""

import math

import pytest
import torch
import yaml

from embodied_rl.anneal import Anneal
from embodied_rl.config import packaged_configs
from embodied_rl.errors import CapabilityError
from embodied_rl.measure import Clock
from embodied_rl.session import Session
from tests.resume import lab

FAST = {"start": 1.2, "floor": 0.2, "plain": 1, "delay": 2.0, "delay_growth": 1.0, "delay_max": 3.0}


def test_temperatures_by_hand():
    # 1 + 1.2 - e^(t/2): t = 1: 2.2 - e^0.5, t = 2: 2.2 - e < 0 -> floor; one update later the delay is 3, and stays 3
    wanted = [1.0, 2.2 - math.exp(0.5), 0.2, 0.2]
    assert Anneal(**FAST).temperatures(4, 0).tolist() == pytest.approx(wanted)
    later = [1.0, 2.2 - math.exp(1 / 3), 2.2 - math.exp(2 / 3), 0.2]
    assert Anneal(**FAST).temperatures(4, 1).tolist() == pytest.approx(later)
    assert Anneal(**FAST).temperatures(4, 9).tolist() == pytest.approx(later)


def test_the_delay_of_the_recipe_is_that_of_the_authors_code():
    recipe = yaml.safe_load((packaged_configs() / "method" / "ead.yaml").read_text())
    (of_recipe,), of_class = recipe["collect"].values(), Anneal()
    assert Anneal(**of_recipe) == of_class
    for update in (0, 7, 7994, 7995, 10**6):
        delay = 20 * min(25 + 5 * update, 40000)
        t = torch.arange(10, 3000, dtype=torch.float64)
        wanted = (1 + 1.2 - torch.exp(t / delay)).clamp(min=0.1).float()
        assert torch.equal(of_class.temperatures(3000, update)[10:], wanted)


def session(**algorithm):
    changes = {"collect": {"anneal": FAST, "copies": 16, "decisions": 1}, "policy": {"critic": "none"}, "env": {"turns": 1}}
    return Session.build(lab.recipe("units", algorithm={"type": "grpo"} | algorithm, **changes))


def grpo(**loss):
    return {"credit": {"level": "decision", "baseline": "batch_mean", "scale": "none"}, "loss": loss}


def test_what_is_sampled_cold_is_trained_cold_and_the_ratio_is_1():
    s = session(**grpo(ratio="unit"))
    seen = []
    act = s.policy.act
    s.policy.act = lambda *a, **k: seen.append(s.policy.temperature) or act(*a, **k)
    for update in range(3):
        row = s.iterate(Clock()).reduce()
        assert torch.equal(seen[-1], Anneal(**FAST).temperatures(3, update))
        assert row["sync/logp_gap_mean"] == 0
        assert s.policy.temperature is None
    s.close()


def test_the_reference_is_as_cold_as_the_policy():
    s = session(update={"lr": 1e-9}, **grpo(ratio="unit", kl={"kind": "k2", "coef": 1.0}))
    assert s.iterate(Clock()).value("actor/kl_to_reference") < 1e-8
    s.close()


def test_what_cannot_be_annealed_is_refused():
    with pytest.raises(CapabilityError, match="this policy has no temperature"):
        Session.build(lab.recipe("groups", collect={"anneal": FAST}))
    with pytest.raises(ValueError, match=r"floor \(1.2\) must be below start \(1.2\)"):
        Anneal(floor=1.2)
