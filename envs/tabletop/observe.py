"""From the state vectors to what a policy sees and what success and reward are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import warp as wp
from torch import Tensor

from embodied_rl.envs._words import word_row
from embodied_rl.envs.tabletop.control import FINGER_CLOSED, LEASH, YAW_LEASH, PoseController
from embodied_rl.envs.tabletop.instructions import COLORS, MAX_WORDS, vocabulary
from embodied_rl.envs.tabletop.kinematics import ArmKinematics, rotation_error
from embodied_rl.envs.tabletop.scene import (
    CABINET_FRONT,
    DRAWER_MAX,
    FINGER_MAX,
    HALF_SIZE,
    HANDLE_OFFSET,
    HOME,
    SHAPES,
    Scene,
)
from embodied_rl.envs.tabletop.tasks import View
from embodied_rl.envs.tabletop.warp_runtime import Launch
from embodied_rl.types import Obs, TensorSpec

PLACE, OFFSET, SPEED, SIZE = 5.0, 10.0, 2.0, 30.0
"""Scales to order one of positions (1/m), positions relative to the TCP (1/m), speeds (s/m), half extents (1/m)."""
NUM_SLOTS = len(SHAPES)
HANDLE_CLOSED = wp.constant(wp.vec3(*(CABINET_FRONT + HANDLE_OFFSET)))
"""Middle of the closed drawer's handle, m; opening moves it along -x."""
GRIP = wp.constant(wp.vec3(0.022, 0.012, 0.024))
"""Half extents, in the TCP's frame, of where an object's centre must be for closing fingers to grasp it, m."""
wp.set_module_options({"enable_backward": False})

OBSERVATION: dict[str, TensorSpec] = {
    "proprio": TensorSpec(
        (31,),
        meaning="joint angles from rest (rad) 7, joint velocities (rad/s) 7, TCP position (5/m) 3, TCP x and y axes 6, "
        "gripper opening -1..1, finger target -1..1, wanted minus real TCP position 3 and rotation 3 (of their limits)",
    ),
    "objects": TensorSpec(
        (NUM_SLOTS, 18),
        meaning="per object: position (x5/m) 3, relative to the TCP (x10/m) 3, x and y axes 6, velocity (x2 s/m) 3, "
        "marked goal relative to it (x10/m) 3 (0 without a marked goal)",
    ),
    "looks": TensorSpec(
        (NUM_SLOTS, 12),
        constant=True,
        meaning="what each object is: colour one-hot 6, shape one-hot 3, half extents (x30/m) 3",
    ),
    "goal": TensorSpec(
        (11,),
        meaning="marked goal position (5/m) 3, relative to the TCP (10/m) 3 (both 0 without a marked goal), 1 if there "
        "is one, drawer opening 0..1, handle relative to the TCP (5/m) 3",
    ),
    "instruction": word_row(MAX_WORDS, vocabulary()),
}


@dataclass
class Episode:
    """What stays fixed within an episode, for B copies."""

    task: Tensor
    """[B] int64 index into the env's tasks."""
    seed: Tensor
    """[B] int64 start seed."""
    a: Tensor
    """[B] int64 slot of the object meant."""
    b: Tensor
    """[B] int64 slot of the second object."""
    relation: Tensor
    """[B] int64 index into the task's wordings."""
    goal: Tensor
    """[B, 3] marked goal, m; below the table where there is none."""
    colors: Tensor
    """[B, M] int64 index into COLORS."""
    b_start: Tensor
    """[B, 2] where b started, m."""
    words: Tensor
    """[B, L] int64"""

    @staticmethod
    def empty(num_envs: int, device: torch.device) -> Episode:
        """Rows of zeros, to be filled by a reset."""

        def whole(*shape: int) -> Tensor:
            return torch.zeros(num_envs, *shape, dtype=torch.int64, device=device)

        def real(*shape: int) -> Tensor:
            return torch.zeros(num_envs, *shape, device=device)

        return Episode(
            task=whole(), seed=whole(), a=whole(), b=whole(), relation=whole(), goal=real(3),
            colors=whole(NUM_SLOTS), b_start=real(2), words=whole(MAX_WORDS),
        )  # fmt: skip


class Observer:
    """Reads positions and velocities [B, nq], [B, nv] of one scene, and the pose of its arm.

    `begin` must follow every change of the episodes: it precomputes what stays fixed until the next one.
    """

    def __init__(
        self, scene: Scene, qpos: Tensor, qvel: Tensor, arm: ArmKinematics, control: PoseController, episode: Episode
    ) -> None:
        """Bind the tensors it reads, whose values may change, and those it writes."""
        self._scene, self._episode = scene, episode
        n, device = len(qpos), qpos.device
        first, velocity = scene.objects_qpos[0], scene.objects_qvel[0]
        assert scene.objects_qpos == tuple(first + 7 * i for i in range(NUM_SLOTS))
        assert scene.objects_qvel == tuple(velocity + 6 * i for i in range(NUM_SLOTS))
        self._poses = qpos[:, first : first + 7 * NUM_SLOTS].unflatten(1, (NUM_SLOTS, 7))

        def real(*shape: int) -> Tensor:
            return torch.zeros(n, *shape, device=device)

        def flag() -> Tensor:
            return torch.zeros(n, dtype=torch.bool, device=device)

        half = torch.from_numpy(HALF_SIZE).float().to(device)
        self._view = {
            "between": flag(), "held": flag(), "gripper_open": flag(), "aperture": real(), "a_position": real(3),
            "a_half_height": real(), "a_speed": real(), "b_position": real(3), "b_half_height": real(),
            "relation_on": flag(), "handle": real(3), "drawer": real(),
        }  # fmt: skip
        state = (qpos, qvel, arm.position, arm.rotation, control.finger)
        self._look = Launch(
            look, n, device, *state, episode.a, episode.b, episode.relation, half,
            first, velocity, scene.fingers_qpos.start, scene.fingers_qvel.start, scene.drawer_qpos,
            *self._view.values(),
        )  # fmt: skip
        self._view |= {"tcp": arm.position, "b_start": episode.b_start, "goal": episode.goal}
        self._sensed = {"proprio": real(31), "objects": real(NUM_SLOTS, 18), "goal": real(11)}
        rest = torch.from_numpy(HOME).float().to(device)
        joints = (scene.arm_qpos.start, scene.arm_qvel.start)
        self._describe = Launch(
            describe, n, device, *state, control.position, control.rotation, episode.goal, rest,
            first, velocity, *joints, scene.fingers_qpos.start, scene.drawer_qpos, *self._sensed.values(),
        )  # fmt: skip
        self._shapes, self._palette = torch.eye(NUM_SLOTS, device=device), torch.eye(len(COLORS), device=device)
        self._half = half
        self.begin()

    def begin(self) -> None:
        """Take over what is fixed in the running episodes."""
        fixed = torch.cat([self._shapes, SIZE * self._half], dim=1).expand(len(self._episode.colors), -1, -1)
        self._looks = torch.cat([self._palette[self._episode.colors], fixed], dim=2)
        self._words = self._episode.words.clone()

    def object_poses(self) -> Tensor:
        """[B, M, 7] position (m) and quaternion (w x y z) of every object; valid until the next step."""
        return self._poses

    def view(self) -> View:
        """What success and reward are computed from; its tensors are valid until the next call."""
        self._look()
        return View(**self._view)

    def observation(self) -> Obs:
        """What a policy sees; which object is meant is in the instruction only."""
        self._describe()
        seen = {name: value.clone() for name, value in self._sensed.items()}
        return {**seen, "looks": self._looks, "instruction": self._words}


@wp.kernel
def look(
    qpos: wp.array2d[float],
    qvel: wp.array2d[float],
    tcp: wp.array[wp.vec3],
    rotation: wp.array[wp.mat33],
    finger: wp.array[float],
    a: wp.array[wp.int64],
    b: wp.array[wp.int64],
    relation: wp.array[wp.int64],
    half_size: wp.array2d[float],
    object_at: int,
    velocity_at: int,
    finger_at: int,
    finger_velocity_at: int,
    drawer_at: int,
    between: wp.array[wp.bool],
    held: wp.array[wp.bool],
    gripper_open: wp.array[wp.bool],
    aperture: wp.array[float],
    a_position: wp.array[wp.vec3],
    a_half_height: wp.array[float],
    a_speed: wp.array[float],
    b_position: wp.array[wp.vec3],
    b_half_height: wp.array[float],
    relation_on: wp.array[wp.bool],
    handle: wp.array[wp.vec3],
    drawer: wp.array[float],
) -> None:
    """The fields of `View`.

    An object counts as held when its centre is between the pads, the fingers are commanded clearly narrower than
    they are, and they do not move: only something between them can hold them there.
    """
    i = wp.tid()
    mine, other = int(a[i]), int(b[i])
    place = vector(qpos, i, object_at + 7 * mine)
    # In the frame of the TCP.
    inside = wp.transpose(rotation[i]) @ (place - tcp[i])
    grasped = wp.abs(inside[0]) < GRIP[0] and wp.abs(inside[1]) < GRIP[1] and wp.abs(inside[2]) < GRIP[2]
    opening = 0.5 * (qpos[i, finger_at] + qpos[i, finger_at + 1])
    speed = wp.max(wp.abs(qvel[i, finger_velocity_at]), wp.abs(qvel[i, finger_velocity_at + 1]))
    pressing = opening - finger[i] > 0.002 and opening > 0.012 and speed < 0.03
    between[i] = grasped
    held[i] = pressing and grasped
    gripper_open[i] = finger[i] > 0.025 and opening > 0.02
    aperture[i] = (finger[i] - FINGER_CLOSED) / (FINGER_MAX - FINGER_CLOSED)
    a_position[i] = place
    a_half_height[i] = half_size[mine, 2]
    a_speed[i] = wp.length(vector(qvel, i, velocity_at + 6 * mine))
    b_position[i] = vector(qpos, i, object_at + 7 * other)
    b_half_height[i] = half_size[other, 2]
    relation_on[i] = int(relation[i]) == 0
    opened = qpos[i, drawer_at]
    handle[i] = HANDLE_CLOSED - wp.vec3(opened, 0.0, 0.0)
    drawer[i] = opened


@wp.kernel
def describe(
    qpos: wp.array2d[float],
    qvel: wp.array2d[float],
    tcp: wp.array[wp.vec3],
    rotation: wp.array[wp.mat33],
    finger: wp.array[float],
    wanted_position: wp.array[wp.vec3],
    wanted_rotation: wp.array[wp.mat33],
    marked: wp.array[wp.vec3],
    rest: wp.array[float],
    object_at: int,
    velocity_at: int,
    joint_at: int,
    joint_velocity_at: int,
    finger_at: int,
    drawer_at: int,
    proprio: wp.array2d[float],
    objects: wp.array3d[float],
    goal: wp.array2d[float],
) -> None:
    """The parts of OBSERVATION that change from step to step, in its order."""
    i = wp.tid()
    p, r = tcp[i], rotation[i]
    for j in range(7):
        proprio[i, j] = qpos[i, joint_at + j] - rest[j]
        proprio[i, 7 + j] = qvel[i, joint_velocity_at + j]
    ahead = (wanted_position[i] - p) / LEASH
    turned = rotation_error(wanted_rotation[i], r) / YAW_LEASH
    for k in range(3):
        proprio[i, 14 + k] = PLACE * p[k]
        proprio[i, 17 + 2 * k] = r[k, 0]
        proprio[i, 18 + 2 * k] = r[k, 1]
        proprio[i, 25 + k] = ahead[k]
        proprio[i, 28 + k] = turned[k]
    half_open = 0.5 * FINGER_MAX
    opening = 0.5 * (qpos[i, finger_at] + qpos[i, finger_at + 1])
    proprio[i, 23] = opening / half_open - 1.0
    proprio[i, 24] = finger[i] / half_open - 1.0
    there = wp.where(marked[i][2] > -0.5, 1.0, 0.0)
    for m in range(wp.static(NUM_SLOTS)):
        at = object_at + 7 * m
        place = vector(qpos, i, at)
        # Warp's quaternions end with w, MuJoCo's begin with it.
        turn = wp.quat(qpos[i, at + 4], qpos[i, at + 5], qpos[i, at + 6], qpos[i, at + 3])
        x_axis = wp.vec3(wp.quat_rotate(turn, wp.vec3(1.0, 0.0, 0.0)))
        y_axis = wp.vec3(wp.quat_rotate(turn, wp.vec3(0.0, 1.0, 0.0)))
        for k in range(3):
            objects[i, m, k] = PLACE * place[k]
            objects[i, m, 3 + k] = OFFSET * (place[k] - p[k])
            objects[i, m, 6 + 2 * k] = x_axis[k]
            objects[i, m, 7 + 2 * k] = y_axis[k]
            objects[i, m, 12 + k] = SPEED * qvel[i, velocity_at + 6 * m + k]
            objects[i, m, 15 + k] = there * OFFSET * (marked[i][k] - place[k])
    drawer = qpos[i, drawer_at]
    handle = HANDLE_CLOSED - wp.vec3(drawer, 0.0, 0.0) - p
    for k in range(3):
        goal[i, k] = there * PLACE * marked[i][k]
        goal[i, 3 + k] = there * OFFSET * (marked[i][k] - p[k])
        goal[i, 8 + k] = PLACE * handle[k]
    goal[i, 6] = there
    goal[i, 7] = drawer / DRAWER_MAX


@wp.func
def vector(rows: wp.array2d[float], i: int, at: int) -> wp.vec3:
    """Three neighbours of row i, from column `at`."""
    return wp.vec3(rows[i, at], rows[i, at + 1], rows[i, at + 2])
