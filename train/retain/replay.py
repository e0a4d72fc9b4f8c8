"""Replay: pairs of what the base could do, on which the model is to go on giving the features that the base
gives.

A second stream of pairs beside the training pairs, a function of (seed, samples) as that is; each step takes
a quarter of a batch of it:

    replay_weight * mean over pairs of |image_features - base's|^2 + |text_features - base's|^2

That is the feature distillation of CLIP-KD (Yang et al. 2024) with the model's own past as the teacher, as in
Learning without Forgetting (Li & Hoiem 2016). Every pair stands for itself, so ranks and chunks need no
exchange to be exact."""

import contextlib
import copy

import torch
from torch import nn

from data_prep.errors import UserError
from data_prep.shards import Shards
from train.data.loader import Batch, TrainPairs, train_loader
from train.data.order import Order
from train.loss import fp32_products
from train.model.clip import Clip
from train.recipe import Recipe
from train.step import chunks_of
from train.world import World

PART = 4  # a step replays this part of a batch: with the base's forward, a third of the step's work more


def replay_pairs(recipe: Recipe, world: World) -> Shards | None:
    """The pairs to replay, their bytes verified (each rank its part), or None where the recipe has none.

    Raises:
        UserError: there are none, too few, or the batch has no quarter that the ranks can share.
    """
    if not recipe.replay:
        return None
    pairs, of_step = Shards(recipe.replay, "train"), recipe.global_batch_size // PART
    if recipe.global_batch_size % (PART * world.world_size):
        fitting = (
            recipe.global_batch_size - recipe.global_batch_size % (PART * world.world_size)
            or PART * world.world_size
        )
        raise UserError(
            f"--replay: as many pairs as a quarter of the batch are replayed, and of --global_batch_size {recipe.global_batch_size} "
            f"that cannot be shared evenly by {world.world_size} ranks; pass --global_batch_size {fitting}"
        )
    if len(pairs) < of_step:
        raise UserError(
            f"{recipe.replay}: {len(pairs)} pairs to replay are fewer than the {of_step} of one step; pass a"
            " smaller --global_batch_size"
        )
    pairs.verify(world.rank, world.world_size)
    return pairs


class Replay:
    """The stream of pairs to replay, and the base that knows them, frozen."""

    def __init__(self, pairs: Shards, clip: Clip, recipe: Recipe, world: World, samples: int, end: int):
        """Args:
        clip: as it was loaded, on the device, before its blocks are compiled and a checkpoint is restored.
        samples, end: training pairs seen, and at the end of the run.
        """
        self.base = copy.deepcopy(clip.towers).requires_grad_(False).eval()
        self.weight, self.device = recipe.replay_weight, world.device
        order = Order(pairs.shard_sizes, recipe.global_batch_size // PART, recipe.seed)
        data = TrainPairs(pairs, order, clip.image_size, recipe.augment, recipe.captions)
        self.batches = train_loader(
            data, clip.tokenize, samples // PART, end // PART, world, -(-recipe.workers // PART)
        )

    def backward(self, towers: nn.Module, micro_batch_size: int) -> torch.Tensor:
        """Add the gradient of the next pairs' distance, weighted, to the parameters; gives this rank's
        distance, fp32 [].

        To be called before train.step.backward: under DDP that one reduces the sum of both. Both models are
        as in evaluation, without dropout and with BatchNorm's own statistics, or the distance would not be 0
        for a model that is the base.

        Args:
            towers: train.model.clip.Towers, or DDP around it, whose graph is not static.
        """
        batch = Batch(*(tensor.to(self.device, non_blocking=True) for tensor in next(self.batches)))
        distance = torch.zeros((), device=self.device)
        towers.eval()
        with getattr(towers, "no_sync", contextlib.nullcontext)(), fp32_products("high", self.device):
            for chunk in chunks_of(batch, micro_batch_size):
                with torch.no_grad():
                    wanted = self.base(chunk.images, chunk.tokens, chunk.changes)
                found = towers(chunk.images, chunk.tokens, chunk.changes)
                apart = sum(
                    (mine - base).square().sum() for mine, base in zip(found[:2], wanted[:2], strict=True)
                ) / len(batch.images)
                (self.weight * apart).backward()
                distance += apart.detach()
        towers.train()
        return distance
