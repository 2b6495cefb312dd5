"""Trained policies by name: load a run or a checkpoint, evaluate it, and compare two of them on the same starts."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from rich.table import Table
from rich.text import Text
from torch import Tensor

from embodied_rl import checkpoint, host, manifest
from embodied_rl.config import load_recipe
from embodied_rl.conformance import Side, conform
from embodied_rl.errors import CapabilityError
from embodied_rl.recipe import HELDOUT, Recipe
from embodied_rl.results import EvaluationResult
from embodied_rl.runfolder import Difference, Result, SuiteResult
from embodied_rl.saved import load_weights, stored_policy
from embodied_rl.session import build_env, build_policy, choose_device
from embodied_rl.stats import Interval, bootstrap, independent_difference, mcnemar, paired_difference, wilson
from embodied_rl.stored import run_of
from embodied_rl.suites import suites_of
from embodied_rl.types import Env, Policy

log = logging.getLogger(__name__)

Success = Literal["once", "at_end"]


@dataclass(frozen=True)
class Paired:
    """Success of two policies on the same starts.

    Example: both 250, only_a 32, only_b 8, neither 10: rates 0.940 and 0.860, difference 0.080, p = 0.0002.
    """

    both: int
    only_a: int
    only_b: int
    neither: int

    @property
    def episodes(self) -> int:
        """Starts."""
        return self.both + self.only_a + self.only_b + self.neither

    @property
    def rate_a(self) -> Interval:
        """Success rate of the first, 95 % Wilson interval."""
        return wilson(self.both + self.only_a, self.episodes)

    @property
    def rate_b(self) -> Interval:
        """Success rate of the second, 95 % Wilson interval."""
        return wilson(self.both + self.only_b, self.episodes)

    @property
    def difference(self) -> Interval:
        """rate_a - rate_b, Newcombe's paired 95 % interval."""
        return paired_difference(self.both, self.only_a, self.only_b, self.neither)

    @property
    def p(self) -> float:
        """Exact two-sided McNemar test of "equally good"."""
        return mcnemar(self.only_a, self.only_b)


@dataclass(frozen=True)
class PairedComparison:
    """Two evaluations on the same starts, first minus second."""

    overall: Paired | None
    """None when the env has no notion of success."""
    tasks: dict[str, Paired]
    """Per task; empty for an env of one task."""
    returns: Interval
    """Mean difference of the returns, 95 % bootstrap interval over the starts."""
    success: Success
    """Which success was compared."""


def compare(a: EvaluationResult, b: EvaluationResult, *, success: Success = "once") -> PairedComparison:
    """Compare two evaluations episode by episode; a start on which either could not be judged is left out.

    Args:
        a: Of the first policy.
        b: Of the second, on the same starts.
        success: once (the goal held at some step) or at_end (in the last state).

    Returns:
        comparison: Overall and per task.

    Raises:
        CapabilityError: They were made on different starts, or in an env that ignores seeds, or have no judged start in
            common.
    """
    if not (a.seedable and b.seedable):
        raise CapabilityError(
            "this env does not start the same episode again for the same seed, so its evaluations cannot be compared "
            "in pairs; compare their intervals instead"
        )
    if a.tasks != b.tasks or not torch.equal(a.seed, b.seed) or not torch.equal(a.task, b.task):
        found = [f"{r.episodes} episodes of {', '.join(r.tasks)} with seed {r.run_seed}" for r in (a, b)]
        raise CapabilityError(
            f"the two evaluations were made on different starts ({found[0]}; {found[1]}); evaluate both with the same "
            "env, seed and number of episodes, as `embodied-rl evaluate A B` does"
        )
    valid = a.valid & b.valid
    if not bool(valid.any()):
        raise CapabilityError("the two evaluations have no start that was judged in both; evaluate more episodes")
    column = "success_once" if success == "once" else "success_at_end"
    x, y = getattr(a, column), getattr(b, column)
    overall, tasks = None, {}
    if x is not None and y is not None:
        overall = _paired(x[valid], y[valid])
        of_task = [(name, valid & (a.task == i)) for i, name in enumerate(a.tasks)]
        present = [(name, rows) for name, rows in of_task if bool(rows.any())]
        tasks = {name: _paired(x[rows], y[rows]) for name, rows in present} if len(a.tasks) > 1 else {}
    return PairedComparison(overall, tasks, bootstrap((a.returns - b.returns)[valid].numpy()), success)


def summarize(
    after: dict[str, EvaluationResult], before: dict[str, EvaluationResult] | None = None
) -> dict[str, SuiteResult]:
    """The suites of a final evaluation as `summary.json` holds them.

    Args:
        after: Suite -> the trained policy's evaluation; `heldout` is one of them.
        before: Suite -> that of the policy it started from, as far as it was measured.

    Returns:
        suites: Rates, what differs from `heldout`, and what training changed; paired where the starts are the same.
    """
    out: dict[str, SuiteResult] = {}
    for name, result in after.items():
        suite = out[name] = result.to_dict()
        rows = _paired_rows(result, after[HELDOUT]) if name != HELDOUT else {}
        if rows and rows.keys() >= suite["tasks"].keys():  # a task may have no start that was judged in both
            suite["against_heldout"] = {task: _difference(p) for task, p in rows.items()}
    for name, start in summarize(before).items() if before else ():
        assert before is not None
        if name in out:
            out[name]["start"] = start
            if same_simulator(after[name], before[name], name) and (rows := _paired_rows(after[name], before[name])):
                out[name]["since_start"] = {
                    task: {"before": p.rate_b.value, "after": p.rate_a.value, **_difference(p)}
                    for task, p in rows.items()
                }
    return out


def same_simulator(after: EvaluationResult, before: EvaluationResult, suite: str) -> bool:
    """Whether two evaluations of one run may be compared; where not (it went on elsewhere), the log says why."""
    try:
        manifest.compare(after.manifest, before.manifest, (f"{suite} after training", f"{suite} before it"))
    except CapabilityError as error:
        log.warning("what training changed is not told: %s", str(error).split(". Evaluate both")[0])
        return False
    return True


def _paired_rows(a: EvaluationResult, b: EvaluationResult) -> dict[str, Paired]:
    """Each task and "all"; empty without a notion of success, or where the starts are not the same."""
    try:
        paired = compare(a, b)
    except CapabilityError:
        return {}
    return {**paired.tasks, **({} if paired.overall is None else {"all": paired.overall})}


def _difference(paired: Paired) -> Difference:
    d = paired.difference
    return {"difference": d.value, "low95": d.low, "high95": d.high, "p": paired.p, "episodes": paired.episodes}


def _paired(x: Tensor, y: Tensor) -> Paired:
    return Paired(int((x & y).sum()), int((x & ~y).sum()), int((~x & y).sum()), int((~x & ~y).sum()))


@dataclass
class Loaded:
    """A trained policy, ready to act."""

    policy: Policy
    env: Env
    """Evaluation copies; close it after use."""
    recipe: Recipe
    checkpoint: Path


def load_policy(
    target: str | Path,
    *,
    env: Env | None = None,
    copies: int | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
) -> Loaded:
    """Load a trained policy with an env to evaluate it in.

    Args:
        target: A run folder (its newest checkpoint) or one checkpoint of a run.
        env: Use this env, on whose device the policy is then put; None builds the recipe's own.
        copies: Copies of the env to build; None takes the recipe's evaluate.copies.
        device: As in a recipe; None takes the recipe's.
        overrides: Settings of its recipe to change, for example env.max_steps=50.

    Returns:
        loaded: Policy, env, recipe and the checkpoint that was read.

    Raises:
        NotFoundError: There is no run or checkpoint, or it lies outside a run folder.
        CheckpointError: It is damaged, or holds the weights of another policy.
        ConfigError: The overrides do not fit its recipe.
        CapabilityError: The env means something else by the numbers of an action than the one it was trained in.
    """
    path = checkpoint.resolve(Path(target))
    folder, recipe = run_of(path)
    if overrides:
        recipe = load_recipe(folder, overrides).recipe
    host.prepare(recipe.threads)
    weights, then = stored_policy(path)
    own = env is None
    if env is None:
        where = choose_device(device or recipe.device)
        env = build_env(recipe, num_envs=copies or recipe.evaluate.copies, device=where, split="eval")
    try:
        policy = build_policy(recipe, env=env.spec, device=env.device)
        advice = "evaluate it in an env that means the same, for example its own (without the other target)"
        conform(then, Side.of("the env", env.spec), advice)
        load_weights(policy, weights, str(path))
    except BaseException:
        if own:
            env.close()
        raise
    return Loaded(policy, env, recipe, path)


def evaluate_targets(
    targets: Sequence[str | Path],
    *,
    episodes: int | None = None,
    copies: int | None = None,
    greedy: bool | None = None,
    device: str | None = None,
    overrides: Sequence[str] = (),
) -> list[dict[str, EvaluationResult]]:
    """Evaluate runs or checkpoints on the same held-out starts, all in the env and the suites of the first.

    Args:
        targets: Run folders or checkpoints.
        episodes: None takes the first recipe's evaluate.episodes.
        copies: None takes the first recipe's evaluate.copies.
        greedy: None takes the first recipe's evaluate.greedy.
        device: None takes the first recipe's device.
        overrides: Settings of the first recipe to change, for example env.max_steps=50.

    Returns:
        results: One per target: suite -> evaluation.

    Raises:
        UserError: See `load_policy` and `evaluate`.
    """
    first = load_policy(targets[0], copies=copies, device=device, overrides=overrides)
    suites = suites_of(first.recipe, copies=copies)
    suites[0].env = first.env
    results: list[dict[str, EvaluationResult]] = [{} for _ in targets]
    try:
        policies = [first.policy, *(load_policy(target, env=first.env).policy for target in targets[1:])]
        e = first.recipe.evaluate
        # A recipe that skips the evaluation after training can still be evaluated by hand.
        count = episodes or e.episodes or e.episodes_during
        for suite in suites:
            for policy, found in zip(policies, results, strict=True):
                found[suite.name] = suite.run(policy, first.env.device, count, greedy=greedy)
            suite.close()
    finally:
        for suite in suites:
            suite.close()
    return results


def print_targets(
    targets: Sequence[str | Path],
    results: Sequence[dict[str, EvaluationResult]],
    console: Console | None = None,
    *,
    anyway: bool = False,
) -> None:
    """Print what `evaluate_targets` found: each evaluation, each suite beside `heldout`, and how two targets differ.

    They are compared in pairs, or where the env cannot repeat a start as independent samples.

    Args:
        targets: One or two names.
        results: Of each, suite -> evaluation.
        console: Where to print; standard output when None.
        anyway: Compare also what was not made with the same simulator or not played alike, and say so.

    Raises:
        CapabilityError: Two targets were evaluated on different starts or with different simulators, or only one of
            them greedily.
    """
    for target, suites in zip(targets, results, strict=True):
        for suite, result in suites.items():
            print_evaluation(str(target) if suite == HELDOUT else f"{target}, {suite}", result, console)
            if suite != HELDOUT and result.seedable:
                print_comparison(compare(result, suites[HELDOUT]), (suite, HELDOUT), console)
    if len(results) == 2:
        for suite in results[0]:
            of = "" if suite == HELDOUT else f", {suite}"
            names = (f"{targets[0]}{of}", f"{targets[1]}{of}")
            a, b = results[0][suite], results[1][suite]
            comparison = compare(a, b) if a.seedable and b.seedable else None
            remark = manifest.compare(a.manifest, b.manifest, names, anyway=anyway)
            if comparison is None:
                print_apart(a, b, names, console)
            else:
                print_comparison(comparison, names, console)
            if remark:
                (console or Console()).print(f"note: {remark}", markup=False, soft_wrap=True)


def print_evaluation(name: str, result: EvaluationResult, console: Console | None = None) -> None:
    """Print success with its interval, return and length, per task and overall.

    Args:
        name: What was evaluated.
        result: Its evaluation.
        console: Where to print; standard output when None.
    """
    suite = result.to_dict()
    how = "greedy" if result.greedy else "sampled"
    failed = suite["overall"].get("invalid")
    more = f"; {failed} more could not be judged and count nowhere" if failed else ""
    title = f"{name}: {suite['overall']['episodes']} held-out episodes, {how}{more}"
    table = Table(title=Text(title), title_justify="left")
    table.add_column("task")
    for column in ("success", "95 % interval", "at the end", "return", "length", "episodes"):
        table.add_column(column, justify="right")
    for task, r in [*suite["tasks"].items(), ("all", suite["overall"])]:
        once, end = r.get("success_once"), r.get("success_at_end")
        cells = (
            f"{once['rate']:.3f}" if once else "–",
            f"{once['low95']:.3f}–{once['high95']:.3f}" if once else "–",
            f"{end['rate']:.3f}" if end else "–",
            f"{r['return_mean']:.2f} ± {r['return_std']:.2f}",
            f"{r['length_mean']:.1f}",
            str(r["episodes"]),
        )
        table.add_row(Text(task), *cells, style="bold" if task == "all" else None)
    (console or Console()).print(table)


def print_comparison(comparison: PairedComparison, names: tuple[str, str], console: Console | None = None) -> None:
    """Print the paired comparison of two evaluations, with a sentence that says what it shows.

    Args:
        comparison: First minus second.
        names: Of the two.
        console: Where to print; standard output when None.
    """
    out, (first, second) = console or Console(), names
    r = comparison.returns
    returns = f"mean difference of returns {r.value:+.3f} [{r.low:+.3f}, {r.high:+.3f}]"
    if comparison.overall is None:
        out.print(f"A = {first}, B = {second}: {returns} (A - B, same starts)", markup=False, soft_wrap=True)
        return
    table = Table(title=Text(f"A = {first}, B = {second}, on the same starts"), title_justify="left")
    table.add_column("task")
    for column in ("A", "B", "A - B", "95 % interval", "only A", "only B", "p (McNemar)", "starts"):
        table.add_column(column, justify="right")
    for task, paired in [*comparison.tasks.items(), ("all", comparison.overall)]:
        d = paired.difference
        cells = (
            f"{paired.rate_a.value:.3f}", f"{paired.rate_b.value:.3f}", f"{d.value:+.3f}",
            f"{d.low:+.3f} to {d.high:+.3f}", str(paired.only_a), str(paired.only_b), f"{paired.p:.2g}",
            str(paired.episodes),
        )  # fmt: skip
        table.add_row(Text(task), *cells, style="bold" if task == "all" else None)
    out.print(table)
    out.print(f"{verdict(comparison.overall)}; {returns}", markup=False, soft_wrap=True)


def print_apart(
    a: EvaluationResult, b: EvaluationResult, names: tuple[str, str], console: Console | None = None
) -> None:
    """Print how far two evaluations are apart that have no starts in common, because their env cannot repeat one.

    Args:
        a: Of the first policy.
        b: Of the second.
        names: Of the two.
        console: Where to print; standard output when None.

    Raises:
        CapabilityError: They are of different tasks.
    """
    if a.tasks != b.tasks:
        raise CapabilityError(
            f"the two evaluations are of different tasks ({', '.join(a.tasks)}; {', '.join(b.tasks)}); evaluate both "
            "with the same env"
        )
    out = console or Console()
    table = Table(
        title=Text(f"A = {names[0]}, B = {names[1]}, on starts of their own (this env cannot repeat one)"),
        title_justify="left",
    )
    table.add_column("task")
    for column in ("A", "B", "A - B", "95 % interval", "episodes of A", "of B"):
        table.add_column(column, justify="right")
    suites = [r.to_dict() for r in (a, b)]
    x, y = ({**suite["tasks"], "all": suite["overall"]} for suite in suites)
    for task in [name for name in x if name in y and "success_once" in x[name] and "success_once" in y[name]]:
        of_a, of_b = _rate_of(x[task]), _rate_of(y[task])
        d = independent_difference(of_a, of_b)
        cells = (f"{of_a.value:.3f}", f"{of_b.value:.3f}", f"{d.value:+.3f}", f"{d.low:+.3f} to {d.high:+.3f}")
        counts = (str(x[task]["episodes"]), str(y[task]["episodes"]))
        table.add_row(Text(task), *cells, *counts, style="bold" if task == "all" else None)
    if table.rows:
        out.print(table)
    r = independent_difference(*(bootstrap(e.returns[e.valid].numpy()) for e in (a, b)))
    out.print(f"mean difference of returns {r.value:+.3f} [{r.low:+.3f}, {r.high:+.3f}]", markup=False, soft_wrap=True)


def _rate_of(result: Result) -> Interval:
    rate = result["success_once"]
    return Interval(rate["rate"], rate["low95"], rate["high95"])


def verdict(paired: Paired) -> str:
    """One sentence: which is better, or that these starts do not show it."""
    d, p = paired.difference, paired.p
    if p >= 0.05:
        return f"{paired.episodes} starts do not show a difference between A and B (p = {p:.2g})"
    better, size = ("A", d.value) if d.value > 0 else ("B", -d.value)
    return f"{better} solves {100 * size:.1f} points more of the starts (p = {p:.2g})"
