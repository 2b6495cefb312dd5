"""Which start a new training episode gets: all in turn, or more of those that are neither solved nor out of reach.

Success rates belong to tasks, or, where training plays a limited number of starts, to each of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from pydantic import Field, model_validator
from torch import Tensor

from embodied_rl.errors import CapabilityError
from embodied_rl.metrics import Partials
from embodied_rl.section import Section
from embodied_rl.seeding import numpy_rng, start_seeds
from embodied_rl.types import Env, EnvSpec, State

POOL = -2
"""Stream of the seeds of a limited number of starts; groups have streams from 0 on."""


class Curriculum(Section):
    """How training tasks are chosen; evaluation always plays all of them in turn."""

    kind: Literal["none", "success"] = "none"
    """none: one task after the other; success: the more often, the nearer a task's success rate is to one half."""
    floor: float = Field(0.05, gt=0)
    """Added to p (1 - p), which is 0.25 at most: larger values treat tasks more alike, and none is ever given up."""
    window: int = Field(100, ge=1)
    """Episodes of a task (of a start, with `starts`) after which its running success rate has moved 63 % of the way."""
    starts: int | None = Field(None, ge=2)
    """Different starts (layouts, questions) that training plays again and again: success rates are then kept for each
    start, and not for each task; null: endless ones, none twice."""

    @model_validator(mode="after")
    def _nothing_idle(self) -> Curriculum:
        for name, used in (("floor", self.kind == "success"), ("window", self.kind == "success" or self.starts)):
            value = getattr(self, name)
            if not used and value != type(self).model_fields[name].default:
                raise ValueError(f"{name} ({value}) does nothing with kind (none): remove it, or set kind: success")
        return self


class TaskSampler:
    """A `Curriculum` with its running success rates, which are part of a checkpoint."""

    def __init__(self, config: Curriculum, env: EnvSpec, run_seed: int = 0, playable: Tensor | None = None) -> None:
        """Begin with a success rate of one half for every task, so that each is tried.

        Args:
            config: What to prefer.
            env: What there is to choose from.
            run_seed: Seed of the starts.
            playable: [groups, tasks] bool, the tasks that each group of copies can play; None: all can play all.

        Raises:
            CapabilityError: A curriculum over one task, or without a notion of success.
        """
        self.config, self.tasks, self.run_seed, self.playable = config, env.tasks, run_seed, playable
        self.in_turn = config.kind == "none" and env.task_weights is None
        self.learns = config.kind == "success"
        self.weights = torch.tensor(env.task_weights or (1.0,) * len(env.tasks), dtype=torch.float64)
        self.success = torch.full((len(env.tasks),), 0.5, dtype=torch.float64)
        if config.kind == "success" and config.starts is None and len(env.tasks) < 2:
            raise CapabilityError(
                f"collect.curriculum.kind success chooses among tasks, and the env has only '{env.tasks[0]}': give it "
                "several (env.tasks), set collect.curriculum.starts to choose among starts, or kind: none"
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

    def begin(self, group: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """Seeds and tasks of new episodes.

        Args:
            group: [n] int64 group of each copy; equal groups get equal starts.
            index: [n] int64 how many episodes the group has begun before.

        Returns:
            seed: [n] int64.
            task: [n] int64.
        """
        seed = start_seeds(self.run_seed, "train", group, index)
        return seed, self.choose(group, index, seed)

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
        if not self.learns or not finished:
            return
        task, success = finished["task"], finished["success_once"].double()
        n = torch.bincount(task, minlength=len(self.success)).double()
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


class StartPool(TaskSampler):
    """A curriculum over a limited number of starts, each with a success rate of its own."""

    def __init__(self, config: Curriculum, env: EnvSpec, run_seed: int = 0, playable: Tensor | None = None) -> None:
        """Draw the starts; they depend on the run seed alone.

        Raises:
            CapabilityError: The env cannot start the same episode twice, or has no success to go by.
        """
        super().__init__(config, env, run_seed, playable)
        assert config.starts is not None
        if not env.seedable:
            raise CapabilityError(
                f"collect.curriculum.starts ({config.starts}) plays the same starts again, and this env cannot"
                f"{env.because}: set collect.curriculum.starts: null"
            )
        index = torch.arange(config.starts)
        self.seed = start_seeds(run_seed, "train", torch.full_like(index, POOL), index)
        self.in_turn = env.task_weights is None
        self.task = self.choose(index, torch.zeros_like(index), self.seed)
        self.weights = torch.ones(config.starts, dtype=torch.float64)
        self.success = torch.full((config.starts,), 0.5, dtype=torch.float64)
        self.learns = env.has_success
        self.drawn = 0
        self._sorted, self._order = self.seed.sort()

    def begin(self, group: Tensor, index: Tensor) -> tuple[Tensor, Tensor]:
        """See `TaskSampler.begin`; groups of one call get different starts as long as there are enough of them."""
        groups, member = torch.unique(group, return_inverse=True)
        chosen = self._next(len(groups))[member]
        return self.seed[chosen], self.task[chosen]

    def _next(self, count: int) -> Tensor:
        """[count] starts: without a curriculum in a new random order after each pass over all of them."""
        n, first = len(self.seed), self.drawn
        self.drawn += count
        if self.config.kind == "success":
            rng = numpy_rng(self.run_seed, f"starts/{first}")
            return torch.from_numpy(rng.choice(n, size=count, replace=False, p=self.probabilities().numpy()))
        places = range(first, first + count)
        orders = {k: numpy_rng(self.run_seed, f"starts/{k}").permutation(n) for k in {i // n for i in places}}
        return torch.tensor([int(orders[i // n][i % n]) for i in places])

    def rate(self, seed: Tensor) -> Tensor:
        """[n] float64 running success rates of the starts with these seeds [n]."""
        return self.success[self._find(seed)]

    def _find(self, seed: Tensor) -> Tensor:
        return self._order[torch.searchsorted(self._sorted, seed)]

    def observe(self, finished: dict[str, Tensor]) -> None:
        """See `TaskSampler.observe`; episodes belong to their starts here."""
        if finished:
            super().observe(finished | {"task": self._find(finished["seed"])})

    def metrics(self) -> Partials:
        """The mean success rate over all starts, also those that were not played this time."""
        out = Partials()
        if self.learns:
            out.last("rollout/start_success_mean", float(self.success.mean()))
        return out

    def state_dict(self) -> State:
        """The success rates and how many starts were drawn."""
        return super().state_dict() | {"drawn": self.drawn}

    def load_state_dict(self, state: State) -> None:
        """Restore `state_dict`."""
        super().load_state_dict(state)
        self.drawn = state["drawn"]


def make_sampler(
    config: Curriculum, envs: Sequence[Env], group_size: int, run_seed: int, *, budgeted: bool
) -> TaskSampler:
    """What chooses the starts of a batch.

    Args:
        config: The recipe's.
        envs: Parts of the batch, of equal spec.
        group_size: Copies that share each start.
        run_seed: Seed of the starts.
        budgeted: Whether groups are of different sizes (`collect.budget`).

    Raises:
        CapabilityError: They cannot play what is asked for.
    """
    spec, playable = envs[0].spec, _playable_by_group(envs, group_size)
    if budgeted and not spec.has_success:
        raise CapabilityError(
            "collect.budget goes by success rates, and the env does not tell success: set collect.budget: null"
        )
    if playable is not None and (config.starts is not None or budgeted):
        what = "curriculum.starts" if config.starts is not None else "budget"
        raise CapabilityError(
            f"collect.{what} gives any start to any copy, and these copies can only play the tasks of their own part "
            f"of the mixture: set collect.{what}: null, or leave out the parts' copies"
        )
    return (TaskSampler if config.starts is None else StartPool)(config, spec, run_seed, playable)


def _playable_by_group(envs: Sequence[Env], group_size: int) -> Tensor | None:
    """[groups, tasks] bool, which tasks each group can play; None where all can play all.

    Raises:
        CapabilityError: Copies of one group cannot play the same tasks.
    """
    tables = [env.spec.playable() for env in envs]
    known = [table for table in tables if table is not None]
    if not known:
        return None
    able = torch.cat(known)
    groups = able[::group_size]
    if not torch.equal(groups.repeat_interleave(group_size, 0)[: len(able)], able):
        told = " and ".join(str(copies) for copies, _ in envs[0].spec.blocks or ())
        raise CapabilityError(
            f"collect.group_size {group_size} would put copies of different parts into one group: the parts have "
            f"{told} copies; make each a multiple of {group_size}"
        )
    return groups
