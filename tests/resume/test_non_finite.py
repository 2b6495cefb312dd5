"""NaN and infinity: the step is skipped and counted, nothing that is kept is poisoned, and a streak ends the run."""

import json
import math

import pytest
import torch

from embodied_rl import checkpoint
from embodied_rl.cli import main
from embodied_rl.errors import DivergenceError
from embodied_rl.evaluate import evaluate
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


# The point lives 5 steps: control step 24 is the last of an episode and of the third rollout's first half.
BAD = {
    "NaN reward": (SCALED, poisoned(what="reward", first=22, last=22)),
    "infinite reward": (SCALED, poisoned(what="reward", value="inf", first=22, last=22)),
    "huge reward": ({"update": {"epochs": 2, "minibatches": 1}}, poisoned(what="reward", value="1e30", first=22, last=22)),
    "NaN in a last observation": (SCALED, poisoned(what="obs", first=24, last=24)),
}


@pytest.mark.parametrize("case", BAD)
def test_one_bad_rollout_is_skipped_counted_and_leaves_no_trace(case, tmp_path):
    method, env = BAD[case]
    wanted = lab.recipe(updates=6, algorithm=method, **env)
    first, before = lab.go(wanted, tmp_path / "run", until=2)
    bad, after = lab.go(wanted, tmp_path / "run", until=3, resume=True)
    rest, end = lab.go(wanted, tmp_path / "run", resume=True)
    assert ["actor/skipped_updates" in row for row in first + bad + rest] == [False, False, True, False, False, False]
    assert bad[0]["actor/skipped_updates"] == 2 * method["update"]["minibatches"], "in both epochs"
    assert "actor/policy_loss" not in bad[0], "what was skipped is absent, not 0"
    assert lab.differing(weights(before), weights(after)) == []
    assert lab.differing(before["updater"]["moments"], after["updater"]["moments"]) == []
    assert (after["updater"]["bad_in_a_row"], end["updater"]["bad_in_a_row"]) == (1, 0)
    assert finite(after) and finite(end)
    assert weights(end).keys() and lab.differing(weights(after), weights(end)) != []
    assert all(math.isfinite(v) for row in rest for k, v in row.items() if k.startswith(("actor/", "critic/")))


def test_the_reward_scale_and_the_normaliser_are_those_of_the_sound_numbers(tmp_path):
    """A NaN counts neither in the statistics nor in their number."""
    wanted = lab.recipe(updates=1, algorithm=SCALED, **poisoned(what="reward", first=2, last=2))
    session = Session.build(wanted)
    rollout = session.collector.collect()
    session.credit(rollout)
    assert not torch.isfinite(rollout.reward).all()
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


def test_the_first_update_of_a_streak_tells_the_copies_that_paid_what_is_not_finite(caplog):
    session = Session.build(lab.recipe(updates=1))

    def update(bad):
        rollout = session.collector.collect()
        rollout.reward[0, bad] = math.nan
        session.updater.update(rollout, session.credit(rollout), progress=0.0)

    for bad in ([], [2, 5], [1], [], [3]):
        update(bad)
    session.close()
    told = "skips optimizer steps that are not finite: the env pays rewards that are not finite in copies"
    assert caplog.messages == [f"update 2 {told} [2, 5]", f"update 5 {told} [3]"]


def test_a_streak_of_bad_updates_ends_the_run_and_keeps_the_last_good_checkpoint(tmp_path, capsys):
    wanted = lab.recipe(
        updates=30, checkpoint={"keep": 1}, train={"max_bad_updates": 3}, **poisoned(what="reward", first=4 * STEPS + 3)
    )
    recipe, path = lab.write(wanted, tmp_path), tmp_path / "run"
    assert main(["train", str(recipe)]) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "Traceback" not in err
    assert err.endswith(
        "error: the env pays rewards that are not finite, in the last update in copies [0], so not one optimizer step of "
        "the last 3 updates was finite: mend the env; the weights were left as they were\n"
    )
    rows = lab.rows_of(path)
    assert [row.get("actor/skipped_updates", 0) for row in rows] == [0, 0, 0, 0, 4, 4], "the seventh raised"
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
    wanted = lab.recipe(updates=30, train={"max_bad_updates": 3}, **poisoned(what="reward", first=2 * STEPS + 3))
    rows, state = lab.go(wanted, tmp_path / "run", until=4)
    assert state["updater"]["bad_in_a_row"] == 2
    with pytest.raises(DivergenceError, match="the last 3 updates"):
        lab.go(wanted, tmp_path / "run", resume=True)


@pytest.mark.parametrize(("inner", "entry"), [("point.py", "position"), ("two_state.py", "state")])
def test_an_observation_that_is_not_finite_is_named_with_its_env_and_copies(inner, entry, tmp_path, capsys):
    """Also to a policy of discrete actions, which can always choose one."""
    bad = {"inner": {"type": inner, "max_steps": 4}, "what": "obs", "first": 12}
    recipe = lab.write(lab.recipe(**poisoned(**bad), collect={"pipeline": 2}), tmp_path)
    assert main(["train", str(recipe)]) == 2
    err = capsys.readouterr().err
    assert err.count("error:") == 1 and "Traceback" not in err
    assert err.endswith(
        f"error: env Poison: observation '{entry}' is not finite in copies [0]: mend the env, or let it end the episode "
        "there (terminated)\n"
    )


@pytest.mark.parametrize("first", [0, 7])
def test_an_evaluation_that_is_shown_what_is_not_finite_says_so(first):
    session = Session.build(lab.recipe(**poisoned(inner={"type": "point.py", "max_steps": 12}, what="obs", first=first)))
    with pytest.raises(DivergenceError, match=r"^env Poison: observation 'position' is not finite in copies \[0\]: "):
        evaluate(session.policy, session.collector.parts[0].env, episodes=8, run_seed=0)
    session.close()


def test_numbers_whose_sum_alone_is_not_finite_are_shown_to_the_policy():
    obs = {"far": torch.full((2, 3), 3e38), "picture": torch.zeros(2, 1, dtype=torch.uint8)}
    everyone = torch.ones(2, dtype=torch.bool)
    check_finite(obs, everyone, None)
    obs["far"][1, 2] = math.inf
    check_finite(obs, torch.tensor([True, False]), None)
    with pytest.raises(DivergenceError, match=r"'far' is not finite in copies \[5\]"):
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
