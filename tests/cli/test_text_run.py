"""A language model on text tasks through the command line: first weights measured, training, samples in the report."""

import json

import pytest

from embodied_rl.cli import main
from embodied_rl.config import dump_recipe
from embodied_rl.envs.text.task import Question
from embodied_rl.envs.text.tasks import build_task
from tests.resume import lab
from tests.toys.tiny_lm import tiny_lm

UPDATE = {"epochs": 1, "minibatches": 1, "lr": 1e-3, "micro_units": 16, "logp_gap": {"do": "recompute", "above": 0.0}}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    # Few characters, all others <unk>: replies at random are numbers, and some of them right.
    return str(tiny_lm(tmp_path_factory.mktemp("lm") / "tiny", characters="0123456789", hidden=32))


def recipe(model, **changes):
    """One-digit sums whose last number counts: random replies are right now and then, so that groups have contrast."""
    text = {"type": "text", "model": model, "tasks": [{"task": "arithmetic", "digits": [1, 1], "answer": "last_number"}], "max_context": 80, "max_reply": 2}
    data = {
        "env": text, "policy": {"type": "causal_lm", "model": model, "logp": "decoder"},
        "algorithm": {"type": "grpo", "update": UPDATE}, "collect": {"mode": "episodes", "group_size": 8, "copies": 256, "decisions": 1},
    }  # fmt: skip
    return lab.recipe(updates=2, **lab.lay(data, changes))


def test_a_stopped_run_on_text_ends_with_the_same_bits(model, tmp_path):
    wanted = recipe(model)
    rows, state = lab.go(wanted, tmp_path / "whole")
    assert all(row["rollout/return_std"] > 0 for row in rows), "no reply was right: nothing was learned"
    assert rows[0]["actor/ratio_max"] == rows[1]["actor/ratio_max"] == 1.0
    parts = [row for i, until in enumerate((1, -1)) for row in lab.go(wanted, tmp_path / "run", until=until, resume=i > 0)[0]]
    last = lab.state_of(tmp_path / "run" / "checkpoints")
    assert parts == rows and lab.differing(last, state) == []


def test_the_report_shows_what_was_said_before_and_after(model, tmp_path):
    file = tmp_path / "sums.yaml"
    file.write_text(dump_recipe(recipe(model, evaluate={"videos": 3})), encoding="utf-8")
    assert main(["train", str(file), f"log.folder={tmp_path}", "name=sums"]) == 0
    said = {}
    for when in ("evaluation_start", "evaluation"):
        episodes = json.loads((tmp_path / "sums" / f"{when}.json").read_text())["episodes"]
        said[when] = [e["transcript"].split("\n")[0] for e in episodes if "transcript" in e]
    assert said["evaluation_start"] == said["evaluation"] and len(said["evaluation"]) == 3
    page = (tmp_path / "sums" / "report.html").read_text(encoding="utf-8")
    assert "Samples before and after training" in page and all(question in page for question in said["evaluation"])


@pytest.mark.parametrize(
    ("reply", "reply_only", "last_number"),
    [
        ("46", 1, 1), (" 46.", 1, 1), ("12 + 34 = 46", 0, 1), ("It is 46, of course", 0, 1), ("46 or 47", 0, 0), ("12 + 34 =", 0, 0),
        ("-46", 0, 0), ("146", 0, 0), ("4.46", 0, 0), ("46.5", 0, 0), ("", 0, 0), ("forty-six", 0, 0),
    ],
)  # fmt: skip
def test_where_the_answer_of_a_sum_stands(reply, reply_only, last_number):
    question = Question("What is 12 + 34?", "46")
    for answer, right in (("reply", reply_only), ("last_number", last_number)):
        assert build_task({"task": "arithmetic", "answer": answer}).score(question, reply) == right


def test_a_large_sum_may_have_commas_and_a_negative_one_its_sign():
    task = build_task({"task": "arithmetic", "answer": "last_number"})
    assert task.score(Question("", "1234"), "= 1,234") == 1 and task.score(Question("", "-5"), "3 - 8 = -5") == 1
    assert task.score(Question("", "5"), "13-5") == 1  # a minus without a space before its number belongs to both
