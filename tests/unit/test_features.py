"""What a frozen trunk made of an observation while sampling is what training reads: nothing is encoded twice."""

from dataclasses import replace

import pytest
import torch

from embodied_rl.config import build_recipe
from embodied_rl.measure import Clock
from embodied_rl.session import Session
from embodied_rl.types import FEATURES


def session(likelihood, pipeline=1, **algorithm):
    policy = {"type": "tiny_vla_flow", "likelihood": likelihood, "width": 16, "layers": 1, "heads": 2, "channels": 8, "chunk": 2}
    made = Session.build(build_recipe({
        "env": {"type": "target", "max_steps": 6},
        "policy": policy | {"glances": 2, "denoising_steps": 2},
        "algorithm": {"type": "ppo", "update": {"epochs": 2, "minibatches": 2}} | algorithm,
        "collect": {"copies": 16, "decisions": 5, "pipeline": pipeline},
        "threads": 1, "device": "cpu",
    }))  # fmt: skip
    with torch.no_grad():
        for p in made.policy.parameters():
            p += 0.05 * torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel()))
    return made


def weights(s):
    return {k: v.clone() for k, v in s.policy.state_dict().items()}


def same(a, b):
    return all(torch.equal(x, b[k]) for k, x in a.items())


@pytest.mark.parametrize("algorithm", [{}, {"loss": {"kl": {"coef": 0.1}}}], ids=["plain", "reference"])
@pytest.mark.parametrize("pipeline", [1, 2])
def test_training_on_features_moves_the_weights_as_training_on_pictures_does_bit_for_bit(pipeline, algorithm):
    kept, again = (session("latent", pipeline, **algorithm) for _ in range(2))
    before, real = weights(kept), again.collector.collect
    again.collector.collect = lambda: replace(real(), features=None)
    for _ in range(3):
        a, b = kept.iterate(Clock()).reduce(), again.iterate(Clock()).reduce()
        assert {k: v for k, v in a.items() if not k.startswith("perf/")} == {
            k: v for k, v in b.items() if not k.startswith("perf/")
        }
    assert a["sync/logp_gap_mean"] == 0
    assert same(weights(kept), weights(again)) and not same(weights(kept), before)
    kept.close(), again.close()


def test_with_a_frozen_trunk_an_update_encodes_nothing():
    for likelihood, epochs in (("latent", 0), ("sde", 2)):
        s = session(likelihood)
        rollout = s.collector.collect()
        calls, real = [], s.policy.trunk.prefix
        s.policy.trunk.prefix = lambda obs, calls=calls, real=real: calls.append(1) or real(obs)
        s.updater.update(rollout, s.credit(rollout), progress=0.0)
        assert len(calls) == 2 * epochs
        assert (rollout.features is None) == (likelihood == "sde")
        s.close()


def test_a_rollout_keeps_the_pictures_beside_the_features():
    s = session("latent")
    rollout = s.collector.collect()
    assert rollout.features.shape == (5, 16, 16)
    assert set(rollout.constants) == {"picture", "state"}
    seen = {k: v[rollout.episode.flatten()] for k, v in rollout.constants.items()}
    summary = s.policy.trunk.prefix(seen)[0]
    torch.testing.assert_close(rollout.features.flatten(0, 1), summary.detach())
    obs = {FEATURES: rollout.features.flatten(0, 1)}
    given = s.policy.evaluate(obs, rollout.units.flatten(0, 1))
    assert torch.equal(given.logp.detach(), rollout.logp.flatten(0, 1))
    assert torch.equal(given.value.detach(), rollout.value.flatten())
    assert rollout.to(torch.device("cpu")).features is rollout.features
    s.close()
