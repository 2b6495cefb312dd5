"""Any task of ManiSkill 3 (optional extra `maniskill`): one PhysX scene per copy on a CPU, all copies at once on a GPU.

`device.py` knows what draws (CUDA, or a software driver of Vulkan), `scene.py` is one ManiSkill env as tensors, and
`env.py` makes an `embodied_rl.types.Env` of one or many of them; with `workers`, `simulator.py` is a copy in a process.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

import torch
from pydantic import Field, JsonValue, model_validator

from embodied_rl.envs.isolated import Hosted, IsolatedEnv, foreign_of, host
from embodied_rl.errors import CapabilityError, MissingExtraError
from embodied_rl.section import Section
from embodied_rl.types import Split

if TYPE_CHECKING:
    from embodied_rl.envs.maniskill.env import ManiSkillEnv
    from embodied_rl.envs.maniskill.scene import Scene


class Config(Section):
    """Settings of a ManiSkill task."""

    type: Literal["maniskill"] = "maniskill"
    task: str = Field("PickCube-v1", min_length=1)
    """A registered task, for example `PushCube-v1`."""
    observation: Literal["state", "rgb", "rgbd"] = "state"
    """state: everything, with the poses of the objects; rgb: the cameras, and what the robot knows of itself and its
    goal; rgbd: depth in metres as well."""
    pixels: int | None = Field(None, ge=8)
    """rgb, rgbd: rows and columns of every camera's picture; null keeps the task's own."""
    control: str = "pd_ee_delta_pose"
    """A controller of the robot; pd_ee_delta_pose takes changes of the hand's position and rotation, and the grip."""
    reward: Literal["normalized_dense", "dense", "sparse", "none"] = "normalized_dense"
    """Which of the task's rewards; normalized_dense is dense over its largest value. none: the task has no reward, and
    is paid as sparse pays, 1 in every step in which it is solved."""
    max_steps: int | None = Field(None, ge=1)
    """Control steps after which an episode is truncated; null keeps the task's own limit."""
    end_on_success: bool = True
    """End an episode where the task is solved or has failed; false plays on to the time limit, so that success_at_end
    says whether what was reached has lasted."""
    starts: Literal["exact", "batch"] = "exact"
    """exact: a start depends on its seed alone; batch (GPU only): one reset for all copies that end together, faster
    with thousands of copies, but without groups and fixed evaluation starts."""
    workers: int | None = Field(None, ge=1)
    """CPU only: processes that simulate the copies side by side; null: this one simulates them one after the other. A
    process that draws in software works for half a minute before its first picture."""
    film: int = Field(256, ge=8)
    """Rows and columns of the pictures that videos are made of, before they are scaled to what is asked for."""
    kwargs: dict[str, JsonValue] = {}
    """Further settings of the task, for example {robot_uids: panda_wristcam}."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> Config:
        if self.observation == "state" and self.pixels is not None:
            raise ValueError(
                f"pixels ({self.pixels}) does nothing with observation (state): remove it, or set observation: rgb"
            )
        return self


def build(
    config: Config, *, num_envs: int, device: torch.device, split: Split, seed: int
) -> ManiSkillEnv | IsolatedEnv:
    """Make the copies; `split` and `seed` are not needed, because each start seed says all.

    Args:
        config: What to make.
        num_envs: Copies B.
        device: A CUDA device simulates and draws all copies at once on it; the CPU one after the other, or side by
            side in processes.
        split: Not needed.
        seed: Not needed.

    Raises:
        MissingExtraError: ManiSkill, or a system library that it loads, is not installed.
        NotFoundError: No such task or controller; names the nearest.
        CapabilityError: No Vulkan device, assets that are not on the disk, or a setting that cannot act here.
        ConfigError: ManiSkill refused a setting.
        SimulatorError: The same, where a worker process found it.
    """
    # Imported here, so that its settings can be read, checked and documented where ManiSkill is not installed.
    try:
        from embodied_rl.envs.maniskill.env import ManiSkillEnv
        from embodied_rl.envs.maniskill.scene import Scene, check_task, manifest_of
    except ImportError as error:
        raise MissingExtraError(
            f"env 'maniskill' cannot be loaded ({error}); run: pip install 'embodied-rl[maniskill]', and where a "
            "system library is missing: apt-get install libgl1 libvulkan1"
        ) from error
    check_task(config, device)
    if config.workers is not None:
        return _hosted(config, config.workers, num_envs, device, partial(manifest_of, config, device, num_envs))
    each = num_envs if device.type == "cuda" else 1
    scenes: list[Scene] = []
    try:
        for _ in range(num_envs // each):
            scenes.append(Scene(config, each, device))
        return ManiSkillEnv(config, scenes, device)
    except BaseException:
        for scene in scenes:
            scene.close()
        raise


def _hosted(
    config: Config, workers: int, num_envs: int, device: torch.device, manifest: Callable[[], dict[str, Any]]
) -> IsolatedEnv:
    """The copies in processes of this Python."""
    if device.type == "cuda":
        raise CapabilityError(
            f"env maniskill: workers ({workers}) does nothing on device {device}, where one scene holds all copies: "
            "remove it, or set device: cpu"
        )
    simulator = Path(__file__).with_name("simulator.py")
    settings = config.model_dump(mode="json", exclude={"workers"})
    watched = Hosted(workers=workers)
    foreign = foreign_of(watched, "env maniskill", simulator, settings, max_steps=config.max_steps)
    # The same results come of copies in processes as of copies here, so they have the same manifest.
    return host(watched, replace(foreign, manifest=manifest), num_envs=num_envs, device=device)
