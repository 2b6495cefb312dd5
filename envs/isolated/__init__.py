"""Any simulator in any Python: `env: {type: isolated, simulator: ./my_simulator.py, python: /path/to/python}`.

The file defines a class `Simulator` and needs NumPy and the simulator, nothing of this project; docs/simulators.md
shows a complete one. It runs in worker processes of its own Python, so it may pin whatever it likes, print, hang or
crash. Envs that bring their simulator with them (libero) are built on the same parts.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from pydantic import Field, JsonValue, model_validator

from embodied_rl import sims
from embodied_rl.envs.isolated.env import IsolatedEnv
from embodied_rl.envs.isolated.workers import Foreign
from embodied_rl.errors import NotFoundError
from embodied_rl.section import Section
from embodied_rl.types import Split

__all__ = ["Config", "Hosted", "IsolatedEnv", "build", "host"]


class Hosted(Section):
    """What every env in processes of its own lets one choose."""

    workers: int | None = Field(None, ge=1)
    """Processes that share the copies evenly; null: one for each core this process may use. With one per copy a crash
    costs a single episode."""
    start_seconds: float = Field(300.0, gt=0)
    """Longest time for building a simulator or starting an episode; a worker that takes longer is replaced."""
    step_seconds: float = Field(60.0, gt=0)
    """Longest time for one control step of all copies of a worker; one that takes longer is replaced, and its episodes
    do not count."""
    resumable: bool = True
    """Remember each episode's actions, so that its state can be restored by replaying them; false saves the memory."""


class Config(Hosted):
    """Settings of an env whose simulator is a file of one's own."""

    type: Literal["isolated"] = "isolated"
    simulator: str = Field(min_length=1)
    """File that defines `Simulator`; relative to the working folder."""
    python: str | None = None
    """The Python that runs it; null: that of `sim`, or else this one."""
    sim: str | None = None
    """Name of an environment made by `embodied-rl sim install`, whose Python runs it."""
    settings: dict[str, JsonValue] = {}
    """Handed to `Simulator`."""
    max_steps: int | None = Field(None, ge=1)
    """Control steps after which an episode is truncated; null keeps the simulator's own limit."""

    @model_validator(mode="after")
    def _one_python(self) -> Config:
        if self.python and self.sim:
            raise ValueError(f"python ({self.python}) and sim ({self.sim}) name two Pythons: remove one of them")
        return self


def host(config: Hosted, foreign: Foreign, *, num_envs: int, device: torch.device) -> IsolatedEnv:
    """Build the copies of a simulator in processes of another Python.

    Args:
        config: How they are watched.
        foreign: What runs where.
        num_envs: Copies B.
        device: Where the env's tensors live.

    Raises:
        SimulatorError: A worker does not start, or has other versions.
    """
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    workers = min(config.workers or cores, num_envs)
    foreign = replace(foreign, eager=workers < cores)
    return IsolatedEnv(foreign, num_envs=num_envs, workers=workers, resumable=config.resumable, device=device)


def foreign_of(
    config: Hosted,
    where: str,
    simulator: Path,
    settings: Mapping[str, Any],
    *,
    sim: str | None = None,
    python: str | None = None,
    max_steps: int | None = None,
    variables: Mapping[str, str] | None = None,
) -> Foreign:
    """Decide which Python runs a simulator: that of an installed `sim`, a given one, or this one.

    Raises:
        NotFoundError: There is no such environment, Python or file.
        SimulatorError: The environment was made from another lock file.
    """
    if not simulator.is_file():
        raise NotFoundError(f"{where}: env.simulator '{simulator}': no such file")
    pins: dict[str, str] = {}
    remedy = "install what the simulator needs into that Python"
    interpreter = Path(python).expanduser() if python else Path(sys.executable)
    if sim is not None:
        interpreter, pins = sims.interpreter(sim), sims.pins(sim)
        remedy = f"run `embodied-rl sim install {sim}`"
    elif not interpreter.is_file():
        raise NotFoundError(f"{where}: env.python '{interpreter}': no such file; give the path of a Python")
    # One thread each: the workers share the cores among them, as the copies do.
    threads = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
    return Foreign(
        where, interpreter, simulator.resolve(), dict(settings), max_steps, pins, {**threads, **(variables or {})},
        remedy, config.start_seconds, config.step_seconds,
    )  # fmt: skip


def build(config: Config, *, num_envs: int, device: torch.device, split: Split, seed: int) -> IsolatedEnv:
    """Build copies of a simulator of one's own.

    Args:
        config: What runs where.
        num_envs: Copies B.
        device: Where observations and rewards go.
        split: Not needed: each start seed says which set it belongs to.
        seed: Not needed: every episode is seeded by `reset`.

    Raises:
        NotFoundError: There is no such file, Python or environment.
        SimulatorError: A worker does not start, or has other versions.
    """
    path = Path(config.simulator).expanduser()
    foreign = foreign_of(
        config, f"env isolated: '{path.name}'", path, config.settings, sim=config.sim, python=config.python,
        max_steps=config.max_steps,
    )  # fmt: skip
    return host(config, foreign, num_envs=num_envs, device=device)
