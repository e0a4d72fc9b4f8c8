"""Replay: on general pairs, the model keeps giving the features that the initial model gives.

A second stream of pairs beside the training pairs, a function of (seed, samples) like them. Each step replays
a quarter of a batch:

    replay_weight * mean over pairs of |image_features - initial|^2 + |text_features - initial|^2

This is the feature distillation of CLIP-KD (Yang et al. 2024) with the model's own past as the teacher, as in
Learning without Forgetting (Li & Hoiem 2016). Pairs do not interact, so ranks and chunks need no exchange to
be exact, and images and texts need not belong together:

    replay: SHARDS                     images and captions of these pairs
    replay: own                        images of the training pairs, and no texts
    and replay_texts: FILE             the images of either, and sentences of this file
"""

import hashlib
from pathlib import Path

import torch
from torch import nn

from data_prep.errors import UserError
from data_prep.inputs.texts import txt_captions
from data_prep.shards import Shards
from train.data.augment import Augmentation
from train.data.captions import caption
from train.data.loader import Pair, Skipped, TrainPairs, train_loader
from train.data.order import Order
from train.loss import fp32_products
from train.model.clip import Clip
from train.model.towers import Towers
from train.recipe import OWN, SKIP, Recipe
from train.world import World, no_sync

PART = 4  # a step replays 1/PART of a batch; with the initial model's forward, a third more work per step


def check_replay(recipe: Recipe, n_pairs: int, world: World) -> None:
    """Check that a quarter of the batch can be divided among the ranks, and that there are as many pairs.

    Raises:
        UserError: not so.
    """
    size, divisor = recipe.global_batch_size, PART * world.world_size
    if size % divisor:
        raise UserError(
            f"--global-batch-size {size}: --replay adds a quarter of a batch, which cannot be divided evenly"
            f" among {world.world_size} ranks; pass --global-batch-size {size - size % divisor or divisor}"
        )
    if n_pairs < size // PART:
        raise UserError(
            f"{recipe.replay}: {n_pairs} pairs are fewer than the {size // PART} that one step replays; pass"
            " a smaller --global-batch-size"
        )


def read_texts(file: str) -> tuple[list[str], str | None]:
    """The lines of a file that are not blank, and the sha256 of them; nothing and None for no file.

    Raises:
        UserError: it cannot be read, is not in UTF-8, or has no sentence.
    """
    if not file:
        return [], None
    try:
        data = Path(file).read_bytes()
        texts = [line.strip() for line in txt_captions(data)]
        joined = "\n".join(texts).encode()
    except OSError as error:
        raise UserError(f"{file}: cannot be read ({error.strerror}); pass another --replay-texts") from None
    except UnicodeError:
        raise UserError(f"{file}: not in UTF-8, as --replay-texts must be; convert it") from None
    if not texts:
        raise UserError(f"{file}: has no sentence; --replay-texts must have one per line")
    return texts, hashlib.sha256(joined).hexdigest()


class WithTexts(TrainPairs):
    """Pairs with one of `texts` as their caption, drawn by the position."""

    def __init__(self, texts: list[str], *pairs):
        super().__init__(*pairs)
        self.texts = texts

    def __getitem__(self, position: int) -> Pair:
        pair = super().__getitem__(position)
        bits = pair.patch_seed
        return pair._replace(caption=caption(self.texts[bits % len(self.texts)], self.captions, bits))


class Replay:
    """The stream of pairs, and the frozen initial model."""

    def __init__(
        self,
        pairs: Shards,
        texts: list[str],
        base: Towers,
        clip: Clip,
        recipe: Recipe,
        world: World,
        samples: int,
        end: int,
        skipped: list[Skipped] | None = None,
    ):
        """Args:
        texts: in the place of the pairs' captions; none where they stay.
        base: the initial towers, on the device, frozen.
        samples, end: training pairs seen, and at the end of the run.
        skipped: see train_loader().
        """
        self.base, self.weight, self.device = base, recipe.replay_weight, world.device
        self.augmentation = Augmentation(recipe.augment)
        order = Order(pairs.shard_sizes, recipe.global_batch_size // PART, recipe.seed)
        stream = pairs, order, clip.image_size, recipe.augment, recipe.captions, recipe.on_damage == SKIP
        replayed = WithTexts(texts, *stream) if texts else TrainPairs(*stream)
        self.n_towers = 1 if recipe.replay == OWN and not texts else 2  # captions of one's own are to change
        workers = -(-recipe.workers // PART)
        part = samples // PART, end // PART
        self.batches = train_loader(replayed, clip.tokenize, *part, world, workers, skipped)

    def backward(self, towers: nn.Module, micro_batch_size: int) -> torch.Tensor:
        """Add the weighted gradient of the next pairs' distance to the parameters; gives this rank's
        distance, fp32 [].

        Both models are in evaluation mode, without dropout and with BatchNorm's stored statistics: otherwise
        the distance would not be 0 for the initial model itself.

        Args:
            towers: Towers, or DDP around them without a static graph; gradients are not reduced here.
        """
        batch = next(self.batches).to(self.device)
        distance = torch.zeros((), device=self.device)
        towers.eval()
        with no_sync(towers), fp32_products("high", self.device):
            for chunk in batch.split(micro_batch_size):
                images = self.augmentation.apply(chunk.images, chunk.augment_rows)
                with torch.no_grad():
                    initial = self.base(images, chunk.tokens)
                current = towers(images, chunk.tokens)
                squares = [
                    (now - before).square().sum()
                    for now, before in zip(current[: self.n_towers], initial[: self.n_towers], strict=True)
                ]
                part = sum(squares) / len(batch.images)
                (self.weight * part).backward()
                distance += part.detach()
        towers.train()
        return distance
