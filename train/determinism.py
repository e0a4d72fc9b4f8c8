"""`deterministic: true`: the same bits from the same recipe, also in a process that resumes.

what may differ                                 what is done
order of additions in kernels                   torch.use_deterministic_algorithms; flash attention's backward
                                                obeys it only without warn_only
cuBLAS with several streams                     CUBLAS_WORKSPACE_CONFIG
kernels that inductor chooses by timing         torch._inductor.config.deterministic
kernels compiled for the sizes seen first,      dynamic shapes from the start, and compile_first(): the first
which in a resumed process are others           batch that code is compiled for is the same in every process,
                                                and that of code in a cache on the disk too

Data order, augmentation and dropout are functions of (seed, samples) with or without it.
"""

import os
from contextlib import contextmanager

import torch
import torch._dynamo.config
import torch._inductor.config
import torch.compiler.config
import torch.fx.experimental._config

from data_prep.errors import UserError
from train.data.augment import N_UNIFORMS
from train.data.loader import Batch
from train.model.activation_memory import dummy_batch, should_compile
from train.recipe import switch
from train.step import TrainState, backward

WORKSPACE = "CUBLAS_WORKSPACE_CONFIG"
FIRST_TOKENS = 24  # of the captions that code is compiled with, where the context has as many
NO_IMPLEMENTATION = "does not have a deterministic implementation"


def set_deterministic(on: bool) -> None:
    """Make torch deterministic in this process, or let it choose the fastest kernels; before the first
    product on a GPU, for which cuBLAS reads its environment variable.
    """
    if on:
        os.environ.setdefault(WORKSPACE, ":4096:8")
    torch.use_deterministic_algorithms(on)
    torch.utils.deterministic.fill_uninitialized_memory = not on  # would hide a bug, and costs time
    if hasattr(torch._inductor.config, "deterministic"):  # torch 2.9
        torch._inductor.config.deterministic = on
    torch._dynamo.config.assume_static_by_default = not on
    torch.fx.experimental._config.use_duck_shape = not on  # two sizes that are equal by chance stay two


def compile_first(state: TrainState) -> None:
    """Compile the blocks of both towers with a batch whose sizes depend on the recipe alone.

    Inductor chooses kernels by the sizes that it sees first, for dynamic shapes too. Weights, statistics and
    gradients are as before.
    """
    if not should_compile(state.recipe, state.world.device):
        return
    share = state.recipe.global_batch_size // state.world.world_size
    chunk = state.micro_batch_size
    n = share if share <= chunk else chunk + (share % chunk or chunk)  # each size of a chunk once
    length = min(FIRST_TOKENS, state.clip.towers.context_length)
    # Code that was compiled for other sizes, in a cache on this disk, is not used.
    torch.compiler.config.cache_key_tag = f"{n} pairs in chunks of {chunk}, {length} tokens"
    buffers = {name: buffer.clone() for name, buffer in state.towers.named_buffers()}
    was_training = state.towers.training
    state.towers.train()
    backward(state, noise_batch(state, n, length))
    state.towers.train(was_training)
    state.optimizer.zero_grad()
    for name, buffer in state.towers.named_buffers():
        buffer.copy_(buffers[name])


def noise_batch(state: TrainState, n: int, length: int) -> Batch:
    """n pairs of noise on the device, with captions of `length` tokens; augmented as an average sample is."""
    device = state.world.device
    images, tokens = dummy_batch(state.clip.towers, n, device)
    row = state.augmentation.draw([0.5] * N_UNIFORMS)
    numbers = torch.arange(n, device=device)
    return Batch(
        images,
        tokens[:, :length].contiguous(),
        torch.tensor([row] * n, dtype=torch.float32, device=device),
        numbers,
        numbers[:, None].repeat(1, 2),
    )


@contextmanager
def explained():
    """Name the operation that has no deterministic implementation, and what to do.

    Raises:
        UserError: there is one.
    """
    try:
        yield
    except RuntimeError as error:
        if NO_IMPLEMENTATION not in str(error):
            raise
        raise UserError(
            f"--deterministic: {str(error).partition(NO_IMPLEMENTATION)[0].strip()} {NO_IMPLEMENTATION} on"
            f" this device; resume with {switch('deterministic', False)}"
        ) from None
