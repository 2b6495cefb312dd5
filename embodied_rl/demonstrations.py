"""Demonstrations as training reads them: opened by their metadata, decoded episode by episode, drawn as batches.

The layout on disk is LeRobot's v2.1 (see `demo_format`); `record_demos` makes such sets with an env's own expert.

Example:
    demos = Demonstrations("demos/lift")
    stats = demos.statistics()["action"]["q99"]                    # [7]
    for obs, action, mask, last in demos.batches(torch.Generator().manual_seed(0), batch_size=256, chunk=8):
        ...                                                        # action [256, 8, 7], mask [256, 8]
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl.conformance import Side, conform, read_convention, vectors_of, vocabularies_of
from embodied_rl.convention import UNKNOWN
from embodied_rl.demo_batches import CACHE_BYTES, Batches
from embodied_rl.demo_files import read_json, read_lines, read_table
from embodied_rl.demo_format import (
    CHUNKS_SIZE,
    CUT,
    DATA_PATH,
    DTYPES,
    EPISODES,
    INFO,
    NO_EPISODE,
    OWN,
    STATS,
    TASKS,
    VERSION,
    DemonstrationError,
    Feature,
    entry_of,
    from_arrow,
    instruction_problem,
    parse_episode,
)
from embodied_rl.errors import CapabilityError, NotFoundError, nearest
from embodied_rl.types import ActionSpec, EnvSpec, Obs, TensorSpec

__all__ = ["CACHE_BYTES", "Batches", "DemonstrationError", "Demonstrations", "Episode"]

STATISTICS = ("mean", "std", "min", "max", "q01", "q99")


@dataclass
class Episode:
    """One demonstration of T frames; frame t is what was seen before `action[t]`."""

    index: int
    obs: Obs
    """name -> [T, ...]; pictures [T, H, W, 3] uint8."""
    action: Tensor
    """[T, D] float32"""
    reward: Tensor | None
    """[T] float32, what each action earned; None where the set has none."""
    success: Tensor | None
    """[T] bool, the goal held after the action; None where the set does not say."""
    instruction: str


class Demonstrations:
    """A set of demonstrations; opening it reads metadata only."""

    def __init__(self, folder: str | Path) -> None:
        """Open a folder.

        Raises:
            NotFoundError: There is no such folder.
            DemonstrationError: Its metadata is missing, damaged or of another version.
            ConfigError: Its actions have a convention that does not exist.
        """
        self.folder = Path(folder)
        self.info, self.features = read_info(self.folder)
        """`features`: column -> what it holds, as in info.json."""
        rows, self._cut = read_lines(self.folder / EPISODES)
        self.lines = [parse_episode(row, f"{self.folder / EPISODES}:{i + 1}") for i, row in enumerate(rows)]
        """One per episode, in the order of the file."""
        if [line.index for line in self.lines] != list(range(len(self.lines))):
            raise DemonstrationError(
                f"{self.folder / EPISODES}: episodes are not numbered 0, 1, 2, ...; number the lines and files anew"
            )
        said = self.info.get(OWN, {}).get("convention")
        size = self.features["action"].size
        self._convention = None if said is None else read_convention(str(self.folder / INFO), said, size)
        self.columns = _columns(self.folder, self.features)
        """Name of an observation entry -> its column."""

    @property
    def episodes(self) -> int:
        """E, whole episodes."""
        return len(self.lines)

    @property
    def frames(self) -> int:
        """Control steps of all episodes."""
        return sum(line.length for line in self.lines)

    @property
    def lengths(self) -> Tensor:
        """[E] int64 frames of each episode."""
        return torch.tensor([line.length for line in self.lines], dtype=torch.int64)

    @property
    def chunk_index(self) -> Tensor:
        """[E] int64 number of the `data/chunk-...` folder that each episode's file lies in."""
        return torch.arange(self.episodes) // int(self.info["chunks_size"])

    @property
    def cameras(self) -> tuple[str, ...]:
        """Entries of the observation that are pictures."""
        return tuple(name for name, column in self.columns.items() if self.features[column].is_picture)

    @property
    def observation(self) -> dict[str, TensorSpec]:
        """What a frame shows, as an env would describe it; of sets made elsewhere only shapes and types are known."""
        known = self.info.get(OWN, {}).get("observation", {})
        out = {}
        for name, column in self.columns.items():
            feature = self.features[column]
            plain = {"shape": feature.picture_shape if feature.is_picture else feature.shape}
            bounds = {"low": 0.0, "high": 255.0} if feature.is_picture else {}
            more = plain | bounds | known.get(name, {}) | {"dtype": DTYPES[feature.dtype]}
            out[name] = TensorSpec(**more | {"shape": tuple(more["shape"])})
        return out

    @property
    def action(self) -> ActionSpec:
        """What an action is."""
        feature = self.features["action"]
        names = feature.names
        if isinstance(names, dict):  # {"motors": [...]}
            names = next(iter(names.values()), None)
        fits = isinstance(names, list) and len(names) == feature.size
        names = tuple(map(str, names)) if fits else ()
        return ActionSpec("continuous", feature.size, names, convention=self._convention)

    def path(self, episode: int) -> Path:
        """The data file of an episode."""
        return data_path(self.folder, self.info, episode)

    def statistics(self) -> dict[str, dict[str, Tensor]]:
        """Statistics over all frames, of `action` and of each entry of the observation that is real-valued.

        Returns:
            statistics: "action" or entry name -> mean, std, min, max, q01, q99, each in the shape of the entry,
                float32. `q01` and `q99` are the 1 % and 99 % quantiles.

        Raises:
            DemonstrationError: There are none, or of another number of frames; says how to make them.
        """
        path = self.folder / STATS
        make = f"python -c \"from embodied_rl.demo_stats import write_statistics; write_statistics('{self.folder}')\""
        if not path.is_file():
            raise DemonstrationError(f"{path}: is missing, so nothing can be normalised; make it with: {make}")
        data, out = read_json(path), {}
        entries = {"action": "action"} | {n: c for n, c in self.columns.items() if self._is_real(c)}
        for name, column in entries.items():
            feature, rows = self.features[column], data.get(column)
            rows = rows if isinstance(rows, dict) else {}
            found = {k: _numbers(rows.get(k), feature.size) for k in STATISTICS}
            if any(x is None for x in found.values()):
                raise DemonstrationError(
                    f"{path}: has no {', '.join(STATISTICS)} of {feature.size} numbers for '{column}'; make them with: "
                    f"{make}"
                )
            count = _numbers(rows.get("count", self.frames), 1)
            if count is None or int(count[0]) != self.frames:
                found_frames = "?" if count is None else int(count[0])
                raise DemonstrationError(
                    f"{path}: is of {found_frames} frames, the set has {self.frames}; make it anew with: {make}"
                )
            shape = self.observation[name].shape if name in self.columns else feature.shape
            out[name] = {k: torch.tensor(x, dtype=torch.float32).reshape(shape) for k, x in found.items()}
        return out

    def bounds(self) -> tuple[float, float] | None:
        """Smallest and largest number of the actions; None where there are no statistics.

        Raises:
            DemonstrationError: See `statistics`.
        """
        if not (self.folder / STATS).is_file():
            return None
        found = self.statistics()["action"]
        return float(found["min"].min()), float(found["max"].max())

    def load(self, episodes: Sequence[int] | None = None, *, cameras: Sequence[str] | None = None) -> Iterator[Episode]:
        """Decode episodes one after another.

        Args:
            episodes: Which, in this order; None for all.
            cameras: Pictures to decode; None for all, `()` for none.

        Yields:
            episode: Tensors on the CPU, each with memory of its own.

        Raises:
            NotFoundError: No such camera or episode.
            DemonstrationError: A file is missing, damaged, or does not hold what the metadata promises.
        """
        columns = self.choose(cameras)
        for index in range(self.episodes) if episodes is None else episodes:
            if not 0 <= index < self.episodes:
                raise NotFoundError(f"{self.folder}: there is no episode {index}, it holds 0 to {self.episodes - 1}")
            yield self._decode(index, columns)

    def batches(
        self,
        generator: torch.Generator,
        batch_size: int,
        chunk: int,
        *,
        cameras: Sequence[str] | None = None,
        cache_bytes: int = CACHE_BYTES,
    ) -> Batches:
        """Endless batches of frames, each frame once per epoch; see `Batches`."""
        return Batches(self, generator, batch_size, chunk, cameras=cameras, cache_bytes=cache_bytes)

    def choose(self, cameras: Sequence[str] | None) -> dict[str, str]:
        """Entry -> column, of everything but the cameras left out; NotFoundError for an unknown camera."""
        for name in cameras or ():
            if name not in self.cameras:
                raise NotFoundError(f"{self.folder}: there is no camera '{name}'{nearest(name, self.cameras)}")
        dropped = set(self.cameras) - set(self.cameras if cameras is None else cameras)
        return {name: column for name, column in self.columns.items() if name not in dropped}

    def require(self, spec: EnvSpec) -> tuple[str, ...]:
        """Make sure that a policy can learn from this set and then act in an env.

        Returns:
            report: What both say of actions, see `conform`.

        Raises:
            DemonstrationError: The set is cut short, or an instruction is none.
            CapabilityError: It is empty, or actions or an entry of the observation differ; says both sides.
        """
        if self._cut:
            raise DemonstrationError(f"{self.folder / EPISODES}: {CUT}")
        if not self.lines:
            raise CapabilityError(f"{self.folder}: {NO_EPISODE}")
        for line in self.lines:
            for problem in filter(None, map(instruction_problem, line.tasks)):
                raise DemonstrationError(
                    f"{self.folder / EPISODES}: episode {line.index}: {problem}; correct it there and in {TASKS}"
                )
        if spec.action.kind != "continuous" or spec.action.size != self.action.size:
            raise CapabilityError(
                f"{self.folder}: its actions have {self.action.size} numbers, the env takes {spec.action.size} "
                f"({spec.action.kind}); collect a set in this env, or name the env it was collected in"
            )
        have = self.observation
        for name, wanted in spec.seen.items():
            found = have.get(name)
            if found is None or (found.shape, found.dtype) != (wanted.shape, wanted.dtype):
                there = f"{list(found.shape)} {found.dtype}" if found else f"absent (it has {', '.join(have)})"
                raise CapabilityError(
                    f"{self.folder}: observation '{name}' is {there}, the env shows {list(wanted.shape)} "
                    f"{wanted.dtype}; collect a set in this env, or set the env as it was then"
                )
            if wanted.dtype != torch.int64 or found.high is None or wanted.high is None:
                continue
            if found.high > wanted.high:
                raise CapabilityError(
                    f"{self.folder}: observation '{name}' has numbers up to {found.high:g}, the env knows them up to "
                    f"{wanted.high:g}; collect a set in this env, or set the env as it was then"
                )
        kept = Side(
            f"demonstrations {self.folder}", self._convention or UNKNOWN, vocabularies=vocabularies_of(have),
            vectors=vectors_of({n: have[n] for n in spec.seen}), numbers=self.action.size, bounds=self.bounds(),
        )  # fmt: skip
        return conform(kept, Side.of("the env", spec), "collect a set in this env, or set the env as it was then")

    def _is_real(self, column: str) -> bool:
        return self.features[column].dtype.startswith("float")

    def _decode(self, index: int, columns: dict[str, str]) -> Episode:
        line, path = self.lines[index], self.path(index)
        wanted = [c for c in (*columns.values(), "action", "next.reward", "next.success") if c in self.features]
        table = read_table(path, wanted)
        if len(table) != line.length:
            raise DemonstrationError(
                f"{path}: has {len(table)} frames, {EPISODES} says {line.length}; {_check(self.folder)}"
            )
        out: dict[str, Tensor] = {}
        specs = self.observation
        for column in wanted:
            try:
                values = from_arrow(table, column, self.features[column])
            except DemonstrationError as error:
                raise DemonstrationError(f"{path}: {error}; {_check(self.folder)}") from error
            if self._is_real(column) and not np.isfinite(values).all():
                frame = int((~np.isfinite(values.reshape(len(values), -1))).any(1).argmax())
                raise DemonstrationError(f"{path}: '{column}' of frame {frame} is not finite; {_check(self.folder)}")
            out[column] = torch.from_numpy(np.array(values))
        obs = {name: out[column].reshape(line.length, *specs[name].shape) for name, column in columns.items()}
        reward, success = (out[c].flatten() if c in out else None for c in ("next.reward", "next.success"))
        return Episode(index, obs, out["action"].float(), reward, success, line.tasks[0])


def read_info(folder: Path) -> tuple[dict[str, Any], dict[str, Feature]]:
    """What info.json says, and its features of a known type.

    Raises:
        NotFoundError: There is no such folder.
        DemonstrationError: No set of demonstrations of this version.
    """
    path = folder / INFO
    if not folder.is_dir():
        raise NotFoundError(f"{folder}: there is no such folder; make a set with: embodied-rl collect")
    if not path.is_file():
        raise NotFoundError(
            f"{folder}: holds no demonstrations ({INFO} is missing); make some with: embodied-rl collect"
        )
    info = read_json(path)
    if info.get("codebase_version") != VERSION:
        raise DemonstrationError(
            f"{path}: codebase_version is {info.get('codebase_version')!r}, expected '{VERSION}'; convert the set with "
            "LeRobot's own scripts, or collect it anew"
        )
    info = {"data_path": DATA_PATH, "chunks_size": CHUNKS_SIZE, "features": {}} | info
    if not isinstance(info["features"], dict):
        raise DemonstrationError(f"{path}: features is a {type(info['features']).__name__}, expected an object")
    try:
        data_path(folder, info, 0)
    except (ArithmeticError, LookupError, TypeError, ValueError):
        raise DemonstrationError(
            f"{path}: data_path {info['data_path']!r} and chunks_size {info['chunks_size']!r} name no file, expected "
            f"'{DATA_PATH}' and {CHUNKS_SIZE}"
        ) from None
    features = {}
    for name, f in info["features"].items():
        if _is_feature(f):
            features[name] = Feature(f["dtype"], tuple(f["shape"]), f.get("names"))
        elif name == "action" or entry_of(name):
            raise DemonstrationError(
                f"{path}: '{name}' is {f}, expected a shape (of three numbers for pictures) and a dtype of "
                f"{', '.join(DTYPES)}"
            )
    action = features.get("action")
    if action is None or len(action.shape) != 1 or not action.dtype.startswith("float"):
        found = "missing" if action is None else f"{action.dtype} {list(action.shape)}"
        raise DemonstrationError(f"{path}: 'action' is {found}, expected real numbers of shape [n]")
    return info, features


def _is_feature(f: Any) -> bool:
    if not isinstance(f, dict) or f.get("dtype") not in DTYPES or not isinstance(f.get("shape"), list):
        return False
    whole = all(type(n) is int and n > 0 for n in f["shape"])
    return whole and (f["dtype"] not in ("image", "video") or len(f["shape"]) == 3)


def data_path(folder: Path, info: dict[str, Any], episode: int) -> Path:
    """The data file of an episode."""
    chunk = episode // int(info["chunks_size"])
    return folder / str(info["data_path"]).format(episode_chunk=chunk, episode_index=episode)


def _columns(folder: Path, features: dict[str, Feature]) -> dict[str, str]:
    out: dict[str, str] = {}
    for column in features:
        name = entry_of(column)
        if name in out:
            raise DemonstrationError(f"{folder / INFO}: '{column}' and '{out[name]}' are both '{name}'; rename one")
        if name:
            out[name] = column
    return out


def _numbers(values: Any, size: int) -> np.ndarray | None:
    """So many finite numbers, or None."""
    try:
        flat = np.asarray(values, np.float64).reshape(-1)
    except (TypeError, ValueError):
        return None
    return flat if flat.size == size and np.isfinite(flat).all() else None


def _check(folder: Path) -> str:
    return f"see all problems with: embodied-rl check demos {folder}"
