"""From the numbers of a mixture's action to those of a part: chosen, turned round, rescaled, as its recipe states.

The mixture's numbers mean what they mean in its first part that takes all of them in order.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embodied_rl.conformance import stated, told
from embodied_rl.convention import ITEMS, UNKNOWN, Agreement, Convention, Item, compare
from embodied_rl.errors import CapabilityError, ConfigError
from embodied_rl.types import ActionSpec

if TYPE_CHECKING:
    from embodied_rl.envs.mixture import MixturePart

_BLOCKS: dict[Item, tuple[str, ...]] = {
    "gripper": ("gripper",), "metres": ("position",), "radians": ("rotation", "joint"), "rotation": ("rotation",),
}  # fmt: skip
"""What of an action is converted for an item; the others cannot be."""


@dataclass(frozen=True)
class Turn:
    """A rotation written otherwise."""

    first: int
    """Of the three numbers."""
    pair: tuple[str, str]
    """Written so before, and so after."""
    radians: float
    """What 1 is, before and after."""

    def __call__(self, action: Tensor) -> Tensor:
        """The action [n, D] with its rotation converted."""
        at = slice(self.first, self.first + 3)
        out = action.clone()
        # Imported here, because few mixtures need Warp for anything.
        from embodied_rl.envs._rotation import convert_rotation

        out[:, at] = convert_rotation(action[:, at] * self.radians, self.pair) / self.radians
        return out


@dataclass(frozen=True)
class Bridge:
    """How a part reads its own action.

    Example: a part with a gripper of the other sign and half the step, behind 7 numbers of which it takes 4:
    `Bridge((0, 1, 2, 6), (2.0, 2.0, 2.0, -1.0))`.
    """

    columns: tuple[int, ...] | None = None
    """Of the mixture's numbers, in the part's order; None takes all."""
    scale: tuple[float, ...] | None = None
    """Factor of each."""
    turn: Turn | None = None
    """Comes after the scale."""

    def __call__(self, action: Tensor) -> Tensor:
        """The part's action of the mixture's [B, ...]."""
        if self.columns is not None:
            action = action[:, list(self.columns)]
        if self.scale is None and self.turn is None:
            return action
        action = action.clamp(-1, 1)  # beyond 1 an action is one of 1, and must be so before it is rescaled
        if self.scale is not None:
            action = action * torch.tensor(self.scale, dtype=action.dtype, device=action.device)
        return action if self.turn is None else self.turn(action)


def bridge_parts(
    parts: Sequence[MixturePart], names: Sequence[str], actions: Sequence[ActionSpec], size: int, report: list[str]
) -> tuple[tuple[Bridge, ...], Convention | None]:
    """What every part makes of the mixture's action.

    Args:
        parts: Say which numbers they take and what is converted.
        names: Of the parts.
        actions: Of the parts, all continuous.
        size: Numbers of the mixture's action.
        report: Receives what is the same, unknown, converted or left.

    Returns:
        bridges: One per part.
        convention: Of the mixture's action, as far as it is one.

    Raises:
        CapabilityError: Equal numbers mean different things, and no setting says what becomes of that.
        ConfigError: A setting converts what does not differ, is unknown or cannot be converted.
    """
    meant = [_meant(part, name, action) for part, name, action in zip(parts, names, actions, strict=True)]
    whole = [p for p, part in enumerate(parts) if part.action in (None, tuple(range(size)))]
    first = whole[0] if whole else 0
    ours = meant[first]
    bridges: list[Bridge] = []
    common = {item: getattr(ours, item) for item in ITEMS}
    for p, (part, name, theirs) in enumerate(zip(parts, names, meant, strict=True)):
        if p == first:
            if part.bridge:
                raise ConfigError(
                    f"mixture: bridge of {name} does nothing, because its numbers are the mixture's: remove it"
                )
            bridges.append(Bridge(part.action))
            continue
        if whole:
            _same_places(part, (names[first], ours, size), (name, theirs, actions[p].size))
        agreement = {k: v for k, v in compare(ours, theirs).items() if k not in _untaken(theirs)}
        report += told(agreement, (names[first], ours), (name, theirs))
        bridges.append(_bridge(part, (names[first], ours), (name, theirs), agreement, actions[p].size, report))
        for item, state in agreement.items():
            if state == "unknown" or part.bridge.get(item) == "keep":
                common[item] = None
    known = whole and any(value is not None for value in common.values())
    return tuple(bridges), Convention.model_validate(common) if known else None


def _meant(part: MixturePart, name: str, action: ActionSpec) -> Convention:
    """What a part's numbers mean, by its env and its recipe."""
    if part.convention is None:
        return action.convention or UNKNOWN
    convention = stated(f"mixture: {name}", action.convention, part.convention)
    if misfit := convention.misfit(action.size):
        raise ConfigError(f"mixture: {name}: {misfit}; correct its convention")
    return convention


def _untaken(convention: Convention) -> set[str]:
    """Items that a part has no numbers for."""
    idle = {"rotation", "radians"} if convention.rotation == "none" else set()
    return idle | ({"gripper"} if convention.gripper == "none" else set())


def _same_places(part: MixturePart, ours: tuple[str, Convention, int], theirs: tuple[str, Convention, int]) -> None:
    """Refuse a mapping that gives a part's gripper a number of the rotation, and the like."""
    mixed, own = ours[1].blocks(ours[2]), theirs[1].blocks(theirs[2])
    if mixed is None or own is None or ours[1].of_joints != theirs[1].of_joints:
        return  # unknown, or a difference in control
    for place, column in enumerate(part.action or range(ours[2])):
        if mixed[column] != own[place]:
            raise ConfigError(
                f"mixture: number {place} of {theirs[0]} is of its {own[place]} and takes number {column} of the "
                f"mixture, which is of the {mixed[column]} in {ours[0]}: name other places in its action"
            )


def _bridge(
    part: MixturePart, ours: tuple[str, Convention], theirs: tuple[str, Convention],
    agreement: dict[Item, Agreement], size: int, report: list[str],
) -> Bridge:  # fmt: skip
    """What a part's `bridge` says, worked out."""
    name, a, b = theirs[0], ours[1], theirs[1]
    blocks = b.blocks(size)
    scale = [1.0] * size
    pair: tuple[str, str] | None = None
    for item in ITEMS:
        state, way = agreement.get(item), part.bridge.get(item)
        sides = f"{item} is {getattr(a, item)} in {ours[0]} and {getattr(b, item)} in {name}"
        if state != "differs":
            if way is not None:
                unsaid = "nobody says what it is: say it in convention, or"
                why = unsaid if state == "unknown" else "it does not differ:"
                raise ConfigError(f"mixture: bridge {item} ({way}) of {name} does nothing, because {why} remove it")
            continue
        can = _convertible(item, a, b) and blocks is not None
        if way is None:
            convert = f"{{{item}: convert}}, or " if can else ""
            raise CapabilityError(
                f"mixture: {sides}, so equal numbers would mean different things: set for {name} bridge: {convert}"
                f"{{{item}: keep}} to give it the numbers as they are"
            )
        if way == "keep":
            report.append(f"{sides}, and {name} takes the numbers as they are")
            continue
        if not can or blocks is None:
            raise ConfigError(
                f"mixture: {sides}, which nothing converts: set bridge: {{{item}: keep}}, or leave {name} out"
            )
        if item == "rotation":
            pair = (str(a.rotation), str(b.rotation))
            continue
        factor = -1.0 if item == "gripper" else getattr(a, item) / getattr(b, item)
        scale = [s * factor if kind in _BLOCKS[item] else s for s, kind in zip(scale, blocks, strict=True)]
        cut = f"; beyond {1 / abs(factor):.3g} it is cut" if abs(factor) > 1 + 1e-9 else ""
        of = next(kind for kind in _BLOCKS[item] if kind in blocks)
        report.append(f"{sides}: {name} takes the {of} times {factor:g}{cut}")
    turn = None
    if pair is not None:
        assert blocks is not None
        first, per = blocks.index("rotation"), a.radians if part.bridge.get("radians") == "keep" else b.radians
        assert a.radians is not None and per is not None
        turn = Turn(first, pair, per)  # the scale has brought the numbers to this unit
        report.append(f"the rotation of {name} is converted from {pair[0]} to {pair[1]}")
    return Bridge(part.action, None if all(s == 1 for s in scale) else tuple(scale), turn)


def _convertible(item: Item, a: Convention, b: Convention) -> bool:
    """Whether a difference can be worked out."""
    if item not in _BLOCKS or (item == "gripper" and "none" in (a.gripper, b.gripper)):
        return False
    if item == "radians":
        return a.control == b.control and (a.of_joints or not {a.rotation, b.rotation} - {"axis_angle", "euler_xyz"})
    if item == "rotation":
        return {a.rotation, b.rotation} == {"axis_angle", "euler_xyz"} and None not in (a.radians, b.radians)
    return True
