"""The command line: `embodied-rl train | evaluate | report | collect | check | sim | show-config | list | doctor`.

Each command parses, calls one function of the engine and prints. Heavy modules are imported inside the commands, so
that `--help` answers at once. A `UserError` becomes one message and exit code 2; anything else is a defect of ours
and keeps its traceback (exit code 1).
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, NoReturn

from embodied_rl import __version__
from embodied_rl.errors import CapabilityError, NotFoundError, UserError, nearest

if TYPE_CHECKING:
    from rich.console import Console

EPILOG = """\
examples:
  embodied-rl train tabletop_demo                        a packaged recipe
  embodied-rl train my.yaml seed=1 collect.copies=128    your file, two settings changed
  embodied-rl evaluate runs/tabletop_demo                success with its interval
  embodied-rl show-config tabletop_demo                  every setting and where it comes from
  embodied-rl doctor                                     what works on this machine
"""


class _Parser(argparse.ArgumentParser):
    """Argparse with one sentence per mistake instead of the whole usage."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"error: {message}; see `{self.prog} --help`\n")

    def _check_value(self, action: argparse.Action, value: Any) -> None:
        if action.choices is not None and value not in action.choices:
            raise argparse.ArgumentError(action, f"'{value}' does not exist{nearest(value, action.choices)}")


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command.

    Args:
        argv: Arguments after the program name; None takes `sys.argv`.

    Returns:
        code: 0 for success, 2 for a mistake of the user, 128 + n after signal n; `check` and `doctor` return 1 when
            something does not pass.
    """
    parser = _build_parser()
    args, rest = parser.parse_known_args(argv)
    if any(text.startswith("-") for text in rest) or (rest and not hasattr(args, "overrides")):
        parser.error(f"unknown argument '{rest[0]}'")
    if rest:  # argparse stops collecting a.b=c at the first option
        args.overrides += rest
    try:
        return int(args.run(args) or 0)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        return 130
    except BrokenPipeError:  # `embodied-rl ... | head` is no failure
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _build_parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="embodied-rl",
        description="Reinforcement learning for robot policies: train, evaluate and inspect.",
        epilog=EPILOG,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"embodied-rl {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    for name, (fill, run, help, examples) in COMMANDS.items():
        sub = commands.add_parser(
            name,
            help=help,
            description=help,
            epilog="examples:\n" + "\n".join(f"  embodied-rl {name} {example}" for example in examples),
            formatter_class=argparse.RawDescriptionHelpFormatter,
        )
        sub.set_defaults(run=run)
        fill(sub)
    return parser


def _recipe_arguments(parser: argparse.ArgumentParser) -> None:
    recipe = "a YAML file, a run folder, or a packaged name (`embodied-rl list recipes`)"
    parser.add_argument("recipe", metavar="RECIPE", help=recipe)
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", default=[], help="settings to change, as in seed=1")


def _train_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--resume", action="store_true", help="go on from the last checkpoint of the run folder")


def _evaluate_arguments(parser: argparse.ArgumentParser) -> None:
    target = "a run folder, one of its checkpoints, or a stored evaluation (evaluation.json), which is not made again"
    parser.add_argument("target", metavar="RUN_OR_CHECKPOINT", help=target)
    parser.add_argument("other", metavar="OTHER", nargs="?", help="a second one, evaluated on the same starts")
    elsewhere = "settings of the env to evaluate in, where it is not the run's own, as in env.max_steps=50"
    parser.add_argument("overrides", metavar="env.a=b", nargs="*", default=[], help=elsewhere)
    parser.add_argument("--episodes", type=_count, help="number of episodes (default: the recipe's evaluate.episodes)")
    parser.add_argument("--copies", type=_count, help="copies of the env (default: the recipe's evaluate.copies)")
    parser.add_argument("--sampled", action="store_true", help="sample as in training instead of taking the mode")
    parser.add_argument("--device", help="auto, cpu, cuda or cuda:<index> (default: the recipe's device)")
    stored = "where the result is stored, a .json file (default: a new one in the run's evaluations/)"
    parser.add_argument("--out", metavar="FILE", help=stored)
    anyway = "compare two results although they were not made with the same simulator, or not played alike"
    parser.add_argument("--compare-anyway", action="store_true", help=anyway)


def _report_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run_folder", metavar="RUN", help="a run folder")


def _collect_arguments(parser: argparse.ArgumentParser) -> None:
    _recipe_arguments(parser)
    parser.add_argument("--episodes", type=_count, required=True, help="episodes of the whole set")
    parser.add_argument("--out", metavar="FOLDER", required=True, help="the set; goes on with one that exists")
    parser.add_argument("--noise", type=_share, default=1.0, help="how much the expert is pushed about (default: 1)")
    misses = "share of the episodes that begin with a miss, which the expert mends (default: 0)"
    parser.add_argument("--misses", type=_share, default=0.0, help=misses)
    shown = "let the set hold the misses too, with what the expert would have done instead"
    parser.add_argument("--show-misses", action="store_true", help=shown)
    replay = "a set whose demonstrations are repeated where objects lie elsewhere, in place of the expert"
    parser.add_argument("--replay", metavar="FOLDER", help=replay)
    blind = "with --replay: guess where objects lie, and keep what succeeds; only success tells"
    parser.add_argument("--blind", action="store_true", help=blind)
    parser.add_argument("--all", action="store_true", help="keep failures too")


def _check_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("kind", choices=("env", "policy", "demos"))
    parser.add_argument("name", metavar="NAME", help="a built-in name, a dotted module or a .py file; demos: a folder")
    parser.add_argument("overrides", metavar="a.b=c", nargs="*", default=[], help="settings of the env or policy")
    parser.add_argument("--copies", type=_count, help="copies of an env, at least 2 (default: 3)")
    parser.add_argument("--steps", type=_count, help="most control steps of one check of an env (default: 1100)")


def _list_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("what", choices=("envs", "policies", "algorithms", "rewards", "recipes"))


def _sim_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("action", choices=("install", "list", "remove"))
    parser.add_argument("name", metavar="NAME", nargs="?", help="a simulator, or a lock file of your own (install)")


def _doctor_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--runs", metavar="FOLDER", default="runs", help="where runs will be written (default: runs)")


def _count(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"expected a whole number of at least 1, got '{text}'")
    return int(text)


def _share(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value <= 1:
        raise argparse.ArgumentTypeError(f"expected a number in [0, 1], got '{text}'")
    return value


def _train(args: argparse.Namespace) -> int:
    from embodied_rl.config import load_recipe

    resolved = load_recipe(args.recipe, args.overrides)  # a wrong recipe is told before anything is built
    from embodied_rl.console import summary_table
    from embodied_rl.train import run

    logging.basicConfig(level=logging.INFO, format="%(message)s", stream=sys.stderr)
    # A run folder that was moved, or named from elsewhere, is resumed where it is.
    folder = Path(args.recipe) if args.resume and (Path(args.recipe) / "recipe.yaml").is_file() else None
    finished = run(resolved.recipe, resume=args.resume, folder=folder)
    if finished.interrupted:
        number = signal.Signals[finished.reason]
        print(f"stopped by {number.name} and saved; go on with: embodied-rl train {finished.folder} --resume")
        return 128 + number
    _console().print(summary_table(json.loads((finished.folder / "summary.json").read_text())))
    print(f"report: {finished.folder / 'report.html'}")
    return 0


def _evaluate(args: argparse.Namespace) -> None:
    more = [text for text in (args.other, *args.overrides) if text is not None]
    settings = [text for text in more if "=" in text and not os.path.exists(text)]
    targets = [args.target, *(text for text in more if text not in settings)]
    stored = [target for target in targets if target.endswith(".json")]
    _check_evaluate(args, targets, stored, settings)
    from embodied_rl import checkpoint
    from embodied_rl.compare import evaluate_targets, print_targets
    from embodied_rl.stored import check_out, store, stored_results

    if stored:
        print_targets(targets, stored_results(targets), _console(), anyway=args.compare_anyway)
        return
    # Named once: a run that goes on meanwhile has a newer one by the end.
    checkpoints = [checkpoint.resolve(Path(target)) for target in targets]
    out = None if args.out is None else Path(args.out)
    if out is not None:
        check_out(out, checkpoints[0])
    greedy = False if args.sampled else None
    given = {"episodes": args.episodes, "copies": args.copies, "greedy": greedy, "device": args.device}
    results = evaluate_targets(checkpoints, **given, overrides=settings)
    try:
        titles = [" ".join([target, *settings]) for target in targets]
        print_targets(titles, results, _console(), anyway=args.compare_anyway)
    finally:  # what was measured is kept, also where the two cannot be compared
        for path, suites in zip(checkpoints, results, strict=True):
            for file in store(suites, path, out):
                print(f"stored: {file}")


def _check_evaluate(
    args: argparse.Namespace, targets: Sequence[str], stored: Sequence[str], settings: Sequence[str]
) -> None:
    """Refuse options of `evaluate` that could do nothing."""
    if len(targets) > 2:
        raise CapabilityError(f"evaluate takes one or two runs, got {len(targets)} ({', '.join(targets)})")
    other = next((text for text in settings if not text.startswith("env.")), None)
    if other is not None:
        raise CapabilityError(
            f"evaluate changes settings of env alone, as in env.max_steps=50, got '{other}'; how much is played, and "
            "where, say its options"
        )
    if args.compare_anyway and len(targets) < 2:
        raise CapabilityError("--compare-anyway compares two results, and one was given: name a second one")
    if stored and len(stored) < len(targets):
        raise CapabilityError(
            f"{stored[0]} is a stored evaluation and the other is not: name two stored ones, or two runs, which are "
            "evaluated on the same starts"
        )
    if args.out is not None and len(targets) > 1 and not stored:
        raise CapabilityError(
            f"--out ({args.out}) is one file, and two are evaluated: remove it, and each is stored in its own run's "
            "folder"
        )
    idle = [f"--{name}" for name in ("episodes", "copies", "sampled", "device", "out") if getattr(args, name)]
    idle += settings
    if stored and idle:
        raise CapabilityError(f"{', '.join(idle)} does nothing to {stored[0]}, which has been made: remove it")


def _collect(args: argparse.Namespace) -> int:
    from embodied_rl.config import load_recipe

    recipe = load_recipe(args.recipe, args.overrides).recipe
    from embodied_rl.demo_console import collect_and_tell

    keep: Literal["success", "all"] = "all" if args.all else "success"
    return collect_and_tell(
        recipe, Path(args.out), args.episodes, noise=args.noise, misses=args.misses, show_misses=args.show_misses,
        replay=args.replay, blind=args.blind, keep=keep, console=_console(),
    )  # fmt: skip


def _check(args: argparse.Namespace) -> int:
    from embodied_rl.check import run_check

    return run_check(args.kind, args.name, args.overrides, copies=args.copies, steps=args.steps)


def _report(args: argparse.Namespace) -> None:
    from embodied_rl.report import write_report

    print(write_report(Path(args.run_folder)))


def _show_config(args: argparse.Namespace) -> None:
    from embodied_rl.config import display, find_recipe, load_recipe
    from embodied_rl.schema import flatten, show

    resolved = load_recipe(args.recipe, args.overrides)
    values = flatten(resolved.recipe.dump())
    rows = [(key, show(value, limit=None), resolved.sources[key]) for key, value in values.items()]
    _print_table(("setting", "value", "from"), rows, title=display(find_recipe(args.recipe)))


def _list(args: argparse.Namespace) -> None:
    from embodied_rl.catalog import describe

    _print_table((args.what, "what it is", ""), describe(args.what), title="")


def _sim(args: argparse.Namespace) -> int:
    from embodied_rl import sims

    if args.action == "list":
        rows = [(sim.name, sim.state, str(sim.folder)) for sim in map(sims.find, sims.names())]
        _print_table(("simulator", "state", "folder"), rows, title="")
        return 0
    if args.name is None:
        raise NotFoundError(f"sim {args.action} needs the name of a simulator; known: {', '.join(sims.names())}")
    if args.action == "remove":
        print(f"removed {args.name}" if sims.remove(args.name) else f"{args.name} is not installed")
        return 0
    print(f"installing {args.name} into {sims.find(args.name).folder} (minutes, once)")
    print(f"ready: {sims.install(args.name).python}")
    return 0


def _console() -> Console:
    from rich.console import Console

    return Console(width=None if sys.stdout.isatty() else 120)  # in a pipe rich would cut tables at 80 characters


def _print_table(head: Sequence[str], rows: Sequence[Sequence[str]], title: str) -> None:
    """A rich table on a terminal; aligned plain lines, one a row, in a pipe."""
    if sys.stdout.isatty():
        from rich import box
        from rich.table import Table

        table = Table(*head, box=box.SIMPLE, title=title or None, title_justify="left")
        for row in rows:
            table.add_row(*(_escape(cell) for cell in row))
        _console().print(table)
        return
    widths = [max(len(row[i]) for row in (head, *rows)) for i in range(len(head))]
    for row in rows:
        print("  ".join(cell.ljust(width) for cell, width in zip(row, widths, strict=True)).rstrip())


def _escape(cell: str) -> str:
    return cell.replace("[", r"\[")


def _doctor(args: argparse.Namespace) -> int:
    from embodied_rl.doctor import examine, print_findings

    return print_findings(examine(Path(args.runs)))


Fill = Callable[[argparse.ArgumentParser], None]
Run = Callable[[argparse.Namespace], int | None]
COMMANDS: dict[str, tuple[Fill, Run, str, tuple[str, ...]]] = {
    "train": (
        _train_arguments,
        _train,
        "Train a recipe to its end; writes runs/<name>/.",
        (
            "tabletop_demo",
            "my.yaml name=second seed=1 env.tasks=[reach,push]",
            "runs/second --resume                    go on after an interruption",
        ),
    ),
    "evaluate": (
        _evaluate_arguments,
        _evaluate,
        "Measure success on starts that training never saw; compare two runs on the same starts.",
        (
            "runs/tabletop_demo",
            "runs/a runs/b --episodes 1000         paired comparison (McNemar)",
            "runs/a/checkpoints/update_000040 --sampled --out sampled.json",
            "runs/a env.max_steps=50               in an env with another setting than it was trained in",
            "runs/a/evaluation.json runs/b/evaluation.json   compare what was measured before",
        ),
    ),
    "report": (
        _report_arguments,
        _report,
        "Write report.html of a run: curves, success, timing, videos, the recipe.",
        ("runs/tabletop_demo",),
    ),
    "collect": (
        _collect_arguments,
        _collect,
        "Record demonstrations with the env's scripted expert, collect.copies episodes side by side.",
        (
            "tabletop_demo --episodes 300 --out demos/tabletop",
            "my.yaml env.tasks=[lift] --episodes 50 --out demos/lift --noise 0 --all",
        ),
    ),
    "check": (
        _check_arguments,
        _check,
        "Run the contract tests on an env or a policy, also on a file of your own; look through demonstrations.",
        ("env tabletop tasks=[reach]", "env ./pouring.py", "policy mlp hidden=[64,64]", "demos demos/tabletop"),
    ),
    "sim": (
        _sim_arguments,
        _sim,
        "Make, list or remove the environments of simulators that cannot live in this one.",
        ("install libero", "install ./my_simulator.txt       a lock file of your own", "list"),
    ),
    "show-config": (
        _recipe_arguments,
        _show_config,
        "Print every setting of a recipe and where it comes from.",
        ("tabletop_demo", "my.yaml seed=1 | grep algorithm"),
    ),
    "list": (_list_arguments, _list, "List what a recipe can name.", ("envs", "recipes")),
    "doctor": (
        _doctor_arguments,
        _doctor,
        "Say what works on this machine, what does not, and the command that would mend it.",
        ("", "--runs /data/runs        also check the disk of that folder"),
    ),
}
"""Name -> its arguments, what it runs, one sentence, and examples."""
