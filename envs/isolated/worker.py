"""The far side of an isolated simulator: run by path in the simulator's own Python, which needs NumPy only.

    python worker.py SOCKET LIFELINE        two inherited file descriptors

What both sides must agree on stands here too, and the engine imports it: the protocol's version, the frames on the
socket and the layout of the shared memory. It must run on Python 3.9 and import nothing but the standard library and
NumPy. Numbers travel in the shared memory alone; the socket carries one byte per command (`GO`, then `DONE`), and JSON
where something has to be said once.
"""

from __future__ import annotations

import fcntl
import hashlib
import importlib.metadata
import importlib.util
import json
import mmap
import os
import signal
import socket
import struct
import sys
import traceback
from time import perf_counter
from typing import Any

import numpy as np

PROTOCOL = 3
"""Raised whenever frames, layout or the meaning of a field change."""
RESET, STEP, OBSERVE, TALK, DONE = b"r", b"s", b"o", b"j", b"d"
"""Commands of one byte, JSON that follows, and the answer to a command."""
EAGER_SECONDS = 2e-4
"""Longest active wait: about what waking a process on a core that sleeps takes."""
LONGEST_REST = 1024
"""Most waits in a row that are not active."""
ALIGNMENT = 64
"""Bytes: fields begin at cache lines, so that two workers never write to the same one."""
FLAGS = ("terminated", "truncated", "success")
"""Rows of `flags`; those of `numbers` are the reward and the metrics: each is read in one go."""

Array = np.ndarray


def layout(spec: dict[str, Any], copies: int) -> list[list[Any]]:
    """Lay out everything that is shared.

    Args:
        spec: As `complete` returns it.
        copies: B.

    Returns:
        fields: [name, dtype, shape, offset in bytes]; the last one is "end", of no size. Shapes have B in front, or
            behind the names of the rows (see `name_rows`).
    """
    action = spec["action"]
    fields = [(f"obs/{name}", one["dtype"], one["shape"]) for name, one in spec["observation"].items()]
    fields.append(("action", *(("float32", [action["size"]]) if action["kind"] == "continuous" else ("int64", []))))
    fields += [("seed", "int64", []), ("task", "int64", []), ("active", "bool", [])]
    wholes = [(name, dtype, [copies, *shape]) for name, dtype, shape in fields]
    wholes += [("numbers", "float32", [1 + len(spec["metrics"]), copies]), ("flags", "bool", [len(FLAGS), copies])]
    placed: list[list[Any]] = []
    at = 0
    for name, dtype, whole in wholes:
        placed.append([name, dtype, whole, at])
        size = int(np.prod(whole)) * np.dtype(dtype).itemsize
        at += -(-size // ALIGNMENT) * ALIGNMENT
    return [*placed, ["end", "uint8", [0], at]]


def share(fd: int, fields: list[list[Any]]) -> dict[str, Array]:
    """Map the shared memory behind a file descriptor as arrays, by the names of `layout`."""
    memory = mmap.mmap(fd, max(fields[-1][3], 1))
    return {
        name: np.frombuffer(memory, dtype, int(np.prod(shape)), at).reshape(shape)
        for name, dtype, shape, at in fields[:-1]
    }


def name_rows(shared: dict[str, Array], spec: dict[str, Any]) -> dict[str, Array]:
    """Views [B] of the rows of `numbers` and `flags`: reward, one for each metric, terminated, truncated, success."""
    names = ("reward", *(f"metric/{name}" for name in spec["metrics"]), *FLAGS)
    return dict(zip(names, [*shared["numbers"], *shared["flags"]]))  # noqa: B905 (strict is newer than Python 3.9)


def complete(spec: dict[str, Any]) -> dict[str, Any]:
    """Fill in what a simulator's `spec` may leave out.

    Raises:
        ValueError: It has no observation or action, or keys that nobody reads.
    """
    plain = {"tasks": ["task"], "max_steps": None, "success": False, "cameras": [], "metrics": [], "control_hz": None,
             "on_demand": False, "repeatable": True, "words": 0, "sentences": []}  # fmt: skip
    entry = {"dtype": "float32", "low": None, "high": None, "constant": False, "meaning": ""}
    action: dict[str, Any] = {"names": [], "convention": None}
    unknown = sorted(set(spec) - set(plain) - {"observation", "action"})
    if unknown or not spec.get("observation") or "action" not in spec:
        known = sorted(plain)
        raise ValueError(f"Simulator.spec needs observation and action and may hold {known}; unknown: {unknown}")
    seen = {name: {**entry, **one, "shape": list(one["shape"])} for name, one in spec["observation"].items()}
    whole = {**plain, **spec, "observation": seen, "action": {**action, **spec["action"]}}
    return json.loads(json.dumps(whole))


class Line:
    """One end of the socket between engine and worker."""

    def __init__(self, sock: socket.socket, *, eager: bool = False) -> None:
        """Take over a connected stream socket; an eager line waits actively for what comes soon."""
        self.sock, self.eager = sock, eager
        self._pause, self._rest = 0, 0

    def patience(self, seconds: float) -> None:
        """Wait no longer than this in `hear`.

        The kernel counts, not Python, which would ask it twice (poll, then recv) for every byte.
        """
        whole = int(seconds)
        # One microsecond at least: none means for ever.
        duration = struct.pack("ll", whole, max(int((seconds - whole) * 1e6), 0 if whole else 1))
        self.sock.setsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, duration)

    def say(self, message: dict[str, Any]) -> None:
        """Send one JSON message."""
        data = json.dumps(message).encode()
        self.sock.sendall(TALK + struct.pack("<I", len(data)) + data)

    def tell(self, command: bytes) -> None:
        """Send one byte."""
        self.sock.send(command)

    def hear(self) -> bytes | dict[str, Any]:
        """Wait for one byte or one JSON message.

        Raises:
            EOFError: The other side is gone.
            BlockingIOError: Nothing came within `patience`.
        """
        code = (self.eager and self._soon()) or self.sock.recv(1)
        if code == TALK:
            (size,) = struct.unpack("<I", self._exactly(4))
            message: dict[str, Any] = json.loads(self._exactly(size))
            return message
        if not code:
            raise EOFError
        return code

    def _soon(self) -> bytes:
        """One byte if it comes within `EAGER_SECONDS`, else none.

        Every wait in vain doubles the number of waits that are not active afterwards: beside slow steps, or where
        others need the core, next to nothing is spent on it.
        """
        if self._rest:
            self._rest -= 1
            return b""
        until = perf_counter() + EAGER_SECONDS
        while True:  # once at least, however late it is by now
            try:
                code = self.sock.recv(1, socket.MSG_DONTWAIT)
            except BlockingIOError:
                if perf_counter() < until:
                    continue
                break
            self._pause = 0
            return code
        self._rest = self._pause = min(2 * max(self._pause, 1), LONGEST_REST)
        return b""

    def _exactly(self, size: int) -> bytes:
        data = b""
        while len(data) < size:
            more = self.sock.recv(size - len(data))
            if not more:
                raise EOFError
            data += more
        return data


class Copies:
    """The simulators of one worker: rows `low` to `high` of the shared arrays."""

    def __init__(self, module: Any, hello: dict[str, Any]) -> None:
        """Build them."""
        self.low, self.high = hello["rows"]
        self.settings = hello["settings"]
        self.simulators = [module.Simulator(dict(self.settings)) for _ in range(self.low, self.high)]
        # Later imports, as of what only draws films, would make two manifests differ.
        self.modules = frozenset(sys.modules)
        with open(hello["simulator"], "rb") as file:
            self.checksum = hashlib.sha256(file.read()).hexdigest()
        self.spec = complete(self.simulators[0].spec)
        self.limit = hello["max_steps"] or self.spec["max_steps"]
        self.spec["max_steps"] = self.limit
        if self.spec["words"] and not hasattr(module.Simulator, "instruction"):
            raise ValueError("Simulator.spec has words, and there is no method instruction() that says them")
        if self.spec["sentences"] and not self.spec["words"]:
            raise ValueError("Simulator.spec has sentences that nobody reads: set words to the length of the longest")
        self.doing = ""
        """What fails if something fails now."""
        self.steps = [0] * len(self.simulators)
        self.running = [False] * len(self.simulators)
        self.shared: dict[str, Array] = {}
        self.seen: list[tuple[str, Array]] = []

    def attach(self, fd: int, fields: list[list[Any]]) -> None:
        """Map the shared memory."""
        self.shared = share(fd, fields)
        self.shared.update(name_rows(self.shared, self.spec))
        self.seen = [(name[4:], array) for name, array in self.shared.items() if name.startswith("obs/")]

    def reset(self) -> None:
        """Start new episodes in the active copies."""
        shared = self.shared
        for row in np.flatnonzero(shared["active"][self.low : self.high]).tolist():
            at = row + self.low
            seed, task = int(shared["seed"][at]), int(shared["task"][at])
            self.doing = f"copy {at} failed in reset (seed {seed}, task {self.spec['tasks'][task]})"
            self._show(at, self.simulators[row].reset(seed, task))
            self.steps[row], self.running[row] = 0, True

    def step(self) -> None:
        """Advance the active copies; those whose episode is over stay as they are, with reward 0."""
        shared, low = self.shared, self.low
        active = shared["active"][low : self.high].tolist()
        for row, simulator in enumerate(self.simulators):
            at = row + low
            if not active[row]:
                continue
            if not self.running[row]:
                shared["reward"][at] = shared["terminated"][at] = shared["truncated"][at] = 0
                continue
            self.steps[row] += 1
            self.doing = f"copy {at} failed in step {self.steps[row]}"
            action = shared["action"][at]
            obs, reward, terminated, truncated, info = simulator.step(action.copy() if action.ndim else int(action))
            self._show(at, obs)
            truncated = not terminated and (truncated or self.steps[row] == self.limit)
            shared["reward"][at], shared["terminated"][at], shared["truncated"][at] = reward, terminated, truncated
            if self.spec["success"]:
                shared["success"][at] = bool(info["success"])
            for name in self.spec["metrics"]:
                shared[f"metric/{name}"][at] = info[name]
            self.running[row] = not (terminated or truncated)

    def observe(self) -> None:
        """Write the observations of the active copies."""
        for row in np.flatnonzero(self.shared["active"][self.low : self.high]).tolist():
            self.doing = f"copy {row + self.low} failed in observe"
            self._show(row + self.low, self.simulators[row].observe())

    def _show(self, at: int, obs: dict[str, Any] | None) -> None:
        if obs is None:
            if self.spec["on_demand"]:
                return
            raise ValueError("the simulator gave no observation; only one with on_demand may")
        for name, array in self.seen:
            array[at] = obs[name]

    def talk(self, message: dict[str, Any]) -> dict[str, Any]:
        """Answer a rare request: a picture, what results depend on, or the words of the running episodes."""
        if message["ask"] == "render":
            pictures = share(message["fd"], message["fields"])["pictures"]
            os.close(message["fd"])
            for place, at in message["rows"]:
                self.doing = f"copy {at} failed in render"
                simulator = self.simulators[at - self.low]
                pictures[place] = simulator.render(message["camera"], *pictures.shape[1:3])
            return {}
        if message["ask"] == "manifest":
            self.doing = "the simulator failed in manifest"
            own = getattr(self.simulators[0], "manifest", None)
            told: dict[str, Any] = own() if own else {"settings": self.settings}
            packages = versions(message["pins"]) if message["pins"] else self.packages()
            python = sys.version.split()[0]
            return {"simulator": self.checksum, "python": python, "packages": packages, **told}
        return {"texts": [str(simulator.instruction()) for simulator in self.simulators]}

    def packages(self) -> dict[str, str]:
        """Version of every distribution that the simulator had imported when it was built."""
        found: dict[str, str] = {}
        for one in importlib.metadata.distributions():
            tops = (one.read_text("top_level.txt") or "").split()
            tops = tops or [str(file).split("/")[0].split(".")[0] for file in one.files or ()]
            if self.modules.intersection(tops):
                found[one.metadata["Name"]] = one.version
        return dict(sorted(found.items()))

    def close(self) -> None:
        """Close every simulator that can be closed."""
        for simulator in self.simulators:
            getattr(simulator, "close", lambda: None)()


def load(path: str) -> Any:
    """Import a simulator's file by its path."""
    found = importlib.util.spec_from_file_location("simulator", path)
    assert found is not None and found.loader is not None
    module = importlib.util.module_from_spec(found)
    sys.modules["simulator"] = module
    found.loader.exec_module(module)
    return module


def versions(names: list[str]) -> dict[str, str | None]:
    """Installed version of each distribution, None where there is none."""
    found: dict[str, str | None] = {}
    for name in names:
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            found[name] = None
    return found


def end_with(lifeline: int) -> None:
    """Let the system end this process when the engine closes the other end of a pipe, however deep in a step it is.

    The engine never writes into it. Its end, at the latest when the engine is killed, raises SIGIO, which nobody
    catches: unlike a thread that watches, it needs no turn of the interpreter.
    """
    fcntl.fcntl(lifeline, fcntl.F_SETOWN, os.getpid())
    fcntl.fcntl(lifeline, fcntl.F_SETFL, fcntl.fcntl(lifeline, fcntl.F_GETFL) | os.O_ASYNC)


def serve(line: Line) -> None:
    """Introduce oneself, build the simulators, then obey until the engine is gone."""
    ask = line.hear()
    assert isinstance(ask, dict)
    line.say({"protocol": PROTOCOL, "python": sys.version.split()[0], "versions": versions(ask["versions"])})
    hello = line.hear()
    assert isinstance(hello, dict)
    try:
        copies = Copies(load(hello["simulator"]), hello)
    except SystemExit as error:
        line.say({"refused": str(error)})
        return
    except Exception as error:
        traceback.print_exc()
        line.say({"failed": f"{type(error).__name__}: {error}"})
        return
    line.say({"spec": copies.spec})
    line.eager = hello["eager"]
    _, fds, _, _ = socket.recv_fds(line.sock, 1, 1)
    memory = line.hear()
    assert isinstance(memory, dict)
    copies.attach(fds[0], memory["fields"])
    line.tell(DONE)
    obey = {RESET: copies.reset, STEP: copies.step, OBSERVE: copies.observe}
    try:
        while True:
            command = line.hear()
            if isinstance(command, dict) and command["ask"] == "render":
                _, (command["fd"], *_), _, _ = socket.recv_fds(line.sock, 1, 1)
            try:
                answer = copies.talk(command) if isinstance(command, dict) else obey[command]()
            except Exception as error:
                traceback.print_exc()
                line.say({"fault": f"{copies.doing}: {type(error).__name__}: {error}"})
                return
            line.tell(DONE) if answer is None else line.say(answer)
    finally:
        copies.close()


def main() -> None:
    """Serve the engine at the other end of the socket that was inherited."""
    # The folder of this file is no place to import from: its neighbours are the engine's.
    sys.path.pop(0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    end_with(int(sys.argv[2]))
    try:
        serve(Line(socket.socket(fileno=int(sys.argv[1]))))
    except (EOFError, BrokenPipeError, ConnectionResetError):
        pass  # the engine is gone, or needs this worker no more


if __name__ == "__main__":
    main()
