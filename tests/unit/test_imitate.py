"""Supervised fine-tuning: it learns, it can be resumed and gone on from, and what does not fit is refused."""

import json
import math
import shutil
import statistics

import pytest
import torch

from embodied_rl import checkpoint
from embodied_rl.cli import main
from embodied_rl.config import build_recipe
from embodied_rl.demonstrations import Demonstrations
from embodied_rl.errors import CapabilityError, CheckpointError, DivergenceError, UserError
from embodied_rl.imitate import ImitationSession
from embodied_rl.measure import Clock
from embodied_rl.record_demos import collect_demonstrations
from embodied_rl.saved import load_weights, stored_policy
from embodied_rl.session import Session
from embodied_rl.train import build_session, run
from tests.resume import lab

SMALL = {"width": 16, "heads": 2, "layers": 1, "channels": 8, "glances": 2, "chunk": 2}
POLICIES = {
    "tokens": {"type": "tiny_vla_tokens", "bins": 16},
    "autoregressive": {"type": "tiny_vla_tokens", "bins": 16, "decoding": "autoregressive"},
    "flow": {"type": "tiny_vla_flow"},
    "diffusion": {"type": "tiny_vla_flow", "process": "diffusion"},
    "latent": {"type": "tiny_vla_flow", "likelihood": "latent"},
}


@pytest.fixture(autouse=True)
def threads():
    """The recipes compute with one thread; other tests need not."""
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


def recipe(name="flow", **changes):
    """Five updates of three optimizer steps."""
    env, demonstrations = lab.seen()
    algorithm = {"type": "sft", "demonstrations": demonstrations, "steps": 15, "steps_per_update": 3, "batch_size": 8, "warmup": 2}
    base = {
        "name": "sft", "threads": 1, "env": {"type": env}, "policy": SMALL | POLICIES[name], "algorithm": algorithm,
        "evaluate": {"episodes": 0}, "checkpoint": {"every": 1}, "log": {"tensorboard": False, "progress": False},
    }  # fmt: skip
    return build_recipe(lab.lay(base, changes))


def iterate(session, updates):
    return [session.iterate(Clock()).reduce() for _ in range(updates)]


def weights(session):
    return {k: v.clone() for k, v in session.policy.state_dict().items()}


def error_of(wanted):
    with pytest.raises(UserError) as error:
        build_session(wanted)
    return type(error.value), str(error.value)


# ---- learning --------------------------------------------------------------------------------------------------------


# Demonstrations whose actions are the undisturbed ones take more frames and steps than noisy ones did (200 and 250 gave the flow 0.3 - 0.5).
@pytest.mark.learning
@pytest.mark.parametrize(("policy", "batch_size", "threshold"), [("tokens", 64, 0.5), ("flow", 96, 0.5)])
def test_a_policy_that_imitates_reaches_the_goal_that_a_word_names(policy, batch_size, threshold, tmp_path):
    env, demonstrations = lab.seen(400)

    def train(seed, **algorithm):
        settings = {"demonstrations": demonstrations, "batch_size": batch_size, "lr": 5e-3, "steps": 600, "steps_per_update": 60, "warmup": 10}
        wanted = recipe(
            # The goals are in a vector here: pictures and words cannot tell where a demonstration ends.
            policy, seed=seed, policy={"width": 32, "foresight_reads": "summary"}, algorithm=settings | algorithm,
            evaluate={"episodes": 60, "copies": 60, "videos": 0},
        )  # fmt: skip
        done = run(wanted, folder=tmp_path / f"{seed} {algorithm}")
        return done, lab.rows_of(done.folder)

    untrained, _ = train(0, steps=1, warmup=0, lr=1e-8)
    scores = []
    for seed in range(3):
        done, rows = train(seed)
        losses = [row["actor/imitation_loss"] for row in rows]
        assert len(losses) == 10 and losses[-1] < 0.7 * losses[0] and losses[-1] == pytest.approx(min(losses), rel=0.1)
        assert done.reason == "finished" and rows[-1]["progress/env_steps"] == 600 * batch_size
        scores.append(done.result.score)
    assert untrained.result.score < 0.25
    assert statistics.median(scores) >= threshold, scores


def test_from_the_command_line(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    env, _ = lab.seen()
    wanted = recipe("tokens", algorithm={"demonstrations": "demos"}, evaluate={"episodes": 4, "copies": 2, "every": 2, "episodes_during": 2})
    path = lab.write(wanted, tmp_path / "runs")
    assert main(["collect", str(path), "--episodes", "6", "--out", "demos"]) == 0
    assert main(["train", str(path), "seed=1"]) == 0
    capsys.readouterr()
    summary = json.loads((tmp_path / "runs/sft/summary.json").read_text())
    kept = {k: summary[k] for k in ("finished", "stop_reason", "updates", "env_steps", "optimizer_steps")}
    assert kept == {"finished": True, "stop_reason": "finished", "updates": 5, "env_steps": 120, "optimizer_steps": 15}
    assert "episodes" not in summary and "decisions" not in summary, "what does not happen is absent"
    assert summary["evaluation"]["heldout"]
    rows = lab.rows_of(tmp_path / "runs/sft")
    assert [row["progress/optimizer_steps"] for row in rows] == [3, 6, 9, 12, 15]
    assert ["eval/heldout/success_rate" in row for row in rows] == [False, True, False, True, False]
    assert (tmp_path / "runs/sft/report.html").is_file()
    assert main(["evaluate", "runs/sft", "--episodes", "2"]) == 0
    assert main(["train", "runs/sft", "--resume"]) == 0
    assert lab.rows_of(tmp_path / "runs/sft") == rows


@pytest.mark.parametrize("policy", POLICIES)
def test_whatever_imitates_moves_all_that_its_loss_reads(policy):
    """Also what the policy would freeze for reinforcement learning."""
    session = build_session(recipe(policy, algorithm={"weight_decay": 0.0}))
    before = weights(session)
    rows = iterate(session, 5)
    assert all(math.isfinite(row["actor/imitation_loss"]) and row["actor/grad_norm"] > 0 for row in rows)
    moved = {k for k, v in weights(session).items() if not torch.equal(v, before[k])}
    aside = ("critic.", "actor", "scale.", "trunk.foresight.mean", "trunk.foresight.std")
    assert {k for k in before if k not in moved} == {k for k in before if k.startswith(aside)}


def test_the_step_size_rises_and_falls():
    """lr 1, 2 steps of warm-up of 4, cosine: 1/2, (1 + cos(pi / 4)) / 2, 1/2, ..."""
    half = {n: 0.5 * (1 + math.cos(math.pi * n / 4)) for n in range(5)}
    wanted = {"cosine": [0.5, half[1], half[2], half[3]], "constant": [0.5, 1.0, 1.0, 1.0]}
    for schedule, expected in wanted.items():
        settings = {"steps": 4, "steps_per_update": 1, "warmup": 2, "lr": 1.0, "lr_schedule": schedule}
        session = build_session(recipe("tokens", algorithm=settings))
        assert [row["actor/lr"] for row in iterate(session, 4)] == pytest.approx(expected)
        assert (session.progress, session.update, session.frames) == (1.0, 4, 32) and session.total_steps == 32


def test_the_last_update_is_as_long_as_what_is_left():
    session = build_session(recipe(algorithm={"steps": 7}))
    iterate(session, 3)
    assert (session.steps, session.update, session.progress) == (7, 3, 1.0)


def test_frames_beyond_the_end_of_a_demonstration_count_for_nothing():
    """Tokens of a chunk that are decided in parallel do not see each other, so what is shown there may be anything."""
    out = []
    for junk in (0.0, 0.7):
        session = build_session(recipe("tokens", algorithm={"batch_size": 64}))
        real, masked = session.batches, []

        def spoiled(real=real, junk=junk, masked=masked):
            for obs, action, mask, last in real:
                masked.append(int((~mask).sum()))
                yield obs, torch.where(mask.unsqueeze(-1), action, junk), mask, last

        session.batches = spoiled()
        rows = iterate(session, 1)
        assert min(masked) > 0
        out.append((rows[0]["actor/imitation_loss"], weights(session)))
    assert out[0][0] == out[1][0] and lab.differing(out[0][1], out[1][1]) == []


def test_the_loss_is_the_mean_over_frames_that_count():
    session = build_session(recipe("tokens", algorithm={"steps_per_update": 1, "batch_size": 64}))
    c = session.config
    order = torch.Generator().manual_seed(session.recipe.seed)
    # What the session is going to draw.
    obs, action, mask, last = next(Demonstrations(c.demonstrations).batches(order, c.batch_size, session.policy.chunk))
    assert not bool(mask.all())
    with torch.no_grad():
        each = session.policy.imitation_loss(obs, action, last, torch.Generator())
    assert iterate(session, 1)[0]["actor/imitation_loss"] == pytest.approx(float(each[mask].mean()), rel=1e-5)


@pytest.mark.parametrize("how", ["quantiles", "std", "none"])
def test_the_range_of_actions(how):
    session = build_session(recipe(algorithm={"action_range": how}))
    stats = Demonstrations(session.config.demonstrations).statistics()["action"]
    low, high = {
        "quantiles": (stats["q01"], stats["q99"]), "std": (stats["mean"] - 3 * stats["std"], stats["mean"] + 3 * stats["std"]),
        "none": (-torch.ones(2), torch.ones(2)),
    }[how]  # fmt: skip
    scale = session.policy.scale
    torch.testing.assert_close(scale.normalise(low), -torch.ones(2))
    torch.testing.assert_close(scale.normalise(high), torch.ones(2))


# ---- going on --------------------------------------------------------------------------------------------------------


def plain(rows):
    return [{k: v for k, v in row.items() if not k.startswith(("time/", "perf/"))} for row in rows]


@pytest.mark.parametrize("policy", ["autoregressive", "diffusion"])
def test_restored_after_some_updates_it_goes_on_bit_for_bit(policy, tmp_path):
    wanted = recipe(policy)
    whole = build_session(wanted)
    rows = plain(iterate(whole, 5))
    for k in (0, 2, 4):
        first = build_session(wanted)
        assert plain(iterate(first, k)) == rows[:k]
        checkpoint.save(tmp_path / str(k), first.state_dict(), update=k, keep=1, best_score=None)
        second = build_session(wanted, fresh=False)
        iterate(second, 1)  # everything it did before is replaced
        assert second.load_state_dict(checkpoint.load(checkpoint.latest(tmp_path / str(k))), "file")
        assert second.update == k
        assert plain(iterate(second, 5 - k)) == rows[k:]
        assert lab.differing(whole.state_dict(), second.state_dict()) == []


def test_resumed_with_other_demonstrations_it_stops(tmp_path):
    folder = tmp_path / "demos"
    shutil.copytree(lab.seen()[1], folder)
    wanted = recipe(algorithm={"demonstrations": str(folder)}, log={"folder": str(tmp_path)})
    lab.go(wanted, tmp_path / "sft", until=2)
    frames = Demonstrations(folder).frames
    collect_demonstrations(wanted.env, folder, 41)
    with pytest.raises(CapabilityError) as error:
        lab.go(wanted, tmp_path / "sft", resume=True)
    assert f"frames in the set, the saved run had {frames}; go on with the same set and cache_bytes, or begin a new run" in str(error.value)


@pytest.fixture(scope="module")
def tokens_run(tmp_path_factory):
    """A finished run of imitating tokens; read only."""
    folder = tmp_path_factory.mktemp("tokens") / "sft"
    lab.go(recipe("tokens"), folder)
    return folder


def test_start_from_begins_with_the_weights_of_another_run(tokens_run):
    """With a state of its own in all else; and the range of actions is that of the run it comes from."""
    stored = stored_policy(str(tokens_run))[0]
    session = build_session(recipe("tokens", seed=1, start_from=str(tokens_run), algorithm={"action_range": "none"}))
    assert lab.differing(weights(session), dict(stored)) == []
    assert (session.steps, session.frames) == (0, 0)
    assert not session.optimizer.moments["exp_avg"].any()
    iterate(session, 1)
    assert lab.differing(weights(session), dict(stored)) != []
    newest = checkpoint.latest(tokens_run / "checkpoints")
    again = build_session(recipe("tokens", start_from=str(newest)))
    assert lab.differing(weights(again), dict(stored)) == []


def test_reinforcement_starts_from_a_run_that_imitated(tokens_run):
    wanted = recipe(
        "tokens", start_from=str(tokens_run), algorithm={"type": "ppo"}, collect={"copies": 2, "decisions": 2}
    )
    session = build_session(wanted)
    assert isinstance(session, Session) and lab.differing(weights(session), dict(stored_policy(str(tokens_run))[0])) == []
    before = weights(session)
    session.iterate(Clock())
    assert lab.differing(weights(session), before) != []
    session.close()


def test_smoothing_acts_where_something_is_imitated_and_nowhere_else():
    """So recipes that reinforce need not repeat that of the recipe they start from."""
    ppo, collect = {"type": "ppo"}, {"collect": {"copies": 4, "decisions": 4}}
    own = {"self_imitation": {"coef": 1.0, "rows": 8}}
    for algorithm, more, acts in (({}, {}, True), (ppo, collect, False), (ppo | own, collect, True)):
        found = []
        for smoothing in (0.0, 2.0):
            session = build_session(recipe("tokens", policy={"smoothing": smoothing}, algorithm=algorithm, **more))
            found.append((plain(iterate(session, 3)), weights(session)))
            session.close()
        (rows, before), (others, after) = found
        assert (rows != others) == acts and bool(lab.differing(before, after)) == acts


def test_a_flow_that_imitated_is_frozen_when_noise_is_steered(tmp_path):
    lab.go(recipe("latent", algorithm={"lr": 1e-2}), tmp_path / "sft")
    wanted = recipe("latent", start_from=str(tmp_path / "sft"), algorithm={"type": "ppo"}, collect={"copies": 2, "decisions": 2})
    session = build_session(wanted)
    assert lab.differing(weights(session), dict(stored_policy(str(tmp_path / "sft"))[0])) == []
    before = weights(session)
    session.iterate(Clock())
    moved = {place.split("/")[1].split(".")[0] for place in lab.differing(weights(session), before)}
    assert moved == {"actor", "actor_log_std", "critic"}
    session.close()


def test_a_resumed_run_does_not_need_what_it_started_from(tokens_run, tmp_path):
    shutil.copytree(tokens_run, tmp_path / "old")
    wanted = recipe("tokens", start_from=str(tmp_path / "old"), log={"folder": str(tmp_path / "runs")})
    path = lab.write(wanted, tmp_path / "runs")
    lab.go(wanted, tmp_path / "runs/sft", until=2)
    shutil.rmtree(tmp_path / "old")
    assert main(["train", str(path), "--resume"]) == 0
    assert lab.rows_of(tmp_path / "runs/sft")[-1]["progress/update"] == 5


def test_a_run_that_was_killed_before_its_first_checkpoint_begins_where_it_was_told_to(tokens_run, tmp_path):
    wanted = recipe("tokens", start_from=str(tokens_run), log={"folder": str(tmp_path / "runs")})
    path, run = lab.write(wanted, tmp_path / "runs"), tmp_path / "runs/sft"
    assert main(["train", str(path)]) == 0
    rows = lab.rows_of(run)
    for name in ("metrics.jsonl", "summary.json", "evaluation_start.json"):
        (run / name).unlink(missing_ok=True)
    shutil.rmtree(run / "checkpoints")
    assert main(["train", str(path), "--resume"]) == 0
    for name in ("actor/imitation_loss", "actor/grad_norm"):
        assert [row[name] for row in lab.rows_of(run)] == [row[name] for row in rows]


def test_a_checkpoint_without_a_policy_is_no_start(tokens_run, tmp_path):
    path = checkpoint.save(tmp_path / "checkpoints", {"weights": torch.zeros(1)}, update=1, keep=1)
    kind, text = error_of(recipe("tokens", start_from=str(path)))
    assert kind is CheckpointError and text == f"checkpoint {path} holds no policy; use one that `embodied-rl train` wrote"


def test_start_from_refuses_another_policy(tokens_run):
    kind, text = error_of(recipe("tokens", start_from=str(tokens_run), policy={"bins": 8}))
    assert kind is CheckpointError
    assert text == (
        f"checkpoint {tokens_run} holds another policy: head.weight is [32, 16], the policy has [16, 16]; head.bias is "
        "[32], the policy has [16]. Use the recipe it was trained with (recipe.yaml in its run folder)"
    )
    kind, text = error_of(recipe("flow", start_from=str(tokens_run)))
    assert kind is CheckpointError and text.startswith(f"checkpoint {tokens_run} holds another policy: place is missing; ")
    kind, text = error_of(recipe("tokens", start_from=str(tokens_run / "nowhere")))
    assert issubclass(kind, UserError) and "nowhere" in text
    # In one direction only: a part too many is as wrong as one that is missing.
    session = build_session(recipe("tokens"))
    with pytest.raises(CheckpointError, match="extra is not part of this policy"):
        load_weights(session.policy, weights(session) | {"extra": torch.zeros(1)}, "x")


# ---- what does not fit -----------------------------------------------------------------------------------------------


def test_demonstrations_that_the_env_would_not_recognise_are_refused():
    _, demos = lab.seen()
    assert error_of(recipe(env={"tilt": True})) == (
        CapabilityError,
        f"{demos}: observation 'tilt' is absent (it has position, goals, word, camera), the env shows [1] torch.float32; "
        "collect a set in this env, or set the env as it was then",
    )
    assert error_of(recipe(env={"type": str(lab.TOYS / "point.py")})) == (
        CapabilityError,
        f"{demos}: observation 'goals' is [4] torch.float32, the env shows [2, 3] torch.float32; collect a set in this env, "
        "or set the env as it was then",
    )
    assert error_of(recipe(env={"type": "gymnasium", "id": "Pendulum-v1"})) == (
        CapabilityError,
        f"{demos}: its actions have 2 numbers, the env takes 1 (continuous); collect a set in this env, or name the env it was collected in",
    )
    assert error_of(recipe(env={"type": str(lab.TOYS / "two_state.py")})) == (
        CapabilityError,
        f"{demos}: its actions have 2 numbers, the env takes 2 (discrete); collect a set in this env, or name the env it was collected in",
    )


def test_no_demonstrations(tmp_path, capsys):
    kind, text = error_of(recipe(algorithm={"demonstrations": str(tmp_path / "none")}))
    assert text == f"{tmp_path / 'none'}: there is no such folder; make a set with: embodied-rl collect"
    path = lab.write(recipe(algorithm={"demonstrations": str(tmp_path / "none")}), tmp_path / "runs")
    assert main(["train", str(path)]) == 2
    assert capsys.readouterr().err == f"error: {text}\n"
    assert not (tmp_path / "runs/sft").exists(), "nothing is left behind by a recipe that cannot begin"


def test_a_policy_that_cannot_imitate_is_refused():
    assert error_of(recipe(env={"pictures": False}, policy={"type": "mlp", "hidden": [8]})) == (
        CapabilityError,
        "policy mlp has no imitation_loss, so demonstrations teach it nothing: choose tiny_vla_tokens, "
        "tiny_vla_flow, hf_vla or pi0",
    )


def test_a_warm_up_that_never_ends_is_refused():
    with pytest.raises(UserError, match=r"warmup \(15\) must be below steps \(15\)"):
        recipe(algorithm={"warmup": 15})


# ---- numbers that are not finite -------------------------------------------------------------------------------------


def poisoned(session, bad):
    """The session's batches with a NaN in the observations of the optimizer steps named."""
    real = session.batches

    def batches():
        for step, (obs, action, *rest) in enumerate(real):
            if step in bad:
                obs = obs | {"position": obs["position"] + math.nan}
            yield obs, action, *rest

    session.batches = batches()
    return session


def test_a_step_that_is_not_finite_is_skipped_and_counted():
    session = poisoned(build_session(recipe("flow")), {4, 6, 7, 8})
    rows = iterate(session, 2)
    kept, moments = weights(session), {k: v.clone() for k, v in session.optimizer.moments.items()}
    rows += iterate(session, 1)
    assert lab.differing(kept, weights(session)) == [] and lab.differing(moments, session.optimizer.moments) == []
    assert session.bad_in_a_row == 1
    rows += iterate(session, 1)
    assert session.bad_in_a_row == 0 and session.steps == 12
    assert [row.get("actor/skipped_updates", 0) for row in rows] == [0, 1, 3, 0]
    assert ["actor/imitation_loss" in row for row in rows] == [True, True, False, True], "what was skipped is absent, not 0"
    assert all(math.isfinite(v) for row in rows for v in row.values())
    assert all(bool(torch.isfinite(v).all()) for v in weights(session).values())
    assert float(session.optimizer.moments["step"]) == 12 - 4


def test_a_skipped_step_leaves_what_would_have_been_without_it():
    """The gradient of a bad step is not kept for the next one."""
    a, b = (build_session(recipe("tokens", algorithm={"steps_per_update": 1})) for _ in range(2))
    poisoned(a, {1})
    iterate(a, 3)
    iterate(b, 1)
    next(b.batches)
    b.steps += 1
    iterate(b, 1)
    assert lab.differing(weights(a), weights(b)) == []


def test_a_streak_of_bad_updates_ends_the_run(tmp_path, monkeypatch, capsys):
    build = ImitationSession.build.__func__
    monkeypatch.setattr(ImitationSession, "build", classmethod(lambda cls, r, fresh=True: unlucky(build(cls, r, fresh=fresh))))
    wanted = recipe("flow", train={"max_bad_updates": 2}, algorithm={"steps": 60}, log={"folder": str(tmp_path)})
    path = lab.write(wanted, tmp_path)
    assert main(["train", str(path)]) == 2
    assert capsys.readouterr().err.endswith(
        "error: not one optimizer step of the last 2 updates was finite; the weights were left as they were; lower "
        f"algorithm.lr, or look for non-finite numbers with: embodied-rl check demos {wanted.algorithm.demonstrations}\n"
    )
    rows = lab.rows_of(tmp_path / "sft")
    assert [row.get("actor/skipped_updates", 0) for row in rows] == [0, 0, 3], "the fourth raised"
    newest = checkpoint.latest(tmp_path / "sft/checkpoints")
    assert newest.name == "update_000002", "no checkpoint was written while updates were skipped"
    summary = json.loads((tmp_path / "sft/summary.json").read_text())
    assert (summary["finished"], summary["stop_reason"]) == (False, "diverged")


def unlucky(session):
    """From the seventh optimizer step on nothing is finite."""
    real = session.policy.imitation_loss
    session.policy.imitation_loss = lambda *a: real(*a) * (math.nan if session.steps >= 6 else 1.0)
    return session


def test_the_streak_is_part_of_the_state():
    session = build_session(recipe("tokens", train={"max_bad_updates": 2}))
    real = session.batches
    poisoned(session, set(range(3)))
    iterate(session, 1)
    assert session.bad_in_a_row == 1
    session.batches = real
    again = build_session(session.recipe, fresh=False)
    again.load_state_dict(session.state_dict(), "memory")
    with pytest.raises(DivergenceError, match="of the last 2 updates"):
        poisoned(again, set(range(3))).iterate(Clock())


def test_light_is_not_varied_where_nothing_is_seen(monkeypatch):
    monkeypatch.setattr("embodied_rl.imitate._cameras", lambda spec: [])
    with pytest.raises(CapabilityError, match="algorithm.augment varies the light of pictures, and the env shows none"):
        ImitationSession.build(recipe(algorithm={"augment": {"brightness": 0.2}}))
