"""Conversations: what the policy is shown, what is kept of its replies, what it is paid."""

import json
import re
from dataclasses import replace
from fractions import Fraction
from functools import partial

import pytest
import torch

from embodied_rl import registry
from embodied_rl.check_env import spec_is_coherent, wrong_actions_are_refused
from embodied_rl.check_tools import EnvCase, differing, examine
from embodied_rl.curriculum import Curriculum, StartPool, TaskSampler
from embodied_rl.envs.text.calculation import evaluate
from embodied_rl.envs.text.env import overlong_cost
from embodied_rl.envs.text.task import Question, held_out
from embodied_rl.envs.text.tasks import build_task
from embodied_rl.errors import CapabilityError
from embodied_rl.seeding import numpy_rng, start_seeds
from embodied_rl.types import PAD, Vocabulary
from tests.toys.tiny_lm import tiny_lm

END, START = 3, 2


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return str(tiny_lm(tmp_path_factory.mktemp("model")))


def make(model, tasks=("arithmetic",), copies=4, **given):
    module = registry.load("env", "text")
    settings = {"model": model, "tasks": list(tasks), "max_context": 400} | given
    config = module.Config.model_validate_json(json.dumps(settings))
    return module.build(config, num_envs=copies, device=torch.device("cpu"), split="train", seed=0)


def begin(env, *seeds, tasks=None):
    everyone = torch.ones(env.spec.num_envs, dtype=torch.bool)
    tasks = torch.zeros(env.spec.num_envs, dtype=torch.int64) if tasks is None else torch.tensor(tasks)
    return env.reset(everyone, torch.tensor(seeds), tasks)


def ids(env, text):
    return env.speech.tokenizer(text, add_special_tokens=False)["input_ids"]


def reply(env, *texts, end=True):
    """Rows of token ids, with the id that ends a turn unless it is cut."""
    action = torch.full((env.spec.num_envs, env.spec.action.length), -1)
    for row, text in enumerate(texts):
        row_ids = ids(env, text) + [END] * end
        action[row, : len(row_ids)] = torch.tensor(row_ids)
    return action


def shown(env, obs, copy):
    return env.speech.tokenizer.decode([i for i in obs["context"][copy].tolist() if i >= 0])


def answers(env):
    return [c.question.answer for c in env._copies]


def test_a_question_is_shown_as_the_chat_template_writes_it(model):
    env = make(model, copies=2)
    text = shown(env, begin(env, 2, 4), 0)
    assert text.startswith("<|start|>user\nWhat is ")
    assert text.endswith("? Answer with just the number.<|end|>\n<|start|>assistant\n")
    system = make(model, copies=2, system="Be brief.")
    assert shown(system, begin(system, 2, 4), 0) == "<|start|>system\nBe brief.<|end|>\n" + text
    v = env.spec.vocabulary
    assert (v.size, v.end, v.name) == (len(env.speech.tokenizer), (END,), model) and len(v.fingerprint) == 64
    assert env.spec.observation["context"].constant and env.spec.max_steps == 1


def test_the_fingerprint_tells_tokenizers_and_templates_apart(model, tmp_path):
    same, fewer, other = (make(str(tiny_lm(tmp_path / n, **x))) for n, x in {
        "a": {"seed": 7}, "b": {"characters": "0123456789WhatisAnsweruejm .+?\n"}, "c": {"template": "{% for m in messages %}{{ m['content'] }}<|end|>{% endfor %}"},
    }.items())  # fmt: skip
    prints = [e.spec.vocabulary.fingerprint for e in (make(model), same, fewer, other)]
    assert prints[0] == prints[1] and len(set(prints)) == 3


def test_a_right_reply_is_paid_1_and_a_wrong_one_0(model):
    env = make(model)
    begin(env, 2, 4, 6, 8)
    a = answers(env)
    step = env.step(reply(env, a[0], f" {a[1]}.\n", str(int(a[2]) + 1), f"It is {a[3]}"))
    assert step.reward.tolist() == [1.0, 1.0, 0.0, 0.0] and step.success.tolist() == [True, True, False, False]
    assert bool(step.terminated.all()) and not bool(step.truncated.any()) and not bool(step.invalid.any())
    assert step.metrics["tokens"].tolist() == [len(a[0]) + 1, len(a[1]) + 4, len(str(int(a[2]) + 1)) + 1, len(a[3]) + 7]
    again = env.step(reply(env, *a))
    assert again.reward.tolist() == [0.0] * 4 and bool(again.terminated.all()), "it waits"
    assert env.transcript(torch.tensor([0, 2])) == [
        f"question: {env._copies[0].question.text}\nreply: {a[0]}\nright answer: {a[0]}\nscore 1",
        f"question: {env._copies[2].question.text}\nreply: {int(a[2]) + 1}\nright answer: {a[2]}\nscore 0",
    ]


def test_examples_stand_before_each_question_of_their_task_alone(model):
    pairs = [["What is 1 + 2?", "1 + 2 = 3"], ["What is 4 + 4?", "4 + 4 = 8"]]
    env = make(model, [{"task": "arithmetic", "name": "shown", "examples": pairs}, {"task": "arithmetic", "name": "plain"}], copies=2, max_context=400)
    obs = env.reset(torch.ones(2, dtype=torch.bool), torch.tensor([3, 3]), torch.tensor([0, 1]))
    said = "".join(f"<|start|>user\n{q}<|end|>\n<|start|>assistant\n{a}<|end|>\n" for q, a in pairs)
    first, second = shown(env, obs, 0), shown(env, obs, 1)
    assert said in first and first.replace(said, "") == second, "the same question, with nothing before it"
    assert [c.question.text for c in env._copies] == [env._copies[0].question.text] * 2
    assert env.manifest()["tasks"][0]["examples"] == pairs
    with pytest.raises(CapabilityError, match=r"task 'shown' has \d+ tokens with the chat template and its examples, and env.max_context is 30"):
        begin(make(model, [{"task": "arithmetic", "name": "shown", "examples": pairs}], copies=1, max_context=30), 3)


def test_a_task_of_weight_3_is_played_three_times_as_often(model):
    tasks = [{"task": "arithmetic", "name": "sums", "weight": 3}, {"task": "arithmetic", "name": "long", "digits": [3, 3]}]
    spec = make(model, tasks).spec
    assert spec.task_weights == (3.0, 1.0) and spec.tasks == ("sums", "long")
    seed, task = TaskSampler(Curriculum(), spec).begin(torch.arange(4000), torch.zeros(4000, dtype=torch.int64))
    assert 0.72 < float((task == 0).float().mean()) < 0.78
    pool = StartPool(Curriculum(kind="success", starts=400), spec)
    assert 0.67 < float((pool.task == 0).float().mean()) < 0.83
    assert make(model, [t | {"weight": 2} for t in tasks]).spec.task_weights is None


def test_idle_copies_are_left_alone(model):
    env = make(model)
    begin(env, 2, 4, 6, 8)
    active = torch.tensor([True, False, True, False])
    env.step(reply(env, *answers(env)), active)
    assert [bool(c.ending) for c in env._copies] == active.tolist()
    assert env.step(reply(env, *answers(env)), ~active).reward.tolist() == [0.0, 1.0, 0.0, 1.0]


@pytest.mark.parametrize("kind", ["arithmetic", "countdown", "calculator", "reasoning_gym/chain_sum"])
def test_training_and_evaluation_questions_never_meet(kind):
    task = build_task({"task": kind, "digits": [1, 2]} if kind == "arithmetic" else kind)
    seeds = [start_seeds(0, split, torch.zeros(300), torch.arange(300)).tolist() for split in ("train", "eval")]
    texts = [{task.draw(partial(numpy_rng, s), bool(s & 1), 0.2).text for s in some} for some in seeds]
    assert len(texts[0]) > 100 and len(texts[1]) > 100 and not texts[0] & texts[1]
    if kind in {"calculator", "reasoning_gym/chain_sum"}:
        assert all(held_out(t, 0.2) for t in texts[1]) and not any(held_out(t, 0.2) for t in texts[0])
    else:  # nor do those with the same numbers in another order
        found = [[re.findall(r"\d+", t) for t in some] for some in texts]
        of_game = 1 if kind == "countdown" else 0  # its last number is the target
        games = [{(*sorted(n[: len(n) - of_game]), *n[len(n) - of_game :]) for n in some} for some in found]
        assert not games[0] & games[1] and len(games[0]) < len(texts[0])


def test_the_held_out_share_is_what_it_says():
    rate = sum(held_out(f"What is {i}?", 0.2) for i in range(20_000)) / 20_000
    assert abs(rate - 0.2) < 4 * (0.16 / 20_000) ** 0.5


def test_arithmetic_asks_what_was_asked_for():
    rng = numpy_rng(0)
    plain, mixed = build_task("arithmetic"), build_task({"task": "arithmetic", "digits": [1, 3], "operators": ["+", "-", "*"], "terms": 4})
    sums = [plain.question(rng) for _ in range(2000)]
    for q in sums:
        a, b = map(int, q.text.removeprefix("What is ").removesuffix("? Answer with just the number.").split(" + "))
        assert 10 <= a <= 99 and 10 <= b <= 99 and q.answer == str(a + b)
    assert len({q.text for q in sums}) > 1700
    for _ in range(300):
        q = mixed.question(rng)
        text = q.text.removeprefix("What is ").partition("?")[0]
        assert q.answer == str(eval(text)) and len(text.split()) == 7


def test_countdown_has_a_solution_and_takes_any_other():
    task, rng = build_task({"task": "countdown", "numbers": 4}), numpy_rng(1)
    for _ in range(200):
        q = task.question(rng)
        assert 1 <= q.facts["target"] <= 100 and evaluate(q.answer) == q.facts["target"]
        assert task.score(q, q.answer) == task.score(q, f" {q.answer} = {q.facts['target']}. ") == 1.0
    q = Question("", "", {"numbers": [3, 5, 5], "target": 13})
    for text, right in {"3+5+5": 1, "5 + (5 + 3)": 1, "3 + 5*2": 0, "3+5+5+0": 0, "8 + 5": 0, "13": 0, "3 + 10": 0, "3+5+5=14": 0, "(5+5+3": 0, "": 0, "3+5": 0}.items():  # fmt: skip
        assert task.score(q, text) == right, text


def test_reasoning_gym_may_pay_full_scores_alone():
    settings = {"task": "reasoning_gym/letter_counting", "answer": "last_number"}
    kind, strict = build_task(settings), build_task(settings | {"partial": False})
    question = strict.question(numpy_rng(0))
    hedge = f"{question.answer}2"  # the right answer stands in it, for which the data set pays half
    scores = [[task.score(question, reply) for reply in (question.answer, hedge, "nothing")] for task in (kind, strict)]
    assert scores[0][:2] == [1.0, 0.5] and scores[1] == [1.0, 0.0, 0.0]


def test_reasoning_gym_may_be_given_the_last_number_of_a_reply():
    settings = {"task": "reasoning_gym/chain_sum", "settings": {"min_terms": 2, "max_terms": 2}}
    strict, kind = build_task(settings), build_task(settings | {"answer": "last_number"})
    q = strict.question(numpy_rng(4, "sum"))
    said = f"That makes 5 + 6 = {q.answer}."
    assert strict.score(q, said) < 1 and kind.score(q, said) == kind.score(q, q.answer) == 1.0
    assert kind.score(q, f"{q.answer}, or 3") < 1 and kind.score(q, "I do not know") < 1
    assert (kind.result(q, said), kind.result(q, "none")) == (q.answer, None) and strict.result(q, said) == said[:-1]


def test_reasoning_gym_questions_are_those_of_the_library():
    import reasoning_gym

    task = build_task({"task": "reasoning_gym/chain_sum", "settings": {"min_terms": 2, "max_terms": 3}, "hint": ""})
    for _ in range(3):
        q = task.question(numpy_rng(_))
        theirs = reasoning_gym.create_dataset("chain_sum", seed=q.facts["seed"], size=1, min_terms=2, max_terms=3)
        assert q.text == theirs[0]["question"] and q.answer == theirs[0]["answer"]
        assert task.score(q, q.answer) == 1.0 > task.score(q, "no idea")


def test_a_file_of_questions_is_split_and_judged_by_mathematics(model, tmp_path):
    path = tmp_path / "maths.jsonl"
    rows = [{"question": f"What is {i}/2?", "answer": f"{i}/2"} for i in range(40)]
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    env = make(model, [str(path)], copies=3, judge_seconds=60)
    assert env.spec.tasks == ("maths",)
    begin(env, 2, 5, 8)
    halves = [Fraction(a) for a in answers(env)]
    step = env.step(reply(env, str(float(halves[0])), f"so it is {halves[1] * 2}/2", "17/3"))
    assert step.reward.tolist() == [1.0, 1.0, 0.0] and not bool(step.invalid.any())
    env.close()
    asked = [{c.draw(partial(numpy_rng, s), bool(s & 1), 0.2).text for s in range(split, 2000, 2)} for split in (0, 1) for c in env.tasks]
    assert not asked[0] & asked[1] and asked[0] | asked[1] == {r["question"] for r in rows}


def test_a_folder_of_questions_has_its_own_split(tmp_path):
    for name in ("train", "eval"):
        (tmp_path / f"{name}.jsonl").write_text("".join(json.dumps({"question": f"{name} {i}", "answer": i}) + "\n" for i in range(5)))
    task = build_task({"task": "questions", "path": str(tmp_path)})
    for split, name in ((False, "train"), (True, "eval")):
        drawn = {task.draw(partial(numpy_rng, s), split, 0.2).text for s in range(200)}
        assert drawn == {f"{name} {i}" for i in range(5)}


def test_a_calculator_answers_and_the_replies_are_kept_as_they_were_sampled(model):
    env = make(model, ["calculator"], copies=3)
    first = begin(env, 2, 4, 6)
    assert not env.spec.observation["context"].constant and env.spec.max_steps == 4
    # Token ids that no tokenizer would make of the text: a special one in the middle.
    odd = reply(env, "<calc>2*(3+4)</calc>", "<calc>1/0</calc>", "<calc>9**9**9</calc>")
    odd[0, :22] = torch.tensor([START, *ids(env, "<calc>2*(3+4)</calc>"), END])[:22]
    step = env.step(odd)
    assert not bool((step.terminated | step.truncated).any()) and step.reward.tolist() == [0.0] * 3
    after = step.obs["context"][0]
    length = int((first["context"][0] >= 0).sum())
    sampled = [i for i in odd[0].tolist() if i >= 0]
    assert after[:length].tolist() == first["context"][0][:length].tolist()
    assert after[length : length + len(sampled)].tolist() == sampled
    rest = [i for i in after[length + len(sampled) :].tolist() if i >= 0]
    assert env.speech.tokenizer.decode(rest) == "\n<|start|>user\n14<|end|>\n<|start|>assistant\n", "the end is not written twice"
    assert "error: division by zero<|end|>" in shown(env, step.obs, 1) and "error: number too large<|end|>" in shown(env, step.obs, 2)
    step = env.step(reply(env, *answers(env)))
    assert step.reward.tolist() == [1.0] * 3 and bool(step.terminated.all())
    assert env.transcript(torch.tensor([0]))[0].split("\n")[1:4] == ["reply: <calc>2*(3+4)</calc>", "told: 14", f"reply: {answers(env)[0]}"]


def test_a_reply_that_was_cut_is_closed_before_it_is_answered(model):
    env = make(model, ["calculator"], copies=1, max_reply=len("<calc>1+1</calc>"))
    begin(env, 2)
    step = env.step(reply(env, "<calc>1+1</calc>", end=False))
    assert shown(env, step.obs, 0).endswith("assistant\n<calc>1+1</calc><|end|>\n<|start|>user\n2<|end|>\n<|start|>assistant\n")
    assert step.metrics["cut"].tolist() == [1.0]


def test_a_conversation_ends_after_its_turns_or_when_it_has_outgrown_the_context(model):
    env = make(model, ["calculator"], copies=1, max_turns=2)
    begin(env, 2)
    call = reply(env, "<calc>1+1</calc>")
    assert not bool(env.step(call).terminated[0])
    step = env.step(call)
    assert bool(step.terminated[0]) and step.reward.tolist() == [0.0], "a call is no answer"
    length = int((begin(env, 2)["context"] >= 0).sum())
    short = make(model, ["calculator"], copies=1, max_context=length + 10)
    begin(short, 2)
    step = short.step(call)
    assert bool(step.terminated[0]) and not bool(step.success[0]) and not bool(step.invalid[0])
    assert short.transcript(torch.tensor([0]))[0].endswith(f"score 0: the conversation has outgrown {length + 10} tokens")


def test_a_judge_that_fails_makes_the_episode_void(model, tmp_path):
    path = tmp_path / "shy.py"
    path.write_text(
        "from embodied_rl.envs.text import Question, Task\nfrom embodied_rl.section import Section\n\n"
        "class Config(Section):\n    word: str = 'yes'\n\n"
        "class Shy(Task):\n    def __init__(self, word):\n        self.word = word\n"
        "    def question(self, rng):\n        return Question(f'Say {self.word} {rng.integers(1000)}.', self.word)\n"
        "    def score(self, question, reply):\n        return None if reply == 'hm' else super().score(question, reply)\n\n"
        "def build(config):\n    return Shy(config.word)\n"
    )
    env = make(model, [{"task": str(path), "word": "no"}, "arithmetic"], copies=4, judge_seconds=60)
    begin(env, 2, 4, 6, 8, tasks=[0, 0, 0, 1])
    step = env.step(reply(env, "no", "hm", "yes", "hm"))
    assert step.reward.tolist() == [1.0, 0.0, 0.0, 0.0]
    assert step.invalid.tolist() == step.truncated.tolist() == [False, True, False, False]
    assert step.terminated.tolist() == [True, False, True, True]
    assert env.spec.tasks == ("shy", "arithmetic")
    env.close()


@pytest.mark.parametrize(
    ("tokens", "finished", "cost"), [(1, True, 0.0), (24, True, 0.0), (26, True, 0.25), (32, True, 1.0), (32, False, 1.0)]
)
def test_long_replies_cost_what_dapo_says(model, tokens, finished, cost):
    assert overlong_cost(tokens, finished, longest=32, margin=8) == cost
    assert overlong_cost(tokens, finished, longest=32, margin=0) == 0.0
    env = make(model, copies=1, overlong=8)
    begin(env, 2)
    answer = answers(env)[0]
    step = env.step(reply(env, answer + " " * (tokens - len(answer) - finished) if tokens > 2 else "9"[: tokens - 1], end=finished))
    assert float(step.reward) == (1.0 if tokens > 2 else 0.0) - cost
    assert float(step.metrics["overlong"]) == cost and bool(step.success) == (tokens > 2)


def test_a_saved_conversation_goes_on_bit_for_bit(model):
    whole, other = (make(model, ["calculator", "arithmetic"], copies=3) for _ in range(2))
    for env in (whole, other):
        begin(env, 2, 4, 6, tasks=[0, 1, 0])
    begin(other, 8, 10, 12)
    whole.step(reply(whole, "<calc>7*8</calc>", "1", "<calc>7*9</calc>"))
    state = json.loads(json.dumps({"copies": [{k: v.tolist() if isinstance(v, torch.Tensor) else v for k, v in c.items()} for c in whole.get_state()["copies"]]}))
    for c in state["copies"]:
        c["context"] = torch.tensor(c["context"])
    obs = other.set_state({"context": whole.get_state()["context"], **state})
    assert torch.equal(obs["context"], whole._look()["context"])
    for texts in (["<calc>1</calc>", "2", answers(whole)[2]], [answers(whole)[0], "", "3"]):
        a, b = (env.step(reply(env, *texts)) for env in (whole, other))
        assert not list(differing(vars(a), vars(b)))
    everyone = torch.arange(3)
    assert whole.transcript(everyone) == other.transcript(everyone)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"vocabulary": None}, "spec.vocabulary is None"),
        ({"vocabulary": Vocabulary("x", 5, "0", (3,))}, "spec.vocabulary is Vocabulary"),
        ({"vocabulary": Vocabulary("x", 82, "0", (82,))}, "an id that ends a row is none of"),
    ],
)
def test_a_spec_that_cannot_speak_is_caught(model, changes, told):
    def broken(num_envs, *, split="train", max_steps=None):
        env = make(model, copies=num_envs)
        env.spec = replace(env.spec, **changes)
        return env

    case = EnvCase(broken, 2, 10, False)
    finding = examine([spec_is_coherent], case)[0]
    assert finding.ok is False and told in finding.detail


def test_an_env_that_takes_ids_after_the_end_is_caught(model):
    class Lenient(type(make(model))):
        def step(self, action, active=None):
            if not bool(((action >= PAD) & (action < self.spec.action.size)).all()) or action.shape != (2, 32) or action.dtype != torch.int64:
                return super().step(action, active)
            return super().step(torch.where((action == PAD).cummax(1).values, PAD, action), active)

    case = EnvCase(lambda n, **_: Lenient(make(model).config, n, torch.device("cpu")), 2, 10, False)
    finding = examine([wrong_actions_are_refused], case)[0]
    assert finding.ok is False and finding.detail == "an id after the end: accepted, expected a ShapeError"
