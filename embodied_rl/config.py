"""From a recipe file and overrides to one frozen `Recipe`, or to every problem at once with where it was written.

A recipe is a YAML file. `extends:` names the files it is laid over (relative to the file, then in the packaged
`configs/`); sections merge deeply, lists are replaced, and a section whose `type` changes drops the keys of the old
type. `a.b=c` on the command line comes last. The `env`, `policy`, `algorithm` and `reward` sections are checked by the
`Config` of the module that their `type` names, so a file added to `envs/` brings its own settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from embodied_rl import registry, yaml_strict
from embodied_rl.errors import NotFoundError, nearest
from embodied_rl.recipe import Recipe
from embodied_rl.schema import COMPONENTS, Problems, Resolved, resolve, resolve_component, show
from embodied_rl.section import Section
from embodied_rl.yaml_strict import Node, YamlError, merge

_OVERRIDE = re.compile(r"(?P<path>[A-Za-z0-9_-]+(\.[A-Za-z0-9_-]+)*)=(?P<value>.*)", re.DOTALL)


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
    problems = Problems()
    root = _read(path, (), problems)
    overlay = _parse_overrides(overrides, problems)
    return resolve(merge(root, overlay) if overlay else root, display(path), problems)


def load_resolved(path: str | Path) -> Resolved:
    """Read a resolved recipe as `dump_recipe` wrote it into a run folder; nothing is extended or overridden."""
    path = Path(path)
    if not path.is_file():
        raise NotFoundError(f"recipe '{path}': no such file")
    problems = Problems()
    return resolve(_read(path, (), problems, extends=False), display(path), problems)


def build_recipe(data: dict[str, Any]) -> Recipe:
    """Check a recipe given as plain data, for use from Python.

    Args:
        data: As in a YAML file, `{"env": {"type": "tabletop"}, "policy": {"type": "mlp"}, ...}`.

    Raises:
        ConfigError: All problems at once.
    """
    return resolve(yaml_strict.parse(yaml_strict.dump(data), "recipe", lines=False), "recipe", Problems()).recipe


def load_component(kind: registry.Kind, name: str, overrides: Sequence[str] = ()) -> Section:
    """Return the `Config` of one component with overrides relative to it, for example `hidden=[64]` of a policy.

    Raises:
        NotFoundError: There is no such module.
        MissingExtraError: An optional dependency of it is not installed.
        ConfigError: All problems at once.
    """
    problems = Problems()
    return resolve_component(kind, name, _parse_overrides(overrides, problems), problems)


def dump_recipe(recipe: Recipe) -> str:
    """Return the recipe as YAML that `load_resolved` reads back to an equal recipe, floats bit for bit."""
    data = recipe.dump()
    for kind in COMPONENTS:
        if data[kind] is not None:
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


def _read(path: Path, chain: tuple[Path, ...], problems: Problems, *, extends: bool = True) -> Node:
    name = display(path)
    empty = Node({}, f"{name}:1")
    root: Node | None
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
        problems.append(f"{root.where}: a recipe is a mapping (`key: value` lines), got {show(root.plain())}")
        root = None
    if root is None:
        problems.incomplete = True
        return empty
    entries = dict(root.value)
    parents = entries.pop("extends", None)
    own = Node({key: _anchor_type(key, node, path.parent) for key, node in entries.items()}, root.where)
    if parents is None:
        return own
    if not extends:
        problems.append(f"{parents.where}: extends: a resolved recipe extends nothing")
        return own
    base = _read_parents(parents, path, (*chain, path.resolve()), problems)
    return merge(base, own)


def _read_parents(parents: Node, path: Path, chain: tuple[Path, ...], problems: Problems) -> Node:
    names = parents.value if isinstance(parents.value, list) else [parents]
    merged = Node({}, parents.where)
    for name in names:
        if not isinstance(name.value, str) or not name.value:
            problems.append(f"{name.where}: extends: expected a file name or a list of them, got {show(name.plain())}")
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
            merged = merge(merged, _read(found, chain, problems))
    return merged


def _find_parent(name: str, child: Path) -> Path | None:
    for folder in (child.parent, packaged_configs()):
        for candidate in (folder / name, folder / f"{name}.yaml"):
            if candidate.is_file():
                return candidate
    return None


def _anchor_type(key: str, node: Node, folder: Path) -> Node:
    """Make a `type: ./my_env.py` absolute, so that the resolved recipe loads from anywhere on this machine."""
    if key not in COMPONENTS or not isinstance(node.value, dict) or "type" not in node.value:
        return node
    kind = node.value["type"]
    if not isinstance(kind.value, str) or not kind.value.endswith(".py"):
        return node
    absolute = (folder / Path(kind.value).expanduser()).resolve()
    return Node({**node.value, "type": Node(str(absolute), kind.where)}, node.where)


def _parse_overrides(overrides: Iterable[str], problems: Problems) -> Node | None:
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
                node = Node({kind: _anchor_type(kind, node.value[kind], Path.cwd())}, where)
        tree = merge(tree, node) if tree else node
    return tree
