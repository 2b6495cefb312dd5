"""Where recorded demonstrations began and what was done there, which is what repeats them elsewhere reads."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import cast

import torch
from torch import Tensor

from embodied_rl.demo_format import OWN
from embodied_rl.demonstrations import Demonstrations
from embodied_rl.errors import CapabilityError
from embodied_rl.seeding import split_of


@dataclass(frozen=True)
class Shown:
    """K demonstrations of an env's tasks."""

    seeds: Tensor
    """[K] int64 start seeds."""
    tasks: Tensor
    """[K] int64 index into the env's tasks; each has some."""
    actions: list[Tensor]
    """K times [T, D], as executed."""

    @staticmethod
    def read(folder: str | Path, env_type: str, tasks: tuple[str, ...]) -> Shown:
        """Read a set that is to be repeated in an env.

        Raises:
            CapabilityError: Its actions are not what was executed, or it is of another env, does not say where it
                began, lacks a task, or is of evaluation starts.
        """
        demos = Demonstrations(folder)
        _same_env(demos, env_type)
        made = demos.info.get(OWN, {}).get("made", {})
        if made.get("disturbance", {}).get("std") or made.get("misses"):
            raise CapabilityError(
                f"{folder}: its hand was pushed about or missed, so its actions do not lead where it went: record it "
                "with --noise 0 and without --misses"
            )
        seeds, numbers, which = _starts(demos, tasks)
        return Shown(seeds, numbers, [episode.action for episode in demos.load(which, cameras=())])


def _same_env(demos: Demonstrations, env_type: str) -> None:
    """Refuse demonstrations of another env, whose seeds would begin something else here.

    Raises:
        CapabilityError: Names both.
    """
    made = demos.info.get(OWN, {}).get("made", {}).get("env", {}).get("type")
    if made is not None and Path(made).name != Path(env_type).name:
        raise CapabilityError(
            f"{demos.folder}: was recorded in env '{made}', and this one is '{env_type}', where its seeds begin "
            "something else: record a set in this env"
        )


def _starts(demos: Demonstrations, tasks: tuple[str, ...]) -> tuple[Tensor, Tensor, list[int]]:
    """Start seeds and tasks [K] int64 of a set's episodes of an env's tasks, and their numbers in the set.

    Raises:
        CapabilityError: It does not say where they began, lacks a task, or is of evaluation starts.
    """
    folder = demos.folder
    known = [(line.extra.get("seed"), line.extra.get("task")) for line in demos.lines]
    if not all(isinstance(seed, int) and isinstance(task, str) for seed, task in known):
        raise CapabilityError(
            f"{folder}: does not say at which seeds its episodes began, as sets of `embodied-rl collect` do: record "
            "one with it"
        )
    which = [i for i, (_, task) in enumerate(known) if task in tasks]
    numbers = [tasks.index(cast(str, known[i][1])) for i in which]
    lacking = [task for i, task in enumerate(tasks) if i not in numbers]
    if lacking:
        raise CapabilityError(
            f"{folder}: has no episode of task {', '.join(lacking)}: record one, or leave the task out"
        )
    seeds = torch.tensor([cast(int, known[i][0]) for i in which], dtype=torch.int64)
    if bool(split_of(seeds).any()):
        raise CapabilityError(
            f"{folder}: was recorded at evaluation starts, which training must not see: record another set"
        )
    return seeds, torch.tensor(numbers, dtype=torch.int64), which
