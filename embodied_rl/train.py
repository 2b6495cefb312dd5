"""Training: the loop, and what surrounds it (run folder, signals, resume, final evaluation)."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

import torch

from embodied_rl import checkpoint
from embodied_rl.algorithms import ImitationConfig
from embodied_rl.compare import since_start
from embodied_rl.config import dump_recipe, load_resolved
from embodied_rl.errors import ConfigError, DivergenceError
from embodied_rl.evaluate import evaluate, film
from embodied_rl.imitate import ImitationSession
from embodied_rl.measure import Clock, memory_mib
from embodied_rl.recipe import Recipe
from embodied_rl.report import write_report
from embodied_rl.results import EvaluationResult
from embodied_rl.runfolder import RunFolder, Summary, open_run
from embodied_rl.seeding import global_rng_untouched
from embodied_rl.session import Session, build_env
from embodied_rl.types import Env
from embodied_rl.writers import Writers, open_writers

log = logging.getLogger(__name__)

RESUMABLE = ("name", "train", "evaluate", "checkpoint", "log", "device")
"""Sections that may differ between a run and its continuation: they do not change what the next update computes."""
START_EVALUATION = "evaluation_start.json"
"""Of the policy that training starts from."""
GOALS = ("finished", "time", "target")
"""Reasons to stop that are an end of training; the others are a signal's name and "diverged"."""


Learner = Session | ImitationSession
"""What the loop drives."""


def build_session(recipe: Recipe, *, fresh: bool = True) -> Learner:
    """Build what a recipe's algorithm learns with; see `Session.build` and `ImitationSession.build`."""
    if isinstance(recipe.algorithm, ImitationConfig):
        return ImitationSession.build(recipe, fresh=fresh)
    return Session.build(recipe, fresh=fresh)


class StopRequest:
    """SIGINT or SIGTERM: the first asks the loop to stop after the current update, a second SIGINT ends at once."""

    def __init__(self) -> None:
        """Nothing asked yet."""
        self.signal: signal.Signals | None = None
        self.at_once = False
        """Nothing is left to be saved: the first signal already interrupts (KeyboardInterrupt)."""

    def _handle(self, number: int, frame: FrameType | None) -> None:
        second = self.signal is not None and number == signal.SIGINT
        if second:
            text = "second interrupt: stopping at once; the last checkpoint is intact"
        elif self.at_once:
            text = "stopping; the training is saved"
        else:
            text = "finishing the current update, then saving (interrupt again to stop at once)"
        # Written past Python's buffers, which the interrupted code may just be using; the terminal may be gone.
        with suppress(OSError):
            show_cursor = "\x1b[?25h" if second and os.isatty(2) else ""
            os.write(2, f"{show_cursor}\n{text}\n".encode())
        if second:
            os._exit(130)
        self.signal = signal.Signals(number)
        if self.at_once:
            raise KeyboardInterrupt

    @contextmanager
    def listening(self) -> Iterator[StopRequest]:
        """Handle the two signals inside the block; outside the main thread, where Python cannot, do nothing."""
        if threading.current_thread() is not threading.main_thread():
            yield self
            return
        old = {s: signal.signal(s, self._handle) for s in (signal.SIGINT, signal.SIGTERM)}
        try:
            yield self
        finally:
            for s, handler in old.items():
                signal.signal(s, handler)


def train(session: Learner, folder: RunFolder, writers: Writers, stop: StopRequest) -> str:
    """The loop: iterate (see `Session.iterate`), measure; now and then evaluate and save.

    Args:
        session: Freshly built or restored.
        folder: Where checkpoints go.
        writers: Where numbers go.
        stop: Signals.

    Returns:
        reason: Why training ended: "finished", "time", "target", "SIGINT" or "SIGTERM".
    """
    s, r, clock = session, session.recipe, Clock()
    started, wall_before = perf_counter(), s.wall_s
    reason = why_stop(s, stop)
    with closing(Suite(r)) as suite:
        while reason is None:
            metrics = s.iterate(clock)
            s.score = None
            if r.evaluate.every and s.update % r.evaluate.every == 0:
                with clock.phase("evaluate"):
                    result = suite.run(s, r.evaluate.episodes_during, final=False)
                metrics.merge(result.metrics(suite.name))
                s.score = result.score
            s.wall_s = wall_before + perf_counter() - started
            seconds = {f"time/{k}_s": v for k, v in clock.take().items()}
            row = metrics.reduce() | seconds | s.counters() | {
                "time/total_s": s.wall_s, "perf/memory_mib": memory_mib(),
            }  # fmt: skip
            writers.write(row)
            reason = why_stop(s, stop)
            # Nothing was learned since the last checkpoint while updates are skipped; it stays the last good one.
            due = s.score is not None or s.update % r.checkpoint.every == 0
            if reason or (due and not s.bad_in_a_row):
                with clock.phase("checkpoint"):
                    writers.flush()
                    keep = r.checkpoint.keep
                    checkpoint.save(folder.checkpoints, s.state_dict(), update=s.update, keep=keep, best_score=s.score)
    return reason


def why_stop(session: Learner, stop: StopRequest) -> str | None:
    """Return the reason to stop now, or None to go on."""
    t = session.recipe.train
    if stop.signal is not None:
        return stop.signal.name
    if session.progress >= 1:
        return "finished"
    if t.target_success is not None and session.score is not None and session.score >= t.target_success:
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

    def run(self, session: Learner, episodes: int, *, final: bool) -> EvaluationResult:
        """Evaluate the session's policy on `episodes` held-out starts, the same ones every time.

        The final evaluation has starts of its own: those that chose the best checkpoint would flatter it.
        """
        e, seed = self.recipe.evaluate, self.recipe.seed
        # Evaluating must not move what training draws from: a generator of its own, and the global ones put back.
        generator = None if e.greedy else torch.Generator(session.device).manual_seed(seed)
        with global_rng_untouched():
            if self.env is None:
                self.env = build_env(self.recipe, num_envs=e.copies, device=session.device, split="eval")
            return evaluate(
                session.policy,
                self.env,
                episodes=episodes,
                run_seed=seed,
                stream=0 if final else 1,
                greedy=e.greedy,
                generator=generator,
            )

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


def run(recipe: Recipe, *, resume: bool = False, folder: Path | None = None) -> Finished:
    """Train a recipe into its run folder, evaluate, film and report.

    Args:
        recipe: Complete.
        resume: Continue the run folder's last checkpoint instead of starting anew.
        folder: The run folder; None for the recipe's `<log.folder>/<name>`.

    Returns:
        finished: The folder, why training ended, and the final evaluation.

    Raises:
        UserError: Anything the user can mend; nothing in an existing run folder is lost.
    """
    folder = folder or Path(recipe.log.folder) / recipe.name
    # A run that was killed before its first checkpoint begins anew, where `start_from` says.
    session = build_session(recipe, fresh=not resume or checkpoint.latest(folder / "checkpoints") is None)
    with closing(session):
        opened = open_run(folder, resume=resume)
        try:
            return _run_in(opened, session, resume)
        finally:
            opened.release()


def _run_in(folder: RunFolder, session: Learner, resume: bool) -> Finished:
    recipe = session.recipe
    if resume:
        _restore(folder, session)
    folder.write_start(dump_recipe(recipe), device=session.device)
    with StopRequest().listening() as stop:
        _measure_start(folder, session)
        try:
            with closing(_writers(folder, session)) as writers:
                reason = train(session, folder, writers, stop)
        except DivergenceError:
            folder.write_summary(_summary(session, "diverged", None))
            raise
        result, stop.at_once = None, True
        try:
            if stop.signal is None:
                result = _conclude(folder, session)
        except KeyboardInterrupt:
            pass
        if stop.signal is not None:
            reason, result = stop.signal.name, None
    summary = _summary(session, reason, result)
    if result is not None and (folder.path / START_EVALUATION).exists():
        summary["since_start"] = since_start(result, EvaluationResult.load(folder.path / START_EVALUATION))
    folder.write_summary(summary)
    write_report(folder.path)
    return Finished(folder.path, reason, result)


def _writers(folder: RunFolder, session: Learner) -> Writers:
    s = session
    return open_writers(folder, s.recipe, total_steps=s.total_steps, device=s.device, update=s.update)


def _restore(folder: RunFolder, session: Learner) -> None:
    """Load the newest intact checkpoint, after making sure that it belongs to this recipe."""
    stored = folder.path / "recipe.yaml"
    if stored.is_file():
        found = differences(load_resolved(stored).recipe.dump(), session.recipe.dump())
        differ = [key for key in found if key.split(".")[0] not in RESUMABLE]
        if differ:
            raise ConfigError(
                f"{folder.path} was started with other settings ({', '.join(differ[:6])}), so it cannot be continued "
                f"with these; resume it with its own recipe: embodied-rl train {folder.path} --resume. Only train, "
                "evaluate, checkpoint, log and device may differ"
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


def _measure_start(folder: RunFolder, session: Learner) -> None:
    """Evaluate the policy that training starts from, on the starts of the final evaluation."""
    path, recipe = folder.path / START_EVALUATION, session.recipe
    if recipe.start_from is None or not recipe.evaluate.episodes or session.update or path.exists():
        return
    log.info("evaluating %s, which training starts from", recipe.start_from)
    started = perf_counter()
    with closing(Suite(recipe)) as suite:
        suite.run(session, recipe.evaluate.episodes, final=True).save(path)
    session.wall_s += perf_counter() - started


def _conclude(folder: RunFolder, session: Learner) -> EvaluationResult | None:
    """Final evaluation and videos."""
    e = session.recipe.evaluate
    if e.episodes == 0:
        return None
    suite = Suite(session.recipe)
    started = perf_counter()
    try:
        result = suite.run(session, e.episodes, final=True)
        result.save(folder.path / "evaluation.json")
        assert suite.env is not None
        if e.videos and suite.env.spec.cameras and suite.env.spec.seedable:
            film(session.policy, suite.env, result, folder=folder.videos, count=e.videos)
    finally:
        suite.close()
    session.wall_s += perf_counter() - started
    return result


def _summary(session: Learner, reason: str, result: EvaluationResult | None) -> Summary:
    summary: Summary = {
        "name": session.recipe.name,
        "finished": reason in GOALS,
        "stop_reason": reason,
        "updates": session.update,
        "env_steps": int(session.counters()["progress/env_steps"]),
        "wall_time_s": session.wall_s,
        "device": str(session.device),
        "seed": session.recipe.seed,
        "evaluation": {} if result is None else {Suite.name: result.to_dict()},
    }
    if isinstance(session, ImitationSession):
        return summary | {"optimizer_steps": session.steps}
    return summary | {"decisions": session.decisions, "episodes": session.episodes}
