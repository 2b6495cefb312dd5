"""What an evaluation says it was made with, and what that forbids."""

import hashlib
import json
import re
import shutil
import sys
from pathlib import Path

import gymnasium
import pytest
import torch

from embodied_rl import manifest, registry
from embodied_rl.cli import main
from embodied_rl.compare import evaluate_targets, summarize
from embodied_rl.config import load_component
from embodied_rl.errors import CapabilityError, RunFolderError
from embodied_rl.evaluate import evaluate
from embodied_rl.report_evaluation import made_with
from embodied_rl.results import EvaluationResult
from embodied_rl.runfolder import checksum
from embodied_rl.seeding import start_seeds
from tests.kit import CPU, TOYS, Scripted, unwrapped


def built(name, overrides=(), num_envs=2):
    config = load_component("env", name, list(overrides))
    return registry.load("env", name).build(config, num_envs=num_envs, device=CPU, split="eval", seed=0)


@pytest.fixture
def two(toy_run, tmp_path):
    """Two copies of one stored evaluation, and a way to change the second."""
    paths = [tmp_path / "a.json", tmp_path / "b.json"]
    for path in paths:
        shutil.copy(toy_run / "evaluation.json", path)

    def change(edit, path=paths[1]):
        document = json.loads(path.read_text())
        edit(document)
        path.write_text(json.dumps(document))

    return [str(path) for path in paths], change


def test_a_checksum_is_the_standard_one():
    assert checksum(b"a", b"bc") == hashlib.sha256(b"abc").hexdigest()


def test_a_frame_changes_with_one_pixel_and_with_its_type_but_not_with_the_copy():
    obs = {"picture": torch.zeros(3, 4, 4, 3, dtype=torch.uint8)}
    first, same = manifest.frame(obs, 0, 7), manifest.frame(obs, 2, 7)
    assert first == same and set(first) == {"seed", "picture"}
    obs["picture"][2, 1, 1, 0] = 1
    assert manifest.frame(obs, 2, 7)["picture"] != first["picture"] and manifest.frame(obs, 0, 7) == first
    assert manifest.frame({"picture": obs["picture"].view(torch.int8)}, 0, 7)["picture"] != first["picture"]
    assert manifest.frame({"x": torch.zeros(1, 0)}, 0, 7)["x"], "nothing at all has a checksum too"


def test_a_finished_run_has_a_manifest_of_what_was_played(toy_run):
    document = json.loads((toy_run / "evaluation.json").read_text())
    found, tasks = document["manifest"], document["tasks"]
    assert set(found) == {"engine", "starts", "env", "frames", "policy"}
    assert found["policy"] == {"greedy": True, "chunk": 1} and document["greedy"] is True
    assert found["engine"]["packages"]["torch"] == str(torch.__version__)
    assert found["starts"] == {"run_seed": 0, "split": "eval", "stream": 0, "episodes": len(document["episodes"])}
    assert found["frames"].keys() == set(tasks), "one frame per task"
    for i, task in enumerate(tasks):
        expected = int(start_seeds(0, "eval", torch.tensor([0]), torch.tensor([i])))
        assert found["frames"][task]["seed"] == expected == document["episodes"][i]["seed"]


def test_the_frames_are_of_the_first_observations_whatever_the_copies_and_the_policy(toy_run):
    few, many = (evaluate_targets([toy_run], episodes=6, copies=n)[0]["heldout"] for n in (1, 5))
    assert few.manifest["frames"] == many.manifest["frames"] and few.manifest["frames"]
    assert manifest.differences(few.manifest, many.manifest) == []


@pytest.mark.parametrize(
    ("name", "overrides", "keys"),
    [
        ("tabletop", ["tasks=[reach]"], {"scene", "physics", "reward", "packages"}),
        ("gymnasium", ["id=HalfCheetah-v5"], {"id", "model", "packages"}),
    ],
)
def test_built_in_envs_tell_what_their_results_depend_on(name, overrides, keys):
    env = built(name, overrides)
    told = manifest.make(env, {}, {})["env"]
    env.close()
    assert keys <= told.keys() and told["max_steps"] == env.spec.max_steps
    assert re.fullmatch(r"[\d.]+\w*", told["packages"]["mujoco"])


OWN = """
import gymnasium
import numpy as np
from gymnasium import spaces

class Line(gymnasium.Env):
    observation_space = spaces.Box(-1, 1, (1,), np.float32)
    action_space = spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return np.zeros(1, np.float32), {}

    def step(self, action):
        return np.zeros(1, np.float32), 1.0, False, False, {}

gymnasium.register("Line-v0", entry_point=Line, max_episode_steps=3)
"""
REACHER = Path(__file__).parents[2] / "examples" / "reacher"


@pytest.mark.parametrize("kind", ["gymnasium", "mjcf", "file"])
def test_what_has_no_version_is_told_by_the_checksum_of_its_file_wherever_that_lies(kind, tmp_path, monkeypatch):
    """So a reward that was changed in it forbids a comparison."""
    told = []
    for name, addition in (("a", ""), ("b", ""), ("c", "\n# another reward\n")):
        folder = tmp_path / name
        folder.mkdir()
        if kind == "gymnasium":
            (folder / "line.py").write_text(OWN + addition)
            monkeypatch.syspath_prepend(folder)
            sys.modules.pop("line", None)
            monkeypatch.setattr(gymnasium, "registry", dict(gymnasium.registry))
            env = built("gymnasium", ["id=line:Line-v0"])
        elif kind == "mjcf":
            (folder / "task.py").write_text((REACHER / "task.py").read_text() + addition)
            env = built("mjcf", [f"scene={REACHER / 'reacher.xml'}", f"task={folder / 'task.py'}:Reach", "threads=1"])
        else:
            (folder / "point.py").write_text((TOYS / "point.py").read_text() + addition)
            env = built(str(folder / "point.py"))
        told.append({"engine": {}, "starts": {}, "frames": {}, "env": manifest.make(env, {}, {})["env"]})
        env.close()
    assert manifest.differences(told[0], told[1]) == []
    assert [line.split()[0] for line in manifest.differences(told[0], told[2])] == ["source"]
    assert "Reach" in str(told[0]) or kind != "mjcf"


def test_a_folder_has_one_checksum_that_changes_with_names_and_contents(tmp_path):
    def write(name, **files):
        for file, text in files.items():
            (tmp_path / name / "deep").mkdir(parents=True, exist_ok=True)
            (tmp_path / name / "deep" / file).write_text(text)
        return manifest.checksum_of(tmp_path / name)

    first = write("a", mesh="1", texture="2")
    assert write("b", texture="2", mesh="1") == first
    assert len({first, write("c", mesh="1", texture="3"), write("d", mesh="1", texturf="2"), write("e", mesh="12", texture="")}) == 4
    assert manifest.checksum_of(tmp_path / "a" / "deep" / "mesh") == manifest.checksum_of(tmp_path / "b" / "deep" / "mesh")


def test_a_mixture_joins_what_its_parts_tell():
    cart = "{name: cart, env: {type: gymnasium, id: CartPole-v1}}"
    again = "{name: long, env: {type: gymnasium, id: CartPole-v1, max_steps: 9}}"
    env = built("mixture", [f"parts=[{cart}, {again}]"])
    told = env.manifest()["parts"]
    env.close()
    assert set(told) == {"cart", "long"} and told["cart"]["id"] == "CartPole-v1" and "gymnasium" in told["cart"]["packages"]
    assert told["cart"]["max_steps"] == 500 and told["long"]["max_steps"] == 9


def test_mixtures_that_are_joined_otherwise_are_told_apart(tmp_path):
    mine = [tmp_path / "a.py", tmp_path / "b.py"]
    for path, addition in zip(mine, ("", "\n# another reward\n"), strict=True):
        path.write_text((TOYS / "point.py").read_text() + addition)
    arm = {"type": str(TOYS / "arm.py"), "numbers": 2, "convention": {"metres": 0.1}, "max_steps": 9}

    def told(toy=None, part=None, file=mine[0], limit=7, missing="zeros"):
        toy = {"name": "toy", "env": {"type": str(file), "max_steps": limit}} | (toy or {})
        part = {"name": "arm", "env": arm} | (part or {})
        env = built("mixture", [f"parts={json.dumps([part, toy])}", f"missing={missing}"])
        env.close()
        return {"engine": {}, "starts": {}, "frames": {}, "env": manifest.make(env, {}, {})["env"]}

    def differing(**changes):
        return [line.split()[0] for line in manifest.differences(told(), told(**changes))]

    assert differing() == [] and told()["env"]["missing"] == "zeros" and told()["env"]["pad"] is False
    assert told()["env"]["parts"]["toy"]["control_hz"] is None
    # A part without a manifest of its own is told by its file.
    assert differing(file=mine[1]) == ["parts.toy.source"]
    assert differing(limit=8) == ["parts.toy.max_steps"]
    assert differing(toy={"rename": {"position": "place"}}) == ["parts.toy.joined.rename.position"]
    assert differing(toy={"action": [1, 0]}) == ["parts.toy.joined.action"]
    assert "parts.toy.joined.convention.metres" in differing(toy={"convention": {"metres": 0.1}})
    hand = {"control": "ee_delta", "rotation": "axis_angle", "gripper": "opens_at_plus"}
    whole = {"env": {**arm, "numbers": 7, "convention": hand}}
    turned = {"type": arm["type"], "convention": hand | {"gripper": "closes_at_plus"}}
    keep, convert = (told(toy={"env": turned, "bridge": {"gripper": how}}, part=whole, missing="refuse") for how in ("keep", "convert"))
    assert [line.split()[0] for line in manifest.differences(keep, convert)] == ["parts.toy.joined.bridge.gripper"]


def test_a_built_in_env_is_told_by_the_files_that_define_it(tmp_path, monkeypatch):
    """So a threshold that was changed in one of them forbids a comparison, and says in which."""
    package = sys.modules[manifest.ENVS]
    env = built("tabletop", ["tasks=[reach]"])
    env.close()

    def told(name, change=lambda data: data):
        folder = tmp_path / name
        shutil.copytree(Path(package.__path__[0]), folder, ignore=shutil.ignore_patterns("__pycache__"))
        for file in ("_words.py", "tabletop/tasks.py", "libero/protocols.yaml"):
            (folder / file).write_bytes(change((folder / file).read_bytes()))
        monkeypatch.setattr(package, "__path__", [str(folder)])
        manifest.files_of.cache_clear()
        return {"engine": {}, "starts": {}, "frames": {}, "env": manifest.make(env, {}, {})["env"]}

    try:
        first = told("first")
        assert manifest.differences(first, told("again", lambda data: data.replace(b"\n", b"\r\n"))) == []
        other = told("other", lambda data: data + b"# another threshold\n")
    finally:
        monkeypatch.undo()
        manifest.files_of.cache_clear()
    assert manifest.differences(first, other) == ["files differ in _words.py, tabletop/tasks.py"]
    assert not [name for name in first["env"]["files"] if name.startswith(("libero", "mixture"))]


def test_an_env_of_ones_own_that_extends_a_built_in_one_is_told_by_the_files_of_both(tmp_path):
    (tmp_path / "mine.py").write_text(
        "from embodied_rl.envs import target\nfrom embodied_rl.envs.target import Config\n\n"
        "class Mine(target.TargetEnv):\n    pass\n\n"
        "def build(config, *, num_envs, device, split, seed):\n"
        "    env = target.build(config, num_envs=num_envs, device=device, split=split, seed=seed)\n"
        "    env.__class__ = Mine\n    return env\n"
    )
    told = manifest.told_by(built(str(tmp_path / "mine.py")))
    assert set(told["files"]) == {"target.py"} and told["source"] == checksum((tmp_path / "mine.py").read_bytes())


def test_a_manifest_of_ones_own_does_not_hide_the_file_that_it_is_in():
    env = built(str(TOYS / "point.py"))
    env.manifest = lambda: {"surface": "ice"}
    told = manifest.told_by(env)
    assert told["surface"] == "ice" and told["source"] == checksum((TOYS / "point.py").read_bytes())


def test_an_env_that_tells_no_plain_data_is_refused():
    env = built("target")
    env.manifest = lambda: {"model": object()}
    with pytest.raises(CapabilityError, match=r"manifest\(\) of TargetEnv is no plain data \(.*object.*\): return a dict of text"):
        manifest.make(env, {}, {})
    env.manifest = lambda: {"weight": float("nan")}
    with pytest.raises(CapabilityError, match="no plain data"):
        manifest.make(env, {}, {})


# ---- comparing ----------------------------------------------------------------------------------------------------


def test_two_stored_evaluations_of_one_simulator_are_compared(two, capsys):
    files, _ = two
    assert main(["evaluate", *files]) == 0
    shown = capsys.readouterr()
    assert "on the same starts" in unwrapped(shown.out) and "note:" not in shown.out and not shown.err


@pytest.mark.parametrize(
    ("edit", "complaint"),
    [
        (lambda d: d["manifest"]["env"].update(packages={"mujoco": "3.3.3"}), "packages.mujoco is not told in A and 3.3.3 in B"),
        (lambda d: d["manifest"]["env"].update(files={"target.py": "0" * 64}), "files are told by B alone"),
        (lambda d: d["manifest"]["env"].update(max_steps=99), "max_steps is [0-9a-z ]+ in A and 99 in B"),
        (lambda d: d["manifest"]["env"].update(protocol={"name": "openpi"}), "protocol.name is not told in A and openpi in B"),
        (
            lambda d: d["manifest"]["frames"]["second"].update(position="0" * 64),
            "the first 'position' of task [a-z]+ is [0-9a-f ]+ in A and 000000000000 in B",
        ),
    ],
)
def test_results_of_unlike_simulators_are_not_compared_unless_told_to(two, edit, complaint, capsys):
    files, change = two
    change(edit)
    assert main(["evaluate", *files]) == 2
    message = capsys.readouterr().err
    assert re.search(rf"error: A = .*a.json and B = .*b.json were not made with the same simulator: .*{complaint}", message)
    assert message.endswith("or compare them with --compare-anyway\n") and message.count("\n") == 1
    assert main(["evaluate", *files, "--compare-anyway"]) == 0
    shown = unwrapped(capsys.readouterr().out)
    assert "on the same starts" in shown and re.search(f"note: A = .*{complaint}", shown)


def test_what_does_not_matter_forbids_nothing(two, capsys):
    files, change = two
    change(lambda d: d["manifest"]["engine"].update(python="3.12.0", commit="0" * 40, packages={}))
    assert main(["evaluate", *files]) == 0


def test_many_differences_are_told_in_one_sentence():
    one = {"engine": {}, "starts": {}, "env": {f"k{i}": 0 for i in range(9)}, "frames": {}}
    other = one | {"env": {f"k{i}": 1 for i in range(9)}}
    with pytest.raises(CapabilityError, match="k3 is 0 in A and 1 in B; and 5 more. Evaluate both again"):
        manifest.compare(one, other, ("a", "b"))


def test_files_that_differ_are_one_difference():
    one = {"engine": {}, "starts": {}, "env": {"files": dict.fromkeys("abcdef", "0")}, "frames": {}}
    other = one | {"env": {"files": dict.fromkeys("acdefg", "1") | {"a": "0"}}}
    assert manifest.differences(one, other) == ["files differ in b, c, d, e and 2 more"]
    assert dict(manifest.lines(one))["files"] == "a 0, b 0, c 0, d 0, e 0, f 0"


def test_a_task_that_only_one_of_them_played_is_a_difference():
    one = {"engine": {}, "starts": {}, "env": {}, "frames": {"x": {"seed": 1, "state": "a"}}}
    found = manifest.differences(one, one | {"frames": {}})
    assert found == ["the seed of task x is 1 in A and not told in B", "the first 'state' of task x is a in A and not told in B"]


def test_an_evaluation_without_a_manifest_is_compared_and_said_to_have_none(two, capsys):
    files, change = two
    change(lambda d: d.pop("manifest"))
    assert EvaluationResult.load(Path(files[1])).manifest is None
    assert main(["evaluate", *files]) == 0
    assert "b.json has no manifest (older than manifests), so whether both were made" in capsys.readouterr().out


def played(**policy):
    """A manifest of a policy that played so; without anything, of before that was kept."""
    plain = {"engine": {}, "starts": {}, "env": {"limit": 1}, "frames": {}}
    return plain | ({"policy": {"greedy": True, "chunk": 1} | policy} if policy else {})


def test_a_greedy_and_a_sampled_evaluation_are_not_compared_unless_told_to():
    greedy, sampled, names = played(greedy=True), played(greedy=False), ("a", "b")
    assert manifest.compare(greedy, greedy, names) is manifest.compare(sampled, sampled, names) is None
    unlike = "A = a and B = b were not played alike: A sampled and B greedy"
    with pytest.raises(CapabilityError) as refused:
        manifest.compare(sampled, greedy, names)
    assert str(refused.value) == f"{unlike}. Evaluate both again in one way (greedy or sampled), or compare them with --compare-anyway"
    assert manifest.compare(sampled, greedy, names, anyway=True) == unlike
    elsewhere = played(greedy=False) | {"env": {"limit": 2}}
    with pytest.raises(CapabilityError, match="same simulator: limit is 1 in A and 2 in B, and were not played alike: A greedy and B sampled"):
        manifest.compare(greedy, elsewhere, names)


def test_another_chunk_is_told_and_forbids_nothing():
    short, long = played(chunk=5), played(chunk=8)
    told = "a decision covers 5 control steps in A and 8 in B"
    assert manifest.compare(short, long, ("a", "b")) == told and manifest.compare(long, long, ("a", "b")) is None
    sampled = played(greedy=False, chunk=8)
    assert manifest.compare(short, sampled, ("a", "b"), anyway=True).endswith(f"A greedy and B sampled; {told}")


def test_how_a_policy_played_is_compared_only_where_both_tell_it(two, capsys):
    for other in (played(greedy=False, chunk=9), played()):
        assert manifest.compare(played(), other, ("a", "b")) is manifest.compare(other, played(), ("a", "b")) is None
    files, change = two
    change(lambda d: d["manifest"].pop("policy"))
    assert EvaluationResult.load(Path(files[1])).manifest.keys() == {"engine", "starts", "env", "frames"}
    assert main(["evaluate", *files]) == 0
    assert "note:" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("told", "departures"),
    [
        ({"protocol": {"chunk": 1}}, {"departures": "policy.chunk: 2"}), ({"protocol": {"chunk": 3}}, {"departures": "policy.chunk: 2"}),
        ({"protocol": {"chunk": 2}}, {"departures": "none"}),
        ({"protocol": {"chunk": None}}, {}), ({"protocol": {"name": "mine"}}, {}), ({"protocol": "mine"}, {}), ({}, {}),
    ],
)  # fmt: skip
def test_a_chunk_that_is_not_the_protocols_departs_from_it(told, departures, caplog):
    env = built("target")
    env.manifest = lambda: told
    found = manifest.make(env, {}, {}, {"greedy": False, "chunk": 2})
    assert found["policy"] == {"greedy": False, "chunk": 2} | departures
    manifest.warn_of_departures(found)
    departed = "the env's protocol executes {chunk} control steps of a decision; this evaluation departs from it in policy.chunk: 2"
    assert caplog.messages == ([departed.format(**told["protocol"])] if "policy.chunk: 2" in departures.values() else [])
    assert dict(manifest.lines(found))["policy"].startswith("greedy False, chunk 2")


@pytest.mark.parametrize(
    ("found", "why"),
    [([1], "its manifest is list, expected an object"), ({}, "its manifest has no 'engine'"),
     ({"engine": {}, "starts": {}, "env": {}, "frames": {"x": 1}}, "a frame of its manifest is no object"),
     *((played() | {"policy": policy}, "the 'policy' of its manifest lacks 'greedy' (true or false) or 'chunk' (control steps)")
       for policy in ([], None, {"chunk": 1}, {"greedy": "no", "chunk": 1}, {"greedy": True, "chunk": "8"}))],
)  # fmt: skip
def test_a_damaged_manifest_is_told(two, found, why, capsys):
    files, change = two
    change(lambda d: d.update(manifest=found))
    assert main(["evaluate", *files]) == 2
    message = capsys.readouterr().err
    assert f"b.json: is not an evaluation that this version can read ({why}); make it again" in message


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (["A", "--compare-anyway"], "--compare-anyway compares two results, and one was given: name a second one"),
        (["A", "B", "--episodes", "3", "--sampled"], "--episodes, --sampled does nothing to "),
        (["A", "runs/b"], "is a stored evaluation and the other is not: name two stored ones, or two runs"),
    ],
)
def test_options_that_could_do_nothing_are_refused(two, arguments, complaint, capsys):
    names = dict(zip("AB", two[0], strict=True))
    assert main(["evaluate", *(names.get(a, a) for a in arguments)]) == 2
    assert complaint in capsys.readouterr().err


def test_what_training_changed_is_not_told_across_simulators(toy_run, caplog):
    after = EvaluationResult.load(toy_run / "evaluation.json")
    assert "since_start" in summarize({"heldout": after}, {"heldout": after})["heldout"]
    other = json.loads(json.dumps(after.manifest))
    other["env"]["max_steps"] = 99
    before = EvaluationResult(**{**vars(after), "manifest": other})
    assert "since_start" not in summarize({"heldout": after}, {"heldout": before})["heldout"]
    assert "what training changed is not told: A = heldout after training" in caplog.text


def test_the_report_shows_the_manifest(toy_run):
    stored = json.loads((toy_run / "evaluation.json").read_text())
    assert "What was evaluated" in (toy_run / "report.html").read_text()
    page = made_with(stored, toy_run)
    task, frame = next(iter(stored["manifest"]["frames"].items()))
    checksums = [value for key, value in frame.items() if key != "seed"]
    assert f"first frame of {task}" in page and checksums[0][:12] in page
    stored["manifest"]["env"] = None
    with pytest.raises(RunFolderError, match="its manifest has no 'env'; evaluate the run again"):
        made_with(stored, toy_run)
    stored.pop("manifest")
    assert "The evaluation has no manifest: it is older than manifests." in made_with(stored, toy_run)


def test_an_env_that_cannot_repeat_a_start_has_no_frames():
    env = built(str(TOYS / "forgetful.py"))
    policy = Scripted(lambda obs: torch.zeros(len(next(iter(obs.values()))), 1, 1), lambda obs: None, has_critic=False)
    assert evaluate(policy, env, episodes=2, run_seed=0).manifest["frames"] == {}
