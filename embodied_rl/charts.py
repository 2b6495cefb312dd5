"""Learning curves of a run as SVG for the report, and as one PNG for a README."""

from __future__ import annotations

import io
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FuncFormatter, MaxNLocator

from embodied_rl.runfolder import SuiteResult

Row = dict[str, Any]
Points = tuple[np.ndarray, np.ndarray]

X = "progress/env_steps"
PALETTE = ("#2f6fb7", "#e07b39", "#3a9d6e", "#8a5fb0", "#c8474b", "#7d6b5d", "#d38bb8", "#6f7a86", "#b5a42e", "#37a6b5")
"""Line colours, told apart by most colour-blind readers."""
INK, FAINT, GRID = "#30363d", "#768390", "#e4e8ec"
_STYLE: dict[Any, Any] = {
    "svg.fonttype": "none",  # text stays text: small files, the page's own font
    "svg.hashsalt": "embodied_rl",  # equal data, equal bytes
    "font.family": "sans-serif",
    "font.size": 9,
    "axes.formatter.useoffset": False,
    "axes.edgecolor": GRID,
    "axes.labelcolor": FAINT,
    "axes.titlecolor": INK,
    "xtick.color": FAINT,
    "ytick.color": FAINT,
    "text.color": INK,
}
MOST_POINTS = 400


@dataclass(frozen=True)
class Chart:
    """One panel of the report.

    Example: `Chart("Step size", ("actor/kl_k3", "actor/kl_k1"), "nat")`.
    """

    title: str
    keys: tuple[str, ...]
    """Metrics drawn as lines; `<task>` at the end stands for one line per task, `<suite>` for every suite."""
    unit: str = ""
    share: bool = False
    """The values are shares: the axis goes from 0 to 1."""
    wide: bool = False


@dataclass(frozen=True)
class Baseline:
    """A level to compare a curve with, and its 95 % interval.

    Example: `Baseline(0.41, 0.356, 0.466)`.
    """

    value: float
    low: float
    high: float


def baselines(start: SuiteResult) -> dict[str, Baseline]:
    """Levels of the policy that training started from.

    Args:
        start: Its evaluation.

    Returns:
        levels: Key of CHARTS -> level; success with Wilson's interval, return with mean +- 1.96 standard errors.
    """
    r = start["overall"]
    half = 1.96 * r["return_std"] / math.sqrt(r["episodes"])
    levels = {"eval/<suite>/return_mean": Baseline(r["return_mean"], r["return_mean"] - half, r["return_mean"] + half)}
    if once := r.get("success_once"):
        levels["eval/<suite>/success_rate"] = Baseline(once["rate"], once["low95"], once["high95"])
    return levels


CHARTS: tuple[Chart, ...] = (
    Chart("Success", ("rollout/success_once_rate", "eval/<suite>/success_rate"), share=True, wide=True),
    Chart("Return", ("rollout/return_mean", "eval/<suite>/return_mean"), "task units", wide=True),
    Chart("Success by task, while collecting", ("rollout/success_once_rate/<task>",), share=True),
    Chart("Success by task, evaluation", ("eval/<suite>/success_rate/<task>",), share=True),
    Chart("Imitation loss", ("actor/imitation_loss",)),
    Chart("Episode length", ("rollout/length_mean",), "control steps"),
    Chart("Entropy", ("actor/entropy",), "nat"),
    Chart("Step size: KL(old ‖ new)", ("actor/kl_k3", "actor/kl_k1"), "nat"),
    Chart("Distance to the reference", ("actor/kl_to_reference",), "nat"),
    Chart("Log-probability gap to the sampler", ("sync/logp_gap_mean",), "nat"),
    Chart("Clipped share", ("actor/clip_fraction",)),
    Chart("Explained variance of the critic", ("critic/explained_variance",)),
    Chart("Critic loss", ("critic/loss",)),
    Chart("Gradient norm before clipping", ("actor/grad_norm",)),
    Chart("Learning rate", ("actor/lr",)),
    Chart("Speed", ("perf/env_steps_per_s",), "control steps / s"),
)
"""Panels in reading order; a panel of which nothing was measured is left out."""


def draw(rows: Sequence[Row], chart: Chart, levels: Mapping[str, Baseline] | None = None) -> str | None:
    """Draw one panel.

    Args:
        rows: `metrics.jsonl`.
        chart: What to draw.
        levels: Key of a chart -> level drawn as a dashed line; see `baselines`.

    Returns:
        svg: An `<svg>` element without references to other files; None when none of the keys was measured.
    """
    lines = [(label, _series(rows, key)) for key in chart.keys for label, key in _expand(rows, key)]
    lines = [(label, points) for label, points in lines if len(points[0])]
    if not lines:
        return None
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(5.6, 2.8) if chart.wide else (4.2, 2.5), layout="constrained")
        axes = figure.add_subplot()
        _plot(axes, rows, chart, lines, levels or {})
        return _svg(figure)


def save_curves(rows: Sequence[Row], path: Path, levels: Mapping[str, Baseline] | None = None) -> bool:
    """Write success (or return) over control steps as a PNG picture.

    Args:
        rows: `metrics.jsonl`.
        path: Ends in .png.
        levels: See `draw`.

    Returns:
        written: False when nothing was measured yet.
    """
    with matplotlib.rc_context(_STYLE):
        figure = Figure(figsize=(7.2, 3.2), layout="constrained", dpi=150)
        for chart in CHARTS[:2]:
            lines = [(label, _series(rows, key)) for key in chart.keys for label, key in _expand(rows, key)]
            lines = [(label, points) for label, points in lines if len(points[0])]
            if lines:
                axes = figure.add_subplot()
                _plot(axes, rows, chart, lines, levels or {})
                axes.set_title(chart.title, fontsize=10, loc="left")
                figure.savefig(path, metadata={"Software": None})
                return True
    return False


def smooth(values: np.ndarray) -> np.ndarray:
    """Centred moving average over a twentieth of the curve; the window shrinks at both ends, NaN is left out."""
    half = len(values) // 40
    if half == 0:
        return values
    good = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(good, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(good)])
    low = np.maximum(np.arange(len(values)) - half, 0)
    high = np.minimum(np.arange(len(values)) + half + 1, len(values))
    with np.errstate(invalid="ignore"):
        return (sums[high] - sums[low]) / (counts[high] - counts[low])


def _plot(
    axes: Axes, rows: Sequence[Row], chart: Chart, lines: list[tuple[str, Points]], levels: Mapping[str, Baseline]
) -> None:
    for i, (label, (x, y)) in enumerate(lines):
        colour = PALETTE[i % len(PALETTE)]
        x, y, keep = x, np.asarray(y), _thin(len(x))
        if label.startswith("evaluation"):
            _plot_evaluation(axes, rows, label, x, y, colour)
            continue
        soft = smooth(y)
        if soft is not y:
            axes.plot(x[keep], y[keep], color=colour, alpha=0.22, linewidth=0.8)
        axes.plot(x[keep], soft[keep], color=colour, linewidth=1.7, label=label, marker="o" if len(x) == 1 else None)
    if chart.share:
        axes.set_ylim(-0.03, 1.03)
    else:
        _limit(axes, lines)
    found = [levels[key] for key in chart.keys if key in levels]
    bottom, top = axes.get_ylim()
    for level in found:
        bottom, top = min(bottom, level.low), max(top, level.high)
        axes.axhspan(level.low, level.high, color=INK, alpha=0.08, linewidth=0)
        axes.axhline(level.value, color=INK, linestyle=(0, (5, 3)), linewidth=1.2, label="before training")
    axes.set_ylim(bottom, top)
    if len(lines) > 1 or found:
        axes.legend(frameon=False, fontsize=8, loc="best", handlelength=1.4)
    axes.set_ylabel(chart.unit)
    axes.set_xlabel("control steps")
    axes.xaxis.set_major_formatter(FuncFormatter(_steps))
    axes.xaxis.set_major_locator(MaxNLocator(6))
    axes.grid(color=GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.tick_params(length=0)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _plot_evaluation(axes: Axes, rows: Sequence[Row], label: str, x: np.ndarray, y: np.ndarray, colour: str) -> None:
    suite = label.partition(" ")[2]
    axes.plot(x, y, color=colour, linewidth=1.4, marker="o", markersize=3.5, label=label)
    low = dict(zip(*_series(rows, f"eval/{suite}/success_low95"), strict=True))
    high = dict(zip(*_series(rows, f"eval/{suite}/success_high95"), strict=True))
    rate = dict(zip(*_series(rows, f"eval/{suite}/success_rate"), strict=True))
    if all(rate.get(a) == b and a in low and a in high for a, b in zip(x, y, strict=True)):
        axes.fill_between(x, [low[a] for a in x], [high[a] for a in x], color=colour, alpha=0.15, linewidth=0)


def _expand(rows: Sequence[Row], pattern: str) -> list[tuple[str, str]]:
    """(label, key) of every measured key that a chart's key stands for, in the order of first appearance."""
    expression = re.compile(re.escape(pattern).replace("<suite>", "([^/]+)").replace("<task>", "(.+)"))
    found: dict[str, str] = {}
    for key in dict.fromkeys(k for row in rows for k in row):
        match = expression.fullmatch(key)
        if match:
            found[key] = _label(pattern, match.groups())
    several = len({k.split("/")[1] for k in found if k.startswith("eval/")}) > 1
    if pattern.endswith("<task>") and not several:
        found = {key: label.rpartition(": ")[2] for key, label in found.items()}
    return [(label, key) for key, label in found.items()]


def _label(pattern: str, names: tuple[str, ...]) -> str:
    if pattern.endswith("<task>"):
        return ": ".join(names)
    if pattern.startswith("eval/"):
        return f"evaluation {names[0]}"
    name = pattern.rpartition("/")[2]
    return {"success_once_rate": "while collecting", "return_mean": "while collecting"}.get(name, name)


def _series(rows: Sequence[Row], key: str) -> Points:
    pairs = [(row[X], row[key]) for row in rows if row.get(key) is not None and X in row]
    return np.array([p[0] for p in pairs], float), np.array([p[1] for p in pairs], float)


def _limit(axes: Axes, lines: list[tuple[str, Points]]) -> None:
    """Keep a single spike from flattening the rest of a curve."""
    values = np.concatenate([y for _, (_, y) in lines])
    low, high = np.percentile(values, [1, 99])
    size = np.abs(values).max() or 1.0  # all zeros still need an axis of some height
    if values.max() - values.min() <= 1e-6 * size:  # constant but for rounding: do not blow the rounding up
        axes.set_ylim(values.min() - 0.1 * size, values.max() + 0.1 * size)
    elif high > low and len(values) >= 50:
        margin = 0.15 * (high - low)
        bottom, top = max(low - margin, values.min()), min(high + margin, values.max())
        pad = 0.04 * (top - bottom)
        axes.set_ylim(bottom - pad, top + pad)


def _thin(count: int) -> np.ndarray:
    """Indices of at most MOST_POINTS points, first and last included."""
    return np.unique(np.linspace(0, count - 1, min(count, MOST_POINTS)).round().astype(int))


def _steps(value: float, _position: int | None) -> str:
    for factor, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if abs(value) >= factor:
            return f"{value / factor:.3g}{letter}"
    return f"{value:.0f}" if math.isfinite(value) else ""


def _svg(figure: Figure) -> str:
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    # The page sizes it: a fixed size in points would not shrink on a phone.
    text = re.sub(r'<svg ([^>]*?)width="[^"]*"', r"<svg \1", text, count=1)
    return re.sub(r'<svg ([^>]*?)height="[^"]*"', r"<svg \1", text, count=1)
