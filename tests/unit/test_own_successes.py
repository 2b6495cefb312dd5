"""A critic that reads what only a simulator knows, its own step size, and the imitation of own successes."""

from dataclasses import replace

import pytest
import torch

from embodied_rl import registry
from embodied_rl.batch import micro_batches
from embodied_rl.config import build_recipe
from embodied_rl.errors import CapabilityError
from embodied_rl.loss import Loss, LossFunction
from embodied_rl.measure import Clock
from embodied_rl.policies._critic import Critic, ValueHead
from embodied_rl.saved import load_weights
from embodied_rl.selection import join
from embodied_rl.self_imitation import OwnSuccesses, SelfImitation, Successes
from embodied_rl.session import Session
from embodied_rl.types import ActionSpec, Batch, Evaluation, Rollout, TensorSpec
from tests.kit import CPU, TOYS, spec

OBSERVATION = {
    "front": TensorSpec((16, 16, 3), torch.uint8, low=0, high=255),
    "state": TensorSpec((3,)),
    "told": TensorSpec((5,), privileged=True),
}
SMALL = {"width": 16, "heads": 2, "layers": 1, "channels": 8, "glances": 2, "chunk": 2}
HEADS = {"tiny_vla_flow": {"denoising_steps": 2}, "tiny_vla_tokens": {"bins": 5}}


def policy(name, observation=None, reads="privileged", **config):
    module = registry.load("policy", name)
    torch.manual_seed(0)
    made = module.build(
        module.Config(**SMALL | HEADS[name] | {"critic": {"hidden": 8, "reads": reads}} | config),
        env=spec(observation or OBSERVATION, ActionSpec("continuous", 3)), device=CPU,
    )  # fmt: skip
    with torch.no_grad():
        for p in made.parameters():
            p += 0.1 * torch.randn_like(p)
    return made


def look(n=20, seed=0):
    g = torch.Generator().manual_seed(seed)
    picture = torch.randint(0, 256, (n, 16, 16, 3), generator=g).to(torch.uint8)
    return {"front": picture, "state": torch.randn(n, 3, generator=g), "told": torch.randn(n, 5, generator=g)}


def decide(p, obs):
    out = p.act(obs, generator=torch.Generator().manual_seed(1))
    return out.action.clone(), None if out.value is None else out.value.clone()


# ---- a privileged critic ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_what_only_the_simulator_knows_moves_the_value_and_never_the_action(name):
    p, obs = policy(name), look()
    action, value = decide(p, obs)
    other = obs | {"told": look(seed=1)["told"]}
    again, moved = decide(p, other)
    assert torch.equal(action, again) and not torch.allclose(value, moved)
    seen = obs | {"front": look(seed=1)["front"]}
    changed, same = decide(p, seen)
    assert not torch.equal(action, changed) and torch.equal(value, same), "and pictures never the value"
    torch.testing.assert_close(p.value(obs), value)
    assert torch.equal(p.value(seen), p.value(obs))
    assert p.privileged_critic and not policy(name, reads="prefix").privileged_critic


@pytest.mark.parametrize("name", HEADS)
def test_outside_of_simulation_it_acts_without_a_value(name):
    p, obs = policy(name), look()
    action, _ = decide(p, obs)
    del obs["told"]
    without, value = decide(p, obs)
    assert torch.equal(action, without) and value is None


@pytest.mark.parametrize("name", HEADS)
def test_its_loss_reaches_no_parameter_of_the_actor(name):
    p, obs = policy(name), look()
    out = p.act(obs, generator=torch.Generator().manual_seed(1))
    p.evaluate(obs, out.units.clone()).value.square().sum().backward()
    touched = {n for n, x in p.named_parameters() if x.grad is not None and bool(x.grad.abs().sum() > 0)}
    assert touched and all(n.startswith("critic") for n in touched)


@pytest.mark.parametrize("name", [*HEADS, "mlp"])
def test_the_actor_is_built_as_if_privileged_entries_were_not_there(name):
    plain = {k: v for k, v in OBSERVATION.items() if k != "told"}
    if name == "mlp":
        del plain["front"]
        module = registry.load("policy", "mlp")
        made = [
            module.build(module.Config(hidden=[4]), env=spec(o, ActionSpec("continuous", 3)), device=CPU)
            for o in (plain, plain | {"told": OBSERVATION["told"]})
        ]
    else:
        made = [policy(name, o, reads="prefix") for o in (plain, OBSERVATION)]
    shapes = [{n: x.shape for n, x in p.named_parameters()} for p in made]
    assert shapes[0] == shapes[1]


def test_without_anything_privileged_it_says_what_to_set():
    plain = {k: v for k, v in OBSERVATION.items() if k != "told"}
    with pytest.raises(CapabilityError, match=r"policy.critic.reads \(privileged\).*set env.privileged=true"):
        policy("tiny_vla_flow", plain)


def test_the_tabletop_tells_where_the_object_meant_is():
    module = registry.load("env", "tabletop")
    config = module.Config(observation="pictures", cameras=("table",), picture_size=8, reward="sparse", privileged=True)
    env = module.build(config, num_envs=2, device=CPU, split="train", seed=0)
    obs = env.reset(torch.ones(2, dtype=torch.bool), torch.tensor([2, 4]), torch.tensor([0, 2]))
    view, told = env.view(), obs["told"]
    assert env.spec.observation["told"].privileged and told.shape == (2, *env.spec.observation["told"].shape)
    torch.testing.assert_close(told[:, 17:20], 10 * (view.a_position - view.tcp).float())
    torch.testing.assert_close(told[:, 20:23], 5 * view.a_position.float())
    assert told[:, -3:].tolist() == [[1, 0, 0], [0, 0, 1]], "the task"
    env.close()


# ---- a critic that begins anew, with a step size of its own ------------------------------------------------------------


def session(algorithm="ppo", policy=None, **sections):
    return Session.build(build_recipe({
        "env": {"type": "target", "max_steps": 6, "tolerance": 0.9},
        "policy": (policy if "type" in (policy or {}) else {"type": "tiny_vla_flow", **SMALL, "denoising_steps": 2} | (policy or {})),
        "algorithm": {"type": algorithm} | sections,
        "collect": {"copies": 16, "decisions": 3} | ({"mode": "episodes", "group_size": 4} if algorithm == "grpo" else {}),
        "threads": 1, "device": "cpu",
    }))  # fmt: skip


def test_weights_without_a_critic_leave_a_new_one_as_it_is():
    imitated = session("grpo", {"critic": {"kind": "none"}}).policy
    fresh = session().policy
    before = {n: x.clone() for n, x in fresh.state_dict().items()}
    weights = {n: x + 1 for n, x in imitated.state_dict().items()}
    with pytest.raises(Exception, match="critic.hidden.weight is missing"):
        load_weights(fresh, weights, "there")
    load_weights(fresh, weights, "there", fresh_critic=True)
    for n, x in fresh.state_dict().items():
        assert torch.equal(x, before[n] if n.startswith("critic") else weights[n]), n
    del weights["trunk.summary"]
    with pytest.raises(Exception, match=r"trunk.summary is missing"):
        load_weights(fresh, weights, "there", fresh_critic=True)


def test_the_first_step_of_adam_is_as_long_as_each_part_s_own_step_size():
    s = session(update={"epochs": 1, "minibatches": 1, "lr": 1e-4, "critic_lr": 1e-2, "adam_eps": 1e-12})
    before = {n: x.clone() for n, x in s.policy.named_parameters()}
    s.iterate(Clock())
    moved = {n: (x - before[n]).abs().max().item() for n, x in s.policy.named_parameters()}
    critic = max(v for n, v in moved.items() if n.startswith("critic"))
    actor = max(v for n, v in moved.items() if not n.startswith("critic"))
    assert critic == pytest.approx(1e-2, rel=1e-3) and actor == pytest.approx(1e-4, rel=1e-2)


def test_the_critic_s_gradient_does_not_shorten_the_actor_s():
    """The critic's loss a million times larger: clipped together, nothing would be left for the actor."""
    lengths = []
    for coef in (1e-3, 1e3):
        s = session(update={"epochs": 1, "minibatches": 1, "critic_lr": 1e-3}, loss={"value": {"coef": coef}})
        s.iterate(Clock())
        flat = s.updater.parameters
        lengths.append(float(torch.linalg.vector_norm(flat.grad[: flat.border])))
    # The shared trunk gets some of the critic's gradient, so the lengths are not equal; both are at the limit of 0.5.
    assert lengths[1] == pytest.approx(0.5, rel=1e-3) and lengths[0] > 0.01


# ---- an eye that is taught what the simulator knows ------------------------------------------------------------------


@pytest.mark.parametrize("name", HEADS)
def test_insight_is_the_error_of_what_was_told_and_teaches_the_eye_alone(name):
    p, obs = policy(name, critic={"hidden": 8, "reads": "privileged", "insight": 0.5}), look()
    out = p.act(obs, generator=torch.Generator().manual_seed(1))
    evaluation = p.evaluate(obs, out.units.clone())
    evaluation.auxiliary.mean().backward()
    touched = {n for n, x in p.named_parameters() if x.grad is not None and bool(x.grad.abs().sum() > 0)}
    assert any(n.startswith("trunk.eyes") for n in touched)
    assert all(n.startswith(("trunk.eyes", "trunk.words", "critic.insight")) for n in touched)
    with torch.no_grad():
        head = p.critic.insight
        error = head.head(torch.nn.functional.gelu(head.hidden(p.trunk.prefix(obs).sight))) - obs["told"]
        huber = torch.where(error.abs() < 1, error.square() / 2, error.abs() - 0.5)
        torch.testing.assert_close(evaluation.auxiliary, 0.5 * huber.mean(1))
    plain = policy(name).evaluate(obs, out.units.clone())
    assert plain.auxiliary is None


@pytest.mark.parametrize("pieces", [None, 3])
def test_what_is_learned_besides_is_a_mean_over_the_rows_of_a_step_however_it_is_cut(pieces):
    """L = ... + mean of the auxiliary loss: by hand for 8 rows, whole and in micro-batches of at most 3."""
    n, extra = 8, torch.arange(8.0, requires_grad=True)
    rows = torch.full((n,), 1 / n)
    batch = Batch({}, torch.zeros(n, 1), torch.zeros(n, 1), None, torch.zeros(n), None, None, rows.unsqueeze(1), rows,
                  torch.zeros(n, dtype=torch.int64), None, None, None)  # fmt: skip
    total, start = torch.zeros(()), 0
    for piece in micro_batches(batch, pieces, False):
        stop = start + len(piece)
        total = total + LossFunction(Loss(), 1)(Evaluation(piece.logp, auxiliary=extra[start:stop]), piece).total
        start = stop
    total.backward()
    assert total.item() == pytest.approx(3.5) and extra.grad.tolist() == [1 / n] * n


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"critic": {"insight": 1.0}}, r"insight \(1\) predicts what only a simulator knows, and reads is prefix"),
        (
            {"likelihood": "latent", "critic": {"insight": 1.0, "reads": "privileged"}},
            r"critic.insight \(1\) does nothing with likelihood \(latent\), whose eye is frozen",
        ),
    ],
)
def test_insight_that_could_teach_nothing_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        registry.load("policy", "tiny_vla_flow").Config(**SMALL | settings)


def test_a_policy_without_an_eye_of_its_own_says_that_there_is_nothing_to_teach():
    head = ValueHead(reads="privileged", insight=1.0)
    with pytest.raises(CapabilityError, match=r"policy.critic.insight \(1\) .* this policy has none"):
        Critic(spec(OBSERVATION, ActionSpec("continuous", 3)), 16, head)


# ---- own successes -----------------------------------------------------------------------------------------------------


def rollout():
    """3 decisions of 2 copies: copy 0 solves episode 0 in its second decision, then begins episode 2, which goes on; copy
    1 fails episode 1 at a time limit in its last."""
    false = torch.zeros(3, 2, dtype=torch.bool)
    terminated, truncated = false.clone(), false.clone()
    terminated[1, 0], truncated[2, 1] = True, True
    final = torch.full((3, 2), -1)
    final[1, 0], final[2, 1], final[2, 0] = 0, 1, 2
    t = torch.arange(6.0).view(3, 2)
    return Rollout(
        obs={"state": t.unsqueeze(-1)}, constants={"goal": torch.tensor([[10.0], [11.0], [12.0]])},
        episode=torch.tensor([[0, 1], [0, 1], [2, 1]]), units=t.unsqueeze(-1), logp=t.unsqueeze(-1),
        mask=~false.unsqueeze(-1), valid=~false, reward=t, steps=torch.tensor([[2, 2], [1, 2], [2, 2]]),
        terminated=terminated, truncated=truncated, value=None, next_value=None, group=torch.zeros(3, 2, dtype=torch.int64),
        task=torch.zeros(3, 2, dtype=torch.int64), policy_version=torch.zeros(3, 2, dtype=torch.int64), chunk=2,
        finished={}, metrics={}, solved=torch.tensor([[0, 0], [1, 0], [0, 0]]), action=t.view(3, 2, 1, 1).expand(3, 2, 2, 1),
        final=final, final_obs={"state": torch.tensor([[100.0], [101.0], [102.0]])},
    )  # fmt: skip


def test_only_decisions_of_solved_episodes_count_with_where_they_ended():
    own = Successes.of(rollout())
    assert own.obs["state"].tolist() == [[0.0], [2.0]] and own.obs["goal"].tolist() == [[10.0], [10.0]]
    assert own.action[..., 0].tolist() == [[0.0, 0.0], [2.0, 2.0]]
    assert own.mask.tolist() == [[True, True], [True, False]], "the second chunk ended after one control step"
    assert own.last["state"].tolist() == [[100.0], [100.0]]
    assert own.last["goal"].tolist() == [[10.0], [10.0]], "what stays for the whole episode is so at its end"


def test_decisions_after_the_goal_has_held_are_left_out():
    r = rollout()
    going_on = replace(r, solved=torch.tensor([[1, 0], [2, 0], [0, 0]]))
    assert Successes.of(going_on).obs["state"].tolist() == [[0.0]]
    assert len(Successes.of(replace(r, solved=torch.zeros(3, 2, dtype=torch.int64)))) == 0


@pytest.mark.parametrize(("decisions", "end"), [(2, 5.0), (3, 101.0)])
def test_a_failure_that_did_what_other_words_ask_for_is_a_success_under_those_words(decisions, end):
    """Hand-worked: copy 1 fails, and its first two (or all three) decisions led to goal 77."""
    relabelled = torch.zeros(3, 2, dtype=torch.bool)
    relabelled[:decisions, 1] = True
    own = Successes.of(replace(rollout(), relabelled=relabelled, relabels={"goal": torch.tensor([[0.0], [77.0], [0.0]])}))
    n = 2 + decisions
    assert own.obs["state"].flatten().tolist() == [0.0, 2.0, 1.0, 3.0, 5.0][:n]
    assert own.obs["goal"].flatten().tolist() == [10.0, 10.0, 77.0, 77.0, 77.0][:n]
    assert own.last["state"].flatten().tolist() == [100.0, 100.0, end, end, end][:n]
    assert own.last["goal"].flatten().tolist() == [10.0, 10.0, 77.0, 77.0, 77.0][:n]
    assert own.action[2:, 0, 0].tolist() == [1.0, 3.0, 5.0][:decisions]


def test_an_env_that_does_not_know_what_was_done_unasked_is_refused():
    with pytest.raises(CapabilityError, match=r"self_imitation.hindsight .* this env does not tell"):
        session("ppo", self_imitation={"coef": 1.0, "hindsight": True})


def shifted(by):
    """The rollout above with `by` added to all that is seen."""
    r = rollout()
    return replace(
        r, obs={"state": r.obs["state"] + by}, constants={"goal": r.constants["goal"] + by},
        final_obs={"state": r.final_obs["state"] + by},
    )  # fmt: skip


def test_successes_of_earlier_rollouts_are_kept_and_the_oldest_leave():
    """Hand-worked: each rollout brings two decisions; of three rollouts five are kept, and a restart knows them."""
    config = SelfImitation(coef=1.0, keep=5)
    own = OwnSuccesses(config, CPU, seed=0)
    for by in (0.0, 20.0, 40.0):
        own.begin(shifted(by), lambda flat: flat.rows["logp"], 0)
    again = OwnSuccesses(config, CPU, seed=9)
    again.load_state_dict(own.state_dict())
    for kept in (own.successes, again.successes):
        assert kept.obs["state"].flatten().tolist() == [2.0, 20.0, 22.0, 40.0, 42.0]
        assert kept.obs["goal"].flatten().tolist() == [10.0, 30.0, 30.0, 50.0, 50.0]
        assert kept.last["state"].flatten().tolist() == [100.0, 120.0, 120.0, 140.0, 140.0]
        assert kept.action[..., 0].tolist() == [[2.0, 2.0], [0.0, 0.0], [2.0, 2.0], [0.0, 0.0], [2.0, 2.0]]
        assert kept.mask.tolist() == [[True, False], [True, True], [True, False], [True, True], [True, False]]
    # A rollout without any success loses nothing; without `keep` only the latest counts.
    own.begin(replace(rollout(), solved=torch.zeros(3, 2, dtype=torch.int64)), lambda flat: flat.rows["logp"], 0)
    assert len(own.successes) == 5
    latest = OwnSuccesses(SelfImitation(coef=1.0), CPU, seed=0)
    for by in (0.0, 20.0):
        latest.begin(shifted(by), lambda flat: flat.rows["logp"], 0)
    assert latest.successes.obs["state"].flatten().tolist() == [20.0, 22.0]


def test_side_by_side_every_success_keeps_the_end_of_its_own_episode():
    longer = replace(rollout(), final_obs={"state": torch.tensor([[200.0], [201.0], [202.0]])})
    shorter = replace(
        rollout(), **{k: getattr(rollout(), k)[:2] for k in (
            "episode", "units", "logp", "mask", "valid", "reward", "steps", "terminated", "truncated", "group", "task",
            "policy_version", "solved", "action", "final",
        )}, obs={"state": rollout().obs["state"][:2]}, constants={"goal": torch.tensor([[10.0], [11.0]])},
        final_obs={"state": torch.tensor([[100.0], [101.0]])},
    )  # fmt: skip
    shorter.final[1, 1] = 1
    own = Successes.of(join([shorter, longer]))
    ends = sorted(zip(own.obs["state"][:, 0].tolist(), own.last["state"][:, 0].tolist(), strict=True))
    assert ends == [(0.0, 100.0), (0.0, 200.0), (2.0, 100.0), (2.0, 200.0)]


@pytest.mark.parametrize("head", [{}, {"type": "tiny_vla_tokens"}])
def test_an_update_brings_the_policy_nearer_to_what_succeeded(head):
    """Without any policy gradient (learning nothing from advantages), the imitation loss of the successes falls."""
    kind = {"type": "tiny_vla_tokens", **SMALL, "bins": 16} if head else {}
    falls = []
    for coef in (0.0, 1.0):
        s = session(
            "ppo", kind, self_imitation={"coef": coef, "rows": 64},
            update={"epochs": 4, "minibatches": 4, "lr": 3e-3, "critic_warmup": 99},
        )  # fmt: skip
        s.collector.keep_final_obs = s.collector.keep_actions = True
        taken = s.collector.collect()
        own = Successes.of(taken)
        assert len(own) > 4, "the goals are large enough to be hit by chance"

        def loss(s=s, own=own):
            with torch.no_grad():
                draw, noise = (torch.Generator().manual_seed(7) for _ in range(2))
                return float(own.loss(s.policy, 512, draw, noise))

        before = loss()
        metrics = s.updater.update(taken, s.credit(taken), progress=0.0).reduce()
        assert ("actor/self_imitation_loss" in metrics) == (coef > 0)
        falls.append(before - loss())
    assert falls[1] > 0.05 and falls[1] > 3 * abs(falls[0])


@pytest.mark.parametrize("coef", [0.0, 1.0])
def test_what_only_imitation_reads_is_trained_where_there_is_imitation(coef):
    s = session(self_imitation={"coef": coef})
    before = s.policy.trunk.foresight.head.weight.clone()
    for _ in range(2):
        s.iterate(Clock())
    assert torch.equal(before, s.policy.trunk.foresight.head.weight) == (coef == 0)


def build(env, **algorithm):
    """A run of the mlp policy in one of the tests' toys."""
    return Session.build(build_recipe({
        "env": {"type": str(TOYS / env)}, "policy": {"type": "mlp"}, "algorithm": {"type": "ppo"} | algorithm,
        "collect": {"copies": 4, "decisions": 3}, "device": "cpu",
    }))  # fmt: skip


def test_what_cannot_imitate_is_refused():
    with pytest.raises(CapabilityError, match=r"self_imitation.coef \(1\).*the policy has no imitation_loss"):
        build("point.py", self_imitation={"coef": 1})
    with pytest.raises(CapabilityError, match=r"update.critic_lr \(0.01\) moves a critic, and none is trained here"):
        session("grpo", {"critic": {"kind": "none"}}, update={"critic_lr": 0.01})


@pytest.mark.parametrize("kind", HEADS)
def test_foresight_alone_teaches_the_eye_and_leaves_the_actions(kind):
    """Successes that were really seen: what is foreseen of their ends comes nearer, and no part beyond the eye moves."""
    p, obs = policy(kind), look()
    p.imitates()
    own = Successes(obs, torch.zeros(20, 2, 3), torch.ones(20, 2, dtype=torch.bool), {"state": look(seed=3)["state"]})
    g = torch.Generator().manual_seed(0)
    loss = own.foresight(p, 64, g, g)
    loss.backward()
    touched = {n for n, x in p.named_parameters() if x.grad is not None and bool(x.grad.abs().sum() > 0)}
    assert touched and all(n.startswith(("trunk.eyes", "trunk.foresight", "trunk.words")) for n in touched)
    # It is the foresight part of the imitation loss on the same rows, hand-worked: 2 Huber(error in deviations).
    eye = p.trunk.foresight
    with torch.no_grad():
        error = eye.head(torch.nn.functional.gelu(eye.hidden(p.trunk.prefix(obs).sight))) - own.last["state"]
        huber = torch.where(error.abs() < 1, error.square() / 2, error.abs() - 0.5)
        torch.testing.assert_close(p.foresight_loss(obs, own.last), 2 * huber.mean(1))


def test_who_foresees_nothing_cannot_learn_to():
    with pytest.raises(CapabilityError, match=r"learns \(foresight\) .* set learns: everything"):
        session(policy={"foresight": 0}, self_imitation={"coef": 1.0, "learns": "foresight"})
