"""What an episode achieved that it was not asked for: another object that was touched, pushed to the goal or lifted.

The simulator knows it as it knows success, by the same tests. Said in words it turns a failure at one task into a
solved episode of another, from which instructions can be learned (see `embodied_rl.self_imitation`).
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embodied_rl.envs.tabletop.instructions import Name, encode
from embodied_rl.envs.tabletop.layout import rephrase
from embodied_rl.envs.tabletop.scene import SHAPES
from embodied_rl.types import Obs, State

if TYPE_CHECKING:
    from collections.abc import Callable

    from embodied_rl.envs.tabletop.observe import Episode
    from embodied_rl.envs.tabletop.tasks import Task, View


class Achieved:
    """Watches every control step; one deed is kept per episode.

    The episode's own task done to another object counts most; else, where reaching is a task of the env, the first
    object that was touched.
    """

    def __init__(self, tasks: tuple[Task, ...], names: tuple[Name, ...], episode: Episode) -> None:
        """Nothing has been achieved."""
        self._tasks, self._names, self._episode = tasks, names, episode
        self._reach = next((i for i, task in enumerate(tasks) if task.name == "reach"), None)
        self._since = torch.zeros_like(episode.task)
        self._task, self._object = torch.zeros_like(self._since), torch.zeros_like(self._since)

    def begin(self, mask: Tensor) -> None:
        """Forget the episodes of the masked copies [B]."""
        self._since.masked_fill_(mask, 0)

    def look(self, view: Callable[[], View], steps: Tensor, running: Tensor) -> None:
        """Note what holds now.

        Args:
            view: Of all copies, for the object that `episode.a` names.
            steps: [B] int64 control steps since the start.
            running: [B] bool, copies that have just moved.
        """
        episode, rows = self._episode, torch.arange(len(steps), device=steps.device)
        meant = episode.a.clone()
        for slot in range(len(SHAPES)):
            episode.a.fill_(slot)
            seen = view()
            done = torch.stack([task.success(seen) for task in self._tasks])
            other = running & (meant != slot)
            if self._reach is not None:
                touched = done[self._reach] & (self._since == 0) & (other | (running & (episode.task != self._reach)))
                self._note(touched, steps, torch.full_like(steps, self._reach), slot)
            mine = done[episode.task, rows] & other & ((self._since == 0) | (self._task != episode.task))
            self._note(mine, steps, episode.task, slot)
        episode.a.copy_(meant)

    def _note(self, where: Tensor, steps: Tensor, task: Tensor, slot: int) -> None:
        self._since = torch.where(where, steps, self._since)
        self._task = torch.where(where, task, self._task)
        self._object = torch.where(where, slot, self._object)

    def told(self, copies: Tensor) -> tuple[Tensor, Obs]:
        """See `embodied_rl.types.Relabelling.achieved`."""
        episode, since = self._episode, self._since * copies
        words = torch.zeros_like(episode.words)
        for i in since.nonzero()[:, 0].tolist():
            task = self._tasks[int(self._task[i])]
            relation = int(episode.relation[i]) if self._task[i] == episode.task[i] else 0
            seed, step, a, b = (int(x[i]) for x in (episode.seed, since, self._object, episode.b))
            text = rephrase(task, seed, step, a, b, relation, episode.colors[i].cpu().numpy(), self._names)
            words[i] = torch.tensor(encode(text), device=words.device)
        return since, {"instruction": words}

    def get_state(self) -> State:
        """What has been achieved so far."""
        return {"since": self._since.clone(), "task": self._task.clone(), "object": self._object.clone()}

    def set_state(self, state: State | None) -> None:
        """Restore `get_state`'s result; None, of an env that was not watched, knows nothing."""
        if state is None:
            self._since.zero_()
            return
        moved = (state[name].to(self._since.device).clone() for name in ("since", "task", "object"))
        self._since, self._task, self._object = moved
