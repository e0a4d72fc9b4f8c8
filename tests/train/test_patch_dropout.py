"""Blank patches are dropped first, the others by the sample's seed; none in evaluation and at a run's end."""

import pytest
import torch
from conftest import save_tiny
from scipy import stats

from data_prep.errors import UserError
from train.model.clip import Clip, load
from train.model.patch_dropout import PatchDropout, uniforms

VISION = {"image_size": 32, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}  # 16 patches


@pytest.fixture
def clip(tmp_path) -> Clip:
    clip = load(f"local-dir:{save_tiny(tmp_path, vision_cfg=VISION)}")
    PatchDropout.install(clip.towers.model.visual)
    clip.towers.train()
    return clip


def noise(n: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 256, (n, 3, 32, 32), dtype=torch.uint8, generator=generator)


def kept_patches(clip: Clip, images: torch.Tensor, seeds: torch.Tensor) -> torch.Tensor:
    """Which patches of the images reach the blocks, bool [b, 16].

    Patch embeddings are set to 0, so that a token is the positional embedding of its patch.
    """
    visual, inputs = clip.towers.model.visual, []
    with torch.no_grad():
        visual.conv1.weight.zero_()
    hook = visual.ln_pre.register_forward_pre_hook(lambda module, arguments: inputs.append(arguments[0]))
    clip.towers.image_features(images, seeds)
    hook.remove()
    tokens = inputs[0][:, 1:, None]
    return torch.isclose(tokens, visual.positional_embedding[None, None, 1:]).all(-1).any(1)


def splitmix64(seed: int, n: int) -> list[int]:
    """The first n outputs, as in the reference implementation (https://prng.di.unimi.it/splitmix64.c)."""
    outputs, mask = [], (1 << 64) - 1
    for _ in range(n):
        seed = (seed + 0x9E3779B97F4A7C15) & mask
        z = ((seed ^ (seed >> 30)) * 0xBF58476D1CE4E5B9) & mask
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & mask
        outputs.append(z ^ (z >> 31))
    return outputs


def test_numbers_are_those_of_splitmix64():
    assert splitmix64(0, 3) == [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    seeds = [0, 1, 1 << 40, (1 << 63) - 1, -1, -(1 << 63)]
    numbers = uniforms(torch.tensor(seeds), 50)
    assert numbers.dtype == torch.float32
    for row, seed in zip(numbers.tolist(), seeds, strict=True):
        assert row == [(output >> 40) / 2**24 for output in splitmix64(seed % 2**64, 50)]


def test_numbers_are_uniform_over_seeds_and_patches():
    """Also for neighbouring seeds."""
    numbers = uniforms(torch.arange(500), 40).double().numpy()
    assert 0 <= numbers.min() <= numbers.max() < 1
    assert stats.kstest(numbers.flatten(), "uniform").pvalue > 0.001
    assert stats.kstest(numbers[:, 7], "uniform").pvalue > 0.001
    for one, two in ((numbers[:-1], numbers[1:]), (numbers[:, :-1], numbers[:, 1:])):
        assert abs(stats.pearsonr(one.flatten(), two.flatten()).statistic) < 0.03  # four standard deviations


def test_blank_patches_are_dropped_first(clip):
    clip.towers.patch_dropout.set_rate(0.75, 0.0)
    images = torch.full((6, 3, 32, 32), 200, dtype=torch.uint8)
    for n_drawn in range(6):  # image n has a line in its first n patches
        for patch in range(n_drawn):
            row, column = 8 * (patch // 4), 8 * (patch % 4)
            images[n_drawn, 1, row : row + 8, column + 3] = 10
    kept = kept_patches(clip, images, torch.arange(6))
    assert kept.sum(1).tolist() == [4] * 6
    for n_drawn in range(5):
        assert kept[n_drawn, :n_drawn].all()
    assert kept[5, :5].sum() == 4


def test_a_mask_is_a_function_of_the_samples_seed_and_image(clip):
    """The same in any batch, chunk and order, whatever the state of torch's generator."""
    clip.towers.patch_dropout.set_rate(0.5, 0.89)
    images, seeds = noise(400), torch.arange(400) * 12345678901
    kept = kept_patches(clip, images, seeds)
    assert kept.sum(1).eq(8).all()
    assert (kept.float().mean(0) - 0.5).abs().max() < 0.1  # four standard deviations
    for size in (1, 7, 32):
        chunks = zip(images[:70].split(size), seeds[:70].split(size), strict=True)
        assert torch.equal(torch.cat([kept_patches(clip, *chunk) for chunk in chunks]), kept[:70])
    order = torch.randperm(400)
    assert torch.equal(kept_patches(clip, images[order], seeds[order]), kept[order])
    assert not torch.equal(kept_patches(clip, images, seeds + 1), kept)


def test_no_patch_is_dropped_in_evaluation_and_at_the_end(clip):
    images, seeds = noise(2), torch.arange(2)
    expected = load(clip.name).towers.image_features(images)
    clip.towers.patch_dropout.set_rate(0.5, 0.9)
    assert torch.equal(clip.towers.image_features(images, seeds), expected)
    clip.towers.patch_dropout.set_rate(0.5, 0.0)
    assert not torch.equal(clip.towers.image_features(images, seeds), expected)
    clip.towers.eval()
    assert torch.equal(clip.towers.image_features(images), expected)


def test_training_without_seeds_is_an_error(clip):
    """Each forward needs its own: those of the forward before are not used again."""
    clip.towers.patch_dropout.set_rate(0.5, 0.0)
    clip.towers.image_features(noise(2), torch.arange(2))
    with pytest.raises(AssertionError, match=r"remember\(\)"):
        clip.towers.image_features(noise(2))


def test_a_tower_without_patches_is_an_error(tmp_path):
    vision = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8}
    clip = load(f"local-dir:{save_tiny(tmp_path, vision_cfg=vision)}")
    with pytest.raises(UserError, match="a ModifiedResNet has no patches to drop"):
        PatchDropout.install(clip.towers.model.visual)
