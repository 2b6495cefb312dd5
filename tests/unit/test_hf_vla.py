"""Wrapped vision-language models: what they compute, what is trained of them, what a checkpoint holds, and errors."""

import copy
import re

import numpy as np
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
hf_vla = registry.load("policy", "hf_vla")

MODELS = ("paligemma", "smolvlm", "qwen3_vl")
WORDS = TensorSpec((5,), torch.int64, low=0, high=29, constant=True)
WHOLE = {"paligemma": "PaliGemmaForConditionalGeneration", "smolvlm": "SmolVLMForConditionalGeneration",
         "qwen3_vl": "Qwen3VLForConditionalGeneration"}  # fmt: skip


def env_spec(cameras=1, side=(32, 32), size=3, **more):
    pictures = {f"camera{i}": TensorSpec((*side, 3), torch.uint8, low=0, high=255) for i in range(cameras)}
    return spec({**pictures, "joints": TensorSpec((4,)), "words": WORDS, **more}, ActionSpec("continuous", size))


def make(env=None, seed=0, **config):
    torch.manual_seed(seed)
    return hf_vla.build(hf_vla.Config(**config), env=env or env_spec(), device=CPU)


def observation(env, n=6, seed=0):
    g = torch.Generator().manual_seed(seed)
    made = {
        torch.uint8: lambda s: torch.randint(0, 256, (n, *s.shape), generator=g, dtype=torch.uint8),
        torch.int64: lambda s: torch.randint(0, int(s.high or 0) + 1, (n, *s.shape), generator=g),
        torch.float32: lambda s: torch.randn(n, *s.shape, generator=g),
    }
    return {k: made[s.dtype](s) for k, s in env.observation.items()}


def folder_of(kind, path, seed=5):
    """A tiny model with its language head, saved as a user has it."""
    torch.manual_seed(seed)
    settings = transformers.AutoConfig.for_model(kind, **hf_vla.TINY[kind])
    getattr(transformers, WHOLE[kind])(settings).save_pretrained(path)
    return str(path)


def rl_recipe(model, **policy):
    env, _ = lab.seen()
    chunk = {"chunk": 2} | policy
    return lab.recipe(
        policy={"type": "hf_vla", "model": model, "width": 16, "heads": 2, "layers": 1, **chunk}, env={"type": env},
        collect={"copies": 6, "decisions": 4}, updates=2,
    )  # fmt: skip


def decide(policy, obs, seed=3):
    out = policy.act(obs, generator=torch.Generator().manual_seed(seed))
    return [x.clone() for x in (out.units, out.logp, out.action, out.value)]


# ---- what is computed -----------------------------------------------------------------------------------------------


def processed(kind, pictures):
    """Pixels by transformers' own image processors; pictures [N, P, H, W, 3]."""
    n, p = pictures.shape[:2]
    images = [np.asarray(x) for x in pictures.flatten(0, 1)]
    if kind == "qwen3_vl":
        from transformers.models.qwen2_vl.image_processing_pil_qwen2_vl import Qwen2VLImageProcessorPil

        half = [0.5, 0.5, 0.5]
        made = Qwen2VLImageProcessorPil(patch_size=8, merge_size=2, do_resize=False, image_mean=half, image_std=half)
        return dict(made(images, return_tensors="pt"))
    from transformers.models.siglip.image_processing_pil_siglip import SiglipImageProcessorPil

    pixels = SiglipImageProcessorPil(size={"height": 32, "width": 32})(images, return_tensors="pt")["pixel_values"]
    return {"pixel_values": pixels.view(n, p, *pixels.shape[1:]) if kind == "smolvlm" else pixels}


@pytest.mark.parametrize("kind", MODELS)
def test_hidden_states_are_those_that_transformers_computes_from_placeholders_and_processed_pictures(kind):
    env = env_spec(cameras=1 if kind == "qwen3_vl" else 2)
    policy, obs = make(env, model=f"tiny:{kind}"), observation(env)
    backbone = policy.trunk.backbone
    vlm = backbone.vlm
    with torch.no_grad():
        for p in vlm.parameters():  # tidy initial values would hide mistakes
            p.add_(0.05 * torch.randn_like(p))
        backbone.words.weight.copy_(vlm.get_input_embeddings()(torch.arange(30)))
        ours = backbone(obs)
        pictures = torch.stack([v for k, v in obs.items() if k.startswith("camera")], dim=1)
        places = ours.shape[1] - obs["words"].shape[1]
        ids = torch.cat([torch.full((6, places), 31), obs["words"]], dim=1)
        more = {
            "paligemma": {"token_type_ids": torch.zeros_like(ids)},
            "smolvlm": {},
            "qwen3_vl": {"mm_token_type_ids": (ids == 31).int()},
        }[kind]
        theirs = vlm(input_ids=ids, **processed(kind, pictures), **more).last_hidden_state
    torch.testing.assert_close(ours, theirs, atol=2e-5, rtol=1e-4)


def test_a_second_camera_of_qwen_lies_behind_the_first():
    env = env_spec(cameras=2)
    policy, obs = make(env, model="tiny:qwen3_vl"), observation(env)
    _, more = policy.trunk.backbone.embed(obs)
    # 32 x 32 pixels are 4 x 4 patches, merged to 2 x 2 tokens: each camera takes two places along its sides.
    assert more["position_ids"][:, 0].tolist() == [
        [0, 0, 0, 0, 2, 2, 2, 2, 4, 5, 6, 7, 8],
        [0, 0, 1, 1, 2, 2, 3, 3, 4, 5, 6, 7, 8],
        [0, 1, 0, 1, 2, 3, 2, 3, 4, 5, 6, 7, 8],
    ]
    swapped = {**obs, "camera0": obs["camera1"], "camera1": obs["camera0"]}
    with torch.no_grad():
        assert not torch.allclose(policy.trunk.backbone(obs), policy.trunk.backbone(swapped), atol=1e-4)


def test_pictures_of_another_size_are_resized_as_the_image_processor_does_it():
    env = env_spec(side=(24, 40))
    obs = observation(env)
    blurred = torch.nn.functional.avg_pool2d(obs["camera0"].permute(0, 3, 1, 2).float(), 5, 1, 2)
    obs["camera0"] = blurred.permute(0, 2, 3, 1).to(torch.uint8)
    ours = make(env).trunk.backbone.look(obs)[0]
    theirs = processed("paligemma", obs["camera0"].unsqueeze(1))["pixel_values"]
    assert ours.shape == (6, 3, 32, 32)
    assert float((ours - theirs).abs().max()) <= 2 / 255 / 0.5, "Pillow rounds to whole numbers after each axis"


def test_a_folders_own_means_are_used(tmp_path):
    folder = folder_of("paligemma", tmp_path)
    (tmp_path / "preprocessor_config.json").write_text('{"image_mean": [0.4, 0.5, 0.6], "image_std": [0.2, 0.25, 0.5]}')
    obs = observation(env_spec())
    seen = make(model=folder).trunk.backbone.look(obs)[0]
    x = obs["camera0"].permute(0, 3, 1, 2) / 255
    torch.testing.assert_close(seen[:, 2], (x[:, 2] - 0.6) / 0.5)


@pytest.mark.parametrize("kind", MODELS)
def test_a_folder_with_a_language_head_gives_its_weights(kind, tmp_path):
    policy = make(model=folder_of(kind, tmp_path))
    torch.manual_seed(5)
    whole = getattr(transformers, WHOLE[kind])(transformers.AutoConfig.for_model(kind, **hf_vla.TINY[kind])).model
    own = dict(policy.trunk.backbone.model.named_parameters())
    assert own.keys() == dict(whole.named_parameters()).keys()
    assert all(torch.equal(own[n], p) for n, p in whole.named_parameters())


# ---- the contract ---------------------------------------------------------------------------------------------------

VARIANTS = [
    ["model=tiny:smolvlm", "head=flow", "likelihood=learned"],
    ["model=tiny:qwen3_vl", "decoding=autoregressive", "critic.kind=hl_gauss"],
    ["model=tiny:paligemma", "head=flow", "lora=2", "freeze=vision"],
    ["model=tiny:paligemma", "head=flow", "likelihood=latent"],
    ["model=tiny:smolvlm", "dtype=bfloat16", "freeze=all", "critic.kind=none"],
]


@pytest.mark.parametrize("overrides", VARIANTS, ids=" ".join)
def test_variants_keep_the_contract(overrides):
    findings = check_policy("hf_vla", ["width=32", "layers=1", *overrides])
    assert [f"{f.name}: {f.detail}" for f in findings if f.ok is False] == []
    assert sum(f.ok is True for f in findings) >= 10


@pytest.mark.parametrize("kind", MODELS)
def test_batches_of_any_size_give_the_same_log_probabilities(kind):
    policy, everything = make(model=f"tiny:{kind}"), observation(env_spec(), 40)
    g = torch.Generator().manual_seed(1)
    for n in (1, 16, 17, 40):
        obs = {k: v[:n] for k, v in everything.items()}
        out = policy.act(obs, generator=g)
        for rows in torch.arange(n).split(7):
            again = policy.evaluate({k: v[rows] for k, v in obs.items()}, out.units.clone()[rows]).logp
            assert torch.equal(again, out.logp[rows])


# ---- learning -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("head", ["tokens", "flow"])
@pytest.mark.parametrize("kind", MODELS)
def test_imitation_steps_lower_the_loss_of_one_batch(kind, head):
    env = env_spec()
    policy, obs = make(env, model=f"tiny:{kind}", head=head), observation(env)
    action = torch.rand(6, 4, 3, generator=torch.Generator().manual_seed(0)) * 2 - 1
    optimizer = torch.optim.Adam([p for p in policy.parameters() if p.requires_grad], 3e-3)

    def loss():
        return policy.imitation_loss(obs, action, {"joints": obs["joints"]}, torch.Generator().manual_seed(0)).mean()

    first = float(loss().detach())
    for _ in range(20):
        optimizer.zero_grad()
        loss().backward()
        optimizer.step()
    assert float(loss().detach()) < 0.9 * first


@pytest.mark.parametrize(
    ("kind", "policy"),
    [("paligemma", {"head": "flow"}), ("smolvlm", {}), ("qwen3_vl", {"head": "flow", "lora": 2}), ("smolvlm", {"lora": 2})],
    ids=lambda x: x if isinstance(x, str) else " ".join(map(str, x.values())) or "tokens",
)
def test_reinforcement_starts_at_ratio_one_moves_weights_and_resumes_exactly(kind, policy, tmp_path):
    recipe = rl_recipe(f"tiny:{kind}", **policy)
    before = {n: x.clone() for n, x in build_session(recipe).policy.state_dict().items()}
    rows, state = lab.go(recipe, tmp_path / "whole")
    assert len(rows) >= 2 and {row["sync/logp_gap_mean"] for row in rows} == {0.0}
    moved = {n for n, x in state["policy"].items() if not torch.equal(x, before[n])}
    inside = {n for n in moved if n.startswith("trunk.backbone.model.")}
    assert any(n.startswith("head.") for n in moved) and "trunk.backbone.words.weight" in moved and inside
    if "lora" in policy:
        assert all("lora_" in n for n in inside), "an adapter leaves the model's own weights alone"

    part, _ = lab.go(recipe, tmp_path / "parts", until=1)
    rest, resumed = lab.go(recipe, tmp_path / "parts", resume=True)
    assert [*part, *rest] == rows and lab.differing(resumed, state) == []


def test_demonstrations_teach_it_through_the_engine_and_it_can_be_evaluated(tmp_path):
    policy = {"type": "hf_vla", "model": "tiny:smolvlm", "width": 16, "heads": 2, "chunk": 2}
    recipe = lab.recipe("imitation", policy=policy, algorithm={"lr": 3e-3})
    rows, state = lab.go(recipe, tmp_path / "run")
    losses = [row["actor/imitation_loss"] for row in rows]
    assert losses[-1] < 0.9 * losses[0]
    env = registry.load("env", recipe.env.type).build(recipe.env, num_envs=3, device=CPU, split="eval", seed=0)
    policy = build_session(recipe).policy
    load_weights(policy, state["policy"], "run")
    assert evaluate(policy, env, episodes=5, run_seed=0).episodes == 5


# ---- what is trained, and what a checkpoint holds -------------------------------------------------------------------


def trained(policy):
    return {n.removeprefix("trunk.backbone.") for n, p in policy.named_parameters() if p.requires_grad and "backbone" in n}


@pytest.mark.parametrize("kind", MODELS)
def test_freeze_and_lora_choose_what_is_trained(kind):
    language = {"paligemma": "model.language_model", "smolvlm": "model.text_model", "qwen3_vl": "model.language_model"}[kind]
    everything = trained(make(model=f"tiny:{kind}"))
    assert any(not n.startswith((language, "words")) for n in everything)
    assert not any("embed_tokens" in n for n in everything), "token embeddings are not used"
    behind = {n for n in everything if n.startswith((language, "words"))}
    assert trained(make(model=f"tiny:{kind}", freeze="vision")) == behind
    assert trained(make(model=f"tiny:{kind}", freeze="all")) == {"words.weight"}
    adapters = trained(make(model=f"tiny:{kind}", freeze="vision", lora=2)) - {"words.weight"}
    # Two matrices at each of the seven linear layers of both blocks.
    assert len(adapters) == 2 * 7 * 2 and all("lora_" in n and n.startswith(language) for n in adapters)


def test_adapters_begin_as_nothing():
    obs = observation(env_spec())
    plain, adapted = make(), make(lora=2)
    names = {n.replace(".base_layer", ""): p for n, p in adapted.trunk.backbone.model.named_parameters()}
    with torch.no_grad():
        for n, p in plain.trunk.backbone.model.named_parameters():
            p.copy_(names[n])
        plain.trunk.backbone.words.weight.copy_(adapted.trunk.backbone.words.weight)
        assert torch.equal(plain.trunk.backbone(obs), adapted.trunk.backbone(obs))


def test_bfloat16_is_for_what_is_frozen():
    policy = make(dtype="bfloat16", freeze="vision")
    found = {(p.requires_grad, p.ndim > 1, p.dtype) for n, p in policy.named_parameters() if "backbone.model" in n}
    assert found == {(True, True, torch.float32), (True, False, torch.float32), (False, True, torch.bfloat16), (False, False, torch.float32)}


def test_a_copy_decides_the_same_and_does_not_share_weights():
    policy, obs = make(lora=2, head="flow"), observation(env_spec())
    twin, before = copy.deepcopy(policy), decide(policy, obs)
    assert all(map(torch.equal, before, decide(twin, obs)))
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.1)
    assert all(map(torch.equal, before, decide(twin, obs)))


@pytest.mark.parametrize("settings", [{"lora": 2}, {"freeze": "vision"}, {"freeze": "none"}], ids=str)
def test_frozen_weights_of_a_folder_stay_out_of_checkpoints(settings, tmp_path):
    folder = folder_of("smolvlm", tmp_path / "model")
    policy, obs = make(model=folder, **settings), observation(env_spec())
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(0.05 * torch.randn_like(p) * p.requires_grad)
    state = policy.state_dict()
    frozen = {n for n, p in policy.named_parameters() if not p.requires_grad and "backbone" in n}
    assert frozen and not frozen & state.keys()
    path = checkpoint.save(tmp_path / "checkpoints", {"policy": dict(state)}, update=1, keep=1)
    other = make(seed=9, model=folder, **settings)
    load_weights(other, checkpoint.load(path)["policy"], "there")
    assert all(map(torch.equal, decide(policy, obs), decide(other, obs)))

    foreign = make(model=folder_of("smolvlm", tmp_path / "foreign", seed=6), **settings)
    with pytest.raises(CheckpointError, match=r"frozen weights of policy.model '.*foreign' are not those that this checkpoint was"):
        load_weights(foreign, checkpoint.load(path)["policy"], "there")


# ---- errors ---------------------------------------------------------------------------------------------------------


def test_models_that_cannot_be_had(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "bare").mkdir()
    (tmp_path / "bare" / "config.json").write_text('{"model_type": "paligemma"}')
    (tmp_path / "alien").mkdir()
    (tmp_path / "alien" / "config.json").write_text('{"model_type": "openvla"}')
    text = transformers.LlamaModel(transformers.LlamaConfig(vocab_size=32, hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2))
    text.save_pretrained(tmp_path / "text")
    for model, message in {
        "tiny:gpt": "policy.model 'tiny:gpt': there is no such tiny model; known: tiny:paligemma or tiny:smolvlm or tiny:qwen3_vl",
        "/nowhere": "policy.model '/nowhere': no such folder; models are never downloaded: give a folder that holds config.json and safetensors weights, or tiny:paligemma",
        f"{tmp_path}/empty": "the folder holds no config.json (found nothing); save_pretrained writes one",
        f"{tmp_path}/bare": "cannot load it",
        f"{tmp_path}/alien": "cannot load it",
    }.items():
        with pytest.raises(NotFoundError, match=re.escape(message)) as caught:
            make(model=model)
        assert "\n" not in str(caught.value)
    with pytest.raises(CapabilityError, match="text' is a LlamaModel, which reads no pictures"):
        make(model=f"{tmp_path}/text")


def test_a_folder_that_lacks_weights_is_refused(tmp_path):
    from safetensors.torch import load_file, save_file

    file = f"{folder_of('paligemma', tmp_path)}/model.safetensors"
    weights = {n: x for n, x in load_file(file).items() if "layers.1" not in n}
    save_file(weights, file, metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"the folder lacks \d+ weights of its config.json \(.*layers.1.*give the whole model"):
        make(model=str(tmp_path))


def test_envs_that_do_not_fit():
    for env, message in {
        "no picture": (spec({"joints": TensorSpec((4,))}, ActionSpec("continuous", 2)), "needs a picture"),
        "discrete": (spec(env_spec().observation, ActionSpec("discrete", 4)), "moves continuous actions"),
        "slots": (env_spec(slots=TensorSpec((3, 9))), "cannot read observation 'slots'"),
    }.values():
        with pytest.raises(CapabilityError, match=message):
            make(env)
    with pytest.raises(CapabilityError, match=r"image_size \(20\) must be a multiple of 8"):
        make(image_size=20)
    with pytest.raises(CapabilityError, match="'tiny:paligemma' .paligemma. cannot be run on pictures of 64 x 64 pixels"):
        make(image_size=64)
    assert make(model="tiny:smolvlm", image_size=16).trunk.backbone.look(observation(env_spec()))[0].shape == (6, 3, 16, 16)
    assert make(env_spec(side=(20, 40)), model="tiny:qwen3_vl").trunk.backbone.sizes == {"camera0": (32, 48)}


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"lora": 2, "freeze": "all"}, "lora (2) adapts nothing with freeze (all): set freeze: vision, or lora: 0"),
        ({"encode_once": True}, "encode_once (true) needs a vision part that stays as it is: set freeze: vision or all"),
        ({"encode_once": True, "freeze": "all", "head": "flow", "likelihood": "latent"}, "encode_once (true) does nothing with likelihood (latent)"),
        ({"encode_once": True, "freeze": "all", "head": "flow", "likelihood": "latent", "critic": {"reads": "privileged"}},
         "encode_once (true) does nothing with likelihood (latent)"),
        ({"foresight_reads": "summary"}, "foresight_reads (summary) does nothing with hf_vla, whose foresight reads the summary either way"),
        ({"glances": 4}, "glances (4) is of a picture encoder that the wrapped model replaces: remove it"),
        ({"noise": 0.3}, "noise (0.3) does nothing with head (tokens): remove it, or change head"),
        ({"head": "flow", "bins": 16}, "bins (16) does nothing with head (flow): remove it, or change head"),
        ({"chunk": 0}, "policy.chunk: expected greater than or equal to 1, got 0"),
        ({"dtype": "float16"}, "dtype"),
    ],
)
def test_settings_that_do_not_fit(setting, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        rl_recipe("tiny:paligemma", **setting)
