"""The device of this process and what it can do, asked of torch: CUDA, ROCm, XPU, MPS, or the CPU."""

import functools
import importlib.util
import os
import platform
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F

from data_prep.errors import UserError
from data_prep.terminal import say

CPU = torch.device("cpu")
# In what torch's allocators and cuBLAS say; only some raise torch.OutOfMemoryError.
OUT_OF_MEMORY = ("out of memory", "can't allocate memory", "ALLOC_FAILED")


def own_device() -> torch.device:
    """The accelerator of this rank; the CPU where torch finds none.

    Raises:
        UserError: torchrun has started more ranks on this machine than it has accelerators.
    """
    if not torch.accelerator.is_available():
        return CPU
    kind = torch.accelerator.current_accelerator().type
    if "LOCAL_RANK" not in os.environ:
        return torch.device(kind)
    rank, count = int(os.environ["LOCAL_RANK"]), torch.accelerator.device_count()
    if rank >= count:
        raise UserError(
            f"rank {rank} of this machine has no {kind} device, there are {count}; pass torchrun"
            f" --nproc_per_node {count}"
        )
    return torch.device(kind, rank)


def backend_of(device: torch.device) -> str:
    """torch's collectives for a device: "nccl", "xccl", "gloo".

    Raises:
        UserError: it has none.
    """
    backend = dist.get_default_backend_for_device(device)
    if device != CPU and backend == "gloo":  # which reduces tensors in CPU memory alone
        raise UserError(f"torch has no collectives for {device.type}; start one process, without torchrun")
    return backend


def has_streams(device: torch.device) -> bool:
    """Whether copies can run beside computation, which pinned memory is for."""
    return device.type != "cpu" and hasattr(torch.get_device_module(device), "Stream")


def on_stream(stream: torch.Stream | None) -> AbstractContextManager:
    """What is computed inside goes to `stream`; nothing changes for None."""
    return torch.get_device_module(stream.device).stream(stream) if stream else nullcontext()


def counts_memory(device: torch.device) -> bool:
    """Whether torch says how much of the device's memory is free, and how much was in use at most."""
    module = torch.get_device_module(device)
    return all(hasattr(module, name) for name in ("mem_get_info", "max_memory_allocated"))


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an allocation failed, on the device or on the machine."""
    return isinstance(error, torch.OutOfMemoryError) or (
        isinstance(error, RuntimeError) and any(sign in str(error) for sign in OUT_OF_MEMORY)
    )


@contextmanager
def out_of_memory_advice(advice: str) -> Iterator[None]:
    """Inside, an allocation that fails is a UserError with `advice`: "pass a smaller --batch-size"."""
    try:
        yield
    except RuntimeError as error:
        if not is_out_of_memory(error):
            raise
        place = "GPU memory" if isinstance(error, torch.OutOfMemoryError) else "memory"
        first = " ".join(str(error).splitlines()[0].split())[:160]
        raise UserError(f"out of {place} ({first}); {advice}") from None


@functools.cache
def has_bf16(device: torch.device) -> bool:
    """Whether products under autocast are in bf16; a small one is tried."""
    ones = torch.ones(8, 8, device=device)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # autocast warns, and then computes in fp32
        try:
            with torch.autocast(device.type, torch.bfloat16):
                return (ones @ ones).dtype == torch.bfloat16
        except (RuntimeError, TypeError):
            return False


def use_bf16(precision: str, device: torch.device) -> bool:
    """Whether towers compute in bf16: where that is asked for, and the device has it; "auto" asks for it on
    all devices but the CPU.
    """
    if precision == "auto":
        return device.type != "cpu" and has_bf16(device)
    if precision == "bf16" and not has_bf16(device):
        if os.environ.get("RANK", "0") == "0":
            name = device_name(device)
            say(f"warning: {name} has no bf16 under autocast; products are in fp32", file=sys.stderr)
        return False
    return precision == "bf16"


@functools.cache
def can_compile(device: torch.device) -> bool:
    """Whether torch.compile works: it needs Triton, a C compiler and a device that is new enough for both."""
    if importlib.util.find_spec("triton") is None:
        return False
    try:
        torch.compile(F.gelu)(torch.ones(8, device=device))
    except RuntimeError:  # all that dynamo and inductor raise
        return False
    return True


def cpu_name() -> str:
    """The kind of the processor, and the instructions that torch's products use on it: "AMD EPYC, AVX512"."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8", errors="replace")
    except OSError:
        text = ""
    found = re.search(r"^(?:model name|CPU part)\s*: *(.+)$", text, flags=re.MULTILINE)
    return f"{found[1].strip() if found else platform.machine()}, {torch.backends.cpu.get_cpu_capability()}"


def device_name(device: torch.device | None = None) -> str:
    """ "NVIDIA H100", or the kind of device where torch knows no name: "cpu", "mps"."""
    device = device or own_device()
    names = getattr(torch.get_device_module(device), "get_device_name", None)
    return names(device) if names else device.type
