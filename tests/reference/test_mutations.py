"""Would the tests notice? Each mutation breaks one function on purpose, and a named test must fail for it.

The table is explained in README.md. A mutation whose text is gone fails with a sentence: whoever rewrites a function
rewrites its mutations too.
"""

import importlib
import inspect
import textwrap
from dataclasses import dataclass, field

import pytest

from embodied_rl.credit import Credit

FUTURE_ANNOTATIONS = 0x1000000
"""Compiler flag of `from __future__ import annotations`, which the mutated modules use."""


@dataclass(frozen=True)
class Mutation:
    """In the source of `where` replace `old` by `new`; then `test` must fail."""

    where: str
    old: str
    new: str
    test: str
    given: dict = field(default_factory=dict)

    def __str__(self):
        return f"{self.where.partition(':')[2]}: {self.old.strip()} -> {self.new.strip() or 'nothing'}"


GAE, RETURN = "embodied_rl.advantage:gae", "embodied_rl.advantage:return_to_go"
BASELINE, SCALE, WHITEN = (f"embodied_rl.advantage:{n}" for n in ("subtract_baseline", "scale", "whiten"))
CHAIN, REWARD_STD = "embodied_rl.credit:CreditChain.__call__", "embodied_rl.credit:CreditChain._reward_std"
POST, FIT = "embodied_rl.credit:CreditChain._post", "embodied_rl.credit:fit_metrics"
SURROGATE, CELL, WEIGHTS, KL = (f"embodied_rl.loss:{n}" for n in ("surrogate", "by_cell", "cell_weights", "kl_estimate"))
BINS, VALUE = "embodied_rl.value_loss:hl_gauss_targets", "embodied_rl.loss:value_loss"
LOSS = "embodied_rl.loss:LossFunction.__call__"
FLATTEN, SHUFFLE = "embodied_rl.batch:flatten", "embodied_rl.batch:_shuffle"
MLP = "embodied_rl.policies.mlp:MlpPolicy"
CHAINS, SCALE_OF_ACTIONS = "embodied_rl.policies._chains", "embodied_rl.policies._trunk:ActionScale"
MIDDLE = "embodied_rl.policies._ordered:MiddleDraw"
FLOW, TOKENS = "embodied_rl.policies.tiny_vla_flow", "embodied_rl.policies.tiny_vla_tokens:TokenPolicy"
PROPERTIES, SELECTION = "tests.properties.", "tests.unit.test_selection:"
POTENTIAL, SHAPING = "embodied_rl.shaping:potential_reward", "embodied_rl.shaping:Shaping"
SRPO = "embodied_rl.rewards.self_referential"
CHUNKS = (3, 1, True, "stream")
SPOILT = "tests.resume.test_non_finite:test_what_is_learned_beside_a_spoilt_episode_is_what_the_others_say"

MUTATIONS = [
    # generalised advantage estimates
    Mutation(GAE, "torch.where(terminated, zero, next_value)", "next_value", "test_gae:test_nothing_follows_a_termination_whatever_its_next_value_says"),
    Mutation(GAE, "torch.where(terminated, zero", "torch.where(terminated | truncated, zero", "test_gae:test_one_time_limit_has_one_answer"),
    Mutation(GAE, "~(terminated | truncated)", "~terminated", "test_gae:test_a_truncation_bootstraps_from_the_state_that_followed_and_stops_the_sum"),
    Mutation(GAE, "~(terminated | truncated)", "~truncated", "test_gae:test_nothing_follows_a_termination_whatever_its_next_value_says"),
    Mutation(GAE, "reward + discount *", "discount * reward +", "test_gae:test_lambda_0_gives_one_step_errors"),
    Mutation(GAE, "- value\n", "+ value\n", "test_gae:test_lambda_0_gives_one_step_errors"),
    Mutation(GAE, "(discount * lam)", "discount", "test_gae:test_lambda_0_7_carries_0_63_of_what_lies_ahead"),
    Mutation(GAE, "(discount * lam)", "lam", "test_gae:test_lambda_1_gives_the_discounted_return_minus_the_value"),
    # returns, baselines, scales
    Mutation(RETURN, "(~done)", "torch.ones_like(done)", "test_credit:test_return_to_go_discounts_backwards_and_stops_at_the_end_of_an_episode"),
    Mutation(RETURN, "discount * (~done)", "(~done)", "test_credit:test_return_to_go_takes_a_discount_per_decision"),
    Mutation(BASELINE, "(total - score) / (count - 1)", "total / count", "test_credit:test_leave_one_out_subtracts_the_mean_of_the_others"),
    Mutation("embodied_rl.credit:subtract_baseline", "(total - score) / (count - 1)", "(total - score) / count", "test_policy_gradient:test_rloo_is_unbiased", {"returns": "trajectory"}),
    Mutation(BASELINE, "score - total / count", "score + total / count", "test_credit:test_group_mean_subtracts_the_mean"),
    Mutation(BASELINE, "score[valid]", "score.flatten()", "test_credit:test_batch_mean_subtracts_the_mean_of_everything_valid"),
    Mutation(BASELINE, "torch.where(equal_in_group(score, group, member), torch.zeros_like(score), centred)", "centred",
             "test_credit:test_equal_scores_give_exactly_zero_though_their_mean_rounds", {"reward": 0.1, "size": 10, "kind": "group_mean"}),
    Mutation(BASELINE, "torch.zeros_like(score) if equal else", "", "test_credit:test_equal_scores_give_exactly_zero_though_their_mean_rounds",
             {"reward": 0.1, "size": 10, "kind": "batch_mean"}),
    Mutation(SCALE, "(count - 1).clamp(min=1)", "count", "test_credit:test_grpo_divides_by_the_unbiased_standard_deviation_of_the_group"),
    Mutation(SCALE, ".sqrt().clamp(min=floor)", ".sqrt()", "test_credit:test_the_floor_bounds_the_divisor"),
    Mutation(SCALE, "mean.abs()", "score.abs()", "test_credit:test_max_rl_divides_by_the_mean_of_the_group"),
    Mutation(WHITEN, "torch.std_mean(chosen)", "torch.std_mean(x)", "test_credit:test_whitening_looks_at_valid_numbers_only_and_zeroes_the_rest"),
    Mutation(WHITEN, "(x - mean)", "x", "test_credit:test_whitening_brings_mean_0_and_unbiased_deviation_1"),
    Mutation(CHAIN, "score, counted = score[:1], counted[:1]", "score = score[:1].expand_as(score)",
             "test_credit:test_trajectory_scores_do_not_weigh_long_episodes_more"),
    Mutation("embodied_rl.credit:CreditChain._reward_and_discount", "gamma ** rollout.steps.to(reward.dtype)", "gamma",
             "test_credit:test_a_chunk_is_discounted_by_the_steps_it_really_executed"),
    Mutation(CHAIN, "target = raw + value", "target = raw", "test_credit:test_the_critic_target_is_the_unprocessed_advantage_plus_the_value"),
    Mutation(CHAIN, "counts = counts & ~equal", "pass", SELECTION + "test_groups_without_contrast_leave_the_denominators"),
    Mutation(CHAIN, "self._post(raw, counts)", "self._post(raw, rollout.valid)", SELECTION + "test_what_is_learned_from_does_not_know_what_was_dropped",
             {"name": "whiten"}),
    Mutation("embodied_rl.credit:CreditChain._compare", "counted, c.scale, c.scale_floor)[:, :copies]", "rollout.valid[: len(score)], c.scale, c.scale_floor)",
             SELECTION + "test_what_is_learned_from_does_not_know_what_was_dropped", {"name": "batch_std"}),
    Mutation("embodied_rl.credit:until_success", "rollout.solved < 2", "rollout.solved < 1", SELECTION + "test_returns_end_with_the_decision_that_succeeds"),
    Mutation("embodied_rl.credit:until_success", "rollout.terminated | (rollout.solved == 1)", "rollout.terminated",
             SELECTION + "test_the_critic_learns_that_nothing_follows_success"),
    Mutation("embodied_rl.record:Record._solved", " & ~(d", " & (d", SELECTION + "test_success_is_remembered_across_rollouts_until_the_episode_ends"),
    Mutation("embodied_rl.record:Record._solved", "self.c.episode_success.to(self.c.device)", "torch.zeros_like(self.c.episode_success)",
             SELECTION + "test_success_is_remembered_across_rollouts_until_the_episode_ends"),
    Mutation("embodied_rl.selection:join", "r.episode + episodes", "r.episode",
             SELECTION + "test_side_by_side_every_copy_has_the_advantages_and_rows_it_had_alone", {"credit": Credit(gamma=0.9)}),
    Mutation("embodied_rl.selection:join", "r.group + groups", "r.group",
             SELECTION + "test_side_by_side_every_copy_has_the_advantages_and_rows_it_had_alone", {"credit": Credit(gamma=0.9)}),
    Mutation("embodied_rl.selection:_extended", "changed[f.name][made:] = 0", "pass",
             SELECTION + "test_side_by_side_every_copy_has_the_advantages_and_rows_it_had_alone", {"credit": Credit(gamma=0.9)}),
    Mutation(POST, "x > 0", "x < 0", "test_credit:test_positive_and_negative_weights_and_the_clamp_come_last"),
    Mutation(REWARD_STD, "running * d + reward[t]", "running + reward[t]",
             "test_credit:test_the_running_reward_scale_is_the_deviation_of_all_discounted_returns_so_far"),
    Mutation(REWARD_STD, "delta**2", "delta", "test_credit:test_the_running_reward_scale_is_the_deviation_of_all_discounted_returns_so_far"),
    Mutation(REWARD_STD, "series[rollout.valid & torch.isfinite(series)]", "series[torch.isfinite(series)]",
             "test_credit:test_the_running_reward_scale_skips_decisions_after_the_end_of_an_episode"),
    Mutation(FIT, "1 - float", "float", "test_credit:test_explained_variance_by_hand"),
    # credit of units, further baselines, outcomes
    Mutation("embodied_rl.advantage:unit_gae", "delta + step * lam * ahead", "delta + lam * ahead", "test_unit_credit:test_token_level_gae_across_two_replies"),
    Mutation("embodied_rl.advantage:unit_gae", "ahead * goes_on[t]", "ahead", "test_unit_credit:test_nothing_flows_back_over_the_end_of_an_episode"),
    Mutation("embodied_rl.advantage:unit_gae", "step = torch.where(acts[t, :, a], one, step)", "pass", "test_unit_credit:test_token_level_gae_across_two_replies"),
    Mutation("embodied_rl.advantage:unit_gae", "acts[..., 0] |= ~mask.any(-1)", "pass", "test_unit_credit:test_a_reply_without_own_tokens_passes_reward_and_time_on"),
    Mutation("embodied_rl.credit:other_half", "weight * s - other", "s - other", "test_credit:test_canon_with_a_preferred_half_by_hand"),
    Mutation("embodied_rl.budget:share_out", "p * (1 - p) ** 2", "(1 - p) ** 2", "test_budget:test_three_starts_by_hand"),
    Mutation("embodied_rl.budget:share_out", "p**n * (1 - p)", "p**n", "test_budget:test_no_other_division_is_worth_more",
             {"low": 2, "high": 8, "total": 14}),
    Mutation("embodied_rl.rewards.majority:winner", "if r >= 0", "", "test_majority:test_void_episodes_have_no_vote"),
    Mutation("embodied_rl.rewards.majority:with_novelty", "if j != i and", "if", "test_majority:test_novelty_by_hand"),
    Mutation("embodied_rl.guide:Guided._gain", "0.5 * (q + 1)", "0.5", "test_guide:test_the_ratio_is_to_the_policy_before_the_update"),
    Mutation("embodied_rl.guide:Guided._advantage", "& member", "", "test_guide:test_void_episodes_set_no_baseline"),
    Mutation("embodied_rl.replay:ReplayBuffer.losses", "- self.baseline", "", "test_replay:test_masked_units_count_for_nothing"),
    Mutation("embodied_rl.replay:ReplayBuffer._keep", "- self.config.episodes", "- 99", "test_replay:test_episodes_above_the_quantile_of_recent_returns_are_kept_and_the_oldest_leave"),
    Mutation("embodied_rl.credit:other_half", "(1 - between) * (s - own)", "(s - own)", "test_credit:test_canon_by_hand"),
    Mutation("embodied_rl.credit:CreditChain._by_unit", "paid = on_last_unit(reward + penalty.sum(-1), mask) - penalty", "paid = on_last_unit(reward, mask) - penalty",
             "test_unit_credit:test_the_return_to_go_of_a_token_holds_the_penalties_of_itself_and_all_later_ones"),
    Mutation("embodied_rl.credit:CreditChain.__call__", "counts & ~rollout.greedy & ", "counts & ", "test_credit:test_a_greedy_copy_is_the_baseline_of_its_group_and_leaves"),
    Mutation("embodied_rl.outcome:against_others", "(total - own) / (count - 1)", "total / count", "test_outcome:test_scores_are_compared_with_the_others_of_the_group"),
    Mutation("embodied_rl.update:Updater._reset_reference", "moment.zero_()", "pass", "tests.unit.test_reference_policy:test_every_so_many_updates_the_policy_becomes_its_own_reference"),
    Mutation(SURROGATE, "bounded * advantage * (ratio / ratio.detach())", "bounded * advantage * ratio", "test_surrogate:test_as_a_weight_the_ratio_is_bounded_and_no_gradient_is_cut_off"),
    # the trust region
    Mutation(SURROGATE, "clipped, bounded, plain", "clipped, plain, bounded", "test_surrogate:test_clip_of_good_and_bad_actions_on_both_sides"),
    Mutation(SURROGATE, "1 - config.clip_low, 1 + config.clip_high) * advantage", "1 - config.clip_high, 1 + config.clip_low) * advantage",
             "test_surrogate:test_a_higher_upper_clip_lets_good_actions_grow_further"),
    Mutation(SURROGATE, "(advantage < 0) & ", "", "test_surrogate:test_the_dual_clip_bounds_the_loss_of_bad_actions_only"),
    Mutation(SURROGATE, "torch.where(below, floor, objective)", "objective", "test_surrogate:test_the_dual_clip_bounds_the_loss_of_bad_actions_only"),
    Mutation(SURROGATE, "clipped = bounded < plain", "clipped = bounded != plain", "test_surrogate:test_clip_of_good_and_bad_actions_on_both_sides"),
    Mutation(SURROGATE, "plain - advantage.abs() * ", "plain + advantage.abs() * ",
             "test_surrogate:test_the_quadratic_trust_region_peaks_at_its_edge_and_pulls_back_beyond_it"),
    Mutation(SURROGATE, "advantage.abs() * (ratio", "advantage * (ratio",
             "test_surrogate:test_the_quadratic_trust_region_peaks_at_its_edge_and_pulls_back_beyond_it"),
    Mutation(SURROGATE, "(ratio - 1) * advantage.sign() >", "(ratio - 1) >",
             "test_surrogate:test_the_quadratic_trust_region_peaks_at_its_edge_and_pulls_back_beyond_it"),
    # ratio levels and aggregation
    Mutation(CELL, "torch.where(mask, x, torch.zeros((), dtype=x.dtype, device=x.device))", "x", "test_levels:test_masked_units_neither_multiply_nor_count"),
    Mutation(CELL, "mask.view(shape).sum(-1)", "torch.full_like(total, shape[-1])", "test_levels:test_masked_units_neither_multiply_nor_count"),
    Mutation(CELL, "(n, chunk, a // chunk)", "(n, a // chunk, chunk)", "test_levels:test_units_are_ordered_control_step_by_control_step"),
    Mutation(CELL, "index_add(0, rows, total)[rows]", "index_add(0, rows, total)[rows * 0]", "test_levels:test_a_trajectory_multiplies_all_its_decisions_and_every_row_carries_it"),
    Mutation(CELL, 'if reduce == "mean":\n        total =', 'if reduce == "mean" and level != "trajectory":\n        total =',
             "test_levels:test_gspo_takes_the_geometric_mean_over_the_units_of_the_trajectory"),
    Mutation(WEIGHTS, "(per_row.clamp(min=1) * ", "(", "test_levels:test_the_weight_of_a_unit", {"aggregate": "decision_mean"}),
    Mutation(WEIGHTS, "(per_row > 0).sum()", "n * torch.ones(())", "test_levels:test_the_weight_of_a_unit", {"aggregate": "decision_mean"}),
    Mutation(WEIGHTS, "per_trajectory[rows]", "per_row", "test_levels:test_the_weight_of_a_unit", {"aggregate": "trajectory_mean"}),
    Mutation(WEIGHTS, "(length * present)", "length", "test_levels:test_the_weight_of_a_unit", {"aggregate": "constant"}),
    Mutation(WEIGHTS, "mask.to(torch.float32)", "torch.ones_like(mask, dtype=torch.float32)", "test_levels:test_the_weight_of_a_unit",
             {"aggregate": "unit_mean"}),
    # KL, values, the total
    Mutation(KL, "torch.expm1(-d", "torch.expm1(d", "test_kl:test_k1_and_k3_estimate_the_kl_without_bias"),
    Mutation(KL, "MAX_LOG_RATIO)) + d", "MAX_LOG_RATIO))", "test_kl:test_k1_and_k3_estimate_the_kl_without_bias"),
    Mutation(KL, "0.5 * d.square()", "d.square()", "test_kl:test_a_k2_penalty_has_the_gradient_of_the_reverse_kl"),
    Mutation(BINS, " * 2**0.5)", ")", "test_value_loss:test_hl_gauss_is_the_cross_entropy_of_the_labels"),
    Mutation(BINS, "target.clamp(low, high)", "target", "test_value_loss:test_hl_gauss_labels_are_the_normal_distribution_over_the_bins",
             {"y": 2.7, "support": (-1.0, 2.0, 7)}),
    Mutation(BINS, " / (cdf[..., -1:] - cdf[..., :1])", " / 2", "test_value_loss:test_hl_gauss_labels_are_the_normal_distribution_over_the_bins",
             {"y": 2.0, "support": (-1.0, 2.0, 7)}),
    Mutation(VALUE, "torch.maximum", "torch.minimum", "test_value_loss:test_the_clipped_loss_is_the_larger_of_two_errors"),
    Mutation(VALUE, "batch.value + (value - batch.value)", "(value - batch.target)",
             "test_value_loss:test_the_clipped_loss_is_the_larger_of_two_errors"),
    Mutation(VALUE, "-(labels", "(labels", "test_value_loss:test_hl_gauss_is_the_cross_entropy_of_the_labels"),
    Mutation(LOSS, "policy = -weighted_sum", "policy = weighted_sum", "test_surrogate:test_the_loss_is_the_negative_mean_and_its_gradient_points_uphill"),
    Mutation(LOSS, "torch.sub(total, entropy", "torch.add(total, entropy", "test_surrogate:test_the_entropy_bonus_is_subtracted_with_the_weight_of_its_cell"),
    Mutation(LOSS, "torch.add(total, kl_ref", "torch.sub(total, kl_ref", "test_kl:test_a_k3_penalty_has_the_gradient_of_the_forward_kl"),
    Mutation(LOSS, "evaluation.logp - batch.logp_ref", "batch.logp_ref - evaluation.logp", "test_kl:test_a_k3_penalty_has_the_gradient_of_the_forward_kl"),
    Mutation(LOSS, "alpha=c.value.coef", "alpha=1.0", "test_value_loss:test_the_value_loss_enters_the_total_with_its_coefficient_as_a_mean_over_decisions"),
    Mutation(LOSS, 'kl_estimate(-log_ratio, "k3")', 'kl_estimate(log_ratio, "k3")', "test_kl:test_the_reported_kl_is_from_the_old_to_the_new_policy"),
    Mutation(LOSS, ".clamp(-MAX_LOG_RATIO, MAX_LOG_RATIO)", "", "test_levels:test_huge_log_ratios_stay_finite"),
    # batches
    Mutation(FLATTEN, "masked_fill(~counts, 0)", "clone()",
             PROPERTIES + "test_nothing_leaks:test_decisions_after_the_end_and_masked_units_reach_no_weight_of_a_policy", {"level": "unit"}),
    Mutation(SHUFFLE, "if not whole:", "if True:",
             PROPERTIES + "test_batches:test_over_an_epoch_trajectory_mean_weighs_long_and_short_trajectories_alike", {"level": "unit"}),
    # collection
    Mutation("embodied_rl.record:Record._next_value", "out[step, copies] = x", "pass",
             PROPERTIES + "test_collector:test_the_last_observation_of_the_rollout_is_valued_and_so_is_every_true_last_state"),
    Mutation("embodied_rl.execute:_void", "rows & ~total.terminated", "rows & total.terminated", SPOILT, {"mode": "stream"}),
    Mutation("embodied_rl.execute:_void", "torch.zeros_like(x), x)", "x, x)", SPOILT, {"mode": "episodes"}),
    Mutation("embodied_rl.collect:execute", "active = mask & ~done", "active = mask", PROPERTIES + "test_collector:test_a_copy_stops_in_the_middle_of_a_chunk"),
    Mutation("embodied_rl.collect:execute", "total.obs = {k: v.clone() for k, v in total.obs.items()}", "pass",
             PROPERTIES + "test_collector:test_a_copy_stops_in_the_middle_of_a_chunk"),
    Mutation("embodied_rl.collect:decide", "index_copy_(0, rows, x)", "index_copy_(0, rows.flip(0), x)",
             PROPERTIES + "test_collector:test_decisions_of_a_shrinking_batch_have_the_log_probabilities_that_training_computes", {"name": "mlp"}),
    Mutation("embodied_rl.record:Record._next_value", "out[step, copies] = x", "out[step, copies] = values[: len(x)]",
             PROPERTIES + "test_collector:test_finished_copies_leave_the_inference_batch", {"parts": 1}),
    Mutation("embodied_rl.curriculum:TaskSampler.observe", "self.config.window) ** n", "self.config.window)", "tests.unit.test_curriculum:test_success_rates_and_probabilities_by_hand"),
    Mutation("embodied_rl.curriculum:TaskSampler.probabilities", "(1 - self.success)", "self.success",
             "tests.unit.test_curriculum:test_success_rates_and_probabilities_by_hand"),
    Mutation("embodied_rl.curriculum:TaskSampler.choose", "for s in seed.tolist()", "for s in group.tolist()",
             "tests.unit.test_curriculum:test_tasks_are_drawn_with_their_probabilities_by_the_seed_alone"),
    Mutation("embodied_rl.collect:execute", "total.steps + mask", "total.steps + 1", "test_episode_algebra:test_success_termination_and_truncation_in_the_middle_of_a_chunk",
             {"mode": "stream"}),
    Mutation("embodied_rl.collect:execute", "total.success_once | (success & mask)", "success & mask",
             "test_episode_algebra:test_success_termination_and_truncation_in_the_middle_of_a_chunk", {"mode": "episodes"}),
    Mutation("embodied_rl.record:Record._next_value", "pieces = list(self.finals)", "pieces = []",
             "test_episode_algebra:test_restarted_at_once_or_padded_an_episode_has_the_same_advantages", {"name": "gae", "chunk": 2}),
    # densities
    Mutation(f"{MLP}._log_prob", "logp - log_tanh_derivative", "logp + log_tanh_derivative",
             "test_distributions:test_the_density_of_squashed_actions_integrates_to_1", {"init_std": 0.6}),
    Mutation(f"{MLP}._log_prob", "value=-0.5", "value=-1.0", "test_distributions:test_log_probabilities_are_those_of_a_normal_distribution_per_unit",
             {"std": "free"}),
    Mutation(f"{MLP}._entropy", "weights / weights.sum()", "weights", "test_distributions:test_the_entropy_of_squashed_actions_is_the_integral_of_minus_p_log_p",
             {"init_std": 0.3}),
    # denoising chains
    Mutation(f"{CHAINS}:sde_step", "after - variance * d / (2 * now)", "after + variance * d / (2 * now)",
             "test_chains:test_with_many_steps_the_marginals_are_exact", {"process": "flow", "noise": 0.3}),
    Mutation(f"{CHAINS}:sde_step", "(variance * d).sqrt()", "variance.sqrt()", "test_chains:test_flow_steps_worked_by_hand"),
    Mutation(f"{CHAINS}:sde_step", "1 - after, 1 - now", "1 - now, 1 - after", "test_chains:test_flow_steps_worked_by_hand"),
    Mutation(f"{CHAINS}:sde_step", "torch.sin(math.pi / 2 * after) / torch.sin(math.pi / 2 * now)", "torch.sin(math.pi / 2 * now) / torch.sin(math.pi / 2 * after)",
             "test_chains:test_diffusion_steps_are_those_of_the_ddim_paper"),
    Mutation(f"{CHAINS}:_diffusion_step", " - std.square()", "", "test_chains:test_with_many_steps_the_marginals_are_exact",
             {"process": "diffusion", "noise": 1.0}),
    Mutation(f"{CHAINS}:_diffusion_step", "(x - sigma * noise)", "(x + sigma * noise)", "test_chains:test_diffusion_steps_with_noise_1_are_the_posterior_of_ddpm"),
    Mutation(f"{CHAINS}:ode_step", "x - answer", "x + answer",
             "test_chains:test_a_network_that_answers_the_target_finds_the_action_in_any_number_of_steps", {"process": "flow", "steps": 3}),
    Mutation(f"{CHAINS}:training_pair", "noise - action", "action - noise",
             "test_chains:test_a_network_that_answers_the_target_finds_the_action_in_any_number_of_steps", {"process": "flow", "steps": 1}),
    Mutation(f"{CHAINS}:training_pair", "torch.sin(math.pi / 2 * t)", "t",
             "test_chains:test_the_best_guess_of_the_target_is_the_perfect_answer", {"process": "diffusion"}),
    Mutation(f"{CHAINS}:gaussian_logp", "- std.log()", "+ std.log()", "test_chains:test_the_density_of_a_step"),
    # flow and diffusion policies
    Mutation(f"{FLOW}:FlowPolicy._answer", "if m > 1", "if m > 99", "test_vla_policies:test_the_probability_of_a_chain_is_that_of_its_gaussian_steps",
             {"case": "sde"}),
    Mutation(f"{CHAINS}:ChainConfig.learned_std", "torch.sigmoid", "torch.tanh", "test_vla_policies:test_the_learned_deviation_stays_within_its_bounds"),
    Mutation(f"{FLOW}:FlowPolicy._step", "self.now[k])", "self.after[k])", "test_vla_policies:test_the_probability_of_a_chain_is_that_of_its_gaussian_steps",
             {"case": "learned"}),
    Mutation(f"{FLOW}:FlowPolicy._step", ".clamp(min=self.config.min_std)", "", "test_vla_policies:test_the_probability_of_a_chain_is_that_of_its_gaussian_steps",
             {"case": "sde, floor"}),
    Mutation(f"{FLOW}:FlowPolicy._ode", "self.now[k], self.after[k])", "self.after[k], self.now[k])",
             "test_vla_policies:test_the_greedy_chunk_is_the_ode_from_the_middle_of_the_noise", {"case": "cfm"}),
    Mutation(f"{FLOW}:FlowPolicy._step", "flat = ode_step(self.config.process, x, answer, now, after)", "flat = ode_step(self.config.process, x, answer, after, now)",
             "test_vla_policies:test_the_greedy_chunk_is_the_ode_from_the_middle_of_the_noise", {"case": "sde"}),
    Mutation(f"{FLOW}:FlowPolicy._draw", "std * normal()", "normal()", "test_vla_policies:test_steps_are_drawn_from_the_gaussian_they_are_scored_with",
             {"case": "sde"}),
    Mutation(f"{FLOW}:FlowPolicy._draw", "chosen.eq(k)", "chosen.ne(k)", "test_vla_policies:test_with_one_noisy_step_the_others_follow_the_ode"),
    Mutation(f"{FLOW}:FlowPolicy._draw", "self.actor_log_std.exp()", "self.actor_log_std",
             "test_vla_policies:test_latent_noise_is_drawn_from_the_gaussian_it_is_scored_with"),
    Mutation(f"{CHAINS}:ChainConfig.by_unit", "x.transpose(1, 2).flatten(1, 2)", "x.flatten(1, 2)",
             "test_action_units:test_a_unit_is_what_a_step_says_of_a_control_step", {"case": "sde"}),
    Mutation("embodied_rl.batch:_taken", "begins <", "begins <=", "test_action_units:test_actions_after_the_end_of_an_episode_have_no_ratio", {"name": "flow"}),
    Mutation("embodied_rl.batch:_taken", " * (rollout.chunk // actions)", "", "test_action_units:test_an_action_that_is_held_was_taken_once_it_has_begun"),
    Mutation(FLATTEN, "mask = mask & rows(_taken(rollout, actions))", "mask = rows(_taken(rollout, actions))", "test_action_units:test_masked_units_are_masked_still"),
    Mutation(f"{CHAINS}:ChainConfig.total", "x.mean(-1)", "x.sum(-1)", "test_vla_policies:test_mean_divides_by_the_numbers_of_a_step", {"case": "sde"}),
    Mutation(f"{FLOW}:FlowPolicy._log_prob", "-self._matching_loss", "self._matching_loss",
             "test_vla_policies:test_the_ratio_of_cfm_is_that_of_the_matching_losses"),
    Mutation(f"{FLOW}:FlowPolicy._matching_loss", ".mean(1)", ".sum(1)", "test_vla_policies:test_the_ratio_of_cfm_is_that_of_the_matching_losses"),
    Mutation(f"{FLOW}:FlowPolicy.imitation_loss", " * self.now[0]", "", "test_vla_policies:test_flows_imitate_by_the_squared_error_of_their_answer",
             {"case": "diffusion"}),
    Mutation(f"{FLOW}:FlowPolicy.freeze_flow", "requires_grad_(False)", "requires_grad_(True)", "test_vla_policies:test_with_latent_only_actor_and_critic_learn"),
    # tokens
    Mutation(f"{TOKENS}._logits", "self.config.temperature if temperature is None else temperature", "temperature or 1.0",
             "test_vla_policies:test_the_probability_of_tokens_is_the_softmax_worked_out_one_after_the_other", {"decoding": "parallel", "temperature": 0.4}),
    Mutation(f"{TOKENS}._logits", "causal_mask(self.num_units, cache) if self.autoregressive else None", "None",
             "test_vla_policies:test_a_token_sees_those_before_it_and_no_later_one"),
    Mutation(f"{TOKENS}._logits", "units[:, :-1]", "units[:, 1:]",
             "test_vla_policies:test_the_probability_of_tokens_is_the_softmax_worked_out_one_after_the_other", {"decoding": "autoregressive", "temperature": 1.0}),
    Mutation(f"{TOKENS}._decode", " / self.config.temperature", "", "test_vla_policies:test_tokens_are_drawn_from_their_softmax",
             {"decoding": "autoregressive", "temperature": 0.3, "draws": 1}),
    Mutation(f"{TOKENS}._centre", " + 0.5", "", "test_vla_policies:test_what_a_token_does_is_the_middle_of_what_it_was_taught_for",
             {"decoding": "parallel", "bins": 5}),
    Mutation(f"{TOKENS}.imitation_loss", ", temperature=1.0", "", "test_vla_policies:test_tokens_imitate_by_the_cross_entropy_of_the_demonstrated_bins",
             {"decoding": "parallel"}),
    Mutation(f"{TOKENS}.imitation_loss", ".flatten(1) / 2 * bins", ".flatten(1) / 2 * (bins - 1)", "test_vla_policies:test_what_a_token_does_is_the_middle_of_what_it_was_taught_for",
             {"decoding": "autoregressive", "bins": 5}),
    Mutation("embodied_rl.policies.tiny_vla_tokens:gaussian_classes", "(0, 1), value=1.0", "(0, 1), value=0.0",
             "test_vla_policies:test_smoothed_tokens_imitate_by_the_cross_entropy_of_a_gaussian", {"decoding": "parallel"}),
    Mutation("embodied_rl.policies.tiny_vla_tokens:median_class", "< 0.5", "< 0.6",
             "test_vla_policies:test_the_median_is_the_bin_in_which_half_of_the_mass_is_reached", {"decoding": "parallel", "temperature": 1.0}),
    Mutation(f"{MIDDLE}.log_prob", "picked.squeeze(-1) + density", "density", "test_middle_draw:test_every_combination_of_draws", {"n": 3}),
    Mutation(f"{MIDDLE}.log_prob", "above + p * (1 - nodes)", "above + p * nodes", "test_middle_draw:test_every_combination_of_draws", {"n": 3}),
    Mutation(f"{MIDDLE}.entropy", "range(self.power + 1, n + 1)", "range(self.power, n + 1)", "test_middle_draw:test_every_combination_of_draws", {"n": 3}),
    Mutation(f"{MIDDLE}.sample", ".median(-1)", ".max(-1)", "test_middle_draw:test_draws_follow_it", {"n": 3}),
    Mutation("embodied_rl.policies._trunk:Foresight.loss", " / self.std", "", "test_vla_policies:test_flows_imitate_by_the_squared_error_of_their_answer",
             {"case": "sde"}),
    Mutation(f"{SCALE_OF_ACTIONS}.fit", ".clamp(min=0.01)", "", "test_vla_policies:test_the_scale_maps_the_range_to_1_and_back"),
    # sampling and training apart
    Mutation(LOSS, "objective * batch.correction", "objective / batch.correction", "test_logp_gap:test_the_objective_is_weighted_and_nothing_else_is"),
    Mutation("embodied_rl.update:Updater._mend", 'by_cell(logp - rows["logp"]', 'by_cell(rows["logp"] - logp',
             "test_logp_gap:test_correcting_gives_the_gradient_under_the_policy_itself"),
    Mutation("embodied_rl.update:Updater._mend", ".clamp(max=c.cap)", "", "test_logp_gap:test_correcting_gives_the_gradient_under_the_policy_itself"),
    Mutation("embodied_rl.update:Updater._mend", 'rows["logp"] = logp', "pass",
             "test_logp_gap:test_recomputing_gives_the_update_of_an_honest_sampler_bit_for_bit", {"masked": False, "micro_batch": None}),
    Mutation("embodied_rl.update:Updater._mend", "> c.above * count", ">= 0", "test_logp_gap:test_up_to_the_threshold_nothing_is_changed", {"do": "correct"}),
    Mutation("embodied_rl.update:Updater._step", "self._stepped = self._moved = True", "self._stepped = True",
             "test_logp_gap:test_the_gap_is_logged_in_every_update", {"method": "ppo", "mode": "stream"}),
    Mutation("embodied_rl.update:Updater._step", "if not len(batch) and measure:", "if False:",
             "test_logp_gap:test_the_gap_is_that_of_the_weights_that_sampled_where_something_else_makes_the_first_step"),
    # progress rewards
    Mutation(POTENTIAL, "discount * torch", "torch", "test_shaping:test_shaping_by_hand"),
    Mutation(POTENTIAL, "- now", "+ now", "test_shaping:test_every_policy_loses_the_potential_of_the_state_and_nothing_else", {"seed": 0}),
    Mutation(POTENTIAL, "over = terminated if bootstraps else terminated | truncated", "over = truncated",
             "test_shaping:test_every_policy_loses_the_potential_of_the_state_and_nothing_else", {"seed": 0}),
    Mutation(POTENTIAL, "terminated if bootstraps else terminated | truncated", "terminated",
             "test_shaping:test_with_a_time_limit_and_no_critic_every_policy_loses_the_potential_of_the_start", {"seed": 0}),
    Mutation(POTENTIAL, "terminated if bootstraps else terminated | truncated", "terminated | truncated",
             "test_shaping:test_advantages_are_the_same_for_a_critic_that_knows_the_shaping", {"lam": 0.7}),
    Mutation(f"{SHAPING}._potential", "rollout.steps.to(now.dtype)", "1", PROPERTIES + "test_episodes:test_the_shaping_of_an_episode_adds_up_to_the_difference_of_its_ends",
             {"case": CHUNKS, "gamma": 0.9}),
    Mutation(f"{SHAPING}._potential", "a[1:]", "a[:-1]", PROPERTIES + "test_episodes:test_the_shaping_of_an_episode_adds_up_to_the_difference_of_its_ends",
             {"case": CHUNKS, "gamma": 0.9}),
    Mutation(f"{SHAPING}._at_the_end", ' and (e.failed or self.config.use == "alone")', "", PROPERTIES + "test_episodes:test_the_outcome_is_paid_once_to_failures_where_they_end"),
    Mutation("embodied_rl.record:Record._final", "going = (d[\"valid\"][t - 1] & (row[t - 1] < 0))", "going = d[\"valid\"][t - 1]",
             PROPERTIES + "test_episodes:test_an_episode_shows_every_state_once_and_the_last_one_is_where_it_really_ended", {"case": CHUNKS}),
    Mutation(f"{SRPO}:progress", "* (0.5 - (d", "* (0.5 + (d", "test_self_referential:test_failures_are_scored_by_their_distance_to_the_nearest_cluster"),
    Mutation(f"{SRPO}:progress", "* (0.5 - (d - low)", "* (0.5 - d", "test_self_referential:test_failures_are_scored_by_their_distance_to_the_nearest_cluster"),
    Mutation(f"{SRPO}:distance", "amin(1)", "amax(1)", "test_self_referential:test_failures_are_scored_by_their_distance_to_the_nearest_cluster"),
    Mutation(f"{SRPO}:cluster", ">= neighbours", "> neighbours", "test_self_referential:test_successes_cluster_and_the_lonely_one_counts_for_nothing"),
    Mutation(f"{SRPO}:cluster", "torch.where(core, reached, label)", "reached", "test_self_referential:test_a_point_between_two_clusters_does_not_join_them"),
    Mutation(f"{SRPO}:cluster_centres", " * x.shape[1] ** 0.5", "", "test_self_referential:test_successes_cluster_and_the_lonely_one_counts_for_nothing"),
    Mutation(f"{SRPO}:SelfReferential._learn", "argmax()) + 1", "argmax())", "test_self_referential:test_the_reference_is_the_state_in_which_the_goal_first_held"),
    Mutation(f"{SRPO}:SelfReferential._learn", "e.failed and", "", "test_self_referential:test_a_potential_is_known_before_the_rollout_it_judges"),
    Mutation(f"{SRPO}:SelfReferential.judge", '"outcome"', '"potential"', "test_self_referential:test_a_potential_is_known_before_the_rollout_it_judges"),
    # the optimizer
    Mutation("embodied_rl.update:Updater._adapt", "self.lr / 1.5", "self.lr * 1.5",
             "test_optimizer:test_the_adaptive_step_shrinks_when_the_policy_moves_too_far_and_grows_when_it_hardly_moves"),
    Mutation("embodied_rl.update:Updater._move", "c.max_grad_norm / norm", "1 / norm",
             "test_optimizer:test_an_update_is_adamw_with_a_clipped_gradient_over_epochs_of_minibatches", {"max_grad_norm": 0.05, "weight_decay": 0.0}),
]  # fmt: skip


def resolve(where):
    """(owner, name, function) of "module:function" or "module:Class.method"."""
    module, _, path = where.partition(":")
    owner = importlib.import_module(module)
    *classes, name = path.split(".")
    for c in classes:
        owner = getattr(owner, c)
    return owner, name, inspect.unwrap(getattr(owner, name))


def broken(mutation, function):
    """The function with the mutation applied to its source, living beside the real one."""
    source = textwrap.dedent(inspect.getsource(function))
    found = source.count(mutation.old)
    assert found == 1, f"{mutation.where} holds {mutation.old!r} {found} times: the function was rewritten, rewrite its mutation"
    space = dict(vars(inspect.getmodule(function)))
    exec(compile(source.replace(mutation.old, mutation.new), f"<{mutation}>", "exec", flags=FUTURE_ANNOTATIONS), space)
    return space[function.__name__]


def find_test(name):
    """The function "module:test", of this folder unless the module is given in full."""
    module, _, test = name.partition(":")
    return getattr(importlib.import_module(module if "." in module else f"tests.reference.{module}"), test)


@pytest.mark.parametrize("mutation", MUTATIONS, ids=str)
def test_the_named_test_fails_for_the_mutation(mutation, monkeypatch):
    test = find_test(mutation.test)
    owner, name, function = resolve(mutation.where)
    replacement = broken(mutation, function)
    monkeypatch.setattr(owner, name, replacement)
    if vars(inspect.getmodule(test)).get(name) is function:
        # The test module imported the function by name.
        monkeypatch.setattr(inspect.getmodule(test), name, replacement)
    with pytest.raises(AssertionError):
        test(**mutation.given)


def test_the_named_tests_pass_when_nothing_is_broken():
    for test, given in {(m.test, tuple(sorted(m.given.items()))) for m in MUTATIONS}:
        find_test(test)(**dict(given))
