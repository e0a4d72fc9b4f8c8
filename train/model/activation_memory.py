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
import weakref
from collections.abc import Iterator

import psutil
import torch
from open_clip.hf_model import HFTextEncoder
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from data_prep.cores import ranks_here
from data_prep.errors import UserError
from train.device import can_compile, counts_memory, is_out_of_memory
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
# Of one function. Beyond torch's own 8, blocks stay eager for good, after one warning. A block has a graph
# for each tower, with and without gradients (chunks), in training and evaluation (replay), for inputs that
# need no gradient (locked towers, LoRA), each for fixed sizes, for dynamic ones, and for sizes of 1.
RECOMPILE_LIMIT = 64
SMALLEST_CHUNK = 16  # pairs; smaller chunks leave a GPU idle, and recomputing blocks costs less
MEASURED_PAIRS, MEASURED_PAIRS_ON_CPU = 16, 4  # and half of them; on a CPU a pair of ViT-L/14 takes a second


def should_compile(recipe: Recipe, device: torch.device) -> bool:
    """Whether the blocks of the towers are compiled."""
    return (
        recipe.compile == "always"
        or recipe.activation_checkpointing == "selective"
        or (recipe.compile == "auto" and device.type != "cpu" and can_compile(device))
    )


def apply_checkpointing(model: nn.Module, mode: str, compiled: bool) -> None:
    """Make an open_clip model recompute what `mode` says; equal blocks are compiled once for all of them."""
    torch.compiler.reset()
    torch._dynamo.config.recompile_limit = RECOMPILE_LIMIT
    # DDP's buckets would cut each block into several graphs, and blocks overlap with reductions as they are.
    torch._dynamo.config.optimize_ddp = False
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
    else in the fewest chunks. All ranks get the same.

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
        mine = torch.tensor([pairs_that_fit(towers, mode, world, asked)])
        fits[mode] = -int(world.max(-mine))
        if fits[mode] >= asked:
            return mode, asked
    if recipe.micro_batch_size != "auto":
        return modes[-1], asked
    mode = next((mode for mode in modes if fits[mode] >= SMALLEST_CHUNK), modes[-1])
    if fits[mode] < 1:
        smaller = "" if mode == MODES[-1] else f"pass --activation-checkpointing {MODES[-1]}, "
        raise UserError(
            f"{recipe.model}: with activation_checkpointing {mode}, weights, moments and one pair do not fit"
            f" into {free_bytes(world.device) / 1e9:.1f} GB of free memory; {smaller}free some, or use a"
            " smaller model"
        )
    return mode, math.ceil(share / math.ceil(share / fits[mode]))


def pairs_that_fit(towers: nn.Module, mode: str, world: World, asked: int) -> int:
    """How many pairs, at most `asked`, one forward and backward pass can hold beside weights, gradients and
    moments.

    Measured at two sizes, because part of the memory does not grow with the pairs (casts of weights are 0.9
    GB for ViT-L/14), and at the result, where the device counts its memory. Without compiled blocks, which
    keep a little less (6 % in a ViT's block, mode none): compiling takes longer than all else here, and would
    have to be done again for the real batch.
    """
    counted = counts_memory(world.device)
    trained = sum(parameter.nbytes for parameter in towers.parameters() if parameter.requires_grad)
    available = SPARE * free_bytes(world.device) - 3 * trained
    apply_checkpointing(towers.model, mode, compiled=False)
    towers.train()
    # Restored below, or a BatchNorm's statistics would contain the noise.
    buffers = {name: buffer.clone() for name, buffer in towers.named_buffers()}
    needed = functools.cache(lambda n: needed_bytes(towers, mode, n, world.device))
    size = min(asked, MEASURED_PAIRS if counted else MEASURED_PAIRS_ON_CPU)
    while size and needed(size) == math.inf:
        size //= 2
    most, half = 0, size // 2 if size > 3 else 0  # BatchNorm may not take a single pair
    if size:
        each = max(1.0, (needed(size) - needed(half)) / (size - half))
        most = max(0, min(asked, size + int((available - needed(size)) // each)))
    if counted and most > size and needed(most) > available:
        each = (needed(most) - needed(size)) / (most - size)
        most = size + int((available - needed(size)) // each)
    for name, buffer in towers.named_buffers():
        buffer.copy_(buffers[name])
    return most


def needed_bytes(towers: nn.Module, mode: str, n: int, device: torch.device) -> float:
    """Memory that a forward and backward pass of n pairs takes beside weights and gradients; infinity where
    there is less.
    """
    if not n:
        return 0.0
    try:
        batch = dummy_batch(towers, n, device)
        return _peak_bytes(towers, batch) if counts_memory(device) else _kept_bytes(towers, mode, batch)
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        return math.inf
    finally:
        towers.zero_grad()
        if counts_memory(device):
            torch.get_device_module(device).empty_cache()


def _peak_bytes(towers: nn.Module, batch: tuple) -> int:
    device = batch[0].device
    memory = torch.get_device_module(device)
    for _ in range(2):  # the first also allocates gradients
        memory.reset_peak_memory_stats(device)
        before = memory.memory_allocated(device)
        dummy_loss(towers(*batch)).backward()
    return memory.max_memory_allocated(device) - before


def _kept_bytes(towers: nn.Module, mode: str, batch: tuple) -> float:
    """What the forward pass keeps for the backward pass, and of blocks that are computed again, one."""
    with LiveBytes() as live:
        outputs = towers(*batch)
        kept = live.now
        del outputs
    if mode == "full":
        apply_checkpointing(towers.model, "none", compiled=False)
        kept += _kept_bytes(towers, "none", batch) / max(1, len(blocks(towers.model)))
        apply_checkpointing(towers.model, mode, compiled=False)
    return kept


class LiveBytes(TorchDispatchMode):
    """Counts the memory of tensors that are made inside, on devices that do not count their own.

    Attributes:
        now: bytes of the tensors that are alive.
        peak: the most that were alive at once.
    """

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._alive: dict[int, weakref.ref] = {}

    def __torch_dispatch__(self, operation, types, arguments=(), options=None):
        outputs = operation(*arguments, **(options or {}))
        given = {tensor.untyped_storage()._cdata for tensor in _tensors((arguments, options))}
        for tensor in _tensors(outputs):
            storage = tensor.untyped_storage()
            if storage._cdata not in given and storage._cdata not in self._alive:  # no view
                self._count(storage)
        return outputs

    def _count(self, storage: torch.UntypedStorage) -> None:
        address, size = storage._cdata, storage.nbytes()

        def forget(_) -> None:
            del self._alive[address]
            self.now -= size

        self._alive[address] = weakref.ref(storage, forget)
        self.now += size
        self.peak = max(self.peak, self.now)


def _tensors(tree: object) -> list[torch.Tensor]:
    return [leaf for leaf in tree_leaves(tree) if isinstance(leaf, torch.Tensor)]


def less_memory(mode: str = "", micro_batch_size: int = 0) -> str:
    """What to change where training runs out of memory.

    Args:
        mode, micro_batch_size: those in use, where they are known.
    """
    smaller = f"--micro-batch-size {micro_batch_size // 2}" if mode else "a smaller --micro-batch-size"
    changes = [smaller] if micro_batch_size != 1 else []
    changes += [f"--activation-checkpointing {MODES[-1]}"] if mode != MODES[-1] else []
    advice = f"pass {' or '.join(changes)}, and the run resumes" if changes else "use a smaller model"
    in_use = f"micro_batch_size is {micro_batch_size} and activation_checkpointing {mode}: " if mode else ""
    return in_use + advice


def dummy_batch(towers: nn.Module, n: int, device: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
    """Noise images, and captions that fill the whole context."""
    size = towers.model.visual.image_size
    images = torch.randint(
        0, 256, (n, 3, *((size, size) if isinstance(size, int) else size)), dtype=torch.uint8, device=device
    )
    tokens = torch.randint(1, towers.vocab_size, (n, towers.context_length), device=device)
    return images, tokens


def free_bytes(device: torch.device) -> int:
    """Memory that this process may still allocate; on a CPU, and where torch does not count the device's, its
    share of what is free on the machine.
    """
    if counts_memory(device):
        memory = torch.get_device_module(device)
        unused = memory.memory_reserved(device) - memory.memory_allocated(device)
        return memory.mem_get_info(device)[0] + unused
    return psutil.virtual_memory().available // ranks_here()


def dummy_loss(outputs: tuple[torch.Tensor, ...]) -> torch.Tensor:
    image_features, text_features, logit_scale, *_ = outputs
    return (image_features @ text_features.T).mean() * logit_scale
