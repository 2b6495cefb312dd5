"""What docs/vla.md shows of one's own simulator, model and reward is run, not trusted, and settings of docs/vla_training.md too."""

import json
import re
import shlex
from pathlib import Path

import pytest
import torch
import yaml

from embodied_rl import registry
from embodied_rl.cli import main
from embodied_rl.config import load_recipe
from embodied_rl.schema import suite_env
from embodied_rl.writers import read_rows

PAGE, TRAINING = (
    (Path(__file__).parents[2] / "docs" / name).read_text(encoding="utf-8") for name in ("vla.md", "vla_training.md")
)
FILES = dict(re.findall(r"^`([\w.]+)`:\n\n```(?:python|yaml)\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE))
COMMANDS = {
    tuple(shlex.split(line, comments=True)[1:])
    for block in re.findall(r"^```sh\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)
    for line in block.splitlines()
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A folder with the files of the page."""
    folder = tmp_path_factory.mktemp("page")
    for name, text in FILES.items():
        (folder / name).write_text(text, encoding="utf-8")
    return folder


@pytest.fixture
def here(folder, monkeypatch):
    """Work there."""
    monkeypatch.chdir(folder)
    return folder


def run(text: str, *overrides: str) -> None:
    """One command of the page, which has to show it, with overrides that make it short."""
    words = tuple(shlex.split(text))
    assert words in COMMANDS, f"docs/vla.md does not show: embodied-rl {text}"
    assert main((*words, *overrides)) == 0


def test_the_page_shows_the_files_that_are_tried_here():
    assert list(FILES) == ["dots.py", "looker.py", "dots.yaml", "dots_rl.yaml", "gentle.py", "gentle.yaml"]


def test_the_simulator_and_the_model_keep_their_contracts(here, capsys):
    run("check env ./dots.py")
    run("check policy ./looker.py")
    shown = capsys.readouterr().out
    assert "21 passed, 0 failed, 0 not tried" in shown and "12 passed, 0 failed, 3 not tried" in shown


def test_the_model_imitates_in_the_simulator_and_is_improved_by_reinforcement(here, capsys):
    run("collect dots.yaml --episodes 60 --out demos --noise 0.3")
    run("train dots.yaml")
    run("train dots_rl.yaml")
    suite = json.loads((here / "runs" / "rl" / "summary.json").read_text())["evaluation"]["heldout"]
    assert suite["start"]["overall"]["success_once"]["rate"] > 0.5
    assert suite["since_start"]["all"]["difference"] > 0.05
    assert (here / "runs" / "rl" / "report.html").read_text().count("<video") == 4
    capsys.readouterr()
    run("evaluate runs/rl")
    assert f"{suite['overall']['success_once']['rate']:.3f}" in capsys.readouterr().out


def test_the_reward_is_that_of_the_env_less_the_effort(here):
    recipe = load_recipe("gentle.yaml").recipe
    assert recipe.env.reward == "progress"
    gentle, plain = (registry.load("env", name) for name in (str(here / "gentle.py"), "tabletop"))
    steps = []
    for module, config in ((gentle, recipe.env), (plain, plain.Config(tasks=["reach"], reward="progress"))):
        env = module.build(config, num_envs=2, device=torch.device("cpu"), split="train", seed=0)
        env.reset(torch.ones(2, dtype=torch.bool), torch.tensor([2, 4]), torch.zeros(2, dtype=torch.int64))
        steps.append(env.step(torch.tensor([[1.0] * 7, [0.5] * 6 + [3.0]])))
        env.close()
    effort = 0.1 * torch.tensor([1.0, (6 * 0.25 + 1) / 7])
    torch.testing.assert_close(steps[0].reward, steps[1].reward - effort)
    torch.testing.assert_close(steps[0].metrics["effort"], effort)
    assert torch.equal(steps[0].success, steps[1].success)


def test_the_pages_point_to_each_other():
    assert "(vla_training.md)" in PAGE and "(vla.md)" in TRAINING


def test_the_suite_of_the_page_is_one_of_the_tabletop():
    found = re.search(r"suites:\n    (\w+): \{(\w+): (\w+)\}", TRAINING)
    assert found is not None
    name, setting, value = found.groups()
    recipe = load_recipe("tabletop_vla").recipe
    assert recipe.evaluate.suites == {name: {setting: value}}
    assert getattr(suite_env(recipe.env, {setting: value}), setting) == value != getattr(recipe.env, setting)


def test_the_gentle_arm_is_trained(here):
    run(
        "train gentle.yaml", "env.max_steps=8", "collect.copies=4", "collect.decisions=4", "train.env_steps=32",
        "evaluate.episodes=2", "evaluate.copies=2", "evaluate.videos=0",
    )  # fmt: skip
    (row,) = read_rows(here / "runs" / "gentle" / "metrics.jsonl")
    # Each action costs 0.1 times its mean square, and an untrained policy moves about.
    assert 0 < row["rollout/reward_effort_mean"] < 0.1


def test_the_settings_for_success_alone_are_those_of_a_recipe(tmp_path):
    section = TRAINING.partition("## From success alone")[2].partition("\n## ")[0]
    text = "".join(line[4:] for line in section.splitlines(keepends=True) if line.startswith("    "))
    path = tmp_path / "alone.yaml"
    path.write_text("extends: tabletop_vla_grpo.yaml\nname: alone\nenv: {end_on_success: false}\n" + text, encoding="utf-8")
    recipe, shown = load_recipe(path).recipe, yaml.safe_load(text)
    collect = {name: getattr(recipe.collect, name) for name in shown["collect"]}
    assert collect | {"curriculum": {"kind": recipe.collect.curriculum.kind}} == shown["collect"]
    assert recipe.algorithm.credit.mask_after_success is shown["algorithm"]["credit"]["mask_after_success"] is True
