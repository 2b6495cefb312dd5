"""Wrapped models read instructions as their own tokens: what enters them, what is learned, checkpoints and errors."""

import json
import logging
import re
from dataclasses import replace

import pytest
import torch

from embodied_rl import checkpoint, registry
from embodied_rl.envs._joined import _observation
from embodied_rl.envs._words import encode_words, unambiguous, word_id, word_row
from embodied_rl.errors import CapabilityError, CheckpointError, NotFoundError
from embodied_rl.saved import load_weights
from embodied_rl.types import FEATURES, ActionSpec, TensorSpec
from tests.kit import CPU, spec

transformers = pytest.importorskip("transformers")

LENGTH = 6
TOLD = ("push the red cube", "push the blue cube", "push the zebra")
MERGES = "▁+t ▁t+h ▁th+e ▁+r ▁r+e ▁re+d ▁+c ▁c+u b+e ▁+p ▁p+u s+h ▁pu+sh"
"""▁push, ▁the and ▁red are tokens, "▁cu be" and "▁ b l u e" are words of several, and z is unknown."""
KINDS = {"paligemma": "hf_vla", "smolvlm": "hf_vla", "qwen3_vl": "hf_vla", "pi0": "pi0"}


def tokenizer_into(folder, without="z"):
    from tokenizers import Tokenizer, models, pre_tokenizers

    merges = [tuple(pair.split("+")) for pair in MERGES.split()]
    pieces = ["<unk>", *sorted(set("▁pushtheredcubelgo") - {without}), *map("".join, merges)]
    model = models.BPE({piece: i for i, piece in enumerate(pieces)}, merges, unk_token="<unk>")
    tokenizer = Tokenizer(model)
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first")
    fast = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")
    fast.save_pretrained(folder)
    return fast


@pytest.fixture(scope="module", params=KINDS)
def folder(request, tmp_path_factory):
    """A tiny model with a tokenizer: its kind, folder and tokenizer; read only."""
    return made(request.param, tmp_path_factory.mktemp(request.param))


def made(kind, path):
    module = registry.load("policy", KINDS[kind])
    torch.manual_seed(5)
    tiny = module.open_model(module.Config(model=f"tiny:{kind}"), module.TINY_PI0 if kind == "pi0" else module.TINY)
    tiny.save_pretrained(path)
    return kind, str(path), tokenizer_into(path)


def env_spec(told=TOLD):
    picture = TensorSpec((32, 32, 3), torch.uint8, low=0, high=255)
    seen = {"camera": picture, "joints": TensorSpec((4,)), "instruction": word_row(LENGTH, told)}
    return spec(seen, ActionSpec("continuous", 3))


def make(kind, path, told=TOLD, seed=0, **config):
    module = registry.load("policy", KINDS[kind])
    small = {"denoising_steps": 2} if kind == "pi0" else {"width": 16, "heads": 2, "layers": 1}
    torch.manual_seed(seed)
    return module.build(module.Config(model=path, chunk=2, **small, **config), env=env_spec(told), device=CPU)


def backbone_of(policy):
    return policy.backbone if hasattr(policy, "backbone") else policy.trunk.backbone


def observation(*texts, seed=0):
    g = torch.Generator().manual_seed(seed)
    n = len(texts)
    ids = torch.tensor([encode_words(text, LENGTH, "a test", "") for text in texts])
    return {"camera": torch.randint(0, 256, (n, 32, 32, 3), generator=g, dtype=torch.uint8),
            "joints": torch.randn(n, 4, generator=g), "instruction": ids}  # fmt: skip


def entering(policy, *texts):
    """What the language model reads behind the pictures, [N, S, width]."""
    backbone, obs = backbone_of(policy), observation(*texts)
    with torch.no_grad():
        return backbone.embed(obs)[0][:, backbone.see(obs).shape[2] :]


def own(policy, ids):
    return backbone_of(policy).vlm.get_input_embeddings()(torch.tensor(ids)).detach()


def learned(policy, word=None):
    return backbone_of(policy).words.weight[word_id(word) if word else 0].detach()


def decide(policy, obs, seed=3):
    out = policy.act(obs, generator=torch.Generator().manual_seed(seed))
    return [x.clone() for x in (out.units, out.logp, out.action, out.value)]


# ---- what enters the model -------------------------------------------------------------------------------------------


def test_a_sentence_is_the_models_own_embeddings_of_its_tokens_and_then_padding(folder):
    kind, path, tokenizer = folder
    policy = make(kind, path)
    ids = tokenizer.encode(TOLD[0], add_special_tokens=False)
    assert tokenizer.convert_ids_to_tokens(ids) == ["▁push", "▁the", "▁red", "▁cu", "be"]
    (found,) = entering(policy, TOLD[0])
    assert len(found) == LENGTH * 5, "blue has five tokens, and any word might be as long"
    assert torch.equal(found[:5], own(policy, ids))
    assert torch.equal(found[5:], learned(policy).expand(LENGTH * 5 - 5, -1))


def test_two_sentences_that_differ_in_a_word_differ_there_only(folder):
    kind, path, tokenizer = folder
    red, blue = entering(make(kind, path), *TOLD[:2])
    assert torch.equal(red[:2], blue[:2]) and torch.equal(red[3:5], blue[7:9])
    assert not any(torch.equal(red[2], row) for row in blue)
    assert torch.equal(blue[:9], own(make(kind, path), tokenizer.encode(TOLD[1], add_special_tokens=False)))
    assert torch.equal(red[9:], blue[9:])


def test_words_that_tokenizer_or_env_do_not_know_are_learned_in_their_place(folder):
    kind, path, tokenizer = folder
    policy = make(kind, path)
    the, red = (tokenizer.convert_tokens_to_ids(word) for word in ("▁the", "▁red"))
    for unknown in ("zebra", "grasp"):  # told and <unk> to the tokenizer; not told
        (found,) = entering(policy, f"the {unknown} red")
        assert torch.equal(found[:3], torch.stack([*own(policy, [the]), learned(policy, unknown), *own(policy, [red])]))
        assert torch.equal(found[3], learned(policy))


@pytest.mark.parametrize(
    ("told", "config", "message"),
    [
        (TOLD, {}, "5 words are read as the model's own tokens, at most 5 each; others are learned"),
        ((), {}, "all words have learned embeddings (the env does not tell its words beforehand)"),
        (TOLD, {"words": "learned"}, "all words have learned embeddings, because policy.words says so"),
    ],
)
def test_the_log_says_how_words_are_read_and_learned_ones_stay_as_they_were(told, config, message, tmp_path, caplog):
    kind, path, _ = made("smolvlm", tmp_path)
    with caplog.at_level(logging.INFO):
        policy = make(kind, path, told, **config)
    assert [r.message for r in caplog.records if "words" in r.message] == [f"policy.model '{path}': {message}"]
    if config or not told:
        found = entering(policy, TOLD[0])
        assert torch.equal(found, backbone_of(policy).words(observation(TOLD[0])["instruction"]))


# ---- learning ---------------------------------------------------------------------------------------------------------

LEARNERS = [("paligemma", {"head": "flow", "freeze": "vision", "lora": 2}), ("smolvlm", {}),
            ("qwen3_vl", {"freeze": "all", "dtype": "bfloat16"}), ("pi0", {"freeze": "vision", "encode_once": True})]  # fmt: skip


@pytest.mark.parametrize(("kind", "config"), LEARNERS, ids=str)
def test_sampling_and_training_agree_while_it_learns_and_the_models_words_stay(kind, config, tmp_path):
    policy = make(*made(kind, tmp_path)[:2], **config)
    obs = observation(*TOLD, "grasp the cube")
    parameters = {n: p for n, p in policy.named_parameters() if p.requires_grad}
    before = {n: p.detach().clone() for n, p in policy.named_parameters()}
    optimizer = torch.optim.SGD(parameters.values(), 1e-3)
    for seed in range(3):
        out = policy.act(obs, generator=torch.Generator().manual_seed(seed))
        seen = obs if out.features is None else obs | {FEATURES: out.features.clone()}
        logp = policy.evaluate(seen, out.units.clone()).logp
        assert torch.equal(logp, out.logp)
        optimizer.zero_grad()
        (-logp.mean() / logp.detach().abs().mean()).backward()
        optimizer.step()
    moved = {n for n, p in policy.named_parameters() if not torch.equal(p, before[n])}
    assert any(n.endswith("words.weight") for n in moved) and len(moved) > 5
    assert not any("embed_tokens" in n for n in (*parameters, *moved))


# ---- checkpoints ------------------------------------------------------------------------------------------------------


def test_a_checkpoint_keeps_the_words_that_another_env_does_not_tell(folder, tmp_path):
    kind, path, tokenizer = folder
    policy, obs = make(kind, path), observation(*TOLD)
    saved = checkpoint.save(tmp_path, {"policy": dict(policy.state_dict())}, update=1, keep=1)
    weights = checkpoint.load(saved)["policy"]
    for told in (TOLD, ()):
        other = make(kind, path, told, seed=9)
        assert not all(map(torch.equal, decide(policy, obs), decide(other, obs)))
        load_weights(other, weights, "there")
        assert all(map(torch.equal, decide(policy, obs), decide(other, obs)))
    other = make(kind, path, ("go",), seed=9)
    load_weights(other, weights, "there")
    ids = tokenizer.encode("push the blue cube go", add_special_tokens=False)
    assert torch.equal(entering(other, "push the blue cube go")[0, : len(ids)], own(other, ids))


def test_another_tokenizer_is_refused(tmp_path):
    kind, path, _ = made("smolvlm", tmp_path)
    policy = make(kind, path)
    tokenizer_into(path, without="g")
    with pytest.raises(CheckpointError, match=r"frozen weights of .* not those that this checkpoint was trained on, or its tokenizer is"):
        load_weights(make(kind, path), policy.state_dict(), "there")


# ---- what envs tell, and errors ---------------------------------------------------------------------------------------


def test_words_that_share_an_id_are_not_told():
    assert unambiguous([(5, "b"), (3, "a"), (5, "c"), (3, "a")]) == ((3, "a"),)
    assert word_row(4, ["Push the CUBE!", "push"]).texts == tuple(sorted((word_id(w), w) for w in ("push", "the", "cube")))


def test_the_tabletop_tells_every_word_of_its_instructions():
    from embodied_rl.envs.tabletop.instructions import TEMPLATES, describe
    from embodied_rl.envs.tabletop.observe import OBSERVATION

    told = dict(OBSERVATION["instruction"].texts)
    nouns = [describe(slot, [0, 1, 2], ("both",), 0.0) for slot in range(3)] + ["object", "yellow", "purple", "orange"]
    texts = [t.format(a=n, b=n) for kind in TEMPLATES.values() for split in kind.values() for t in split for n in nouns]
    assert {word for text in texts for word in text.split()} == set(told.values())
    assert all(told[word_id(word)] == word for word in told.values())


def test_a_mixture_tells_the_words_of_all_its_parts():
    mixture = registry.load("env", "mixture")
    config = mixture.Config(parts=[{"env": {"type": "a"}}, {"env": {"type": "b"}}])
    rows = [{"instruction": word_row(4, [text])} for text in ("push it", "pull it")]
    rows.append({"instruction": replace(word_row(4), texts=((word_id("pull"), "other"),))})
    for n, words in ((2, {"push", "pull", "it"}), (3, {"push", "it"})):
        joined = _observation(config, ["a", "b", "c"][:n], rows[:n], [])
        assert {word for _, word in joined["instruction"].texts} == words


def test_tokenizers_that_do_not_fit(tmp_path):
    kind, path, _ = made("smolvlm", tmp_path)
    file = tmp_path / "tokenizer.json"
    data = json.loads(file.read_text())
    data["model"]["vocab"]["▁red"] = 400
    file.write_text(json.dumps(data))
    with pytest.raises(CapabilityError, match=re.escape(f"policy.model '{path}': its tokenizer has a token 400 and the model knows 32")):
        make(kind, path)
    file.write_text("{")
    with pytest.raises(NotFoundError, match=r"transformers cannot read its tokenizer \(.+\); mend it, or set policy.words: learned"):
        make(kind, path)
    make(kind, path, words="learned")
    with pytest.raises(CapabilityError, match=r"words \(learned\) does nothing with policy.model 'tiny:smolvlm', which has no tokenizer"):
        make(kind, "tiny:smolvlm", words="learned")
