"""From a name in a recipe to the module that implements it.

The file name is the registration: `type: tabletop` under `env:` is `embodied_rl.envs.tabletop`, imported when
asked for. A recipe may also name a dotted module (`my_lab.envs.pouring`) or a file of the user's own (`./pouring.py`).

What each kind of module offers:

    env        Config(Section), build(config, *, num_envs, device, split, seed) -> Env
    policy     Config(Section), build(config, *, env, device) -> Policy           (env: EnvSpec)
    algorithm  Config(AlgorithmConfig)
    reward     Config(RewardConfig), build(config, *, env, device) -> RewardModel  (env: EnvSpec)
"""

from __future__ import annotations

import importlib
import importlib.util
import pkgutil
import sys
from pathlib import Path
from types import ModuleType
from typing import Literal, NoReturn

from embodied_rl.errors import MissingExtraError, NotFoundError, nearest

Kind = Literal["env", "policy", "algorithm", "reward"]

PACKAGES: dict[Kind, str] = {
    "env": "embodied_rl.envs",
    "policy": "embodied_rl.policies",
    "algorithm": "embodied_rl.algorithms",
    "reward": "embodied_rl.rewards",
}
PLURAL: dict[Kind, str] = {"env": "envs", "policy": "policies", "algorithm": "algorithms", "reward": "rewards"}
EXTRAS = {
    "envpool": "envpool",
    "mani_skill": "maniskill",
    "wandb": "wandb",
    "tensorboard": "tensorboard",
    "transformers": "vla",
    "peft": "vla",
    "reasoning_gym": "tasks",
    "math_verify": "tasks",
}
"""Importable module -> the extra of this project that installs it."""


def names(kind: Kind) -> list[str]:
    """Return every built-in name of a kind, without importing the files."""
    package = importlib.import_module(PACKAGES[kind])
    return sorted(m.name for m in pkgutil.iter_modules(package.__path__) if not m.name.startswith("_"))


def load(kind: Kind, name: str) -> ModuleType:
    """Import the module behind a name.

    Args:
        kind: "env", "policy", "algorithm" or "reward".
        name: A built-in name, a dotted module path, or a path to a `.py` file.

    Returns:
        module: With `Config` and, except for algorithms, `build`.

    Raises:
        NotFoundError: No such name, module or file, or the module lacks `Config` or `build`.
        MissingExtraError: The file exists but an optional dependency of it is not installed.
    """
    if name.endswith(".py"):
        try:
            module = load_file(kind, Path(name))
        except ModuleNotFoundError as error:
            _tell_what_to_install(kind, name, error)
    elif "." in name:
        module = _import(kind, name, name)
    elif name in names(kind):
        module = _import(kind, name, f"{PACKAGES[kind]}.{name}")
    else:
        raise NotFoundError(f"{kind} '{name}' does not exist{nearest(name, names(kind))}")
    wanted = ("Config",) if kind == "algorithm" else ("Config", "build")
    missing = [w for w in wanted if not hasattr(module, w)]
    if missing:
        raise NotFoundError(
            f"{kind} '{name}': {module.__file__} defines no {' and no '.join(missing)}; "
            f"a file of this kind needs {' and '.join(wanted)}"
        )
    return module


def _import(kind: Kind, name: str, path: str) -> ModuleType:
    try:
        return importlib.import_module(path)
    except ModuleNotFoundError as error:
        if error.name and (path == error.name or path.startswith(error.name + ".")):
            raise NotFoundError(f"{kind} '{name}': there is no module '{error.name}'") from None
        _tell_what_to_install(kind, name, error)


def _tell_what_to_install(kind: Kind, name: str, error: ModuleNotFoundError) -> NoReturn:
    top = (error.name or "").split(".")[0]
    if top == "embodied_rl":
        raise error  # a wrong import in the file, nothing to install
    extra = EXTRAS.get(top)
    cure = f"pip install 'embodied-rl[{extra}]'" if extra else f"pip install {top}"
    raise MissingExtraError(
        f"{kind} '{name}' needs the package '{top}', which is not installed; run: {cure}"
    ) from error


def load_file(kind: str, path: Path) -> ModuleType:
    """Import a file of the user's own, once.

    Args:
        kind: What it is called in messages.
        path: Of a `.py` file.

    Raises:
        NotFoundError: No such file.
    """
    path = path.expanduser().resolve()
    if not path.is_file():
        raise NotFoundError(f"{kind} '{path}': no such file")
    # The full path is part of the name so that two users' files called `env.py` do not collide.
    unique = "embodied_rl_user_" + "_".join(path.with_suffix("").parts[1:]).replace("-", "_").replace(".", "_")
    if unique in sys.modules:
        return sys.modules[unique]
    spec = importlib.util.spec_from_file_location(unique, path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[unique] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[unique]
        raise
    return module
