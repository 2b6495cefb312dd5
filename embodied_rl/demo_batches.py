"""Endless batches of demonstrated frames, from sets that may be larger than memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from embodied_rl.demo_format import NO_EPISODE
from embodied_rl.errors import CapabilityError
from embodied_rl.types import Obs, State

if TYPE_CHECKING:
    from embodied_rl.demonstrations import Demonstrations

CACHE_BYTES = 2 * 2**30
"""Decoded frames kept in memory: 2 GiB hold about 87,000 frames of two cameras with 64 x 64 pixels."""


Drawn = tuple[Obs, Tensor, Tensor, Obs]


class Batches(Iterator[Drawn]):
    """Frames drawn uniformly without replacement, each once per epoch; a batch may cross from one epoch to the next.

    The set is decoded in blocks of whole episodes that fit into `cache_bytes`. A set that fits as a whole is one block:
    decoded once, and an epoch is one permutation of all frames. Otherwise each epoch puts the episodes into a new
    order, cuts it into blocks, and draws from one block after the other; so a batch mixes the episodes of one block
    (hundreds), and every episode is decoded once per epoch. A single episode above the limit is still a block.

    Each item is (obs, action, mask, last):
        obs: name -> [N, ...]
        action: [N, C, D] float32, the action of the frame and of the C - 1 frames that follow it; beyond the end of
            the episode its last action is repeated.
        mask: [N, C] bool, False beyond the end of the episode.
        last: name -> [N, D], the vectors of the observation as they are in the last frame of the episode.
    """

    def __init__(
        self,
        demos: Demonstrations,
        generator: torch.Generator,
        batch_size: int,
        chunk: int,
        *,
        cameras: Sequence[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> None:
        """Draw from a set.

        Args:
            demos: At least one episode.
            generator: One number is drawn from it per epoch; on the CPU.
            batch_size: N.
            chunk: C.
            cameras: Pictures to decode; None for all.
            cache_bytes: Most bytes of decoded frames in memory.

        Raises:
            CapabilityError: The set is empty, or N or C is below 1.
            NotFoundError: No such camera.
        """
        if not demos.episodes:
            raise CapabilityError(f"{demos.folder}: {NO_EPISODE}")
        if batch_size < 1 or chunk < 1:
            raise CapabilityError(f"batches need batch_size and chunk of at least 1, got {batch_size} and {chunk}")
        self.batch_size, self.chunk = batch_size, chunk
        self._demos, self._generator = demos, generator
        self._cameras = None if cameras is None else tuple(cameras)
        self._lengths = demos.lengths
        specs = demos.observation
        shapes = [(specs[name].shape, specs[name].dtype) for name in demos.choose(cameras)]
        shapes.append((demos.action.shape, torch.float32))
        self._frame_bytes = sum(torch.Size(shape).numel() * dtype.itemsize for shape, dtype in shapes)
        self._capacity = max(1, cache_bytes // self._frame_bytes)
        self._block = Block([], {}, torch.empty(0), torch.empty(0))
        self._blocks: list[tuple[list[int], Tensor]] = []
        self.epoch = -1
        self._seed, self._position = 0, 0

    @property
    def cached_bytes(self) -> int:
        """Bytes of the decoded frames in memory now."""
        return sum(x.nbytes for x in (*self._block.obs.values(), self._block.action))

    def prefetch(self) -> None:
        """Decode a set that fits into memory now, so that a damaged file is told before anything has begun."""
        if self._demos.frames <= self._capacity:
            self._block = self._decode(list(range(self._demos.episodes)))

    def __next__(self) -> Drawn:
        """Draw one batch; see the class."""
        parts: list[Drawn] = []
        missing = self.batch_size
        while missing:
            if self.epoch < 0 or self._position == self._demos.frames:
                self._begin(int(torch.randint(2**62, (), generator=self._generator)), self.epoch + 1)
            rows = self._draw(missing)
            parts.append(self._block.take(rows, self.chunk))
            missing -= len(rows)
        if len(parts) == 1:
            return parts[0]
        obs = {k: torch.cat([part[0][k] for part in parts]) for k in parts[0][0]}
        last = {k: torch.cat([part[3][k] for part in parts]) for k in parts[0][3]}
        return obs, torch.cat([part[1] for part in parts]), torch.cat([part[2] for part in parts]), last

    def state_dict(self) -> State:
        """Where it is: the same batches follow after `load_state_dict`, also in another process.

        The generator's state is part of it. The limit of the cache must be the same when the set does not fit.
        """
        return {
            "epoch": self.epoch,
            "seed": self._seed,
            "position": self._position,
            "frames": self._demos.frames,
            "capacity": min(self._capacity, self._demos.frames),
            "generator": self._generator.get_state(),
        }

    def load_state_dict(self, state: State) -> None:
        """Go on from `state_dict`.

        Raises:
            CapabilityError: The set or the limit of the cache has changed, so the order of the frames would differ.
        """
        own = {"frames": self._demos.frames, "capacity": min(self._capacity, self._demos.frames)}
        for name, now in own.items():
            if state[name] != now:
                what = "frames in the set" if name == "frames" else "frames in the cache"
                raise CapabilityError(
                    f"{self._demos.folder}: {now} {what}, the saved run had {state[name]}; go on with the same set and "
                    "cache_bytes, or begin a new run"
                )
        self._generator.set_state(state["generator"])
        if state["epoch"] >= 0:
            self._begin(state["seed"], state["epoch"])
        self.epoch, self._position = state["epoch"], state["position"]

    def _begin(self, seed: int, epoch: int) -> None:
        """Order the frames of an epoch by its seed."""
        own = torch.Generator().manual_seed(seed)
        if self._demos.frames <= self._capacity:
            groups = [list(range(self._demos.episodes))]
        else:
            order = torch.randperm(self._demos.episodes, generator=own).tolist()
            groups = _groups(order, self._lengths, self._capacity)
        sizes = [int(self._lengths[group].sum()) for group in groups]
        self._blocks = [(g, torch.randperm(n, generator=own)) for g, n in zip(groups, sizes, strict=True)]
        self._seed, self.epoch, self._position = seed, epoch, 0

    def _draw(self, most: int) -> Tensor:
        """The next rows of the block in turn, at most so many; decodes the block when it is not the one in memory."""
        before, turn = 0, 0
        while self._position >= before + len(self._blocks[turn][1]):
            before += len(self._blocks[turn][1])
            turn += 1
        group, order = self._blocks[turn]
        if self._block.episodes != group:
            self._block = Block([], {}, torch.empty(0), torch.empty(0))  # frees the old one before the new is made
            self._block = self._decode(group)
        rows = order[self._position - before :][:most]
        self._position += len(rows)
        return rows

    def _decode(self, group: list[int]) -> Block:
        lengths = self._lengths[group]
        ends = lengths.cumsum(0)
        frames, specs = int(ends[-1]), self._demos.observation
        entries = self._demos.choose(self._cameras)
        obs = {name: torch.empty(frames, *specs[name].shape, dtype=specs[name].dtype) for name in entries}
        action = torch.empty(frames, self._demos.action.size)
        start = 0
        for episode in self._demos.load(group, cameras=self._cameras):
            here = slice(start, start + len(episode.action))
            for name, values in episode.obs.items():
                obs[name][here] = values
            action[here] = episode.action
            start = here.stop
        return Block(group, obs, action, ends.repeat_interleave(lengths))


class Block:
    """Decoded episodes, one after the other."""

    def __init__(self, episodes: list[int], obs: Obs, action: Tensor, ends: Tensor) -> None:
        """Hold frames [F, ...]; `ends` [F] is the row after the last one of each frame's episode."""
        self.episodes, self.obs, self.action, self.ends = episodes, obs, action, ends

    def take(self, rows: Tensor, chunk: int) -> Drawn:
        """Observation, actions and mask of some rows, and the vectors at the end of their episodes."""
        ends = self.ends[rows, None]
        ahead = rows[:, None] + torch.arange(chunk)
        obs = {
            name: values.index_select(0, rows) for name, values in self.obs.items()
        }  # several times as fast as [rows]
        vectors = (k for k, x in self.obs.items() if x.ndim == 2 and x.is_floating_point())
        last = {name: self.obs[name].index_select(0, ends[:, 0] - 1) for name in vectors}
        return obs, self.action[torch.minimum(ahead, ends - 1)], ahead < ends, last


def _groups(order: list[int], lengths: Tensor, capacity: int) -> list[list[int]]:
    """Cut episodes into runs of at most `capacity` frames, or of one episode."""
    groups: list[list[int]] = []
    room = 0
    for episode in order:
        length = int(lengths[episode])
        if not groups or length > room:
            groups.append([])
            room = capacity
        groups[-1].append(episode)
        room -= length
    return groups
