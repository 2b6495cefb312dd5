"""Starts that spread out from demonstrated ones as they are mastered.

A policy that knows one demonstration succeeds next to it and hardly anywhere else, where reinforcement then has nothing
to go by. So training begins at the demonstrated starts, and those of each task spread as far as it succeeds:

    s <- min(1, max(0, s + gain * sum over the task's finished episodes of (success - target)))

s = 0 is a demonstrated start itself, s = 1 anywhere, as in evaluation, which never hears of s. What lies between is the
env's to say (`types.Spreading`).

Source: Akkaya et al. 2019 (automatic domain randomization, arXiv:1910.07113): ranges that widen around one start while
the policy succeeds at their borders. Differs: one number for each task, moved by all of its episodes in proportion to
how far they are from the target. Salimans and Chen 2018 (arXiv:1812.03381) also learn from one demonstration, from its
end backwards; here every episode is played from its beginning.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import cast

import torch
from pydantic import Field
from torch import Tensor

from embodied_rl.demo_format import OWN
from embodied_rl.demonstrations import Demonstrations
from embodied_rl.errors import CapabilityError
from embodied_rl.metrics import Partials
from embodied_rl.section import Section
from embodied_rl.seeding import numpy_rng, split_of
from embodied_rl.types import Env, Spreading, State


class Spread(Section):
    """How far from demonstrated starts training begins."""

    around: str = Field(min_length=1)
    """Folder of demonstrations of every task, made by `embodied-rl collect`; training begins where they do."""
    target: float = Field(0.25, gt=0, lt=1)
    """Success rate at which a task's starts spread no further; where it succeeds less often they draw back."""
    gain: float = Field(0.002, gt=0)
    """How far one episode that succeeds, or fails, moves them, times its distance from the target."""
    anywhere: float = Field(0.0, ge=0, lt=1)
    """Share of the episodes that begin anywhere in any case; they move nothing, and let policy and critic see early
    what there is."""


class Spreader:
    """A `Spread` with the present share of each task, which is part of a checkpoint."""

    def __init__(self, config: Spread, envs: Sequence[Env]) -> None:
        """Begin at the demonstrated starts.

        Args:
            config: Around what, and how fast.
            envs: Parts of equal spec.

        Raises:
            CapabilityError: An env that cannot start near another start, or tells no success; demonstrations that do
                not say where they began, or lack a task.
            UserError: There are no such demonstrations.
        """
        spec = envs[0].spec
        if not all(isinstance(env, Spreading) for env in envs) or not spec.has_success:
            raise CapabilityError(
                f"collect.spread begins near the starts of {config.around}, and this env cannot start near another "
                "start, or does not tell success: set collect.spread: null, or use the tabletop"
            )
        self.config, self.tasks = config, spec.tasks
        self.seeds, self.task_of = _starts(config.around, spec.tasks)
        self.share = torch.zeros(len(spec.tasks), dtype=torch.float64)

    def choose(self, seed: Tensor, task: Tensor) -> tuple[Tensor, Tensor]:
        """Near what, and how near, new episodes begin.

        Args:
            seed: [n] int64 their own start seeds; equal seeds and tasks get equal answers.
            task: [n] int64

        Returns:
            other: [n] int64 seed of a demonstrated start of the same task.
            share: [n] float64 how far from it.
        """
        pick = [numpy_rng(x, "near").random() for x in seed.tolist()]
        known = [self.seeds[self.task_of == k] for k in range(len(self.tasks))]
        other = [int(known[k][int(x * len(known[k]))]) for x, k in zip(pick, task.tolist(), strict=True)]
        share = torch.where(self._anywhere(seed), 1.0, self.share[task])
        return torch.tensor(other, dtype=torch.int64), share

    def _anywhere(self, seed: Tensor) -> Tensor:
        """[n] bool, episodes that begin anywhere in any case."""
        draws = [numpy_rng(x, "anywhere").random() for x in seed.tolist()]
        return torch.tensor(draws, dtype=torch.float64) < self.config.anywhere

    def observe(self, finished: dict[str, Tensor]) -> None:
        """Move the shares with the episodes that ended in a rollout (`Rollout.finished`)."""
        if not finished:
            return
        near = ~self._anywhere(finished["seed"])
        above = finished["success_once"].double() - self.config.target
        moved = torch.zeros_like(self.share).index_add_(0, finished["task"][near], above[near])
        self.share = (self.share + self.config.gain * moved).clamp(0, 1)

    def metrics(self) -> Partials:
        """The share of each task in the next rollout."""
        out = Partials()
        for task, share in zip(self.tasks, self.share.tolist(), strict=True):
            out.last(f"rollout/start_spread/{task}", share)
        return out

    def state_dict(self) -> State:
        """The shares."""
        return {"share": self.share.clone()}

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`."""
        self.share.copy_(state["share"])


def check_source(config: Spread, env_type: str) -> None:
    """Refuse demonstrations of another env, whose seeds would begin something else here.

    Raises:
        CapabilityError: Names both.
    """
    made = Demonstrations(config.around).info.get(OWN, {}).get("made", {}).get("env", {}).get("type")
    if made is not None and Path(made).name != Path(env_type).name:
        raise CapabilityError(
            f"{config.around}: was recorded in env '{made}', and this run plays '{env_type}', where its seeds begin "
            "something else: record a set in this env, or set collect.spread: null"
        )


def _starts(folder: str, tasks: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Start seeds and tasks [K] int64 of a set's episodes, of the env's tasks."""
    lines = Demonstrations(folder).lines
    known = [(line.extra.get("seed"), line.extra.get("task")) for line in lines]
    if not all(isinstance(seed, int) and isinstance(task, str) for seed, task in known):
        raise CapabilityError(
            f"{folder}: does not say at which seeds its episodes began, as sets of `embodied-rl collect` do: record "
            "one, or set collect.spread: null"
        )
    pairs = [(cast(int, seed), tasks.index(cast(str, task))) for seed, task in known if task in tasks]
    lacking = [task for i, task in enumerate(tasks) if i not in {t for _, t in pairs}]
    if lacking:
        raise CapabilityError(
            f"{folder}: has no episode of task {', '.join(lacking)}, so training does not know where to begin it: "
            "record one, or leave the task out"
        )
    seeds = torch.tensor([seed for seed, _ in pairs], dtype=torch.int64)
    if bool(split_of(seeds).any()):
        raise CapabilityError(
            f"{folder}: was recorded at evaluation starts, which training must not see: record another set"
        )
    return seeds, torch.tensor([task for _, task in pairs], dtype=torch.int64)
