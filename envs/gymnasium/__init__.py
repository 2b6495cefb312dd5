"""Any Gymnasium id: B independent copies, or a vector env of Gymnasium's or of the id's own.

    env: {type: gymnasium, id: HalfCheetah-v5}
    env: {type: gymnasium, id: CartPole-v1, vectorization_mode: vector_entry_point}

`single.py` steps copies one after another, `vector.py` drives a `gymnasium.vector.VectorEnv` of any autoreset mode,
`wrapped.py` is what the two share, and `making.py` calls `gymnasium.make` and `gymnasium.make_vec`. Observations of a
plain Box are called "state".
"""

from __future__ import annotations

import logging
from typing import Any, Literal

import gymnasium
import torch
from pydantic import Field, JsonValue, model_validator

from embodied_rl.envs.gymnasium.making import make_single, make_vector
from embodied_rl.envs.gymnasium.single import GymnasiumEnv
from embodied_rl.envs.gymnasium.vector import VectorizedEnv
from embodied_rl.section import Section
from embodied_rl.types import Split

__all__ = ["Config", "GymnasiumEnv", "VectorizedEnv", "build"]

log = logging.getLogger(__name__)


class Config(Section):
    """Settings of an env from Gymnasium or from a package that registers its envs there."""

    type: Literal["gymnasium"] = "gymnasium"
    id: str = Field(min_length=1)
    """As in `gymnasium.make`: `HalfCheetah-v5`, or `package:Name-v0` for envs that a package registers on import."""
    kwargs: dict[str, JsonValue] = {}
    """Further arguments of `gymnasium.make`, or of the vector env's own class with `vectorization_mode:
    vector_entry_point`, for example {forward_reward_weight: 2.0}."""
    vectorization_mode: Literal["sync", "async", "vector_entry_point"] | None = None
    """Who steps the copies, as in `gymnasium.make_vec`. null: this project, one after another; async: one process for
    each; sync: Gymnasium's own loop; vector_entry_point: the class that is registered for the id, all at once."""
    vector_kwargs: dict[str, JsonValue] = {}
    """sync, async: further arguments of Gymnasium's vector env, for example {context: spawn}."""
    max_steps: int | None = Field(None, ge=1)
    """Control steps after which an episode is truncated; null keeps the limit the id was registered with."""
    success_key: str | None = None
    """Entry of `info` that says the goal is reached; null looks for `success` and `is_success` in a first step."""
    resumable: bool = True
    """Remember each episode's actions, so that its state can be restored by replaying them; false saves the memory."""
    render: bool = False
    """Offer the camera `default` (render_mode rgb_array); needs what the env's own drawing needs."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> Config:
        if self.vector_kwargs and self.vectorization_mode not in ("sync", "async"):
            raise ValueError(
                f"vector_kwargs ({', '.join(self.vector_kwargs)}) does nothing with vectorization_mode "
                f"({self.vectorization_mode or 'null'}): set vectorization_mode: sync or async, or give the arguments "
                "of the env's own class in kwargs"
            )
        return self


def build(
    config: Config, *, num_envs: int, device: torch.device, split: Split, seed: int
) -> GymnasiumEnv | VectorizedEnv:
    """Build copies of a Gymnasium env.

    Args:
        config: What to make.
        num_envs: Copies B.
        device: Where its tensors live; the env itself runs on the CPU.
        split: Not needed here: training and evaluation differ by the seeds that `reset` is given.
        seed: Not needed here either: every episode is seeded by `reset`.

    Raises:
        NotFoundError: No such id; names the nearest.
        MissingExtraError: The id needs a package that is not installed.
        CapabilityError: A space that is not understood, or a vector env that does not keep to Gymnasium's interface.
        ConfigError: `gymnasium.make` or `gymnasium.make_vec` refused the arguments.
    """
    told: set[str] = set()
    made: list[gymnasium.Env[Any, Any]] = []
    env: GymnasiumEnv | VectorizedEnv
    try:
        if config.vectorization_mode is None:
            for _ in range(num_envs):
                made.append(make_single(config, told))
            env = GymnasiumEnv(config, made, device)
        else:
            # Of one copy in this process, what is wrong is easier told than of many in others.
            if config.vectorization_mode != "vector_entry_point":
                made.append(make_single(config, told))
            env = _vectorized(config, num_envs, device, made[0] if made else None, told)
            close(made)
    except BaseException:
        close(made)
        raise
    for message in sorted(told):
        log.info("env gymnasium: '%s': %s", config.id, message)
    return env


def _vectorized(
    config: Config, num_envs: int, device: torch.device, single: gymnasium.Env[Any, Any] | None, told: set[str]
) -> VectorizedEnv:
    vector = make_vector(config, num_envs, told)
    try:
        return VectorizedEnv(config, vector, vector if single is None else single, num_envs, device)
    except BaseException:
        vector.close()
        raise


def close(envs: list[gymnasium.Env[Any, Any]]) -> None:
    """Close every one."""
    for env in envs:
        env.close()
