"""The data that walks through the engine, and what an env and a policy must offer.

Axis letters, used in every docstring of the project:

    T decisions of one rollout      B copies of the env        A units of one decision
    N flattened decisions           C control steps (chunk)    D features
    K denoising steps               V vocabulary               E episodes

A *decision* is one call of the policy. It emits `A` *units* (action values, tokens, denoising steps), each
with a log-probability under the policy that sampled it, and is executed as a chunk of `C` control steps.
"""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from torch import Tensor

from embodied_rl.offers import Annealed, Demonstrating, Encoding, Foreseeing, Hinting, Imitator, Relabelling, Sparing
from embodied_rl.spec import PAD, ActionSpec, EnvSpec, Obs, TensorSpec, Vocabulary

__all__ = [
    "FEATURES",
    "PAD",
    "ActionSpec",
    "Advantage",
    "Annealed",
    "Batch",
    "Demonstrating",
    "Encoding",
    "Env",
    "EnvSpec",
    "Evaluation",
    "Foreseeing",
    "Hinting",
    "Imitator",
    "Obs",
    "Policy",
    "PolicyOutput",
    "Relabelling",
    "Rollout",
    "Sparing",
    "Split",
    "State",
    "Step",
    "TensorSpec",
    "Vocabulary",
]

FEATURES = "policy/features"
"""Entry that stands for the whole observation where `Policy.evaluate` is given a policy's own `features`."""

State = dict[str, Any]
"""A tree of dicts and lists whose leaves are tensors, str, int, float, bool or None: what a checkpoint holds."""

Split = Literal["train", "eval"]
"""Which set of starts (seeds, layouts, wordings) an env draws from; the two never overlap."""


@dataclass
class Step:
    """What happened in one control step, for all copies; nothing has been reset yet.

    `obs` is always the state that really followed the action: episodes begin with `reset(mask, ...)`, so there is no
    "final observation" to keep apart. It is empty where the env gives observations on demand.
    """

    obs: Obs
    reward: Tensor
    """[B] float32, task units."""
    terminated: Tensor
    """[B] bool, the task ended: nothing follows."""
    truncated: Tensor
    """[B] bool, cut by a time limit: the state still has a value."""
    success: Tensor | None = None
    """[B] bool, the task's goal holds in the state `obs`; None when the env has no such notion."""
    metrics: dict[str, Tensor] = field(default_factory=dict)
    """name -> [B] float32 reward terms and diagnostics, logged as rollout/reward_<name>_mean."""
    result: Tensor | None = None
    """[B] int64 >= 0, equal where episodes have come to the same (a hash of the answer, the bin an object lies in),
    right or wrong; -1 for nothing. None without `has_results`."""
    invalid: Tensor | None = None
    """[B] bool, the judge or the simulator failed: the episode is over (`terminated | truncated` holds too), is left
    out of every mean, baseline and loss, and is counted. None when nothing can fail."""
    starting: Tensor | None = None
    """[B] bool, copies that took no action: their episode begins with `obs` or later (`EnvSpec.restarts_itself`)."""


@runtime_checkable
class Env(Protocol):
    """B copies of an environment, stepped together, torch tensors in and out on `device`.

    Protocol of one episode: `reset(mask, seeds, tasks)` starts it in the masked copies; `step(action, active)`
    advances; when a copy is `terminated | truncated` it waits (its later outputs are ignored) until the next reset.
    """

    spec: EnvSpec
    device: torch.device

    def reset(self, mask: Tensor, seeds: Tensor, tasks: Tensor) -> Obs:
        """Start new episodes in some copies and return the observation of ALL copies.

        Args:
            mask: [B] bool, copies to restart; the others keep their state and observation.
            seeds: [B] int64 >= 0; same seed, same task and same split: same start, bit for bit. The last bit is
                1 for evaluation starts, 0 for training starts (see `embodied_rl.seeding`).
            tasks: [B] int64, index into `spec.tasks`.
        """
        ...

    def step(self, action: Tensor, active: Tensor | None = None) -> Step:
        """Advance one control step.

        Args:
            action: [B, *spec.action.shape] of spec.action.dtype; continuous values are clipped to [-1, 1].
            active: [B] bool, copies whose result will be used; the others may be advanced or left alone.

        Raises:
            ShapeError: Wrong shape, dtype or device, or a non-finite action (says which copies).
        """
        ...

    def observe(self) -> Obs:
        """Observation of all copies as they are now; only asked of envs with `spec.on_demand`."""
        ...

    def get_state(self) -> State:
        """Everything needed to continue bit for bit; CapabilityError when `spec.has_state` is False."""
        ...

    def set_state(self, state: State) -> Obs:
        """Restore `get_state`'s result and return the observation of all copies."""
        ...

    def render(self, copies: Tensor, camera: str, height: int, width: int) -> Tensor:
        """Pictures [len(copies), H, W, 3] uint8 of the copies asked for; NotFoundError for an unknown camera."""
        ...

    def close(self) -> None:
        """Free threads and memory; may be called twice."""
        ...

    # An env whose episodes can be read may offer as well:
    #     transcript(copies: Tensor) -> list[str]    what has happened so far in the copies asked for, in words
    #     manifest() -> dict[str, Any]    plain data on what its results depend on (versions, checksums of models and
    #         assets, the protocol), not on the machine (paths, threads): where it differs, evaluations are not compared


@dataclass
class PolicyOutput:
    """One decision for B copies.

    Example, 2 copies of a 3-dimensional Gaussian, chunk 1: units and logp [2, 3], action [2, 1, 3], value [2].
    """

    units: Tensor
    """[B, A, ...] what was sampled, exactly as `evaluate` wants it back."""
    logp: Tensor
    """[B, A] log-probability of each unit under the sampler."""
    action: Tensor
    """[B, C, *action.shape] what the env executes, in order."""
    value: Tensor | None = None
    """[B] critic's estimate for the observation, in the critic's (scaled) reward units; None without a critic. A policy
    whose attribute `value_per_unit` is True gives [B, A] instead: the estimate before each unit, the first of which is
    that of the observation (for `credit.level: unit`)."""
    mask: Tensor | None = None
    """[B, A] bool, units that count; None when all do."""
    features: Tensor | None = None
    """[B, ...] all that `evaluate` needs of the observation, made by what no gradient and no `observe` changes: it is
    then asked about `{FEATURES: features}`, so that nothing is encoded twice. None: it needs the observation."""


@dataclass
class Evaluation:
    """The current policy's opinion of N recorded decisions, with gradients."""

    logp: Tensor
    """[N, A]"""
    entropy: Tensor | None = None
    """[N, A] entropy of each unit's distribution (an estimate where there is no closed form); None if it has none."""
    value: Tensor | None = None
    """[N], or [N, A] with `value_per_unit`, expectation of the critic; None without a critic."""
    value_logits: Tensor | None = None
    """[N, bins], or [N, A, bins], when the critic is a classifier over return bins (HL-Gauss)."""
    auxiliary: Tensor | None = None
    """[N] what the policy learns besides, weighted by its own settings; its mean is added to every loss."""


class Policy(Protocol):
    """What the engine asks of a network; every implementation is also a `torch.nn.Module`.

    Two rules keep training honest. (1) `act` and `evaluate` share one code path for log-probabilities, so that the
    ratio is exactly 1 before the first step. (2) Nothing inside the policy changes during collection: running
    statistics move only in `observe`, which the loop calls after an update.
    """

    chunk: int
    """C, control steps per decision."""
    actions_per_decision: int
    """Different actions in a chunk: C, fewer when each is held for several control steps, 1 with `units_span_chunk`."""
    num_units: int
    """A, units per decision."""
    has_critic: bool

    def act(self, obs: Obs, *, generator: torch.Generator | None, greedy: bool = False) -> PolicyOutput:
        """Sample (or with `greedy` take the mode of) one decision per copy, without gradients."""
        ...

    def evaluate(self, obs: Obs, units: Tensor, *, entropy: bool = True) -> Evaluation:
        """Log-probabilities, entropies and values of recorded decisions, with gradients.

        Args:
            obs: [N, ...] observations, or `{FEATURES: [N, ...]}` where `act` gave features.
            units: [N, A, ...] as `act` returned them.
            entropy: False when no loss reads it, so it need not be computed.
        """
        ...

    def value(self, obs: Obs) -> Tensor:
        """[N] critic's estimate, without gradients."""
        ...

    def observe(self, obs: Obs) -> None:
        """Move running statistics (observation normaliser) with a finished rollout's observations [N, ...]."""
        ...

    # A policy may have:
    #     privileged_critic: bool    True when `value` reads privileged entries alone: it then needs no last picture
    #     pretrained: bool    True when its first weights are worth measuring: a run then evaluates them as well
    #     evaluating(on: bool) -> None    from here on it is (no longer) played for evaluation, nobody learns from it
    #     samples_for_evaluation: bool    True when settings of it say how: evaluation must then not be greedy
    #     units_span_chunk: bool    True when every unit covers the whole chunk, so that none belongs to one action
    #     units_out_of_order: bool    True when a unit was sampled after looking at some that stand behind it
    #     entropy_learns: bool    False when no weight moves the entropy of its units, or they have none


@dataclass
class Rollout:
    """T decisions of B copies, and everything later rooms may read of them.

    Worked example, T = 2, B = 1, one unit, an episode that ends by a time limit at the first decision:
    reward [[1.0], [0.5]], terminated [[False], [False]], truncated [[True], [False]], value [[2.0], [3.0]],
    next_value [[2.5], [3.2]]: 2.5 is the value of the state where the limit struck, not of the fresh start (3.0).
    """

    obs: Obs
    """name -> [T, B, ...] for entries that change within an episode."""
    constants: Obs
    """name -> [E, ...] for per-episode entries; row `episode[t, b]` belongs to decision (t, b)."""
    episode: Tensor
    """[T, B] int64 index of the episode: two decisions share it exactly when they belong to one episode."""
    units: Tensor
    """[T, B, A, ...]"""
    logp: Tensor
    """[T, B, A] at sampling time, under the sampler's real temperature."""
    mask: Tensor
    """[T, B, A] bool, units that count."""
    valid: Tensor
    """[T, B] bool, decisions that count: False after the end of an episode that is not restarted, where the copy took
    none (`Step.starting`), and in all of an episode in which the judge or the simulator failed."""
    reward: Tensor
    """[T, B] unscaled, summed over the executed steps of the chunk."""
    steps: Tensor
    """[T, B] int64 control steps really executed, at most C; the decision's discount is gamma ** steps."""
    terminated: Tensor
    """[T, B] bool"""
    truncated: Tensor
    """[T, B] bool"""
    value: Tensor | None
    """[T, B], or [T, B, A] of a critic that values every unit."""
    next_value: Tensor | None
    """[T, B] value of the state that really followed, before any reset; unused (0) where terminated."""
    group: Tensor
    """[T, B] int64, decisions of copies that share one start (layout, instruction and seed) share it."""
    task: Tensor
    """[T, B] int64 index into `EnvSpec.tasks`."""
    policy_version: Tensor
    """[T, B] int64, number of optimizer updates behind the weights that sampled it."""
    chunk: int
    """C"""
    finished: dict[str, Tensor]
    """Episodes that ended in this rollout: task, seed, copy, length [E] int64; return [E]; success_once,
    success_at_end [E] bool (when the env has success)."""
    metrics: dict[str, tuple[float, float]]
    """name -> (sum, count) partial means of the env's `Step.metrics` over the executed steps of valid decisions."""
    solved: Tensor | None = None
    """[T, B] int64: 0 while the goal has not held in the episode, 1 in the decision in which it first does (at any of
    its control steps), 2 in every later one; None when the env has no success. Episodes that began in an earlier
    rollout are known from their beginning."""
    features: Tensor | None = None
    """[T, B, ...] what `PolicyOutput.features` gave, for `Policy.evaluate`; None where it reads `obs`."""
    action: Tensor | None = None
    """[T, B, C, ...] what the env was asked to execute; kept for self-imitation only."""
    greedy: Tensor | None = None
    """[T, B] bool, decisions of the copies that take the policy's mode, as a baseline for their group; None when all
    sample. They are in no batch and no metric."""
    final_obs: Obs = field(default_factory=dict)
    """name -> [F, ...] states that no decision was taken in, the last of an episode or of the rollout; for rewards."""
    final: Tensor | None = None
    """[T, B] int64 row of `final_obs` that followed the decision; -1 where the next decision's observation did."""
    result: Tensor | None = None
    """[T, B] int64, `Step.result` after the decision; None when the env has none."""
    instructions: list[str] | None = None
    """[E] what the env asked in words when the episode (or the rollout) began, row `episode[t, b]`; for rewards. None
    where the env has no `instructions()`."""
    demonstration: Tensor | None = None
    """[T, B, *action.shape] a good action at the start of the rollout, the same in every row; kept for `guide`."""
    demonstrated: Tensor | None = None
    """[T, B] bool, where there is a demonstration."""
    invalid: Tensor | None = None
    """[T, B] bool, decisions of episodes whose judge or simulator failed; they are not `valid`. None for none."""
    relabelled: Tensor | None = None
    """[T, B] bool, decisions that led to what their episode, which failed, achieved unasked; kept for
    self-imitation only."""
    relabels: Obs = field(default_factory=dict)
    """name -> [E, ...] entries of the observation that would have asked for it; row `episode[t, b]`."""

    @property
    def done(self) -> Tensor:
        """[T, B] bool, the episode ended with this decision, for either reason."""
        return self.terminated | self.truncated

    def to(self, device: torch.device) -> Rollout:
        """Return a copy whose tensors are on `device`."""

        def move(x: Any) -> Any:
            if isinstance(x, Tensor):
                return x.to(device)
            return {k: move(v) for k, v in x.items()} if isinstance(x, dict) else x

        return Rollout(**{f.name: move(getattr(self, f.name)) for f in fields(self)})


@dataclass
class Advantage:
    """What credit assignment returns.

    Example: two copies of one group with returns 1 and 0, GRPO: advantage [[0.707], [-0.707]] on each decision.
    """

    advantage: Tensor
    """[T, B], or [T, B, A] with `credit.level: unit`; exactly 0 where the decision (the unit) carries no signal."""
    target: Tensor | None = None
    """Of the same shape: regression target of the critic, in the critic's units; None without a critic."""
    metrics: dict[str, tuple[float, float]] = field(default_factory=dict)
    """name -> (sum, count)"""
    counts: Tensor | None = None
    """[T, B] bool, decisions that are learned from; None for all valid ones. The others leave before the update: they
    are in no batch and in no denominator."""


@dataclass
class Batch:
    """Flattened decisions, as a loss sees them: N rows of A units."""

    obs: Obs
    """name -> [N, ...]"""
    units: Tensor
    """[N, A, ...]"""
    logp: Tensor
    """[N, A] of the proximal policy: the one that sampled, or a recomputed one."""
    mask: Tensor | None
    """[N, A] bool; None when every unit counts (saves the masking)."""
    advantage: Tensor
    """[N], or [N, A] with `credit.level: unit`."""
    target: Tensor | None
    """[N] or [N, A]"""
    value: Tensor | None
    """[N] or [N, A] at sampling time."""
    weight: Tensor
    """[N, L] share of each cell in the loss: rows of the whole optimizer step add up to 1 (see `loss.cell_weights`)."""
    row_weight: Tensor
    """[N] share of each decision in the value loss, or [N, A] of each unit: adds up to 1 over the optimizer step."""
    trajectory: Tensor
    """[N] int64 trajectory of each row, consecutive rows of one trajectory when the ratio needs it."""
    logp_ref: Tensor | None = None
    """[N, A] of the reference policy."""
    group: Tensor | None = None
    """[N] int64 group of each row, where the loss compares the members of a group; None otherwise."""
    correction: Tensor | None = None
    """[N, L] factor of each cell's objective, where another policy sampled than `logp` is of; None for 1."""

    def __len__(self) -> int:
        return self.logp.shape[0]
