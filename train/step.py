"""One optimizer step. The loop runs it, the benchmark times it, and the fault injection disturbs it.

batch -> augment -> towers -> features -> loss -> gradients -> clipped -> AdamW -> L2-SP, EMA
"""

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from torch import nn

from train.data.augment import Augmentation
from train.data.loader import Batch, Skipped, TrainPairs
from train.data.order import Order, random_bits
from train.loss import Loss, fp32_products
from train.model.clip import Clip
from train.optim import GuardedAdamW, lr_at, set_lr
from train.recipe import Recipe
from train.retain.l2sp import L2SP
from train.retain.replay import Replay
from train.retain.select import WeightSelector
from train.run.nonfinite import NonFiniteGuard
from train.world import World, no_sync

DROPOUT = 4  # a stream of random bits beside those of train.data.order and train.data.loader

Values = dict[str, torch.Tensor | float]  # what a step logs, by name; tensors stay on the device


@dataclass
class TrainState:
    """What steps change and what they need for it; setup() makes one, train_step() advances it.

    Attributes:
        clip: the model; its towers hold the weights in training.
        towers: clip.towers, or DDP around them.
        batches: this rank's batches, from `samples` on.
        samples: pairs seen by all ranks. With `seed` it decides data order, augmentation, dropout and
            learning rate.
        end: pairs at the end of the run.
        activation_checkpointing, micro_batch_size: as chosen where the recipe says auto.
        skipped: damaged samples of this rank's batches, replayed ones included, that are not logged yet.
    """

    recipe: Recipe
    world: World
    clip: Clip
    towers: nn.Module
    optimizer: GuardedAdamW
    augmentation: Augmentation
    loss: Loss
    order: Order
    pairs: TrainPairs
    batches: Iterator[Batch]
    samples: int
    end: int
    activation_checkpointing: str
    micro_batch_size: int
    selector: WeightSelector
    guard: NonFiniteGuard
    l2_sp: L2SP | None = None
    replay: Replay | None = None
    skipped: list[Skipped] = field(default_factory=list)

    @property
    def step(self) -> int:
        """Steps taken."""
        return self.samples // self.recipe.global_batch_size

    @property
    def steps(self) -> int:
        return self.end // self.recipe.global_batch_size


def train_step(state: TrainState, batch: Batch) -> Values:
    """Take one step on this rank's share of a global batch, and advance `state.samples`.

    A step whose loss or gradient is not finite on any rank changes no weight, moment or average
    (NonFiniteGuard).

    Returns:
        "train/loss" and others, means over the ranks, fp32 [] on the device: nothing waits for a GPU here.
    """
    recipe, world, optimizer = state.recipe, state.world, state.optimizer
    lr = lr_at(state.step, state.steps, recipe.optim)
    set_lr(optimizer, lr)
    values: Values = {"train/lr": lr}
    if dropout := state.clip.towers.patch_dropout:
        dropout.set_rate(recipe.patch_dropout, state.samples / state.end)
    if state.replay:  # before backward(), which lets DDP reduce the sum of both gradients
        distance = state.replay.backward(state.towers, state.micro_batch_size)
        values["train/replay_loss"] = world.sum(distance) / world.world_size
    loss = world.sum(backward(state, batch.to(world.device))) / world.world_size
    grad_norm = torch.nn.utils.clip_grad_norm_(state.clip.towers.parameters(), recipe.optim.max_grad_norm)
    found_inf = state.guard.check(state.samples, loss, grad_norm)
    optimizer.step(found_inf=found_inf)  # waits for the snapshot of a checkpoint being written (Run.start)
    if state.l2_sp:
        state.l2_sp.step(optimizer, found_inf)
    optimizer.zero_grad()
    if recipe.loss == "clip":  # SigLIP's logit_scale exceeds 100 from the start
        state.clip.towers.clamp_logit_scale()
    state.samples += recipe.global_batch_size
    state.selector.after_step(state.step, found_inf)
    logit_scale = state.clip.towers.model.logit_scale.detach().exp()
    return {"train/loss": loss, **values, "train/grad_norm": grad_norm, "train/logit_scale": logit_scale}


def backward(state: TrainState, batch: Batch) -> torch.Tensor:
    """Add the gradient of the global batch's loss to the parameters; gives this rank's loss, fp32 [].

    Where this rank's share is more than `micro_batch_size`, features of all chunks are computed without a
    graph, the loss is taken once over all of them, and each chunk is computed again to receive its gradient
    (Gao et al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"). What is
    random in a forward is seeded by (seed, samples, rank, chunk), so the second computation repeats the
    first.

    Args:
        batch: this rank's pairs, on its device.
    """
    chunks = batch.split(state.micro_batch_size)
    seeds = random_bits(len(chunks), state.recipe.seed, state.samples, state.world.rank, DROPOUT).tolist()
    with fp32_products("high", batch.images.device):
        if len(chunks) == 1:
            torch.manual_seed(seeds[0])
            outputs = forward(state, state.towers, batch)
            loss = state.loss(outputs, batch.ids, state.world, weights=batch.weights)
            loss.backward()
            return loss.detach()
        return _backward_in_chunks(state, batch, chunks, seeds)


def _backward_in_chunks(
    state: TrainState, batch: Batch, chunks: list[Batch], seeds: list[int]
) -> torch.Tensor:
    features = []
    with torch.no_grad():
        for chunk, seed in zip(chunks, seeds, strict=True):
            torch.manual_seed(seed)
            features.append(forward(state, state.clip.towers, chunk))
    # scalars: logit_scale, and logit_bias where the model has one.
    image_features, text_features, *scalars = zip(*features, strict=True)
    leaves = [torch.cat(image_features), torch.cat(text_features)]
    leaves += [scalar[0].detach().clone() for scalar in scalars]
    leaves = [leaf.requires_grad_() for leaf in leaves]
    loss = state.loss(leaves, batch.ids, state.world, weights=batch.weights)
    loss.backward()
    image_gradients, text_gradients = (leaf.grad.split(state.micro_batch_size) for leaf in leaves[:2])
    for number, (chunk, seed) in enumerate(zip(chunks, seeds, strict=True)):
        last = number == len(chunks) - 1
        # DDP reduces once, with the last chunk.
        with contextlib.nullcontext() if last else no_sync(state.towers):
            torch.manual_seed(seed)
            outputs = forward(state, state.towers, chunk)
            # A scalar has one gradient for the whole batch; it goes in with the last chunk, when DDP reduces.
            scalar_gradients = [leaf.grad if last else torch.zeros_like(leaf) for leaf in leaves[2:]]
            gradients = [image_gradients[number], text_gradients[number], *scalar_gradients]
            # Features of a locked tower need no gradient, nor does a logit_bias that the loss does not use.
            needed = [
                (output, gradient)
                for output, gradient in zip(outputs, gradients, strict=True)
                if output.requires_grad and gradient is not None
            ]
            torch.autograd.backward(*zip(*needed, strict=True))
    return loss.detach()


def forward(state: TrainState, towers: nn.Module, batch: Batch) -> tuple[torch.Tensor, ...]:
    """The towers' outputs for a batch, augmented; see Towers.forward."""
    images = state.augmentation.apply(batch.images, batch.augment_rows)
    return towers(images, batch.tokens, batch.patch_seeds)
