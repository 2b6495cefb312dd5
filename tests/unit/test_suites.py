"""Suites: the same starts in an env with some settings changed, before training and after it."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from embodied_rl.cli import main
from embodied_rl.config import build_recipe, dump_recipe, load_recipe, load_resolved
from embodied_rl.errors import ConfigError
from embodied_rl.results import EvaluationResult
from embodied_rl.seeding import start_seed
from embodied_rl.suites import Suite, check_suites, evaluation_file, suites_of
from embodied_rl.video import read_mp4
from tests.kit import Scripted, unwrapped

HURRIED = "evaluate.suites.hurried.max_steps=3"
TRAINING = ("evaluate.every=1", "algorithm.update.lr=0.1")
FILMED = f"env.type={Path(__file__).parents[1] / 'toys' / 'filmed.py'}"
CPU = torch.device("cpu")


def episodes(run, name):
    return EvaluationResult.load(run / name)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, toy_run):
    """A run with a suite that started from another run."""
    folder = tmp_path_factory.mktemp("suites")
    recipe = str(toy_run.parent / "toy.yaml")
    changes = [f"start_from={toy_run}", f"log.folder={folder}", "evaluate.videos=3", FILMED]
    assert main(["train", recipe, "name=second", *TRAINING, HURRIED, *changes]) == 0
    return folder / "second"


def test_a_suite_plays_the_same_starts_in_a_changed_env(pair):
    heldout, hurried = (episodes(pair, evaluation_file(name)) for name in ("heldout", "hurried"))
    assert torch.equal(heldout.seed, hurried.seed) and torch.equal(heldout.task, hurried.task)
    assert heldout.seed.tolist() == [start_seed(0, "eval", 0, i) for i in range(8)], "not those that chose the best checkpoint"
    assert heldout.length.max() == 10 and hurried.length.max() == 3
    summary = json.loads((pair / "summary.json").read_text())["evaluation"]
    assert list(summary) == ["heldout", "hurried"] and summary["hurried"]["overall"]["length_mean"] == 3
    gap = summary["hurried"]["against_heldout"]["all"]
    rates = [summary[name]["overall"]["success_once"]["rate"] for name in ("hurried", "heldout")]
    assert gap["difference"] == pytest.approx(rates[0] - rates[1]) and gap["episodes"] == 8


def test_a_chunk_that_departs_from_the_protocol_is_told_after_a_final_evaluation_alone(toy_run, caplog):
    recipe = load_resolved(toy_run / "recipe.yaml").recipe
    suite = Suite(recipe)
    suite.open(CPU).manifest = lambda: {"protocol": {"chunk": 3}}
    policy = Scripted(lambda obs: torch.zeros(len(obs["position"]), 2, 2), lambda obs: None, chunk=2, has_critic=False)
    departures = []
    for final in (False, True):
        caplog.clear()
        result = suite.run(policy, CPU, 2, final=final)
        departures.append((result.manifest["policy"]["departures"], len(caplog.messages)))
    suite.close()
    assert departures == [("policy.chunk: 2", 0), ("policy.chunk: 2", 1)]


def test_the_policy_that_training_starts_from_plays_every_suite_too(pair, toy_run):
    before = episodes(pair, evaluation_file("heldout", start=True))
    first = episodes(toy_run, "evaluation.json")
    assert torch.equal(before.returns, first.returns), "the start is the policy of the first run"
    assert episodes(pair, evaluation_file("hurried", start=True)).length.max() == 3
    suites = json.loads((pair / "summary.json").read_text())["evaluation"]
    for name in ("heldout", "hurried"):
        assert suites[name]["start"]["overall"] == episodes(pair, evaluation_file(name, start=True)).to_dict()["overall"]
        assert suites[name]["since_start"]["all"]["episodes"] == 8


def test_the_first_episodes_are_filmed_before_and_after_training(pair):
    before, after = (episodes(pair, evaluation_file("heldout", start=start)) for start in (True, False))
    index = json.loads((pair / "videos" / "pairs" / "index.json").read_text())
    assert index["fps"] == 10 and len(index["pairs"]) == 3
    for i, shown in enumerate(index["pairs"]):
        assert shown["task"] == ("first", "second")[i % 2] and shown["instruction"] == f"to the {shown['task']}"
        for when, result in (("before", before), ("after", after)):
            facts = {"success": bool(result.success_once[i]), "length": int(result.length[i]), "return": float(result.returns[i])}
            assert shown[when] == facts
        film = read_mp4(pair / "videos" / "pairs" / shown["file"]).astype(int)
        assert len(film) == max(shown["before"]["length"], shown["after"]["length"]) + 1
        left, right = film[:, :, :192], film[:, :, 196:]
        assert np.abs(left[0] - right[0]).mean() < 1 < np.abs(left[-1] - right[-1]).mean(), "one start, two policies"
        first, second = (sorted((pair / "videos" / folder).glob(f"{i:02d}_*.mp4"))[0] for folder in ("before", ""))
        assert np.abs(left[len(read_mp4(first)) - 1] - read_mp4(first)[-1]).mean() < 1, "before is on the left"
        assert np.abs(right[len(read_mp4(second)) - 1] - read_mp4(second)[-1]).mean() < 1
    assert (pair / "report.html").read_text().count("<video") == 3


def test_suites_are_played_at_the_end_only(pair):
    keys = {key for line in (pair / "metrics.jsonl").read_text().splitlines() for key in json.loads(line)}
    assert any(key.startswith("eval/heldout/") for key in keys) and not any("hurried" in key for key in keys)


def test_a_suite_changes_nothing_of_the_training(pair, toy_run, tmp_path):
    recipe = str(toy_run.parent / "toy.yaml")
    assert main(["train", recipe, "name=plain", *TRAINING, f"start_from={toy_run}", f"log.folder={tmp_path}"]) == 0
    rows = [[json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()] for run in (pair, tmp_path / "plain")]
    for one, two in zip(*rows, strict=True):
        assert {k: v for k, v in one.items() if k[:5] not in ("time/", "perf/")} == {
            k: v for k, v in two.items() if k[:5] not in ("time/", "perf/")
        }


def test_evaluating_a_run_by_hand_plays_its_suites_and_compares_them(pair, capsys):
    assert main(["evaluate", str(pair), "--episodes", "6"]) == 0
    shown = unwrapped(capsys.readouterr().out)
    assert "second: 6 held-out episodes, greedy" in shown and "second, hurried: 6 held-out episodes" in shown
    assert "A = hurried, B = heldout, on the same starts" in shown
    assert main(["evaluate", str(pair), str(pair), "--episodes", "4"]) == 0
    assert "do not show a difference" in unwrapped(capsys.readouterr().out)


def test_a_recipe_with_suites_survives_the_run_folder(toy):
    recipe = load_recipe("toy.yaml", [HURRIED, "evaluate.suites.both={max_steps: 4, reward: sparse}"]).recipe
    (toy / "recipe.yaml").write_text(dump_recipe(recipe))
    again = load_resolved(toy / "recipe.yaml").recipe
    assert again == recipe and build_recipe(recipe.dump()) == recipe
    assert [s.name for s in suites_of(again)] == ["heldout", "hurried", "both"]
    assert Suite(again, "both").recipe.env.max_steps == 4 and Suite(again).recipe.env == again.env
    assert again.env.max_steps == 10
    assert load_recipe("toy.yaml", [HURRIED.partition(".hurried")[0] + "=null"]).recipe.evaluate.suites is None


@pytest.mark.parametrize(
    ("suites", "message"),
    [
        ("hurried: {max_stepz: 3}", "my.yaml:3: evaluate.suites.hurried.max_stepz: unknown key; did you mean 'max_steps'?"),
        ("hurried: {max_steps: 0}", "my.yaml:3: evaluate.suites.hurried.max_steps: expected greater than or equal to 1, got 0"),
        ("hurried: {}", "my.yaml:3: evaluate.suites.hurried: changes no setting of env; change one, or remove it"),
        ("same: {max_steps: 10}", "my.yaml:3: evaluate.suites.same: changes no setting of env; change one, or remove it"),
        ("other: {type: tabletop}", "my.yaml:3: evaluate.suites.other.type: a suite stays in the recipe's env; remove it"),
        (
            "heldout: {max_steps: 3}",
            "my.yaml:3: evaluate.suites: 'heldout' is the suite that changes nothing; give this one another name",
        ),
        ("hurried: 3", "my.yaml:3: evaluate.suites.hurried: expected a section, got 3"),
    ],
)
def test_a_suite_that_cannot_be_meant_is_refused(suites, message, toy, capsys):
    (toy / "my.yaml").write_text(f"extends: toy.yaml\nevaluate:\n  suites: {{{suites}}}\n")
    assert main(["train", "my.yaml"]) == 2
    lines = capsys.readouterr().err.splitlines()
    assert lines[0].startswith("error: 1 problem in the recipe") and lines[1:] == [f"  {message}"]


def test_a_suite_that_the_policy_could_not_play_is_told_before_training(toy):
    recipe = load_recipe("tabletop_demo", ["evaluate.suites.hard.tasks=[reach]"]).recipe
    with pytest.raises(ConfigError, match=r"evaluate.suites.hard changes the env's tasks, so the policy could not play it"):
        check_suites(recipe, CPU)
    hurried = load_recipe("toy.yaml", [HURRIED]).recipe
    shortest = hurried.evaluate.suites["hurried"]["max_steps"]
    check_suites(hurried, CPU, chunk=shortest)
    with pytest.raises(ConfigError, match=rf"hurried: an episode has {shortest} control steps, and a decision of the policy covers {shortest + 1}"):
        check_suites(hurried, CPU, chunk=shortest + 1)


def test_a_suite_shorter_than_a_decision_stops_a_run_before_it_begins(toy, capsys):
    assert main(["train", "toy.yaml", HURRIED, "policy.chunk=9"]) == 2
    assert "hurried: an episode has" in capsys.readouterr().err
