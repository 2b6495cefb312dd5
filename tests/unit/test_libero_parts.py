"""The parts of the LIBERO adapter that need no LIBERO: starts, words, pictures, protocols."""

import importlib.util
import logging
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from scipy.spatial.transform import Rotation

from embodied_rl import registry
from embodied_rl.convention import Convention
from embodied_rl.errors import NotFoundError, SimulatorError
from embodied_rl.seeding import start_seed
from tests.kit import CPU, TOYS

PATH = TOYS.parents[1] / "envs" / "libero" / "simulator.py"
LIBERO = registry.load("env", "libero")
PLAIN = {"picture": 8, "jpeg": False, "crop": 1.0, "resize": "bilinear"}


@pytest.fixture(scope="module")
def simulator():
    found = importlib.util.spec_from_file_location("libero_simulator", PATH)
    module = importlib.util.module_from_spec(found)
    found.loader.exec_module(module)
    return module


def starts(simulator, states, split, given=None, count=2000):
    return [simulator.choose_start(states, start_seed(0, split, 0, i), 7, given) for i in range(count)]


def test_training_never_starts_where_evaluation_does(simulator):
    train, evaluation = (starts(simulator, "heldout", split) for split in ("train", "eval"))
    assert {row for row, _ in train} == set(range(40)) and {row for row, _ in evaluation} == set(range(40, 50))
    assert {fixtures for _, fixtures in train + evaluation} == {7}


def test_sampled_training_starts_are_new_placements_and_evaluation_is_published(simulator):
    train, evaluation = (starts(simulator, "sampled", split) for split in ("train", "eval"))
    assert {row for row, _ in train} == {None} and len({fixtures for _, fixtures in train}) == 2000
    assert {row for row, _ in evaluation} == set(range(50)) and {fixtures for _, fixtures in evaluation} == {7}


def test_published_starts_are_all_fifty_and_each_is_what_the_task_says(simulator):
    for split in ("train", "eval"):
        assert {row for row, _ in starts(simulator, "published", split)} == set(range(50))
        assert set(starts(simulator, "each", split, given=31)) == {(31, 7)}


def test_what_an_action_means_is_said_as_the_protocol_tells_the_gripper(simulator):
    """OSC_POSE's output_max is 0.05 m and 0.5 rad; robosuite's own gripper closes at +1."""
    told = {name: Convention(**simulator.convention(p["hand"])) for name, p in LIBERO.PROTOCOLS.items()}
    assert {name for name, c in told.items() if c.gripper == "closes_at_plus"} == {"openpi", "lerobot"}
    same = Convention(control="ee_delta", frame="base", rotation="axis_angle", gripper="opens_at_plus", metres=0.05, radians=0.5)
    assert told["openvla-oft"] == same and same.misfit(len(simulator.ACTION)) == ""


def test_every_state_is_about_equally_likely(simulator):
    counts = np.bincount([row for row, _ in starts(simulator, "published", "train", count=10_000)], minlength=50)
    # 200 expected; 5 standard deviations of a binomial count are 70.
    assert np.abs(counts - 200).max() < 70


@pytest.mark.parametrize(
    ("task", "text"),
    [
        ("libero_goal/put_the_bowl_on_the_plate", "put the bowl on the plate"),
        ("libero_90/KITCHEN_SCENE10_close_the_top_drawer_of_the_cabinet", "close the top drawer of the cabinet"),
        ("libero_10/LIVING_ROOM_SCENE2_put_both_the_butter_and_the_milk_in_the_basket", "put both the butter and the milk in the basket"),
    ],
)
def test_instructions_are_those_of_the_benchmark(simulator, task, text):
    assert simulator.language(task) == text


def test_rotations_are_rotation_vectors(simulator):
    rng = np.random.default_rng(0)
    for quaternion in rng.normal(size=(50, 4)):
        quaternion /= np.linalg.norm(quaternion)
        found = simulator.axis_angle(quaternion)
        same = Rotation.from_rotvec(found) * Rotation.from_quat(quaternion).inv()
        assert same.magnitude() < 1e-6
        # robosuite's sign: a negative w gives the long way round, as the data of published policies has it.
        assert (np.linalg.norm(found) > np.pi) == (quaternion[3] < 0)
    assert simulator.axis_angle(np.array([0.0, 0, 0, 1])).tolist() == [0, 0, 0]


def test_pictures_are_turned_by_180_degrees(simulator):
    picture = np.arange(8 * 8 * 3, dtype=np.uint8).reshape(8, 8, 3)
    turned = simulator.prepare_picture(picture, PLAIN)
    assert turned[0, 0].tolist() == picture[7, 7].tolist() and turned[2, 5].tolist() == picture[5, 2].tolist()


def test_pictures_are_resized_cropped_and_compressed_as_the_protocol_says(simulator):
    across = np.tile(np.linspace(0, 255, 256).astype(np.uint8)[:, None, None], (1, 256, 3))
    whole = simulator.prepare_picture(across, PLAIN | {"picture": 224, "resize": "lanczos"})
    assert whole.shape == (224, 224, 3) and whole[0].mean() > 250 and whole[-1].mean() < 5
    cropped = simulator.prepare_picture(across, PLAIN | {"picture": 224, "resize": "lanczos", "crop": 0.9})
    # sqrt(0.9) of the height remains: 2.57 % of the brightness is lost at each end.
    assert abs(cropped[0].mean() - 255 * (1 - (1 - 0.9**0.5) / 2)) < 2 and abs(cropped[-1].mean() - 255 * (1 - 0.9**0.5) / 2) < 2
    noise = np.random.default_rng(0).integers(0, 255, (224, 224, 1), dtype=np.uint8).repeat(3, axis=2)
    kept, pressed = (simulator.prepare_picture(noise, PLAIN | {"picture": 224, "jpeg": j}) for j in (False, True))
    assert np.array_equal(kept, noise[::-1, ::-1]) and 0 < np.abs(pressed.astype(int) - kept).mean() < 20


def test_every_protocol_says_everything_and_a_change_lies_over_it():
    wanted = LIBERO.PROTOCOLS["openpi"].keys()
    assert {"openvla", "openvla-oft", "openpi", "rlinf", "simplevla-rl", "lerobot"} == LIBERO.PROTOCOLS.keys()
    for name, protocol in LIBERO.PROTOCOLS.items():
        assert protocol.keys() == wanted, name
        assert protocol["steps"].keys() == {"libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90"}
        LIBERO.Changes(**{key: value for key, value in protocol.items() if key in LIBERO.Changes.model_fields} | {"cameras": tuple(protocol["cameras"])})
    assert wanted - {"trials", "states", "steps", "settle_hand", "chunk"} == LIBERO.Changes.model_fields.keys()
    config = LIBERO.Config(protocol="openpi", change=LIBERO.Changes(settle=3))
    assert config.in_force() == LIBERO.PROTOCOLS["openpi"] | {"settle": 3} and config.limit() == 220


PUBLISHED = {
    "openvla": (220, 280, 300, 520, 400, 50, 1),
    "openvla-oft": (220, 280, 300, 520, 400, 50, 8),
    "openpi": (220, 280, 300, 520, 400, 50, 5),
    "rlinf": (240, 320, 320, 480, 400, 50, None),
    "simplevla-rl": (512, 512, 512, 512, 512, 50, 8),
    "lerobot": (280, 280, 300, 520, 400, 10, None),
}
"""Step limits of spatial, object, goal, 10 and 90, trials of each task, and the chunk, as the scripts have them."""


def test_step_limits_trials_and_chunks_are_the_published_ones():
    suites = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
    found = {name: (*(p["steps"][suite] for suite in suites), p["trials"], p["chunk"]) for name, p in LIBERO.PROTOCOLS.items()}
    assert found == PUBLISHED and {p["states"] for p in LIBERO.PROTOCOLS.values()} == {"each"}


# ---- how an evaluation relates to the published one, and what can be missing ------------------------------------------


def told(monkeypatch, caplog, tmp_path, *, split="eval", tasks=("a", "b"), **config):
    """What is logged when an env of these tasks is built, and its protocol as the worker gets it."""
    built = {}

    def host(config, foreign, **_):
        built.update(foreign.settings)
        return SimpleNamespace(spec=SimpleNamespace(tasks=tasks))

    monkeypatch.setattr(LIBERO, "host", host)
    config = LIBERO.Config(**{"isolated": False, "assets": str(assets_in(tmp_path / "named"))} | config)
    with caplog.at_level(logging.INFO):
        caplog.clear()
        LIBERO.build(config, num_envs=1, device=CPU, split=split, seed=0)
    return [(record.levelname, record.getMessage()) for record in caplog.records], built["protocol"]["departures"]


def assets_in(folder):
    for name in LIBERO.FOLDERS:
        (folder / name).mkdir(parents=True, exist_ok=True)
    return folder


def test_it_is_told_how_an_evaluation_departs_from_the_published_one(monkeypatch, caplog, tmp_path):
    whole = (
        "env libero: protocol openvla-oft plays 50 episodes of each task, one from each of its first 50 initial states "
        "(env.states: each, evaluate.episodes: 100); "
    )
    said, kept = told(monkeypatch, caplog, tmp_path, max_steps=9, change=LIBERO.Changes(cameras=("wrist",), settle=10))
    differs = "env.states: heldout, env.change.cameras: ['wrist'], env.max_steps: 9"
    assert said == [("WARNING", whole + f"this evaluation departs from it in {differs}")] and kept == differs
    assert told(monkeypatch, caplog, tmp_path, split="train")[0] == []
    each = {"states": "each", "tasks": ("a#00", "b#00", "a#01", "b#01")}
    assert told(monkeypatch, caplog, tmp_path, **each) == ([("INFO", whole + "this env keeps to it")], "none")
    said, _ = told(monkeypatch, caplog, tmp_path, protocol="lerobot", **each)
    assert "10 episodes of each task" in said[0][1] and "evaluate.episodes: 20)" in said[0][1]


def test_assets_are_found_where_named_or_where_hf_libero_downloads_them(monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.delenv(LIBERO.ASSETS, raising=False)
    with pytest.raises(NotFoundError, match="has not downloaded to ~/.cache/libero/assets: download the folder"):
        LIBERO.find_assets(None)
    downloaded = assets_in(tmp_path / ".cache" / "libero" / "assets")
    assert LIBERO.find_assets(None) == downloaded.resolve()
    monkeypatch.setenv(LIBERO.ASSETS, str(assets_in(tmp_path / "variable")))
    assert LIBERO.find_assets(None) == (tmp_path / "variable").resolve()
    assert LIBERO.find_assets(str(assets_in(tmp_path / "named"))) == (tmp_path / "named").resolve()
    monkeypatch.delenv(LIBERO.ASSETS)
    (downloaded / "scenes").rmdir()
    with pytest.raises(NotFoundError, match="libero/assets' lack scenes: download"):
        LIBERO.find_assets(None)


def test_the_checksum_of_assets_is_that_of_their_files_and_not_of_what_a_download_leaves_beside(simulator, tmp_path):
    sums = []
    for folder, text in (("a", "mesh"), ("b", "mesh"), ("c", "other")):
        (assets_in(tmp_path / folder) / "scenes" / "wall.xml").write_text(text)
        sums.append(simulator.checksum_of(str(tmp_path / folder)))
    (tmp_path / "b" / ".cache").mkdir()
    for name in (".cache/metadata", "README.md"):
        (tmp_path / "b" / name).write_text("downloaded today")
    assert sums[0] == sums[1] != sums[2] and simulator.checksum_of(str(tmp_path / "b")) == sums[0]


def test_this_python_is_taken_when_it_is_not_isolated_and_says_that_it_has_no_libero(monkeypatch, tmp_path):
    if importlib.util.find_spec("libero"):
        pytest.skip("LIBERO is installed beside the engine")
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path))
    config = LIBERO.Config(isolated=False, workers=1, assets=str(assets_in(tmp_path / "assets")))
    with pytest.raises(SimulatorError) as caught:
        LIBERO.build(config, num_envs=1, device=CPU, split="train", seed=0)
    assert str(caught.value) == (
        f"env libero: the Python {Path(sys.executable)} has no LIBERO (hf-libero): install it there, or leave "
        "env.isolated out and run `embodied-rl sim install libero`"
    )
