"""DDP, its hooks and the collectives on one rank, which training leaves out where there is one rank.

RANK=0 LOCAL_RANK=0 WORLD_SIZE=1 ... python -m benchmarks.gpu.ddp OUT DEADLINE MODEL SHARDS BATCH
"""

import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist

from benchmarks.gpu.record import Record
from benchmarks.gpu.smoke import PART
from train.determinism import noise_batch
from train.recipe import Recipe
from train.setup import setup, wrap_ddp
from train.step import train_step
from train.world import World, _Gather, joined_world

STEPS, TOKENS = 3, 16
BOUND = 1e-2  # relative; bf16, and kernels that add in any order


def after(recipe: Recipe, world: World, ddp: bool) -> dict[str, float]:
    """Loss and gradient norm of the last of STEPS steps on one batch of noise."""
    torch.manual_seed(0)
    state = setup(recipe, None, world)
    state.towers.train()
    batch = noise_batch(state, recipe.global_batch_size, min(TOKENS, state.clip.towers.context_length))
    chunked = state.micro_batch_size < recipe.global_batch_size
    if ddp:
        state.towers = wrap_ddp(state.towers, replace(world, world_size=2), chunked)  # as if there were two
    values = [train_step(state, batch) for _ in range(STEPS)][-1]
    return {name: float(values[f"train/{name}"]) for name in ("loss", "grad_norm")}


def collectives(world: World) -> dict:
    """The features' all_gather with its backward pass, and gloo's groups beside the device's."""
    features = torch.randn(8, 4, device=world.device, requires_grad=True)
    _Gather.apply(features, 0, 1).sum().backward()
    total = torch.ones(3)
    dist.all_reduce(total, group=world.host_group)
    dist.monitored_barrier(world.roll_call)
    return {"equal": bool(features.grad.eq(1).all() and total.eq(1).all()), "backend": dist.get_backend()}


def main(out: str, deadline: str, model: str, data: str, batch: str) -> None:
    record = Record(Path(out), float(deadline))
    with joined_world() as world:
        record.note(PART, "collectives", **collectives(world))
        size = int(batch) // 2
        for compiled in ("never",) if world.device.type == "cpu" else ("never", "always"):
            for chunk in (size, size // 2):
                options = {"global_batch_size": size, "micro_batch_size": chunk, "compile": compiled}
                recipe = Recipe(model, data, "", workers=0, activation_checkpointing="none", **options)
                plain, wrapped = (after(recipe, world, ddp) for ddp in (False, True))
                off = max(abs(plain[name] - wrapped[name]) / plain[name] for name in plain)
                name = f"DDP{' chunked' if chunk < size else ''}{' compiled' if compiled == 'always' else ''}"
                record.note(
                    PART, f"{name} equals no DDP", equal=off < BOUND, relative_difference=off, **plain
                )


if __name__ == "__main__":
    main(*sys.argv[1:])
