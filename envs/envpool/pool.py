"""Copies of one envpool id, stepped by envpool's C++ threads."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.envs._spaces import Array, check_action
from embodied_rl.envs.envpool.layout import Given, Layout, spec_of
from embodied_rl.errors import CapabilityError, NotFoundError
from embodied_rl.types import Obs, State, Step


class Pooled:
    """What envpool's copies have in common, however they are made: they are NumPy arrays until they are handed out."""

    def __init__(self, layouts: Sequence[Layout], num_envs: int, device: torch.device, where: str) -> None:
        """Nothing seen yet."""
        self.where, self.device, self._b = where, device, num_envs
        self._on_cpu = device.type == "cpu"
        self.spec = spec_of(layouts, num_envs)
        self.told: Callable[[], dict[str, Any]] = dict
        self._terms = tuple(layouts[0].terms)
        self._seen: dict[str, Array] = {}
        """What all copies saw last, without the instruction; no array is written to once it was handed out."""
        self._words: Tensor | None = None
        """[B, MAX_WORDS] the instructions."""
        if all(layout.sentence for layout in layouts):
            self.instructions = self._instructions  # other envs have no such method

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Advance one control step; copies that are not active stay where they are."""
        self.send(action, active)
        return self.recv()

    def send(self, action: Tensor, active: Tensor | None = None) -> None:
        """Begin a control step in the pools' threads; `recv` must follow."""
        raise NotImplementedError

    def recv(self) -> Step:
        """Wait for the step that `send` began."""
        raise NotImplementedError

    def get_state(self) -> State:
        """Not possible.

        Raises:
            CapabilityError: Always.
        """
        raise no_state(self.where)

    def set_state(self, state: State) -> Obs:
        """Not possible; see `get_state`."""
        raise no_state(self.where)

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        """Not offered.

        Raises:
            NotFoundError: Always.
        """
        raise no_camera(self.where, camera)

    def manifest(self) -> dict[str, Any]:
        """What results depend on, with what each id shows first in a pool of seed 0."""
        return self.told()

    # ---- inside -------------------------------------------------------------------------------------------------

    def _instructions(self) -> list[str]:
        """The instruction of each copy as text."""
        raise NotImplementedError

    def _result(self, given: Given, copies: Array | None = None) -> Step:
        """The step in which these copies moved (None: all, in order) and gave this; the others have 0 and False."""
        if copies is not None:

            def everyone(x: Array) -> Array:
                whole = np.zeros(self._b, x.dtype)
                whole[copies] = x
                return whole

            success = None if given.success is None else everyone(given.success)
            ends = everyone(given.terminated), everyone(given.truncated)
            terms = {name: everyone(x) for name, x in given.terms.items()}
            given = Given(self._spread(given.obs, copies), everyone(given.reward), *ends, success, terms)
        self._seen = given.obs
        tensor = self._tensor
        return Step(
            self._shown(),
            tensor(given.reward),
            tensor(given.terminated),
            tensor(given.truncated),
            None if given.success is None else tensor(given.success),
            {name: tensor(x) for name, x in given.terms.items()},
        )

    def _idle(self) -> Step:
        """A step in which no copy was active."""
        zero, no = np.zeros(0, np.float32), np.zeros(0, bool)
        nothing = Given({}, zero, no, no, no if self.spec.has_success else None, dict.fromkeys(self._terms, zero))
        return self._result(nothing, np.zeros(0, np.int32))

    def _spread(self, obs: dict[str, Array], copies: Array) -> dict[str, Array]:
        """What all copies see after these have seen something new."""
        seen = dict(self._seen)
        for name, x in obs.items():
            seen[name] = seen[name].copy() if name in seen else np.zeros((self._b, *x.shape[1:]), x.dtype)
            seen[name][copies] = x
        return seen

    def _shown(self) -> Obs:
        """The observation of all copies.

        envpool writes every step into fresh memory that lives as long as somebody refers to it, so arrays that need no
        conversion are handed on as they are.
        """
        obs = {name: self._tensor(x) for name, x in self._seen.items()}
        if self._words is not None:
            obs["instruction"] = self._words
        return obs

    def _tensor(self, x: Array) -> Tensor:
        there = torch.from_numpy(x)
        return there if self._on_cpu else there.to(self.device)


class EnvpoolEnv(Pooled):
    """See `embodied_rl.types.Env`; besides, `step` can be split into `send` and `recv`, and the pool works in between.

    envpool restarts a finished copy by itself at the step after its end. It never gets that far here: a finished copy
    is either reset explicitly or left out of the next step.
    """

    def __init__(self, layout: Layout, pool: Any, device: torch.device) -> None:
        """Wrap a pool in synchronous mode (batch size = number of copies)."""
        b = int(pool.config["num_envs"])
        super().__init__([layout], b, device, f"env envpool: '{layout.id}'")
        self._layout, self._pool = layout, pool
        if layout.words is not None:
            self._words = torch.tensor(layout.words, device=device).repeat(b, 1)
        continuous = layout.action.spec.kind == "continuous"
        self._buffer = np.empty((b, layout.action.spec.size), layout.action.dtype) if continuous else None
        self._all = np.arange(b, dtype=np.int32)
        self._sent: Array | None = None

    # ---- the protocol ------------------------------------------------------------------------------------------

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Start new episodes in the masked copies; seeds are not used (`spec.seedable` is False)."""
        assert self._sent is None, "reset between send and recv"
        ids = np.flatnonzero(mask.cpu().numpy()).astype(np.int32) if self._seen else self._all
        if len(ids):
            self._pool._reset(ids)
            obs = self._layout.observed(self._pool._recv(), len(ids))
            self._seen = obs if len(ids) == self._b else self._spread(obs, ids)
        return self._shown()

    def send(self, action: Tensor, active: Tensor | None = None) -> None:
        """Begin a control step in the pool's threads; `recv` must follow."""
        check_action(action, self.spec.action, self._b, self.device, self.where)
        assert self._sent is None, "send twice without recv"
        assert self._seen, "step before the first reset"
        native = self._layout.action(action, self._buffer)
        moving = everyone_or(active)
        ids = self._all if moving is None else np.flatnonzero(moving).astype(np.int32)
        if len(ids):
            self._pool._send([ids, ids, native if moving is None else native[ids]])
        self._sent = ids

    def recv(self) -> Step:
        """Wait for the step that `send` began."""
        ids, self._sent = self._sent, None
        assert ids is not None, "recv without send"
        # The pool's own lists of arrays, without the dictionaries that its Python wrapper makes of them at every step
        # (30 of 50 microseconds): where each array lies in them never changes.
        if not len(ids):
            return self._idle()
        given = self._layout.read(self._pool._recv(), len(ids))
        return self._result(given, None if len(ids) == self._b else ids)

    def close(self) -> None:
        """Stop the threads; may be called twice."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    # ---- inside -------------------------------------------------------------------------------------------------

    def _instructions(self) -> list[str]:
        return [self._layout.sentence or ""] * self._b


def everyone_or(active: Tensor | None) -> Array | None:
    """[B] bool which copies move; None where all do."""
    if active is None:
        return None
    moving: Array = active.cpu().numpy()
    return None if moving.all() else moving


def no_state(where: str) -> CapabilityError:
    """Why nothing can be saved, and what to use instead."""
    return CapabilityError(
        f"{where} cannot save its state: envpool gives no access to it, so a resumed run begins new episodes; "
        "for an exact resume use env.type: gymnasium with the same id"
    )


def no_camera(where: str, camera: str) -> NotFoundError:
    """Why nothing can be drawn, and what to use instead."""
    return NotFoundError(
        f"{where}: camera '{camera}' does not exist: this env draws no pictures; use env.type: gymnasium with "
        "env.render: true"
    )
