"""The reward model that docs/rewards.md shows is run, not trusted; one that reads gets the sentence that was asked."""

import re
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from embodied_rl import registry
from embodied_rl.config import build_recipe
from embodied_rl.errors import ShapeError
from embodied_rl.measure import Clock
from embodied_rl.selection import columns, join
from embodied_rl.session import Session
from embodied_rl.shaping import episodes

ROOT = Path(__file__).parents[2]


def block(page):
    (found,) = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(encoding="utf-8"), flags=re.DOTALL)
    return found


def test_the_reward_model_in_one_file_pays_for_getting_nearer(tmp_path):
    for name, page in (("walk.py", "README.md"), ("nearer.py", "docs/rewards.md")):
        (tmp_path / name).write_text(block(page), encoding="utf-8")
    recipe = build_recipe(
        {
            "env": {"type": str(tmp_path / "walk.py"), "reward": "sparse"},
            "policy": {"type": "mlp", "hidden": [8]},
            "algorithm": {"type": "ppo", "credit": {"gamma": 0.9}},
            "collect": {"copies": 4, "decisions": 30},
            "reward": {"type": str(tmp_path / "nearer.py"), "far": 2.0},
        }
    )
    session = Session.build(recipe)
    rollout = session.collector.collect()
    shaped, _ = session.shaping(rollout)
    extra, paid = shaped.reward - rollout.reward, 0
    for e in episodes(rollout):
        assert e.instruction is None, "this env does not say what it asks"
        p = (1 - e.obs["position"][:, 0].abs() / 2).clamp(0, 1)
        torch.testing.assert_close(extra[e.first : e.first + len(e), e.copy], 0.9 * p[1:] - p[:-1], rtol=0, atol=1e-6)
        paid += len(e)
    assert paid == 120
    row = session.iterate(Clock()).reduce()
    assert {"rollout/progress_reward_mean", "rollout/progress_judged_rate"} <= row.keys()
    session.close()


READS = """
from pydantic import Field
import torch
from embodied_rl.rewards import RewardConfig, RewardModel

class Config(RewardConfig):
    type: str = "./reads.py"
    use: str = "alone"
    likes: str = "red"

class Reads(RewardModel):
    def __init__(self, likes):
        self.likes = likes

    def judge(self, episodes):
        return [torch.full((len(e) + 1,), float(self.likes in e.instruction.split())) for e in episodes]

def build(config, *, env, device):
    return Reads(config.likes)
"""


def dots(folder, *, mode, pipeline=1, broken=False):
    """A session in the simulator of docs/vla.md, judged by READS; and its words."""
    page = (ROOT / "docs" / "vla.md").read_text(encoding="utf-8")
    text = re.search(r"^`dots.py`:\n\n```python\n(.*?)^```", page, flags=re.DOTALL | re.MULTILINE)[1]
    if broken:
        text = text.replace("for row in self.words.tolist()]", "for row in self.words.tolist()[1:]]")
    (folder / "dots.py").write_text(text, encoding="utf-8")
    (folder / "reads.py").write_text(READS, encoding="utf-8")
    small = {"width": 16, "heads": 2, "layers": 1, "channels": 8, "glances": 2, "chunk": 1, "critic": {"kind": "none"}}
    session = Session.build(build_recipe({
        "env": {"type": str(folder / "dots.py"), "max_steps": 3},
        "policy": {"type": "tiny_vla_tokens", "bins": 8, **small},
        "algorithm": {"type": "reinforce"},
        "collect": {"copies": 8, "decisions": 3, "mode": mode, "pipeline": pipeline},
        "reward": {"type": str(folder / "reads.py")},
    }))  # fmt: skip
    return session, registry.load("env", str(folder / "dots.py")).WORDS


@pytest.mark.parametrize("pipeline", [1, 2])
def test_a_reward_model_reads_the_sentence_that_the_env_asked(tmp_path, pipeline):
    session, words = dots(tmp_path, mode="episodes", pipeline=pipeline)
    rollouts = [session.collector.collect() for _ in range(3)]
    some = columns(rollouts[2], torch.tensor([0, 3]))  # the sentences of those that are left out stay with it
    for e in episodes(rollouts[0]):
        assert e.instruction == " ".join(words[i] for i in e.obs["instruction"][0].tolist() if i)
    apart, together = [e for r in (some, *rollouts) for e in episodes(r)], episodes(join([some, *rollouts]))
    assert [e.instruction for e in together] == [e.instruction for e in apart]
    assert len(together) == 26 and len({e.instruction for e in together}) > 8
    assert [e.instruction for e in apart[:2]] == [rollouts[2].instructions[0], rollouts[2].instructions[3]]
    bare = [replace(r, constants={}) for r in (some, *rollouts)]
    assert [e.instruction for e in episodes(join(bare))] == [e.instruction for e in apart], "also where no entry is constant"
    shaped, _ = session.shaping(rollouts[0])
    red = (rollouts[0].constants["instruction"] == words.index("red")).any(1).float()
    torch.testing.assert_close((shaped.reward * shaped.valid).sum(0), red)
    assert 0 < float(red.mean()) < 1
    session.close()


def test_an_episode_that_begins_within_a_rollout_or_before_it_has_its_own_sentence(tmp_path):
    session, words = dots(tmp_path, mode="episodes")
    session.collector.mode, session.collector.decisions = "stream", 7
    for _ in range(3):
        for e in episodes(session.collector.collect()):
            assert e.instruction == " ".join(words[i] for i in e.obs["instruction"][0].tolist() if i)
    session.close()


def test_instructions_for_some_copies_only_are_refused(tmp_path):
    session, _ = dots(tmp_path, mode="episodes", broken=True)
    with pytest.raises(ShapeError, match=r"the env's instructions\(\) gave 7 sentences, expected 8, one for each copy"):
        session.collector.collect()
    session.close()
