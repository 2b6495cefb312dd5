"""The same numbers, bit for bit, with less Python: what ManiSkill does on a CPU many times in every control step.

ManiSkill writes its structures for thousands of copies on a GPU. With one copy on a CPU most of a control step is the
cost of calling: a pose crosses four functions and five small tensors each time a task looks at it, the product of two
quaternions is 31 operations on tensors of one number, and every joint is told its target by a tensor of its own.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.utils.geometry import rotation_conversions
from mani_skill.utils.structs.articulation import Articulation
from mani_skill.utils.structs.pose import Pose
from torch import Tensor

_create = Pose.create.__func__  # the function behind a classmethod
_multiply = rotation_conversions.quaternion_raw_multiply
_set_targets = Articulation.set_joint_drive_targets


def _on_cpu(device: Any) -> bool:
    return device is None or torch.device(device).type == "cpu"


def _pose(cls: type[Pose], pose: Any, device: Any = None) -> Pose:
    """`Pose.create`; the poses of bodies on a CPU go straight into one array."""
    if not (isinstance(pose, list) and pose and isinstance(pose[0], sapien.Pose) and _on_cpu(device)):
        return _create(cls, pose, device)
    raw = np.empty((len(pose), 7), np.float32)
    for row, one in zip(raw, pose, strict=True):
        row[:3], row[3:] = one.p, one.q
    return cls(raw_pose=torch.from_numpy(raw))


def _product(a: Tensor, b: Tensor) -> Tensor:
    """`quaternion_raw_multiply`; a single product on a CPU by NumPy's float32 scalars, each operation rounded alike."""
    if not (a.shape == b.shape == (1, 4) and a.dtype == b.dtype == torch.float32 and a.device.type == "cpu"):
        product: Tensor = _multiply(a, b)
        return product
    aw, ax, ay, az = a.numpy()[0]
    bw, bx, by, bz = b.numpy()[0]
    out = np.empty((1, 4), np.float32)
    out[0, 0] = aw * bw - ax * bx - ay * by - az * bz
    out[0, 1] = aw * bx + ax * bw + ay * bz - az * by
    out[0, 2] = aw * by - ax * bz + ay * bw + az * bx
    out[0, 3] = aw * bz + ax * by - ay * bx + az * bw
    return torch.from_numpy(out)


def _drive(self: Articulation, targets: Tensor, joints: Any = None, joint_indices: Tensor | None = None) -> None:
    """`set_joint_drive_targets`; the joints of one robot on a CPU are told without a tensor for each."""
    if self.scene.gpu_sim_enabled or joints is None or not isinstance(targets, Tensor):
        _set_targets(self, targets, joints, joint_indices)
        return
    row = targets[0].to(torch.float32).numpy()
    for i, joint in enumerate(joints):
        joint._objs[0].drive_target = row[i : i + 1]


def install() -> None:
    """Put them in the place of ManiSkill's own in this process; calling it again changes nothing."""
    Pose.create = classmethod(_pose)
    rotation_conversions.quaternion_raw_multiply = _product
    Articulation.set_joint_drive_targets = _drive


def uninstall() -> None:
    """Put ManiSkill's own back, to compare with them."""
    Pose.create = classmethod(_create)
    rotation_conversions.quaternion_raw_multiply = _multiply
    Articulation.set_joint_drive_targets = _set_targets
