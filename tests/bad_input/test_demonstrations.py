"""Damaged sets of demonstrations, sets that do not fit, and collecting what cannot be: what is said."""

import errno
import json
import os
import re
import shutil

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch

from embodied_rl.cli import main
from embodied_rl.config import load_component
from embodied_rl.demo_check import validate
from embodied_rl.demo_format import DemonstrationError, encode_picture
from embodied_rl.demonstrations import Demonstrations
from embodied_rl.errors import CapabilityError, NotFoundError
from embodied_rl.record_demos import collect_demonstrations
from embodied_rl.types import ActionSpec, TensorSpec
from tests.kit import TOYS
from tests.kit import spec as env_spec


def shown(**settings):
    return load_component("env", str(TOYS / "shown.py"), [f"{k}={json.dumps(v)}" for k, v in settings.items()])


@pytest.fixture(scope="module")
def good(tmp_path_factory):
    """A set of four episodes; read it, never write into it."""
    folder = tmp_path_factory.mktemp("good") / "set"
    collect_demonstrations(shown(), folder, 4, copies=4)
    return folder


@pytest.fixture
def demos(good, tmp_path, monkeypatch):
    """A copy in `set/` that a test may damage."""
    monkeypatch.chdir(tmp_path)
    shutil.copytree(good, "set")
    return tmp_path / "set"


def say(capsys, *argv: str) -> str:
    capsys.readouterr()
    assert main(list(argv)) == 2
    return capsys.readouterr().err


def info(folder, **changes):
    data = json.loads((folder / "meta/info.json").read_text()) | changes
    (folder / "meta/info.json").write_text(json.dumps(data))
    return data


def lines(folder, change):
    path = folder / "meta/episodes.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    change(rows)
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def episode(folder, index, change):
    """Rewrite the table of an episode."""
    path = folder / f"data/chunk-000/episode_{index:06d}.parquet"
    pq.write_table(change(pq.read_table(path)), path, write_page_checksum=True)


def column(name, values):
    """A change that puts other values into a column."""
    return lambda table: table.set_column(table.column_names.index(name), name, values(table))


# ---- opening ---------------------------------------------------------------------------------------------------------


def test_a_folder_that_is_not_there(capsys):
    assert say(capsys, "check", "demos", "nowhere") == (
        "error: nowhere: there is no such folder; make a set with: embodied-rl collect\n"
    )


def test_a_folder_of_something_else(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "other").mkdir()
    assert say(capsys, "check", "demos", "other") == (
        "error: other: holds no demonstrations (meta/info.json is missing); make some with: embodied-rl collect\n"
    )


def test_settings_where_none_are_taken(demos, capsys):
    assert say(capsys, "check", "demos", "set", "a=1") == "error: check demos takes a folder only, got 'a=1'; leave it out\n"


RESTORE = "restore the file from a copy, or collect the set anew"


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("info.json", '{"codebase_version": "v3.0"}',
         "set/meta/info.json: codebase_version is 'v3.0', expected 'v2.1'; convert the set with LeRobot's own scripts, or collect it anew"),
        ("info.json", '{"codebase',
         f"set/meta/info.json: is not valid JSON (Unterminated string starting at: line 1 column 2 (char 1)); {RESTORE}"),
        ("info.json", "[]", f"set/meta/info.json: holds a list, expected a JSON object; {RESTORE}"),
        ("info.json", '{"codebase_version": "v2.1", "features": {}}',
         "set/meta/info.json: 'action' is missing, expected real numbers of shape [n]"),
        ("info.json", '{"codebase_version": "v2.1", "features": {"action": {"dtype": "int64", "shape": [1]}}}',
         "set/meta/info.json: 'action' is int64 [1], expected real numbers of shape [n]"),
        ("info.json", '{"codebase_version": "v2.1", "features": {"observation.x": {"dtype": "string", "shape": [1]}}}',
         "set/meta/info.json: 'observation.x' is {'dtype': 'string', 'shape': [1]}, expected a shape (of three numbers for pictures) and a dtype of "
         "float32, float64, int64, int32, uint8, bool, image, video"),
        ("info.json", '{"codebase_version": "v2.1", "data_path": "{nothing}"}',
         "set/meta/info.json: data_path '{nothing}' and chunks_size 1000 name no file, expected "
         "'data/chunk-{episode_chunk:03d}/episode_{episode_index:06d}.parquet' and 1000"),
        ("episodes.jsonl", "no\n{}\n", f"set/meta/episodes.jsonl:1: is not a JSON object; {RESTORE}"),
        ("episodes.jsonl", '{"episode_index": 0, "length": 0, "tasks": ["x"]}\n',
         "set/meta/episodes.jsonl:1: expected episode_index, length of at least 1 and tasks (a list of instructions), found "
         f'{{"episode_index": 0, "length": 0, "tasks": ["x"]}}; {RESTORE}'),
        ("episodes.jsonl", '{"episode_index": 1, "length": 3, "tasks": ["x"]}\n',
         "set/meta/episodes.jsonl: episodes are not numbered 0, 1, 2, ...; number the lines and files anew"),
    ],
)  # fmt: skip
def test_metadata_that_cannot_be_read(name, text, message, demos):
    (demos / "meta" / name).write_text(text)
    with pytest.raises(DemonstrationError) as error:
        Demonstrations("set")
    assert str(error.value) == message
    assert message in validate("set")


def test_metadata_that_is_missing(demos):
    (demos / "meta/episodes.jsonl").unlink()
    message = f"set/meta/episodes.jsonl: cannot be read (No such file or directory); {RESTORE}"
    with pytest.raises(DemonstrationError, match=f"^{re.escape(message)}$"):
        Demonstrations("set")
    assert validate("set") == [message]


# ---- episodes --------------------------------------------------------------------------------------------------------

FILE = "set/data/chunk-000/episode_000002.parquet"
ANEW = "remove the episode, or collect it anew"


def problem_of(demos):
    """The one problem of the set; the other episodes are still read."""
    (problem,) = validate("set")
    assert len(list(Demonstrations("set").load([0, 1, 3]))) == 3
    return problem


def refused(match=""):
    """Loading the damaged episode says where it is; the rest of the set stays readable."""
    with pytest.raises(DemonstrationError, match=f"^{re.escape(FILE)}: {match}"):
        list(Demonstrations("set").load([2]))


def test_a_file_that_is_missing(demos):
    os.unlink(FILE)
    assert problem_of(demos) == f"{FILE}: is missing; {RESTORE}"
    refused("is missing")


@pytest.mark.parametrize("kept", [0, 100, 0.5, 0.99])
def test_a_file_that_is_cut(kept, demos):
    data = (demos.parent / FILE).read_bytes()
    (demos.parent / FILE).write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert re.fullmatch(rf"{re.escape(FILE)}: is cut short or damaged \(.+\); {RESTORE}", problem_of(demos))
    refused("is cut short or damaged")


def test_a_byte_that_has_changed(demos):
    data = bytearray((demos.parent / FILE).read_bytes())
    data[200] ^= 255
    (demos.parent / FILE).write_bytes(data)
    assert re.fullmatch(rf"{re.escape(FILE)}: is cut short or damaged \(.+\); {RESTORE}", problem_of(demos))


def test_frames_that_are_missing(demos):
    length = Demonstrations("set").lines[2].length
    episode(demos, 2, lambda table: table.slice(0, length - 1))
    assert problem_of(demos) == (
        f"{FILE}: has {length - 1} frames, meta/episodes.jsonl says {length}; correct the line, or collect the set anew"
    )
    refused(f"has {length - 1} frames, meta/episodes.jsonl says {length}; see all problems with: embodied-rl check demos set$")


def test_actions_of_another_size(demos):
    episode(demos, 2, column("action", lambda t: pa.array([[0.0, 0.0, 0.0]] * len(t), pa.list_(pa.float32(), 3))))
    assert problem_of(demos) == f"{FILE}: 'action' has 3 numbers, info.json says 2; {ANEW}"
    refused("'action' has 3 numbers, info.json says 2; see all problems with: embodied-rl check demos set$")


def test_actions_of_several_sizes_in_one_episode(demos):
    episode(demos, 2, column("action", lambda t: pa.array([[0.0, 0.0]] + [[0.0]] * (len(t) - 1), pa.list_(pa.float32()))))
    assert problem_of(demos) == f"{FILE}: 'action' has 1 numbers, info.json says 2; {ANEW}"
    refused("'action' has 1 numbers")


def test_actions_of_another_type_and_columns_that_are_missing(demos):
    episode(demos, 2, column("action", lambda t: pa.array([[0, 0]] * len(t), pa.list_(pa.int64(), 2))))
    assert problem_of(demos) == f"{FILE}: 'action' is int64, info.json says float32; {ANEW}"
    episode(demos, 2, lambda t: t.drop_columns("action"))
    assert problem_of(demos) == f"{FILE}: column 'action' is missing; {ANEW}"
    refused("column 'action' is missing")


def test_numbers_that_are_not_finite(demos):
    def spoil(table):
        values = np.array(table.column("observation.position").to_pylist(), np.float32)
        values[1, 0] = np.nan
        return pa.FixedSizeListArray.from_arrays(pa.array(values.reshape(-1)), 2)

    episode(demos, 2, column("observation.position", spoil))
    assert problem_of(demos) == f"{FILE}: 'observation.position' is not finite in frame 1; {ANEW}"
    refused("'observation.position' of frame 1 is not finite; see all problems with: embodied-rl check demos set$")


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (encode_picture(np.zeros((6, 9, 3), np.uint8)), "has 6 x 9 pixels, info.json says 6 x 8"),
        (encode_picture(np.zeros((6, 8), np.uint8)), "has colour mode L, expected RGB with 8 bits per colour"),
        (encode_picture(np.zeros((6, 8, 3), np.uint8))[:-30], "is not a whole PNG or JPEG picture"),
        (b"no picture", "is not a whole PNG or JPEG picture"),
        (b"", "is empty"),
    ],
)
def test_pictures_that_are_not_what_was_promised(data, message, demos):
    def pictures(table):
        rows = table.column("observation.images.camera").to_pylist()
        rows[1] = {"bytes": data, "path": None}
        return pa.array(rows, table.schema.field("observation.images.camera").type)

    episode(demos, 2, column("observation.images.camera", pictures))
    assert problem_of(demos) == f"{FILE}: 'observation.images.camera' of frame 1 {message}; {ANEW}"
    refused(re.escape(f"'observation.images.camera' of frame 1 {message}; "))


def test_videos(demos):
    data = info(demos)
    data["features"]["observation.images.camera"]["dtype"] = "video"
    info(demos, **data)
    refused("'observation.images.camera' is a video, and pictures are read from Parquet only: convert it to images; ")
    assert len(list(Demonstrations("set").load(cameras=()))) == 4


def test_totals_and_leftovers(demos):
    info(demos, total_frames=3)
    shutil.copy(FILE, "set/data/chunk-000/episode_000009.parquet")
    with open("set/meta/episodes.jsonl", "a") as file:
        file.write('{"episode_index": 4, "le')
    frames = Demonstrations("set").frames
    assert validate("set") == [
        "set/meta/episodes.jsonl: its last line is cut; go on with embodied-rl collect, or delete it",
        f"set/meta/info.json: total_frames is 3, meta/episodes.jsonl comes to {frames}; go on with embodied-rl collect, or correct it",
        "set/data/chunk-000/episode_000009.parquet: belongs to no line of meta/episodes.jsonl; go on with embodied-rl collect, or delete it",
    ]


# ---- instructions ----------------------------------------------------------------------------------------------------

BAD_TEXTS = [
    ("", "the instruction is empty, expected 1 to 500 printable characters"),
    (" ", "the instruction is empty, expected 1 to 500 printable characters"),
    ("very " * 101, "the instruction has 505 characters, expected at most 500"),
    ("push\nit", "the instruction has the character U+000A, expected printable characters only"),
    ("push \x1b[31mit", "the instruction has the character U+001B, expected printable characters only"),
    ("push \ud800", "the instruction has the character U+D800, expected printable characters only"),
]
GOOD_TEXTS = ["把红色方块推到目标", "ادفع المكعب", "Würfel schieben", "मेज़ पर रखो", "push 👩‍🔧 it", "v" * 500]


@pytest.mark.parametrize(("text", "message"), BAD_TEXTS)
def test_instructions_in_a_set(text, message, demos):
    lines(demos, lambda rows: rows[2].update(tasks=[text]))
    with open("set/meta/tasks.jsonl", "a") as file:
        file.write(json.dumps({"task_index": 2, "task": text}) + "\n")
    assert validate("set") == [f"set/meta/episodes.jsonl: episode 2: {message}"]


def test_an_instruction_without_a_line(demos):
    lines(demos, lambda rows: rows[2].update(tasks=["push it"]))
    assert validate("set") == ["set/meta/tasks.jsonl: has no line for the instruction of episode 2, 'push it'; add it"]


@pytest.mark.parametrize(("text", "message"), [row for row in BAD_TEXTS if "\ud800" not in row[0]])
def test_instructions_that_an_env_gives(text, message, tmp_path):
    with pytest.raises(DemonstrationError) as error:
        collect_demonstrations(shown(text=text), tmp_path / "set", 2, copies=2)
    assert str(error.value) == f"attempt 0 (task 'first'): {message}; mend the env's instructions(); what is recorded is kept"


@pytest.mark.parametrize("text", GOOD_TEXTS)
def test_text_of_any_language_comes_back(text, tmp_path):
    collect_demonstrations(shown(text=text), tmp_path / "set", 2, copies=2)
    assert [e.instruction for e in Demonstrations(tmp_path / "set").load()] == [text, text]
    assert validate(tmp_path / "set") == []


# ---- statistics ------------------------------------------------------------------------------------------------------

MAKE = "python -c \"from embodied_rl.demo_stats import write_statistics; write_statistics('set')\""


def test_statistics_that_are_missing_and_how_to_make_them(demos):
    whole = Demonstrations("set").statistics()
    (demos / "meta/stats.json").unlink()
    message = f"set/meta/stats.json: is missing, so nothing can be normalised; make it with: {MAKE}"
    with pytest.raises(DemonstrationError) as error:
        Demonstrations("set").statistics()
    assert str(error.value) == message
    assert validate("set") == [message]
    exec(MAKE.split('"')[1])
    assert all(torch.equal(x, whole[name][k]) for name, s in Demonstrations("set").statistics().items() for k, x in s.items())


def test_statistics_of_another_set(demos):
    data = json.loads((demos / "meta/stats.json").read_text())
    frames = Demonstrations("set").frames
    data["action"]["count"] = [7]
    (demos / "meta/stats.json").write_text(json.dumps(data))
    assert validate("set") == [
        f"set/meta/stats.json: is of 7 frames, the set has {frames}; make it anew with: {MAKE}"
    ]
    data["action"] = {"mean": [0, 0, 0]}
    (demos / "meta/stats.json").write_text(json.dumps(data))
    assert validate("set") == [
        f"set/meta/stats.json: has no mean, std, min, max, q01, q99 of 2 numbers for 'action'; make them with: {MAKE}"
    ]


# ---- using -----------------------------------------------------------------------------------------------------------


def test_names_and_numbers_that_do_not_exist(demos):
    opened = Demonstrations("set")
    with pytest.raises(NotFoundError, match=r"^set: there is no camera 'camra'; did you mean 'camera'\?$"):
        opened.batches(torch.Generator(), 4, 1, cameras=["camra"])
    with pytest.raises(NotFoundError, match="^set: there is no episode 4, it holds 0 to 3$"):
        list(opened.load([4]))
    with pytest.raises(CapabilityError, match="^batches need batch_size and chunk of at least 1, got 4 and 0$"):
        opened.batches(torch.Generator(), 4, 0)


def test_a_set_without_an_episode(demos):
    (demos / "meta/episodes.jsonl").write_text("")
    with pytest.raises(CapabilityError, match="^set: holds no episode; collect some with: embodied-rl collect$"):
        Demonstrations("set").batches(torch.Generator(), 4, 1)


def test_an_env_that_the_set_was_not_made_in(demos):
    seen = {"position": TensorSpec((2,))}
    with pytest.raises(CapabilityError) as error:
        Demonstrations("set").require(env_spec(seen, ActionSpec("continuous", 7)))
    assert str(error.value) == (
        "set: its actions have 2 numbers, the env takes 7 (continuous); collect a set in this env, or name the env it was collected in"
    )
    with pytest.raises(CapabilityError) as error:
        Demonstrations("set").require(env_spec({"position": TensorSpec((3,))}, ActionSpec("continuous", 2)))
    assert str(error.value) == (
        "set: observation 'position' is [2] torch.float32, the env shows [3] torch.float32; collect a set in this env, or set the env as it was then"
    )
    with pytest.raises(CapabilityError, match=r"'state' is absent \(it has position, goals, word, camera\), the env shows"):
        Demonstrations("set").require(env_spec({"state": TensorSpec((3,))}, ActionSpec("continuous", 2)))


# ---- collecting ------------------------------------------------------------------------------------------------------


@pytest.fixture
def recipe(toy):
    (toy / "toy.yaml").write_text((toy / "toy.yaml").read_text().replace("point.py", "shown.py"))
    return toy


def collect(capsys, *more):
    return say(capsys, "collect", "toy.yaml", "--episodes", "2", "--out", "out", *more)


@pytest.mark.parametrize(
    ("argv", "message"),
    [
        (["x", "--episodes", "0", "--out", "y"], "error: argument --episodes: expected a whole number of at least 1, got '0'; see `embodied-rl collect --help`\n"),
        (["x", "--episodes", "1"], "error: the following arguments are required: --out; see `embodied-rl collect --help`\n"),
        (["x", "--episodes", "1", "--out", "y", "--noise", "2"], "error: argument --noise: expected a number in [0, 1], got '2'; see `embodied-rl collect --help`\n"),
        (["x", "--episodes", "1", "--out", "y", "--noise", "nan"], "error: argument --noise: expected a number in [0, 1], got 'nan'; see `embodied-rl collect --help`\n"),
    ],
)  # fmt: skip
def test_a_wrong_command_line(argv, message, capsys):
    with pytest.raises(SystemExit) as stop:
        main(["collect", *argv])
    assert stop.value.code == 2
    assert capsys.readouterr().err == message


def test_an_env_without_an_expert(toy, capsys):
    assert collect(capsys) == (
        f"error: env '{TOYS}/point.py' cannot be demonstrated: it lacks a scripted expert (a method `expert()` of the env)\n"
    )
    assert not (toy / "out").exists()


def test_going_on_with_a_set_that_was_made_differently(recipe, capsys):
    assert main(["collect", "toy.yaml", "--episodes", "2", "--out", "out"]) == 0
    for more, what in [
        (["--noise", "0.3"], "disturbance.std 1.0, and 0.3 is"),
        (["--misses", "0.3"], "misses 0.0, and 0.3 is"),
        (["--misses", "0.3", "--show-misses"], "misses 0.0, and 0.3 is"),
        (["--all"], "keep success, and all is"),
        (["env.max_steps=8"], "env.max_steps 10, and 8 is"),
        (["seed=1"], "seed 0, and 1 is"),
        (["collect.copies=2"], "copies 4, and 2 is"),
    ]:
        assert collect(capsys, *more) == (
            f"error: out: was made with {what} asked for now; choose another --out, or ask for the same\n"
        )
    assert Demonstrations("out").episodes == 2


def test_going_on_with_a_set_of_a_version_that_wrote_the_noise_into_the_actions(recipe, capsys):
    assert main(["collect", "toy.yaml", "--episodes", "2", "--out", "out"]) == 0
    data = info(recipe / "out")
    del data["embodied_rl"]["made"]["disturbance"]
    data["embodied_rl"]["made"]["noise"] = 1.0
    (recipe / "out/meta/info.json").write_text(json.dumps(data))
    assert collect(capsys) == (
        "error: out: was made by another version, with settings that there are not now (noise) and without some that "
        "there are (disturbance.correlation, disturbance.fade, disturbance.std); choose another --out\n"
    )


def test_a_set_from_before_there_were_misses_is_gone_on_with(recipe, capsys):
    assert main(["collect", "toy.yaml", "--episodes", "2", "--out", "out"]) == 0
    data = info(recipe / "out")
    for later in ("misses", "show_misses", "replay"):
        del data["embodied_rl"]["made"][later]
    (recipe / "out/meta/info.json").write_text(json.dumps(data))
    capsys.readouterr()
    assert collect(capsys, "--misses", "0.5") == (
        "error: out: was made with misses 0.0, and 0.5 is asked for now; choose another --out, or ask for the same\n"
    )
    assert main(["collect", "toy.yaml", "--episodes", "4", "--out", "out"]) == 0


def test_misses_that_are_to_be_shown_where_there_are_none(recipe, capsys):
    assert collect(capsys, "--show-misses") == (
        "error: --show-misses does nothing without misses: set --misses 0.5, or remove it\n"
    )
    assert not (recipe / "out").exists()


def test_misses_of_an_env_whose_expert_never_errs(recipe, capsys, monkeypatch):
    from embodied_rl import registry

    monkeypatch.delattr(registry.load("env", str(TOYS / "shown.py")).Shown, "clumsy")
    assert collect(capsys, "--misses", "0.5").endswith(
        "cannot be demonstrated: it lacks an expert that errs (a method `clumsy()` of the env; or record without --misses)\n"
    )
    assert not (recipe / "out").exists()


def test_demonstrations_that_an_env_cannot_repeat_or_that_are_not_there(recipe, capsys):
    assert collect(capsys, "--replay", "nowhere").endswith(
        "cannot be demonstrated: it lacks repeating demonstrations elsewhere (a method `replay()` of the env; or record without "
        "--replay)\n"
    )
    argv = ["collect", "tabletop_demo", "--episodes", "3", "--out", "out", "--replay", "nowhere"]
    assert main(argv) == 2
    assert capsys.readouterr().err == "error: nowhere: there is no such folder; make a set with: embodied-rl collect\n"
    assert not (recipe / "out").exists()


@pytest.mark.parametrize("told", [(True,), (1.0, 0.0), (0, 1)])
def test_an_expert_that_does_not_say_which_dimensions_may_be_disturbed(told, tmp_path, monkeypatch):
    from embodied_rl import registry

    env = shown()
    monkeypatch.setattr(registry.load("env", env.type).Expert, "disturbed", told, raising=False)
    with pytest.raises(CapabilityError) as error:
        collect_demonstrations(env, tmp_path / "set", 2, copies=2)
    assert str(error.value) == (
        f"the expert's `disturbed` is {told}, expected 2 booleans, one for each dimension of the action"
    )


def test_a_folder_with_something_else_in_it(recipe, capsys):
    (recipe / "out").mkdir()
    (recipe / "out/thesis.tex").write_text("dear")
    assert collect(capsys) == "error: out: exists and holds no demonstrations; choose another --out\n"
    assert (recipe / "out/thesis.tex").read_text() == "dear"
    shutil.rmtree(recipe / "out")
    (recipe / "out").write_text("a file")
    assert collect(capsys) == "error: out: exists and holds no demonstrations; choose another --out\n"


def test_a_set_made_elsewhere_is_not_written_into(recipe, capsys):
    assert main(["collect", "toy.yaml", "--episodes", "2", "--out", "out"]) == 0
    data = info(recipe / "out")
    del data["embodied_rl"]
    (recipe / "out/meta/info.json").write_text(json.dumps(data))
    assert collect(capsys) == "error: out: was not made by embodied-rl collect; choose another --out\n"


def test_going_on_with_a_damaged_set(recipe, capsys):
    assert main(["collect", "toy.yaml", "--episodes", "2", "--out", "out"]) == 0
    (recipe / "out/data/chunk-000/episode_000001.parquet").unlink()
    assert collect(capsys) == (
        "error: out: the data of episode 1 is missing; see all problems with: embodied-rl check demos out\n"
    )


def test_two_processes_at_once(recipe, capsys):
    from embodied_rl.demo_files import lock

    assert main(["collect", "toy.yaml", "--episodes", "2", "--out", "out"]) == 0
    handle = lock(recipe / "out")
    try:
        assert collect(capsys) == (
            "error: out: another process is collecting into it; wait for it, stop it, or choose another --out\n"
        )
    finally:
        os.close(handle)


def test_an_expert_that_cannot_do_it(tmp_path):
    with pytest.raises(CapabilityError) as error:
        collect_demonstrations(shown(clumsy=True, max_steps=1), tmp_path / "set", 200, copies=50)
    assert re.fullmatch(
        r"the expert failed 100 times in a row at task '(first|second)': give it more time \(env.max_steps\), less noise "
        r"\(--noise\), or leave the task out; what is recorded is kept",
        str(error.value),
    )
    assert validate(tmp_path / "set")[0].endswith("meta/stats.json: is missing, so nothing can be normalised; make it with: "
        f"python -c \"from embodied_rl.demo_stats import write_statistics; write_statistics('{tmp_path}/set')\"")  # fmt: skip


def test_an_env_that_shows_numbers_that_are_not_finite(tmp_path):
    with pytest.raises(DemonstrationError) as error:
        collect_demonstrations(shown(broken=True, end_on_success=False), tmp_path / "set", 2, copies=2)
    assert str(error.value) == (
        "attempt 0 (task 'first'): 'observation.position' is not finite; mend the env; what is recorded is kept"
    )


def test_a_full_disk_keeps_what_is_finished(recipe, capsys, monkeypatch):
    from embodied_rl import demo_files

    real, calls = os.fsync, [0]

    def fsync(handle):
        calls[0] += 1
        if calls[0] == 11:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(handle)

    monkeypatch.setattr(demo_files.os, "fsync", fsync)
    assert collect(capsys) == (
        "error: out: cannot be written (No space left on device); finished episodes are kept: mend that and run the same command again, or choose another --out\n"
    )
    assert Demonstrations("out").episodes == 1
    assert main(["collect", "toy.yaml", "--episodes", "2", "--out", "out"]) == 0
    assert validate("out") == []
