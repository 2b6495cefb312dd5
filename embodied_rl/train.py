"""Training: the loop, and what surrounds it (run folder, signals, resume, final evaluation)."""

from __future__ import annotations

import logging
import os
import signal
import threading
from collections.abc import Iterable, Iterator
from contextlib import closing, contextmanager, suppress
from pathlib import Path
from time import perf_counter
from types import FrameType
from typing import Any

import torch

from embodied_rl import checkpoint
from embodied_rl.algorithms import ImitationConfig
from embodied_rl.compare import summarize
from embodied_rl.config import dump_recipe, load_resolved
from embodied_rl.errors import ConfigError, DivergenceError, SimulatorError, UserError
from embodied_rl.evaluate import choose, frame_rate
from embodied_rl.imitate import ImitationSession
from embodied_rl.measure import Clock, memory_mib
from embodied_rl.recipe import HELDOUT, Recipe
from embodied_rl.report import write_report
from embodied_rl.results import EvaluationResult
from embodied_rl.runfolder import RunFolder, SuiteResult, Summary, open_run
from embodied_rl.session import Session
from embodied_rl.suites import Suite, check_suites, evaluation_file, suites_of
from embodied_rl.video import BEFORE, PAIRS, read_clips, write_pairs
from embodied_rl.writers import Writers, open_writers

log = logging.getLogger(__name__)

RESUMABLE = ("name", "train", "evaluate", "checkpoint", "log", "device")
"""Sections that may differ between a run and its continuation: they do not change what the next update computes."""
GOALS = ("finished", "time", "target")
"""Reasons to stop that are an end of training; the others are a signal's name, "diverged", "simulator" and "error"."""


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
            text = "second interrupt: stopping at once; what is saved is intact"
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
    saved, patience = started, r.checkpoint.every_seconds
    reason = why_stop(s, stop)
    with _kept(folder, s, writers), closing(Suite(r)) as suite:
        while reason is None:
            metrics = s.iterate(clock)
            s.score = None
            if r.evaluate.every and s.update % r.evaluate.every == 0:
                with clock.phase("evaluate"):
                    result = suite.run(s.policy, s.device, r.evaluate.episodes_during, final=False)
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
            due |= patience is not None and perf_counter() - saved >= patience
            if reason or (due and not s.bad_in_a_row):
                with clock.phase("checkpoint"):
                    _save(folder, s, writers)
                saved = perf_counter()
    return reason


@contextmanager
def _kept(folder: RunFolder, session: Learner, writers: Writers) -> Iterator[None]:
    """Where anything fails between two updates, above all a simulator, save the updates that are finished."""
    try:
        yield
    except Exception:
        unsaved = session.update > checkpoint.newest_update(folder.checkpoints)
        if unsaved and session.whole:
            with suppress(UserError, OSError):
                _save(folder, session, writers)
        raise


def _save(folder: RunFolder, session: Learner, writers: Writers) -> None:
    writers.flush()
    checkpoint.save(
        folder.checkpoints, session.state_dict(), update=session.update, keep=session.recipe.checkpoint.keep,
        best_score=session.score,
    )  # fmt: skip


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


class Finished:
    """What `run` gives back."""

    def __init__(self, folder: Path, reason: str, results: dict[str, EvaluationResult]) -> None:
        """Keep the three.

        Args:
            folder: The run folder.
            reason: Why training ended, as `train` returns it.
            results: Suite -> final evaluation; empty when it was skipped or the run was interrupted.
        """
        self.folder, self.reason, self.results = folder, reason, results

    @property
    def result(self) -> EvaluationResult | None:
        """Of the suite `heldout`; None when there was no final evaluation."""
        return self.results.get(HELDOUT)

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
    if session.conformance:
        folder.write_conformance(session.conformance)
    results: dict[str, EvaluationResult] = {}
    with StopRequest().listening() as stop:
        if recipe.evaluate.episodes:
            check_suites(recipe, session.device, session.policy.chunk)
        try:
            reason = _learn(folder, session, stop, results)
        except Exception as error:
            # What ended the run is told, whatever of its end cannot be written.
            with suppress(UserError, OSError):
                _write_end(folder, session, _kind(error), results, error)
            raise
    _write_end(folder, session, reason, results)
    return Finished(folder.path, reason, results)


def _learn(folder: RunFolder, session: Learner, stop: StopRequest, results: dict[str, EvaluationResult]) -> str:
    """Evaluate the start, train, evaluate the end into `results`; returns why it ended."""
    _measure_start(folder, session)
    with closing(_writers(folder, session)) as writers:
        reason = train(session, folder, writers, stop)
    stop.at_once = True
    with suppress(KeyboardInterrupt):
        if stop.signal is None:
            _conclude(folder, session, results)
    if stop.signal is None:
        return reason
    results.clear()
    return stop.signal.name


def _kind(error: Exception) -> str:
    """The reason to stop that an error is."""
    if isinstance(error, DivergenceError):
        return "diverged"
    return "simulator" if isinstance(error, SimulatorError) else "error"


def _write_end(
    folder: RunFolder, session: Learner, reason: str, results: dict[str, EvaluationResult],
    error: Exception | None = None,
) -> None:  # fmt: skip
    """Write the summary and the report."""
    summary = _summary(session, reason, summarize(results, _start_evaluations(folder, results)))
    summary["saved_update"] = checkpoint.newest_update(folder.checkpoints)
    if error is not None:
        summary["error"] = str(error) if isinstance(error, UserError) else f"{type(error).__name__}: {error}"
    folder.write_summary(summary)
    write_report(folder.path)


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
    """Evaluate and film the policy that training starts from, on the starts of the final evaluation."""
    recipe = session.recipe
    origin = recipe.start_from or ("pretrained weights" if getattr(session.policy, "pretrained", False) else None)
    if origin is None or not recipe.evaluate.episodes or session.update:
        return
    for suite in suites_of(recipe):
        path = folder.path / evaluation_file(suite.name, start=True)
        if path.exists():
            continue
        log.info("evaluating %s, which training starts from (%s)", origin, suite.name)
        started = perf_counter()
        with closing(suite):
            result = suite.run(session.policy, session.device, recipe.evaluate.episodes)
            if suite.name == HELDOUT:
                # The first episodes, not chosen ones: whoever follows looks better on what this policy failed at.
                numbers = torch.arange(min(recipe.evaluate.videos, result.episodes))
                suite.film(session.policy, result, numbers, folder.videos / BEFORE)
            result.save(path)
        session.wall_s += perf_counter() - started


def _start_evaluations(folder: RunFolder, suites: Iterable[str]) -> dict[str, EvaluationResult]:
    """Suite -> evaluation of the policy that training started from, as far as there are any."""
    paths = {suite: folder.path / evaluation_file(suite, start=True) for suite in suites}
    return {suite: EvaluationResult.load(path) for suite, path in paths.items() if path.exists()}


def _conclude(folder: RunFolder, session: Learner, results: dict[str, EvaluationResult]) -> None:
    """Final evaluation of every suite, each added to `results` when it is done, and videos of the first."""
    e = session.recipe.evaluate
    if e.episodes == 0:
        return
    started = perf_counter()
    for suite in suites_of(session.recipe):
        with closing(suite):
            result = results[suite.name] = suite.run(session.policy, session.device, e.episodes)
            result.save(folder.path / evaluation_file(suite.name))
            if suite.name == HELDOUT and e.videos:
                _film(folder, session, suite, result)
    session.wall_s += perf_counter() - started


def _film(folder: RunFolder, session: Learner, suite: Suite, result: EvaluationResult) -> None:
    """Film the trained policy: the episodes of which there are films before training, or chosen ones."""
    before = read_clips(folder.videos / BEFORE)[: result.episodes]
    numbers = torch.arange(len(before)) if before else choose(result, session.recipe.evaluate.videos)
    after = suite.film(session.policy, result, numbers, folder.videos)
    if before and after:
        write_pairs(folder.videos / PAIRS, before, after, frame_rate(suite.open(session.device).spec))


def _summary(session: Learner, reason: str, evaluation: dict[str, SuiteResult]) -> Summary:
    summary: Summary = {
        "name": session.recipe.name,
        "finished": reason in GOALS,
        "stop_reason": reason,
        "updates": session.update,
        "env_steps": int(session.counters()["progress/env_steps"]),
        "wall_time_s": session.wall_s,
        "device": str(session.device),
        "seed": session.recipe.seed,
        "evaluation": evaluation,
    }
    if isinstance(session, ImitationSession):
        return summary | {"optimizer_steps": session.steps}
    return summary | {"decisions": session.decisions, "episodes": session.episodes}
