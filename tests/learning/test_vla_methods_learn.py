"""Tokens, and every way to see a flow or a diffusion chain as a policy, learn to hit what is shown; median of three seeds.

Comments give the lowest and the highest score of seeds 0 to 5 (2026-11, torch 2.13, CPU).
"""

import math
import statistics
from functools import cache

import pytest
import torch

from embodied_rl import registry
from tests.kit import CPU, algorithm, toy, wire
from tests.toys.aim import RADIUS

pytestmark = pytest.mark.learning
SEEDS = (0, 1, 2)
UPDATES, LAST = 50, 10
SMALL = {"width": 32, "heads": 2, "layers": 1, "channels": 8, "glances": 1, "chunk": 1, "foresight": 0.0}
FLOW = {"type": "tiny_vla_flow", "critic": {"kind": "none"}}

UNTRAINED = {
    "Flow-SDE": ({}, {}, 0.65),  # 0.78 - 0.83
    "Flow-SDE, one noisy step": ({"stochastic": "one"}, {}, 0.65),  # 0.70 - 0.93
    "Flow-Noise": ({"likelihood": "learned"}, {}, 0.65),  # 0.73 - 0.91
    # A loss can be pushed up without end: with failures at full weight half of the seeds lose again what they had learned.
    "FPO": ({"likelihood": "cfm", "samples": 16}, {"credit": {"negative_weight": 0.25}}, 0.85),  # 0.97 - 1.0
}
"""Name -> settings of the policy, sections of GRPO, threshold; all start at 0.0 - 0.1."""
IMITATED = {
    "DPPO": ({"process": "diffusion", "noise": 1.0}, {}, 0.75),  # 0.28 - 0.45 at first, then 0.82 - 0.94
    "DSRL": ({"likelihood": "latent", "latent_std": 1.0}, {"update": {"lr": 1e-2}}, 0.85),  # 0.30 - 0.44, 0.98 - 0.99
}
"""The same, of policies that can only improve what was imitated: an untrained diffusion magnifies its noise thirtyfold, and
a frozen flow acts by what it knows."""


def build(spec, seed, policy):
    module = registry.load("policy", policy["type"])
    torch.manual_seed(seed)
    return module.build(module.Config(**SMALL | policy), env=spec, device=CPU)


@cache
def imitated(name):
    """Weights after imitating a shooter who aims at the target and at the point opposite, half of the time each."""
    net = build(toy("aim", 1).spec, 1, FLOW | IMITATED[name][0])
    net.fit_vectors({})
    steps, g = 600, torch.Generator().manual_seed(1)
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-2)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, steps)
    for _ in range(steps):
        angle = 2 * math.pi * torch.rand(256, generator=g)
        target = RADIUS * torch.stack([angle.cos(), angle.sin()], dim=1)
        side = torch.randint(2, (256, 1), generator=g) * 2 - 1
        shot = side * target + 0.1 * torch.randn(256, 2, generator=g)
        loss = net.imitation_loss({"target": target}, shot.unsqueeze(1), {}, g).mean()
        optimizer.zero_grad(), loss.backward(), optimizer.step(), schedule.step()
    return net.state_dict()


def train(name, seed):
    """Success of the sampling policy in the first rollout, and its mean over the last ones."""
    policy, sections, _ = (UNTRAINED | IMITATED)[name]
    envs = [toy("aim", 64)]
    net = build(envs[0].spec, seed, FLOW | policy)
    if name in IMITATED:
        net.load_state_dict(imitated(name))
    method = algorithm("grpo", **sections | {"update": {"lr": 2e-3, "epochs": 2, "minibatches": 2} | sections.get("update", {})})
    run = wire(envs, net, method, decisions=1, seed=seed, mode="episodes", group_size=8)
    scores = [float(run.iterate()[0].finished["success_at_end"].double().mean()) for _ in range(UPDATES)]
    return scores[0], statistics.mean(scores[-LAST:])


@pytest.mark.parametrize("name", UNTRAINED)
def test_it_learns_to_hit_from_nothing(name):
    scores = [train(name, seed)[1] for seed in SEEDS]
    assert statistics.median(scores) >= UNTRAINED[name][2], scores


@pytest.mark.parametrize("name", IMITATED)
def test_it_learns_which_of_two_imitated_ways_is_paid(name):
    first, last = zip(*(train(name, seed) for seed in SEEDS), strict=True)
    assert statistics.median(first) < 0.6, first
    assert statistics.median(last) >= IMITATED[name][2], last


@pytest.mark.parametrize("decoding", ["parallel", "autoregressive"])
def test_tokens_and_a_classifying_critic_learn_by_ppo(decoding):
    # Observed: 0.61 - 0.71 (parallel), 0.78 - 0.89 (autoregressive), from 0.1; values within 0.015 of what is paid.
    critic = {"kind": "hl_gauss", "low": -1.5, "high": 1.0}
    policy = {"type": "tiny_vla_tokens", "bins": 16, "decoding": decoding, "critic": critic}
    method = algorithm("ppo", loss={"value": {"kind": "hl_gauss"}}, update={"lr": 3e-3, "epochs": 2, "minibatches": 2})
    scores, errors = [], []
    for seed in SEEDS:
        envs = [toy("aim", 64)]
        run = wire(envs, build(envs[0].spec, seed, policy), method, decisions=2, seed=seed)
        rollouts = [run.iterate()[0] for _ in range(35)][-LAST:]
        scores.append(statistics.mean(float(r.finished["success_at_end"].double().mean()) for r in rollouts))
        errors.append(statistics.mean(float((r.value - r.reward).mean()) for r in rollouts))
    assert statistics.median(scores) >= 0.5, scores
    assert max(map(abs, errors)) < 0.1, errors
