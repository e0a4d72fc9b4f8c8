"""The gradient of the global batch, whole or in micro batches: the same to rounding."""

import contextlib
from collections.abc import Iterable, Iterator

import torch
from torch import nn
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.nn.parallel import DistributedDataParallel

from train.loader import Batch
from train.loss import clip_loss
from train.order import random_bits
from train.world import World

DROPOUT = 4  # a stream of randomness beside those of train.order and train.loader


def distribute(towers: nn.Module, world: World, chunked: bool = False, compress: bool = False) -> nn.Module:
    """`towers` so that backward() leaves the mean gradient of all ranks.

    Args:
        chunked: whether steps will be in micro batches; DDP's static graph does not go with passes that are not reduced.
        compress: gradients travel in bf16.
    """
    if world.world_size == 1:
        return towers
    together = DistributedDataParallel(towers, static_graph=not chunked, gradient_as_bucket_view=True)
    if compress:
        together.register_comm_hook(None, bf16_compress_hook)
    return together


def backward(towers: nn.Module, batch: Batch, micro_batch: int, world: World, seed: int, samples: int) -> torch.Tensor:
    """Add the gradient of the global batch's loss to the parameters; gives this rank's loss, fp32 [].

    Where this rank's share is more than `micro_batch`, features of all chunks are computed without a graph, the loss
    is taken once over all of them, and each chunk is computed again to receive its gradient (Gao et al. 2021,
    "Scaling Deep Contrastive Learning Batch Size under Memory Limited Setup"). What is random in a forward
    is seeded by (seed, samples, rank, chunk), so the second computation repeats the first.

    Args:
        towers: train.model.Towers, or DDP around it.
        batch: this rank's pairs, on its device.
        samples: pairs seen before this step.
    """
    with fp32_products("high", batch.images.device):
        return _backward(towers, batch, micro_batch, world, seed, samples)


def _backward(towers: nn.Module, batch: Batch, micro_batch: int, world: World, seed: int, samples: int) -> torch.Tensor:
    chunks = [Batch(*part) for part in zip(*(tensor.split(micro_batch) for tensor in batch), strict=True)]
    seeds = random_bits(len(chunks), seed, samples, world.rank, DROPOUT).tolist()
    if len(chunks) == 1:
        torch.manual_seed(seeds[0])
        loss = _exact_loss(towers(*batch), world)
        loss.backward()
        return loss.detach()

    bare = getattr(towers, "module", towers)
    features = []
    with torch.no_grad():
        for chunk, chunk_seed in zip(chunks, seeds, strict=True):
            torch.manual_seed(chunk_seed)
            features.append(bare(*chunk))
    image_features, text_features, (logit_scale, *_) = zip(*features, strict=True)
    leaves = [leaf.requires_grad_() for leaf in (torch.cat(image_features), torch.cat(text_features), logit_scale.clone())]
    loss = _exact_loss(leaves, world)
    loss.backward()
    image_gradients, text_gradients = (leaf.grad.split(micro_batch) for leaf in leaves[:2])
    for number, (chunk, chunk_seed) in enumerate(zip(chunks, seeds, strict=True)):
        last = number == len(chunks) - 1
        with contextlib.nullcontext() if last or bare is towers else towers.no_sync():
            torch.manual_seed(chunk_seed)
            *again, logit_scale = towers(*chunk)
            # logit_scale has one gradient for the whole batch; it goes in with the last chunk, when DDP reduces.
            scale_gradient = leaves[2].grad if last else torch.zeros_like(logit_scale)
            torch.autograd.backward([*again, logit_scale], [image_gradients[number], text_gradients[number], scale_gradient])
    return loss.detach()


def _exact_loss(features: Iterable[torch.Tensor], world: World) -> torch.Tensor:
    image_features, text_features, logit_scale = features
    with fp32_products("highest", image_features.device):  # logits reach 100, and TF32 would move them by a tenth
        return clip_loss(image_features, text_features, logit_scale, world)


@contextlib.contextmanager
def fp32_products(precision: str, device: torch.device) -> Iterator[None]:
    """fp32 matrix products of a GPU in here: "high" by tensor cores (TF32, 10 bits of mantissa), "highest" with all 23."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
