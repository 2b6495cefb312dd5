"""One file per reward model: how far has each episode come?

A reward model looks at whole episodes (pictures, vectors, instructions) and answers with the progress of every state,
in [0, 1]. What becomes of the answer is written once, in embodied_rl/shaping.py. A new model is one file with `Config`
and `build`, here or anywhere: `reward.type` takes a path (docs/rewards.md has one that runs).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from pydantic import Field
from torch import Tensor

from embodied_rl.section import Section
from embodied_rl.types import Obs, State


class RewardConfig(Section):
    """What every reward model has: how its answers become reward."""

    type: str
    use: Literal["potential", "outcome", "alone"] = "potential"
    """potential: pays the change of progress, discount * progress' - progress, which leaves the best policy the best;
    outcome: pays failed episodes their last progress, which does not, but tells failures apart; alone: pays every
    episode its last progress in place of the env's reward, which nothing learns from then."""
    coef: float = Field(1.0, gt=0)
    """Reward per unit of progress; with outcome keep it below what the env pays for success."""

    @property
    def needs_groups(self) -> bool:
        """Whether copies must share starts."""
        return False

    @property
    def needs_whole_episodes(self) -> bool:
        """Whether an episode must lie within one rollout."""
        return self.use != "potential"

    @property
    def needs_results(self) -> bool:
        """Whether the env must say what each episode came to (`Step.result`)."""
        return False


@dataclass(frozen=True)
class Episode:
    """What a rollout holds of one episode: L decisions, and the L + 1 states before, between and after them.

    Example: two decisions of a camera policy, solved by the second: obs {"camera": [3, 64, 64, 3] uint8, "instruction":
    [3, 12] int64}, success [False, True], terminated True. With `collect.mode: stream` the beginning may lie in an
    earlier rollout and the end in a later one.
    """

    obs: Obs
    """name -> [L + 1, ...], entries that are constant within an episode repeated."""
    success: Tensor | None
    """[L] bool, the goal has held by the end of the decision; None when the env has no success."""
    terminated: bool
    """The last state is the task's own end."""
    truncated: bool
    """The last state is where the episode was cut; neither: it goes on."""
    task: int
    """Index into `EnvSpec.tasks`."""
    group: int
    """Episodes of one rollout that share their start share it."""
    copy: int
    """Column of the rollout."""
    first: int
    """Row of its first decision."""
    units: Tensor | None = None
    """[L, A, ...] what the policy emitted."""
    mask: Tensor | None = None
    """[L, A] bool, units that count."""
    result: int | None = None
    """What it came to in the end (`Step.result`), -1 for nothing; None when the env does not say."""
    instruction: str | None = None
    """What was asked, in words, as it was when the episode (or the rollout) began; None when the env has no
    `instructions()`."""

    def __len__(self) -> int:
        """Number of decisions L."""
        return len(next(iter(self.obs.values()))) - 1

    @property
    def succeeded(self) -> bool:
        """Whether the goal held at some step."""
        return self.success is not None and bool(self.success.any())

    @property
    def failed(self) -> bool:
        """Whether it has ended without the goal ever holding."""
        return (self.terminated or self.truncated) and not self.succeeded


class RewardModel:
    """Base class of reward models; `judge` is all that a model without memory needs."""

    def judge(self, episodes: Sequence[Episode]) -> Sequence[Tensor | None]:
        """Say how far each episode had come in each of its states.

        With `use: potential` the answer must follow from the states and from earlier rollouts only: a potential that
        looks at what else happened in this one would depend on the actions it is to judge.

        Args:
            episodes: All of one rollout.

        Returns:
            progress: For each episode [L + 1] in [0, 1], or None where the model cannot say; no reward is paid then.
        """
        raise NotImplementedError

    def metrics(self) -> dict[str, tuple[float, float]]:
        """Name -> (sum, count) of the latest `judge`."""
        return {}

    def state_dict(self) -> State:
        """What an exact resume needs."""
        return {}

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`."""
