"""What goes wrong with text runs ends in one sentence and exit code 2, through the command line."""

import json
import shutil

import pytest
import torch

from embodied_rl.cli import main
from embodied_rl.policies.causal_lm import generator as lm
from tests.toys.tiny_lm import tiny_lm

QUESTION = '{"question": "What is 1 + 1?", "answer": "2"}\n'


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("models") / "tiny")


def run(tmp_path, capsys, model, **changes):
    """Exit code and what was told of one tiny run."""
    recipe = {
        "name": "r", "threads": 1, "device": "cpu",
        "env": {"type": "text", "model": str(model), "max_context": 300, "max_reply": 4, "tasks": ["arithmetic"]},
        "policy": {"type": "causal_lm", "model": str(model)}, "algorithm": {"type": "grpo", "update": {"epochs": 1, "minibatches": 1}},
        "collect": {"copies": 4, "group_size": 2, "decisions": 1, "mode": "episodes"}, "train": {"env_steps": 8},
        "evaluate": {"episodes": 0}, "log": {"folder": str(tmp_path), "tensorboard": False, "progress": False},
    }  # fmt: skip
    for section, keys in changes.items():
        recipe[section] = recipe.get(section, {}) | keys
    path = tmp_path / "recipe.yaml"
    path.write_text(json.dumps(recipe))
    code = main(["train", str(path)])
    return code, capsys.readouterr().err


def one_sentence(told):
    """The last line that is told; there is no traceback."""
    assert "Traceback" not in told, told
    lines = [line for line in told.splitlines() if line.strip()]
    assert len([line for line in lines if line.startswith("error")]) <= 1
    return " ".join(" ".join(lines).split())


def test_the_run_itself_is_fine(model, tmp_path, capsys):
    assert run(tmp_path, capsys, model)[0] == 0


@pytest.mark.parametrize("section", ["env", "policy"])
def test_a_model_without_a_tokenizer(section, model, tmp_path, capsys):
    bare = tmp_path / "bare"
    shutil.copytree(model, bare)
    (bare / "tokenizer.json").unlink()
    code, told = run(tmp_path, capsys, model, **{section: {"model": str(bare)}})
    assert code == 2 and "tokenizer" in one_sentence(told) and str(bare) in one_sentence(told)


def test_a_question_that_is_too_long(model, tmp_path, capsys):
    code, told = run(tmp_path, capsys, model, env={"max_context": 20})
    assert code == 2 and "raise env.max_context to" in one_sentence(told)


def test_a_conversation_longer_than_the_model_can_read(model, tmp_path, capsys):
    code, told = run(tmp_path, capsys, model, env={"max_context": 1024})
    assert code == 2 and "was made for 1024 tokens" in one_sentence(told)


@pytest.mark.parametrize("line", ["", "{", '{"question": "x"}'])
def test_a_bad_line_of_questions(line, model, tmp_path, capsys):
    path = tmp_path / "q.jsonl"
    path.write_text(f"{QUESTION}{line}\n{QUESTION}")
    code, told = run(tmp_path, capsys, model, env={"tasks": [str(path)]})
    assert code == 2 and "q.jsonl:2: " in one_sentence(told)


def test_settings_that_something_else_replaces(model, tmp_path, capsys):
    told = run(tmp_path, capsys, model, env={"overlong": 2}, reward={"type": "majority"})
    assert told[0] == 2 and one_sentence(told[1]).endswith(
        "env.overlong (2) changes what the env pays, and reward majority pays in its place: remove env.overlong, or the reward section"
    )
    told = run(tmp_path, capsys, model, policy={"temperature": 0.7}, collect={"anneal": {"plain": 1}})
    assert told[0] == 2 and one_sentence(told[1]).endswith(
        "collect.anneal gives every unit a temperature in place of policy.temperature (0.7), at which nothing would be sampled or "
        "learned: set policy.temperature: 1.0, or collect.anneal: null"
    )
    assert run(tmp_path, capsys, model, reward={"type": "majority"}, collect={"anneal": {"plain": 1}})[0] == 0


JUDGE = '''
"""A task whose judge goes wrong."""
import os
from embodied_rl.envs.text import Question, Task
from embodied_rl.section import Section
class Config(Section):
    """None."""
class Wrong(Task):
    def question(self, rng):
        return Question(f"Say {{rng.integers(10**6)}}.", "x")
    def score(self, question, reply):
        {does}
def build(config):
    {builds}
    return Wrong()
'''


def test_a_judge_that_always_dies_ends_the_run(model, tmp_path, capsys, caplog):
    (tmp_path / "wrong.py").write_text(JUDGE.format(does="os._exit(3)", builds="pass"))
    changes = {"env": {"tasks": [str(tmp_path / "wrong.py")]}, "train": {"env_steps": 80, "max_bad_updates": 2}}
    code, told = run(tmp_path, capsys, model, **changes)
    assert code == 2 and "judge or simulator failed in every episode of the last 2 updates" in one_sentence(told)
    assert "its process died (exit code 3)" in caplog.text


def test_judges_that_hang_die_raise_or_say_nothing_now_and_then_do_not_stall_a_run(model, tmp_path, capsys):
    ways = "(lambda: time.sleep(60), lambda: os._exit(3), lambda: 1 / 0, lambda: None, *[lambda: 1.0] * 4)"
    does = f"import time; return {ways}[sum(question.text.encode()) % 8]()"
    (tmp_path / "wrong.py").write_text(JUDGE.format(does=does, builds="pass"))
    env = {"tasks": [str(tmp_path / "wrong.py")], "judge_seconds": 0.5}
    code, told = run(tmp_path, capsys, model, env=env, train={"env_steps": 64}, collect={"copies": 32})
    assert code == 0, told
    rows = [json.loads(line) for line in (tmp_path / "r" / "metrics.jsonl").read_text().splitlines()]
    rates = [row["rollout/invalid_rate"] for row in rows if "rollout/invalid_rate" in row]
    assert len(rates) >= 2 and all(0 < rate < 1 for rate in rates)
    assert all(row["rollout/success_once_rate"] == 1 for row in rows if "rollout/invalid_rate" in row), "void is never wrong"


def test_a_judge_that_cannot_be_built_in_its_process(model, tmp_path, capsys):
    (tmp_path / "wrong.py").write_text(JUDGE.format(does="return 1.0", builds="assert 'judge_process' not in os.sys.argv[0], 'no licence'"))
    code, told = run(tmp_path, capsys, model, env={"tasks": [str(tmp_path / "wrong.py")]})
    assert code == 2 and "the judges of env.tasks could not be started" in one_sentence(told) and "no licence" in told


def test_vllm_that_is_not_there(model, tmp_path, capsys):
    import sys

    generator = {"kind": "vllm", "python": str(tmp_path / "nowhere/python")}
    code, told = run(tmp_path, capsys, model, policy={"generator": generator})
    assert code == 2 and "no such file; give the Python of an environment that has vLLM" in one_sentence(told)
    code, told = run(tmp_path, capsys, model, policy={"generator": generator | {"python": sys.executable}})
    assert code == 2 and "vLLM cannot be imported there" in one_sentence(told)


@pytest.mark.slow
def test_vllm_of_a_wrong_version(model, tmp_path, capsys, monkeypatch):
    import sys
    from pathlib import Path

    (tmp_path / "vllm.py").write_text((Path(__file__).parents[1] / "toys/vllm_stand_in.py").read_text())
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setenv("STAND_IN_VERSION", "0.8.5")
    code, told = run(tmp_path, capsys, model, policy={"generator": {"kind": "vllm", "python": sys.executable}})
    assert code == 2 and "has vLLM 0.8.5, and 0.32 or newer is needed" in one_sentence(told)


def test_too_little_memory_halves_then_says_what_to_set(model, tmp_path, capsys, monkeypatch, caplog):
    plain = lm.generate

    def most(rows):
        def generate(*args, **given):
            if len(args[4]) > rows:
                torch.empty(2**50)
            return plain(*args, **given)

        return generate

    monkeypatch.setattr(lm, "generate", most(1))
    assert run(tmp_path, capsys, model)[0] == 0
    assert "set policy.rows: 1 to begin with that" in caplog.text
    monkeypatch.setattr(lm, "generate", most(0))
    shutil.rmtree(tmp_path / "r")
    code, told = run(tmp_path, capsys, model)
    assert code == 2 and "not enough memory to write a single reply: lower the env's max_context or length" in one_sentence(told)
