"""A toy for action chunks: say the two numbers that the state shows, beside a picture that tells nothing.

Each episode has a target in [-1, 1]^2. A control step is right when the action is within `tolerance` of it; two right
steps in a row solve the task. With `chunk` 4 an episode is at most 6 decisions. It is the smallest task on which a
vision-language-action policy can be trained from sparse success, and the one that TorchRL's recipe for action-token
GRPO uses (ToyVLAEnv: 2-D action, 16 x 16 picture, chunk 4, tolerance 0.35).
"""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field
from torch import Tensor

from embodied_rl.errors import CheckpointError, NotFoundError
from embodied_rl.section import Section
from embodied_rl.seeding import numpy_rng
from embodied_rl.types import ActionSpec, EnvSpec, Obs, Split, State, Step, TensorSpec

SIZE = 16
"""Rows and columns of the picture."""
IN_A_ROW = 2
"""Right control steps that solve the task."""


class Config(Section):
    """The toy target."""

    type: Literal["target"] = "target"
    tolerance: float = Field(0.35, gt=0)
    """Largest distance of a right action from the target."""
    max_steps: int = Field(24, ge=IN_A_ROW)
    """Control steps after which an episode is truncated."""


class TargetEnv:
    """See the module docstring and `embodied_rl.types.Env`; the reward is 1 in the step that solves the task."""

    def __init__(self, config: Config, num_envs: int, device: torch.device) -> None:
        """Every copy at a target of zero; call `reset`."""
        self.config, self.device = config, device
        self.spec = EnvSpec(
            observation={
                "picture": TensorSpec((SIZE, SIZE, 3), torch.uint8, low=0, high=255, constant=True, meaning="noise"),
                "state": TensorSpec((2,), low=-1, high=1, constant=True, meaning="the target"),
            },
            action=ActionSpec("continuous", 2, ("x", "y")),
            num_envs=num_envs,
            max_steps=config.max_steps,
            tasks=("target",),
            seedable=True,
            has_state=True,
            has_success=True,
        )
        self._target = torch.zeros(num_envs, 2, device=device)
        self._picture = torch.zeros(num_envs, SIZE, SIZE, 3, dtype=torch.uint8, device=device)
        self._right = torch.zeros(num_envs, dtype=torch.int64, device=device)
        self._steps = torch.zeros(num_envs, dtype=torch.int64, device=device)

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Draw targets and pictures for the masked copies."""
        for row in mask.nonzero().flatten().tolist():
            rng = numpy_rng(int(seeds[row]), "target")
            self._target[row] = torch.from_numpy(rng.uniform(-1, 1, 2)).to(self._target)
            self._picture[row] = torch.from_numpy(rng.integers(0, 256, (SIZE, SIZE, 3))).to(self._picture)
        self._right[mask] = 0
        self._steps[mask] = 0
        return self._look()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Judge one action of every copy; copies that are not active go on as well."""
        self.spec.action.check(action, self.spec.num_envs, self.device, "target")
        near = torch.linalg.vector_norm(action.clamp(-1, 1) - self._target, dim=1) < self.config.tolerance
        self._right = torch.where(near, self._right + 1, torch.zeros_like(self._right))
        self._steps = self._steps + 1
        success = self._right >= IN_A_ROW
        truncated = (self._steps >= self.config.max_steps) & ~success
        return Step(self._look(), success.float(), success, truncated, success.clone())

    def get_state(self) -> State:
        """Targets, pictures and counters."""
        return {name: getattr(self, f"_{name}").clone() for name in ("target", "picture", "right", "steps")}

    def set_state(self, state: State) -> Obs:
        """Restore `get_state`'s result.

        Raises:
            CheckpointError: It is of another number of copies.
        """
        if len(state["target"]) != self.spec.num_envs:
            raise CheckpointError(
                f"target state: found {len(state['target'])} copies, expected {self.spec.num_envs}; build the env as "
                "the state's run did"
            )
        for name in ("target", "picture", "right", "steps"):
            getattr(self, f"_{name}").copy_(state[name])
        return self._look()

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        """There is no camera."""
        raise NotFoundError(f"camera '{camera}' does not exist: the toy target draws no pictures")

    def manifest(self) -> dict[str, float]:
        """What results depend on."""
        return {"tolerance": self.config.tolerance}

    def close(self) -> None:
        """Nothing to free."""

    def _look(self) -> Obs:
        return {"picture": self._picture.clone(), "state": self._target.clone()}


def build(config: Config, *, num_envs: int, device: torch.device, split: Split, seed: int) -> TargetEnv:
    """Make an env; `split` and `seed` are not needed, because each start seed says all."""
    return TargetEnv(config, num_envs, device)
