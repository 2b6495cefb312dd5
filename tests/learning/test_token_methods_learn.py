"""Every recipe of configs/method learns to spell; thresholds are on the median of three seeds.

A reply of at most three ids out of five answers one of three questions: the untrained policy is right in 4 % of its
replies. One recipe is a file, laid over the toy by `extends:` as a user would.
"""

import statistics
from pathlib import Path

import pytest

from embodied_rl.config import load_recipe, packaged_configs
from embodied_rl.measure import Clock
from embodied_rl.session import Session
from tests.kit import TOYS

pytestmark = pytest.mark.learning
SEEDS = (0, 1, 2)
ON_TOP = {"ead": "grpo", "ghpo": "grpo", "knapsack": "grpo", "curriculum": "grpo"}
"""Recipes that change how is collected and need a method below them."""
PARTS = sorted({path.stem for path in (packaged_configs() / "method").glob("*.yaml")} - ON_TOP.keys()) + [*ON_TOP]

SLOWER = {
    "ppo_units": (50, 0.1, 0.85),  # 0.63 - 1.0: a fresh critic comes first
    "remax": (50, 0.1, 0.6),  # 0.69 - 0.99: half of the copies only set the baseline
    "ngrpo": (50, 0.1, 0.85),  # 0.61 - 1.0
    "nsr": (50, 0.1, 0.4),  # 0.48 - 0.98: it only learns what not to say
    "weighted_reinforce": (50, 0.1, 0.4),  # 0.44 - 0.99
}
"""Recipe -> (updates, step size, threshold), with the range over seeds 0 to 5; the others have (25, 0.15, 0.85)."""
CHANGES = {
    # Agreement only leads to what the policy leans to: it begins with 29 % right replies.
    "ttrl": "policy.lean=2.0",
    "evol_rl": "policy.lean=2.0",
    "dr_grpo": "algorithm.loss.constant_units=3",
    "canon": "algorithm.loss.constant_units=3",
    "ppo_units": "policy.critic=unit",
    "spear": "algorithm.replay.ramp=10",
    "prorl": "algorithm.loss.kl.reset_every=10",
    "ead": "collect.anneal={plain: 1, delay: 3.0, floor: 0.3, delay_growth: 0.0}",
}
"""What a recipe says must be set to the env or the length of the run."""


def train(name: str, seed: int, folder: Path, *, updates: int, lr: float) -> float:
    """Mean over the last five updates of the share of right replies, with the sampling policy."""
    path, below = folder / "recipe.yaml", f"method/{ON_TOP[name]}.yaml, " if name in ON_TOP else ""
    path.write_text(
        f"extends: [{below}method/{name}.yaml]\nseed: {seed}\nthreads: 1\nenv: {{type: {TOYS}/words.py}}\npolicy: {{type: {TOYS}/table.py}}\n"
        f"collect: {{copies: 64, decisions: 1}}\nalgorithm: {{update: {{lr: {lr}, epochs: 2, minibatches: 1}}}}\n"
        "log: {tensorboard: false, progress: false}\n"
    )
    changes = [CHANGES[name]] if name in CHANGES else []
    session = Session.build(load_recipe(path, changes).recipe)
    scores = [session.iterate(Clock()).value("rollout/success_once_rate") for _ in range(updates)]
    session.close()
    return statistics.mean(scores[-5:])


@pytest.mark.parametrize("name", PARTS)
def test_a_recipe_learns_to_spell(name, tmp_path):
    updates, lr, threshold = SLOWER.get(name, (25, 0.15, 0.85))
    scores = [train(name, seed, tmp_path, updates=updates, lr=lr) for seed in SEEDS]
    assert statistics.median(scores) >= threshold, scores
