"""Our side of the talk with vLLM, and with `-m vllm` the whole of it.

The whole of it: EMBODIED_RL_VLLM_PYTHON=~/vllm/bin/python pytest -m vllm tests/unit/test_causal_lm_vllm.py
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from transformers import AutoModelForCausalLM

from embodied_rl.errors import CapabilityError, MissingExtraError, NotFoundError, UserError
from embodied_rl.policies import causal_lm
from embodied_rl.policies.causal_lm.decode import Narrowing
from embodied_rl.policies.causal_lm.model import open_folder
from tests.toys import echo
from tests.toys.tiny_lm import tiny_lm
from tests.unit.test_causal_lm_sampling import evaluation_takes_the_likeliest

CPU = torch.device("cpu")
STOPS = ("7", "ab", "a")
"""Texts that end a reply in some of eight random replies of 24 tokens, whoever draws them."""
STAND_IN = Path(echo.__file__).with_name("vllm_stand_in.py")


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    return tiny_lm(tmp_path_factory.mktemp("models") / "llama")


def interpreter(folder: Path, *, vllm: bool = True, version: str = "0.32.0") -> Path:
    """A Python in whose environment `import vllm` finds the stand-in, or nothing."""
    package = folder / "packages" / "vllm"
    package.mkdir(parents=True)
    text = STAND_IN.read_text() if vllm else "raise ModuleNotFoundError(\"No module named 'vllm'\")"
    (package / "__init__.py").write_text(text)
    script = folder / "python"
    script.write_text(f'#!/bin/sh\nexport STAND_IN_VERSION={version} PYTHONPATH="{package.parent}"\nexec "{sys.executable}" "$@"\n')
    script.chmod(0o755)
    return script


def make(model: Path, python: Path, **settings):
    env = echo.Echo(echo.Config(model=str(model), length=settings.pop("length", 6)), 8, CPU)
    generator = {"kind": "vllm", "python": str(python)} | settings.pop("generator", {})
    config = causal_lm.Config(model=str(model), logp="decoder", generator=generator, **settings)
    return causal_lm.build(config, env=env.spec, device=CPU), env


def check_talk(policy, env, most: float) -> None:
    """What is written after a change of the weights is written by the new weights."""
    every = torch.ones(8, dtype=torch.bool)
    obs = env.reset(every, torch.arange(8) // 4 * 2, torch.zeros(8, dtype=torch.int64))
    for step in range(2):
        with torch.no_grad():
            for p in policy.parameters():
                p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(step)))
        out = policy.act(obs, generator=torch.Generator().manual_seed(3))
        judged = policy.evaluate(obs, out.units).logp
        assert (judged - out.logp).abs().max() < most
        assert torch.equal(out.mask, out.units != -1) and out.units.shape == (8, 6)
        assert len({tuple(x) for x in out.units.tolist()}) > 4, "samples of a group differ"
        again = policy.act(obs, generator=torch.Generator().manual_seed(3))
        assert torch.equal(again.units, out.units)
    greedy = policy.act(obs, generator=None, greedy=True).units
    own = causal_lm.build(policy.config.model_copy(update={"generator": causal_lm.Config().generator}), env=env.spec, device=CPU)
    own.load_state_dict(policy.state_dict())
    assert torch.equal(own.act(obs, generator=None, greedy=True).units, greedy)


def test_weights_go_there_and_tokens_come_back(llama, tmp_path):
    policy, env = make(llama, interpreter(tmp_path), temperature=0.8)
    check_talk(policy, env, most=2e-5)
    policy.generator.close()
    assert policy.generator.process.poll() == 0


def check_rows(policy, env) -> None:
    """Rows of one call have their own settings, and sampling and what is said of it are those of the built-in decoder."""
    every = torch.ones(8, dtype=torch.bool)
    context = env.reset(every, torch.arange(8) // 4 * 2, torch.zeros(8, dtype=torch.int64))["context"]
    uniform = torch.rand(8, 6, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    greedy, plain = policy.write(context, None).units, policy.write(context, uniform).units
    settings = [(1.0, 0, 1.0)] * 2 + [(1.0, 1, 1.0)] * 2 + [(1.0, 0, 1e-6)] * 2 + [(1e-3, 0, 1.0)] * 2
    t, k, p = (torch.tensor(x) for x in zip(*settings, strict=True))
    mixed = policy.write(context, uniform, narrow=Narrowing(t, k, p)).units
    assert torch.equal(mixed[:2], plain[:2]) and torch.equal(mixed[2:], greedy[2:])
    assert all((plain[i : i + 2] != greedy[i : i + 2]).any() for i in (2, 4, 6))


def check_truncation(policy, env, most: float) -> None:
    """Nothing is drawn but what the built-in decoder would draw from, with its probabilities."""
    every, n, model = torch.ones(8, dtype=torch.bool), 8, AutoModelForCausalLM.from_pretrained(policy.generator.model)
    model.load_state_dict(policy.weights(), strict=False)  # it may have learned since
    context = env.reset(every, torch.zeros(8, dtype=torch.int64), torch.zeros(8, dtype=torch.int64))["context"]
    uniform = torch.rand(n, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    for top_k, top_p in ((3, 1.0), (0, 0.6), (4, 0.7)):
        narrow = Narrowing(torch.full((n,), 0.9), torch.full((n,), top_k), torch.full((n,), top_p))
        written = policy.write(context, uniform, narrow=narrow)
        with torch.no_grad():
            z = torch.stack([model(row[row != -1][None]).logits[0, -1] for row in context]) / policy.config.temperature
        allowed = narrow(z, torch.arange(n)).log_softmax(-1)
        first = allowed.gather(1, written.units[:, :1]).squeeze(1)
        assert bool(first.isfinite().all()) and (first - written.logp[:, 0]).abs().max() < most
        assert int(allowed[0].isfinite().sum()) < z.shape[1] and len(written.units[:, 0].unique()) > 1


def test_rows_have_their_own_temperature_top_k_and_top_p(llama, tmp_path):
    policy, env = make(llama, interpreter(tmp_path), temperature=1.3, evaluation={"top_k": 1, "temperature": 2.0})
    check_rows(policy, env)
    check_truncation(policy, env, most=2e-5)
    check_evaluation(policy, env)
    policy.anneal(torch.linspace(1.0, 2.0, 6))
    with pytest.raises(CapabilityError, match="policy.generator.kind vllm has one temperature for all tokens"):
        policy.write(torch.zeros(1, 1, dtype=torch.int64), None)
    policy.generator.close()


def check_evaluation(policy, env) -> None:
    """Evaluation samples as it is told, here the likeliest token, and training as before."""
    obs = env.reset(torch.ones(8, dtype=torch.bool), torch.arange(8) * 2, torch.zeros(8, dtype=torch.int64))
    evaluation_takes_the_likeliest(policy, obs)


def check_stops(model: Path, python: Path) -> None:
    """A reply ends with a stop text and is until then what it would have been; `force_end` takes the last place."""
    policy, env = make(model, python, stop=STOPS, force_end=True, length=24)
    obs = env.reset(torch.ones(8, dtype=torch.bool), torch.arange(8) * 2, torch.zeros(8, dtype=torch.int64))
    found = policy.act(obs, generator=torch.Generator().manual_seed(4))
    policy.config = policy.config.model_copy(update={"stop": (), "force_end": False})
    whole = policy.act(obs, generator=torch.Generator().manual_seed(4))
    decode, stopped = open_folder(str(model))[1].decode, 0
    for row, reference in zip(found.units.tolist(), whole.units.tolist(), strict=True):
        ids = [i for i in row if i != -1]
        free = ids[:-1] if len(ids) == 24 else ids
        assert free == reference[: len(free)]
        assert not any(x in decode(ids[:-1], skip_special_tokens=True) for x in STOPS)
        ended = any(x in decode(ids, skip_special_tokens=True) for x in STOPS)
        stopped += ended
        assert ended or len(ids) in (24, len([i for i in reference if i != -1]))
    assert 2 <= stopped < 8
    full = (found.units != -1).all(1)
    assert bool((found.units[full, -1] == policy.end[0]).all()) and not bool(found.mask[:, -1].any())
    policy.generator.close()


def test_stop_texts_end_a_reply_and_ends_are_forced(llama, tmp_path):
    check_stops(llama, interpreter(tmp_path))


def test_a_vllm_that_is_missing_too_old_or_dies_is_told_in_one_sentence(llama, tmp_path):
    with pytest.raises(NotFoundError, match=r"policy.generator.python '/no/python': no such file; give the Python of an environment"):
        make(llama, Path("/no/python"))
    for name, given, error, words in (
        ("none", {"vllm": False}, MissingExtraError, "vLLM cannot be imported there .ModuleNotFoundError: No module named 'vllm'.; install it"),
        ("old", {"version": "0.8.5"}, CapabilityError, r"has vLLM 0.8.5, and 0.32 or newer is needed; upgrade it there"),
    ):
        (tmp_path / name).mkdir()
        policy, env = make(llama, interpreter(tmp_path / name, **given))
        with pytest.raises(error, match=words):
            policy.generator.start()
        policy.generator.close()
    for name, mode, script, words in (
        ("dead", 0o755, "echo out of luck >&2\nexit 3", "vLLM ended with code 3 when asked for 'version'; its last line was: out of luck"),
        ("text", 0o644, "", r"policy.generator.python '.*text' cannot be run \(Permission denied\); give the interpreter"),
        ("other", 0o755, "echo Hello; cat", "answered 'Hello' when asked for 'version', so it is no Python that has vLLM"),
        ("hangs", 0o755, "cat > /dev/null", r"did not answer within 0.5 s when asked for 'version' \(policy.generator.seconds\)"),
    ):
        path = tmp_path / name
        path.write_text(f"#!/bin/sh\n{script}\n")
        path.chmod(mode)
        policy, env = make(llama, path, generator={"seconds": 0.5} if name == "hangs" else {})
        with pytest.raises(CapabilityError, match=words):
            policy.generator.start()
        policy.generator.close()


def test_where_vllm_has_no_memory_the_batch_is_halved_and_the_rest_is_told(llama, tmp_path, caplog):
    policy, env = make(llama, interpreter(tmp_path))
    obs = env.reset(torch.ones(8, dtype=torch.bool), torch.arange(8) * 2, torch.zeros(8, dtype=torch.int64))
    whole = policy.act(obs, generator=torch.Generator().manual_seed(4))
    policy.generator.close()
    package = tmp_path / "packages" / "vllm" / "__init__.py"
    package.write_text(STAND_IN.read_text().replace("MOST = None", "MOST = 3"))
    small, _ = make(llama, tmp_path / "python")
    small.load_state_dict(policy.state_dict())
    assert torch.equal(small.act(obs, generator=torch.Generator().manual_seed(4)).units, whole.units)
    assert "not enough memory to write 4 replies at once: going on with 2; set policy.generator.rows: 2" in caplog.text
    small.generator.close()
    package.write_text(STAND_IN.read_text().replace("MOST = None", "MOST = 0"))
    none, _ = make(llama, tmp_path / "python")
    with pytest.raises(UserError, match="to write a single reply: lower policy.generator.options.gpu_memory_utilization"):
        none.act(obs, generator=torch.Generator().manual_seed(4))
    none.generator.close()
    told = "Available memory on node 0 (20.63/23.54 GiB) on startup is less than desired CPU memory utilization (0.92, 21.66 GiB)."
    package.write_text(STAND_IN.read_text().replace("self.stale = False\n        print", f"raise ValueError({told!r})\n        print"))
    full, _ = make(llama, tmp_path / "python")
    with pytest.raises(CapabilityError, match=r"cannot load .* 21.66 GiB\).; lower policy.generator.options.gpu_memory_utilization"):
        full.generator.start()
    full.generator.close()


def test_settings_that_would_do_nothing_are_refused():
    for given, words in (
        ({"generator": {"kind": "vllm"}}, "needs python"),
        ({"generator": {"rows": 3}}, "does nothing with kind .builtin."),
        ({"generator": {"kind": "vllm", "python": "x"}, "lora": 4}, "set lora: 0"),
        ({"generator": {"kind": "vllm", "python": "x"}, "rows": 4}, "set generator.rows"),
        ({"critic": {"detach": True}}, "does nothing with kind .none."),
    ):
        with pytest.raises(ValidationError, match=words):
            causal_lm.Config(**given)


@pytest.mark.vllm
def test_vllm_itself(tmp_path):
    python = os.environ.get("EMBODIED_RL_VLLM_PYTHON")
    if not python:
        pytest.skip("set EMBODIED_RL_VLLM_PYTHON to the Python of an environment that has vLLM")
    wide = tiny_lm(tmp_path / "wide", hidden=256)  # vLLM's attention on a CPU has no heads of 16
    policy, env = make(wide, Path(python), temperature=0.8)
    check_talk(policy, env, most=1e-3)
    check_rows(policy, env)
    check_truncation(policy, env, most=1e-3)
    policy.generator.close()
    check_stops(wide, Path(python))
