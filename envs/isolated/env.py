"""Copies of a simulator that lives in other processes, as one env."""

from __future__ import annotations

import logging
import math
import os
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from embodied_rl.envs._words import encode_words
from embodied_rl.envs.isolated.spec import INSTRUCTION, env_spec
from embodied_rl.envs.isolated.worker import OBSERVE, RESET, STEP, layout, name_rows, share
from embodied_rl.envs.isolated.workers import Foreign, Lost, Worker, shared_memory, split_rows
from embodied_rl.errors import CapabilityError, CheckpointError, NotFoundError, SimulatorError, nearest
from embodied_rl.types import Obs, State, Step

log = logging.getLogger(__name__)

Array = NDArray[Any]
TRIES = 3
"""Attempts to start one episode, each with a new worker."""
LOWEST, HIGHEST = np.float32(-1.0), np.float32(1.0)
"""Ends of a continuous action."""
LOSSES = 10
"""Lost workers without one finished episode between them, after which waiting for better luck would be in vain."""


class IsolatedEnv:
    """See `embodied_rl.types.Env`; B copies over a few worker processes of another Python.

    An action is written once into shared memory and an observation read once. A worker that dies, hangs or gives up is
    replaced; the episodes it held end as `invalid`, as does the episode of a copy that shows a number that is not
    finite. `restarts` and `void` count both.

    The state is each copy's seed, task and actions, which `set_state` plays again: a simulator needs no way to save
    itself, only to be repeatable.
    """

    def __init__(self, foreign: Foreign, *, num_envs: int, workers: int, resumable: bool, device: torch.device) -> None:
        """Start the workers and shake hands.

        Raises:
            SimulatorError, ConfigError: A worker does not start, has other versions, or a spec that cannot be.
        """
        self.foreign, self.where, self.device = foreign, foreign.where, device
        self.restarts, self.void, self._on_host = 0, 0, device.type == "cpu"
        self._losses, self._fd = 0, -1
        self._workers: list[Worker] = []
        self._native: dict[str, Any] = {}
        self._about: dict[str, Any] = {}
        try:
            for low, high in split_rows(num_envs, workers):
                self._workers.append(Worker(foreign, low, high))
            self._native = self._workers[0].introduce()
            self.spec = env_spec(self._native, num_envs, self.where)
            self._fields = layout(self._native, num_envs)
            # Kept open: workers that are replaced later are given the same memory.
            self._fd = shared_memory(self._fields[-1][3])
            self._shared = share(self._fd, self._fields)
            self._shared.update(name_rows(self._shared, self._native))
            for worker in self._workers:
                self._admit(worker, introduced=worker is self._workers[0])
        except BaseException:
            self.close()
            raise
        self.spec = replace(self.spec, has_state=resumable and self._native["repeatable"])
        self._resumable = resumable
        self._seen = {name: np.zeros_like(self._shared[f"obs/{name}"]) for name in self._native["observation"]}
        self._running, self._lost, self._stale = (np.zeros(num_envs, bool) for _ in range(3))
        self._seeds, self._tasks = np.full(num_envs, -1, np.int64), np.zeros(num_envs, np.int64)
        self._actions: list[list[Array]] = [[] for _ in range(num_envs)]
        if self._native["words"]:
            self._texts = [""] * num_envs
            self._words = np.zeros((num_envs, self._native["words"]), np.int64)
            self.instructions = lambda: list(self._texts)  # other envs have no such method

    # ---- the protocol ------------------------------------------------------------------------------------------

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Start new episodes in the masked copies; returns the observation of all copies.

        Raises:
            SimulatorError: An episode could not be started, several times in a row.
        """
        rows = mask.cpu().numpy()
        self._seeds[rows], self._tasks[rows] = seeds.cpu().numpy()[rows], tasks.cpu().numpy()[rows]
        for row in np.flatnonzero(rows).tolist():
            self._actions[row] = []
        self._start(rows)
        self._shared["success"][rows] = False
        if self._native["words"]:
            self._listen(rows)
        if self.spec.on_demand:
            self._stale |= rows
            return self.observe()
        return self._read(rows)

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Advance one control step; copies that are not active or have ended stay where they are, with reward 0."""
        given = self._take(action)
        go = self._running if active is None else self._running & active.cpu().numpy()
        moving = go & ~self._lost
        if self.spec.has_state:
            for row in moving.nonzero()[0].tolist():
                self._actions[row].append(given[row].copy())
        self._shared["active"][...] = moving
        if self._command(STEP, moving, self.foreign.step_seconds):
            moving &= ~self._lost
        obs: Obs = {}
        if self.spec.on_demand:
            self._stale |= moving
            # A step may show what is not finite before anybody looks, and ends its episode here.
            self._doubt(moving, {name: self._shared[f"obs/{name}"] for name in self._seen})
        else:
            obs = self._read(moving)
        return self._judge(go, moving, obs)

    def observe(self) -> Obs:
        """Observation of all copies as they are now; only those that have moved since the last call are asked."""
        if not (self.spec.on_demand and self._stale.any()):
            return self._show()
        stale = self._stale & ~self._lost
        self._shared["active"][...] = stale
        self._command(OBSERVE, stale, self.foreign.start_seconds)
        self._stale[:] = False
        return self._read(stale & ~self._lost)

    def spare(self, copies: Tensor) -> None:
        """See `embodied_rl.types.Sparing`."""
        self._stale &= ~copies.cpu().numpy()

    def get_state(self) -> State:
        """Seed, task and actions of each copy's episode, and its observation as a check.

        Raises:
            CapabilityError: `resumable` is false, or the simulator is not repeatable.
        """
        self._needs_state()
        kind = self._shared["action"]
        rows = [np.stack(a) if a else np.empty((0, *kind.shape[1:]), kind.dtype) for a in self._actions]
        return {
            "tasks": list(self.spec.tasks),
            "seed": torch.from_numpy(self._seeds.copy()),
            "task": torch.from_numpy(self._tasks.copy()),
            "running": torch.from_numpy(self._running.copy()),
            "lost": torch.from_numpy(self._lost.copy()),
            "actions": [torch.from_numpy(row) for row in rows],
            "obs": {name: torch.from_numpy(x.copy()) for name, x in self._seen.items()},
        }

    def set_state(self, state: State) -> Obs:
        """Play the episodes of `get_state` again; costs as many steps as they are old.

        Raises:
            CheckpointError: The state is of another env or number of copies.
            CapabilityError: An episode did not repeat.
        """
        self._needs_state()
        if tuple(state["tasks"]) != self.spec.tasks or len(state["actions"]) != self.spec.num_envs:
            raise CheckpointError(
                f"{self.where}: the state is of {len(state['actions'])} copies of {len(state['tasks'])} tasks, "
                f"expected {self.spec.num_envs} of {len(self.spec.tasks)}; build the env as the state's run did"
            )
        self._replay(state)
        self._running[...], self._lost[...] = state["running"].numpy(), state["lost"].numpy()
        # What the others showed last may be older than where they stopped.
        going = self._running & ~self._lost
        for name, x in state["obs"].items():
            kept, repeated = x.numpy(), self._seen[name]
            for row in np.flatnonzero(going).tolist():
                if not np.array_equal(kept[row], repeated[row]):
                    raise CapabilityError(
                        f"{self.where} did not repeat its episode: after {len(self._actions[row])} replayed steps "
                        f"'{name}' of copy {row} differs from the saved one; set env.resumable: false, and a resumed "
                        "run begins new episodes instead"
                    )
            repeated[~going] = kept[~going]
        return self._show()

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        """Pictures [len(copies), H, W, 3] uint8 of the copies asked for; black where the simulator was lost.

        Raises:
            NotFoundError: No such camera.
        """
        if camera not in self.spec.cameras:
            raise NotFoundError(f"{self.where}: camera '{camera}' does not exist{nearest(camera, self.spec.cameras)}")
        asked = copies.tolist()
        shape = [len(asked), height, width, 3]
        if not asked:
            return torch.empty(*shape, dtype=torch.uint8, device=self.device)
        size = int(np.prod(shape))
        fields = [["pictures", "uint8", shape, 0], ["end", "uint8", [0], size]]
        fd = shared_memory(size)
        try:
            pictures = share(fd, fields)["pictures"]
            for worker in self._workers:
                rows = [(i, row) for i, row in enumerate(asked) if worker.low <= row < worker.high]
                if rows and worker.ready:
                    request = {"ask": "render", "camera": camera, "fields": fields, "rows": rows}
                    self._ask(worker, request, fd)
        finally:
            os.close(fd)
        return torch.from_numpy(pictures.copy()).to(self.device)

    def manifest(self) -> dict[str, Any]:
        """What the simulator's results depend on, as its worker tells it: its file, its packages, and its own words.

        Raises:
            SimulatorError: No worker could tell.
        """
        if self.foreign.manifest is not None:
            return self.foreign.manifest()
        if not self._about:
            for worker in self._workers:
                if not worker.ready:
                    self._admit(worker)
                if about := self._ask(worker, {"ask": "manifest", "pins": list(self.foreign.versions)}):
                    self._about = about
                    break
            else:
                raise SimulatorError(f"{self.where}: no worker could tell its manifest; {self._workers[0].output()}")
        return dict(self._about)

    def close(self) -> None:
        """End the workers; may be called twice."""
        for worker in self._workers:
            worker.hang_up()
        for worker in self._workers:
            worker.close()
        self._workers = []
        self._shared = {}
        if self._fd >= 0:
            os.close(self._fd)
            self._fd = -1

    # ---- inside -------------------------------------------------------------------------------------------------

    def _admit(self, worker: Worker, *, introduced: bool = False) -> None:
        """Finish the handshake with a new worker."""
        native = self._native if introduced else worker.introduce()
        if native != self._native:
            keys = [key for key, value in self._native.items() if native.get(key) != value]
            raise SimulatorError(
                f"{self.where}: the simulator of {worker.copies} has another spec ({', '.join(keys)}) than that of "
                "copy 0: every copy must be alike"
            )
        worker.attach(self._fd, self._fields)

    def _command(self, command: bytes, rows: Array, seconds: float) -> list[Worker]:
        """Have the workers of some rows do something side by side; returns those that were lost over it."""
        busy = [w for w in self._workers if w.ready and np.count_nonzero(rows[w.rows])]
        for worker in busy:
            worker.tell(command)
        lost = []
        for worker in busy:
            try:
                worker.wait(seconds)
            except Lost as how:
                self._lose(worker, str(how))
                lost.append(worker)
        return lost

    def _start(self, rows: Array) -> None:
        """Start the episodes of some rows, with new workers where the old ones are lost."""
        missing = rows.copy()
        for attempt in range(TRIES):
            for worker in self._workers:
                if missing[worker.rows].any() and not worker.ready:
                    self._readmit(worker, last=attempt + 1 == TRIES)
            self._lost[missing], self._running[missing] = False, True
            self._shared["seed"][...], self._shared["task"][...] = self._seeds, self._tasks
            self._shared["active"][...] = missing
            started = missing.copy()
            self._command(RESET, missing, self.foreign.start_seconds)
            for worker in self._workers:
                if not worker.ready:
                    started[worker.rows] = False
            missing &= ~started
            if not missing.any():
                return
        row = int(np.flatnonzero(missing)[0])
        worker = next(w for w in self._workers if w.low <= row < w.high)
        raise SimulatorError(
            f"{self.where}: the episode of seed {self._seeds[row]}, task '{self.spec.tasks[self._tasks[row]]}' could "
            f"not be started, {TRIES} times in a row; {worker.output()}"
        )

    def _readmit(self, worker: Worker, *, last: bool) -> None:
        """Shake hands with the successor of a lost worker; one that is lost as well gets a successor of its own."""
        try:
            self._admit(worker)
        except SimulatorError:
            if last:
                raise
            self._lose(worker, "did not start again")

    def _lose(self, worker: Worker, how: str) -> None:
        """Give up a worker and the episodes it held, and start its successor in the background."""
        held = np.zeros_like(self._running)
        held[worker.rows] = self._running[worker.rows]
        self._lost |= held
        self._stale[worker.rows] = False
        self.restarts += 1
        self._losses += 1
        told = worker.output()
        log.warning(
            "%s: the worker of %s %s; %d running episodes do not count, and it is started again (restart %d of this "
            "env); %s", self.where, worker.copies, how, int(held.sum()), self.restarts, told,
        )  # fmt: skip
        if self._losses > LOSSES:
            raise SimulatorError(
                f"{self.where}: {self._losses} workers were lost without one finished episode between them, the last "
                f"one {how}; {told}"
            )
        worker.restart()

    def _take(self, action: Tensor) -> Array:
        """Write the action [B, ...] where the workers read it, clipped; ShapeError for anything else."""
        spec, shared = self.spec.action, self._shared["action"]
        given = action.detach().cpu().numpy()
        # What is all right is seen from the array; only what is not is looked at as `check` does, which takes longer.
        alike = given.shape == shared.shape and given.dtype == shared.dtype and action.device.type == self.device.type
        if not (alike and spec.kind == "continuous" and all_finite(given)):
            spec.check(action, self.spec.num_envs, self.device, self.where)
        if spec.kind == "continuous":
            np.maximum(given, LOWEST, out=shared)
            np.minimum(shared, HIGHEST, out=shared)
        else:
            shared[...] = given
        return shared

    def _read(self, rows: Array) -> Obs:
        """Take over what the copies show: rows that moved must be finite, lost ones stay as they were seen last."""
        fresh: dict[str, Array] = {name: self._shared[f"obs/{name}"].copy() for name in self._seen}
        self._doubt(rows, fresh)
        if np.count_nonzero(self._lost):
            for name, shown in fresh.items():
                shown[self._lost] = self._seen[name][self._lost]
        self._seen = fresh
        return self._show()

    def _doubt(self, rows: Array, seen: dict[str, Array]) -> None:
        """Give up those of some rows that show a number that is not finite."""
        for name, shown in seen.items():
            if shown.dtype.kind == "f" and not all_finite(shown):
                self._give_up(rows & ~np.isfinite(shown).reshape(len(shown), -1).all(axis=1), f"'{name}'")

    def _give_up(self, bad: Array, what: str) -> None:
        """Declare the episodes of copies lost that showed a number that is not finite."""
        bad = bad & ~self._lost
        if bad.any():
            copies = bad.nonzero()[0].tolist()
            log.warning("%s: %s is not finite in copies %s: their episodes do not count", self.where, what, copies)
            self._lost |= bad

    def _show(self) -> Obs:
        seen = {name: self._tensor(x) for name, x in self._seen.items()}
        return seen | {INSTRUCTION: self._tensor(self._words)} if self._native["words"] else seen

    def _tensor(self, x: Array) -> Tensor:
        return torch.from_numpy(x) if self._on_host else torch.from_numpy(x).to(self.device)

    def _judge(self, go: Array, moving: Array, obs: Obs) -> Step:
        """The step as the engine wants it: 0 where nothing moved, and the end of every episode that is lost."""
        names = ("reward", *self._native["metrics"])
        numbers, flags = self._shared["numbers"].copy(), self._shared["flags"].copy()
        if not all_finite(numbers):
            for name, x in zip(names, numbers, strict=True):
                self._give_up(moving & ~np.isfinite(x), name if x is numbers[0] else f"reward term {name}")
        invalid = go & self._lost
        ending, success = flags[:2], flags[2]
        if np.count_nonzero(moving) < len(moving) or np.count_nonzero(self._lost):
            still = ~moving | self._lost
            numbers[:, still], ending[:, still] = 0, False
            success[invalid] = self._shared["success"][invalid] = False
            ending[1] |= invalid
        if np.count_nonzero(ending):
            ended = ending[0] | ending[1]
            self._running = self._running & ~ended
            self.void += int(np.count_nonzero(invalid))
            self._losses = 0 if (ended & ~invalid).any() else self._losses
        return Step(
            obs=obs,
            reward=self._tensor(numbers[0]),
            terminated=self._tensor(flags[0]),
            truncated=self._tensor(flags[1]),
            success=self._tensor(success) if self.spec.has_success else None,
            metrics={name: self._tensor(numbers[i]) for i, name in enumerate(names) if i},
            invalid=self._tensor(invalid),
        )

    def _replay(self, state: State) -> None:
        actions = [row.numpy() for row in state["actions"]]
        self._seeds, self._tasks = state["seed"].numpy().copy(), state["task"].numpy().copy()
        begun = torch.from_numpy(self._seeds >= 0)
        self.reset(begun, state["seed"], state["task"])
        action = torch.zeros(self.spec.num_envs, *self.spec.action.shape, dtype=self.spec.action.dtype)
        for t in range(max((len(row) for row in actions), default=0)):
            for row, taken in enumerate(actions):
                if t < len(taken):
                    action[row] = torch.from_numpy(np.asarray(taken[t]))
            active = torch.tensor([t < len(row) for row in actions])
            self.step(action.to(self.device), active.to(self.device))
        self.observe()

    def _needs_state(self) -> None:
        if not self.spec.has_state:
            reason = "the simulator says it is not repeatable" if self._resumable else "env.resumable is false"
            raise CapabilityError(f"{self.where} cannot save its state: {reason}; a resumed run begins new episodes")

    def _listen(self, rows: Array) -> None:
        """Take over the instructions of rows that have just started, as text and as word ids."""
        self._words = self._words.copy()  # earlier observations keep theirs
        for worker in self._workers:
            if not rows[worker.rows].any() or not worker.ready:
                continue
            texts = (self._ask(worker, {"ask": "texts"}) or {"texts": []})["texts"]
            for row, text in enumerate(texts, worker.low):
                if rows[row]:
                    self._texts[row] = text
                    self._words[row] = encode_words(text, self._native["words"], self.where, "raise spec['words']")

    def _ask(self, worker: Worker, request: dict[str, Any], fd: int | None = None) -> dict[str, Any] | None:
        """A worker's answer to a rare request; None when it was lost over it."""
        try:
            return worker.ask(request, fd)
        except Lost as lost:
            self._lose(worker, str(lost))
            return None


def all_finite(x: Array) -> bool:
    """Whether every number is finite, as a sum shows in one pass; a sum that overflows is looked at more closely."""
    return math.isfinite(np.add.reduce(x, axis=None)) or bool(np.isfinite(x).all())
