"""From an entry of `env.tasks` to a task; the files beside this one are the built-in tasks."""

from __future__ import annotations

import importlib
import json
import math
import pkgutil
from collections.abc import Sequence
from pathlib import PurePath
from types import ModuleType
from typing import Any, NamedTuple, cast

from pydantic import ValidationError

from embodied_rl import registry
from embodied_rl.envs.text.task import Task
from embodied_rl.errors import ConfigError, MissingExtraError, NotFoundError, nearest
from embodied_rl.section import Section

Entry = str | dict[str, Any]
GYM = "reasoning_gym/"
"""Short form: `reasoning_gym/chain_sum` is {task: reasoning_gym, dataset: chain_sum}."""


def names() -> list[str]:
    """The built-in tasks."""
    return sorted(m.name for m in pkgutil.iter_modules(__path__))


class Asked(NamedTuple):
    """What an entry says.

    Example: `Asked("arithmetic", "sums", 1.0, (("What is 1 + 2?", "1 + 2 = 3"),), {"digits": [3, 3]})`.
    """

    kind: str
    """A built-in name, a dotted module or a `.py` file."""
    name: str
    """How metrics call the task."""
    weight: float
    """How often training plays it, beside the others."""
    examples: tuple[tuple[str, str], ...]
    """What was asked and replied before each question."""
    settings: dict[str, Any]
    """Of its Config."""


def read_entry(entry: Entry) -> Asked:
    """Take an entry apart.

    Raises:
        ValueError: A mapping without `task`, a name that is no text, a weight that is no number above 0, or examples
            that are no pairs of texts.
    """
    settings = {"task": entry} if isinstance(entry, str) else dict(entry)
    kind = settings.pop("task", None)
    if not isinstance(kind, str) or not kind:
        raise ValueError(f"{entry} does not say which task: write {{task: arithmetic, ...}}")
    name = settings.pop("name", None)
    if name is not None and (not isinstance(name, str) or not name):
        raise ValueError(f"{entry}: name must be a text")
    weight = settings.pop("weight", 1.0)
    if isinstance(weight, bool) or not isinstance(weight, int | float) or not 0 < weight < math.inf:
        raise ValueError(f"{entry}: weight must be a number above 0")
    examples = settings.pop("examples", ())
    if not isinstance(examples, list | tuple) or not all(map(_is_pair, examples)):
        raise ValueError(f"{entry}: examples must be pairs of texts, [[question, reply], ...]")
    default = kind
    if kind.startswith(GYM):
        kind, settings = "reasoning_gym", {"dataset": kind.removeprefix(GYM), **settings}
    elif kind.endswith((".jsonl", "/")):
        default = PurePath(kind).stem
        kind, settings = "questions", {"path": kind, **settings}
    elif kind.endswith(".py"):
        default = PurePath(kind).stem
    return Asked(kind, name or default, float(weight), tuple((a, b) for a, b in examples), settings)


def _is_pair(example: Any) -> bool:
    return isinstance(example, list | tuple) and len(example) == 2 and all(isinstance(x, str) and x for x in example)


def check_entry(entry: Entry) -> str:
    """The name of an entry's task, after checking what can be checked without reading the disk.

    Raises:
        ValueError: No such built-in task, or settings that it refuses.
    """
    asked = read_entry(entry)
    if "." not in asked.kind:
        try:
            _configure(_module(asked.kind), asked.kind, asked.settings)
        except (NotFoundError, ConfigError) as error:
            raise ValueError(str(error)) from None
    return asked.name


def build_task(entry: Entry) -> Task:
    """Make the task of an entry.

    Raises:
        UserError: It does not exist, refuses its settings, or needs a package that is not installed.
    """
    asked = read_entry(entry)
    kind = asked.kind
    module = _module(kind)
    config = _configure(module, kind, asked.settings)
    try:
        return cast(Task, module.build(config))
    except ModuleNotFoundError as error:
        extra = registry.EXTRAS.get((error.name or "").split(".")[0])
        if extra is None:
            raise
        raise MissingExtraError(
            f"task '{kind}' needs the package '{error.name}', which is not installed; run: pip install "
            f"'embodied-rl[{extra}]'"
        ) from error


def _module(kind: str) -> ModuleType:
    if "." in kind:
        return registry.load("env", kind)
    if kind not in names():
        raise NotFoundError(f"task '{kind}' does not exist{nearest(kind, names())}; a task of your own is a .py file")
    return importlib.import_module(f"{__name__}.{kind}")


def _configure(module: ModuleType, kind: str, settings: dict[str, Any]) -> Section:
    try:
        return cast(Section, module.Config.model_validate_json(json.dumps(settings)))
    except ValidationError as error:
        told = "; ".join(_sentence(e["loc"], e["msg"], e.get("input")) for e in error.errors())
        raise ConfigError(f"task '{kind}': {told}") from None


def _sentence(place: Sequence[int | str], message: str, found: object) -> str:
    where = ".".join(map(str, place))
    return f"{where} ({found}): {message}" if where else message.removeprefix("Value error, ")
