"""The contract tests themselves: a sound env and policy pass, and each deliberate mistake is caught by its own check."""

import dataclasses
import io
import math

import pytest
import torch
from rich.console import Console
from torch import nn

from embodied_rl import check_env as env_checks
from embodied_rl import check_policy as policy_checks
from embodied_rl.check import (
    check_env,
    check_env_factory,
    check_policy,
    check_policy_factory,
    print_findings,
    run_check,
)
from embodied_rl.check_tools import Finding
from embodied_rl.errors import CapabilityError, ConfigError, NotFoundError, ShapeError
from embodied_rl.types import FEATURES, Evaluation, PolicyOutput, Step
from tests.kit import TOYS, toy

POINT = str(TOYS / "point.py")


def title(check):
    return check.__doc__.split("\n")[0].rstrip(".")


def failed(findings):
    return {f.name.split("] ")[-1] for f in findings if f.ok is False}


# ---- envs -------------------------------------------------------------------------------------------------------


class Sound:
    """The toy `point` with a camera; subclasses break one promise each."""

    max_steps = 10

    def __init__(self, copies, split="train", max_steps=None):
        self.inner = toy("point", copies, max_steps=max_steps or self.max_steps)
        self.spec = dataclasses.replace(self.inner.spec, cameras=("top",))
        self.device, self.split = self.inner.device, split

    def reset(self, mask, seeds, tasks):
        return self.inner.reset(mask, seeds, tasks)

    def step(self, action, active=None):
        return self.inner.step(action, active)

    def get_state(self):
        return self.inner.get_state()

    def set_state(self, state):
        return self.inner.set_state(state)

    def render(self, copies, camera, height, width):
        if camera != "top":
            raise NotFoundError(f"camera '{camera}' does not exist")
        shade = (self.inner.position[copies, 0] * 50 + 100).to(torch.uint8)
        return shade.view(-1, 1, 1, 1).expand(-1, height, width, 3).clone()

    def close(self):
        pass


class WrongNames(Sound):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.spec = dataclasses.replace(self.spec, action=dataclasses.replace(self.spec.action, names=("x",)))


class TellsPadding(Sound):
    told = ((0, "go"),)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        word = dataclasses.replace(self.spec.observation["word"], texts=self.told)
        self.spec = dataclasses.replace(self.spec, observation=self.spec.observation | {"word": word})


class TellsTwice(TellsPadding):
    told = ((1, "go"), (1, "stop"))


class DoubleStart(Sound):
    def reset(self, mask, seeds, tasks):
        obs = super().reset(mask, seeds, tasks)
        return obs | {"position": obs["position"].double()}


class OutOfBounds(Sound):
    def reset(self, mask, seeds, tasks):
        obs = super().reset(mask, seeds, tasks)
        return obs | {"word": obs["word"] + 2}


class NeedsTwo(Sound):
    def step(self, action, active=None):
        return super().step(action + 0 * action[1], active)


class NanForNothing(Sound):
    def step(self, action, active=None):
        step = super().step(action, active)
        return dataclasses.replace(step, reward=torch.where((action == 0).all(1), torch.nan, step.reward))


class BothEnds(Sound):
    def step(self, action, active=None):
        step = super().step(action, active)
        return dataclasses.replace(step, terminated=step.truncated)


class KeepsItsClock(Sound):
    def reset(self, mask, seeds, tasks):
        before = self.inner.t.clone()
        obs = super().reset(mask, seeds, tasks)
        self.inner.t = before
        return obs


class OneClockForAll(Sound):
    def reset(self, mask, seeds, tasks):
        before = self.inner.t.clone()
        obs = super().reset(mask, seeds, tasks)
        if not mask.all():
            self.inner.t = before
        return obs


class Endless(Sound):
    def step(self, action, active=None):
        step = super().step(action, active)
        return dataclasses.replace(step, truncated=torch.zeros_like(step.truncated))


class ResetsItself(Sound):
    """With the same start, or with one of its own."""

    own = False

    def reset(self, mask, seeds, tasks):
        self.seeds, self.tasks = seeds, tasks
        return super().reset(mask, seeds, tasks)

    def step(self, action, active=None):
        step = super().step(action, active)
        if step.truncated.any():
            obs = self.inner.reset(step.truncated, self.seeds + (2 if self.own else 0), self.tasks)
            step = dataclasses.replace(step, obs=obs)
        return step


class ResetsItselfElsewhere(ResetsItself):
    own = True


class Dice(Sound):
    def reset(self, mask, seeds, tasks):
        obs = super().reset(mask, seeds, tasks)
        self.inner.position[mask] += 1e-3 * torch.rand(int(mask.sum()), 2)
        return obs | {"position": self.inner.position.clone()}


class CopyMatters(Sound):
    def reset(self, mask, seeds, tasks):
        return super().reset(mask, seeds + 2 * torch.arange(len(seeds)), tasks)


class SameStartsForEvaluation(Sound):
    def reset(self, mask, seeds, tasks):
        return super().reset(mask, seeds & ~1, tasks)


class ResetsAll(Sound):
    def reset(self, mask, seeds, tasks):
        return super().reset(torch.ones_like(mask), seeds, tasks)


class PushesOthers(Sound):
    """A partial reset moves the others' hidden state; it shows only in the step after."""

    kick = 0.0

    def reset(self, mask, seeds, tasks):
        self.kick = 0.0 if mask.all() else 0.1
        return super().reset(mask, seeds, tasks)

    def step(self, action, active=None):
        kick, self.kick = self.kick, 0.0
        return super().step((action.clamp(-0.8, 0.8) + kick) if kick else action, active)


class IdleMatters(Sound):
    def step(self, action, active=None):
        return super().step(action if active is None else action * 0.5, active)


class GoesOnWaiting(Sound):
    """Observations on demand, from copies that move on while nobody asks them to."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.spec = dataclasses.replace(self.spec, on_demand=True)

    def step(self, action, active=None):
        return dataclasses.replace(super().step(action), obs={})

    def observe(self):
        return self.inner._obs()


class TellsTheTime(Sound):
    def manifest(self):
        return {"steps": int(self.inner.t.sum())}


class AcceptsNan(Sound):
    def step(self, action, active=None):
        return super().step(torch.nan_to_num(action, posinf=1.0), active)


class OtherError(Sound):
    def step(self, action, active=None):
        try:
            return super().step(action, active)
        except ShapeError as error:
            raise RuntimeError("boom") from error


class Anonymous(Sound):
    def step(self, action, active=None):
        try:
            return super().step(action, active)
        except ShapeError:
            raise ShapeError("bad action") from None


class Unclipped(Sound):
    def step(self, action, active=None):
        step = super().step(action, active)
        beyond = (action - action.clamp(-1, 1)).nan_to_num()
        self.inner.position = self.inner.position + beyond * 0.01
        return dataclasses.replace(step, obs=step.obs | {"position": self.inner.position.clone()})


class ForgetsItsClock(Sound):
    def get_state(self):
        return super().get_state() | {"t": torch.zeros_like(self.inner.t)}


class AliasedState(Sound):
    def get_state(self):
        state = super().get_state()
        self.alias = state["position"]
        return state

    def step(self, action, active=None):
        step = super().step(action, active)
        if hasattr(self, "alias"):
            self.alias.copy_(self.inner.position)
        return step


class SilentAboutState(Sound):
    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.spec = dataclasses.replace(self.spec, has_state=False)


class StateWithObjects(Sound):
    def get_state(self):
        return super().get_state() | {"rng": object()}


class NewWords(Sound):
    def step(self, action, active=None):
        step = super().step(action, active)
        return dataclasses.replace(step, obs=step.obs | {"word": 3 - step.obs["word"]})


class FloatPictures(Sound):
    def render(self, copies, camera, height, width):
        return super().render(copies, camera, height, width).float()


class DisorderedPictures(Sound):
    def render(self, copies, camera, height, width):
        return super().render(copies.sort().values, camera, height, width)


class AnyCamera(Sound):
    def render(self, copies, camera, height, width):
        return super().render(copies, "top", height, width)


class WordyNumbers(Sound):
    def transcript(self, copies):
        return [1, 2]


class DisorderedWords(Sound):
    def transcript(self, copies):
        return [f"copy {i}" for i in copies.sort().values.tolist()]


class InvalidGoesOn(Sound):
    def step(self, action, active=None):
        step = super().step(action, active)
        return dataclasses.replace(step, invalid=~(step.terminated | step.truncated))


class ClosesOnce(Sound):
    count = 0

    def close(self):
        self.count += 1
        if self.count == 2:  # not more often, so that the harness can close what it made
            raise RuntimeError("already closed")


MISTAKES = [
    (WrongNames, "spec_is_coherent", "2 dimensions and 1 names"),
    (TellsPadding, "spec_is_coherent", "texts of 'word' has an id that is not in 1 to 2"),
    (TellsTwice, "spec_is_coherent", "texts of 'word' has an id twice"),
    (DoubleStart, "reset_keeps_the_spec", "'position' is torch.float64"),
    (OutOfBounds, "reset_keeps_the_spec", "'word' reaches 3, the spec's high is 2"),
    (NeedsTwo, "one_copy_works", "IndexError"),
    (NanForNothing, "zero_agent_runs", "reward is not finite in copies [0, 1, 2]"),
    (BothEnds, "random_agent_runs", "both terminated and truncated"),
    (KeepsItsClock, "random_agent_runs", "truncated one step after a reset"),
    (OneClockForAll, "partial_reset_starts_a_whole_episode", "truncated is True after 7 steps, and False"),
    (Endless, "time_limit_holds", "go on after max_steps, 10 steps"),
    (ResetsItself, "last_observation_is_true", "ends with the observation it began with"),
    (ResetsItselfElsewhere, "last_observation_is_true", "is not what the action led to"),
    (Dice, "same_seed_same_start", "'position' differs when the env is reset again"),
    (CopyMatters, "same_seed_same_start", "differs when another copy is given the seed"),
    (SameStartsForEvaluation, "evaluation_starts_are_new", "the last bit of the seed is ignored"),
    (ResetsAll, "partial_reset_is_local", "of copies 1 and up changed when copy 0 was reset"),
    (PushesOthers, "partial_reset_is_local", "1 steps later 'position' of copies 1 and up"),
    (IdleMatters, "active_copies_do_not_mind_idle_ones", "differs from a step of all copies"),
    (GoesOnWaiting, "idle_copies_wait", "'position' of an idle copy changed in step 2"),
    (AcceptsNan, "wrong_actions_are_refused", "NaN: accepted"),
    (OtherError, "wrong_actions_are_refused", "raises RuntimeError instead of ShapeError"),
    (Anonymous, "wrong_actions_are_refused", "does not name the copy"),
    (Unclipped, "actions_are_clipped", "differs between the actions 7 and 1"),
    (ForgetsItsClock, "state_round_trip", "'truncated' differs"),
    (AliasedState, "state_round_trip", "the saved state changes when the env moves on"),
    (SilentAboutState, "state_round_trip", "does not raise CapabilityError"),
    (StateWithObjects, "state_round_trip", "CheckpointError"),
    (NewWords, "constants_are_constant", "'word' changes at step 1"),
    (FloatPictures, "pictures_are_as_asked", "torch.float32"),
    (DisorderedPictures, "pictures_are_as_asked", "order asked for"),
    (AnyCamera, "pictures_are_as_asked", "unknown camera is accepted"),
    (WordyNumbers, "transcripts_are_as_asked", "expected two texts"),
    (DisorderedWords, "transcripts_are_as_asked", "order asked for"),
    (TellsTheTime, "manifest_is_plain", "changes within an episode"),
    (InvalidGoesOn, "random_agent_runs", "copies [0, 1, 2] are invalid, but their episodes go on"),
    (ClosesOnce, "close_twice", "already closed"),
]


def test_a_sound_env_passes_every_check():
    findings = check_env_factory(Sound, can_lengthen=True)
    assert len(findings) == len(env_checks.CHECKS)
    assert [f for f in findings if f.ok is not True] == []


@pytest.mark.parametrize(("broken", "check", "detail"), MISTAKES, ids=lambda x: getattr(x, "__name__", None))
def test_each_mistake_of_an_env_is_caught_by_its_check(broken, check, detail):
    findings = check_env_factory(broken, can_lengthen=True)
    name = title(getattr(env_checks, check))
    finding = next(f for f in findings if f.name == name)
    assert finding.ok is False and detail in finding.detail, finding


def test_every_check_of_envs_has_a_mistake_that_it_catches():
    assert {check for _, check, _ in MISTAKES} == {c.__name__ for c in env_checks.CHECKS}


def test_without_a_later_time_limit_only_the_plain_self_reset_is_seen():
    name = title(env_checks.last_observation_is_true)
    assert name in failed(check_env_factory(ResetsItself))
    assert name not in failed(check_env_factory(ResetsItselfElsewhere))


def test_an_env_is_found_by_name_with_settings():
    findings = check_env(POINT, ["max_steps=4", "end_on_success=true"])
    assert failed(findings) == set()
    with pytest.raises(NotFoundError, match="no such file"):
        check_env("nowhere.py")
    with pytest.raises(ConfigError, match="max_step"):
        check_env(POINT, ["max_step=4"])


def test_an_env_that_cannot_be_built_is_one_finding_or_the_users_error():
    def crash(copies, **settings):
        raise ZeroDivisionError("oh")

    (finding,) = check_env_factory(crash)
    assert finding.ok is False and finding.detail.startswith("ZeroDivisionError: oh (")
    with pytest.raises(NotFoundError, match="did you mean 'CartPole-v1'?"):
        check_env("gymnasium", ["id=CartPol-v1"])


def test_a_check_that_crashes_is_a_finding_and_the_others_still_run():
    class Crashes(Sound):
        def set_state(self, state):
            raise ZeroDivisionError("oh")

    findings = check_env_factory(Crashes, can_lengthen=True)
    assert len(findings) == len(env_checks.CHECKS) and failed(findings) == {title(env_checks.state_round_trip)}
    assert "ZeroDivisionError: oh" in next(f.detail for f in findings if f.ok is False)


# ---- policies ---------------------------------------------------------------------------------------------------


class Linear(nn.Module):
    """A Gaussian with a linear mean over normalised vectors, and a linear critic; subclasses break one promise each."""

    has_critic = True

    def __init__(self, spec):
        super().__init__()
        if spec.action.kind != "continuous" or any(o.dtype == torch.uint8 for o in spec.observation.values()):
            raise CapabilityError("linear takes vectors and continuous actions")
        self.names = [n for n, o in spec.observation.items() if o.dtype.is_floating_point]
        size = sum(math.prod(spec.observation[n].shape) for n in self.names)
        self.chunk, self.num_units = 1, spec.action.size
        self.mean, self.critic = nn.Linear(size, self.num_units), nn.Linear(size, 1)
        self.log_std = nn.Parameter(torch.zeros(self.num_units))
        self.register_buffer("shift", torch.zeros(size))

    def features(self, obs):
        return torch.cat([obs[n].flatten(1) for n in self.names], dim=1) - self.shift

    def log_prob(self, mean, units):
        return -0.5 * ((units - mean) / self.log_std.exp()) ** 2 - self.log_std - 0.9189385

    def noise(self, mean, generator):
        return torch.randn(mean.shape, generator=generator)

    def act(self, obs, *, generator, greedy=False):
        with torch.no_grad():
            x = self.features(obs)
            mean = self.mean(x)
            units = mean if greedy else mean + self.log_std.exp() * self.noise(mean, generator)
            return PolicyOutput(units, self.log_prob(mean, units), units.unsqueeze(1), self.critic(x).squeeze(1))

    def evaluate(self, obs, units, *, entropy=True):
        x = self.features(obs)
        mean = self.mean(x)
        h = (self.log_std + 1.4189385).expand_as(mean) if entropy else None
        return Evaluation(self.log_prob(mean, units), h, self.critic(x).squeeze(1))

    def value(self, obs):
        with torch.no_grad():
            return self.critic(self.features(obs)).squeeze(1)

    def observe(self, obs):
        self.shift.copy_((self.features(obs) + self.shift).mean(0))


class WrongUnits(Linear):
    def __init__(self, spec):
        super().__init__(spec)
        self.num_units += 1


class DiscretelyWrong(Linear):
    def act(self, obs, *, generator, greedy=False):
        out = super().act(obs, generator=generator, greedy=greedy)
        return dataclasses.replace(out, action=out.action.long())


class RecordsGradients(Linear):
    def act(self, obs, *, generator, greedy=False):
        out = super().act(obs, generator=generator, greedy=greedy)
        return dataclasses.replace(out, logp=self.log_prob(self.mean(self.features(obs)), out.units))


class AlwaysEntropy(Linear):
    def evaluate(self, obs, units, *, entropy=True):
        return super().evaluate(obs, units)


class OtherFormula(Linear):
    def evaluate(self, obs, units, *, entropy=True):
        out = super().evaluate(obs, units, entropy=entropy)
        return dataclasses.replace(out, logp=(out.logp.double() * 1.0000002).float())


class BatchNormalised(Linear):
    """Bitwise equal on the same batch, but not in a minibatch."""

    def features(self, obs):
        x = super().features(obs)
        return x - x.mean(0)


class OtherValue(Linear):
    def value(self, obs):
        return super().value(obs) + 0.1


class NotOnlyTold(Linear):
    privileged_critic = True


class GreedySamples(Linear):
    def act(self, obs, *, generator, greedy=False):
        return super().act(obs, generator=generator)


class GlobalNoise(Linear):
    def noise(self, mean, generator):
        return torch.randn(mean.shape)


class NoNoise(Linear):
    def noise(self, mean, generator):
        return torch.zeros(mean.shape)


class Unused(Linear):
    def __init__(self, spec):
        super().__init__(spec)
        self.forgotten = nn.Linear(3, 3)


class MovesWhileActing(Linear):
    def act(self, obs, *, generator, greedy=False):
        self.observe(obs)
        return super().act(obs, generator=generator, greedy=greedy)


class ChangesItsInput(Linear):
    def evaluate(self, obs, units, *, entropy=True):
        out = super().evaluate(obs, units, entropy=entropy)
        obs["state"].mul_(0.5)
        return out


class ObserveTrains(Linear):
    def observe(self, obs):
        super().observe(obs)
        with torch.no_grad():
            self.log_std += 1


class TrainedFeatures(Linear):
    """Gives as features what a layer made that learns: training would use a stale one and never move it."""

    def __init__(self, spec):
        super().__init__(spec)
        self.layer = nn.Linear(self.shift.numel(), self.shift.numel())

    def features(self, obs):
        return obs[FEATURES] if FEATURES in obs else self.layer(super().features(obs))

    def act(self, obs, *, generator, greedy=False):
        out = super().act(obs, generator=generator, greedy=greedy)
        return dataclasses.replace(out, features=self.features(obs).detach())


class HiddenStatistics(Linear):
    def __init__(self, spec):
        super().__init__(spec)
        shift = self.shift
        del self.shift
        self.__dict__["shift"] = shift


POLICY_MISTAKES = [
    (WrongUnits, "decision_has_the_promised_form", "logp is torch.float32 [1, 4] on cpu, expected torch.float32 [1, 5]"),
    (DiscretelyWrong, "decision_has_the_promised_form", "action is torch.int64"),
    (RecordsGradients, "decision_has_the_promised_form", "must not record gradients"),
    (AlwaysEntropy, "evaluation_has_the_promised_form", "although entropy=False"),
    (OtherFormula, "ratio_is_one", "they differ by up to"),
    (BatchNormalised, "ratio_is_one", "a minibatch of half of the rows in another order differs"),
    (BatchNormalised, "rows_do_not_meet", "when only other rows change"),
    (TrainedFeatures, "features_stand_for_the_observation", "what makes the features must be frozen"),
    (OtherValue, "values_agree", "value and act differ by 0.1"),
    (NotOnlyTold, "values_agree", "privileged_critic is True, but other entries move the value by"),
    (GreedySamples, "greedy_is_deterministic", "two greedy decisions"),
    (GlobalNoise, "samples_follow_the_generator", "moves torch's global generator"),
    (NoNoise, "samples_follow_the_generator", "another generator gives the same samples"),
    (Unused, "gradients_reach_every_parameter", "no gradient reaches forgotten.weight, forgotten.bias"),
    (MovesWhileActing, "nothing_moves_while_collecting", "'shift' changed"),
    (ChangesItsInput, "nothing_moves_while_collecting", "'state', which was handed in, was changed"),
    (ObserveTrains, "nothing_moves_while_collecting", "observe changed the parameters log_std"),
    (HiddenStatistics, "state_dict_is_complete", "something lives outside of it"),
]


def test_a_sound_policy_passes_every_check_for_the_envs_it_takes():
    findings = check_policy_factory(Linear)
    assert [f for f in findings if f.ok is False] == []
    assert {f.name for f in findings if f.ok is None} == {"[vector, discrete] can be built", "[pixels and words] can be built"}
    assert sum(f.ok is True for f in findings) == 2 * (1 + len(policy_checks.CHECKS))


@pytest.mark.parametrize(("broken", "check", "detail"), POLICY_MISTAKES, ids=lambda x: getattr(x, "__name__", None))
def test_each_mistake_of_a_policy_is_caught_by_its_check(broken, check, detail):
    findings = check_policy_factory(broken, specs={"": policy_checks.SPECS["vector, continuous"]})
    finding = next(f for f in findings if f.name == title(getattr(policy_checks, check)))
    assert finding.ok is False and detail in finding.detail, finding


def test_every_check_of_policies_has_a_mistake_that_it_catches():
    assert {check for _, check, _ in POLICY_MISTAKES} == {c.__name__ for c in policy_checks.CHECKS}


def test_a_policy_that_takes_no_env_or_is_no_module_fails():
    def refuse(spec):
        raise CapabilityError("no")

    assert "every env was refused" in check_policy_factory(refuse)[-1].detail
    assert failed(check_policy_factory(lambda spec: object())) == {"is a torch.nn.Module"}
    findings = check_policy_factory(lambda spec: 1 / 0)
    assert len(findings) == len(policy_checks.SPECS) and all("ZeroDivisionError" in f.detail for f in findings)


def test_a_policy_is_found_by_name_with_settings():
    assert failed(check_policy("mlp", ["hidden=[8]"])) == set()
    env = toy("point", 3)
    assert failed(check_policy("mlp", ["hidden=[8]", "word_dim=4"], env=env.spec)) == set()


# ---- printing ---------------------------------------------------------------------------------------------------


def test_findings_are_printed_one_a_line_and_decide_the_exit_code(capsys):
    out = io.StringIO()
    findings = [Finding("a", True, "[3, 4]"), Finding("b", None, "why"), Finding("c", False, "found 1, expected 2")]
    assert print_findings(findings, Console(file=out, width=100)) == 1
    assert out.getvalue() == "ok   a: [3, 4]\nskip b: why\nFAIL c: found 1, expected 2\n1 passed, 1 failed, 1 not tried\n"
    assert print_findings(findings[:2], Console(file=out)) == 0
    assert run_check("env", POINT) == 0 and "0 failed" in capsys.readouterr().out


def test_a_step_that_breaks_the_spec_is_described_in_full():
    env = Sound(2)
    env.reset(torch.tensor([True, True]), torch.tensor([0, 2]), torch.tensor([0, 1]))
    good = env.step(torch.zeros(2, 2))
    bad = {
        "reward": (torch.zeros(2, 1), "reward is torch.float32 [2, 1] on cpu, expected torch.float32 [2] on cpu"),
        "success": (None, "success is a NoneType, expected a tensor"),
        "metrics": ({"d": torch.tensor([1.0, torch.inf])}, r"metrics['d'] is not finite in copies [1]"),
        "terminated": (torch.zeros(2), "terminated is torch.float32 [2]"),
        "obs": ({"position": good.obs["position"]}, "entries ['position'], the spec has ['goals', 'position', 'word']"),
    }
    for name, (value, message) in bad.items():
        with pytest.raises(Exception) as caught:
            env_checks.check_step(Step(**{f.name: getattr(good, f.name) for f in dataclasses.fields(Step)} | {name: value}), env, "now")
        assert message in str(caught.value), name
