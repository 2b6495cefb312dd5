"""LIBERO in its own Python, run by the worker of `envs/isolated`: NumPy, Pillow and LIBERO, nothing of the engine.

What a policy sees is what LIBERO's own `OffScreenRenderEnv` shows, number for number and pixel for pixel: robosuite
samples its observations in the first physics step of each control step, so a copy of the physics state is taken there
and drawn later, when somebody asks. Drawing is most of LIBERO's time, and a policy that decides once in eight control
steps needs one picture of the eight.

Source: Liu et al. 2023 (LIBERO, arXiv:2306.03310); the package hf-libero 0.1.4.
"""

from __future__ import annotations

import atexit
import difflib
import hashlib
import io
import json
import os
import pickletools
import shutil
import sys
import tempfile
import types
import zipfile
from typing import Any

import numpy as np

SUITES = ("libero_spatial", "libero_object", "libero_goal", "libero_10", "libero_90")
CAMERAS = {"agentview": "agentview", "wrist": "robot0_eye_in_hand"}
"""Our name -> LIBERO's."""
SENSORS = ("robot0_eef_pos", "robot0_eef_quat", "robot0_gripper_qpos")
DRAWN = (
    "xpos", "xquat", "xmat", "xipos", "ximat", "geom_xpos", "geom_xmat", "site_xpos", "site_xmat", "cam_xpos",
    "cam_xmat", "light_xpos", "light_xdir", "subtree_com",
)  # fmt: skip
"""Parts of MuJoCo's data that a picture is drawn from."""
STATES = 50
"""Published initial states of each task."""
HELD_OUT = 10
"""The last ones, on which training never starts when states are held out."""
ACTION = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
WORDS = 24
HZ = 20
SPARE = 2
"""Scenes that a process keeps beside those in use."""


def locate() -> str:
    """Folder of the installed package, found without importing it: its import asks a question on standard input."""
    for place in sys.path:
        folder = os.path.join(place, "libero", "libero")
        if os.path.isdir(os.path.join(folder, "bddl_files")):
            return folder
    sys.exit(
        f"the Python {sys.executable} has no LIBERO (hf-libero): install it there, or leave env.isolated out and run "
        "`embodied-rl sim install libero`"
    )


def prepare(assets: str) -> Any:
    """Import LIBERO with a configuration and assets of our own; returns its module of environments."""
    home = tempfile.mkdtemp(prefix="libero-")
    atexit.register(shutil.rmtree, home, ignore_errors=True)
    folder = locate()
    places = {"benchmark_root": folder, "bddl_files": os.path.join(folder, "bddl_files"),
              "init_states": os.path.join(folder, "init_files"), "datasets": home, "assets": assets}  # fmt: skip
    with open(os.path.join(home, "config.yaml"), "w") as file:
        json.dump(places, file)
    os.environ["LIBERO_CONFIG_PATH"] = home
    os.environ["MUJOCO_GL"] = os.environ["PYOPENGL_PLATFORM"] = "egl"
    import libero.libero

    libero.libero._assets_path_cache = assets
    try:
        import libero.libero.envs
    except (ImportError, AttributeError, RuntimeError) as error:
        if "EGL" in str(error).upper() or "OPENGL" in str(error).upper():
            sys.exit(no_egl(error))
        raise
    return libero.libero.envs


def no_egl(error: object) -> str:
    """What to do where nothing can be drawn."""
    return (
        f"LIBERO draws with EGL, and that does not work here ({error}): install libegl1, libgl1 and libgles2 with a "
        "driver (`apt-get install libegl1 libgl1 libgles2 libgl1-mesa-dri`)"
    )


def task_names() -> list[str]:
    """Every task as "suite/task", in the published order."""
    scope: dict[str, Any] = {}
    with open(os.path.join(locate(), "benchmark", "libero_suite_task_map.py")) as file:
        # The package around it imports torch.
        exec(file.read(), scope)
    return [f"{suite}/{task}" for suite in SUITES for task in scope["libero_task_map"][suite]]


def choose(wanted: list[str]) -> list[str]:
    """Turn suites and "suite/task" names into tasks; exits with the nearest name for one that does not exist."""
    known = task_names()
    chosen: list[str] = []
    for name in wanted:
        found = [task for task in known if task == name or task.startswith(name + "/")]
        if not found:
            near = difflib.get_close_matches(name, [*SUITES, *known], n=1, cutoff=0.3)
            hint = f"did you mean '{near[0]}'?" if near else f"suites: {', '.join(SUITES)}"
            sys.exit(f"task '{name}' does not exist; {hint}")
        chosen += found
    if len(set(chosen)) < len(chosen):
        sys.exit(f"tasks {wanted} name one twice; list each task or its suite once")
    return chosen


def language(task: str) -> str:
    """The instruction of a task, as LIBERO's benchmark words it."""
    name = task.split("/")[1]
    if name[0].isupper():  # of LIBERO-100: the scene comes first
        at = name.find("SCENE")
        name = name[at:].split("_", 1)[1]
    return name.replace("_", " ")


def initial_states(task: str) -> np.ndarray:
    """[50, D] published initial states of a task, read without running what a pickle could run.

    The files were written by torch.save: a zip whose data.pkl holds one float64 array, its bytes as a Latin-1 string.
    """
    suite, name = task.split("/")
    path = os.path.join(locate(), "init_files", suite, name + ".pruned_init")
    with zipfile.ZipFile(path) as archive:
        member = next(n for n in archive.namelist() if n.endswith("data.pkl"))
        found = [(op.name, arg) for op, arg, _ in pickletools.genops(archive.read(member))]
    texts = [str(arg) for name, arg in found if name == "BINUNICODE"]
    numbers = [int(arg or 0) for name, arg in found if name.startswith("BININT")]
    rows, columns = numbers[2:4]  # after the shape (0,) of an empty array and the version of the format
    data = max(texts, key=len).encode("latin1")
    if "f8" not in texts or len(data) != 8 * rows * columns:
        sys.exit(f"the initial states {path} are not in the format of hf-libero 0.1.4: install the locked version")
    return np.frombuffer(data, "<f8").reshape(rows, columns)


def axis_angle(quaternion: np.ndarray) -> np.ndarray:
    """Rotation vector [3] (rad) of a unit quaternion (x, y, z, w), with robosuite's sign: 2 acos(w), up to 2 pi."""
    w = float(np.clip(quaternion[3], -1.0, 1.0))
    sine = np.sqrt(1.0 - w * w)
    if np.isclose(sine, 0.0):
        return np.zeros(3)
    return np.asarray(quaternion[:3]) * 2.0 * np.arccos(w) / sine


def prepare_picture(picture: np.ndarray, p: dict[str, Any]) -> np.ndarray:
    """Turn a drawn picture [H, W, 3] by 180 degrees and bring it to the size that the policy sees."""
    from PIL import Image

    picture = np.ascontiguousarray(picture[::-1, ::-1])
    size = (p["picture"], p["picture"])
    if not p["jpeg"] and p["crop"] == 1 and picture.shape[:2] == size:
        return picture
    image = Image.fromarray(picture)
    if p["jpeg"]:
        buffer = io.BytesIO()
        image.save(buffer, "JPEG", quality=95)
        image = Image.open(buffer).convert("RGB")
    if image.size != size:
        kernel = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}[p["resize"]]
        image = image.resize(size, kernel)
    if p["crop"] < 1:
        margin = (1 - np.sqrt(p["crop"])) / 2 * p["picture"]
        box = (margin, margin, p["picture"] - margin, p["picture"] - margin)
        image = image.resize(size, Image.Resampling.BILINEAR, box=box)
    return np.asarray(image)


def convention(hand: str) -> dict[str, Any]:
    """What an action means: robosuite's controller OSC_POSE as LIBERO sets it, behind the protocol's gripper.

    Source: robosuite 1.4.0, controllers/config/osc_pose.json (output_max) and utils/control_utils.py (the rotation is
    an axis-angle, multiplied from the left).
    """
    gripper = "closes_at_plus" if hand == "open_low" else "opens_at_plus"
    return {"control": "ee_delta", "frame": "base", "rotation": "axis_angle", "gripper": gripper, "metres": 0.05,
            "radians": 0.5}  # fmt: skip


class Scene:
    """One task's world; building it takes seconds, so a process keeps and lends it."""

    def __init__(self, envs: Any, task: str) -> None:
        """Load the scene; exits with a sentence when a file of the assets is missing or nothing can be drawn."""
        import mujoco
        from robosuite.utils.observables import Observable, sensor

        self.task = task
        suite, name = task.split("/")
        path = os.path.join(locate(), "bddl_files", suite, name + ".bddl")
        try:
            self.env = envs.OffScreenRenderEnv(
                bddl_file_name=path, use_camera_obs=False, hard_reset=False, ignore_done=True, control_freq=HZ
            ).env
        except Exception as error:
            text = str(error) or type(error).__name__
            if "EGL" in text.upper() or "EGL" in type(error).__name__.upper() or "EGL" in type(error).__module__:
                sys.exit(no_egl(text))
            if isinstance(error, FileNotFoundError) or "resource not found" in text or "rror opening file" in text:
                sys.exit(f"an asset of '{task}' is missing ({text}): download LIBERO's assets again, whole")
            raise
        self.states = initial_states(task)
        sim = self.env.sim
        self.context = sim._render_context_offscreen
        self.seen = mujoco.MjData(sim.model._model)

        pairs = [(getattr(self.seen, name), getattr(sim.data._data, name)) for name in DRAWN]

        @sensor(modality="snapshot")
        def snapshot(cache: dict[str, Any]) -> np.ndarray:
            for kept, live in pairs:
                kept[...] = live
            return np.zeros(1)

        kept = {name: self.env._observables[name] for name in SENSORS}
        kept["snapshot"] = Observable(name="snapshot", sensor=snapshot, sampling_rate=HZ)
        # The other forty observables are only computed, in every physics step, to be thrown away.
        self.env._observables = kept

    def start(self, state: np.ndarray | None, seed: int) -> None:
        """Begin anew: fixtures by the seed, everything else by the initial state, or by the seed where that is None."""
        from robosuite.utils.errors import RandomizationError

        np.random.seed(seed)
        for robot in self.env.robots:
            # All that a scene remembers of its last episode when it is not built anew.
            robot.gripper.current_action = np.zeros(robot.gripper.dof)
        while True:
            try:
                self.env.reset()
                break
            except RandomizationError:
                continue  # objects did not fit beside each other: LIBERO draws again
        if state is not None:
            self.env.sim.set_state_from_flattened(state)
            self.env.sim.forward()
        self.env._check_success()
        self.env._post_process()
        self.env._update_observables(force=True)

    def draw(self, camera: str, height: int, width: int, data: Any) -> np.ndarray:
        """Picture [H, W, 3] of a physics state, upside down as OpenGL gives it."""
        self.context.gl_ctx.make_current()
        self.context.data = types.SimpleNamespace(_data=data)
        return self.env.sim.render(camera_name=camera, height=height, width=width)

    def close(self) -> None:
        """Free what the scene holds; OpenGL frees objects by number, in whatever context is current."""
        self.context.gl_ctx.make_current()
        self.context.con.free()
        self.context.con = types.SimpleNamespace(free=lambda: None)
        self.env.close()


class Pool:
    """The scenes of one process, lent to its copies."""

    def __init__(self, envs: Any) -> None:
        """Begin empty."""
        self.envs = envs
        self.idle: list[Scene] = []

    def lend(self, task: str) -> Scene:
        """An idle scene of the task, or a new one."""
        for scene in self.idle:
            if scene.task == task:
                self.idle.remove(scene)
                return scene
        return Scene(self.envs, task)

    def take_back(self, scene: Scene, most: int) -> None:
        """Keep a scene for later; the one that has waited longest goes when there are more than `most`."""
        self.idle.append(scene)
        if len(self.idle) > most:
            self.idle.pop(0).close()


POOLS: list[Pool] = []


class Simulator:
    """One copy; see the worker of `envs/isolated`."""

    def __init__(self, settings: dict[str, Any]) -> None:
        """Check that everything is there, and build the first scene.

        Args:
            settings: tasks, states, assets, and the protocol `p` (see protocols.yaml).
        """
        self.p = p = settings["protocol"]
        self.states, self.assets = settings["states"], settings["assets"]
        self.tasks = choose(settings["tasks"])
        self.limits = [p["steps"][task.split("/")[0]] for task in self.tasks]
        if not POOLS:
            POOLS.append(Pool(prepare(settings["assets"])))
            POOLS[0].take_back(POOLS[0].lend(self.tasks[0]), 1)
        self.scene: Scene | None = None
        self.keep = len(self.tasks) if len(self.tasks) <= 10 else SPARE
        size = p["picture"]
        seen: dict[str, Any] = {
            camera: {"shape": [size, size, 3], "dtype": "uint8", "low": 0, "high": 255, "meaning": f"camera {camera}"}
            for camera in p["cameras"]
        }
        if p["state"]:
            meaning = "hand position (m) 3, axis-angle (rad) 3, fingers (m) 2"
            seen["proprio"] = {"shape": [8], "meaning": meaning}
        names = self.tasks
        if self.states == "each":
            # All tasks take their turn before a second state does, so that fewer episodes are fewer trials of each.
            names = [f"{task}#{state:02d}" for state in range(STATES) for task in self.tasks]
        self.spec = {
            "observation": seen,
            "action": {"kind": "continuous", "size": 7, "names": list(ACTION), "convention": convention(p["hand"])},
            "tasks": names,
            "max_steps": max(self.limits),
            "success": True,
            "cameras": list(CAMERAS),
            "control_hz": float(HZ),
            "on_demand": True,
            "words": WORDS,
            "sentences": [language(task) for task in self.tasks],
        }

    def reset(self, seed: int, task: int) -> None:
        """Start an episode; nothing is shown until `observe`."""
        turn, which = divmod(task, len(self.tasks))
        name, state = self.tasks[which], turn if self.states == "each" else None
        if self.scene is None or self.scene.task != name:
            if self.scene is not None:
                POOLS[0].take_back(self.scene, self.keep)
            self.scene = POOLS[0].lend(name)
        row, fixtures = choose_start(self.states, seed, self.p["seed"], state)
        self.scene.start(None if row is None else self.scene.states[row], fixtures)
        self.left = self.limits[which]
        idle = np.array([0.0] * 6 + [self.p["settle_hand"]])
        for _ in range(self.p["settle"]):
            self.scene.env.step(idle)

    def step(self, action: np.ndarray) -> tuple[None, float, bool, bool, dict[str, bool]]:
        """One control step: 1/20 s. The reward is 1 in the step that reaches the goal, which ends the episode."""
        assert self.scene is not None
        command = action.astype(np.float64)
        hand = command[6]
        if self.p["hand"] == "open_high":
            command[6] = -hand
        elif self.p["hand"] == "open_high_binary":
            command[6] = -np.sign(hand)
        _, _, success, _ = self.scene.env.step(command)
        self.left -= 1
        return None, float(success), bool(success), self.left == 0, {"success": bool(success)}

    def observe(self) -> dict[str, np.ndarray]:
        """What the policy sees now."""
        assert self.scene is not None
        side = self.p["render"]
        seen = {
            name: prepare_picture(self.scene.draw(CAMERAS[name], side, side, self.scene.seen), self.p)
            for name in self.p["cameras"]
        }
        if self.p["state"]:
            position, quaternion, fingers = (self.scene.env._observables[name].obs for name in SENSORS)
            seen["proprio"] = np.concatenate([position, axis_angle(quaternion), fingers])
        return seen

    def render(self, camera: str, height: int, width: int) -> np.ndarray:
        """A picture for people: turned upright only, of the state as it is now."""
        assert self.scene is not None
        return self.scene.draw(CAMERAS[camera], height, width, self.scene.env.sim.data._data)[::-1, ::-1]

    def manifest(self) -> dict[str, Any]:
        """What results depend on: the protocol in force, where episodes start, and the files of the assets."""
        return {"protocol": self.p, "states": self.states, "assets": checksum_of(self.assets)}

    def instruction(self) -> str:
        """What the task asks for."""
        return language(self.scene.task) if self.scene is not None else ""


def checksum_of(folder: str) -> str:
    """SHA-256 of the names and contents of all files in the folders of a folder, in the order of their names.

    Hidden folders, and what lies beside the folders, are left out: a download leaves its notes and times there.
    """
    whole = hashlib.sha256()
    tops = [os.path.join(folder, name) for name in os.listdir(folder) if not name.startswith(".")]
    names = sorted(os.path.join(at, name) for top in tops for at, _, files in os.walk(top) for name in files)
    for name in names:
        one = hashlib.sha256()
        with open(name, "rb") as file:
            while block := file.read(1 << 20):
                one.update(block)
        whole.update(os.path.relpath(name, folder).encode() + b"\0" + one.digest())
    return whole.hexdigest()


def choose_start(states: str, seed: int, fixtures: int, given: int | None) -> tuple[int | None, int]:
    """Decide where an episode starts; training seeds are even, evaluation seeds odd.

    Args:
        states: heldout, sampled, published or each (see the recipe's `env.states`).
        seed: Of the start.
        fixtures: The protocol's seed for what an initial state does not fix.
        given: Initial state that the task itself names, or None.

    Returns:
        state: Row of the published initial states; None draws a new placement.
        seed: For the places that remain to be drawn.
    """
    number = int.from_bytes(hashlib.blake2b(str(seed).encode(), digest_size=8, person=b"libero").digest(), "little")
    if given is not None:
        return given, fixtures
    train = seed % 2 == 0
    if states == "sampled" and train:
        return None, number % 2**32
    if states != "heldout":
        return number % STATES, fixtures
    return (number % (STATES - HELD_OUT) if train else STATES - HELD_OUT + number % HELD_OUT), fixtures
