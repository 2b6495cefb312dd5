"""The mlp, which says that its first weights are worth measuring."""

from __future__ import annotations

from typing import Any

from embodied_rl import registry

mlp = registry.load("policy", "mlp")


class Config(mlp.Config):
    """Settings of the mlp."""

    type: str = "tests/toys/pretrained.py"


def build(config: Config, **given: Any) -> Any:
    policy = mlp.build(config, **given)
    policy.pretrained = True
    return policy
