"""A recipe and shards become a run.

  python -m train RECIPE --data SHARDS --run RUN
      train/recipes/demo.yaml, for example; one process, on a GPU if there is one
  torchrun --nproc_per_node 2 -m -- train RECIPE --data SHARDS --run RUN
      one process per GPU, or two on the CPU: the same batches, the same loss
      (the -- keeps torchrun from reading --run as its own --run-path)

Any key of the recipe can be typed as a flag and then wins: --optim.lr 1e-5 --global-batch-size 128. All of
them: --help. The same command again resumes an unfinished run from its last checkpoint.
To stop a run cleanly: touch RUN/stop, or Ctrl-C. To watch it: tensorboard --logdir RUN.

Commands of their own, each with --help:
  python -m train.forecast RECIPE    what a run will reach, and what is short, from short runs
  python -m train.lr RECIPE          a search for the learning rate
  python -m train.sweep RECIPE       a grid of recipe values
  python -m train.bench RECIPE       speed and memory
"""

import os
import sys
from shlex import quote
from typing import TYPE_CHECKING

from data_prep.errors import UserError, exit_on_user_error
from data_prep.tables import counted
from data_prep.terminal import say
from train.data.shares import first_of
from train.metrics import DIRECTIONS, metric_of
from train.recipe import parse, recipe_file

if TYPE_CHECKING:
    from train.run.folder import Run

COMMANDS = ("forecast", "lr", "sweep", "bench", "fetch", "export", "publish")  # python -m train.NAME


def main() -> None:
    if len(sys.argv) == 1:
        say(__doc__.strip())
        return
    name = sys.argv[1]
    if name in COMMANDS and not recipe_file(name).is_file():
        raise UserError(f"{name}: no such recipe; did you mean python -m train.{name}?")
    recipe = parse(sys.argv[1:])
    # Imported here, so that help and mistakes do not wait for torch. The one place where train knows eval.
    from eval.validation import has_split, validator
    from train.loop import fit
    from train.model.activation_memory import less_memory
    from train.retain.select import check_retention
    from train.run.folder import PART_OF_RUNS
    from train.world import joined_world

    with joined_world(recipe.timeout_minutes, less_memory()) as world:
        world.all_or_raise(lambda: check_retention(recipe))
        validate = world.all_or_raise(lambda: validator(recipe, world))
        data = first_of(recipe.data)
        if world.is_first and not has_split(data, "val"):
            say(f"{data}: no val split, so nothing is validated; the last checkpoint is exported")
        run = fit(recipe, world, validate)
        if world.is_first:
            say(summary(run, advise=PART_OF_RUNS not in os.environ))


def summary(run: "Run", advise: bool = True) -> str:
    """What to know at the end of a run, or when it was stopped.

    Args:
        advise: whether to say what to do too; not where another command has started the run.
    """
    from train.retain.select import TRAINED, prefix
    from train.run.records import DAMAGED, read_metrics, read_state, read_status

    recipe_file = quote(str(run.folder / "recipe.yaml"))
    status = read_status(run.folder)
    if status["state"] != "finished":
        resume = f"; resume with: python -m train {recipe_file}" if advise else ""
        return f"stopped after {status['samples']} pairs{resume}"
    lines = read_metrics(run.folder / "metrics.jsonl")
    validations = [line for line in lines if "val/mean/R@1" in line]
    another = " (for a new run, pass another --run)" if advise else ""
    words = [f"{run.folder} is finished: {status['samples']} pairs{another}"]
    best = read_state((run.folder / "checkpoints" / "best").resolve())
    weights = best["weights"]
    for line in validations[1:]:  # the first is of the initial weights
        if line["samples"] != best["samples"]:
            continue
        name = "" if weights == TRAINED else f", {weights}"
        for direction in DIRECTIONS:
            key = f"val/{direction}/R@1"
            before, after = f"{100 * validations[0][key]:.1f} %", f"{100 * line[prefix(weights) + key]:.1f} %"
            words.append(
                f"  {direction} R@1 on val: {before} before training, {after} in the best"
                f" checkpoint (after {best['samples']} pairs{name})"
            )
        metric = run.recipe.best_metric
        before, after = validations[0].get(metric), line.get(prefix(weights) + metric)
        if advise and None not in (before, after) and before != after:
            words += [_worse(run)] if (after < before) == metric_of(metric).higher_is_better else []
    if not validations:
        words.append("  no validation, for want of a val split: the exported weights are the last ones")
    if damaged := len(read_metrics(run.folder / DAMAGED)):
        words.append(f"  skipped for damage: {counted(damaged, 'sample')}; {run.folder / DAMAGED} lists them")
    return "\n".join([*words, *(_next_commands(run) if advise else [])])


def _next_commands(run: "Run") -> list[str]:
    """Lines with the commands that evaluate a finished run and show its curves."""
    from eval.validation import has_split
    from train.run.trackers import SHOW

    place, data, words = quote(str(run.folder)), first_of(run.recipe.data), []
    held_out = [split for split in ("test", "val") if has_split(data, split)]
    if held_out:
        words.append(f"evaluate: python -m eval retrieval {place} --data {quote(data)} --split {held_out[0]}")
    shown = [SHOW[name].format(run=place) for name in run.recipe.log if name in SHOW]
    return [*words, *([f"curves:   {' or '.join(shown)}"] if shown else [])]


def _worse(run: "Run") -> str:
    """A sentence on a run whose best weights score lower than the initial ones."""
    recipe, rate = quote(str(run.folder / "recipe.yaml")), run.recipe.optim.lr
    return (
        f"  worse than before training ({run.recipe.best_metric}); lower --optim.lr (now {rate:g}), or"
        f" search for a rate: python -m train.lr {recipe} --runs RUNS"
    )


if __name__ == "__main__":
    exit_on_user_error(main)
