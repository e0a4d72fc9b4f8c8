"""How fast, and in how much memory: optimizer steps on real shards, taken apart; and the whole path beside
open_clip_train's.

  python -m train.bench train/recipes/demo.yaml --data data/icons/shards
  python -m train.bench train/recipes/spectrum_icons.yaml --data SHARDS --micro_batch_size 64
      --global_batch_size 64 one row: pairs/s, its parts, peak memory; the loader alone
  ... --sweep True            a row for each micro_batch_size from 8 to the batch, and each way to save memory
  ... --peer True             the same model, batch and data by open_clip_train in turns, with and without its checkpointing
  ... --profile trace.json    two steps as a trace, for chrome://tracing or ui.perfetto.dev
  ... --plot bench.png        the rows as a picture

The recipe's architecture is built with random weights: nothing is downloaded. A table for people, then one
line of JSON. Each row is measured in a process of its own. Peak memory is the GPU's allocator's, or on the
CPU the largest resident size of the process; the model's FLOP are counted without what is computed twice to
save memory."""

import dataclasses
import json
import multiprocessing
import os
import sys
import tempfile
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import TypeVar

from data_prep.errors import UserError, exit_on_user_error
from data_prep.shards import Shards
from train.bench.peer import OUT_OF_MEMORY, check_peer, whole_path
from train.bench.table import plot, table
from train.bench.timing import device, measure_around, measure_step, profile_steps
from train.loop import check_batch
from train.model.activation_memory import MODES, should_compile
from train.recipe import Recipe, parse, plain
from train.world import World

T = TypeVar("T")


@dataclass(frozen=True)
class Bench(Recipe):
    """A recipe, and what to measure of it."""

    steps: int = 5
    """Optimizer steps that are timed, after some to warm up. On a GPU take 50."""
    sweep: bool = False
    """A row for each micro_batch_size (8, 16, ... batch) and each way to save memory."""
    peer: bool = False
    """The whole path in turns with open_clip_train."""
    profile: str = ""
    """File for a trace of two steps."""
    plot: str = ""
    """File (.png) for a picture of the rows."""


class OutOfMemory(Exception):
    """What a row of the table says of it."""


def in_fresh_process(measure: Callable[..., T], *arguments) -> T:
    """measure(*arguments), whose memory is its own.

    Raises:
        OutOfMemory: of the GPU or the machine.
    """
    context = multiprocessing.get_context(
        "forkserver"
    )  # imports once; what it forks has no memory of rows before
    context.set_forkserver_preload(["train.bench.timing"])
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        try:
            return pool.submit(measure, *arguments).result()
        except BrokenProcessPool:  # killed by the kernel
            raise OutOfMemory from None
        except RuntimeError as error:
            if any(sign in f"{type(error).__name__}: {error}" for sign in OUT_OF_MEMORY):
                raise OutOfMemory from None
            raise


def measure_rows(
    recipe: Recipe, steps: int, sweep: bool, gflop_per_pair: float, matmul_tflop_per_s: float
) -> list[dict]:
    """A row of the recipe as it is, or one for each micro_batch_size and mode; one that has too little memory
    has no numbers."""
    choices = [(recipe.micro_batch_size, recipe.activation_checkpointing)]
    if sweep:
        sizes = [2**power for power in range(3, 40) if 2**power < recipe.global_batch_size] + [
            recipe.global_batch_size
        ]
        modes = [mode for mode in MODES if mode != "selective" or should_compile(recipe, device())]
        choices = [(size, mode) for mode in modes for size in sizes]
    rows = []
    for size, mode in choices:
        row = {"micro_batch_size": size, "memory": mode, "pairs_per_s": None, "peak_memory_gb": None}
        try:
            row |= in_fresh_process(
                measure_step,
                dataclasses.replace(recipe, micro_batch_size=size, activation_checkpointing=mode),
                steps,
            )
            row["share_of_peak"] = row["pairs_per_s"] * gflop_per_pair / matmul_tflop_per_s / 1e3
        except OutOfMemory:
            pass
        rows.append(row)
        print(
            f"micro_batch_size {row['micro_batch_size']}, {row['memory']}: {row['pairs_per_s'] or 'out of memory'}",
            file=sys.stderr,
        )
    return rows


def main() -> None:
    if len(sys.argv) == 1:
        print(__doc__.strip())
        return
    bench = parse([*sys.argv[1:], "--run", "unused"], Bench)
    recipe = plain(bench)
    if bench.steps < 1:
        raise UserError(f"--steps {bench.steps}: at least 1 is wanted")
    if "WORLD_SIZE" in os.environ:
        raise UserError("python -m train.bench measures one process; start it without torchrun")
    check_batch(recipe, len(Shards(recipe.data, "train")), World())
    if bench.peer:
        check_peer(recipe)
    around = in_fresh_process(measure_around, recipe)
    result = {
        "model": recipe.model,
        **{key: getattr(recipe, key) for key in ("batch", "precision", "workers")},
        **{name: version(name) for name in ("torch", "open_clip_torch")},
        **around,
        "steps": measure_rows(
            recipe, bench.steps, bench.sweep, around["gflop_per_pair"], around["matmul_tflop_per_s"]
        ),
        "whole_path": [],
    }
    if bench.peer:
        with tempfile.TemporaryDirectory() as folder:
            result["whole_path"] = whole_path(recipe, bench.steps, device(), Path(folder))
    if bench.profile:
        in_fresh_process(profile_steps, recipe, str(Path(bench.profile).absolute()))
    print(table(result))
    if bench.plot:
        plot(result, Path(bench.plot))
    print(json.dumps(result))


if __name__ == "__main__":
    exit_on_user_error(main)
