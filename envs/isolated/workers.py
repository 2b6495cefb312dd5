"""The near side of an isolated simulator: processes that are started, introduced, waited for, and ended."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import subprocess
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from embodied_rl.envs.isolated.worker import DONE, PROTOCOL, Line
from embodied_rl.errors import SimulatorError

WORKER = Path(__file__).with_name("worker.py")
PARTING = 5.0
"""Seconds a worker has to close its simulators before it is killed."""


class Lost(Exception):
    """A worker died, hung or gave up; the message says how."""


@dataclass(frozen=True)
class Foreign:
    """What a worker runs, and in which Python."""

    where: str
    """Name of the env, for messages."""
    python: Path
    simulator: Path
    """File that defines `Simulator`."""
    settings: dict[str, Any]
    max_steps: int | None = None
    """Overrides the simulator's own."""
    versions: dict[str, str] = field(default_factory=dict)
    """Distribution -> the only version that will do."""
    variables: dict[str, str] = field(default_factory=dict)
    """Environment variables that the simulator needs."""
    remedy: str = "install what the simulator needs into that Python"
    """What to do when a version does not fit."""
    start_seconds: float = 300.0
    """Longest time for building a simulator or starting an episode."""
    step_seconds: float = 60.0
    """Longest time for a control step of all copies of a worker."""
    manifest: Callable[[], dict[str, Any]] | None = None
    """Says what results depend on, where that is known here; None asks a worker."""
    eager: bool = False
    """Whether both sides may wait actively, which wants a core for each worker and one for the engine."""


def shared_memory(size: int) -> int:
    """A file descriptor of memory without a name, so that nothing is left behind however this ends; close it."""
    if hasattr(os, "memfd_create"):
        fd = os.memfd_create("embodied_rl")
    else:
        with tempfile.TemporaryFile() as file:
            fd = os.dup(file.fileno())
    os.ftruncate(fd, max(size, 1))
    return fd


class Worker:
    """One process that simulates rows `low` to `high` of the copies."""

    def __init__(self, foreign: Foreign, low: int, high: int) -> None:
        """Start it; `introduce` and `attach` make it ready."""
        self.foreign, self.low, self.high, self.rows = foreign, low, high, slice(low, high)
        self.restarts = 0
        handle, name = tempfile.mkstemp(prefix="embodied_rl-", suffix=".log")
        os.close(handle)
        self.log = Path(name)
        self.launch()

    @property
    def copies(self) -> str:
        """Its copies in words."""
        last = self.high - 1
        return f"copy {last}" if self.low == last else f"copies {self.low} to {last}"

    def launch(self) -> None:
        """Start the process without waiting for it.

        Raises:
            SimulatorError: The interpreter cannot be run.
        """
        ours, theirs = socket.socketpair()
        lifeline, self._lifeline = os.pipe()
        # A Python of its own: paths of the engine's would bring the engine's packages.
        kept = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "PYTHONHOME", "VIRTUAL_ENV")}
        fds = (theirs.fileno(), lifeline)
        try:
            with self.log.open("ab") as log:
                self.process = subprocess.Popen(
                    [self.foreign.python, "-u", WORKER, *map(str, fds)],
                    stdin=subprocess.DEVNULL, stdout=log, stderr=log, pass_fds=fds,
                    env=kept | self.foreign.variables, start_new_session=True,
                )  # fmt: skip
        except OSError as error:
            ours.close()
            os.close(self._lifeline)
            raise SimulatorError(
                f"{self.foreign.where}: its Python {self.foreign.python} cannot be run ({error.strerror}): "
                f"{self.foreign.remedy}"
            ) from None
        finally:
            theirs.close()
            os.close(lifeline)
        self.line, self.ready, self.served = Line(ours, eager=self.foreign.eager), False, False
        self._patience = 0.0
        self.line.say({"versions": list(self.foreign.versions)})

    def introduce(self) -> dict[str, Any]:
        """First half of the handshake: compare versions, have the simulators built.

        Returns:
            spec: Of the simulator, as `worker.complete` fills it.

        Raises:
            SimulatorError: Another protocol or version, or a simulator that does not start; says why.
        """
        f = self.foreign
        try:
            about = self._hear(f.start_seconds)
            self._compare(about)
            built = {"simulator": str(f.simulator), "settings": f.settings, "rows": [self.low, self.high]}
            self.line.say({**built, "max_steps": f.max_steps, "eager": f.eager})
            answer = self._hear(f.start_seconds)
        except Lost as lost:
            raise SimulatorError(f"{f.where} does not start: its worker {lost}; {self.output()}") from None
        if "refused" in answer:
            raise SimulatorError(f"{f.where}: {answer['refused']}")
        if "failed" in answer:
            raise SimulatorError(f"{f.where} does not start: {answer['failed']}; {self.output()}")
        return dict(answer["spec"])

    def _compare(self, about: dict[str, Any]) -> None:
        f = self.foreign
        if about.get("protocol") != PROTOCOL:
            raise SimulatorError(
                f"{f.where}: its worker {WORKER} speaks protocol {about.get('protocol')}, this engine speaks "
                f"{PROTOCOL}: install both from one version of embodied_rl"
            )
        found = about["versions"]
        wrong = [f"{n} {found[n] or 'missing'} instead of {v}" for n, v in f.versions.items() if found[n] != v]
        if wrong:
            raise SimulatorError(f"{f.where}: {f.python} has {', '.join(wrong)}: {f.remedy}")

    def attach(self, fd: int, fields: list[list[Any]]) -> None:
        """Second half: hand over the shared memory."""
        try:
            socket.send_fds(self.line.sock, [b"f"], [fd])
            self.line.say({"fields": fields})
            self.wait(self.foreign.start_seconds)
        except (Lost, OSError) as lost:
            raise SimulatorError(f"{self.foreign.where}: its worker was lost ({lost}); {self.output()}") from None
        self.ready = self.served = True

    def tell(self, command: bytes) -> None:
        """Begin a command; a worker that is gone is noticed by `wait`."""
        with contextlib.suppress(OSError):
            self.line.tell(command)

    def ask(self, message: dict[str, Any], fd: int | None = None) -> dict[str, Any]:
        """Send a rare request and wait for its answer; Lost like `wait`."""
        try:
            self.line.say(message)
            if fd is not None:
                socket.send_fds(self.line.sock, [b"f"], [fd])
        except OSError:
            raise Lost(self._death()) from None
        return self._hear(self.foreign.start_seconds)

    def wait(self, seconds: float) -> None:
        """Wait until the command is done.

        Raises:
            Lost: The worker died, gave up or is still busy after `seconds`.
        """
        answer = self._listen(seconds)
        if answer != DONE:
            raise Lost(f"broke the protocol (answered {answer!r})")

    def _hear(self, seconds: float) -> dict[str, Any]:
        answer = self._listen(seconds)
        if not isinstance(answer, dict):
            raise Lost(f"broke the protocol (answered {answer!r})")
        return answer

    def _listen(self, seconds: float) -> bytes | dict[str, Any]:
        if self._patience != seconds:  # a system call that most steps save
            self.line.patience(seconds)
            self._patience = seconds
        try:
            answer = self.line.hear()
        except BlockingIOError:
            raise Lost(f"gave no sign for {seconds:g} s") from None
        except (EOFError, ConnectionError):
            raise Lost(self._death()) from None
        if isinstance(answer, dict) and "fault" in answer:
            raise Lost(f"gave up: {answer['fault']}")
        return answer

    def _death(self) -> str:
        try:
            code = self.process.wait(PARTING)
        except subprocess.TimeoutExpired:
            return "closed its connection"
        return f"died of {signal.Signals(-code).name}" if code < 0 else f"ended with exit code {code}"

    def output(self) -> str:
        """Where the worker's own words are, and the last of them."""
        lines = [line for line in self.log.read_text(errors="replace").splitlines() if line.strip()]
        last = f", which ends in: {lines[-1].strip()[:300]}" if lines else " (empty)"
        return f"its output is in {self.log}{last}"

    def restart(self) -> None:
        """Replace the process by a new one, which then starts in the background."""
        self._part(0.0)
        self.restarts += 1
        self.launch()

    def hang_up(self) -> None:
        """Ask the process to end, without waiting."""
        self.ready = False
        self.line.sock.close()

    def close(self) -> None:
        """End the process; its output is kept only when something went wrong."""
        # One that is still building its simulators would not notice that it is needed no more.
        self._part(PARTING if self.served else 0.0)
        if not self.restarts and self.process.returncode == 0:
            self.log.unlink(missing_ok=True)

    def _part(self, patience: float) -> None:
        """Hang up, wait for the process to end, then insist."""
        self.hang_up()
        try:
            self.process.wait(patience)
        except subprocess.TimeoutExpired:
            with contextlib.suppress(ProcessLookupError):
                os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()
        if self._lifeline >= 0:
            os.close(self._lifeline)
            self._lifeline = -1


def split_rows(copies: int, workers: int) -> list[tuple[int, int]]:
    """Share copies evenly: 5 copies over 2 workers are rows 0 to 3 and 3 to 5."""
    ends = np.linspace(0, copies, min(workers, copies) + 1).round().astype(int).tolist()
    return list(zip(ends[:-1], ends[1:], strict=True))
