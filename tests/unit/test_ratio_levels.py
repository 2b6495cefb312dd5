"""Every ratio level through the engine with every vision-language-action policy, and what their units cannot give a loss."""

import math

import pytest
import torch

from embodied_rl.errors import CapabilityError
from embodied_rl.measure import Clock
from embodied_rl.session import Session
from tests.resume import lab

SMALL = {"chunk": 2, "width": 16, "heads": 2, "layers": 1}
EYE = {"channels": 8, "glances": 2}
POLICIES = {
    "tokens, parallel": {"type": "tiny_vla_tokens", "bins": 8, **SMALL, **EYE},
    "tokens, autoregressive": {"type": "tiny_vla_tokens", "bins": 8, "decoding": "autoregressive", **SMALL, **EYE},
    "flow": {"type": "tiny_vla_flow", "denoising_steps": 3, **SMALL, **EYE},
    "hf_vla": {"type": "hf_vla", "bins": 8, **SMALL},
    "pi0": {"type": "pi0", "chunk": 2, "denoising_steps": 3},
}
OF_STEPS = ("flow", "pi0")
CELLS = {"unit": None, "action": 2, "decision": 1, "trajectory": 1}
"""Ratios per decision; None: as many as units."""


def session(policy, **loss):
    if policy["type"] in ("hf_vla", "pi0"):
        pytest.importorskip("transformers")
    return Session.build(lab.recipe(
        policy=policy, env={"type": lab.seen()[0]}, collect={"copies": 4, "decisions": 4},
        algorithm={"loss": loss, "update": {"epochs": 1, "minibatches": 2}},
    ))  # fmt: skip


@pytest.mark.parametrize("level", CELLS)
@pytest.mark.parametrize("name", POLICIES)
def test_an_update_at_every_ratio_level(name, level):
    if name in OF_STEPS and level == "action":
        with pytest.raises(CapabilityError, match="ratio action takes one ratio per action, and every unit"):
            session(POLICIES[name], ratio=level)
        return
    s = session(POLICIES[name], ratio=level)
    before = {k: v.clone() for k, v in s.policy.state_dict().items()}
    rollout = s.collector.collect()
    weight = s.updater.loss.weights(None, rollout.episode.flatten(), s.policy.num_units)
    assert weight.shape == (16, CELLS[level] or s.policy.num_units)
    row = s.iterate(Clock()).reduce()
    assert row["sync/logp_gap_mean"] == 0, "the first step is measured before a weight has moved"
    assert row["actor/grad_norm"] > 0 and all(map(math.isfinite, row.values()))
    after = s.policy.state_dict()
    assert any(not torch.equal(v, before[k]) for k, v in after.items())
    assert all(bool(v.isfinite().all()) for v in after.values())
    s.close()


NOISE = {
    "flow, sde": ({"type": "tiny_vla_flow"}, False),
    "flow, diffusion": ({"type": "tiny_vla_flow", "process": "diffusion"}, False),
    "flow, cfm": ({"type": "tiny_vla_flow", "likelihood": "cfm"}, False),
    "flow, learned": ({"type": "tiny_vla_flow", "likelihood": "learned"}, True),
    "flow, latent": ({"type": "tiny_vla_flow", "likelihood": "latent"}, True),
    "pi0, sde": ({"type": "pi0"}, False),
    "pi0, learned": ({"type": "pi0", "likelihood": "learned"}, True),
    "hf_vla, flow": ({"type": "hf_vla", "head": "flow"}, False),
    "tokens": ({"type": "tiny_vla_tokens", "bins": 8}, True),
}


@pytest.mark.parametrize("name", NOISE)
def test_an_entropy_bonus_is_for_entropies_that_weights_move(name):
    own, moves = NOISE[name]
    sizes = {} if own["type"] == "pi0" else SMALL | ({} if own["type"] == "hf_vla" else EYE)
    policy = {"chunk": 2, **sizes, **own}
    if not moves:
        with pytest.raises(CapabilityError, match=r"entropy_coef \(0.01\) does nothing here, because no weight of the policy"):
            session(policy, entropy_coef=0.01)
        return
    s = session(policy, entropy_coef=0.01)
    obs = {k: torch.zeros(4, *o.shape, dtype=o.dtype) for k, o in s.collector.spec.observation.items()}
    units = s.policy.act(obs, generator=torch.Generator().manual_seed(0)).units.clone()
    entropy = s.policy.evaluate(obs, units).entropy
    assert entropy.requires_grad
    entropy.sum().backward()
    assert any(p.grad is not None and bool(p.grad.ne(0).any()) for p in s.policy.parameters())
    s.close()
