"""One ManiSkill env as tensors: a single copy on a CPU, all copies on a GPU; nothing leaves the device."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import mani_skill.envs  # registers the tasks
import torch
from gymnasium import spaces
from mani_skill.utils import assets, download_asset
from mani_skill.utils.registration import REGISTERED_ENVS
from torch import Tensor

from embodied_rl.envs._spaces import ActionMap
from embodied_rl.envs.maniskill.convention import convention_of
from embodied_rl.envs.maniskill.device import drawing_device, handed_in
from embodied_rl.errors import CapabilityError, ConfigError, MissingExtraError, NotFoundError, UserError, nearest
from embodied_rl.manifest import FILES, checksum_of, files_of, source
from embodied_rl.runfolder import installed
from embodied_rl.types import Obs, TensorSpec

if TYPE_CHECKING:
    from embodied_rl.envs.maniskill import Config

RESERVED = {
    "num_envs": "collect.copies", "obs_mode": "env.observation", "reward_mode": "env.reward",
    "control_mode": "env.control", "render_mode": "env.film", "sim_backend": "device", "render_backend": "device",
}  # fmt: skip
"""Setting of ManiSkill -> the setting of a recipe that says it."""
REWARDS = ("normalized_dense", "dense", "sparse")
"""Rewards of a task's own."""
OBS_MODES = {
    "state": ("state",),
    "rgb": ("rgb", "rgb+segmentation"),
    "rgbd": ("rgb+depth", "rgbd", "rgb+depth+segmentation"),
}
"""`env.observation` -> what ManiSkill calls it, the best first; what it shows beyond that is left out."""
REFUSALS = (TypeError, ValueError, AssertionError, NotImplementedError, RuntimeError, AttributeError, IndexError)
"""What ManiSkill raises over settings that do not fit a task; the last two over another number of robots."""


@dataclass
class Moment:
    """What came of a start or a control step; tensors [n, ...] that nobody else writes to."""

    obs: Obs
    """Without pictures after a step where those are asked for with `Scene.look`."""
    reward: Tensor
    success: Tensor | None
    ended: Tensor
    """[n] bool, solved or failed."""
    broken: dict[str, Tensor]
    """Entry of the observation, or reward -> [n] bool, it is not finite: the simulation has blown up."""


def check_task(config: Config, device: torch.device) -> None:
    """Refuse what can be known to be wrong before anything is built.

    Raises:
        NotFoundError: No such task.
        CapabilityError: It has no such reward or observation, its assets are not on the disk, or `starts: batch`
            without a GPU.
        ConfigError: `kwargs` holds what a recipe says elsewhere.
    """
    where = f"env maniskill: '{config.task}'"
    if config.task not in REGISTERED_ENVS:
        alike = nearest(config.task, REGISTERED_ENVS)
        hint = alike if alike.startswith("; did") else "; PickCube-v1, PushCube-v1 and StackCube-v1 are some"
        raise NotFoundError(f"{where} does not exist{hint}")
    for key in RESERVED.keys() & config.kwargs.keys():
        raise ConfigError(f"{where}: kwargs must not hold {key}; use {RESERVED[key]}")
    if config.starts == "batch" and device.type != "cuda":
        raise CapabilityError(
            f"{where}: starts (batch) does nothing on device {device}, where every copy has a scene of its own: remove "
            "it, or set device: cuda"
        )
    task = REGISTERED_ENVS[config.task].cls
    modes = task.SUPPORTED_REWARD_MODES
    paid = [name for name in REWARDS if name in modes] or ["none"] * ("none" in modes)
    _check_offered(where, "reward", config.reward, paid, modes)
    seen = [name for name in OBS_MODES if obs_mode(task, name)]
    _check_offered(where, "observation", config.observation, seen, task.SUPPORTED_OBS_MODES)
    asked = {name: _sources(name) for name in REGISTERED_ENVS[config.task].asset_download_ids}
    absent = {name: [x for x in found if not assets.is_data_source_downloaded(x)] for name, found in asked.items()}
    missing = [name for name, sources in absent.items() if sources]
    if missing:
        place = assets.DATA_SOURCES[absent[missing[0]][0]].output_dir
        raise _lacking(where, missing, missing[0], place)


def _check_offered(where: str, setting: str, value: str, usable: Sequence[str], offered: Sequence[str]) -> None:
    """CapabilityError where a task does not take a value; names no value that a recipe would not take."""
    if value in usable:
        return
    hint = f"set env.{setting} to one of {list(usable)}"
    if not usable:
        hint = f"it offers only {list(offered)}, which env.{setting} cannot say, so this task does not run here"
    raise CapabilityError(f"{where} does not take {setting} {value}: {hint}")


def obs_mode(task: Any, observation: str) -> str | None:
    """What a task's class calls an `env.observation`; None where it offers nothing of the kind."""
    modes, names = task.SUPPORTED_OBS_MODES, OBS_MODES[observation]
    # "any_textures" lets ManiSkill combine them as it is asked to.
    return names[0] if "any_textures" in modes else next((name for name in names if name in modes), None)


def _lacking(where: str, names: Sequence[str], group: str, place: object) -> CapabilityError:
    return CapabilityError(
        f"{where} needs the assets {', '.join(names)}, which are not under {place}: run `python -m "
        f"mani_skill.utils.download_asset {group}` where the internet can be reached, or set MS_ASSET_DIR"
    )


@contextmanager
def _nothing_asked(where: str) -> Iterator[None]:
    """Refuse in one sentence where ManiSkill would ask on standard input whether to download its robot."""
    ask = download_asset.prompt_yes_no

    def refuse(question: str) -> bool:
        robot = question.split()[1]  # "Robot anymal_c has assets available for download. ..."
        raise _lacking(f"{where}: its robot {robot}", _sources(robot) or [robot], robot, mani_skill.ASSET_DIR)

    download_asset.prompt_yes_no = refuse
    try:
        yield
    finally:
        download_asset.prompt_yes_no = ask


def _sources(name: str) -> list[str]:
    """Every data source of something that can be downloaded, with groups taken apart."""
    group = name in assets.DATA_GROUPS
    found: list[str] = assets.expand_data_group_into_individual_data_source_ids(name) if group else [name]
    return found


def manifest_of(config: Config, device: torch.device, num_envs: int) -> dict[str, Any]:
    """What results depend on, also where the copies are simulated in processes of their own."""
    settings = ("task", "observation", "pixels", "control", "reward", "end_on_success", "kwargs")
    needed = [x for name in REGISTERED_ENVS[config.task].asset_download_ids for x in _sources(name)]
    sources = {name: assets.DATA_SOURCES[name] for name in needed}
    return {
        **{name: getattr(config, name) for name in settings},
        **source(REGISTERED_ENVS[config.task].cls),
        "assets": {name: checksum_of(Path(one.output_dir) / one.target_path) for name, one in sources.items()},
        FILES: files_of(Scene),
        # PhysX on a GPU is another solver, with another scene that holds all copies, whose number changes what happens.
        "physics": device.type,
        **({"num_envs": num_envs} if device.type == "cuda" else {}),
        "packages": installed(["mani_skill", "sapien"]),
    }


class Scene:
    """See the module docstring."""

    def __init__(self, config: Config, copies: int, device: torch.device) -> None:
        """Build it.

        Raises:
            NotFoundError: No such controller.
            CapabilityError: No Vulkan device, or assets that are not on the disk.
            MissingExtraError: A package that the task alone needs is not installed.
            ConfigError: ManiSkill refused a setting.
        """
        self.where, self.device, self.copies = f"env maniskill: '{config.task}'", device, copies
        self._pictures = config.observation != "state"
        self._depth = config.observation == "rgbd"
        task = REGISTERED_ENVS[config.task]
        self.max_steps: int | None = config.max_steps or task.max_episode_steps
        self.env = self._build(config, task)
        info = self.env.get_info()
        self.has_success = "success" in info
        self.control_hz = float(self.env.control_freq)
        self.cameras = tuple(self.env.scene.human_render_cameras)
        space = self.env.single_action_space
        self.action = ActionMap(space, self.where)
        self.action_names = _action_names(space, config.control)
        agent = self.env.agent
        # Several robots in one task have neither a controller in parts nor a name, and a convention is of one hand.
        controllers = getattr(getattr(agent, "controller", None), "controllers", {})
        parts = {name: one.config for name, one in controllers.items()}
        self.convention = convention_of(getattr(agent, "uid", ""), parts)
        self._middle = torch.as_tensor(self.action.middle, dtype=torch.float32, device=device)
        self._half = torch.as_tensor(self.action.half, dtype=torch.float32, device=device)
        self.observation = self._specs(self.look(info))

    def _build(self, config: Config, task: Any) -> Any:
        settings: dict[str, Any] = task.default_kwargs | config.kwargs
        settings |= {
            "num_envs": self.copies,
            "obs_mode": obs_mode(task.cls, config.observation),
            "reward_mode": config.reward,
            "control_mode": config.control,
            "render_mode": "rgb_array",
            "sim_backend": "physx_cpu" if self.device.type == "cpu" else f"physx_cuda:{self.device.index or 0}",
            "human_render_camera_configs": {"width": config.film, "height": config.film},
        }
        if isinstance(robots := settings.get("robot_uids"), list):
            settings["robot_uids"] = tuple(robots)  # a recipe knows no tuples, and ManiSkill takes nothing else
        if config.pixels is not None:
            settings["sensor_configs"] = {"width": config.pixels, "height": config.pixels}
        with handed_in(drawing_device(self.device, self.where)), _nothing_asked(self.where):
            try:
                env = task.cls(**settings)
            except UserError:
                raise
            except ImportError as error:
                raise MissingExtraError(f"{self.where} cannot be made: {error}") from error
            except OSError as error:
                raise CapabilityError(
                    f"{self.where} cannot be made: {error}; where that is an asset, `python -m "
                    "mani_skill.utils.download_asset` names everything that can be downloaded"
                ) from error
            except REFUSALS as error:
                # How ManiSkill says which controllers the robot has.
                known = re.search(r"not in supported modes: \[(.*)\]", str(error))
                if known:
                    hint = nearest(config.control, re.findall(r"'(\w+)'", known[1]))
                    message = f"{self.where}: controller '{config.control}' does not exist{hint}"
                    raise NotFoundError(message) from None
                hint = "look at env.control and env.kwargs"
                raise ConfigError(f"{self.where} cannot be made: {error}; {hint}") from error
        if config.reward == "none":
            # The class refuses to be asked for it, but ManiSkill can tell every task's success as a sparse reward.
            env._reward_mode = "sparse"
        return env

    def start(self, rows: list[int], seeds: list[int]) -> None:
        """Begin new episodes in some copies; with one row the start depends on its seed alone."""
        everyone = [0] * self.copies
        for row, seed in zip(rows, seeds, strict=True):
            everyone[row] = seed
        if len(rows) == 1:
            everyone = seeds * self.copies
        env_idx = torch.tensor(rows, device=self.device)
        self.env.reset(seed=[s % 2**32 for s in everyone], options={"env_idx": env_idx})

    def advance(self, action: Tensor) -> None:
        """Simulate one control step without looking at it.

        Args:
            action: [n, D] in [-1, 1].
        """
        self.env._step_action(self._native(action))
        self.env._elapsed_steps += 1
        self.env.get_info()

    def step(self, action: Tensor, *, draw: bool = True) -> Moment:
        """Simulate one control step.

        Args:
            action: [n, D] in [-1, 1].
            draw: False leaves the pictures out, which cost far more than the step; `look` then shows everything.
        """
        if draw or not self._pictures:
            raw, reward, ended, _, info = self.env.step(self._native(action))
            return self._moment(self._read(raw), info, reward, ended)
        # ManiSkill's own step without its cameras: rewards are computed from what is known without them.
        taken = self.env._step_action(self._native(action))
        self.env._elapsed_steps += 1
        info = self.env.get_info()
        known = self.env._get_obs_state_dict(info)
        reward = self.env.get_reward(obs=known, action=taken, info=info)
        no = torch.zeros(self.copies, dtype=torch.bool, device=self.device)
        return self._moment(self._read(known), info, reward, info.get("success", no) | info.get("fail", no))

    def look(self, info: dict[str, Any] | None = None) -> Moment:
        """What the scene shows now; reward 0, and success as it is."""
        info = self.env.get_info() if info is None else info
        obs = self._read(self.env.get_obs(info))
        no = torch.zeros(self.copies, dtype=torch.bool, device=self.device)
        return self._moment(obs, info, torch.zeros(self.copies, device=self.device), no)

    def film(self, camera: str) -> Tensor:
        """Pictures [n, H, W, 3] uint8 of one camera."""
        return torch.as_tensor(self.env.render_rgb_array(camera)).to(torch.uint8)

    def close(self) -> None:
        """Free the simulator."""
        self.env.close()

    # ---- inside -------------------------------------------------------------------------------------------------

    def _native(self, action: Tensor) -> Any:
        """What ManiSkill takes: [n, D], or such a tensor for each of several robots."""
        return self.action.split(action.clamp(-1, 1) * self._half + self._middle)

    def _moment(self, obs: Obs, info: dict[str, Any], reward: Tensor, ended: Tensor) -> Moment:
        numbers = {f"'{name}'": x for name, x in obs.items() if x.is_floating_point()} | {"reward": reward}
        broken = {name: ~torch.isfinite(x.reshape(self.copies, -1)).all(1) for name, x in numbers.items()}
        success = info["success"].bool().clone() if "success" in info else None
        return Moment(obs, reward.to(torch.float32).clone(), success, ended.bool().clone(), broken)

    def _read(self, raw: Any) -> Obs:
        """ManiSkill's observation as flat entries: `state`, a picture per camera, and its depth in metres."""
        if not self._pictures:
            return {"state": raw.to(torch.float32).clone()}
        known = list(_vectors({name: raw[name] for name in ("agent", "extra") if name in raw}, self.copies))
        obs: Obs = {"state": torch.cat(known, dim=1)} if known else {}
        for camera, seen in raw.get("sensor_data", {}).items():
            obs[camera] = seen["rgb"].to(torch.uint8).clone()
            if self._depth:
                obs[f"{camera}_depth"] = seen["depth"].to(torch.float32) / 1000
        return obs

    def _specs(self, moment: Moment) -> dict[str, TensorSpec]:
        specs = {}
        for name, x in moment.obs.items():
            shape, picture = tuple(x.shape[1:]), x.dtype == torch.uint8
            if name == "state":
                meaning = "joints, hand and goal" if self._pictures else "joints, hand, goal and objects"
            else:
                meaning = "a camera's picture" if picture else "a camera's depth, m"
            specs[name] = TensorSpec(shape, x.dtype, 0 if picture else None, 255 if picture else None, meaning=meaning)
        return specs


def _action_names(space: Any, control: str) -> tuple[str, ...]:
    """What the numbers of an action are called; of several robots, each with its robot's name before a dot."""
    if isinstance(space, spaces.Dict):
        one_by_one = ((robot, _action_names(box, control) or range(*box.shape)) for robot, box in space.items())
        return tuple(f"{robot}.{name}" for robot, names in one_by_one for name in names)
    pose = ("dx", "dy", "dz", "drx", "dry", "drz", "gripper")
    return pose if control == "pd_ee_delta_pose" and space.shape == (7,) else ()


def _vectors(tree: Any, copies: int) -> list[Tensor]:
    """Every number of a nested dict as [n, features], in the dict's order."""
    if isinstance(tree, dict):
        return [x for inner in tree.values() for x in _vectors(inner, copies)]
    return [torch.as_tensor(tree).to(torch.float32).reshape(copies, -1)]
