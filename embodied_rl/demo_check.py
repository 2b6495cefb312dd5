"""What is wrong with a set of demonstrations: every problem, each in one sentence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from embodied_rl.check_tools import Finding
from embodied_rl.convention import UNKNOWN
from embodied_rl.demo_files import read_lines, read_table
from embodied_rl.demo_format import (
    CUT,
    EPISODE_STATS,
    EPISODES,
    INFO,
    TASKS,
    DemonstrationError,
    EpisodeLine,
    Feature,
    from_arrow,
    instruction_problem,
    parse_episode,
)
from embodied_rl.demonstrations import Demonstrations, data_path, read_info
from embodied_rl.errors import ConfigError


def check_demos(folder: str, overrides: Sequence[str] = ()) -> list[Finding]:
    """Look through a set, one finding per problem, or one that says what it holds.

    Raises:
        NotFoundError: There is no set.
        ConfigError: Settings were given.
    """
    if overrides:
        raise ConfigError(f"check demos takes a folder only, got '{overrides[0]}'; leave it out")
    problems = validate(folder)
    if problems:
        return [Finding(problem, False) for problem in problems]
    demos = Demonstrations(folder)
    texts = len({text for line in demos.lines for text in line.tasks})
    told = f"what an action means is {(demos.action.convention or UNKNOWN).told()}"
    return [Finding(f"{demos.episodes:,} episodes, {demos.frames:,} frames, {texts:,} instructions", True, told)]


def validate(folder: str | Path) -> list[str]:
    """Read every file of a set, decode every picture and compare with the metadata.

    Args:
        folder: The set; nothing in it is changed.

    Returns:
        problems: Sentences, empty when all is well. Missing, cut or damaged files, frame counts that do not match,
            actions of another size, values that are not finite, pictures of another size or type, instructions that
            are empty, too long or not printable, missing statistics, another version of the layout, actions of an
            unknown or unfitting convention.

    Raises:
        NotFoundError: There is no such folder, or no set in it.
    """
    folder = Path(folder)
    try:
        info, features = read_info(folder)
        rows, cut = read_lines(folder / EPISODES)
        lines = [parse_episode(row, f"{folder / EPISODES}:{i + 1}") for i, row in enumerate(rows)]
    except DemonstrationError as error:
        return [str(error)]
    problems = []
    if cut:
        problems.append(f"{folder / EPISODES}: {CUT}")
    problems += _metadata(folder, info, lines)
    problems += _instructions(folder, lines)
    for line in lines:
        path = data_path(folder, info, line.index)
        problems += [f"{path}: {problem}" for problem in _episode(path, line, features)]
    problems += _left_over(folder, info, lines)
    try:
        Demonstrations(folder).statistics()
    except (DemonstrationError, ConfigError) as error:
        problems.append(str(error))
    return problems


def _metadata(folder: Path, info: dict[str, Any], lines: list[EpisodeLine]) -> Iterator[str]:
    found = {"total_episodes": len(lines), "total_frames": sum(line.length for line in lines)}
    for name, value in found.items():
        if info.get(name) != value:
            yield (
                f"{folder / INFO}: {name} is {info.get(name)}, {EPISODES} comes to {value}; go on with embodied-rl "
                "collect, or correct it"
            )
    try:
        rows, _ = read_lines(folder / EPISODE_STATS)
    except DemonstrationError as error:
        yield str(error)
        return
    absent = sorted({line.index for line in lines} - {row.get("episode_index") for row in rows})
    if absent:
        yield f"{folder / EPISODE_STATS}: has no line for {_some('episode', absent)}; take their statistics anew"


def _instructions(folder: Path, lines: list[EpisodeLine]) -> Iterator[str]:
    first: dict[str, int] = {}
    for line in lines:
        for text in line.tasks:
            first.setdefault(text, line.index)
    for text, index in first.items():
        problem = instruction_problem(text)
        if problem:
            yield f"{folder / EPISODES}: episode {index}: {problem}"
    try:
        rows, _ = read_lines(folder / TASKS)
    except DemonstrationError as error:
        yield str(error)
        return
    known = {row.get("task") for row in rows}
    for text, index in first.items():
        if text not in known:
            yield f"{folder / TASKS}: has no line for the instruction of episode {index}, {text[:60]!r}; add it"


def _episode(path: Path, line: EpisodeLine, features: dict[str, Feature]) -> Iterator[str]:
    try:
        table = read_table(path, verify=True)
    except DemonstrationError as error:
        yield str(error).removeprefix(f"{path}: ")
        return
    if len(table) != line.length:
        yield f"has {len(table)} frames, {EPISODES} says {line.length}; correct the line, or collect the set anew"
    for name, feature in features.items():
        try:
            values = from_arrow(table, name, feature)
        except DemonstrationError as error:
            yield f"{error}; remove the episode, or collect it anew"
            continue
        except pa.ArrowException as error:
            yield f"'{name}' cannot be read ({error}); remove the episode, or collect it anew"
            continue
        if feature.dtype.startswith("float") and not np.isfinite(values).all():
            bad = (~np.isfinite(values.reshape(len(values), -1))).any(1).nonzero()[0].tolist()
            yield f"'{name}' is not finite in {_some('frame', bad)}; remove the episode, or collect it anew"
        wanted = {"frame_index": np.arange(len(table)), "episode_index": np.full(len(table), line.index)}
        if name in wanted and not np.array_equal(values.reshape(-1), wanted[name]):
            yield f"'{name}' does not count as its place in the set says; number its frames anew"


def _left_over(folder: Path, info: dict[str, Any], lines: list[EpisodeLine]) -> Iterator[str]:
    listed = {data_path(folder, info, line.index) for line in lines}
    for path in sorted((folder / "data").glob("*/*")):
        if path not in listed:
            yield f"{path}: belongs to no line of {EPISODES}; go on with embodied-rl collect, or delete it"


def _some(what: str, numbers: list[int]) -> str:
    more = f" and {len(numbers) - 8} more" if len(numbers) > 8 else ""
    return f"{what}{'s' * (len(numbers) > 1)} {', '.join(map(str, numbers[:8]))}{more}"
