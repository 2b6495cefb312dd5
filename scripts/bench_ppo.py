"""PPO on HalfCheetah-v4: env steps per second, updates included, beside Stable-Baselines3, skrl and rsl-rl-lib.

    python scripts/bench_ppo.py              both settings, 1 and 2 torch threads, 3 interleaved rounds (about 15 minutes)
    python scripts/bench_ppo.py --quick      about a minute, too short to tell 10 % apart

Every measurement runs in a process of its own. Each framework is reported at its best number of torch threads, ours
also at its best `collect.pipeline` and Stable-Baselines3 at its best vectorisation; all choices are in the table.
"""

from __future__ import annotations

import os
import sys
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from _bench import Job, finish, machine, measure_all, median, parser, spread, table, worker_main
from _ppo_peers import ENV, PEERS, Stop, Stopwatch, run_peer

SETTINGS: dict[str, dict[str, Any]] = {
    "small": {"copies": 32, "decisions": 64, "epochs": 10, "minibatches": 32},
    "wide": {"copies": 256, "decisions": 16, "epochs": 4, "minibatches": 4},
}
COMMON = {"lr": 3e-4, "gamma": 0.99, "lam": 0.95, "clip": 0.2, "max_grad_norm": 0.5}
NAMES = {"ours": "ours", "stable_baselines3_dummy": "stable_baselines3"}
"""Variants that are reported under one name, at the better of them."""


def our_recipe(s: dict[str, Any], job: Job) -> Any:
    """The recipe that equals the peers' settings."""
    from embodied_rl.config import build_recipe

    return build_recipe({
        "env": {"type": "envpool", "id": ENV, "threads": job["sim_threads"]},
        "policy": {"type": "mlp", "hidden": [64, 64]},
        "algorithm": {
            "type": "ppo",
            "credit": {"gamma": s["gamma"], "lam": s["lam"]},
            "loss": {"clip_low": s["clip"], "clip_high": s["clip"]},
            "update": {k: s[k] for k in ("epochs", "minibatches", "lr", "max_grad_norm")},
        },
        "collect": {"copies": s["copies"], "decisions": s["decisions"], "pipeline": job["pipeline"]},
        "threads": job["threads"],
        "device": "cpu",
    })  # fmt: skip


def run_ours(s: dict[str, Any], clock: Stopwatch, job: Job) -> dict[str, Any]:
    """The engine, iteration by iteration until the stopwatch stops it."""
    from embodied_rl.measure import Clock
    from embodied_rl.session import Session

    session = Session.build(our_recipe(s, job))
    spent = {"rollout_ms": 0.0, "update_ms": 0.0}
    try:
        while True:
            clock.mark()
            if len(clock.marks) == clock.warm_up + 1:
                spent = dict.fromkeys(spent, 0.0)
            seconds = Clock()
            session.iterate(seconds)
            took = seconds.take()
            spent["rollout_ms"] += took["rollout"] * 1e3
            spent["update_ms"] += (took["advantage"] + took["update"]) * 1e3
    except Stop:
        pass
    result = clock.result(s["copies"])
    return result | {k: v / result["iterations"] for k, v in spent.items()}


def measure(job: Job) -> dict[str, Any]:
    """One framework, one setting, one number of torch threads."""
    import torch

    torch.set_num_threads(job["threads"])
    s = SETTINGS[job["setting"]] | COMMON
    clock = Stopwatch(s["decisions"], warm_up=2, seconds=job["seconds"])
    if job["framework"] == "ours":
        return run_ours(s, clock, job)
    return run_peer(job["framework"], s, clock, job["sim_threads"])


def plan(settings: list[str], frameworks: list[str], seconds: float, quick: bool) -> list[Job]:
    """All measurements of one round."""
    jobs: list[Job] = []
    for setting in settings:
        for threads in (1,) if quick else (1, 2):
            for framework in frameworks:
                common = {"framework": framework, "setting": setting, "threads": threads, "sim_threads": 2, "seconds": seconds}
                pipelines = [0] if framework != "ours" else [1 if setting == "small" else 2] if quick else [1, 2]
                # Each part of a pipeline has a pool of its own; together they have as many threads as a peer's one.
                jobs += [common | ({"pipeline": p, "sim_threads": 2 // p} if p else {}) for p in pipelines]
    return jobs


def report(jobs: list[Job], results: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print the table and return the JSON object: steps per second and ratios by setting, each at its best."""
    rows, best = [], {}
    for i, job in enumerate(jobs):
        speed = median(results[i], "steps_per_s")
        variant = f"{job['framework']}" + (f", pipeline {job['pipeline']}" if "pipeline" in job else "")
        cells = [median(results[i], k) for k in ("cpu_ms", "rollout_ms", "update_ms", "first_iteration_s")]
        rows.append([variant, job["setting"], job["threads"], speed, f"{spread(results[i], 'steps_per_s'):.0%}", *cells])
        key = (NAMES.get(job["framework"], job["framework"]), job["setting"])
        if speed is not None and speed > best.get(key, 0.0):
            best[key] = speed
    print(table(
        ["framework", "setting", "threads", "steps/s", "spread", "cpu ms/it", "rollout ms", "update ms", "first it. s"], rows,
    ))  # fmt: skip
    out: dict[str, Any] = {}
    for (name, setting), speed in best.items():
        out.setdefault(name, {})[setting] = speed
        if name != "ours" and ("ours", setting) in best:
            out.setdefault(f"ratio_{name}", {})[setting] = best["ours", setting] / speed
    for setting in SETTINGS:
        peers = [v for (n, s), v in best.items() if n != "ours" and s == setting]
        if peers and ("ours", setting) in best:
            out.setdefault("ratio_best_peer", {})[setting] = best["ours", setting] / max(peers)
    return out


def main() -> None:
    """Measure, print the table and the JSON line."""
    p = parser(__doc__)
    p.add_argument("--setting", choices=[*SETTINGS, "both"], default="both")
    p.add_argument("--only", nargs="+", choices=["ours", *PEERS], default=["ours", *PEERS], help="frameworks to run")
    p.add_argument("--seconds", type=float, default=None, help="time measured per run (default 6, quick 1.5)")
    args = p.parse_args()
    settings = list(SETTINGS) if args.setting == "both" else [args.setting]
    jobs = plan(settings, args.only, args.seconds or (1.5 if args.quick else 6.0), args.quick)
    print(f"PPO on {ENV} (envpool), {machine()}")
    results = measure_all(__file__, jobs, args.repeats or (1 if args.quick else 3))
    out = report(jobs, results)
    finish({"name": "ppo", "setting": {k: SETTINGS[k] for k in settings}, **out})


if __name__ == "__main__":
    worker_main(measure)
    main()
