"""Demonstrations, instructions, pictures, chunks and weights that do not fit: one sentence, and nothing is begun."""

import json
import os
import re
import shlex
import shutil
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embodied_rl.cli import main
from embodied_rl.envs.tabletop.instructions import MAX_WORDS, encode, word_id
from embodied_rl.errors import CapabilityError, ShapeError
from embodied_rl.observation import check_observation
from embodied_rl.types import ActionSpec, TensorSpec
from tests.kit import spec
from tests.resume import lab

RECIPE = """\
name: {name}
threads: 1
env: {{type: {env}}}
policy: {{type: tiny_vla_tokens, bins: 16, width: 16, heads: 2, layers: 1, channels: 8, glances: 2, chunk: 2}}
algorithm: {algorithm}
evaluate: {{episodes: 0}}
log: {{tensorboard: false, progress: false}}
"""
SFT = "{type: sft, demonstrations: set, steps: 2, steps_per_update: 2, batch_size: 4, warmup: 1}\ncollect: {copies: 4}"
PPO = """\
{type: ppo, update: {epochs: 1, minibatches: 1}}
collect: {copies: 4, decisions: 4}
train: {env_steps: 32}"""
EPISODES, INFO = Path("set/meta/episodes.jsonl"), Path("set/meta/info.json")
FILE = "set/data/chunk-000/episode_000002.parquet"


@pytest.fixture
def work(tmp_path, monkeypatch):
    """Working folder with `sft.yaml`, `rl.yaml`, and in `set/` demonstrations that a test may damage."""
    monkeypatch.chdir(tmp_path)
    env, demos = lab.seen()
    shutil.copytree(demos, "set")
    for name, algorithm in (("sft", SFT), ("rl", PPO)):
        (tmp_path / f"{name}.yaml").write_text(RECIPE.format(name=name, env=env, algorithm=algorithm))
    before = torch.get_num_threads()
    yield tmp_path
    torch.set_num_threads(before)


def say(capsys, *argv: str) -> str:
    """The one message of a command that is refused."""
    capsys.readouterr()
    assert main(list(argv)) == 2
    err = capsys.readouterr().err
    assert err.startswith("error: ") and err.count("\n") == 1, err
    return err.removeprefix("error: ").removesuffix("\n")


# ---- demonstrations, when training begins ----------------------------------------------------------------------------


def cut_file():
    Path(FILE).write_bytes(Path(FILE).read_bytes()[: os.path.getsize(FILE) // 2])


def cut_line():
    EPISODES.write_bytes(EPISODES.read_bytes()[:-30])


def other_actions():
    table = pq.read_table(FILE)
    actions = pa.array([[0.0] * 3] * len(table), pa.list_(pa.float32(), 3))
    pq.write_table(table.set_column(table.column_names.index("action"), "action", actions), FILE)


def say_instead(*texts):
    """Other instructions from episode 3 on."""
    rows = [json.loads(line) for line in EPISODES.read_text().splitlines()]
    for row, text in zip(rows[3:], texts, strict=False):
        row["tasks"] = [text]
    EPISODES.write_text("".join(json.dumps(row) + "\n" for row in rows))


def more_words():
    """The set says that its words go further than the env's."""
    info = json.loads(INFO.read_text())
    info["embodied_rl"]["observation"]["word"]["high"] = 9
    INFO.write_text(json.dumps(info))


MAKE = "python -c \"from embodied_rl.demo_stats import write_statistics; write_statistics('set')\""
SETS = {
    "a file that is cut": (cut_file, f"{FILE}: is cut short or damaged (*); restore the file from a copy, or collect the set anew"),
    "a file that is missing": (lambda: os.unlink(FILE), f"{FILE}: is missing; restore the file from a copy, or collect the set anew"),
    "a list of episodes that is cut": (
        cut_line, "set/meta/episodes.jsonl: its last line is cut; go on with embodied-rl collect, or delete it"),
    "no episode": (lambda: EPISODES.write_text(""), "set: holds no episode; collect some with: embodied-rl collect"),
    "actions of two sizes": (
        other_actions, f"{FILE}: 'action' has 3 numbers, info.json says 2; see all problems with: embodied-rl check demos set"),
    "no statistics": (
        lambda: os.unlink("set/meta/stats.json"),
        f"set/meta/stats.json: is missing, so nothing can be normalised; make it with: {MAKE}"),
    "an empty instruction": (
        lambda: say_instead(" "), "set/meta/episodes.jsonl: episode 3: the instruction is empty, expected 1 to 500 printable characters; "
        "correct it there and in meta/tasks.jsonl"),
    "a very long instruction": (
        lambda: say_instead("very " * 101), "set/meta/episodes.jsonl: episode 3: the instruction has 505 characters, expected at most 500; "
        "correct it there and in meta/tasks.jsonl"),
    "words that the env does not know": (
        more_words, "set: observation 'word' has numbers up to 9, the env knows them up to 2; collect a set in this env, or "
        "set the env as it was then"),
}  # fmt: skip


@pytest.mark.parametrize("case", SETS)
def test_a_set_that_cannot_be_learned_from_is_refused_before_a_run_is_begun(case, work, capsys):
    damage, message = SETS[case]
    damage()
    assert re.fullmatch(re.escape(message).replace(r"\*", ".+"), said := say(capsys, "train", "sft.yaml")), said
    assert not os.path.exists("runs"), "the same command can be given again once the set is mended"


def test_a_set_in_any_language_is_learned_from(work):
    say_instead("把红色方块推到目标", "Würfel schieben", "ادفع المكعب")
    assert main(["train", "sft.yaml"]) == 0


# ---- settings of rollouts, which imitation does not make --------------------------------------------------------------

COLLECTED = {
    "decisions=16": ("collect.decisions (16)", "collect.decisions=64"),
    "mode=episodes": ("collect.mode ('episodes')", "collect.mode='stream'"),
    "pipeline=2": ("collect.pipeline (2)", "collect.pipeline=1"),
    "curriculum.starts=100": ("collect.curriculum.starts (100)", "collect.curriculum.starts=null"),
    "anneal.start=1.5": ("collect.anneal (a section)", "collect.anneal=null"),
}


@pytest.mark.parametrize("setting", COLLECTED)
def test_a_setting_that_only_rollouts_read_is_refused_where_none_are_made(setting, work, capsys):
    found, undone = COLLECTED[setting]
    end = " nothing with algorithm sft, which makes no rollouts: remove {}, or undo what a recipe that is extended brings with "
    assert say(capsys, "train", "sft.yaml", f"collect.{setting}") == f"{found} does{end.format('it')}{undone}"
    assert say(capsys, "train", "sft.yaml", f"collect.{setting}", "train.env_steps=7") == (
        f"{found}, train.env_steps (7) do{end.format('them')}{undone} train.env_steps=1000000"
    )
    assert not os.path.exists("runs")


def test_what_undoes_them_is_taken(work, capsys):
    """As where a recipe of reinforcement is extended by one that imitates."""
    (work / "both.yaml").write_text(f"extends: rl.yaml\nname: both\nalgorithm: {SFT.partition(chr(10))[0]}\n")
    said = say(capsys, "train", "both.yaml", "collect.group_size=2", "collect.mode=episodes", "collect.hints=[0.5]")
    assert said.startswith(
        "collect.decisions (4), collect.mode ('episodes'), collect.group_size (2), collect.hints ([0.5]), train.env_steps (32) do nothing "
    )
    assert main(["train", "both.yaml", *shlex.split(said.rpartition(" with ")[2])]) == 0
    assert main(["collect", "sft.yaml", "--episodes", "4", "--out", "more", "collect.decisions=16"]) == 0


# ---- instructions of the tabletop ------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "  ", "?!", "👩‍🔧"])
def test_an_instruction_without_a_word_is_refused(text):
    message = f"instruction {text!r} has no words, the tabletop reads 1 to 14: word it in letters or digits, "
    with pytest.raises(CapabilityError, match=f"^{re.escape(message)}or raise MAX_WORDS in envs/tabletop/instructions.py$"):
        encode(text)


def test_an_instruction_of_too_many_words_is_refused_and_not_cut():
    assert len(encode("lift " * MAX_WORDS)) == MAX_WORDS and all(encode("lift " * MAX_WORDS))
    with pytest.raises(CapabilityError) as error:
        encode("lift " * 500)
    assert str(error.value) == (
        f"instruction '{'lift ' * 12}...' has 500 words, the tabletop reads 1 to 14: word it shorter, or raise MAX_WORDS in "
        "envs/tabletop/instructions.py"
    )


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Würfel HEBEN!", ["würfel", "heben"]),
        ("Wu\u0308rfel", ["würfel"]),  # the same letters, put together differently
        ("मेज़ पर रखो", ["मेज़", "पर", "रखो"]),
        ("把红色方块，推到目标", ["把红色方块", "推到目标"]),
        ("push_the-cube's 2nd", ["push", "the", "cube", "s", "2nd"]),
    ],
)
def test_words_of_any_language_have_ids_of_their_own(text, words):
    import unicodedata

    ids = [word_id(unicodedata.normalize("NFC", word)) for word in words]
    assert encode(text) == (*ids, *[0] * (MAX_WORDS - len(ids)))


def test_a_template_that_is_too_long_ends_a_run_with_a_sentence(work, capsys, monkeypatch):
    from embodied_rl.envs.tabletop import instructions

    monkeypatch.setitem(instructions.TEMPLATES["reach"], "train", ("reach the {a} " + "now " * 20,))
    said = say(capsys, "train", "rl.yaml", "env.type=tabletop", "env.tasks=[reach]", "policy.type=mlp", "policy.chunk=1")
    assert re.match(r"instruction 'reach the .+\.\.\.' has 2\d words, the tabletop reads 1 to 14: word it shorter", said)


# ---- what an env shows -----------------------------------------------------------------------------------------------

CAMERA = "torch.uint8 [4, 8, 8, 3]: convert it in the env, or correct EnvSpec.observation"
NAMES = "make the env's observation and EnvSpec.observation name the same entries"
SHOWN = {
    "a picture of another size": (
        'obs["camera"] = obs["camera"][:, :6]', f"the env shows 'camera' as torch.uint8 [4, 6, 8, 3], its spec promises {CAMERA}"),
    "a picture of another type": (
        'obs["camera"] = obs["camera"].float() / 255',
        f"the env shows 'camera' as torch.float32 [4, 8, 8, 3], its spec promises {CAMERA}"),
    "colours first": (
        'obs["camera"] = obs["camera"].permute(0, 3, 1, 2)',
        f"the env shows 'camera' as torch.uint8 [4, 3, 8, 8], its spec promises {CAMERA}"),
    "a copy too few": (
        'obs["camera"] = obs["camera"][1:]', f"the env shows 'camera' as torch.uint8 [3, 8, 8, 3], its spec promises {CAMERA}"),
    "no picture": (
        'del obs["camera"]', f"the env shows position, goals, word, its spec promises position, goals, word, camera: {NAMES}"),
    "something more": (
        'obs["depth"] = obs["position"]',
        f"the env shows position, goals, word, camera, depth, its spec promises position, goals, word, camera: {NAMES}"),
    "words beyond the vocabulary": (
        'obs["word"] = obs["word"] + 7', "the env shows 'word' with numbers from 8 to 9, its spec promises 0 to 2: keep to it in "
        "the env, or correct EnvSpec.observation"),
}  # fmt: skip


def shows(path, change):
    """Write the env as a file, with one line more where it looks."""
    source = lab.SEEN.format(shown=lab.TOYS / "shown.py")
    path.write_text(source.replace("        return obs\n", f"        {change}\n        return obs\n", 1))


@pytest.mark.parametrize("case", SHOWN)
def test_an_env_that_shows_something_else_than_it_promises(case, work, capsys):
    change, message = SHOWN[case]
    shows(work / "wrong.py", change)
    assert say(capsys, "train", "rl.yaml", "env.type=wrong.py") == message
    assert say(capsys, "collect", "rl.yaml", "env.type=wrong.py", "--episodes", "4", "--out", "out") == message


def test_an_env_that_changes_what_it_shows_in_the_middle_of_an_episode(work, capsys):
    shows(work / "wrong.py", 'if bool((self.t > 2).any()): obs["camera"] = obs["camera"].float()')
    message = SHOWN["a picture of another type"][1]
    assert say(capsys, "train", "rl.yaml", "env.type=wrong.py") == message
    assert main(["train", "rl.yaml"]) == 2, "the folder of the run that was refused is kept"
    shutil.rmtree("runs")
    assert main(["train", "rl.yaml"]) == 0
    text = (work / "runs/rl/recipe.yaml").read_text()
    shows(work / "other.py", SHOWN["words beyond the vocabulary"][0])
    for name, wanted in (("wrong", message), ("other", SHOWN["words beyond the vocabulary"][1])):
        (work / "runs/rl/recipe.yaml").write_text(text.replace(lab.seen()[0], str(work / f"{name}.py")))
        assert say(capsys, "evaluate", "runs/rl", "--episodes", "4", "--copies", "4") == wanted


def test_ranges_are_looked_at_where_an_episode_begins_and_only_of_ids():
    made = spec({"ids": TensorSpec((2,), torch.int64, low=0, high=5, constant=True), "x": TensorSpec((1,), low=0, high=1)}, ActionSpec("discrete", 2))
    obs = {"ids": torch.tensor([[0, 5]]), "x": torch.tensor([[7.0]])}
    check_observation(obs, made, start=True)
    for bad in (-1, 6):
        obs["ids"][0, 1] = bad
        check_observation(obs, made)
        with pytest.raises(ShapeError, match="the env shows 'ids' with numbers from "):
            check_observation(obs, made, start=True)


# ---- policies --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sft", "rl"])
def test_a_chunk_that_is_longer_than_an_episode(name, work, capsys):
    sentence = (
        "a decision of the policy covers {} control steps and an episode of the env has {}, so the rest could never be executed: lower "
        "the policy's chunk to {}, or raise env.max_steps"
    )
    assert say(capsys, "train", f"{name}.yaml", "policy.chunk=11") == sentence.format(11, 10, 10)
    assert not os.path.exists("runs")
    assert main(["train", f"{name}.yaml", "policy.chunk=10"]) == 0
    assert say(capsys, "evaluate", f"runs/{name}", "--episodes", "2", "env.max_steps=4") == sentence.format(10, 4, 4)


def test_pictures_of_a_size_that_a_policy_cannot_cut(work, capsys):
    said = say(capsys, "train", "tabletop_vla", "start_from=null", "env.picture_size=30")
    assert said == (
        "observation 'close' is a picture of 30 x 30 pixels; this policy takes multiples of 4: make the env's pictures 32 x 32"
    )


def test_cameras_that_do_not_exist_and_cameras_that_no_demonstration_has(work, capsys):
    capsys.readouterr()
    assert main(["train", "tabletop_vla", "start_from=null", "env.cameras=[table, wirst]"]) == 2
    assert capsys.readouterr().err == (
        "error: 1 problem in the recipe configs/tabletop_vla.yaml:\n  command line: env.cameras=[table, wirst]: env.cameras: "
        "camera 'wirst' does not exist; did you mean 'wrist'?\n"
    )
    text = INFO.read_text()
    INFO.write_text(text.replace("observation.images.camera", "observation.images.top"))
    assert say(capsys, "train", "sft.yaml") == (
        "set: observation 'camera' is absent (it has position, goals, word, top), the env shows [8, 8, 3] torch.uint8; collect "
        "a set in this env, or set the env as it was then"
    )


def test_weights_that_speak_other_tokens(work, capsys):
    assert main(["train", "rl.yaml", "name=first"]) == 0
    end = ". Use the recipe it was trained with (recipe.yaml in its run folder)"
    assert say(capsys, "train", "rl.yaml", "start_from=runs/first", "policy.bins=32") == (
        "checkpoint runs/first holds another policy: head.weight is [32, 16], the policy has [64, 16]; head.bias is [32], the "
        f"policy has [64]{end}"
    )
    source = lab.SEEN.format(shown=lab.TOYS / "shown.py")
    words = 'own = {"word": TensorSpec((1,), torch.int64, low=0, high=9, constant=True), "goals": TensorSpec((4,))}'
    (work / "words.py").write_text(source.replace('own = {"goals": TensorSpec((4,))}', words))
    assert say(capsys, "train", "rl.yaml", "start_from=runs/first", "env.type=words.py") == (
        f"checkpoint runs/first holds another policy: trunk.words.embedding.weight is [3, 64], the policy has [10, 64]{end}"
    )
    assert not os.path.exists("runs/rl")


def test_a_language_model_of_another_kind(work, capsys):
    pytest.importorskip("transformers")
    small = ["policy.type=hf_vla", "policy.channels=48", "policy.glances=8"]
    assert main(["train", "rl.yaml", "name=first", *small, "policy.model=tiny:paligemma"]) == 0
    said = say(capsys, "train", "rl.yaml", "start_from=runs/first", *small, "policy.model=tiny:smolvlm")
    assert said.startswith("checkpoint runs/first holds another policy: trunk.backbone.model.")
    assert said.endswith("Use the recipe it was trained with (recipe.yaml in its run folder)")
    assert say(capsys, "train", "rl.yaml", *small, "policy.model=nowhere") == (
        "policy.model 'nowhere': no such folder; models are never downloaded: give a folder that holds config.json and "
        "safetensors weights, or tiny:paligemma or tiny:smolvlm or tiny:qwen3_vl"
    )
    assert not os.path.exists("runs/rl")
