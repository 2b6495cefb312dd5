"""What the numbers of an action mean, read from the controllers of ManiSkill's Panda; other robots' are unknown."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal

from embodied_rl.convention import Convention

FINGERS = {"panda": True, "panda_wristcam": True, "panda_stick": False}
"""Robots whose controllers are known -> whether they have a gripper, which opens where its joint grows."""


def convention_of(robot: str, controllers: Mapping[str, Any]) -> Convention | None:
    """The convention of a controller.

    ManiSkill scales a normalised rotation by `rot_lower`, which is negative: +1 turns by -0.1 rad.

    Args:
        robot: Its uid.
        controllers: Part of the robot -> configuration of its controller, in the order of the action.

    Returns:
        convention: None where it is not known.

    Source: mani_skill 3.0.1, agents/controllers/pd_ee_pose.py (`_clip_and_scale_action`, `compute_target_pose`).
    """
    wanted = ["arm", "gripper"] if FINGERS.get(robot) else ["arm"]
    if robot not in FINGERS or list(controllers) != wanted:
        return None
    arm = controllers["arm"]
    kind, delta = type(arm).__name__, getattr(arm, "use_delta", False)
    gripper: Literal["none", "opens_at_plus"] = "opens_at_plus" if FINGERS[robot] else "none"
    if kind == "PDEEPosControllerConfig":
        frames = {"root_translation": "base", "body_translation": "tool"}
        return _of_hand(delta, frames.get(arm.frame), "none", gripper, _half(arm.pos_lower, arm.pos_upper), None)
    if kind == "PDEEPoseControllerConfig":
        frames = {
            "root_translation:root_aligned_body_rotation": "base",
            "body_translation:body_aligned_body_rotation": "tool",
        }
        radians = _half(arm.rot_lower, arm.rot_upper)
        if radians is not None and arm.normalize_action:
            radians = -radians
        metres = _half(arm.pos_lower, arm.pos_upper)
        return _of_hand(delta, frames.get(arm.frame), "euler_xyz", gripper, metres, radians)
    if kind == "PDJointPosControllerConfig":
        if delta:
            return Convention(control="joint_delta", gripper=gripper, radians=_half(arm.lower, arm.upper))
        return Convention(control="joint_absolute", gripper=gripper)
    if kind == "PDJointVelControllerConfig":
        return Convention(control="joint_velocity", gripper=gripper, radians=_half(arm.lower, arm.upper))
    return None


def _of_hand(
    delta: bool, frame: Any, rotation: Any, gripper: Any, metres: float | None, radians: float | None
) -> Convention:
    return Convention(
        control="ee_delta" if delta else "ee_absolute", frame=frame, rotation=rotation, gripper=gripper, metres=metres,
        radians=radians,
    )  # fmt: skip


def _half(low: Any, high: Any) -> float | None:
    """What 1 is, where every axis goes from -x to x; None elsewhere."""
    plain = isinstance(low, float) and isinstance(high, float) and low == -high and high > 0
    return high if plain else None
