"""Environment stepping with random actions: the tabletop arm by parts, and every adapter beside other vectorisations.

    python scripts/bench_envs.py             all, 3 interleaved rounds (about 12 minutes)
    python scripts/bench_envs.py --quick     about three minutes
    python scripts/bench_envs.py --only metaworld   the settings whose name holds this word

tabletop-64 is control steps per second of 64 copies, restarts included, with the share of each part. The other rows are
one simulation each: the adapter of ours, then the simulator's own vectorisation where it has one, and Gymnasium's and
Stable-Baselines3's. `ours / this` is the ratio of the medians. Two threads or worker processes simulate in ours, in
envpool and in mujoco_rollout; gymnasium_async and sb3_subproc have a process for each copy, as they are made.
envpool hands out what it has, mostly float64 arrays; envpool_tensors makes the float32 tensors of them that a learner
needs, as ours does. mujoco_rollout is physics alone, without observation, reward and restarts: what is missing to 1
there is what these cost. ManiSkill and LIBERO are measured where they are installed (LIBERO_ASSETS says where its assets are; more in
bench_libero.py), and left out with a line where they are not.
"""

from __future__ import annotations

import math
import os
import sys
from time import perf_counter
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from _bench import Job, Parts, finish, machine, measure_all, median, parser, spread, table, worker_main

PARTS = ("physics", "inverse kinematics", "forward kinematics", "reward", "observation", "reset", "rest")
LIBERO, CHUNKS = "LIBERO, every step seen (libero)", "LIBERO, every eighth step seen (libero)"


def tabletop(copies: int, threads: int) -> tuple[Any, Parts]:
    """The tabletop env with three tasks, its parts watched."""
    import torch

    from embodied_rl.envs.tabletop import Config, build
    from embodied_rl.envs.tabletop import env as module

    config = Config(tasks=["reach", "push", "lift"], threads=threads)
    env = build(config, num_envs=copies, device=torch.device("cpu"), split="train", seed=0)
    parts = Parts(PARTS)
    parts.watch(env.physics, "step", "physics")
    parts.watch(env.controller, "advance", "inverse kinematics")
    parts.watch(env.arm, "forward", "forward kinematics")
    parts.watch(module, "judge", "reward")
    parts.watch(env, "view", "reward")
    parts.watch(env, "observe", "observation")
    parts.watch(env, "_start", "reset")
    return env, parts


def measure(job: Job) -> dict[str, Any]:
    """Steps per second of one env: the median over blocks of 50 steps, in which most simulations restart once."""
    import statistics

    import torch
    from _vector_envs import LIMIT, cases, ours, stepper

    torch.set_num_threads(1)
    if job["setting"] in (LIBERO, CHUNKS):
        import bench_libero

        return bench_libero.measure(
            {"kind": job["env"], "chunk": job["chunk"], "copies": job["copies"], "steps": 16 * math.ceil(job["seconds"])}
        )
    parts = None
    if job["setting"].startswith("tabletop"):
        env, parts = tabletop(job["copies"], threads=2)
        step = stepper(env)
    else:
        case = cases()[job["setting"]]
        step = ours(case) if job["env"] == "ours" else case.peers[job["env"]]()
    for _ in range(3):
        step()
    if parts:
        parts.take()
    speeds, steps, start = [], 0, perf_counter()
    while perf_counter() - start < job["seconds"] or len(speeds) < 3:
        before = perf_counter()
        made = sum(step() for _ in range(LIMIT))
        speeds.append(made / (perf_counter() - before))
        steps += LIMIT
    result: dict[str, Any] = {"steps_per_s": statistics.median(speeds)}
    if parts:
        result |= {f"{name} ms": seconds / steps * 1e3 for name, seconds in parts.take().items()}
    return result


def plan(seconds: float, quick: bool, only: str) -> tuple[list[Job], list[str]]:
    """All measurements of one round, and what cannot be measured here."""
    from _vector_envs import cases

    jobs: list[Job] = []
    absent = []
    for copies in (64,) if quick else (16, 64, 256):
        jobs.append({"env": "ours", "setting": f"tabletop-{copies}", "copies": copies, "seconds": seconds})
    for name, case in cases().items():
        if case.installed:
            jobs += [
                {"env": e, "setting": name, "copies": case.copies, "seconds": seconds} for e in ("ours", *case.peers)
            ]
        else:
            absent.append(name)
    if "LIBERO_ASSETS" in os.environ:
        # Looked at after every step, and after every eighth as by a policy that executes chunks of 8.
        kinds = [(LIBERO, 1, "ours"), (LIBERO, 1, "SubprocVectorEnv"), (CHUNKS, 8, "ours"), (CHUNKS, 8, "SubprocVectorEnv")]
        jobs += [{"env": e, "setting": s, "chunk": c, "copies": 2, "seconds": seconds} for s, c, e in kinds]
    else:
        absent += [LIBERO, CHUNKS]
    return [job for job in jobs if only in job["setting"].lower()], [name for name in absent if only in name.lower()]


def report(jobs: list[Job], results: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print both tables and return the JSON object."""
    out: dict[str, Any] = {}
    rows, shares = [], []
    speeds = {(job["setting"], job["env"]): median(results[i], "steps_per_s") for i, job in enumerate(jobs)}
    for i, job in enumerate(jobs):
        setting, name = job["setting"], job["env"]
        speed, our = speeds[setting, name], speeds.get((setting, "ours"))
        ratio = our / speed if our and speed and name != "ours" else None
        shown = "" if ratio is None else f"{ratio:.2f}"
        rows.append([setting, job["copies"], name, speed, f"{spread(results[i], 'steps_per_s'):.0%}", shown])
        out.setdefault(setting, {})[name] = {"steps_per_s": speed} | ({} if ratio is None else {"ratio": ratio})
        if setting.startswith("tabletop") and speed is not None:
            ms = {part: median(results[i], f"{part} ms") or 0.0 for part in PARTS}
            around = sum(ms.values()) - ms["physics"]
            shares.append([setting, *ms.values(), f"{around / ms['physics']:.0%}"])
            out[setting] |= {"around_physics": around / ms["physics"], "parts_ms": ms}
    print(table(["setting", "copies", "by", "steps/s", "spread", "ours / this"], rows))
    if shares:
        print("\nmilliseconds per control step of all copies; the last column is everything else over the physics")
        print(table(["tabletop", *PARTS, "around"], shares))
    return out


def main() -> None:
    """Measure, print the tables and the JSON line."""
    options = parser(__doc__)
    options.add_argument("--only", default="", help="measure the settings whose name holds this word")
    args = options.parse_args()
    jobs, absent = plan(1.0 if args.quick else 3.0, args.quick, args.only.lower())
    if not jobs:
        options.error(f"no setting that is installed here holds '{args.only}' in its name")
    print(f"stepping with random actions, {machine()}")
    for name in absent:
        print(f"left out, because it is not installed here: {name}")
    results = measure_all(__file__, jobs, args.repeats or (1 if args.quick else 3))
    finish({"name": "envs", "sim_threads": 2, "settings": report(jobs, results)})


if __name__ == "__main__":
    worker_main(measure)
    main()
