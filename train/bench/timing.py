"""The loop's own train_step, timed on the device's own time line; and what its speed is compared with."""

import dataclasses
import time

import torch
import torch.backends.mha
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from train.bench.peer import peak_memory_gb
from train.device import device_name, own_device
from train.recipe import Recipe
from train.setup import setup
from train.step import TrainState, train_step
from train.world import World

PARTS = ("data", "forward", "backward", "optimizer")
WARMUP_STEPS, LOADER_SECONDS, COUNTED_PAIRS = 2, 3.0, 8
# batches never run out, and the learning rate and patch dropout stay those of the beginning
MANY_EPOCHS = 1 << 20

Mark = float | torch.cuda.Event


class Clock:
    """Marks on the device's time line; on a GPU that is not the host's, which runs ahead."""

    def __init__(self, device: torch.device):
        self.cuda = device.type == "cuda"

    def mark(self) -> Mark:
        if not self.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def seconds(self, start: Mark, end: Mark) -> float:
        return start.elapsed_time(end) / 1e3 if self.cuda else end - start


class Stepper:
    """train_step with marks around its parts, by hooks.

    Attributes:
        spans: (part, start, end) of all steps since it was last cleared.
    """

    def __init__(self, recipe: Recipe):
        self.state = bench_state(recipe)
        self.state.towers.train()
        self.clock, self.spans = Clock(self.state.world.device), []
        self._forward_began = self._optimizer_began = None
        self.state.towers.register_forward_pre_hook(self._begin_forward)
        self.state.towers.register_forward_hook(self._end_forward)
        self.state.optimizer.register_step_pre_hook(self._begin_optimizer)

    def __call__(self) -> None:
        began = self.clock.mark()
        batch = next(self.state.batches).to(self.state.world.device)
        loaded = self.clock.mark()
        train_step(self.state, batch)
        ended = self.clock.mark()
        self.spans += [
            ("data", began, loaded),
            ("forward and backward", loaded, self._optimizer_began),
            ("optimizer", self._optimizer_began, ended),
        ]

    def seconds(self) -> dict[str, float]:
        """Of each of PARTS, summed over `spans`. The loss, recomputation and gradient clipping are in
        backward.
        """
        if self.clock.cuda:
            torch.cuda.synchronize()
        sums = dict.fromkeys((*PARTS, "forward and backward"), 0.0)
        for part, start, end in self.spans:
            sums[part] += self.clock.seconds(start, end)
        sums["backward"] = sums.pop("forward and backward") - sums["forward"]
        return sums

    def _begin_forward(self, *_) -> None:
        self._forward_began = self.clock.mark()

    def _end_forward(self, *_) -> None:
        self.spans.append(("forward", self._forward_began, self.clock.mark()))

    def _begin_optimizer(self, *_) -> None:
        self._optimizer_began = self.clock.mark()


def bench_state(recipe: Recipe) -> TrainState:
    """The recipe's state with random weights and no run: nothing is downloaded, verified or written."""
    return setup(dataclasses.replace(recipe, epochs=MANY_EPOCHS), None, World(device=device()))


def measure_step(recipe: Recipe, steps: int) -> dict:
    """Seconds of a step and of its parts, pairs/s and peak memory; `data_s` is how long the device had no
    batch.
    """
    step = Stepper(recipe)
    for _ in range(WARMUP_STEPS):
        step()
    for _ in range(_prefetched(recipe)):
        next(step.state.batches)
    step()  # waits for its batch; from here on the loader is ahead, if it can be
    step.spans.clear()
    for _ in range(steps):
        step()
    parts = step.seconds()
    step_s = sum(parts.values()) / steps
    return {
        "micro_batch_size": step.state.micro_batch_size,
        "activation_checkpointing": step.state.activation_checkpointing,
        "step_s": step_s,
        "pairs_per_s": recipe.global_batch_size / step_s,
        **{f"{part}_s": parts[part] / steps for part in PARTS},
        "peak_memory_gb": peak_memory_gb(),
    }


def profile_steps(recipe: Recipe, file: str) -> None:
    """Write a trace of two steps, after warm-up."""
    step = Stepper(recipe)
    for _ in range(WARMUP_STEPS):
        step()
    with torch.profiler.profile(record_shapes=True) as profiler:
        for _ in range(2):
            step()
        step.seconds()  # waits for the device
    profiler.export_chrome_trace(file)


def measure_reference(recipe: Recipe) -> dict:
    """What the rows are compared with: the best matmul speed, FLOP per pair, and the loader's samples/s
    alone.
    """
    state = bench_state(dataclasses.replace(recipe, activation_checkpointing="none", compile="never"))
    batches = state.batches
    for _ in range(_prefetched(recipe)):
        next(batches)
    samples, started = 0, time.perf_counter()
    while (elapsed_s := time.perf_counter() - started) < LOADER_SECONDS:
        samples += len(next(batches).images)
    dtype = torch.bfloat16 if recipe.precision == "bf16" else torch.float32
    return {
        "device": device_name() if device().type == "cuda" else f"cpu, {torch.get_num_threads()} threads",
        "loader_samples_per_s": samples / elapsed_s,
        "gflop_per_pair": flop_per_pair(recipe) / 1e9,
        "matmul_tflop_per_s": best_matmul_flop_per_s(device(), dtype) / 1e12,
    }


def flop_per_pair(recipe: Recipe) -> float:
    """FLOP of a train_step per pair of the batch: what the recipe drops, freezes, adapts or replays is
    counted.

    Recomputation that saves memory is not counted. Counted on COUNTED_PAIRS pairs.
    """
    counted = dataclasses.replace(
        recipe,
        global_batch_size=COUNTED_PAIRS,
        micro_batch_size=COUNTED_PAIRS,
        activation_checkpointing="none",
        compile="never",
        workers=0,
    )
    state = bench_state(counted)
    state.towers.train()
    batch = next(state.batches)
    # The counter does not know all fused attention kernels, nor the fast path of nn.MultiheadAttention, which
    # locked towers and replay's initial model take; it knows their plain form.
    fast_path = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    try:
        with FlopCounterMode(display=False) as flop, sdpa_kernel(SDPBackend.MATH):
            train_step(state, batch)
    finally:
        torch.backends.mha.set_fastpath_enabled(fast_path)
    return flop.get_total_flops() / COUNTED_PAIRS


def best_matmul_flop_per_s(device: torch.device, dtype: torch.dtype) -> float:
    """FLOP/s of the fastest of a few square products, each the best of three times."""
    clock, speeds = Clock(device), []
    sizes, repeats = ((4096, 8192, 16384), 20) if clock.cuda else ((1024, 2048), 1)
    for size in sizes:
        left, right = torch.randn(2, size, size, device=device, dtype=dtype)
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
    return own_device()


def _prefetched(recipe: Recipe) -> int:
    """Batches that the workers have prefetched."""
    return 2 + 4 * recipe.workers
