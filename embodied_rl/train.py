"""Training: the loop, and what surrounds it (run folder, signals, resume, final evaluation)."""

from __future__ import annotations

import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

import torch

from embodied_rl import checkpoint
from embodied_rl.config import dump_recipe, load_resolved
from embodied_rl.errors import ConfigError, RunFolderError
from embodied_rl.evaluate import evaluate, film
from embodied_rl.measure import Clock, memory_mib, rollout_metrics
from embodied_rl.recipe import Recipe
from embodied_rl.report import write_report
from embodied_rl.results import EvaluationResult
from embodied_rl.runfolder import RunFolder, Summary, open_run
from embodied_rl.session import Session, build_env
from embodied_rl.types import Env
from embodied_rl.writers import Writers, open_writers

log = logging.getLogger(__name__)

RESUMABLE = ("train", "evaluate", "checkpoint", "log", "device")
"""Sections that may differ between a run and its continuation: they do not change what the next update computes."""


class StopRequest:
    """SIGINT or SIGTERM: the first asks the loop to stop after the current update, a second SIGINT ends at once."""

    def __init__(self) -> None:
        """Nothing asked yet."""
        self.signal: signal.Signals | None = None

    def _handle(self, number: int, frame: FrameType | None) -> None:
        if self.signal is not None and number == signal.SIGINT:
            os.write(2, b"\nsecond interrupt: stopping at once; the last checkpoint is intact\n")
            os._exit(130)
        self.signal = signal.Signals(number)
        os.write(2, b"\nfinishing the current update, then saving (interrupt again to stop at once)\n")

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the two signals inside the block."""
        old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)


def train(session: Session, folder: RunFolder, writers: Writers, stop: StopRequest) -> str:
    """The algorithm: collect, credit, update, measure; now and then evaluate and save.

    Args:
        session: Freshly built or restored.
        folder: Where checkpoints go.
        writers: Where numbers go.
        stop: Signals.

    Returns:
        reason: Why training ended: "finished", "time", "target", "SIGINT" or "SIGTERM".
    """
    s, r, clock = session, session.recipe, Clock()
    suite = Suite(r)
    started, wall_before = perf_counter(), s.wall_s
    reason = why_stop(s, stop, None)
    while reason is None:
        with clock.phase("rollout"):
            rollout = s.collector.collect()
        with clock.phase("advantage"):
            advantage = s.credit(rollout)
        with clock.phase("update"):
            metrics = s.updater.update(rollout, advantage, progress=s.progress)
            s.policy.observe({k: v[rollout.valid] for k, v in rollout.obs.items()})
        s.collector.version = s.update

        steps = int(rollout.steps[rollout.valid].sum())
        s.env_steps += steps
        s.decisions += int(rollout.valid.sum())
        s.episodes += len(rollout.finished.get("return", ()))
        metrics.merge(rollout_metrics(rollout, s.collector.spec.tasks))
        metrics.merge_pairs(advantage.metrics)

        score = None
        if r.evaluate.every and s.update % r.evaluate.every == 0:
            with clock.phase("evaluate"):
                result = suite.run(s, r.evaluate.episodes_during)
            metrics.merge(result.metrics(suite.name))
            score = result.score
        s.wall_s = wall_before + perf_counter() - started
        seconds = clock.take()
        row = metrics.reduce() | {f"time/{k}_s": v for k, v in seconds.items()} | {
            "progress/update": s.update, "progress/env_steps": s.env_steps, "progress/decisions": s.decisions,
            "progress/episodes": s.episodes, "time/total_s": s.wall_s, "perf/memory_mib": memory_mib(),
            "perf/env_steps_per_s": steps / (seconds["rollout"] + seconds["advantage"] + seconds["update"]),
        }  # fmt: skip
        writers.write(row)
        reason = why_stop(s, stop, score)
        if reason or score is not None or s.update % r.checkpoint.every == 0:
            with clock.phase("checkpoint"):
                writers.flush()
                checkpoint.save(folder.checkpoints, s.state_dict(), update=s.update, keep=r.checkpoint.keep, best_score=score)
    suite.close()
    return reason


def why_stop(session: Session, stop: StopRequest, score: float | None) -> str | None:
    """Return the reason to stop now, or None to go on."""
    t = session.recipe.train
    if stop.signal is not None:
        return stop.signal.name
    if session.env_steps >= t.env_steps:
        return "finished"
    if t.target_success is not None and score is not None and score >= t.target_success:
        return "target"
    if t.max_seconds is not None and session.wall_s >= t.max_seconds:
        return "time"
    return None


class Suite:
    """Evaluation on held-out starts, with an env of its own that is built when first needed."""

    name = "heldout"

    def __init__(self, recipe: Recipe) -> None:
        """Remember the recipe; build nothing yet."""
        self.recipe = recipe
        self.env: Env | None = None

    def run(self, session: Session, episodes: int) -> EvaluationResult:
        """Evaluate the session's policy on the first `episodes` held-out starts: the same ones every time."""
        e = self.recipe.evaluate
        if self.env is None:
            self.env = build_env(self.recipe, num_envs=e.copies, device=session.device, split="eval")
        # A generator of its own: evaluating must not move the one that training samples with.
        generator = None if e.greedy else torch.Generator(session.device).manual_seed(self.recipe.seed)
        return evaluate(session.policy, self.env, episodes=episodes, run_seed=self.recipe.seed, greedy=e.greedy, generator=generator)

    def close(self) -> None:
        """Close the env."""
        if self.env is not None:
            self.env.close()
            self.env = None


class Finished:
    """What `run` gives back."""

    def __init__(self, folder: Path, reason: str, result: EvaluationResult | None) -> None:
        """Keep the three.

        Args:
            folder: The run folder.
            reason: Why training ended, as `train` returns it.
            result: Of the final evaluation; None when it was skipped or the run was interrupted.
        """
        self.folder, self.reason, self.result = folder, reason, result

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run before its goal."""
        return self.reason.startswith("SIG")


def run(recipe: Recipe, *, resume: bool = False) -> Finished:
    """Train a recipe into its run folder, evaluate, film and report.

    Args:
        recipe: Complete.
        resume: Continue the run folder's last checkpoint instead of starting anew.

    Returns:
        finished: The folder, why training ended, and the final evaluation.

    Raises:
        UserError: Anything the user can mend; nothing in an existing run folder is lost.
    """
    path = Path(recipe.log.folder) / recipe.name
    session = Session.build(recipe)
    try:
        folder = open_run(path, resume=resume)
        try:
            return _run_in(folder, session, resume)
        finally:
            folder.release()
    finally:
        session.close()


def _run_in(folder: RunFolder, session: Session, resume: bool) -> Finished:
    recipe = session.recipe
    if resume:
        _restore(folder, session)
    folder.write_start(dump_recipe(recipe), device=session.device)
    writers = open_writers(folder, recipe, device=session.device, update=session.update)
    try:
        with StopRequest().listening() as stop:
            reason = train(session, folder, writers, stop)
    finally:
        writers.close()
    result = None
    if not reason.startswith("SIG"):
        result = _conclude(folder, session)
    folder.write_summary(_summary(session, reason, result))
    write_report(folder.path)
    return Finished(folder.path, reason, result)


def _restore(folder: RunFolder, session: Session) -> None:
    """Load the newest intact checkpoint, after making sure that it belongs to this recipe."""
    stored = folder.path / "recipe.yaml"
    if stored.is_file():
        differ = [k for k in differences(load_resolved(stored).recipe.dump(), session.recipe.dump()) if k.split(".")[0] not in RESUMABLE]
        if differ:
            raise ConfigError(
                f"{folder.path} was started with other settings ({', '.join(differ[:6])}), so it cannot be continued with these; "
                f"resume it with its own recipe: embodied-rl train {folder.path} --resume. Only train, evaluate, checkpoint, log "
                "and device may differ"
            )
    newest = checkpoint.latest(folder.checkpoints)
    if newest is None:
        log.warning("%s has no checkpoint yet: starting from the beginning", folder.path)
        return
    session.load_state_dict(checkpoint.load(newest), str(newest))
    log.info("continuing %s after update %d", folder.path, session.update)


def differences(old: dict[str, Any], new: dict[str, Any], prefix: str = "") -> list[str]:
    """Dotted paths at which two resolved recipes differ."""
    out = []
    for key in sorted(old.keys() | new.keys()):
        a, b = old.get(key), new.get(key)
        if isinstance(a, dict) and isinstance(b, dict):
            out += differences(a, b, f"{prefix}{key}.")
        elif a != b:
            out.append(prefix + key)
    return out


def _conclude(folder: RunFolder, session: Session) -> EvaluationResult | None:
    """Final evaluation and videos."""
    e = session.recipe.evaluate
    if e.episodes == 0:
        return None
    suite = Suite(session.recipe)
    started = perf_counter()
    try:
        result = suite.run(session, e.episodes)
        result.save(folder.path / "evaluation.json")
        assert suite.env is not None
        if e.videos and suite.env.spec.cameras and suite.env.spec.seedable:
            film(session.policy, suite.env, result, folder=folder.videos, count=e.videos)
    finally:
        suite.close()
    session.wall_s += perf_counter() - started
    return result


def _summary(session: Session, reason: str, result: EvaluationResult | None) -> Summary:
    return {
        "name": session.recipe.name,
        "finished": not reason.startswith("SIG"),
        "stop_reason": reason,
        "updates": session.update,
        "env_steps": session.env_steps,
        "decisions": session.decisions,
        "episodes": session.episodes,
        "wall_time_s": session.wall_s,
        "device": str(session.device),
        "seed": session.recipe.seed,
        "evaluation": {} if result is None else {Suite.name: result.to_dict()},
    }
