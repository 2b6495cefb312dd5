"""Do progress rewards help? The point of tests/toys with sparse success, with and without self-referential progress.

    python scripts/bench_rewards.py             5 seeds, 30 updates (60 trainings, about ten minutes)
    python scripts/bench_rewards.py --quick     1 seed, 2 updates, a minute or two: that everything runs, and no more

Two worlds: the goal of a task is always at the same place, or at another place in every episode. Per row: success while
training (mean over all updates, sampled) and greedy success after it (300 held-out starts), mean and range over seeds.
Each round has a seed of its own.
"""

from __future__ import annotations

import os
import sys
from contextlib import closing
from pathlib import Path
from statistics import mean
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from _bench import Job, finish, machine, measure_all, parser, table, worker_main

POINT = Path(__file__).resolve().parent.parent / "tests" / "toys" / "point.py"
PROGRESS: dict[str, Any] = {"type": "self_referential", "entries": ["position"]}
METHODS: dict[str, dict[str, Any]] = {
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
CASES: dict[tuple[str, str], dict[str, Any] | None] = {
    ("GRPO", "success alone"): None,
    ("GRPO", "outcome, compare: task"): PROGRESS | {"use": "outcome"},
    ("GRPO", "outcome, compare: group"): PROGRESS | {"use": "outcome", "compare": "group"},
    ("PPO", "success alone"): None,
    ("PPO", "potential, compare: task"): PROGRESS | {"use": "potential"},
    ("PPO", "potential, compare: task, coef: 0.1"): PROGRESS | {"use": "potential", "coef": 0.1},
}
GOALS = ("one place", "anywhere")
RATES = ("while training", "greedy afterwards")


def measure(job: Job) -> dict[str, Any]:
    """Train one case with one seed: success while training, greedy success afterwards."""
    from embodied_rl.config import build_recipe
    from embodied_rl.measure import Clock
    from embodied_rl.session import Session
    from embodied_rl.suites import Suite

    env = {
        "type": str(POINT), "reward": "sparse", "end_on_success": True, "max_steps": 8,
        "fixed_goals": job["goals"] == GOALS[0],
    }  # fmt: skip
    parts = METHODS[job["method"]]
    policy = {"type": "mlp", "hidden": [32], "word_dim": 8, "init_std": 0.5} | parts["policy"]
    reward = CASES[job["method"], job["reward"]]
    recipe = build_recipe({
        "seed": job["seed"], "threads": 1, "device": "cpu", "env": env, **parts, "policy": policy, "reward": reward,
    })  # fmt: skip
    with closing(Session.build(recipe)) as session, closing(Suite(recipe)) as suite:
        rows = [session.iterate(Clock()).reduce() for _ in range(job["updates"])]
        after = suite.run(session.policy, session.device, 300, greedy=True)
    return dict(zip(RATES, (mean(r["rollout/success_once_rate"] for r in rows), after.score), strict=True))


def main() -> None:
    """Train every case with every seed, print the table and the JSON line."""
    p = parser(__doc__, rounds=5)
    p.add_argument("--updates", type=int, default=None, help="of each training (default 30, quick 2)")
    args = p.parse_args()
    seeds = range(1, 1 + (args.repeats or (1 if args.quick else 5)))
    setting = {"updates": args.updates or (2 if args.quick else 30)}
    rows = [{"goals": goals, "method": method, "reward": reward} for goals in GOALS for method, reward in CASES]
    # A training is the same every time, so that rounds are seeds.
    jobs = [row | setting | {"seed": seed} for seed in seeds for row in rows]
    print(f"success rates, mean (range) over {len(seeds)} seeds, {setting['updates']} updates, {machine()}")
    results = measure_all(__file__, jobs, 1)
    cells, out = [], {}
    for i, row in enumerate(rows):
        found = [result for j in range(i, len(jobs), len(rows)) for result in results[j]]
        rates = {name: [result[name] for result in found] for name in RATES}
        cells.append(
            [*row.values(), *(f"{mean(x):.2f} ({min(x):.2f} - {max(x):.2f})" if x else None for x in rates.values())]
        )
        out[", ".join(row.values())] = {name: [round(x, 4) for x in of_seeds] for name, of_seeds in rates.items()}
    print(table([*rows[0], *RATES], cells))
    finish({"name": "rewards", "setting": setting, "ours": out})


if __name__ == "__main__":
    worker_main(measure)
    main()
