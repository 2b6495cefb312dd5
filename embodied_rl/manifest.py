"""What an evaluation was made with: kept beside its episodes, and compared before two evaluations are.

A manifest is a plain dict:

    engine    version, commit, Python and packages of the engine: told, and not compared
    starts    run seed, split, stream, number of episodes; the starts themselves stand in the episodes
    env       what decides what happens in the simulator: time limit, control rate, the files that define the env, and
              what it tells of itself
    frames    task -> seed of the first episode of the task, and a checksum of every entry of its first observation
    policy    how the policy played: `greedy` or sampled, `chunk`, the control steps of a decision, and where the env's
              `protocol` says how many are published, the `departures` from it; missing in what is older

`env`, `frames` and `policy.greedy` have to agree for a difference in success to be one of the policies: a library that
was upgraded has changed pixels before without a word (MuJoCo 3.3.3 and LIBERO's objects).
"""

from __future__ import annotations

import functools
import hashlib
import importlib.metadata
import inspect
import json
import logging
import platform
import re
import sys
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embodied_rl import __version__, registry
from embodied_rl.errors import CapabilityError
from embodied_rl.runfolder import PACKAGES, checksum, git_state, installed
from embodied_rl.types import Env, Obs

log = logging.getLogger(__name__)

Manifest = dict[str, Any]
PARTS = ("engine", "starts", "env", "frames")
TOLD = 4
"""Differences that one sentence names."""
FILES = "files"
"""Entry of what an env tells that maps files to checksums: one difference, however many of them differ."""
ENVS = registry.PACKAGES["env"]
_IMPORT = re.compile(rf"from {re.escape(ENVS)}\.([\w.]+) import")


def make(
    env: Env, starts: dict[str, Any], frames: dict[str, dict[str, Any]], policy: dict[str, Any] | None = None
) -> Manifest:
    """Put a manifest together.

    Args:
        env: That was evaluated in.
        starts: What the starts were made from.
        frames: Task -> `frame`.
        policy: "greedy" and "chunk" of who played; None when nobody did.

    Raises:
        CapabilityError: The env tells something of itself that is not plain data.
    """
    try:
        # As it will be read again: tuples become lists, and no number is NaN.
        plain = json.loads(json.dumps(told_by(env), allow_nan=False))
    except (TypeError, ValueError) as error:
        raise CapabilityError(
            f"manifest() of {type(env).__name__} is no plain data ({error}): return a dict of text, numbers, lists and "
            "dicts"
        ) from None
    played = {} if policy is None else {"policy": {**policy, **_departures(plain, policy["chunk"])}}
    return {"engine": dict(_engine()), "starts": starts, "env": plain, "frames": frames, **played}


def _departures(env: dict[str, Any], chunk: int) -> dict[str, str]:
    """What no env can know of its own departures: how many control steps of a decision the policy executes."""
    published = _published(env)
    return {} if published is None else {"departures": "none" if chunk == published else f"policy.chunk: {chunk}"}


def _published(env: dict[str, Any]) -> int | None:
    """Control steps of a decision by the protocol that an env tells; None where it says nothing of them."""
    protocol = env.get("protocol")
    return protocol.get("chunk") if isinstance(protocol, dict) else None


def warn_of_departures(manifest: Manifest) -> None:
    """Log where the policy, and not the env, departed from the env's protocol."""
    departures = manifest.get("policy", {}).get("departures", "none")
    if departures != "none":
        log.warning(
            "the env's protocol executes %s control steps of a decision; this evaluation departs from it in %s",
            _published(manifest["env"]),
            departures,
        )


def told_by(env: Env) -> dict[str, Any]:
    """What the results of an env depend on: its limits, the files that define it, and what its `manifest()` says."""
    spec, own = env.spec, getattr(env, "manifest", None)
    rates: dict[str, Any] = {"max_steps": spec.max_steps, "control_hz": spec.control_hz}
    if spec.vocabulary is not None:
        rates["vocabulary"] = spec.vocabulary.fingerprint
    files = {name: digest for kind in type(env).__mro__ for name, digest in files_of(kind).items()}
    return {**rates, **source(type(env)), **({FILES: files} if files else {}), **(own() if own else {})}


@functools.cache
def files_of(kind: type) -> dict[str, str]:
    """Checksums of the files that define a class of a built-in env, whatever ends their lines.

    They are its env's folder or file, and those that these import from other envs. Comments count too: whether a change
    matters is left to the reader, who may compare nevertheless.

    Example: of TargetEnv {"target.py": "9c1f..."}, of a class of the user's own {}.
    """
    if not kind.__module__.startswith(f"{ENVS}."):
        return {}
    root = Path(sys.modules[ENVS].__path__[0])
    own = root / kind.__module__.split(".")[2]
    left = [file for file in own.rglob("*") if file.is_file() and file.suffix != ".pyc"]
    left = left or [own.with_suffix(".py")]
    found: dict[str, str] = {}
    while left:
        file = left.pop()
        name = file.relative_to(root).as_posix()
        if name in found or not file.is_file():
            continue
        data = file.read_bytes().replace(b"\r\n", b"\n")
        found[name] = checksum(data)
        for module in _IMPORT.findall(data.decode(errors="replace")):
            path = root.joinpath(*module.split("."))
            left.append(path / "__init__.py" if path.is_dir() else path.with_suffix(".py"))
    return dict(sorted(found.items()))


@functools.cache
def source(kind: type) -> dict[str, str]:
    """{"source": checksum} of the file that defines a class of the user's own; nothing of ours or one with a version.

    Example: of a class in `./drift.py` {"source": "9c1f..."}, of a class of Gymnasium {}.
    """
    top = kind.__module__.split(".")[0]
    if top == "embodied_rl" or top in importlib.metadata.packages_distributions():
        return {}
    try:
        file = inspect.getsourcefile(kind)
    except (OSError, TypeError):  # it was typed in, or made by other code
        file = None
    return {"source": checksum(Path(file).read_bytes())} if file else {}


@functools.cache
def checksum_of(folder: Path) -> str:
    """SHA-256 of a file, or of the names and contents of all files of a folder; read once, assets can be large."""
    files = sorted(file for file in folder.rglob("*") if file.is_file()) if folder.is_dir() else [folder]
    return checksum(*(p for file in files for p in (f"{file.relative_to(folder)}\0".encode(), _bytes_of(file))))


def _bytes_of(file: Path) -> bytes:
    with file.open("rb") as opened:
        return hashlib.file_digest(opened, "sha256").digest()


@functools.cache
def _engine() -> tuple[tuple[str, Any], ...]:
    state, _ = git_state(Path(__file__).parent)
    source = {"commit": state["commit"], "uncommitted_changes": state["dirty"]} if state else {}
    about = {"embodied_rl": __version__, **source, "python": platform.python_version()}
    return tuple({**about, "packages": installed(PACKAGES)}.items())


def frame(obs: Obs, row: int, seed: int) -> dict[str, Any]:
    """Checksums of what one copy shows.

    Args:
        obs: name -> [B, ...].
        row: The copy.
        seed: Its start seed.

    Returns:
        frame: "seed", and entry -> checksum of its type, shape and bytes.
    """
    return {"seed": seed, **{name: _of_tensor(x[row]) for name, x in sorted(obs.items())}}


def _of_tensor(x: Tensor) -> str:
    array = x.detach().cpu().contiguous()
    # As bytes: NumPy does not know every type that torch does.
    data = array.reshape(-1).view(torch.uint8).numpy().tobytes() if array.numel() else b""
    return checksum(f"{array.dtype} {list(array.shape)} ".encode(), data)


def read(found: Any) -> Manifest | None:
    """A manifest from a file; None where there is none, as in evaluations that are older than manifests.

    Raises:
        ValueError: It is damaged; says how.
    """
    if found is None:
        return None
    if not isinstance(found, dict):
        raise ValueError(f"its manifest is {type(found).__name__}, expected an object")
    for part in PARTS:
        if not isinstance(found.get(part), dict):
            raise ValueError(f"its manifest has no '{part}'")
    if not all(isinstance(one, dict) for one in found["frames"].values()):
        raise ValueError("a frame of its manifest is no object")
    if "policy" in found:
        policy = found["policy"] if isinstance(found["policy"], dict) else {}
        if not isinstance(policy.get("greedy"), bool) or not isinstance(policy.get("chunk"), int):
            raise ValueError("the 'policy' of its manifest lacks 'greedy' (true or false) or 'chunk' (control steps)")
    return found


def differences(a: Manifest, b: Manifest) -> list[str]:
    """What differs in what matters, one clause each.

    Example: ["packages.mujoco is 3.3.2 in A and 3.3.3 in B", "files differ in tabletop/tasks.py", "the first 'table' of
    task reach is 1f2e... in A and 9c1f... in B"].
    """
    clauses = []
    for key, x, y in _unlike(_flat(a["env"]), _flat(b["env"])):
        clauses.append(_clause(key, x, y))
    for task in sorted(a["frames"].keys() | b["frames"].keys()):
        for entry, x, y in _unlike(a["frames"].get(task, {}), b["frames"].get(task, {})):
            what = f"the seed of task {task}" if entry == "seed" else f"the first '{entry}' of task {task}"
            clauses.append(_clause(what, x, y))
    return clauses


def _clause(what: str, x: Any, y: Any) -> str:
    if isinstance(x, dict) and isinstance(y, dict):
        names = [name for name, _, _ in _unlike(x, y)]
        more = f" and {len(names) - TOLD} more" if len(names) > TOLD else ""
        return f"{what} differ in {', '.join(names[:TOLD])}{more}"
    if isinstance(x, dict) or isinstance(y, dict):
        return f"{what} are told by {'A' if y is None else 'B'} alone"
    return f"{what} is {_short(x)} in A and {_short(y)} in B"


def compare(a: Manifest | None, b: Manifest | None, names: tuple[str, str], *, anyway: bool = False) -> str | None:
    """Refuse a comparison of results that were made with different simulators, or one greedy and one sampled.

    Args:
        a: Of the first result; None where it has none.
        b: Of the second.
        names: Of the two results.
        anyway: Tell instead of refusing.

    Returns:
        remark: What a reader of the comparison has to know; None when nothing.

    Raises:
        CapabilityError: They differ; says in what, in which, and how to compare them nevertheless.
    """
    lacking = [name for name, manifest in zip(names, (a, b), strict=True) if manifest is None]
    if a is None or b is None:
        verb = "has" if len(lacking) == 1 else "have"
        return (
            f"{' and '.join(lacking)} {verb} no manifest (older than manifests), so whether both were made with the "
            "same simulator is not known"
        )
    found, how = [], []
    if clauses := differences(a, b):
        more = f"; and {len(clauses) - TOLD} more" if len(clauses) > TOLD else ""
        found.append(f"were not made with the same simulator: {'; '.join(clauses[:TOLD])}{more}")
        how.append("with one installation")
    if greedy := _played_unlike(a, b, "greedy"):
        x, y = ("greedy" if g else "sampled" for g in greedy)
        found.append(f"were not played alike: A {x} and B {y}")
        how.append("in one way (greedy or sampled)")
    what = f"A = {names[0]} and B = {names[1]} {', and '.join(found)}"
    if found and not anyway:
        raise CapabilityError(f"{what}. Evaluate both again {' and '.join(how)}, or compare them with --compare-anyway")
    remarks = [what] if found else []
    if chunks := _played_unlike(a, b, "chunk"):  # a property of the policies, and so told alone
        remarks.append("a decision covers {} control steps in A and {} in B".format(*chunks))
    return "; ".join(remarks) or None


def _played_unlike(a: Manifest, b: Manifest, key: str) -> tuple[Any, Any] | None:
    """How the two policies played, where both manifests tell it and it differs."""
    x, y = (manifest.get("policy", {}).get(key) for manifest in (a, b))
    return None if x is None or y is None or x == y else (x, y)


def lines(manifest: Manifest) -> list[tuple[str, str]]:
    """The manifest as rows (what, value) for a reader; long checksums are cut."""
    starts, engine = manifest["starts"], {k: v for k, v in manifest["engine"].items() if k != "packages"}
    rows = [("starts", ", ".join(f"{k} {v}" for k, v in starts.items()))]
    rows += [(key, _short(value)) for key, value in _flat(manifest["env"]).items()]
    if "policy" in manifest:
        rows.append(("policy", ", ".join(f"{k} {v}" for k, v in manifest["policy"].items())))
    rows.append(("engine", ", ".join(f"{k} {_short(v)}" for k, v in engine.items())))
    for task, one in manifest["frames"].items():
        rows.append((f"first frame of {task}", ", ".join(f"{k} {_short(v)}" for k, v in one.items())))
    return rows


def _unlike(a: dict[str, Any], b: dict[str, Any]) -> list[tuple[str, Any, Any]]:
    """(key, value in a, value in b) where they differ; None where there is none."""
    keys = dict.fromkeys([*a, *b])
    return [(k, a.get(k), b.get(k)) for k in keys if k not in a or k not in b or a[k] != b[k]]


def _flat(tree: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        branch = isinstance(value, dict) and key != FILES
        out |= _flat(value, f"{prefix}{key}.") if branch else {prefix + key: value}
    return out


def _short(value: Any) -> str:
    if isinstance(value, dict):
        return ", ".join(f"{name} {_short(x)}" for name, x in value.items())
    text = "not told" if value is None else str(value)
    is_checksum = len(text) >= 40 and all(c in "0123456789abcdef" for c in text)
    return text[:12] if is_checksum else text[:120]
