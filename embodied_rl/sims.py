"""Virtual environments of simulators that cannot live in the engine's: `embodied-rl sim install | list | remove`.

An env folder that brings a `lock.txt` (every package that its simulator needs, with exact versions and hashes) can be
installed by its name; so can a lock file of one's own, by its path. Each environment is a folder of its own in
`$EMBODIED_RL_SIMS`, or in `~/.cache/embodied_rl/sims` where that is not set.
"""

from __future__ import annotations

import hashlib
import importlib
import os
import re
import shutil
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

from embodied_rl import registry
from embodied_rl.errors import NotFoundError, SimulatorError, nearest

STAMP = "lock.sha256"
"""Written last into a finished environment: which lock it was made from."""
_PIN = re.compile(r"^([A-Za-z0-9][A-Za-z0-9._-]*)==([^\s;\\]+)", re.MULTILINE)
_PYTHON = re.compile(r"^# python (\d+\.\d+)$", re.MULTILINE)


@dataclass(frozen=True)
class Sim:
    """One simulator's environment.

    Example: `Sim("libero", Path(".../envs/libero/lock.txt"), Path("~/.cache/embodied_rl/sims/libero"))`.
    """

    name: str
    lock: Path
    folder: Path

    @property
    def python(self) -> Path:
        """Its interpreter."""
        return self.folder / "bin" / "python"

    @property
    def state(self) -> str:
        """absent, unfinished, outdated or ready."""
        if not self.folder.exists():
            return "absent"
        stamp = self.folder / STAMP
        if not stamp.is_file() or not self.python.exists():
            return "unfinished"
        return "ready" if stamp.read_text().strip() == _digest(self.lock) else "outdated"


def home() -> Path:
    """The folder that holds the environments."""
    given = os.environ.get("EMBODIED_RL_SIMS")
    return Path(given).expanduser() if given else Path.home() / ".cache" / "embodied_rl" / "sims"


def names() -> list[str]:
    """Names of the simulators that can be installed by name."""
    package = importlib.import_module(registry.PACKAGES["env"])
    return sorted(lock.parent.name for place in package.__path__ for lock in Path(place).glob("*/lock.txt"))


def find(name: str) -> Sim:
    """Look up a simulator.

    Args:
        name: One of `names()`, or the path of a lock file, whose name becomes the environment's.

    Raises:
        NotFoundError: There is neither.
    """
    if name.endswith(".txt"):
        lock = Path(name).expanduser().resolve()
        if not lock.is_file():
            raise NotFoundError(f"sim '{name}': no such lock file")
        return Sim(lock.stem, lock, home() / lock.stem)
    package = importlib.import_module(registry.PACKAGES["env"])
    for place in package.__path__:
        lock = Path(place) / name / "lock.txt"
        if name in names() and lock.is_file():
            return Sim(name, lock, home() / name)
    own = home() / name / "lock.txt"
    if own.is_file():
        return Sim(name, own, home() / name)
    raise NotFoundError(f"sim '{name}' does not exist{nearest(name, names())}")


def pins(name: str) -> dict[str, str]:
    """Every distribution of a simulator's lock file with its version."""
    return dict(_PIN.findall(_text(find(name))))


def interpreter(name: str) -> Path:
    """The Python of an installed simulator.

    Raises:
        NotFoundError: There is no such simulator, or it is not installed.
        SimulatorError: It was made from another lock file than the one that is there now.
    """
    sim = find(name)
    if sim.state in ("absent", "unfinished"):
        raise NotFoundError(
            f"sim '{name}' runs in an environment of its own, and {sim.folder} "
            f"{'is not there' if sim.state == 'absent' else 'was not finished'}: run `embodied-rl sim install {name}` "
            "(EMBODIED_RL_SIMS names another folder for it)"
        )
    if sim.state == "outdated":
        raise SimulatorError(
            f"sim '{name}': {sim.folder} was made from another lock file than {sim.lock}: run "
            f"`embodied-rl sim install {name}`"
        )
    return sim.python


def install(name: str) -> Sim:
    """Make a simulator's environment from its lock file; one that is ready is left alone.

    uv does it where it is installed, else the venv and pip of this Python.

    Raises:
        NotFoundError: There is no such simulator.
        SimulatorError: It needs another Python, or its lock file cannot be installed; says why.
    """
    sim = find(name)
    if sim.state == "ready":
        return sim
    text = _text(sim)
    wanted = _PYTHON.search(text)
    version = wanted[1] if wanted else f"{sys.version_info.major}.{sys.version_info.minor}"
    remove(sim.name)
    uv = shutil.which("uv")
    _run(sim, _create(sim, version, uv), f"a virtual environment with Python {version} cannot be made")
    # Kept inside, so that a lock file of one's own is known by its name from now on.
    lock = sim.folder / "lock.txt"
    lock.write_text(text)
    # Nothing but the lock decides what is installed: no resolver, and no file of another content.
    asked = ["--no-deps", *(["--require-hashes"] if "--hash=" in text else []), "-r", str(lock)]
    tool = [uv, "pip", "install", "--python", str(sim.python)] if uv else [str(sim.python), "-m", "pip", "install"]
    _run(sim, [*tool, "--quiet", *asked], f"its lock file {sim.lock} no longer resolves")
    (sim.folder / STAMP).write_text(_digest(lock) + "\n")
    return sim


def remove(name: str) -> bool:
    """Delete a simulator's environment; False when there was none."""
    folder = home() / name
    # Only what `install` made: a folder of that name may be anything.
    if not re.fullmatch(r"[A-Za-z0-9][A-Za-z0-9._-]*", name) or not (folder / "pyvenv.cfg").is_file():
        return False
    shutil.rmtree(folder)
    return True


def _create(sim: Sim, version: str, uv: str | None) -> list[str]:
    """The command that makes an empty environment."""
    if uv:
        return [uv, "venv", "--quiet", "--python", version, str(sim.folder)]
    if version == f"{sys.version_info.major}.{sys.version_info.minor}":
        return [sys.executable, "-m", "venv", str(sim.folder)]
    other = shutil.which(f"python{version}")
    if other is None:
        raise SimulatorError(
            f"sim '{sim.name}' needs Python {version}, and this is {sys.version.split()[0]}: install python{version}, "
            "or uv (`pip install uv`), which fetches it"
        )
    return [other, "-m", "venv", str(sim.folder)]


def _run(sim: Sim, command: list[str], failure: str) -> None:
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
    if done.returncode:
        shutil.rmtree(sim.folder, ignore_errors=True)
        raise SimulatorError(f"sim '{sim.name}': {failure} ({_reason(done.stderr or done.stdout)})")


def _reason(output: str) -> str:
    """What a tool complains of, in one line."""
    text = " ".join(line.strip(" ×╰─▶│") for line in output.splitlines() if line.strip())
    return text[:400] or "no reason was given"


def _text(sim: Sim) -> str:
    """The lock file's text; SimulatorError where it pins nothing."""
    text = sim.lock.read_bytes().decode("utf-8", errors="replace")
    # An environment of nothing would be "ready", and fail later for a reason that is harder to see.
    if not text.strip() or "\ufffd" in text:
        raise SimulatorError(
            f"sim '{sim.name}': {sim.lock} is {'no text' if text.strip() else 'empty'}, expected a lock file: a line "
            "name==version for every package, as `pip freeze` or `uv pip compile` write it"
        )
    return text


def _digest(lock: Path) -> str:
    return hashlib.sha256(lock.read_bytes()).hexdigest()
