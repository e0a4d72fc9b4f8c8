"""Run under torchrun by test_step: one gradient of the global batch, this rank holding its share; saved by
the first rank.
"""

import sys

import numpy as np
import torch

from train.data.augment import CROP_DRAWS, DRAWS, draw_changes
from train.data.loader import Batch
from train.loss import loss_of, train_logit_bias
from train.model.clip import load
from train.recipe import Augment, Recipe
from train.step import backward
from train.world import World, joined_world

LOSSES = [
    ("clip", "ignore"),
    ("clip", "positive"),
    ("siglip", "negative"),
    ("siglip", "ignore"),
    ("siglip", "positive"),
]


def gradients(
    model: str, micro_batch_size: int, out: str, compress: bool, losses: list[tuple[str, str]]
) -> None:
    with joined_world() as world:
        saved = []
        for loss, same_group in losses:
            saved += gradients_of_two_steps(model, micro_batch_size, world, compress, loss, same_group)
        if world.is_first:
            torch.save(saved, out)


def gradients_of_two_steps(
    model: str,
    micro_batch_size: int,
    world: World,
    compress: bool = False,
    loss: str = "clip",
    same_group: str = "negative",
) -> list[dict]:
    clip = load(model)
    train_logit_bias(clip, loss)
    loss_of_recipe = loss_of(Recipe(model, "", "", loss=loss, same_group=same_group))
    clip.towers.train()
    whole = global_batch()
    share = len(whole.images) // world.world_size
    towers = wrap_ddp(clip.towers, world, chunked=micro_batch_size < share, compress=compress)
    mine = Batch(*(tensor[world.rank * share :][:share] for tensor in whole))
    saved = []
    for samples in (0, 100):  # the second call meets DDP's rebuilt buckets
        clip.towers.zero_grad()
        value = backward(towers, mine, micro_batch_size, world, seed=0, samples=samples, loss=loss_of_recipe)
        value = world.sum(value.clone()) / world.world_size
        trained = {
            name: parameter.grad.clone()
            for name, parameter in clip.towers.named_parameters()
            if parameter.requires_grad
        }
        saved.append({"loss": value, **trained})
    return saved


def global_batch() -> Batch:
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (16, 3, 16, 16), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 49406, (16, 10), generator=generator)
    tokens[:, 7] = 49407  # the end of a text, where the tower reads its feature
    # Groups across the ranks' border, in their halves, and captions that cross the groups.
    ids = torch.stack(
        [torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 6, 7, 1, 8, 9, 9, 9, 10]), 100 + torch.arange(16) % 11], dim=1
    )
    return Batch(images, tokens, global_changes(), ids)


def global_changes() -> torch.Tensor:
    augment = Augment(
        color_jitter=(0.2, 0.2, 0.1, 0.1), gray_scale_prob=0.2, flip_prob=0.5, blur_prob=0.2, theme_prob=0.5
    )
    drawn = np.random.default_rng(0).random((16, DRAWS - CROP_DRAWS))
    return torch.tensor([draw_changes(augment, uniforms) for uniforms in drawn.tolist()])


if __name__ == "__main__":
    wanted = LOSSES if "losses" in sys.argv else [("clip", "negative")]
    gradients(sys.argv[1], int(sys.argv[2]), sys.argv[3], "compress" in sys.argv, wanted)
