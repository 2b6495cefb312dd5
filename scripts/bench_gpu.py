"""The tabletop on MuJoCo Warp by number of copies: physics, pictures, and PPO from state and from pictures.

    python scripts/bench_gpu.py             256, 1024 and 4096 copies on CUDA, 3 interleaved rounds
    python scripts/bench_gpu.py --quick     256 copies, one round

Everything is told per second, of one copy each:

    physics steps   while all copies move at random; the physics alone
    control steps   the same with observation, reward and restarts
    pictures N      N x N pixels of one camera, drawn anew for every copy
    PPO decisions   whole iterations, updates included, of the recipe tabletop_demo (from state)
    VLA decisions   the same of the recipe tabletop_vla (from pictures and words), with untrained weights

Without a CUDA device the same is measured with 8 and 16 copies (quick: 8) on Warp's CPU device, which is made for
tests: such numbers show that everything runs, and nothing of its speed. The first run on a machine compiles Warp's
kernels for minutes, which is not counted.
"""

from __future__ import annotations

import os
import sys
from time import perf_counter
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from _bench import Job, Parts, finish, machine, measure_all, median, parser, spread, table, worker_main

COPIES = {"cuda": (256, 1024, 4096), "cpu": (8, 16)}
PIXELS = (64, 128, 224)
MICRO_BATCH = 2048
"""Decisions whose gradients are held at once: memory must not grow with the copies."""


def measure_stepping(job: Job) -> dict[str, Any]:
    """Steps of the env with random actions; sums, because restarts are rare and dear."""
    import torch
    from _vector_envs import stepper
    from bench_vla import wait_for

    from embodied_rl.envs.tabletop import Config, build

    env = build(
        Config(physics="warp"), num_envs=job["copies"], device=torch.device(job["device"]), split="train", seed=0
    )
    parts = Parts(("physics", "rest"), wait_for(job["device"]))
    parts.watch(env.physics, "step", "physics")
    step = stepper(env)
    step()
    parts.take()
    start, steps = perf_counter(), 0
    while steps < job["steps"] or perf_counter() - start < job["seconds"]:
        step()
        steps += 1
    spent, made = parts.take(), steps * job["copies"]
    return {"physics steps": made * env.scene.substeps / spent["physics"], "control steps": made / sum(spent.values())}


def measure_pictures(job: Job) -> dict[str, Any]:
    """Pictures of the camera `table`, as an env keeps them for a policy."""
    import torch
    from bench_vla import in_turns

    from embodied_rl.envs.tabletop.pictures import Pictures
    from embodied_rl.envs.tabletop.scene import HOME, build_scene

    scene, device = build_scene(), torch.device(job["device"])
    qpos = torch.from_numpy(scene.model.qpos0).repeat(job["copies"], 1)
    qpos[:, scene.arm_qpos] = torch.from_numpy(HOME)
    qpos = qpos.float().to(device)
    pictures = Pictures(scene.model, job["copies"], ("table",), job["pixels"], device, job["threads"])

    def draw() -> None:
        pictures.forget()
        pictures.look(qpos, lambda rows: (None, None))

    return {f"pictures {job['pixels']}": job["copies"] / in_turns({"draw": draw}, job)["draw"]}


def measure_ppo(job: Job) -> dict[str, Any]:
    """Iterations of the recipe that learns from state."""
    from embodied_rl.config import load_recipe
    from embodied_rl.session import Session

    settings = {"device": job["device"], "threads": job["threads"], "collect.copies": job["copies"],
                "collect.decisions": job["decisions"], "env.physics": "warp"}  # fmt: skip
    recipe = load_recipe("tabletop_demo", [f"{name}={value}" for name, value in settings.items()]).recipe
    return {"PPO decisions": decisions_per_s(Session.build(recipe), job)}


def measure_vla(job: Job) -> dict[str, Any]:
    """Iterations of the recipe that learns from pictures and words."""
    from bench_vla import session

    settings = {"env__physics": "warp", "algorithm__update__micro_batch": MICRO_BATCH}
    return {"VLA decisions": decisions_per_s(session({"policy": "tiny_vla_flow"} | job, **settings), job)}


def decisions_per_s(session: Any, job: Job) -> float:
    """Decisions of all copies over the median time of an iteration."""
    from bench_vla import in_turns

    from embodied_rl.measure import Clock

    seconds = in_turns({"iteration": lambda: session.iterate(Clock())}, job)["iteration"]
    return job["copies"] * job["decisions"] / seconds


MEASURES = {"stepping": measure_stepping, "pictures": measure_pictures, "PPO": measure_ppo, "VLA": measure_vla}


def measure(job: Job) -> dict[str, Any]:
    """One part for one number of copies."""
    return MEASURES[job["part"]](job)


def plan(device: str, quick: bool) -> list[Job]:
    """All measurements of one round."""
    common = {"device": device, "threads": 1, "turns": 1 if quick else 3, "seconds": 0.0 if quick else 5.0}
    small = {"steps": 10, "decisions": 2} if device == "cpu" else {"steps": 100, "decisions": 10}
    jobs: list[Job] = []
    for copies in COPIES[device][: 1 if quick else None]:
        sized = common | small | {"copies": copies}
        jobs.append({"part": "stepping"} | sized)
        jobs += [{"part": "pictures", "pixels": n} | sized for n in PIXELS]
        jobs += [{"part": part} | sized for part in ("PPO", "VLA")]
    return jobs


def report(jobs: list[Job], results: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print the table and return what -> copies -> per second."""
    out: dict[str, Any] = {}
    rows = []
    for i, job in enumerate(jobs):
        for name in results[i][0] if results[i] else ():
            number = median(results[i], name)
            rows.append([name, job["copies"], number, f"{spread(results[i], name):.0%}"])
            out.setdefault(name, {})[str(job["copies"])] = number
    print(table(["what", "copies", "per second", "spread"], rows))
    return out


def main() -> None:
    """Measure, print the table and the JSON line."""
    import torch

    args = parser(__doc__).parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    print(f"the tabletop on MuJoCo Warp, {torch.cuda.get_device_name() if device == 'cuda' else 'no GPU'}, {machine()}")
    jobs = plan(device, args.quick)
    results = measure_all(__file__, jobs, args.repeats or (1 if args.quick else 3), timeout=1200.0)
    finish({"name": "gpu", "device": device, "per_s": report(jobs, results)})


if __name__ == "__main__":
    worker_main(measure)
    main()
