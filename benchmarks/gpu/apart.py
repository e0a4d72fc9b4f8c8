"""The state of training with the large model, on a batch of noise that is already on the device, and what is
measured on it.
"""

import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import torch

from benchmarks.gpu.estimate import estimate, kind_of
from benchmarks.gpu.record import Record
from benchmarks.gpu.sizes import Sizes
from train.bench.timing import bench_state, best_matmul_flop_per_s
from train.determinism import noise_batch
from train.device import device_name, own_device
from train.model.activation_memory import apply_checkpointing
from train.recipe import Recipe
from train.step import train_step


@dataclass(frozen=True)
class Row:
    mode: str
    pairs: int
    chunk: int
    tokens: int
    steps: int
    compiled: bool = True

    @property
    def name(self) -> str:
        chunks = f" in chunks of {self.chunk}" if self.chunk < self.pairs else ""
        eager = "" if self.compiled else ", not compiled"
        return f"{self.pairs} pairs{chunks}, {self.mode}, {self.tokens} tokens{eager}"


class Apart:
    """The state of training with the large model, and what is measured on it."""

    def __init__(self, record: Record, sizes: Sizes, data: str):
        self.record, self.sizes, self.device = record, sizes, own_device()
        self.cuda = self.device.type == "cuda"
        options = {"global_batch_size": sizes.batch, "micro_batch_size": sizes.batch, "workers": 0}
        options |= {"precision": sizes.precision, "activation_checkpointing": "none", "compile": "never"}
        self.state = bench_state(Recipe(sizes.large, data, "", **options))
        self.state.towers.train()
        self.ceilings: dict[str, float] = {}
        self.arranged: Row | None = None

    def synchronize(self) -> None:
        if self.cuda:
            torch.cuda.synchronize()

    def timed(self, work: Callable, n: int) -> tuple[float, float]:
        """Seconds of each of n calls; and of the first one until it returned, while the device computes."""
        self.synchronize()
        started = time.perf_counter()
        work()
        returned = time.perf_counter() - started
        for _ in range(n - 1):
            work()
        self.synchronize()
        return (time.perf_counter() - started) / n, returned

    def measure_ceilings(self) -> dict:
        dtype = torch.bfloat16 if self.cuda else torch.float32
        source = torch.empty((1 << 30) if self.cuda else (1 << 22), device=self.device)
        target = torch.empty_like(source)
        target.copy_(source)
        copy_s, _ = self.timed(lambda: target.copy_(source), 10)
        self.ceilings = {
            "matmul_tflop_per_s": best_matmul_flop_per_s(self.device, dtype) / 1e12,
            "copy_tb_per_s": 2 * source.nbytes / copy_s / 1e12,
        }
        return self.ceilings | {"device": device_name(self.device), "torch": torch.__version__}

    def arrange(self, row: Row) -> None:
        """Checkpoint and compile as a row says; what is already compiled for it is kept."""
        compiled = row.compiled and self.cuda  # a rehearsal on a CPU is over before C++ is compiled
        if self.arranged != row:  # another batch too: its graph is not to be the dynamic one of two
            apply_checkpointing(self.state.clip.towers.model, row.mode, compiled)
            self.arranged = row

    def step(self, row: Row) -> Callable[[], object]:
        """A step of a row; the first call compiles."""
        self.state.micro_batch_size = row.chunk
        batch = noise_batch(self.state, row.pairs, row.tokens)
        return lambda: train_step(self.state, batch)

    def measure(self, row: Row) -> dict:
        self.arrange(row)
        started, step = time.perf_counter(), self.step(row)
        if row.pairs > row.chunk:  # two chunks compile all that many do
            self.step(Row(row.mode, 2 * row.chunk, row.chunk, row.tokens, 1))()
        else:
            step()
        self.synchronize()
        cold_s = time.perf_counter() - started
        if row.pairs == row.chunk:
            step()
        if self.cuda:
            torch.cuda.reset_peak_memory_stats()
        step_s, host_s = self.timed(step, row.steps)
        return {
            "ms": 1e3 * step_s,
            "pairs/s": row.pairs / step_s,
            "ms per pair": 1e3 * step_s / row.pairs,
            "host ms": 1e3 * host_s,
            "peak GB": torch.cuda.max_memory_allocated() / 1e9 if self.cuda else None,
            "cold s": cold_s,
        }

    def count_syncs(self, row: Row) -> dict:
        """How often the host waits for the device in a step, and where."""
        if not self.cuda:
            return {"skipped": "no GPU"}
        self.arrange(row)
        step = self.step(row)
        step()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
        places = [f"{seen.filename}:{seen.lineno}" for seen in caught if "synchroniz" in str(seen.message)]
        return {"syncs": len(places), "places": sorted(set(places))[:6]}

    def profile(self, row: Row) -> dict:
        """Milliseconds of a step by what they are spent on, beside the estimate; OUT/kernels.txt has more."""
        self.arrange(row)
        step, kinds = self.step(row), torch.profiler.ProfilerActivity
        step()
        with torch.profiler.profile(
            activities=[kinds.CPU, kinds.CUDA] if self.cuda else [kinds.CPU]
        ) as profiled:
            for _ in range(2):
                step()
            self.synchronize()
        events, which = profiled.key_averages(), "device" if self.cuda else "cpu"
        key = f"self_{'cuda' if self.cuda else 'cpu'}_time_total"
        table = events.table(sort_by=key, row_limit=50, max_name_column_width=100)
        (self.record.out / "kernels.txt").write_text(table)
        times, count = {}, 0
        for event in events:
            ours = not self.cuda or event.device_type.name == "CUDA"
            if ours and not getattr(event, "is_user_annotation", False):  # these span kernels
                spent_ms = getattr(event, f"self_{which}_time_total") / 2e3
                times[kind_of(event.key)] = times.get(kind_of(event.key), 0) + spent_ms
                count += event.count // 2
        model = self.sizes.large.partition(":")[0]
        ceilings = self.ceilings or self._noted_ceilings()
        return {
            "kernels": count,
            "measured ms": times | {"step": sum(times.values())},
            "estimated ms": estimate(model, row.pairs, row.tokens, ceilings),
        }

    def _noted_ceilings(self) -> dict[str, float]:
        (noted,) = (line for line in self.record.notes() if line["name"] == "ceilings")
        return {name: noted[name] for name in ("matmul_tflop_per_s", "copy_tb_per_s")}
