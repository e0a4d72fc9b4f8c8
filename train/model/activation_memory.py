"""What the forward pass keeps for the backward pass, and how many pairs of it fit in memory.

mode       kept                                         recomputed
none       everything                                   nothing
selective  outputs of blocks, products, attention       norms, activations and sums, in each compiled block
full       the input of each block                      each block: a third more time

"selective" is torch's selective checkpointing, not its activation_memory_budget. That is a fraction of all
bytes kept, casts of weights included; where these are many (bf16, few tokens), 0.7 recomputed every product
of a block without a warning. A batch that does not fit is computed in chunks of micro_batch_size pairs
(train.step), each forward twice.
"""

import contextlib
import functools
import logging
import math
import os
from collections.abc import Iterator

import psutil
import torch
from open_clip.hf_model import HFTextEncoder
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from data_prep.errors import UserError
from train.recipe import Recipe
from train.world import World

MODES = ("none", "selective", "full")  # each takes less memory, and more time, than the one before
# It warns of in-place operations in recomputed code. These blocks have none, or "full" would be wrong too.
logging.getLogger("torch._higher_order_ops.wrap").setLevel(logging.ERROR)
ATEN = torch.ops.aten
PRODUCTS = {ATEN.mm, ATEN.addmm, ATEN.bmm, ATEN.baddbmm, ATEN.convolution}
ATTENTION = {
    getattr(ATEN, f"_scaled_dot_product_{name}")
    for name in ("flash_attention", "flash_attention_for_cpu", "efficient_attention")
}
ATTENTION |= {ATEN._scaled_dot_product_cudnn_attention}
SPARE = 0.85  # of the free memory; the rest is for workspaces, the loss and fragments
SMALLEST_CHUNK = 16  # pairs; smaller chunks leave a GPU idle, and recomputing blocks costs less


def should_compile(recipe: Recipe, device: torch.device) -> bool:
    """Whether the blocks of the towers are compiled."""
    return (
        recipe.compile == "always"
        or recipe.activation_checkpointing == "selective"
        or (recipe.compile == "auto" and device.type == "cuda")
    )


def apply_checkpointing(model: nn.Module, mode: str, compiled: bool) -> None:
    """Make an open_clip model recompute what `mode` says; equal blocks are compiled once for all of them."""
    torch.compiler.reset()
    set_grad_checkpointing(model, mode == "full")
    for block in blocks(model):
        kind = getattr(type(block), "kind_before", type(block))
        block.__class__ = _keeping_products(kind) if mode == "selective" else kind
        block._compiled_call_impl = None
        if compiled:
            block.compile()


def set_grad_checkpointing(model: nn.Module, on: bool) -> None:
    """open_clip's, which for Hugging Face's towers switches it on whatever it is told."""
    text = getattr(model, "text", None)
    if not isinstance(text, HFTextEncoder):
        model.set_grad_checkpointing(on)
        return
    model.visual.set_grad_checkpointing(on)
    if text.transformer.supports_gradient_checkpointing:
        getattr(text.transformer, f"gradient_checkpointing_{'enable' if on else 'disable'}")()


@functools.cache
def _keeping_products(kind: type) -> type:
    """A subclass of a block's class that keeps PRODUCTS and ATTENTION of its forward; compiled once."""

    def policy(_, operation: torch._ops.OpOverload, *arguments, **options) -> CheckpointPolicy:
        kept = getattr(operation, "overloadpacket", None) in PRODUCTS | ATTENTION
        return CheckpointPolicy.MUST_SAVE if kept else CheckpointPolicy.PREFER_RECOMPUTE

    class KeepingProducts(kind):
        kind_before = kind

        def forward(self, *inputs, **options):
            contexts = functools.partial(create_selective_checkpoint_contexts, policy)
            return checkpoint(super().forward, *inputs, use_reentrant=False, context_fn=contexts, **options)

    return KeepingProducts


def blocks(model: nn.Module) -> list[nn.Module]:
    """The layers of both towers: the outermost modules of which a list holds several of one class."""
    found = []
    for child in model.children():
        layers = list(child) if isinstance(child, (nn.ModuleList, nn.Sequential)) else []
        found += layers if len(layers) > 1 and len({type(layer) for layer in layers}) == 1 else blocks(child)
    return found


@contextlib.contextmanager
def uncompiled() -> Iterator[None]:
    """Run without compiled code: evaluation's batch sizes and modes would each be compiled anew."""
    with torch.compiler.set_stance("force_eager"):
        yield


def fit_micro_batch(towers: nn.Module, recipe: Recipe, world: World) -> tuple[str, int]:
    """The recipe's activation_checkpointing and micro_batch_size; "auto" is replaced by measuring a few
    pairs.

    The fastest that fits: this rank's share of the batch at once, in the first of MODES in which it fits;
        else
    in the fewest chunks. All ranks get the same.

    Args:
        towers: on the device, as they were loaded; their gradients are cleared.

    Raises:
        UserError: not even one pair fits.
    """
    share = recipe.global_batch_size // world.world_size
    asked = share if recipe.micro_batch_size == "auto" else min(recipe.micro_batch_size, share)
    possible = [mode for mode in MODES if mode != "selective" or should_compile(recipe, world.device)]
    modes = possible if recipe.activation_checkpointing == "auto" else [recipe.activation_checkpointing]
    if len(modes) == 1 and recipe.micro_batch_size != "auto":
        return modes[0], asked
    fits = {}
    for mode in modes:
        mine = torch.tensor([pairs_that_fit(towers, mode, recipe, world, min(8, share))])
        fits[mode] = -int(world.max(-mine))
        if fits[mode] >= asked:
            return mode, asked
    if recipe.micro_batch_size != "auto":
        return modes[-1], asked
    mode = next((mode for mode in modes if fits[mode] >= SMALLEST_CHUNK), modes[-1])
    if fits[mode] < 1:
        raise UserError(
            f"{recipe.model}: with activation_checkpointing {mode}, weights, moments and one pair do not fit"
            f" into {free_bytes(world.device) / 1e9:.1f} GB of free memory; free some, or use a smaller model"
        )
    return mode, math.ceil(share / math.ceil(share / fits[mode]))


def pairs_that_fit(towers: nn.Module, mode: str, recipe: Recipe, world: World, n: int) -> int:
    """How many pairs one forward and backward pass can hold beside weights, gradients and moments, measured
    on n of them.
    """
    free = free_bytes(world.device)
    trained = sum(parameter.nbytes for parameter in towers.parameters() if parameter.requires_grad)
    apply_checkpointing(towers.model, mode, should_compile(recipe, world.device))
    towers.train()
    batch = dummy_batch(towers, n, world.device)
    # Restored below, or a BatchNorm's statistics would contain the noise.
    buffers = {name: buffer.clone() for name, buffer in towers.named_buffers()}
    if world.device.type == "cuda":
        for _ in range(2):  # the first also allocates gradients and compiles
            torch.cuda.reset_peak_memory_stats(world.device)
            before = torch.cuda.memory_allocated(world.device)
            dummy_loss(towers(*batch)).backward()
        each = (torch.cuda.max_memory_allocated(world.device) - before) / n
        towers.zero_grad()
        torch.cuda.empty_cache()
    else:
        each = saved_bytes(towers, batch) / n
        if mode == "full":  # one block at a time is kept whole
            apply_checkpointing(towers.model, "none", compiled=False)
            each += saved_bytes(towers, batch) / n / max(1, len(blocks(towers.model)))
    for name, buffer in towers.named_buffers():
        buffer.copy_(buffers[name])
    return int((SPARE * free - 3 * trained) / each)


def saved_bytes(towers: nn.Module, batch: tuple) -> int:
    """Bytes that a forward pass keeps for the backward pass, and that grow with the batch: no weights, nor
    casts of them.
    """
    kept: dict[int, tuple[int, torch.Tensor]] = {}
    weights = {tuple(parameter.shape) for parameter in towers.parameters()}
    weights |= {shape[::-1] for shape in weights}

    def keep(tensor: torch.Tensor) -> torch.Tensor:
        if tuple(tensor.shape) not in weights:
            storage = tensor.untyped_storage()
            # The tensor keeps its address from being reused.
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        outputs = towers(*batch)
    del outputs
    return sum(size for size, _ in kept.values())


def dummy_batch(towers: nn.Module, n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise images, and captions that fill the whole context."""
    size = towers.model.visual.image_size
    images = torch.randint(
        0, 256, (n, 3, *((size, size) if isinstance(size, int) else size)), dtype=torch.uint8, device=device
    )
    tokens = torch.randint(1, towers.vocab_size, (n, towers.context_length), device=device)
    return images, tokens


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still allocate; on a CPU, its share of what is free on the machine."""
    if device.type == "cuda":
        return (
            torch.cuda.mem_get_info(device)[0]
            + torch.cuda.memory_reserved(device)
            - torch.cuda.memory_allocated(device)
        )
    return psutil.virtual_memory().available // int(os.environ.get("LOCAL_WORLD_SIZE", 1))


def dummy_loss(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    image_features, text_features, logit_scale, *_ = outputs
    return (image_features @ text_features.T).mean() * logit_scale
