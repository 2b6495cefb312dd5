"""One HTML file per run: results with intervals, learning curves, time, videos, recipe, versions. No network needed."""

from __future__ import annotations

import base64
import json
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from embodied_rl.charts import CHARTS, draw, save_curves
from embodied_rl.console import stop_sentence
from embodied_rl.errors import NotFoundError, RunFolderError
from embodied_rl.runfolder import Rate, Result, Summary, explained, write_text_atomic
from embodied_rl.video import INDEX
from embodied_rl.writers import read_rows

VIDEO_BUDGET = 9_000_000
"""Bytes of video put into the page (a third more in base64); the other files stay in videos/."""
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
    summary: Summary | None = _json(run / "summary.json")
    if summary and rows and rows[-1]["progress/update"] > summary["updates"]:
        summary = None  # of an earlier stop: the run has gone on since
    versions = _json(run / "versions.json") or {}
    body = [
        _header(run, rows, summary, versions),
        _results(summary, rows),
        _changes(summary),
        _videos(run),
        _curves(rows),
        _time(rows),
        _origin(run, versions),
    ]
    path = run / "report.html"
    with explained(run / "learning_curve.png", "write it"):
        save_curves(rows, run / "learning_curve.png")
    title = summary["name"] if summary else run.resolve().name
    write_text_atomic(path, _PAGE.format(title=escape(title), style=_STYLE, body="\n".join(filter(None, body))))
    return path


def _json(path: Path) -> Any:
    if not path.exists():
        return None
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise RunFolderError(f"{path}: is damaged ({error}); delete it and run `embodied-rl report` again") from None


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
            text = f"{100 * once['rate']:.1f} % <small>{_percent_interval(once)}</small>"
            cards.append(f"<div class='card main'><b>{text}</b><span>success, {escape(suite)}</span></div>")
        else:
            cards.append(_card(f"return, {suite}", f"{overall['return_mean']:.4g}", "main"))
    return cards


def _card(label: str, value: str | None, kind: str = "") -> str:
    if value is None:
        return ""
    return f"<div class='card {kind}'><b>{escape(value)}</b><span>{escape(label)}</span></div>"


def _results(summary: Summary | None, rows: Sequence[dict[str, Any]]) -> str:
    if summary is None or not summary["evaluation"]:
        text = "There is no final evaluation yet." if summary is None else "There was no final evaluation."
        evaluated = [r for r in rows if any(k.startswith("eval/") for k in r)]
        if evaluated:
            update = int(evaluated[-1]["progress/update"])
            text += f" Its last evaluation during training was at update {update}; see the curves."
        return f"<section><h2>Result</h2><p>{escape(text)}</p></section>"
    tables = []
    for suite, result in summary["evaluation"].items():
        has_success = "success_once" in result["overall"]
        success = ("success", "rate, 95 % interval", "at the end") if has_success else ()
        head = ("task", *success, "return", "length", "episodes")
        lines = [*result["tasks"].items()]
        body = "".join(_result_row(task, r, has_success) for task, r in lines)
        body += _result_row("all" if lines else suite, result["overall"], has_success, "total" if lines else "")
        head_html = "".join(f"<th>{escape(h)}</th>" for h in head)
        kind = "results rates" if has_success else "results"
        table = f"<div class=scroll><table class='{kind}'><tr>{head_html}</tr>{body}</table></div>"
        tables.append(f"<h3>{escape(suite)}</h3>{table}")
    note = (
        "Success means that the goal held at some step; “at the end” that it held in the last state. "
        "Bars show the rate, whiskers its 95 % interval (Wilson). Evaluation starts are never used in training."
    )
    return f"<section><h2>Result</h2>{''.join(tables)}<p class=note>{note}</p></section>"


def _changes(summary: Summary | None) -> str:
    changes = summary.get("since_start") if summary else None
    if not changes:
        return ""
    lines = "".join(
        f"<tr class='{'total' if name == 'all' else ''}'><th scope=row>{escape(name)}</th><td>{c['before']:.3f}</td>"
        f"<td><b>{c['after']:.3f}</b></td><td>{c['difference']:+.3f} <small>{c['low95']:+.3f} to {c['high95']:+.3f}"
        f"</small></td><td>{c['p']:.2g}</td><td>{c['episodes']}</td></tr>"
        for name, c in changes.items()
    )
    head = "".join(f"<th>{h}</th>" for h in ("task", "before", "after", "difference, 95 %", "p", "episodes"))
    note = "Both policies played the same starts: the difference is paired (Newcombe), p is McNemar's exact test."
    table = f"<div class=scroll><table class=results><tr>{head}</tr>{lines}</table></div>"
    return f"<section><h2>Before and after</h2>{table}<p class=note>{note}</p></section>"


def _result_row(task: str, r: Result, has_success: bool, kind: str = "") -> str:
    cells = [f"<th scope=row>{escape(task)}</th>"]
    if has_success:
        once, end = r.get("success_once"), r.get("success_at_end")
        rate = f"<td>{_bar(once)}</td><td><b>{once['rate']:.3f}</b> {_interval(once)}</td>" if once else ""
        cells.append(rate or "<td>–</td><td>–</td>")
        cells.append(f"<td>{end['rate']:.3f}</td>" if end else "<td>–</td>")
    cells.append(f"<td>{r['return_mean']:.2f}</td><td>{r['length_mean']:.1f}</td><td>{r['episodes']}</td>")
    return f"<tr class='{kind}'>{''.join(cells)}</tr>"


def _bar(rate: Rate) -> str:
    low, high = 100 * rate["low95"], 100 * rate["high95"]
    return (
        f"<div class=bar role=img aria-label='{rate['successes']} of {rate['episodes']}'>"
        f"<i style='width:{100 * rate['rate']:.2f}%'></i><u style='left:{low:.2f}%;width:{high - low:.2f}%'></u></div>"
    )


def _interval(rate: Rate) -> str:
    return f"<small>{rate['low95']:.3f}–{rate['high95']:.3f}</small>"


def _percent_interval(rate: Rate) -> str:
    return f"{100 * rate['low95']:.1f}–{100 * rate['high95']:.1f}"


def _videos(run: Path) -> str:
    index = _json(run / "videos" / INDEX)
    if not index or not index["clips"]:
        return ""
    figures, spent, left_out = [], 0, 0
    for clip in index["clips"]:
        path = run / "videos" / clip["file"]
        if not path.is_file() or spent + path.stat().st_size > VIDEO_BUDGET:
            left_out += 1
            continue
        spent += path.stat().st_size
        data = base64.b64encode(path.read_bytes()).decode()
        kind, word = {True: ("success", "success"), False: ("failure", "failure"), None: ("", "")}[clip["success"]]
        facts = [word, f"{clip['length']} steps" if clip.get("length") is not None else ""]
        hint = f"return {clip['return']:.3g}" if clip.get("return") is not None else ""
        figures.append(
            f"<figure class='{kind}' title='{hint}'>"
            f"<video autoplay loop muted playsinline src='data:video/mp4;base64,{data}'></video>"
            f"<figcaption><b>{escape(clip['task'])}</b><em>{' · '.join(filter(None, facts))}</em>"
            f"<span>{escape(clip['instruction'])}</span></figcaption></figure>"
        )
    more = f"<p class=note>{left_out} more in the folder videos/.</p>" if left_out else ""
    return f"<section><h2>Episodes after training</h2><div class=videos>{''.join(figures)}</div>{more}</section>"


def _curves(rows: Sequence[dict[str, Any]]) -> str:
    if not rows:
        return "<section><h2>Learning curves</h2><p>No update has finished yet.</p></section>"
    panels = []
    for chart in CHARTS:
        svg = draw(rows, chart)
        if svg:
            kind = "wide" if chart.wide else ""
            panels.append(f"<figure class='{kind}'><figcaption>{escape(chart.title)}</figcaption>{svg}</figure>")
    note = "Thin lines are single updates, thick lines a moving average; bands are 95 % intervals of evaluations."
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
    return (
        f"<section><h2>Where the time went</h2><div class=stack>{''.join(parts)}</div><div class=scroll><table>"
        f"<tr><th></th><th>time</th><th>share</th><th>per update</th></tr>{''.join(lines)}</table></div>"
        f"<p class=note>{' '.join(facts)}</p></section>"
    )


def _origin(run: Path, versions: dict[str, Any]) -> str:
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


_PAGE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title} · training report</title>
<style>{style}</style>
</head>
<body>
<main>
{body}
</main>
</body>
</html>
"""

_STYLE = """
:root { --ink: #1f2328; --soft: #59636e; --faint: #818b98; --line: #e4e8ec; --paper: #fff; --ground: #f6f8fa;
  --good: #2e8b57; --bad: #c83e3a; --accent: #2f6fb7; }
* { box-sizing: border-box; }
body { margin: 0; background: var(--ground); color: var(--ink);
  font: 15px/1.5 system-ui, -apple-system, "Segoe UI", Roboto, "Helvetica Neue", Arial, sans-serif; }
main { max-width: 1120px; margin: 0 auto; padding: 28px 20px 60px; }
h1 { font-size: 28px; margin: 0 0 4px; letter-spacing: -0.01em; overflow-wrap: anywhere; }
h2 { font-size: 18px; margin: 0 0 14px; }
h3 { font-size: 14px; margin: 14px 0 6px; color: var(--soft); font-weight: 600; }
section { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 20px 22px;
  margin-top: 18px; }
.note { color: var(--faint); font-size: 13px; margin: 12px 0 0; }
header .note { margin: 0 0 8px; }
.badge { font-size: 12px; font-weight: 600; vertical-align: 5px; padding: 2px 9px; border-radius: 99px;
  letter-spacing: 0; }
.badge.done { background: #dff3e7; color: #1d6b40; }
.badge.open { background: #fdf0d5; color: #855b00; }
.cards { display: grid; grid-template-columns: repeat(auto-fit, minmax(150px, 1fr)); gap: 12px; margin-top: 16px; }
.card { background: var(--paper); border: 1px solid var(--line); border-radius: 12px; padding: 12px 16px; }
.card b { display: block; font-size: 20px; font-variant-numeric: tabular-nums; }
.card b small { font-weight: 400; font-size: 13px; color: var(--soft); white-space: nowrap; }
.card.main { border-color: #bfd4ec; background: #f3f8fd; }
.card.small b { font-size: 14px; line-height: 30px; white-space: nowrap; overflow: hidden;
  text-overflow: ellipsis; }
.card span { color: var(--faint); font-size: 13px; }
.scroll { overflow-x: auto; }
table { border-collapse: collapse; font-size: 14px; font-variant-numeric: tabular-nums; }
th, td { text-align: right; padding: 6px 14px 6px 0; border-bottom: 1px solid var(--line); white-space: nowrap; }
th:first-child, details td, details th { text-align: left; }
tr:first-child th { color: var(--faint); font-weight: 500; font-size: 13px; }
th[scope=row] { font-weight: 500; }
tr:last-child > * { border-bottom: 0; }
tr.total > * { border-top: 2px solid var(--line); font-weight: 600; }
table.results { width: 100%; }
table.rates td:nth-child(2) { width: 36%; min-width: 130px; } table.rates th:nth-child(2) { text-align: left; }
td small { color: var(--soft); font-weight: 400; }
.bar { position: relative; height: 14px; background: #edf1f4; border-radius: 3px; }
.bar i { position: absolute; inset: 0 auto 0 0; background: var(--good); opacity: 0.85; border-radius: 3px; }
.bar u { position: absolute; top: 6px; height: 2px; background: var(--ink); }
.bar u::before, .bar u::after { content: ""; position: absolute; top: -4px; height: 10px; width: 2px;
  background: var(--ink); }
.bar u::before { left: 0; } .bar u::after { right: 0; }
.videos { display: grid; grid-template-columns: repeat(auto-fill, minmax(220px, 1fr)); gap: 14px; }
figure { margin: 0; }
.videos figure { border: 3px solid var(--faint); border-radius: 10px; overflow: hidden; background: var(--paper); }
.videos figure.success { border-color: var(--good); } .videos figure.failure { border-color: var(--bad); }
.videos video { display: block; width: 100%; background: #dfe4e8; }
.videos figcaption { padding: 7px 10px 9px; font-size: 13px; line-height: 1.35; }
.videos em { font-style: normal; color: var(--faint); float: right; }
.videos figcaption::after { content: ""; display: block; clear: both; }
.videos .success em { color: var(--good); } .videos .failure em { color: var(--bad); }
.videos span { display: block; color: var(--soft); clear: both; }
.curves { display: grid; grid-template-columns: repeat(6, 1fr); gap: 22px 20px; }
.curves figure { grid-column: span 2; min-width: 0; } .curves figure.wide { grid-column: span 3; }
.curves figcaption { font-weight: 600; font-size: 13px; margin-bottom: 4px; }
.curves svg { display: block; width: 100%; height: auto; font-family: inherit; }
.curves svg text { font-family: inherit !important; }
.stack { display: flex; height: 22px; border-radius: 5px; overflow: hidden; margin-bottom: 12px; }
.dot { display: inline-block; width: 10px; height: 10px; border-radius: 3px; margin-right: 8px; }
details { border-top: 1px solid var(--line); padding: 9px 0; }
details:first-of-type { border-top: 0; }
summary { cursor: pointer; font-weight: 500; }
pre { background: var(--ground); border-radius: 8px; padding: 14px; overflow-x: auto; font-size: 12.5px;
  line-height: 1.45; }
code { font-size: 13px; overflow-wrap: anywhere; }
@media (max-width: 820px) {
  .curves figure, .curves figure.wide { grid-column: span 6; }
  main { padding: 18px 12px 40px; } section { padding: 16px 14px; }
}
@media (max-width: 560px) {
  .videos { grid-template-columns: 1fr 1fr; gap: 8px; } .videos em { float: none; display: block; }
  .cards { grid-template-columns: 1fr 1fr; } .card b { font-size: 17px; }
}
"""
