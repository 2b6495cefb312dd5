"""Wrapped models on the command line: trained, then evaluated from the run folder and the folder of the model."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
import yaml

from embodied_rl import registry
from embodied_rl.cli import main
from embodied_rl.config import build_recipe
from embodied_rl.session import build_policy
from tests.resume import lab

pytest.importorskip("transformers")

RECIPE = """\
name: run
threads: 1
env: {{type: {env}}}
policy: {policy}
algorithm: {{type: ppo, update: {{epochs: 1, minibatches: 1}}}}
collect: {{copies: 4, decisions: 4}}
train: {{env_steps: 32}}
evaluate: {{episodes: 4, copies: 4, videos: 0}}
log: {{tensorboard: false, progress: false}}
"""
POLICIES = {
    "paligemma": "{type: hf_vla, model: model, width: 16, heads: 2, layers: 1, chunk: 2, freeze: vision}",
    "qwen3_vl": "{type: hf_vla, model: model, head: flow, width: 16, heads: 2, layers: 1, chunk: 2, freeze: vision, lora: 2}",
    "pi0": "{type: pi0, model: model, chunk: 2, freeze: vision, lora: 2}",
}


@pytest.mark.parametrize("kind", POLICIES)
def test_a_run_folder_and_the_models_own_are_all_that_evaluation_needs(kind, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    module = registry.load("policy", "pi0" if kind == "pi0" else "hf_vla")
    torch.manual_seed(0)
    tiny = module.open_model(module.Config(model=f"tiny:{kind}"), module.TINY_PI0 if kind == "pi0" else module.TINY)
    tiny.save_pretrained("model")
    Path("run.yaml").write_text(RECIPE.format(env=lab.seen()[0], policy=POLICIES[kind]))
    before = torch.get_num_threads()
    assert main(["train", "run.yaml"]) == 0
    suite = json.loads(Path("runs/run/summary.json").read_text())["evaluation"]["heldout"]
    capsys.readouterr()
    assert main(["evaluate", "runs/run"]) == 0
    rate = suite["overall"]["success_once"]["rate"]
    assert f"{rate:.3f}" in capsys.readouterr().out
    shutil.rmtree("model")
    assert main(["evaluate", "runs/run"]) == 2
    assert re.fullmatch(r"error: policy.model 'model': no such folder; .*\n", capsys.readouterr().err)
    torch.set_num_threads(before)


PAGE = (Path(__file__).parents[2] / "docs" / "vla_models.md").read_text(encoding="utf-8")
SHOWN = [yaml.safe_load(block) for block in re.findall(r"^```yaml\n(.*?)^```", PAGE, flags=re.DOTALL | re.MULTILINE)]


def test_the_page_shows_a_section_for_each_of_the_two_policies():
    assert [(list(shown), shown["policy"]["type"]) for shown in SHOWN] == [(["policy"], "hf_vla"), (["policy"], "pi0")]


@pytest.mark.parametrize("shown", SHOWN, ids=lambda shown: shown["policy"]["type"])
@pytest.mark.parametrize("algorithm", [{"type": "sft", "demonstrations": "demos"}, {"type": "ppo"}], ids=lambda a: a["type"])
def test_a_section_of_the_page_is_one_of_a_recipe_that_imitates_and_of_one_that_reinforces(shown, algorithm):
    env = {"type": "tabletop", "observation": "pictures"}
    policy = build_recipe({"env": env, **shown, "algorithm": algorithm}).policy
    for name, value in shown["policy"].items():
        assert getattr(policy, name) == value
    tiny = {"pi0": {"model": "tiny:pi0", "chunk": 2}}.get(policy.type, {"model": "tiny:paligemma"})
    recipe = build_recipe({"env": env, "policy": shown["policy"] | tiny, "algorithm": algorithm})
    shows = registry.load("env", "tabletop").build(recipe.env, num_envs=1, device=torch.device("cpu"), split="train", seed=0)
    built = build_policy(recipe, env=shows.spec, device=torch.device("cpu"))
    shows.close()
    assert built.chunk == recipe.policy.chunk and any(p.requires_grad for p in built.parameters())
