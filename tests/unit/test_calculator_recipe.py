"""The recipe of several replies, whole: the tool answers between them, and only the policy's own tokens are learned from."""

from contextlib import closing

import pytest
import torch

from embodied_rl.config import load_recipe
from embodied_rl.envs import text
from embodied_rl.loss import LossFunction
from embodied_rl.measure import Clock
from embodied_rl.policies import causal_lm
from embodied_rl.session import Session
from embodied_rl.types import PAD
from tests.resume import lab
from tests.toys.tiny_lm import tiny_lm

CPU = torch.device("cpu")
TASK = {"task": "calculator", "terms": 2, "digits": 1}


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A tiny model that was taught to call the calculator first and to say a number then, most of the time."""
    folder = tiny_lm(tmp_path_factory.mktemp("models") / "tiny", hidden=32, layers=1)
    env = text.build(text.Config(model=str(folder), tasks=(TASK,), max_context=400, max_reply=20), num_envs=1, device=CPU, split="train", seed=0)
    policy = causal_lm.build(causal_lm.Config(model=str(folder)), env=env.spec, device=CPU)
    optimizer = torch.optim.Adam(policy.parameters(), lr=1e-2)
    ids = [env.speech.say(said) for said in ("<calc>2+3</calc>", "5")]
    call, answer = (torch.tensor([[*row, *[PAD] * (20 - len(row))]]) for row in ids)
    for step in range(36):
        asked = env.reset(torch.tensor([True]), torch.tensor([2 * step]), torch.tensor([0]))
        told = env.step(call).obs
        loss = -sum(policy.evaluate(obs, units, entropy=False).logp.sum() for obs, units in ((asked, call), (told, answer)))
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    policy.model.save_pretrained(folder)
    return str(folder)


def recipe(model):
    changes = [
        f"env.model={model}", f"policy.model={model}", f"env.tasks=[{{{', '.join(f'{k}: {v}' for k, v in TASK.items())}}}]",
        "env.max_context=400", "env.max_reply=20", "env.overlong=8", "collect.copies=8", "collect.group_size=4", "algorithm.update.lr=1e-3",
        "threads=1", "device=cpu", "evaluate.every=0", "evaluate.episodes=0", "checkpoint.every=1", "log.tensorboard=false", "log.progress=false",
    ]  # fmt: skip
    return load_recipe("calculator_grpo", changes).recipe


def test_only_the_policys_own_tokens_count(model, monkeypatch):
    counted, plain = [], LossFunction.__call__
    monkeypatch.setattr(LossFunction, "__call__", lambda loss, e, batch, **how: counted.append(batch) or plain(loss, e, batch, **how))
    with closing(Session.build(recipe(model))) as s:
        seen, update = [], s.updater.update
        s.updater.update = lambda *given, **how: seen.extend(given) or update(*given, **how)
        before = [p.detach().clone() for p in s.policy.parameters()]
        s.iterate(Clock())
        (rollout, credit), read = seen, s.collector.parts[0].env.speech.read
        context, units = ([[[i for i in row if i != PAD] for row in t] for t in x.tolist()] for x in (rollout.obs["context"], rollout.units))
        assert torch.equal(rollout.mask, (rollout.units != PAD) & rollout.valid.unsqueeze(-1))
        went_on = rollout.valid[1].nonzero().flatten().tolist()
        assert len(went_on) >= 4, "most conversations have a second reply"
        for b in went_on:
            earlier = context[0][b] + units[0][b]
            assert context[1][b][: len(earlier)] == earlier, "a reply goes into the next context as the ids that were sampled"
            assert read(context[1][b][len(earlier) :]).strip().startswith("user\n")
        learned = sum(int(batch.mask.sum()) for batch in counted)
        assert learned == sum(len(units[t][b]) for t, b in (credit.advantage != 0).nonzero().tolist()) > 0
        assert any(not torch.equal(a, b) for a, b in zip(before, s.policy.parameters(), strict=True))


def test_a_run_of_several_replies_resumes_bit_for_bit(model, tmp_path):
    wanted = recipe(model)
    rows, state = lab.go(wanted, tmp_path / "whole", until=2)
    parts = []
    for until in (1, 2):
        more, last = lab.go(wanted, tmp_path / "run", until=until, resume=until > 1)
        parts += more
    assert len(rows) == 2 and parts == rows and lab.differing(last, state) == []
