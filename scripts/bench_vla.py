"""From pictures and words: where the time of a run goes, and what each way of saving it is worth.

    python scripts/bench_vla.py              all tables, 3 interleaved rounds (about 25 minutes)
    python scripts/bench_vla.py --quick      small, one round, about a minute

All tables are of untrained weights: `tiny_vla_flow` as the recipe `tabletop_vla` has it, `tiny_vla_tokens` as
`tabletop_vla_tokens` (what `make demo` trains) has it:

    phases       milliseconds per decision of all copies, by what they are spent on
    pipeline     collecting with one part (simulate, then decide), with two (one simulates while the other decides) and
                 with four, taken in turns in one process; see below
    skipping     an update when a share of the decisions has no advantage, with those rows evaluated and left out
    frozen       an update of the flow policy with likelihood: latent, whose trunk is frozen, and a critic that reads it,
                 on pictures that are encoded again and on the features that were kept while sampling
    prefix       a decision with pictures and words encoded once, and encoded again for each denoising step or token

Results of a GPU are added when there is one.

What `pipeline` injects. On a machine where simulator and policy compete for the same cores there is little to overlap, so
besides the recipe `as is` it is run with a simulator that takes its time somewhere else. Each decision then waits, once,
where its observation is asked for; `latency` is how long the wait of all copies is, as a multiple of what the policy takes
for all copies (measured in the same process just before). Resets do not wait.

    elsewhere    nothing but the wait: the simulator costs this machine nothing, and no episode ends
    waiting      the recipe's own simulator, and the wait besides
    shared       one simulator serves the parts in the order of their requests, and half of the copies take half of the
                 time, as on CPU cores of another machine: more parts do not make it faster
    each         each part waits the whole latency, however few its copies are, and parts wait at the same time, as for a
                 network or for simulators on a GPU each

Overlapped perfectly, with n parts, T decisions, inference i and a shared latency s of all copies, T (i + s) becomes
T max(i, s) + min(i, s) / n: nothing runs beside the first decision or the last wait.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from threading import Lock
from time import perf_counter, sleep
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from _bench import Job, Parts, finish, machine, measure_all, median, parser, spread, table, worker_main

RECIPES = {"tiny_vla_flow": "tabletop_vla", "tiny_vla_tokens": "tabletop_vla_tokens"}
"""Policy -> the recipe that it is measured in; changing the type over another's recipe would drop all its settings."""
POLICIES = tuple(RECIPES)
PHASES = ("physics", "camera", "inference", "update", "reset", "rest")
PARTS = (1, 2, 4)
SIMULATORS = (
    ("as is", "-", 0.0), ("waiting", "shared", 1.0),
    *(("elsewhere", "shared", x) for x in (0.5, 1.0, 2.0)), *(("elsewhere", "each", x) for x in (0.5, 1.0)),
)  # fmt: skip
"""(simulator, wait, latency) of the table `pipeline`."""
EVERY_STEP = {"policy__stochastic": "all", "policy__start": 1.0, "policy__noise": 0.5, "policy__min_std": 0.08}
"""Of the flow policy, where the recipe samples in its last step alone."""
SIZES = {True: {"copies": 32, "decisions": 4, "turns": 1}, False: {"copies": 64, "decisions": 8, "turns": 2}}
"""Of a measurement, quick or not."""
WHOLE = {"copies": 128, "decisions": 10}
"""Of `pipeline`: a rollout as the recipe has it, because its ends are what cannot be overlapped."""


def recipe(job: Job, **settings: Any) -> Any:
    """The recipe of the job's policy, with its sizes and threads; `settings` as a__b=c for a.b=c."""
    from embodied_rl.config import load_recipe

    chosen = {
        "start_from": "null", "device": job["device"], "threads": job["threads"],
        "collect__copies": job["copies"], "collect__decisions": job["decisions"], "collect__pipeline": 1,
        # Untrained weights never succeed: paid by success alone, no decision had an advantage and no update anything to do.
        "env__threads": os.cpu_count(), "env__reward": "progress",
    } | settings  # fmt: skip
    return load_recipe(RECIPES[job["policy"]], [f"{name.replace('__', '.')}={value}" for name, value in chosen.items()]).recipe


def session(job: Job, **settings: Any) -> Any:
    """A session of `recipe`."""
    from embodied_rl.session import Session

    return Session.build(recipe(job, **settings))


def seen(session: Any) -> Any:
    """What all copies of a session with one part see after a rollout."""
    session.collector.collect()
    return session.collector.parts[0].obs


def wait_for(device: str) -> Callable[[], object]:
    """What waits until a device has done what it was asked for."""
    import torch

    return torch.cuda.synchronize if device.startswith("cuda") else lambda: None


def in_turns(ways: dict[str, Callable[[], object]], job: Job) -> dict[str, float]:
    """Median seconds of each way, taken in turns for the job's time, after one turn that warms up."""
    wait = wait_for(job["device"])
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for way in ways.values():
        way()
    start, turns = perf_counter(), 0
    while turns < job["turns"] or perf_counter() - start < job["seconds"]:
        for name, way in ways.items():
            wait()
            before = perf_counter()
            way()
            wait()
            seconds[name].append(perf_counter() - before)
        turns += 1
    return {name: statistics.median(taken) for name, taken in seconds.items()}


def measure_phases(job: Job) -> dict[str, Any]:
    """Milliseconds per decision of all copies by phase, and decisions per second."""
    from embodied_rl.measure import Clock

    s = session(job)
    parts = Parts(PHASES, wait_for(job["device"]))
    env = s.collector.parts[0].env
    for owner, method, phase in (
        (env, "step", "physics"), (env, "observe", "camera"), (env, "reset", "reset"),
        (s.policy, "act", "inference"), (s.policy, "value", "inference"), (s.updater, "update", "update"),
    ):  # fmt: skip
        parts.watch(owner, method, phase)
    s.iterate(Clock())
    parts.take()
    start, turns = perf_counter(), 0
    while turns < job["turns"] or perf_counter() - start < job["seconds"]:
        s.iterate(Clock())
        turns += 1
    # Sums, because resets are rare and dear.
    spent, decisions = parts.take(), turns * job["decisions"]
    s.close()
    return {
        **{phase: seconds / decisions * 1e3 for phase, seconds in spent.items()},
        "decisions_per_s": job["copies"] * decisions / sum(spent.values()),
    }


class Server:
    """Something elsewhere that works off requests one after the other."""

    def __init__(self) -> None:
        """Nothing to do yet."""
        self._lock, self._free = Lock(), 0.0

    def serve(self, seconds: float) -> None:
        """Wait until it has done what was asked for earlier, and then this for `seconds`.

        Sleeping gives the interpreter and the core to others, as waiting for a network or a GPU does.
        """
        with self._lock:
            self._free = max(self._free, perf_counter()) + seconds
            left = self._free - perf_counter()
        sleep(max(0.0, left))


class Distant:
    """An env that runs, as far as this process can tell, on another machine: what it shows is waited for."""

    def __init__(self, env: Any, server: Server, seconds: float, simulate: bool) -> None:
        """Wrap an env whose reset has been called.

        Args:
            env: On demand, so that each decision asks once what is seen.
            server: Simulates.
            seconds: It takes per decision.
            simulate: Also step the env; otherwise it shows what it saw last, and no episode ends.
        """
        self.env, self.server, self.seconds, self.simulate = env, server, seconds, simulate
        self.spec, self.reset = env.spec, env.reset
        self._seen = env.observe()

    def step(self, action: Any, active: Any = None) -> Any:
        """Hand the action over."""
        import torch

        from embodied_rl.types import Step

        if self.simulate:
            return self.env.step(action, active)
        no = torch.zeros(len(action), dtype=torch.bool, device=action.device)
        return Step({}, no.float(), no, no.clone(), no.clone())

    def observe(self) -> Any:
        """What is seen after the latest step, when the simulator is done."""
        self.server.serve(self.seconds)
        return self.env.observe() if self.simulate else self._seen

    def close(self) -> None:
        """Close the env."""
        self.env.close()


def measure_pipeline(job: Job) -> dict[str, Any]:
    """Milliseconds per decision of all copies by number of parts; of the policy alone for all copies and half of them."""
    threads, copies = os.cpu_count() or 1, job["copies"]
    ways = {n: session(job, collect__pipeline=n, env__threads=max(1, threads // n)) for n in PARTS}
    obs = seen(ways[1])
    policy = ways[1].policy
    half = {name: x[: copies // 2] for name, x in obs.items()}
    think = {"act": lambda: policy.act(obs, generator=None), "half": lambda: policy.act(half, generator=None)}
    thought = in_turns(think, job | {"seconds": 1.0})
    for n, s in ways.items():
        if n > 1:
            s.collector.collect()
        shared = Server()
        for part in s.collector.parts:
            if job["simulator"] == "as is":
                continue
            wait = thought["act"] * job["latency"]
            server, seconds = (shared, wait / n) if job["wait"] == "shared" else (Server(), wait)
            part.env = Distant(part.env, server, seconds, simulate=job["simulator"] == "waiting")
    took = in_turns({f"{n} parts": s.collector.collect for n, s in ways.items()}, job)
    for s in ways.values():
        s.close()
    ms = {name: seconds / job["decisions"] * 1e3 for name, seconds in took.items()}
    ratios = {f"ratio {n}": took["1 parts"] / took[f"{n} parts"] for n in PARTS[1:]}
    return ms | ratios | {name: seconds * 1e3 for name, seconds in thought.items()}


def measure_skipping(job: Job) -> dict[str, Any]:
    """Seconds of an update of a loss that nothing but the advantage feeds, with and without the rows that have none."""
    import torch

    from embodied_rl.loss import LossFunction, ValueLoss
    from embodied_rl.types import Advantage
    from embodied_rl.update import Updater

    class Everything(LossFunction):
        def skips(self, batch: Any) -> bool:
            return False

    s = session(job)
    rollout = s.collector.collect()
    algorithm, levels = s.recipe.algorithm, (s.policy.actions_per_decision, s.policy.value_range)
    config = algorithm.loss.model_copy(update={"value": ValueLoss(coef=0.0)})
    # Every epoch is made, whatever the KL.
    update = algorithm.update.model_copy(update={"critic_warmup": 0, "target_kl": None})
    updater = Updater(s.policy, LossFunction(config, *levels), update, seed=0, max_bad_updates=1)
    generator = torch.Generator().manual_seed(0)
    signal = torch.rand(rollout.reward.shape, generator=generator) >= job["share"]
    advantage = torch.randn(rollout.reward.shape, generator=generator) * signal

    def learn(loss: LossFunction) -> Callable[[], object]:
        def way() -> None:
            updater.loss = loss
            updater.update(rollout, Advantage(advantage.to(rollout.reward.device)), progress=0.0)

        return way

    took = in_turns({"all": learn(Everything(config, *levels)), "skipped": learn(LossFunction(config, *levels))}, job)
    s.close()
    return took | {"ratio": took["all"] / took["skipped"]}


def measure_frozen(job: Job) -> dict[str, Any]:
    """Seconds of an update with a frozen trunk, from pictures and from kept features."""
    from dataclasses import replace

    # A critic that is told the state reads the observation, and then nothing is kept.
    s = session(job, policy__likelihood="latent", policy__critic__reads="prefix", **EVERY_STEP)
    updater, rollout = s.updater, s.collector.collect()
    assert rollout.features is not None
    updater.config = updater.config.model_copy(update={"target_kl": None})
    advantage = s.credit(rollout)
    pictures = replace(rollout, features=None)
    ways = {"pictures": pictures, "features": rollout}
    took = in_turns({k: lambda x=x: updater.update(x, advantage, progress=0.0) for k, x in ways.items()}, job)
    s.close()
    return took | {"ratio": took["pictures"] / took["features"]}


def measure_prefix(job: Job) -> dict[str, Any]:
    """Milliseconds of a decision of all copies with the prefix encoded once, and once per denoising step or token."""
    import torch

    more = {"policy__decoding": "autoregressive"} if job["policy"] == "tiny_vla_tokens" else EVERY_STEP
    s = session(job, collect__decisions=1, **more)
    obs = seen(s)
    policy, trunk = s.policy, s.policy.trunk
    generator = torch.Generator(s.device).manual_seed(0)
    passes = policy.num_units
    suffix, calls = trunk.suffix, {"n": 0}

    def again(*args: Any, **kwargs: Any) -> Any:
        # The first pass uses what was just encoded; the one after the last is that of the log-probabilities.
        calls["n"] += 1
        if 1 < calls["n"] <= passes:
            trunk.prefix(obs)
        return suffix(*args, **kwargs)

    def act(way: Callable[..., Any]) -> Callable[[], object]:
        def decide() -> None:
            calls["n"] = 0
            trunk.suffix = way
            policy.act(obs, generator=generator)

        return decide

    took = in_turns({"each": act(again), "once": act(suffix)}, job)
    s.close()
    return {name: seconds * 1e3 for name, seconds in took.items()} | {"passes": passes, "ratio": took["each"] / took["once"]}


MEASURES = {
    "phases": measure_phases,
    "pipeline": measure_pipeline,
    "skipping": measure_skipping,
    "frozen": measure_frozen,
    "prefix": measure_prefix,
}


def measure(job: Job) -> dict[str, Any]:
    """One row of one table."""
    return MEASURES[job["table"]](job)


def plan(tables: list[str], quick: bool, seconds: float) -> list[Job]:
    """All measurements of one round."""
    import torch

    sizes = SIZES[quick]
    policies = POLICIES[:1] if quick else POLICIES
    jobs: list[Job] = []
    for device in ("cpu", "cuda") if torch.cuda.is_available() else ("cpu",):
        common = sizes | {"device": device, "seconds": seconds}
        many = (1,) if quick or device == "cuda" else (1, 2)
        rows: dict[str, list[Job]] = {
            "phases": [{"policy": p, "threads": t} for p in POLICIES for t in many],
            "pipeline": [
                {"policy": POLICIES[0], "threads": 1, "simulator": s, "wait": w, "latency": x} | (sizes if quick else WHOLE)
                for s, w, x in (SIMULATORS[:4:3] if quick else SIMULATORS)
            ],
            "skipping": [{"policy": p, "threads": 1, "share": x} for p in policies for x in ((0.5,) if quick else (0.5, 0.9))],
            "frozen": [{"policy": POLICIES[0], "threads": 1}],
            "prefix": [{"policy": p, "threads": 1} | ({"copies": 16} if quick else {}) for p in POLICIES],
        }
        jobs += [{"table": name} | common | row for name in tables for row in rows[name]]
    return jobs


COLUMNS = {
    "phases": (*PHASES, "decisions_per_s"),
    "pipeline": ("act", "half", *(f"{n} parts" for n in PARTS), *(f"ratio {n}" for n in PARTS[:0:-1])),
    "skipping": ("all", "skipped", "ratio"),
    "frozen": ("pictures", "features", "ratio"),
    "prefix": ("passes", "each", "once", "ratio"),
}
"""Table -> what is measured; the last is the one whose spread over the rounds is told."""
SETTINGS = {"pipeline": ("simulator", "wait", "latency"), "skipping": ("share",)}
UNITS = {
    "phases": "milliseconds per decision of all copies",
    "pipeline": "milliseconds per decision of all copies while collecting; act, half: the policy alone on all copies, on half of them",
    "skipping": "seconds per update; share: of decisions without an advantage",
    "frozen": "seconds per update with likelihood: latent",
    "prefix": "milliseconds per decision of all copies",
}


def report(jobs: list[Job], results: dict[int, list[dict[str, Any]]]) -> dict[str, Any]:
    """Print the tables and return the JSON object."""
    out: dict[str, Any] = {}
    for name in dict.fromkeys(job["table"] for job in jobs):
        keys = ("policy", "device", "threads", *SETTINGS.get(name, ()))
        rows = []
        for i, job in enumerate(jobs):
            if job["table"] != name:
                continue
            numbers = {column: median(results[i], column) for column in COLUMNS[name]}
            rows.append([*(job[k] for k in keys), *numbers.values(), f"{spread(results[i], COLUMNS[name][-1]):.0%}"])
            out.setdefault(name, {})[" ".join(str(job[k]) for k in keys)] = numbers
        print(f"\n{name}: {UNITS[name]}")
        print(table([*keys, *COLUMNS[name], "spread"], rows))
    return out


def main() -> None:
    """Measure, print the tables and the JSON line."""
    p = parser(__doc__)
    p.add_argument("--only", nargs="+", choices=list(MEASURES), default=list(MEASURES), help="tables to make")
    p.add_argument("--seconds", type=float, default=None, help="time measured per row and round (default 8, quick 0)")
    args = p.parse_args()
    jobs = plan(args.only, args.quick, (0.0 if args.quick else 8.0) if args.seconds is None else args.seconds)
    print(f"{', '.join(RECIPES.values())} with {SIZES[args.quick]['copies']} copies, {machine()}")
    results = measure_all(__file__, jobs, args.repeats or (1 if args.quick else 3))
    out = report(jobs, results)
    finish({"name": "vla", "setting": SIZES[args.quick], **out})


if __name__ == "__main__":
    worker_main(measure)
    main()
