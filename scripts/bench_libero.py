"""LIBERO behind this project beside its own SubprocVectorEnv, as openvla-oft and RLinf use it.

    LIBERO_ASSETS=... python scripts/bench_libero.py            3 interleaved rounds (several minutes)
    LIBERO_ASSETS=... python scripts/bench_libero.py --quick    one round

Both step the same copies of one task with zero actions, two cameras of 256 x 256 pixels. SubprocVectorEnv draws every
control step; ours draws when the policy looks: after every step (chunk 1) or after every eighth (chunk 8). Beside the
steps per second stand the milliseconds of processor time per step, of all processes together: on a busy machine they
compare better than the clock does.
"""

from __future__ import annotations

import inspect
import json
import os
import subprocess
import sys
import tempfile
from time import perf_counter
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from _bench import Job, finish, machine, measure_all, median, parser, spread, table, worker_main

SUITE, TASK = "libero_goal", "put_the_bowl_on_the_plate"


def cpu_seconds() -> float:
    """Processor time of this process and everything below it, also of processes that still run."""
    import os

    parents, spent = {}, {}
    for name in filter(str.isdigit, os.listdir("/proc")):
        try:
            with open(f"/proc/{name}/stat") as file:
                fields = file.read().rpartition(")")[2].split()
        except OSError:
            continue  # it has just ended
        parents[int(name)], spent[int(name)] = int(fields[1]), int(fields[11]) + int(fields[12])
    below = {os.getpid()}
    while new := {pid for pid, parent in parents.items() if parent in below} - below:
        below |= new
    return sum(spent[pid] for pid in below) / os.sysconf("SC_CLK_TCK")


PEER = inspect.getsource(cpu_seconds) + '''
import json, os, sys, tempfile, time
assets, suite, task, copies, steps = sys.argv[1:]
home = os.environ["LIBERO_CONFIG_PATH"] = tempfile.mkdtemp()
open(home + "/config.yaml", "w").write("{}")
import numpy as np
import libero.libero as L
L._assets_path_cache = assets
from libero.libero.envs import OffScreenRenderEnv, SubprocVectorEnv
if __name__ == "__main__":
    bddl = f"{os.path.dirname(L.__file__)}/bddl_files/{suite}/{task}.bddl"
    make = lambda: OffScreenRenderEnv(bddl_file_name=bddl, camera_heights=256, camera_widths=256)
    env = SubprocVectorEnv([make] * int(copies))
    env.seed(0)
    env.reset()
    action = np.zeros((int(copies), 7))
    env.step(action)
    begin, cpu, total = time.perf_counter(), cpu_seconds(), int(copies) * int(steps)
    for _ in range(int(steps)):
        env.step(action)
    seconds, cpu = time.perf_counter() - begin, cpu_seconds() - cpu
    print(json.dumps({"steps_per_s": total / seconds, "cpu ms": cpu / total * 1e3}), flush=True)
    env.close()
'''


def peer(job: Job) -> dict[str, Any]:
    """LIBERO's own vector env, in LIBERO's own Python."""
    from embodied_rl import sims

    with tempfile.TemporaryDirectory() as folder:
        script = os.path.join(folder, "peer.py")
        with open(script, "w") as file:
            file.write(PEER)
        variables = os.environ | {"MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl"}
        args = [os.environ["LIBERO_ASSETS"], SUITE, TASK, str(job["copies"]), str(job["steps"])]
        done = subprocess.run([sims.interpreter("libero"), script, *args], env=variables, capture_output=True, text=True, check=True)
    line = next(line for line in done.stdout.splitlines() if line.startswith('{"steps_per_s"'))
    return dict(json.loads(line))


def ours(job: Job) -> dict[str, Any]:
    """The libero env, its observation asked for once per chunk."""
    import torch

    from embodied_rl.envs.libero import Changes, Config, build

    b = job["copies"]
    config = Config(tasks=(f"{SUITE}/{TASK}",), protocol="openpi", change=Changes(picture=256), workers=min(2, b))
    env = build(config, num_envs=b, device=torch.device("cpu"), split="train", seed=0)
    env.reset(torch.ones(b, dtype=torch.bool), 2 * torch.arange(b), torch.zeros(b, dtype=torch.int64))
    action = torch.zeros(b, 7)
    env.step(action)
    env.observe()
    begin, cpu, total = perf_counter(), cpu_seconds(), b * job["steps"]
    for t in range(job["steps"]):
        env.step(action)
        if (t + 1) % job["chunk"] == 0:
            env.observe()
    seconds, cpu = perf_counter() - begin, cpu_seconds() - cpu
    env.close()
    return {"steps_per_s": total / seconds, "cpu ms": cpu / total * 1e3}


def measure(job: Job) -> dict[str, Any]:
    """Control steps per second of all copies."""
    return peer(job) if job["kind"] == "SubprocVectorEnv" else ours(job)


def main() -> None:
    """Measure, print the table and the JSON line."""
    args = parser(__doc__).parse_args()
    steps = 16 if args.quick else 64
    kinds = [("SubprocVectorEnv", 1), ("ours, chunk 1", 1), ("ours, chunk 8", 8)]
    jobs: list[Job] = [{"kind": kind, "chunk": chunk, "copies": 2, "steps": steps} for kind, chunk in kinds]
    print(f"LIBERO, control steps of 2 copies per second, {machine()}")
    results = measure_all(__file__, jobs, args.repeats or (1 if args.quick else 3))
    speeds = [median(found, "steps_per_s") for found in results.values()]
    rows = []
    for (kind, _), speed, found in zip(kinds, speeds, results.values(), strict=True):
        ratio = speed / speeds[0] if speed and speeds[0] else None
        shown = "" if ratio is None else f"{ratio:.2f}"
        rows.append([kind, speed, f"{spread(found, 'steps_per_s'):.0%}", shown, median(found, "cpu ms")])
    print(table(["", "steps/s", "spread", "times its own", "cpu ms/step"], rows))
    out = {kind: {"steps_per_s": row[1], "cpu_ms": row[4]} for (kind, _), row in zip(kinds, rows, strict=True)}
    finish({"name": "libero", **out})


if __name__ == "__main__":
    worker_main(measure)
    main()
