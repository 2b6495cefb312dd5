"""What a control step costs more when its simulator runs in a process of its own.

    python scripts/bench_isolation.py            3 interleaved rounds (about a minute)
    python scripts/bench_isolation.py --quick    a few seconds

A simulator that does nothing but hand over its observation is stepped in this process, behind the isolated env, and
behind Gymnasium's AsyncVectorEnv (shared memory for observations, pickles for the rest). The overhead is the difference
per step of all copies; with several copies per worker it is shared by them.
"""

from __future__ import annotations

import os
import statistics
import sys
import tempfile
from time import perf_counter
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from _bench import Job, finish, machine, measure_all, median, parser, spread, table, worker_main

SIMULATOR = '''
import numpy as np

class Simulator:
    def __init__(self, settings):
        shape, kind = settings["shape"], settings["dtype"]
        self.spec = {"observation": {"state": {"shape": shape, "dtype": kind}}, "action": {"kind": "continuous", "size": 4}}
        self.seen = {"state": np.zeros(shape, kind)}

    def reset(self, seed, task):
        return self.seen

    def step(self, action):
        return self.seen, 0.0, False, False, {}
'''
Times = tuple[float, float]
"""Seconds per step: median, and the quickest tenth."""
SMALL, PICTURE = ([10], "float32"), ([224, 224, 3], "uint8")


def namespace() -> dict[str, Any]:
    """The simulator's code, run here."""
    scope: dict[str, Any] = {}
    exec(SIMULATOR, scope)
    return scope


def isolated(job: Job, steps: int) -> Times:
    """Seconds per step of all copies behind the isolated env."""
    import torch

    from embodied_rl.envs.isolated import Config, build

    b = job["copies"]
    with tempfile.NamedTemporaryFile("w", suffix=".py") as file:
        file.write(SIMULATOR)
        file.flush()
        settings = {"shape": job["shape"], "dtype": job["dtype"]}
        config = Config(simulator=file.name, settings=settings, workers=job["workers"], resumable=False)
        env = build(config, num_envs=b, device=torch.device("cpu"), split="train", seed=0)
    env.reset(torch.ones(b, dtype=torch.bool), torch.arange(b), torch.zeros(b, dtype=torch.int64))
    action = torch.zeros(b, 4)
    seconds = clock(lambda: env.step(action), steps)
    env.close()
    return seconds


def gymnasium_async(job: Job, steps: int) -> Times:
    """The same behind Gymnasium's AsyncVectorEnv, one process per copy."""
    import gymnasium
    import numpy as np

    class Plain(gymnasium.Env):
        def __init__(self) -> None:
            self.inner = namespace()["Simulator"]({"shape": job["shape"], "dtype": job["dtype"]})
            limit = 255 if job["dtype"] == "uint8" else np.inf
            low = 0 if job["dtype"] == "uint8" else -np.inf
            self.observation_space = gymnasium.spaces.Box(low, limit, job["shape"], np.dtype(job["dtype"]))
            self.action_space = gymnasium.spaces.Box(-1, 1, (4,))

        def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
            return self.inner.reset(0, 0)["state"], {}

        def step(self, action: Any) -> Any:
            obs, *rest = self.inner.step(action)
            return (obs["state"], *rest)

    env = gymnasium.vector.AsyncVectorEnv([Plain] * job["copies"], shared_memory=True)
    env.reset(seed=0)
    action = np.zeros((job["copies"], 4), np.float32)
    seconds = clock(lambda: env.step(action), steps)
    env.close(terminate=True)
    return seconds


def direct(job: Job, steps: int) -> Times:
    """The same simulators in this process, without any env around them."""
    import numpy as np

    made = [namespace()["Simulator"]({"shape": job["shape"], "dtype": job["dtype"]}) for _ in range(job["copies"])]
    action = np.zeros(4, np.float32)

    def step() -> None:
        for one in made:
            one.step(action)

    return clock(step, steps)


def clock(step: Any, steps: int) -> Times:
    """Seconds of one step: the median, and the quickest tenth, which other jobs on the machine disturb the least."""
    times = []
    for _ in range(steps):
        begin = perf_counter()
        step()
        times.append(perf_counter() - begin)
    return statistics.median(times), statistics.quantiles(times, n=10)[0]


def measure(job: Job) -> dict[str, Any]:
    """Microseconds per step, and what is left after the simulator's own."""
    kind = {"isolated": isolated, "gymnasium_async": gymnasium_async}[job["kind"]]
    own, whole = direct(job, job["steps"]), kind(job, job["steps"])
    overhead, quiet = (1e6 * (w - o) for w, o in zip(whole, own, strict=True))
    return {"overhead_us": overhead, "quiet_us": quiet}


def main() -> None:
    """Measure, print the table and the JSON line."""
    args = parser(__doc__).parse_args()
    cases = [("isolated", 1, 1, SMALL), ("gymnasium_async", 1, 1, SMALL), ("isolated", 8, 1, SMALL), ("isolated", 8, 2, SMALL)]
    cases += [("gymnasium_async", 8, 8, SMALL), ("isolated", 8, 2, PICTURE), ("gymnasium_async", 8, 8, PICTURE)]
    jobs: list[Job] = [
        {"kind": kind, "copies": copies, "workers": workers, "shape": shape, "dtype": dtype, "steps": 1000 if args.quick else 5000}
        for kind, copies, workers, (shape, dtype) in cases
    ]
    print(f"overhead of a step of all copies, {machine()}")
    results = measure_all(__file__, jobs, args.repeats or (1 if args.quick else 3))
    rows, overhead, quickest = [], {}, {}
    for i, (job, case) in enumerate(zip(jobs, cases, strict=True)):
        sees = "10 numbers" if job["dtype"] == "float32" else "a 224x224 picture"
        us, quiet = median(results[i], "overhead_us"), median(results[i], "quiet_us")
        rows.append([case[0], case[1], case[2], sees, us, f"{spread(results[i], 'overhead_us'):.0%}", quiet])
        name = f"{case[0]} {case[1]} copies {case[2]} processes {sees}"
        overhead[name], quickest[name] = us, quiet
    print(table(["behind", "copies", "processes", "each sees", "microseconds", "spread", "quickest tenth"], rows))
    finish({"name": "isolation", "overhead_us": overhead, "quickest_tenth_us": quickest})


if __name__ == "__main__":
    worker_main(measure)
    main()
