"""Optimizer steps on real shards, taken apart on the device's own time line; and what their speed is compared
with.
"""

import time
from collections.abc import Iterator

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from data_prep.shards import Shards
from train.bench.peer import peak_memory_gb
from train.data.loader import Batch, TrainPairs, train_loader
from train.data.order import Order
from train.loss import loss_of, train_logit_bias
from train.model.activation_memory import apply_checkpointing, fit_micro_batch, should_compile
from train.model.clip import Clip, clamp_logit_scale, load
from train.optim import build_optimizer
from train.recipe import Recipe
from train.step import backward
from train.world import World

PARTS = ("data", "forward", "backward", "optimizer")
WARMUP_STEPS, LOADER_SECONDS, COUNTED_PAIRS = 2, 3.0, 8


class Clock:
    """Marks on the time line of the device; on a GPU that is not the host's, which runs ahead."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def mark(self) -> float | torch.cuda.Event:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: float | torch.cuda.Event, end: float | torch.cuda.Event) -> float:
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start


class Stepper:
    """Optimizer steps as fit() takes them; `spans` are the (part, start, end) of all since it was last
    emptied.
    """

    def __init__(self, recipe: Recipe):
        self.recipe, self.world = recipe, World(device=device())
        clip = load(recipe.model, weights=False)
        train_logit_bias(clip, recipe.loss)
        self.batches = _batches(recipe, clip, self.world)
        clip.towers.bf16 = recipe.precision == "bf16"
        self.towers = clip.towers.to(self.world.device)
        self.memory, self.micro_batch_size = fit_micro_batch(self.towers, recipe, self.world)
        apply_checkpointing(self.towers.model, self.memory, should_compile(recipe, self.world.device))
        self.towers.train()
        self.optimizer = build_optimizer(self.towers, recipe.optim)
        self.clock, self.spans, self.samples = Clock(self.world.device), [], 0
        self.towers.register_forward_pre_hook(self._begin_forward)
        self.towers.register_forward_hook(self._end_forward)

    def __call__(self) -> None:
        marks = [self.clock.mark()]
        batch = Batch(*(tensor.to(self.world.device, non_blocking=True) for tensor in next(self.batches)))
        marks.append(self.clock.mark())
        backward(
            self.towers,
            batch,
            self.micro_batch_size,
            self.world,
            self.recipe.seed,
            self.samples,
            loss_of(self.recipe),
        )
        marks.append(self.clock.mark())
        torch.nn.utils.clip_grad_norm_(self.towers.parameters(), self.recipe.optim.max_grad_norm)
        self.optimizer.step()
        self.optimizer.zero_grad()
        if self.recipe.loss == "clip":
            clamp_logit_scale(self.towers)
        marks.append(self.clock.mark())
        self.spans += zip(("data", "forward and backward", "optimizer"), marks, marks[1:], strict=False)
        self.samples += self.recipe.global_batch_size

    def seconds(self) -> dict[str, float]:
        """Of each of PARTS, summed over `spans`; the loss and what is computed again are part of the backward
        pass.
        """
        if self.clock.cuda:
            torch.cuda.synchronize()
        found = dict.fromkeys((*PARTS, "forward and backward"), 0.0)
        for part, start, end in self.spans:
            found[part] += self.clock.seconds(start, end)
        found["backward"] = found.pop("forward and backward") - found["forward"]
        return found

    def _begin_forward(self, *_) -> None:
        self.forward_begun = self.clock.mark()

    def _end_forward(self, *_) -> None:
        self.spans.append(("forward", self.forward_begun, self.clock.mark()))


def measure_step(recipe: Recipe, steps: int) -> dict:
    """Seconds of a step and of its parts, pairs/s and peak memory; `data_s` is how long the device had no
    batch.
    """
    step = Stepper(recipe)
    for _ in range(WARMUP_STEPS):
        step()
    for _ in range(_fetched_ahead(recipe)):
        next(step.batches)
    step()  # which waits for its batch; from here on the loader is ahead, if it can be
    step.spans.clear()
    for _ in range(steps):
        step()
    parts = step.seconds()
    step_s = sum(parts.values()) / steps
    seconds = {f"{part}_s": parts[part] / steps for part in PARTS}
    chosen = {"micro_batch_size": step.micro_batch_size, "memory": step.memory}
    return {
        **chosen,
        "step_s": step_s,
        "pairs_per_s": recipe.global_batch_size / step_s,
        **seconds,
        "peak_memory_gb": peak_memory_gb(),
    }


def profile_steps(recipe: Recipe, file: str) -> None:
    """Write a trace of two steps, after those that warm up."""
    step = Stepper(recipe)
    for _ in range(WARMUP_STEPS):
        step()
    with torch.profiler.profile(record_shapes=True) as profiler:
        for _ in range(2):
            step()
        step.seconds()  # waits for the device
    profiler.export_chrome_trace(file)


def measure_around(recipe: Recipe) -> dict:
    """What the rows are compared with: the best that matmuls do here, FLOP per pair, and samples/s of the
    loader when nobody trains.
    """
    world = World(device=device())
    clip = load(recipe.model, weights=False)
    batches = _batches(recipe, clip, world)
    clip.towers.bf16 = recipe.precision == "bf16"
    batch = next(batches)
    counted = Batch(*(tensor[:COUNTED_PAIRS].to(world.device) for tensor in batch))
    towers = clip.towers.to(world.device).train()
    # The fused kernels of attention are not all known to the counter; their plain form is.
    with FlopCounterMode(display=False) as flop, sdpa_kernel(SDPBackend.MATH):
        loss_of(recipe)(
            towers(counted.images, counted.tokens, counted.changes), counted.ids, world
        ).backward()
    del towers, clip
    for _ in range(_fetched_ahead(recipe)):
        next(batches)
    samples, started = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - started) < LOADER_SECONDS:
        samples += len(next(batches).images)
    return {
        "device": (
            torch.cuda.get_device_name()
            if world.device.type == "cuda"
            else f"cpu, {torch.get_num_threads()} threads"
        ),
        "loader_samples_per_s": samples / elapsed_s,
        "gflop_per_pair": flop.get_total_flops() / len(counted.images) / 1e9,
        "matmul_tflop_per_s": (
            _best_matmul(world.device, torch.bfloat16 if recipe.precision == "bf16" else torch.float32) / 1e12
        ),
    }


def _best_matmul(where: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few square products, each the best of three times."""
    clock, speeds = Clock(where), []
    sizes, repeats = ((4096, 8192, 16384), 20) if clock.cuda else ((1024, 2048), 1)
    for size in sizes:
        left, right = torch.randn(2, size, size, device=where, dtype=dtype)
        left @ right
        for _ in range(3):
            start = clock.mark()
            for _ in range(repeats):
                left @ right
            end = clock.mark()
            if clock.cuda:
                torch.cuda.synchronize()
            speeds.append(2 * size**3 * repeats / clock.seconds(start, end))
    return max(speeds)


def device() -> torch.device:
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


def _batches(recipe: Recipe, clip: Clip, world: World) -> Iterator[Batch]:
    shards = Shards(recipe.data, "train")
    order = Order(
        shards.shard_sizes,
        recipe.global_batch_size,
        recipe.seed,
        shards.groups if recipe.spread_mates else None,
    )
    data = TrainPairs(shards, order, clip.image_size, recipe.augment, recipe.captions)
    return train_loader(data, clip.tokenize, 0, 1 << 40, world, recipe.workers)


def _fetched_ahead(recipe: Recipe) -> int:
    """Batches that are ready, or nearly, while nobody asks for them."""
    return 2 + 4 * recipe.workers
