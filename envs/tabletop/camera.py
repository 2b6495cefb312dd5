"""Pictures of many copies at once, ray-traced by MuJoCo Warp: no OpenGL, EGL or display is needed on any device.

The camera owns its own small set of render worlds. For each picture the joint positions, goal and colours of a copy
are written into one of them, so it works the same for both physics engines and never disturbs their state. What a
policy sees at 64 x 64 and what a video shows come from the same call.

Example, the first two copies from the front:

    camera = BatchCamera(scene.model, torch.device("cpu"))
    mocap_pos, geom_rgba = paint(scene, colors[:2], goal[:2])
    pictures = camera.render(qpos[:2], ("front",), 128, 128, mocap_pos, geom_rgba)["front"]  # [2, 128, 128, 3] uint8
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import mujoco
import mujoco_warp as mjw
import numpy as np
import torch
import warp as wp
from torch import Tensor

from embodied_rl.envs.tabletop.instructions import COLORS
from embodied_rl.envs.tabletop.scene import Scene
from embodied_rl.envs.tabletop.warp_runtime import start_warp
from embodied_rl.errors import NotFoundError, ShapeError, nearest

CAPACITY = 64
"""Copies drawn per launch, if nothing else is said; more are drawn in slices."""
LAUNCH_BYTES = 2**30
"""Memory for the pictures of one launch on CUDA."""
BACKGROUND = (0.80, 0.86, 0.92)
"""RGB of rays that hit nothing."""
RGB: dict[str, tuple[float, float, float]] = {
    "red": (0.85, 0.12, 0.12),
    "green": (0.13, 0.62, 0.20),
    "blue": (0.12, 0.30, 0.85),
    "yellow": (0.95, 0.82, 0.10),
    "purple": (0.52, 0.18, 0.68),
    "orange": (0.96, 0.48, 0.06),
}
"""What the colour words of the instructions look like."""
_FIRST = threading.Lock()
"""Held while a context draws for the first time: MuJoCo Warp then generates its kernel, and of two that are generated
at once one is wrong for good, without a word (objects are seen through the table)."""


class BatchCamera:
    """Draws any subset of copies from the named cameras of one model."""

    def __init__(
        self,
        model: mujoco.MjModel,
        device: torch.device,
        *,
        capacity: int = CAPACITY,
        shadows: bool = True,
        samples: int = 1,
        threads: int = 1,
    ) -> None:
        """Allocate the render worlds.

        Args:
            model: Compiled model; its cameras, lights and materials are used.
            device: Where pictures are made and returned.
            capacity: Copies drawn per launch; memory grows with it.
            shadows: Trace one more ray per pixel and light that casts shadows; about half as fast.
            samples: Rays per pixel along each axis, averaged; 2 smooths edges for four times the work.
            threads: CPU threads that draw side by side, each with worlds of its own; a GPU uses one.

        Raises:
            NotFoundError: Warp cannot use the device.
        """
        self.names = tuple(model.camera(i).name for i in range(model.ncam))
        """Cameras that `render` accepts."""
        self.device = device
        self._model = model
        self._capacity = capacity
        options = {"use_shadows": shadows, "samples_per_pixel": samples}
        lanes = threads if device.type == "cpu" else 1
        self._worlds = [_Worlds(model, device, capacity, options) for _ in range(lanes)]
        self._pool = ThreadPoolExecutor(lanes, "camera") if lanes > 1 else None

    def render(
        self,
        qpos: Tensor,
        cameras: Sequence[str],
        height: int,
        width: int,
        mocap_pos: Tensor | None = None,
        geom_rgba: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Draw n copies from one or more cameras.

        Args:
            qpos: [n, nq] positions in the model's units, any float type, any device.
            cameras: Names out of `names`.
            height: Rows of each picture.
            width: Columns of each picture.
            mocap_pos: [n, nmocap, 3] m, places of the mocap bodies; None leaves them where the model has them.
            geom_rgba: [n, ngeom, 4] in [0, 1], colours; alpha 0 is invisible; None takes the model's.

        Returns:
            pictures: camera -> [n, height, width, 3] uint8 on `device`, rows from the top.

        Raises:
            NotFoundError: No such camera.
            ShapeError: A wrong shape or an impossible picture size.
        """
        cameras = tuple(cameras)
        n = self._check(qpos, cameras, height, width, mocap_pos, geom_rgba)
        pictures = {name: torch.empty(n, height, width, 3, dtype=torch.uint8, device=self.device) for name in cameras}
        # As even as they come: the last thread to finish decides.
        size = min(self._capacity, -(-n // len(self._worlds))) if n else 1
        slices = [slice(start, min(start + size, n)) for start in range(0, n, size)]

        def draw(lane: int) -> None:
            for rows in slices[lane :: len(self._worlds)]:
                marks = None if mocap_pos is None else mocap_pos[rows]
                colors = None if geom_rgba is None else geom_rgba[rows]
                packed = self._worlds[lane].draw(qpos[rows], marks, colors, cameras, height, width)
                for i, name in enumerate(cameras):
                    pictures[name][rows] = packed[:, i, :, :, :3].flip(-1)

        if self._pool is None or len(slices) < 2:
            draw(0)
        else:
            list(self._pool.map(draw, range(len(self._worlds))))
        return pictures

    def _check(
        self,
        qpos: Tensor,
        cameras: tuple[str, ...],
        height: int,
        width: int,
        mocap_pos: Tensor | None,
        geom_rgba: Tensor | None,
    ) -> int:
        for name in cameras:
            if name not in self.names:
                raise NotFoundError(f"camera '{name}' does not exist in this scene{nearest(name, self.names)}")
        if height < 1 or width < 1:
            raise ShapeError(f"camera picture: found height {height} and width {width}, expected at least 1 pixel each")
        n = len(qpos)
        wanted = {
            "qpos": (qpos, (n, self._model.nq)),
            "mocap_pos": (mocap_pos, (n, self._model.nmocap, 3)),
            "geom_rgba": (geom_rgba, (n, self._model.ngeom, 4)),
        }
        for name, (value, shape) in wanted.items():
            if value is not None and tuple(value.shape) != shape:
                raise ShapeError(
                    f"camera {name}: found shape {list(value.shape)}, expected {list(shape)}; one row per picture"
                )
        return n


class _Worlds:
    """Render worlds for one thread: a model, its data and what the ray tracer keeps between pictures."""

    def __init__(self, model: mujoco.MjModel, device: torch.device, capacity: int, options: dict[str, Any]) -> None:
        self._model, self._device, self._capacity, self._options = model, device, capacity, options
        self._warp_device = start_warp(device)
        with wp.ScopedDevice(self._warp_device):
            self._warp_model = mjw.put_model(model)
            # One row of colours per world; the model itself has one row for all.
            colors = np.broadcast_to(model.geom_rgba.astype(np.float32), (capacity, model.ngeom, 4))
            self._warp_model.geom_rgba = wp.array(colors, dtype=wp.vec4)
            # Nothing collides here, so the room for contacts is as small as it can be.
            self._data = mjw.make_data(model, nworld=capacity, nconmax=1, njmax=1)
        self._qpos = wp.to_torch(self._data.qpos)
        self._mocap_pos = wp.to_torch(self._data.mocap_pos)
        self._rgba = wp.to_torch(self._warp_model.geom_rgba)
        self._own_mocap, self._own_rgba = self._mocap_pos.clone(), self._rgba.clone()
        self._contexts: dict[tuple[tuple[str, ...], int, int], mjw.RenderContext] = {}

    def draw(
        self,
        qpos: Tensor,
        mocap_pos: Tensor | None,
        geom_rgba: Tensor | None,
        cameras: tuple[str, ...],
        height: int,
        width: int,
    ) -> Tensor:
        """At most `capacity` copies: [n, cameras, height, width, 4] uint8, blue first; valid until the next call."""
        n = len(qpos)
        self._qpos[:n] = qpos
        self._mocap_pos[:n] = self._own_mocap[:n] if mocap_pos is None else mocap_pos
        self._rgba[:n] = self._own_rgba[:n] if geom_rgba is None else geom_rgba
        first = (cameras, height, width) not in self._contexts
        with self._on_torch_stream(), _FIRST if first else contextlib.nullcontext():
            context = self._context(cameras, height, width)
            # A view of the first worlds only: kernels are launched over `nworld`.
            data = replace(self._data, nworld=n)
            mjw.kinematics(self._warp_model, data)
            mjw.camlight(self._warp_model, data)
            mjw.refit_bvh(self._warp_model, data, context)
            mjw.render(self._warp_model, data, context)
        return wp.to_torch(context.rgb_data)[:n].view(torch.uint8).view(n, len(cameras), height, width, 4)

    def _context(self, cameras: tuple[str, ...], height: int, width: int) -> mjw.RenderContext:
        key = (cameras, height, width)
        if key not in self._contexts:
            self._contexts[key] = mjw.create_render_context(
                self._model,
                nworld=self._capacity,
                cam_active=list(cameras),
                cam_res=(width, height),
                render_rgb=True,
                render_depth=False,
                render_seg=False,
                background_color=(*BACKGROUND, 1.0),
                **self._options,
            )
        return self._contexts[key]

    def _on_torch_stream(self) -> contextlib.AbstractContextManager[object]:
        """Launch in order with torch's own kernels (matters on CUDA only, where this has not been run yet)."""
        if self._warp_device.is_cuda:
            return wp.ScopedStream(wp.stream_from_torch(torch.cuda.current_stream(self._device)))
        return wp.ScopedDevice(self._warp_device)


def capacity_for(copies: int, pixels: int, device: torch.device) -> int:
    """Copies to draw per launch: on CUDA all of them as far as memory allows, since a launch of few leaves it idle.

    Args:
        copies: That there are.
        pixels: Of all pictures of one copy, 4 bytes each.
        device: Where they are drawn.
    """
    if device.type != "cuda":
        return CAPACITY
    return max(1, min(copies, LAUNCH_BYTES // (4 * pixels)))


def paint(scene: Scene, colors: Tensor, goal: Tensor) -> tuple[Tensor, Tensor]:
    """Turn what differs between copies into what `BatchCamera.render` takes.

    Args:
        scene: The tabletop scene.
        colors: [n, M] int64, index into `instructions.COLORS` of each object.
        goal: [n, 3] m, marked goal; below the table where there is none.

    Returns:
        mocap_pos: [n, nmocap, 3] m, with the goal marker at the goal.
        geom_rgba: [n, ngeom, 4], with the objects' colours and an invisible marker where there is no goal.
    """
    n, device = len(colors), colors.device
    palette = torch.tensor([RGB[name] for name in COLORS], device=device)
    rgba = torch.from_numpy(scene.model.geom_rgba.copy()).to(device).repeat(n, 1, 1)
    rgba[:, list(scene.object_geoms), :3] = palette[colors].to(rgba.dtype)
    rgba[:, scene.model.geom("goal").id, 3] *= goal[:, 2] >= 0
    mocap_pos = torch.zeros(n, scene.model.nmocap, 3, dtype=goal.dtype, device=device)
    mocap_pos[:, scene.goal_mocap] = goal
    return mocap_pos, rgba
