"""A scene file of your own and a class that says what is to be done in it: copies, pictures, words, two engines.

    env: {type: mjcf, scene: examples/reacher/reacher.xml, task: examples/reacher/task.py:Reach}

docs/mjcf.md says what the class offers; `task.py` beside this file has its methods one by one.
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator

from embodied_rl.convention import Convention
from embodied_rl.envs.mjcf.env import MjcfEnv
from embodied_rl.envs.mjcf.scene import load_scene
from embodied_rl.envs.mjcf.task import Start, Task, load_task
from embodied_rl.envs.mjcf.view import Poses, View
from embodied_rl.envs.tabletop.physics import Engine, cores, make_physics, refuse_idle
from embodied_rl.envs.tabletop.pictures import Pictures
from embodied_rl.errors import CapabilityError, NotFoundError, nearest
from embodied_rl.section import Section
from embodied_rl.types import Split

__all__ = ["Config", "MjcfEnv", "Start", "Task", "View", "build"]


class Config(Section):
    """A scene of your own."""

    type: Literal["mjcf"] = "mjcf"
    scene: str = Field(min_length=1)
    """Path of the scene, an MJCF file (XML)."""
    task: str = Field(min_length=1)
    """The task class: `path/to/file.py:Class` or `package.module:Class`."""
    frame_skip: int = Field(10, ge=1)
    """Physics steps of one control step; their length is the scene's `option timestep`."""
    max_steps: int = Field(100, ge=1)
    """Control steps after which an episode is truncated."""
    end_on_success: bool = False
    """End the episode (terminated) in the first control step in which the task is solved."""
    observation: Literal["state", "pictures"] = "state"
    """state: what the task's `observe` returns; pictures: what cameras see, beside what the task's `sense` returns."""
    cameras: tuple[str, ...] = ()
    """Cameras of observation: pictures, by their names in the scene; none means all of them."""
    picture_size: int = Field(64, ge=8, le=512)
    """Rows and columns of each picture in pixels."""
    physics: Engine = "auto"
    """native: MuJoCo's C engine on CPU threads; warp: MuJoCo Warp on `device`; auto: warp on CUDA, native on a CPU."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of the native engine and of the cameras; null takes every core this process may use."""
    convention: Convention = Convention()
    """What the numbers of an action mean, for what was learned elsewhere; nothing else is changed by it."""
    contacts: int = Field(64, ge=1)
    """Warp engine: contacts of each copy that there is room for."""
    constraint_rows: int = Field(256, ge=1)
    """Warp engine: constraint rows of each copy that there is room for, up to four per contact."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> Config:
        refuse_idle(self, ("cameras", "picture_size"))
        return self


def build(config: Config, *, num_envs: int, device: torch.device, split: Split, seed: int) -> MjcfEnv:
    """Make an env.

    Args:
        config: The recipe's section.
        num_envs: Copies B.
        device: Where observations and rewards go.
        split: Not needed: each start seed says which set it belongs to.
        seed: Not needed: nothing is random but the starts.

    Raises:
        NotFoundError: The scene, the task or a camera does not exist.
        ConfigError: The scene or the convention is not valid, or the task lacks something or gives what cannot be used.
        CapabilityError: The scene has what the engines cannot do here.
    """
    scene = load_scene(config.scene, config.convention)
    task = load_task(config.task, scene)
    known = tuple(scene.model.camera(i).name for i in range(scene.model.ncam))
    cameras = config.cameras or known
    for name in cameras:
        if name not in known:
            raise NotFoundError(f"{scene.where}: camera '{name}' does not exist{nearest(name, known)}")
    if config.observation == "pictures" and not cameras:
        raise CapabilityError(f"{scene.where} has no camera: add one (<camera .../>), or set observation: state")
    room = {"contacts": config.contacts, "constraint_rows": config.constraint_rows}
    try:
        physics = make_physics(config.physics, scene.model, num_envs, device, config.threads, **room)
        poses = Poses(scene, num_envs, physics.device)
    except NotImplementedError as error:
        raise CapabilityError(f"{scene.where} has what MuJoCo Warp cannot do: {error}") from None
    pictures = None
    if config.observation == "pictures":
        pictures = Pictures(scene.model, num_envs, cameras, config.picture_size, physics.device, cores(config.threads))
    return MjcfEnv(config, scene, task, physics, poses, known, device, pictures)
