"""The recipe loader: YAML 1.2 scalars, extends, overrides, and every problem told with its place."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from embodied_rl import yaml_strict
from embodied_rl.config import build_recipe, dump_recipe, load_recipe, load_resolved
from embodied_rl.errors import ConfigError, NotFoundError
from embodied_rl.recipe import Recipe

ENV = '''
"""A room with a button."""
from typing import Literal
from pydantic import Field, model_validator
from embodied_rl.section import Section

class Reward(Section):
    kind: Literal["dense", "sparse"] = "dense"
    scale: float = Field(1.0, gt=0)

class Config(Section):
    tasks: tuple[str, ...] = ("press",)
    reward: Reward = Reward(scale=0.5)
    noise: float = Field(0.0, ge=0, le=1)
    horizon: int = Field(50, ge=1)
    sticky: bool = False
    limit: float | Literal["auto"] = "auto"
    weights: dict[str, float] = {}

    @model_validator(mode="after")
    def _tasks(self):
        if self.weights and set(self.weights) != set(self.tasks):
            raise ValueError(f"weights has {sorted(self.weights)} and tasks {sorted(self.tasks)}: name the same tasks in both")
        return self

def build(config, *, num_envs, device, split, seed):
    raise NotImplementedError
'''
POLICY = '''
"""A network."""
from embodied_rl.section import Section
class Config(Section):
    width: int = 64
    lr_scale: float
def build(config, *, env, device):
    raise NotImplementedError
'''
ALGORITHM = '''
"""A method."""
from pydantic import Field
from embodied_rl.section import Section
class Config(Section):
    clip: float = Field(0.2, gt=0)
    epochs: int = 4
    gamma: float = 0.99
'''
BASE = """\
name: base
env: {type: ./room.py}
policy:
  type: ./net.py
  lr_scale: 1e-4
algorithm:
  type: ./method.py
"""


@pytest.fixture
def folder(tmp_path, monkeypatch):
    for name, text in {"room.py": ENV, "hall.py": ENV.replace("horizon", "length"), "net.py": POLICY, "method.py": ALGORITHM}.items():
        (tmp_path / name).write_text(text)
    (tmp_path / "base.yaml").write_text(BASE)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def write(folder: Path, text: str, name: str = "my.yaml") -> str:
    (folder / name).write_text(text)
    return name


def problems(call, *args) -> list[str]:
    with pytest.raises(ConfigError) as error:
        call(*args)
    return [line.strip() for line in str(error.value).splitlines()[1:]]


def test_yaml_1_2_scalars_are_read_as_a_person_reads_them():
    text = "[1e-4, 1E5, -.5, 1., 3, -7, +2, 0x1F, 0o17, on, Off, yes, no, true, False, null, ~, 12:30, 1_000, 0.1.2, .inf, -.inf]"
    assert yaml_strict.parse(text, "x").plain() == [
        1e-4, 1e5, -0.5, 1.0, 3, -7, 2, 31, 15, "on", "Off", "yes", "no", True, False, None, None, "12:30", "1_000", "0.1.2",
        float("inf"), float("-inf"),
    ]  # fmt: skip
    assert yaml_strict.parse("['1e-4', \"true\", '010']", "x").plain() == ["1e-4", "true", "010"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 010", "f:1: 010: a leading zero is octal for some readers; write 10, or quote it for text"),
        ("a: .nan", "f:1: .nan: no setting can be 'not a number'; write null or a number"),
        ("a: 1\nb: 2\na: 3", "f:3: key 'a' was given before at f:1; keep one of them"),
        ("a: &x 1\nb: *x", "f:1: not valid YAML: anchors and aliases (&, *) are not used in recipes; use extends"),
        ("a: !!python/name:os.system", "f:1: not valid YAML: tags (tag:yaml.org,2002:python/name:os.system) are not used in recipes"),
        ("<<: {a: 1}", "f:1: merge keys (<<) are not used in recipes; use extends"),
        ("1: a", "f:1: a key must be a name, got 1; quote it if it is meant"),
        ("? [a]\n: b", "f:1: a key must be a name"),
        ("a: [1, 2", "f:1: not valid YAML while parsing a flow sequence: expected ',' or ']', but got '<stream end>'"),
        ("a: 1\n\tb: 2", "f:2: not valid YAML while scanning for the next token: found character '\\t' that cannot start any token"),
        ("a: 1\n---\nb: 2", "f:2: not valid YAML expected a single document in the stream: but found another document"),
        ("a: 1\nb: \x00", "f:2: not valid YAML: character #x0000 is not allowed"),
    ],
)
def test_yaml_that_would_lose_or_bend_a_value_is_refused(text, message):
    with pytest.raises(yaml_strict.YamlError) as error:
        yaml_strict.parse(text, "f")
    assert error.value.problems == [message]


scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(st.characters(codec="utf-8", exclude_categories=["C"]))
trees = st.recursive(scalars, lambda x: st.lists(x) | st.dictionaries(st.text("abcxyz_019", min_size=1), x), max_leaves=12)


@settings(max_examples=200, deadline=None)
@given(trees)
def test_what_is_dumped_reads_back_bit_for_bit(tree):
    text = yaml_strict.dump({"tree": tree})
    back = yaml_strict.parse(text, "x").plain()["tree"]
    assert repr(back) == repr(tree)


@pytest.mark.parametrize("text", ["on", "1e-4", "010", "12:30", "null", "0x1F", ".nan", "1_000", "", "a: b", "- a", "=", "<<", "2001-01-01"])
def test_strings_that_look_like_other_types_stay_strings(text):
    assert yaml_strict.parse(yaml_strict.dump({"a": text}), "x").plain() == {"a": text}


def test_a_recipe_says_where_each_value_comes_from(folder):
    mine = write(folder, "extends: base.yaml\nseed: 3\nenv:\n  noise: 0.25\n  tasks: [press, pull]\n")
    resolved = load_recipe(mine, ["algorithm.clip=0.1", "collect.copies=8"])
    assert isinstance(resolved.recipe, Recipe)
    assert (resolved.recipe.seed, resolved.recipe.env.noise, resolved.recipe.policy.lr_scale) == (3, 0.25, 1e-4)
    assert resolved.recipe.env.tasks == ("press", "pull")
    expected = {
        "seed": "my.yaml:2", "env.noise": "my.yaml:4", "env.tasks": "my.yaml:5", "env.type": "base.yaml:2", "env.horizon": "default",
        "env.reward.scale": "default", "policy.lr_scale": "base.yaml:5", "algorithm.clip": "command line",
        "collect.copies": "command line", "train.env_steps": "default", "env.weights": "default",
    }  # fmt: skip
    assert {key: resolved.sources[key] for key in expected} == expected


def test_later_files_lie_over_earlier_ones_and_lists_are_replaced(folder):
    write(folder, "seed: 1\nenv: {tasks: [press, pull], noise: 0.1}\ncollect: {copies: 8}\n", "a.yaml")
    write(folder, "seed: 2\nenv: {tasks: [press]}\n", "b.yaml")
    recipe = load_recipe(write(folder, "extends: [base.yaml, a.yaml, b]\ncollect: {decisions: 5}\n")).recipe
    assert (recipe.seed, recipe.env.tasks, recipe.env.noise) == (2, ("press",), 0.1)
    assert (recipe.collect.copies, recipe.collect.decisions) == (8, 5)


def test_extends_is_relative_to_the_file_that_says_it(folder):
    (folder / "deep").mkdir()
    (folder / "deep" / "part.yaml").write_text("extends: ../base.yaml\nseed: 9\n")
    assert load_recipe(write(folder, "extends: deep/part.yaml\n")).recipe.seed == 9


def test_extends_falls_back_to_the_packaged_configs(folder, monkeypatch):
    packaged = folder / "packaged"
    (packaged / "algorithm").mkdir(parents=True)
    (packaged / "algorithm" / "calm.yaml").write_text("algorithm: {clip: 0.05}\n")
    (packaged / "calm_room.yaml").write_text("extends: [algorithm/calm.yaml]\n")
    monkeypatch.setattr("embodied_rl.config.packaged_configs", lambda: packaged)
    resolved = load_recipe(write(folder, "extends: [base.yaml, calm_room]\n"))
    assert resolved.recipe.algorithm.clip == 0.05


def test_a_changed_type_drops_the_settings_of_the_old_one(folder):
    write(folder, "extends: base.yaml\nenv: {horizon: 7, noise: 0.5}\n", "with_settings.yaml")
    recipe = load_recipe(write(folder, "extends: with_settings.yaml\nenv: {type: ./hall.py, length: 9}\n")).recipe
    assert recipe.env.length == 9
    assert recipe.env.noise == 0.0
    recipe = load_recipe("with_settings.yaml", ["env.length=11", "env.type=hall.py"]).recipe
    assert (recipe.env.length, recipe.env.noise) == (11, 0.0)
    recipe = load_recipe("with_settings.yaml", ["env.type=room.py"]).recipe
    assert (recipe.env.horizon, recipe.env.noise) == (7, 0.5)


def test_a_partly_given_section_keeps_the_defaults_of_its_owner(folder):
    recipe = load_recipe("base.yaml", ["env.reward.kind=sparse"]).recipe
    assert recipe.env.reward.scale == 0.5


def test_overrides_follow_the_same_yaml_rules(folder):
    recipe = load_recipe("base.yaml", ["policy.lr_scale=3e-5", "env.tasks=[press, on]", "env.limit=2", "train.max_seconds=null"]).recipe
    assert recipe.policy.lr_scale == 3e-5
    assert recipe.env.tasks == ("press", "on")
    assert (recipe.env.limit, recipe.train.max_seconds) == (2.0, None)


def test_all_problems_are_told_at_once_each_with_its_place(folder):
    bad = write(
        folder,
        """\
extends: base.yaml
seed: fast
env:
  nose: 0.1
  horizon: 2.5
  limit: soon
  sticky: on
  reward:
    scael: 1
    scale: -1
algorithm:
  gama: 0.9
  clip: 0
train:
  env_steps: 1_000_000
collect.copies: 3
frobnicate: 1
""",
    )
    told = problems(load_recipe, bad, ["algorithm.epoch=3", "train.max_seconds=0", "evaluate.episodes=1e3"])
    assert sorted(told) == sorted(
        [
            "my.yaml:2: seed: expected a valid integer, got 'fast'",
            "my.yaml:4: env.nose: unknown key; did you mean 'noise'?",
            "my.yaml:5: env.horizon: expected a valid integer, got 2.5",
            "my.yaml:6: env.limit: expected a valid number, got 'soon' or expected 'auto', got 'soon'",
            "my.yaml:7: env.sticky: expected a valid boolean, got 'on'; write true",
            "my.yaml:9: env.reward.scael: unknown key; did you mean 'scale'?",
            "my.yaml:10: env.reward.scale: expected greater than 0, got -1",
            "my.yaml:12: algorithm.gama: unknown key; did you mean 'gamma'?",
            "my.yaml:13: algorithm.clip: expected greater than 0, got 0",
            "my.yaml:15: train.env_steps: expected a valid integer, got '1_000_000'; write 1000000",
            "my.yaml:16: collect.copies: unknown key; a dotted key works only on the command line, nest it here",
            "my.yaml:17: frobnicate: unknown key; known: "
            "algorithm, checkpoint, collect, device, env, evaluate, log, name, policy, reward, seed, start_despite, "
            "start_from, threads, train",
            "command line: algorithm.epoch=3: algorithm.epoch: unknown key; did you mean 'epochs'?",
            "command line: train.max_seconds=0: train.max_seconds: expected greater than 0, got 0",
            "command line: evaluate.episodes=1e3: evaluate.episodes: expected a valid integer, got 1000.0; write 1000",
        ]
    )


def test_relations_name_both_values_and_a_way_out(folder):
    assert problems(load_recipe, "base.yaml", ["collect.copies=10", "collect.pipeline=4"]) == [
        "command line: collect.pipeline=4: collect: copies (10) must be a multiple of group_size (1) times pipeline (4): "
        "change copies to 12"
    ]
    assert problems(load_recipe, "base.yaml", ["env.weights={pull: 1}"]) == [
        "command line: env.weights={pull: 1}: env: weights has ['pull'] and tasks ['press']: name the same tasks in both"
    ]


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("policy: {lr_scale: 1}", r"my.yaml:1: policy.type: missing; it says which policy these settings are for \(known: .*\)"),
        ("policy: mlp", r"my.yaml:1: policy: expected a section, got 'mlp'; write `policy: \{type: ...\}` \(known: .*\)"),
        ("policy: {type: 3}", r"my.yaml:1: policy.type: expected a name, got 3 \(known: .*\)"),
        ("policy: {type: mlpp}", r"my.yaml:1: policy.type: policy 'mlpp' does not exist; did you mean 'mlp'\?"),
        ("policy: {type: ./nowhere.py}", r"my.yaml:1: policy.type: policy '.*nowhere.py': no such file"),
        ("policy: {type: no.such.lab}", r"my.yaml:1: policy.type: policy 'no.such.lab': there is no module 'no'"),
        ("policy: {type: ./method.py}", r"my.yaml:1: policy.type: policy '.*method.py': .*method.py defines no build; a file.*"),
        ("", r"my.yaml: policy: the section is missing; add `policy: \{type: ...\}` \(known: .*\)"),
    ],
)
def test_a_component_without_a_usable_type_has_its_own_sentence(folder, text, expected):
    body = f"{text}\nenv: {{type: ./room.py, horizon: 0}}\nalgorithm: {{type: ./method.py}}\n"
    told = problems(load_recipe, write(folder, body))
    assert len(told) == 2
    assert re.fullmatch(expected, told[0]), told[0]
    assert told[1] == "my.yaml:2: env.horizon: expected greater than or equal to 1, got 0"


def test_a_required_setting_that_is_missing_points_at_its_section(folder):
    assert problems(load_recipe, write(folder, "extends: base.yaml\npolicy: {type: net.py}\nseed: -1\n")) == [
        "my.yaml:3: seed: expected greater than or equal to 0, got -1"
    ]
    write(folder, BASE.replace("  lr_scale: 1e-4\n", ""), "bare.yaml")
    assert problems(load_recipe, "bare.yaml") == ["bare.yaml:3: policy.lr_scale: missing; it has no default"]


def test_a_circle_of_extends_is_shown_as_a_chain(folder):
    write(folder, "extends: b.yaml\n", "a.yaml")
    write(folder, "extends: c.yaml\n", "b.yaml")
    write(folder, "extends: [base.yaml, b.yaml]\n", "c.yaml")
    assert problems(load_recipe, "a.yaml") == ["c.yaml:1: extends: goes in a circle: b.yaml -> c.yaml -> b.yaml"]


def test_one_part_may_be_reached_by_two_ways(folder):
    write(folder, "extends: base.yaml\nseed: 1\n", "a.yaml")
    write(folder, "extends: base.yaml\ncollect: {decisions: 3}\n", "b.yaml")
    recipe = load_recipe(write(folder, "extends: [a.yaml, b.yaml]\n")).recipe
    assert (recipe.seed, recipe.collect.decisions) == (1, 3)


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("seed", "command line: seed: expected a.b=c, for example train.env_steps=100000"),
        ("seed=", "command line: seed=: no value after '='; write seed=null to unset it"),
        ("extends=x.yaml", "command line: extends=x.yaml: extends belongs in a recipe file"),
        ("seed=010", "command line: seed=010: 010: a leading zero is octal for some readers; write 10, or quote it for text"),
        ("env.tasks=[a", "command line: env.tasks=[a: not valid YAML while parsing a flow sequence: expected ',' or ']', but got '<stream end>'"),
        ("seed.deep=1", "command line: seed.deep=1: seed: expected a valid integer, got a section"),
    ],
)  # fmt: skip
def test_overrides_that_cannot_be_read_are_told(folder, override, message):
    assert problems(load_recipe, "base.yaml", [override]) == [message]


def test_the_same_override_twice_is_refused(folder):
    assert problems(load_recipe, "base.yaml", ["seed=1", "seed=2"]) == ["command line: seed=2: seed was given before as seed=1; keep one"]


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n", "my.yaml:1: a recipe is a mapping (`key: value` lines), got [\"a\"]"),
        (b"name: \xff\n", "my.yaml: not a text file in UTF-8 (byte 6 is 0xff)"),
        (b"extends: nowhere.yaml\n", "my.yaml:1: extends: 'nowhere.yaml' is neither beside this file nor in the packaged configs/"),
        (b"extends: [1]\n", "my.yaml:1: extends: expected a file name or a list of them, got 1"),
    ],
)
def test_files_that_are_no_recipe_are_told(folder, content, message):
    (folder / "my.yaml").write_bytes(content)
    assert problems(load_recipe, "my.yaml") == [message]


def test_a_file_with_a_lost_value_is_still_checked_for_the_rest(folder):
    mine = write(folder, "extends: base.yaml\nseed: 1\nseed: 2\nenv:\n  horizon: 010\n  nose: 1\n")
    assert problems(load_recipe, mine) == [
        "my.yaml:3: key 'seed' was given before at my.yaml:2; keep one of them",
        "my.yaml:5: 010: a leading zero is octal for some readers; write 10, or quote it for text",
        "my.yaml:6: env.nose: unknown key; did you mean 'noise'?",
    ]


def test_a_recipe_that_does_not_exist_is_told_with_the_nearest_name(folder):
    with pytest.raises(NotFoundError, match="recipe 'tabletop_dmo': no such file, and no packaged recipe has this name; did you mean 'tabletop_demo'"):
        load_recipe("tabletop_dmo")


def test_the_resolved_recipe_loads_unchanged_from_another_folder(folder, tmp_path_factory, monkeypatch):
    resolved = load_recipe("base.yaml", ["policy.lr_scale=0.1000000000000000055", "env.noise=1e-17", "name=on", "env.weights={press: .inf}"])
    text = dump_recipe(resolved.recipe)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    (elsewhere / "recipe.yaml").write_text(text)
    monkeypatch.chdir(elsewhere)
    back = load_resolved("recipe.yaml")
    assert back.recipe == resolved.recipe
    assert dump_recipe(back.recipe) == text
    assert "default" not in back.sources.values()
    assert load_recipe(elsewhere).recipe == resolved.recipe


@settings(max_examples=50, deadline=None)
@given(value=st.floats(0, 1, allow_subnormal=True))
def test_every_float_survives_the_run_folder(tmp_path_factory, value):
    folder = tmp_path_factory.getbasetemp() / "floats"
    folder.mkdir(exist_ok=True)
    for name, text in {"room.py": ENV, "net.py": POLICY, "method.py": ALGORITHM, "base.yaml": BASE}.items():
        (folder / name).write_text(text)
    recipe = load_recipe(folder / "base.yaml", [f"env.noise={value!r}"]).recipe
    (folder / "recipe.yaml").write_text(dump_recipe(recipe))
    assert load_resolved(folder / "recipe.yaml").recipe.env.noise.hex() == value.hex()


def test_a_resolved_recipe_extends_nothing(folder):
    assert problems(load_resolved, write(folder, "extends: base.yaml\n"))[0] == "my.yaml:1: extends: a resolved recipe extends nothing"


def test_a_recipe_can_be_built_from_plain_data(folder):
    data = {"env": {"type": "room.py"}, "policy": {"type": "net.py", "lr_scale": 1}, "algorithm": {"type": "method.py"}, "seed": 5}
    recipe = build_recipe(data)
    assert (recipe.seed, recipe.policy.lr_scale, recipe.env.tasks) == (5, 1.0, ("press",))
    assert problems(build_recipe, data | {"sed": 1}) == ["recipe: sed: unknown key; did you mean 'seed'?"]
    assert build_recipe(data) == recipe
    assert build_recipe(data | {"seed": 6}) != recipe
