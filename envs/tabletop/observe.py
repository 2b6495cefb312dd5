"""From the state vectors to what a policy sees and what success and reward are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embodied_rl.envs.tabletop.control import FINGER_CLOSED, LEASH, YAW_LEASH, PoseController
from embodied_rl.envs.tabletop.instructions import COLORS, MAX_WORDS, WORD_IDS
from embodied_rl.envs.tabletop.kinematics import Pose, rotation_error, rotation_from_quaternion
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
from embodied_rl.types import Obs, TensorSpec

PLACE, OFFSET, SPEED, SIZE = 5.0, 10.0, 2.0, 30.0
"""Scales to order one of positions (1/m), positions relative to the TCP (1/m), speeds (s/m), half extents (1/m)."""
NUM_SLOTS = len(SHAPES)

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
    "instruction": TensorSpec(
        (MAX_WORDS,),
        torch.int64,
        low=0,
        high=WORD_IDS - 1,
        constant=True,
        meaning="word ids of the instruction, 0 pads",
    ),
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
    """Reads positions and velocities [B, nq], [B, nv] of one scene.

    `begin` must follow every change of the episodes: it precomputes what stays fixed until the next one.
    """

    def __init__(self, scene: Scene, device: torch.device) -> None:
        """Precompute indices and constants."""
        self._scene = scene
        first, velocity = scene.objects_qpos[0], scene.objects_qvel[0]
        assert scene.objects_qpos == tuple(first + 7 * i for i in range(NUM_SLOTS))
        assert scene.objects_qvel == tuple(velocity + 6 * i for i in range(NUM_SLOTS))
        self._poses = slice(first, first + 7 * NUM_SLOTS)
        self._velocities = slice(velocity, velocity + 6 * NUM_SLOTS)
        self._half = torch.from_numpy(HALF_SIZE).float().to(device)
        self._handle_closed = torch.from_numpy(CABINET_FRONT + HANDLE_OFFSET).float().to(device)
        self._forward = torch.tensor([1.0, 0.0, 0.0], device=device)
        self._grip = torch.tensor([0.022, 0.012, 0.024], device=device)
        self._seven, self._three = torch.arange(7, device=device), torch.arange(3, device=device)
        self._shapes, self._palette = torch.eye(NUM_SLOTS, device=device), torch.eye(len(COLORS), device=device)
        half_open = 0.5 * FINGER_MAX
        self._proprio_rest = torch.tensor([*HOME, *[0.0] * 16, half_open, half_open, *[0.0] * 6]).float().to(device)
        scale = [1.0] * 14 + [PLACE] * 3 + [1.0] * 6 + [1 / half_open] * 2 + [1 / LEASH] * 3 + [1 / YAW_LEASH] * 3
        self._proprio_scale = torch.tensor(scale, device=device)
        scale = [PLACE] * 3 + [OFFSET] * 3 + [1.0] * 6 + [SPEED] * 3 + [OFFSET] * 3
        self._objects_scale = torch.tensor(scale, device=device)
        scale = [PLACE] * 3 + [OFFSET] * 3 + [1.0, 1 / DRAWER_MAX] + [PLACE] * 3
        self._goal_scale = torch.tensor(scale, device=device)
        # The first two columns of a rotation matrix are linear in the products of the quaternion's entries.
        self._axes = _axes_of_products().to(device)

    def begin(self, episode: Episode) -> None:
        """Take over what is fixed in the running episodes."""
        a, b = episode.a[:, None], episode.b[:, None]
        first, velocity = self._scene.objects_qpos[0], self._scene.objects_qvel[0]
        self._index = torch.cat([first + 7 * a + self._seven, first + 7 * b + self._three], dim=1)
        self._velocity_index = velocity + 6 * a + self._three
        self._a_half, self._b_half = self._half[episode.a, 2], self._half[episode.b, 2]
        self._on = episode.relation == 0
        self._goal, self._b_start, self._words = episode.goal.clone(), episode.b_start.clone(), episode.words.clone()
        self._marked = (episode.goal[:, 2:] > -0.5).float()
        self._goal_or_zero = self._marked * self._goal
        fixed = torch.cat([self._shapes, SIZE * self._half], dim=1).expand(len(a), -1, -1)
        self._looks = torch.cat([self._palette[episode.colors], fixed], dim=2)

    def handle(self, qpos: Tensor) -> Tensor:
        """[B, 3] middle of the drawer's handle, m."""
        return self._handle_closed - qpos[:, self._scene.drawer_qpos, None] * self._forward

    def object_poses(self, qpos: Tensor) -> Tensor:
        """[B, M, 7] position (m) and quaternion (w x y z) of every object."""
        return qpos[:, self._poses].unflatten(1, (NUM_SLOTS, 7))

    def view(self, qpos: Tensor, qvel: Tensor, pose: Pose, finger_target: Tensor) -> View:
        """What success and reward are computed from.

        An object counts as held when its centre is between the pads, the fingers are commanded clearly narrower than
        they are, and they do not move: only something between them can hold them there.
        """
        scene = self._scene
        tcp, rotation, _ = pose
        meant = qpos.gather(1, self._index)
        a_position = meant[:, :3]
        within = torch.bmm((a_position - tcp)[:, None], rotation)[:, 0].abs()
        opening = qpos[:, scene.fingers_qpos].mean(dim=1)
        still = qvel[:, scene.fingers_qvel].abs().amax(dim=1) < 0.03
        pressing = (opening - finger_target > 0.002) & (opening > 0.012) & still
        between = (within < self._grip).all(dim=1)
        return View(
            tcp=tcp,
            between=between,
            held=pressing & between,
            aperture=(finger_target - FINGER_CLOSED) / (FINGER_MAX - FINGER_CLOSED),
            gripper_open=(finger_target > 0.025) & (opening > 0.02),
            a_position=a_position,
            a_half_height=self._a_half,
            a_speed=torch.linalg.vector_norm(qvel.gather(1, self._velocity_index), dim=1),
            b_position=meant[:, 7:],
            b_half_height=self._b_half,
            b_start=self._b_start,
            goal=self._goal,
            relation_on=self._on,
            handle=self.handle(qpos),
            drawer=qpos[:, scene.drawer_qpos],
        )

    def observation(self, qpos: Tensor, qvel: Tensor, pose: Pose, control: PoseController) -> Obs:
        """What a policy sees; which object is meant is in the instruction only."""
        scene = self._scene
        tcp, rotation, _ = pose
        proprio = torch.cat(
            [
                qpos[:, scene.arm_qpos],
                qvel[:, scene.arm_qvel],
                tcp,
                rotation[:, :, :2].flatten(1),
                qpos[:, scene.fingers_qpos].mean(dim=1, keepdim=True),
                control.finger[:, None],
                control.position - tcp,
                rotation_error(control.rotation, rotation),
            ],
            dim=1,
        )
        poses = self.object_poses(qpos)
        position, quaternion = poses[:, :, :3], poses[:, :, 3:]
        products = (quaternion[..., :, None] * quaternion[..., None, :]).flatten(2)
        velocity = qvel[:, self._velocities].unflatten(1, (NUM_SLOTS, 6))[:, :, :3]
        axes = products @ self._axes
        to_goal = self._marked[:, None] * (self._goal[:, None] - position)
        objects = torch.cat([position, position - tcp[:, None], axes, velocity, to_goal], dim=2)
        goal = torch.cat(
            [
                self._goal_or_zero,
                self._marked * (self._goal - tcp),
                self._marked,
                qpos[:, scene.drawer_qpos, None],
                self.handle(qpos) - tcp,
            ],
            dim=1,
        )
        return {
            "proprio": (proprio - self._proprio_rest) * self._proprio_scale,
            "objects": objects * self._objects_scale,
            "looks": self._looks,
            "goal": goal * self._goal_scale,
            "instruction": self._words,
        }


def _axes_of_products() -> Tensor:
    """[16, 6] that turns the products q_i q_j of a unit quaternion into its matrix's x and y axes, row by row."""
    basis = torch.eye(4)
    weights = torch.zeros(4, 4, 6)
    for i in range(4):
        weights[i, i] = _quadratic(basis[i])
        for j in range(i):
            # Polarisation: the mixed part of the quadratic form, shared by q_i q_j and q_j q_i.
            mixed = _quadratic(basis[i] + basis[j]) - _quadratic(basis[i]) - _quadratic(basis[j])
            weights[i, j] = weights[j, i] = 0.5 * mixed
    return weights.flatten(0, 1)


def _quadratic(q: Tensor) -> Tensor:
    """The x and y axes [6] as a homogeneous quadratic form of q, that is |q|^2 R(q / |q|)."""
    square = (q * q).sum()
    return (square * rotation_from_quaternion(q / square.sqrt()))[:, :2].flatten()
