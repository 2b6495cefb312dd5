"""From actions to joint targets: the wanted TCP pose of every copy, moved by each action and held within limits."""

from __future__ import annotations

import torch
from torch import Tensor

from embodied_rl.envs.tabletop.kinematics import ArmKinematics, Pose, turned
from embodied_rl.envs.tabletop.scene import FINGER_MAX
from embodied_rl.types import State

MAX_MOVE = 0.02
"""m the wanted position moves per control step for an action of 1 on each axis (0.4 m/s); small enough that a policy's
exploration noise does not shake objects out of reach of its fingers."""
MAX_TURN = 0.05
"""rad the wanted rotation turns per control step about each world axis (1 rad/s)."""
WORKSPACE = ((-0.20, 0.20), (-0.38, 0.28), (0.008, 0.35))
"""Ranges of x, y, z of the wanted TCP, m."""
SIN_TILT = 0.34
"""Sine of the largest tilt of the gripper from straight down, about each horizontal axis (20 degrees)."""
MAX_YAW = 1.75
"""Largest turn of the gripper about the vertical from its rest pose, rad."""
LEASH = 0.06
"""Farthest the wanted position may be ahead of the real one on each axis, m: pushing on a wall stores no more."""
YAW_LEASH = 0.4
"""The same for the rotation about the vertical, rad."""
MAX_JOINT_STEP = 0.3
"""Farthest a joint target may be ahead of the joint, rad."""
FINGER_CLOSED = -0.01
"""Finger target of a fully closed command, m; below 0 so that it still presses on thin objects."""


class PoseController:
    """Wanted TCP pose and finger target of B copies, and the joint targets that follow them.

    The action convention is the field's: 7 numbers in [-1, 1]: displacement along the world axes, rotation about the
    world axes (axis-angle), gripper (1 open, -1 closed).
    """

    def __init__(self, kinematics: ArmKinematics, num_envs: int, device: torch.device) -> None:
        """Start with every copy at the origin; `hold` sets the real pose."""
        self._kinematics = kinematics
        self.position = torch.zeros(num_envs, 3, device=device)
        """[B, 3] wanted TCP position, m."""
        self.rotation = torch.eye(3, device=device).repeat(num_envs, 1, 1)
        """[B, 3, 3] wanted TCP frame."""
        self.finger = torch.full((num_envs,), FINGER_MAX, device=device)
        """[B] target of each finger joint, m."""
        self._low, self._high = torch.tensor(WORKSPACE, device=device).unbind(1)
        half_stroke = 0.5 * (FINGER_MAX - FINGER_CLOSED)
        self._scale = torch.tensor([MAX_MOVE] * 3 + [MAX_TURN] * 3 + [half_stroke], device=device)
        self._lean = torch.tensor([1.0, -1.0], device=device)

    def hold(self, mask: Tensor, pose: Pose) -> None:
        """Want the present pose with an open gripper in the masked copies."""
        self.position[mask] = pose[0][mask]
        self.rotation[mask] = pose[1][mask]
        self.finger[mask] = FINGER_MAX

    def advance(self, action: Tensor, joints: Tensor, pose: Pose) -> Tensor:
        """Move the wanted pose by an action and solve for joint targets.

        Args:
            action: [B, 7] in [-1, 1].
            joints: [B, 7] rad, where the arm is.
            pose: Its forward kinematics.

        Returns:
            ctrl: [B, 9] joint and finger targets.
        """
        position, rotation, _ = pose
        change = action * self._scale
        wanted = self.position + change[:, :3]
        wanted = torch.clamp(wanted, position - LEASH, position + LEASH)
        self.position = torch.clamp(wanted, self._low, self._high)
        self.rotation = turned(self.rotation, self._turn(change[:, 3:6], rotation))
        self.finger = change[:, 6] + 0.5 * (FINGER_MAX + FINGER_CLOSED)
        target = self._kinematics.solve(joints, pose, self.position, self.rotation, MAX_JOINT_STEP)
        return torch.cat([target, self.finger[:, None].expand(-1, 2)], dim=1)

    def _turn(self, turn: Tensor, rotation: Tensor) -> Tensor:
        """Cut a rotation vector [B, 3] so that the wanted frame keeps within tilt and yaw limits."""
        # The tool's z axis leans from straight down about the horizontal axis (z_y, -z_x), by the sine of the tilt.
        tilt = self.rotation[:, :2, 2].flip(1) * self._lean
        tilted = (tilt + turn[:, :2]).clamp(-SIN_TILT, SIN_TILT)
        wanted = torch.atan2(self.rotation[:, 1, 0], self.rotation[:, 0, 0])
        actual = torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0])
        yaw = torch.clamp(wanted + turn[:, 2], actual - YAW_LEASH, actual + YAW_LEASH).clamp(-MAX_YAW, MAX_YAW)
        return torch.cat([tilted - tilt, (yaw - wanted)[:, None]], dim=1)

    def get_state(self) -> State:
        """Wanted pose and finger target."""
        return {"position": self.position.clone(), "rotation": self.rotation.clone(), "finger": self.finger.clone()}

    def set_state(self, state: State) -> None:
        """Restore `get_state`'s result."""
        self.position = state["position"].to(self.position.device).clone()
        self.rotation = state["rotation"].to(self.rotation.device).clone()
        self.finger = state["finger"].to(self.finger.device).clone()
