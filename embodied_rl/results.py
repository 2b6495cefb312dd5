"""What an evaluation came to: one row per episode, its summary, its metrics and its file."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from embodied_rl import manifest as manifests
from embodied_rl.errors import NotFoundError, RunFolderError
from embodied_rl.metrics import Partials
from embodied_rl.runfolder import Rate, Result, SuiteResult, write_json_atomic
from embodied_rl.stats import wilson
from embodied_rl.types import Split

FORMAT = 1


@dataclass(frozen=True)
class EvaluationResult:
    """E episodes, one row each, in the order of their numbers.

    Example: 4 episodes of tasks ("reach", "push") have task [0, 1, 0, 1]; with success_once [1, 0, 1, 1] the overall
    rate is 0.75, reach's 1.0 and push's 0.5.
    """

    tasks: tuple[str, ...]
    run_seed: int
    stream: int
    split: Split
    greedy: bool
    seedable: bool
    """False when the env ignores seeds: then the rows of two results do not belong together."""
    seed: Tensor
    """[E] int64 start seed."""
    task: Tensor
    """[E] int64 index into `tasks`."""
    returns: Tensor
    """[E] float64 undiscounted sum of rewards, task units."""
    length: Tensor
    """[E] int64 control steps."""
    success_once: Tensor | None
    """[E] bool, the goal held after some step; None when the env has no such notion."""
    success_at_end: Tensor | None
    """[E] bool, the goal held in the last state."""
    invalid: Tensor | None = None
    """[E] bool, the judge or the simulator failed: the episode is in no rate and no mean. None when none did."""
    transcripts: dict[int, str] = field(default_factory=dict)
    """Episode number -> what happened in words, of the first few, where the env tells it."""
    manifest: manifests.Manifest | None = None
    """What it was made with (see `embodied_rl.manifest`); None of an evaluation that is older than manifests."""

    @property
    def episodes(self) -> int:
        """E."""
        return len(self.seed)

    @property
    def valid(self) -> Tensor:
        """[E] bool, episodes that count."""
        return torch.ones_like(self.task, dtype=torch.bool) if self.invalid is None else ~self.invalid

    @property
    def score(self) -> float:
        """What the best checkpoint is chosen by: the success rate (once), or the mean return where there is none."""
        column = self.returns if self.success_once is None else self.success_once
        return float(column[self.valid].double().mean())

    def to_dict(self) -> SuiteResult:
        """The suite as `summary.json` holds it: overall, and per task when there are several."""
        everyone, valid = torch.ones_like(self.task, dtype=torch.bool), self.valid
        of_task = [(name, self.task == i) for i, name in enumerate(self.tasks)]
        present = [(name, rows) for name, rows in of_task if bool((rows & valid).any())]
        tasks = {name: self._result(rows) for name, rows in present} if len(self.tasks) > 1 else {}
        return {"overall": self._result(everyone), "tasks": tasks}

    def metrics(self, suite: str) -> Partials:
        """The same numbers as metrics `eval/<suite>/...`, per task with the task's name appended."""
        out, result = Partials(), self.to_dict()
        for name, r in [("", result["overall"]), *((f"/{task}", r) for task, r in result["tasks"].items())]:
            n, key = r["episodes"], f"eval/{suite}/{{}}{name}".format
            out.add(key("return_mean"), r["return_mean"] * n, n)
            out.add(key("length_mean"), r["length_mean"] * n, n)
            out.add(key("episodes"), n)
            if "invalid" in r:
                out.add(key("invalid"), r["invalid"])
            if "success_once" in r:
                out.add(key("success_rate"), r["success_once"]["successes"], n)
                out.last(key("success_low95"), r["success_once"]["low95"])
                out.last(key("success_high95"), r["success_once"]["high95"])
                out.add(key("success_at_end_rate"), r["success_at_end"]["successes"], n)
        return out

    def _result(self, chosen: Tensor) -> Result:
        rows = chosen & self.valid
        returns = self.returns[rows]
        out: Result = {
            "return_mean": float(returns.mean()),
            "return_std": float(returns.std(unbiased=False)),
            "return_median": float(np.median(returns.numpy())),
            "length_mean": float(self.length[rows].double().mean()),
            "episodes": int(rows.sum()),
        }
        if self.success_once is not None and self.success_at_end is not None:
            out["success_once"] = _rate(self.success_once[rows])
            out["success_at_end"] = _rate(self.success_at_end[rows])
        if self.invalid is not None:
            out["invalid"] = int((chosen & self.invalid).sum())
        return out

    def save(self, path: Path) -> None:
        """Write `evaluation.json`: how it was made, the summary, the manifest, and one record per episode."""
        columns: dict[str, list[Any]] = {
            "seed": self.seed.tolist(),
            "task": [self.tasks[i] for i in self.task.tolist()],
            "return": self.returns.tolist(),
            "length": self.length.tolist(),
        }
        if self.success_once is not None and self.success_at_end is not None:
            columns |= {"success_once": self.success_once.tolist(), "success_at_end": self.success_at_end.tolist()}
        if self.invalid is not None:
            columns["invalid"] = self.invalid.tolist()
        made = {k: getattr(self, k) for k in ("run_seed", "stream", "split", "greedy", "seedable")}
        records = [dict(zip(columns, row, strict=True)) for row in zip(*columns.values(), strict=True)]
        for number, text in self.transcripts.items():
            records[number]["transcript"] = text
        document = {"format": FORMAT, **made, "tasks": list(self.tasks), "summary": self.to_dict()}
        document |= {"manifest": self.manifest, "episodes": records}
        write_json_atomic(path, document)

    @classmethod
    def load(cls, path: Path) -> EvaluationResult:
        """Read what `save` wrote.

        Raises:
            NotFoundError: No such file.
            RunFolderError: It is not an evaluation of this format.
        """
        if not path.is_file():
            raise NotFoundError(f"{path}: no such evaluation; `embodied-rl evaluate RUN` makes one")
        try:
            document = json.loads(path.read_text(encoding="utf-8"))
            if document["format"] != FORMAT:
                raise ValueError(f"format {document['format']}, this version reads {FORMAT}")
            rows, tasks = document["episodes"], tuple(document["tasks"])
            told = [k for k in ("success_once", "success_at_end") if k in rows[0]]
            success = {k: torch.tensor([r[k] for r in rows], dtype=torch.bool) for k in told}
            return cls(
                tasks=tasks,
                **{k: document[k] for k in ("run_seed", "stream", "split", "greedy", "seedable")},
                seed=torch.tensor([r["seed"] for r in rows], dtype=torch.int64),
                task=torch.tensor([tasks.index(r["task"]) for r in rows], dtype=torch.int64),
                returns=torch.tensor([r["return"] for r in rows], dtype=torch.float64),
                length=torch.tensor([r["length"] for r in rows], dtype=torch.int64),
                success_once=success.get("success_once"),
                success_at_end=success.get("success_at_end"),
                invalid=torch.tensor([r["invalid"] for r in rows]) if "invalid" in rows[0] else None,
                manifest=manifests.read(document.get("manifest")),
                transcripts={i: r["transcript"] for i, r in enumerate(rows) if "transcript" in r},
            )
        except (ValueError, KeyError, TypeError, IndexError) as error:
            message = f"{path}: is not an evaluation that this version can read ({error}); make it again"
            raise RunFolderError(message) from None


def _rate(success: Tensor) -> Rate:
    k, n = int(success.sum()), len(success)
    i = wilson(k, n)
    return {"rate": i.value, "low95": i.low, "high95": i.high, "successes": k, "episodes": n}
