"""Checkpoints are copied and written by a thread, while training goes on.

weights, moments -> Snapshot, in CPU memory: the next change of them waits for this, which a forward and a
                 backward hide -> files, sha256, fsync, rename (train.run.checkpoint): the next save, a stop
                 and the end wait for this
"""

import sys
import threading
import time
from collections.abc import Callable
from concurrent import futures

import torch
from torch import nn


class Snapshot:
    """Weights and moments as they were at one moment, in CPU memory that is taken once, before training.

    It holds as much again as the weights and AdamW's moments do: 1.8 GB for ViT-B/32, 5.1 GB for ViT-L/14, on
    the first rank alone; pinned where the model is on a GPU, for which torch rounds each tensor up to a power
    of two."""

    def __init__(self, model: nn.Module, optimizer: torch.optim.Optimizer):
        """Take the memory, so that no save does.

        Raises:
            MemoryError, RuntimeError: there is not enough.
        """
        self.buffers: dict[tuple, torch.Tensor] = {}
        device = next(model.parameters()).device
        self.stream = torch.cuda.Stream(device) if device.type == "cuda" else None
        for name, tensor in model.state_dict().items():
            self._buffer("weights", name, tensor)
        parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
        for number, parameter in enumerate(
            parameters
        ):  # as in the optimizer's state_dict; there is no state before the first step
            for name in ("exp_avg", "exp_avg_sq"):
                self._buffer(number, name, parameter)

    def begin(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> Callable[[], tuple[dict, dict]]:
        """What copies the present weights and moments, to be called by another thread; gives both as
        state_dicts.

        Until that returns, the two may be read, by a forward and a backward, but not changed. A model's
        buffers (the statistics of a BatchNorm) are changed by a forward, and copied here."""
        weights, state = model.state_dict(), optimizer.state_dict()
        weights |= {
            name: tensor.to("cpu", copy=True) for name, tensor in model.named_buffers() if name in weights
        }
        written = torch.cuda.current_stream(self.stream.device).record_event() if self.stream else None

        def copy() -> tuple[dict, dict]:
            with torch.cuda.stream(self.stream):
                if self.stream:
                    self.stream.wait_event(written)
                copied = (
                    self._copied("weights", weights),
                    {
                        **state,
                        "state": {
                            number: self._copied(number, moments)
                            for number, moments in state["state"].items()
                        },
                    },
                )
                if self.stream:
                    self.stream.synchronize()
            return copied

        return copy

    def _copied(self, key: str | int, values: dict) -> dict:
        return {
            name: (
                self._buffer(key, name, value).copy_(value, non_blocking=True)
                if torch.is_tensor(value)
                else value
            )
            for name, value in values.items()
        }

    def _buffer(self, key: str | int, name: str, tensor: torch.Tensor) -> torch.Tensor:
        if (
            (
                key,
                name,
            )
            not in self.buffers
        ):  # zeros, and not empty: a page that was never touched costs time at its first use
            self.buffers[key, name] = torch.zeros(
                tensor.shape, dtype=tensor.dtype, pin_memory=self.stream is not None
            )
        return self.buffers[key, name]


class AsyncWriter:
    """One thread, which writes one checkpoint at a time; of the first rank, elsewhere idle.

    Attributes:
        writing: the checkpoint that was begun last, if any; it keeps what went wrong.
        times: seconds, as they go to the log; new_times() gives them.
    """

    def __init__(self):
        self.snapshot, self.writing, self.times = None, None, {}
        self.copied = threading.Event()
        self.copied.set()
        self.thread = futures.ThreadPoolExecutor(
            1, "checkpoint"
        )  # Python waits for it at exit, whatever happens

    def allocate(self, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
        """Take the memory of the snapshots; where it cannot be had, training will wait for each checkpoint."""
        try:
            self.snapshot = Snapshot(model, optimizer)
        except (
            MemoryError,
            RuntimeError,
        ) as error:  # torch has no type of its own for memory that is not there
            reason = " ".join(str(error).split())[:200]
            print(
                f"warning: no memory for a copy of weights and moments ({reason}); training waits for each"
                " checkpoint",
                file=sys.stderr,
            )

    def begin(
        self, model: nn.Module, optimizer: torch.optim.Optimizer, write: Callable[[dict, dict], None]
    ) -> None:
        """Let `write(weights, moments)`, of this moment, be called by the thread; the one before it must have
        ended.
        """

        def work() -> None:
            started = time.perf_counter()
            try:
                copied = copy()
            finally:
                self.copied.set()
            write(*copied)
            self.times["time/save_write_s"] = time.perf_counter() - started

        copy = (
            self.snapshot.begin(model, optimizer)
            if self.snapshot
            else lambda: (model.state_dict(), optimizer.state_dict())
        )
        self.copied.clear()
        self.writing = self.thread.submit(work)
        if not self.snapshot:
            self.join()

    def wait_for_snapshot(self) -> None:
        """Before weights or moments change: until they are copied, if they are to be written."""
        started = time.perf_counter()
        self.copied.wait()
        if "time/save_stall_s" in self.times:
            self.times["time/save_stall_s"] += time.perf_counter() - started

    @property
    def has_failed(self) -> bool:
        return self.writing is not None and self.writing.done() and self.writing.exception() is not None

    def join(self) -> None:
        """Until nothing is being written, however that ends; wait() says how."""
        futures.wait([self.writing] if self.writing else [])

    def wait(self) -> None:
        """The same, and what kept the checkpoint from being written is raised."""
        if self.writing:
            self.writing.result()

    def new_times(self) -> dict[str, float]:
        """How long the last save kept a step waiting, and how long it took to write; each is given once."""
        return {name: self.times.pop(name) for name in list(self.times)}

    def close(self) -> None:
        self.thread.shutdown()
        self.snapshot = None
