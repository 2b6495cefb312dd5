"""Checkpoints: a tree of tensors and plain values, written so that a kill at any moment loses nothing.

One checkpoint is one folder inside the run's `checkpoints/`:

    update_000120/
        tensors.safetensors     every tensor of the tree, named by its place in it
        state.json              the tree with references to the tensors, checksums, the update and its score

It is written under a temporary name, flushed to the disk and then renamed, so a folder called `update_...` is always
complete. There is no pickle: reading a checkpoint runs no code. Tensors come back on the CPU.
"""

from __future__ import annotations

import errno
import hashlib
import json
import math
import os
import re
import shutil
import warnings
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

from embodied_rl.errors import CheckpointError, NotFoundError, RunFolderError
from embodied_rl.types import State

FORMAT = 1
PROJECT = "embodied_rl"
TENSORS = "tensors.safetensors"
TREE = "state.json"
_NAME = re.compile(r"update_(\d{6,})(?:-(\d+))?")
_TEMPORARY = ".tmp-"


class CheckpointWarning(UserWarning):
    """A damaged checkpoint was passed over."""


def save(folder: Path, state: State, *, update: int, keep: int, best_score: float | None = None) -> Path:
    """Write one checkpoint atomically, then drop those that are no longer kept.

    Kept are the newest `keep` and the one with the highest score. Checkpoints of a later update belong to a
    continuation that was abandoned by resuming from an earlier one; they are dropped too.

    Args:
        folder: The run's `checkpoints/`; created when missing.
        state: Nested dicts (keys str or int), lists and tuples of tensors, str, int, float, bool and None.
        update: Number of finished updates, >= 0.
        keep: Newest checkpoints to keep, >= 1.
        best_score: Higher is better, for example a success rate; None (or non-finite) when it was not measured.

    Returns:
        path: The new checkpoint's folder.

    Raises:
        CheckpointError: The state holds something a checkpoint cannot hold; says where in the tree.
        RunFolderError: The disk is full or the folder cannot be written; earlier checkpoints are untouched.
    """
    assert update >= 0 and keep >= 1
    tensors: dict[str, Tensor] = {}
    tree = _encode(state, (), tensors, set())
    score = best_score if best_score is not None and math.isfinite(best_score) else None
    try:
        folder.mkdir(parents=True, exist_ok=True)
        _remove_leftovers(folder)
        path = folder / _free_name(folder, update)
        temporary = folder / f"{_TEMPORARY}{path.name}"
        try:
            temporary.mkdir()
            _write(temporary, tree, tensors, update, score)
            os.rename(temporary, path)
        except BaseException:
            shutil.rmtree(temporary, ignore_errors=True)
            raise
        _fsync(folder)
        _prune(folder, path, keep)
    except (OSError, SafetensorError) as error:
        raise _unwritable(folder, tensors, update, error) from error
    return path


def load(path: Path) -> State:
    """Read a checkpoint and check that it is whole.

    Args:
        path: A folder that `save` returned.

    Returns:
        state: The tree as it was saved, bit for bit; tensors on the CPU, each with memory of its own.

    Raises:
        NotFoundError: There is nothing at `path`.
        CheckpointError: Damaged, foreign, or written by a newer version; says what was found and what to do.
    """
    path = Path(path)
    document = _read(path, verify=True)
    with safe_open(path / TENSORS, framework="pt", device="cpu") as file:
        # Cloned because the file is mapped at 8-byte alignment: kernels may sum such memory in another order than
        # torch's own 64-byte aligned memory, and a resumed run would then differ in the last bit.
        tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 (not a dict)
    state = _decode(document["tree"], tensors)
    assert isinstance(state, dict)
    return state


def latest(folder: Path) -> Path | None:
    """Newest intact checkpoint of a run.

    Args:
        folder: The run's `checkpoints/`.

    Returns:
        path: None when there is none. A damaged newer one is passed over with a `CheckpointWarning`.

    Raises:
        CheckpointError: There are checkpoints and every one is damaged.
    """
    problems: list[str] = []
    for path in _checkpoints(folder):
        try:
            _read(path, verify=True, advise=False)
        except CheckpointError as error:
            problems.append(str(error))
            continue
        if problems:
            warnings.warn(
                f"{'; '.join(problems)}; going back to the older checkpoint {path}", CheckpointWarning, stacklevel=2
            )
        return path
    if problems:
        raise CheckpointError(
            f"{folder}: no checkpoint is intact ({'; '.join(problems)}); start the run again under another name"
        )
    return None


def newest_update(folder: Path) -> int:
    """Update of a run's newest checkpoint, which is not looked into; 0 when there is none."""
    return max((_order(path)[0] for path in _checkpoints(folder)), default=0)


def best(folder: Path) -> Path | None:
    """Intact checkpoint with the highest score (the newest of equals); None when none has a score."""
    scored = []
    for age, path in enumerate(_checkpoints(folder)):
        try:
            score = _read(path, verify=True, advise=False)["score"]
        except CheckpointError as error:
            warnings.warn(f"{error}; it is passed over in the search for the best", CheckpointWarning, stacklevel=2)
            continue
        if score is not None:
            scored.append((score, -age, path))
    return max(scored)[2] if scored else None


def resolve(path: Path) -> Path:
    """Turn what a user names into one checkpoint.

    Args:
        path: A checkpoint, a run folder, or a run's `checkpoints/`; the last two stand for the newest intact one.

    Raises:
        NotFoundError: There is nothing at `path`, or no checkpoint below it.
        CheckpointError: See `latest`.
    """
    path = Path(path)
    if not path.exists():
        raise NotFoundError(f"{path}: no such run or checkpoint")
    if (path / TREE).exists() or (path / TENSORS).exists() or not path.is_dir():
        return path
    for folder in (path / "checkpoints", path):
        found = latest(folder)
        if found is not None:
            return found
    raise NotFoundError(f"{path}: holds no checkpoint (expected {path / 'checkpoints'}/update_... or {path / TREE})")


def size(state: State) -> int:
    """Bytes of all tensors of a tree."""
    tensors: dict[str, Tensor] = {}
    _encode(state, (), tensors, set())
    return sum(t.nbytes for t in tensors.values())


def _encode(x: Any, place: tuple[str, ...], tensors: dict[str, Tensor], seen: set[int]) -> Any:
    """JSON form of a tree; its tensors go into `tensors`. Objects with one key that starts with $ are our tags."""
    if isinstance(x, Tensor):
        name = "/".join(place)
        while name in tensors or name == "__metadata__":
            name += "+"
        tensors[name] = _storable(x, place, seen)
        return {"$tensor": name, "dtype": str(x.dtype).removeprefix("torch."), "shape": list(x.shape)}
    if x is None or type(x) in (str, bool, int):
        return x
    if type(x) is float:
        return x if math.isfinite(x) else {"$float": str(x)}
    if type(x) in (list, tuple):
        items = [_encode(v, (*place, str(i)), tensors, seen) for i, v in enumerate(x)]
        return items if type(x) is list else {"$tuple": items}
    if isinstance(x, dict):
        for key in x:
            if type(key) not in (str, int):
                raise CheckpointError(
                    f"state at '{'/'.join(place)}' has the key {key!r} of type {type(key).__name__}; "
                    "keys must be str or int: convert it in get_state"
                )
        values = {k: _encode(v, (*place, str(k)), tensors, seen) for k, v in x.items()}
        plain = all(type(k) is str and not k.startswith("$") for k in x)
        return values if plain else {"$items": [[k, v] for k, v in values.items()]}
    raise CheckpointError(
        f"state at '{'/'.join(place)}' is of type {type(x).__name__}; a checkpoint holds tensors, str, "
        "int, float, bool, None, dicts, lists and tuples: convert it in get_state"
    )


def _storable(x: Tensor, place: tuple[str, ...], seen: set[int]) -> Tensor:
    """A dense CPU tensor that shares its memory with no other of this checkpoint (safetensors refuses sharing)."""
    if x.layout is not torch.strided or x.is_quantized:
        raise CheckpointError(f"state at '{'/'.join(place)}' is a sparse or quantized tensor; store dense tensors")
    x = x.detach().to("cpu").resolve_conj().resolve_neg().contiguous()
    if x.untyped_storage().data_ptr() in seen:
        x = x.clone()
    seen.add(x.untyped_storage().data_ptr())
    return x


def _decode(x: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(x, list):
        return [_decode(v, tensors) for v in x]
    if not isinstance(x, dict):
        return x
    if "$tensor" in x:
        return tensors[x["$tensor"]]
    if "$float" in x:
        return float(x["$float"])
    if "$tuple" in x:
        return tuple(_decode(v, tensors) for v in x["$tuple"])
    if "$items" in x:
        return {k: _decode(v, tensors) for k, v in x["$items"]}
    return {k: _decode(v, tensors) for k, v in x.items()}


def _write(folder: Path, tree: Any, tensors: dict[str, Tensor], update: int, score: float | None) -> None:
    # One entry only: the library writes several in random order, and equal states should give equal files.
    save_file(tensors, folder / TENSORS, metadata={"format": f"{PROJECT} {FORMAT}"})
    _fsync(folder / TENSORS)
    document = {
        "project": PROJECT,
        "format": FORMAT,
        "update": update,
        "score": score,
        "tensors": {"bytes": (folder / TENSORS).stat().st_size, "sha256": _sha256(folder / TENSORS)},
        "tree": tree,
    }
    document["sha256"] = _document_sha256(document)
    with open(folder / TREE, "w", encoding="utf-8") as file:
        json.dump(document, file, allow_nan=False)
        file.flush()
        os.fsync(file.fileno())
    shutil.copymode(folder / TREE, folder / TENSORS)  # the library makes files that only their owner can read
    _fsync(folder)


def _read(path: Path, *, verify: bool, advise: bool = True) -> dict[str, Any]:
    """The document of a checkpoint whose files are whole; CheckpointError otherwise."""
    if not path.exists():
        raise NotFoundError(f"{path}: no such checkpoint")
    problem, document = _inspect(path, verify=verify)
    if problem:
        raise CheckpointError(f"{path}: {problem}{_advice(path) if advise else ''}")
    return document


def _inspect(path: Path, *, verify: bool) -> tuple[str, dict[str, Any]]:
    """What is wrong with a checkpoint ("" when nothing is), and its document."""
    try:
        return _inspect_files(path, verify)
    except OSError as error:
        return f"cannot be read ({error.strerror})", {}


def _inspect_files(path: Path, verify: bool) -> tuple[str, dict[str, Any]]:
    if not path.is_dir():
        return f"is a file; a checkpoint is a folder that holds {TREE} and {TENSORS}", {}
    missing = [name for name in (TREE, TENSORS) if not (path / name).is_file()]
    if missing:
        there = ", ".join(sorted(p.name for p in path.iterdir())[:6]) or "nothing"
        return f"is not a whole checkpoint: {' and '.join(missing)} missing, found {there}", {}
    try:
        document = json.loads((path / TREE).read_text(encoding="utf-8"))
    except ValueError as error:
        return f"is damaged: {TREE} is not valid JSON ({error})", {}
    if not isinstance(document, dict) or document.get("project") != PROJECT:
        return f"is foreign: {TREE} was not written by {PROJECT}", {}
    if document.get("format") != FORMAT:
        return f"has format {document.get('format')}, this version reads {FORMAT}: use the version that wrote it", {}
    claimed = document.pop("sha256", None)
    if claimed != _document_sha256(document):
        return f"is damaged: the checksum of {TREE} is wrong", {}
    if verify:
        expected, found = document["tensors"]["bytes"], (path / TENSORS).stat().st_size
        if found != expected:
            return f"is damaged: {TENSORS} has {found} bytes instead of {expected}", {}
        if _sha256(path / TENSORS) != document["tensors"]["sha256"]:
            return f"is damaged: the checksum of {TENSORS} is wrong", {}
    return "", document


def _advice(path: Path) -> str:
    for other in _checkpoints(path.parent):
        if other.name != path.name and not _inspect(other, verify=True)[0]:
            return f"; use {other}, which is intact"
    return ""


def _checkpoints(folder: Path) -> list[Path]:
    """Finished checkpoints, newest first."""
    if not folder.is_dir():
        return []
    found = [(_order(p), p) for p in folder.iterdir() if _NAME.fullmatch(p.name) and p.is_dir()]
    return [p for _, p in sorted(found, reverse=True)]


def _order(path: Path) -> tuple[int, int]:
    match = _NAME.fullmatch(path.name)
    assert match is not None
    return int(match[1]), int(match[2] or 1)


def _free_name(folder: Path, update: int) -> str:
    """`update_000120`, or `update_000120-2` when that exists: a folder cannot be replaced by another in one step."""
    taken = [_order(p)[1] for p in _checkpoints(folder) if _order(p)[0] == update]
    return f"update_{update:06d}" + (f"-{max(taken) + 1}" if taken else "")


def _prune(folder: Path, newest: Path, keep: int) -> None:
    update = _order(newest)[0]
    on_course = [p for p in _checkpoints(folder) if p == newest or _order(p)[0] < update]
    # Hashing the tensors of every checkpoint at every save would cost more than the save: only the trees are read.
    scores = {p: _inspect(p, verify=False)[1].get("score") for p in on_course}
    scored = [p for p in on_course if scores[p] is not None]
    top = max(scored, key=lambda p: (scores[p], _order(p)), default=newest)
    for path in _checkpoints(folder):
        if path not in on_course[:keep] and path != top:
            doomed = folder / f"{_TEMPORARY}{path.name}-old"
            os.rename(path, doomed)  # first out of sight, so that a half-deleted folder is never taken for a checkpoint
            shutil.rmtree(doomed)


def _remove_leftovers(folder: Path) -> None:
    for path in folder.glob(f"{_TEMPORARY}*"):
        shutil.rmtree(path)


def _unwritable(folder: Path, tensors: dict[str, Tensor], update: int, error: Exception) -> RunFolderError:
    inside = re.search(r"\(os error (\d+)\)", str(error))  # how safetensors passes on the system's error
    number = error.errno if isinstance(error, OSError) else int(inside[1]) if inside else None
    full = number in (errno.ENOSPC, errno.EDQUOT)
    try:
        free = f"{shutil.disk_usage(folder).free / 2**20:.1f} MiB are free"
    except OSError:
        free = "the free space is unknown"
    needed = sum(t.nbytes for t in tensors.values()) / 2**20
    reason = f"the disk is full ({needed:.1f} MiB are needed, {free})" if full else str(error)
    cure = "free some space" if full else "make the folder writable"
    return RunFolderError(
        f"{folder}: cannot write the checkpoint of update {update}: {reason}; earlier checkpoints are untouched; "
        f"{cure} and run again with --resume"
    )


def _document_sha256(document: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(document, sort_keys=True, allow_nan=False).encode()).hexdigest()


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
