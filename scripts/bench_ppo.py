"""PPO on HalfCheetah-v4: env steps per second, updates included, beside Stable-Baselines3, skrl and rsl-rl-lib.

    python scripts/bench_ppo.py              both settings, 1 and 2 torch threads, 3 interleaved rounds (about 15 min)
    python scripts/bench_ppo.py --quick      about a minute
"""

from __future__ import annotations

import os
import sys
from time import perf_counter
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from _bench import finish, machine, measure_all, median, parser, spread, table, worker_main
from _ppo_peers import ENV, PEERS, Stop, Stopwatch, run_peer

SETTINGS: dict[str, dict[str, Any]] = {
    "small": {"copies": 32, "decisions": 64, "epochs": 10, "minibatches": 32},
    "wide": {"copies": 256, "decisions": 16, "epochs": 4, "minibatches": 4},
}
COMMON = {"lr": 3e-4, "gamma": 0.99, "lam": 0.95, "clip": 0.2, "max_grad_norm": 0.5}
FRAMEWORKS = ["ours", *PEERS]


def our_recipe(s: dict[str, Any], job: dict[str, Any]) -> Any:
    """The recipe that equals the peers' settings."""
    from embodied_rl.config import build_recipe

    return build_recipe({
        "env": {"type": job.get("env", "envpool"), "id": ENV, "threads": job["sim_threads"]},
        "policy": {"type": "mlp", "hidden": [64, 64]},
        "algorithm": {
            "type": "ppo",
            "credit": {"gamma": s["gamma"], "lam": s["lam"], "returns": "gae", "baseline": "critic", "whiten": True},
            "loss": {"clip_low": s["clip"], "clip_high": s["clip"]},
            "update": {"epochs": s["epochs"], "minibatches": s["minibatches"], "lr": s["lr"], "max_grad_norm": s["max_grad_norm"]},
        },
        "collect": {"copies": s["copies"], "decisions": s["decisions"], "pipeline": job.get("pipeline", 1)},
        "threads": job["threads"],
        "device": "cpu",
    })  # fmt: skip


def run_ours(s: dict[str, Any], clock: Stopwatch, job: dict[str, Any]) -> dict[str, Any]:
    """The body of `embodied_rl.train`'s loop, without its files."""
    from embodied_rl.measure import rollout_metrics
    from embodied_rl.session import Session

    session = Session.build(our_recipe(s, job))
    spent = {"rollout_ms": 0.0, "advantage_ms": 0.0, "update_ms": 0.0}
    try:
        while True:
            clock.mark()
            if len(clock.marks) == clock.warm_up + 1:
                spent = dict.fromkeys(spent, 0.0)
            t0 = perf_counter()
            rollout = session.collector.collect()
            t1 = perf_counter()
            advantage = session.credit(rollout)
            t2 = perf_counter()
            metrics = session.updater.update(rollout, advantage, progress=0.0)
            session.policy.observe({k: v[rollout.valid] for k, v in rollout.obs.items()})
            metrics.merge(rollout_metrics(rollout, session.collector.spec.tasks))
            metrics.reduce()
            for name, seconds in zip(spent, (t1 - t0, t2 - t1, perf_counter() - t2), strict=True):
                spent[name] += seconds * 1e3
    except Stop:
        pass
    result = clock.result(s["copies"])
    return result | {k: v / result["iterations"] for k, v in spent.items()}


def measure(job: dict[str, Any]) -> dict[str, Any]:
    """One framework, one setting, one number of torch threads."""
    import torch

    torch.set_num_threads(job["threads"])
    s = SETTINGS[job["setting"]] | COMMON
    clock = Stopwatch(s["decisions"], job["warm_up"], job["seconds"])
    if job["framework"] == "ours":
        return run_ours(s, clock, job)
    return run_peer(job["framework"], s, clock, job["sim_threads"])


def main() -> None:
    p = parser(__doc__)
    p.add_argument("--setting", choices=[*SETTINGS, "both"], default="both")
    p.add_argument("--only", nargs="*", choices=FRAMEWORKS, default=FRAMEWORKS, help="frameworks to run")
    args = p.parse_args()


if __name__ == "__main__":
    worker_main(measure)
    main()
