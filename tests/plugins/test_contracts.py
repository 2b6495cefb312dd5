"""The contract over every file in envs/ and policies/: a new file is tried without being named here."""

import pytest
import torch

from embodied_rl import registry
from embodied_rl.check import check_env, check_policy
from embodied_rl.errors import MissingExtraError
from tests.kit import TOYS
from tests.toys import echo
from tests.toys.tiny_lm import tiny_lm

REACHER = TOYS.parents[1] / "examples" / "reacher"
ENV_SETTINGS = {
    "gymnasium": [["id=HalfCheetah-v5", "max_steps=60"], ["id=CartPole-v1"], ["id=Pendulum-v1", "max_steps=40"], ["id=FrozenLake-v1"]],
    "text": [["model=TINY_LM", "tasks=[calculator, {task: arithmetic, digits: [1, 3]}]", "max_context=300", "overlong=4"], ["model=TINY_LM"]],
    "isolated": [[f"simulator={TOYS / 'foreign' / 'point.py'}", "workers=1"]],
    "envpool": [["id=HalfCheetah-v4", "max_steps=60"], ["id=CartPole-v1"], ["id=FetchReach-v4", "reward_terms=true"], ["id=[CartPole-v0, CartPole-v1]", "instructions={CartPole-v0: soon, CartPole-v1: later}"]],
    "tabletop": [[], ["physics=warp", "max_steps=6"]],
    "mjcf": [
        [f"scene={REACHER / 'reacher.xml'}", f"task={REACHER / 'task.py'}:Reach", *engine] for engine in (["max_steps=12"], ["max_steps=6", "physics=warp"])
    ],
    "mixture": [
        ["missing=zeros", "parts=[{env: {type: target, max_steps: 12}, action: [5, 2]}, {env: {type: tabletop, tasks: [reach, push], max_steps: 12}, weight: 2}]"],
        ["parts=[{env: {type: gymnasium, id: CartPole-v1, max_steps: 30}}, {name: longer, env: {type: gymnasium, id: CartPole-v1, max_steps: 40}}]"],
    ],
    "maniskill": [["task=PushCube-v1", "max_steps=6"]],
}
"""Envs that need settings; any other is tried as it comes."""
INSTALLED_APART = {"libero": "tests/sim/test_libero.py"}
"""Envs with a Python of their own, and the tests that try them where it is installed."""
POLICY_SETTINGS = {
    "mlp": [
        [],
        ["std=state", "squash=true", "critic.kind=hl_gauss"],
        ["chunk=3", "critic.kind=none", "attention_heads=0"],
        ["critic.share=all", "normalize_obs=false"],
        ["critic.share=nothing", "hidden=[16]"],
    ],
    "tiny_vla_flow": [[], ["likelihood=latent"], ["process=diffusion"], ["likelihood=cfm"], ["likelihood=learned", "stochastic=one"], ["units=action", "log_prob=mean"]],
    "tiny_vla_tokens": [[], ["decoding=autoregressive"], ["critic.kind=hl_gauss"]],
    "causal_lm": [["model=TINY_LM", "temperature=0.8"], ["model=TINY_LM", "lora=2", "attention=eager"]],
}
"""Variants worth trying; any other policy is tried as it comes."""


def cases(kind, settings):
    here = [name for name in registry.names(kind) if name not in INSTALLED_APART]
    return [(name, overrides) for name in here for overrides in settings.get(name, [[]])]


def label(x):
    return x if isinstance(x, str) else " ".join(x) or "defaults"


def load_or_skip(kind, name):
    try:
        registry.load(kind, name)
    except MissingExtraError as error:
        pytest.skip(str(error))


def broken(findings):
    return [f"{f.name}: {f.detail}" for f in findings if f.ok is False]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_lm(tmp_path_factory.mktemp("model")))


@pytest.mark.parametrize(("name", "overrides"), cases("env", ENV_SETTINGS), ids=label)
def test_every_env_keeps_the_contract(name, overrides, model):
    load_or_skip("env", name)
    try:
        findings = check_env(name, [text.replace("TINY_LM", model) for text in overrides])
    except MissingExtraError as error:
        pytest.skip(str(error))
    assert broken(findings) == []
    assert sum(f.ok is True for f in findings) >= 12


@pytest.mark.parametrize(("name", "overrides"), cases("policy", POLICY_SETTINGS), ids=label)
def test_every_policy_keeps_the_contract(name, overrides, model):
    load_or_skip("policy", name)
    env = echo.Echo(echo.Config(model=model), 64, torch.device("cpu")).spec if "model=TINY_LM" in overrides else None
    findings = check_policy(name, [text.replace("TINY_LM", model) for text in overrides], env=env)
    assert broken(findings) == []
    assert sum(f.ok is True for f in findings) >= 10


def test_nothing_is_left_out():
    assert {name for name, _ in cases("env", ENV_SETTINGS)} | INSTALLED_APART.keys() == set(registry.names("env")) >= {"gymnasium", "envpool", "tabletop"}
    assert {name for name, _ in cases("policy", POLICY_SETTINGS)} == set(registry.names("policy")) >= {"mlp"}
