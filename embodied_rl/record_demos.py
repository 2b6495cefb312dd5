"""Recording demonstrations: an env's own scripted expert plays, the episodes that succeed are kept.

Attempt i has task i modulo the number of tasks and a start that depends on (seed, i) alone. Attempts are played in
batches of `copies`, side by side; what disturbs the expert is seeded per batch. So what an attempt looks like depends
on its number, `copies` and the settings, and never on when recording was interrupted.

The env executes what the expert wants plus a disturbance, and the set holds what it wanted: it shows how to come back
to the path (DART; Laskey, Lee, Fox, Dragan, Goldberg 2017, arXiv:1703.09327).

An expert that never misses does not show what to do after a miss. With `misses` a clumsy hand begins some attempts and
the expert takes over once the error is found out; the set holds what follows (as in HG-DAgger, where a person takes
over from the imitator; Kelly, Sidrane, Driggs-Campbell, Kochenderfer 2019, arXiv:1810.02890), and with `show_misses`
also the error, each frame with what the expert would have done there, as with the disturbance.

With `replay` the expert is a set of demonstrations that the env repeats where objects lie elsewhere (as in MimicGen;
Mandlekar et al. 2023, arXiv:2310.17596); what succeeds is kept, as ever. With `blind` nobody tells it where they lie:
it guesses, and attempt i is the next guess at its task that succeeded (see `embodied_rl.blind`).

Episode k of the set has task k modulo the number of tasks, and is the next attempt of that task that is worth keeping:
every task has the same number of episodes (one more for the first ones), a longer set begins with the shorter one, and
a set that was interrupted equals one that was not.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol, cast

import numpy as np
import torch
from torch import Tensor

from embodied_rl import registry
from embodied_rl.blind import STARTS, Guesser, Guesses
from embodied_rl.demo_format import FRAME, DemonstrationError, Feature, feature_of, instruction_problem, to_arrow
from embodied_rl.demo_starts import Shown
from embodied_rl.demo_stats import episode_statistics, write_statistics
from embodied_rl.demo_writer import DemoWriter, Packed
from embodied_rl.disturbance import CORRELATION, FADE, Disturbance
from embodied_rl.errors import CapabilityError
from embodied_rl.observation import check_observation
from embodied_rl.offers import Speaking
from embodied_rl.section import Section
from embodied_rl.seeding import start_seed, start_seeds
from embodied_rl.types import Env, Obs

NOISE, WHO, HOW = -3, -4, -5
"""Streams of the disturbance, of who errs and of how, beside those of guessing (`blind.py`): those of training
are groups 0, 1, 2, ..."""
PATIENCE = 100
"""Attempts in a row that may fail at a task before recording gives up."""
LONGEST = 100_000
"""Control steps after which an episode of an env without a time limit is taken for endless."""


class Expert(Protocol):
    """What `env.expert()` returns: a scripted policy that watches the env it belongs to.

    An attribute `disturbed`, D booleans, names the dimensions of the action that may be disturbed; without it, all.
    """

    def reset(self, mask: Tensor) -> None:
        """Begin anew in the masked copies [B]; the env has been reset before."""
        ...

    def act(self) -> Tensor:
        """Actions [B, D] float32 for the state the env is in; what was executed before may be something else."""
        ...


class Clumsy(Expert, Protocol):
    """What `env.clumsy(copies, seed)` returns: an expert that errs in some copies until it has found out."""

    errs: Tensor
    """[B] bool, copies in which it has not found out yet; `act` is asked for in every control step and moves it on."""


@dataclass(frozen=True)
class Settings:
    """What decides which episodes a set holds, beside the env."""

    noise: float
    keep: Literal["success", "all"]
    copies: int
    seed: int
    misses: float = 0.0
    show_misses: bool = False
    replay: str | None = None
    blind: bool = False

    def made(self) -> dict[str, Any]:
        """What info.json says of them; a set recorded under another kind of noise differs in its names."""
        disturbance = {"std": self.noise, "correlation": CORRELATION, "fade": FADE}
        misses = {"misses": self.misses, "show_misses": self.show_misses}
        made = {"disturbance": disturbance, "keep": self.keep, "copies": self.copies, "seed": self.seed, **misses}
        return made | {"replay": self.replay} | ({"blind": True} if self.blind else {})


@dataclass(frozen=True)
class TaskCount:
    """Attempts at one task, up to the last that was kept."""

    kept: int
    solved: int
    tried: int


@dataclass(frozen=True)
class Collected:
    """A set as it is now."""

    folder: Path
    episodes: int
    frames: int
    tasks: dict[str, TaskCount]
    bytes: int
    seconds: float
    """Of this call."""
    guesses: Guesses | None = None
    """What was found by guessing."""


def collect_demonstrations(
    env: Section,
    folder: str | Path,
    episodes: int,
    *,
    noise: float = 1.0,
    misses: float = 0.0,
    show_misses: bool = False,
    replay: str | Path | None = None,
    blind: bool = False,
    keep: Literal["success", "all"] = "success",
    copies: int = 16,
    seed: int = 0,
    device: str | torch.device = "cpu",
    on_progress: Callable[[int], None] | None = None,
) -> Collected:
    """Record demonstrations until a set holds so many, then write its statistics; goes on with a set that exists.

    Args:
        env: The env's section of a recipe, `recipe.env`.
        folder: Where the set lies or shall lie.
        episodes: Episodes of the whole set; nothing is recorded when it holds as many.
        noise: Standard deviation of the `Disturbance`, in action units; 0 leaves the expert alone.
        misses: Share of the attempts in which a clumsy hand begins, which grasps beside the object.
        show_misses: Whether the set holds these beginnings, each frame with what the expert would have done.
        replay: Folder of demonstrations to repeat where objects lie elsewhere, in place of the expert.
        blind: Whether where they lie is guessed, and only success tells.
        keep: Episodes in which the goal held at some step, or all.
        copies: Attempts played side by side.
        seed: Of starts and disturbances.
        device: Where the env computes.
        on_progress: Called with the number of episodes in the set whenever it has changed, from another thread.

    Returns:
        collected: What the set holds.

    Raises:
        CapabilityError: There are no misses to be shown, or nothing to repeat blindly; or the env has no expert,
            cannot be seeded, takes no continuous actions, does not tell success, or its expert fails at a task again
            and again.
        DemonstrationError: The folder holds a set that was made differently, or cannot be written; or the env gives
            an instruction or a number that cannot be stored.
    """
    if show_misses and not misses:
        raise CapabilityError("--show-misses does nothing without misses: set --misses 0.5, or remove it")
    if blind and replay is None:
        raise CapabilityError("--blind does nothing without demonstrations to repeat: set --replay, or remove it")
    began, where = time.monotonic(), torch.device(device)
    module = registry.load("env", cast(Any, env).type)
    built = cast(Env, module.build(env, num_envs=copies, device=where, split="train", seed=seed))
    settings = Settings(noise, keep, copies, seed, misses, show_misses, None if replay is None else str(replay), blind)
    try:
        _check_capable(built, cast(Any, env).type, settings)
        shown = None if replay is None else Shown.read(replay, cast(Any, env).type, built.spec.tasks)
        features = _features(built)
        made = {"env": env.model_dump(mode="json"), **settings.made(), "device": where.type}
        writer = DemoWriter(
            Path(folder), features, fps=built.spec.control_hz, robot=Path(str(cast(Any, env).type)).stem, made=made,
            observation=built.spec.observation, convention=built.spec.action.convention,
        )  # fmt: skip
        guesses = None
        try:
            guesses = Guesses(Path(folder), built.spec.tasks, seed) if blind else None
            _Recorder(built, writer, settings, features, shown, guesses).run(episodes, on_progress)
        finally:
            writer.finish()
    finally:
        built.close()
    write_statistics(folder)
    return _summary(writer, built.spec.tasks, time.monotonic() - began, guesses)


def _check_capable(env: Env, name: str, settings: Settings) -> None:
    spec = env.spec
    lacks = []
    if settings.replay is not None and not callable(getattr(env, "replay", None)):
        lacks.append("repeating demonstrations elsewhere (a method `replay()` of the env; or record without --replay)")
    if settings.replay is None and not callable(getattr(env, "expert", None)):
        lacks.append("a scripted expert (a method `expert()` of the env)")
    if not spec.seedable:
        lacks.append("starts that can be repeated (`EnvSpec.seedable`)")
    if spec.action.kind != "continuous":
        lacks.append("continuous actions")
    if settings.keep == "success" and not spec.has_success:
        lacks.append("a notion of success (`EnvSpec.has_success`; or keep every episode with --all)")
    if settings.misses and settings.replay is None and not callable(getattr(env, "clumsy", None)):
        lacks.append("an expert that errs (a method `clumsy()` of the env; or record without --misses)")
    if lacks:
        raise CapabilityError(f"env '{name}' cannot be demonstrated: it lacks {', and '.join(lacks)}")


def _features(env: Env) -> dict[str, Feature]:
    spec = env.spec
    out = dict(feature_of(entry, tensor) for entry, tensor in spec.observation.items())
    out["action"] = Feature("float32", (spec.action.size,), list(spec.action.names) or None)
    told = ("next.reward", "next.success", "next.done") if spec.has_success else ("next.reward", "next.done")
    return out | {name: FRAME[name] for name in told}


class _Recorder:
    """Plays attempts and hands the episodes to the writer in their order, which it does while the next are played."""

    def __init__(
        self, env: Env, writer: DemoWriter, settings: Settings, features: dict[str, Feature], shown: Shown | None,
        guesses: Guesses | None,
    ) -> None:  # fmt: skip
        self.env, self.writer, self.settings, self.features = env, writer, settings, features
        self.shown, self.guesses = shown, guesses
        t = len(env.spec.tasks)
        self.last = [-1] * t
        """The latest attempt of each task that was in the set when recording began."""
        for k, line in enumerate(writer.lines):
            self.last[k % t] = int(line.extra["attempt"])
        self.kept = [len(writer.lines[task::t]) for task in range(t)]
        """Episodes of each task that are in the set or on their way to it."""
        self.waiting: list[deque[Packed]] = [deque() for _ in range(t)]
        self.failures = [0] * t

    def run(self, episodes: int, on_progress: Callable[[int], None] | None) -> None:
        """Play until the set holds so many."""
        tasks, copies = len(self.env.spec.tasks), self.settings.copies
        wanted = [len(range(task, episodes, tasks)) for task in range(tasks)]
        # Attempts that were kept but not yet written are played once more: that is all an interruption costs.
        batch = min(last + tasks if last >= 0 else task for task, last in enumerate(self.last)) // copies
        with ThreadPoolExecutor(1) as writing:
            job: Future[None] | None = None
            while any(have < want for have, want in zip(self.kept, wanted, strict=True)):
                attempts = range(batch * copies, (batch + 1) * copies)
                tape = _Tape(self.env, attempts, self.settings, self.shown, self.guesses)
                chosen = self._choose(tape, wanted)
                if job is not None:
                    job.result()
                job = writing.submit(self._write, tape, chosen, on_progress)
                batch += 1
            if job is not None:
                job.result()

    def _choose(self, tape: _Tape, wanted: list[int]) -> list[int]:
        """The copies whose attempts are worth keeping."""
        names = self.env.spec.tasks
        chosen: list[int] = []
        for copy, attempt in enumerate(tape.attempts):
            task = attempt % len(names)
            if attempt <= self.last[task] or self.kept[task] >= wanted[task]:
                continue
            shows = tape.start[copy] < tape.length[copy] and not tape.invalid[copy]
            if shows and (self.settings.keep == "all" or tape.solved[copy]):
                chosen.append(copy)
                self.kept[task] += 1
                self.failures[task] = 0
                continue
            self.failures[task] += 1
            if self.failures[task] >= PATIENCE:
                raise CapabilityError(
                    f"the expert failed {PATIENCE} times in a row at task '{names[task]}': give it more time "
                    "(env.max_steps), less noise (--noise), or leave the task out; what is recorded is kept"
                )
        return chosen

    def _write(self, tape: _Tape, chosen: list[int], on_progress: Callable[[int], None] | None) -> None:
        """Encode what was chosen, and write as far as every task has its next episode."""
        names, lines = self.env.spec.tasks, self.writer.lines
        have = len(lines)
        for copy in chosen:
            task = tape.attempts[copy] % len(names)
            self.waiting[task].append(tape.pack(copy, self.features, names[task]))
        while queue := self.waiting[len(lines) % len(names)]:
            self.writer.append(queue.popleft())
            if on_progress is not None:
                on_progress(len(lines))
        if len(lines) > have:
            self.writer.write_info()


class _Tape:
    """What happened in one batch of attempts."""

    def __init__(
        self, env: Env, attempts: range, settings: Settings, shown: Shown | None, guesses: Guesses | None
    ) -> None:
        """Play them all to their ends."""
        self.attempts = attempts
        spec, device, b = env.spec, env.device, len(attempts)
        numbers = torch.tensor(attempts)
        self.seeds = start_seeds(settings.seed, "train", torch.full_like(numbers, STARTS), numbers)
        tasks = numbers % len(spec.tasks)
        noise, who, how = (start_seed(settings.seed, "train", of, attempts.start // b) for of in (NOISE, WHO, HOW))
        by = cast(Any, env)
        expert: Expert = by.expert() if shown is None else by.replay(shown.seeds, shown.tasks, shown.actions)
        if guesses is not None:
            _check_guesses(expert)
            self.seeds, elsewhere, beside = guesses.starts(numbers, cast(Guesser, expert))
        disturbance = Disturbance(settings.noise, _disturbed(expert, spec.action.size), b, noise)
        active = torch.ones(b, dtype=torch.bool, device=device)
        obs = env.reset(active.clone(), self.seeds.to(device), tasks.to(device))
        if guesses is not None:
            cast(Guesser, expert).suppose(active, elsewhere, beside)
        clumsy = _clumsy(env if shown is None else expert, settings.misses, b, who, how) if settings.misses else None
        self.start = np.zeros(b, np.int64)
        """Control steps that are left out at the beginning."""
        for player in filter(None, (expert, clumsy)):
            player.reset(active.clone())
        self.length = np.zeros(b, np.int64)
        self.solved, self.invalid = np.zeros(b, bool), np.zeros(b, bool)
        self._frames: list[dict[str, np.ndarray]] = []
        self._texts: list[list[str]] = []
        while bool(active.any()):
            if len(self._frames) >= LONGEST:
                raise CapabilityError(
                    f"an episode has not ended within {LONGEST:,} control steps, and the env has no time limit of its "
                    "own; give it one (env.max_steps)"
                )
            seen = env.observe() if spec.on_demand else obs
            check_observation(seen, spec, start=not self._frames)
            said = env.instructions() if isinstance(env, Speaking) else [spec.tasks[i] for i in tasks.tolist()]
            self._texts.append(said)
            frame = _to_numpy({feature_of(entry, spec.observation[entry])[0]: x for entry, x in seen.items()})
            wanted = expert.act().clamp(-1, 1)
            played = wanted
            if clumsy is not None:
                errs = clumsy.errs.to(device)
                if not settings.show_misses:
                    self.start += (errs & active).cpu().numpy()
                played = torch.where(errs[:, None], clumsy.act(), wanted)
            executed = (played + disturbance.draw().to(device)).clamp(-1, 1)
            step = env.step(torch.where(active[:, None], executed, 0.0), None if bool(active.all()) else active)
            obs, done = step.obs, step.terminated | step.truncated
            told = {"action": wanted, "next.reward": step.reward, "next.done": done}
            if step.success is not None:
                told["next.success"] = step.success
                self.solved |= (step.success & active).cpu().numpy()
            if step.invalid is not None:
                self.invalid |= (step.invalid & active).cpu().numpy()
            self._frames.append(frame | _to_numpy(told))
            self.length += active.cpu().numpy()
            active = active & ~done

    def pack(self, copy: int, features: dict[str, Feature], task: str) -> Packed:
        """One attempt, encoded; DemonstrationError when it holds what cannot be stored."""
        attempt, kept = self.attempts[copy], slice(int(self.start[copy]), int(self.length[copy]))
        texts = [said[copy] for said in self._texts[kept]]
        where = f"attempt {attempt} (task '{task}')"
        for problem in filter(None, map(instruction_problem, dict.fromkeys(texts))):
            raise DemonstrationError(f"{where}: {problem}; mend the env's instructions(); what is recorded is kept")
        columns = {}
        for name, feature in features.items():
            values = np.stack([frame[name][copy] for frame in self._frames[kept]]).reshape(len(texts), *feature.shape)
            columns[name] = values
            if values.dtype.kind == "f" and not np.isfinite(values).all():
                raise DemonstrationError(f"{where}: '{name}' is not finite; mend the env; what is recorded is kept")
        extra = {
            "attempt": attempt,
            "seed": int(self.seeds[copy]),
            "task": task,
            "success": bool(self.solved[copy]),
        }
        arrays = {name: to_arrow(values, features[name]) for name, values in columns.items()}
        return Packed(arrays, episode_statistics(columns, features), texts, extra)


def _clumsy(of: Any, share: float, copies: int, who: int, how: int) -> Clumsy:
    """Who errs in a share of the copies, and how: by seeds of their own, lest only some errors be seen."""
    if not callable(getattr(of, "clumsy", None)):
        raise CapabilityError(
            "what the env's replay() returns cannot err: give it a method `clumsy()`, or record without --misses"
        )
    errs = torch.rand(copies, generator=torch.Generator().manual_seed(who)) < share
    return cast(Clumsy, of.clumsy(errs, how))


def _check_guesses(expert: Any) -> None:
    if not (callable(getattr(expert, "guess", None)) and callable(getattr(expert, "suppose", None))):
        raise CapabilityError(
            "what the env's replay() returns cannot guess: give it methods `guess()` and `suppose()` "
            "(embodied_rl/blind.py), or record without --blind"
        )


def _disturbed(expert: Expert, size: int) -> Tensor:
    """[D] bool, the dimensions that may be disturbed."""
    told = getattr(expert, "disturbed", (True,) * size)
    if len(told) != size or not all(isinstance(x, bool) for x in told):
        raise CapabilityError(
            f"the expert's `disturbed` is {told!r}, expected {size} booleans, one for each dimension of the action"
        )
    return torch.tensor(told)


def _to_numpy(tensors: Obs) -> dict[str, np.ndarray]:
    """Copies on the CPU: an env may reuse its arrays."""
    return {name: x.detach().to("cpu", copy=True).numpy() for name, x in tensors.items()}


def _summary(writer: DemoWriter, names: tuple[str, ...], seconds: float, guesses: Guesses | None) -> Collected:
    tasks = {}
    for task, name in enumerate(names):
        lines = writer.lines[task :: len(names)]
        tried = (int(lines[-1].extra["attempt"]) - task) // len(names) + 1 if lines else 0
        tasks[name] = TaskCount(len(lines), sum(bool(line.extra["success"]) for line in lines), tried)
    size = sum(p.stat().st_size for p in writer.folder.rglob("*") if p.is_file())
    frames = sum(line.length for line in writer.lines)
    return Collected(writer.folder, len(writer.lines), frames, tasks, size, seconds, guesses)
