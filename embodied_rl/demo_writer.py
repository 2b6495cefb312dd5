"""Writing demonstrations: append-only, one episode at a time, safe to kill at any moment.

An episode is its data file and then its line in episodes.jsonl; the line is what makes it part of the set. Opening a
folder again removes what a kill left behind: a data file without its line, or a line that was cut.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from embodied_rl.conformance import Side, conform, read_convention
from embodied_rl.convention import Convention
from embodied_rl.demo_files import append_line, line_of, lock, read_lines, writable, write_json
from embodied_rl.demo_format import (
    CHUNKS_SIZE,
    DATA_PATH,
    EPISODE_STATS,
    EPISODES,
    FRAME,
    INFO,
    OWN,
    TASKS,
    VERSION,
    DemonstrationError,
    EpisodeLine,
    Feature,
    arrow_schema,
    parse_episode,
    to_arrow,
)
from embodied_rl.demo_stats import episode_statistics
from embodied_rl.demonstrations import data_path, read_info
from embodied_rl.runfolder import TEMPORARY, replace_file
from embodied_rl.types import TensorSpec

_DATA_FILE = re.compile(r"episode_(\d+)\.parquet")


@dataclass
class Packed:
    """One recorded episode, encoded and ready to be written."""

    columns: dict[str, pa.Array]
    stats: dict[str, Any]
    instructions: list[str]
    """Of each frame; mostly all the same."""
    extra: dict[str, Any]


class DemoWriter:
    """A set of demonstrations that this process alone may write into, until `close`."""

    def __init__(
        self,
        folder: Path,
        features: Mapping[str, Feature],
        *,
        fps: float | None,
        robot: str,
        made: Mapping[str, Any],
        observation: Mapping[str, TensorSpec],
        convention: Convention | None,
    ) -> None:
        """Begin a set, or go on with one that was made in the same way.

        Args:
            folder: Where it lies; created when missing.
            features: Columns of observation, action and `next.`.
            fps: Control steps per second; None counts steps as seconds.
            robot: What the layout calls `robot_type`.
            made: Everything that decides which episodes there are; going on needs the same.
            observation: What the env says of each entry.
            convention: What it says of its actions; a set that was begun when nothing was kept stays without.

        Raises:
            DemonstrationError: The folder holds something else, was made differently, is damaged, cannot be written,
                or another process writes into it.
        """
        self.folder = folder
        self.features = {**features, **{k: f for k, f in FRAME.items() if not k.startswith("next.")}}
        self.lines: list[EpisodeLine] = []
        self._frames, self._tasks = 0, dict[str, int]()
        rate = fps if fps is not None else 1.0
        self._fps = int(rate) if rate == int(rate) else rate
        specs = {k: asdict(s) | {"dtype": str(s.dtype).removeprefix("torch.")} for k, s in observation.items()}
        for one in specs.values():
            del one["texts"]  # the policy is built for an env, which says them itself
        said = None if convention is None else convention.model_dump(mode="json")
        own = json.loads(json.dumps({"made": made, "observation": specs, "convention": said}))
        self._head = {"codebase_version": VERSION, "robot_type": robot}
        self._own, self._lock = own, -1
        with writable(folder):
            begun = (folder / INFO).is_file()
            if not begun and folder.exists() and _is_used(folder):
                raise DemonstrationError(f"{folder}: exists and holds no demonstrations; choose another --out")
            (folder / "meta").mkdir(parents=True, exist_ok=True)
            self._lock = lock(folder)
            try:
                if begun:
                    self._compare()
                    self._repair()
                else:
                    for name in (EPISODES, EPISODE_STATS, TASKS):
                        (folder / name).touch()
                self.write_info()
            except BaseException:
                self.close()
                raise

    def append(self, packed: Packed) -> None:
        """Write one episode; when this returns it survives a kill and a loss of power."""
        index, t, known = len(self.lines), len(packed.instructions), len(self._tasks)
        numbers = [self._tasks.setdefault(text, len(self._tasks)) for text in packed.instructions]
        steps = np.arange(t)
        counted: dict[str, np.ndarray] = {
            "timestamp": (steps / self._fps).astype(np.float32),
            "frame_index": steps,
            "episode_index": np.full(t, index),
            "index": self._frames + steps,
            "task_index": np.array(numbers),
        }
        columns = packed.columns | {k: to_arrow(v, self.features[k]) for k, v in counted.items()}
        stats = packed.stats | episode_statistics(counted, self.features)
        table = pa.table([columns[name] for name in self.features], schema=arrow_schema(self.features))
        buffer = pa.BufferOutputStream()
        pq.write_table(table, buffer, compression="zstd", write_page_checksum=True)
        line = EpisodeLine(index, t, tuple(dict.fromkeys(packed.instructions)), packed.extra)
        with writable(self.folder):
            path = self._path(index)
            path.parent.mkdir(parents=True, exist_ok=True)
            replace_file(path, buffer.getvalue().to_pybytes())
            for text in list(self._tasks)[known:]:
                append_line(self.folder / TASKS, {"task_index": self._tasks[text], "task": text})
            append_line(self.folder / EPISODE_STATS, {"episode_index": index, "stats": stats})
            append_line(self.folder / EPISODES, _row(line))
        self.lines.append(line)
        self._frames += t

    def write_info(self) -> None:
        """Bring the totals of info.json up to date."""
        n = len(self.lines)
        info = self._head | {
            "total_episodes": n,
            "total_frames": self._frames,
            "total_tasks": len(self._tasks),
            "total_videos": 0,
            "total_chunks": -(-n // CHUNKS_SIZE),
            "chunks_size": CHUNKS_SIZE,
            "fps": self._fps,
            "splits": {"train": f"0:{n}"},
            "data_path": DATA_PATH,
            "video_path": None,
            "features": {name: f.describe() for name, f in self.features.items()},
            OWN: self._own,
        }
        write_json(self.folder / INFO, info)

    def finish(self) -> None:
        """Bring info.json up to date and close, whatever becomes of the first."""
        try:
            self.write_info()
        finally:
            self.close()

    def close(self) -> None:
        """Let other processes write; may be called twice."""
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1

    def _compare(self) -> None:
        """Refuse to go on with a set that was made differently."""
        info, _ = read_info(self.folder)
        own = info.get(OWN)
        if not isinstance(own, dict) or not isinstance(own.get("made"), dict):
            raise DemonstrationError(f"{self.folder}: was not made by embodied-rl collect; choose another --out")
        then, now = _flat(own["made"]), _flat(self._own["made"])
        # Sets were recorded before there were misses, and before demonstrations were repeated.
        none = {"misses": 0.0, "show_misses": False, "replay": None}
        then = {key: value for key, value in none.items() if key in now} | then
        for key in then:
            if key in now and then[key] != now[key]:
                raise DemonstrationError(
                    f"{self.folder}: was made with {key} {then[key]}, and {now[key]} is asked for now; choose another "
                    "--out, or ask for the same"
                )
        gone, new = sorted(then.keys() - now.keys()), sorted(now.keys() - then.keys())
        if gone or new:
            raise DemonstrationError(
                f"{self.folder}: was made by another version, with settings that there are not now "
                f"({', '.join(gone) or 'none'}) and without some that there are ({', '.join(new) or 'none'}); choose "
                "another --out"
            )
        # What was not said of the first episodes must not be said of them by later ones.
        said, self._own["convention"] = self._own["convention"], own.get("convention")
        there, here = (read_convention(str(self.folder), c or {}) for c in (self._own["convention"], said))
        conform(Side(str(self.folder), there), Side("the env", here), "choose another --out")
        if info["features"] != {name: f.describe() for name, f in self.features.items()}:
            raise DemonstrationError(f"{self.folder}: the env now shows other things than it did; choose another --out")

    def _repair(self) -> None:
        """Drop what a kill left unfinished; refuse where more than that is missing."""
        rows, _ = read_lines(self.folder / EPISODES)
        where = self.folder / EPISODES
        self.lines = [parse_episode(row, f"{where}:{i + 1}") for i, row in enumerate(rows)]
        n, texts = len(self.lines), list(dict.fromkeys(self._texts()))
        stats = read_lines(self.folder / EPISODE_STATS)[0][:n]
        tasks = read_lines(self.folder / TASKS)[0][: len(texts)]
        absent = [i for i in range(n) if not self._path(i).is_file()]
        if absent or len(stats) < n or [t.get("task") for t in tasks] != texts:
            what = f"the data of episode {absent[0]} is" if absent else f"lines of {EPISODE_STATS} or {TASKS} are"
            raise DemonstrationError(
                f"{self.folder}: {what} missing; see all problems with: embodied-rl check demos {self.folder}"
            )
        for name, whole in ((EPISODES, rows), (EPISODE_STATS, stats), (TASKS, tasks)):
            text = "".join(line_of(row) for row in whole).encode()
            if (self.folder / name).read_bytes() != text:
                replace_file(self.folder / name, text)
        for path in (self.folder / "data").glob("*/*"):
            match = _DATA_FILE.fullmatch(path.name)
            if path.name.startswith(TEMPORARY) or (match and int(match[1]) >= n):
                path.unlink()
        self._tasks = {text: i for i, text in enumerate(texts)}
        self._frames = sum(line.length for line in self.lines)

    def _path(self, index: int) -> Path:
        return data_path(self.folder, {"data_path": DATA_PATH, "chunks_size": CHUNKS_SIZE}, index)

    def _texts(self) -> Iterator[str]:
        return (text for line in self.lines for text in line.tasks)


def _is_used(path: Path) -> bool:
    """Whether something other than a set that was only just begun is there."""
    return not path.is_dir() or any(inside.name != "meta" for inside in path.iterdir())


def _row(line: EpisodeLine) -> dict[str, Any]:
    return {"episode_index": line.index, "tasks": list(line.tasks), "length": line.length, **line.extra}


def _flat(tree: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    out: dict[str, Any] = {}
    for key, value in tree.items():
        out |= _flat(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return out
