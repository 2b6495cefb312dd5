"""Several envpool ids in one batch: the tasks of one env, each with its instruction."""

from __future__ import annotations

import heapq
import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from embodied_rl.envs.envpool.layout import Layout, spec_of
from embodied_rl.envs.envpool.pool import EnvpoolEnv, Pooled
from embodied_rl.types import Obs, Step

Make = Callable[[Layout, int, int], EnvpoolEnv]
"""(layout, copies, how many copies of this id there are already) -> a pool of it."""


@dataclass
class Block:
    """One pool, and which copies of the batch play in it."""

    env: EnvpoolEnv
    copies: Tensor
    """[n] int64 copies that play here now."""
    rows: Tensor
    """[n] int64 which row of the pool each of them has."""


class EnvpoolTasks(Pooled):
    """See `embodied_rl.types.Env`; besides, `step` can be split into `send` and `recv`.

    A copy is lent a row of a pool of its task at each reset, and gives it back at the next. A task's first pool has its
    even share of the copies, and another of that size is made when more ask for it than there are rows: a copy of
    MetaWorld takes about 10 MB, so giving every task all B copies would not fit. All pools step at the same time, each
    in its own threads.
    """

    def __init__(self, layouts: list[Layout], make: Make, num_envs: int, device: torch.device) -> None:
        """Make nothing yet: a pool comes into being with the first copy that plays its task."""
        self.where, self.device = "env envpool", device
        self._layouts, self._make, self._b = layouts, make, num_envs
        self._share = math.ceil(num_envs / len(layouts))
        self._blocks: list[Block] = []
        self._made = [0] * len(layouts)
        self.told = {}
        self._free: list[list[tuple[int, int]]] = [[] for _ in layouts]
        """Of each task, a heap of (block, row) that nobody plays in."""
        self._place: list[tuple[int, int, int]] = [(-1, -1, -1)] * num_envs
        """Of each copy: task, block, row."""
        self._obs: Obs = {}
        self._sent: list[tuple[Block, Tensor]] | None = None
        self._terms = tuple(layouts[0].terms)
        self.spec = spec_of(layouts, num_envs)

    # ---- the protocol ------------------------------------------------------------------------------------------

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Start new episodes in the masked copies; seeds are not used (`spec.seedable` is False)."""
        assert self._sent is None, "reset between send and recv"
        rows, wanted = mask.nonzero().flatten().tolist(), tasks.tolist()
        for copy in rows:
            task, block, row = self._place[copy]
            if block >= 0:
                heapq.heappush(self._free[task], (block, row))
        for copy in rows:
            self._place[copy] = (wanted[copy], *self._take(wanted[copy]))
        self._seat()
        self._begin_writing()
        for block in self._blocks:
            new = mask[block.copies]
            if bool(new.any()):
                here = torch.zeros(block.env.spec.num_envs, dtype=torch.bool, device=self.device)
                here[block.rows[new]] = True
                self._write(block, block.env.reset(here, here.long(), torch.zeros_like(here.long())), new)
        return dict(self._obs)

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Advance one control step; copies that are not active stay where they are."""
        self.send(action, active)
        return self.recv()

    def send(self, action: Tensor, active: Tensor | None = None) -> None:
        """Begin a control step in the threads of every pool; `recv` must follow."""
        self.spec.action.check(action, self._b, self.device, self.where)
        assert self._sent is None, "send twice without recv"
        assert self._obs, "step before the first reset"
        self._sent = []
        for block in self._blocks:
            go = torch.ones_like(block.copies, dtype=torch.bool) if active is None else active[block.copies]
            if bool(go.any()):
                n = block.env.spec.num_envs
                inner = torch.zeros((n, *action.shape[1:]), dtype=action.dtype, device=self.device)
                moving = torch.zeros(n, dtype=torch.bool, device=self.device)
                inner[block.rows], moving[block.rows] = action[block.copies], go
                block.env.send(inner, moving)
                self._sent.append((block, go))

    def recv(self) -> Step:
        """Wait for the step that `send` began."""
        sent, self._sent = self._sent, None
        assert sent is not None, "recv without send"
        self._begin_writing()
        no = torch.zeros(self._b, dtype=torch.bool, device=self.device)
        zero = torch.zeros(self._b, device=self.device)
        out = Step(dict(self._obs), zero, no, no.clone(), no.clone() if self.spec.has_success else None)
        out.metrics = {name: zero.clone() for name in self._terms}
        for block, go in sent:
            step = block.env.recv()
            copies, rows = block.copies[go], block.rows[go]
            self._write(block, step.obs, go)
            out.reward[copies] = step.reward[rows]
            out.terminated[copies], out.truncated[copies] = step.terminated[rows], step.truncated[rows]
            if out.success is not None and step.success is not None:
                out.success[copies] = step.success[rows]
            for name, x in out.metrics.items():
                x[copies] = step.metrics[name][rows]
        return out

    def close(self) -> None:
        """Stop the threads; may be called twice."""
        for block in self._blocks:
            block.env.close()

    # ---- inside -------------------------------------------------------------------------------------------------

    def _take(self, task: int) -> tuple[int, int]:
        """(block, row) of a task that nobody plays in; makes a new pool where there is none."""
        free = self._free[task]
        if not free:
            env = self._make(self._layouts[task], self._share, self._made[task])
            self._made[task] += self._share
            nobody = torch.empty(0, dtype=torch.int64, device=self.device)
            free.extend((len(self._blocks), row) for row in range(self._share))
            self._blocks.append(Block(env, nobody, nobody))
        return heapq.heappop(free)

    def _seat(self) -> None:
        """Tell every pool who plays in it."""
        place = torch.tensor(self._place, device=self.device)
        for number, block in enumerate(self._blocks):
            block.copies = (place[:, 1] == number).nonzero().flatten()
            block.rows = place[block.copies, 2]

    def _begin_writing(self) -> None:
        """Observations that were handed out stay as they are: what comes is written into memory of its own."""
        self._obs = {
            name: self._obs[name].clone()
            if name in self._obs
            else torch.zeros(self._b, *spec.shape, dtype=spec.dtype, device=self.device)
            for name, spec in self.spec.observation.items()
        }

    def _write(self, block: Block, obs: Obs, some: Tensor) -> None:
        """Lay what some copies of a pool see into the batch's observation."""
        copies, rows = block.copies[some], block.rows[some]
        for name, x in obs.items():
            self._obs[name][copies] = x[rows]
