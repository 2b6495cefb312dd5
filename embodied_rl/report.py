"""One HTML file per run: results with intervals, learning curves, time, videos, recipe, versions. No network needed."""

from __future__ import annotations

import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from embodied_rl.charts import CHARTS, Baseline, baselines, draw, save_curves
from embodied_rl.console import stop_sentence
from embodied_rl.errors import NotFoundError, RunFolderError
from embodied_rl.recipe import HELDOUT
from embodied_rl.report_evaluation import changes, films, made_with, percent_interval, results, samples, spoken
from embodied_rl.report_style import PAGE, STYLE
from embodied_rl.runfolder import Summary, explained, write_text_atomic
from embodied_rl.suites import evaluation_file
from embodied_rl.video import INDEX, PAIRS
from embodied_rl.writers import read_rows

PHASES = {
    "rollout": ("Collecting", "#2f6fb7"),
    "advantage": ("Credit assignment", "#8a5fb0"),
    "update": ("Learning", "#e07b39"),
    "evaluate": ("Evaluation", "#3a9d6e"),
    "checkpoint": ("Checkpoints", "#b5a42e"),
    "other": ("Logging and the rest", "#a5adb5"),
}


def write_report(run: Path) -> Path:
    """Write `report.html` (and `learning_curve.png`) into a run folder, whatever the run has come to.

    Args:
        run: The run folder; a part that is missing there becomes a sentence or is left out.

    Returns:
        path: Of the page: one file that opens without a network.

    Raises:
        NotFoundError: There is no such folder.
        RunFolderError: It is not a run folder, a file in it is damaged, or the page cannot be written.
    """
    run = Path(run)
    if not run.is_dir():
        raise NotFoundError(f"{run}: no such run folder")
    if not (run / "recipe.yaml").exists() and not (run / "metrics.jsonl").exists():
        raise RunFolderError(f"{run}: is not a run folder (it has neither recipe.yaml nor metrics.jsonl)")
    rows = read_rows(run / "metrics.jsonl")
    summary = _summary(run)
    if summary and rows and rows[-1]["progress/update"] > summary["updates"]:
        summary = None  # of an earlier stop: the run has gone on since
    versions = _json(run / "versions.json") or {}
    measured = _json(run / evaluation_file(HELDOUT, start=True))
    start = baselines(measured["summary"]) if measured else {}
    body = [
        _header(run, rows, summary, versions),
        results(summary, rows),
        changes(summary),
        samples(measured, _json(run / evaluation_file(HELDOUT))),
        films(_json(run / "videos" / PAIRS / INDEX), _json(run / "videos" / INDEX), run / "videos"),
        _curves(rows, start),
        _time(rows),
        _origin(run, versions, _json(run / evaluation_file(HELDOUT))),
    ]
    path = run / "report.html"
    with explained(run / "learning_curve.png", "write it"):
        save_curves(rows, run / "learning_curve.png", start)
    title = summary["name"] if summary else run.resolve().name
    write_text_atomic(path, PAGE.format(title=escape(title), style=STYLE, body="\n".join(filter(None, body))))
    return path


def _json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path}: is damaged ({error}); delete it and run `embodied-rl report` again") from None


def _summary(run: Path) -> Summary | None:
    summary: Summary | None = _json(run / "summary.json")
    if summary and (changed := summary.pop("since_start", None)) and HELDOUT in summary["evaluation"]:
        summary["evaluation"][HELDOUT]["since_start"] = changed  # where summaries have it now
    return summary


def _header(run: Path, rows: Sequence[dict[str, Any]], summary: Summary | None, versions: dict[str, Any]) -> str:
    last = rows[-1] if rows else {}
    name = summary["name"] if summary else run.resolve().name
    if summary is None:
        badge, word = "open", "unfinished"
        done = f"after update {int(last['progress/update'])}" if last else "before the first update"
        note = f"This run has not ended: the page shows its state {done}."
    else:
        badge = "done" if summary["finished"] else "open"
        word = "finished" if summary["finished"] else "stopped"
        note = stop_sentence(summary)
    counts: dict[str, Any] = dict(summary or {})
    steps = counts.get("env_steps", last.get("progress/env_steps"))
    episodes = counts.get("episodes", last.get("progress/episodes"))
    seconds = counts.get("wall_time_s", last.get("time/total_s"))
    where = versions.get("device_name") or counts.get("device")
    cards = _headline(summary)
    cards += [
        _card("control steps", f"{steps:,.0f}" if steps is not None else None),
        _card("episodes", f"{episodes:,.0f}" if episodes is not None else None),
        _card("wall time", _duration(seconds) if seconds is not None else None),
        _card("computed on", where, "small"),
    ]
    paragraph = f"<p class=note>{escape(note)}</p>" if note else ""
    return (
        f"<header><h1>{escape(name)} <span class='badge {badge}'>{word}</span></h1>{paragraph}"
        f"<div class=cards>{''.join(cards)}</div></header>"
    )


def _headline(summary: Summary | None) -> list[str]:
    cards = []
    for suite, result in (summary["evaluation"] if summary else {}).items():
        overall = result["overall"]
        once = overall.get("success_once")
        if once:
            text = f"{100 * once['rate']:.1f} % <small>{percent_interval(once)}</small>"
            cards.append(f"<div class='card main'><b>{text}</b><span>success, {spoken(suite)}</span></div>")
        else:
            cards.append(_card(f"return, {suite.replace('_', ' ')}", f"{overall['return_mean']:.4g}", "main"))
    return cards


def _card(label: str, value: str | None, kind: str = "") -> str:
    if value is None:
        return ""
    return f"<div class='card {kind}'><b>{escape(value)}</b><span>{escape(label)}</span></div>"


def _curves(rows: Sequence[dict[str, Any]], start: dict[str, Baseline]) -> str:
    if not rows:
        return "<section><h2>Learning curves</h2><p>No update has finished yet.</p></section>"
    panels = []
    for chart in CHARTS:
        svg = draw(rows, chart, start)
        if svg:
            kind = "wide" if chart.wide else ""
            panels.append(f"<figure class='{kind}'><figcaption>{escape(chart.title)}</figcaption>{svg}</figure>")
    note = "Thin lines are single updates, thick lines a moving average; bands are 95 % intervals of evaluations."
    if start:
        note += " The dashed line is the policy that training started from, on the starts of the final evaluation."
    curves = f"<div class=curves>{''.join(panels)}</div>"
    return f"<section><h2>Learning curves</h2>{curves}<p class=note>{note}</p></section>"


def _time(rows: Sequence[dict[str, Any]]) -> str:
    totals = {p: sum(r.get(f"time/{p}_s") or 0.0 for r in rows) for p in PHASES}
    known = sum(totals.values())
    if not known:
        return ""
    totals["other"] = max(0.0, (rows[-1].get("time/total_s") or 0.0) - known)
    whole = sum(totals.values())
    parts, lines = [], []
    for phase, (name, colour) in PHASES.items():
        seconds = totals[phase]
        share = 100 * seconds / whole
        if share >= 0.05:
            parts.append(f"<i style='width:{share:.2f}%;background:{colour}'></i>")
            lines.append(
                f"<tr><th scope=row><span class=dot style='background:{colour}'></span>{name}</th>"
                f"<td>{_duration(seconds)}</td><td>{share:.1f} %</td><td>{1000 * seconds / len(rows):,.0f} ms</td></tr>"
            )
    speeds = sorted(r["perf/env_steps_per_s"] for r in rows if r.get("perf/env_steps_per_s"))
    memory = [r["perf/memory_mib"] for r in rows if r.get("perf/memory_mib")]
    facts = []
    if speeds:
        facts.append(f"Median speed {speeds[len(speeds) // 2]:,.0f} control steps per second, updates included.")
    if memory:
        facts.append(f"Largest memory of the process {max(memory):,.0f} MiB.")
    if void := sum(r.get("rollout/invalid_episodes") or 0 for r in rows):
        facts.append(f"Episodes in which the judge or the simulator failed, which count nowhere: {void:,.0f}.")
    if lost := sum(r.get("perf/worker_restarts") or 0 for r in rows):
        facts.append(f"Processes of simulators that were lost and started again: {lost:,.0f}.")
    return (
        f"<section><h2>Where the time went</h2><div class=stack>{''.join(parts)}</div><div class=scroll><table>"
        f"<tr><th></th><th>time</th><th>share</th><th>per update</th></tr>{''.join(lines)}</table></div>"
        f"<p class=note>{' '.join(facts)}</p></section>"
    )


def _origin(run: Path, versions: dict[str, Any], evaluation: dict[str, Any] | None) -> str:
    parts = []
    recipe = run / "recipe.yaml"
    if recipe.exists():
        parts.append(f"<details><summary>Resolved recipe</summary><pre>{escape(recipe.read_text())}</pre></details>")
    if versions:
        flat = {k: v for k, v in versions.items() if k != "packages" and v is not None}
        flat |= versions.get("packages", {})
        cells = ((escape(str(k)), escape(str(v))) for k, v in flat.items())
        lines = "".join(f"<tr><th scope=row>{k}</th><td>{v}</td></tr>" for k, v in cells)
        parts.append(f"<details><summary>Versions</summary><table>{lines}</table></details>")
    if evaluation:
        parts.append(made_with(evaluation, run / evaluation_file(HELDOUT)))
    git = _json(run / "git.json")
    if git:
        state = "with uncommitted changes (git.diff)" if git["dirty"] else "clean"
        commit, branch = escape(git["commit"]), escape(git["branch"])
        parts.append(f"<p>Source: commit <code>{commit}</code> on {branch}, {state}.</p>")
    return f"<section><h2>How to repeat it</h2>{''.join(parts)}</section>" if parts else ""


def _duration(seconds: float) -> str:
    if seconds < 60:
        return f"{seconds:.1f} s"
    minutes, hours = int(seconds) // 60, int(seconds) // 3600
    return f"{minutes} min {int(seconds) % 60:02d} s" if not hours else f"{hours} h {minutes % 60:02d} min"
