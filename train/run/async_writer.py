"""Checkpoints are copied and written by a thread while training continues.

weights, moments -> Snapshot, in CPU memory: the next optimizer step waits for it, behind a forward and a
                 backward -> files, sha256, fsync, rename (train.run.checkpoint): the next save, a stop and
                 the end wait for it
"""

import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures

import torch
from torch import nn

from data_prep.terminal import say
from train.device import has_streams, on_stream


class Snapshot:
    """Weights and moments at one moment, in CPU memory that is allocated once, before training.

    It takes as much as the weights and AdamW's moments, on the first rank alone: 1.8 GB for ViT-B/32, 5.1 GB
    for ViT-L/14. It is pinned where the model is on a GPU, for which torch rounds each tensor up to a power
    of two.
    """

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        """Allocate the memory.

        Raises:
            MemoryError, RuntimeError: there is not enough.
        """
        self.buffers: dict[tuple, torch.Tensor] = {}
        device = next(model.parameters()).device
        self.stream = torch.get_device_module(device).Stream(device) if has_streams(device) else None
        for name, tensor in model.state_dict().items():
            self._buffer("weights", name, tensor)
        # Numbered as in the optimizer's state_dict, which is still empty before the first step.
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(parameters):
            for name in ("exp_avg", "exp_avg_sq"):
                self._buffer(number, name, parameter)

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], tuple[dict, dict]]:
        """A function for another thread that copies the weights and moments of now, and gives both as
        state_dicts.

        Until it returns, weights and moments may be read but not changed. Buffers of the model (a BatchNorm's
        statistics) are copied here, because a forward changes them.
        """
        weights, state = model.state_dict(), optimizer.state_dict()
        buffers = {name: buffer for name, buffer in model.named_buffers() if name in weights}
        weights |= {name: buffer.to("cpu", copy=True) for name, buffer in buffers.items()}
        device = self.stream.device if self.stream else None
        written = torch.get_device_module(device).current_stream(device).record_event() if device else None

        def copy() -> tuple[dict, dict]:
            with on_stream(self.stream):
                if self.stream:
                    self.stream.wait_event(written)
                copied_weights = self._copied("weights", weights)
                moments = {number: self._copied(number, values) for number, values in state["state"].items()}
                if self.stream:
                    self.stream.synchronize()
            return copied_weights, {**state, "state": moments}

        return copy

    def _copied(self, key: str | int, values: dict) -> dict:
        copied = dict(values)
        for name, value in values.items():
            if torch.is_tensor(value):
                copied[name] = self._buffer(key, name, value).copy_(value, non_blocking=True)
        return copied

    def _buffer(self, key: str | int, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if (key, name) not in self.buffers:
            # zeros, not empty: a page that was never written costs time at its first use.
            pinned = self.stream is not None
            self.buffers[key, name] = torch.zeros(tensor.shape, dtype=tensor.dtype, pin_memory=pinned)
        return self.buffers[key, name]


class AsyncWriter:
    """A thread that writes one checkpoint at a time, on the first rank.

    Attributes:
        writing: the newest checkpoint that was begun, if any; it keeps an error of its writing.
        times: seconds for the log, given once by new_times().
    """

    def __init__(self):
        self.snapshot, self.writing, self.times = None, None, {}
        self.copied = threading.Event()
        self.copied.set()
        self.thread = futures.ThreadPoolExecutor(1, "checkpoint")  # Python joins it at exit, whatever happens

    def allocate(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Allocate the snapshot; without enough memory, training waits for each checkpoint."""
        try:
            self.snapshot = Snapshot(model, optimizer)
        except (MemoryError, RuntimeError) as error:  # torch raises a plain RuntimeError on the CPU
            reason = " ".join(str(error).split())[:200]
            say(
                f"warning: not enough memory to copy weights and moments ({reason}); training waits for each"
                " checkpoint",
                file=sys.stderr,
            )

    def begin(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, write: Callable[[dict, dict], None]
    ) -> None:
        """Call `write(weights, moments)`, as they are now, in the thread. The previous checkpoint must be
        joined.
        """

        def work() -> None:
            started = time.perf_counter()
            try:
                copied = copy()
            finally:
                self.copied.set()
            write(*copied)
            self.times["time/save_write_s"] = time.perf_counter() - started

        def no_copy() -> tuple[dict, dict]:
            return model.state_dict(), optimizer.state_dict()

        copy = self.snapshot.begin(model, optimizer) if self.snapshot else no_copy
        self.copied.clear()
        self.writing = self.thread.submit(work)
        if not self.snapshot:
            self.join()

    def wait_for_snapshot(self) -> None:
        """Wait until weights and moments are copied; called before they change."""
        started = time.perf_counter()
        self.copied.wait()
        if "time/save_stall_s" in self.times:
            self.times["time/save_stall_s"] += time.perf_counter() - started

    @property
    def has_failed(self) -> bool:
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def join(self) -> None:
        """Wait until nothing is being written, and raise nothing."""
        futures.wait([self.writing] if self.writing else [])

    def wait(self) -> None:
        """Wait until nothing is being written, and raise what kept the checkpoint from being written."""
        if self.writing:
            self.writing.result()

    def new_times(self) -> dict[str, float]:
        """Seconds that the last save made a step wait, and that it took to write; each is given once."""
        return {name: self.times.pop(name) for name in list(self.times)}

    def close(self) -> None:
        self.thread.shutdown()
        self.snapshot = None
