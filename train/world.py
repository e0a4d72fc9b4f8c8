"""Processes that train together: one without torchrun, else one per GPU (NCCL, XCCL), or on CPUs (gloo)."""

import os
import re
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch
import torch.distributed as dist

from data_prep.errors import Fault, UserError
from data_prep.masked import one_line
from train.device import backend_of, out_of_memory_advice, own_device

T = TypeVar("T")
# Part of the error of a collective whose other end is gone.
LOST = ("gloo", "NCCL", "XCCL", "Connection closed", "Timed out")
ROLL_CALL_TIMEOUT_S = 20
# Of the commands of eval; training has its own advice.
SMALLER_BATCH = "pass a smaller --batch-size, or free memory that other programs use"


@dataclass(frozen=True)
class World:
    rank: int = 0
    world_size: int = 1
    device: torch.device = torch.device("cpu")  # noqa: RUF009
    host_group: dist.ProcessGroup | None = None  # gloo: reductions of CPU tensors never wait for the GPU
    roll_call: dist.ProcessGroup | None = None  # gloo, unused until a rank falls silent

    @property
    def is_first(self) -> bool:
        return self.rank == 0

    def gather(self, features: torch.Tensor) -> torch.Tensor:
        """The rows of all ranks in rank order, [b, d] -> [b * world_size, d]; gradients flow back to each
        row's owner.
        """
        return features if self.world_size == 1 else _Gather.apply(features, self.rank, self.world_size)

    def sum(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._reduce(tensor, dist.ReduceOp.SUM)

    def max(self, tensor: torch.Tensor) -> torch.Tensor:
        return self._reduce(tensor, dist.ReduceOp.MAX)

    def _reduce(self, tensor: torch.Tensor, operation: dist.ReduceOp) -> torch.Tensor:
        """The reduced values on every rank; in place."""
        if self.world_size > 1:
            dist.all_reduce(tensor, operation, group=self.host_group if tensor.device.type == "cpu" else None)
        return tensor

    def any(self, *flags: bool) -> list[bool]:
        """For each flag, whether it is set on any rank: the same answer on all."""
        return self.max(torch.tensor(flags, dtype=torch.int32)).bool().tolist()

    def join(self, items: list) -> list:
        """The items of all ranks, in rank order, on every rank; they must be few."""
        lists = [items]
        if self.world_size > 1:
            lists *= self.world_size
            dist.all_gather_object(lists, items, group=self.host_group)
        return [item for each in lists for item in each]

    def barrier(self) -> None:
        self.sum(torch.zeros(1))

    def all_or_raise(self, prepare: Callable[[], T]) -> T:
        """Run prepare() on every rank; if one raises UserError, all raise it.

        `prepare` must not communicate with other ranks.
        """
        if self.world_size == 1:
            return prepare()
        result, failure = None, None
        try:
            result = prepare()
        except UserError as error:
            failure = error
        failures = [None] * self.world_size
        dist.all_gather_object(failures, failure, group=self.host_group)
        for rank, other in enumerate(failures):
            if other is not None:
                all_alike = all(str(failure) == str(other) for failure in failures)
                shared = type(other)(str(other) if all_alike else f"on rank {rank}: {other}")
                shared.shared = True
                raise shared
        return result


def no_sync(towers: torch.nn.Module) -> AbstractContextManager:
    """DDP's context in which gradients are not reduced; nothing for bare towers."""
    return getattr(towers, "no_sync", nullcontext)()


class _Gather(torch.autograd.Function):
    """all_gather whose backward sums, for each row, the gradients of all ranks' losses."""

    @staticmethod
    def forward(ctx, features: torch.Tensor, rank: int, world_size: int) -> torch.Tensor:
        ctx.rows = slice(rank * len(features), (rank + 1) * len(features))
        gathered = features.new_empty(world_size * len(features), *features.shape[1:])
        dist.all_gather_into_tensor(gathered, features.contiguous())
        return gathered

    @staticmethod
    def backward(ctx, gradient: torch.Tensor):
        gradient = gradient.contiguous()
        dist.all_reduce(gradient)
        return gradient[ctx.rows], None, None


def _store() -> dist.Store:
    """The store in which the ranks find each other, with a prefix of its own for each start.

    torchrun's agent keeps its store when it restarts its workers (--max-restarts), and with torch 2.15 these
    then find the addresses of their predecessors.
    """
    hosted = os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True"
    place = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    store = dist.TCPStore(*place, is_master=os.environ["RANK"] == "0" and not hosted, wait_for_workers=False)
    return dist.PrefixStore(f"start {os.environ.get('TORCHELASTIC_RESTART_COUNT', 0)}", store)


def _silent_ranks(world: World) -> str:
    """A sentence that names the ranks that do not answer."""
    try:
        dist.monitored_barrier(world.roll_call, timedelta(seconds=ROLL_CALL_TIMEOUT_S), wait_all_ranks=True)
    except RuntimeError as error:
        if found := re.search(r"[Rr]anks? ([\d, ]+) failed", str(error)):
            return (
                f"rank {found[1].strip()} of {world.world_size} (from 0) is silent: it was killed, hangs, or"
                " its node is gone"
            )
    return (
        f"rank {world.rank} of {world.world_size} (from 0) lost the others: one was killed, hangs, or the"
        " network is cut"
    )


@contextmanager
def joined_world(timeout_minutes: float = 10, memory_advice: str = SMALLER_BATCH) -> Iterator[World]:
    """The processes that torchrun started; alone where it started none.

    Args:
        memory_advice: what to do where memory is short.

    Raises:
        UserError: of another cause, or an allocation failed.
        Fault: a rank was silent for `timeout_minutes`, or is gone.
    """
    device = own_device()
    if "WORLD_SIZE" not in os.environ:
        with out_of_memory_advice(memory_advice):
            yield World(device=device)
        return
    accelerated = device.type != "cpu"
    if accelerated:
        torch.accelerator.set_device_index(device.index)
    timeout = timedelta(minutes=timeout_minutes)
    # gloo times out first, with an error that can be reported; NCCL's timeout ends the process.
    dist.init_process_group(
        backend_of(device),
        timeout=timeout * (1 + accelerated),
        device_id=device if accelerated else None,
        store=_store(),
        rank=int(os.environ["RANK"]),
        world_size=int(os.environ["WORLD_SIZE"]),
    )
    host_group = dist.new_group(backend="gloo", timeout=timeout) if accelerated else None
    world = World(
        dist.get_rank(),
        dist.get_world_size(),
        device,
        host_group,
        dist.new_group(backend="gloo", timeout=timeout),
    )
    try:
        with out_of_memory_advice(memory_advice):
            yield world
    except UserError as error:
        if error.shared:  # otherwise a rank is inside a collective, and this would wait for it
            dist.destroy_process_group()
        raise
    except RuntimeError as error:  # torch raises no more specific type for a failed collective of gloo
        if not any(sign in str(error) for sign in LOST):
            raise
        cause = one_line(error, 160)
        raise Fault(
            f"{_silent_ranks(world)} ({cause}); run the same command again to resume from the last checkpoint"
        ) from None
    world.barrier()
    dist.destroy_process_group()
