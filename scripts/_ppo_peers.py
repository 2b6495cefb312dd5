"""PPO of other libraries on one envpool env, with equal hyper-parameters; used by bench_ppo.py.

Every peer runs its own training entry point on an env of ours that notes the time at each rollout's first step and
raises `Stop` when enough has been measured, so that all are timed alike: iteration = rollout + update + bookkeeping.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from time import perf_counter, process_time
from typing import Any

import numpy as np

ENV = "HalfCheetah-v4"


class Stop(Exception):
    """Enough was measured."""


class Stopwatch:
    """Seconds of each iteration: the time between the first env steps of consecutive rollouts."""

    def __init__(self, steps: int, warm_up: int, seconds: float, least: int = 3) -> None:
        """Measure after `warm_up` iterations of `steps` env steps for `seconds`, but at least `least` iterations."""
        self.steps, self.warm_up, self.seconds, self.least = steps, warm_up, seconds, least
        self.count = 0
        self.marks: list[float] = []
        self.cpu: list[float] = []

    def tick(self) -> None:
        """Call before each env step."""
        if self.count % self.steps == 0:
            self.mark()
        self.count += 1

    def mark(self) -> None:
        """Call where a rollout begins; raises `Stop` when done."""
        self.marks.append(perf_counter())
        self.cpu.append(process_time())
        done = len(self.marks) - self.warm_up - 1
        if done >= self.least and self.marks[-1] - self.marks[self.warm_up] >= self.seconds:
            raise Stop

    def result(self, copies: int) -> dict[str, Any]:
        """Median env steps per second over the measured iterations, and how long the first one took.

        `cpu_ms` is the processor time of an iteration over all threads: less disturbed by other programs.
        """
        spans = np.diff(self.marks[self.warm_up :])
        return {
            "steps_per_s": float(copies * self.steps / np.median(spans)),
            "cpu_ms": float(np.median(np.diff(self.cpu[self.warm_up :])) * 1e3),
            "iterations": len(spans),
            "first_iteration_s": self.marks[1] - self.marks[0],
        }


class Pool:
    """envpool with finished copies restarted at once, as all three peers expect; `final` holds their last states."""

    def __init__(self, copies: int, clock: Stopwatch, sim_threads: int) -> None:
        """Start `copies` of the env, stepped by `sim_threads` threads."""
        import envpool

        self.env = envpool.make(ENV, env_type="gymnasium", num_envs=copies, num_threads=sim_threads, seed=0)
        self.copies, self.clock = copies, clock
        self.observation_space, self.action_space = _float32(self.env.observation_space), _float32(self.env.action_space)

    def reset(self) -> np.ndarray:
        """Return the first observations [B, D] float32."""
        return self.env.reset()[0].astype(np.float32)

    def step(self, action: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray | None]:
        """Observation after restarts, reward, terminated, truncated, and the last states of the copies that ended."""
        self.clock.tick()
        obs, reward, terminated, truncated, _ = self.env.step(action.astype(np.float64))
        obs = obs.astype(np.float32)
        done = terminated | truncated
        final = None
        if done.any():
            final = obs[done].copy()
            obs[done] = self.env.reset(np.flatnonzero(done).astype(np.int32))[0]
        return obs, reward.astype(np.float32), terminated, truncated, final


def _float32(space: Any) -> Any:
    import gymnasium

    return gymnasium.spaces.Box(space.low.astype(np.float32), space.high.astype(np.float32), dtype=np.float32)


def stable_baselines3(s: dict[str, Any], clock: Stopwatch, pool: Pool | None) -> None:
    """PPO("MlpPolicy") with VecNormalize over observations; `pool` None takes DummyVecEnv over Gymnasium.

    Differs from ours: advantages are whitened per minibatch; time limits change the reward.
    """
    from stable_baselines3 import PPO
    from stable_baselines3.common.vec_env import DummyVecEnv, VecEnvWrapper, VecNormalize
    from stable_baselines3.common.vec_env.base_vec_env import VecEnv

    class PoolVecEnv(VecEnv):
        def __init__(self, pool: Pool) -> None:
            self.pool = pool
            super().__init__(pool.copies, pool.observation_space, pool.action_space)

        def reset(self) -> Any:
            return self.pool.reset()

        def step_async(self, actions: Any) -> None:
            self.actions = actions

        def step_wait(self) -> Any:
            obs, reward, terminated, truncated, final = self.pool.step(self.actions)
            infos: list[dict[str, Any]] = [{} for _ in range(self.num_envs)]
            done = terminated | truncated
            for row, i in enumerate(np.flatnonzero(done)):
                infos[i] = {"terminal_observation": final[row], "TimeLimit.truncated": bool(truncated[i] and not terminated[i])}
            return obs, reward, done, infos

        def close(self) -> None: ...
        def get_attr(self, name: str, indices: Any = None) -> Any:
            return [None] * self.num_envs

        def set_attr(self, *args: Any, **kwargs: Any) -> None: ...
        def env_method(self, *args: Any, **kwargs: Any) -> Any: ...
        def env_is_wrapped(self, *args: Any, **kwargs: Any) -> Any:
            return [False] * self.num_envs

    class Timed(VecEnvWrapper):
        def reset(self) -> Any:
            return self.venv.reset()

        def step_async(self, actions: Any) -> None:
            clock.tick()
            self.venv.step_async(actions)

        def step_wait(self) -> Any:
            return self.venv.step_wait()

    if pool is None:
        import gymnasium

        inner: Any = Timed(DummyVecEnv([lambda: gymnasium.make(ENV) for _ in range(s["copies"])]))
    else:
        inner = PoolVecEnv(pool)
    model = PPO(
        "MlpPolicy", VecNormalize(inner, norm_obs=True, norm_reward=False), n_steps=s["decisions"], device="cpu",
        batch_size=s["copies"] * s["decisions"] // s["minibatches"], n_epochs=s["epochs"], learning_rate=s["lr"],
        gamma=s["gamma"], gae_lambda=s["lam"], clip_range=s["clip"], ent_coef=0.0, vf_coef=0.5, max_grad_norm=s["max_grad_norm"],
        policy_kwargs={"net_arch": {"pi": [64, 64], "vf": [64, 64]}}, seed=0,
    )  # fmt: skip
    model.learn(10**9)


def skrl(s: dict[str, Any], clock: Stopwatch, pool: Pool | None) -> None:
    """PPO agent with RunningStandardScaler and the sequential trainer.

    Differs from ours: the scaler moves during the first epoch of an update, minibatch by minibatch; advantages are
    whitened over the rollout.
    """
    import torch
    from skrl.agents.torch.ppo import PPO, PPO_CFG
    from skrl.envs.wrappers.torch import Wrapper
    from skrl.memories.torch import RandomMemory
    from skrl.resources.preprocessors.torch import RunningStandardScaler
    from skrl.trainers.torch import SequentialTrainer
    from skrl.utils.model_instantiators.torch import deterministic_model, gaussian_model

    assert pool is not None

    class PoolWrapper(Wrapper):
        observation_space, action_space, num_envs = pool.observation_space, pool.action_space, pool.copies

        def reset(self) -> Any:
            return torch.from_numpy(pool.reset()), {}

        def step(self, actions: Any) -> Any:
            obs, reward, terminated, truncated, _ = pool.step(actions.numpy())
            columns = [torch.from_numpy(x).view(-1, 1) for x in (reward, terminated, truncated)]
            return torch.from_numpy(obs), *columns, {}

        def state(self) -> Any:
            return None

        def render(self, *args: Any, **kwargs: Any) -> Any: ...
        def close(self) -> None: ...

    env = PoolWrapper(pool)
    spaces = {"observation_space": pool.observation_space, "action_space": pool.action_space, "device": "cpu"}
    network = [{"name": "net", "input": "OBSERVATIONS", "layers": [64, 64], "activations": "tanh"}]
    models = {
        "policy": gaussian_model(**spaces, network=network, output="ACTIONS"),
        "value": deterministic_model(**spaces, network=network, output="ONE"),
    }
    cfg = PPO_CFG(
        rollouts=s["decisions"], learning_epochs=s["epochs"], mini_batches=s["minibatches"], discount_factor=s["gamma"],
        gae_lambda=s["lam"], learning_rate=s["lr"], grad_norm_clip=s["max_grad_norm"], ratio_clip=s["clip"], value_clip=0.0,
        value_loss_scale=0.5, time_limit_bootstrap=True, observation_preprocessor=RunningStandardScaler,
        observation_preprocessor_kwargs={"size": pool.observation_space, "device": "cpu"},
    )  # fmt: skip
    cfg.experiment.write_interval = 0
    cfg.experiment.checkpoint_interval = 0
    memory = RandomMemory(memory_size=s["decisions"], num_envs=pool.copies, device="cpu")
    agent = PPO(models=models, memory=memory, cfg=cfg, **spaces)
    SequentialTrainer(env=env, agents=agent, cfg={"timesteps": 10**9, "headless": True, "disable_progressbar": True}).train()


def rsl_rl(s: dict[str, Any], clock: Stopwatch, pool: Pool | None) -> None:
    """OnPolicyRunner with empirical normalisation inside actor and critic.

    Differs from ours: entropy and a KL are computed in every minibatch; advantages are whitened over the rollout.
    """
    import torch
    from rsl_rl.env import VecEnv
    from rsl_rl.runners import OnPolicyRunner
    from tensordict import TensorDict

    assert pool is not None

    class PoolVecEnv(VecEnv):
        def __init__(self) -> None:
            self.num_envs, self.num_actions, self.max_episode_length = pool.copies, pool.action_space.shape[-1], 1000
            self.episode_length_buf = torch.zeros(pool.copies, dtype=torch.long)
            self.device, self.cfg = "cpu", {}
            self.obs = self.pack(pool.reset())

        def pack(self, obs: np.ndarray) -> TensorDict:
            return TensorDict({"policy": torch.from_numpy(obs)}, batch_size=[pool.copies])

        def get_observations(self) -> TensorDict:
            return self.obs

        def step(self, actions: Any) -> Any:
            obs, reward, terminated, truncated, _ = pool.step(actions.numpy())
            self.obs = self.pack(obs)
            done = torch.from_numpy(terminated | truncated)
            return self.obs, torch.from_numpy(reward), done, {"time_outs": torch.from_numpy(truncated & ~terminated)}

    model = {"class_name": "MLPModel", "hidden_dims": [64, 64], "activation": "tanh", "obs_normalization": True}
    gaussian = {"class_name": "GaussianDistribution", "init_std": 1.0, "std_type": "log"}
    cfg = {
        "num_steps_per_env": s["decisions"], "save_interval": 10**9, "obs_groups": {"actor": ["policy"], "critic": ["policy"]},
        "actor": {**model, "distribution_cfg": gaussian}, "critic": dict(model),
        "algorithm": {
            "class_name": "PPO", "num_learning_epochs": s["epochs"], "num_mini_batches": s["minibatches"], "clip_param": s["clip"],
            "gamma": s["gamma"], "lam": s["lam"], "value_loss_coef": 0.5, "entropy_coef": 0.0, "learning_rate": s["lr"],
            "max_grad_norm": s["max_grad_norm"], "use_clipped_value_loss": False, "schedule": "fixed",
        },
    }  # fmt: skip
    OnPolicyRunner(PoolVecEnv(), cfg, log_dir=None, device="cpu").learn(10**9)


PEERS: dict[str, tuple[Callable[..., None], bool]] = {
    "stable_baselines3": (stable_baselines3, True),
    "stable_baselines3_dummy": (stable_baselines3, False),
    "skrl": (skrl, True),
    "rsl_rl": (rsl_rl, True),
}
"""Name -> (its training, whether it steps envpool)."""


def run_peer(name: str, s: dict[str, Any], clock: Stopwatch, sim_threads: int) -> dict[str, Any]:
    """Train with one peer until the stopwatch stops it.

    Args:
        name: Key of PEERS.
        s: Hyper-parameters, see `bench_ppo.SETTINGS`.
        clock: Counts env steps.
        sim_threads: Threads of envpool.

    Returns:
        result: `Stopwatch.result`.
    """
    train, pooled = PEERS[name]
    pool = Pool(s["copies"], clock, sim_threads) if pooled else None
    try:
        train(s, clock, pool)
    except Stop:
        pass
    return clock.result(s["copies"])


if os.environ.get("PYTHONWARNINGS") == "ignore":
    # Gymnasium prints through its own logger that v4 of the env is old; the peers' tables stay readable without it.
    import gymnasium

    gymnasium.logger.min_level = gymnasium.logger.ERROR
