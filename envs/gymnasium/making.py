"""Calling `gymnasium.make` and `gymnasium.make_vec`; what they refuse becomes a sentence."""

from __future__ import annotations

import importlib
import inspect
import logging
import signal
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

import gymnasium
import mujoco
from gymnasium import error as gym_error
from gymnasium.envs.registration import load_env_creator
from gymnasium.vector import AutoresetMode, VectorEnv

from embodied_rl.errors import CapabilityError, ConfigError, MissingExtraError, NotFoundError, nearest

if TYPE_CHECKING:
    from embodied_rl.envs.gymnasium import Config

log = logging.getLogger(__name__)

OURS = {
    "id", "max_episode_steps", "render_mode", "disable_env_checker", "num_envs", "vectorization_mode", "vector_kwargs",
    "wrappers",
}  # fmt: skip
"""Arguments of `make` and `make_vec` that are none of the env's own."""


def where_of(config: Config) -> str:
    """The env's id, for messages."""
    return f"env gymnasium: '{config.id}'"


def make_single(config: Config, told: set[str]) -> gymnasium.Env[Any, Any]:
    """One copy; warnings are added to `told`.

    Raises:
        UserError: It cannot be made.
    """
    settings = _settings(config)
    with _sentences(config, told, (TypeError,)):
        return gymnasium.make(config.id, disable_env_checker=True, **settings)


def make_vector(config: Config, num_envs: int, told: set[str]) -> VectorEnv[Any, Any, Any]:
    """A vector env, with autoreset mode Disabled where it can be had and nothing else is asked for.

    Args:
        config: With a `vectorization_mode`.
        num_envs: Copies B.
        told: Warnings are added to it.

    Raises:
        UserError: It cannot be made.
    """
    settings, mode = _settings(config), config.vectorization_mode
    assert mode is not None

    def make(**more: Any) -> Any:
        with _sentences(config, told, (TypeError, ValueError, AttributeError, AssertionError, RuntimeError)):
            return gymnasium.make_vec(config.id, num_envs, mode, **settings, **more)

    if mode != "vector_entry_point":
        with _interrupts_ignored():
            return _vector_env(config, make(vector_kwargs=_asked(config, config.vector_kwargs, AutoresetMode.DISABLED)))
    settings = _asked(config, settings)
    if "autoreset_mode" in settings or "autoreset_mode" not in inspect.signature(_creator(config)).parameters:
        return _vector_env(config, make())
    try:
        return _vector_env(config, make(autoreset_mode=AutoresetMode.DISABLED))
    except ConfigError as error:
        refusal = error.__cause__
        log.info("%s: its class refuses autoreset_mode Disabled (%s), so its own is taken", where_of(config), refusal)
        return _vector_env(config, make())


def _settings(config: Config) -> dict[str, Any]:
    clash = sorted(OURS & config.kwargs.keys())
    if clash:
        raise ConfigError(
            f"{where_of(config)}: kwargs must not hold {', '.join(clash)}; use env.id, env.max_steps, env.render, "
            "env.vectorization_mode and collect.copies"
        )
    settings: dict[str, Any] = dict(config.kwargs)
    if config.max_steps is not None:
        settings["max_episode_steps"] = config.max_steps
    if config.render:
        settings["render_mode"] = "rgb_array"
    return settings


def _asked(config: Config, settings: dict[str, Any], default: AutoresetMode | None = None) -> dict[str, Any]:
    """The arguments with the autoreset mode that they name as Gymnasium's own type, or with the default."""
    mode, known = settings.get("autoreset_mode", default), [m.value for m in AutoresetMode]
    if mode is None:
        return settings
    if not isinstance(mode, AutoresetMode) and mode not in known:
        raise ConfigError(f"{where_of(config)}: autoreset_mode '{mode}' does not exist{nearest(str(mode), known)}")
    return {**settings, "autoreset_mode": AutoresetMode(mode)}


def _creator(config: Config) -> Callable[..., Any]:
    """What the id registers as its vector env."""
    module, _, name = config.id.rpartition(":")
    with _sentences(config, set(), ()):
        if module:
            importlib.import_module(module)
        entry = gymnasium.spec(name).vector_entry_point
        if entry is None:
            raise CapabilityError(
                f"{where_of(config)} registers no vector_entry_point: set env.vectorization_mode: async or null"
            )
        return load_env_creator(entry) if isinstance(entry, str) else entry


def _vector_env(config: Config, env: Any) -> VectorEnv[Any, Any, Any]:
    if isinstance(env, VectorEnv):
        return env
    raise CapabilityError(
        f"{where_of(config)}: its vector_entry_point makes a {type(env).__name__}, expected a "
        "gymnasium.vector.VectorEnv; register a single env as entry_point, and set env.vectorization_mode: null"
    )


@contextmanager
def _sentences(config: Config, told: set[str], refusals: tuple[type[Exception], ...]) -> Iterator[None]:
    """Turn what making an env raises into the user's errors, and keep what it warns of."""
    where = where_of(config)
    try:
        with _warnings_into(told):
            yield
    except gym_error.UnregisteredEnv as error:
        hint = nearest(config.id, _ids(config.id))
        if isinstance(error, gym_error.NamespaceNotFound):
            hint += "; an id like 'ALE/Pong-v5' exists once its package is installed and named: 'ale_py:ALE/Pong-v5'"
        raise NotFoundError(f"{where} does not exist{hint}") from None
    except (gym_error.DependencyNotInstalled, ImportError) as error:
        raise MissingExtraError(f"{where} needs a package that is not installed: {error}") from None
    except (gym_error.Error, *refusals) as error:
        look = "look at env.kwargs" + (" and env.vector_kwargs" if config.vector_kwargs else "")
        registered = gymnasium.registry.get(config.id.rpartition(":")[2])
        if config.vectorization_mode != "vector_entry_point" and registered and registered.entry_point is None:
            look = "it has a vector env alone, so set env.vectorization_mode: vector_entry_point"
        raise ConfigError(f"{where} cannot be made: {error}; {look}") from error


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


@contextmanager
def _interrupts_ignored() -> Iterator[None]:
    """Processes that are started here do not hear Ctrl-C, so that the engine can finish its update and save."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    handler = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, handler)


def _ids(wanted: str) -> list[str]:
    """Registered ids worth proposing: all of them when something is alike, else a few well-known ones."""
    known = list(gymnasium.registry)
    alike = nearest(wanted, known).startswith("; did")
    return known if alike else ["CartPole-v1", "HalfCheetah-v5", "Pendulum-v1"]
