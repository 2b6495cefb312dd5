"""What `bench_envs.py` steps: every adapter of ours, and the same simulation behind other vectorisations.

A `Case` is one simulation with a number of copies. Each of its ways to step (`ours` and the peers) is a function that
builds it and returns a control step of all copies with a random action, restarts included.

What is counted are control steps: a copy that was only restarted in a call has made none. Our copies restart between two
steps, those of bare envpool and of Gymnasium in the call after the one that ended their episode, in which they ignore
their action. To count that call would give these one step for nothing in every episode (one of 51 with `LIMIT`).
"""

from __future__ import annotations

import importlib.util
import os
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

Stepper = Callable[[], int]
"""Moves all copies; how many of them made a control step."""
Peers = dict[str, Callable[[], Stepper]]
"""Name of a vectorisation -> what builds it."""
THREADS = 2
FRAME_SKIP = 10
"""Physics steps per control step of the reacher, as the mjcf adapter has them."""
LIMIT = 50
"""Control steps of an episode, where one can say it: as many as are timed together, so that each pays for restarts."""
ROOT = Path(__file__).resolve().parents[1]
TASKS = tuple(f"MetaWorld/{name}-v3" for name in ("Reach", "Push", "DrawerClose", "WindowOpen"))
"""Quick ones to build; all of MetaWorld's share one observation and action."""
GOAL_SHOWN = {"partially_observable": False}


@dataclass
class Case:
    """One simulation."""

    copies: int
    env: dict[str, Any]
    """The recipe's env section."""
    peers: Peers
    installed: bool = True
    """Whether what it needs is here."""


# ---- ours --------------------------------------------------------------------------------------------------------


def stepper(env: Any) -> Stepper:
    """One control step of an env of ours with a random action, restarts included."""
    import torch

    from embodied_rl.seeding import start_seeds

    spec, b = env.spec, env.spec.num_envs
    actions = (torch.rand(16, b, *spec.action.shape) * 2 - 1).to(env.device).unbind()
    episodes = torch.zeros(b, dtype=torch.int64)
    copies = torch.arange(b)
    able = spec.playable()
    # The first task of each copy's own where copies differ, all in turn where they do not.
    own = None if able is None else able.int().argmax(1)
    clock = {"t": 0}

    def reset(mask: torch.Tensor) -> None:
        tasks = (copies + episodes) % len(spec.tasks) if own is None else own
        env.reset(*(x.to(env.device) for x in (mask, start_seeds(0, "train", copies, episodes), tasks)))
        episodes[mask] += 1

    def step() -> int:
        result = env.step(actions[clock["t"] % len(actions)])
        clock["t"] += 1
        done = (result.terminated | result.truncated).cpu()
        if bool(done.any()):
            reset(done)
        return b

    reset(torch.ones(b, dtype=torch.bool))
    return step


def ours(case: Case) -> Stepper:
    """The adapter that the case's env section names."""
    import torch

    from embodied_rl.registry import load

    module = load("env", case.env["type"])
    os.chdir(ROOT)  # scenes are named as recipes name them
    config = module.Config(**case.env)
    return stepper(module.build(config, num_envs=case.copies, device=torch.device("cpu"), split="train", seed=0))


# ---- others ------------------------------------------------------------------------------------------------------


def bare_envpool(ids: tuple[str, ...], copies: int) -> Stepper:
    """Bare envpool, one pool for each id; all pools are told their actions before one is waited for."""
    share = copies // len(ids)
    pools = envpools(ids, share)
    width = pools[0].action_space.shape[0]
    actions = np.random.default_rng(0).uniform(-1, 1, (16, share, width))
    rows, clock = np.arange(share, dtype=np.int32), {"t": 0}

    def step() -> int:
        for pool in pools:
            pool.send(actions[clock["t"] % len(actions)], rows)
        clock["t"] += 1
        return sum(int(np.count_nonzero(pool.recv()[4]["elapsed_step"])) for pool in pools)

    return step


def envpool_tensors(ids: tuple[str, ...], copies: int) -> Stepper:
    """Envpool as a learner in torch meets it: float32 tensors in, checked to be finite, and float32 tensors out."""
    import torch

    share = copies // len(ids)
    pools = envpools(ids, share)
    actions = (torch.rand(16, copies, pools[0].action_space.shape[0]) * 2 - 1).unbind()
    rows, clock = np.arange(share, dtype=np.int32), {"t": 0}

    def step() -> int:
        action = actions[clock["t"] % len(actions)]
        clock["t"] += 1
        if not bool(torch.isfinite(action).all()):
            raise ValueError("an action is not finite")
        for pool, part in zip(pools, action.split(share), strict=True):
            pool.send(part.numpy().astype(np.float64), rows)
        given = [pool.recv() for pool in pools]
        obs = torch.from_numpy(np.concatenate([one[0] for one in given]).astype(np.float32))
        reward, terminated, truncated = (torch.from_numpy(np.concatenate([one[i] for one in given])) for i in (1, 2, 3))
        assert len(obs) == len(reward) == len(terminated) == len(truncated) == copies
        return sum(int(np.count_nonzero(one[4]["elapsed_step"])) for one in given)

    return step


def envpools(ids: tuple[str, ...], share: int) -> list[Any]:
    """One started pool for each id."""
    import envpool

    pools = [envpool.make_gymnasium(id, num_envs=share, num_threads=THREADS, seed=0, **told(id)) for id in ids]
    for pool in pools:
        pool.async_reset()
        pool.recv()
    return pools


def _envpool(ids: tuple[str, ...], copies: int) -> Peers:
    return {"envpool": partial(bare_envpool, ids, copies), "envpool_tensors": partial(envpool_tensors, ids, copies)}


def told(id: str) -> dict[str, Any]:
    """MetaWorld's goal is shown, as in the recipe, and its episodes are short."""
    return GOAL_SHOWN | {"max_episode_steps": LIMIT} if id.startswith("MetaWorld") else {}


class One(gymnasium.Env[Any, Any]):
    """A single copy of an envpool id, so that Gymnasium can vectorise it."""

    def __init__(self, id: str) -> None:
        """Make it."""
        import envpool

        self.inner = envpool.make_gymnasium(id, num_envs=1, num_threads=1, seed=0, **told(id))
        self.observation_space, self.action_space = self.inner.observation_space, self.inner.action_space

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Start."""
        return self.inner.reset()[0][0], {}

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step."""
        obs, reward, terminated, truncated, _ = self.inner.step(np.asarray(action)[None])
        return obs[0], float(reward[0]), bool(terminated[0]), bool(truncated[0]), {}


def one_of(id: str) -> Any:
    """One copy of a Gymnasium or envpool id."""
    return One(id) if id.startswith("MetaWorld") else gymnasium.make(id)


class Arm(gymnasium.Env[Any, Any]):
    """The scene of examples/reacher, written as one writes a Gymnasium env: MuJoCo's Python and NumPy."""

    def __init__(self) -> None:
        """Compile the scene."""
        import mujoco

        self.mujoco, self.model = mujoco, mujoco.MjModel.from_xml_path(str(ROOT / "examples/reacher/reacher.xml"))
        self.data = mujoco.MjData(self.model)
        self.observation_space = gymnasium.spaces.Box(-np.inf, np.inf, (10,), np.float32)
        self.action_space = gymnasium.spaces.Box(-1, 1, (2,), np.float32)

    def reset(self, *, seed: int | None = None, options: Any = None) -> tuple[Any, dict[str, Any]]:
        """Arm and balls anywhere."""
        super().reset(seed=seed)
        self.mujoco.mj_resetData(self.model, self.data)
        self.data.qpos[:] = self.np_random.uniform([-np.pi, -2.0], [np.pi, 2.0])
        self.data.mocap_pos[:, :2] = self.np_random.uniform(-0.15, 0.15, (2, 2))
        self.mujoco.mj_forward(self.model, self.data)
        self.t = 0
        return self.look()[0], {}

    def look(self) -> tuple[Any, Any]:
        """What the policy sees, and where the balls are from the tip."""
        data, balls = self.data, (self.data.mocap_pos - self.data.site_xpos[0])[:, :2]
        shown = [np.sin(data.qpos), np.cos(data.qpos), 0.1 * data.qvel, 10 * balls.ravel()]
        return np.concatenate(shown).astype(np.float32), balls

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        """Step as the adapter does: `frame_skip` physics steps, reward and success."""
        self.data.ctrl[:] = 0.1 * np.clip(action, -1, 1)
        self.mujoco.mj_step(self.model, self.data, FRAME_SKIP)
        self.mujoco.mj_forward(self.model, self.data)
        obs, balls = self.look()
        distance = float(np.linalg.norm(balls[0]))
        self.t += 1
        return obs, float(np.exp(-10 * distance)), False, self.t >= LIMIT, {"success": distance < 0.025}


def maniskill_alone(control: str) -> Any:
    """One copy of PushCube as ManiSkill wraps it for Gymnasium's vectorisations."""
    import mani_skill.envs  # noqa: F401  registers the tasks
    import torch
    from mani_skill.utils.wrappers.gymnasium import CPUGymWrapper

    from embodied_rl.envs.maniskill.device import drawing_device, handed_in

    torch.set_num_threads(1)
    settings = {
        "obs_mode": "state",
        "control_mode": control,
        "reward_mode": "normalized_dense",
        "sim_backend": "physx_cpu",
    }
    with handed_in(drawing_device(torch.device("cpu"), "the benchmark")):
        return CPUGymWrapper(gymnasium.make("PushCube-v1", **settings))


def by_gymnasium(make: list[Callable[[], Any]], processes: bool, context: str | None = None) -> Stepper:
    """Gymnasium's vectorisation: a process for each copy, or all in this one."""
    env: Any = AsyncVectorEnv(make, context=context) if processes else SyncVectorEnv(make)
    assert env.metadata["autoreset_mode"] is AutoresetMode.NEXT_STEP
    return _random_steps(env, next_step=True)


def by_sb3(id: str, copies: int, processes: bool) -> Stepper:
    """Stable-Baselines3's, which restart a copy in the step that ends its episode."""
    from stable_baselines3.common.vec_env import DummyVecEnv, SubprocVecEnv

    make = [partial(one_of, id)] * copies
    # Forked: 32 fresh interpreters would import torch for minutes on a small machine.
    return _random_steps(SubprocVecEnv(make, start_method="fork") if processes else DummyVecEnv(make), next_step=False)


def _random_steps(env: Any, next_step: bool) -> Stepper:
    """`next_step`: copies that ended are restarted by the next call."""
    env.reset()
    space = getattr(env, "single_action_space", env.action_space)
    actions = np.random.default_rng(0).uniform(-1, 1, (16, env.num_envs, *space.shape)).astype(space.dtype)
    clock = {"t": 0, "over": 0}

    def step() -> int:
        ends = env.step(actions[clock["t"] % len(actions)])[2:4]
        clock["t"] += 1
        restarted, clock["over"] = clock["over"], int(np.count_nonzero(ends[0] | ends[1])) if next_step else 0
        return env.num_envs - restarted

    return step


def bare_rollout(copies: int) -> Stepper:
    """MuJoCo's own vectorisation, `mujoco.rollout`: the physics of all copies, without observation, reward or restart."""
    import mujoco
    from mujoco.rollout import Rollout

    model = mujoco.MjModel.from_xml_path(str(ROOT / "examples/reacher/reacher.xml"))
    data = [mujoco.MjData(model) for _ in range(THREADS)]
    size = mujoco.mj_stateSize(model, mujoco.mjtState.mjSTATE_FULLPHYSICS)
    state = np.zeros((copies, size))
    mujoco.mj_getState(model, data[0], state[0], mujoco.mjtState.mjSTATE_FULLPHYSICS)
    state[:] = state[0]
    control = np.random.default_rng(0).uniform(-0.1, 0.1, (copies, FRAME_SKIP, model.nu))
    engine, now = Rollout(nthread=THREADS), {"state": state}

    def step() -> int:
        states, _ = engine.rollout([model] * copies, data, now["state"], control)
        now["state"] = states[:, -1]
        return copies

    return step


# ---- the cases ---------------------------------------------------------------------------------------------------

ISOLATED = """
import gymnasium

class Simulator:
    def __init__(self, settings):
        self.env = gymnasium.make("HalfCheetah-v5")
        shape = list(self.env.observation_space.shape)
        self.spec = {"observation": {"state": {"shape": shape, "dtype": "float64"}}, "action": {"kind": "continuous", "size": 6}}

    def reset(self, seed, task):
        return {"state": self.env.reset(seed=seed)[0]}

    def step(self, action):
        obs, reward, terminated, truncated, _ = self.env.step(action)
        return {"state": obs}, float(reward), terminated, truncated, {}
"""


def _gymnasium(make: Callable[[], Any], copies: int, context: str | None = None) -> Peers:
    """Gymnasium's two."""
    alone = [make] * copies
    return {
        "gymnasium_sync": partial(by_gymnasium, alone, False),
        "gymnasium_async": partial(by_gymnasium, alone, True, context),
    }


def _sb3(id: str, copies: int) -> Peers:
    """Stable-Baselines3's two."""
    return {"sb3_dummy": partial(by_sb3, id, copies, False), "sb3_subproc": partial(by_sb3, id, copies, True)}


def _simulator() -> str:
    """A file for the isolated env; it lies among the temporary files."""
    path = Path(tempfile.gettempdir()) / f"bench_envs_{os.getuid()}_half_cheetah.py"
    path.write_text(ISOLATED)
    return str(path)


def cases() -> dict[str, Case]:
    """Every adapter, by the name of what it simulates."""
    pool = {"type": "envpool", "threads": THREADS}
    shown = {"kwargs": GOAL_SHOWN, "max_steps": LIMIT}
    mixed = [{"name": id[10:-3], "copies": 16, "env": {**pool, "id": id, **shown}} for id in TASKS[:2]]
    arm = {"scene": "examples/reacher/reacher.xml", "task": "examples/reacher/task.py:Reach", "max_steps": LIMIT}
    cube = {"task": "PushCube-v1", "control": "pd_ee_delta_pose", "end_on_success": False}
    # Not forked: the parent has opened Vulkan by then, for the copy that it asks for its spaces.
    cubes = _gymnasium(partial(maniskill_alone, cube["control"]), 4, "spawn")
    return {
        "HalfCheetah-v4 (envpool)": Case(
            32, pool | {"id": "HalfCheetah-v4"},
            _envpool(("HalfCheetah-v4",), 32)
            | _gymnasium(partial(one_of, "HalfCheetah-v4"), 32) | _sb3("HalfCheetah-v4", 32),
        ),
        "HalfCheetah-v5 (gymnasium)": Case(
            32, {"type": "gymnasium", "id": "HalfCheetah-v5", "resumable": False},
            _gymnasium(partial(one_of, "HalfCheetah-v5"), 32) | _sb3("HalfCheetah-v5", 32),
        ),
        "MetaWorld, one task (envpool)": Case(
            32, pool | {"id": TASKS[0]} | shown,
            _envpool(TASKS[:1], 32) | _gymnasium(partial(one_of, TASKS[0]), 32),
        ),
        "MetaWorld, four tasks (envpool)": Case(
            32, pool | {"id": list(TASKS)} | shown, _envpool(TASKS, 32)
        ),
        "MetaWorld, two tasks (mixture)": Case(
            32, {"type": "mixture", "parts": mixed}, _envpool(TASKS[:2], 32)
        ),
        "HalfCheetah-v5 (isolated)": Case(
            8, {"type": "isolated", "simulator": _simulator(), "workers": THREADS, "resumable": False},
            _gymnasium(partial(one_of, "HalfCheetah-v5"), 8),
        ),
        "reacher (mjcf)": Case(
            64, {"type": "mjcf", "threads": THREADS} | arm,
            {"mujoco_rollout": partial(bare_rollout, 64)} | _gymnasium(Arm, 64),
        ),
        "PushCube-v1 (maniskill)": Case(
            4, {"type": "maniskill", "workers": THREADS} | cube, cubes,
            installed=importlib.util.find_spec("mani_skill") is not None,
        ),
    }  # fmt: skip
