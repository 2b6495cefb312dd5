"""From pictures and words: where the time of a run goes, and what each way of saving it is worth.

    python scripts/bench_vla.py              all tables, 3 interleaved rounds (about 25 minutes)
    python scripts/bench_vla.py --quick      small, one round, about a minute

All tables are of the recipe `tabletop_vla` with untrained weights, for both kinds of policy:

    phases       milliseconds per decision of all copies, by what they are spent on
    pipeline     collecting with one part (simulate, then decide) and with two (one simulates while the other decides),
                 taken in turns in one process. `as is`: the recipe's own simulator, which needs the cores itself;
                 `waiting`: the same, and besides each decision waits as long as the policy thinks, as for a simulator
                 on another machine; `elsewhere`: nothing but that wait
    skipping     an update when a share of the decisions has no advantage, with those rows evaluated and left out
    frozen       an update of the flow policy with likelihood: latent, whose trunk is frozen, on pictures that are encoded
                 again and on the features that were kept while sampling
    prefix       a decision with pictures and words encoded once, and encoded again for each denoising step or token

Results of a GPU are added when there is one.
"""

from __future__ import annotations

import os
import statistics
import sys
from collections.abc import Callable
from time import perf_counter, sleep
from typing import Any

sys.path.insert(0, os.path.dirname(os.path.abspath(__file__)))

from _bench import Job, Parts, finish, machine, measure_all, median, parser, spread, table, worker_main

RECIPE = "tabletop_vla"
POLICIES = ("tiny_vla_flow", "tiny_vla_tokens")
PHASES = ("physics", "camera", "inference", "update", "reset", "rest")
SIMULATORS = ("as is", "waiting", "elsewhere")
EVERY_STEP = {"policy__stochastic": "all", "policy__start": 1.0, "policy__noise": 0.5, "policy__min_std": 0.08}
"""Of the flow policy, where the recipe samples in its last step alone."""
SIZES = {True: {"copies": 32, "decisions": 4, "turns": 1}, False: {"copies": 64, "decisions": 8, "turns": 2}}
"""Of a measurement, quick or not; a whole rollout of the recipe has 20 decisions, and so it does in `pipeline`."""


def recipe(job: Job, **settings: Any) -> Any:
    """The recipe with the job's policy, sizes and threads; `settings` as a__b=c for a.b=c."""
    from embodied_rl.config import load_recipe

    chosen = {
        "start_from": "null", "policy__type": job["policy"], "device": job["device"], "threads": job["threads"],
        "collect__copies": job["copies"], "collect__decisions": job["decisions"], "collect__pipeline": 1,
        # Untrained weights never succeed: paid by success alone, no decision had an advantage and no update anything to do.
        "env__threads": os.cpu_count(), "env__reward": "progress",
    } | settings  # fmt: skip
    return load_recipe(RECIPE, [f"{name.replace('__', '.')}={value}" for name, value in chosen.items()]).recipe


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


class Distant:
    """An env that runs, as far as this process can tell, on another machine: every step is waited for.

    Sleeping gives the interpreter and the core to others, as waiting for a network or a GPU does.
    """

    def __init__(self, env: Any, seconds: float, simulate: bool) -> None:
        """Wrap an env whose reset has been called.

        Args:
            env: On demand.
            seconds: Of waiting per control step.
            simulate: Also step the env; otherwise it shows what it saw last, and no episode ends.
        """
        self.env, self.seconds, self.simulate = env, seconds, simulate
        self.spec, self.reset = env.spec, env.reset
        self._seen = env.observe()

    def step(self, action: Any, active: Any = None) -> Any:
        """Wait, then step."""
        import torch

        from embodied_rl.types import Step

        sleep(self.seconds)
        if self.simulate:
            return self.env.step(action, active)
        no = torch.zeros(len(action), dtype=torch.bool, device=action.device)
        return Step({}, no.float(), no, no.clone(), no.clone())

    def observe(self) -> Any:
        """What is seen after the latest step."""
        return self.env.observe() if self.simulate else self._seen

    def close(self) -> None:
        """Close the env."""
        self.env.close()


def measure_pipeline(job: Job) -> dict[str, Any]:
    """Milliseconds per decision of all copies, collected with one part and with two."""
    threads = os.cpu_count() or 1
    ways = {f"{n} parts": session(job, collect__pipeline=n, env__threads=max(1, threads // n)) for n in (1, 2)}
    ways["2 parts"].collector.collect()
    obs = seen(ways["1 parts"])
    policy = ways["1 parts"].policy
    thought = in_turns({"act": lambda: policy.act(obs, generator=None)}, job | {"seconds": 0.5})["act"]
    if job["simulator"] != "as is":
        for s in ways.values():
            for part in s.collector.parts:
                # Of a decision of all copies: half of the copies are simulated in half of the time.
                seconds = thought * part.env.spec.num_envs / job["copies"] / s.policy.chunk
                part.env = Distant(part.env, seconds, simulate=job["simulator"] == "waiting")
    took = in_turns({name: s.collector.collect for name, s in ways.items()}, job)
    for s in ways.values():
        s.close()
    ms = {name: seconds / job["decisions"] * 1e3 for name, seconds in took.items()}
    return ms | {"act": thought * 1e3, "ratio": took["1 parts"] / took["2 parts"]}


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

    s = session(job, policy__likelihood="latent", **EVERY_STEP)
    updater, rollout = s.updater, s.collector.collect()
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
                {"policy": POLICIES[0], "threads": t, "simulator": s} | (sizes if quick else {"decisions": 20})
                for t in many
                for s in (SIMULATORS[::2] if quick else SIMULATORS)
            ],
            "skipping": [{"policy": p, "threads": 1, "share": x} for p in policies for x in ((0.5,) if quick else (0.5, 0.9))],
            "frozen": [{"policy": POLICIES[0], "threads": 1}],
            "prefix": [{"policy": p, "threads": 1} | ({"copies": 16} if quick else {}) for p in POLICIES],
        }
        jobs += [{"table": name} | common | row for name in tables for row in rows[name]]
    return jobs


COLUMNS = {
    "phases": (*PHASES, "decisions_per_s"),
    "pipeline": ("act", "1 parts", "2 parts", "ratio"),
    "skipping": ("all", "skipped", "ratio"),
    "frozen": ("pictures", "features", "ratio"),
    "prefix": ("passes", "each", "once", "ratio"),
}
"""Table -> what is measured; the last is the one whose spread over the rounds is told."""
SETTINGS = {"pipeline": ("simulator",), "skipping": ("share",)}
UNITS = {
    "phases": "milliseconds per decision of all copies",
    "pipeline": "milliseconds per decision of all copies while collecting; act: the policy alone",
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
    print(f"{RECIPE} with {SIZES[args.quick]['copies']} copies, {machine()}")
    results = measure_all(__file__, jobs, args.repeats or (1 if args.quick else 3))
    out = report(jobs, results)
    finish({"name": "vla", "setting": SIZES[args.quick], **out})


if __name__ == "__main__":
    worker_main(measure)
    main()
