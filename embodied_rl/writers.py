"""Where metrics go: a JSON-lines file always; TensorBoard, Weights & Biases and the terminal as wished.

Every writer takes one row per update, `name -> value`, with `progress/update` and `progress/env_steps` in it.
"""

from __future__ import annotations

import contextlib
import io
import json
import math
import os
import secrets
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, Protocol

import torch

from embodied_rl.console import ConsoleWriter
from embodied_rl.errors import MissingExtraError, RunFolderError
from embodied_rl.metrics import check_keys
from embodied_rl.recipe import Recipe
from embodied_rl.runfolder import RunFolder, explained, write_text_atomic

Row = Mapping[str, float]


class Writer(Protocol):
    """One destination."""

    def write(self, row: Row) -> None:
        """Take the metrics of one update."""
        ...

    def flush(self) -> None:
        """Bring everything taken so far to the disk: called before a checkpoint."""
        ...

    def close(self) -> None:
        """Flush and end; may be called twice."""
        ...


class Writers:
    """Several destinations as one."""

    def __init__(self, writers: Sequence[Writer], *, check: bool = False) -> None:
        """Fan out to `writers`; with `check` a key without a row in METRICS is refused (KeyError)."""
        self.writers = list(writers)
        self.check = check

    def write(self, row: Row) -> None:
        """Give one row to every writer, with `progress/non_finite_metrics` added."""
        bad = sum(not math.isfinite(v) for v in row.values())
        row = {**row, "progress/non_finite_metrics": bad}
        if self.check:
            check_keys(row)
        for writer in self.writers:
            writer.write(row)

    def flush(self) -> None:
        """Flush every writer."""
        for writer in self.writers:
            writer.flush()

    def close(self) -> None:
        """Close every writer, also when one of them fails."""
        with contextlib.ExitStack() as stack:
            for writer in self.writers:
                stack.callback(writer.close)


class JsonlWriter:
    """Appends one JSON object per update to a file; NaN and infinity become null (JSON has neither)."""

    def __init__(self, path: Path) -> None:
        """Open for appending.

        Raises:
            RunFolderError: The file cannot be opened.
        """
        self.path = path
        with explained(path, "open it for writing"):
            self._file = self._opened()

    def write(self, row: Row) -> None:
        """Append one line and hand it to the operating system, so that a kill of the process loses nothing."""
        line = json.dumps({k: v if math.isfinite(v) else None for k, v in row.items()}, allow_nan=False)
        rest = memoryview((line + "\n").encode())
        with explained(self.path, "write it"):
            while rest:
                rest = rest[self._file.write(rest) :]

    def flush(self) -> None:
        """Force the lines onto the disk."""
        with explained(self.path, "write it"):
            os.fsync(self._file.fileno())

    def truncate_after(self, update: int) -> None:
        """Drop the rows of updates later than `update`, and a last line that a kill cut short, in one step.

        Args:
            update: Finished updates of the checkpoint from which the run goes on; 0 drops every row.
        """
        self._file.close()
        rows = [r for r in read_rows(self.path) if r.get("progress/update", math.inf) <= update]
        write_text_atomic(self.path, "".join(json.dumps(r, allow_nan=False) + "\n" for r in rows))
        with explained(self.path, "open it for writing"):
            self._file = self._opened()

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _opened(self) -> io.FileIO:
        # Unbuffered: what could not be written to a full disk must not come up again when the file is closed.
        return io.FileIO(self.path, "a")


class TensorBoardWriter:
    """Writes scalars over `progress/env_steps` as TensorBoard events."""

    def __init__(self, folder: Path, *, resume_step: int | None = None) -> None:
        """Open an events file.

        Args:
            folder: Where events go; created when missing.
            resume_step: `progress/env_steps` from which the run goes on; later points of earlier files are hidden.

        Raises:
            MissingExtraError: The package tensorboard is not installed.
        """
        try:
            from torch.utils.tensorboard import SummaryWriter
        except ImportError:
            raise _missing("tensorboard", "log.tensorboard=false") from None
        self.folder = folder
        purge = None if resume_step is None else resume_step + 1
        with explained(folder, "write TensorBoard events"):
            self._writer: Any = SummaryWriter(str(folder), purge_step=purge)

    def write(self, row: Row) -> None:
        """Add every value as a scalar."""
        step = int(row["progress/env_steps"])
        with explained(self.folder, "write TensorBoard events"):
            for name, value in row.items():
                self._writer.add_scalar(name, value, step)

    def flush(self) -> None:
        """Write what is queued."""
        with explained(self.folder, "write TensorBoard events"):
            self._writer.flush()

    def close(self) -> None:
        """Close the events file."""
        self._writer.close()


class WandbWriter:
    """Sends rows to Weights & Biases, or with `offline` keeps them in the run folder for `wandb sync`."""

    def __init__(
        self, folder: Path, *, mode: Literal["online", "offline"], project: str, name: str, config: dict[str, Any]
    ) -> None:
        """Start a wandb run, or go on with the one that this run folder had before.

        Args:
            folder: The run folder; wandb writes into `wandb/` there.
            mode: online or offline.
            project: wandb project.
            name: Shown name.
            config: The recipe as plain data.

        Raises:
            MissingExtraError: The package wandb is not installed.
            RunFolderError: wandb cannot start (not logged in, no network).
        """
        try:
            import wandb
        except ImportError:
            raise _missing("wandb", "log.wandb=off") from None
        id_file = folder / "wandb_id"
        if not id_file.exists():
            write_text_atomic(id_file, secrets.token_hex(4))
        try:
            self._run: Any = wandb.init(
                dir=str(folder), mode=mode, project=project, name=name, id=id_file.read_text().strip(), config=config,
                resume="allow" if mode == "online" else None, settings=wandb.Settings(silent=True, console="off"),
            )  # fmt: skip
        except (wandb.errors.Error, OSError) as error:
            raise RunFolderError(
                f"log.wandb {mode}: wandb cannot start ({error}); log in with `wandb login`, or set log.wandb=offline"
            ) from error
        # Rows that are logged again after a resume have smaller steps, which wandb would drop if it counted itself.
        self._run.define_metric("*", step_metric="progress/env_steps")

    def write(self, row: Row) -> None:
        """Log one row."""
        self._run.log(dict(row))

    def flush(self) -> None:
        """Nothing to do: wandb's own process keeps what it was given."""

    def close(self) -> None:
        """Finish the wandb run."""
        self._run.finish()


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a metrics.jsonl, in order; a last line that a kill cut short is left out.

    Raises:
        RunFolderError: A line before the last is not a JSON object (somebody edited the file).
    """
    if not path.exists():
        return []
    rows: list[dict[str, Any]] = []
    lines = path.read_text(encoding="utf-8").split("\n")
    for number, line in enumerate(lines, 1):
        try:
            row = json.loads(line) if line else {}
        except ValueError:
            row = None
        if isinstance(row, dict):
            rows += [row] if row else []
        elif number < len(lines):
            raise RunFolderError(f"{path}:{number}: not a JSON object; remove that line")
    return rows


def open_writers(
    folder: RunFolder, recipe: Recipe, *, device: torch.device, total_steps: int | None = None, update: int = 0
) -> Writers:
    """Open every destination the recipe asks for.

    Args:
        folder: The run's.
        recipe: Its `log` section chooses.
        device: Said in the first line on the terminal.
        total_steps: Control steps that the whole training takes; None for the recipe's.
        update: Finished updates of the checkpoint from which the run goes on; rows of later updates are dropped.

    Returns:
        writers: Close them at the end.

    Raises:
        MissingExtraError: A destination needs a package that is not installed; says which extra brings it.
        RunFolderError: A file cannot be written.
    """
    log = recipe.log
    with contextlib.ExitStack() as stack:
        jsonl = JsonlWriter(folder.metrics)
        stack.callback(jsonl.close)
        jsonl.truncate_after(update)
        last = (read_rows(folder.metrics) or [{}])[-1]
        steps = int(last.get("progress/env_steps", 0))
        writers: list[Writer] = [jsonl]
        if log.tensorboard:
            writers.append(TensorBoardWriter(folder.path / "tensorboard", resume_step=steps if update else None))
            stack.callback(writers[-1].close)
        if log.wandb != "off":
            writers.append(
                WandbWriter(
                    folder.path, mode=log.wandb, project=log.wandb_project, name=recipe.name, config=recipe.dump()
                )
            )
            stack.callback(writers[-1].close)
        total = total_steps or recipe.train.env_steps
        writers.append(
            ConsoleWriter(
                recipe.name, total, device=device, live=log.progress, first_step=steps, row=last,
                max_seconds=recipe.train.max_seconds,
            )
        )  # fmt: skip
        stack.pop_all()
    return Writers(writers)


def _missing(package: str, way_out: str) -> MissingExtraError:
    return MissingExtraError(
        f"log.{package} needs the package '{package}', which is not installed; "
        f"run: pip install 'embodied-rl[{package}]', or set {way_out}"
    )
