"""Errors a user can cause: each says where, what was found, what was expected and what to do.

`UserError` and its children are what the command line turns into one sentence and exit code 2.
Each child also inherits the standard type, so `except ValueError` works for callers of the library.
Broken invariants of our own are `assert`, never one of these.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class UserError(Exception):
    """Root of every error that the user can mend; the message is complete without a traceback."""


class ConfigError(UserError, ValueError):
    """A recipe or a command-line override is wrong; all problems are told at once."""


class ShapeError(UserError, ValueError):
    """A tensor has another shape, dtype or device than the receiver was built for."""


class NotFoundError(UserError, ValueError):
    """A name (env, policy, algorithm, recipe, file, device, camera) does not exist."""


class MissingExtraError(UserError, ImportError):
    """An optional dependency is not installed; the message names the extra that brings it."""


class CheckpointError(UserError, ValueError):
    """A checkpoint is damaged, foreign, or made for another policy or env."""


class RunFolderError(UserError, OSError):
    """The run folder cannot be created, written or read."""


class CapabilityError(UserError, ValueError):
    """The chosen parts cannot work together (groups on an env that cannot be seeded, and so on)."""


class SimulatorError(UserError, RuntimeError):
    """A simulator in a process of its own does not start, has other versions, or is lost again and again."""


class DivergenceError(UserError, ArithmeticError):
    """Training produced non-finite numbers too many times in a row."""


def nearest(name: str, known: Iterable[str]) -> str:
    """Return "; did you mean 'x'?" for the closest known name, or the list of them.

    Args:
        name: What the user wrote.
        known: Every accepted name.

    Returns:
        hint: A clause that starts with "; ", ready to be appended to a message.
    """
    names = sorted(known)
    close = difflib.get_close_matches(name, names, n=1, cutoff=0.5)
    if close:
        return f"; did you mean '{close[0]}'?"
    return f"; known: {', '.join(names)}" if names else "; none is available"
