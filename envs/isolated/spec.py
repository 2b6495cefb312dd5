"""What a simulator says of itself, in the engine's words."""

from __future__ import annotations

from typing import Any

import torch

from embodied_rl.conformance import read_convention
from embodied_rl.envs._words import word_row
from embodied_rl.types import ActionSpec, EnvSpec, TensorSpec

INSTRUCTION = "instruction"
"""Entry of the observation that holds the word ids."""


def env_spec(native: dict[str, Any], num_envs: int, where: str) -> EnvSpec:
    """Turn a simulator's own description into the engine's; ConfigError where its convention cannot be."""
    observation = {
        name: TensorSpec(
            tuple(one["shape"]), getattr(torch, one["dtype"]), one["low"], one["high"], one["constant"], one["meaning"]
        )
        for name, one in native["observation"].items()
    }
    if words := native["words"]:
        observation[INSTRUCTION] = word_row(words, native["sentences"])
    action, said = native["action"], native["action"]["convention"]
    convention = None if said is None else read_convention(where, said, action["size"])
    return EnvSpec(
        observation=observation,
        action=ActionSpec(action["kind"], action["size"], tuple(action["names"]), convention=convention),
        num_envs=num_envs,
        max_steps=native["max_steps"],
        tasks=tuple(native["tasks"]),
        seedable=native["repeatable"],
        has_state=native["repeatable"],
        has_success=native["success"],
        cameras=tuple(native["cameras"]),
        control_hz=native["control_hz"],
        on_demand=native["on_demand"],
    )
