"""Mistakes around reward models: what is said, and exit code 2."""

import pytest

from embodied_rl.cli import main
from tests.conftest import ROOT

SRPO = "reward.type=self_referential"
GRPO = ["algorithm.type=grpo", "collect.mode=episodes", "policy.critic.kind=none"]
GROUPS = [*GRPO, "collect.group_size=2"]


def say(capsys, *overrides):
    capsys.readouterr()
    assert main(["train", "toy.yaml", *overrides]) == 2
    err = capsys.readouterr().err
    return err[err.index("error: ") + 7 :].strip()


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (
            ["reward.type=selfreferential"],
            "1 problem in the recipe toy.yaml:\n  command line: reward.type=selfreferential: reward.type: reward 'selfreferential' does not "
            "exist; did you mean 'self_referential'?",
        ),
        (
            ["reward.coef=1"],
            "1 problem in the recipe toy.yaml:\n  command line: reward.coef=1: reward.type: missing; it says which reward these settings are "
            "for (known: majority, self_referential, a dotted module, or a .py file)",
        ),
        (
            [SRPO, "reward.compare=group", "reward.use=potential"],
            "1 problem in the recipe toy.yaml:\n  command line: reward.use=potential: reward: compare (group) knows no success before the "
            "rollout that it judges, and use (potential) may look at earlier ones only: set compare: task, or use: outcome",
        ),
        (
            [SRPO, "reward.compare=group", "reward.memory=3"],
            "1 problem in the recipe toy.yaml:\n  command line: reward.memory=3: reward: memory (3) does nothing with compare (group), "
            "whose starts never come back",
        ),
        (
            [SRPO, "reward.encoder=vit", "reward.grid=4"],
            "1 problem in the recipe toy.yaml:\n  command line: reward.grid=4: reward: grid (4) does nothing with encoder (vit): remove it, "
            "or set encoder: pixels",
        ),
        ([SRPO], "reward.use outcome judges whole episodes, and collect.mode is stream: set collect.mode: episodes, or reward.use: potential"),
        (
            [SRPO, "reward.use=potential", "reward.embed=trajectory"],
            "reward self_referential with these settings judges whole episodes, and collect.mode is stream: set collect.mode: episodes",
        ),
        (
            [SRPO, "reward.use=potential", *GROUPS],
            "reward.use potential does nothing with algorithm.credit.returns trajectory: over an episode it adds up to minus the progress of "
            "the start, which no action changes. Set reward.use: outcome, or algorithm.credit.returns: return_to_go",
        ),
        (
            [SRPO, "reward.compare=group", "algorithm.type=reinforce", *GRPO[1:]],
            "reward self_referential compares copies of one start, and collect.group_size is 1: set collect.group_size: 8 and collect.mode: "
            "episodes",
        ),
        ([SRPO, "reward.entries=[positon]", *GROUPS], "reward.entries: the env shows no 'positon'; did you mean 'position'?"),
        (
            [SRPO, "reward.entries=[word]", *GROUPS],
            "reward.entries: 'word' is [1] of torch.int64, expected a picture [height, width, 3] of torch.uint8 or a vector of numbers: leave "
            "it out",
        ),
        (
            [SRPO, "reward.encoder=vit", *GROUPS],
            "reward.encoder 'vit' looks at pictures, and among what it is shown (position, goals) there is none: set reward.encoder: pixels, "
            "which takes vectors as they are, or let the env show some",
        ),
        (
            [SRPO, f"env.type={ROOT}/tests/toys/two_state.py", *GROUPS],
            "reward.use outcome pays failed episodes, and this env does not say which those are (it has no success): set reward.use: "
            "potential",
        ),
        (
            [SRPO, "reward.use=potential", f"env.type={ROOT}/tests/toys/two_state.py"],
            "reward self_referential learns from successes, and this env does not say which episodes succeed (it has no success): remove the "
            "section, or choose another reward model",
        ),
        (
            [SRPO, "algorithm.type=sft", "algorithm.demonstrations=demos"],
            "reward (self_referential) does nothing with algorithm sft, which learns from demonstrations: remove the section, or set "
            "reward=null",
        ),
    ],
)
def test_a_reward_section_that_cannot_work(overrides, sentence, toy, capsys):
    assert say(capsys, *overrides) == sentence
    assert not (toy / "runs").exists()


MODEL = """
import torch
from embodied_rl.rewards import RewardConfig, RewardModel
class Config(RewardConfig):
    type: str = ""
class Model(RewardModel):
    def judge(self, episodes):
        return {answers}
def build(config, *, env, device):
    return Model()
"""


@pytest.mark.parametrize(
    ("answers", "sentence"),
    [
        ("[torch.ones(len(e)) for e in episodes]",
         "episode 0: found progress of shape [10], expected [11], one number for each state before, between and after its 10 decisions"),
        ("[torch.full((len(e) + 1,), 50.0) for e in episodes]",
         "episode 0: found progress 50, expected numbers in [0, 1]; answer None for an episode that it cannot judge"),
        ("[torch.full((len(e) + 1,), float('nan')) for e in episodes]",
         "episode 0: found progress nan, expected numbers in [0, 1]; answer None for an episode that it cannot judge"),
        ("[None]", "found 1 answers to 4 episodes, expected one each"),
    ],
)  # fmt: skip
def test_a_reward_model_that_answers_with_something_else(answers, sentence, toy, capsys):
    (toy / "mine.py").write_text(MODEL.format(answers=answers))
    said = say(capsys, "reward.type=./mine.py")
    assert said.startswith(f"reward model '{toy}/mine.py'") and said.endswith(sentence)


def test_a_reward_model_without_build(toy, capsys):
    (toy / "mine.py").write_text(MODEL.split("def build")[0].format(answers="[]"))
    assert "mine.py defines no build; a file of this kind needs Config and build" in say(capsys, "reward.type=./mine.py")
