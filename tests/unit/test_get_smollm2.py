"""scripts/get_smollm2.py on a tiny GGUF file: what is written loads, speaks and has the weights of the file."""

import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from tokenizers.pre_tokenizers import ByteLevel
from transformers import AutoModelForCausalLM, AutoTokenizer

from tests.unit.test_text_env import answers, begin, make

gguf = pytest.importorskip("gguf", reason="needs the extra text")
ROOT = Path(__file__).parents[2]
WIDTH, HEADS, LAYERS = 64, 4, 1
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture
def script():
    spec = importlib.util.spec_from_file_location("get_smollm2", ROOT / "scripts" / "get_smollm2.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def call(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["get_smollm2.py", *map(str, arguments)])
    script.main()


def write(path):
    """A Llama of one layer whose tokens are bytes; the weights that SmolLM2's file has in 4 bits are in 4 bits here."""
    special, letters = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"], sorted(ByteLevel.alphabet())
    tokens = special + letters + ["ab"]
    w = gguf.GGUFWriter(path, "llama")
    w.add_context_length(512), w.add_embedding_length(WIDTH), w.add_block_count(LAYERS), w.add_feed_forward_length(2 * WIDTH)
    w.add_head_count(HEADS), w.add_head_count_kv(HEADS), w.add_layer_norm_rms_eps(1e-5), w.add_rope_freq_base(1e4)
    w.add_rope_dimension_count(WIDTH // HEADS), w.add_vocab_size(len(tokens))
    w.add_tokenizer_model("gpt2"), w.add_tokenizer_pre("smollm"), w.add_token_list(tokens), w.add_token_merges(["a b"])
    w.add_token_types([gguf.TokenType.CONTROL] * len(special) + [gguf.TokenType.NORMAL] * (len(letters) + 1))
    w.add_bos_token_id(1), w.add_eos_token_id(2), w.add_unk_token_id(0), w.add_pad_token_id(2), w.add_chat_template(TEMPLATE)
    rng, weights = np.random.default_rng(0), {}
    shapes = {"token_embd": (len(tokens), WIDTH), "blk.0.ffn_gate": (2 * WIDTH, WIDTH), "blk.0.ffn_up": (2 * WIDTH, WIDTH)}
    shapes |= {"blk.0.ffn_down": (WIDTH, 2 * WIDTH)} | {f"blk.0.attn_{x}": (WIDTH, WIDTH) for x in ("q", "k", "v", "output")}
    q4 = gguf.GGMLQuantizationType.Q4_1
    for name, shape in shapes.items():
        packed = gguf.quants.quantize(rng.normal(0, 0.1, shape).astype(np.float32), q4)
        w.add_tensor(f"{name}.weight", packed, raw_dtype=q4)
        weights[name] = torch.from_numpy(gguf.quants.dequantize(packed, q4))
    for name in ("output_norm", "blk.0.attn_norm", "blk.0.ffn_norm"):
        w.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))
    w.write_header_to_file(), w.write_kv_data_to_file(), w.write_tensors_to_file(), w.close()
    return weights


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_file_becomes_a_folder_that_the_engine_reads(script, dtype, tmp_path, monkeypatch, capsys):
    weights, out = write(tmp_path / "tiny.gguf"), tmp_path / "models" / "tiny"
    call(script, monkeypatch, "--gguf", tmp_path / "tiny.gguf", "--out", out, "--dtype", dtype)
    assert f"wrote {out}" in capsys.readouterr().out
    model, tokenizer = AutoModelForCausalLM.from_pretrained(out), AutoTokenizer.from_pretrained(out)
    assert model.dtype == getattr(torch, dtype) and "quantization_config" not in json.loads((out / "config.json").read_text())
    state = model.state_dict()
    theirs = {"token_embd": "embed_tokens", "blk.0.ffn_down": "layers.0.mlp.down_proj", "blk.0.attn_v": "layers.0.self_attn.v_proj"}
    for name, ours in theirs.items():
        assert torch.equal(state[f"model.{ours}.weight"], weights[name].to(model.dtype)), name
    # Query and key have the two halves of each head interleaved in a GGUF file.
    halves = weights["blk.0.attn_q"].view(HEADS, -1, 2, WIDTH).transpose(1, 2).reshape(WIDTH, WIDTH)
    assert torch.equal(state["model.layers.0.self_attn.q_proj.weight"], halves.to(model.dtype))
    assert tokenizer("ab", add_special_tokens=False).input_ids == [3 + 256] and model.generation_config.eos_token_id == 2

    call(script, monkeypatch, "--out", out)  # nothing is fetched again
    assert f"{out} holds a model already" in capsys.readouterr().out
    env = make(str(out), copies=2, max_reply=16)
    assert "What is" in env.speech.tokenizer.decode([i for i in begin(env, 2, 4)["context"][0].tolist() if i >= 0])
    action = torch.full((2, 16), -1)
    for row, answer in enumerate(answers(env)):
        said = tokenizer(answer + "<|im_end|>", add_special_tokens=False).input_ids
        action[row, : len(said)] = torch.tensor(said)
    assert env.step(action).reward.tolist() == [1.0, 1.0]
    env.close()


def test_what_is_missing_is_said_before_anything_is_fetched(script, tmp_path, monkeypatch):
    monkeypatch.setattr(script, "download", lambda folder: pytest.fail("fetched"))
    with pytest.raises(SystemExit, match="--gguf: there is no file nowhere.gguf"):
        call(script, monkeypatch, "--gguf", "nowhere.gguf", "--out", tmp_path / "x")
    with pytest.raises(SystemExit, match="is there and holds no model"):
        call(script, monkeypatch, "--out", tmp_path)
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "gguf" else object())
    with pytest.raises(SystemExit, match=r"^gguf not installed: run `pip install -e .\[text\]` in the repository$"):
        call(script, monkeypatch, "--out", tmp_path / "x")


def test_a_download_that_fails_says_so(script, tmp_path, monkeypatch):
    asked = []
    monkeypatch.setattr(script.subprocess, "run", lambda command: asked.append(command) or type("Done", (), {"returncode": 1}))
    with pytest.raises(SystemExit, match=f"pip could not download {script.PACKAGE}: see its message above"):
        call(script, monkeypatch, "--out", tmp_path / "x")
    assert asked[0][-1] == script.PACKAGE and not (tmp_path / "x").exists()
