"""What a task may look at: joints, and where bodies and sites are, of all copies at once."""

from __future__ import annotations

from dataclasses import dataclass

import mujoco
import mujoco_warp as mjw
import torch
import warp as wp
from torch import Tensor

from embodied_rl.envs.mjcf.scene import Scene
from embodied_rl.envs.tabletop.warp_runtime import start_warp
from embodied_rl.errors import NotFoundError, nearest

_WIDTH = {mujoco.mjtJoint.mjJNT_FREE: (7, 6), mujoco.mjtJoint.mjJNT_BALL: (4, 3)}
"""Positions and velocities of a joint; slides and hinges have one of each."""


class Poses:
    """Forward kinematics of B copies by MuJoCo Warp, the same for both physics engines."""

    def __init__(self, scene: Scene, num_envs: int, device: torch.device) -> None:
        """Allocate the copies."""
        model = scene.model
        self._warp_device = start_warp(device)
        with wp.ScopedDevice(self._warp_device):
            self._model = mjw.put_model(model)
            # Nothing collides here, so the room for contacts is as small as it can be.
            self._data = mjw.make_data(model, nworld=num_envs, nconmax=1, njmax=1)
        self._qpos = wp.to_torch(self._data.qpos)
        self.mocap_pos = wp.to_torch(self._data.mocap_pos)
        """[B, nmocap, 3] m, where the marks are; the caller's to change."""
        self.body, self.site = wp.to_torch(self._data.xpos), wp.to_torch(self._data.site_xpos)
        self.body_quaternion = wp.to_torch(self._data.xquat)

    def update(self, qpos: Tensor) -> None:
        """Compute where everything is at positions [B, nq]."""
        self._qpos.copy_(qpos)
        if self._warp_device.is_cuda:
            with wp.ScopedStream(wp.stream_from_torch(torch.cuda.current_stream(self._qpos.device))):
                mjw.kinematics(self._model, self._data)
        else:
            with wp.ScopedDevice(self._warp_device):
                mjw.kinematics(self._model, self._data)


@dataclass
class View:
    """All copies as they are now; tensors are valid until the next step, so clone what is kept.

    Example: `(view.site("fingertip") - view.body("target")).norm(dim=1)` is the distance [B] in metres.
    """

    scene: Scene
    poses: Poses
    qpos: Tensor
    """[B, nq] positions, float32."""
    qvel: Tensor
    """[B, nv] velocities, float32."""
    task: Tensor
    """[B] int64 index into the class's `tasks`."""
    memory: Tensor
    """[B, K] float32, what `Start.memory` was at the start of the episode."""

    def joint(self, name: str) -> Tensor:
        """[B, n] position of a joint: m or rad; a free joint has 7 numbers (position, quaternion w x y z)."""
        joint = self._id(mujoco.mjtObj.mjOBJ_JOINT, "joint", name)
        model = self.scene.model
        first, width = model.jnt_qposadr[joint], _WIDTH.get(model.jnt_type[joint], (1, 1))[0]
        return self.qpos[:, first : first + width]

    def joint_velocity(self, name: str) -> Tensor:
        """[B, n] velocity of a joint: m/s or rad/s; a free joint has 6 numbers (linear, angular)."""
        joint = self._id(mujoco.mjtObj.mjOBJ_JOINT, "joint", name)
        model = self.scene.model
        first, width = model.jnt_dofadr[joint], _WIDTH.get(model.jnt_type[joint], (1, 1))[1]
        return self.qvel[:, first : first + width]

    def body(self, name: str) -> Tensor:
        """[B, 3] m, where a body is; a mocap body is where the start of the episode put it."""
        return self.poses.body[:, self._id(mujoco.mjtObj.mjOBJ_BODY, "body", name)]

    def quaternion(self, name: str) -> Tensor:
        """[B, 4] (w x y z) how a body is turned."""
        return self.poses.body_quaternion[:, self._id(mujoco.mjtObj.mjOBJ_BODY, "body", name)]

    def site(self, name: str) -> Tensor:
        """[B, 3] m, where a site is."""
        return self.poses.site[:, self._id(mujoco.mjtObj.mjOBJ_SITE, "site", name)]

    def _id(self, kind: mujoco.mjtObj, what: str, name: str) -> int:
        model = self.scene.model
        found = mujoco.mj_name2id(model, kind, name)
        if found < 0:
            count = {"joint": model.njnt, "body": model.nbody, "site": model.nsite}[what]
            known = filter(None, (mujoco.mj_id2name(model, kind, i) for i in range(count)))
            raise NotFoundError(f"{self.scene.where}: {what} '{name}' does not exist{nearest(name, known)}")
        return int(found)
