"""Small VLA policies in float32: `evaluate` repeats the log-probabilities of `act`, and a decision looks at what is seen once."""

import pytest
import torch

from embodied_rl import registry
from embodied_rl.types import ActionSpec, TensorSpec
from tests.kit import CPU, spec

OBSERVATION = {
    "front": TensorSpec((16, 16, 3), torch.uint8, low=0, high=255),
    "state": TensorSpec((3,)),
    "instruction": TensorSpec((4,), torch.int64, low=0, high=9, constant=True),
}
SMALL = {"width": 32, "heads": 2, "layers": 2, "channels": 8, "glances": 2, "chunk": 2}
HEADS = {
    "flow": ("tiny_vla_flow", {}),
    "flow, one step": ("tiny_vla_flow", {"stochastic": "one"}),
    "learned": ("tiny_vla_flow", {"likelihood": "learned"}),
    "diffusion": ("tiny_vla_flow", {"process": "diffusion", "noise": 1.0}),
    "diffusion, one step": ("tiny_vla_flow", {"process": "diffusion", "stochastic": "one"}),
    "flow, by action": ("tiny_vla_flow", {"units": "action"}),
    "learned, one step, by action": ("tiny_vla_flow", {"likelihood": "learned", "stochastic": "one", "units": "action"}),
    "diffusion, by action": ("tiny_vla_flow", {"process": "diffusion", "units": "action"}),
    "cfm": ("tiny_vla_flow", {"likelihood": "cfm"}),
    "cfm, one sample": ("tiny_vla_flow", {"likelihood": "cfm", "samples": 1}),
    "latent": ("tiny_vla_flow", {"likelihood": "latent"}),
    "tokens": ("tiny_vla_tokens", {"bins": 16}),
    "autoregressive": ("tiny_vla_tokens", {"bins": 16, "decoding": "autoregressive"}),
}
MOST = 48


@pytest.fixture(params=HEADS)
def policy(request):
    """A policy whose every parameter matters."""
    name, config = HEADS[request.param]
    module = registry.load("policy", name)
    torch.manual_seed(0)
    made = module.build(module.Config(**SMALL | config), env=spec(OBSERVATION, ActionSpec("continuous", 3)), device=CPU)
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn_like(p)
    return made


def look(n):
    g = torch.Generator().manual_seed(0)
    return {
        "front": torch.randint(0, 256, (n, 16, 16, 3), generator=g).to(torch.uint8),
        "state": torch.randn(n, 3, generator=g),
        "instruction": torch.randint(0, 10, (n, 4), generator=g),
    }


@pytest.mark.parametrize("n", [1, 7, 16, MOST])
def test_evaluate_repeats_the_log_probabilities_of_act_bit_for_bit(policy, n):
    obs = look(n)
    out = policy.act(obs, generator=torch.Generator().manual_seed(1))
    assert out.logp.dtype == torch.float32
    for entropy in (True, False):
        given = policy.evaluate(obs, out.units.clone(), entropy=entropy)
        assert torch.equal(given.logp.detach(), out.logp), float((given.logp - out.logp).abs().max())


@pytest.mark.parametrize("size", [1, 7, 16, 31])
def test_so_it_does_in_minibatches_of_any_size_and_order(policy, size):
    obs, g = look(MOST), torch.Generator().manual_seed(1)
    out = policy.act(obs, generator=g)
    units, order = out.units.clone(), torch.randperm(MOST, generator=g)
    for rows in order.split(size):
        logp = policy.evaluate({k: v[rows] for k, v in obs.items()}, units[rows]).logp.detach()
        assert torch.equal(logp, out.logp[rows]), float((logp - out.logp[rows]).abs().max())


@pytest.mark.parametrize("greedy", [False, True])
def test_what_is_seen_is_encoded_once_per_decision(policy, greedy, monkeypatch):
    prefix, suffix = policy.trunk.prefix, policy.trunk.suffix
    calls = []
    monkeypatch.setattr(policy.trunk, "prefix", lambda obs: calls.append("prefix") or prefix(obs))
    monkeypatch.setattr(policy.trunk, "suffix", lambda *a, **k: calls.append("suffix") or suffix(*a, **k))
    policy.act(look(3), generator=torch.Generator().manual_seed(1), greedy=greedy)
    assert calls.count("prefix") == 1
    # While the head is asked for every denoising step, or token.
    passes = getattr(policy.config, "denoising_steps", policy.num_units if getattr(policy, "autoregressive", False) else 1)
    assert calls.count("suffix") >= passes
