"""Counts of what compiled blocks do, and the same on each of several ranks.

test_compiled.py runs this file under torchrun:
  python -m tests.compiled_script OUT MODEL
"""

import sys
from dataclasses import replace

import torch
import torch.nn.functional as F
from torch import nn

from tests.ranks_script import ALONE, BASIC, N_PAIRS, global_batch, train_state
from train.model.activation_memory import apply_checkpointing, blocks
from train.model.clip import Clip, load
from train.step import TrainState, backward
from train.world import World, joined_world


class Counts:
    """Graphs made, runs of them, and calls of blocks."""

    def __init__(self):
        self.graphs = self.runs = self.calls = 0

    def backend(self, graph: torch.fx.GraphModule, inputs: list):
        """Runs what was traced as it is. Partitioned graphs ("aot_eager_decomp_partition") are as many."""
        self.graphs += 1

        def run(*arguments):
            self.runs += 1
            return graph.forward(*arguments)

        return run

    def compile(self, clip: Clip, mode: str) -> None:
        """apply_checkpointing() with compiled blocks, all counted."""
        compile_in_place = nn.Module.compile
        nn.Module.compile = lambda module: compile_in_place(module, backend=self.backend)
        try:
            apply_checkpointing(clip.towers.model, mode, compiled=True)
        finally:
            nn.Module.compile = compile_in_place
        for block in blocks(clip.towers.model):
            block.register_forward_pre_hook(self._count)

    def _count(self, *_) -> None:
        self.calls += 1


def compiled_state(
    counts: Counts, clip: Clip, mode: str = "none", world: World = ALONE, **changes
) -> TrainState:
    state = train_state(clip, replace(BASIC, **changes), world)
    counts.compile(clip, mode)
    return state


def step(state: TrainState, length: int = 16) -> None:
    """A forward and backward pass of this rank's pairs, with captions that are cut at `length` tokens."""
    batch, share = global_batch(), N_PAIRS // state.world.world_size
    batch = batch._replace(tokens=F.pad(batch.tokens[:, :8], (0, length - 8)))
    backward(state, batch.split(share)[state.world.rank])


def main(world: World, out: str, model: str) -> None:
    """Save vars(Counts) of the first rank after three steps on whole shares."""
    counts = Counts()
    state = compiled_state(counts, load(model), world=world, micro_batch_size=N_PAIRS // world.world_size)
    for _ in range(3):  # DDP with a static graph is another from the second step on
        step(state)
    if world.is_first:
        torch.save(vars(counts), out)


if __name__ == "__main__":
    with joined_world() as world:
        main(world, *sys.argv[1:])
