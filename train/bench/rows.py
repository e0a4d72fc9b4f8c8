"""Rows of the benchmark, each measured in a process whose memory is its own."""

import dataclasses
import multiprocessing
import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from typing import TypeVar

from data_prep.child import exit_with_parent
from data_prep.rooms import importable
from data_prep.terminal import say
from train.bench.timing import device, flop_per_pair, measure_step
from train.device import is_out_of_memory
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
    with ProcessPoolExecutor(1, context, exit_with_parent) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except BrokenProcessPool:  # killed by the kernel
            raise OutOfMemory from None
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise OutOfMemory from None
            raise


def measure_rows(recipe: Recipe, steps: int, sweep: bool, reference: dict) -> list[dict]:
    """A row of the recipe as it is, and one with captions that fill the context where its own are shorter; or
    a row for each value of what is "auto" in it. One that runs out of memory has no numbers.

    Args:
        reference: of measure_reference().
    """
    if sweep:
        return [measure_row(each, steps, reference) for each in swept(recipe)]
    rows = [measure_row(recipe, steps, reference)]
    if rows[0]["pairs_per_s"] and rows[0]["tokens"][1] < reference["context_length"]:
        full = {**reference, "gflop_per_pair": in_fresh_process(flop_per_pair, recipe, True) / 1e9}
        rows.append(measure_row(recipe, steps, full, full_context=True))
    return rows


def swept(recipe: Recipe) -> list[Recipe]:
    """The recipe with each micro_batch_size (8, 16, ... global_batch_size) and each activation_checkpointing,
    where these are "auto" in it.
    """
    size = recipe.global_batch_size
    sizes = [2**power for power in range(3, 40) if 2**power < size] + [size]
    modes = [mode for mode in MODES if mode != "selective" or should_compile(recipe, device())]
    sizes = sizes if recipe.micro_batch_size == "auto" else [recipe.micro_batch_size]
    modes = modes if recipe.activation_checkpointing == "auto" else [recipe.activation_checkpointing]
    return [
        dataclasses.replace(recipe, micro_batch_size=size, activation_checkpointing=mode)
        for mode in modes
        for size in sizes
    ]


def measure_row(recipe: Recipe, steps: int, reference: dict, full_context: bool = False) -> dict:
    row = {
        "micro_batch_size": recipe.micro_batch_size,
        "activation_checkpointing": recipe.activation_checkpointing,
        "pairs_per_s": None,
        "peak_memory_gb": None,
    }
    try:
        row |= in_fresh_process(measure_step, recipe, steps, full_context)
        flop_per_s = row["pairs_per_s"] * reference["gflop_per_pair"] * 1e9
        row["share_of_peak"] = flop_per_s / (reference["matmul_tflop_per_s"] * 1e12)
    except OutOfMemory:
        pass
    speed = f"{row['pairs_per_s']:.4g} pairs/s" if row["pairs_per_s"] else "out of memory"
    say(
        f"micro_batch_size {row['micro_batch_size']}, {row['activation_checkpointing']}: {speed}",
        file=sys.stderr,
    )
    return row
