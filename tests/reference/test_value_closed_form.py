"""A critic trained on an env that always pays 1 finds 1 / (1 - gamma), but only if time limits are not taken for ends."""

import pytest
import torch

from tests.kit import algorithm, mlp, number, toy, wire

STEPS = 5


def learned_value(limit, *, decisions, lam, updates, critic=None):
    """Value of the only state after training the critic; gamma is 0.9 and episodes last 5 steps."""
    env = toy("constant", 8, max_steps=STEPS, limit=limit)
    critic = critic or {"kind": "scalar"}
    policy = mlp(env.spec, hidden=(8,), normalize_obs=False, critic=critic)
    value_loss = {"kind": "hl_gauss" if critic["kind"] == "hl_gauss" else "mse", "coef": 1.0}
    ppo = algorithm(
        "ppo", credit={"gamma": 0.9, "lam": lam}, loss={"value": value_loss},
        update={"lr": 5e-2, "epochs": 2, "minibatches": 1, "max_grad_norm": 100.0},
    )  # fmt: skip
    run = wire([env], policy, ppo, decisions=decisions)
    for _ in range(updates):
        run.iterate()
    return number(policy.value({"one": torch.ones(1, 1)})[0])


def test_with_truncation_the_value_is_the_endless_sum():
    # 1 / (1 - 0.9) = 10; 7 decisions per rollout, so that episodes of 5 go on across its border
    assert learned_value("truncates", decisions=7, lam=0.9, updates=60) == pytest.approx(10.0, rel=0.02)


def test_a_classifying_critic_finds_the_same_value():
    critic = {"kind": "hl_gauss", "low": 0.0, "high": 20.0, "bins": 41}
    assert learned_value("truncates", decisions=7, lam=0.9, updates=60, critic=critic) == pytest.approx(10.0, rel=0.02)


def test_with_termination_the_value_is_the_finite_one():
    # One step in five ends it, and the state does not say which: v = 1 + 0.9 x 0.8 v, so v = 1 / 0.28 = 3.571
    assert learned_value("terminates", decisions=2 * STEPS, lam=0.0, updates=60) == pytest.approx(1 / 0.28, rel=0.02)
