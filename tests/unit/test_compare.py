"""Loading trained policies, and comparing two of them on the same starts."""

import dataclasses
import io
import shutil

import pytest
import torch
from rich.console import Console

from embodied_rl import checkpoint
from embodied_rl.compare import (
    Paired,
    compare,
    evaluate_targets,
    load_policy,
    print_comparison,
    print_evaluation,
    print_targets,
    summarize,
    verdict,
)
from embodied_rl.errors import CapabilityError, CheckpointError, NotFoundError
from embodied_rl.results import EvaluationResult
from embodied_rl.stats import mcnemar, paired_difference


def result(success, tasks=("x", "y"), returns=None, **changes):
    e = len(success)
    once = torch.tensor(success, dtype=torch.bool)
    returns = torch.zeros(e, dtype=torch.float64) if returns is None else torch.tensor(returns, dtype=torch.float64)
    given = dict(
        tasks=tasks, run_seed=0, stream=0, split="eval", greedy=True, seedable=True, seed=torch.arange(e) * 2 + 1,
        task=torch.arange(e) % len(tasks), returns=returns, length=torch.full((e,), 5), success_once=once,
        success_at_end=torch.zeros(e, dtype=torch.bool),
    )  # fmt: skip
    return EvaluationResult(**(given | changes))


def text_of(print_function, *args):
    console = Console(width=140, record=True, file=io.StringIO())
    print_function(*args, console)
    return console.export_text()


def test_a_comparison_pairs_the_episodes_by_hand():
    a = result([1, 1, 1, 1, 0, 0], returns=[1, 2, 3, 4, 5, 6])
    b = result([1, 0, 0, 0, 1, 0], returns=[0, 0, 0, 0, 0, 0])
    c = compare(a, b)
    assert c.overall == Paired(both=1, only_a=3, only_b=1, neither=1)
    assert c.tasks == {"x": Paired(1, 1, 1, 0), "y": Paired(0, 2, 0, 1)}
    assert c.overall.p == mcnemar(3, 1) and c.overall.difference == paired_difference(1, 3, 1, 1)
    assert c.overall.rate_a.value == 4 / 6 and c.overall.rate_b.value == 2 / 6
    assert c.returns.value == 3.5 and c.returns.low < 3.5 < c.returns.high
    assert compare(a, b, success="at_end").overall == Paired(0, 0, 0, 6)


def test_what_training_changed_is_told_in_pairs():
    before, after = result([1, 0, 0, 0, 1, 0]), result([1, 1, 1, 1, 0, 0])
    suites = summarize({"heldout": after}, {"heldout": before})
    assert suites["heldout"]["start"] == before.to_dict() and suites["heldout"]["overall"] == after.to_dict()["overall"]
    changes = suites["heldout"]["since_start"]
    assert list(changes) == ["x", "y", "all"]
    paired = paired_difference(1, 3, 1, 1)
    assert changes["all"] == {
        "before": 2 / 6, "after": 4 / 6, "difference": paired.value, "low95": paired.low, "high95": paired.high,
        "p": mcnemar(3, 1), "episodes": 6,
    }  # fmt: skip
    assert (changes["x"]["before"], changes["x"]["after"], changes["y"]["episodes"]) == (2 / 3, 2 / 3, 3)


def test_a_suite_is_told_beside_the_held_out_one_in_pairs():
    heldout, easy = result([1, 0, 0, 0, 1, 0]), result([1, 1, 1, 1, 0, 0])
    suites = summarize({"heldout": heldout, "easy": easy}, {"heldout": heldout, "easy": heldout})
    paired = paired_difference(1, 3, 1, 1)
    assert suites["easy"]["against_heldout"]["all"] == {
        "difference": paired.value, "low95": paired.low, "high95": paired.high, "p": mcnemar(3, 1), "episodes": 6,
    }  # fmt: skip
    assert paired.value > 0, "the suite's success minus that of heldout"
    assert "against_heldout" not in suites["heldout"]
    assert suites["easy"]["start"]["against_heldout"]["all"]["difference"] == 0
    assert suites["easy"]["since_start"]["all"]["before"] == 2 / 6 and suites["easy"]["since_start"]["all"]["after"] == 4 / 6
    assert suites["heldout"]["since_start"]["all"]["difference"] == 0


def test_what_was_not_played_on_the_same_starts_is_told_without_a_difference():
    after = {"heldout": result([1, 1, 0, 0])}
    for before in (result([1, 0]), result([1, 0, 0, 0], seedable=False)):
        suite = summarize(after, {"heldout": before})["heldout"]
        assert suite["start"]["overall"]["success_once"]["successes"] == 1 and "since_start" not in suite
    assert "start" not in summarize(after)["heldout"] and "start" not in summarize(after, {})["heldout"]
    without = dataclasses.replace(result([0, 0]), success_once=None, success_at_end=None)
    assert "against_heldout" not in summarize({"heldout": without, "easy": without})["easy"]


def test_the_example_in_the_docstring_is_true():
    p = Paired(250, 32, 8, 10)
    assert (p.episodes, round(p.rate_a.value, 3), round(p.rate_b.value, 3), round(p.difference.value, 3)) == (300, 0.94, 0.86, 0.08)
    assert round(p.p, 4) == 0.0002


@pytest.mark.parametrize(
    "change",
    [
        {"seed": torch.arange(4) * 2 + 3},
        {"tasks": ("x", "z")},
        {"task": torch.zeros(4, dtype=torch.int64)},
    ],
)
def test_evaluations_on_other_starts_are_not_compared(change):
    with pytest.raises(CapabilityError, match="made on different starts .*4 episodes of x, y with seed 0; 4 episodes of x, "):
        compare(result([1, 0, 1, 0]), result([1, 0, 1, 0], **change))
    with pytest.raises(CapabilityError, match="made on different starts"):
        compare(result([1, 0, 1, 0]), result([1, 0]))


def test_evaluations_in_an_env_that_ignores_seeds_are_not_compared():
    with pytest.raises(CapabilityError, match="cannot be compared in pairs"):
        compare(result([1, 0]), result([1, 0], seedable=False))


def test_evaluations_in_an_env_that_ignores_seeds_are_compared_as_independent_samples():
    def told(*results, anyway=False):
        suites = [{"heldout": r} for r in results]
        return text_of(lambda console: print_targets(["runs/a", "runs/b"], suites, console, anyway=anyway))

    manifests = [{"engine": {}, "starts": {}, "env": {"packages": {"envpool": v}}, "frames": {}} for v in ("1", "2")]
    good = [1] * 56 + [0] * 14
    poor = [1] * 48 + [0] * 32
    a, b = (result(s, returns=s, seedable=False, manifest=manifests[0]) for s in (good, poor))
    shown = told(a, b)
    assert "on starts of their own (this env cannot repeat one)" in shown
    row = next(line for line in shown.splitlines() if "all" in line and "to" in line)
    assert [cell.strip() for cell in row.split("│")[1:-1]] == ["all", "0.800", "0.600", "+0.200", "+0.052 to +0.334", "70", "80"]
    assert "mean difference of returns +0.200 [+0.0" in shown and "McNemar" not in shown
    other = dataclasses.replace(b, manifest=manifests[1])
    with pytest.raises(CapabilityError, match="not made with the same simulator: packages.envpool is 1 in A and 2 in B"):
        told(a, other)
    assert "note: A = runs/a and B = runs/b were not made with the same simulator" in told(a, other, anyway=True)
    with pytest.raises(CapabilityError, match=r"are of different tasks \(x, y; x, z\)"):
        told(a, dataclasses.replace(b, tasks=("x", "z")))
    blind = [dataclasses.replace(r, success_once=None, success_at_end=None) for r in (a, b)]
    shown = told(*blind)
    assert "mean difference of returns +0.200" in shown and "A - B" not in shown


def test_without_success_only_the_returns_are_compared():
    a, b = (dataclasses.replace(result([0] * 4, returns=r), success_once=None, success_at_end=None) for r in ([1, 2, 3, 4], [0, 0, 0, 0]))
    c = compare(a, b)
    assert c.overall is None and c.tasks == {} and c.returns.value == 2.5
    assert "mean difference of returns +2.500" in text_of(print_comparison, c, ("a", "b"))


def test_the_verdict_says_no_more_than_the_test_does():
    assert verdict(Paired(10, 3, 1, 6)) == "20 starts do not show a difference between A and B (p = 0.62)"
    assert verdict(Paired(100, 30, 5, 65)) == "A solves 12.5 points more of the starts (p = 2.2e-05)"
    assert verdict(Paired(100, 5, 30, 65)).startswith("B solves 12.5 points more")


def test_both_tables_show_rates_intervals_and_the_test():
    a, b = result([1, 1, 1, 1, 0, 0]), result([1, 0, 0, 0, 1, 0])
    shown = text_of(print_evaluation, "runs/[a]", a)
    assert "runs/[a]: 6 held-out episodes, greedy" in shown and "0.667" in shown and "0.300–0.903" in shown
    shown = text_of(print_comparison, compare(a, b), ("runs/a", "runs/b"))
    assert "A = runs/a, B = runs/b" in shown and "+0.333" in shown and "6 starts do not show a difference" in shown


def test_a_run_loads_with_the_weights_of_its_newest_checkpoint(toy_run):
    loaded = load_policy(toy_run)
    try:
        assert loaded.checkpoint == checkpoint.resolve(toy_run) and loaded.recipe.name == "toy"
        weights = checkpoint.load(loaded.checkpoint)["policy"]
        own = loaded.policy.state_dict()
        assert set(own) == set(weights) and all(torch.equal(own[k], weights[k]) for k in own)
        assert loaded.env.spec.num_envs == 4
    finally:
        loaded.env.close()


def test_evaluating_a_run_again_gives_what_the_run_itself_measured(toy_run):
    stored = EvaluationResult.load(toy_run / "evaluation.json")
    again = evaluate_targets([toy_run])[0]["heldout"]
    assert torch.equal(again.seed, stored.seed) and torch.equal(again.success_once, stored.success_once)
    assert torch.equal(again.returns, stored.returns)


def test_two_checkpoints_meet_the_same_starts_whatever_their_own_settings(toy_run, tmp_path):
    other = tmp_path / "other"
    shutil.copytree(toy_run, other)
    text = (other / "recipe.yaml").read_text()
    assert "seed: 0" in text
    (other / "recipe.yaml").write_text(text.replace("seed: 0", "seed: 5"))
    a, b = (suites["heldout"] for suites in evaluate_targets([toy_run, other], episodes=6, copies=3))
    assert a.episodes == b.episodes == 6 and torch.equal(a.seed, b.seed)
    assert torch.equal(a.returns, b.returns), "the weights are the same, so everything is"
    assert compare(a, b).overall.p == 1.0


def test_sampling_instead_of_the_mode_is_an_option(toy_run):
    greedy, sampled = (evaluate_targets([toy_run], episodes=4, greedy=g)[0]["heldout"] for g in (True, False))
    assert greedy.greedy and not sampled.greedy and not torch.equal(greedy.returns, sampled.returns)


def test_what_cannot_be_loaded_is_told_in_a_sentence(toy_run, tmp_path):
    with pytest.raises(NotFoundError, match="no such run or checkpoint"):
        load_policy(tmp_path / "nothing")
    newest = checkpoint.resolve(toy_run)
    stray = tmp_path / "stray" / newest.name
    shutil.copytree(newest, stray)
    with pytest.raises(NotFoundError, match="lies outside a run folder"):
        load_policy(stray)
    other = tmp_path / "other"
    shutil.copytree(toy_run, other)
    text = (other / "recipe.yaml").read_text()
    assert "hidden: [8]" in text
    (other / "recipe.yaml").write_text(text.replace("hidden: [8]", "hidden: [16]"))
    with pytest.raises(CheckpointError, match="holds another policy: .*the policy has"):
        load_policy(other)
    empty = checkpoint.save(tmp_path / "run" / "checkpoints", {"policy": None}, update=1, keep=1)
    shutil.copy(toy_run / "recipe.yaml", tmp_path / "run")
    with pytest.raises(CheckpointError, match="holds no policy"):
        load_policy(empty)
