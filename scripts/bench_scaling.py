"""Time and memory of one PPO iteration as the number of copies grows: the tabletop and HalfCheetah-v4.

    python scripts/bench_scaling.py             16 to 4096 copies, 2 rounds (about 8 minutes)
    python scripts/bench_scaling.py --quick     16 and 256 copies, about half a minute

Every measurement is a process of its own: `memory MiB` is the peak of its resident memory above what the imports take.
16 decisions per copy, 4 epochs of 4 minibatches, 2 hidden layers of 128 (tabletop) or 64 (HalfCheetah).
"""

from __future__ import annotations

import os
import resource
import statistics
import sys
from time import perf_counter
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from _bench import Job, finish, machine, measure_all, median, parser, table, worker_main

COPIES = (16, 64, 256, 1024, 4096)
ENVS: dict[str, dict[str, Any]] = {
    "tabletop": {"env": {"type": "tabletop"}, "policy": {"type": "mlp", "hidden": [128, 128], "hold": 2}},
    "HalfCheetah-v4": {
        "env": {"type": "envpool", "id": "HalfCheetah-v4", "threads": 2},
        "policy": {"type": "mlp", "hidden": [64, 64]},
    },
}
KEYS = ("steps_per_s", "rollout_ms", "update_ms", "memory_mib")


def resident_mib() -> float:
    """Peak resident memory of this process so far."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def measure(job: Job) -> dict[str, Any]:
    """Median over the iterations after the first."""
    import torch

    from embodied_rl.config import build_recipe
    from embodied_rl.measure import Clock
    from embodied_rl.session import Session

    torch.set_num_threads(1)
    before = resident_mib()
    session = Session.build(build_recipe({
        **ENVS[job["setting"]],
        "algorithm": {"type": "ppo", "update": {"epochs": 4, "minibatches": 4}},
        "collect": {"copies": job["copies"], "decisions": 16},
        "device": "cpu",
    }))  # fmt: skip
    rollouts, updates, steps = [], [], []
    start = perf_counter()
    while len(rollouts) < 3 or perf_counter() - start < job["seconds"]:
        clock, before = Clock(), session.env_steps
        session.iterate(clock)
        took = clock.take()
        rollouts.append(took["rollout"])
        updates.append(took["advantage"] + took["update"])
        steps.append(session.env_steps - before)
    rollout_s, update_s = statistics.median(rollouts[1:]), statistics.median(updates[1:])
    return {
        "steps_per_s": statistics.median(steps[1:]) / (rollout_s + update_s),
        "rollout_ms": rollout_s * 1e3,
        "update_ms": update_s * 1e3,
        "memory_mib": resident_mib() - before,
    }


def main() -> None:
    """Measure, print the table and the JSON line."""
    args = parser(__doc__, rounds=2).parse_args()
    copies = (16, 256) if args.quick else COPIES
    jobs = [{"setting": env, "copies": n, "seconds": 2.0 if args.quick else 8.0} for env in ENVS for n in copies]
    print(f"one PPO iteration by number of copies, {machine()}")
    results = measure_all(__file__, jobs, args.repeats or (1 if args.quick else 2))
    numbers = [{k: median(results[i], k) for k in KEYS} for i in range(len(jobs))]
    print(table(["env", "copies", "steps/s", "rollout ms", "update ms", "memory MiB"],
                [[j["setting"], j["copies"], *n.values()] for j, n in zip(jobs, numbers, strict=True)]))  # fmt: skip
    ours: dict[str, Any] = {}
    for job, number in zip(jobs, numbers, strict=True):
        ours.setdefault(job["setting"], {})[str(job["copies"])] = number
    finish({"name": "scaling", "setting": {"decisions": 16, "epochs": 4, "minibatches": 4}, "ours": ours})


if __name__ == "__main__":
    worker_main(measure)
    main()
