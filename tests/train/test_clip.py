"""MODEL: loaded as it was published, or refused with a sentence; the seed's own architecture takes a step."""

import json
import math

import open_clip
import pytest
import torch
from conftest import save_tiny
from PIL import Image

from data_prep.errors import UserError
from train.data.loader import Batch
from train.model.clip import clamp_logit_scale, load
from train.optim import build_optimizer
from train.recipe import Optim
from train.step import backward
from train.world import World

CAPTIONS = ["a red brick", "camera front variant", "x"]


def picture() -> Image.Image:
    return Image.effect_noise((31, 25), 80).convert("RGB")


def test_a_checkpoint_from_elsewhere_gives_the_features_that_open_clip_gives(tiny_model):
    """The folder is as others publish theirs: open_clip is the reference for weights, preprocessing and
    tokens.
    """
    clip = load(tiny_model)
    model, _, preprocess = open_clip.create_model_and_transforms(tiny_model)
    tokenizer = open_clip.get_tokenizer(tiny_model)
    model.eval()
    clip.towers.eval()
    image = picture()
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


def test_what_is_saved_loads_back_bit_equal_in_open_clip(tiny_model, tmp_path):
    clip = load(tiny_model)
    clip.save(tmp_path)
    again = open_clip.create_model(f"local-dir:{tmp_path}").state_dict()
    for name, tensor in clip.towers.model.state_dict().items():
        assert torch.equal(tensor, again[name]), name
    assert load(f"local-dir:{tmp_path}").config == clip.config
    assert clip.config["preprocess_cfg"]["mean"] == [0.5, 0.4, 0.3]


def test_random_weights_follow_the_seed_and_leave_the_generator_alone():
    torch.manual_seed(5)
    before = torch.get_rng_state()
    first, same, other = (
        load("demo-vit:none", seed=seed).towers.model.visual.conv1.weight for seed in (0, 0, 1)
    )
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert torch.equal(before, torch.get_rng_state())


def test_a_weights_file_can_be_named(tiny_model, tmp_path):
    """NAME:FILE, as open_clip has it."""
    model = open_clip.create_model("demo-vit")
    torch.save(model.state_dict(), tmp_path / "weights.pt")
    clip = load(f"demo-vit:{tmp_path / 'weights.pt'}")
    assert torch.equal(clip.towers.model.visual.proj, model.visual.proj)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("ViT-B-33:none", "perhaps you meant 'ViT-B-32'"),
        ("nonsense", "a MODEL is NAME:PRETRAINED"),
        (
            "ViT-B-32",
            r"which weights\? Write ViT-B-32:none for random ones, or ViT-B-32:TAG, with TAG one of openai",
        ),
        ("ViT-B-32:laion", "has no weights 'laion'; it has openai"),
        ("ViT-B-32:openai", "another activation; use ViT-B-32-quickgelu:openai"),
        ("ViT-B-32-quickgelu:laion2b_s34b_b79k", "has no weights|another activation; use ViT-B-32:"),
        ("local-dir:/nowhere", "cannot be loaded.*open_clip_config.json"),
    ],
)
def test_a_wrong_name_is_explained(name, message):
    with pytest.raises(UserError, match=message):
        load(name)


def test_a_folder_without_weights_is_not_random_weights(tiny_model, tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "open_clip_model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot be loaded"):
        load(f"local-dir:{tmp_path}")


def test_weights_of_another_shape_are_refused(tmp_path):
    save_tiny(tmp_path)
    config = json.loads((tmp_path / "open_clip_config.json").read_text())
    config["model_cfg"]["embed_dim"] = 24
    (tmp_path / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="size mismatch"):
        load(f"local-dir:{tmp_path}")


def test_no_network_is_a_sentence(monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name in ("ViT-B-16:laion2b_s34b_b88k", "hf-hub:nobody/nothing"):
        with pytest.raises(
            UserError, match=rf"not in the cache.*HF_HUB_OFFLINE=1.*python -m train.fetch {name}"
        ):
            load(name)


def test_temperature_is_clamped(tiny_model):
    towers = load(tiny_model).towers
    for value, expected in ((9.0, math.log(100)), (-1.0, 0.0), (3.0, 3.0)):
        towers.model.logit_scale.data.fill_(value)
        clamp_logit_scale(towers)
        assert towers.model.logit_scale.item() == pytest.approx(expected)


def test_the_seeds_architecture_takes_a_step_with_checkpointing():
    """ViT-L/14 at full size, 428 million parameters; its tag's preprocessing, without its weights."""
    clip = load("ViT-L-14:laion2b_s32b_b82k", weights=False)
    assert clip.config["preprocess_cfg"]["mean"] == clip.config["preprocess_cfg"]["std"] == (0.5, 0.5, 0.5)
    assert tuple(clip.preprocess.transforms[-1].mean) == (0.5, 0.5, 0.5)
    assert sum(parameter.numel() for parameter in clip.towers.parameters()) == 427_616_513
    assert clip.eval_transform(picture()).shape == (3, 224, 224)
    clip.towers.bf16 = (
        torch.ops.mkldnn._is_mkldnn_bf16_supported()
    )  # elsewhere it takes a hundred times as long: 15 minutes
    clip.towers.model.set_grad_checkpointing()
    clip.towers.train()
    optimizer = build_optimizer(clip.towers, Optim(lr=1e-4))
    images = torch.randint(0, 256, (2, 3, 224, 224), dtype=torch.uint8)
    batch = Batch(images, clip.tokenizer(CAPTIONS[:2]), torch.zeros(2, 0), torch.arange(4).view(2, 2))
    before = {
        name: parameter.detach().clone() for name, parameter in list(clip.towers.named_parameters())[:8]
    }
    loss = backward(clip.towers, batch, 2, World(), seed=0, samples=0)
    assert loss.dtype == torch.float32
    assert 0 < loss < 10
    for name, parameter in clip.towers.named_parameters():
        assert parameter.dtype == parameter.grad.dtype == torch.float32
        assert torch.isfinite(parameter.grad).all(), name
    optimizer.step()
    assert all(not torch.equal(before[name], dict(clip.towers.named_parameters())[name]) for name in before)
