"""Run under torchrun by test_step: one gradient of the global batch, this rank holding its share; saved by the first rank."""

import sys

import numpy as np
import torch

from train.augment import CROP_DRAWS, DRAWS, draw_changes
from train.loader import Batch
from train.model import load
from train.recipe import Augment
from train.step import backward, distribute
from train.world import World, joined_world


def gradients(model: str, micro_batch: int, out: str, compress: bool) -> None:
    with joined_world() as world:
        saved = gradients_of_two_steps(model, micro_batch, world, compress)
        if world.is_first:
            torch.save(saved, out)


def gradients_of_two_steps(model: str, micro_batch: int, world: World, compress: bool = False) -> list[dict]:
    clip = load(model)
    clip.towers.train()
    whole = global_batch()
    share = len(whole.images) // world.world_size
    towers = distribute(clip.towers, world, chunked=micro_batch < share, compress=compress)
    mine = Batch(*(tensor[world.rank * share :][:share] for tensor in whole))
    saved = []
    for samples in (0, 100):  # the second call meets DDP's rebuilt buckets
        clip.towers.zero_grad()
        loss = backward(towers, mine, micro_batch, world, seed=0, samples=samples)
        loss = world.sum(loss.clone()) / world.world_size
        saved.append({"loss": loss, **{name: parameter.grad.clone() for name, parameter in clip.towers.named_parameters()}})
    return saved


def global_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 49406, (16, 10), generator=generator)
    tokens[:, 7] = 49407  # the end of a text, where the tower reads its feature
    return Batch(images, tokens, global_changes())


def global_changes() -> torch.Tensor:
    augment = Augment(color_jitter=(0.2, 0.2, 0.1, 0.1), gray_scale_prob=0.2, flip_prob=0.5, blur_prob=0.2)
    drawn = np.random.default_rng(0).random((16, DRAWS - CROP_DRAWS))
    return torch.tensor([draw_changes(augment, uniforms) for uniforms in drawn.tolist()])


if __name__ == "__main__":
    gradients(sys.argv[1], int(sys.argv[2]), sys.argv[3], "compress" in sys.argv)
