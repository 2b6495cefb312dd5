"""What a frozen trunk made of an observation while sampling is what training reads: nothing is encoded twice."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embodied_rl.config import build_recipe
from embodied_rl.measure import Clock
from embodied_rl.session import Session
from embodied_rl.types import FEATURES

ENVS = {"prefix": "target", "privileged": str(Path(__file__).parents[1] / "toys" / "whispered.py")}
"""By what the critic reads."""


def session(likelihood, pipeline=1, reads="prefix", **algorithm):
    policy = {"type": "tiny_vla_flow", "likelihood": likelihood, "width": 16, "layers": 1, "heads": 2, "channels": 8, "chunk": 2}
    made = Session.build(build_recipe({
        "env": {"type": ENVS[reads], "max_steps": 6},
        "policy": policy | {"glances": 2, "denoising_steps": 2, "critic": {"reads": reads}},
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
@pytest.mark.parametrize("reads", ENVS)
def test_training_on_features_moves_the_weights_as_training_on_pictures_does_bit_for_bit(reads, pipeline, algorithm):
    kept, again = (session("latent", pipeline, reads, **algorithm) for _ in range(2))
    before, real = weights(kept), again.collector.collect
    again.collector.collect = lambda: replace(real(), features=None)
    for _ in range(3):
        a, b = kept.iterate(Clock()).reduce(), again.iterate(Clock()).reduce()
        assert {k: v for k, v in a.items() if not k.startswith("perf/")} == {
            k: v for k, v in b.items() if not k.startswith("perf/")
        }
    assert a["sync/logp_gap_mean"] == 0
    assert same(weights(kept), weights(again)) and not same(weights(kept), before)
    assert kept.collector.collect().features is not None
    kept.close(), again.close()


@pytest.mark.parametrize("reads", ENVS)
def test_with_a_frozen_trunk_an_update_encodes_nothing(reads):
    for likelihood, epochs in (("latent", 0), ("sde", 2)):
        s = session(likelihood, reads=reads)
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


def test_what_only_a_simulator_knows_is_kept_beside_the_features():
    s = session("latent", reads="privileged")
    rollout = s.collector.collect()
    assert rollout.features.shape == (5, 16, 16 + 4)
    assert torch.equal(rollout.features[..., 16:], rollout.obs["told"])
    found = []
    seen = {k: v.flatten(0, 1) for k, v in rollout.obs.items()}
    seen |= {k: v[rollout.episode.flatten()] for k, v in rollout.constants.items()}
    for obs in ({FEATURES: rollout.features.flatten(0, 1)}, seen):
        given = s.policy.evaluate(obs, rollout.units.flatten(0, 1))
        assert torch.equal(given.logp.detach(), rollout.logp.flatten(0, 1))
        assert torch.equal(given.value.detach(), rollout.value.flatten()) and len(given.value.unique()) > 16
        trained = [p for p in s.policy.parameters() if p.requires_grad]
        found.append(torch.autograd.grad(given.logp.square().sum() + given.value.square().sum(), trained))
    assert all(torch.equal(a, b) and bool(a.any()) for a, b in zip(*found, strict=True))
    del seen["told"]
    assert s.policy.act(seen, generator=None, greedy=True).features is None, "outside of simulation nothing is learned"
    s.close()
