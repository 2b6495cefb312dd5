"""A scripted expert that solves every task of the tabletop: the source of demonstrations.

Each task is a row of waypoints; a copy goes on to its next waypoint once the TCP is close enough to the present one
and has waited there long enough. All copies run at once, each with its own task and waypoint.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from embodied_rl.envs.tabletop.control import MAX_MOVE, MAX_TURN
from embodied_rl.envs.tabletop.env import TabletopEnv
from embodied_rl.envs.tabletop.tasks import View

HOVER, CARRY = 0.10, 0.14
"""m above an object from where it is approached, and height of the TCP while it is carried."""
GRASP_ABOVE, SLIDE_ABOVE = 0.006, 0.010
"""m above an object's centre where it is grasped to be pushed, and from its rest while it slides: a hand that imitates
this is some millimetres off, and fingertips that touch the table do not slide."""
BESIDE = 0.068
"""m between the centres of two objects placed side by side."""
LOST = 0.05
"""m between TCP and grasped object from which it counts as dropped."""
PULL = 0.04
"""m the wanted position is ahead while the handle is moved."""

NEVER = -1.0
"""Distance of a last waypoint, which is not left."""
FAMILY = {"reach": 0, "push": 1, "lift": 2, "place": 2, "stack": 2, "open": 3, "close": 4}
"""Row of the plan each task follows."""
LIFTING = 3
"""Waypoint of those that grasp at which they move on with the object."""
# Per waypoint: distance in m at which it is reached, control steps to stay at least, gripper, largest action.
_PLAN: tuple[tuple[tuple[float, int, float, float], ...], ...] = (
    ((0.015, 0, 1, 1), (NEVER, 0, 1, 1)),
    ((0.015, 0, 1, 1), (0.008, 0, 1, 1), (9, 4, -1, 1), (NEVER, 0, -1, 0.7)),
    (
        (0.015, 0, 1, 1), (0.008, 0, 1, 1), (9, 4, -1, 1), (0.020, 0, -1, 1),
        (0.008, 0, -1, 0.7), (0.006, 0, -1, 0.4), (9, 3, 1, 1), (NEVER, 0, 1, 1),
    ),
    ((0.012, 0, -1, 1), (0.008, 0, -1, 1), (NEVER, 0, -1, 1)),
    ((0.015, 0, -1, 1), (0.010, 0, -1, 1), (NEVER, 0, -1, 1)),
)  # fmt: skip
_LENGTH = max(len(row) for row in _PLAN)
_RELEASE = 6
"""Waypoint at which a carried object is let go."""


class Expert:
    """Scripted policy for all copies of a tabletop env.

    Waypoints per task:
        reach: above the object, the middle of its upper side.
        push: as lift, but the closed fingers slide the object over the table. Pushed from behind it slips off a
            finger 2 cm wide as soon as the hand is half a finger beside the line to the goal.
        lift: above the object, down with the gripper turned to its sides, close, up.
        place and stack: as lift, then over the place, down, open, up. "Beside" takes the side of B with the most
            room. A dropped object is picked up again. These need 80 steps.
        open: with closed fingers above and down behind the handle, then towards the robot.
        close: with closed fingers above and down before the handle, then away from the robot.

    Example:
        expert = Expert(env)
        env.reset(mask, seeds, tasks); expert.reset(mask); step = env.step(expert.act())
    """

    disturbed = (True, True, True, False, False, False, False)
    """The hand may be pushed aside; its turn and its fingers are left alone."""

    def __init__(self, env: TabletopEnv) -> None:
        """Watch an env, which is read in `act` and never stepped here; call `reset` after each reset of it."""
        device = env.physics.device
        self._env, self._device = env, device
        self._family_of = torch.tensor([FAMILY[name] for name in env.spec.tasks], device=device)
        self._lift = torch.tensor([name == "lift" for name in env.spec.tasks], device=device)
        self._stack = torch.tensor([name == "stack" for name in env.spec.tasks], device=device)
        padded = [row + (row[-1],) * (_LENGTH - len(row)) for row in _PLAN]
        self._plan = torch.tensor(padded, dtype=torch.float32, device=device)
        self._rows = torch.arange(env.spec.num_envs, device=device)
        self._phase = torch.zeros_like(self._rows)
        self._waited = torch.zeros_like(self._rows)
        self._beside = torch.zeros(len(self._rows), 2, device=device)

    def reset(self, mask: Tensor) -> None:
        """Begin with the first waypoint in the masked copies [B]; the env must have been reset before."""
        mask = mask.to(self._device)
        self._phase[mask] = 0
        self._waited[mask] = 0
        self._beside = torch.where(mask[:, None], self._roomiest(), self._beside)

    def act(self) -> Tensor:
        """Actions for the state the env is in; moves on to the next waypoints.

        Returns:
            action: [B, 7] float32 in [-1, 1], on the env's device.
        """
        env, view = self._env, self._look()
        family = self._family_of[env.episode.task]
        self._start_over(family, view)
        points = self._waypoints(view)
        target = points[self._rows, family, self._phase]
        self._advance(family, torch.linalg.vector_norm(view.tcp - target, dim=1))
        target = points[self._rows, family, self._phase]
        plan = self._plan[family, self._phase]
        limit = plan[:, 3:]
        move = ((target - env.controller.position) / MAX_MOVE).clamp(-limit, limit)
        action = torch.zeros(len(move), 7, device=self._device)
        action[:, :3] = move
        action[:, 5] = self._turn(family)
        action[:, 6] = plan[:, 2]
        return action.clamp(-1, 1).to(env.device)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _look(self) -> View:
        """What it takes for the state."""
        return self._env.view()

    def _advance(self, family: Tensor, distance: Tensor) -> None:
        """Go on to the next waypoint where the present one is reached."""
        self._waited += 1
        plan = self._plan[family, self._phase]
        last = self._lift[self._env.episode.task] & (self._phase == LIFTING)
        reached = (distance < plan[:, 0]) & (self._waited > plan[:, 1]) & ~last
        self._phase = (self._phase + reached).clamp_max(_LENGTH - 1)
        self._waited[reached] = 0

    def _start_over(self, family: Tensor, view: View) -> None:
        """Begin again where the grasped object was dropped; go on where it is held already."""
        grasping = grasps(family)
        dropped = grasping & (self._phase >= LIFTING) & (self._phase < _RELEASE) & (view.tcp_to_a > LOST)
        caught = grasping & (self._phase < LIFTING - 1) & view.held
        self._phase[dropped] = 0
        self._phase[caught] = LIFTING
        self._waited[dropped | caught] = 0

    def _waypoints(self, view: View) -> Tensor:
        """[B, families, waypoints, 3] of all copies in all families, m."""
        rows = [self._reach(view), self._push(view), self._carry(view), *_drawer(view)]
        return torch.stack([torch.stack(row + row[-1:] * (_LENGTH - len(row)), dim=1) for row in rows], dim=1)

    def _reach(self, view: View) -> list[Tensor]:
        return [_raised(view.a_top, 0.06), view.a_top]

    def _push(self, view: View) -> list[Tensor]:
        # The object lies in the fingers as it was grasped: what goes to the goal is the object, not the TCP.
        there = (view.goal + view.tcp - view.a_position)[:, :2]
        high = _raised(view.a_position, GRASP_ABOVE)
        return [_raised(view.a_position, HOVER), high, high, _at(there, view.a_half_height + SLIDE_ABOVE)]

    def _carry(self, view: View) -> list[Tensor]:
        on = (view.relation_on | self._stack[self._env.episode.task])[:, None]
        place = view.b_position[:, :2] + torch.where(on, torch.zeros_like(self._beside), self._beside)
        height = torch.where(on[:, 0], view.b_position[:, 2] + view.b_half_height, 0.0) + view.a_half_height + 0.003
        # The object hangs in the fingers as it was grasped: what goes to the place is the object, not the TCP.
        down = _at(place, height) + view.tcp - view.a_position
        up = _at(view.tcp[:, :2], CARRY)
        object_ = view.a_position
        over = _at(down[:, :2], CARRY)
        return [_raised(object_, HOVER), object_, object_, up, over, down, view.tcp, _raised(view.tcp, 0.06)]

    def _turn(self, family: Tensor) -> Tensor:
        """[B] rotation about the vertical that aligns the fingers with the sides of the object to grasp."""
        env = self._env
        quaternion = env.object_poses()[self._rows, env.episode.a, 3:].float()
        yaw = 2 * torch.atan2(quaternion[:, 3], quaternion[:, 0])
        rotation = env.controller.rotation
        # Half a turn is no difference to any of the objects.
        turn = torch.remainder(yaw - torch.atan2(rotation[:, 1, 0], rotation[:, 0, 0]) + math.pi / 2, math.pi)
        needed = grasps(family) & (self._phase < 2) & (env.episode.a != 1)
        return torch.where(needed, (turn - math.pi / 2) / MAX_TURN, 0.0)

    def _roomiest(self) -> Tensor:
        """[B, 2] offset from B to the side with the most room, m."""
        env, view = self._env, self._env.view()
        third = (3 - env.episode.a - env.episode.b).clamp(0, 2)
        other = env.object_poses()[self._rows, third, :2].float()
        sides = BESIDE * torch.tensor([[1.0, 0.0], [-1.0, 0.0], [0.0, 1.0], [0.0, -1.0]], device=self._device)
        spots = view.b_position[:, None, :2].float() + sides
        room = torch.linalg.vector_norm(spots - other[:, None], dim=2)
        outside = (spots[:, :, 1] < -0.12) | (spots[:, :, 0].abs() > 0.17)
        return sides[(room - 10.0 * outside).argmax(dim=1)]


def grasps(family: Tensor) -> Tensor:
    """[B] bool, copies whose task begins with a grasp."""
    return (family == FAMILY["push"]) | (family == FAMILY["lift"])


def _drawer(view: View) -> tuple[list[Tensor], list[Tensor]]:
    """Waypoints of open and close."""
    shift = view.handle.new_tensor
    inside = view.handle + shift([0.026, 0.0, -0.008])
    before = view.handle + shift([-0.045, 0.0, 0.0])
    pull, push = view.tcp + shift([-PULL, 0.0, 0.0]), view.tcp + shift([PULL, 0.0, 0.0])
    return [_raised(inside, HOVER), inside, pull], [_raised(before, 0.08), before, push]


def _at(place: Tensor, height: Tensor | float) -> Tensor:
    """Points [B, 3] over places [B, 2]."""
    z = torch.as_tensor(height, dtype=place.dtype, device=place.device).expand(len(place))
    return torch.cat([place, z[:, None]], dim=1)


def _raised(point: Tensor, height: float) -> Tensor:
    """Points [B, 3] raised by a height in m."""
    return point + point.new_tensor([0.0, 0.0, height])
