"""What the engine must know of an env before its first step: the shapes of what it shows and of what it takes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from embodied_rl.convention import Convention
from embodied_rl.errors import ConfigError, ShapeError

PAD = -1
"""Fills rows of token ids after their end, in observations, actions and units."""

Obs = dict[str, Tensor]
"""What a policy sees: name -> [B, ...]. For example {"state": [64, 52] float32, "instruction": [64, 12] int64}."""


@dataclass(frozen=True)
class TensorSpec:
    """One entry of the observation, without the batch axis.

    Example: `TensorSpec((12,), torch.int64, low=0, high=255, constant=True, meaning="instruction word ids")`.
    """

    shape: tuple[int, ...]
    dtype: torch.dtype = torch.float32
    low: float | None = None
    """Smallest value that can occur, or None when unbounded."""
    high: float | None = None
    """Largest value that can occur, or None when unbounded."""
    constant: bool = False
    """True when the value does not change within an episode: a rollout stores it once per episode."""
    meaning: str = ""
    """One phrase with the unit."""
    privileged: bool = False
    """Known in simulation only: for critics and reward models. What chooses actions must work without it."""
    vocabulary: str = ""
    """Ids: whoever names the same vocabulary means the same by an id, and no word by 0, which ends short rows; ""
    where the env does not say."""
    texts: tuple[tuple[int, str], ...] = ()
    """Ids of words: (id, word) of those that the env can tell, as (412, "push"); 0 is then padding. Two words with one
    id are left out. A policy with a pretrained language model reads them as that model does."""


@dataclass(frozen=True)
class ActionSpec:
    """What one control step takes: `size` numbers in [-1, 1], one integer below `size`, or a row of such integers.

    Example: the arm is `ActionSpec("continuous", 7, ("dx", "dy", "dz", "drx", "dry", "drz", "gripper"))`; a reply of at
    most 32 tokens is `ActionSpec("tokens", 49152, length=32)`, where "hello" may be [28120, 2, PAD, PAD, ...].
    """

    kind: Literal["continuous", "discrete", "tokens"]
    size: int
    names: tuple[str, ...] = ()
    length: int = 1
    """tokens: the longest row; shorter ones end in PAD."""
    convention: Convention | None = None
    """continuous: what the numbers mean to a robot; None where the env does not say."""

    def __post_init__(self) -> None:
        """Refuse a convention that these numbers cannot have."""
        if self.convention is not None and self.kind != "continuous":
            raise ConfigError(f"a {self.kind} action has no convention ({self.convention.told()}): leave it out")
        if self.convention is not None and (misfit := self.convention.misfit(self.size)):
            raise ConfigError(f"action {list(self.names) or ''}: {misfit}; correct one of them")

    @property
    def shape(self) -> tuple[int, ...]:
        """Of one control step's action without the batch axis: `(size,)`, discrete `()`, tokens `(length,)`."""
        if self.kind == "tokens":
            return (self.length,)
        return (self.size,) if self.kind == "continuous" else ()

    @property
    def dtype(self) -> torch.dtype:
        """float32 for continuous actions, int64 for the others."""
        return torch.float32 if self.kind == "continuous" else torch.int64

    def check(self, action: Tensor, num_envs: int, device: torch.device, where: str) -> None:
        """Refuse what is not an action for each copy; an env calls it first in `step`.

        Args:
            action: Anything that was given to `step`.
            num_envs: Copies B.
            device: The env's.
            where: Name of the env, for the message.

        Raises:
            ShapeError: Another shape, type or device, or a number that is no action; says which copies.
        """
        wanted = (num_envs, *self.shape)
        if tuple(action.shape) != wanted or action.dtype != self.dtype or action.device.type != device.type:
            raise ShapeError(
                f"{where} action: found shape {list(action.shape)}, {action.dtype} on {action.device}, expected "
                f"{list(wanted)}, {self.dtype} on {device}"
            )
        if self.kind == "continuous":
            # One number tells; where it is not finite because it overflowed, the look below finds nothing wrong.
            if math.isfinite(float(action.sum())):
                return
            wrong, what = ~torch.isfinite(action).all(dim=1), "not finite"
            expected = "numbers in [-1, 1]; the policy that made them has diverged"
        elif self.kind == "discrete":
            wrong, what, expected = (action < 0) | (action >= self.size), "no action", f"0 to {self.size - 1}"
        else:
            pad = action == PAD
            wrong = ((action >= self.size) | (action < PAD)).any(1) | (pad[:, :-1] & ~pad[:, 1:]).any(1)
            what, expected = "no row of tokens", f"ids 0 to {self.size - 1}, then only {PAD}"
        if bool(wrong.any()):
            bad = wrong.nonzero().flatten().tolist()
            more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
            raise ShapeError(f"{where} action: {what} in copies {bad[:8]}{more}, expected {expected}")


@dataclass(frozen=True)
class Vocabulary:
    """Whose token ids an env's observations and actions are; under other ids the same words would be nonsense.

    Example: `Vocabulary("models/smollm2", 49152, "9ca9acdd...", end=(2,))`.
    """

    name: str
    """Where it comes from, for messages."""
    size: int
    """V; ids are below it."""
    fingerprint: str
    """SHA-256 (hex) over what maps text to ids: equal exactly when both sides speak the same language."""
    end: tuple[int, ...] = ()
    """Ids that end a reply."""


@dataclass(frozen=True)
class EnvSpec:
    """Everything the engine needs to know of an env before its first step."""

    observation: dict[str, TensorSpec]
    action: ActionSpec
    num_envs: int
    """Number of copies B."""
    max_steps: int | None
    """Control steps after which an episode is truncated; None when the env has no limit of its own."""
    tasks: tuple[str, ...]
    """Names of the tasks; `Step.task` holds indices into it. One name for a single-task env."""
    seedable: bool
    """`reset` starts the same episode again for the same seed and task: needed for groups and fixed eval layouts."""
    has_state: bool
    """`get_state` / `set_state` continue bit for bit: needed for an exact resume."""
    has_success: bool = False
    """`Step.success` is meaningful."""
    has_results: bool = False
    """`Step.result` says what an episode came to."""
    cameras: tuple[str, ...] = ()
    """Camera names accepted by `render`; empty when the env draws no pictures."""
    control_hz: float | None = None
    """Control steps per second of simulated time."""
    restarts_itself: bool = False
    """Its copies begin their next episode when the simulator does, not when `reset` asks for it, so none can wait while
    others move on. Until it has begun, `reset` and `step` show some finite observation, and `Step.starting` says so."""
    reason: str = ""
    """Why it is not seedable or has no state, for messages."""
    on_demand: bool = False
    """`Step.obs` is empty and `observe` gives the observation: for envs whose pictures cost more than a control step.
    Copies that are not active in `step` then stay exactly where they stopped."""
    vocabulary: Vocabulary | None = None
    """Of the token ids in observations and actions; a policy that speaks another one is refused."""
    task_weights: tuple[float, ...] | None = None
    """How often training starts each task, relative to the others; None for all alike, in turn."""
    blocks: tuple[tuple[int, tuple[int, ...]], ...] | None = None
    """Consecutive copies that can play some tasks only, as (copies, indices of their tasks); None: each plays all.

    Example: `((2, (0,)), (6, (1, 2)))`: copies 0 and 1 play task 0, copies 2 to 7 play tasks 1 and 2.
    """

    def playable(self) -> Tensor | None:
        """[B, tasks] bool on the CPU: which tasks each copy can play; None where each can play all."""
        if self.blocks is None:
            return None
        able = torch.zeros(self.num_envs, len(self.tasks), dtype=torch.bool)
        first = 0
        for copies, tasks in self.blocks:
            able[first : first + copies, list(tasks)] = True
            first += copies
        return able

    @property
    def because(self) -> str:
        """The reason in brackets after a blank, or nothing; for messages."""
        return f" ({self.reason})" if self.reason else ""

    @property
    def seen(self) -> dict[str, TensorSpec]:
        """What actions may be chosen by: the observation without its privileged entries."""
        return {name: entry for name, entry in self.observation.items() if not entry.privileged}
