"""LIBERO: 130 manipulation tasks in five suites, each told by a sentence, with the field's evaluation protocols.

`env: {type: libero, tasks: [libero_spatial]}` in a recipe. It runs in worker processes of its own Python (MuJoCo 3.3.2
and robosuite 1.4.0, which exclude the engine's): `embodied-rl sim install libero` makes that. docs/simulators.md tells
where its assets come from and what the protocols are.

Source: Liu et al. 2023 (LIBERO: Benchmarking Knowledge Transfer for Lifelong Robot Learning, arXiv:2306.03310).
"""

from __future__ import annotations

import logging
import os
from pathlib import Path
from typing import Any, Literal

import torch
import yaml
from pydantic import Field, field_validator, model_validator

from embodied_rl.envs.isolated import Hosted, IsolatedEnv, foreign_of, host
from embodied_rl.errors import NotFoundError, nearest
from embodied_rl.section import Section
from embodied_rl.types import Split

log = logging.getLogger(__name__)

HERE = Path(__file__).parent
ASSETS = "LIBERO_ASSETS"
"""Environment variable that names the folder of assets where the recipe does not."""
DOWNLOADED = "~/.cache/libero/assets"
"""Where hf-libero 0.1.4 puts the assets that it downloads."""
FOLDERS = (
    "articulated_objects", "scenes", "stable_hope_objects", "stable_scanned_objects", "textures", "turbosquid_objects",
)  # fmt: skip
"""What the folder of assets holds."""


PROTOCOLS: dict[str, dict[str, Any]] = yaml.safe_load((HERE / "protocols.yaml").read_text())
"""The published protocols by name."""


class Changes(Section):
    """Settings that take the place of the protocol's; null keeps what it says."""

    settle: int | None = Field(None, ge=0)
    """Control steps of doing nothing at the start of an episode, while objects fall to rest."""
    hand: Literal["open_low", "open_high", "open_high_binary"] | None = None
    """The last action: open_low: -1 opens and 1 closes, LIBERO's own; open_high: 1 opens and -1 closes;
    open_high_binary: the same, and only the sign counts."""
    cameras: tuple[Literal["agentview", "wrist"], ...] | None = Field(None, min_length=1)
    """Pictures that the policy sees."""
    render: int | None = Field(None, ge=16, le=1024)
    """Pixels of a side as LIBERO draws; most of its time goes there."""
    picture: int | None = Field(None, ge=16, le=1024)
    """Pixels of a side as the policy sees."""
    resize: Literal["lanczos", "bilinear"] | None = None
    """How the one becomes the other."""
    jpeg: bool | None = None
    """Through JPEG of quality 95 before resizing, as the data of OpenVLA went."""
    crop: float | None = Field(None, gt=0, le=1)
    """Share of the area, cut from the middle and enlarged again; 1 keeps all."""
    state: bool | None = None
    """Show the 8 numbers of the arm as `proprio`: position (m), axis-angle (rad), two fingers (m)."""
    seed: int | None = Field(None, ge=0, lt=2**32)
    """Of the places of fixtures, which initial states do not fix."""


class Config(Hosted):
    """Settings of LIBERO."""

    type: Literal["libero"] = "libero"
    tasks: tuple[str, ...] = Field(("libero_spatial",), min_length=1)
    """Suites (libero_spatial, libero_object, libero_goal, libero_10, libero_90) and tasks as suite/task, in any
    mixture; copies share them evenly."""
    protocol: str = "openvla-oft"
    """Published evaluation protocol: what is seen, how the gripper is told, how long an episode is."""
    change: Changes = Changes()
    """Settings that take the place of the protocol's."""
    states: Literal["heldout", "sampled", "published", "each"] = "heldout"
    """Where episodes start. heldout: training from the first 40 of a task's 50 published initial states, evaluation
    from the last 10; sampled: training from new placements, evaluation from all 50; published: both from all 50, as
    most papers do; each: as published, with every pair of task and state a task of its own, so that the first n
    episodes of each task play its first n states, as the published protocols do."""
    max_steps: int | None = Field(None, ge=1)
    """Control steps (1/20 s) after which an episode is truncated, where that is sooner than the protocol's limit."""
    assets: str | None = None
    """Folder of LIBERO's assets; null takes the one that the environment variable LIBERO_ASSETS names, or else
    ~/.cache/libero/assets, where hf-libero puts its download."""
    isolated: bool = True
    """Run in the Python that `embodied-rl sim install libero` made; false runs the workers in this one, for those who
    have installed LIBERO beside the engine."""

    @field_validator("protocol")
    @classmethod
    def _known(cls, protocol: str) -> str:
        if protocol not in PROTOCOLS:
            raise ValueError(f"protocol '{protocol}' does not exist{nearest(protocol, PROTOCOLS)}")
        return protocol

    @model_validator(mode="after")
    def _sooner(self) -> Config:
        limit = self.limit()
        if self.max_steps is not None and limit is not None and self.max_steps >= limit:
            raise ValueError(
                f"max_steps ({self.max_steps}) is not sooner than the limit of protocol '{self.protocol}' ({limit}): "
                "remove it, or choose another protocol"
            )
        return self

    def limit(self) -> int | None:
        """Control steps of the longest episode by the protocol; None where no suite is known."""
        steps = PROTOCOLS[self.protocol]["steps"]
        return max((steps[suite] for task in self.tasks if (suite := task.split("/")[0]) in steps), default=None)

    def in_force(self) -> dict[str, Any]:
        """The protocol with the recipe's changes laid over it."""
        changes = {name: value for name, value in self.change.model_dump(mode="json").items() if value is not None}
        return PROTOCOLS[self.protocol] | changes

    def departures(self) -> str:
        """What differs from the published evaluation, however many episodes are played; empty when nothing does."""
        published = PROTOCOLS[self.protocol]
        changed: dict[str, Any] = {} if self.states == published["states"] else {"env.states": self.states}
        changed |= {f"env.change.{k}": v for k, v in self.in_force().items() if v != published[k]}
        changed |= {} if self.max_steps is None else {"env.max_steps": self.max_steps}
        return ", ".join(f"{name}: {value}" for name, value in changed.items())


def find_assets(given: str | None) -> Path:
    """The folder of assets.

    Args:
        given: The recipe's `env.assets`.

    Raises:
        NotFoundError: It is neither named nor where hf-libero puts it, not there, or not LIBERO's; says what to
            download and where to put it.
    """
    get = (
        "download the folder libero/libero/assets of the LIBERO repository (or the copy of it on the Hugging Face hub "
        f"that the package hf-libero names), and name its folder as env.assets or in the environment variable {ASSETS}"
    )
    named = given or os.environ.get(ASSETS)
    if not named and Path(DOWNLOADED).expanduser().is_dir():
        named = DOWNLOADED
    if not named:
        raise NotFoundError(
            "env libero needs the assets of LIBERO, which its package does not bring and has not downloaded to "
            f"{DOWNLOADED}: {get}"
        )
    folder = Path(named).expanduser().resolve()
    if not folder.is_dir():
        raise NotFoundError(f"env libero: its assets '{folder}' are not there: {get}")
    missing = [name for name in FOLDERS if not (folder / name).is_dir()]
    if missing:
        raise NotFoundError(f"env libero: its assets '{folder}' lack {', '.join(missing)}: {get}")
    return folder


def build(config: Config, *, num_envs: int, device: torch.device, split: Split, seed: int) -> IsolatedEnv:
    """Build copies of LIBERO.

    Args:
        config: The recipe's section.
        num_envs: Copies B.
        device: Where observations and rewards go.
        split: For evaluation it is told how that relates to the published one; each start seed says its own set.
        seed: Not needed: every episode is seeded by `reset`.

    Raises:
        NotFoundError: LIBERO is not installed, or its assets are missing.
        SimulatorError: A task that does not exist, no EGL, or another version than the lock file's.
    """
    settings = {
        "protocol": {"name": config.protocol, **config.in_force(), "departures": config.departures() or "none"},
        "states": config.states,
        "tasks": list(config.tasks),
        "assets": str(find_assets(config.assets)),
    }
    # Mesa's software renderer would start a thread for every core in every worker.
    variables = {"LP_NUM_THREADS": "1", "MUJOCO_GL": "egl", "PYOPENGL_PLATFORM": "egl"}
    foreign = foreign_of(
        config, "env libero", HERE / "simulator.py", settings, sim="libero" if config.isolated else None,
        max_steps=config.max_steps, variables=variables,
    )  # fmt: skip
    env = host(config, foreign, num_envs=num_envs, device=device)
    if split == "eval":
        _relate(config, len({name.split("#")[0] for name in env.spec.tasks}))
    return env


def _relate(config: Config, tasks: int) -> None:
    """Log how an evaluation of so many tasks relates to the published one; the engine alone knows its episodes."""
    trials, departures = PROTOCOLS[config.protocol]["trials"], config.departures()
    published = (
        f"env libero: protocol {config.protocol} plays {trials} episodes of each task, one from each of its first "
        f"{trials} initial states (env.states: each, evaluate.episodes: {trials * tasks})"
    )
    if departures:
        log.warning("%s; this evaluation departs from it in %s", published, departures)
    else:
        log.info("%s; this env keeps to it", published)
