"""Gymnasium spaces as the engine's specs: shared by the envs that wrap somebody else's simulator."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from gymnasium import spaces
from numpy.typing import NDArray
from torch import Tensor

from embodied_rl.errors import CapabilityError, ShapeError
from embodied_rl.types import ActionSpec, TensorSpec

Array = NDArray[Any]
Part = tuple[tuple[Any, ...], spaces.Box]
"""The keys that lead to a Box of an action, and the Box."""


@dataclass(frozen=True)
class Leaf:
    """One tensor of the observation and where it lies in the simulator's own observation.

    Example: `Dict(arm=Box(7), camera=Box(64, 64, 3, uint8))` has the leaves "arm" float32 [7] and "camera" uint8
    [64, 64, 3]; a plain `Box` is one leaf called "state" with an empty path.
    """

    name: str
    path: tuple[str, ...]
    spec: TensorSpec
    dtype: np.dtype[Any]
    """What the tensor holds, as NumPy says it."""
    start: int = 0
    """Subtracted, so that categories count from 0."""

    def read(self, observation: Any) -> Any:
        """The leaf's part of a (nested) observation."""
        for key in self.path:
            observation = observation[key]
        return observation - self.start if self.start else observation


def leaves(space: spaces.Space[Any], where: str) -> tuple[Leaf, ...]:
    """Lay an observation space out flat.

    Floats become float32, uint8 stays (images), other integers become float32 when they are a Box (numbers) and int64
    when they are Discrete (categories, counted from 0). Nested names are joined by "/".

    Args:
        space: Box, Discrete, or a Dict of these.
        where: The env's id, for messages.

    Raises:
        CapabilityError: Another kind of space.
    """
    found = tuple(_walk(space, (), where))
    if not found:
        raise CapabilityError(f"{where}: the observation space {space} is empty; a policy needs something to look at")
    return found


def _walk(space: spaces.Space[Any], path: tuple[str, ...], where: str) -> Iterator[Leaf]:
    name = "/".join(path) or "state"
    if isinstance(space, spaces.Dict):
        for key, inner in space.spaces.items():
            yield from _walk(inner, (*path, str(key)), where)
    elif isinstance(space, spaces.Box):
        image = space.dtype == np.uint8
        # An empty shape would leave nothing for a policy's last axis.
        shape = space.shape or (1,)
        low, high = float(np.min(space.low)), float(np.max(space.high))
        bounded = bool(np.isfinite(space.low).all() and np.isfinite(space.high).all())
        spec = TensorSpec(
            shape,
            torch.uint8 if image else torch.float32,
            low if bounded else None,
            high if bounded else None,
            meaning=f"{name}, as the simulator gives it",
        )
        yield Leaf(name, path, spec, np.dtype(np.uint8 if image else np.float32))
    elif isinstance(space, spaces.Discrete):
        spec = TensorSpec((), torch.int64, 0.0, float(space.n - 1), meaning=f"{name}, a category")
        yield Leaf(name, path, spec, np.dtype(np.int64), int(space.start))
    else:
        raise CapabilityError(
            f"{where}: its observation '{name}' is a {type(space).__name__}, and only Box, Discrete and Dict of these "
            "are understood; wrap the env so that it returns one of them"
        )


class ActionMap:
    """From the engine's actions (numbers in [-1, 1], or a category from 0) to what the simulator takes.

    A bounded dimension is mapped by low + (a + 1) / 2 * (high - low); where a bound is infinite, a is used as it is.
    A Dict of Boxes is one flat action, its parts in the order of the Dict's keys; `split` makes a Dict of it again.
    """

    def __init__(self, space: spaces.Space[Any], where: str) -> None:
        """Read the action space.

        Args:
            space: Box, Discrete, or a Dict (of Dicts) of Boxes.
            where: The env's id, for messages.

        Raises:
            CapabilityError: Another kind of space.
        """
        self.where = where
        self._parts: list[Part] = []
        self.shape: tuple[int, ...] = ()
        if isinstance(space, spaces.Discrete):
            self.spec = ActionSpec("discrete", int(space.n))
            self.start, self.dtype = int(space.start), np.dtype(space.dtype or np.int64)
            return
        parts = list(_parts(space, (), where))
        boxes = [box for _, box in parts]
        size = sum(math.prod(box.shape) for box in boxes)
        self.shape, self.dtype = boxes[0].shape, np.result_type(*(box.dtype for box in boxes))
        names: tuple[str, ...] = ()
        if isinstance(space, spaces.Dict):
            # Its numbers stay flat, so that they can be kept and played again as those of a Box.
            self._parts, self.shape = parts, (size,)
            names = tuple(f"{_joined(path)}.{i}" for path, box in parts for i in range(math.prod(box.shape)))
        self.spec = ActionSpec("continuous", size, names)
        low = np.concatenate([box.low.reshape(-1).astype(np.float64) for box in boxes])
        high = np.concatenate([box.high.reshape(-1).astype(np.float64) for box in boxes])
        bounded = np.isfinite(low) & np.isfinite(high)
        low, high = np.where(bounded, low, -1.0), np.where(bounded, high, 1.0)
        self.middle, self.half = ((high + low) / 2).astype(self.dtype), ((high - low) / 2).astype(self.dtype)
        self.low, self.high = low.astype(self.dtype), high.astype(self.dtype)
        self.identity = bool((low == -1.0).all() and (high == 1.0).all())

    def __call__(self, action: Tensor, out: Array | None = None) -> Array:
        """Check a batch of actions and convert it.

        Args:
            action: [B, *spec.shape] of spec.dtype, already known to have the right shape.
            out: [B, size] of the simulator's dtype to write continuous actions into; None for a new array.

        Returns:
            native: [B, *shape] of the simulator's dtype; what a Dict takes is still to be `split`.

        Raises:
            ShapeError: A number that is not finite, or a category that does not exist; names the copies.
        """
        x = action.detach().cpu().numpy()
        if self.spec.kind == "discrete":
            wrong = (x < 0) | (x >= self.spec.size)
            if wrong.any():
                raise ShapeError(
                    f"{self.where} action: {_copies(wrong)} got {x[wrong][0]}, expected 0 to {self.spec.size - 1}"
                )
        else:
            finite = np.isfinite(x)
            if not finite.all():
                raise ShapeError(
                    f"{self.where} action: not finite in {_copies(~finite.all(axis=1))}, expected numbers in [-1, 1]; "
                    "the policy that made them has diverged"
                )
        return self.native(x, out)

    def native(self, x: Array, out: Array | None = None) -> Array:
        """Convert actions that are known to be good; see `__call__`."""
        if self.spec.kind == "discrete":
            return (x + self.start).astype(self.dtype)
        if out is None:
            out = np.empty(x.shape, self.dtype)
        np.copyto(out, x)
        np.maximum(out, -1.0, out=out)
        np.minimum(out, 1.0, out=out)
        if not self.identity:
            out *= self.half
            out += self.middle
            # Rounding may leave the box by one unit in the last place, and some simulators refuse that.
            np.clip(out, self.low, self.high, out=out)
        return out.reshape(len(x), *self.shape)

    def split(self, native: Any) -> Any:
        """What the simulator takes: the native action itself, or the Dict that it asks for.

        Args:
            native: Of one copy [*shape] or of several [B, *shape]; an array or a tensor.

        Returns:
            taken: The same; for a Dict, nested as the space is, [*box.shape] or [B, *box.shape] of each Box, arrays in
                its dtype.
        """
        if not self._parts:
            return native
        taken: dict[Any, Any] = {}
        end = 0
        for path, box in self._parts:
            start, end = end, end + math.prod(box.shape)
            x = native[..., start:end].reshape((*native.shape[:-1], *box.shape))
            place = taken
            for key in path[:-1]:
                place = place.setdefault(key, {})
            place[path[-1]] = x if isinstance(x, Tensor) else x.astype(box.dtype, copy=False)
        return taken


def _parts(space: spaces.Space[Any], path: tuple[Any, ...], where: str) -> Iterator[Part]:
    """Every Box of an action space and the keys that lead to it; CapabilityError for anything else."""
    if isinstance(space, spaces.Dict) and space.spaces:
        for key, inner in space.spaces.items():
            yield from _parts(inner, (*path, key), where)
    elif isinstance(space, spaces.Box) and np.issubdtype(space.dtype or np.float32, np.floating):
        yield path, space
    elif path:
        raise CapabilityError(
            f"{where}: '{_joined(path)}' of its action is {space}, and in a Dict only a Box of floats is understood; "
            "wrap the env so that it takes one"
        )
    else:
        raise CapabilityError(
            f"{where}: its action is {space}, and only a Box of floats, a Dict of such or a Discrete is understood; "
            "wrap the env so that it takes one of them"
        )


def _joined(path: tuple[Any, ...]) -> str:
    return "/".join(map(str, path))


def check_action(action: Tensor, spec: ActionSpec, num_envs: int, device: torch.device, where: str) -> None:
    """Refuse a batch of actions of another shape, dtype or device.

    Raises:
        ShapeError: Says what was found and what was expected.
    """
    wanted = (num_envs, *spec.shape)
    if action.shape != wanted or action.dtype != spec.dtype or action.device.type != device.type:
        raise ShapeError(
            f"{where} action: found shape {list(action.shape)}, {action.dtype} on {action.device}, expected "
            f"{list(wanted)}, {spec.dtype} on {device}"
        )


def _copies(wrong: Array) -> str:
    rows = np.flatnonzero(wrong).tolist()
    more = f" and {len(rows) - 8} more" if len(rows) > 8 else ""
    return f"copies {rows[:8]}{more}"


def resized(pictures: Tensor, height: int, width: int) -> Tensor:
    """Scale pictures by antialiased bilinear interpolation.

    Args:
        pictures: [N, h, w, 3] uint8.
        height: Rows H.
        width: Columns W.

    Returns:
        pictures: [N, H, W, 3] uint8.
    """
    if pictures.shape[1:3] == (height, width):
        return pictures
    planes = pictures.permute(0, 3, 1, 2).float()
    planes = torch.nn.functional.interpolate(planes, (height, width), mode="bilinear", antialias=True)
    return planes.round().clamp(0, 255).to(torch.uint8).permute(0, 2, 3, 1).contiguous()
