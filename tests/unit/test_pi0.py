"""pi0: the same numbers as transformers' own model, exact chains, what is trained, checkpoints and errors."""

import math
import re

import pytest
import torch

from embodied_rl import checkpoint, registry
from embodied_rl.check import check_policy
from embodied_rl.errors import CapabilityError, CheckpointError, ConfigError, NotFoundError
from embodied_rl.evaluate import evaluate
from embodied_rl.saved import load_weights
from embodied_rl.train import build_session
from embodied_rl.types import ActionSpec, TensorSpec
from tests.kit import CPU, spec
from tests.resume import lab

transformers = pytest.importorskip("transformers")
pi0 = registry.load("policy", "pi0")

VECTORS = {"joints": TensorSpec((4,)), "gripper": TensorSpec((1,))}
WORDS = TensorSpec((5,), torch.int64, low=0, high=29, constant=True)
D, C, WIDE, ROOM = 3, 4, 8, 12
"""Action numbers of the env, control steps, and the tiny model's max_action_dim and max_state_dim."""


def env_spec(cameras=2, vectors=VECTORS, size=D, **more):
    pictures = {f"camera{i}": TensorSpec((32, 32, 3), torch.uint8, low=0, high=255) for i in range(cameras)}
    return spec({**pictures, **vectors, "words": WORDS, **more}, ActionSpec("continuous", size))


def make(env=None, seed=0, shake=0.0, **config):
    torch.manual_seed(seed)
    policy = pi0.build(pi0.Config(**config), env=env or env_spec(), device=CPU)
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(shake * torch.randn_like(p) * p.requires_grad)
    return policy


def observation(env, n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = {
        torch.uint8: lambda s: torch.randint(0, 256, (n, *s.shape), generator=g, dtype=torch.uint8),
        torch.int64: lambda s: torch.randint(0, int(s.high or 0) + 1, (n, *s.shape), generator=g),
        torch.float32: lambda s: torch.randn(n, *s.shape, generator=g),
    }
    return {k: made[s.dtype](s) for k, s in env.observation.items()}


def folder_of(path, seed=5):
    torch.manual_seed(seed)
    settings = transformers.AutoConfig.for_model("pi0", **pi0.TINY_PI0["pi0"])
    transformers.PI0ForConditionalGeneration(settings).save_pretrained(path)
    return str(path)


def rl_recipe(**policy):
    env, _ = lab.seen()
    policy = {"chunk": 2, "denoising_steps": 3} | policy
    return lab.recipe(policy={"type": "pi0", **policy}, env={"type": env}, collect={"copies": 6, "decisions": 4}, updates=2)


def decide(policy, obs, seed=3, greedy=False):
    out = policy.act(obs, generator=torch.Generator().manual_seed(seed), greedy=greedy)
    return [x.clone() for x in (out.units, out.logp, out.action, out.value)]


# ---- the same numbers as transformers -------------------------------------------------------------------------------


@pytest.fixture
def beside():
    """Our policy, and what transformers' own model needs for the same observation and the same words."""
    policy, obs = make(shake=0.05), observation(env_spec())
    model = policy.backbone.model
    with torch.no_grad():
        policy.backbone.words.weight.copy_(model.get_input_embeddings()(torch.arange(30)))
    ids = torch.cat([torch.full((6, 2 * 16), 31), obs["words"]], dim=1)
    pixels = torch.stack([obs["camera0"], obs["camera1"]], dim=1).permute(0, 1, 4, 2, 3) / 127.5 - 1
    state = torch.cat([obs["joints"], obs["gripper"], torch.zeros(6, ROOM - 5)], dim=1)
    theirs = {"state": state, "input_ids": ids, "pixel_values": pixels, "attention_mask": torch.ones_like(ids),
              "pixel_attention_mask": torch.ones(6, 2, dtype=torch.bool)}  # fmt: skip
    return policy, obs, model, theirs


def test_the_velocity_is_that_of_transformers(beside):
    policy, obs, model, theirs = beside
    x, t = torch.randn(6, C, WIDE), torch.rand(6)
    with torch.no_grad():
        ours, _ = policy.velocity(policy.prefix(obs), x, t)
        wanted = model(noise=x, timestep=t, **theirs).logits
    torch.testing.assert_close(ours, wanted, atol=1e-5, rtol=1e-4)


def test_greedy_actions_are_those_of_sample_actions(beside):
    policy, obs, model, theirs = beside
    wanted = model.sample_actions(noise=torch.zeros(6, C, WIDE), num_steps=policy.config.denoising_steps, **theirs)
    action = policy.act(obs, generator=None, greedy=True).action
    torch.testing.assert_close(action, wanted[..., :D].clamp(-1, 1), atol=1e-5, rtol=1e-4)


def test_the_imitation_loss_is_that_of_transformers(beside):
    policy, obs, model, theirs = beside
    action = torch.rand(6, C, D) * 2 - 1
    noise = torch.randn(6, C, WIDE, generator=torch.Generator().manual_seed(0))
    g = torch.Generator().manual_seed(0)
    torch.randn(6, C, WIDE, generator=g)
    t = torch.rand(6, generator=g) ** (1 / 1.5) * 0.999 + 0.001
    padded = torch.cat([action, torch.zeros(6, C, WIDE - D)], dim=-1)
    with torch.no_grad():
        ours = policy.imitation_loss(obs, action, {}, torch.Generator().manual_seed(0))
        wanted = model(noise=noise, timestep=t, actions=padded, **theirs).loss
    assert ours.shape == (6, C)
    torch.testing.assert_close(ours.mean(), wanted, atol=1e-5, rtol=1e-4)


def test_times_follow_pi0s_beta_distribution(monkeypatch):
    policy, drawn = make(), []
    monkeypatch.setattr(policy, "prefix", lambda obs: None)
    monkeypatch.setattr(policy, "velocity", lambda prefix, x, t: (drawn.append(t), (torch.zeros_like(x), None))[1])
    n = 20_000
    policy.imitation_loss({"joints": torch.zeros(n, 4)}, torch.zeros(n, C, D), {}, torch.Generator().manual_seed(0))
    t = (drawn[0].double() - 0.001) / 0.999
    # Beta(1.5, 1): mean a / (a + 1), variance a / ((a + 1)^2 (a + 2)).
    assert float(t.mean()) == pytest.approx(0.6, abs=5e-3)
    assert float(t.var()) == pytest.approx(1.5 / (2.5**2 * 3.5), abs=2e-3)


# ---- chains ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("settings", [{}, {"likelihood": "learned"}, {"stochastic": "one"}, {"stochastic": "last", "start": 0.5}, {"log_prob": "mean"}, {"min_std": 0.2}], ids=str)
def test_a_step_is_a_gaussian_over_what_is_executed_and_the_ode_for_the_rest(settings):
    policy, obs = make(shake=0.05, denoising_steps=3, **settings), observation(env_spec())
    out = policy.act(obs, generator=torch.Generator().manual_seed(0))
    units = out.units.clone()
    assert units.shape == (6, 1 if "stochastic" in settings else 3, C * WIDE + C * D + 1)
    prefix, numbers = policy.prefix(obs), C * D
    for i in range(units.shape[1]):
        x, after, k = units[:, i, : C * WIDE].view(6, C, WIDE), units[:, i, C * WIDE : -1], units[:, i, -1].long()
        now = 1 - k.float().view(-1, 1, 1) / 3
        velocity, hidden = policy.velocity(prefix, x, now.flatten())
        ode = x - velocity / 3
        if settings.get("likelihood") == "learned":
            share = torch.sigmoid(policy.spread(hidden))
            mean, std = ode[..., :D], (math.log(0.08) + (math.log(0.16) - math.log(0.08)) * share).exp()
        else:
            # Flow-SDE, written out: variance s^2 d t / (1 - t), the denominator shifted by a step at t = 1.
            away = torch.where(k.view(-1, 1, 1) == 0, torch.tensor(1 / 3), 1 - now)
            variance = 0.25 * now / away
            mean = (x - velocity * now) * (1 - now + 1 / 3) + (x + velocity * (1 - now)) * (now - 1 / 3 - variance / 3 / (2 * now))
            mean, std = mean[..., :D], (variance / 3).sqrt().clamp(min=settings.get("min_std", 0.08)).expand(6, C, D)
        logp = torch.distributions.Normal(mean.flatten(1), std.flatten(1)).log_prob(after).sum(1)
        torch.testing.assert_close(out.logp[:, i], logp / (numbers if "log_prob" in settings else 1), atol=1e-3, rtol=1e-4)
        if i + 1 < units.shape[1]:
            following = units[:, i + 1, : C * WIDE].view(6, C, WIDE)
            torch.testing.assert_close(following[..., :D].flatten(1), after)
            torch.testing.assert_close(following[..., D:], ode[..., D:], atol=1e-5, rtol=1e-4)


def test_a_chain_that_starts_with_less_noise_and_one_that_has_it_last():
    obs = observation(env_spec())
    seen = [make(shake=0.05, denoising_steps=3, start=start).act(obs, generator=torch.Generator().manual_seed(0)) for start in (1.0, 0.25)]
    first = [out.units[:, 0, : C * WIDE] for out in seen]
    torch.testing.assert_close(first[1], 0.25 * first[0])
    # From the middle of the noise and with noise in the last step only: a Gaussian around the greedy decision.
    policy = make(shake=0.05, denoising_steps=3, stochastic="last", start=0.0, likelihood="learned")
    drawn, greedy = (policy.act(obs, generator=torch.Generator().manual_seed(0), greedy=g) for g in (False, True))
    assert drawn.units.shape[1] == 1 and set(drawn.units[..., -1].flatten().tolist()) == {2.0}
    assert torch.equal(drawn.units[..., : C * WIDE], greedy.units[..., : C * WIDE])
    away = (drawn.units - greedy.units)[..., C * WIDE : -1]
    assert float(away.abs().min()) > 0 and 0.08 / 2 < float(away.std()) < 0.16 * 2


@pytest.mark.parametrize("settings", [{}, {"likelihood": "learned", "lora": 2}, {"stochastic": "last", "start": 0.0}, {"units": "action"}], ids=str)
def test_batches_of_any_size_give_the_same_log_probabilities(settings):
    policy, everything = make(shake=0.05, **settings), observation(env_spec(), 40)
    g = torch.Generator().manual_seed(1)
    for n in (1, 16, 17, 40):
        obs = {k: v[:n] for k, v in everything.items()}
        out = policy.act(obs, generator=g)
        for rows in torch.arange(n).split(7):
            again = policy.evaluate({k: v[rows] for k, v in obs.items()}, out.units.clone()[rows]).logp
            assert torch.equal(again, out.logp[rows])


@pytest.mark.parametrize("settings", [{}, {"likelihood": "learned"}, {"stochastic": "one"}], ids=str)
def test_units_by_action_are_the_same_chain_control_step_by_control_step(settings):
    obs = observation(env_spec())
    steps, parts = (make(shake=0.05, denoising_steps=3, units=u, **settings) for u in ("step", "action"))
    units, logp, action, _ = decide(steps, obs)
    apart, each, same, _ = decide(parts, obs)
    m = units.shape[1]
    assert torch.equal(action, same) and apart.shape == (6, C * m, WIDE + D + 1)
    table = apart.view(6, C, m, -1).transpose(1, 2)
    whole = [x.flatten(2) for x in table[..., :-1].split([WIDE, D], -1)]
    assert torch.equal(torch.cat([*whole, table[:, :, 0, -1:]], -1), units)
    torch.testing.assert_close(each.view(6, C, m).sum(1), logp)
    # Another control step's later noise changes nothing of what the first step says of this one.
    apart.view(6, C, m, -1)[:, 0, 0, WIDE:-1] += 0.1
    changed = (parts.evaluate(obs, apart).logp.detach() != each).view(6, C, m)
    assert bool(changed[:, 0, 0].all()) and int(changed.sum()) == 6


VARIANTS = [["likelihood=learned", "critic.kind=hl_gauss"], ["stochastic=one", "critic.detach=true", "chunk=2"],
            ["units=action", "log_prob=mean"], ["lora=2", "freeze=vision", "dtype=bfloat16"]]  # fmt: skip


@pytest.mark.parametrize("overrides", VARIANTS, ids=" ".join)
def test_variants_keep_the_contract(overrides):
    findings = check_policy("pi0", overrides)
    assert [f"{f.name}: {f.detail}" for f in findings if f.ok is False] == []
    assert sum(f.ok is True for f in findings) >= 10


# ---- learning -------------------------------------------------------------------------------------------------------


def test_imitation_steps_lower_the_loss_of_one_batch():
    policy, obs = make(), observation(env_spec())
    action = torch.rand(6, C, D, generator=torch.Generator().manual_seed(0)) * 2 - 1
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], 3e-3)
    losses = []
    for _ in range(20):
        loss = policy.imitation_loss(obs, action, {}, torch.Generator().manual_seed(0)).mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < 0.8 * losses[0]


@pytest.mark.parametrize("policy", [{}, {"likelihood": "learned", "stochastic": "one"}, {"lora": 2}], ids=str)
def test_reinforcement_starts_at_ratio_one_moves_weights_and_resumes_exactly(policy, tmp_path):
    recipe = rl_recipe(**policy)
    before = {n: x.clone() for n, x in build_session(recipe).policy.state_dict().items()}
    rows, state = lab.go(recipe, tmp_path / "whole")
    assert len(rows) >= 2 and {row["sync/logp_gap_mean"] for row in rows} == {0.0}
    moved = {n.removeprefix("backbone.model.") for n, x in state["policy"].items() if not torch.equal(x, before[n])}
    assert "action_out_proj.weight" in moved and any(n.startswith("embed_action_time") for n in moved)
    for part in ("model.vlm.language_model", "model.vlm.vision_tower", "model.dit"):
        inside = {n for n in moved if n.startswith(part)}
        assert inside and ("lora" not in policy or all("lora_" in n for n in inside))

    part, _ = lab.go(recipe, tmp_path / "parts", until=1)
    rest, resumed = lab.go(recipe, tmp_path / "parts", resume=True)
    assert [*part, *rest] == rows and lab.differing(resumed, state) == []


def test_demonstrations_teach_it_through_the_engine_and_it_can_be_evaluated(tmp_path):
    recipe = lab.recipe("imitation", policy={"type": "pi0", "chunk": 2}, algorithm={"lr": 1e-2, "steps": 150, "steps_per_update": 25})
    rows, state = lab.go(recipe, tmp_path / "run")
    losses = [row["actor/imitation_loss"] for row in rows]
    assert losses[-1] < 0.85 * losses[0]
    assert state["policy"]["state_std"].ne(1).all(), "vectors are normalised by the demonstrations"
    env = registry.load("env", recipe.env.type).build(recipe.env, num_envs=3, device=CPU, split="eval", seed=0)
    policy = build_session(recipe).policy
    load_weights(policy, state["policy"], "run")
    assert evaluate(policy, env, episodes=5, run_seed=0).episodes == 5


# ---- what is trained, and what a checkpoint holds -------------------------------------------------------------------


def trained(policy):
    names = {n for n, p in policy.named_parameters() if p.requires_grad}
    return {n.removeprefix("backbone.model.") for n in names if n.startswith("backbone.model.")}


def test_freeze_and_lora_choose_what_is_trained():
    everything = trained(make())
    assert not any("embed_tokens" in n for n in everything), "token embeddings are not used"
    assert trained(make(freeze="vision")) == {n for n in everything if "vision_tower" not in n and "projector" not in n}
    assert trained(make(freeze="all")) == {n for n in everything if "vlm" not in n}
    projections = {n for n in everything if n.startswith(("embed_action_time", "action_out_proj"))}
    adapters = trained(make(freeze="vision", lora=2)) - projections
    assert all("lora_" in n for n in adapters) and projections < trained(make(lora=2))
    assert {n.split(".")[1] for n in adapters} == {"dit", "vlm"}
    # Without a critic nothing reads PaliGemma's last layer behind its keys and values.
    for critic in ({"kind": "none"}, {"detach": True}):
        spared = everything - trained(make(critic=critic))
        assert spared and all(n.startswith("model.vlm.language_model.") for n in spared)


@pytest.mark.parametrize("settings", [{"lora": 2}, {"freeze": "all"}], ids=str)
def test_frozen_weights_of_a_folder_stay_out_of_checkpoints(settings, tmp_path):
    folder = folder_of(tmp_path / "model")
    policy, obs = make(model=folder, shake=0.05, **settings), observation(env_spec())
    own = transformers.PI0ForConditionalGeneration.from_pretrained(folder).model.vlm.language_model.layers[0].mlp.up_proj.weight
    layer = policy.backbone.vlm.language_model.layers[0].mlp.up_proj
    assert torch.equal(layer.base_layer.weight if "lora" in settings else layer.weight, own)
    frozen = {n for n, p in policy.named_parameters() if not p.requires_grad}
    assert frozen and not frozen & policy.state_dict().keys()
    path = checkpoint.save(tmp_path / "checkpoints", {"policy": dict(policy.state_dict())}, update=1, keep=1)
    other = make(seed=9, model=folder, **settings)
    load_weights(other, checkpoint.load(path)["policy"], "there")
    for greedy in (False, True):
        assert all(map(torch.equal, decide(policy, obs, greedy=greedy), decide(other, obs, greedy=greedy)))
    foreign = make(model=folder_of(tmp_path / "foreign", seed=6), **settings)
    with pytest.raises(CheckpointError, match=r"frozen weights of policy.model '.*foreign' are not those"):
        load_weights(foreign, checkpoint.load(path)["policy"], "there")


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_models_chunks_and_envs_that_do_not_fit(tmp_path):
    (tmp_path / "empty").mkdir()
    other = transformers.AutoConfig.for_model("paligemma", **pi0.TINY["paligemma"])
    transformers.PaliGemmaModel(other).save_pretrained(tmp_path / "other")
    vector = {"joints": TensorSpec((13,))}
    cases = [
        (NotFoundError, "policy.model '/nowhere': no such folder; models are never downloaded", None, {"model": "/nowhere"}),
        (NotFoundError, "there is no such tiny model; known: tiny:pi0", None, {"model": "tiny:paligemma"}),
        (NotFoundError, "the folder holds no config.json (found nothing)", None, {"model": f"{tmp_path}/empty"}),
        (CapabilityError, "other' is a PaliGemmaModel, not pi0: use hf_vla", None, {"model": f"{tmp_path}/other"}),
        (CapabilityError, "policy.chunk (5) is longer than the 4 steps (chunk_size) of policy.model 'tiny:pi0': set chunk: 4, or null", None, {"chunk": 5}),
        (CapabilityError, "this env's actions have 9 numbers, policy.model 'tiny:pi0' has room for 8 (max_action_dim)", env_spec(size=9), {}),
        (CapabilityError, "this env's vectors (joints) have 13 numbers, policy.model 'tiny:pi0' has room for 12", env_spec(vectors=vector), {}),
        (CapabilityError, "policy pi0 cannot read observation 'slots'", env_spec(slots=TensorSpec((3, 9))), {}),
        (CapabilityError, "a vision-language model needs a picture", env_spec(cameras=0), {}),
        (CapabilityError, "policy pi0 moves continuous actions", spec(env_spec().observation, ActionSpec("discrete", 4)), {}),
    ]
    for error, message, env, config in cases:
        with pytest.raises(error, match=re.escape(message)) as caught:
            make(env, **config)
        assert "\n" not in str(caught.value)


def test_an_env_without_vectors_or_words():
    pictures = {k: v for k, v in env_spec().observation.items() if k.startswith("camera")}
    env = spec(pictures, ActionSpec("continuous", 2))
    policy = make(env)
    assert policy.act(observation(env), generator=None).action.shape == (6, C, 2)
    assert "embed_action_time.state_proj.weight" not in trained(policy)


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"min_std": 0.2, "likelihood": "learned"}, "min_std (0.2) must be below max_std (0.16)"),
        ({"noise": 0.3, "likelihood": "learned"}, "noise (0.3) does nothing with likelihood (learned)"),
        ({"max_std": 0.3}, "max_std (0.3) does nothing with likelihood (sde)"),
        ({"min_std": 0.3, "max_std": 0.3, "likelihood": "learned"}, "min_std (0.3) must be below max_std (0.3)"),
        ({"lora": 2, "freeze": "all"}, "lora (2) adapts nothing with freeze (all): set freeze: vision, or lora: 0"),
    ],
)
def test_settings_that_do_not_fit(setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        rl_recipe(**setting)
