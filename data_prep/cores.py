"""CPU cores, for the number of processes that share work."""

import os


def cores() -> int:
    """CPU cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def ranks_here() -> int:
    """Processes of torchrun on this machine, which share its cores and memory."""
    return int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def local_rank() -> int:
    """The number of this process among those of torchrun on this machine."""
    return int(os.environ.get("LOCAL_RANK", "0"))


def cores_per_rank() -> int:
    """CPU cores that this process may use, shared with the other ranks of its node."""
    return max(1, cores() // ranks_here())
