"""Same seed, same bits; and a run that was saved and restored goes on bit for bit as if nothing had happened."""

import copy

import pytest
import torch

from embodied_rl.collect import Collector
from tests.kit import Scripted, algorithm, mlp, toy, wire

SETTINGS = {
    "ppo": {},
    "ppo, chunks, two parts": {"chunk": 2, "parts": 2},
    "ppo, adaptive step, scaled rewards, reference": {
        "sections": {
            "update": {"lr_schedule": "adaptive_kl", "target_kl": 0.003},
            "credit": {"reward_scale": "running_return_std"},
            "loss": {"kl": {"kind": "k3", "coef": 0.1}, "entropy_coef": 0.01},
        }
    },
    "ppo, state std, squash, classifying critic": {
        "policy": {"std": "state", "squash": True, "critic": {"kind": "hl_gauss", "low": -20.0, "high": 20.0}},
        "sections": {"loss": {"value": {"kind": "hl_gauss"}}},
    },
    "ppo, held actions, ratio per action": {
        "policy": {"chunk": 2, "hold": 3, "bound_mean": True},
        "sections": {"loss": {"ratio": "action", "aggregate": "unit_mean"}},
    },
    "grpo": {"method": "grpo", "mode": "episodes", "group_size": 4, "policy": {"critic": {"kind": "none"}}},
    "reinforce, two parts": {"method": "reinforce", "mode": "episodes", "parts": 2, "policy": {"critic": {"kind": "none"}}},
    "bandit": {"env": "bandit", "sections": {"credit": {"lam": 0.5}}},
}  # fmt: skip


def build(seed=0, *, env="point", method="ppo", mode="stream", group_size=1, parts=1, chunk=1, policy=None, sections=None):
    envs = [toy(env, 8 // parts, **({"max_steps": 5, "end_on_success": True} if env == "point" else {})) for _ in range(parts)]
    net = mlp(envs[0].spec, seed=seed, hidden=(16,), **({"chunk": chunk} | (policy or {})))
    config = algorithm(method, **(sections or {}))
    return wire(envs, net, config, decisions=7, mode=mode, group_size=group_size, seed=seed)


def save(run):
    """Everything a checkpoint holds, as copies: live tensors would go on changing."""
    parts = {"policy": run.policy, "credit": run.credit, "updater": run.updater, "collector": run.collector}
    return copy.deepcopy({k: v.state_dict() for k, v in parts.items()})


def load(run, state):
    run.policy.load_state_dict(state["policy"])
    run.credit.load_state_dict(state["credit"])
    run.updater.load_state_dict(state["updater"])
    return run.collector.load_state_dict(state["collector"])


def bits(run, rollout=None, metrics=None):
    """What must agree: all weights and statistics, and where given the rollout and its metrics."""
    out = {f"policy.{k}": v.clone() for k, v in run.policy.state_dict().items()}
    if rollout is not None:
        for name in ("reward", "logp", "units", "value", "next_value", "terminated", "truncated", "valid", "policy_version"):
            x = getattr(rollout, name)
            if x is not None:
                # Storage after the end of an episode was never written.
                out[name] = x[rollout.valid].clone() if name != "valid" else x.clone()
        out |= {f"finished.{k}": v.clone() for k, v in rollout.finished.items()}
        out |= {f"metric.{k}": torch.tensor(v) for k, v in metrics.reduce().items()}
    return out


def assert_same(a, b):
    assert a.keys() == b.keys()
    different = [k for k in a if not torch.equal(a[k], b[k])]
    assert not different


@pytest.mark.parametrize("name", SETTINGS)
def test_the_same_seed_gives_the_same_bits(name):
    first, second = build(**SETTINGS[name]), build(**SETTINGS[name])
    assert_same(bits(first), bits(second))
    for _ in range(3):
        assert_same(bits(first, *first.iterate()), bits(second, *second.iterate()))
    other = build(seed=1, **SETTINGS[name])
    other.iterate()
    assert any(not torch.equal(x, y) for x, y in zip(bits(first).values(), bits(other).values(), strict=True))


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("after", [0, 1, 3])
def test_a_restored_run_goes_on_bit_for_bit(name, after):
    whole = build(**SETTINGS[name])
    for _ in range(after):
        whole.iterate()
    state = save(whole)
    expected = [bits(whole, *whole.iterate()) for _ in range(3)]

    # Another seed of weights, and a life of its own before the restore: nothing of it may survive.
    restored = build(**SETTINGS[name])
    restored.iterate()
    with torch.no_grad():
        for p in restored.policy.parameters():
            p += 1
    assert load(restored, state) is True
    for row in expected:
        assert_same(bits(restored, *restored.iterate()), row)
    for run in (whole, restored):
        run.collector.close()


@pytest.mark.parametrize("chunk", [1, 3])
@pytest.mark.parametrize("parts", [1, 2])
def test_a_restored_collector_goes_on_in_the_middle_of_its_episodes(chunk, parts):
    def build_collector():
        envs = [toy("lengths", 6 // parts, longest=9) for _ in range(parts)]
        policy = Scripted(lambda obs: obs["t"][:, :1].unsqueeze(1).expand(-1, chunk, -1), lambda obs: obs["t"].sum(-1), chunk, chunk)
        return Collector(envs, policy, decisions=4, run_seed=7)

    whole, restored = build_collector(), build_collector()
    whole.collect()
    state = copy.deepcopy(whole.state_dict())
    assert restored.load_state_dict(state) is True
    for _ in range(5):
        a, b = whole.collect(), restored.collect()
        for name in ("reward", "steps", "value", "next_value", "terminated", "truncated", "episode", "task"):
            assert torch.equal(getattr(a, name), getattr(b, name)), name
        assert a.finished.keys() == b.finished.keys() and all(torch.equal(a.finished[k], b.finished[k]) for k in a.finished)
    whole.close()
    restored.close()


def test_an_env_without_state_begins_new_episodes_and_says_so(caplog):
    policy = Scripted(lambda obs: obs["noise"].unsqueeze(1), lambda obs: obs["noise"][:, 0])
    first, second = (Collector([toy("forgetful", 4)], policy, decisions=5) for _ in range(2))
    first.collect()
    state = copy.deepcopy(first.state_dict())
    assert second.load_state_dict(state) is False
    assert "episodes begin anew" in caplog.text
    rollout = second.collect()
    assert bool((second.starts > first.starts - 1).all())
    # The half-finished episodes were given up: no length may carry over.
    assert not rollout.finished or int(rollout.finished["length"].max()) <= 5


def test_nothing_begun_is_restored_exactly_even_without_state():
    policy = Scripted(lambda obs: obs["noise"].unsqueeze(1), lambda obs: obs["noise"][:, 0])
    first, second = (Collector([toy("forgetful", 4)], policy, decisions=5) for _ in range(2))
    assert second.load_state_dict(first.state_dict()) is True
