"""What a task of your own offers, and how it is found."""

from __future__ import annotations

import importlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Protocol

import mujoco
import numpy as np
from torch import Tensor

from embodied_rl.envs.mjcf.scene import Scene
from embodied_rl.envs.mjcf.view import View
from embodied_rl.errors import ConfigError, NotFoundError, nearest
from embodied_rl.registry import load_file

METHODS = ("start", "observe", "reward", "success")


@dataclass
class Start:
    """How one episode begins.

    Example: `Start("touch the red ball", qpos=[0.3, -1.2], mocap={"target": (0.1, 0.2, 0.0)})`.
    """

    instruction: str
    qpos: Sequence[float] | np.ndarray | None = None
    """[nq] positions; None for the scene's own (`model.qpos0`)."""
    qvel: Sequence[float] | np.ndarray | None = None
    """[nv] velocities; None for rest."""
    mocap: dict[str, Sequence[float]] = field(default_factory=dict)
    """Mocap body -> (x, y, z) in m: marks that are seen and not felt, such as a goal."""
    memory: Sequence[float] = ()
    """Numbers that `View.memory` shows until the episode ends; as many in every start."""


class Task(Protocol):
    """A class with these methods; it need not inherit from this one. It may have `tasks`, names that share it."""

    def __init__(self, model: mujoco.MjModel) -> None:
        """Take what is needed of the compiled scene; nothing else is given."""
        ...

    def start(self, task: str, rng: np.random.Generator) -> Start:
        """How an episode of `task` begins; random only through `rng`."""
        ...

    def observe(self, view: View) -> Tensor:
        """[B, D] float32 what a policy sees beside the instruction."""
        ...

    def reward(self, view: View) -> Tensor:
        """[B] reward for the state that the action led to."""
        ...

    def success(self, view: View) -> Tensor:
        """[B] bool, the goal holds now."""
        ...

    # And, where it is wanted:
    #     tasks: tuple[str, ...]               names of its tasks; without it there is one, called like the class
    #     sense(view) -> Tensor                [B, D] what a policy that looks at pictures is told of the robot itself
    #     terminated(view) -> Tensor           [B] bool, nothing can follow (fallen over, out of reach)


def load_task(name: str, scene: Scene) -> Task:
    """Find a class and make one of it.

    Args:
        name: `file.py:Class` or `package.module:Class`.
        scene: It is for.

    Raises:
        NotFoundError: No such file, module or class.
        ConfigError: It lacks a method, or cannot be made.
    """
    where = f"env mjcf: task '{name}'"
    place, colon, wanted = name.rpartition(":")
    if not colon or not place:
        raise ConfigError(f"{where}: found no class, expected file.py:Class or package.module:Class")
    module = _module(place, where)
    found = getattr(module, wanted, None)
    if not isinstance(found, type):
        known = [k for k, v in vars(module).items() if isinstance(v, type) and v.__module__ == module.__name__]
        raise NotFoundError(f"{where}: {place} has no class '{wanted}'{nearest(wanted, known)}")
    lacking = [method for method in METHODS if not callable(getattr(found, method, None))]
    if lacking:
        raise ConfigError(f"{where} has no method {', '.join(lacking)}; a task needs {', '.join(METHODS)}")
    try:
        made: Task = found(scene.model)
    except (TypeError, ValueError, KeyError) as error:
        raise ConfigError(f"{where} cannot be made of the scene's model: {type(error).__name__}: {error}") from error
    return made


def _module(place: str, where: str) -> ModuleType:
    if place.endswith(".py"):
        return load_file("env mjcf: task", Path(place))
    try:
        return importlib.import_module(place)
    except ModuleNotFoundError as error:
        if error.name and (place == error.name or place.startswith(error.name + ".")):
            raise NotFoundError(f"{where}: there is no module '{error.name}'") from None
        raise
