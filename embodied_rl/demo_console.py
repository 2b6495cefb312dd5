"""`embodied-rl collect`: progress while demonstrations are recorded, and a table of what there is."""

from __future__ import annotations

import contextlib
from pathlib import Path
from typing import Literal

from rich import box
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from rich.table import Table

from embodied_rl import host
from embodied_rl.demonstrations import Demonstrations
from embodied_rl.errors import UserError
from embodied_rl.recipe import Recipe
from embodied_rl.record_demos import Collected, collect_demonstrations
from embodied_rl.session import choose_device


def collect_and_tell(
    recipe: Recipe, folder: Path, episodes: int, *, noise: float, misses: float, show_misses: bool,
    replay: str | None, blind: bool, keep: Literal["success", "all"], console: Console,
) -> int:  # fmt: skip
    """Record demonstrations in a recipe's env and print what came of it.

    Args:
        recipe: Its env, seed, device, threads and collect.copies count.
        folder: See `collect_demonstrations`, as for the rest.
        episodes: Of the whole set.
        noise: Of the disturbance, in action units.
        misses: Share of the attempts that begin with a miss.
        show_misses: Whether the set holds the misses, too.
        replay: Demonstrations to repeat instead of asking the expert.
        blind: Whether it is guessed where things are.
        keep: Which episodes.
        console: Where to print.

    Returns:
        code: 0, or 130 when interrupted.
    """
    host.prepare(recipe.threads)
    bar = Progress(
        TextColumn("{task.completed:,.0f} / {task.total:,.0f} episodes"), BarColumn(None), TimeElapsedColumn(),
        TextColumn("left"), TimeRemainingColumn(), console=console, expand=True, disable=not console.is_terminal,
    )  # fmt: skip
    try:
        with bar:
            task = bar.add_task("", total=episodes, completed=_have(folder))
            done = collect_demonstrations(
                recipe.env, folder, episodes, noise=noise, misses=misses, show_misses=show_misses, replay=replay,
                blind=blind, keep=keep, copies=recipe.collect.copies, seed=recipe.seed,
                device=choose_device(recipe.device), on_progress=lambda n: bar.update(task, completed=n),
            )  # fmt: skip
    except KeyboardInterrupt:
        console.print(
            f"interrupted: {_have(folder):,} of {episodes:,} episodes are in {folder}; run the same command to go on",
            markup=False, highlight=False, soft_wrap=True,
        )  # fmt: skip
        return 130
    console.print(summary_table(done))
    return 0


def summary_table(done: Collected) -> Table:
    """What a set holds, and how often the expert succeeded at each task."""
    table = Table("", box=box.SIMPLE, show_header=False)
    table.add_column(justify="right")
    table.add_row("demonstrations", str(done.folder))
    table.add_row("episodes", f"{done.episodes:,}")
    table.add_row("frames", f"{done.frames:,}")
    if done.guesses is not None:
        for name, solved, tried in zip(done.tasks, done.guesses.found, done.guesses.tried, strict=True):
            table.add_row(f"guesses at {name}", f"{len(solved) / max(1, tried):.1%} ({len(solved):,} of {tried:,})")
    for name, count in done.tasks.items():
        share = f"{count.solved / count.tried:.0%}" if count.tried else "-"
        table.add_row(f"expert at {name}", f"{share} ({count.solved} of {count.tried})")
    table.add_row("on disk", f"{done.bytes / 2**20:,.1f} MiB")
    table.add_row("time", f"{done.seconds:,.1f} s")
    return table


def _have(folder: Path) -> int:
    """Episodes that are there already."""
    with contextlib.suppress(UserError):
        return Demonstrations(folder).episodes
    return 0
