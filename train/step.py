"""The gradient of the global batch, whole or in micro batches: the same to rounding."""

import contextlib

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from train.data.loader import Batch
from train.data.order import random_bits
from train.loss import Loss, clip_loss, fp32_products
from train.world import World

DROPOUT = 4  # a stream of randomness beside those of train.data.order and train.data.loader


def wrap_ddp(towers: nn.Module, world: World, chunked: bool = False, compress: bool = False) -> nn.Module:
    """`towers` so that backward() leaves the mean gradient of all ranks.

    Args:
        chunked: whether steps will be in micro batches; DDP's static graph does not go with passes that are
            not reduced.
        compress: gradients travel in bf16.
    """
    if world.world_size == 1:
        return towers
    together = DistributedDataParallel(towers, static_graph=not chunked, gradient_as_bucket_view=True)
    if compress:
        together.register_comm_hook(None, bf16_compress_hook)
    return together


def backward(
    towers: nn.Module,
    batch: Batch,
    micro_batch_size: int,
    world: World,
    seed: int,
    samples: int,
    loss: Loss = clip_loss,
) -> torch.Tensor:
    """Add the gradient of the global batch's loss to the parameters; gives this rank's loss, fp32 [].

    Where this rank's share is more than `micro_batch_size`, features of all chunks are computed without a graph,
    the loss is taken once over all of them, and each chunk is computed again to receive its gradient (Gao et
    al. 2021, "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"). What is random in a
    forward is seeded by (seed, samples, rank, chunk), so the second computation repeats the first.

    Args:
        towers: train.model.clip.Towers, or DDP around it.
        batch: this rank's pairs, on its device.
        samples: pairs seen before this step.
        loss: as train.loss.loss_of gives it.
    """
    with fp32_products("high", batch.images.device):
        return _backward(towers, batch, micro_batch_size, world, seed, samples, loss)


def _backward(
    towers: nn.Module, batch: Batch, micro_batch_size: int, world: World, seed: int, samples: int, loss: Loss
) -> torch.Tensor:
    chunks = chunks_of(batch, micro_batch_size)
    seeds = random_bits(len(chunks), seed, samples, world.rank, DROPOUT).tolist()
    if len(chunks) == 1:
        torch.manual_seed(seeds[0])
        value = loss(towers(batch.images, batch.tokens, batch.changes), batch.ids, world)
        value.backward()
        return value.detach()

    bare = getattr(towers, "module", towers)
    features = []
    with torch.no_grad():
        for chunk, chunk_seed in zip(chunks, seeds, strict=True):
            torch.manual_seed(chunk_seed)
            features.append(bare(chunk.images, chunk.tokens, chunk.changes))
    image_features, text_features, *scalars = zip(
        *features, strict=True
    )  # logit_scale, and logit_bias where there is one
    leaves = [
        torch.cat(image_features),
        torch.cat(text_features),
        *(scalar[0].detach().clone() for scalar in scalars),
    ]
    value = loss([leaf.requires_grad_() for leaf in leaves], batch.ids, world)
    value.backward()
    image_gradients, text_gradients = (leaf.grad.split(micro_batch_size) for leaf in leaves[:2])
    for number, (chunk, chunk_seed) in enumerate(zip(chunks, seeds, strict=True)):
        last = number == len(chunks) - 1
        with contextlib.nullcontext() if last or bare is towers else towers.no_sync():
            torch.manual_seed(chunk_seed)
            again = towers(chunk.images, chunk.tokens, chunk.changes)
            # A scalar has one gradient for the whole batch; it goes in with the last chunk, when DDP reduces.
            scalar_gradients = [leaf.grad if last else torch.zeros_like(leaf) for leaf in leaves[2:]]
            gradients = [image_gradients[number], text_gradients[number], *scalar_gradients]
            # The features of a locked tower want no gradient, nor does a logit_bias of which the loss does
            # not depend.
            trained = [
                pair
                for pair in zip(again, gradients, strict=True)
                if pair[0].requires_grad and pair[1] is not None
            ]
            torch.autograd.backward(*zip(*trained, strict=True))
    return value.detach()


def chunks_of(batch: Batch, micro_batch_size: int) -> list[Batch]:
    """The batch in parts of `micro_batch_size` pairs, the last one with what is left."""
    return [Batch(*part) for part in zip(*(tensor.split(micro_batch_size) for tensor in batch), strict=True)]
