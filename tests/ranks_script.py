"""A TrainState around a made-up global batch, and its gradients on each rank.

test_step.py runs this file under torchrun, where each rank holds its share of the batch:
  python -m tests.ranks_script OUT PLAIN_MODEL BIASED_MODEL
"""

import sys
from dataclasses import replace

import numpy as np
import torch

from train.data.augment import N_UNIFORMS, Augmentation
from train.data.loader import Batch
from train.data.order import Order
from train.loss import loss_of, train_logit_bias
from train.model.clip import Clip, load
from train.model.patch_dropout import PatchDropout
from train.optim import build_optimizer
from train.recipe import Augment, Recipe
from train.retain.select import WeightSelector
from train.run.nonfinite import NonFiniteGuard
from train.setup import wrap_ddp
from train.step import TrainState, backward
from train.world import World, joined_world

ALONE = World()
N_PAIRS = 16
MICRO_BATCH_SIZES = (8, 3)  # on two ranks: a rank's whole share, and three chunks
AUGMENT = Augment(color_jitter=(0.2, 0.2, 0.1, 0.1), gray_scale_prob=0.2, flip_prob=0.5, blur_prob=0.2)
BASIC = Recipe(
    "made up", "", "", global_batch_size=N_PAIRS, micro_batch_size=N_PAIRS, precision="fp32", augment=AUGMENT
)
# name -> what differs from BASIC, and whether pairs have weights. "clip" uses a model without a logit_bias,
# all others one with it.
CASES = {
    "clip": {},
    "clip positive": {"same_group": "positive"},
    "siglip": {"loss": "siglip"},
    "siglip positive": {"loss": "siglip", "same_group": "positive"},
    "patch dropout": {"patch_dropout": 0.5},
    "clip weighted": {"same_group": "positive", "weighted": True},
    "siglip weighted": {"loss": "siglip", "weighted": True},
}


def train_state(clip: Clip, recipe: Recipe = BASIC, world: World = ALONE) -> TrainState:
    """The state at the start of a run of ten steps, without shards and without a run folder."""
    if recipe.patch_dropout:
        PatchDropout.install(clip.towers.model.visual).set_rate(recipe.patch_dropout, 0.0)
    train_logit_bias(clip, recipe.loss)
    clip.towers.train()
    return TrainState(
        recipe=recipe,
        world=world,
        clip=clip,
        towers=wrap_ddp(clip.towers, world, recipe.micro_batch_size * world.world_size < N_PAIRS),
        optimizer=build_optimizer(clip.towers, recipe.optim),
        augmentation=Augmentation(recipe.augment),
        loss=loss_of(recipe),
        order=Order(np.array([N_PAIRS]), N_PAIRS, recipe.seed),
        pairs=None,
        batches=iter(()),
        samples=0,
        end=10 * N_PAIRS,
        activation_checkpointing="none",
        micro_batch_size=recipe.micro_batch_size,
        selector=WeightSelector(clip, recipe),
        guard=NonFiniteGuard(),
    )


def global_batch(augment: Augment = AUGMENT, weighted: bool = False) -> Batch:
    """Noise, with groups and captions that several pairs share; by wish, of weights that differ by rank."""
    generator = torch.Generator().manual_seed(3)
    images = torch.randint(0, 256, (N_PAIRS, 3, 16, 16), dtype=torch.uint8, generator=generator)
    tokens = torch.randint(1, 49406, (N_PAIRS, 10), generator=generator)
    tokens[:, 7] = 49407  # the end of a text, where the tower reads its feature
    # Groups that cross the ranks' border, groups within a rank, and captions that cross the groups.
    groups = torch.tensor([0, 0, 1, 2, 3, 4, 5, 6, 6, 7, 1, 8, 9, 9, 9, 10])
    ids = torch.stack([groups, 100 + torch.arange(N_PAIRS) % 11], dim=1)
    augmentation = Augmentation(augment)
    uniforms = np.random.default_rng(0).random((N_PAIRS, N_UNIFORMS)).tolist()
    rows = torch.tensor([augmentation.draw(numbers) for numbers in uniforms])
    patch_seeds = torch.randint(0, 1 << 62, (N_PAIRS,), generator=generator)
    weights = torch.arange(N_PAIRS) ** 2 / N_PAIRS**2 if weighted else None
    return Batch(images, tokens, rows, patch_seeds, ids, weights)


def gradients(state: TrainState, batch: Batch) -> dict[str, torch.Tensor]:
    """The loss of the global batch and the gradient of each trained parameter.

    Args:
        batch: this rank's share.
    """
    state.clip.towers.zero_grad()
    loss = state.world.sum(backward(state, batch).clone()) / state.world.world_size
    parameters = state.clip.towers.named_parameters()
    trained = {name: parameter.grad.clone() for name, parameter in parameters if parameter.requires_grad}
    return {"loss": loss, **trained}


def gradients_of_two_steps(
    model: str, micro_batch_size: int, world: World, weighted: bool = False, **changes
) -> list[dict]:
    """gradients() twice: the second backward pass meets the buckets that DDP rebuilds after the first."""
    state = train_state(load(model), replace(BASIC, micro_batch_size=micro_batch_size, **changes), world)
    share = N_PAIRS // world.world_size
    batch = global_batch(weighted=weighted).split(share)[world.rank]
    return [gradients(state, batch) for _ in range(2)]


def save_gradients(world: World, out: str, plain_model: str, biased_model: str) -> None:
    """Save {(case, micro_batch_size): gradients_of_two_steps()} to the file `out`, by the first rank."""
    saved = {}
    for micro_batch_size in MICRO_BATCH_SIZES:
        for name, changes in CASES.items():
            model = plain_model if name == "clip" else biased_model
            saved[name, micro_batch_size] = gradients_of_two_steps(model, micro_batch_size, world, **changes)
    if world.is_first:
        torch.save(saved, out)


if __name__ == "__main__":
    with joined_world() as world:
        save_gradients(world, *sys.argv[1:])
