"""Which task a new training episode gets: all in turn, or more of those that are neither solved nor out of reach."""

from __future__ import annotations

from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from embodied_rl.errors import CapabilityError
from embodied_rl.metrics import Partials
from embodied_rl.section import Section
from embodied_rl.seeding import numpy_rng
from embodied_rl.types import EnvSpec, State


class Curriculum(Section):
    """How training tasks are chosen; evaluation always plays all of them in turn."""

    kind: Literal["none", "success"] = "none"
    """none: one task after the other; success: the more often, the nearer a task's success rate is to one half."""
    floor: float = Field(0.05, gt=0)
    """Added to p (1 - p), which is 0.25 at most: larger values treat tasks more alike, and none is ever given up."""
    window: int = Field(100, ge=1)
    """Episodes of a task after which its running success rate has moved 63 % of the way."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> Curriculum:
        for name in ("floor", "window"):
            value = getattr(self, name)
            if self.kind == "none" and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} ({value}) does nothing with kind (none): remove it, or set kind: success")
        return self


class TaskSampler:
    """A `Curriculum` with its running success rates, which are part of a checkpoint."""

    def __init__(self, config: Curriculum, env: EnvSpec, playable: Tensor | None = None) -> None:
        """Begin with a success rate of one half for every task, so that each is tried.

        Args:
            config: What to prefer.
            env: Whose tasks.
            playable: [groups, tasks] bool, the tasks that each group of copies can play; None: all can play all.

        Raises:
            CapabilityError: A curriculum over one task, or without a notion of success.
        """
        self.config, self.tasks, self.playable = config, env.tasks, playable
        self.in_turn = config.kind == "none" and env.task_weights is None
        self.weights = torch.tensor(env.task_weights or (1.0,) * len(env.tasks), dtype=torch.float64)
        self.success = torch.full((len(env.tasks),), 0.5, dtype=torch.float64)
        if config.kind == "success" and len(env.tasks) < 2:
            raise CapabilityError(
                f"collect.curriculum.kind success chooses among tasks, and the env has only '{env.tasks[0]}': give it "
                "several (env.tasks), or set collect.curriculum.kind: none"
            )
        if config.kind == "success" and not env.has_success:
            raise CapabilityError(
                "collect.curriculum.kind success goes by success rates, and the env does not tell success: set "
                "collect.curriculum.kind: none"
            )

    def probabilities(self) -> Tensor:
        """Probability of each task: w (p (1 - p) + floor) / sum over tasks, w its weight and p its success rate.

        Without a curriculum w / sum over tasks. p (1 - p) is the variance of the success of one episode, and so the
        expected squared advantage within a group.

        Returns:
            probability: [tasks] float64.
        """
        weight = self.weights
        if self.config.kind == "success":
            weight = weight * (self.success * (1 - self.success) + self.config.floor)
        return weight / weight.sum()

    def choose(self, group: Tensor, index: Tensor, seed: Tensor) -> Tensor:
        """Tasks of new episodes.

        Args:
            group: [n] int64 group of each copy.
            index: [n] int64 how many episodes the group has begun before.
            seed: [n] int64 their start seeds; equal seeds get equal tasks.

        Returns:
            task: [n] int64, a function of the arguments and the success rates alone.
        """
        if self.in_turn:
            if self.playable is None:
                return (group + index) % len(self.tasks)
            able = self.playable[group]
            turn = (group + index) % able.sum(1)
            return (able & (able.cumsum(1) == turn[:, None] + 1)).int().argmax(1)
        u = torch.tensor([numpy_rng(s, "task").random() for s in seed.tolist()], dtype=torch.float64)
        border = self._by_group().cumsum(1)
        border = border[group] if self.playable is not None else border.expand(len(u), -1)
        # The first task whose border lies above u; rounding must not lead beyond the last one that has a share.
        return torch.minimum((border <= u[:, None]).sum(1), (border < border[:, -1:]).sum(1))

    def _by_group(self) -> Tensor:
        """[groups, tasks] probability of each task in each group; a single row where all groups are alike."""
        if self.playable is None:
            return self.probabilities()[None]
        share = self.probabilities() * self.playable
        return share / share.sum(1, keepdim=True)

    def observe(self, finished: dict[str, Tensor]) -> None:
        """Move the success rates with the episodes that ended in a rollout (`Rollout.finished`).

        p <- k p + (1 - k) s / n with k = (1 - 1 / window) ** n, for a task with s successes in n episodes: their order
        does not matter.
        """
        if self.config.kind == "none" or not finished:
            return
        task, success = finished["task"], finished["success_once"].double()
        n = torch.bincount(task, minlength=len(self.tasks)).double()
        rate = torch.zeros_like(n).index_add_(0, task, success) / n.clamp(min=1)
        keep = (1 - 1 / self.config.window) ** n
        self.success = keep * self.success + (1 - keep) * rate

    def metrics(self) -> Partials:
        """With a curriculum, the probability of each task in the next rollout."""
        out = Partials()
        if self.config.kind != "none":
            for task, p in zip(self.tasks, self._by_group().mean(0).tolist(), strict=True):
                out.last(f"rollout/task_probability/{task}", p)
        return out

    def state_dict(self) -> State:
        """The success rates."""
        return {"success": self.success.clone()}

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`."""
        self.success.copy_(state["success"])
