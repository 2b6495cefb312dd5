"""What the numbers of an action mean to a robot, as far as anybody has said, and how two such meanings differ."""

from __future__ import annotations

import math
from typing import Any, Literal, get_args

from pydantic import Field, model_validator

from embodied_rl.section import Section

Item = Literal["control", "frame", "rotation", "gripper", "metres", "radians"]
ITEMS: tuple[Item, ...] = get_args(Item)
Agreement = Literal["same", "unknown", "differs"]
ROTATION_SIZE = {
    "none": 0, "axis_angle": 3, "euler_xyz": 3, "quaternion_wxyz": 4, "quaternion_xyzw": 4, "rot6d": 6,
}  # fmt: skip
"""Numbers that a rotation takes."""


class Convention(Section):
    """What the numbers of a continuous action mean; null stands for what nobody has said.

    A hand has three numbers of position, those of its rotation and one of the gripper; joints have one each, and then
    comes the gripper. All lie in [-1, 1].

    Example: LIBERO's own 7 numbers are `Convention(control="ee_delta", frame="base", rotation="axis_angle",
    gripper="closes_at_plus", metres=0.05, radians=0.5)`.
    """

    control: (
        Literal["ee_delta", "ee_absolute", "joint_delta", "joint_absolute", "joint_velocity", "joint_torque"] | None
    ) = None
    """What is commanded: the hand's pose (ee) or the joints, as a change or as a goal."""
    frame: Literal["base", "tool"] | None = None
    """ee: along and about whose axes: those of the robot's base, or those of the hand itself."""
    rotation: Literal["none", "axis_angle", "euler_xyz", "quaternion_wxyz", "quaternion_xyzw", "rot6d"] | None = None
    """ee: how a rotation is written; euler_xyz is R = Rx(a) Ry(b) Rz(c), rot6d the first two columns of R."""
    gripper: Literal["none", "opens_at_plus", "closes_at_plus"] | None = None
    """Which way the last number moves the fingers."""
    metres: float | None = Field(None, gt=0, allow_inf_nan=False)
    """ee: what 1 is along each axis, in metres; ee_absolute: where each axis has a range of its own, null."""
    radians: float | None = Field(None, allow_inf_nan=False)
    """What 1 is about each axis or joint, in radians; below 0 where it turns against the right-hand rule."""

    @model_validator(mode="after")
    def _can_be(self) -> Convention:
        if self.radians == 0:
            raise ValueError("radians (0) would turn nothing: say what 1 is in radians, or null where it is unknown")
        if self.rotation == "none" and self.radians is not None and not self.of_joints:
            raise ValueError(f"radians ({self.radians:g}) says nothing with rotation (none): remove one of them")
        idle = [name for name in ("frame", "rotation", "metres") if self.of_joints and getattr(self, name) is not None]
        if idle:
            raise ValueError(
                f"{idle[0]} ({getattr(self, idle[0])}) belongs to the hand's pose and control is {self.control}: "
                "remove one of them"
            )
        return self

    @property
    def of_joints(self) -> bool:
        """Whether joints are commanded, and not the hand's pose."""
        return (self.control or "").startswith("joint")

    def blocks(self, size: int) -> tuple[str, ...] | None:
        """What each of `size` numbers belongs to: position, rotation, joint or gripper; None where that is unknown."""
        if self.gripper is None or self.control is None:
            return None
        grip = 0 if self.gripper == "none" else 1
        if self.of_joints:
            return ("joint",) * (size - grip) + ("gripper",) * grip
        if self.rotation is None:
            return None
        return ("position",) * 3 + ("rotation",) * ROTATION_SIZE[self.rotation] + ("gripper",) * grip

    def misfit(self, size: int) -> str:
        """Why an action of `size` numbers cannot be meant so; "" where it can."""
        blocks = self.blocks(size)
        if blocks is None or len(blocks) == size:
            return ""
        parts = ", ".join(f"{blocks.count(kind)} of {kind}" for kind in dict.fromkeys(blocks))
        return f"its convention ({self.told()}) takes {len(blocks)} numbers ({parts}), and the action has {size}"

    def told(self) -> str:
        """What is known in one phrase.

        Example: "control ee_delta, frame base, rotation axis_angle, gripper opens_at_plus, metres 0.02, radians 0.05".
        """
        known = [f"{name} {_short(getattr(self, name))}" for name in ITEMS if getattr(self, name) is not None]
        return ", ".join(known) or "unknown"


UNKNOWN = Convention()
"""Nobody has said anything."""


def compare(a: Convention, b: Convention) -> dict[Item, Agreement]:
    """Whether equal numbers mean the same.

    Args:
        a: One side.
        b: The other.

    Returns:
        agreement: Of every item that can be meant at all (joints have no frame); `unknown` where a side does not say.
    """
    idle: set[str] = {"frame", "rotation", "metres"} if a.of_joints and b.of_joints else set()
    if a.rotation == b.rotation == "none":
        idle.add("radians")
    return {item: _agree(getattr(a, item), getattr(b, item)) for item in ITEMS if item not in idle}


def _agree(x: Any, y: Any) -> Agreement:
    if x is None or y is None:
        return "unknown"
    alike = math.isclose(x, y, rel_tol=1e-6) if isinstance(x, float) and isinstance(y, float) else x == y
    return "same" if alike else "differs"


def _short(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
