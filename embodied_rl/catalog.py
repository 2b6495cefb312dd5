"""What a recipe can name on this machine: one line for each env, policy, algorithm, reward model and recipe."""

from __future__ import annotations

import ast
import importlib.util
from pathlib import Path

from embodied_rl import registry
from embodied_rl.config import packaged_configs, recipe_names
from embodied_rl.errors import MissingExtraError


def describe(what: str) -> list[tuple[str, str, str]]:
    """Describe everything of one sort.

    Args:
        what: "envs", "policies", "algorithms", "rewards" or "recipes".

    Returns:
        rows: (name, first line of its documentation, "" or what is missing to use it).
    """
    if what == "recipes":
        return [(name, _first_comment(packaged_configs() / f"{name}.yaml"), "") for name in recipe_names()]
    kind = next(kind for kind, plural in registry.PLURAL.items() if plural == what)
    return [(name, _first_docstring_line(kind, name), _missing(kind, name)) for name in registry.names(kind)]


def _first_docstring_line(kind: registry.Kind, name: str) -> str:
    # Read, not imported: a file whose extra is missing still says what it is.
    spec = importlib.util.find_spec(f"{registry.PACKAGES[kind]}.{name}")
    assert spec is not None and spec.origin is not None
    text = ast.get_docstring(ast.parse(Path(spec.origin).read_text(encoding="utf-8"))) or ""
    return text.partition("\n")[0]


def _missing(kind: registry.Kind, name: str) -> str:
    try:
        registry.load(kind, name)
    except MissingExtraError as error:
        return f"not installed: {error}"
    return ""


def _first_comment(path: Path) -> str:
    first = path.read_text(encoding="utf-8").partition("\n")[0]
    return first.removeprefix("#").strip() if first.startswith("#") else ""
