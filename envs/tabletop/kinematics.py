"""Batched kinematics of the arm: forward kinematics, Jacobian and damped-least-squares inverse kinematics.

All constants come from the compiled model, so a change of the scene needs none here.
"""

from __future__ import annotations

import mujoco
import torch
from torch import Tensor

from embodied_rl.envs.tabletop.scene import ARM_JOINTS

DAMPING = 0.05
"""Lambda of the damped least squares; larger is calmer near singular poses and slower to converge."""
POSTURE_GAIN = 0.05
"""Share of the distance to the rest posture that the spare degree of freedom closes per control step."""


Pose = tuple[Tensor, Tensor, Tensor]
"""TCP position [B, 3], TCP rotation [B, 3, 3], joint frames [B, 7, 4, 4], as `ArmKinematics.forward` returns them."""


class ArmKinematics:
    """Kinematics of the seven joints up to the tool centre point (TCP), for B copies at once."""

    def __init__(self, model: mujoco.MjModel, rest: Tensor, device: torch.device) -> None:
        """Read frames and limits from the model.

        Args:
            model: Compiled scene with the joints `ARM_JOINTS` (each about its own z axis) and a site "tcp".
            rest: [7] rad, posture that resolves the redundancy.
            device: Where the batches live.
        """
        joints = [model.joint(name).id for name in ARM_JOINTS]
        bodies = [int(model.jnt_bodyid[j]) for j in joints]
        base = int(model.body_parentid[bodies[0]])
        fixed = [_frame(model.body_pos[b], model.body_quat[b]) for b in bodies]
        fixed[0] = _frame(model.body_pos[base], model.body_quat[base]) @ fixed[0]
        about_z = torch.zeros(3, 4, 4, dtype=torch.float64)
        about_z[0, 2, 2] = about_z[0, 3, 3] = 1.0
        about_z[1, 0, 0] = about_z[1, 1, 1] = 1.0
        about_z[2, 0, 1], about_z[2, 1, 0] = -1.0, 1.0
        # The frame of joint i in its parent is constant + cosine * cos(q_i) + sine * sin(q_i).
        parts = torch.stack(fixed)[None] @ about_z[:, None]
        self._constant, self._cosine, self._sine = parts.float().to(device).contiguous()
        site = model.site("tcp").id
        hand = int(model.site_bodyid[site])
        assert int(model.body_parentid[hand]) == bodies[-1], "the TCP must hang on the last link by one fixed body"
        tool = _frame(model.body_pos[hand], model.body_quat[hand]) @ _frame(model.site_pos[site], model.site_quat[site])
        self._tool = tool.float().to(device)
        limits = torch.from_numpy(model.jnt_range[joints]).float().to(device)
        self._low, self._high = limits[:, 0].contiguous(), limits[:, 1].contiguous()
        self._rest = rest.float().to(device)
        self._damping = DAMPING**2 * torch.eye(6, device=device)

    def forward(self, joints: Tensor) -> Pose:
        """Forward kinematics.

        Args:
            joints: [B, 7] rad.

        Returns:
            position: [B, 3] TCP in the world, m.
            rotation: [B, 3, 3] TCP frame in the world (columns are its axes; z points out of the gripper).
            frames: [B, 7, 4, 4] joint frames in the world, input of `jacobian`.
        """
        angle = joints[:, :, None, None]
        local = self._constant + self._cosine * angle.cos() + self._sine * angle.sin()
        first, *others = local.unbind(1)
        frames = [first]
        for frame in others:
            frames.append(torch.bmm(frames[-1], frame))
        tcp = torch.bmm(frames[-1], self._tool.expand(len(joints), -1, -1))
        return tcp[:, :3, 3], tcp[:, :3, :3], torch.stack(frames, dim=1)

    def jacobian(self, frames: Tensor, position: Tensor) -> Tensor:
        """Geometric Jacobian of the TCP: column i is (z_i x (p - p_i), z_i).

        Args:
            frames: [B, 7, 4, 4] from `forward`.
            position: [B, 3] TCP, m.

        Returns:
            jacobian: [B, 6, 7], linear rows (m/rad) above angular rows (rad/rad).
        """
        axes = frames[:, :, :3, 2]
        arms = position[:, None] - frames[:, :, :3, 3]
        return torch.cat([torch.cross(axes, arms, dim=2), axes], dim=2).transpose(1, 2)

    def solve(self, joints: Tensor, pose: Pose, target: Tensor, target_rotation: Tensor, max_step: float) -> Tensor:
        """One step of damped-least-squares inverse kinematics with a posture task in the null space.

        dq = J' (J J' + lambda^2 I)^-1 (e - J n) + n,  n = gain (q_rest - q)

        Args:
            joints: [B, 7] rad, where the arm is.
            pose: `forward(joints)`.
            target: [B, 3] wanted TCP position, m.
            target_rotation: [B, 3, 3] wanted TCP frame.
            max_step: Largest change of each joint, rad.

        Returns:
            joint_target: [B, 7] rad, inside the joint limits.

        Source: Nakamura and Hanafusa, "Inverse kinematic solutions with singularity robustness", 1986, eq. 30.
        """
        position, rotation, frames = pose
        jacobian = self.jacobian(frames, position)
        error = torch.cat([target - position, rotation_error(target_rotation, rotation)], dim=1)[:, :, None]
        posture = (POSTURE_GAIN * (self._rest - joints))[:, :, None]
        residual = torch.baddbmm(error, jacobian, posture, alpha=-1)
        across = jacobian.transpose(1, 2)
        weights = torch.linalg.solve(torch.baddbmm(self._damping, jacobian, across), residual)
        step = torch.baddbmm(posture, across, weights)[:, :, 0].clamp(-max_step, max_step)
        return torch.clamp(joints + step, self._low, self._high)


def rotation_error(target: Tensor, actual: Tensor) -> Tensor:
    """Rotation vector in the world frame that turns `actual` into `target`, to first order.

    e = 1/2 sum_k (a_k x t_k) over the three axes; its length is sin(angle), so it is good below about 1 rad.

    Args:
        target: [B, 3, 3]
        actual: [B, 3, 3]

    Returns:
        error: [B, 3] rad.
    """
    return 0.5 * torch.cross(actual, target, dim=1).sum(dim=2)


def turned(rotation: Tensor, vector: Tensor) -> Tensor:
    """Frames [B, 3, 3] turned in the world by rotation vectors [B, 3] in rad (Rodrigues' formula, column by column)."""
    angle = torch.linalg.vector_norm(vector, dim=1).clamp_min(1e-12)[:, None, None]
    axis = vector[:, :, None] / angle
    cosine = angle.cos()
    across = torch.cross(axis.expand(-1, -1, 3), rotation, dim=1)
    along = axis * torch.bmm(axis.transpose(1, 2), rotation)
    return cosine * (rotation - along) + angle.sin() * across + along


def rotation_from_quaternion(quaternion: Tensor) -> Tensor:
    """Rotation matrices [..., 3, 3] of unit quaternions [..., 4] (w, x, y, z)."""
    w, x, y, z = quaternion.unbind(-1)
    x2, y2, z2 = x * x, y * y, z * z
    rows = [
        1 - 2 * (y2 + z2), 2 * (x * y - w * z), 2 * (x * z + w * y),
        2 * (x * y + w * z), 1 - 2 * (x2 + z2), 2 * (y * z - w * x),
        2 * (x * z - w * y), 2 * (y * z + w * x), 1 - 2 * (x2 + y2),
    ]  # fmt: skip
    return torch.stack(rows, dim=-1).unflatten(-1, (3, 3))


def _frame(position: object, quaternion: object) -> Tensor:
    frame = torch.eye(4, dtype=torch.float64)
    frame[:3, 3] = torch.as_tensor(position, dtype=torch.float64)
    frame[:3, :3] = rotation_from_quaternion(torch.as_tensor(quaternion, dtype=torch.float64))
    return frame
