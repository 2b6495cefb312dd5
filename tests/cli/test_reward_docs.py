"""The reward model that docs/rewards.md shows is run, not trusted."""

import re
from pathlib import Path

import torch

from embodied_rl.config import build_recipe
from embodied_rl.measure import Clock
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
        p = (1 - e.obs["position"][:, 0].abs() / 2).clamp(0, 1)
        torch.testing.assert_close(extra[e.first : e.first + len(e), e.copy], 0.9 * p[1:] - p[:-1], rtol=0, atol=1e-6)
        paid += len(e)
    assert paid == 120
    row = session.iterate(Clock()).reduce()
    assert {"rollout/progress_reward_mean", "rollout/progress_judged_rate"} <= row.keys()
    session.close()
