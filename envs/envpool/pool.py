"""Copies of one envpool id, stepped by envpool's C++ threads."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.envs._spaces import Array, check_action
from embodied_rl.envs.envpool.layout import Layout, spec_of
from embodied_rl.errors import CapabilityError, NotFoundError
from embodied_rl.types import Obs, State, Step


class Pooled:
    """What envpool's copies cannot do, however they are made."""

    where: str
    told: dict[str, Any]

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
        """What results depend on."""
        return self.told


class EnvpoolEnv(Pooled):
    """See `embodied_rl.types.Env`; besides, `step` can be split into `send` and `recv`, and the pool works in between.

    envpool restarts a finished copy by itself at the step after its end. It never gets that far here: a finished copy
    is either reset explicitly or left out of the next step.
    """

    def __init__(self, layout: Layout, pool: Any, device: torch.device) -> None:
        """Wrap a pool in synchronous mode (batch size = number of copies)."""
        self.where = f"env envpool: '{layout.id}'"
        self.device = device
        self._pool: Any = pool
        self._layout, self._action = layout, layout.action
        b = self._b = int(pool.config["num_envs"])
        self.spec = spec_of([layout], b)
        self._all = np.arange(b, dtype=np.int32)
        self._words = None if layout.words is None else torch.tensor(layout.words, device=device).repeat(b, 1)
        continuous = self._action.spec.kind == "continuous"
        self._buffer = np.empty((b, self._action.spec.size), self._action.dtype) if continuous else None
        self.told = {}
        self._sent: Array | None = None
        self._obs: Obs | None = None

    # ---- the protocol ------------------------------------------------------------------------------------------

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Start new episodes in the masked copies; seeds are not used (`spec.seedable` is False)."""
        assert self._sent is None, "reset between send and recv"
        ids = self._all if self._obs is None else np.flatnonzero(mask.cpu().numpy()).astype(np.int32)
        if len(ids):
            self._pool._reset(ids)
            self._obs = self._read(self._pool._recv(), ids)
        assert self._obs is not None
        return dict(self._obs)

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Advance one control step; copies that are not active stay where they are."""
        self.send(action, active)
        return self.recv()

    def send(self, action: Tensor, active: Tensor | None = None) -> None:
        """Begin a control step in the pool's threads; `recv` must follow."""
        check_action(action, self.spec.action, self._b, self.device, self.where)
        assert self._sent is None, "send twice without recv"
        assert self._obs is not None, "step before the first reset"
        native = self._action(action, self._buffer)
        ids = self._all
        if active is not None and not bool(active.all()):
            ids = np.flatnonzero(active.cpu().numpy()).astype(np.int32)
            native = native[ids]
        if len(ids):
            self._pool._send([ids, ids, native])
        self._sent = ids

    def recv(self) -> Step:
        """Wait for the step that `send` began."""
        ids, self._sent = self._sent, None
        assert ids is not None, "recv without send"
        if not len(ids):
            return self._idle()
        # The pool's own lists of arrays, without the dictionaries that its Python wrapper makes of them at every step
        # (30 of 50 microseconds): where each array lies in them never changes.
        arrays = self._pool._recv()
        find, success_at, terms = self._layout.find, self._layout.success_at, self._layout.terms
        self._obs = self._read(arrays, ids)
        cut = arrays[find["trunc"]]
        return Step(
            obs=dict(self._obs),
            reward=self._column(arrays[find["reward"]], ids),
            terminated=self._column(arrays[find["done"]] > cut, ids),
            truncated=self._column(cut, ids),
            success=None if success_at is None else self._column(arrays[success_at].astype(bool), ids),
            metrics={name: self._column(arrays[at].astype(np.float32), ids) for name, at in terms.items()},
        )

    def close(self) -> None:
        """Stop the threads; may be called twice."""
        if self._pool is not None:
            self._pool.close()
            self._pool = None

    # ---- inside -------------------------------------------------------------------------------------------------

    def _read(self, arrays: list[Array], ids: Array) -> Obs:
        """The observation of all copies, of which `ids` are new.

        envpool writes every step into fresh memory that lives as long as somebody refers to it, so arrays that need no
        conversion are handed on as they are.
        """
        obs: Obs = {}
        for entry in self._layout.entries:
            new = torch.from_numpy(entry.read(arrays, len(ids))).to(self.device)
            if len(ids) < self._b:
                assert self._obs is not None
                new = self._obs[entry.name].index_copy(0, torch.from_numpy(ids.astype(np.int64)).to(self.device), new)
            obs[entry.name] = new
        if self._words is not None:
            obs["instruction"] = self._words
        return obs

    def _column(self, x: Array, ids: Array) -> Tensor:
        """[B] from what the stepped copies gave; 0 or False for the others."""
        if len(ids) < self._b:
            everyone = np.zeros(self._b, x.dtype)
            everyone[ids] = x
            x = everyone
        return torch.from_numpy(x).to(self.device)

    def _idle(self) -> Step:
        """A step in which no copy was active."""
        assert self._obs is not None
        no = torch.zeros(self._b, dtype=torch.bool, device=self.device)
        zero = torch.zeros(self._b, device=self.device)
        success = no.clone() if self.spec.has_success else None
        return Step(dict(self._obs), zero, no, no.clone(), success, {name: zero.clone() for name in self._layout.terms})


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
