"""Any Gymnasium id: B independent copies, stepped one after another in this process.

A copy is restarted only by `reset`, with the seed of its episode, so the last observation of an episode is the true
one and the same seed always starts the same episode. Observations of a plain Box are called "state".
"""

from __future__ import annotations

import importlib.metadata
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal

import gymnasium
import mujoco
import numpy as np
import torch
from gymnasium import error as gym_error
from pydantic import Field, JsonValue
from torch import Tensor

from embodied_rl.envs._spaces import ActionMap, Array, check_action, leaves, resized
from embodied_rl.errors import CapabilityError, CheckpointError, ConfigError, MissingExtraError, NotFoundError, nearest
from embodied_rl.runfolder import checksum, installed
from embodied_rl.section import Section
from embodied_rl.types import EnvSpec, Obs, Split, State, Step

log = logging.getLogger(__name__)

CAMERA = "default"
SUCCESS_KEYS = ("success", "is_success")


class Config(Section):
    """Settings of an env from Gymnasium or from a package that registers its envs there."""

    type: Literal["gymnasium"] = "gymnasium"
    id: str = Field(min_length=1)
    """As in `gymnasium.make`: `HalfCheetah-v5`, or `package:Name-v0` for envs that a package registers on import."""
    kwargs: dict[str, JsonValue] = {}
    """Further arguments of `gymnasium.make`, for example {forward_reward_weight: 2.0}."""
    max_steps: int | None = Field(None, ge=1)
    """Control steps after which an episode is truncated; null keeps the limit the id was registered with."""
    success_key: str | None = None
    """Entry of `info` that says the goal is reached; null looks for `success` and `is_success` in a first step."""
    resumable: bool = True
    """Remember each episode's actions, so that its state can be restored by replaying them; false saves the memory."""
    render: bool = False
    """Offer the camera `default` (render_mode rgb_array); needs what the env's own drawing needs."""


class GymnasiumEnv:
    """See `embodied_rl.types.Env`.

    Gymnasium has no way to read or write an env's state, so `get_state` holds the seed and the actions of each running
    episode and `set_state` plays them again (its cost: as many steps as the episodes are old). The observation at the
    end must be the stored one bit for bit; an env that draws random numbers behind `reset(seed=...)` is refused there.
    """

    def __init__(self, config: Config, envs: list[gymnasium.Env[Any, Any]], device: torch.device) -> None:
        """Join copies that `build` made."""
        first = envs[0]
        self.config, self.device = config, device
        self.where = f"env gymnasium: '{config.id}'"
        self._envs = envs
        self._leaves = leaves(first.observation_space, self.where)
        self._action = ActionMap(first.action_space, self.where)
        info = self._probe(first)
        self._success = _success_key(config, info)
        terms = [k for k, v in info.items() if k.startswith("reward_") and np.ndim(v) == 0]
        self._terms = {k: k.removeprefix("reward_") for k in terms}
        step_seconds = getattr(first.unwrapped, "dt", None)
        registered = first.spec
        b = len(envs)
        self.spec = EnvSpec(
            observation={leaf.name: leaf.spec for leaf in self._leaves},
            action=self._action.spec,
            num_envs=b,
            max_steps=registered.max_episode_steps if registered else None,
            tasks=(config.id,),
            seedable=True,
            has_state=config.resumable and not (registered is not None and registered.nondeterministic),
            has_success=self._success is not None,
            cameras=(CAMERA,) if config.render else (),
            control_hz=1.0 / float(step_seconds) if step_seconds else None,
        )
        self._obs = {leaf.name: np.zeros((b, *leaf.spec.shape), leaf.dtype) for leaf in self._leaves}
        self._seeds = np.full(b, -1, np.int64)
        self._running = np.zeros(b, bool)
        self._reached = np.zeros(b, bool)
        self._actions: list[list[Array]] = [[] for _ in envs]

    # ---- the protocol ------------------------------------------------------------------------------------------

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Start new episodes in the masked copies; returns the observation of all copies."""
        wanted = seeds.tolist()
        for i in mask.nonzero().flatten().tolist():
            self._start(i, wanted[i])
        return self._observe()

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Advance one control step; copies that are not active or have ended stay where they are, with reward 0."""
        check_action(action, self.spec.action, len(self._envs), self.device, self.where)
        assert (self._seeds >= 0).any(), "step before the first reset"
        native = self._action(action)
        go = self._running if active is None else self._running & active.cpu().numpy()
        b = len(self._envs)
        reward, terminated, truncated = np.zeros(b, np.float32), np.zeros(b, bool), np.zeros(b, bool)
        terms = {name: np.zeros(b, np.float32) for name in self._terms.values()}
        for i in np.flatnonzero(go).tolist():
            obs, reward[i], terminated[i], cut, info = self._envs[i].step(self._native(native, i))
            truncated[i] = cut and not terminated[i]
            self._read(i, obs)
            if self._success is not None:
                self._reached[i] = bool(info.get(self._success, False))
            for key, name in self._terms.items():
                terms[name][i] = info.get(key, 0.0)
            if self.spec.has_state:
                self._actions[i].append(native[i])
        self._running &= ~(terminated | truncated)
        return Step(
            obs=self._observe(),
            reward=self._tensor(reward),
            terminated=self._tensor(terminated),
            truncated=self._tensor(truncated),
            success=self._tensor(self._reached.copy()) if self.spec.has_success else None,
            metrics={name: self._tensor(x) for name, x in terms.items()},
        )

    def get_state(self) -> State:
        """Seed and actions of each copy's episode, and its observation as a check.

        Raises:
            CapabilityError: `resumable` is false, or the id is registered as nondeterministic.
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
            CapabilityError: An episode did not repeat.
        """
        self._needs_state()
        if state["id"] != self.config.id or len(state["actions"]) != len(self._envs):
            raise CheckpointError(
                f"{self.where}: the state is of {len(state['actions'])} copies of '{state['id']}', expected "
                f"{len(self._envs)} of '{self.config.id}'; build the env as the state's run did"
            )
        seeds = state["seeds"].tolist()
        for i, actions in enumerate(state["actions"]):
            if seeds[i] < 0:
                self._seeds[i], self._running[i], self._actions[i] = -1, False, []
                continue
            self._replay(i, seeds[i], actions.numpy())
            for name, x in state["obs"].items():
                if not np.array_equal(self._obs[name][i], x[i].numpy(), equal_nan=x.is_floating_point()):
                    raise CapabilityError(
                        f"{self.where} did not repeat its episode: after {len(actions)} replayed steps '{name}' of "
                        f"copy {i} differs from the saved one, so it depends on more than the seed and the actions; "
                        "set env.resumable: false, and a resumed run begins new episodes instead"
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
        frames = [torch.from_numpy(np.ascontiguousarray(self._draw(self._envs[i]))) for i in copies.tolist()]
        if not frames:
            return torch.empty(0, height, width, 3, dtype=torch.uint8, device=self.device)
        return resized(torch.stack(frames), height, width).to(self.device)

    def manifest(self) -> dict[str, Any]:
        """What results depend on: the env's package, and MuJoCo's version and the model's file where there is one."""
        inner: Any = self._envs[0].unwrapped
        package = type(inner).__module__.split(".")[0]
        names = {"gymnasium", *importlib.metadata.packages_distributions().get(package, ())}
        model: dict[str, Any] = {}
        if isinstance(getattr(inner, "model", None), mujoco.MjModel):
            names.add("mujoco")
            file = Path(str(getattr(inner, "fullpath", "")))
            model = {"model": checksum(file.read_bytes())} if file.is_file() else {}
        packages = installed(sorted(names))
        return {"id": self.config.id, "kwargs": self.config.kwargs, "packages": packages, **model}

    def close(self) -> None:
        """Close every copy; may be called twice."""
        for env in self._envs:
            env.close()
        self._envs = []

    # ---- inside -------------------------------------------------------------------------------------------------

    def _probe(self, env: gymnasium.Env[Any, Any]) -> dict[str, Any]:
        """What `info` holds after a first step: the spec must say before the run whether success is known."""
        obs, _ = env.reset(seed=0)
        for leaf in self._leaves:
            found = np.shape(leaf.read(obs))
            if found != leaf.spec.shape and not (found == () and leaf.spec.shape == (1,)):
                raise CapabilityError(
                    f"{self.where}: observation '{leaf.name}' has shape {list(found)}, but its space promises "
                    f"{list(leaf.spec.shape)}; mend the env's observation_space"
                )
        if self.config.render:
            self._draw(env)
        zeros = torch.zeros(1, *self._action.spec.shape, dtype=self._action.spec.dtype)
        return dict(env.step(self._native(self._action(zeros), 0))[4])

    def _start(self, i: int, seed: int) -> None:
        obs, info = self._envs[i].reset(seed=seed)
        self._seeds[i], self._running[i], self._actions[i] = seed, True, []
        self._reached[i] = bool(info.get(self._success, False)) if self._success else False
        self._read(i, obs)

    def _replay(self, i: int, seed: int, actions: Array) -> None:
        self._start(i, seed)
        for row in range(len(actions)):
            obs, _, terminated, truncated, info = self._envs[i].step(self._native(actions, row))
            if terminated or truncated:
                self._running[i] = False
            if self._success is not None:
                self._reached[i] = bool(info.get(self._success, False))
        if len(actions):
            self._read(i, obs)
        self._actions[i] = list(actions)

    def _native(self, actions: Array, i: int) -> Any:
        """One copy's action; a copy of the row, because an env may keep or change what it is given."""
        return int(actions[i]) if self._action.spec.kind == "discrete" else actions[i].copy()

    def _read(self, i: int, obs: Any) -> None:
        for leaf in self._leaves:
            self._obs[leaf.name][i] = leaf.read(obs)

    def _observe(self) -> Obs:
        return {name: self._tensor(x.copy()) for name, x in self._obs.items()}

    def _tensor(self, x: Array) -> Tensor:
        return torch.from_numpy(x).to(self.device)

    def _needs_state(self) -> None:
        if self.spec.has_state:
            return
        reason = "it is registered as nondeterministic" if self.config.resumable else "env.resumable is false"
        raise CapabilityError(f"{self.where} cannot save its state: {reason}; a resumed run begins new episodes")

    def _draw(self, env: gymnasium.Env[Any, Any]) -> Any:
        try:
            return env.render()
        except gym_error.DependencyNotInstalled as error:
            raise MissingExtraError(f"{self.where} cannot draw: {error}; or set env.render: false") from None
        except Exception as error:
            raise CapabilityError(
                f"{self.where} cannot draw on this machine: {error}; MuJoCo envs need a display or MUJOCO_GL=egl with "
                "the system packages libegl1 and libgl1; or set env.render: false"
            ) from error


def _success_key(config: Config, info: dict[str, Any]) -> str | None:
    if config.success_key is not None:
        return config.success_key
    return next((key for key in SUCCESS_KEYS if key in info), None)


def _make(config: Config, told: set[str]) -> gymnasium.Env[Any, Any]:
    """One copy; errors become sentences, and warnings are added to `told`."""
    where = f"env gymnasium: '{config.id}'"
    clash = sorted({"id", "max_episode_steps", "render_mode", "disable_env_checker"} & config.kwargs.keys())
    if clash:
        raise ConfigError(f"{where}: kwargs must not hold {', '.join(clash)}; use env.id, env.max_steps and env.render")
    settings: dict[str, Any] = dict(config.kwargs)
    if config.max_steps is not None:
        settings["max_episode_steps"] = config.max_steps
    if config.render:
        settings["render_mode"] = "rgb_array"
    try:
        with _warnings_into(told):
            return gymnasium.make(config.id, disable_env_checker=True, **settings)
    except gym_error.UnregisteredEnv as error:
        hint = nearest(config.id, _ids(config.id))
        if isinstance(error, gym_error.NamespaceNotFound):
            hint += "; an id like 'ALE/Pong-v5' exists once its package is installed and named: 'ale_py:ALE/Pong-v5'"
        raise NotFoundError(f"{where} does not exist{hint}") from None
    except (gym_error.DependencyNotInstalled, ImportError) as error:
        raise MissingExtraError(f"{where} needs a package that is not installed: {error}") from None
    except (TypeError, gym_error.Error) as error:
        raise ConfigError(f"{where} cannot be made: {error}; look at env.kwargs") from None


@contextmanager
def _warnings_into(told: set[str]) -> Iterator[None]:
    """Collect what Python and MuJoCo warn of; the latter would print it and write a MUJOCO_LOG.TXT, once per copy."""
    handler = mujoco.get_mju_user_warning()
    mujoco.set_mju_user_warning(told.add)
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            yield
    finally:
        mujoco.set_mju_user_warning(handler)
        told |= {str(warning.message) for warning in caught}


def _ids(wanted: str) -> list[str]:
    """Registered ids worth proposing: all of them when something is alike, else a few well-known ones."""
    known = list(gymnasium.registry)
    alike = nearest(wanted, known).startswith("; did")
    return known if alike else ["CartPole-v1", "HalfCheetah-v5", "Pendulum-v1"]


def build(config: Config, *, num_envs: int, device: torch.device, split: Split, seed: int) -> GymnasiumEnv:
    """Build copies of a Gymnasium env.

    Args:
        config: What to make.
        num_envs: Copies B.
        device: Where its tensors live; the env itself runs on the CPU.
        split: Not needed here: training and evaluation differ by the seeds that `reset` is given.
        seed: Not needed here either: every episode is seeded by `reset`.

    Raises:
        NotFoundError: No such id; names the nearest.
        MissingExtraError: The id needs a package that is not installed.
        CapabilityError: A space that is not understood.
        ConfigError: `gymnasium.make` refused the arguments.
    """
    envs: list[gymnasium.Env[Any, Any]] = []
    try:
        told: set[str] = set()
        for _ in range(num_envs):
            envs.append(_make(config, told))
        for message in sorted(told):
            log.info("env gymnasium: '%s': %s", config.id, message)
        return GymnasiumEnv(config, envs, device)
    except BaseException:
        for env in envs:
            env.close()
        raise
