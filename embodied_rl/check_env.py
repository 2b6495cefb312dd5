"""What `embodied-rl check env` tries; each function's first line is what it makes sure of."""

from __future__ import annotations

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from embodied_rl import checkpoint, manifest
from embodied_rl.check_tools import (
    Broken,
    EnvCase,
    NotTried,
    actions_for,
    check_obs,
    check_step,
    check_tensor,
    clone,
    copy_mask,
    differing,
    expect,
    identical,
    move,
    observations_differ,
    restart,
    rows_where,
    seeds_of,
    start,
    tasks_of,
    zeros_for,
)
from embodied_rl.convention import UNKNOWN
from embodied_rl.errors import CapabilityError, NotFoundError, ShapeError
from embodied_rl.types import PAD, Env


def spec_is_coherent(case: EnvCase) -> str:
    """The spec contradicts neither itself nor the env."""
    env = case.env
    s, a = env.spec, env.spec.action
    expect(s.num_envs == case.copies, f"num_envs is {s.num_envs}, {case.copies} copies were asked for")
    expect(bool(s.observation), "the observation has no entries")
    expect(bool(s.tasks) and len(set(s.tasks)) == len(s.tasks), f"tasks must be named, each once: {s.tasks}")
    expect(a.size >= 1 and a.kind in ("continuous", "discrete", "tokens") and a.length >= 1, f"action is {a}")
    if a.kind == "tokens":
        v = s.vocabulary
        expect(v is not None and v.size == a.size, f"the action is of {a.size} token ids, spec.vocabulary is {v}")
        expect(v is not None and all(0 <= i < v.size for i in v.end), f"an id that ends a row is none of {v}")
    expect(len(a.names) in (0, a.size), f"the action has {a.size} dimensions and {len(a.names)} names")
    expect(s.max_steps is None or s.max_steps >= 1, f"max_steps is {s.max_steps}")
    for name, o in s.observation.items():
        expect(isinstance(o.dtype, torch.dtype), f"dtype of '{name}' is {o.dtype}")
        expect(o.low is None or o.high is None or o.low <= o.high, f"'{name}' has low {o.low} above high {o.high}")
        ids = [i for i, _ in o.texts]
        expect(len(set(ids)) == len(ids), f"texts of '{name}' has an id twice")
        expect(all(0 < i <= (o.high or 0) for i in ids), f"texts of '{name}' has an id that is not in 1 to {o.high}")
    return f"what an action means is {(a.convention or UNKNOWN).told()}" if a.kind == "continuous" else a.kind


def reset_keeps_the_spec(case: EnvCase) -> None:
    """A start has the entries, shapes, types and bounds of the spec, for every task."""
    for first in range(len(case.env.spec.tasks)):
        check_obs(start(case.env, first), case.env.spec, case.copies, case.env.device, "after reset")


def manifest_is_plain(case: EnvCase) -> str:
    """What the env tells of itself for an evaluation's manifest is plain data, and stays as it is."""
    start(case.env)
    first = manifest.make(case.env, {}, {})["env"]
    move(case.env, zeros_for(case.env))
    expect(first == manifest.make(case.env, {}, {})["env"], "manifest() changes within an episode")
    return ", ".join(first) if hasattr(case.env, "manifest") else "it tells nothing"


def one_copy_works(case: EnvCase) -> None:
    """A single copy works."""
    env = case.fresh(1)
    check_obs(start(env), env.spec, 1, env.device, "one copy, after reset")
    check_step(move(env, zeros_for(env)), env, "one copy, first step")


def zero_agent_runs(case: EnvCase) -> str:
    """An agent that does nothing can play."""
    return _play(case, lambda env, n: [zeros_for(env)] * n)


def random_agent_runs(case: EnvCase) -> str:
    """A random agent can play, with resets of the copies that end."""
    return _play(case, actions_for)


def _play(case: EnvCase, plan: Callable[[Env, int], list[Tensor]]) -> str:
    env = case.env
    obs, ended = start(env), 0
    n = min(case.steps, (env.spec.max_steps or 200) + 20)
    fresh = torch.zeros(case.copies, dtype=torch.bool)
    for t, action in enumerate(plan(env, n)):
        step = move(env, action)
        check_step(step, env, f"step {t + 1}")
        done = step.terminated | step.truncated
        at_once = step.truncated.cpu() & fresh
        if (env.spec.max_steps or 2) > 1:
            expect(not bool(at_once.any()), f"copies {rows_where(at_once)} are truncated one step after a reset")
        if bool(done.any()):
            ended += int(done.sum())
            obs = restart(env, done, first=1000 + 10 * t)
            check_obs(obs, env.spec, case.copies, env.device, "after a partial reset")
        fresh = done.cpu()
    return f"{n} steps, {ended} episodes ended"


def time_limit_holds(case: EnvCase) -> str:
    """No episode is longer than max_steps, and the limit truncates."""
    env, limit = case.env, case.env.spec.max_steps
    if limit is None:
        raise NotTried("the env has no time limit")
    if limit > case.steps:
        raise NotTried(f"max_steps is {limit}, more than the {case.steps} steps of this check")
    start(env)
    running, cut = torch.ones(case.copies, dtype=torch.bool, device=env.device), 0
    for t in range(limit):
        step = move(env, zeros_for(env), running)
        if t + 1 == limit:
            silent = running & ~step.terminated & ~step.truncated
            expect(not bool(silent.any()), f"copies {rows_where(silent)} go on after max_steps, {limit} steps")
        cut += int((step.truncated & running).sum())
        running &= ~(step.terminated | step.truncated)
        if not bool(running.any()):
            break
    return f"{cut} of {case.copies} copies truncated"


def last_observation_is_true(case: EnvCase) -> str:
    """The observation at the end of an episode is the last state, not a fresh start."""
    env, limit = case.fresh(), case.env.spec.max_steps
    n = min(limit or 200, case.steps)
    longer = case.fresh(max_steps=limit + 5) if case.can_lengthen and limit == n else None
    first, running = start(env), torch.ones(case.copies, dtype=torch.bool, device=env.device)
    if longer is not None and list(differing(first, start(longer))):
        longer = None
    before, ends, compared = first, 0, 0
    for action in actions_for(env, n, seed=1):
        step = move(env, action)
        other = move(longer, action) if longer is not None else None
        done = (step.terminated | step.truncated) & running
        for i in done.nonzero().flatten().tolist():
            row, ends = copy_mask(env, i), ends + 1
            again = not observations_differ(step.obs, first, row) and bool(observations_differ(before, first, row))
            expect(not again, f"copy {i} ends with the observation it began with: it was reset inside step")
            if other is not None and not bool((other.terminated | other.truncated)[i]):
                names, compared = observations_differ(step.obs, other.obs, row), compared + 1
                expect(not names, f"'{', '.join(names)}' of copy {i} at the time limit is not what the action led to")
        running = running & ~done
        # From here on the two may differ for reasons of their own: a different clock, or dice.
        if other is not None and observations_differ(step.obs, other.obs, running):
            longer = None
        before = step.obs
        if not bool(running.any()):
            break
    if not ends:
        raise NotTried(f"no episode ended within {n} steps")
    return f"{ends} ends, {compared} compared with an env of a later time limit"


def same_seed_same_start(case: EnvCase) -> None:
    """The same seed and task start the same episode, in any copy, at any time, in any env."""
    env = case.env
    if not env.spec.seedable:
        raise NotTried("spec.seedable is False")
    first = start(env)
    for action in actions_for(env, 3):
        env.step(action)
    name = next(differing(first, start(env)), None)
    expect(name is None, f"'{name}' differs when the env is reset again")
    name = next(differing(first, start(case.fresh())), None)
    expect(name is None, f"'{name}' differs in a second env")
    if env.spec.blocks is not None:
        return  # no other copy need be able to play the task
    seeds, tasks = seeds_of(env).flip(0), tasks_of(env).flip(0)
    everyone = torch.ones(case.copies, dtype=torch.bool, device=env.device)
    turned = {k: v.flip(0) for k, v in clone(env.reset(everyone, seeds, tasks)).items()}
    name = next(differing(first, turned), None)
    expect(name is None, f"'{name}' differs when another copy is given the seed; groups need equal starts")


def evaluation_starts_are_new(case: EnvCase) -> str:
    """Evaluation seeds start other episodes than training seeds."""
    if not case.env.spec.seedable:
        raise NotTried("spec.seedable is False")
    train, evaluation = case.fresh(), case.fresh(split="eval")
    everyone = torch.ones(case.copies, dtype=torch.bool, device=train.device)
    tasks = tasks_of(train)
    ours = clone(train.reset(everyone, seeds_of(train), tasks))
    theirs = clone(evaluation.reset(everyone, seeds_of(evaluation, split="eval"), tasks))
    if all(identical(x[:1].expand_as(x), x) for x in ours.values()):
        raise NotTried("the seed changes nothing that can be observed")
    new = [i for i in range(case.copies) if observations_differ(ours, theirs, copy_mask(train, i))]
    # The two seeds of a copy differ in their last bit only.
    expect(bool(new), "training and evaluation seeds start the same episodes: the last bit of the seed is ignored")
    return f"{len(new)} of {case.copies} starts differ"


def partial_reset_is_local(case: EnvCase) -> str:
    """A partial reset leaves the other copies alone."""
    env, twin = case.fresh(), case.fresh()
    others = ~copy_mask(env, 0)
    names = observations_differ(start(env), restart(env, copy_mask(env, 0)), others)
    expect(not names, f"'{', '.join(names)}' of copies 1 and up changed when copy 0 was reset")
    obs, twin_obs = start(env), start(twin)
    plan = actions_for(env, 8, seed=2)
    for action in plan[:4]:
        step, twin_obs = move(env, action), move(twin, action).obs
        obs = step.obs
        # What a copy shows after its end is its own affair.
        others = others & ~(step.terminated | step.truncated)
    names = observations_differ(restart(env, copy_mask(env, 0)), obs, others)
    expect(not names, f"'{', '.join(names)}' of copies 1 and up changed when copy 0 was reset after 4 steps")
    if observations_differ(obs, twin_obs, others):
        return "two equal envs do not move alike, so what follows was not compared"
    for t, action in enumerate(plan[4:]):
        step, twin_step = move(env, action), move(twin, action)
        names = observations_differ(step.obs, twin_step.obs, others)
        expect(not names, f"{t + 1} steps later '{', '.join(names)}' of copies 1 and up differs from a twin's")
        others = others & ~(twin_step.terminated | twin_step.truncated)
    return ""


def partial_reset_starts_a_whole_episode(case: EnvCase) -> str:
    """An episode that a partial reset begins starts like any other and is as long."""
    if not case.env.spec.seedable:
        raise NotTried("spec.seedable is False")
    env, twin, copy = case.fresh(), case.fresh(), copy_mask(case.env, 0)
    start(env)
    for action in actions_for(env, 3, seed=7):
        env.step(action)
    names = observations_differ(restart(env, copy), start(twin, first=1000), copy)
    expect(not names, f"'{', '.join(names)}' differs from a reset of all copies with the same seed")
    n = min(case.steps, (case.env.spec.max_steps or 50) + 1)
    for t, action in enumerate(actions_for(env, n, seed=8)):
        late, whole = move(env, action, copy), move(twin, action, copy)
        if bool((late.terminated | whole.terminated)[0]):
            break  # not compared: a simulator on a GPU may round differently
        x, y = bool(late.truncated[0]), bool(whole.truncated[0])
        expect(x == y, f"truncated is {x} after {t + 1} steps, and {y} when all copies were reset together")
        if x:
            break
    return f"followed for {t + 1} steps"


def active_copies_do_not_mind_idle_ones(case: EnvCase) -> None:
    """Active copies move the same whether or not others are idle."""
    env, twin = case.fresh(), case.fresh()
    if list(differing(start(env), start(twin))):
        raise NotTried("two equal envs do not start alike")
    plan, active = actions_for(env, 4, seed=3), ~copy_mask(env, 0)
    for t, action in enumerate(plan):
        step, whole = move(env, action, active), move(twin, action)
        check_step(step, env, f"step {t + 1} with copy 0 idle", active)
        names = observations_differ(step.obs, whole.obs, active)
        expect(not names, f"'{', '.join(names)}' of the active copies differs from a step of all copies")
        expect(identical(step.reward[active], whole.reward[active]), "reward of the active copies differs")
        active = active & ~(step.terminated | step.truncated)
        if not bool(active.any()):
            break


def idle_copies_wait(case: EnvCase) -> str | None:
    """Where observations are given on demand, copies that are not active stay exactly where they stopped."""
    env = case.fresh()
    if not env.spec.on_demand:
        return "observations come with every step"
    start(env)
    plan = actions_for(env, 4, seed=4)
    before, idle = move(env, plan[0]).obs, copy_mask(env, 0)
    for t, action in enumerate(plan[1:]):
        names = observations_differ(move(env, action, ~idle).obs, before, idle)
        expect(not names, f"'{', '.join(names)}' of an idle copy changed in step {t + 2}: its last state would be lost")
    return None


def wrong_actions_are_refused(case: EnvCase) -> None:
    """An action of another shape or type, or one that is not finite, is refused with a ShapeError."""
    env = case.env
    start(env)
    a, right = env.spec.action, zeros_for(env)
    wrong = {"one copy too many": torch.cat([right, right[:1]]), "float64": right.double()}
    if a.kind != "discrete":
        wrong["one number too many"] = torch.cat([right, right[:, :1]], dim=1)
    if a.kind == "continuous":
        for name, number in (("NaN", float("nan")), ("infinite", float("inf"))):
            wrong[name] = right.clone()
            wrong[name][1, 0] = number
    else:
        wrong["too large"] = right.clone()
        wrong["too large"][1] = a.size
    if a.kind == "tokens":
        wrong["no id"] = right.clone()
        wrong["no id"][1, 0] = PAD - 1
        if a.length > 1:
            wrong["an id after the end"] = right.clone()
            wrong["an id after the end"][1, :-1] = PAD
    for name, action in wrong.items():
        try:
            env.step(action)
        except ShapeError as error:
            of_copy = ("NaN", "infinite", "too large", "no id", "an id after the end")
            told = name not in of_copy or "1" in str(error)
            expect(told, f"{name} in copy 1: the message does not name the copy: {error}")
            continue
        except Exception as error:
            raise Broken(f"{name}: raises {type(error).__name__} instead of ShapeError: {error}") from None
        raise Broken(f"{name}: accepted, expected a ShapeError")
    check_step(move(env, right), env, "the step after a refused action")


def actions_are_clipped(case: EnvCase) -> None:
    """A continuous action beyond [-1, 1] does what the bound does."""
    if case.env.spec.action.kind != "continuous":
        raise NotTried(f"actions are {case.env.spec.action.kind}")
    env, twin = case.fresh(), case.fresh()
    if list(differing(start(env), start(twin))):
        raise NotTried("two equal envs do not start alike")
    running = torch.ones(case.copies, dtype=torch.bool, device=env.device)
    for t, action in enumerate(actions_for(env, 4, seed=4)):
        far, near = move(env, action.sign() * 7), move(twin, action.sign())
        names = observations_differ(far.obs, near.obs, running)
        expect(not names, f"step {t + 1}: '{', '.join(names)}' differs between the actions 7 and 1")
        running = running & ~(near.terminated | near.truncated)


def state_round_trip(case: EnvCase) -> str:
    """A saved state continues bit for bit, here and in a new env."""
    env = case.env
    obs = start(env)
    if not env.spec.has_state:
        for call in (env.get_state, lambda: env.set_state({})):
            try:
                call()
            except CapabilityError:
                continue
            raise Broken("spec.has_state is False, but get_state or set_state does not raise CapabilityError")
        return "spec.has_state is False, and it says so"
    plan = actions_for(env, min(case.steps, (env.spec.max_steps or 30) + 10), seed=5)
    now, plan = plan[:7], plan[7:]
    for t, action in enumerate(now):
        step = move(env, action)
        obs, done = step.obs, step.terminated | step.truncated
        if t == 2:
            done = done | copy_mask(env, 0)  # copies of different age
        if bool(done.any()):
            obs = restart(env, done)
    state = env.get_state()
    kept = clone(state)
    future = _follow(env, plan)
    name = next(differing(state, kept), None)
    expect(name is None, f"the saved state changes when the env moves on ('{name}'): get_state must copy")
    with tempfile.TemporaryDirectory() as folder:
        stored = checkpoint.load(checkpoint.save(Path(folder), kept, update=0, keep=1))
    for where, other in (("the same env", env), ("a new env", case.fresh())):
        restored = clone(other.set_state(clone(stored)))
        name = next(differing(restored, obs), None)
        expect(name is None, f"in {where} set_state returns another '{name}' than the env had")
        for t, (was, again) in enumerate(zip(future, _follow(other, plan), strict=True)):
            name = next(differing(was, again), None)
            expect(name is None, f"in {where} '{name}' differs {t + 1} steps after set_state")
    return f"{len(future)} steps compared"


def _follow(env: Env, plan: list[Tensor]) -> list[dict[str, Any]]:
    """Everything that comes of a plan, with resets of the copies that end."""
    out = []
    for t, action in enumerate(plan):
        step = move(env, action)
        done = step.terminated | step.truncated
        kept = {"obs": step.obs, "reward": step.reward, "terminated": step.terminated, "truncated": step.truncated}
        out.append(kept | ({} if step.success is None else {"success": step.success}))
        if bool(done.any()):
            out[-1]["start"] = restart(env, done, first=2000 + 10 * t)
    return out


def constants_are_constant(case: EnvCase) -> str:
    """Entries marked constant do not change within an episode."""
    env = case.env
    names = [name for name, o in env.spec.observation.items() if o.constant]
    if not names:
        raise NotTried("no entry is marked constant")
    obs, running = start(env), torch.ones(case.copies, dtype=torch.bool, device=env.device)
    for t, action in enumerate(actions_for(env, min(case.steps, env.spec.max_steps or 100), seed=6)):
        step = move(env, action, running)
        for name in names:
            same = identical(step.obs[name][running], obs[name][running])
            expect(same, f"'{name}' changes at step {t + 1}: a rollout would keep only its first value")
        running &= ~(step.terminated | step.truncated)
        if not bool(running.any()):
            break
    return ", ".join(names)


def pictures_are_as_asked(case: EnvCase) -> str:
    """Every camera draws the copies asked for, at the size asked for; unknown cameras are refused."""
    env = case.env
    start(env)
    both, h, w = torch.tensor([1, 0], device=env.device), 24, 32
    for camera in env.spec.cameras:
        pair = env.render(both, camera, h, w).clone()
        check_tensor(pair, (2, h, w, 3), torch.uint8, env.device, f"camera '{camera}'")
        turned = env.render(both.flip(0), camera, h, w).clone()
        expect(identical(pair, turned.flip(0)), f"camera '{camera}' does not draw the copies in the order asked for")
    try:
        env.render(both, "no such camera", h, w)
    except NotFoundError:
        return ", ".join(env.spec.cameras) or "no cameras"
    raise Broken("an unknown camera is accepted, expected a NotFoundError")


def transcripts_are_as_asked(case: EnvCase) -> str:
    """An env that tells episodes in words does so for the copies asked for."""
    env = case.env
    transcript = getattr(env, "transcript", None)
    if transcript is None:
        return "it tells none"
    start(env)
    move(env, actions_for(env, 1, seed=9)[0])
    both = torch.tensor([1, 0], device=env.device)
    texts = transcript(both)
    expect([type(x) for x in texts] == [str, str], f"transcript of two copies gives {texts!r}, expected two texts")
    expect(transcript(both.flip(0)) == texts[::-1], "transcript does not tell the copies in the order asked for")
    return f"{len(texts[0])} characters"


def close_twice(case: EnvCase) -> None:
    """An env can be closed twice."""
    env = case.fresh()
    start(env)
    env.close()
    env.close()


CHECKS: tuple[Callable[[EnvCase], str | None], ...] = (
    spec_is_coherent, reset_keeps_the_spec, one_copy_works, zero_agent_runs, random_agent_runs, time_limit_holds,
    last_observation_is_true, same_seed_same_start, evaluation_starts_are_new, partial_reset_is_local,
    partial_reset_starts_a_whole_episode, active_copies_do_not_mind_idle_ones, idle_copies_wait,
    wrong_actions_are_refused, actions_are_clipped, state_round_trip, constants_are_constant, pictures_are_as_asked,
    transcripts_are_as_asked, manifest_is_plain, close_twice,
)  # fmt: skip
