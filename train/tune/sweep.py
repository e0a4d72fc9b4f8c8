"""Runs over values of a recipe's keys, one after another, and one table that says which was best.

  python -m train.sweep train/recipes/icons.yaml --vary optim.lr=1e-5,3e-5 --vary global_batch_size=128,256 --data SHARDS
      --run RUNS a run for each combination, four here, in RUNS/NAME; other flags of the recipe are of all of
      them
  ... --nproc 2               each on two GPUs
  python -m train.sweep --table RUNS
      the table alone, of any folder of runs: those of `python -m slurm sweep`, of runs that go on, of some
          started by hand

The same command again goes on: finished runs are skipped, unfinished ones resume. One that fails is listed,
    and the others
go on. To stop: touch RUNS/stop, or Ctrl-C. The table is printed, and is RUNS/sweep.md and RUNS/sweep.json.
"""

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import tyro

from data_prep.atomic import atomic_file
from data_prep.errors import Fault, UserError
from data_prep.shards import Shards
from train.recipe import AnyRecipe, Recipe, parse, plain, to_yaml
from train.run.folder import Run
from train.run.stop import Stop
from train.setup import check_batch
from train.tune.grid import expand_grid
from train.tune.table import markdown, recipes_in, results, write
from train.world import World

ENVIRONMENT = {
    **os.environ,
    "PYTHONPATH": os.pathsep.join([str(Path(__file__).parents[2]), os.environ.get("PYTHONPATH", "")]),
}
LOOK_S = 0.5  # between two looks at whether the sweep is to stop


@dataclass(frozen=True)
class Sweep(Recipe):
    """A recipe, and what to vary of it."""

    vary: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
    """A key and its values, optim.lr=1e-5,3e-5; with several --vary, every combination of their values."""
    nproc: int = 1
    """Processes of each run, one per GPU, as torchrun's --nproc_per_node."""


def main() -> None:
    words = sys.argv[1:]
    if not words:
        print(__doc__.strip())
    elif words[0] == "--table":
        if len(words) != 2:
            raise UserError(
                f"--table {' '.join(words[1:])}: one folder of runs is wanted: python -m train.sweep --table"
                " RUNS"
            )
        table(Path(words[1]))
    else:
        settings = parse(words, Sweep)
        sweep(Path(settings.run), plan(words, Sweep, list(settings.vary), Path(settings.run)), settings.nproc)


def table(folder: Path) -> None:
    """Prints and writes the table of the runs in `folder`, as they are now."""
    recipes = recipes_in(folder)
    if not recipes:
        raise UserError(
            f"{folder}: no runs in it; python -m train.sweep RECIPE --vary KEY=VALUES --data SHARDS --run"
            f" {folder} makes some"
        )
    rows = results(folder, recipes)
    print(text := markdown(rows))
    write(folder, rows, text)


def sweep(folder: Path, recipes: dict[str, Recipe], nproc: int) -> None:
    """Train every run that is not finished, then print and write the table of all runs in `folder`.

    Raises:
        UserError: a run cannot begin; none was begun.
        Fault: some failed; the table lists them.
    """
    failed, stopped = train_all(folder, recipes, nproc)
    rows = results(folder, recipes_in(folder) | recipes, failed)
    print(text := markdown(rows))
    write(folder, rows, text)
    end(folder, failed, stopped)


def end(folder: Path, failed: dict[str, int], stopped: bool) -> None:
    """Say what is left to do."""
    if stopped:
        print(
            "stopped; the same command goes on; the table as it stands: python -m train.sweep --table"
            f" {folder}"
        )
    if failed:
        raise Fault(
            f"{folder}: {len(failed)} of the runs failed ({', '.join(failed)}), and said why above; the same"
            " command tries them again"
        )


def plan(words: list[str], schema: type[AnyRecipe], vary: list[str], folder: Path) -> dict[str, Recipe]:
    """The recipe of each run by its name; a mistake in any of them is found here, before the first begins.

    Args:
        words: the command line, `[RECIPE.yaml] [--flag value ...]`, read as `schema`.
        vary: see train.tune.grid.expand_grid.
        folder: to hold the run folders.
    """
    named = words[0] if not words[0].startswith("-") else "run"
    return {
        name: plain(parse([*words, *flags, "--run", str(folder / name)], schema))
        for name, (_, flags) in expand_grid([named], vary).items()
    }


def train_all(folder: Path, recipes: dict[str, Recipe], nproc: int) -> tuple[dict[str, int], bool]:
    """Each run by a process of its own, because training sets what is global to one; its bar and its words
    are passed through.

    Returns:
        The exit codes of those that failed, and whether the sweep was stopped before its end.
    """
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            "a sweep starts the processes of its runs itself; start it without torchrun, with --nproc"
        )
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: at least 1 is wanted")
    finished = {name for name, recipe in recipes.items() if check(recipe, nproc)}
    folder.mkdir(parents=True, exist_ok=True)
    failed = {}
    with Stop(folder / "stop") as stop:
        for number, (name, recipe) in enumerate(recipes.items(), 1):
            if stop.requested():
                break
            print(
                f"== {number} of {len(recipes)}: {name}{' is finished' if name in finished else ''}",
                flush=True,
            )
            if (
                name not in finished
                and (code := train_one(folder / f"{name}.yaml", recipe, nproc, stop))
                and not stop.requested()
            ):
                failed[name] = code
        stopped = stop.requested()
    stop.file.unlink(missing_ok=True)
    return failed, stopped


def check(recipe: Recipe, nproc: int) -> bool:
    """Whether the run is finished already.

    Raises:
        UserError: it cannot begin, or go on: another recipe or other data in its folder, another process at
            it, too large a batch.
    """
    shards, run = Shards(recipe.data, "train"), Run(recipe, World())
    try:
        check_batch(recipe, len(shards), World(world_size=nproc))
        run.check_data(shards.fingerprint)
        return run.is_finished
    finally:
        run.close()


def train_one(file: Path, recipe: Recipe, nproc: int, stop: Stop) -> int:
    """The exit code of a training, whose recipe is written to `file`; where the sweep is to stop, it is asked
    to stop.
    """
    with atomic_file(file) as partial:
        partial.write_text(to_yaml(recipe))
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc), "-m", "--"]
        if nproc > 1
        else ["-m"]
    )
    asked = Path(recipe.run) / "stop"
    with subprocess.Popen([sys.executable, *launcher, "train", str(file)], env=ENVIRONMENT) as process:
        while process.poll() is None:
            if stop.requested() and not asked.exists():
                asked.parent.mkdir(exist_ok=True)
                asked.touch()
            try:
                process.wait(LOOK_S)
            except subprocess.TimeoutExpired:
                continue
    if stop.requested():
        asked.unlink(missing_ok=True)  # it may have ended by itself meanwhile
    return process.returncode
