"""Run-level settings: everything that belongs to the run and not to the env, the policy or the method."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, SerializeAsAny, field_validator, model_validator

from embodied_rl.anneal import Anneal
from embodied_rl.budget import Budget
from embodied_rl.convention import Item
from embodied_rl.curriculum import Curriculum
from embodied_rl.section import Section


class Collect(Section):
    """How experience is gathered; of imitation, which gathers none, `embodied-rl collect` reads copies alone."""

    copies: int = Field(64, ge=1)
    """Copies of the env stepped together (B); more copies: smoother gradients, more memory."""
    decisions: int = Field(64, ge=1)
    """Decisions per copy in one rollout (T)."""
    mode: Literal["stream", "episodes"] = "stream"
    """stream: episodes go on across rollouts; episodes: every copy runs one episode per rollout, then waits."""
    group_size: int = Field(1, ge=1)
    """Copies that share each start; group-relative methods need at least 2 and mode: episodes."""
    pipeline: int = Field(1, ge=1, le=8)
    """Parts the copies are split into; with 2, one half simulates while the other half is inferred."""
    dynamic_sampling: Literal["none", "drop", "refill"] = "none"
    """What becomes of groups whose returns are all equal: none keeps them, with an advantage of 0, in every mean over
    the batch; drop takes them out before the update; refill collects further groups in their place as well (DAPO)."""
    max_attempts: int = Field(4, ge=2)
    """refill: most rollouts per update; whatever contrast there is then has to do."""
    curriculum: Curriculum = Curriculum()
    budget: Budget | None = None
    """Copies per start by its success rate, group_size on average; needs curriculum.starts, whose rates are known. null
    gives every start group_size copies."""
    hints: tuple[float, ...] = ()
    """Shares of the solution, in (0, 1] and growing: starts that no copy of a group has solved are played again with
    the first as a hint, then with the next. Empty for none. It needs an env that can show its solutions."""
    anneal: Anneal | None = None
    """Sampling temperature that falls within a decision; null samples at the policy's own temperature throughout."""

    @model_validator(mode="after")
    def _divisible(self) -> Collect:
        unit = self.group_size * self.pipeline
        if self.copies % unit:
            raise ValueError(
                f"copies ({self.copies}) must be a multiple of group_size ({self.group_size}) times pipeline "
                f"({self.pipeline}): change copies to {-(-self.copies // unit) * unit}"
            )
        if self.group_size > 1 and self.mode == "stream":
            raise ValueError(
                f"group_size ({self.group_size}) above 1 needs mode: episodes, so that a group ends together"
            )
        return self

    @model_validator(mode="after")
    def _starts_suffice(self) -> Collect:
        starts, groups, size = self.curriculum.starts, self.copies // self.group_size, self.group_size
        if starts is not None and starts < groups:
            raise ValueError(
                f"curriculum.starts ({starts}) is less than the {groups} starts of one rollout (copies {self.copies} / "
                f"group_size {size}): set curriculum.starts to {groups} or more"
            )
        if self.budget is None:
            return self
        if starts is None:
            raise ValueError(
                "budget goes by the success rate of each start, and curriculum.starts (null) never plays one twice: "
                "set curriculum.starts, for example to 1000"
            )
        if not self.budget.low <= size <= self.budget.high or size == 1:
            raise ValueError(
                f"group_size ({size}) is the mean of the copies per start, so it must lie between budget.low "
                f"({self.budget.low}) and budget.high ({self.budget.high})"
            )
        return self

    @model_validator(mode="after")
    def _hints_grow(self) -> Collect:
        grows = all(a < b for a, b in zip((0.0, *self.hints), self.hints, strict=False))
        if not grows or any(share > 1 for share in self.hints):
            raise ValueError(f"hints ({list(self.hints)}) must grow and lie in (0, 1], for example [0.25, 0.5, 0.75]")
        if self.hints and self.mode == "stream":
            raise ValueError(f"hints ({list(self.hints)}) play whole episodes again: set mode: episodes")
        return self

    @model_validator(mode="after")
    def _groups_to_sample(self) -> Collect:
        if self.dynamic_sampling != "none" and self.group_size < 2:
            raise ValueError(
                f"dynamic_sampling ({self.dynamic_sampling}) looks for groups whose returns differ, and group_size is "
                f"{self.group_size}: set group_size: 8 and mode: episodes, or dynamic_sampling: none"
            )
        if self.dynamic_sampling != "refill" and self.max_attempts != type(self).model_fields["max_attempts"].default:
            raise ValueError(
                f"max_attempts ({self.max_attempts}) does nothing with dynamic_sampling ({self.dynamic_sampling}): "
                "remove it, or set dynamic_sampling: refill"
            )
        return self


HELDOUT = "heldout"
"""The suite of an evaluation in which nothing of env is changed."""
SuiteName = Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9_-]*$")]


class Evaluate(Section):
    """Closed-loop evaluation on starts that training never sees."""

    every: int = Field(0, ge=0)
    """Updates between evaluations during training; 0 evaluates only at the end."""
    episodes: int = Field(300, ge=0)
    """Episodes of the final evaluation; 0 skips it."""
    episodes_during: int = Field(60, ge=1)
    """Episodes of each evaluation during training."""
    copies: int = Field(100, ge=1)
    """Copies that share them evenly."""
    suites: dict[SuiteName, dict[str, Any]] | None = None
    """Name -> settings of env: after training (and before it, where the first weights are measured) the same starts are
    also played in an env with these settings changed, and compared in pairs; null plays none."""
    greedy: bool = True
    """Take the policy's mode; false samples, as in training."""
    videos: int = Field(8, ge=0)
    """Episodes filmed after training (successes and failures), or written down where the env tells them in words; 0 for
    none, or when the env does neither."""

    @field_validator("suites")
    @classmethod
    def _names_are_free(cls, suites: dict[str, dict[str, Any]] | None) -> dict[str, dict[str, Any]] | None:
        if HELDOUT in (suites or {}):
            raise ValueError(f"'{HELDOUT}' is the suite that changes nothing; give this one another name")
        return suites


class Checkpoint(Section):
    """What is kept on disk for resuming."""

    every: int = Field(20, ge=1)
    """Updates between checkpoints; the last update always makes one."""
    every_seconds: float | None = Field(300.0, gt=0)
    """Seconds after the last checkpoint from which the next update makes one as well, so that a run that fails or is
    killed loses little; null counts updates alone."""
    keep: int = Field(2, ge=1)
    """Latest checkpoints kept; the best one by evaluation is kept besides."""


class Log(Section):
    """Where numbers go; `metrics.jsonl` is always written."""

    folder: str = "runs"
    """Parent of the run folder `<folder>/<name>`."""
    tensorboard: bool = True
    """Write TensorBoard events into the run folder."""
    wandb: Literal["off", "online", "offline"] = "off"
    """Weights & Biases mode; offline writes into the run folder and can be synced later."""
    wandb_project: str = "embodied-rl"
    """Project name for Weights & Biases."""
    progress: bool = True
    """Live progress on the terminal; plain lines where the output is not a terminal."""


class Train(Section):
    """How long to train."""

    env_steps: int = Field(1_000_000, ge=1)
    """Control steps over all copies after which training ends; imitation ends after algorithm.steps."""
    max_seconds: float | None = Field(None, gt=0)
    """Stop early after this wall time, counted over resumes; null for no limit."""
    max_bad_updates: int = Field(5, ge=1)
    """Skipped non-finite updates in a row after which the run stops."""
    target_success: float | None = Field(None, gt=0, le=1)
    """Stop when an evaluation during training reaches this success rate; null never stops early."""


class Recipe(Section):
    """One run, completely: what `train` takes and what is written to the run folder."""

    name: str = Field("run", min_length=1, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")
    """Name of the run folder; letters, digits, '.', '_' and '-'."""
    seed: int = Field(0, ge=0, lt=2**31)
    """Seeds networks, sampling and starts."""
    device: str = "auto"
    """auto, cpu, cuda or cuda:<index>; auto takes the first CUDA device, else the CPU."""
    threads: int | None = Field(None, ge=1)
    """torch CPU threads; null leaves torch's own choice. Results are bit-identical only for an equal number."""
    start_from: str | None = None
    """Run folder or checkpoint whose policy training begins with, for example one trained on demonstrations; null
    begins with random weights. Its weights must be those of the policy section, by name and shape; reinforcement begins
    a critic where they have none. Settings that shape no weight, such as draws and temperature, may differ."""
    start_despite: tuple[Item, ...] = ()
    """What the numbers of an action may mean otherwise in env than where start_from was trained, for training to get
    over it: control, frame, rotation, gripper, metres, radians. All else is refused where it differs."""
    env: SerializeAsAny[Section]
    policy: SerializeAsAny[Section]
    algorithm: SerializeAsAny[Section]
    reward: SerializeAsAny[Section] | None = None
    """A reward model that adds to the env's own reward; null for the env's alone."""
    collect: Collect = Collect()
    train: Train = Train()
    evaluate: Evaluate = Evaluate()
    checkpoint: Checkpoint = Checkpoint()
    log: Log = Log()

    @model_validator(mode="after")
    def _despite_something(self) -> Recipe:
        if self.start_despite and self.start_from is None:
            raise ValueError(
                f"start_despite ({list(self.start_despite)}) does nothing with start_from (null): remove it, or say "
                "what to start from"
            )
        return self

    def dump(self) -> dict[str, Any]:
        """The resolved recipe as plain data; loading it again gives an equal recipe."""
        return self.model_dump(mode="json")
