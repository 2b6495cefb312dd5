"""From actions to joint targets: the wanted TCP pose of every copy, moved by each action and held within limits."""

from __future__ import annotations

import torch
import warp as wp
from torch import Tensor

from embodied_rl.convention import Convention
from embodied_rl.envs.tabletop.kinematics import ArmKinematics
from embodied_rl.envs.tabletop.scene import FINGER_MAX
from embodied_rl.envs.tabletop.warp_runtime import Launch
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
FINGER_CLOSED = -0.01
"""Finger target of a fully closed command, m; below 0 so that it still presses on thin objects."""

CONVENTION = Convention(
    control="ee_delta", frame="base", rotation="axis_angle", gripper="opens_at_plus", metres=MAX_MOVE, radians=MAX_TURN
)
"""Of the action."""

_LOW, _HIGH = (wp.constant(wp.vec3(*bound)) for bound in zip(*WORKSPACE, strict=True))
wp.set_module_options({"enable_backward": False})


class PoseController:
    """Wanted TCP pose and finger target of B copies, and the joint targets that follow them.

    The action convention is the field's: 7 numbers in [-1, 1]: displacement along the world axes, rotation about the
    world axes (axis-angle), gripper (1 open, -1 closed).
    """

    def __init__(self, arm: ArmKinematics) -> None:
        """Start with every copy at the origin; `hold` sets the real pose."""
        self._arm = arm
        n, device = len(arm.position), arm.position.device
        self.position = arm.target_position
        """[B, 3] wanted TCP position, m."""
        self.rotation = arm.target_rotation
        """[B, 3, 3] wanted TCP frame."""
        self.finger = torch.full((n,), FINGER_MAX, device=device)
        """[B] target of each finger joint, m."""
        self._action = torch.zeros(n, 7, device=device)
        self._active = torch.ones(n, dtype=torch.bool, device=device)
        changed = (self.position, self.rotation, self.finger, arm.ctrl)
        self._steer = Launch(steer, n, device, self._active, self._action, arm.position, arm.rotation, *changed)

    def hold(self, mask: Tensor) -> None:
        """Want the present pose with an open gripper in the masked copies."""
        self.position[mask] = self._arm.position[mask]
        self.rotation[mask] = self._arm.rotation[mask]
        self.finger[mask] = FINGER_MAX

    def advance(self, action: Tensor, active: Tensor | None = None) -> Tensor:
        """Move the wanted pose by an action and solve for joint targets.

        Args:
            action: [B, 7] in [-1, 1].
            active: [B] bool, copies to move; what the others want stays. None for all.

        Returns:
            ctrl: [B, 9] joint and finger targets; valid until the next call.
        """
        self._action.copy_(action)
        self._active.fill_(True) if active is None else self._active.copy_(active)
        self._steer()
        self._arm.solve()
        return self._arm.ctrl

    def get_state(self) -> State:
        """Wanted pose and finger target."""
        return {"position": self.position.clone(), "rotation": self.rotation.clone(), "finger": self.finger.clone()}

    def set_state(self, state: State) -> None:
        """Restore `get_state`'s result."""
        self.position.copy_(state["position"])
        self.rotation.copy_(state["rotation"])
        self.finger.copy_(state["finger"])


@wp.kernel
def steer(
    active: wp.array[wp.bool],
    action: wp.array2d[float],
    position: wp.array[wp.vec3],
    rotation: wp.array[wp.mat33],
    wanted_position: wp.array[wp.vec3],
    wanted_rotation: wp.array[wp.mat33],
    finger: wp.array[float],
    ctrl: wp.array2d[float],
) -> None:
    """Move what is wanted by the action, on its leash and within the workspace, tilt and yaw limits."""
    i = wp.tid()
    if not active[i]:
        return
    leash = wp.vec3(LEASH, LEASH, LEASH)
    wanted = wanted_position[i] + MAX_MOVE * wp.vec3(action[i, 0], action[i, 1], action[i, 2])
    wanted = wp.min(wp.max(wanted, position[i] - leash), position[i] + leash)
    wanted_position[i] = wp.min(wp.max(wanted, _LOW), _HIGH)
    # The tool's z axis leans from straight down about the horizontal axis (z_y, -z_x), by the sine of the tilt.
    frame = wanted_rotation[i]
    x = within(frame[1, 2] + MAX_TURN * action[i, 3], SIN_TILT) - frame[1, 2]
    y = within(-frame[0, 2] + MAX_TURN * action[i, 4], SIN_TILT) + frame[0, 2]
    yaw, actual = wp.atan2(frame[1, 0], frame[0, 0]), wp.atan2(rotation[i][1, 0], rotation[i][0, 0])
    z = within(actual + within(yaw + MAX_TURN * action[i, 5] - actual, YAW_LEASH), MAX_YAW) - yaw
    turn = wp.vec3(x, y, z)
    wanted_rotation[i] = wp.quat_to_matrix(wp.quat_from_axis_angle(wp.normalize(turn), wp.length(turn))) @ frame
    target = FINGER_CLOSED + 0.5 * (action[i, 6] + 1.0) * (FINGER_MAX - FINGER_CLOSED)
    finger[i] = target
    ctrl[i, 7] = target
    ctrl[i, 8] = target


@wp.func
def within(value: float, limit: float) -> float:
    """The value, cut to [-limit, limit]."""
    return wp.clamp(value, -limit, limit)
