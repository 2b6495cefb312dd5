"""Closed-loop evaluation: a fixed number of episodes per copy, on starts that depend on nothing but their number.

Episode i starts from `start_seed(run_seed, split, stream, i)` with task i modulo the number of tasks, whatever the
policy and however many copies share the work, so two policies meet the same layouts and can be compared in pairs.
Copy c plays episodes c, c + B, c + 2B, ...: were copies to take new episodes until enough had ended, short episodes
would be over-represented.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from embodied_rl import manifest
from embodied_rl.decide import decide
from embodied_rl.errors import CapabilityError, DivergenceError
from embodied_rl.execute import execute
from embodied_rl.observation import check_finite, check_observation, name_of
from embodied_rl.offers import Sparing, Speaking
from embodied_rl.results import EvaluationResult
from embodied_rl.seeding import start_seeds
from embodied_rl.types import Env, EnvSpec, Obs, Policy, Split, Step
from embodied_rl.video import Clip, write_videos

OnFrame = Callable[[Env, Tensor], None]
"""Called after every start and control step with the env and `episode` [B] int64: the number of the episode that
each copy has just moved in, -1 for copies that did not move."""

LONGEST = 100_000
"""Control steps after which an episode of an env without a time limit is taken for endless."""


def evaluate(
    policy: Policy,
    env: Env,
    *,
    episodes: int,
    run_seed: int,
    split: Split = "eval",
    stream: int = 0,
    greedy: bool = True,
    generator: torch.Generator | None = None,
    on_frame: OnFrame | None = None,
) -> EvaluationResult:
    """Play episodes 0 to E - 1 of a set of starts.

    Args:
        policy: Decides; in evaluation mode (`nn.Module.eval`) meanwhile, otherwise unchanged.
        env: B copies; every one of them is restarted.
        episodes: E, shared evenly by the copies; the first E mod B of them play one more.
        run_seed: With `split` and `stream` it fixes the starts; fewer episodes are the first ones of more.
        split: Training or evaluation starts.
        stream: Another stream is another, independent set of starts.
        greedy: Take the policy's mode instead of sampling.
        generator: Of the samples, on the policy's device.
        on_frame: See `OnFrame`.

    Returns:
        result: One row per episode.

    Raises:
        CapabilityError: No episodes were asked for, or an env without a time limit does not end one.
        DivergenceError: Every episode is invalid, or begins with what is not finite.
    """
    if episodes < 1:
        raise CapabilityError(f"evaluate needs at least 1 episode, got {episodes}; set evaluate.episodes")
    numbers = torch.arange(episodes)
    starts = _Starts(run_seed, split, stream, len(env.spec.tasks))
    frames: dict[str, dict[str, Any]] = {}

    def on_start(number: int, obs: Obs, row: int) -> None:
        if number < len(env.spec.tasks) and env.spec.seedable:
            frames[env.spec.tasks[number]] = manifest.frame(obs, row, int(starts.seeds(numbers[number : number + 1])))

    columns = _play(
        policy, env, numbers, starts, greedy=greedy, generator=generator, on_frame=on_frame, on_start=on_start
    )
    valid = ~columns["invalid"]
    if not bool(valid.any()):
        raise DivergenceError(
            f"the env's judge or simulator failed in all {episodes} evaluation episodes, so nothing was measured: mend "
            "it (the warnings above say what failed)"
        )
    has = env.spec.has_success
    made = {"run_seed": run_seed, "split": split, "stream": stream, "episodes": episodes}
    played = {"greedy": greedy, "chunk": policy.chunk}
    return EvaluationResult(
        tasks=env.spec.tasks, run_seed=run_seed, stream=stream, split=split, greedy=greedy, seedable=env.spec.seedable,
        seed=starts.seeds(numbers), task=starts.tasks(numbers), returns=columns["returns"], length=columns["length"],
        success_once=columns["once"] if has else None, success_at_end=columns["at_end"] if has else None,
        invalid=None if bool(valid.all()) else ~valid, manifest=manifest.make(env, made, frames, played),
    )  # fmt: skip


def film(
    policy: Policy,
    env: Env,
    result: EvaluationResult,
    numbers: Tensor,
    *,
    camera: str | None = None,
    height: int = 192,
    width: int = 192,
    folder: Path | None = None,
    generator: torch.Generator | None = None,
) -> list[Clip]:
    """Play some episodes of an evaluation again, from the same starts, and film them.

    What a clip says of itself (success, length, return) is what happened in front of the camera.

    Args:
        policy: The one that was evaluated.
        env: The env it was evaluated in; any number of copies.
        result: The evaluation.
        numbers: [N] int64 of its episodes, for example from `choose`.
        camera: None takes the env's first.
        height: Pixels.
        width: Pixels.
        folder: Where to write the videos; None writes none.
        generator: Of the samples, for a result that is not greedy.

    Returns:
        clips: One per episode.

    Raises:
        CapabilityError: The env draws no pictures, or cannot start an episode again.
        NotFoundError: No such camera.
    """
    if not env.spec.cameras:
        raise CapabilityError("this env has no camera to film with; set evaluate.videos: 0")
    if not env.spec.seedable:
        raise CapabilityError("this env cannot start an episode again, so none can be filmed; set evaluate.videos: 0")
    if not len(numbers):
        return []
    recorder = Recorder(camera or env.spec.cameras[0], height, width)
    starts = _Starts(result.run_seed, result.split, result.stream, len(env.spec.tasks))
    seen = _play(policy, env, numbers, starts, greedy=result.greedy, generator=generator, on_frame=recorder)
    clips = [
        Clip(
            torch.stack(recorder.frames[number]).numpy(),
            task=env.spec.tasks[int(result.task[number])],
            instruction=recorder.texts.get(number, ""),
            success=bool(seen["once"][i]) if env.spec.has_success else None,
            length=int(seen["length"][i]),
            episode_return=float(seen["returns"][i]),
        )
        for i, number in enumerate(numbers.tolist())
    ]
    if folder is not None:
        write_videos(folder, clips, frame_rate(env.spec))
    return clips


def frame_rate(spec: EnvSpec) -> float:
    """Frames per second at which a film of an env shows real time; 20 where the env has no clock."""
    return spec.control_hz or 20.0


def choose(result: EvaluationResult, count: int) -> Tensor:
    """Numbers of episodes worth looking at: failures and successes in turn, each kind going round the tasks.

    Args:
        result: An evaluation.
        count: How many at most; as many successes as failures where both exist.

    Returns:
        numbers: [<= count] int64, ascending.
    """
    success = result.success_once if result.success_once is not None else torch.ones(result.episodes, dtype=torch.bool)
    queues = []
    for kind in (~success & result.valid, success & result.valid):
        ranks = torch.zeros(result.episodes, dtype=torch.int64)
        for task in range(len(result.tasks)):
            rows = (kind & (result.task == task)).nonzero().flatten()
            ranks[rows] = torch.arange(len(rows))
        members = kind.nonzero().flatten().tolist()
        queues.append(sorted(members, key=lambda i: (int(ranks[i]), i)))  # noqa: B023 (used at once)
    chosen: list[int] = []
    while len(chosen) < count and any(queues):
        chosen += [queue.pop(0) for queue in queues if queue][: count - len(chosen)]
    return torch.tensor(sorted(chosen), dtype=torch.int64)


class Recorder:
    """An `on_frame` hook that keeps the pictures of every episode."""

    def __init__(self, camera: str, height: int, width: int) -> None:
        """Film with one camera at one size (pixels)."""
        self.camera, self.height, self.width = camera, height, width
        self.frames: dict[int, list[Tensor]] = {}
        """Episode number -> its pictures [H, W, 3] uint8, start and last state included."""
        self.texts: dict[int, str] = {}
        """Episode number -> its instruction, when the env has `instructions()`."""

    def __call__(self, env: Env, episode: Tensor) -> None:
        """Take a picture of each copy that has just moved."""
        copies = (episode >= 0).nonzero().flatten()
        if not len(copies):
            return
        pictures = env.render(copies.to(env.device), self.camera, self.height, self.width).cpu()
        texts = env.instructions() if isinstance(env, Speaking) else None
        for copy, number, picture in zip(copies.tolist(), episode[copies].tolist(), pictures, strict=True):
            self.frames.setdefault(number, []).append(picture)
            if texts is not None:
                self.texts.setdefault(number, texts[copy])


class Transcriber:
    """An `on_frame` hook that keeps what the first episodes come to in words, for envs with `transcript`."""

    def __init__(self, count: int) -> None:
        """Follow episodes 0 to count - 1."""
        self.count = count
        self.texts: dict[int, str] = {}
        """Episode number -> its transcript, complete once it has ended."""

    def __call__(self, env: Env, episode: Tensor) -> None:
        """Ask for the words of each copy that has just moved in one of the episodes."""
        copies = ((episode >= 0) & (episode < self.count)).nonzero().flatten()
        if len(copies):
            texts = env.transcript(copies.to(env.device))  # type: ignore[attr-defined]
            self.texts |= dict(zip(episode[copies].tolist(), texts, strict=True))


@dataclass(frozen=True)
class _Starts:
    """From episode numbers to starts."""

    run_seed: int
    split: Split
    stream: int
    num_tasks: int

    def seeds(self, numbers: Tensor) -> Tensor:
        return start_seeds(self.run_seed, self.split, torch.full_like(numbers, self.stream), numbers)

    def tasks(self, numbers: Tensor) -> Tensor:
        return numbers % self.num_tasks


def _plan(env: Env, task: Tensor) -> Tensor:
    """[B, turns] which of E episodes each copy plays one after the other, E behind its last.

    Copy c plays c, c + B, ...; where copies cannot play every task, an episode goes to the one of those that can which
    has fewest so far.

    Args:
        env: Says which copy can play what.
        task: [E] of each episode.
    """
    b, e, able = env.spec.num_envs, len(task), env.spec.playable()
    if able is None:
        turns = -(-e // b) + 1
        return torch.arange(turns * b).clamp(max=e).view(turns, b).T
    queue: list[list[int]] = [[] for _ in range(b)]
    for i, t in enumerate(task.tolist()):
        min((queue[c] for c in able[:, t].nonzero().flatten().tolist()), key=len).append(i)
    turns = max(map(len, queue)) + 1
    return torch.tensor([q + [e] * (turns - len(q)) for q in queue])


class _Watched:
    """An env that tells `on_frame` of every control step, also of those inside a chunk."""

    def __init__(self, env: Env, on_frame: OnFrame) -> None:
        self.env, self.on_frame = env, on_frame
        self.spec, self.where, self.observe = env.spec, name_of(env), getattr(env, "observe", None)
        if isinstance(env, Sparing):
            self.spare = env.spare
        self.playing = torch.full((env.spec.num_envs,), -1)

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        step = self.env.step(action, active)
        moved = self.playing if active is None else torch.where(active.cpu(), self.playing, -1)
        self.on_frame(self.env, moved)
        return step


def _play(
    policy: Policy,
    env: Env,
    numbers: Tensor,
    starts: _Starts,
    *,
    greedy: bool,
    generator: torch.Generator | None,
    on_frame: OnFrame | None,
    on_start: Callable[[int, Obs, int], None] | None = None,
) -> dict[str, Tensor]:
    """Play the episodes with the given numbers [E]; returns, length, once, at_end and invalid [E], on the CPU.

    `on_start` is told of every episode that begins: its number, what all copies show, and its copy.
    """
    b, e, device = env.spec.num_envs, len(numbers), env.device
    out = {
        "returns": torch.zeros(e, dtype=torch.float64), "length": torch.zeros(e, dtype=torch.int64),
        "once": torch.zeros(e, dtype=torch.bool), "at_end": torch.zeros(e, dtype=torch.bool),
        "invalid": torch.zeros(e, dtype=torch.bool),
    }  # fmt: skip
    plan = _plan(env, starts.tasks(numbers))
    turn = torch.zeros(b, dtype=torch.int64)
    row = plan[:, 0]  # e is no episode: an idle copy
    total = torch.zeros(b, dtype=torch.float64, device=device)
    length = torch.zeros(b, dtype=torch.int64, device=device)
    once = torch.zeros(b, dtype=torch.bool, device=device)
    watched = _Watched(env, on_frame) if on_frame else None

    def begin(mask: Tensor) -> Obs:
        mask = mask & (row < e)
        which = numbers[row.clamp(max=e - 1)]
        obs = env.reset(mask.to(device), starts.seeds(which).to(device), starts.tasks(which).to(device))
        check_observation(obs, env.spec, start=True)
        check_finite(obs, mask.to(device), env)
        for copy in mask.nonzero().flatten().tolist() if on_start else ():
            assert on_start is not None
            on_start(int(which[copy]), obs, copy)
        if watched is not None:
            watched.playing = torch.where(row < e, which, -1)
            watched.on_frame(env, torch.where(mask, which, -1))
        return obs

    with _eval_mode(policy):
        obs = begin(torch.ones(b, dtype=torch.bool))
        while bool((playing := row < e).any()):
            active = None if bool(playing.all()) else playing.to(device)
            action = decide(policy, obs, active, generator=generator, greedy=greedy).action
            stepper: Any = watched or env
            executed = execute(stepper, action, active, ends="none")
            obs = executed.obs
            over = executed.terminated | executed.truncated
            total += executed.reward
            length += executed.steps
            if executed.success_once is not None:
                once |= executed.success_once
            if env.spec.max_steps is None and int(length.max()) > LONGEST:
                raise CapabilityError(
                    f"an evaluation episode has not ended within {LONGEST:,} control steps, and the env has no time "
                    "limit of its own; give it one (env.max_steps), or skip evaluation (evaluate.episodes: 0)"
                )
            done = over.cpu() & playing
            if not bool(done.any()):
                continue
            ended = row[done]
            here = done.to(device)
            out["returns"][ended], out["length"][ended] = total[here].cpu(), length[here].cpu()
            out["once"][ended] = once[here].cpu()
            if executed.success is not None:
                out["at_end"][ended] = executed.success[here].cpu()
            if executed.invalid is not None:
                out["invalid"][ended] = executed.invalid[here].cpu()
            total[here], length[here], once[here] = 0.0, 0, False
            turn += done
            row = plan.gather(1, turn[:, None])[:, 0]
            if bool((done & (row < e)).any()):
                obs = begin(done)
    return out


class _eval_mode:  # noqa: N801 (used like a function)
    """Put a policy into evaluation mode (no dropout, its own way of sampling there) for a while."""

    def __init__(self, policy: Policy) -> None:
        self.module = policy if isinstance(policy, nn.Module) and policy.training else None
        self.evaluating: Callable[[bool], None] = getattr(policy, "evaluating", lambda on: None)

    def __enter__(self) -> None:
        self.evaluating(True)
        if self.module is not None:
            self.module.eval()

    def __exit__(self, *_: object) -> None:
        self.evaluating(False)
        if self.module is not None:
            self.module.train()
