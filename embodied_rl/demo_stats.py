"""Statistics of demonstrations: per episode as it is written, and over the whole set with quantiles."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from embodied_rl.demo_files import read_table, write_json
from embodied_rl.demo_format import STATS, DemonstrationError, Feature, from_arrow
from embodied_rl.demonstrations import Demonstrations


def write_statistics(folder: str | Path) -> None:
    """Write `meta/stats.json`: statistics of the actions and of every real-valued entry of the observation.

    One feature at a time is read from all episodes, so memory holds the frames of the largest feature and no picture.

    Args:
        folder: A set of at least one episode.

    Raises:
        NotFoundError: There is no set.
        DemonstrationError: It is empty, damaged, or has values that are not finite.
    """
    demos = Demonstrations(folder)
    if not demos.episodes:
        raise DemonstrationError(f"{demos.folder}: holds no episode, so there is nothing to take statistics of")
    wanted = {name: f for name, f in demos.features.items() if f.dtype.startswith("float") and _is_seen(name, demos)}
    write_json(demos.folder / STATS, {name: _over_all(demos, name, feature) for name, feature in wanted.items()})


def _is_seen(name: str, demos: Demonstrations) -> bool:
    return name == "action" or name in demos.columns.values()


def _over_all(demos: Demonstrations, name: str, feature: Feature) -> dict[str, Any]:
    values = np.empty((demos.frames, feature.size), np.dtype(feature.dtype))
    start = 0
    for line in demos.lines:
        path = demos.path(line.index)
        try:
            frames = from_arrow(read_table(path, [name]), name, feature)
        except DemonstrationError as error:
            raise DemonstrationError(str(error) if str(path) in str(error) else f"{path}: {error}") from error
        if len(frames) != line.length or not np.isfinite(frames).all():
            raise DemonstrationError(
                f"{path}: '{name}' has another length than its line says, or is not finite; see all problems with: "
                f"embodied-rl check demos {demos.folder}"
            )
        values[start : start + len(frames)] = frames.reshape(len(frames), -1)
        start += len(frames)
    out = quantities(values)
    # One number at a time: float64 copies of everything would need three times the memory.
    both = [np.quantile(values[:, i].astype(np.float64), (0.01, 0.99)) for i in range(feature.size)]
    out |= {"q01": np.array([q[0] for q in both]), "q99": np.array([q[1] for q in both])}
    shaped = {k: v.reshape(feature.shape).tolist() for k, v in out.items()}
    return shaped | {"count": [demos.frames]}


def episode_statistics(columns: Mapping[str, np.ndarray], features: Mapping[str, Feature]) -> dict[str, Any]:
    """What a line of episodes_stats.jsonl says of each column.

    Args:
        columns: name -> [T, *shape]; pictures [T, H, W, 3].
        features: What they are.

    Returns:
        stats: name -> mean, std, min, max in the shape of a frame, and count; of pictures per colour, [3, 1, 1] in
            [0, 1].
    """
    out = {}
    for name, values in columns.items():
        feature, frames = features[name], len(values)
        if feature.is_picture:
            rows = quantities(values.reshape(-1, 3))
            stats = {k: (v / 255).reshape(3, 1, 1).tolist() for k, v in rows.items()}
        else:
            stats = {k: v.reshape(feature.shape).tolist() for k, v in quantities(values.reshape(frames, -1)).items()}
        out[name] = stats | {"count": [frames]}
    return out


def quantities(values: np.ndarray) -> dict[str, np.ndarray]:
    """Mean, standard deviation (of the population), smallest and largest of each column of values [F, D]."""
    columns = [values[:, i].astype(np.float64) for i in range(values.shape[1])]
    return {
        "mean": np.array([c.mean() for c in columns]),
        "std": np.array([c.std() for c in columns]),
        "min": np.array([c.min() for c in columns]),
        "max": np.array([c.max() for c in columns]),
    }
