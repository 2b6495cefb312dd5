"""Evaluations as files: where `embodied-rl evaluate` keeps what it has measured, and how it is read again."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from itertools import count
from pathlib import Path

from embodied_rl.config import load_resolved
from embodied_rl.errors import NotFoundError, RunFolderError
from embodied_rl.recipe import HELDOUT, Recipe
from embodied_rl.results import EvaluationResult

FOLDER = "evaluations"
"""Folder of a run for what is measured by hand; `evaluation.json` stays what the run itself came to."""


def run_of(checkpoint: Path) -> tuple[Path, Recipe]:
    """Folder and recipe of the run that a checkpoint lies in.

    Raises:
        NotFoundError: It lies in none.
    """
    for folder in checkpoint.resolve().parents:
        if (folder / "recipe.yaml").is_file():
            return folder, load_resolved(folder / "recipe.yaml").recipe
    raise NotFoundError(
        f"checkpoint {checkpoint} lies outside a run folder: no recipe.yaml above it; put it into its run"
    )


def check_out(out: Path, checkpoint: Path) -> None:
    """Refuse a file that could not be written or read again, before minutes are spent on what it should hold.

    Args:
        out: Of the suite `heldout`; the other suites' lie beside it.
        checkpoint: That is going to be evaluated.

    Raises:
        RunFolderError: Says what is wrong with it.
    """
    if out.suffix != ".json":
        raise RunFolderError(f"--out {out}: expected a name that ends in .json, by which a stored evaluation is known")
    if not os.path.isdir(out.parent):
        raise RunFolderError(f"--out {out}: there is no folder {out.parent}: make it, or name another file")
    for suite in (HELDOUT, *(run_of(checkpoint)[1].evaluate.suites or {})):
        file = _beside(out, suite)
        try:
            file.touch(exist_ok=False)
            file.unlink()
        except FileExistsError:
            raise RunFolderError(f"--out {out}: {file} exists already: name another file, or delete it") from None
        except OSError as error:
            raise RunFolderError(f"--out {out}: cannot be written ({error.strerror}): name another file") from None


def store(results: Mapping[str, EvaluationResult], checkpoint: Path, out: Path | None = None) -> list[Path]:
    """Write what an evaluation came to, with its manifest, a file for each suite.

    Args:
        results: Suite -> evaluation.
        checkpoint: That was evaluated.
        out: See `check_out`; None takes a new file in the run's `evaluations/`, named after the checkpoint.

    Returns:
        files: That were written, for example runs/a/evaluations/update_000040.json; the second is update_000040-2.json.

    Raises:
        RunFolderError: They cannot be written.
    """
    if out is None:
        folder = run_of(checkpoint)[0] / FOLDER
        names = (f"{checkpoint.name}{'' if n == 1 else f'-{n}'}.json" for n in count(1))
        out = next(f for name in names if not (f := folder / name).exists())
    else:
        folder = out.parent
    files = {suite: _beside(out, suite) for suite in results}
    try:
        folder.mkdir(exist_ok=True)
        for suite, file in files.items():
            results[suite].save(file)
    except OSError as error:
        cause = error.__cause__ if isinstance(error, RunFolderError) else error
        why = getattr(cause, "strerror", cause)
        raise RunFolderError(f"{out}: cannot be written ({why}): name another file with --out") from None
    return list(files.values())


def stored_results(targets: Sequence[str | Path]) -> list[dict[str, EvaluationResult]]:
    """Read evaluations that have been made before, as `evaluate_targets` returns them.

    Args:
        targets: Files such as `runs/a/evaluation.json`.

    Raises:
        UserError: See `EvaluationResult.load`.
    """
    return [{HELDOUT: EvaluationResult.load(Path(target))} for target in targets]


def _beside(out: Path, suite: str) -> Path:
    """Example: b.json for `heldout`, b.training_sentences.json for the suite of that name."""
    return out if suite == HELDOUT else out.with_name(f"{out.stem}.{suite}.json")
