"""Several envpool ids in one batch: the tasks of one env, each with its instruction."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.envs._spaces import Array
from embodied_rl.envs.envpool.layout import MAX_WORDS, Given, Layout
from embodied_rl.envs.envpool.pool import Pooled, everyone_or
from embodied_rl.types import Obs, Step

Make = Callable[[Layout, int, int], Any]
"""(layout, copies, how many copies of this id there are already) -> a pool of it."""
NOBODY = np.zeros(0, np.int32)


@dataclass
class Block:
    """One pool, and which copies of the batch play in it."""

    layout: Layout
    pool: Any
    copies: Array
    """[n] copies that play here now."""
    rows: Array
    """[n] int32 which row of the pool each of them has."""
    begun: bool = False
    """Whether its rows have been reset."""


class EnvpoolTasks(Pooled):
    """See `embodied_rl.types.Env`; besides, `step` can be split into `send` and `recv`.

    A copy is lent a row of a pool of its task at each reset, and gives it back at the next. A task's first pool has its
    even share of the copies, and another of that size is made when more ask for it than there are rows: a copy of
    MetaWorld takes about 10 MB, so giving every task all B copies would not fit. All pools step at the same time, each
    in its own threads.
    """

    def __init__(self, layouts: list[Layout], make: Make, num_envs: int, device: torch.device) -> None:
        """Make nothing yet: a pool comes into being with the first copy that plays its task."""
        super().__init__(layouts, num_envs, device, "env envpool")
        self._layouts, self._make = layouts, make
        self._share = math.ceil(num_envs / len(layouts))
        self._blocks: list[Block] = []
        self._made = [0] * len(layouts)
        self._free: list[list[tuple[int, int]]] = [[] for _ in layouts]
        """Of each task, a heap of (block, row) that nobody plays in."""
        self._place: list[tuple[int, int, int]] = [(-1, -1, -1)] * num_envs
        """Of each copy: task, block, row."""
        words = [layout.words for layout in layouts if layout.words is not None]
        self._sentences = np.array([*words, [0] * MAX_WORDS])
        """[tasks + 1, MAX_WORDS] the instructions; the last is of a copy that has not begun."""
        self._sent: list[tuple[Block, Array]] | None = None

    # ---- the protocol ------------------------------------------------------------------------------------------

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Start new episodes in the masked copies; seeds are not used (`spec.seedable` is False)."""
        assert self._sent is None, "reset between send and recv"
        starting = mask.cpu().numpy()
        self._seat(np.flatnonzero(starting).tolist(), tasks.tolist())
        begun = []
        for block in self._blocks:
            new = starting[block.copies]
            if new.any():
                # The first reset begins all rows, also those that wait for a copy.
                rows = block.rows[new] if block.begun else np.arange(self._share, dtype=np.int32)
                block.pool._reset(rows)
                begun.append((block, new, rows))
        for block, new, rows in begun:
            obs = block.layout.observed(block.pool._recv(), len(rows))
            if not block.begun:
                obs, block.begun = {name: x[block.rows[new]] for name, x in obs.items()}, True
            self._seen = self._spread(obs, block.copies[new])
        return self._shown()

    def send(self, action: Tensor, active: Tensor | None = None) -> None:
        """Begin a control step in the threads of every pool; `recv` must follow."""
        self.spec.action.check(action, self._b, self.device, self.where)
        assert self._sent is None, "send twice without recv"
        assert self._seen, "step before the first reset"
        moving, wanted = everyone_or(active), action.detach().cpu().numpy()
        self._sent = []
        for block in self._blocks:
            copies, rows = block.copies, block.rows
            if moving is not None:
                copies, rows = copies[moving[copies]], rows[moving[copies]]
            if len(copies):
                block.pool._send([rows, rows, block.layout.action.native(wanted[copies])])
                self._sent.append((block, copies))

    def recv(self) -> Step:
        """Wait for the step that `send` began."""
        sent, self._sent = self._sent, None
        assert sent is not None, "recv without send"
        if not sent:
            return self._idle()
        given = [block.layout.read(block.pool._recv(), len(copies)) for block, copies in sent]
        return self._result(Given.joined(given), np.concatenate([copies for _, copies in sent]))

    def close(self) -> None:
        """Stop the threads; may be called twice."""
        for block in self._blocks:
            block.pool.close()
        self._blocks = []

    # ---- inside -------------------------------------------------------------------------------------------------

    def _instructions(self) -> list[str]:
        texts = [*(layout.sentence or "" for layout in self._layouts), ""]  # the last is of a copy that has not begun
        return [texts[task] for task, _, _ in self._place]

    def _seat(self, starting: list[int], tasks: list[int]) -> None:
        """Give each copy that starts a row of its task, and tell every pool who plays in it."""
        for copy in starting:
            task, *seat = self._place[copy]
            if seat[0] >= 0:
                heapq.heappush(self._free[task], (seat[0], seat[1]))
        for copy in starting:
            self._place[copy] = (tasks[copy], *self._take(tasks[copy]))
        place = np.array(self._place, np.int32)
        for number, block in enumerate(self._blocks):
            block.copies = np.flatnonzero(place[:, 1] == number)
            block.rows = place[block.copies, 2]
        self._words = torch.from_numpy(self._sentences[place[:, 0]]).to(self.device)

    def _take(self, task: int) -> tuple[int, int]:
        """(block, row) of a task that nobody plays in; makes a new pool where there is none."""
        free = self._free[task]
        if not free:
            layout = self._layouts[task]
            free.extend((len(self._blocks), row) for row in range(self._share))
            pool = self._make(layout, self._share, self._made[task])
            self._blocks.append(Block(layout, pool, NOBODY, NOBODY))
            self._made[task] += self._share
        return heapq.heappop(free)
