"""The metrics table and the partial sums."""

import math
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from embodied_rl.metrics import GROUPS, METRICS, Partials, check_keys, deterministic, find, metrics_markdown

ROOT = Path(__file__).parents[2]


def test_the_documentation_page_is_generated_from_the_table():
    assert (ROOT / "docs" / "metrics.md").read_text() == metrics_markdown(), "run: python scripts/generate_docs.py"


def test_every_metric_is_on_the_page_once():
    page = metrics_markdown()
    for key in METRICS:
        assert page.count(f"| `{key}` |") == 1


@pytest.mark.parametrize("key", METRICS)
def test_names_follow_the_convention(key):
    metric = METRICS[key]
    assert key.split("/")[0] in GROUPS
    assert re.fullmatch(r"[a-z]+(/[a-z0-9_<>]+)+", key)
    assert metric.meaning and "approx" not in key
    if key.startswith("time/"):
        assert key.endswith("_s") and metric.unit == "s"
    if key.endswith("_rate") and not key.startswith("perf/"):
        assert metric.unit == "1"


@pytest.mark.parametrize(
    ("key", "row"),
    [
        ("actor/kl_k3", "actor/kl_k3"),
        ("rollout/success_once_rate/push", "rollout/success_once_rate/<task>"),
        ("rollout/return_mean/ALE/Pong-v5", "rollout/return_mean/<task>"),
        ("rollout/reward_grasp_mean", "rollout/reward_<term>_mean"),
        ("eval/heldout/success_rate", "eval/<suite>/success_rate"),
        ("eval/heldout/success_low95/lift", "eval/<suite>/success_low95/<task>"),
    ],
)
def test_a_logged_key_finds_its_row(key, row):
    assert find(key) is METRICS[row]


@pytest.mark.parametrize("key", ["actor/approx_kl", "eval/success_rate", "rollout/reward_grasp", "eval/<suite>/succes", "kl_k3"])
def test_an_unknown_key_has_no_row(key):
    assert find(key) is None


def test_unknown_keys_are_named_all_at_once_with_the_nearest_one():
    check_keys(["actor/kl_k1", "time/rollout_s"])
    with pytest.raises(KeyError) as error:
        check_keys(["actor/entropies", "actor/kl_k1", "critic/losses"])
    assert error.value.args[0] == (
        "metrics without a row in METRICS: 'actor/entropies'; did you mean 'actor/entropy'?; 'critic/losses'; did you mean 'critic/loss'?"
    )


def test_a_mean_of_unequal_parts_is_the_mean_of_all():
    parts = Partials()
    parts.add("actor/entropy", 6.0, 3)
    parts.add("actor/entropy", 1.0, 1)
    assert parts.reduce() == {"actor/entropy": 1.75}


def test_a_mean_of_nothing_is_absent_and_a_sum_of_nothing_is_zero():
    parts = Partials()
    parts.add("rollout/return_mean", 0.0, 0.0)
    parts.add("actor/skipped_updates", 0.0, 0.0)
    assert parts.reduce() == {"actor/skipped_updates": 0.0}
    assert parts.value("rollout/return_mean") is None and parts.value("never heard of") is None


def test_the_table_says_which_parts_are_summed():
    parts = Partials()
    for _ in range(3):
        parts.add("actor/skipped_updates", 2.0, 1.0)
        parts.add("actor/grad_norm", 2.0, 1.0)
    assert parts.reduce() == {"actor/skipped_updates": 6.0, "actor/grad_norm": 2.0}


def test_a_maximum_keeps_the_largest_and_does_not_hide_nan():
    parts = Partials()
    for value in (1.0, 3.0, 2.0):
        parts.maximum("actor/ratio_max", value)
    assert parts.value("actor/ratio_max") == 3.0
    parts.maximum("actor/ratio_max", math.nan)
    parts.maximum("actor/ratio_max", 9.0)
    assert math.isnan(parts.reduce()["actor/ratio_max"])


def test_the_last_value_wins():
    parts = Partials()
    parts.last("actor/lr", 1.0)
    parts.last("actor/lr", 0.5)
    other = Partials()
    other.last("actor/lr", 0.25)
    parts.merge(other)
    assert parts.value("actor/lr") == 0.25


def test_selecting_parts_leaves_the_original_alone():
    parts = Partials()
    parts.add("actor/loss", 1.0)
    parts.maximum("actor/ratio_max", 1.0)
    parts.last("actor/lr", 1.0)
    only = parts.only("actor/lr", "actor/loss")
    only.add("actor/loss", 9.0)
    assert set(only.reduce()) == {"actor/lr", "actor/loss"}
    assert parts.without("actor/lr").reduce() == {"actor/loss": 1.0, "actor/ratio_max": 1.0}
    assert parts.value("actor/loss") == 1.0


finite = st.floats(-1e6, 1e6)


@given(st.lists(finite, min_size=1), st.data())
def test_how_the_parts_are_split_changes_nothing(values, data):
    cut = data.draw(st.integers(0, len(values)))
    whole, left, right = Partials(), Partials(), Partials()
    for target, part in ((whole, values), (left, values[:cut]), (right, values[cut:])):
        target.add("actor/loss", sum(part), len(part))
        for v in part:
            target.maximum("actor/ratio_max", v)
    left.merge(right)
    merged, once = left.reduce(), whole.reduce()
    assert merged.keys() == once.keys()
    assert merged["actor/ratio_max"] == once["actor/ratio_max"] == max(values)
    assert merged["actor/loss"] == pytest.approx(math.fsum(values) / len(values), rel=1e-9, abs=1e-6)


def test_pairs_merge_like_single_parts():
    parts = Partials()
    parts.merge_pairs({"critic/value_mean": (3.0, 2.0)})
    parts.merge_pairs({"critic/value_mean": (1.0, 2.0)})
    assert parts.reduce() == {"critic/value_mean": 1.0}


def test_wall_time_and_speed_are_kept_apart_from_what_a_seed_decides():
    row = {"actor/loss": 1.0, "time/update_s": 2.0, "perf/env_steps_per_s": 3.0, "progress/update": 4}
    assert deterministic(row) == {"actor/loss": 1.0, "progress/update": 4}
