"""Training on the terminal: live progress where there is one, plain lines where there is not, and the closing table."""

from __future__ import annotations

import time
from collections.abc import Mapping

import torch
from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table
from rich.text import Text

from embodied_rl.recipe import HELDOUT
from embodied_rl.runfolder import Difference, Rate, Result, Summary

Row = Mapping[str, float]

_SPARKS = "▁▂▃▄▅▆▇█"
_HISTORY = 40
LONGEST_SILENCE_S = 30.0
"""Slow updates are told one by one."""


class ConsoleWriter:
    """Shows the key numbers of each update."""

    def __init__(
        self,
        name: str,
        total_steps: int,
        *,
        device: torch.device,
        live: bool = True,
        every: int = 10,
        first_step: int = 0,
        row: Row | None = None,
        max_seconds: float | None = None,
        console: Console | None = None,
    ) -> None:
        """Print the first line (run, device, threads) and start the display.

        Args:
            name: Of the run.
            total_steps: Control steps at which training ends.
            device: Where the run computes.
            live: Redraw in place when the output is a terminal; otherwise print one line per `every` updates.
            every: Updates between plain lines.
            first_step: Control steps done before, when the run goes on.
            row: The last row before, when the run goes on.
            max_seconds: Wall time of the whole run after which it ends; None for no limit.
            console: Where to print; standard output when None.
        """
        self.console = console or Console()
        self.every = every
        self._seen: dict[str, float] = dict(row or {})
        self._eval_update: int | None = None
        self._success: list[float] = []
        self._told = time.monotonic()
        threads = torch.get_num_threads()
        cpu = f"{threads} thread{'s' * (threads > 1)}"
        where = f"{torch.cuda.get_device_name(device)}, {cpu}" if device.type == "cuda" else cpu
        start = f", going on at step {first_step:,}" if first_step else ""
        self.say(f"{name}: device {device} ({where}), torch {torch.__version__}{start}")
        self._progress = Progress(
            TextColumn("{task.completed:,.0f} / {task.total:,.0f} steps"), BarColumn(None),
            TextColumn("{task.percentage:.0f} %"), TimeElapsedColumn(), TextColumn("{task.fields[left]}"),
            console=self.console, expand=True,
        )  # fmt: skip
        self._task = self._progress.add_task("", total=total_steps, completed=first_step, left="")
        self._total, self._first, self._started = total_steps, first_step, time.monotonic()
        self._max_seconds = max_seconds
        self._live: Live | None = None
        if live and self.console.is_terminal and not self.console.is_dumb_terminal:
            self._live = Live(self._view(), console=self.console, refresh_per_second=4)
            self._live.start()

    def say(self, text: str) -> None:
        """Print a line above the live display."""
        self.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def write(self, row: Row) -> None:
        """Show one update."""
        self._seen.update(row)
        if "rollout/success_once_rate" in row:
            self._success = [*self._success, row["rollout/success_once_rate"]][-_HISTORY:]
        update = int(row["progress/update"])
        evaluated = any(k.startswith("eval/") for k in row)
        if evaluated:
            self._eval_update = update
        if self._live is not None:
            self._progress.update(
                self._task, completed=min(row["progress/env_steps"], self._total), left=self._left(row)
            )
            self._live.update(self._view())
        elif evaluated or update == 1 or update % self.every == 0 or time.monotonic() - self._told > LONGEST_SILENCE_S:
            self._told = time.monotonic()
            self.say(self._plain(row))

    def flush(self) -> None:
        """Nothing to do."""

    def close(self) -> None:
        """Leave the last state of the display on the screen."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def _view(self) -> RenderableType:
        table = Table.grid(padding=(0, 2))
        table.add_column(style="bold")
        table.add_column()
        for label, text in key_numbers(self._seen, self._success, self._eval_update):
            table.add_row(label, Text(text))  # Text: names may hold square brackets, which are markup
        return Group(self._progress, table)

    def _plain(self, row: Row) -> str:
        steps = row["progress/env_steps"]
        parts = [f"update {int(row['progress/update'])}", f"{int(steps):,} steps ({100 * steps / self._total:.0f} %)"]
        parts += [
            f"{label} {value}"
            for label, value in (
                ("success", _number(row, "rollout/success_once_rate")),
                ("eval", _evaluation(row)),
                ("return", _number(row, "rollout/return_mean")),
                ("imitation loss", _number(row, "actor/imitation_loss")),
                ("entropy", _number(row, "actor/entropy")),
                ("kl", _number(row, "actor/kl_k3")),
                ("explained", _number(row, "critic/explained_variance")),
            )
            if value
        ]
        if "perf/env_steps_per_s" in row:
            parts.append(f"{row['perf/env_steps_per_s']:,.0f} steps/s")
        return " · ".join([*parts, *filter(None, [self._left(row)])])

    def _left(self, row: Row) -> str:
        """Time until the steps or the seconds of the run are used up, whichever is first; empty when not known yet."""
        steps = row["progress/env_steps"]
        if steps <= self._first:
            return ""
        left = (time.monotonic() - self._started) * max(0.0, self._total - steps) / (steps - self._first)
        if self._max_seconds is not None and "time/total_s" in row:
            left = min(left, max(0.0, self._max_seconds - row["time/total_s"]))
        return f"left {int(left) // 60}:{int(left) % 60:02d}"


def key_numbers(row: Row, success: list[float], eval_update: int | None) -> list[tuple[str, str]]:
    """The lines of the live display; a line of which nothing was measured is left out.

    Args:
        row: Latest value of every metric.
        success: Success rates of the last rollouts, drawn as a small curve.
        eval_update: Update of the last evaluation; None before the first.

    Returns:
        lines: (label, text), at most eight.
    """
    tasks = {k.rpartition("/")[2]: v for k, v in row.items() if k.startswith("rollout/success_once_rate/")}
    evaluation = _evaluation(row)
    seconds = {k[5:-2]: v for k, v in row.items() if k.startswith("time/") and k != "time/total_s"}
    whole = sum(seconds.values())
    lines = [
        ("success", _join(("", _number(row, "rollout/success_once_rate")), ("", _spark(success)))),
        ("by task", " · ".join(f"{name} {value:.2f}" for name, value in tasks.items())),
        ("evaluation", f"{evaluation} at update {eval_update}" if evaluation and eval_update else evaluation),
        ("return", _join(
            ("", _number(row, "rollout/return_mean")), ("±", _number(row, "rollout/return_std")),
            ("length", _number(row, "rollout/length_mean")), ("episodes", f"{int(row.get('progress/episodes', 0)):,}"),
        )),
        ("policy", _join(
            ("imitation loss", _number(row, "actor/imitation_loss")),
            ("entropy", _number(row, "actor/entropy")), ("KL", _number(row, "actor/kl_k3")),
            ("clipped", _number(row, "actor/clip_fraction")), ("gradient", _number(row, "actor/grad_norm")),
            ("lr", _number(row, "actor/lr")),
        )),
        ("critic", _join(
            ("loss", _number(row, "critic/loss")), ("explained variance", _number(row, "critic/explained_variance")),
        )),
        ("speed", _join(
            ("", f"{row['perf/env_steps_per_s']:,.0f} steps/s" if "perf/env_steps_per_s" in row else ""),
            *((name, f"{100 * s / whole:.0f} %") for name, s in seconds.items() if whole and s / whole >= 0.01),
        )),
        ("skipped", f"{row['actor/skipped_updates']:.0f} non-finite steps" if row.get("actor/skipped_updates") else ""),
    ]  # fmt: skip
    return [(label, text) for label, text in lines if text] if "progress/update" in row else []


def stop_sentence(summary: Summary) -> str:
    """Why a run ended, in words, and where it would go on."""
    reason, saved = summary["stop_reason"], summary.get("saved_update")
    after = "" if saved is None else f" after update {saved}"
    resume = "nothing was saved yet, so --resume begins anew" if saved == 0 else f"go on{after} with --resume"
    weights = "nothing was saved yet" if saved == 0 else f"the last good checkpoint{after} is kept"
    sentences = {
        "finished": f"Trained for all of its {summary['env_steps']:,} control steps.",
        "target": "Ended early: an evaluation reached train.target_success.",
        "time": "Ended early: train.max_seconds was reached.",
        "diverged": f"Stopped: numbers were not finite; {weights}.",
        "simulator": f"Stopped: its simulator failed again and again; {resume}.",
        "error": f"Stopped by an error; {resume} once it is mended: {summary.get('error')}",
        "SIGINT": f"Stopped by an interrupt; {resume}.",
        "SIGTERM": f"Stopped by a termination signal; {resume}.",
    }
    return sentences.get(reason, f"Ended: {reason}.")


def summary_table(summary: Summary) -> Table:
    """The closing table: success with 95 % intervals, what changed since `start_from`, suites beside `heldout`."""
    notes = []
    for suite, found in summary["evaluation"].items():
        if change := found.get("since_start", {}).get("all"):
            notes.append(f"{suite}: before training {change['before']:.3f}, {_paired(change)}")
        if gap := found.get("against_heldout", {}).get("all"):
            notes.append(f"{suite} minus {HELDOUT}: {_paired(gap)}")
    caption = Text("\n".join(notes)) if notes else None
    title = Text(f"{summary['name']}: {stop_sentence(summary)}")
    table = Table(title=title, title_justify="left", caption=caption, caption_justify="left")
    for column in ("suite", "task"):
        table.add_column(column)
    for column in ("success", "95 % interval", "at the end", "return", "length", "episodes"):
        table.add_column(column, justify="right")
    for suite, result in summary["evaluation"].items():
        rows = [*result["tasks"].items(), ("all", result["overall"])]
        for task, r in rows:
            last = task == "all"
            table.add_row(Text(suite), Text(task), *_cells(r), style="bold" if last else None, end_section=last)
    return table


def _paired(d: Difference) -> str:
    return f"paired difference {d['difference']:+.3f} ({d['low95']:+.3f} to {d['high95']:+.3f})"


def _cells(r: Result) -> tuple[str, ...]:
    once, end = r.get("success_once"), r.get("success_at_end")
    return (
        f"{once['rate']:.3f}" if once else "–",
        interval(once) if once else "–",
        f"{end['rate']:.3f}" if end else "–",
        f"{r['return_mean']:.2f}",
        f"{r['length_mean']:.1f}",
        str(r["episodes"]),
    )


def interval(rate: Rate) -> str:
    """The 95 % interval of a success rate as text: 0.907–0.962."""
    return f"{rate['low95']:.3f}–{rate['high95']:.3f}"


def _evaluation(row: Row) -> str:
    """Success of the last evaluation with its interval, one entry per suite; "" before the first."""
    texts = []
    for key, value in row.items():
        group, _, rest = key.partition("/")
        suite, _, name = rest.partition("/")
        if group == "eval" and name == "success_rate":
            low, high = row.get(f"eval/{suite}/success_low95"), row.get(f"eval/{suite}/success_high95")
            bounds = f" [{low:.2f}, {high:.2f}]" if low is not None and high is not None else ""
            texts.append(f"{suite} {value:.2f}{bounds}")
        elif group == "eval" and name == "return_mean" and f"eval/{suite}/success_rate" not in row:
            texts.append(f"{suite} return {value:.4g}")
    return " ".join(texts)


def _number(row: Row, key: str) -> str:
    return f"{row[key]:.3g}" if key in row and row[key] is not None else ""


def _join(*parts: tuple[str, str]) -> str:
    return "  ".join(f"{label} {text}".strip() for label, text in parts if text)


def _spark(values: list[float]) -> str:
    return "".join(_SPARKS[min(7, int(8 * min(max(v, 0.0), 1.0)))] for v in values) if len(values) > 1 else ""
