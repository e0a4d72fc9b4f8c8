"""How fast, and in how much memory: one step on made-up batches, and the loader alone on real shards.

  python -m train.bench train/recipes/demo.yaml --data data/icons/shards
  python -m train.bench train/recipes/spectrum_icons.yaml --data SHARDS --micro_batch 64 --batch 64

The recipe's architecture is built with random weights: nothing is downloaded. A table for people, then one line of
JSON. Peak memory is the GPU's allocator's, or on the CPU the largest resident size of the process.
"""

import dataclasses
import json
import os
import resource
import sys
import time
from collections.abc import Callable

import torch

from data_prep.errors import UserError, exit_on_user_error
from data_prep.shards import Shards
from train.augment import CROP_DRAWS, DRAWS, draw_changes
from train.loader import Batch, TrainPairs, train_loader
from train.loop import check_batch
from train.memory import arrange, choose, compiles
from train.model import clamp_logit_scale, load
from train.optim import build_optimizer
from train.order import Order
from train.recipe import Recipe, parse
from train.step import backward
from train.world import World

STEPS, WARMUP_STEPS, LOADER_SECONDS = 5, 2, 5.0


def measure_step(recipe: Recipe, world: World) -> dict:
    """Seconds and memory of an optimizer step on random pixels and tokens, of which captions fill the whole context."""
    clip = load(recipe.model, weights=False)
    clip.towers.bf16 = recipe.precision == "bf16"
    clip.towers.to(world.device)
    memory, micro_batch = choose(clip.towers, recipe, world)
    arrange(clip.towers.model, memory, compiles(recipe, world.device))
    clip.towers.train()
    optimizer = build_optimizer(clip.towers, recipe.optim)
    tokens = clip.tokenizer([""] * recipe.batch)
    images = torch.randint(0, 256, (recipe.batch, 3, *clip.image_size), dtype=torch.uint8)
    changes = torch.tensor([draw_changes(recipe.augment, draws) for draws in torch.rand(recipe.batch, DRAWS - CROP_DRAWS).tolist()])
    batch = Batch(*(tensor.to(world.device) for tensor in (images, torch.randint_like(tokens, 1, 1000), changes)))

    def step() -> None:
        backward(clip.towers, batch, micro_batch, world, recipe.seed, 0)
        torch.nn.utils.clip_grad_norm_(clip.towers.parameters(), recipe.optim.clip).item()  # waits for the device
        optimizer.step()
        optimizer.zero_grad()
        clamp_logit_scale(clip.towers)

    seconds = _seconds_each(step)
    return {"step_s": seconds, "pairs_per_s": recipe.batch / seconds, "peak_memory_gb": _peak_memory_gb(world)}


def measure_loader(recipe: Recipe, shards: Shards, world: World) -> dict:
    """Samples that the recipe's workers deliver in a second when nobody trains."""
    clip = load(recipe.model, weights=False)
    data = TrainPairs(shards, Order(shards.shard_sizes, recipe.batch, recipe.seed), clip.image_size, recipe.augment)
    batches = iter(train_loader(data, clip.tokenize, 0, 1 << 40, world, recipe.workers))
    for _ in range(2 + 4 * recipe.workers):  # what was fetched ahead while the workers started
        next(batches)
    samples, started = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - started) < LOADER_SECONDS:
        samples += len(next(batches).images)
    return {"loader_samples_per_s": samples / elapsed_s}


def _seconds_each(step: Callable[[], None]) -> float:
    for _ in range(WARMUP_STEPS):
        step()
    started = time.perf_counter()
    for _ in range(STEPS):
        step()
    return (time.perf_counter() - started) / STEPS


def _peak_memory_gb(world: World) -> float:
    if world.device.type == "cuda":
        return torch.cuda.max_memory_allocated(world.device) / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    if len(sys.argv) == 1:
        print(__doc__.strip())
        return
    recipe = parse([*sys.argv[1:], "--run", "unused"])
    if "WORLD_SIZE" in os.environ:
        raise UserError("python -m train.bench measures one process; start it without torchrun")
    world = World(device=torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    shards = Shards(recipe.data, "train")
    check_batch(recipe, len(shards), world)
    result = {
        "model": recipe.model,
        "device": torch.cuda.get_device_name() if world.device.type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "torch": torch.__version__,
        **{key: dataclasses.asdict(recipe)[key] for key in ("batch", "micro_batch", "precision", "memory", "workers")},
        **measure_step(recipe, world),
        **measure_loader(recipe, shards, world),
    }
    for name, value in result.items():
        print(f"{name:22} {value:.3f}" if isinstance(value, float) else f"{name:22} {value}")
    print(json.dumps(result))


if __name__ == "__main__":
    exit_on_user_error(main)
