"""The folder of one run: who may write into it, what lies in it, and how its small files are written.

Layout:
    runs/<name>/
        recipe.yaml       the resolved recipe; loads unchanged
        versions.json     Python, packages, platform, device
        git.json          commit, whether the tree was dirty, untracked files (only inside a git repository)
        git.diff          what differed from that commit (only when something did)
        conformance.txt   what demonstrations, parts of a mixture, `start_from` and the env mean by actions and pictures
        metrics.jsonl     one JSON object per update
        summary.json      how the run ended (see `Summary`)
        evaluation.json   every episode of the final evaluation; evaluation.<suite>.json of further suites, and
                          evaluation_start*.json of the policy that training started from
        evaluations/      what `embodied-rl evaluate` measured later, see `embodied_rl.stored`
        report.html       one page that shows it all
        checkpoints/      see `embodied_rl.checkpoint`
        videos/           MP4 and GIF; before/ and pairs/ where training started from a policy
        tensorboard/      events
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import hashlib
import importlib.metadata
import json
import os
import platform
import subprocess
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any, NotRequired, TypedDict

import torch

from embodied_rl.errors import RunFolderError

PACKAGES = ("torch", "numpy", "gymnasium", "mujoco", "mujoco-warp", "warp-lang", "envpool", "safetensors", "pydantic")
LONGEST_DIFF = 5_000_000


class Rate(TypedDict):
    """A success rate with its 95 % interval."""

    rate: float
    """successes / episodes"""
    low95: float
    high95: float
    successes: int
    episodes: int


class Result(TypedDict):
    """What one group of evaluation episodes came to; an env without success has only the means."""

    success_once: NotRequired[Rate]
    success_at_end: NotRequired[Rate]
    return_mean: float
    return_std: NotRequired[float]
    """Between episodes."""
    return_median: NotRequired[float]
    length_mean: float
    """Control steps."""
    episodes: int
    invalid: NotRequired[int]
    """Episodes beside those in which the judge or the simulator failed; absent when none did."""


class Difference(TypedDict):
    """Difference of two success rates on the same starts, with its 95 % interval (Newcombe) and McNemar's exact p."""

    difference: float
    low95: float
    high95: float
    p: float
    episodes: int


class Change(Difference):
    """Success before and after training on the same starts, and after - before.

    Example: {"before": 0.41, "after": 0.93, "difference": 0.52, "low95": 0.46, "high95": 0.58, "p": 1e-40,
    "episodes": 300}.
    """

    before: float
    after: float


class SuiteResult(TypedDict):
    """One evaluation suite; differences have a key for each task and "all"."""

    overall: Result
    tasks: dict[str, Result]
    """Task name -> its episodes; empty for an env of one task."""
    against_heldout: NotRequired[dict[str, Difference]]
    """Success in this suite minus success in `heldout`; absent in `heldout` itself."""
    start: NotRequired[SuiteResult]
    """The policy that training started from, in this suite; only with `start_from` or pretrained weights."""
    since_start: NotRequired[dict[str, Change]]
    """What changed since then, where the starts were the same."""


TEMPORARY = ".tmp-"
"""How names of files begin that are not yet whole."""


class Summary(TypedDict):
    """`summary.json`: what a finished or stopped run came to.

    Example: {"name": "tabletop", "finished": true, "stop_reason": "env_steps reached", "updates": 366, "env_steps":
    1499136, "decisions": 1499136, "episodes": 24211, "wall_time_s": 611.2, "device": "cpu", "seed": 0,
    "evaluation": {"heldout": {"overall": {"success_once": {"rate": 0.94, "low95": 0.907, "high95": 0.962, "successes":
    282, "episodes": 300}, ...}, "tasks": {"reach": {...}, ...}}}}
    """

    name: str
    finished: bool
    """True when training reached its end (steps, time or target), False when it was stopped or diverged."""
    stop_reason: str
    error: NotRequired[str]
    """What was told when an error ended the run; absent when none did."""
    updates: int
    saved_update: NotRequired[int]
    """That of the newest checkpoint, after which --resume goes on; 0 when there is none, absent in old summaries."""
    env_steps: int
    """Control steps over all copies."""
    decisions: NotRequired[int]
    episodes: NotRequired[int]
    optimizer_steps: NotRequired[int]
    """Of a run that imitates demonstrations; `env_steps` are then the frames it was shown."""
    wall_time_s: float
    """Over resumes, final evaluation included."""
    device: str
    seed: NotRequired[int]
    evaluation: dict[str, SuiteResult]
    """Suite name -> result of the final evaluation; empty when it was skipped."""
    since_start: NotRequired[dict[str, Change]]
    """Only in old summaries, of their one suite; now each suite of `evaluation` has its own."""


class RunFolder:
    """A run folder that this process alone may write into, until `release`."""

    def __init__(self, path: Path, lock: int) -> None:
        self.path = path
        self._lock: int | None = lock

    @property
    def metrics(self) -> Path:
        """Path of `metrics.jsonl`."""
        return self.path / "metrics.jsonl"

    @property
    def checkpoints(self) -> Path:
        """Path of `checkpoints/`."""
        return self.path / "checkpoints"

    @property
    def videos(self) -> Path:
        """Path of `videos/`."""
        return self.path / "videos"

    def write_start(self, recipe: str, *, device: torch.device) -> None:
        """Write the files that say what is about to run: recipe.yaml, versions.json, git.json and git.diff.

        Args:
            recipe: The resolved recipe as YAML text.
            device: Where the run computes.
        """
        write_text_atomic(self.path / "recipe.yaml", recipe)
        write_json_atomic(self.path / "versions.json", versions(device))
        state, diff = git_state(Path(__file__).parent)
        if state is not None:
            write_json_atomic(self.path / "git.json", state)
        if diff:
            write_text_atomic(self.path / "git.diff", diff)

    def write_conformance(self, report: Sequence[str]) -> None:
        """Keep what the parts of the run agree on, one sentence a line; a resumed run leaves it as it began."""
        path = self.path / "conformance.txt"
        if not path.exists():
            write_text_atomic(path, "".join(f"{line}\n" for line in report))

    def write_summary(self, summary: Summary) -> None:
        """Write summary.json in one step."""
        write_json_atomic(self.path / "summary.json", summary)

    def release(self) -> None:
        """Let other processes write; may be called twice."""
        if self._lock is not None:
            os.close(self._lock)
            self._lock = None


def open_run(path: Path, *, resume: bool = False) -> RunFolder:
    """Create a run folder, or with `resume` take an existing one, and lock it for this process.

    The lock is the kernel's (flock): it ends with the process, however it ends, so none is ever stale.

    Args:
        path: `<log.folder>/<name>`.
        resume: The folder must exist; without it, it must not (or be empty): nothing is ever overwritten.

    Returns:
        run: Call `release` at the end.

    Raises:
        RunFolderError: It exists, does not exist, cannot be written, or another process trains into it.
    """
    with explained(path, "create the run folder"):
        if resume and not path.is_dir():
            raise RunFolderError(f"{path}: there is no run to resume; start it without --resume")
        if not resume and path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise RunFolderError(
                f"{path}: exists already{_progress(path)}; continue it with --resume, choose another name=..., "
                "or delete it"
            )
        path.mkdir(parents=True, exist_ok=True)
        lock = _lock(path)
        (path / "checkpoints").mkdir(exist_ok=True)
    return RunFolder(path, lock)


def _lock(path: Path) -> int:
    handle = os.open(path / ".lock", os.O_RDWR | os.O_CREAT, 0o644)
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        owner = os.pread(handle, 200, 0).decode(errors="replace").strip()
        os.close(handle)
        if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
            raise RunFolderError(
                f"{path}: another process ({owner or 'unknown'}) is training into it; wait for it, stop it, "
                "or choose another name=..."
            ) from None
        raise
    os.ftruncate(handle, 0)
    os.pwrite(handle, f"pid {os.getpid()} on {platform.node()}".encode(), 0)
    return handle


def _progress(path: Path) -> str:
    """What follows a run's name: " (finished)", " (stopped after update 120)" or nothing."""
    try:
        summary = json.loads((path / "summary.json").read_text())
        return " (finished)" if summary["finished"] else f" (stopped after update {summary['updates']})"
    except (OSError, ValueError, KeyError, TypeError):
        return ""


@contextlib.contextmanager
def explained(path: Path, action: str) -> Iterator[None]:
    """Turn an OSError of the block into a RunFolderError that says what to do.

    Args:
        path: What is being written.
        action: What is being done, for "cannot <action>".
    """
    try:
        yield
    except RunFolderError:
        raise
    except OSError as error:
        cures = {
            errno.ENOSPC: "the disk is full: free some space, or set log.folder to another disk",
            errno.EDQUOT: "the disk quota is used up: free some space, or set log.folder to another disk",
            errno.EACCES: "permission denied: make it writable, or set log.folder to a folder of yours",
            errno.EPERM: "permission denied: make it writable, or set log.folder to a folder of yours",
            errno.EROFS: "the file system is read-only: set log.folder to another place",
            errno.ENOTDIR: "a part of this path is a file, not a folder: rename it, or set log.folder to another place",
            errno.EEXIST: "a part of this path is a file, not a folder: rename it, or set log.folder to another place",
            errno.ENAMETOOLONG: "the name is too long: choose a shorter name=...",
            errno.ENOLCK: "the file system has no locks: set log.folder to a local disk",
            errno.ENOTSUP: "the file system has no locks: set log.folder to a local disk",
        }
        reason = cures.get(error.errno or 0, f"{error.strerror or error}: set log.folder to another place")
        raise RunFolderError(f"{path}: cannot {action}: {reason}") from error


def replace_file(path: Path, data: bytes) -> None:
    """Write a file in one step: after a kill it holds the old bytes or the new ones, never a part."""
    temporary = path.with_name(TEMPORARY + path.name)
    try:
        with open(temporary, "wb") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_text_atomic(path: Path, text: str) -> None:
    """Replace a text file in one step.

    Raises:
        RunFolderError: It cannot be written; the old file is untouched.
    """
    with explained(path, "write it"):
        replace_file(path, text.encode())


def write_json_atomic(path: Path, data: Any) -> None:
    """Replace a JSON file in one step; NaN and infinity are refused (ValueError), JSON has none."""
    write_text_atomic(path, json.dumps(data, indent=2, allow_nan=False) + "\n")


def versions(device: torch.device) -> dict[str, Any]:
    """What the run computes with: versions of Python and of the packages that matter, platform, processor, device."""
    on_cuda = device.type == "cuda"
    return {
        "embodied_rl": importlib.metadata.version("embodied-rl"),
        "python": platform.python_version(),
        "packages": installed(PACKAGES),
        "platform": platform.platform(),
        "cpus": os.cpu_count(),
        "device": str(device),
        "device_name": torch.cuda.get_device_name(device) if on_cuda else _cpu_name(),
        "torch_threads": torch.get_num_threads(),
        "cuda": torch.version.cuda if on_cuda else None,
    }


def checksum(*parts: bytes) -> str:
    """SHA-256 of bytes, one after the other, in hexadecimal."""
    digest = hashlib.sha256()
    for part in parts:
        digest.update(part)
    return digest.hexdigest()


def installed(names: Iterable[str]) -> dict[str, str]:
    """Version of each distribution of `names` that is installed."""
    found = {}
    for name in names:
        with contextlib.suppress(importlib.metadata.PackageNotFoundError):
            found[name] = importlib.metadata.version(name)
    return found


def _cpu_name() -> str:
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def git_state(folder: Path) -> tuple[dict[str, Any] | None, str]:
    """Which source ran.

    Args:
        folder: A folder inside the repository.

    Returns:
        state: {"commit", "branch", "dirty", "untracked"}; None outside a repository or without git.
        diff: What differs from the commit, "" when nothing does.
    """
    top = _git(folder, "rev-parse", "--show-toplevel")
    commit = _git(folder, "rev-parse", "HEAD")
    if top is None or commit is None:
        return None, ""
    root = Path(top.strip())
    status = (_git(root, "status", "--porcelain", "--untracked-files=normal") or "").splitlines()
    diff = _git(root, "diff", "HEAD") or ""
    if len(diff) > LONGEST_DIFF:
        diff = f"{diff[:LONGEST_DIFF]}\n[cut after {LONGEST_DIFF} of {len(diff)} characters]\n"
    state = {
        "commit": commit.strip(),
        "branch": (_git(root, "rev-parse", "--abbrev-ref", "HEAD") or "").strip(),
        "dirty": bool(status),
        "untracked": [line[3:] for line in status if line.startswith("??")],
    }
    return state, diff


def _git(folder: Path, *args: str) -> str | None:
    """Output of one git command; None when git is not there or refuses."""
    try:
        done = subprocess.run(
            ["git", "-C", str(folder), *args], capture_output=True, text=True, errors="replace", timeout=20, check=False
        )
    except (OSError, subprocess.TimeoutExpired):
        return None
    return done.stdout if done.returncode == 0 else None
