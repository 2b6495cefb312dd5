"""Finding starts at which a demonstration succeeds that was moved by guesswork: all that is told is success.

Attempt i has task i modulo the number of tasks, a start of its own, and a guess: another start, which its own is taken
for. Most fail. Where one succeeds it is now known where to go, but only roughly, for a little beside does as well. So
places drawn around each right guess are tried too, and what is played again to be recorded goes to the middle of those
that succeeded. What is known of the task is what the demonstrations show, and everything else was found by trying.

Source: random search over a parameter of whole episodes (Salimans et al. 2017, arXiv:1703.03864, section 2.2, on why a
perturbation that lasts explores where one of single actions does not); keeping what succeeded and imitating it is
expert iteration (Anthony, Tian, Barber 2017, arXiv:1705.08439); the mean of the best of a cloud of tries is the
cross-entropy method (Rubinstein 1999), here with one cloud. Differs: the parameter is a start, and nothing is learned
while searching.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from embodied_rl.demo_files import read_lines, writable
from embodied_rl.demo_format import DemonstrationError
from embodied_rl.errors import CapabilityError
from embodied_rl.runfolder import write_text_atomic
from embodied_rl.seeding import start_seeds

FILE = Path("meta/guesses.jsonl")
STARTS, GUESSES, BESIDE = -2, -6, -7
"""Streams of seeds; see `embodied_rl.record_demos`."""
TRIES = 32
"""Places around a right guess that are tried."""
ROUND = 1024
"""Attempts at each task between two looks at what was found."""
HOPELESS = 32
"""Rounds without a success after which a task is given up."""


class Guesser(Protocol):
    """What `env.replay(...)` returns, of an env that can be guessed in."""

    def guess(self, seeds: Tensor, tasks: Tensor, elsewhere: Tensor, beside: Sequence[list[int]]) -> Tensor:
        """Whether attempts [N] succeed that `suppose` so of their starts [N]: [N] bool. The env is reset after."""
        ...

    def suppose(self, mask: Tensor, seeds: Tensor, beside: Sequence[list[int]]) -> None:
        """From the next `reset` of the masked copies [B] on, take their starts for those of these seeds [B], shifted.

        By the mean of small shifts, one drawn by each seed in `beside` [B]; by nothing where there are none.
        """
        ...


class Guesses:
    """What was found, kept in a file of the set; the k-th success of each task, in the order of attempts."""

    def __init__(self, folder: Path, tasks: tuple[str, ...], seed: int) -> None:
        """Read what an earlier call has found.

        Args:
            folder: Of the set.
            tasks: Names; T of them.
            seed: Of starts and guesses.

        Raises:
            DemonstrationError: The file is damaged.
        """
        self._path, self._tasks, self._seed = folder / FILE, tasks, seed
        self.tried = [0] * len(tasks)
        """Attempts at each task."""
        self.found: list[list[int]] = [[] for _ in tasks]
        """And the numbers of those that succeeded."""
        self.beside: list[list[list[int]]] = [[] for _ in tasks]
        """And of the first of these, which of the tries around them succeeded, by their numbers."""
        rows = read_lines(self._path)[0] if self._path.is_file() else []
        try:
            for row in rows:
                task = tasks.index(row["task"])
                self.tried[task], self.found[task] = int(row["tried"]), [int(attempt) for attempt in row["solved"]]
                self.beside[task] = [[int(i) for i in tries] for tries in row["beside"]]
        except (KeyError, ValueError, TypeError) as error:
            raise DemonstrationError(
                f"{self._path}: is damaged ({type(error).__name__}: {error}); delete it, and the guesses are made again"
            ) from error

    def starts(self, numbers: Tensor, guesser: Guesser) -> tuple[Tensor, Tensor, list[list[int]]]:
        """The starts of the N attempts to be recorded, and what they are taken for; searches where there are none yet.

        Args:
            numbers: [N] int64; number n is the (n div T)-th success of task n modulo T.
            guesser: Tries.

        Returns:
            seeds: [N] int64
            elsewhere: [N] int64
            beside: N lists of seeds of shifts.

        Raises:
            CapabilityError: A task is never solved so.
        """
        t = len(self._tasks)
        last = {n % t: n // t for n in sorted(numbers.tolist())}
        while lacking := [task for task, k in sorted(last.items()) if len(self.found[task]) <= k]:
            self._search(lacking, guesser)
        self._look_around(last, guesser)
        attempts = torch.tensor([self.found[n % t][n // t] for n in numbers.tolist()])
        tries = [torch.tensor(self.beside[n % t][n // t], dtype=torch.int64) for n in numbers.tolist()]
        beside = [self._seeds(BESIDE, some).tolist() for some in tries]
        return self._seeds(STARTS, attempts), self._seeds(GUESSES, attempts), beside

    def _seeds(self, stream: int, attempts: Tensor) -> Tensor:
        return start_seeds(self._seed, "train", torch.full_like(attempts, stream), attempts)

    def _solved(self, guesser: Guesser, attempts: Tensor, beside: Sequence[list[int]]) -> Tensor:
        """Whether attempts [N] succeed with their guesses, shifted: [N] bool."""
        seeds, elsewhere = self._seeds(STARTS, attempts), self._seeds(GUESSES, attempts)
        return guesser.guess(seeds, attempts % len(self._tasks), elsewhere, beside)

    def _look_around(self, last: dict[int, int], guesser: Guesser) -> None:
        """Try places around those right guesses, up to the `last` of each task, where that has not been done."""
        t = len(self._tasks)
        new = [a for task, k in sorted(last.items()) for a in self.found[task][len(self.beside[task]) : k + 1]]
        if not new:
            return
        attempts = torch.tensor(new).repeat_interleave(TRIES)
        tries = TRIES * attempts + torch.arange(TRIES).repeat(len(new))
        solved = self._solved(guesser, attempts, self._seeds(BESIDE, tries)[:, None].tolist())
        for attempt, numbers, good in zip(new, tries.view(-1, TRIES), solved.view(-1, TRIES), strict=True):
            self.beside[attempt % t].append(numbers[good].tolist())
        self._write()

    def _search(self, lacking: list[int], guesser: Guesser) -> None:
        """One more round at each task of which there are too few."""
        t = len(self._tasks)
        attempts = torch.tensor([t * (self.tried[task] + i) + task for i in range(ROUND) for task in lacking])
        solved = self._solved(guesser, attempts, [[]] * len(attempts))
        for attempt in attempts[solved].tolist():
            self.found[attempt % t].append(attempt)
        for task in lacking:
            self.tried[task] += ROUND
            if not self.found[task] and self.tried[task] >= HOPELESS * ROUND:
                raise CapabilityError(
                    f"none of {self.tried[task]:,} guesses solved task '{self._tasks[task]}': give it more time "
                    "(env.max_steps), another demonstration, or leave the task out"
                )
        self._write()

    def _write(self) -> None:
        rows = zip(self._tasks, self.tried, self.found, self.beside, strict=True)
        lines = (json.dumps(dict(zip(("task", "tried", "solved", "beside"), row, strict=True))) for row in rows)
        with writable(self._path.parent):
            write_text_atomic(self._path, "".join(f"{line}\n" for line in lines))
