"""Sections of the report that show what evaluations came to: tables with intervals, before and after, films."""

from __future__ import annotations

import base64
import os.path
from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import Any

from embodied_rl import manifest
from embodied_rl.errors import RunFolderError
from embodied_rl.recipe import HELDOUT
from embodied_rl.runfolder import Change, Difference, Rate, Result, SuiteResult, Summary
from embodied_rl.video import PAIRS

LONGEST_SAMPLE = 1500
"""Characters of a transcript in the page; evaluation.json has all of them."""
VIDEO_BUDGET = 9_000_000
"""Bytes of video put into the page (a third more in base64); the other files stay in videos/."""


def results(summary: Summary | None, rows: Sequence[dict[str, Any]]) -> str:
    """The final evaluation, suite by suite and task by task; a sentence where there is none.

    Args:
        summary: None before the run has ended.
        rows: `metrics.jsonl`.
    """
    if summary is None or not summary["evaluation"]:
        text = "There is no final evaluation yet." if summary is None else "There was no final evaluation."
        evaluated = [r for r in rows if any(k.startswith("eval/") for k in r)]
        if evaluated:
            update = int(evaluated[-1]["progress/update"])
            text += f" Its last evaluation during training was at update {update}; see the curves."
        return f"<section><h2>Result</h2><p>{escape(text)}</p></section>"
    tables = [f"<h3>{spoken(suite)}</h3>{_result_table(suite, r)}" for suite, r in summary["evaluation"].items()]
    note = (
        "Success means that the goal held at some step; “at the end” that it held in the last state. "
        "Bars show the rate, whiskers its 95 % interval (Wilson). Evaluation starts are never used in training."
    )
    if any("against_heldout" in r for r in summary["evaluation"].values()):
        note += (
            f" Every suite plays the same starts; the others than {HELDOUT} with some settings of the env changed "
            f"(evaluate.suites in the recipe). “minus {HELDOUT}” is the paired difference (Newcombe)."
        )
    return f"<section><h2>Result</h2>{''.join(tables)}<p class=note>{note}</p></section>"


def spoken(suite: str) -> str:
    """A suite's name as text of the page."""
    return escape(suite.replace("_", " "))


def _result_table(suite: str, result: SuiteResult) -> str:
    has_success, against = "success_once" in result["overall"], result.get("against_heldout")
    success = ("success", "rate, 95 % interval", "at the end") if has_success else ()
    more = (f"minus {HELDOUT}",) if against else ()
    names = [*result["tasks"], "all" if result["tasks"] else suite]
    lines = []
    for name, r in zip(names, [*result["tasks"].values(), result["overall"]], strict=True):
        total = r is result["overall"]
        difference = against[("all" if total else name)] if against else None
        lines.append(_result_row(name, r, has_success, difference, "total" if total and result["tasks"] else ""))
    head = _head("task", *success, *more, "return", "length", "episodes")
    kind = "results rates" if has_success else "results"
    return f"<div class=scroll><table class='{kind}'>{head}{''.join(lines)}</table></div>"


def _result_row(task: str, r: Result, has_success: bool, against: Difference | None, kind: str) -> str:
    cells = [f"<th scope=row>{escape(task)}</th>"]
    if has_success:
        once, end = r.get("success_once"), r.get("success_at_end")
        rate = f"<td>{_bar(once)}</td><td><b>{once['rate']:.3f}</b> {_interval(once)}</td>" if once else ""
        cells.append(rate or "<td>–</td><td>–</td>")
        cells.append(f"<td>{end['rate']:.3f}</td>" if end else "<td>–</td>")
    if against:
        cells.append(f"<td>{_signed(against)}</td>")
    cells.append(f"<td>{r['return_mean']:.2f}</td><td>{r['length_mean']:.1f}</td><td>{r['episodes']}</td>")
    return f"<tr class='{kind}'>{''.join(cells)}</tr>"


def changes(summary: Summary | None) -> str:
    """What training changed since the policy it started from, suite by suite; nothing where it started from none."""
    evaluation = summary["evaluation"] if summary else {}
    tables = [f"<h3>{spoken(suite)}</h3>{_change_table(r)}" for suite, r in evaluation.items() if "since_start" in r]
    if not tables:
        return ""
    note = (
        "The upper bar is the policy that training started from, the lower one the trained policy. Both played the "
        "same starts: the difference is paired (Newcombe), p is McNemar's exact test."
    )
    return f"<section><h2>Before and after</h2>{''.join(tables)}<p class=note>{note}</p></section>"


def _change_table(result: SuiteResult) -> str:
    start = result.get("start")
    lines = []
    for name, change in result["since_start"].items():
        after = result["overall"] if name == "all" else result["tasks"][name]
        before = None if start is None else start["overall"] if name == "all" else start["tasks"][name]
        kind = "total" if name == "all" and len(result["since_start"]) > 1 else ""
        lines.append(_change_row(name, change, before and before.get("success_once"), after.get("success_once"), kind))
    head = _head("task", "success", "before", "after", "difference, 95 %", "p", "episodes")
    return f"<div class=scroll><table class='results rates'>{head}{''.join(lines)}</table></div>"


def _change_row(name: str, c: Change, before: Rate | None, after: Rate | None, kind: str) -> str:
    bars = "".join(_bar(rate, look) for rate, look in ((before, "old"), (after, "")) if rate)
    old, new = (_interval(rate) if rate else "" for rate in (before, after))
    return (
        f"<tr class='{kind}'><th scope=row>{escape(name)}</th><td class=two>{bars}</td><td>{c['before']:.3f} {old}</td>"
        f"<td><b>{c['after']:.3f}</b> {new}</td><td>{_signed(c)}</td><td>{c['p']:.2g}</td><td>{c['episodes']}</td></tr>"
    )


def _head(*names: str) -> str:
    return f"<tr>{''.join(f'<th>{escape(name)}</th>' for name in names)}</tr>"


def _signed(d: Difference | Change) -> str:
    return f"{d['difference']:+.3f} <small>{d['low95']:+.3f} to {d['high95']:+.3f}</small>"


def _bar(rate: Rate, look: str = "") -> str:
    low, high = 100 * rate["low95"], 100 * rate["high95"]
    return (
        f"<div class='bar {look}' role=img aria-label='{rate['successes']} of {rate['episodes']}'>"
        f"<i style='width:{100 * rate['rate']:.2f}%'></i><u style='left:{low:.2f}%;width:{high - low:.2f}%'></u></div>"
    )


def _interval(rate: Rate) -> str:
    return f"<small>{rate['low95']:.3f}–{rate['high95']:.3f}</small>"


def percent_interval(rate: Rate) -> str:
    """The 95 % interval of a success rate in percent: 90.7–96.2."""
    return f"{100 * rate['low95']:.1f}–{100 * rate['high95']:.1f}"


def made_with(evaluation: dict[str, Any], path: Path) -> str:
    """The manifest of an evaluation: simulator, protocol, starts, and checksums of the first frames.

    Args:
        evaluation: `evaluation.json`.
        path: Its path, for messages.

    Raises:
        RunFolderError: The manifest is damaged.
    """
    try:
        found = manifest.read(evaluation.get("manifest"))
    except ValueError as error:
        raise RunFolderError(f"{path}: {error}; evaluate the run again") from None
    if found is None:
        return "<p>The evaluation has no manifest: it is older than manifests.</p>"
    rows = "".join(f"<tr><th scope=row>{escape(k)}</th><td>{escape(v)}</td></tr>" for k, v in manifest.lines(found))
    return f"<details><summary>What was evaluated</summary><table>{rows}</table></details>"


def samples(before: dict[str, Any] | None, after: dict[str, Any] | None) -> str:
    """Episodes in words, before and after training side by side; nothing where the env tells none.

    Args:
        before: `evaluation_start.json`; None when there is none.
        after: `evaluation.json`.
    """
    whens = {"before": before, "after": after}
    given = {when: enumerate(d.get("episodes", ())) for when, d in whens.items() if d}
    told = {when: {i: e for i, e in episodes if "transcript" in e} for when, episodes in given.items()}
    told = {when: episodes for when, episodes in told.items() if episodes}
    if not told:
        return ""
    rows = []
    for number in sorted(set().union(*told.values())):
        here = {when: episodes[number] for when, episodes in told.items() if number in episodes}
        lines = {when: e["transcript"].split("\n") for when, e in here.items()}
        # What both begin with is the question; one alone, or two that are equal, begin with their first line.
        different = {tuple(x) for x in lines.values()}
        shared = len(os.path.commonprefix(list(different))) if len(different) > 1 else 1
        first = next(iter(here.values()))
        cells = [f"<th scope=row>{escape(first['task'])}</th>", _words(lines[next(iter(lines))][:shared])]
        cells += [_words(lines[w][shared:], _spoken_outcome(here[w])) if w in here else "<td>–</td>" for w in told]
        rows.append(f"<tr>{''.join(cells)}</tr>")
    title = "Samples before and after training" if len(told) > 1 else f"Samples {next(iter(told))} training"
    head = _head("task", "start", *told)
    table = f"<div class=scroll><table class='results words'>{head}{''.join(rows)}</table></div>"
    note = "<p class=note>The evaluation's first episodes, not chosen ones; the edge tells success from failure.</p>"
    return f"<section><h2>{title}</h2>{table}{note}</section>"


def _spoken_outcome(episode: dict[str, Any]) -> str:
    return "" if episode.get("invalid") else _outcome({"success": episode.get("success_once")})


def _words(lines: Sequence[str], kind: str = "") -> str:
    text = "\n".join(lines)
    short = text if len(text) <= LONGEST_SAMPLE else text[:LONGEST_SAMPLE] + " …"
    return f"<td class='{kind}'>{escape(short)}</td>"


def films(pairs: dict[str, Any] | None, clips: dict[str, Any] | None, folder: Path) -> str:
    """The films of a run: before and after side by side where both were filmed, else the trained policy alone.

    Args:
        pairs: Index of `videos/pairs`; None when there is none.
        clips: Index of `videos`.
        folder: The run's `videos`.
    """
    if pairs:
        # Stable: task by task in the order of their first episode.
        order = list(dict.fromkeys(pair["task"] for pair in pairs["pairs"]))
        chosen = sorted(pairs["pairs"], key=lambda pair: order.index(pair["task"]))
        title, kind = "Episodes before and after training", "pairs"
        shown, more = _players([(folder / PAIRS / p["file"], "pair", _pair_caption(p)) for p in chosen])
        note = "Left before training, right after it, from the same start. These are the evaluation's first episodes."
    elif clips:
        title, kind, note = "Episodes after training", "", ""
        shown, more = _players([(folder / c["file"], _outcome(c), _caption(c)) for c in clips["clips"]])
    else:
        return ""
    notes = "".join(f"<p class=note>{text}</p>" for text in (note, more) if text)
    return f"<section><h2>{title}</h2><div class='videos {kind}'>{shown}</div>{notes}</section>"


def _players(videos: Sequence[tuple[Path, str, str]]) -> tuple[str, str]:
    """A figure for each (file, class, caption) within the budget, and a sentence for those left out."""
    figures, spent, left_out = [], 0, 0
    for path, kind, caption in videos:
        if not path.is_file() or spent + path.stat().st_size > VIDEO_BUDGET:
            left_out += 1
            continue
        spent += path.stat().st_size
        data = base64.b64encode(path.read_bytes()).decode()
        figures.append(
            f"<figure class='{kind}'><video autoplay loop muted playsinline src='data:video/mp4;base64,{data}'></video>"
            f"{caption}</figure>"
        )
    return "".join(figures), f"{left_out} more in the folder videos/." if left_out else ""


def _outcome(clip: dict[str, Any]) -> str:
    return {True: "success", False: "failure", None: ""}[clip["success"]]


def _facts(clip: dict[str, Any]) -> str:
    facts = [_outcome(clip), f"{clip['length']} steps" if clip.get("length") is not None else ""]
    return " · ".join(filter(None, facts))


def _hint(clip: dict[str, Any]) -> str:
    return f"return {clip['return']:.3g}" if clip.get("return") is not None else ""


def _caption(clip: dict[str, Any]) -> str:
    return (
        f"<figcaption title='{_hint(clip)}'><b>{escape(clip['task'])}</b><em>{_facts(clip)}</em>"
        f"<span>{escape(clip['instruction'])}</span></figcaption>"
    )


def _pair_caption(pair: dict[str, Any]) -> str:
    sides = "".join(
        f"<div class='{_outcome(pair[when])}' title='{_hint(pair[when])}'>{when}: {_facts(pair[when])}</div>"
        for when in ("before", "after")
    )
    return (
        f"<div class=sides>{sides}</div>"
        f"<figcaption><b>{escape(pair['task'])}</b><span>{escape(pair['instruction'])}</span></figcaption>"
    )
