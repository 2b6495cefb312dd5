"""Every recipe of configs/method learns to spell; thresholds are on the median of three seeds.

A reply of at most three ids out of five answers one of three questions: the untrained policy is right in 4 % of its
replies. One recipe is a file, laid over the toy by `extends:` as a user would. Options on top of a method that would learn
alone must show a sign of their work as well, which the method alone does not show.
"""

import statistics
import tempfile
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import torch

from embodied_rl.config import load_recipe, packaged_configs
from embodied_rl.curriculum import StartPool
from embodied_rl.measure import Clock
from embodied_rl.session import Session
from tests.kit import TOYS

pytestmark = pytest.mark.learning
SEEDS = (0, 1, 2)
REGULARISERS = {"kl_in_loss": "loss.kl.coef=0.5", "kl_in_reward": "loss.kl.coef=0.5", "entropy": "loss.entropy_coef=1.0"}
"""Recipe -> so much of it that nothing else counts."""
ON_TOP = dict.fromkeys(["ead", "ghpo", "knapsack", "curriculum"], "grpo") | dict.fromkeys(REGULARISERS, "rloo")
"""Recipes that need a method below them, and which they get."""
GUIDED = ["ghpo", "relift", "rl_plus"]
"""Recipes that learn from solutions."""
PARTS = sorted({path.stem for path in (packaged_configs() / "method").glob("*.yaml")} - ON_TOP.keys() - {*GUIDED})
PARTS += [name for name in ON_TOP if name not in GUIDED]

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
    "ttrl": ["policy.lean=2.0"],
    "evol_rl": ["policy.lean=2.0"],
    "dr_grpo": ["algorithm.loss.constant_units=3"],
    "canon": ["algorithm.loss.constant_units=3"],
    "ppo_units": ["policy.critic=unit"],
    "spear": ["algorithm.replay.ramp=10"],
    "prorl": ["algorithm.loss.kl.reset_every=10"],
    "ead": ["collect.anneal={plain: 1, delay: 3.0, floor: 0.3, delay_growth: 0.0}"],
}
"""What a recipe says must be set to the env or the length of the run."""
FAR = ("env.letters=20", "env.words=1", "env.told=false", "policy.reads_back=false")
"""A word that nobody finds by chance; what is learned with its beginning given holds without."""


class Watched:
    """A session, the temperatures it sampled with, and the last rollout with the success rates that it was drawn by."""

    def __init__(self, session: Session) -> None:
        self.session, self.temperature, self.seeds, self.rates = session, None, None, None
        collect, act = session.collector.collect, session.policy.act

        def watched_collect():
            sampler = session.collector.sampler
            self.rates = sampler.success.clone()
            rollout = collect()
            self.seeds = rollout.finished["seed"]
            return rollout

        def watched_act(*args, **kwargs):
            self.temperature = session.policy.temperature
            return act(*args, **kwargs)

        session.collector.collect, session.policy.act = watched_collect, watched_act


Row = dict[str, float]


def cold_at_the_end(watched: Watched, row: Row) -> float:
    """1 where the first id was sampled at temperature 1, and the last one below."""
    t = watched.temperature
    return float(t is not None and float(t[0]) == 1.0 and float(t[-1]) < 1.0)


def near_one_half(watched: Watched, row: Row) -> float:
    """p (1 - p) of the starts that were played over that of all starts: 1 without preference."""
    sampler, of_all = watched.session.collector.sampler, watched.rates * (1 - watched.rates)
    return float(of_all[sampler._find(watched.seeds)].mean() / of_all.mean()) if isinstance(sampler, StartPool) else 1.0


def reference_is_the_policy(watched: Watched, row: Row) -> float:
    updater = watched.session.updater
    if updater.reference is None:
        return 0.0
    pairs = zip(updater.policy.parameters(), updater.reference.parameters(), strict=True)
    return float(all(torch.equal(a, b) for a, b in pairs))


SIGNS: dict[str, tuple[Callable[[Watched, Row], float], float]] = {
    "ead": (cold_at_the_end, 1.0),
    "curriculum": (near_one_half, 1.04),  # observed 1.09; starts drawn alike have 1.00 +- 0.02
    "knapsack": (lambda watched, row: float(row.get("rollout/group_size_max", 0) > 8), 0.3),
    "spear": (lambda watched, row: float(row["rollout/replayed_decisions"] > 0 > row["actor/replay_loss"]) if "actor/replay_loss" in row else 0.0, 0.5),
    "dapo": (lambda watched, row: float(row["rollout/episodes"] > 64), 0.5),
    "prorl": (reference_is_the_policy, 2 / 25),
}  # fmt: skip
"""Recipe -> what only its option does in an update, and how much of it the mean over all updates must show."""


@cache
def train(name: str, seed: int, *changes: str) -> tuple[list[dict[str, float]], list[dict[str, float]]]:
    """Metrics and signs (see `SIGNS`) of every update."""
    updates, lr, _ = SLOWER.get(name, (25, 0.15, 0.85))
    below = f"method/{ON_TOP[name]}.yaml, " if name in ON_TOP else ""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "recipe.yaml"
        path.write_text(
            f"extends: [{below}method/{name}.yaml]\nseed: {seed}\nthreads: 1\nenv: {{type: {TOYS}/words.py}}\npolicy: {{type: {TOYS}/table.py}}\n"
            f"collect: {{copies: 64, decisions: 1}}\nalgorithm: {{update: {{lr: {lr}, epochs: 2, minibatches: 1}}}}\n"
            "log: {tensorboard: false, progress: false}\n"
        )
        session = Session.build(load_recipe(path, [*CHANGES.get(name, ()), *changes]).recipe)
    watched, rows, signs = Watched(session), [], []
    for _ in range(updates):
        rows.append(session.iterate(Clock()).reduce())
        signs.append({of: sign(watched, rows[-1]) for of, (sign, _) in SIGNS.items()})
    session.close()
    return rows, signs


def score(name: str, seed: int, *changes: str) -> float:
    """Mean over the last five updates of the share of right replies, with the sampling policy."""
    return statistics.mean(row["rollout/success_once_rate"] for row in train(name, seed, *changes)[0][-5:])


@pytest.mark.parametrize("name", PARTS)
def test_a_recipe_learns_to_spell(name):
    scores = [score(name, seed) for seed in SEEDS]
    assert statistics.median(scores) >= SLOWER.get(name, (25, 0.15, 0.85))[2], scores


@pytest.mark.parametrize("name", SIGNS)
def test_an_option_does_its_work_and_the_method_below_does_not(name):
    seen, without = (statistics.mean(s[name] for seed in SEEDS for s in train(of, seed)[1]) for of in (name, "grpo"))
    assert without < SIGNS[name][1] <= seen, (without, seen)


@pytest.mark.parametrize("name", GUIDED)
def test_solutions_lead_where_nobody_arrives_by_chance(name):
    # One reply of 9,261 is right: the method alone has 0.0 with every seed, those with solutions 0.61 - 0.98.
    scores, alone = ([score(of, seed, *FAR) for seed in SEEDS] for of in (name, "grpo"))
    assert statistics.median(alone) <= 0.05 and statistics.median(scores) >= 0.5, (scores, alone)


@pytest.mark.parametrize("name", REGULARISERS)
def test_too_much_of_a_regulariser_holds_the_policy_back(name):
    assert score(name, 0, f"algorithm.{REGULARISERS[name]}") < 0.5 < score(name, 0)
