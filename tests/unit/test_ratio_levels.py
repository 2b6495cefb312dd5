"""Every ratio level through the engine with every vision-language-action policy, and what their units cannot give a loss."""

import math

import pytest
import torch

from embodied_rl.cells import by_cell
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
    "flow, by action": {"type": "tiny_vla_flow", "denoising_steps": 3, "units": "action", **SMALL, **EYE},
    "hf_vla": {"type": "hf_vla", "bins": 8, **SMALL},
    "hf_vla, flow by action": {"type": "hf_vla", "head": "flow", "denoising_steps": 3, "units": "action", **SMALL},
    "pi0": {"type": "pi0", "chunk": 2, "denoising_steps": 3},
    "pi0, by action": {"type": "pi0", "chunk": 2, "denoising_steps": 3, "units": "action"},
}
OF_STEPS = ("flow", "pi0")
CELLS = {"unit": None, "action": 2, "decision": 1, "trajectory": 1}
"""Ratios per decision; None: as many as units."""


def session(policy, env=None, **loss):
    if policy["type"] in ("hf_vla", "pi0"):
        pytest.importorskip("transformers")
    return Session.build(lab.recipe(
        policy=policy, env=env or {"type": lab.seen()[0]}, collect={"copies": 4, "decisions": 4},
        algorithm={"loss": loss, "update": {"epochs": 1, "minibatches": 2}},
    ))  # fmt: skip


@pytest.mark.parametrize("level", CELLS)
@pytest.mark.parametrize("name", POLICIES)
def test_an_update_at_every_ratio_level(name, level):
    if name in OF_STEPS and level == "action":
        with pytest.raises(CapabilityError, match="every unit of this policy covers the whole chunk: set policy.units: action"):
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


@pytest.mark.parametrize("level", ["decision", "trajectory"])
@pytest.mark.parametrize("name", ["hf_vla", "pi0"])
def test_groups_of_whole_episodes_teach_a_wrapped_model(name, level):
    pytest.importorskip("transformers")
    s = Session.build(lab.recipe(
        policy=POLICIES[name] | {"critic": {"kind": "none"}}, env={"type": lab.seen()[0], "max_steps": 5},
        collect={"copies": 8, "decisions": 4, "mode": "episodes", "group_size": 4},
        algorithm={"type": "grpo", "loss": {"ratio": level}, "update": {"epochs": 2, "minibatches": 1}},
    ))  # fmt: skip
    rollout = s.collector.collect()
    given, where = s.credit(rollout).advantage, rollout.valid
    assert s.recipe.algorithm.credit.returns == "trajectory" and bool((rollout.valid.sum(0) > 1).all())
    assert torch.equal(given[where], given[0].expand_as(given)[where]), "one advantage for all decisions of an episode"
    for group in given[0].view(2, 4):
        assert float(group.abs().sum()) > 0 and float(group.sum()) == pytest.approx(0, abs=1e-5)
    before = {k: v.clone() for k, v in s.policy.state_dict().items()}
    row = s.iterate(Clock()).reduce()
    assert row["sync/logp_gap_mean"] == 0 and row["actor/grad_norm"] > 0 and all(map(math.isfinite, row.values()))
    assert row["actor/kl_k3"] > 0, "the second epoch finds a policy that has moved"
    assert "critic/loss" not in row and any(not torch.equal(v, before[k]) for k, v in s.policy.state_dict().items())
    s.close()


ONE_UNIT = {
    "cfm": ({"type": "tiny_vla_flow", "likelihood": "cfm"}, "decision"),
    "latent": ({"type": "tiny_vla_flow", "likelihood": "latent"}, "decision"),
    "noise in the last step": ({"type": "tiny_vla_flow", "stochastic": "last"}, "decision"),
    "pi0, noise in one step": ({"type": "pi0", "stochastic": "one"}, "decision"),
    "actions of one number": ({"type": "mlp", "hidden": [8], "chunk": 2}, "action"),
}


@pytest.mark.parametrize("name", ONE_UNIT)
def test_a_mean_over_the_units_of_a_cell_is_refused_where_each_cell_is_one_unit(name):
    own, level = ONE_UNIT[name]
    sizes = {"tiny_vla_flow": SMALL | EYE, "pi0": {"chunk": 2}, "mlp": {}}[own["type"]]
    env = {"type": "gymnasium", "id": "Pendulum-v1"} if own["type"] == "mlp" else None
    with pytest.raises(CapabilityError, match=rf"reduce \(mean\) does nothing with ratio \({level}\) here, because every {level} of"):
        session(own | sizes, env=env, ratio=level, reduce="mean")
    # Over a trajectory it is a mean over decisions, and several units are there to be averaged.
    session(own | sizes, env=env, ratio="trajectory", reduce="mean").close()
    if own["type"] == "mlp":
        session(own | sizes, env=env, ratio="decision", reduce="mean").close()


def test_over_one_unit_sum_and_mean_are_the_same_number():
    x, mask = torch.randn(6, 1), torch.tensor([[True], [False]] * 3)
    for level, chunk, cells in (("decision", 1, x), ("action", 2, torch.randn(6, 2))):
        counts = mask.expand_as(cells)
        both = [by_cell(cells, counts, level, reduce, chunk, torch.arange(6)) for reduce in ("sum", "mean")]
        assert torch.equal(*both)


def test_units_that_move_those_before_them_are_not_credited_for_what_follows():
    recipe = lab.recipe(
        policy=POLICIES["flow, by action"] | {"critic": {"kind": "none"}}, env={"type": lab.seen()[0]},
        collect={"mode": "episodes", "copies": 4, "decisions": 4},
        algorithm={
            "type": "reinforce", "loss": {"ratio": "unit"},
            "credit": {"level": "unit", "returns": "return_to_go", "baseline": "none", "gamma": 1.0},
        },
    )  # fmt: skip
    with pytest.raises(CapabilityError, match=r"credit.level unit credits a unit for those behind it"):
        Session.build(recipe)


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
