"""Rows of the benchmark, each measured in a process whose memory is its own."""

import dataclasses
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data_prep.rooms import importable
from train.bench.peer import OUT_OF_MEMORY
from train.bench.timing import device, measure_step
from train.model.activation_memory import MODES, should_compile
from train.recipe import Recipe

T = TypeVar("T")


class OutOfMemory(Exception):
    """A measurement needs more memory than there is."""


def in_fresh_process(measure: Callable[..., T], *arguments) -> T:
    """measure(*arguments) in a process of its own.

    Raises:
        OutOfMemory: of the GPU or the machine.
    """
    # imports once; its forks have no memory of earlier rows
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([importable("train.bench.timing")])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except BrokenProcessPool:  # killed by the kernel
            raise OutOfMemory from None
        except RuntimeError as error:
            if any(sign in f"{type(error).__name__}: {error}" for sign in OUT_OF_MEMORY):
                raise OutOfMemory from None
            raise


def measure_rows(recipe: Recipe, steps: int, sweep: bool, reference: dict) -> list[dict]:
    """A row of the recipe as it is, or one for each micro_batch_size and mode; one that runs out of memory
    has no numbers.

    Args:
        reference: of measure_reference().
    """
    combinations = [(recipe.micro_batch_size, recipe.activation_checkpointing)]
    if sweep:
        size = recipe.global_batch_size
        sizes = [2**power for power in range(3, 40) if 2**power < size] + [size]
        modes = [mode for mode in MODES if mode != "selective" or should_compile(recipe, device())]
        combinations = [(size, mode) for mode in modes for size in sizes]
    rows = []
    for size, mode in combinations:
        chosen = {"micro_batch_size": size, "activation_checkpointing": mode}
        row = {**chosen, "pairs_per_s": None, "peak_memory_gb": None}
        try:
            row |= in_fresh_process(measure_step, dataclasses.replace(recipe, **chosen), steps)
            flop_per_s = row["pairs_per_s"] * reference["gflop_per_pair"] * 1e9
            row["share_of_peak"] = flop_per_s / (reference["matmul_tflop_per_s"] * 1e12)
        except OutOfMemory:
            pass
        rows.append(row)
        speed = f"{row['pairs_per_s']:.4g} pairs/s" if row["pairs_per_s"] else "out of memory"
        print(
            f"micro_batch_size {row['micro_batch_size']}, {row['activation_checkpointing']}: {speed}",
            file=sys.stderr,
        )
    return rows
