"""Kinematics of the arm: forward kinematics and damped-least-squares inverse kinematics, one Warp thread per copy.

All constants come from the compiled model, so a change of the scene needs none here.
"""

from __future__ import annotations

import mujoco
import numpy as np
import torch
import warp as wp
from torch import Tensor

from embodied_rl.envs.tabletop.scene import ARM_JOINTS
from embodied_rl.envs.tabletop.warp_runtime import Launch

DAMPING = 0.05
"""Lambda of the damped least squares; larger is calmer near singular poses and slower to converge."""
POSTURE_GAIN = 0.05
"""Share of the distance to the rest posture that the spare degree of freedom closes per control step."""
MAX_JOINT_STEP = 0.3
"""Farthest a joint target may be ahead of the joint, rad."""

_DAMPED = wp.constant(wp.mat33(*(DAMPING**2 * np.eye(3)).flatten()))
wp.set_module_options({"enable_backward": False})


class ArmKinematics:
    """The seven joints up to the tool centre point (TCP), for B copies at once.

    `forward` and `solve` read and write the tensors below, which stay the same objects.

    Example: arm.forward(); arm.target_position.copy_(arm.position); arm.solve()  # arm.ctrl now holds the pose
    """

    def __init__(self, model: mujoco.MjModel, rest: np.ndarray, qpos: Tensor) -> None:
        """Read frames and limits from the model.

        Args:
            model: Compiled scene with the joints `ARM_JOINTS` (each about its own z axis) and a site "tcp"; the arm's
                actuators are its first seven.
            rest: [7] rad, posture that resolves the redundancy.
            qpos: [B, nq] float32 whose memory holds the positions whenever `forward` or `solve` is called.
        """
        joints = [model.joint(name).id for name in ARM_JOINTS]
        bodies = [int(model.jnt_bodyid[j]) for j in joints]
        site = model.site("tcp").id
        hand = int(model.site_bodyid[site])
        base = int(model.body_parentid[bodies[0]])
        assert int(model.body_parentid[hand]) == bodies[-1], "the TCP must hang on the last link by one fixed body"
        fixed = [_frame(model.body_pos[b], model.body_quat[b]) for b in bodies]
        fixed[0] = _frame(model.body_pos[base], model.body_quat[base]) @ fixed[0]
        tool = _frame(model.body_pos[hand], model.body_quat[hand]) @ _frame(model.site_pos[site], model.site_quat[site])
        frames = torch.from_numpy(np.stack([*fixed, tool])).float()
        first = [int(model.jnt_qposadr[j]) for j in joints]
        assert first == list(range(first[0], first[0] + 7)), "the arm's joints must follow each other"
        limits = model.jnt_range[joints]
        n, device = len(qpos), qpos.device

        def zeros(*shape: int) -> Tensor:
            return torch.zeros(n, *shape, device=device)

        self.position = zeros(3)
        """[B, 3] TCP in the world, m; by `forward`."""
        self.rotation = zeros(3, 3)
        """[B, 3, 3] TCP frame in the world (columns are its axes; z points out of the gripper); by `forward`."""
        self.target_position = zeros(3)
        """[B, 3] wanted TCP position, m; read by `solve`."""
        self.target_rotation = torch.eye(3, device=device).repeat(n, 1, 1)
        """[B, 3, 3] wanted TCP frame; read by `solve`."""
        self.ctrl = zeros(model.nu)
        """[B, nu]; `solve` writes the joint targets (rad) into the first seven columns."""
        self.origins, self.axes = zeros(7, 3), zeros(7, 3)
        constants = (frames[:, :3, 3].contiguous().to(device), frames[:, :3, :3].contiguous().to(device))
        bounds = [torch.tensor(bound).float().to(device) for bound in (limits[:, 0], limits[:, 1], rest)]
        pose = (self.position, self.rotation, self.origins, self.axes)
        target = (self.target_position, self.target_rotation)
        self._forward = Launch(forward_kinematics, n, device, qpos, first[0], *constants, *pose)
        self._solve = Launch(inverse_kinematics, n, device, qpos, first[0], *pose, *target, *bounds, self.ctrl)

    def forward(self) -> None:
        """Write the pose of the TCP, and what `solve` needs, from the joints in `qpos`."""
        self._forward()

    def solve(self) -> None:
        """One step of damped-least-squares inverse kinematics with a posture task in the null space.

        dq = J' (J J' + lambda^2 I)^-1 (e - J n) + n,  n = gain (q_rest - q)

        e is the way to the target: its position minus the TCP's, and the rotation vector to its frame to first order
        (the length is sin(angle), good below about 1 rad). `forward` must have seen the same joints. The result is at
        most MAX_JOINT_STEP from the joints and inside their limits.

        Source: Nakamura and Hanafusa, "Inverse kinematic solutions with singularity robustness", 1986, eq. 30.
        """
        self._solve()


@wp.kernel
def forward_kinematics(
    qpos: wp.array2d[float],
    first: int,
    offset: wp.array[wp.vec3],
    turn: wp.array[wp.mat33],
    position: wp.array[wp.vec3],
    rotation: wp.array[wp.mat33],
    origins: wp.array2d[wp.vec3],
    axes: wp.array2d[wp.vec3],
) -> None:
    """Walk from the base to the TCP; origins [B, 7] and axes [B, 7] are where each joint is and turns about."""
    i = wp.tid()
    p = wp.vec3()
    r = wp.identity(n=3, dtype=float)
    for j in range(7):
        p += r @ offset[j]
        q = qpos[i, first + j]
        c, s = wp.cos(q), wp.sin(q)
        r = r @ turn[j] @ wp.mat33(c, -s, 0.0, s, c, 0.0, 0.0, 0.0, 1.0)
        origins[i, j] = p
        axes[i, j] = wp.vec3(r[0, 2], r[1, 2], r[2, 2])
    position[i] = p + r @ offset[7]
    rotation[i] = r @ turn[7]


@wp.kernel
def inverse_kinematics(
    qpos: wp.array2d[float],
    first: int,
    position: wp.array[wp.vec3],
    rotation: wp.array[wp.mat33],
    origins: wp.array2d[wp.vec3],
    axes: wp.array2d[wp.vec3],
    target_position: wp.array[wp.vec3],
    target_rotation: wp.array[wp.mat33],
    low: wp.array[float],
    high: wp.array[float],
    rest: wp.array[float],
    ctrl: wp.array2d[float],
) -> None:
    """See `ArmKinematics.solve`; column j of J is (z_j x (p - p_j), z_j)."""
    i = wp.tid()
    # J J' + lambda^2 I in blocks of 3 x 3, and e - J n in halves.
    upper, lower = wp.mat33(_DAMPED), wp.mat33(_DAMPED)
    mixed = wp.mat33()
    move = target_position[i] - position[i]
    turn = rotation_error(target_rotation[i], rotation[i])
    for j in range(7):
        z = axes[i, j]
        v = wp.cross(z, position[i] - origins[i, j])
        n = POSTURE_GAIN * (rest[j] - qpos[i, first + j])
        upper += wp.outer(v, v)
        mixed += wp.outer(v, z)
        lower += wp.outer(z, z)
        move -= v * n
        turn -= z * n
    # Solve the symmetric 6 x 6 system by its Schur complement.
    inverse = wp.mat33(wp.inverse(upper))
    across = wp.transpose(mixed) @ inverse
    schur = wp.mat33(wp.inverse(lower - across @ mixed))
    b = schur @ (turn - across @ move)
    a = inverse @ (move - mixed @ b)
    for j in range(7):
        z = axes[i, j]
        v = wp.cross(z, position[i] - origins[i, j])
        q = qpos[i, first + j]
        step = wp.dot(v, a) + wp.dot(z, b) + POSTURE_GAIN * (rest[j] - q)
        ctrl[i, j] = wp.clamp(q + wp.clamp(step, -MAX_JOINT_STEP, MAX_JOINT_STEP), low[j], high[j])


@wp.func
def rotation_error(target: wp.mat33, actual: wp.mat33) -> wp.vec3:
    """Rotation vector in the world that turns `actual` into `target`, to first order: 1/2 sum_k a_k x t_k."""
    error = wp.vec3()
    for k in range(3):
        t = wp.vec3(target[0, k], target[1, k], target[2, k])
        a = wp.vec3(actual[0, k], actual[1, k], actual[2, k])
        error += wp.vec3(wp.cross(a, t))
    return error / 2.0


def _frame(position: np.ndarray, quaternion: np.ndarray) -> np.ndarray:
    """[4, 4] float64 of a position and a unit quaternion (w x y z)."""
    frame, matrix = np.eye(4), np.zeros(9)
    mujoco.mju_quat2Mat(matrix, quaternion)
    frame[:3, :3], frame[:3, 3] = matrix.reshape(3, 3), position
    return frame
