"""The loop's own train_step, timed on the device's own time line; and what its speed is compared with."""

import dataclasses
import time

import torch
import torch.backends.mha
import torch.nn.functional as F
from torch._dynamo.utils import counters
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from train.bench.peer import peak_memory_gb
from train.data.loader import PREFETCH_BATCHES, Batch
from train.device import device_name, own_device
from train.recipe import Recipe
from train.setup import setup
from train.step import TrainState, train_step
from train.world import World

PARTS = ("data", "forward", "backward", "optimizer")
WARMUP_STEPS, LOADER_SECONDS, COUNTED_PAIRS = 2, 3.0, 8
ATTEMPTS = 3  # to time steps of which none compiles; each of them compiles for sizes that the others lack
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

    Args:
        full_context: whether captions are padded to the context length, which costs as much as captions that
            fill it: a causal tower computes every position.

    Attributes:
        spans: (part, start, end) of all steps since it was last cleared.
        lengths: tokens of a caption, of each of these steps.
    """

    def __init__(self, recipe: Recipe, full_context: bool = False):
        self.state = bench_state(recipe)
        self.full_context, self.lengths = full_context, []
        self.state.towers.train()
        self.clock, self.spans = Clock(self.state.world.device), []
        self._forward_began = self._optimizer_began = None
        self.state.towers.register_forward_pre_hook(self._begin_forward)
        self.state.towers.register_forward_hook(self._end_forward)
        self.state.optimizer.register_step_pre_hook(self._begin_optimizer)

    def __call__(self) -> None:
        began = self.clock.mark()
        batch = next(self.state.batches)
        if self.full_context:
            batch = with_full_context(batch, self.state)
        self.lengths.append(batch.tokens.shape[1])
        batch = batch.to(self.state.world.device)
        loaded = self.clock.mark()
        train_step(self.state, batch)
        ended = self.clock.mark()
        self.spans += [
            ("data", began, loaded),
            ("forward and backward", loaded, self._optimizer_began),
            ("optimizer", self._optimizer_began, ended),
        ]

    def clear(self) -> None:
        self.spans.clear()
        self.lengths.clear()

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


def with_full_context(batch: Batch, state: TrainState) -> Batch:
    """The same pairs, with captions padded to the context length."""
    missing = state.clip.towers.context_length - batch.tokens.shape[1]
    return batch._replace(tokens=F.pad(batch.tokens, (0, missing)))


def measure_step(recipe: Recipe, steps: int, full_context: bool = False) -> dict:
    """Seconds of a step and of its parts, pairs/s and peak memory; `data_s` is how long the device had no
    batch, "tokens" the length of the shortest and of the longest captions, "compiled" how many graphs were
    compiled while steps were timed (0, unless new sizes appear again and again).
    """
    step = Stepper(recipe, full_context)
    warm_up(step)
    for _ in range(_prefetched(recipe)):
        next(step.state.batches)
    step()  # waits for its batch; from here on the loader is ahead, if it can be
    for _ in range(ATTEMPTS):  # captions of a length that was not there before may compile
        step.clear()
        before = graphs()
        for _ in range(steps):
            step()
        if not (compiled := graphs() - before):
            break
    parts = step.seconds()
    step_s = sum(parts.values()) / steps
    return {
        "micro_batch_size": step.state.micro_batch_size,
        "activation_checkpointing": step.state.activation_checkpointing,
        "tokens": [min(step.lengths), max(step.lengths)],
        "compiled": compiled,
        "step_s": step_s,
        "pairs_per_s": recipe.global_batch_size / step_s,
        **{f"{part}_s": parts[part] / steps for part in PARTS},
        "peak_memory_gb": peak_memory_gb(),
    }


def warm_up(step: Stepper) -> None:
    """Take steps until WARMUP_STEPS in a row compile nothing."""
    idle = 0
    while idle < WARMUP_STEPS:
        before = graphs()
        step()
        idle = idle + 1 if graphs() == before else 0


def graphs() -> int:
    """Graphs that torch has compiled in this process."""
    return counters["stats"]["unique_graphs"]


def profile_steps(recipe: Recipe, file: str) -> None:
    """Write a trace of two steps, after warm-up."""
    step = Stepper(recipe)
    warm_up(step)
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
        "context_length": state.clip.towers.context_length,
        "gflop_per_pair": flop_per_pair(recipe) / 1e9,
        "matmul_tflop_per_s": best_matmul_flop_per_s(device(), dtype) / 1e12,
    }


def flop_per_pair(recipe: Recipe, full_context: bool = False) -> float:
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
    if full_context:
        batch = with_full_context(batch, state)
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
    """Batches that the workers have prefetched, at most (read_ahead())."""
    return 2 + PREFETCH_BATCHES * recipe.workers
