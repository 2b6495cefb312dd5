"""The language model policy: what it writes and what it says of it, against transformers itself."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
import transformers

from embodied_rl.errors import CapabilityError, NotFoundError, ShapeError
from embodied_rl.policies import causal_lm
from embodied_rl.policies.causal_lm import decode, head, pack
from embodied_rl.policies.causal_lm.product import product
from embodied_rl.types import PAD
from tests.toys import echo
from tests.toys.tiny_lm import tiny_lm

CPU = torch.device("cpu")
OTHERS = {
    "gpt2": dict(n_embd=64, n_layer=2, n_head=4, n_positions=128),
    "qwen2": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
    "qwen3": dict(hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=1, head_dim=16),
}


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("models") / "llama")


def other(folder: Path, kind: str) -> Path:
    """A model of another family with the same tokenizer."""
    tiny_lm(folder)
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    torch.manual_seed(1)
    config = transformers.AutoConfig.for_model(kind, vocab_size=size, **OTHERS[kind])
    transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return folder


def make(folder: Path, **settings):
    """A policy with larger weights, whose distributions are far from uniform, and its env."""
    env = echo.Echo(echo.Config(model=str(folder), length=settings.pop("length", 6)), 12, CPU)
    policy = causal_lm.build(causal_lm.Config(model=str(folder), **settings), env=env.spec, device=CPU)
    torch.manual_seed(0)
    with torch.no_grad():
        for name, p in policy.named_parameters():
            p.add_(torch.randn_like(p) * (0.5 if "critic" in name else 0.1))
    return policy, env


def contexts(env, rows: int = 12, groups: int = 4) -> dict[str, torch.Tensor]:
    """Contexts of different lengths, equal within a group, groups mixed."""
    g = torch.Generator().manual_seed(5)
    each = torch.full((groups, env.config.max_context), PAD)
    for i in range(groups):
        n = 3 + 4 * i
        each[i, :n] = torch.randint(4, env.spec.action.size, (n,), generator=g)
    return {"context": each[torch.arange(rows) % groups]}


def ragged(env, rows: int = 12) -> torch.Tensor:
    """Replies of 1 to `length` tokens, some of which begin alike."""
    g = torch.Generator().manual_seed(6)
    a = env.spec.action
    units = torch.randint(4, a.size, (rows, a.length), generator=g)
    units[:, :2] = units[:, :2] % 2 + 4
    count = torch.arange(rows) % a.length + 1
    return units.masked_fill(torch.arange(a.length) >= count[:, None], PAD)


def by_transformers(model, context, units, temperature=1.0):
    """[N, A] log-probabilities and entropies, row by row through an unchanged model."""
    logp, entropy = torch.zeros(units.shape), torch.zeros(units.shape)
    for i in range(len(units)):
        c, u = context[i][context[i] != PAD], units[i][units[i] != PAD]
        z = model(input_ids=torch.cat([c, u])[None]).logits[0, len(c) - 1 : -1] / temperature
        log_p = z.log_softmax(-1)
        logp[i, : len(u)] = log_p.gather(1, u[:, None]).squeeze(1)
        entropy[i, : len(u)] = -(log_p.exp() * log_p).sum(-1)
    return logp, entropy


def unchanged(policy, folder):
    """transformers' own model with the policy's weights."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager")
    model.load_state_dict(policy.model.state_dict())
    return model.eval()


@pytest.mark.parametrize("kind", ["llama", *OTHERS])
@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_packed_log_probabilities_and_gradients_are_those_of_transformers_row_by_row(kind, attention, llama, tmp_path):
    folder = llama if kind == "llama" else other(tmp_path / kind, kind)
    policy, env = make(folder, attention=attention, temperature=0.7)
    obs, units = contexts(env), ragged(env)
    model = unchanged(policy, folder)
    wanted = by_transformers(model, obs["context"], units, 0.7)
    found = policy.evaluate(obs, units)
    torch.testing.assert_close(found.logp, wanted[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy, wanted[1], atol=2e-5, rtol=1e-5)
    g = torch.Generator().manual_seed(1)
    share = [torch.randn(units.shape, generator=g) for _ in range(2)]
    sum((x * s).sum() for x, s in zip(wanted, share, strict=True)).backward()
    sum((x * s).sum() for x, s in zip((found.logp, found.entropy), share, strict=True)).backward()
    theirs = dict(model.named_parameters())
    for name, p in policy.model.named_parameters():
        torch.testing.assert_close(p.grad, theirs[name].grad, atol=1e-4, rtol=1e-3, msg=name)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_greedy_replies_are_those_of_transformers_generate(kind, llama, tmp_path):
    folder = llama if kind == "llama" else other(tmp_path / kind, kind)
    policy, env = make(folder, length=40)
    obs = contexts(env)
    model = unchanged(policy, folder)
    out = policy.act(obs, generator=None, greedy=True)
    for i in range(4):
        c = obs["context"][i][obs["context"][i] != PAD][None]
        written = model.generate(
            c, attention_mask=torch.ones_like(c), max_new_tokens=40, do_sample=False, eos_token_id=3, pad_token_id=0
        )[0, c.shape[1] :]
        found = out.units[i][out.units[i] != PAD]
        assert found.tolist() == written.tolist()
    assert torch.equal(out.mask, out.units != PAD) and torch.equal(out.action[:, 0], out.units)


def test_the_ratio_is_exactly_one_before_the_first_step(llama):
    policy, env = make(llama)
    obs = contexts(env)
    out = policy.act(obs, generator=torch.Generator().manual_seed(0))
    assert torch.equal(policy.evaluate(obs, out.units).logp, out.logp)


@pytest.mark.parametrize(("dtype", "most"), [("float32", 2e-5), ("bfloat16", 0.1)])
def test_what_the_decoder_saw_is_what_training_computes_up_to_rounding(dtype, most, llama):
    policy, env = make(llama, dtype=dtype, logp="decoder", temperature=0.8, length=40)
    obs = contexts(env)
    out = policy.act(obs, generator=torch.Generator().manual_seed(0))
    lengths = out.mask.sum(1)
    assert lengths.min() < lengths.max(), "some row must have left the batch early"
    judged = policy.evaluate(obs, out.units).logp
    assert (judged - out.logp).abs().max() < most
    assert (out.logp[~out.mask] == 0).all() and (judged[~out.mask] == 0).all()


def test_an_annealed_temperature_is_that_of_each_token(llama):
    policy, env = make(llama, logp="decoder", temperature=0.7)
    obs = contexts(env)
    hot = torch.linspace(2.0, 0.5, 6)
    policy.anneal(hot)
    out = policy.act(obs, generator=torch.Generator().manual_seed(0))
    plain = unchanged(policy, llama)
    wanted = torch.stack([by_transformers(plain, obs["context"], out.units, float(t))[0][:, i] for i, t in enumerate(hot)], 1)
    torch.testing.assert_close(out.logp, wanted, atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(policy.evaluate(obs, out.units).logp, wanted, atol=2e-5, rtol=1e-5)
    policy.anneal(None)
    torch.testing.assert_close(policy.evaluate(obs, out.units).logp, by_transformers(plain, obs["context"], out.units, 0.7)[0])


def test_samples_follow_the_models_distribution(llama):
    policy, env = make(llama, length=1, temperature=0.5)
    obs = {k: v[:1].expand(4000, -1) for k, v in contexts(env).items()}
    out = policy.act(obs, generator=torch.Generator().manual_seed(0))
    one = {k: v[:1] for k, v in obs.items()}
    size = env.spec.action.size
    p = torch.stack([policy.evaluate(one, torch.tensor([[v]])).logp[0, 0] for v in range(size)]).exp().detach()
    assert abs(float(p.sum()) - 1) < 1e-5
    counts = torch.bincount(out.units[:, 0], minlength=size)
    wide = 4000 * p > 5
    chi2 = float(((counts - 4000 * p).square() / (4000 * p))[wide].sum())
    assert chi2 < int(wide.sum()) + 4 * (2 * int(wide.sum())) ** 0.5


def test_what_a_row_says_does_not_depend_on_how_many_others_are_there(llama):
    policy, env = make(llama, length=20)
    obs = contexts(env)
    whole = policy.act(obs, generator=torch.Generator().manual_seed(3)).units
    policy.config = policy.config.model_copy(update={"rows": 5})
    assert torch.equal(policy.act(obs, generator=torch.Generator().manual_seed(3)).units, whole)
    assert not torch.equal(policy.act(obs, generator=torch.Generator().manual_seed(4)).units, whole)


def test_rows_that_say_the_same_are_written_as_one_line_until_they_part(llama, monkeypatch):
    policy, env = make(llama, length=8, logp="decoder", temperature=0.3)
    obs = {k: v[:1].expand(12, -1) for k, v in contexts(env).items()}
    lines, plain = [], decode.Cache.attend

    def counted(cache, layer, query, *others):
        lines.append(len(query)) if layer == 0 else None
        return plain(cache, layer, query, *others)

    monkeypatch.setattr(decode.Cache, "attend", counted)
    out = policy.act(obs, generator=torch.Generator().manual_seed(0))
    said = [[i for i in row if i != PAD] for row in out.units.tolist()]
    end = set(policy.end.tolist())
    parted = [{tuple(u[: t + 1]) for u in said if len(u) > t and u[t] not in end} for t in range(7)]
    wanted = [len(x) for x in parted if x]
    assert 1 < wanted[0] < 12 and wanted[-1] > wanted[0], "rows must part, and not all at once"
    assert len(lines) == len(wanted) and all(w <= n <= w / decode.LEAVE for n, w in zip(lines, wanted, strict=True))
    assert (policy.evaluate(obs, out.units).logp - out.logp).abs().max() < 2e-5
    lines.clear()
    policy.act(obs, generator=None, greedy=True)
    assert set(lines) == {1}


@pytest.mark.parametrize("lora", [0, 4])
def test_replies_after_an_update_are_by_the_new_weights(lora, llama):
    policy, env = make(llama, logp="decoder", lora=lora)
    obs = contexts(env)
    before = policy.act(obs, generator=torch.Generator().manual_seed(0))
    moved = [p for p in policy.parameters() if p.requires_grad]
    with torch.no_grad():
        for p in moved:
            p.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(1)), alpha=0.02)
    out = policy.act(obs, generator=torch.Generator().manual_seed(0))
    judged = policy.evaluate(obs, out.units).logp
    assert (judged - out.logp).abs().max() < 2e-5
    assert (policy.evaluate(obs, before.units).logp - before.logp).abs().max() > 1e-2, "the update must show"
    assert not any("forward" in vars(m) for m in policy.modules())


@pytest.mark.parametrize("bias", [False, True])
def test_a_product_by_arranged_weights_is_the_product(bias):
    torch.manual_seed(0)
    layer, x = torch.nn.Linear(37, 53, bias=bias), torch.randn(1, 9, 37)
    times = product(layer.weight, layer.bias, 9)
    torch.testing.assert_close(times(x), layer(x), atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(times(x[0, :1]), layer(x[0, :1]), atol=1e-5, rtol=1e-5)


def test_a_shelf_is_found_by_cumulative_probability():
    z = torch.full((2, 600), -1e9)
    z[0, [0, 300, 599]] = torch.tensor([0.5, 0.3, 0.2]).log()
    z[1, [7, 8]] = torch.tensor([0.9, 0.1]).log()
    line, drawn = torch.tensor([0, 0, 1, 0]), torch.tensor([0.49, 0.51, 0.91, 0.999], dtype=torch.float64)
    ids, logp = decode.sample(z.clone(), line, drawn)
    assert ids.tolist() == [0, 300, 8, 599]
    torch.testing.assert_close(logp.exp(), torch.tensor([0.5, 0.3, 0.1, 0.2]))
    drawn = torch.tensor([0.501, 0.799, 0.0, 0.801], dtype=torch.float64)
    assert decode.sample(z.clone(), line, drawn)[0].tolist() == [300, 300, 7, 599]
    likeliest = decode.sample(z.clone(), line, None)
    assert likeliest[0].tolist() == [0, 0, 7, 0]
    torch.testing.assert_close(likeliest[1].exp(), torch.tensor([0.5, 0.5, 0.9, 0.5]))


def test_logits_in_pieces_give_what_they_give_at_once(monkeypatch):
    torch.manual_seed(0)
    h, w = torch.randn(7, 5, dtype=torch.float64), torch.randn(11, 5, dtype=torch.float64)
    # The third state is followed by two tokens, one of them twice; nothing follows the fifth.
    state, ids = torch.tensor([2, 0, 1, 2, 3, 5, 6, 2]), torch.tensor([4, 0, 1, 2, 3, 10, 6, 4])
    for keep, at_once in ((2**20, 2**20), (2**20, 22), (0, 22)):
        monkeypatch.setattr(head, "KEEP", keep), monkeypatch.setattr(head, "AT_ONCE", at_once)
        x, y = h.clone().requires_grad_(), w.clone().requires_grad_()
        assert torch.autograd.gradcheck(lambda a, b: head.TokenLogp.apply(a, b, state, ids, True), (x, y))
        for one in (0, 1):  # the other has no gradient
            assert torch.autograd.gradcheck(lambda a, b, one=one: head.TokenLogp.apply(a, b, state, ids, True)[one], (x, y))
        logp, entropy = head.token_logp(x, y, state, ids, entropy=True)
        exact = torch.distributions.Categorical(logits=(h @ w.T)[state])
        torch.testing.assert_close(logp, exact.log_prob(ids))
        torch.testing.assert_close(entropy, exact.entropy())


def test_packing_leaves_no_padding_and_computes_equal_beginnings_once(llama):
    _, env = make(llama)
    obs, units = contexts(env)["context"], ragged(env)
    each, group = pack.distinct(obs)
    packed = pack.pack(each, group, units)
    assert len(each) == 4 and torch.equal(each[group], obs)
    rows = [(c, [i for i in u if i != PAD][:-1]) for c, u in zip(obs.tolist(), units.tolist(), strict=True)]
    beginnings = {(tuple(c), *u[: t + 1]) for c, u in rows for t in range(len(u))}
    asked = {tuple(c[: t + 1]) for c in each.tolist() for t in range(len(c)) if c[t] != PAD}
    assert len(packed.ids) == len(asked) + len(beginnings)
    assert (packed.ids >= 0).all()


def test_contexts_that_begin_alike_are_computed_once_up_to_where_they_part(llama):
    policy, env = make(llama, length=6)
    obs = torch.full((5, contexts(env)["context"].shape[1]), PAD)
    said = [[5, 6, 7, 8], [5, 6, 9], [5, 6, 7, 8, 4], [5, 6, 9], [3, 6]]  # the first is the beginning of the third
    for row, tokens in zip(obs, said, strict=True):
        row[: len(tokens)] = torch.tensor(tokens)
    units = torch.tensor([
        [4, 7, 7, PAD, PAD, PAD], [8, 3, 3, 3, PAD, PAD], [7, 7, 9, 9, 9, 9], [8, 3, 5, PAD, PAD, PAD], [6, 6, PAD, PAD, PAD, PAD],
    ])  # fmt: skip
    packed = pack.pack(*pack.distinct(obs), units)
    # Contexts, then replies: what the first says to its context is not shared with the third's context, which says the same.
    assert packed.ids.tolist() == [5, 6, 7, 8, 9, 4, 3, 6, *[4, 7], *[8, 3, 3], *[7, 7, 9, 9, 9], *[6]]
    wanted = by_transformers(unchanged(policy, llama), obs, units)
    found = policy.evaluate({"context": obs}, units)
    torch.testing.assert_close(found.logp, wanted[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy, wanted[1], atol=2e-5, rtol=1e-5)
    # Generation fills its cache from the same packing.
    greedy = policy.act({"context": obs}, generator=None, greedy=True).units
    alone = torch.cat([policy.act({"context": row[None]}, generator=None, greedy=True).units for row in obs])
    assert torch.equal(greedy, alone)


def test_replies_that_begin_alike_are_computed_once_up_to_where_they_part(llama):
    policy, env = make(llama, length=6)
    obs = {k: v[:1].expand(6, -1) for k, v in contexts(env).items()}
    a, b, c = 5, 7, 9
    units = torch.tensor([
        [a, b, c, PAD, PAD, PAD], [a, b, c, a, b, c], [a, b, c, a, b, c], [b, b, c, a, b, c], [a, b, c, b, a, a], [a, *[PAD] * 5],
    ])  # fmt: skip
    packed = pack.pack(*pack.distinct(obs["context"]), units)
    # ab, then c a b of the second, b b c a b of the fourth and b a of the fifth: last tokens are not packed.
    said = [a, b, c, a, b, b, b, c, a, b, b, a]
    assert packed.ids[int((obs["context"][0] != PAD).sum()):].tolist() == said
    wanted = by_transformers(unchanged(policy, llama), obs["context"], units)
    found = policy.evaluate(obs, units)
    torch.testing.assert_close(found.logp, wanted[0], atol=2e-5, rtol=1e-5)
    torch.testing.assert_close(found.entropy, wanted[1], atol=2e-5, rtol=1e-5)


def test_blocks_of_similar_rows_hold_every_row_once():
    count = [100, 3, 0, 98, 2, 1, 100]
    blocks = pack.similar(count, [5] * 7)
    assert sorted(i for block in blocks for i in block) == [0, 1, 3, 4, 5, 6]
    far = pack.similar([1000] * 4 + [10] * 40, [0] * 44)
    assert sum(len(block) * (1000 if block[0] < 4 else 10) ** 2 for block in far) < 1.3 * (4 * 1000**2 + 40 * 10**2)


def test_adapters_begin_as_the_model_itself_and_are_all_that_is_trained(llama):
    plain, env = make(llama)
    policy = causal_lm.build(causal_lm.Config(model=str(llama), lora=4), env=env.spec, device=CPU)
    base = causal_lm.build(causal_lm.Config(model=str(llama)), env=env.spec, device=CPU)
    obs, units = contexts(env), ragged(env)
    torch.testing.assert_close(policy.evaluate(obs, units).logp, base.evaluate(obs, units).logp)
    names = [n for n, p in policy.named_parameters() if p.requires_grad]
    assert names and all("lora_" in n for n in names)
    assert all(p.dtype == torch.float32 for p in policy.parameters() if p.requires_grad)


@pytest.mark.parametrize("kind", ["llama", "gpt2"])
def test_checkpointed_gradients_are_the_same_gradients(kind, llama, tmp_path):
    folder = llama if kind == "llama" else other(tmp_path / kind, kind)
    found = []
    for checkpoint in (False, True):
        policy, env = make(folder, checkpoint_gradients=checkpoint)
        policy.evaluate(contexts(env), ragged(env)).logp.sum().backward()
        found.append([p.grad for p in policy.parameters()])
    for a, b in zip(*found, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("logp", ["evaluate", "decoder"])
def test_a_critic_values_every_token_or_the_whole_reply(logp, llama):
    policy, env = make(llama, logp=logp, critic={"kind": "scalar"})
    obs = contexts(env)
    out = policy.act(obs, generator=torch.Generator().manual_seed(0))
    judged = policy.evaluate(obs, out.units)
    torch.testing.assert_close(out.value, judged.value, atol=1e-4, rtol=1e-4)
    assert judged.value.shape == out.units.shape and (judged.value[~out.mask] == 0).all()
    torch.testing.assert_close(policy.value(obs), judged.value[:, 0].detach(), atol=1e-5, rtol=1e-5)
    policy.config = policy.config.model_copy(update={"critic": policy.config.critic.model_copy(update={"level": "decision"})})
    assert policy.evaluate(obs, out.units).value.shape == (12,)
    torch.testing.assert_close(policy.act(obs, generator=None, greedy=True).value, policy.value(obs), atol=1e-5, rtol=1e-5)


def test_bad_models_are_refused_in_one_sentence(llama, tmp_path):
    _, env = make(llama)

    def build(spec=env.spec, **settings):
        causal_lm.build(causal_lm.Config(**settings), env=spec, device=CPU)

    with pytest.raises(NotFoundError, match="policy.model 'nowhere/at_all': there is no such folder, and no model of that name"):
        build(model="nowhere/at_all")
    bare = tmp_path / "bare"
    tiny_lm(bare)
    (bare / "tokenizer.json").unlink()
    with pytest.raises(NotFoundError, match="the folder holds no tokenizer .tokenizer.json is missing; found .*config.json"):
        build(model=str(bare))
    strange = tiny_lm(tmp_path / "strange", characters="9876543210abc")
    with pytest.raises(CapabilityError, match="do not belong together: tokenizer or chat template differ"):
        build(model=str(strange))
    (context,) = env.spec.observation.values()
    long = replace(env.spec, observation={"context": replace(context, shape=(1020,))})
    with pytest.raises(CapabilityError, match="was made for 1024 tokens, and a conversation of this env may have 1020 and 6 more"):
        build(spec=long, model=str(llama))
    with pytest.raises(CapabilityError, match="this env has no vocabulary"):
        build(spec=replace(env.spec, vocabulary=None), model=str(llama))
    policy, env = make(llama)
    empty = contexts(env)
    empty["context"][3] = PAD
    with pytest.raises(ShapeError, match=r"an empty context in copies \[3\]"):
        policy.act(empty, generator=None, greedy=True)


def test_a_model_whose_attention_is_of_another_kind_is_refused(tmp_path):
    folder = tiny_lm(tmp_path / "bloom")
    size = len(transformers.AutoTokenizer.from_pretrained(folder))
    config = transformers.BloomConfig(vocab_size=size, hidden_size=32, n_layer=1, n_head=2, initializer_range=0.5)
    transformers.BloomForCausalLM(config).save_pretrained(folder)
    with pytest.raises(CapabilityError, match="is a BloomForCausalLM, of which only layers"):
        make(folder)
