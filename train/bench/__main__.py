"""Measure speed and memory: optimizer steps on real shards, taken apart; the whole path beside
open_clip_train's.

  python -m train.bench train/recipes/demo.yaml --data data/icons/shards
  python -m train.bench train/recipes/spectrum_icons.yaml --data SHARDS --micro-batch-size 64
      pairs/s, its parts, peak memory, with captions as they are and as long as the context; the loader alone
  ... --sweep                 a row for each micro_batch_size from 8 on, and each activation_checkpointing, of
                              those that are auto
  ... --peer                  the same model, batch and data by open_clip_train, in turns
  ... --profile trace.json    two steps as a trace, for chrome://tracing or ui.perfetto.dev
  ... --plot bench.png        the rows as an image

The steps are the training loop's own, so the recipe's patch dropout, LoRA, locked tower and replay are
measured too. The recipe's architecture is built with random weights: nothing is downloaded. Prints a table,
then one line of JSON. Each row is measured in its own process. Peak memory is the GPU allocator's, or on the
CPU the process's largest resident size. FLOP per pair are counted without recomputation.

Any key of the recipe is a flag too: python -m train --help
"""

import json
import os
import sys
import tempfile
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Literal

from data_prep.cli import print_guide
from data_prep.errors import UserError, exit_on_user_error
from data_prep.terminal import say
from train.recipe import Recipe, parse_with

PROG = "python -m train.bench RECIPE"
Way = Literal["plain", "grad-checkpointing", "torchcompile", "torchcompile+grad-checkpointing"]


@dataclass(frozen=True)
class Bench:
    """Options of the benchmark."""

    steps: int = 5
    """Optimizer steps that are timed, after warm-up. On a GPU use 50."""
    sweep: bool = False
    """A row for each micro_batch_size (8, 16, ... global_batch_size) and each activation_checkpointing, of
    those that are auto in the recipe."""
    peer: bool = False
    """Also the whole path, in turns with open_clip_train."""
    turns: int = 2
    """Turns of --peer. Each run takes about as long as it compiles, and 7/5 of --steps steps."""
    ways: tuple[Way, ...] = ()
    """How --peer runs open_clip_train: with these of its flags. Default: plain and grad-checkpointing; on a
    GPU all four."""
    profile: str = ""
    """File for a trace of two steps."""
    plot: str = ""
    """File (.png) for an image of the rows."""


def main() -> None:
    arguments = sys.argv[1:]
    if not arguments:
        print_guide(f"{PROG} --data SHARDS [OPTIONS]", __doc__)
        return
    bench, recipe = parse_with(Bench, [*arguments, "--run", "unused"], PROG, __doc__)
    if bench.steps < 1:
        raise UserError(f"--steps {bench.steps}: must be at least 1")
    if bench.turns < 1:
        raise UserError(f"--turns {bench.turns}: must be at least 1")
    if (bench.ways or bench.turns != Bench.turns) and not bench.peer:
        raise UserError("--turns and --ways are of --peer; pass --peer too, or leave them out")
    if "WORLD_SIZE" in os.environ:
        raise UserError("python -m train.bench measures one process; start it without torchrun")
    result = measure(bench, recipe)

    from train.bench.table import plot, table

    say(table(result))
    if bench.plot:
        plot(result, Path(bench.plot))
    say(json.dumps(result))


def measure(bench: Bench, recipe: Recipe) -> dict:
    """What the command prints as JSON.

    Raises:
        UserError: the data does not fill a batch, or open_clip_train cannot do what --peer asks for.
    """
    from train.bench.peer import check_peer, whole_path
    from train.bench.rows import in_fresh_process, measure_rows
    from train.bench.timing import device, measure_reference, profile_steps
    from train.data.sets import open_pairs
    from train.setup import check_batch
    from train.world import World

    check_batch(recipe, len(open_pairs(recipe)), World())
    if bench.peer:
        check_peer(recipe)
    reference = in_fresh_process(measure_reference, recipe)
    result = {
        "model": recipe.model,
        **{key: getattr(recipe, key) for key in ("global_batch_size", "precision", "workers")},
        **{name: version(name) for name in ("torch", "open_clip_torch")},
        **reference,
        "steps": measure_rows(recipe, bench.steps, bench.sweep, reference),
        "whole_path": [],
    }
    if bench.peer:
        with tempfile.TemporaryDirectory() as folder:
            result["whole_path"] = whole_path(
                recipe, bench.steps, device(), Path(folder), bench.turns, bench.ways
            )
    if bench.profile:
        in_fresh_process(profile_steps, recipe, str(Path(bench.profile).absolute()))
    return result


if __name__ == "__main__":
    exit_on_user_error(main)
