"""Whether the parts of a recipe can work together; what cannot is refused with a way out."""

from __future__ import annotations

from typing import cast

from embodied_rl.algorithms import AlgorithmConfig
from embodied_rl.errors import CapabilityError
from embodied_rl.loss import Loss
from embodied_rl.recipe import Recipe
from embodied_rl.types import (
    Annealed,
    Demonstrating,
    Encoding,
    Env,
    EnvSpec,
    Foreseeing,
    Hinting,
    Imitator,
    Policy,
    Relabelling,
)


def check_fit(recipe: Recipe, policy: Policy, env: EnvSpec) -> None:
    """Refuse parts of a recipe that cannot work together, each with a way out.

    Raises:
        CapabilityError: Says both values and what to change.
    """
    algorithm = cast(AlgorithmConfig, recipe.algorithm)
    credit, loss, collect = algorithm.credit, algorithm.loss, recipe.collect
    if credit.needs_critic and not policy.has_critic:
        raise CapabilityError(
            f"algorithm.credit.returns {credit.returns} needs a value head, and the policy has none: give the policy a "
            "critic, or use algorithm: grpo or reinforce"
        )
    if credit.needs_critic and (credit.level == "unit") != getattr(policy, "value_per_unit", False):
        found, wanted = ("decision", "unit") if credit.level == "unit" else ("unit", "decision")
        raise CapabilityError(
            f"algorithm.credit.level is {credit.level} and the policy's critic values every {found}: set "
            f"algorithm.credit.level: {found}, or use a policy whose critic values every {wanted}"
        )
    if credit.level == "unit" and getattr(policy, "units_out_of_order", False):
        raise CapabilityError(
            "algorithm.credit.level unit credits a unit for those behind it, and with policy.units action it moves "
            "some before it as well: set algorithm.credit.level: decision, or policy.units: step"
        )
    if loss.objective == "outcome" and collect.group_size < 2:
        raise CapabilityError(
            "algorithm.loss.objective outcome compares the copies of one start, and collect.group_size is "
            f"{collect.group_size}: set collect.group_size: 8 and collect.mode: episodes"
        )
    if credit.needs_groups and collect.group_size < 2:
        raise CapabilityError(
            f"algorithm.credit compares copies of one start (baseline {credit.baseline}, scale {credit.scale}) but "
            f"collect.group_size is {collect.group_size}: set collect.group_size: 8 and collect.mode: episodes"
        )
    if collect.dynamic_sampling != "none" and not credit.needs_groups:
        raise CapabilityError(
            f"collect.dynamic_sampling {collect.dynamic_sampling} takes out groups whose returns are all equal, but "
            f"with algorithm.credit.baseline {credit.baseline} they carry a signal: set algorithm.credit.baseline: "
            "group_mean (with returns: trajectory), or collect.dynamic_sampling: none"
        )
    if not credit.needs_critic and collect.mode == "stream":
        raise CapabilityError(
            f"algorithm.credit.returns {credit.returns} without a critic needs whole episodes, and collect.mode is "
            "stream: set collect.mode: episodes"
        )
    _check_anneal(recipe, policy)
    if credit.mask_after_success and not env.has_success:
        raise CapabilityError(
            "algorithm.credit.mask_after_success masks what follows success, and the env does not tell success: "
            "remove it"
        )
    if algorithm.self_imitation.coef and not (env.has_success and isinstance(policy, Imitator)):
        lacking = "the policy has no imitation_loss" if env.has_success else "the env does not tell success"
        raise CapabilityError(
            f"algorithm.self_imitation.coef ({algorithm.self_imitation.coef:g}) imitates solved episodes, and "
            f"{lacking}: remove it, or choose an env that tells success and one of the policies tiny_vla_tokens, "
            "tiny_vla_flow, hf_vla and pi0"
        )
    if algorithm.self_imitation.learns == "foresight" and not (isinstance(policy, Foreseeing) and policy.foresees):
        raise CapabilityError(
            "algorithm.self_imitation.learns (foresight) teaches a policy to foresee where episodes end, and this one "
            "does not: set learns: everything, or use tiny_vla_tokens or tiny_vla_flow with foresight above 0"
        )
    if algorithm.update.critic_lr and not (policy.has_critic and loss.value.coef):
        raise CapabilityError(
            f"algorithm.update.critic_lr ({algorithm.update.critic_lr:g}) moves a critic, and none is trained here: "
            "remove it"
        )
    _check_loss(loss, policy)


def _check_anneal(recipe: Recipe, policy: Policy) -> None:
    """Refuse annealing of a policy that has no temperature, or one of its own."""
    if recipe.collect.anneal is None:
        return
    if not isinstance(policy, Annealed):
        raise CapabilityError(
            "collect.anneal lowers the sampling temperature unit by unit, and this policy has no temperature: set "
            "collect.anneal: null, or use a policy that samples tokens"
        )
    own = getattr(recipe.policy, "temperature", 1.0)
    if own != 1:
        raise CapabilityError(
            f"collect.anneal gives every unit a temperature in place of policy.temperature ({own:g}), at which nothing "
            "would be sampled or learned: set policy.temperature: 1.0, or collect.anneal: null"
        )


def _check_loss(loss: Loss, policy: Policy) -> None:
    """Refuse what a loss cannot do with the units and the critic of a policy."""
    if loss.ratio == "action" and getattr(policy, "units_span_chunk", False):
        raise CapabilityError(
            "algorithm.loss.ratio action takes one ratio per action, and every unit of this policy covers the whole "
            "chunk: set policy.units: action (with policy.likelihood sde or learned), or algorithm.loss.ratio: unit "
            "(each denoising step) or decision (all of them)"
        )
    cell = {"decision": policy.num_units, "action": policy.num_units // policy.actions_per_decision}.get(loss.ratio)
    if loss.reduce == "mean" and cell == 1:
        raise CapabilityError(
            f"algorithm.loss.reduce (mean) does nothing with ratio ({loss.ratio}) here, because every {loss.ratio} of "
            "this policy is one unit: set algorithm.loss.reduce: sum, or ratio: trajectory"
        )
    if loss.entropy_coef and not getattr(policy, "entropy_learns", True):
        raise CapabilityError(
            f"algorithm.loss.entropy_coef ({loss.entropy_coef:g}) does nothing here, because no weight of the policy "
            "moves the entropy of its units: set it to 0, or let noise be learned (policy.likelihood: learned)"
        )
    classifies = getattr(policy, "value_range", None) is not None
    if loss.value.coef and policy.has_critic and (loss.value.kind == "hl_gauss") != classifies:
        raise CapabilityError(
            f"algorithm.loss.value.kind is {loss.value.kind} but the policy's critic is "
            f"{'a classifier' if classifies else 'scalar'}: set both to hl_gauss (policy.critic.kind) or neither"
        )


def check_extras(recipe: Recipe, policy: Policy, env: Env) -> None:
    """Refuse hints, replay and demonstrations that cannot act here.

    Raises:
        CapabilityError: Says what lacks and what to change.
    """
    algorithm, collect = cast(AlgorithmConfig, recipe.algorithm), recipe.collect
    if getattr(policy, "samples_for_evaluation", False) and recipe.evaluate.greedy:
        raise CapabilityError(
            "policy.evaluation says how evaluation samples, and evaluate.greedy (true) takes the likeliest instead: "
            "set evaluate.greedy: false, or remove policy.evaluation"
        )
    if algorithm.self_imitation.hindsight and not isinstance(env, Relabelling):
        raise CapabilityError(
            "algorithm.self_imitation.hindsight imitates what episodes achieved unasked, and this env does not tell: "
            "remove it, or use the tabletop"
        )
    guide, replay = algorithm.guide, algorithm.replay
    if collect.hints and not (isinstance(env, Hinting) and env.spec.has_success):
        raise CapabilityError(
            f"collect.hints ({list(collect.hints)}) shows parts of solutions where none was found, and this env "
            "has no hints or does not tell success: set collect.hints: []"
        )
    if replay.coef and (collect.mode == "stream" or collect.anneal is not None):
        why = "whole episodes, and collect.mode is stream: set collect.mode: episodes"
        if collect.mode != "stream":
            why = "log-probabilities of one temperature, and collect.anneal changes it: set collect.anneal: null"
        raise CapabilityError(f"algorithm.replay.coef ({replay.coef:g}) needs {why}")
    if guide.kind == "none":
        return
    lacks = {
        "the env cannot demonstrate": not isinstance(env, Demonstrating),
        "the policy cannot write another's action in its units": not isinstance(policy, Encoding),
        "the env does not tell success (guide.starts: all needs none)": guide.starts == "unsolved"
        and not env.spec.has_success,
        "collect.mode is stream (set episodes)": collect.mode == "stream",
        "collect.hints shows solutions as well (remove one of the two)": bool(collect.hints),
    }
    lack = next((reason for reason, so in lacks.items() if so), None)
    if lack:
        raise CapabilityError(
            f"algorithm.guide.kind ({guide.kind}) learns from demonstrations of the env, and {lack}; or set "
            "algorithm.guide.kind: none"
        )
