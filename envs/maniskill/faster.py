"""The same numbers, bit for bit, with less Python: what ManiSkill does on a CPU many times in every control step.

ManiSkill writes its structures for thousands of copies on a GPU. With one copy on a CPU most of a control step is the
cost of calling: a pose crosses four functions and five small tensors each time a task looks at it, the product of two
quaternions is 31 operations on tensors of one number, and every joint is told its target by a tensor of its own.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import sapien
import torch
from mani_skill.agents.controllers import pd_ee_pose
from mani_skill.utils.geometry import rotation_conversions
from mani_skill.utils.structs import pose as pose_module
from mani_skill.utils.structs.articulation import Articulation
from mani_skill.utils.structs.pose import Pose
from numpy.typing import NDArray
from torch import Tensor

Numbers = Sequence[np.float32] | NDArray[np.float32]
ZERO = np.float32(0)
_create = Pose.create.__func__  # the function behind a classmethod
_OWN = {name: getattr(rotation_conversions, name) for name in ("quaternion_multiply", "quaternion_apply")}
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


def _single(*tensors: Tensor) -> bool:
    """Whether these are one copy's numbers on a CPU."""
    return all(
        x.device.type == "cpu" and x.dtype == torch.float32 and x.dim() == 2 and len(x) == 1 and not x.requires_grad
        for x in tensors
    )


def _times(a: Numbers, b: Numbers) -> tuple[np.float32, ...]:
    """The product of two quaternions (w, x, y, z), each operation rounded to float32 as torch rounds it."""
    (aw, ax, ay, az), (bw, bx, by, bz) = a, b
    return (
        aw * bw - ax * bx - ay * by - az * bz,
        aw * bx + ax * bw + ay * bz - az * by,
        aw * by - ax * bz + ay * bw + az * bx,
        aw * bz + ax * by - ay * bx + az * bw,
    )


def _multiply(a: Tensor, b: Tensor) -> Tensor:
    """`quaternion_multiply`: the product, with a real part that is not negative."""
    if not _single(a, b):
        made: Tensor = _OWN["quaternion_multiply"](a, b)
        return made
    product = np.array([_times(a.numpy()[0], b.numpy()[0])], np.float32)
    return torch.from_numpy(-product if product[0, 0] < 0 else product)


def _apply(quaternion: Tensor, point: Tensor) -> Tensor:
    """`quaternion_apply`: a point, turned."""
    if not _single(quaternion, point):
        made: Tensor = _OWN["quaternion_apply"](quaternion, point)
        return made
    w, x, y, z = q = quaternion.numpy()[0]
    turned = _times(_times(q, (ZERO, *point.numpy()[0])), (w, -x, -y, -z))
    return torch.from_numpy(np.array([turned[1:]], np.float32))


def _drive(self: Articulation, targets: Tensor, joints: Any = None, joint_indices: Tensor | None = None) -> None:
    """`set_joint_drive_targets`; the joints of one robot on a CPU are told without a tensor for each."""
    if self.scene.gpu_sim_enabled or joints is None or not isinstance(targets, Tensor):
        _set_targets(self, targets, joints, joint_indices)
        return
    row = targets[0].to(torch.float32).numpy()
    for i, joint in enumerate(joints):
        joint._objs[0].drive_target = row[i : i + 1]


def _turn_by(functions: Mapping[str, Callable[[Tensor, Tensor], Tensor]]) -> None:
    """Put functions where ManiSkill's structures and controllers have imported theirs."""
    for module in (pose_module, pd_ee_pose):
        for name, function in functions.items():
            setattr(module, name, function)


def install() -> None:
    """Put them in the place of ManiSkill's own in this process; calling it again changes nothing."""
    Pose.create = classmethod(_pose)
    _turn_by({"quaternion_multiply": _multiply, "quaternion_apply": _apply})
    Articulation.set_joint_drive_targets = _drive


def uninstall() -> None:
    """Put ManiSkill's own back, to compare with them."""
    Pose.create = classmethod(_create)
    _turn_by(_OWN)
    Articulation.set_joint_drive_targets = _set_targets
