"""Vision models from a folder as encoders of a reward model: never downloaded, never trained, never half loaded."""

import json

import pytest
import torch
import transformers

from embodied_rl import registry
from embodied_rl.errors import CapabilityError, CheckpointError, NotFoundError
from tests.kit import CPU, toy
from tests.reference.test_self_referential import model

SMALL = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "image_size": 16, "patch_size": 8}


def camera():
    return toy("shown", 3)


@pytest.fixture
def vit(tmp_path):
    torch.manual_seed(0)
    made = transformers.ViTModel(transformers.ViTConfig(**SMALL), add_pooling_layer=False).eval()
    made.save_pretrained(tmp_path)
    return tmp_path, made


def test_a_vision_model_gives_the_mean_of_its_last_hidden_states(vit):
    folder, made = vit
    (folder / "preprocessor_config.json").write_text(json.dumps({"image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 1.0, 2.0]}))
    encoder = model(camera().spec, encoder=str(folder)).encoder
    shade = torch.tensor([[51, 102, 255]] * 2, dtype=torch.uint8)  # one colour, so that resizing does nothing: 0.2, 0.4, 1
    picture = shade[:, None, None].expand(2, 6, 8, 3)
    (z,) = encoder([{"camera": picture, "position": torch.randn(2, 2)}])
    pixels = torch.tensor([0.2, 0.2, 0.35]).view(1, 3, 1, 1).expand(2, 3, 16, 16)
    with torch.no_grad():
        expected = made(pixel_values=pixels).last_hidden_state.mean(1)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-4)
    assert not any(p.requires_grad for p in encoder.model.model.parameters())


def test_a_model_of_pictures_and_words_brings_its_tower(tmp_path):
    torch.manual_seed(0)
    text = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8, "vocab_size": 16}
    made = transformers.CLIPModel(transformers.CLIPConfig(text_config=text, vision_config=SMALL)).eval()
    made.save_pretrained(tmp_path)
    m = model(camera().spec, encoder=str(tmp_path))
    picture = torch.full((1, 6, 8, 3), 255, dtype=torch.uint8)
    (z,) = m.encoder([{"camera": picture}])
    with torch.no_grad():
        expected = made.vision_model(pixel_values=torch.ones(1, 3, 16, 16)).last_hidden_state.mean(1)
    torch.testing.assert_close(z, expected, rtol=0, atol=1e-4)


def test_a_folder_that_lacks_weights_is_refused(vit):
    from safetensors.torch import load_file, save_file

    folder, _ = vit
    weights = load_file(folder / "model.safetensors")
    weights.pop(sorted(weights)[0])
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match="the folder lacks 1 weights"):
        model(camera().spec, encoder=str(folder))


def test_a_model_that_sees_no_pictures_is_refused(tmp_path):
    settings = transformers.LlamaConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8, vocab_size=8)
    transformers.LlamaModel(settings).save_pretrained(tmp_path)
    with pytest.raises(NotFoundError, match="LlamaModel has no image_size, so it is no model of single pictures"):
        model(camera().spec, encoder=str(tmp_path))


def test_a_folder_that_is_none():
    with pytest.raises(NotFoundError, match="reward.encoder 'vit': no folder with a config.json; models are never downloaded"):
        model(camera().spec, encoder="vit")


def test_where_nothing_seen_changes_nothing_can_tell_progress():
    module = registry.load("env", "target")
    spec = module.build(module.Config(), num_envs=1, device=CPU, split="train", seed=0).spec
    with pytest.raises(CapabilityError, match=r"changes within an episode of this env \(it shows picture, state\), so none"):
        model(spec)
    with pytest.raises(CapabilityError, match="so none can tell progress"):
        model(spec, entries=["state"])
