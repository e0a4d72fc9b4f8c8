"""Blank patches are dropped first, the others at random; none are in evaluation and at the end of a run."""

import pytest
import torch
from conftest import save_tiny

from data_prep.errors import UserError
from train.model.clip import Clip, load
from train.model.patch_dropout import drop, install

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}  # 16 patches


@pytest.fixture
def clip(tmp_path) -> Clip:
    clip = load(f"local-dir:{save_tiny(tmp_path, vision_cfg=VISION)}")
    install(clip.towers.model.visual)
    clip.towers.train()
    return clip


def kept_of(clip: Clip, images: torch.Tensor) -> torch.Tensor:
    """bool [b, 16]: which patches of the pictures the blocks saw, by the positional embedding that stands for
    each.
    """
    visual, seen = clip.towers.model.visual, []
    with torch.no_grad():
        visual.conv1.weight.zero_()  # what is left of a patch is where it stands
    visual.ln_pre.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    clip.towers.image_features(images)
    return torch.isclose(seen[0][:, 1:, None], visual.positional_embedding[None, None, 1:]).all(-1).any(1)


def test_blank_patches_go_first(clip):
    drop(clip.towers.model.visual, 0.75, 0.0)
    images = torch.full((6, 3, 32, 32), 200, dtype=torch.uint8)
    for picture in range(6):
        for patch in range(picture):  # so many have a line in them
            images[picture, 1, 8 * (patch // 4) : 8 * (patch // 4) + 8, 8 * (patch % 4) + 3] = 10
    kept = kept_of(clip, images)
    assert kept.sum(1).tolist() == [4] * 6
    for picture in range(5):
        assert kept[picture, :picture].all()
    assert kept[5, :5].sum() == 4


def test_the_others_go_at_random_and_as_the_seed_says(clip):
    drop(clip.towers.model.visual, 0.5, 0.89)
    images = torch.randint(0, 256, (400, 3, 32, 32), dtype=torch.uint8)
    torch.manual_seed(3)
    kept = kept_of(clip, images)
    assert (kept.float().mean(0) - 0.5).abs().max() < 0.1  # four standard deviations
    torch.manual_seed(3)
    assert torch.equal(kept_of(clip, images), kept)


def test_whole_pictures_in_evaluation_and_at_the_end(clip):
    visual, images = clip.towers.model.visual, torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    expected = load(clip.name).towers.image_features(images)
    drop(visual, 0.5, 0.9)
    assert torch.equal(clip.towers.image_features(images), expected)
    drop(visual, 0.5, 0.0)
    assert not torch.equal(clip.towers.image_features(images), expected)
    clip.towers.eval()
    assert torch.equal(clip.towers.image_features(images), expected)


def test_a_tower_without_patches_is_refused(tmp_path):
    clip = load(
        f"local-dir:{save_tiny(tmp_path, vision_cfg={'image_size': 32, 'layers': [1, 1, 1, 1], 'width': 8})}"
    )
    with pytest.raises(UserError, match="a ModifiedResNet has no patches to drop"):
        install(clip.towers.model.visual)
