"""A tabletop arm with language instructions: seven tasks, randomised layouts, two physics engines.

`env: {type: tabletop, tasks: [reach, push, lift]}` in a recipe. The scene is in `scene.py`, the tasks in `tasks.py`.
"""

from __future__ import annotations

from typing import Annotated, Literal

import torch
from pydantic import Field, field_validator, model_validator

from embodied_rl.envs.tabletop.env import TabletopEnv
from embodied_rl.envs.tabletop.instructions import NAMES, Name, Sentences
from embodied_rl.envs.tabletop.physics import Engine, cores, make_physics, refuse_idle
from embodied_rl.envs.tabletop.pictures import Pictures
from embodied_rl.envs.tabletop.scene import CAMERAS, build_scene
from embodied_rl.envs.tabletop.tasks import TASKS
from embodied_rl.errors import nearest
from embodied_rl.section import Section
from embodied_rl.types import Split

Pixels = Annotated[int, Field(ge=8, le=512)]

__all__ = ["Config", "TabletopEnv", "build"]


class Config(Section):
    """The tabletop arm."""

    type: Literal["tabletop"] = "tabletop"
    tasks: list[str] = Field(["reach", "push", "lift"], min_length=1)
    """Any of reach, push, lift, place, stack, open, close; copies share them evenly."""
    reward: Literal["dense", "progress", "sparse"] = "dense"
    """dense: shaped, in [0, 1] per control step, 1 while solved; progress: 10 times the change of dense, so that each
    action is paid for its own effect at once; sparse: 1 while solved, else 0."""
    max_steps: int = Field(50, ge=1)
    """Control steps (1/20 s each) after which an episode is truncated; place and stack need about 80."""
    end_on_success: bool = False
    """End the episode (terminated) in the first control step in which the task is solved."""
    physics: Engine = "auto"
    """native: MuJoCo's C engine on CPU threads; warp: MuJoCo Warp on `device`; auto: warp on CUDA, native on a CPU."""
    observation: Literal["state", "pictures"] = "state"
    """state: positions of everything; pictures: what cameras see, beside the robot's own state and the words."""
    cameras: tuple[str, ...] = ("table", "wrist")
    """Cameras of observation: pictures; any of front, overhead, table, close, wrist; close shows what table
    does in two thirds of the height, for pictures of 2 rows to 3 columns. On a CPU a picture of each costs as
    much as some ten control steps."""
    picture_size: Pixels | tuple[Pixels, Pixels] = 64
    """Rows and columns of each picture in pixels; one number for both, or two."""
    privileged: bool = False
    """observation: pictures; also show what the simulator knows, for a critic (policy.critic.reads: privileged). What
    chooses actions does not get it."""
    evaluation_sentences: Sentences = "heldout"
    """heldout: evaluation starts are told in sentences that training never uses; training: in sentences of training.
    The layouts are the same, so the two can be compared in pairs (see evaluate.suites)."""
    names: tuple[Name, ...] = Field(NAMES, min_length=1)
    """How instructions name objects, chosen at each start: color ("the red object"), shape ("the cube"), both ("the
    red cube")."""
    rephrase: bool = False
    """In training, say the instruction in other words of the same meaning at each control step: demonstrations then
    tell one scene in as many ways as they have frames."""
    threads: int | None = Field(None, ge=1)
    """CPU threads of the native engine and of the cameras; null takes every core this process may use."""
    contacts: int = Field(64, ge=1)
    """Warp engine: contacts of each copy that there is room for."""
    constraint_rows: int = Field(256, ge=1)
    """Warp engine: constraint rows of each copy that there is room for, up to four per contact."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> Config:
        refuse_idle(self, ("cameras", "picture_size", "privileged"))
        return self

    @field_validator("cameras")
    @classmethod
    def _cameras_exist(cls, cameras: tuple[str, ...]) -> tuple[str, ...]:
        for name in cameras:
            if name not in CAMERAS:
                raise ValueError(f"camera '{name}' does not exist{nearest(name, CAMERAS)}")
        if not cameras or len(set(cameras)) < len(cameras):
            raise ValueError(f"cameras {list(cameras)}: name at least one, and each once")
        return cameras

    @model_validator(mode="after")
    def _success_pays(self) -> Config:
        if self.end_on_success and self.reward == "dense":
            raise ValueError(
                f"reward ({self.reward}) with end_on_success ({self.end_on_success}) pays for avoiding success, "
                "because it ends the episode and its rewards; set reward: progress or sparse, or end_on_success: false"
            )
        return self

    @field_validator("names")
    @classmethod
    def _each_once(cls, names: tuple[Name, ...]) -> tuple[Name, ...]:
        if len(set(names)) < len(names):
            raise ValueError(f"names {list(names)}: each once")
        return names

    @field_validator("tasks")
    @classmethod
    def _known(cls, tasks: list[str]) -> list[str]:
        for name in tasks:
            if name not in TASKS:
                raise ValueError(f"task '{name}' does not exist{nearest(name, TASKS)}")
        if len(set(tasks)) < len(tasks):
            raise ValueError(f"tasks {tasks} names one twice; list each task once")
        return tasks


def build(config: Config, *, num_envs: int, device: torch.device, split: Split, seed: int) -> TabletopEnv:
    """Make an env.

    Args:
        config: The recipe's section.
        num_envs: Copies B.
        device: Where observations and rewards go.
        split: Not needed: each start seed says which set it belongs to.
        seed: Not needed: nothing is random but the starts.

    Returns:
        env: Every copy at rest; call `reset` before the first step.
    """
    scene = build_scene()
    room = {"contacts": config.contacts, "constraint_rows": config.constraint_rows}
    physics = make_physics(config.physics, scene.model, num_envs, device, config.threads, **room)
    pictures = None
    if config.observation == "pictures":
        pictures = Pictures(
            scene.model, num_envs, config.cameras, config.picture_size, physics.device, cores(config.threads)
        )
    return TabletopEnv(
        scene,
        physics,
        tuple(config.tasks),
        reward=config.reward,
        max_steps=config.max_steps,
        end_on_success=config.end_on_success,
        device=device,
        pictures=pictures,
        privileged=config.privileged,
        evaluation_sentences=config.evaluation_sentences,
        names=config.names,
        rephrase=config.rephrase,
    )
