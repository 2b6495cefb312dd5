"""Before the first step the ratio is exactly 1: `evaluate` repeats the log-probabilities of `act` bit for bit."""

import pytest
import torch

from embodied_rl.batch import flatten, minibatches, observed
from embodied_rl.types import ActionSpec, TensorSpec
from tests.kit import algorithm, mlp, spec, toy, wire

CONFIGS = {
    "free std": {},
    "state std": {"std": "state"},
    "squash": {"squash": True},
    "squash, state std": {"squash": True, "std": "state"},
    "chunk 3": {"chunk": 3},
    "held actions": {"chunk": 2, "hold": 3},
    "bounded mean": {"bound_mean": True, "std": "state"},
    "shared critic": {"critic": {"share": "all"}},
    "no critic": {"critic": {"kind": "none"}},
    "classifying critic": {"critic": {"kind": "hl_gauss", "bins": 11}},
    "shared classifying critic": {"critic": {"kind": "hl_gauss", "bins": 11, "share": "all"}},
    "one action dimension": {"size": 1},
    "one action dimension, state std, squash": {"size": 1, "std": "state", "squash": True},
    "seven action dimensions": {"size": 7, "std": "state"},
    "odd hidden layers": {"hidden": (33, 17), "size": 2},
    "narrow hidden layer": {"hidden": (5,), "size": 3},
    "no hidden layer": {"hidden": (), "size": 3},
    "no words": {"words": False},
    "no attention": {"attention_heads": 0},
    "vectors only": {"words": False, "slots": False, "activation": "elu"},
    "discrete": {"kind": "discrete", "size": 4},
    "discrete, two actions": {"kind": "discrete", "size": 2, "hidden": (33,)},
    "discrete, shared classifying critic": {"kind": "discrete", "size": 4, "critic": {"kind": "hl_gauss", "share": "encoder"}},
}
MOST = 64


def build(kind="continuous", size=2, words=True, slots=True, **config):
    """A shaken policy with a moved normaliser, and MOST observations."""
    entries = {"vector": TensorSpec((5,))}
    if slots:
        entries["slots"] = TensorSpec((4, 6))
    if words:
        entries["words"] = TensorSpec((7,), torch.int64, low=0, high=20, constant=True)
    policy = mlp(spec(entries, ActionSpec(kind, size)), shake=0.1, **({"hidden": (64, 64)} | config))
    g = torch.Generator().manual_seed(0)
    obs = {
        k: torch.randint(0, 21, (MOST, *s.shape), generator=g) if s.dtype == torch.int64 else 3 * torch.randn(MOST, *s.shape, generator=g) + 1
        for k, s in entries.items()
    }
    policy.observe(obs)
    return policy, obs


@pytest.mark.parametrize("name", CONFIGS)
def test_evaluate_repeats_the_log_probabilities_of_act_in_batches_of_any_size_and_order(name):
    policy, everything = build(**CONFIGS[name])
    g = torch.Generator().manual_seed(1)
    for n in (1, 2, 7, 16, 17, MOST):
        obs = {k: v[:n] for k, v in everything.items()}
        out = policy.act(obs, generator=g)
        units = out.units.clone()  # as a rollout keeps them: not part of inference mode
        order = torch.randperm(n, generator=g)
        for size in (1, 2, 7, 16, 31, MOST):
            for start in range(0, n, size):
                rows = order[start : start + size]
                logp = policy.evaluate({k: v[rows] for k, v in obs.items()}, units[rows]).logp.detach()
                assert torch.equal(logp, out.logp[rows]), (n, size, float((logp - out.logp[rows]).abs().max()))


@pytest.mark.parametrize("name", CONFIGS)
def test_asking_for_the_entropy_or_not_changes_no_log_probability(name):
    policy, obs = build(**CONFIGS[name])
    out = policy.act(obs, generator=torch.Generator().manual_seed(1))
    logp = [policy.evaluate(obs, out.units.clone(), entropy=entropy).logp.detach() for entropy in (True, False)]
    assert torch.equal(logp[0], logp[1]) and torch.equal(logp[0], out.logp)


@pytest.mark.parametrize(("method", "mode"), [("ppo", "stream"), ("grpo", "episodes"), ("reinforce", "episodes")])
@pytest.mark.parametrize("parts", [1, 2])
def test_the_first_minibatch_after_every_collection_has_a_ratio_of_exactly_1(method, mode, parts):
    envs = [toy("point", 8 // parts, end_on_success=True, max_steps=5) for _ in range(parts)]
    policy = mlp(envs[0].spec, hidden=(16,), chunk=2, critic={"kind": "none" if method != "ppo" else "scalar"})
    run = wire(envs, policy, algorithm(method), decisions=6, mode=mode, group_size=4 if mode == "episodes" else 1)
    for _ in range(3):
        rollout = run.collector.collect()
        advantage = run.credit(rollout)
        for batch in minibatches(flatten(rollout, advantage), 3, run.updater.loss, torch.Generator().manual_seed(0)):
            assert torch.equal(policy.evaluate(batch.obs, batch.units).logp.detach(), batch.logp)
        run.updater.update(rollout, advantage, progress=0.0)
        policy.observe(observed(rollout))
    run.collector.close()
