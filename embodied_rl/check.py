"""Contract tests for any env or policy: what the engine relies on, tried out and told one line each.

On the command line: `embodied-rl check env ./pouring.py` and `embodied-rl check policy mlp hidden=[64,64]`; sets of
demonstrations are looked through by `embodied-rl check demos FOLDER`.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal, cast

import torch
from rich.console import Console
from rich.text import Text

from embodied_rl import check_env as env_checks
from embodied_rl import registry
from embodied_rl.check_policy import examine_policy
from embodied_rl.check_tools import EnvCase, Finding, attempt, examine
from embodied_rl.config import load_component
from embodied_rl.errors import ConfigError
from embodied_rl.types import Env, EnvSpec, Policy, Split


def check_env(
    name: str, overrides: Sequence[str] = (), *, copies: int = 3, device: str = "cpu", steps: int = 1100
) -> list[Finding]:
    """Try an env's contract.

    Args:
        name: A built-in name, a dotted module or a `.py` file.
        overrides: Settings, as in `("tasks=[reach]", "max_steps=50")`.
        copies: At least 2.
        device: Where its tensors live.
        steps: Most control steps of one check; an env with longer episodes is not followed to the time limit.

    Returns:
        findings: See `embodied_rl.check_env.CHECKS`.

    Raises:
        UserError: The env does not exist or refuses its settings.
    """
    module, config = registry.load("env", name), load_component("env", name, overrides)
    where = torch.device(device)

    def make(num_envs: int, *, split: Split = "train", max_steps: int | None = None) -> Env:
        settings = config if max_steps is None else config.model_copy(update={"max_steps": max_steps})
        return cast(Env, module.build(settings, num_envs=num_envs, device=where, split=split, seed=0))

    return check_env_factory(make, copies=copies, steps=steps, can_lengthen="max_steps" in type(config).model_fields)


def check_env_factory(
    make: Callable[..., Env], *, copies: int = 3, steps: int = 1100, can_lengthen: bool = False
) -> list[Finding]:
    """Try the contract of envs made by a function `make(num_envs, split=..., max_steps=...) -> Env`.

    Args:
        make: Builds a fresh env; equal calls give equal envs.
        copies: At least 2.
        steps: Most control steps of one check.
        can_lengthen: `make` understands `max_steps` (None: the env's own), which shows the true end of an episode.

    Returns:
        findings: One per check; only that it cannot be built when it cannot.

    Raises:
        UserError: `make` raised it.
    """
    assert copies >= 2
    case = EnvCase(make, copies, steps, can_lengthen)
    try:
        built = attempt("can be built", lambda: case.env)
        if built.ok is False:
            return [built]
        findings = []
        for check in env_checks.CHECKS:
            findings += examine([check], case)
            case.tidy()
        return findings
    finally:
        case.close()


def check_policy(
    name: str, overrides: Sequence[str] = (), *, env: EnvSpec | None = None, device: str = "cpu"
) -> list[Finding]:
    """Try a policy's contract.

    Args:
        name: A built-in name, a dotted module or a `.py` file.
        overrides: Settings, as in `("hidden=[64,64]",)`.
        env: Build it for this env; None tries several made-up ones, of which it has to accept at least one.
        device: Where it computes.

    Returns:
        findings: See `embodied_rl.check_policy.CHECKS`.

    Raises:
        UserError: The policy does not exist or refuses its settings.
    """
    module, config = registry.load("policy", name), load_component("policy", name, overrides)
    where = torch.device(device)

    def make(spec: EnvSpec) -> Policy:
        return cast(Policy, module.build(config, env=spec, device=where))

    return check_policy_factory(make, specs=None if env is None else {"": env}, device=where)


def check_policy_factory(
    make: Callable[[EnvSpec], Policy], *, specs: dict[str, EnvSpec] | None = None, device: torch.device | None = None
) -> list[Finding]:
    """Try the contract of policies made by a function `make(spec) -> Policy`.

    Args:
        make: Builds a policy with freshly drawn parameters.
        specs: Name -> env to build it for; None takes `embodied_rl.check_policy.SPECS`.
        device: Where it computes; None is the CPU.

    Returns:
        findings: One per check and env.
    """
    return examine_policy(make, specs, device or torch.device("cpu"))


def run_check(
    kind: Literal["env", "policy", "demos"],
    name: str,
    overrides: Sequence[str] = (),
    *,
    copies: int | None = None,
    steps: int | None = None,
) -> int:
    """Check, print one line per finding, and return the exit code: 1 when something is broken, else 0.

    Args:
        kind: What it is.
        name: As `check_env` takes it; of demos a folder.
        overrides: Settings.
        copies: Of an env, for slow simulators; None takes the default of `check_env`.
        steps: Of an env, likewise.

    Raises:
        UserError: It does not exist or refuses its settings, or copies and steps of something that is no env.
    """
    fewer: dict[str, Any] = {k: v for k, v in {"copies": copies, "steps": steps}.items() if v is not None}
    if fewer and kind != "env":
        raise ConfigError(f"--{next(iter(fewer))} does nothing for check {kind}: remove it")
    if copies == 1:
        raise ConfigError("--copies is 1, expected at least 2: a partial reset needs a copy that goes on")
    if kind == "demos":
        from embodied_rl.demo_check import check_demos

        return print_findings(check_demos(name, overrides))
    findings = check_env(name, overrides, **fewer) if kind == "env" else check_policy(name, overrides)
    return print_findings(findings)


def print_findings(findings: Sequence[Finding], console: Console | None = None) -> int:
    """Print findings; returns 1 when one of them is broken, else 0."""
    out = console or Console()
    marks = {True: ("ok  ", "green"), False: ("FAIL", "bold red"), None: ("skip", "yellow")}
    for finding in findings:
        mark, style = marks[finding.ok]
        line = Text.assemble((mark, style), " ", finding.name, (f": {finding.detail}" if finding.detail else "", "dim"))
        out.print(line, soft_wrap=True)
    broken = sum(f.ok is False for f in findings)
    passed, skipped = sum(f.ok is True for f in findings), sum(f.ok is None for f in findings)
    out.print(f"{passed} passed, {broken} failed, {skipped} not tried", style="bold")
    return 1 if broken else 0
