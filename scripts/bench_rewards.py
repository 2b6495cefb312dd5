"""Do progress rewards help? The point of tests/toys with sparse success, with and without self-referential progress.

Two worlds: the goal of a task is always at the same place, or at another place in every episode. Per row: success while
training (mean over all updates, sampled) and greedy success after it (300 held-out starts), mean and range over seeds.
"""

from __future__ import annotations

import argparse
from contextlib import closing
from pathlib import Path
from statistics import mean

import torch

from embodied_rl.config import build_recipe
from embodied_rl.measure import Clock
from embodied_rl.session import Session
from embodied_rl.train import Suite

POINT = Path(__file__).resolve().parent.parent / "tests" / "toys" / "point.py"
PROGRESS = {"type": "self_referential", "entries": ["position"]}
METHODS = {
    "GRPO": {
        "policy": {"critic": {"kind": "none"}},
        "algorithm": {"type": "grpo", "loss": {"ratio": "unit"}, "update": {"lr": 3e-3, "epochs": 2}},
        "collect": {"copies": 64, "decisions": 8, "mode": "episodes", "group_size": 8},
    },
    "PPO": {
        "policy": {"critic": {"share": "nothing"}},
        "algorithm": {"type": "ppo", "credit": {"gamma": 0.95}, "update": {"lr": 1e-3}},
        "collect": {"copies": 64, "decisions": 16},
    },
}
CASES = [
    ("GRPO", "success alone", None),
    ("GRPO", "outcome, compare: task", PROGRESS),
    ("GRPO", "outcome, compare: group", PROGRESS | {"compare": "group"}),
    ("PPO", "success alone", None),
    ("PPO", "potential, compare: task", PROGRESS | {"use": "potential"}),
    ("PPO", "potential, compare: task, coef: 0.1", PROGRESS | {"use": "potential", "coef": 0.1}),
]


def main() -> None:
    """Train every case with every seed and print the table."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, default=5, help="seeds 1 to this")
    parser.add_argument("--updates", type=int, default=30)
    args = parser.parse_args()
    torch.set_num_threads(1)
    print("| goals | method | reward | success while training | greedy success afterwards |\n|---|---|---|---|---|")
    for fixed in (True, False):
        for method, label, reward in CASES:
            runs = [train(method, reward, fixed, seed, args.updates) for seed in range(1, args.seeds + 1)]
            cells = [f"{mean(x):.2f} ({min(x):.2f} - {max(x):.2f})" for x in zip(*runs, strict=True)]
            print(f"| {'one place' if fixed else 'anywhere'} | {method} | {label} | {' | '.join(cells)} |", flush=True)


def train(method: str, reward: dict | None, fixed: bool, seed: int, updates: int) -> tuple[float, float]:
    """(success while training, greedy success afterwards)."""
    env = {"type": str(POINT), "reward": "sparse", "end_on_success": True, "max_steps": 8, "fixed_goals": fixed}
    parts = METHODS[method]
    policy = {"type": "mlp", "hidden": [32], "word_dim": 8, "init_std": 0.5} | parts["policy"]
    recipe = build_recipe({"seed": seed, "env": env, **parts, "policy": policy, "reward": reward})
    with closing(Session.build(recipe)) as session, closing(Suite(recipe)) as suite:
        rows = [session.iterate(Clock()).reduce() for _ in range(updates)]
        after = suite.run(session, 300, final=True)
    return mean(r["rollout/success_once_rate"] for r in rows), after.score


if __name__ == "__main__":
    main()
