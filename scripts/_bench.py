"""What the benchmarks share: one subprocess per measurement, interleaved repeats, medians, a table, a JSON line."""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import platform
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Sequence
from time import perf_counter
from typing import Any

Job = dict[str, Any]
"""Arguments of one measurement: plain data, because it crosses a process border."""
_failed: list[Job] = []
"""Measurements of this process that brought nothing; `finish` tells them."""


def worker_main(measure: Callable[[Job], dict[str, Any]]) -> None:
    """Run one measurement if this process was started by `measure_all`; otherwise return.

    Args:
        measure: Takes the job; its result is printed as the last line.
    """
    if len(sys.argv) == 3 and sys.argv[1] == "--worker":
        result = measure(json.loads(sys.argv[2]))
        print(json.dumps(result), flush=True)
        # Skips the peers' exit handlers, some of which wait for threads of an env that was stopped in mid-step.
        os._exit(0)


def measure_all(script: str, jobs: Iterable[Job], repeats: int, timeout: float = 600.0) -> dict[int, list[dict[str, Any]]]:
    """Measure every job `repeats` times, each in a process of its own, round by round so that all see the same drift.

    Args:
        script: Path of the script whose `worker_main` measures.
        jobs: One per line of the result; `threads` becomes the number of CPU threads of torch and OpenMP.
        repeats: Rounds.
        timeout: Seconds one measurement may take.

    Returns:
        results: Index of the job -> the results of its rounds that succeeded.
    """
    jobs = list(jobs)
    results: dict[int, list[dict[str, Any]]] = {i: [] for i in range(len(jobs))}
    for round_ in range(repeats):
        for i, job in enumerate(jobs):
            label = " ".join(f"{k}={v}" for k, v in job.items())
            print(f"\r\033[K[{round_ * len(jobs) + i + 1}/{repeats * len(jobs)}] {label}", end="", file=sys.stderr, flush=True)
            result = _run(script, job, timeout)
            if result is not None:
                results[i].append(result)
    print("\r\033[K", end="", file=sys.stderr, flush=True)
    return results


def _run(script: str, job: Job, timeout: float) -> dict[str, Any] | None:
    threads = str(job.get("threads", 1))
    env = {**os.environ, "OMP_NUM_THREADS": threads, "MKL_NUM_THREADS": threads, "PYTHONWARNINGS": "ignore"}
    command = [sys.executable, script, "--worker", json.dumps(job)]
    with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
        # A session of its own, so that simulators which it started end with it.
        process = subprocess.Popen(command, stdout=out, stderr=err, env=env, start_new_session=True)
        try:
            code = process.wait(timeout)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)
        out.seek(0), err.seek(0)
        lines = [line for line in out.read().splitlines() if line.startswith("{")]
        if code == 0 and lines:
            return json.loads(lines[-1])
        last = (err.read().strip().splitlines() or ["no output"])[-1]
    why = f"nothing within {timeout:.0f} s" if code is None else f"exit code {code}: {last}"
    print(f"\nno result from {job}: {why}", file=sys.stderr)
    _failed.append(job)
    return None


class Parts:
    """Exclusive seconds by part: time in a nested part does not count for the outer one."""

    def __init__(
        self, names: Sequence[str], wait: Callable[[], object] = lambda: None, clock: Callable[[], float] | None = None
    ) -> None:
        """Nothing measured yet.

        Args:
            names: Parts; the last is what runs when no other does.
            wait: Called before the clock is read: what a GPU still does belongs to the part that asked for it.
            clock: Tells seconds; None for those on the wall.
        """
        self.seconds = dict.fromkeys(names, 0.0)
        self._running = [names[-1]]
        self._wait, self._clock = wait, clock or perf_counter
        self._since = self._clock()

    def switch(self) -> None:
        """Book the time since the last switch on the part that runs."""
        self._wait()
        now = self._clock()
        self.seconds[self._running[-1]] += now - self._since
        self._since = now

    def take(self) -> dict[str, float]:
        """Seconds by part since the last `take`."""
        self.switch()
        out, self.seconds = self.seconds, dict.fromkeys(self.seconds, 0.0)
        return out

    def watch(self, owner: Any, method: str, part: str) -> None:
        """Measure every call of `owner.method` as `part`."""
        inner = getattr(owner, method)

        def measured(*args: Any, **kwargs: Any) -> Any:
            self.switch()
            self._running.append(part)
            try:
                return inner(*args, **kwargs)
            finally:
                self.switch()
                self._running.pop()

        setattr(owner, method, measured)


def median(results: list[dict[str, Any]], key: str) -> float | None:
    """Median of one number over the rounds; None when there is none."""
    values = [r[key] for r in results if r.get(key) is not None]
    return statistics.median(values) if values else None


def spread(results: list[dict[str, Any]], key: str) -> float:
    """(largest - smallest) / median over the rounds: what a difference has to exceed to mean anything."""
    values = [r[key] for r in results if r.get(key) is not None]
    return (max(values) - min(values)) / statistics.median(values) if values else 0.0


def table(header: list[str], rows: list[list[Any]]) -> str:
    """Columns of equal width; numbers to the right, with thousands separated."""
    text = [[_show(x) for x in row] for row in rows]
    width = [max(len(h), *(len(r[i]) for r in text)) if text else len(h) for i, h in enumerate(header)]
    lines = ["  ".join(h.ljust(w) if i == 0 else h.rjust(w) for i, (h, w) in enumerate(zip(header, width, strict=True)))]
    for row in text:
        lines.append("  ".join(x.ljust(w) if i == 0 else x.rjust(w) for i, (x, w) in enumerate(zip(row, width, strict=True))))
    return "\n".join(lines)


def _show(x: Any) -> str:
    if x is None:
        return "-"
    if isinstance(x, float):
        return f"{x:,.0f}" if abs(x) >= 1000 else f"{x:.3g}"
    return str(x)


def machine() -> str:
    """One line about where the numbers come from."""
    import torch

    load = ", ".join(f"{x:.1f}" for x in os.getloadavg())
    return f"{os.cpu_count()} cores, {platform.machine()}, Python {platform.python_version()}, torch {torch.__version__}, load {load}"


def parser(doc: str | None, rounds: int = 3) -> argparse.ArgumentParser:
    """A command line with the options that every benchmark takes; `rounds` is how many it makes unless told."""
    p = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    p.add_argument("--quick", action="store_true", help="about a minute; numbers good for a smoke test only")
    p.add_argument("--repeats", type=int, default=None, help=f"rounds of interleaved measurements (default {rounds}, quick 1)")
    return p


def finish(result: dict[str, Any]) -> None:
    """Print the result as the last line, numbers rounded to four digits.

    Raises:
        SystemExit: A measurement failed: the tables hold the others, and whoever started the script is told by its code.
    """
    print(json.dumps(_round(result)), flush=True)
    if _failed:
        sys.exit(f"{len(_failed)} of the measurements failed, see 'no result from' above")


def _round(x: Any) -> Any:
    if isinstance(x, float):
        return float(f"{x:.4g}")
    return {k: _round(v) for k, v in x.items()} if isinstance(x, dict) else x
