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

from embodied_rl.errors import CapabilityError, MissingExtraError, NotFoundError
from embodied_rl.policies import causal_lm
from tests.toys import echo
from tests.toys.tiny_lm import tiny_lm

CPU = torch.device("cpu")
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
    env = echo.Echo(echo.Config(model=str(model), length=6), 8, CPU)
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
    (vllm,) = policy._vllm
    vllm.close()
    assert vllm.process.poll() == 0


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
            policy._vllm[0].start()
    dead = tmp_path / "dead"
    dead.write_text("#!/bin/sh\necho out of luck >&2\nexit 3\n")
    dead.chmod(0o755)
    policy, env = make(llama, dead)
    with pytest.raises(CapabilityError, match="vLLM ended with code 3 when asked for 'version'; its last line was: out of luck"):
        policy._vllm[0].start()


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
