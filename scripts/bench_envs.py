"""Environment stepping with random actions: the tabletop arm by parts, and the adapters beside other vectorisations.

    python scripts/bench_envs.py             all, 3 interleaved rounds (about 5 minutes)
    python scripts/bench_envs.py --quick     about a minute

tabletop-64 is control steps per second of 64 copies, restarts included, with the share of each part. HalfCheetah-v4
compares the envpool adapter, HalfCheetah-v5 the gymnasium adapter, with Gymnasium's and Stable-Baselines3's
vectorisations of 32 copies; v4 also with bare envpool: what is missing to 1 there is what the adapter costs.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from time import perf_counter
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from _bench import Job, Parts, finish, machine, measure_all, median, parser, spread, table, worker_main

COPIES = 32
PEERS = ("gymnasium_sync", "gymnasium_async", "sb3_dummy", "sb3_subproc")
ADAPTERS = {"HalfCheetah-v4": "envpool", "HalfCheetah-v5": "gymnasium"}
PARTS = ("physics", "inverse kinematics", "forward kinematics", "reward", "observation", "reset", "rest")


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


def stepper(env: Any) -> Callable[[], None]:
    """One control step of an env of ours with a random action, restarts included."""
    import torch

    from embodied_rl.seeding import start_seeds

    spec, b = env.spec, env.spec.num_envs
    actions = torch.rand(16, b, *spec.action.shape) * 2 - 1
    episodes = torch.zeros(b, dtype=torch.int64)
    copies = torch.arange(b)
    clock = {"t": 0}

    def reset(mask: torch.Tensor) -> None:
        env.reset(mask, start_seeds(0, "train", copies, episodes), (copies + episodes) % len(spec.tasks))
        episodes[mask] += 1

    def step() -> None:
        result = env.step(actions[clock["t"] % len(actions)])
        clock["t"] += 1
        done = result.terminated | result.truncated
        if bool(done.any()):
            reset(done)

    reset(torch.ones(b, dtype=torch.bool))
    return step


def adapter(kind: str, env_id: str) -> Callable[[], None]:
    """One step of an adapter of ours."""
    import torch

    from embodied_rl.registry import load

    module = load("env", kind)
    extra = {"threads": 2} if kind == "envpool" else {"resumable": False}
    env = module.build(module.Config(id=env_id, **extra), num_envs=COPIES, device=torch.device("cpu"), split="train", seed=0)
    return stepper(env)


def peer(name: str, env_id: str) -> Callable[[], None]:
    """One step of 32 copies by another library."""
    import numpy as np

    if name == "envpool":
        import envpool

        env: Any = envpool.make_gymnasium(env_id, num_envs=COPIES, num_threads=2, seed=0)
    elif name.startswith("gymnasium"):
        import gymnasium

        env = gymnasium.make_vec(env_id, num_envs=COPIES, vectorization_mode=name.removeprefix("gymnasium_"))
    else:
        import gymnasium
        from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

        kind = DummyVecEnv if name == "sb3_dummy" else SubprocVecEnv
        # Forked: 32 fresh interpreters would import torch for minutes on a small machine.
        how = {"start_method": "fork"} if name == "sb3_subproc" else {}
        env = kind([lambda: gymnasium.make(env_id) for _ in range(COPIES)], **how)
    env.reset()
    wide = np.float64 if name == "envpool" else np.float32
    actions = np.random.default_rng(0).uniform(-1, 1, (16, COPIES, 6)).astype(wide)
    clock = {"t": 0}

    def step() -> None:
        env.step(actions[clock["t"] % len(actions)])
        clock["t"] += 1

    return step


def measure(job: Job) -> dict[str, Any]:
    """Steps per second of one env: the median over blocks of a tenth of the time."""
    import statistics

    import torch

    torch.set_num_threads(1)
    parts = None
    copies = job.get("copies", COPIES)
    if job["setting"].startswith("tabletop"):
        env, parts = tabletop(copies, threads=2)
        step = stepper(env)
    elif job["env"] == "ours":
        step = adapter(ADAPTERS[job["setting"]], job["setting"])
    else:
        step = peer(job["env"], job["setting"])
    start = perf_counter()
    done = 0
    while perf_counter() - start < 0.2 * job["seconds"] or done < 3:
        step()
        done += 1
    # Whole episodes of the tabletop in every block, so that each pays for its restarts.
    block = 50 if parts else max(1, int(done * 0.5))
    if parts:
        parts.take()
    speeds, steps, start = [], 0, perf_counter()
    while perf_counter() - start < job["seconds"] or len(speeds) < 3:
        before = perf_counter()
        for _ in range(block):
            step()
        speeds.append(block * copies / (perf_counter() - before))
        steps += block
    result: dict[str, Any] = {"steps_per_s": statistics.median(speeds)}
    if parts:
        result |= {f"{name} ms": seconds / steps * 1e3 for name, seconds in parts.take().items()}
    return result


def plan(seconds: float, quick: bool) -> list[Job]:
    """All measurements of one round."""
    jobs: list[Job] = []
    for copies in (64,) if quick else (16, 64, 256):
        jobs.append({"env": "ours", "setting": f"tabletop-{copies}", "copies": copies, "seconds": seconds})
    for env_id in ADAPTERS:
        bare = ("envpool",) if env_id == "HalfCheetah-v4" else ()
        jobs += [{"env": e, "setting": env_id, "seconds": seconds} for e in ("ours", *bare, *PEERS)]
    return jobs


def report(jobs: list[Job], results: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print both tables and return the JSON object."""
    out: dict[str, Any] = {}
    rows, shares = [], []
    for i, job in enumerate(jobs):
        speed = median(results[i], "steps_per_s")
        name = f"ours ({ADAPTERS[job['setting']]})" if job["env"] == "ours" and job["setting"] in ADAPTERS else job["env"]
        rows.append([name, job["setting"], speed, f"{spread(results[i], 'steps_per_s'):.0%}"])
        if speed is not None:
            out.setdefault(job["env"], {})[job["setting"]] = speed
        if job["setting"].startswith("tabletop") and speed is not None:
            ms = {part: median(results[i], f"{part} ms") or 0.0 for part in PARTS}
            around = sum(ms.values()) - ms["physics"]
            shares.append([job["setting"], *ms.values(), f"{around / ms['physics']:.0%}"])
            out.setdefault("around_physics", {})[job["setting"]] = around / ms["physics"]
            out.setdefault("parts_ms", {})[job["setting"]] = ms
    print(table(["env", "setting", "steps/s", "spread"], rows))
    print("\nmilliseconds per control step of all copies; the last column is everything else over the physics")
    print(table(["tabletop", *PARTS, "around"], shares))
    for name in ("envpool", *PEERS):
        ratios = {s: out["ours"][s] / v for s, v in out.get(name, {}).items() if s in out.get("ours", {})}
        if ratios:
            out[f"ratio_{name}"] = ratios
    return out


def main() -> None:
    """Measure, print the tables and the JSON line."""
    args = parser(__doc__).parse_args()
    jobs = plan(1.0 if args.quick else 3.0, args.quick)
    print(f"stepping with random actions, {machine()}")
    results = measure_all(__file__, jobs, args.repeats or (1 if args.quick else 3))
    out = report(jobs, results)
    finish({"name": "envs", "setting": {"copies": COPIES, "sim_threads": 2}, **out})


if __name__ == "__main__":
    worker_main(measure)
    main()
