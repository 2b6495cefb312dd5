"""The same inputs through Stable-Baselines3, where it is installed: advantages, returns and the gradient of PPO."""

import warnings

import numpy as np
import pytest
import torch

from embodied_rl import advantage
from embodied_rl.loss import Loss, LossFunction, ValueLoss
from embodied_rl.types import Evaluation
from tests.kit import batch_of

with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    sb3 = pytest.importorskip("stable_baselines3")
    import gymnasium
    from gymnasium import spaces
    from stable_baselines3.common.buffers import RolloutBuffer

T, B = 24, 3
BOX = spaces.Box(-1, 1, (2,), np.float32)


def recorded(seed=0):
    """Random rewards, values and ends of episodes (terminations only: there SB3 and the definition agree)."""
    rng = np.random.default_rng(seed)
    reward, value = rng.normal(size=(T, B)), rng.normal(size=(T, B))
    return reward, value, rng.normal(size=B), rng.random((T, B)) < 0.15


@pytest.mark.parametrize(("gamma", "lam"), [(0.99, 0.95), (0.9, 0.0), (1.0, 1.0), (0.97, 0.5)])
def test_advantages_and_targets_equal_those_of_stable_baselines3(gamma, lam):
    reward, value, last_value, done = recorded()
    buffer = RolloutBuffer(T, BOX, BOX, device="cpu", gae_lambda=lam, gamma=gamma, n_envs=B)
    buffer.rewards, buffer.values = reward.astype(np.float32), value.astype(np.float32)
    buffer.episode_starts = np.concatenate([np.zeros((1, B)), done[:-1]]).astype(np.float32)
    buffer.compute_returns_and_advantage(torch.tensor(last_value, dtype=torch.float32), done[-1])

    value_t = torch.tensor(value, dtype=torch.float32)
    next_value = torch.cat([value_t[1:], torch.tensor(last_value, dtype=torch.float32).unsqueeze(0)])
    ours = advantage.gae(
        torch.tensor(reward, dtype=torch.float32), value_t, next_value, torch.tensor(done), torch.zeros(T, B, dtype=torch.bool),
        discount=gamma, lam=lam,
    )  # fmt: skip
    torch.testing.assert_close(ours, torch.from_numpy(buffer.advantages), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours + value_t, torch.from_numpy(buffer.returns), rtol=1e-4, atol=1e-5)


class Nothing(gymnasium.Env):
    """An env only to build a policy around."""

    observation_space, action_space = BOX, spaces.Box(-1, 1, (3,), np.float32)

    def reset(self, *, seed=None, options=None):
        return np.zeros(2, np.float32), {}

    def step(self, action):
        return np.zeros(2, np.float32), 0.0, False, False, {}


def test_the_gradient_of_a_ppo_step_equals_that_of_stable_baselines3():
    entropy_coef, value_coef, clip = 0.01, 0.7, 0.2
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = sb3.PPO(
            "MlpPolicy", Nothing(), n_steps=T, batch_size=T, n_epochs=1, ent_coef=entropy_coef, vf_coef=value_coef, clip_range=clip,
            normalize_advantage=False, max_grad_norm=1e9, device="cpu", seed=0, policy_kwargs={"net_arch": [16]},
        )  # fmt: skip
        model._setup_learn(1)
    g = torch.Generator().manual_seed(1)
    obs, action = torch.randn(T, 2, generator=g), torch.randn(T, 3, generator=g)
    with torch.no_grad():
        old = model.policy.evaluate_actions(obs, action)[1] + 0.3 * torch.randn(T, generator=g)
    adv, returns = torch.randn(T, generator=g), torch.randn(T, generator=g)
    buffer = model.rollout_buffer
    buffer.observations[:, 0], buffer.actions[:, 0] = obs.numpy(), action.numpy()
    buffer.log_probs[:, 0], buffer.advantages[:, 0], buffer.returns[:, 0] = old.numpy(), adv.numpy(), returns.numpy()
    buffer.full = True
    seen = []
    model.policy.optimizer.step = lambda: seen.append([p.grad.clone() for p in model.policy.parameters()])
    model.train()

    model.policy.zero_grad()
    value, logp, entropy = model.policy.evaluate_actions(obs, action)
    function = LossFunction(Loss(clip_low=clip, clip_high=clip, entropy_coef=entropy_coef, value=ValueLoss(coef=value_coef)), chunk=1)
    batch = batch_of(old.unsqueeze(-1), function, advantage=adv, target=returns)
    function(Evaluation(logp.unsqueeze(-1), entropy.unsqueeze(-1), value.flatten()), batch).total.backward()
    assert len(seen) == 1
    for theirs, p in zip(seen[0], model.policy.parameters(), strict=True):
        torch.testing.assert_close(p.grad, theirs, rtol=1e-4, atol=1e-6)
