"""What an env shows, compared with what its spec promised: a policy would misread the rest without a word."""

from __future__ import annotations

import math
from typing import Any

from torch import Tensor

from embodied_rl.errors import DivergenceError, ShapeError
from embodied_rl.types import EnvSpec, Obs


def check_observation(obs: Obs, spec: EnvSpec, *, start: bool = False) -> None:
    """Refuse an observation that is not what the env's spec says.

    Args:
        obs: name -> [B, ...] as `reset`, `step` or `observe` returned it.
        spec: Of the env.
        start: An episode begins: also look at the range of integers that stay for the whole episode (word ids).

    Raises:
        ShapeError: Entries are missing or left over, or one has another shape, dtype or range; says both sides.
    """
    if obs.keys() != spec.observation.keys():
        raise ShapeError(
            f"the env shows {', '.join(obs) or 'nothing'}, its spec promises {', '.join(spec.observation)}: make the "
            "env's observation and EnvSpec.observation name the same entries"
        )
    for name, wanted in spec.observation.items():
        x = obs[name]
        if x.shape[1:] != wanted.shape or x.dtype != wanted.dtype or len(x) != spec.num_envs:
            raise ShapeError(
                f"the env shows '{name}' as {x.dtype} {list(x.shape)}, its spec promises {wanted.dtype} "
                f"{[spec.num_envs, *wanted.shape]}: convert it in the env, or correct EnvSpec.observation"
            )
        if start and wanted.constant and not (x.is_floating_point() or x.dtype.itemsize == 1):
            low, high = (int(limit) for limit in x.aminmax())
            if (wanted.low is not None and low < wanted.low) or (wanted.high is not None and high > wanted.high):
                raise ShapeError(
                    f"the env shows '{name}' with numbers from {low} to {high}, its spec promises {wanted.low} to "
                    f"{wanted.high}: keep to it in the env, or correct EnvSpec.observation"
                )


def not_finite(x: Tensor, rows: Tensor) -> Tensor | None:
    """[b] bool, which of `rows` [b] hold a number in x [b, ...] that is not finite; None when none does."""
    # One sum says that all are finite; where it is not (it may have overflowed) every number is looked at.
    if not x.is_floating_point() or math.isfinite(x.sum().item()):
        return None
    bad = ~x.isfinite().reshape(len(x), -1).all(1) & rows
    return bad if bool(bad.any()) else None


def name_of(env: Any) -> str:
    """What messages call an env."""
    return str(getattr(env, "where", f"env {type(env).__name__}"))


def check_finite(obs: Obs, rows: Tensor, env: Any, *, first: int = 0) -> None:
    """Refuse starts that show numbers that are not finite; other copies may show anything.

    Args:
        obs: name -> [b, ...].
        rows: [b] bool, copies whose episode begins.
        env: That shows them, for the message.
        first: Number of copy 0 in the message.

    Raises:
        DivergenceError: Says which env, entry and copies.
    """
    for name, x in obs.items():
        if (bad := not_finite(x, rows)) is not None:
            copies = (bad.nonzero().squeeze(-1) + first).tolist()
            raise DivergenceError(
                f"{name_of(env)}: observation '{name}' is not finite in copies {copies[:8]}, where they start: "
                "mend the env"
            )
