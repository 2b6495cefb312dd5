"""A frozen vision part encodes each picture once: training reads what it made of it while sampling, bit for bit."""

from dataclasses import replace

import pytest
import torch

from embodied_rl import registry
from embodied_rl.check import check_policy
from embodied_rl.measure import Clock
from embodied_rl.session import Session
from embodied_rl.types import FEATURES, ActionSpec, TensorSpec
from tests.kit import CPU, spec
from tests.resume import lab

pytest.importorskip("transformers")

HEAD = {"width": 16, "heads": 2, "layers": 1}
POLICIES = {
    "paligemma, tokens": {"type": "hf_vla", "freeze": "vision", **HEAD},
    "smolvlm, flow, all frozen, bfloat16": {
        "type": "hf_vla", "model": "tiny:smolvlm", "head": "flow", "freeze": "all", "dtype": "bfloat16", **HEAD},
    "qwen3_vl, autoregressive, adapters": {
        "type": "hf_vla", "model": "tiny:qwen3_vl", "decoding": "autoregressive", "bins": 8, "freeze": "vision", "lora": 2, **HEAD},
    "pi0": {"type": "pi0", "freeze": "vision", "likelihood": "learned", "denoising_steps": 2},
}  # fmt: skip
ENV = {
    "camera": TensorSpec((32, 32, 3), torch.uint8, low=0, high=255),
    "wrist": TensorSpec((32, 32, 3), torch.uint8, low=0, high=255),
    "joints": TensorSpec((4,)),
    "words": TensorSpec((5,), torch.int64, low=0, high=29, constant=True),
}


def make(name, env=None, **more):
    config = {**POLICIES[name], "chunk": 2, "encode_once": True, **more}
    module = registry.load("policy", config["type"])
    torch.manual_seed(0)
    return module.build(module.Config(**config), env=env or spec(ENV, ActionSpec("continuous", 3)), device=CPU)


def backbone(policy):
    return policy.backbone if hasattr(policy, "backbone") else policy.trunk.backbone


def look(n, seed=0, **more):
    g = torch.Generator().manual_seed(seed)
    pictures = {k: torch.randint(0, 256, (n, 32, 32, 3), generator=g, dtype=torch.uint8) for k in ("camera", "wrist")}
    return {**pictures, "joints": torch.randn(n, 4, generator=g), "words": torch.randint(0, 30, (n, 5), generator=g), **more}


@pytest.mark.parametrize("name", POLICIES)
def test_features_give_the_log_probabilities_of_pictures_in_batches_of_any_size(name):
    policy, plain, everything = make(name), make(name, encode_once=False), look(40)
    for n in (1, 16, 40):
        obs = {k: v[:n] for k, v in everything.items()}
        out, other = (p.act(obs, generator=torch.Generator().manual_seed(1)) for p in (policy, plain))
        assert other.features is None and torch.equal(out.logp, other.logp) and torch.equal(out.action, other.action)
        units, features = out.units.clone(), out.features.clone()
        for rows in torch.arange(n).split(7):
            part = {k: v[rows] for k, v in obs.items()}
            seen = policy.evaluate(part, units[rows])
            kept = policy.evaluate({FEATURES: features[rows]}, units[rows])
            assert torch.equal(kept.logp, seen.logp) and torch.equal(kept.value, seen.value)
            if name == "pi0":  # its own attention rounds by the size of the batch on some processors
                torch.testing.assert_close(kept.logp, out.logp[rows], atol=1e-5, rtol=0)
            elif policy.config.dtype == "float32":
                assert torch.equal(kept.logp, out.logp[rows])


@pytest.mark.parametrize("name", POLICIES)
def test_an_update_encodes_no_picture_and_moves_the_weights_as_if_it_did(name):
    def session():
        return Session.build(lab.recipe(
            policy={**POLICIES[name], "chunk": 2, "encode_once": True}, env={"type": lab.seen()[0]},
            algorithm={"update": {"epochs": 2, "minibatches": 2}}, collect={"copies": 4, "decisions": 4},
        ))  # fmt: skip

    kept, again = session(), session()
    real, seen = again.collector.collect, []
    again.collector.collect = lambda: replace(real(), features=None)
    for s, count in ((kept, 0), (again, 4)):
        body = backbone(s.policy)
        see = body.see
        body.see = lambda obs, see=see: seen.append(1) or see(obs)
        collect = s.collector.collect
        s.collector.collect = lambda collect=collect: (collect(), seen.clear())[0]
        for _ in range(2):
            s.iterate(Clock())
            assert len(seen) == count
    a, b = (s.policy.state_dict() for s in (kept, again))
    assert all(torch.equal(x, b[k]) for k, x in a.items())
    kept.close(), again.close()


@pytest.mark.parametrize("name", ["paligemma, tokens", "pi0"])
def test_what_only_a_simulator_knows_is_kept_as_well(name):
    env = spec({**ENV, "told": TensorSpec((3,), privileged=True)}, ActionSpec("continuous", 3))
    policy = make(name, env, critic={"reads": "privileged"})
    obs = look(5, told=torch.randn(5, 3))
    out = policy.act(obs, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        for p in policy.critic.parameters():
            p.add_(0.1)
    value = policy.evaluate({FEATURES: out.features.clone()}, out.units.clone()).value
    assert torch.equal(value, policy.value(obs)) and len(value.unique()) == 5
    assert policy.privileged_critic and torch.equal(value, policy.value(look(5, seed=1, told=obs["told"])))
    assert not make(name, env).privileged_critic
    del obs["told"]
    assert policy.act(obs, generator=None).features is None, "outside of simulation nothing is learned"


@pytest.mark.parametrize("name", POLICIES)
def test_the_contract_is_kept(name):
    config = {**POLICIES[name], "encode_once": True}
    findings = check_policy(config.pop("type"), [f"{k}={str(v).lower()}" for k, v in config.items()])
    assert [f"{f.name}: {f.detail}" for f in findings if f.ok is False] == []
    told = [f.detail for f in findings if "features" in f.name]
    assert told and "largest difference" in told[0]
