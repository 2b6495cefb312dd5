"""From the state vectors to what a policy sees and what success and reward are computed from."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from embodied_rl.envs.tabletop.control import LEASH, YAW_LEASH, Pose, PoseController
from embodied_rl.envs.tabletop.instructions import COLORS, MAX_WORDS, WORD_IDS
from embodied_rl.envs.tabletop.kinematics import rotation_error, rotation_from_quaternion
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
"""Scales to order one of positions (per m), positions relative to the TCP (per m), speeds (s/m), half extents (per m)."""
NUM_SLOTS = len(SHAPES)

OBSERVATION: dict[str, TensorSpec] = {
    "proprio": TensorSpec(
        (31,),
        meaning="joint angles from rest (rad) 7, joint velocities (rad/s) 7, TCP position (x5/m) 3, TCP x and y axes 6, "
        "gripper opening -1..1, finger target -1..1, wanted minus real TCP position 3 and rotation 3 (of their limits)",
    ),
    "objects": TensorSpec(
        (NUM_SLOTS, 27),
        meaning="per object: position (x5/m) 3, relative to the TCP (x10/m) 3, x and y axes 6, velocity (x2 s/m) 3, "
        "colour one-hot 6, shape one-hot 3, half extents (x30/m) 3",
    ),
    "goal": TensorSpec(
        (11,),
        meaning="marked goal position (x5/m) 3, relative to the TCP (x10/m) 3 (both 0 without a marked goal), 1 if there "
        "is one, drawer opening 0..1, handle relative to the TCP (x5/m) 3",
    ),
    "instruction": TensorSpec(
        (MAX_WORDS,), torch.int64, low=0, high=WORD_IDS - 1, constant=True, meaning="word ids of the instruction, 0 pads"
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
    """Reads positions and velocities [B, nq], [B, nv] of one scene."""

    def __init__(self, scene: Scene, num_envs: int, device: torch.device) -> None:
        """Precompute indices and constants."""
        self._scene = scene
        self._rows = torch.arange(num_envs, device=device)
        self._pose_index = torch.tensor([[q + i for i in range(7)] for q in scene.objects_qpos], device=device)
        self._velocity_index = torch.tensor([[v + i for i in range(3)] for v in scene.objects_qvel], device=device)
        self._home = torch.from_numpy(HOME).float().to(device)
        self._half = torch.from_numpy(HALF_SIZE).float().to(device)
        self._half_height = self._half[:, 2].contiguous()
        self._handle_closed = torch.from_numpy(CABINET_FRONT + HANDLE_OFFSET).float().to(device)
        self._forward = torch.tensor([1.0, 0.0, 0.0], device=device)
        shape = torch.eye(NUM_SLOTS, device=device)
        self._fixed = torch.cat([shape, SIZE * self._half], dim=1).expand(num_envs, -1, -1)
        self._colors = torch.eye(len(COLORS), device=device)

    def handle(self, qpos: Tensor) -> Tensor:
        """[B, 3] middle of the drawer's handle, m."""
        return self._handle_closed - qpos[:, self._scene.drawer_qpos, None] * self._forward

    def object_poses(self, qpos: Tensor) -> Tensor:
        """[B, M, 7] position (m) and quaternion (w x y z) of every object."""
        return qpos[:, self._pose_index]

    def view(self, qpos: Tensor, qvel: Tensor, pose: Pose, finger_target: Tensor, episode: Episode) -> View:
        """What success and reward are computed from.

        An object counts as held when its centre is between the pads, the fingers are commanded clearly narrower than
        they are, and they do not move: only something between them can hold them there.
        """
        scene, rows = self._scene, self._rows
        tcp, rotation, _ = pose
        a_pose = qpos[rows[:, None], self._pose_index[episode.a]]
        a_velocity = qvel[rows[:, None], self._velocity_index[episode.a]]
        b_position = qpos[rows[:, None], self._pose_index[episode.b, :3]]
        a_position = a_pose[:, :3]
        a_half, b_half = self._half_height[episode.a], self._half_height[episode.b]
        within = (rotation.transpose(1, 2) @ (a_position - tcp)[:, :, None]).squeeze(2).abs()
        opening = qpos[:, scene.fingers_qpos].mean(dim=1)
        still = qvel[:, scene.fingers_qvel].abs().amax(dim=1) < 0.03
        pressing = (opening - finger_target > 0.002) & (opening > 0.012) & still
        between = (within[:, 0] < 0.022) & (within[:, 1] < 0.012) & (within[:, 2] < 0.024)
        # The third row of the object's rotation says how far its own axes rise: its top is half a height along the
        # steepest; objects stand upright unless knocked over, so its own z axis serves.
        up = 1 - 2 * (a_pose[:, 4] ** 2 + a_pose[:, 5] ** 2)
        top = a_position.clone()
        top[:, 2] += a_half * up.abs()
        return View(
            tcp=tcp,
            held=pressing & between,
            gripper_open=(finger_target > 0.025) & (opening > 0.02),
            a_position=a_position,
            a_top=top,
            a_height=a_position[:, 2] - a_half,
            a_speed=torch.linalg.vector_norm(a_velocity, dim=1),
            a_half_height=a_half,
            b_position=b_position,
            b_half_height=b_half,
            b_moved=torch.linalg.vector_norm(b_position[:, :2] - episode.b_start, dim=1),
            goal=episode.goal,
            relation_on=episode.relation == 0,
            handle=self.handle(qpos),
            drawer=qpos[:, scene.drawer_qpos],
        )

    def observation(self, qpos: Tensor, qvel: Tensor, pose: Pose, control: PoseController, episode: Episode) -> Obs:
        """What a policy sees; which object is meant is in the instruction only."""
        scene = self._scene
        tcp, rotation, _ = pose
        axes = rotation[:, :, :2].flatten(1)
        opening = qpos[:, scene.fingers_qpos].mean(dim=1, keepdim=True)
        proprio = torch.cat(
            [
                qpos[:, scene.arm_qpos] - self._home,
                qvel[:, scene.arm_qvel],
                PLACE * tcp,
                axes,
                opening / (0.5 * FINGER_MAX) - 1,
                control.finger[:, None] / (0.5 * FINGER_MAX) - 1,
                (control.position - tcp) / LEASH,
                rotation_error(control.rotation, rotation) / YAW_LEASH,
            ],
            dim=1,
        )
        poses = self.object_poses(qpos)
        position = poses[:, :, :3]
        objects = torch.cat(
            [
                PLACE * position,
                OFFSET * (position - tcp[:, None]),
                rotation_from_quaternion(poses[:, :, 3:])[..., :2].flatten(2),
                SPEED * qvel[:, self._velocity_index],
                self._colors[episode.colors],
                self._fixed,
            ],
            dim=2,
        )
        marked = (episode.goal[:, 2:] > -0.5).float()
        goal = torch.cat(
            [
                PLACE * marked * episode.goal,
                OFFSET * marked * (episode.goal - tcp),
                marked,
                qpos[:, scene.drawer_qpos, None] / DRAWER_MAX,
                PLACE * (self.handle(qpos) - tcp),
            ],
            dim=1,
        )
        return {"proprio": proprio, "objects": objects, "goal": goal, "instruction": episode.words.clone()}
