"""NaN and infinity: the step is skipped and counted, nothing that is kept is poisoned, and a streak ends the run."""

import json
import math
import re
from dataclasses import replace

import pytest
import torch

from embodied_rl import checkpoint
from embodied_rl.cli import main
from embodied_rl.errors import DivergenceError
from embodied_rl.evaluate import evaluate
from embodied_rl.execute import execute
from embodied_rl.observation import check_finite
from embodied_rl.session import Session
from tests.resume import lab

SCALED = {"credit": {"reward_scale": "running_return_std"}, "update": {"epochs": 2, "minibatches": 2}}
STEPS = 10
"""Control steps of one rollout."""


def poisoned(**config):
    return {"env": {"type": str(lab.TOYS / "poison.py"), "inner": {"type": "point.py", "max_steps": 5}, **config}}


def finite(state):
    """Whether every number that is learned or kept as statistics is finite."""
    kept = [state["policy"], state["updater"]["moments"], state["credit"], state["updater"].get("reference", {})]
    numbers = [x for part in kept for x in part.values() if x is not None]
    return all(bool(torch.isfinite(torch.as_tensor(x)).all()) for x in numbers)


def weights(state):
    """The trained part of a policy: all but its running statistics."""
    return {k: v for k, v in state["policy"].items() if "norms." not in k}


HUGE = {"update": {"epochs": 2, "minibatches": 1}}
"""Of a reward that is finite, and whose square is not."""


def test_one_bad_rollout_is_skipped_counted_and_leaves_no_trace(tmp_path):
    wanted = lab.recipe(updates=6, algorithm=HUGE, **poisoned(what="reward", value="1e30", first=22, last=22))
    first, before = lab.go(wanted, tmp_path / "run", until=2)
    bad, after = lab.go(wanted, tmp_path / "run", until=3, resume=True)
    rest, end = lab.go(wanted, tmp_path / "run", resume=True)
    assert ["actor/skipped_updates" in row for row in first + bad + rest] == [False, False, True, False, False, False]
    assert bad[0]["actor/skipped_updates"] == 2, "in both epochs"
    assert "actor/policy_loss" not in bad[0], "what was skipped is absent, not 0"
    assert lab.differing(weights(before), weights(after)) == []
    assert lab.differing(before["updater"]["moments"], after["updater"]["moments"]) == []
    assert (after["updater"]["bad_in_a_row"], end["updater"]["bad_in_a_row"]) == (1, 0)
    assert finite(after) and finite(end)
    assert weights(end).keys() and lab.differing(weights(after), weights(end)) != []
    assert all(math.isfinite(v) for row in rest for k, v in row.items() if k.startswith(("actor/", "critic/")))


# The point lives 5 steps: control step 24 is the last of an episode, and of the third rollout's first half.
BAD = {
    "NaN reward": ({"what": "reward", "first": 22, "last": 22}, "the reward"),
    "infinite reward": ({"what": "reward", "value": "inf", "first": 22, "last": 22}, "the reward"),
    "NaN in an observation": ({"what": "obs", "first": 22, "last": 22}, "observation 'position'"),
    "NaN in the last one": ({"what": "obs", "first": 24, "last": 24}, "observation 'position'"),
}


@pytest.mark.parametrize("parts", [1, 2])
@pytest.mark.parametrize("case", BAD)
def test_an_episode_that_meets_what_is_not_finite_does_not_count_and_begins_anew(case, parts, tmp_path, caplog):
    """Copy 0 of a part loses one episode, which is told; everything else is learned from, and no update is skipped."""
    settings, what = BAD[case]
    wanted = lab.recipe(updates=6, algorithm=SCALED, collect={"pipeline": parts}, **poisoned(**settings))
    rows, state = lab.go(wanted, tmp_path / "run")
    lost = [row.get("rollout/invalid_episodes", 0) for row in rows]
    assert lost[:3] == [0, 0, parts] and not any(lost[3:])
    assert not any("actor/skipped_updates" in row for row in rows) and finite(state)
    assert all(row["progress/non_finite_metrics"] == 0 and row["rollout/length_mean"] == 5 for row in rows)
    told = f"env Poison: {what} is not finite in copies %s: their episodes do not count"
    assert sorted(m for m in caplog.messages if "finite" in m) == [told % [copy] for copy in (0, 4)[:parts]]


@pytest.mark.parametrize("mode", ["stream", "episodes"])
def test_what_is_learned_beside_a_spoilt_episode_is_what_the_others_say(mode):
    """The batch of the loss holds no decision of it, and those of other copies as if nothing had happened."""
    rollouts = {}
    for name, what in {"sound": {"first": 99}, "spoilt": {"what": "obs", "first": 2, "last": 2}}.items():
        session = Session.build(lab.recipe(collect={"mode": mode}, **poisoned(**what)))
        rollouts[name] = session.collector.collect()
        session.close()
    sound, spoilt = rollouts["sound"], rollouts["spoilt"]
    assert not spoilt.valid[:3, 0].any() and spoilt.truncated[2, 0] and not spoilt.terminated[:, 0].any()
    assert spoilt.reward[2, 0] == 0 and torch.isfinite(spoilt.obs["position"]).all()
    assert bool(spoilt.valid[3:, 0].any()) == (mode == "stream"), "a stream begins the next episode at once"
    for name in ("reward", "logp", "value", "next_value", "valid", "truncated"):
        assert torch.equal(getattr(sound, name)[:3, 1:], getattr(spoilt, name)[:3, 1:]), name
    assert len(spoilt.finished["return"]) == len(sound.finished["return"]) - 1


def test_what_an_env_itself_calls_invalid_is_not_told_again(caplog):
    session = Session.build(lab.recipe())
    env = session.collector.parts[0].env
    everyone = torch.ones(8, dtype=torch.bool)
    env.reset(everyone, torch.arange(8), torch.zeros(8, dtype=torch.int64))
    real, gone = env.step, torch.arange(8) == 3

    def lost(*given):
        step = real(*given)
        step.obs["position"][gone] = math.nan
        return replace(step, reward=torch.where(gone, math.nan, step.reward), truncated=step.truncated | gone, invalid=gone)

    env.step = lost
    executed = execute(env, torch.zeros(8, 1, 2), None)
    assert executed.invalid.tolist() == gone.tolist() and executed.reward[3] == 0 and caplog.messages == []
    session.close()


def test_the_reward_scale_and_the_normaliser_are_those_of_the_sound_numbers(tmp_path):
    """A NaN, as a reward model may give, counts neither in the statistics nor in their number."""
    session = Session.build(lab.recipe(updates=1, algorithm=SCALED))
    rollout = session.collector.collect()
    rollout.reward[2, 0] = math.nan
    session.credit(rollout)
    r, done = rollout.reward.nan_to_num(0.0), rollout.done
    running, seen = torch.zeros(8), []
    for t in range(len(r)):
        running = 0.99 * running + r[t]
        seen.append(running)
        running = torch.where(done[t], 0.0, running)
    assert session.credit.state_dict()["count"] == 80
    assert (session.credit.state_dict()["m2"] / 80) ** 0.5 == pytest.approx(float(torch.stack(seen).double().std(unbiased=False)), rel=1e-5)
    session.close()


def test_a_nan_loss_is_skipped_whatever_it_comes_from(monkeypatch, caplog):
    session = Session.build(lab.recipe(updates=1))
    rollout = session.collector.collect()
    before = [p.detach().clone() for p in session.policy.parameters()]
    evaluate, calls = session.policy.evaluate, []

    def sometimes(obs, units, *, entropy=True):
        out = evaluate(obs, units, entropy=entropy)
        calls.append(None)
        out.logp = out.logp * (math.nan if len(calls) != 3 else 1.0)
        return out

    monkeypatch.setattr(session.policy, "evaluate", sometimes)
    metrics = session.updater.update(rollout, session.credit(rollout), progress=0.0).reduce()
    assert len(calls) == 4 and metrics["actor/skipped_updates"] == 3
    assert session.updater.bad_in_a_row == 0, "one of the four steps was finite"
    assert caplog.messages[0].startswith("update 1 skips optimizer steps that are not finite: loss nan; non-finite inputs: none;")
    assert any(not torch.equal(a, b) for a, b in zip(before, session.policy.parameters(), strict=True))
    assert all(bool(torch.isfinite(p).all()) for p in session.policy.parameters())
    session.close()


def test_the_first_update_of_a_streak_says_why(caplog):
    session = Session.build(lab.recipe(updates=1))

    def update(bad):
        rollout = session.collector.collect()
        rollout.reward[0, bad] = math.nan
        session.updater.update(rollout, session.credit(rollout), progress=0.0)

    for bad in ([], [2, 5], [1], [], [3]):
        update(bad)
    session.close()
    told = "skips optimizer steps that are not finite: loss nan; non-finite inputs: advantage"
    assert [m[: len(told) + 9] for m in caplog.messages] == [f"update 2 {told}", f"update 5 {told}"]


def test_a_streak_of_bad_updates_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    wanted = lab.recipe(
        updates=30, algorithm=HUGE, checkpoint={"keep": 1}, train={"max_bad_updates": 3},
        **poisoned(what="reward", value="1e30", first=4 * STEPS + 3),
    )
    recipe, path = lab.write(wanted, tmp_path), tmp_path / "run"
    assert main(["train", str(recipe)]) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "Traceback" not in err
    assert "error: not one optimizer step of the last 3 updates was finite (loss " in err
    assert err.endswith("lower algorithm.update.lr, or look at the env if an input is named\n")
    rows = lab.rows_of(path)
    assert [row.get("actor/skipped_updates", 0) for row in rows] == [0, 0, 0, 0, 2, 2], "the seventh raised"
    newest = checkpoint.latest(path / "checkpoints")
    assert newest.name == "update_000004", "no checkpoint was written while updates were skipped"
    assert finite(checkpoint.load(newest))
    summary = json.loads((path / "summary.json").read_text())
    assert (summary["finished"], summary["stop_reason"], summary["updates"]) == (False, "diverged", 6)
    assert main(["report", str(path)]) == 0
    # The count is part of the run: it does not begin anew when the run does.
    assert main(["train", str(recipe), "--resume"]) == 2
    assert lab.rows_of(path) == rows


def test_a_streak_that_a_signal_interrupts_goes_on_being_counted(tmp_path):
    bad = poisoned(what="reward", value="1e30", first=2 * STEPS + 3)
    wanted = lab.recipe(updates=30, algorithm=HUGE, train={"max_bad_updates": 3}, **bad)
    rows, state = lab.go(wanted, tmp_path / "run", until=4)
    assert state["updater"]["bad_in_a_row"] == 2
    with pytest.raises(DivergenceError, match="the last 3 updates"):
        lab.go(wanted, tmp_path / "run", resume=True)


@pytest.mark.parametrize("mode", ["stream", "episodes"])
@pytest.mark.parametrize("what", ["reward", "obs"])
def test_an_env_of_nothing_but_spoilt_episodes_ends_the_run(what, mode, tmp_path, capsys):
    wanted = lab.recipe(
        updates=30, collect={"copies": 1, "mode": mode}, checkpoint={"every": 1000}, train={"max_bad_updates": 3},
        **poisoned(what=what, first=4 * STEPS),
    )
    assert main(["train", str(lab.write(wanted, tmp_path))]) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "Traceback" not in err
    assert err.endswith(
        "error: the env's judge or simulator failed in every episode of the last 3 updates, so there was nothing to learn "
        "from; mend it (the warnings above say what failed)\n"
    )


@pytest.mark.parametrize(("inner", "entry"), [("point.py", "position"), ("two_state.py", "state")])
def test_a_start_that_is_not_finite_is_named_with_its_env_and_copies(inner, entry, tmp_path, capsys):
    """Also to a policy of discrete actions, which can always choose one; what was learned before is saved."""
    bad = {"inner": {"type": inner, "max_steps": 4}, "what": "start", "first": 12}
    wanted = lab.recipe(**poisoned(**bad), collect={"pipeline": 2}, checkpoint={"every": 1000})
    assert main(["train", str(lab.write(wanted, tmp_path))]) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "Traceback" not in err
    assert re.search(rf"error: env Poison: observation '{entry}' is not finite in copies \[[04]\], where they start: mend the env\n$", err)
    assert [p.name for p in (tmp_path / "run" / "checkpoints").iterdir()] == ["update_000001"]


@pytest.mark.parametrize("what", ["reward", "obs"])
def test_spoilt_episodes_of_an_evaluation_are_left_out_and_counted(what):
    """Copy 0 of four plays two of the eight episodes, the first of them soundly."""
    session = Session.build(lab.recipe(**poisoned(inner={"type": "point.py", "max_steps": 12}, what=what, first=15, last=15)))
    result = evaluate(session.policy, session.collector.parts[0].env, episodes=16, run_seed=0)
    assert result.invalid.nonzero().flatten().tolist() == [8], "the second episode of copy 0 of eight"
    suite = result.to_dict()
    assert (suite["overall"]["episodes"], suite["overall"]["invalid"]) == (15, 1)
    assert torch.isfinite(result.returns).all()
    session.close()


def test_an_evaluation_of_nothing_but_spoilt_episodes_says_so():
    session = Session.build(lab.recipe(collect={"copies": 1}, **poisoned(what="reward")))
    with pytest.raises(DivergenceError, match="failed in all 3 evaluation episodes, so nothing was measured"):
        evaluate(session.policy, session.collector.parts[0].env, episodes=3, run_seed=0)
    session.close()


def test_numbers_whose_sum_alone_is_not_finite_are_shown_to_the_policy():
    obs = {"far": torch.full((2, 3), 3e38), "picture": torch.zeros(2, 1, dtype=torch.uint8)}
    everyone = torch.ones(2, dtype=torch.bool)
    check_finite(obs, everyone, None)
    obs["far"][1, 2] = math.inf
    check_finite(obs, torch.tensor([True, False]), None)
    with pytest.raises(DivergenceError, match=r"'far' is not finite in copies \[5\], where they start"):
        check_finite(obs, everyone, None, first=4)


LOUD = '''
"""A point whose copies show NaN once their episode is over."""
import torch
from embodied_rl import registry
point = registry.load("env", r"{point}")
class Config(point.Config):
    """Settings."""
    end_on_success: bool = True
class Loud(point.Point):
    over = None
    def reset(self, mask, seeds, tasks):
        self.over = mask & False if self.over is None else self.over & ~mask
        return super().reset(mask, seeds, tasks)
    def step(self, action, active=None):
        step = super().step(action, active)
        step.obs["position"][self.over] = torch.nan
        step.reward[self.over] = torch.nan
        self.over = self.over | step.terminated | step.truncated
        return step
def build(config, *, num_envs, device, split, seed):
    return Loud(config, num_envs, device)
'''


@pytest.mark.parametrize("parts", [1, 2])
def test_waiting_copies_may_show_nan(parts, tmp_path):
    """Between its end and the next reset a copy may show anything; the episodes of other copies go on."""
    (tmp_path / "loud.py").write_text(LOUD.format(point=lab.TOYS / "point.py"))
    env = {"type": str(tmp_path / "loud.py"), "max_steps": 10}
    wanted = lab.recipe(updates=3, env=env, collect={"mode": "episodes", "pipeline": parts, "copies": 16}, policy={"init_std": 2.0})
    rows, state = lab.go(wanted, tmp_path / "run")
    assert any(row["rollout/length_mean"] < 10 for row in rows), "some copies wait"
    assert not any("actor/skipped_updates" in row for row in rows)
    assert all(row["progress/non_finite_metrics"] == 0 for row in rows)
    assert finite(state)
