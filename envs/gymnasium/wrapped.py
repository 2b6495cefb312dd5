"""What the copies of a Gymnasium id share, however they are stepped: spec, state, pictures, manifest."""

from __future__ import annotations

import importlib.metadata
import sys
import traceback
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium import error as gym_error
from gymnasium import spaces
from torch import Tensor

from embodied_rl.envs._spaces import ActionMap, Array, leaves, resized
from embodied_rl.envs.gymnasium.making import where_of
from embodied_rl.errors import CapabilityError, CheckpointError, MissingExtraError, NotFoundError, nearest
from embodied_rl.manifest import source
from embodied_rl.runfolder import checksum, installed
from embodied_rl.types import EnvSpec, Obs, State

if TYPE_CHECKING:
    from embodied_rl.envs.gymnasium import Config

CAMERA = "default"
SUCCESS_KEYS = ("success", "is_success")


class Wrapped:
    """The half of `embodied_rl.types.Env` that does not depend on who steps the copies.

    Gymnasium has no way to read or write an env's state, so `get_state` holds the seed and the actions of each running
    episode and `set_state` plays them again (its cost: as many steps as the episodes are old). The observation at the
    end must be the stored one bit for bit; an env that draws random numbers behind `reset(seed=...)` is refused there.
    """

    spec: EnvSpec

    def __init__(
        self, config: Config, copies: int, device: torch.device, observation: spaces.Space[Any],
        action: spaces.Space[Any],
    ) -> None:  # fmt: skip
        """Read the spaces; `_describe` must follow."""
        self.config, self.device, self.where = config, device, where_of(config)
        self._leaves = leaves(observation, self.where)
        self._action = ActionMap(action, self.where)
        self._obs = {leaf.name: np.zeros((copies, *leaf.spec.shape), leaf.dtype) for leaf in self._leaves}
        self._seeds = np.full(copies, -1, np.int64)
        self._running = np.zeros(copies, bool)
        self._reached = np.zeros(copies, bool)
        self._actions: list[list[Array]] = [[] for _ in range(copies)]

    def _describe(
        self, example: Any, info: dict[str, Any], *, registered: gymnasium.envs.registration.EnvSpec | None,
        seedable: bool = True, restarts_itself: bool = False, reason: str = "",
    ) -> None:  # fmt: skip
        """Write the spec.

        Args:
            example: One copy, or what all copies are made of.
            info: What a first step told: the spec must say before the run whether success is known.
            registered: How Gymnasium knows it.
            seedable: See `EnvSpec`.
            restarts_itself: See `EnvSpec`.
            reason: Why it is not seedable.
        """
        config, copies = self.config, len(self._seeds)
        known = next((key for key in SUCCESS_KEYS if key in info), None)
        self._success = known if config.success_key is None else config.success_key
        self._terms = {k: k.removeprefix("reward_") for k in info if k.startswith("reward_")}
        self._made_of = _made_of(config, example.unwrapped)
        if not reason and not config.resumable:
            reason = "env.resumable is false"
        elif not reason and registered is not None and registered.nondeterministic:
            reason = "it is registered as nondeterministic"
        step_seconds = getattr(example.unwrapped, "dt", None)
        limit = registered.max_episode_steps if registered else None
        self.spec = EnvSpec(
            observation={leaf.name: leaf.spec for leaf in self._leaves},
            action=self._action.spec,
            num_envs=copies,
            max_steps=limit if config.max_steps is None else config.max_steps,
            tasks=(config.id,),
            seedable=seedable,
            has_state=not reason,
            has_success=self._success is not None,
            cameras=(CAMERA,) if config.render else (),
            control_hz=1.0 / float(step_seconds) if step_seconds else None,
            restarts_itself=restarts_itself,
            reason=reason,
        )

    # ---- the protocol ------------------------------------------------------------------------------------------

    def get_state(self) -> State:
        """Seed and actions of each copy's episode, and its observation as a check.

        Raises:
            CapabilityError: `spec.has_state` is False.
        """
        self._needs_state()
        shape = (0, *self._action.shape)
        actions = [np.stack(a) if a else np.empty(shape, self._action.dtype) for a in self._actions]
        return {
            "id": self.config.id,
            "seeds": torch.from_numpy(self._seeds.copy()),
            "actions": [torch.from_numpy(a) for a in actions],
            "obs": {name: torch.from_numpy(x.copy()) for name, x in self._obs.items()},
        }

    def set_state(self, state: State) -> Obs:
        """Play the episodes of `get_state` again; costs as many steps as they are old.

        Raises:
            CheckpointError: The state is of another env or number of copies.
            CapabilityError: An episode did not repeat, or `spec.has_state` is False.
        """
        self._needs_state()
        copies = len(self._seeds)
        if state["id"] != self.config.id or len(state["actions"]) != copies:
            raise CheckpointError(
                f"{self.where}: the state is of {len(state['actions'])} copies of '{state['id']}', expected "
                f"{copies} of '{self.config.id}'; build the env as the state's run did"
            )
        seeds, actions = state["seeds"].numpy(), [a.numpy() for a in state["actions"]]
        self._replay(seeds, actions)
        for name, x in state["obs"].items():
            same = (self._obs[name] == x.numpy()) | ((self._obs[name] != self._obs[name]) & (x != x).numpy())
            moved = np.flatnonzero(~same.reshape(copies, -1).all(1) & (seeds >= 0))
            if len(moved):
                raise CapabilityError(
                    f"{self.where} did not repeat its episode: after {len(actions[moved[0]])} replayed steps '{name}' "
                    f"of copy {moved[0]} differs from the saved one, so it depends on more than the seed and the "
                    "actions; set env.resumable: false, and a resumed run begins new episodes instead"
                )
        return self._observe()

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        """Pictures [len(copies), H, W, 3] uint8, drawn at the env's own size and scaled.

        Raises:
            NotFoundError: No such camera.
            CapabilityError: The env cannot draw on this machine.
        """
        if camera not in self.spec.cameras:
            hint = nearest(camera, self.spec.cameras) if self.spec.cameras else "; set env.render: true to get one"
            raise NotFoundError(f"{self.where}: camera '{camera}' does not exist{hint}")
        if not len(copies):
            return torch.empty(0, height, width, 3, dtype=torch.uint8, device=self.device)
        frames = [torch.from_numpy(np.ascontiguousarray(frame)) for frame in self._frames(copies.tolist())]
        return resized(torch.stack(frames), height, width).to(self.device)

    def manifest(self) -> dict[str, Any]:
        """What results depend on: the env's package or file, and MuJoCo's version and the model where there are."""
        package, mujoco_too, more = self._made_of
        names = {"gymnasium", *importlib.metadata.packages_distributions().get(package, ()), *mujoco_too}
        return {"id": self.config.id, "kwargs": self.config.kwargs, "packages": installed(sorted(names)), **more}

    # ---- inside -------------------------------------------------------------------------------------------------

    def _replay(self, seeds: Array, actions: list[Array]) -> None:
        """Play the episodes of these seeds [B] (-1: none) and actions of each copy [steps, *shape] again."""
        raise NotImplementedError

    def _frames(self, copies: list[int]) -> list[Any]:
        """A picture [h, w, 3] of each of these copies."""
        raise NotImplementedError

    def _draw(self, env: Any) -> Any:
        try:
            return env.render()
        except gym_error.DependencyNotInstalled as error:
            raise MissingExtraError(f"{self.where} cannot draw: {error}; or set env.render: false") from None
        except Exception as error:
            _let_go(error)
            raise CapabilityError(
                f"{self.where} cannot draw on this machine: {str(error).rstrip('.')}; MuJoCo envs need a display or "
                "MUJOCO_GL=egl with the system packages libegl1 and libgl1; or set env.render: false"
            ) from error

    def _observe(self) -> Obs:
        return {name: self._tensor(x.copy()) for name, x in self._obs.items()}

    def _tensor(self, x: Array) -> Tensor:
        return torch.from_numpy(x).to(self.device)

    def _needs_state(self) -> None:
        if not self.spec.has_state:
            raise CapabilityError(
                f"{self.where} cannot save its state: {self.spec.reason}; a resumed run begins new episodes"
            )


def _let_go(error: Exception) -> None:
    """Delete what was half made when an error came; Gymnasium's viewers answer that with a traceback on stderr."""
    hook, sys.unraisablehook = sys.unraisablehook, lambda _: None
    try:
        traceback.clear_frames(error.__traceback__)
    finally:
        sys.unraisablehook = hook


def _made_of(config: Config, inner: Any) -> tuple[str, list[str], dict[str, Any]]:
    """The env's module, ["mujoco"] if it uses it, and what else a manifest tells.

    Who steps the copies changes nothing, unless it is a simulator of its own.
    """
    module, others, more = type(inner).__module__, [], {}
    if isinstance(getattr(inner, "model", None), mujoco.MjModel):
        others = ["mujoco"]
        file = Path(str(getattr(inner, "fullpath", "")))
        more = {"model": checksum(file.read_bytes())} if file.is_file() else {}
    kind: type = type(inner)
    more |= source(kind)
    if config.vectorization_mode == "vector_entry_point":
        more["class"] = f"{module}.{type(inner).__qualname__}"
    return module.split(".")[0], others, more
