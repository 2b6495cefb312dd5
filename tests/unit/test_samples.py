"""Episodes in words: evaluation writes the first ones down, and the report shows them before and after training."""

import json
import re

import pytest

from embodied_rl.config import build_recipe
from embodied_rl.report_evaluation import samples
from embodied_rl.results import EvaluationResult
from embodied_rl.train import run
from tests.kit import TOYS


def recipe(folder, policy, **more):
    return build_recipe({
        "name": "run", "threads": 1, "env": {"type": str(TOYS / "told.py")}, "policy": {"type": policy, "hidden": [8]},
        "algorithm": {"type": "ppo", "update": {"epochs": 4, "minibatches": 1, "lr": 0.02}}, "collect": {"copies": 16, "decisions": 12},
        "train": {"env_steps": 2000}, "evaluate": {"episodes": 6, "copies": 4, "videos": 3} | more, "log": {"folder": str(folder), "tensorboard": False, "progress": False},
    })  # fmt: skip


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return run(recipe(tmp_path_factory.mktemp("runs"), str(TOYS / "pretrained.py"))).folder


def test_the_first_episodes_are_written_down_whole(folder):
    result = EvaluationResult.load(folder / "evaluation.json")
    assert list(result.transcripts) == [0, 1, 2]
    for number, text in result.transcripts.items():
        first, *steps = text.split("\n")
        assert first == f"start {int(result.seed[number]) % 1000} <of all>"
        assert len(steps) == int(result.length[number]) and all(s.startswith("do ") for s in steps)
    assert result.transcripts[0].endswith("do 1 in 1") == bool(result.success_once[0])


def test_weights_worth_measuring_are_evaluated_before_training_too(folder, tmp_path):
    start = EvaluationResult.load(folder / "evaluation_start.json")
    assert list(start.transcripts) == [0, 1, 2]
    assert "since_start" in json.loads((folder / "summary.json").read_text())["evaluation"]["heldout"]
    plain = run(recipe(tmp_path, "mlp", videos=0)).folder
    assert not (plain / "evaluation_start.json").exists()
    assert EvaluationResult.load(plain / "evaluation.json").transcripts == {}, "videos: 0 writes nothing down"


def test_the_report_shows_them_side_by_side(folder):
    page = (folder / "report.html").read_text()
    assert "<h2>Samples before and after training</h2>" in page
    table = re.search(r"<table class='results words'>(.*?)</table>", page, re.DOTALL)[1]
    assert table.count("<tr>") == 4 and "&lt;of all&gt;" in table and "<of all>" not in table
    after = EvaluationResult.load(folder / "evaluation.json")
    assert table.count("class='success'") >= int(after.success_once[:3].sum()) > 0


def episode(text, **more):
    return {"task": "walk", "success_once": True, "transcript": text} | more


def test_what_both_begin_with_is_shown_once():
    page = samples({"episodes": [episode("question\nreply: 1\nscore 0", success_once=False)]}, {"episodes": [episode("question\nreply: 2\nscore 1")]})
    assert "<td class=''>question</td><td class='failure'>reply: 1\nscore 0</td><td class='success'>reply: 2\nscore 1</td>" in page
    same = samples(*[{"episodes": [episode("question\nreply: 1")]}] * 2)
    assert same.count("<td class='success'>reply: 1</td>") == 2
    alone = samples(None, {"episodes": [{"task": "walk"}, episode("question\nx" * 2000, invalid=True)]})
    assert "Samples after training" in alone and " …</td>" in alone and "class='success'" not in alone
    assert samples(None, {"episodes": [{"task": "walk"}]}) == samples(None, None) == ""
