"""Data sets of reasoning-gym of many kinds: they ask, pay for their own answers, and keep evaluation questions apart."""

from functools import partial

import pytest
import torch

from embodied_rl.envs.text.tasks import build_task
from embodied_rl.seeding import numpy_rng, start_seeds
from tests.unit.test_text_env import begin, make, model

__all__ = ["model"]

DATASETS = (
    # algebra and arithmetic
    "complex_arithmetic", "polynomial_multiplication", "simple_equations", "basic_arithmetic", "calendar_arithmetic",
    "fraction_simplification", "gsm_symbolic", "leg_counting", "prime_factorization", "time_intervals",
    # algorithms, code and text
    "base_conversion", "binary_matrix", "number_sorting", "string_manipulation", "palindrome_generation", "bf",
    # ideas from few examples, games, geometry, graphs, logic
    "list_functions", "arc_1d", "maze", "mini_sudoku", "n_queens", "tower_of_hanoi", "simple_geometry", "shortest_path",
    "family_relationships", "knights_knaves",
)  # fmt: skip
"""None of them reads a large file or searches for seconds."""
SETTLED_BY_RULES = ("boxnet", "graph_color")
"""Data sets that know how to check an answer, and none themselves."""


def asked(task, evaluation, count):
    seeds = start_seeds(0, "eval" if evaluation else "train", torch.zeros(count), torch.arange(count)).tolist()
    return [task.draw(partial(numpy_rng, s), evaluation, 0.3) for s in seeds]


@pytest.mark.parametrize("name", DATASETS)
def test_a_data_set_asks_and_pays_for_its_own_answer(name):
    task = build_task(f"reasoning_gym/{name}")
    training, evaluation = asked(task, False, 6), asked(task, True, 6)
    assert not {q.text for q in training} & {q.text for q in evaluation}
    for q in training[:3] + evaluation[:3]:
        assert q.text.endswith("\nGive only the final answer.") and q.answer
        assert task.score(q, q.answer) == 1.0 == task.score(q, f" {q.answer}\n")
        assert all(0 <= task.score(q, wrong) < 1 for wrong in ("no idea", "", "}{ 1/0 (x"))
    assert task.question(numpy_rng(3)) == task.question(numpy_rng(3))


def test_a_reply_that_the_checker_cannot_read_is_wrong_and_a_broken_checker_is_told(monkeypatch):
    task = build_task("reasoning_gym/prime_factorization")
    q = task.question(numpy_rng(0))
    assert task.score(q, "two times two") == 0.0

    def broken(self, answer, entry):
        raise RuntimeError("broken")

    monkeypatch.setattr("reasoning_gym.arithmetic.prime_factorization.PrimeFactorizationDataset.score_answer", broken)
    with pytest.raises(RuntimeError, match="broken"):
        task.score(q, "two times two")


@pytest.mark.parametrize("name", SETTLED_BY_RULES)
def test_what_has_no_answer_is_neither_demonstrated_nor_hinted_at(name, model):
    known = {"task": "reasoning_gym/chain_sum", "settings": {"min_terms": 2, "max_terms": 2}}
    env = make(model, [f"reasoning_gym/{name}", known], copies=2, max_context=4000, max_reply=16)
    env.hint(0.5)
    begin(env, 2, 4, tasks=[0, 1])
    assert [bool(c.question.answer) for c in env._copies] == [False, True]
    assert env.demonstrate()[1].tolist() == [False, True]
    told = env.transcript(torch.arange(2))
    assert "begins like this" not in told[0] and "begins like this" in told[1]
    env.close()
