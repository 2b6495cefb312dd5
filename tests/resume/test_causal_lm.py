"""A language model's run that is stopped and resumed ends with the same bits as one that never was."""

from tests.resume import lab
from tests.toys.tiny_lm import tiny_lm


def test_a_run_that_samples_tokens_resumes_bit_for_bit(tmp_path):
    model = str(tiny_lm(tmp_path / "lm", characters="0123:userasitn\n", hidden=32))
    recipe = lab.recipe(
        updates=4, env={"type": str(lab.TOYS / "echo.py"), "model": model, "digits": "01"},
        policy={"type": "causal_lm", "model": model, "logp": "decoder"},
        algorithm={"type": "grpo", "update": {"epochs": 1, "minibatches": 1, "micro_units": 9, "logp_gap": {"do": "recompute", "above": 0.0}}},
        collect={"mode": "episodes", "group_size": 4, "decisions": 1},
    )  # fmt: skip
    rows, state = lab.go(recipe, tmp_path / "whole")
    assert rows[-1]["actor/ratio_max"] == 1.0 and rows[-1]["sync/logp_gap_mean"] < 1e-4
    parts = []
    for i, until in enumerate((2, -1)):
        more, last = lab.go(recipe, tmp_path / "run", until=until, resume=i > 0)
        parts += more
    assert parts == rows and lab.differing(last, state) == []
