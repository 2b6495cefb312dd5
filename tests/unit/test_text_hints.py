"""Hints under a question, results of replies, and worked answers: what methods beyond plain rewards ask of a text env."""

import json

import pytest
import torch

from embodied_rl.checkpoint import load, save
from embodied_rl.envs.text.env import number_of
from embodied_rl.envs.text.task import Question
from embodied_rl.errors import CapabilityError, ConfigError
from embodied_rl.types import Hinting
from tests.unit.test_text_env import begin, make, model, reply, shown

__all__ = ["model"]


def test_the_beginning_of_a_worked_answer():
    q = Question("?", "46", solution="12 plus 34 is 46")
    assert [q.beginning(s) for s in (0.2, 0.25, 0.5, 1.0)] == ["12", "12 plus", "12 plus 34", "12 plus 34 is 46"]
    assert [Question("?", "1234").beginning(s) for s in (0.01, 0.5, 0.51, 1.0)] == ["1", "12", "123", "1234"]


def test_a_hint_stands_under_the_question_until_it_is_taken_back(model):
    env = make(model)
    assert isinstance(env, Hinting)
    plain = begin(env, 2, 2, 4, 4)
    answer = env._copies[0].question.answer
    env.hint(1.0)
    hinted = env.reset(torch.tensor([True, False, False, False]), torch.tensor([2, 2, 4, 4]), torch.zeros(4, dtype=torch.int64))
    assert f"The solution begins like this: {answer}" in shown(env, hinted, 0)
    assert torch.equal(hinted["context"][1:], plain["context"][1:])
    # The question itself, and so what is held out, stays what it was; the reply is judged as ever.
    assert env._copies[0].question == env._copies[1].question
    step = env.step(reply(env, answer, answer, answer, answer))
    assert step.reward[:2].tolist() == [1.0, 1.0]
    assert "begins like this" in env.transcript(torch.tensor([0]))[0]
    env.hint(0.0)
    assert torch.equal(begin(env, 2, 2, 4, 4)["context"], plain["context"])


def test_a_hinted_conversation_is_restored(model, tmp_path):
    env, other = make(model), make(model)
    env.hint(0.5)
    obs = begin(env, 2, 4, 6, 8)
    save(tmp_path, {"env": env.get_state()}, update=1, keep=1, best_score=None)
    again = other.set_state(load(next(tmp_path.glob("*1")))["env"])
    assert torch.equal(again["context"], obs["context"])
    assert other.transcript(torch.arange(4)) == env.transcript(torch.arange(4))


def test_a_hint_that_does_not_fit_says_so(model):
    length = int((begin(make(model), 2, 2, 2, 2)["context"][0] >= 0).sum())
    env = make(model, max_context=length)
    env.hint(1.0)
    with pytest.raises(CapabilityError, match="with the chat template and 100% of its solution as a hint, and env.max_context is"):
        begin(env, 2, 2, 2, 2)


def test_equal_answers_have_equal_results_whether_right_or_wrong(model):
    env = make(model, tasks=({"task": "arithmetic", "answer": "last_number"},))
    begin(env, 2, 2, 4, 4)
    result = env.step(reply(env, "it is 1,007", "1007.", "of 3 it is 8", "none")).result.tolist()
    assert result[0] == result[1] == number_of("1007") >= 0 and result[2] == number_of("8") and result[3] == -1
    assert number_of(None) == -1 and number_of("") >= 0
    begin(env, 2, 2, 4, 4)
    waiting = env.step(reply(env, "5", "5", "5", "5"), torch.tensor([True, False, False, False])).result
    assert waiting.tolist() == [number_of("5"), -1, -1, -1]


def test_math_verify_results_are_those_of_mathematics(model, tmp_path):
    path = tmp_path / "q.jsonl"
    path.write_text(json.dumps({"question": "What is a half?", "answer": "1/2", "solution": "One of two is 1/2"}) + "\n")
    env = make(model, tasks=(str(path),), heldout=1e-9)
    begin(env, 2, 2, 2, 2)
    assert env._copies[0].question.worked == "One of two is 1/2"
    step = env.step(reply(env, "it is 0.5", "1/2", "1/3", "no"))
    assert step.result[0] == step.result[1] != step.result[2] and step.result[3] == -1 and step.reward.tolist() == [1.0, 1.0, 0.0, 0.0]
    env.close()
    path.write_text('{"question": "a", "answer": "1", "solution": 3}\n')
    with pytest.raises(ConfigError, match=r"q.jsonl:1: 'solution' is 3, expected a text"):
        make(model, tasks=(str(path),))
