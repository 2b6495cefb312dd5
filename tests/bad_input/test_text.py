"""What can be wrong with a text env: one clear sentence each."""

import json
import re

import pytest
import torch

from embodied_rl import registry
from embodied_rl.cli import main
from embodied_rl.errors import CapabilityError, ConfigError, NotFoundError
from tests.toys.tiny_lm import tiny_lm


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("model"))


def make(model, *tasks, **given):
    module = registry.load("env", "text")
    config = module.Config.model_validate_json(json.dumps({"model": str(model), "tasks": tasks or ["arithmetic"], "max_context": 400} | given))
    return module.build(config, num_envs=2, device=torch.device("cpu"), split="train", seed=0)


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("", "is empty"), ("{", "is not JSON"), ("[1]", "is a list"), ('{"question": "a"}', "has no 'answer'"), ('{"answer": "a"}', "has no 'question'"),
        ('{"question": "", "answer": "a"}', "'question' is \"\""), ('{"question": "a", "answer": null}', "'answer' is null"), ('{"question": "a", "answer": true}', "'answer' is true"),
        ('{"question": "one", "answer": "2"}', "the question of line 1 again, with another answer"),
    ],
)  # fmt: skip
def test_a_line_that_is_no_question_is_told_with_its_number(model, tmp_path, line, told):
    path = tmp_path / "q.jsonl"
    path.write_text(f'{{"question": "one", "answer": "1"}}\n{line}\n{{"question": "three", "answer": "3"}}\n')
    with pytest.raises(ConfigError) as error:
        make(model, str(path))
    assert str(error.value).startswith(f"{path}:2: ") and told in str(error.value)


def test_other_files_that_are_no_questions(model, tmp_path):
    with pytest.raises(NotFoundError, match="nowhere.jsonl: no such file of questions"):
        make(model, str(tmp_path / "nowhere.jsonl"))
    (tmp_path / "empty.jsonl").write_text("")
    with pytest.raises(ConfigError, match=r"empty.jsonl:1: is empty"):
        make(model, str(tmp_path / "empty.jsonl"))
    (tmp_path / "latin.jsonl").write_bytes(b'{"question": "\xe9", "answer": "1"}\n')
    with pytest.raises(ConfigError, match="is not a text file in UTF-8"):
        make(model, str(tmp_path / "latin.jsonl"))
    folder = tmp_path / "folder"
    folder.mkdir()
    for name in ("train", "eval"):
        (folder / f"{name}.jsonl").write_text(f'{{"question": "{name}", "answer": 1}}\n{{"question": "both", "answer": 1}}\n')
    with pytest.raises(ConfigError, match=r"eval.jsonl:2: the same question is in train.jsonl:2"):
        make(model, f"{folder}/")
    (tmp_path / "one.jsonl").write_text('{"question": "one", "answer": "1"}\n')
    env = make(model, str(tmp_path / "one.jsonl"))
    with pytest.raises(CapabilityError, match="none of its 1 questions is for "):
        for seed in (2, 3):
            env.reset(torch.tensor([True, False]), torch.tensor([seed, seed]), torch.zeros(2, dtype=torch.int64))


def test_a_model_without_tokenizer_template_or_folder(model, tmp_path):
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text("{}")
    with pytest.raises(CapabilityError, match=r"bare: the folder has no tokenizer \(tokenizer.json\)"):
        make(tmp_path / "bare")
    with pytest.raises(CapabilityError, match="its tokenizer has no chat template"):
        make(tiny_lm(tmp_path / "plain", template=None))
    (tmp_path / "torn").mkdir()
    (tmp_path / "torn" / "tokenizer.json").write_text("{")
    with pytest.raises((CapabilityError, NotFoundError), match="torn: its tokenizer cannot be read"):
        make(tmp_path / "torn")


def test_a_template_that_forgets_replies_ends_at_the_first_answer(tmp_path):
    forgetful = "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}<|end|>{% endfor %}"
    env = make(tiny_lm(tmp_path / "m", template=forgetful), "calculator")
    env.reset(torch.ones(2, dtype=torch.bool), torch.tensor([2, 4]), torch.zeros(2, dtype=torch.int64))
    call = env.speech.tokenizer("<calc>1</calc>", add_special_tokens=False)["input_ids"]
    action = torch.full((2, 32), -1)
    action[:, : len(call)] = torch.tensor(call)
    with pytest.raises(CapabilityError, match="leaves out what was replied"):
        env.step(action)


def test_a_question_longer_than_the_context(model):
    env = make(model, max_context=40)
    with pytest.raises(CapabilityError) as error:
        env.reset(torch.ones(2, dtype=torch.bool), torch.tensor([2, 4]), torch.zeros(2, dtype=torch.int64))
    assert "a question of task 'arithmetic' has 64 tokens with the chat template, and env.max_context is 40" in str(error.value)
    assert "raise env.max_context to 64 or more" in str(error.value)


def test_questions_of_a_file_that_are_too_long_are_told_before_any_is_drawn(model, tmp_path):
    path = tmp_path / "q.jsonl"
    texts = ["1 + 1?", "What is one and one? " * 9, "2 + 2?", "What is two and two? " * 5]
    path.write_text("".join(json.dumps({"question": text, "answer": "2"}) + "\n" for text in texts))
    with pytest.raises(CapabilityError) as error:
        make(model, str(path), max_context=100)
    found = re.fullmatch(
        rf"2 of the 4 questions of task 'q' are longer than env.max_context \(100 tokens with the chat template\): {path}:2 has (\d+); "
        rf"raise env.max_context to (\d+) or more, or take them out \({path}:2, {path}:4\)",
        str(error.value),
    )
    assert found and found[1] == found[2]
    make(model, str(path), max_context=int(found[1]))
    with pytest.raises(CapabilityError, match=f"1 of the 4 questions .* {path}:2 has {found[1]}"):
        make(model, str(path), max_context=int(found[1]) - 1)


@pytest.mark.parametrize(
    ("tasks", "told"),
    [
        ("[arithmetik]", "task 'arithmetik' does not exist; did you mean 'arithmetic'?"),
        ("[arithmetic, arithmetic]", "two tasks are called 'arithmetic': give one of them another name"),
        ("[{name: x}]", "does not say which task"),
        ("[{task: arithmetic, weight: 0}]", "weight must be a number above 0"),
        ("[{task: arithmetic, weight: often}]", "weight must be a number above 0"),
        ("[{task: arithmetic, examples: ['What is 1 + 2?']}]", "examples must be pairs of texts, [[question, reply], ...]"),
        ("[{task: arithmetic, examples: [['What is 1 + 2?', 3]]}]", "examples must be pairs of texts"),
        ("[{task: arithmetic, digit: 3}]", "task 'arithmetic': digit (3): Extra inputs are not permitted"),
        ("[{task: arithmetic, digits: [3, 1]}]", "digits (3, 1) must be two numbers from 1 to 9"),
        ("[reasoning_gym]", "task 'reasoning_gym': dataset"),
        ("[]", "tasks"),
    ],
)
def test_a_task_that_does_not_exist_or_refuses_its_settings(model, tasks, told, capsys):
    assert main(["check", "env", "text", f"model={model}", f"tasks={tasks}"]) == 2
    assert told in capsys.readouterr().err


def test_reasoning_gym_refuses_what_it_does_not_know(model):
    with pytest.raises(NotFoundError, match="no data set 'chain_sums'; did you mean 'chain_sum'"):
        make(model, "reasoning_gym/chain_sums")
    with pytest.raises(ConfigError, match="reasoning_gym/chain_sum: refuses its settings {'legs': 4}"):
        make(model, {"task": "reasoning_gym/chain_sum", "settings": {"legs": 4}})


@pytest.mark.parametrize("given", [{"max_turns": 3}, {"judge_seconds": 2.0}, {"judges": 2}])
def test_settings_that_nothing_uses_are_refused(model, given):
    with pytest.raises(CapabilityError, match=rf"env.{next(iter(given))} \(\S+\) does nothing, because"):
        make(model, **given)


def test_a_state_of_another_shape(model):
    from embodied_rl.errors import CheckpointError

    with pytest.raises(CheckpointError, match=r"found contexts \[2, 300\], expected \[2, 400\]"):
        make(model).set_state(make(model, max_context=300).get_state())


def test_a_missing_package_names_its_extra(model, monkeypatch):
    import sys

    from embodied_rl.errors import MissingExtraError

    monkeypatch.setitem(sys.modules, "math_verify", None)
    with pytest.raises(MissingExtraError, match=r"pip install 'embodied-rl\[tasks\]'"):
        make(model, "q.jsonl")
