"""What a policy sees when it has eyes: small pictures of some cameras, redrawn only where something has moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import mujoco
import torch
from torch import Tensor

from embodied_rl.envs.tabletop.physics import NativePhysics, Physics
from embodied_rl.envs.tabletop.tasks import View
from embodied_rl.errors import NotFoundError, nearest
from embodied_rl.runfolder import installed
from embodied_rl.types import Obs, TensorSpec

if TYPE_CHECKING:
    from embodied_rl.envs.tabletop.camera import BatchCamera

Paint = Callable[[Tensor], tuple[Tensor | None, Tensor | None]]
"""Rows of copies -> their mocap positions and colours, as `BatchCamera.render` takes them."""


def engines(physics: Physics, pictures: Pictures | None) -> dict[str, str]:
    """Versions of what moves the scene and draws it."""
    warp = pictures is not None or not isinstance(physics, NativePhysics)
    return installed(["mujoco", *(["mujoco-warp", "warp-lang"] if warp else [])])


class Films:
    """Pictures of any copies from any camera, for people; the ray tracer is imported when the first is asked for."""

    def __init__(self, model: mujoco.MjModel, device: torch.device, where: str) -> None:
        """Draw nothing yet; `where` begins the sentence about a camera that does not exist."""
        self.cameras = tuple(model.camera(i).name for i in range(model.ncam))
        self._model, self._device, self._where = model, device, where
        self._camera: BatchCamera | None = None

    def draw(self, qpos: Tensor, paint: Paint, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        """Pictures [len(copies), H, W, 3] uint8 of the copies asked for, whose positions are in qpos [B, nq].

        Raises:
            NotFoundError: No such camera.
        """
        if camera not in self.cameras:
            known = nearest(camera, self.cameras) if self.cameras else "; it has none"
            raise NotFoundError(f"{self._where}: camera '{camera}' does not exist{known}")
        from embodied_rl.envs.tabletop.camera import BatchCamera

        if self._camera is None:
            self._camera = BatchCamera(self._model, self._device)
        rows = copies.to(self._device)
        return self._camera.render(qpos[rows], (camera,), height, width, *paint(rows))[camera]


class Pictures:
    """The latest picture of every copy from each camera."""

    def __init__(
        self,
        model: mujoco.MjModel,
        num_envs: int,
        cameras: tuple[str, ...],
        size: int | tuple[int, int],
        device: torch.device,
        threads: int = 1,
    ) -> None:
        """Start the ray tracer.

        Args:
            model: Of the scene.
            num_envs: Copies B.
            cameras: Names of its cameras.
            size: Rows and columns of each picture; one number for both, or two.
            device: Where pictures are made.
            threads: CPU threads that draw side by side.
        """
        # Only those who ask for pictures pay for importing and compiling the ray tracer.
        from embodied_rl.envs.tabletop.camera import BatchCamera, capacity_for

        shape = self._shape = (size, size) if isinstance(size, int) else size
        self.specs = {
            name: TensorSpec((*shape, 3), torch.uint8, low=0, high=255, meaning=f"RGB picture of camera {name}")
            for name in cameras
        }
        # Shadows would make a picture a quarter dearer and tell the policy little.
        capacity = capacity_for(num_envs, len(cameras) * shape[0] * shape[1], device)
        self._camera = BatchCamera(model, device, capacity=capacity, shadows=False, threads=threads)
        self._latest = {name: torch.zeros(num_envs, *shape, 3, dtype=torch.uint8, device=device) for name in cameras}
        self._stale = torch.ones(num_envs, dtype=torch.bool, device=device)

    def forget(self, copies: Tensor | None = None) -> None:
        """The masked copies [B] bool (None: all) have moved: their pictures are to be drawn again."""
        self._stale |= True if copies is None else copies

    def spare(self, copies: Tensor) -> None:
        """Until they move again, let the masked copies [B] bool show what they showed last."""
        self._stale &= ~copies.to(self._stale.device)

    def look(self, qpos: Tensor, paint: Paint) -> Obs:
        """Camera name -> [B, H, W, 3] uint8 of the state given, positions [B, nq]."""
        rows = self._stale.nonzero()[:, 0]
        if len(rows):
            drawn = self._camera.render(qpos[rows], tuple(self._latest), *self._shape, *paint(rows))
            for name, picture in self._latest.items():
                picture[rows] = drawn[name]
            self._stale.fill_(False)
        return {name: picture.clone() for name, picture in self._latest.items()}


def told_spec(tasks: int) -> TensorSpec:
    """Of the entry "told": what the simulator knows and pictures only show, for critics."""
    return TensorSpec(
        (43 + tasks,),
        privileged=True,
        meaning="hand as in that entry 10, finger target 1, wanted minus real TCP 6; object meant: relative to the TCP "
        "(10/m) 3, place (5/m) 3, quaternion 4; goal relative to it (10/m, 0 without one) 3, second object relative to "
        "it (10/m) 3, handle relative to the TCP (5/m) 3, drawer (10/m) 1, height of the object (10/m) 1, between, "
        "held, gripper open, wanted on 4, opening 1, task",
    )


def told(view: View, hand: Tensor, meant: Tensor, task: Tensor) -> Tensor:
    """See `told_spec`.

    Args:
        view: Of all copies.
        hand: [B, 17] entry of the observation.
        meant: [B, 7] pose of the object meant.
        task: [B, tasks] one-hot.

    Returns:
        told: [B, 43 + tasks] float32.
    """
    place = view.a_position
    marked = (view.goal[:, 2:] > -0.5) * (view.goal - place)
    flags = torch.stack([view.between, view.held, view.gripper_open, view.relation_on], dim=1)
    numbers = torch.stack([10 * view.drawer, 10 * view.a_height], dim=1)
    parts = [
        hand, 10 * (place - view.tcp), 5 * place, meant[:, 3:], 10 * marked, 10 * (view.b_position - place),
        5 * (view.handle - view.tcp), numbers, flags, view.aperture[:, None], task,
    ]  # fmt: skip
    return torch.cat([part.float() for part in parts], dim=1)
