"""What one iteration tells about itself: partial sums over the rollout that was just used."""

from __future__ import annotations

import resource
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from time import perf_counter

import torch

from embodied_rl.metrics import Partials
from embodied_rl.offers import Restarting
from embodied_rl.types import Env, Rollout

PER_TASK = {"return_mean": "return", "success_once_rate": "success_once", "success_at_end_rate": "success_at_end"}
"""Metric under rollout/ -> column of `Rollout.finished`, averaged over all episodes and over those of each task."""


def rollout_metrics(rollout: Rollout, tasks: tuple[str, ...]) -> Partials:
    """Returns, lengths, success and reward terms of the episodes and steps of one rollout.

    Args:
        rollout: [T, B].
        tasks: Names of the env's tasks; per-task keys only when there are several.

    Returns:
        metrics: Keys under rollout/; what the rollout does not contain is absent.
    """
    out = Partials()
    for name, (total, count) in rollout.metrics.items():
        out.add(f"rollout/reward_{name}_mean", total, count)
    ended = rollout.finished
    failed = 0 if rollout.invalid is None else len(rollout.episode[rollout.invalid].unique())
    if failed or ended:
        out.add("rollout/invalid_rate", failed, failed + len(ended.get("return", ())))
        out.add("rollout/invalid_episodes", failed)
    if not ended:
        return out
    n = len(ended["return"])
    if n > 1:
        out.last("rollout/return_std", float(ended["return"].std()))
    out.add("rollout/length_mean", float(ended["length"].sum()), n)
    cut = rollout.truncated & rollout.valid
    out.add("rollout/truncated_rate", float((cut if rollout.greedy is None else cut & ~rollout.greedy).sum()), n)
    out.last("rollout/episodes", float(n))
    for name, column in PER_TASK.items():
        if column not in ended:
            continue
        values = ended[column].double()
        out.add(f"rollout/{name}", float(values.sum()), n)
        for i, task in enumerate(tasks if len(tasks) > 1 else ()):
            chosen = values[ended["task"] == i]
            if len(chosen):
                out.add(f"rollout/{name}/{task}", float(chosen.sum()), len(chosen))
    return out


def restarts_of(envs: Iterable[Env]) -> int | None:
    """Processes of simulators replaced since the envs were built; None where there are none."""
    told = [env.restarts for env in envs if isinstance(env, Restarting)]
    counts = [count for count in told if count is not None]
    return sum(counts) if counts else None


class Clock:
    """Seconds spent in named phases since the last `take`."""

    def __init__(self) -> None:
        """Start empty."""
        self.seconds: dict[str, float] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[None]:
        """Add the time of the block to `name`; waits for the GPU so that the time is real."""
        start = perf_counter()
        yield
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.seconds[name] = self.seconds.get(name, 0.0) + perf_counter() - start

    def take(self) -> dict[str, float]:
        """Seconds by phase, then start anew."""
        out, self.seconds = self.seconds, {}
        return out


def memory_mib() -> float:
    """Largest resident memory of this process so far, MiB."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / 2**20 if sys.platform == "darwin" else peak / 2**10
