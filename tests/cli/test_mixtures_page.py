"""docs/mixtures.md: its examples are joined as printed; LIBERO's adapter then drives a world that stands still."""

import json
import re
from pathlib import Path

import pytest
import torch
import yaml

from embodied_rl import registry
from embodied_rl.envs._words import encode_words
from embodied_rl.envs.mixture import Config, build
from tests.kit import CPU, TOYS

PAGE = (Path(__file__).resolve().parents[2] / "docs" / "mixtures.md").read_text()
FIRST, ACTIONS = (yaml.safe_load(text)["env"] for text in re.findall(r"```yaml\n(.*?)```", PAGE, re.DOTALL))
LIBERO, ARM, SAWYER = 0, 1, 4
"""The first task of each part of the second example; the arm has three."""


def joined(node, copies):
    return build(Config.model_validate_json(json.dumps(node)), num_envs=copies, device=CPU, split="train", seed=0)


@pytest.fixture
def without_libero(monkeypatch, tmp_path):
    """LIBERO's env, with its own Python, assets and world replaced."""
    libero = registry.load("env", "libero")
    real, stand_in = libero.foreign_of, TOYS / "foreign" / "libero.py"

    def foreign(config, where, simulator, settings, *, sim, **more):
        return real(config, where, stand_in, settings, **more)

    monkeypatch.setattr(libero, "foreign_of", foreign)
    monkeypatch.setattr(libero, "find_assets", lambda given: tmp_path)


def test_the_first_example_is_joined():
    env = joined(FIRST, 4)
    assert env.spec.tasks == ("arm.reach", "arm.push", "toy.target")
    assert {"toy shows 'state' as 'wanted'", "'wanted' is filled with zeros in arm"} <= set(env.conformance)
    env.close()


def test_the_example_of_actions_is_one_batch_for_a_policy_that_reads_words_and_pictures(without_libero):
    pytest.importorskip("envpool")
    env = joined(ACTIONS, 3)
    try:
        report = "\n".join(env.conformance)
        for line in (
            "'instruction' of arm is padded with zeros from 14 to 24 word ids",
            "'instruction' of sawyer is padded with zeros from 16 to 24 word ids",
            "'agentview' is filled with zeros in sawyer",
            "gripper is closes_at_plus in libero and opens_at_plus in arm: arm takes the gripper times -1",
            "metres is 0.05 in libero and 0.02 in arm: arm takes the position times 2.5; beyond 0.4 it is cut",
            "radians is 0.5 in libero and 0.05 in arm, and arm takes the numbers as they are",
        ):
            assert line in report
        shapes = {name: entry.shape for name, entry in env.spec.observation.items()}
        assert shapes["agentview"] == shapes["wrist"] == (224, 224, 3) and shapes["instruction"] == (24,)
        everyone = torch.ones(3, dtype=torch.bool)
        env.reset(everyone, torch.arange(3) * 2, torch.tensor([LIBERO, ARM, SAWYER]))
        seen, texts = env.observe(), env.instructions()
        assert len(texts[0].split()) == 17 and texts[2] == "Reach a goal position"
        assert seen["instruction"].tolist() == [list(encode_words(text, 24, "a test", "")) for text in texts]
        assert [bool(x.any()) for x in seen["agentview"]] == [True, True, False]
        module = registry.load("policy", "tiny_vla_tokens")
        policy = module.build(module.Config(width=16, heads=2, layers=1, chunk=2, bins=8), env=env.spec, device=CPU)
        step = env.step(policy.act(seen, generator=torch.Generator().manual_seed(0)).action[:, 0])
        assert step.invalid is None or not step.invalid.any()
        assert bool(step.reward.isfinite().all())
    finally:
        env.close()
