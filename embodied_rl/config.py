"""From a recipe file and overrides to one frozen `Recipe`, or to every problem at once with where it was written.

A recipe is a YAML file. `extends:` names the files it is laid over (relative to the file, then in the packaged
`configs/`); sections merge deeply, lists are replaced, and a section whose `type` changes drops the keys of the old
type. `a.b=c` on the command line comes last. The `env`, `policy` and `algorithm` sections are checked by the `Config`
of the module that their `type` names, so a file added to `envs/` brings its own settings.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, get_args

from pydantic import Field, ValidationError, create_model

from embodied_rl import registry, yaml_strict
from embodied_rl.errors import ConfigError, MissingExtraError, NotFoundError, nearest
from embodied_rl.recipe import Recipe
from embodied_rl.section import Section
from embodied_rl.yaml_strict import Node, YamlError

COMPONENTS: tuple[registry.Kind, ...] = ("env", "policy", "algorithm")
_OVERRIDE = re.compile(r"(?P<path>[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*)=(?P<value>.*)", re.DOTALL)


@dataclass(frozen=True)
class Resolved:
    """A recipe in which nothing is left open, and where each of its values comes from."""

    recipe: Recipe
    sources: dict[str, str]
    """Dotted path -> "file:line", "command line" or "default"; for example {"collect.copies": "demo.yaml:4"}."""


class _Problems(list[str]):
    """Complete lines, each with its place."""

    incomplete = False
    """A file could not be read, so what is missing is not the user's omission."""


def load_recipe(path_or_name: str | Path, overrides: Sequence[str] = ()) -> Resolved:
    """Read a recipe with everything it extends, apply overrides and check the result.

    Args:
        path_or_name: A file, a run folder (its `recipe.yaml`), or a name in the packaged `configs/`.
        overrides: `a.b=c`, values by the same YAML rules: `train.env_steps=1000`, `env.tasks=[reach, push]`.

    Returns:
        resolved: The recipe and the source of every value.

    Raises:
        NotFoundError: There is no such recipe.
        ConfigError: All problems, each with its file and line or its override.
    """
    path = find_recipe(path_or_name)
    problems = _Problems()
    root = _read(path, (), problems)
    overlay = _parse_overrides(overrides, problems)
    return _resolve(_merge(root, overlay) if overlay else root, display(path), problems)


def load_resolved(path: str | Path) -> Resolved:
    """Read a resolved recipe as `dump_recipe` wrote it into a run folder; nothing is extended or overridden."""
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"recipe '{path}': no such file")
    problems = _Problems()
    return _resolve(_read(path, (), problems, extends=False), display(path), problems)


def build_recipe(data: dict[str, Any]) -> Recipe:
    """Check a recipe given as plain data, for use from Python.

    Args:
        data: As in a YAML file, `{"env": {"type": "tabletop"}, "policy": {"type": "mlp"}, ...}`.

    Raises:
        ConfigError: All problems at once.
    """
    return _resolve(yaml_strict.parse(yaml_strict.dump(data), "recipe", lines=False), "recipe", _Problems()).recipe


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML that `load_resolved` reads back to an equal recipe, floats bit for bit."""
    data = recipe.dump()
    for kind in COMPONENTS:
        data[kind] = {"type": data[kind].pop("type"), **data[kind]}
    return yaml_strict.dump(data)


def packaged_configs() -> Path:
    """The folder `configs/`: inside the package when installed as a wheel, beside it in the repository."""
    here = Path(__file__).resolve().parent
    return here / "configs" if (here / "configs").is_dir() else here.parent / "configs"


def recipe_names() -> list[str]:
    """Names of the packaged recipes (the parts in sub-folders are not recipes)."""
    return sorted(path.stem for path in packaged_configs().glob("*.yaml"))


def find_recipe(path_or_name: str | Path) -> Path:
    """Return the file behind a path, a run folder or a packaged name; NotFoundError when there is none."""
    given = Path(path_or_name).expanduser()
    places = [given, given / "recipe.yaml", packaged_configs() / given, packaged_configs() / f"{given}.yaml"]
    for path in places:
        if path.is_file():
            return path
    hint = nearest(given.stem, recipe_names())
    raise NotFoundError(f"recipe '{path_or_name}': no such file, and no packaged recipe has this name{hint}")


def display(path: Path) -> str:
    """A path as messages show it: relative to the working folder or to the packaged configs where possible."""
    absolute = path.resolve()
    if absolute.is_relative_to(Path.cwd()):
        return str(absolute.relative_to(Path.cwd()))
    if absolute.is_relative_to(packaged_configs()):
        return str(Path("configs") / absolute.relative_to(packaged_configs()))
    return str(absolute)


@cache  # two models made from one Config would never compare equal
def component_schema(config: type[Section]) -> type[Section]:
    """A module's `Config` with the field `type`, which says in the resolved recipe whose settings these are."""
    kind = Field(description="Name of the built-in module, a dotted module path, or the path of a .py file.")
    return create_model(config.__name__, __base__=config, __module__=config.__module__, type=(str, kind))


def _read(path: Path, chain: tuple[Path, ...], problems: _Problems, *, extends: bool = True) -> Node:
    name = display(path)
    empty = Node({}, f"{name}:1")
    try:
        root = yaml_strict.parse(path.read_text(encoding="utf-8"), name)
    except YamlError as error:
        problems.extend(error.problems)
        root = error.partial
    except UnicodeDecodeError as error:
        problems.append(f"{name}: not a text file in UTF-8 (byte {error.start} is 0x{error.object[error.start]:02x})")
        root = None
    except OSError as error:
        problems.append(f"{name}: cannot be read: {error.strerror}")
        root = None
    if root is not None and root.value is None:
        root = empty
    if root is not None and not isinstance(root.value, dict):
        problems.append(f"{root.where}: a recipe is a mapping (`key: value` lines), got {_show(root.plain())}")
        root = None
    if root is None:
        problems.incomplete = True
        return empty
    entries = dict(root.value)
    parents = entries.pop("extends", None)
    own = Node({key: _anchor_type(key, node, path) for key, node in entries.items()}, root.where)
    if parents is None:
        return own
    if not extends:
        problems.append(f"{parents.where}: extends: a resolved recipe extends nothing")
        return own
    base = _read_parents(parents, path, (*chain, path.resolve()), problems)
    return _merge(base, own)


def _read_parents(parents: Node, path: Path, chain: tuple[Path, ...], problems: _Problems) -> Node:
    names = parents.value if isinstance(parents.value, list) else [parents]
    merged = Node({}, parents.where)
    for name in names:
        if not isinstance(name.value, str) or not name.value:
            problems.append(f"{name.where}: extends: expected a file name or a list of them, got {_show(name.plain())}")
            problems.incomplete = True
            continue
        found = _find_parent(name.value, path)
        if found is None:
            where = "neither beside this file nor in the packaged configs/"
            problems.append(f"{name.where}: extends: '{name.value}' is {where}")
            problems.incomplete = True
        elif found.resolve() in chain:
            loop = [*chain[chain.index(found.resolve()) :], found]
            problems.append(f"{name.where}: extends: goes in a circle: {' -> '.join(display(p) for p in loop)}")
        else:
            merged = _merge(merged, _read(found, chain, problems))
    return merged


def _find_parent(name: str, child: Path) -> Path | None:
    for folder in (child.parent, packaged_configs()):
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    return None


def _anchor_type(key: str, node: Node, path: Path) -> Node:
    """Make a `type: ./my_env.py` absolute, so that the resolved recipe loads from anywhere on this machine."""
    if key not in COMPONENTS or not isinstance(node.value, dict) or "type" not in node.value:
        return node
    kind = node.value["type"]
    if not isinstance(kind.value, str) or not kind.value.endswith(".py"):
        return node
    absolute = (path.parent / Path(kind.value).expanduser()).resolve()
    return Node({**node.value, "type": Node(str(absolute), kind.where)}, node.where)


def _parse_overrides(overrides: Iterable[str], problems: _Problems) -> Node | None:
    """All overrides as one tree, so that their order does not matter where a `type` changes."""
    tree: Node | None = None
    seen: dict[str, str] = {}
    for text in overrides:
        where = f"command line: {text}"
        match = _OVERRIDE.fullmatch(text)
        if not match:
            problems.append(f"{where}: expected a.b=c, for example train.env_steps=100000")
            continue
        path = match["path"]
        if path in seen or path == "extends":
            twice = f"{path} was given before as {seen.get(path)}; keep one"
            problems.append(f"{where}: {twice if path in seen else 'extends belongs in a recipe file'}")
            continue
        seen[path] = text
        if not match["value"]:
            problems.append(f"{where}: no value after '='; write {path}=null to unset it")
            continue
        try:
            node = yaml_strict.parse(match["value"], where, lines=False)
        except YamlError as error:
            problems.extend(error.problems)
            continue
        keys = path.split(".")
        for key in reversed(keys):
            node = Node({key: node}, where)
        for kind in COMPONENTS:
            if kind in node.value:
                node = Node({kind: _anchor_type(kind, node.value[kind], Path.cwd() / "x")}, where)
        tree = _merge(tree, node) if tree else node
    return tree


def _merge(below: Node, top: Node) -> Node:
    if not (isinstance(below.value, dict) and isinstance(top.value, dict)):
        return top
    old, new = below.value.get("type"), top.value.get("type")
    if old and new and old.value != new.value:
        return top
    merged = dict(below.value)
    for key, node in top.value.items():
        merged[key] = _merge(merged[key], node) if key in merged else node
    return Node(merged, top.where)


def _resolve(root: Node, name: str, problems: _Problems) -> Resolved:
    components = {kind: _component(kind, root, name, problems) for kind in COMPONENTS}
    # A component that could not be loaded is checked no further, but the rest of the recipe still is.
    fields: dict[str, Any] = {kind: (config, ...) if config else (Any, None) for kind, config in components.items()}
    schema = create_model("Recipe", __base__=Recipe, **fields)
    try:
        composed = schema.model_validate_json(json.dumps(root.plain()))
    except ValidationError as error:
        problems.extend(_describe(error, root, schema, tell_missing=not problems.incomplete))
    if problems:
        unique = list(dict.fromkeys(problems))
        head = f"{len(unique)} problem{'s' if len(unique) > 1 else ''} in the recipe {name}:"
        raise ConfigError("\n".join([head, *(f"  {line}" for line in unique)]))
    recipe = Recipe.model_validate(dict(composed))
    return Resolved(recipe, _sources(recipe.dump(), root))


def _component(kind: registry.Kind, root: Node, name: str, problems: _Problems) -> type[Section] | None:
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
        got = _show(section.plain())
        problem = f"{kind}: expected a section, got {got}; write `{kind}: {{type: ...}}` ({example})"
    elif chosen is None:
        problem = f"{kind}.type: missing; it says which {kind} these settings are for ({example})"
    else:
        problem = f"{kind}.type: expected a name, got {_show(chosen.plain())} ({example})"
    problems.append(f"{chosen.where if chosen else section.where}: {problem}")
    return None


def _describe(error: ValidationError, root: Node, schema: type[Section], *, tell_missing: bool) -> list[str]:
    """One line per wrong place; a union reports each of its members, which are joined here."""
    lines: dict[tuple[str, str], list[str]] = {}
    for item in error.errors():
        absent = item["type"] == "missing"
        path, node = _locate(item["loc"], root, absent=absent)
        if absent and (path in COMPONENTS or not tell_missing):
            continue  # a missing component was told by _component, with what is known
        messages = lines.setdefault((node.where, path), [])
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


def _message(item: Any, path: str, node: Node, schema: type[Section]) -> str:
    if item["type"] == "extra_forbidden":
        known = _known_keys(schema, item["loc"][:-1])
        key = str(item["loc"][-1])
        nested = "; a dotted key works only on the command line, nest it here" if "." in key else nearest(key, known)
        return f"unknown key{nested}"
    if item["type"] == "missing":
        return "missing; it has no default"
    text = item["msg"].removeprefix("Value error, ").replace("Input should be", "expected", 1)
    value = node.plain()
    if item["type"] == "value_error" or isinstance(value, dict):
        return text if item["type"] == "value_error" else f"{text}, got a section"
    return f"{text}, got {_show(value)}{_hint(item['type'], value)}"


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


def _show(value: Any) -> str:
    """A value as the user wrote it: strings quoted, YAML's true and null, long things cut."""
    if isinstance(value, dict):
        return "a section"
    text = f"'{value}'" if isinstance(value, str) else json.dumps(value)
    return text if len(text) <= 60 else text[:57] + "..."


def _sources(data: dict[str, Any], root: Node | None, prefix: str = "") -> dict[str, str]:
    sources: dict[str, str] = {}
    for key, value in data.items():
        below = root.value.get(key) if root is not None and isinstance(root.value, dict) else None
        path = f"{prefix}{key}"
        if isinstance(value, dict) and value:
            sources |= _sources(value, below, f"{path}.")
        else:
            where = "default" if below is None else below.where
            sources[path] = "command line" if where.startswith("command line: ") else where
    return sources
