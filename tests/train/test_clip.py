"""A MODEL is loaded as it was published, or the mistake is reported; ViT-L/14 at full size takes a step."""

import json
import math
from dataclasses import replace

import open_clip
import pytest
import torch
from conftest import save_tiny
from PIL import Image
from ranks_script import BASIC, train_state

from data_prep.errors import UserError
from train.data.augment import N_UNIFORMS
from train.data.loader import Batch
from train.model.clip import load
from train.model.source import source_of
from train.recipe import Augment
from train.step import train_step

CAPTIONS = ["a red brick", "camera front variant", "x"]


def noise_image() -> Image.Image:
    return Image.effect_noise((31, 25), 80).convert("RGB")


def test_features_equal_open_clips(tiny_model):
    """For a published folder: weights, preprocessing and tokens."""
    clip = load(tiny_model)
    model, _, preprocess = open_clip.create_model_and_transforms(tiny_model)
    tokenizer = open_clip.get_tokenizer(tiny_model)
    model.eval()
    clip.towers.eval()
    image = noise_image()
    pixels = clip.eval_transform(image)[None]
    assert pixels.dtype == torch.uint8
    with torch.no_grad():
        expected_image, expected_text, expected_scale = model(preprocess(image)[None], tokenizer(CAPTIONS))
        image_features, text_features, logit_scale = clip.towers(pixels, clip.tokenizer(CAPTIONS))
    torch.testing.assert_close(image_features, expected_image, rtol=0, atol=1e-6)
    torch.testing.assert_close(text_features, expected_text, rtol=0, atol=1e-6)
    assert logit_scale == expected_scale
    torch.testing.assert_close(
        (pixels[0] / 255 - clip.towers.mean) / clip.towers.std, clip.preprocess(image), rtol=0, atol=1e-6
    )


def test_open_clip_loads_saved_weights_bit_for_bit(tiny_model, tmp_path):
    clip = load(tiny_model)
    clip.save(tmp_path)
    again = open_clip.create_model(f"local-dir:{tmp_path}").state_dict()
    for name, tensor in clip.towers.model.state_dict().items():
        assert torch.equal(tensor, again[name]), name
    assert load(f"local-dir:{tmp_path}").config == clip.config
    assert clip.config["preprocess_cfg"]["mean"] == [0.5, 0.4, 0.3]


def test_random_weights_depend_on_the_seed_and_not_on_the_generator():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (
        load("demo-vit:none", seed=seed).towers.model.visual.conv1.weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-33:none", "did you mean 'ViT-B-32'"),
        ("nonsense", "a MODEL is NAME:PRETRAINED"),
        ("ViT-B-32", "ViT-B-32:none for random ones, ViT-B-32:FILE, or ViT-B-32:TAG, with TAG one of openai"),
        ("ViT-B-32:laion", "has no weights 'laion'; it has openai"),
        ("ViT-B-32:openai", "another activation; use ViT-B-32-quickgelu:openai"),
        ("ViT-B-32-quickgelu:laion2b_s34b_b79k", "has no weights|another activation; use ViT-B-32:"),
        ("local-dir:/nowhere", "cannot be loaded.*open_clip_config.json"),
    ],
)
def test_a_wrong_name_is_an_error(name, message):
    with pytest.raises(UserError, match=message):
        load(name)


def test_a_folder_without_weights_is_an_error(tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load(f"local-dir:{tmp_path}")


def test_weights_of_another_shape_are_an_error(tmp_path):
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 24
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="size mismatch"):
        load(f"local-dir:{tmp_path}")


def test_no_network_is_an_error(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("ViT-B-16:laion2b_s34b_b88k", "hf-hub:nobody/nothing"):
        with pytest.raises(
            UserError, match=rf"not in the cache.*HF_HUB_OFFLINE=1.*python -m train.fetch {name}"
        ):
            load(name)


def test_logit_scale_is_clamped(tiny_model):
    towers = load(tiny_model).towers
    for value, expected in ((9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)):
        towers.model.logit_scale.data.fill_(value)
        towers.clamp_logit_scale()
        assert towers.model.logit_scale.item() == pytest.approx(expected)


@pytest.mark.slow
def test_vit_l_14_takes_a_step_with_checkpointing():
    """The model of spectrum_icons.yaml at full size, 428 million parameters; without its weights."""
    clip = load("ViT-L-14:laion2b_s32b_b82k", weights=False)
    assert clip.config["preprocess_cfg"]["mean"] == clip.config["preprocess_cfg"]["std"] == (0.5, 0.5, 0.5)
    assert tuple(clip.preprocess.transforms[-1].mean) == (0.5, 0.5, 0.5)
    assert sum(parameter.numel() for parameter in clip.towers.parameters()) == 427_616_513
    assert clip.eval_transform(noise_image()).shape == (3, 224, 224)
    # where the CPU has no bf16 instructions, bf16 takes a hundred times as long: 15 minutes
    clip.towers.bf16 = torch.ops.mkldnn._is_mkldnn_bf16_supported()
    clip.towers.model.set_grad_checkpointing()
    state = train_state(clip, replace(BASIC, global_batch_size=2, micro_batch_size=2, augment=Augment()))
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    rows = torch.tensor([state.augmentation.draw([0.5] * N_UNIFORMS)] * 2)
    ids = torch.arange(4).view(2, 2)
    batch = Batch(images, clip.tokenizer(CAPTIONS[:2]), rows, torch.arange(2), ids)
    some = dict(list(clip.towers.named_parameters())[:8])
    before = {name: parameter.detach().clone() for name, parameter in some.items()}
    gradients = {}
    state.optimizer.register_step_pre_hook(
        lambda *_: gradients.update({name: p.grad.clone() for name, p in clip.towers.named_parameters()})
    )
    values = train_step(state, batch)
    assert values["train/loss"].dtype == torch.float32
    assert 0 < values["train/loss"] < 10
    for name, parameter in clip.towers.named_parameters():
        assert parameter.dtype == gradients[name].dtype == torch.float32
        assert torch.isfinite(gradients[name]).all(), name
    assert all(not torch.equal(before[name], parameter) for name, parameter in some.items())


def test_a_tags_preprocessing_is_used():
    preprocess = source_of("ViT-L-14:laion2b_s32b_b82k").preprocess
    assert preprocess["mean"] == preprocess["std"] == (0.5, 0.5, 0.5)
