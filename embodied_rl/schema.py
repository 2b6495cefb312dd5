"""Check a tree of values against the `Config` classes it names; every problem is told with where it was written."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, get_args

from pydantic import Field, ValidationError, create_model

from embodied_rl import registry, yaml_strict
from embodied_rl.errors import ConfigError, MissingExtraError, NotFoundError, nearest
from embodied_rl.recipe import Recipe
from embodied_rl.section import Section
from embodied_rl.yaml_strict import Node, merge

COMPONENTS: tuple[registry.Kind, ...] = ("env", "policy", "algorithm", "reward")
OPTIONAL: tuple[registry.Kind, ...] = ("reward",)
"""Components that a recipe may leave out (null)."""


@dataclass(frozen=True)
class Resolved:
    """A recipe in which nothing is left open, and where each of its values comes from."""

    recipe: Recipe
    sources: dict[str, str]
    """Dotted path -> "file:line", "command line" or "default"; for example {"collect.copies": "demo.yaml:4"}."""


class Problems(list[str]):
    """Complete lines, each with its place."""

    incomplete = False
    """A file could not be read, so what is missing is not the user's omission."""

    def raise_if_any(self, where: str) -> None:
        """Raise ConfigError with all of them, `where` being for example "the recipe my.yaml"."""
        if self:
            lines = list(dict.fromkeys(self))
            head = f"{len(lines)} problem{'s' if len(lines) > 1 else ''} in {where}:"
            raise ConfigError("\n".join([head, *(f"  {line}" for line in lines)]))


def resolve(root: Node, name: str, problems: Problems) -> Resolved:
    """Check a tree of values and freeze it into a recipe.

    Args:
        root: The whole recipe, files and overrides merged.
        name: What to call it in the first line of the message.
        problems: Found while reading; they are told together with those found here.

    Returns:
        resolved: The recipe and the source of every value.

    Raises:
        ConfigError: There is at least one problem.
    """
    absent = [kind for kind in OPTIONAL if root.value.get(kind, Node(None, name)).value is None]
    components = {kind: _component(kind, root, name, problems) for kind in COMPONENTS if kind not in absent}
    # A component that could not be loaded is checked no further, but the rest of the recipe still is.
    fields: dict[str, Any] = {kind: (config, ...) if config else (Any, None) for kind, config in components.items()}
    schema = create_model("Recipe", __base__=Recipe, **fields)
    try:
        composed = schema.model_validate_json(json.dumps(root.plain()))
    except ValidationError as error:
        problems.extend(_describe(error, root, schema, tell_missing=not problems.incomplete))
    if components["env"]:
        problems.extend(_suite_problems(root, components["env"]))
    problems.raise_if_any(f"the recipe {name}")
    recipe = Recipe.model_validate(dict(composed))
    return Resolved(recipe, {path: _source(path.split("."), root) for path in flatten(recipe.dump())})


def suite_env(env: Section, changes: dict[str, Any]) -> Section:
    """The env section with some settings changed, as a suite of the evaluation asks for it.

    Args:
        env: The recipe's.
        changes: One entry of `evaluate.suites`; `resolve` has checked it.
    """
    both = (env.model_dump(mode="json"), changes)
    below, top = (yaml_strict.parse(yaml_strict.dump(x), "", lines=False) for x in both)
    return type(env).model_validate_json(json.dumps(merge(below, top).plain()))


def _suite_problems(root: Node, schema: type[Section]) -> list[str]:
    """What is wrong with the env of each suite; nothing while the env itself, or the list of suites, is wrong."""
    evaluate, env = root.value.get("evaluate"), root.value["env"]
    suites = evaluate.value.get("suites") if evaluate and isinstance(evaluate.value, dict) else None
    try:
        plain = schema.model_validate_json(json.dumps(env.plain()))
    except ValidationError:
        return []
    problems: list[str] = []
    for name, suite in suites.value.items() if suites and isinstance(suites.value, dict) else ():
        if not isinstance(suite.value, dict):
            continue
        path = f"evaluate.suites.{name}"
        if "type" in suite.value:
            problems.append(f"{suite.value['type'].where}: {path}.type: a suite stays in the recipe's env; remove it")
            continue
        changed = merge(env, suite)
        try:
            same = schema.model_validate_json(json.dumps(changed.plain())) == plain
        except ValidationError as error:
            problems += _describe(error, changed, schema, tell_missing=True, prefix=path)
        else:
            problems += [f"{suite.where}: {path}: changes no setting of env; change one, or remove it"] if same else []
    return problems


def resolve_component(kind: registry.Kind, name: str, settings: Node | None, problems: Problems) -> Section:
    """Check the settings of one env, policy, algorithm or reward model on its own.

    Args:
        kind: "env", "policy", "algorithm" or "reward".
        name: As in `type`.
        settings: Its section; None for all defaults.
        problems: Found while reading the settings.

    Returns:
        config: Its `Config`, with `type` filled in.

    Raises:
        NotFoundError: There is no such module.
        MissingExtraError: An optional dependency of it is not installed.
        ConfigError: There is at least one problem.
    """
    schema = component_schema(registry.load(kind, name).Config)
    given = settings.value if settings is not None else {}
    root = Node({**given, "type": Node(name, "command line")}, "command line")
    config: Section | None = None
    try:
        config = schema.model_validate_json(json.dumps(root.plain()))
    except ValidationError as error:
        problems.extend(_describe(error, root, schema, tell_missing=not problems.incomplete))
    problems.raise_if_any(f"the settings of {kind} {name}")
    assert config is not None
    return config


@cache  # two models made from one Config would never compare equal
def component_schema(config: type[Section]) -> type[Section]:
    """A module's `Config` with the field `type`, which says in the resolved recipe whose settings these are."""
    kind = Field(description="Name of the built-in module, a dotted module path, or the path of a .py file.")
    return create_model(config.__name__, __base__=config, __module__=config.__module__, type=(str, kind))


def _component(kind: registry.Kind, root: Node, name: str, problems: Problems) -> type[Section] | None:
    """The schema of the module that the section's `type` names; None, and a problem, when there is none."""
    section = root.value.get(kind, Node(None, name))
    chosen = section.value.get("type") if isinstance(section.value, dict) else None
    if chosen is not None and isinstance(chosen.value, str):
        try:
            return component_schema(registry.load(kind, chosen.value).Config)
        except (NotFoundError, MissingExtraError) as error:
            problems.append(f"{chosen.where}: {kind}.type: {error}")
            return None
    if kind not in root.value and problems.incomplete:
        return None
    example = f"known: {', '.join(registry.names(kind))}, a dotted module, or a .py file"
    if kind not in root.value:
        problem = f"{kind}: the section is missing; add `{kind}: {{type: ...}}` ({example})"
    elif not isinstance(section.value, dict):
        got = show(section.plain())
        problem = f"{kind}: expected a section, got {got}; write `{kind}: {{type: ...}}` ({example})"
    elif chosen is None:
        problem = f"{kind}.type: missing; it says which {kind} these settings are for ({example})"
    else:
        problem = f"{kind}.type: expected a name, got {show(chosen.plain())} ({example})"
    problems.append(f"{chosen.where if chosen else section.where}: {problem}")
    return None


def _describe(
    error: ValidationError, root: Node, schema: type[Section], *, tell_missing: bool, prefix: str = ""
) -> list[str]:
    """One line per wrong place; a union reports each of its members, which are joined here."""
    lines: dict[tuple[str, str], list[str]] = {}
    for item in error.errors():
        absent = item["type"] == "missing"
        path, node = _locate(item["loc"], root, absent=absent)
        if absent and (path in COMPONENTS or not tell_missing):
            continue  # a missing component was told by _component, with what is known
        messages = lines.setdefault((node.where, ".".join(filter(None, (prefix, path)))), [])
        messages.append(_message(item, path, node, schema))
    return [
        f"{where}: {path + ': ' if path else ''}{' or '.join(dict.fromkeys(messages))}"
        for (where, path), messages in lines.items()
    ]


def _locate(loc: Sequence[str | int], root: Node, *, absent: bool) -> tuple[str, Node]:
    """The dotted path of an error and the node nearest to it; pydantic's union tags are left out."""
    node, path = root, ""
    for index, part in enumerate(loc):
        last = index == len(loc) - 1
        if isinstance(node.value, dict) and part in node.value:
            node = node.value[str(part)]
        elif isinstance(node.value, list) and isinstance(part, int) and part < len(node.value):
            node = node.value[part]
        elif not (absent and last):
            continue
        path += f"[{part}]" if isinstance(part, int) else f".{part}" if path else part
    return path, node


_WORDS = {
    "Value error, ": "",
    "Input should be": "expected",
    "a valid array": "a list",
    "a valid tuple": "a list",
    "a valid list": "a list",
    "a valid string": "text",
    "String should match pattern": "expected text of the pattern",
    "an object": "a section",
}
"""Pydantic's words -> the words of a recipe."""


def _message(item: Any, path: str, node: Node, schema: type[Section]) -> str:
    if item["type"] == "extra_forbidden":
        known = _known_keys(schema, item["loc"][:-1])
        key = str(item["loc"][-1])
        nested = "; a dotted key works only on the command line, nest it here" if "." in key else nearest(key, known)
        return f"unknown key{nested}"
    if item["type"] == "missing":
        return "missing; it has no default"
    text = item["msg"]
    for old, new in _WORDS.items():
        text = text.replace(old, new, 1)
    value = node.plain()
    if item["type"] == "value_error" or isinstance(value, dict):
        return text if item["type"] == "value_error" else f"{text}, got a section"
    return f"{text}, got {show(value)}{_hint(item['type'], value)}"


def _hint(kind: str, value: Any) -> str:
    if kind in ("int_type", "int_parsing", "float_type") and isinstance(value, str):
        digits = value.replace("_", "")
        return f"; write {digits}" if digits != value and digits.isdigit() else ""
    if kind == "int_type" and isinstance(value, float) and value.is_integer():
        return f"; write {int(value)}"
    if kind == "bool_type" and str(value).lower() in ("on", "yes", "off", "no", "1", "0"):
        return f"; write {'true' if str(value).lower() in ('on', 'yes', '1') else 'false'}"
    return ""


def _known_keys(schema: type[Section], loc: Sequence[str | int]) -> list[str]:
    level = [schema]
    for part in loc:
        fields = [model.model_fields[part] for model in level if isinstance(part, str) and part in model.model_fields]
        level = [s for field in fields for s in _sections_in(field.annotation)] or level
    return sorted({name for model in level for name in model.model_fields})


def _sections_in(annotation: Any) -> list[type[Section]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        return [annotation]
    return [section for argument in get_args(annotation) for section in _sections_in(argument)]


def show(value: Any, limit: int | None = 60) -> str:
    """A value as messages and tables show it: strings quoted, YAML's true and null, cut after `limit` characters."""
    if isinstance(value, dict) and value:
        return "a section"
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value)
    return text if limit is None or len(text) <= limit else text[: limit - 3] + "..."


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested sections as one level: {"collect.copies": 64, ...}; lists and empty sections are values."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) and value else {f"{prefix}{key}": value}
    return flat


def _source(keys: Sequence[str], root: Node) -> str:
    node = root
    for key in keys:
        if not isinstance(node.value, dict) or key not in node.value:
            return "default"
        node = node.value[key]
    return "command line" if node.where.startswith("command line: ") else node.where
