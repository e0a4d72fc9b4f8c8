"""Train the runs of a grid one after another and write one table of the results (train.sweep).

recipe + grid -> RUNS/NAME.yaml -> python -m train, one process per run -> RUNS/sweep.md, RUNS/sweep.json
"""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from shlex import quote

from data_prep.atomic import MARK, atomic_file, check_parents
from data_prep.errors import Fault, UserError
from data_prep.rooms import environment, importable
from data_prep.tables import counted
from data_prep.terminal import say
from train.data.sets import open_pairs
from train.recipe import Recipe, to_yaml
from train.retain.select import check_retention
from train.run.folder import PART_OF_RUNS, Run
from train.run.stop import Stop
from train.setup import check_batch, check_groups
from train.tune.grid import expand_grid
from train.tune.table import markdown, recipes_in, results, write
from train.world import World

POLL_S = 0.5  # between two checks for a stop request


def print_table(folder: Path) -> None:
    """Print and write the table of the runs in `folder`, finished or not."""
    recipes = recipes_in(folder)
    if not recipes:
        raise UserError(
            f"{folder}: contains no runs; to make some: python -m train.sweep RECIPE --data SHARDS --runs"
            f" {quote(str(folder))} --vary KEY=VALUES"
        )
    rows = results(folder, recipes)
    say(text := markdown(rows))
    write(folder, rows, text)


def train_grid(folder: Path, recipes: dict[str, Recipe], nproc: int) -> None:
    """Train every run that is not finished, then print and write the table of all runs in `folder`.

    Raises:
        UserError: a run cannot start; none was started.
        Fault: runs failed; the table lists them.
    """
    failed, stopped = train_all(folder, recipes, check_runs(folder, recipes, nproc), nproc)
    rows = results(folder, recipes_in(folder) | recipes, failed)
    say(text := markdown(rows))
    write(folder, rows, text)
    report_rest(folder, failed, stopped)


def report_rest(folder: Path, failed: dict[str, int], stopped: bool) -> None:
    """Say how to continue after a stop or a failure."""
    if stopped:
        say(
            "stopped; the same command resumes; the table at any time: python -m train.sweep --table"
            f" {quote(str(folder))}"
        )
    if failed:
        raise Fault(
            f"{folder}: {counted(len(failed), 'run')} failed ({', '.join(failed)}), see their messages above;"
            " the same command tries them again"
        )


def plan(
    arguments: list[str], vary: list[str], folder: Path, read: Callable[[list[str]], tuple[object, Recipe]]
) -> dict[str, Recipe]:
    """The recipe of each run by its name; a mistake in any of them is raised before the first run starts.

    Args:
        arguments: the command line, `[RECIPE.yaml] [--flag value ...]`.
        vary: see train.tune.grid.expand_grid.
        folder: parent of the run folders.
        read: parses a command line into the command's own options and a recipe.
    """
    if typed := [word for word in arguments if word == "--run" or word.startswith("--run=")]:
        raise UserError(f"{typed[0]}: each run has its own folder in --runs {folder}; leave --run out")
    recipe_file = arguments[0] if not arguments[0].startswith("-") else "run"
    return {
        name: read([*arguments, *flags, "--run", str(folder / name)])[1]
        for name, (_, flags) in expand_grid([recipe_file], vary).items()
    }


def check_runs(folder: Path, recipes: dict[str, Recipe], nproc: int) -> set[str]:
    """Check that each run can start or resume, before the first one starts and anything is said about them.

    Returns:
        Names of the runs that are finished.

    Raises:
        UserError: it cannot.
    """
    if "WORLD_SIZE" in os.environ:
        raise UserError(
            "a sweep starts the processes of its runs itself; run it without torchrun, with --nproc"
        )
    if nproc < 1:
        raise UserError(f"--nproc {nproc}: must be at least 1")
    check_folder(folder)
    return {name for name, recipe in recipes.items() if is_finished(recipe, nproc)}


def check_folder(folder: Path) -> None:
    """Refuse a folder that is of something else than runs: a run, or what another command has made.

    Raises:
        UserError: it is such a folder, or no folder.
    """
    check_parents(folder, "--runs")
    if os.path.lexists(folder) and not folder.is_dir():
        raise UserError(f"{folder}: is not a folder; pass another --runs")
    if (folder / "recipe.yaml").is_file() and (folder / "checkpoints").is_dir():
        raise UserError(f"{folder}: is a run; pass another --runs, of a folder for several runs")
    if found := [name for name in ("manifest.json", MARK) if (folder / name).is_file()]:
        raise UserError(
            f"{folder}: holds {found[0]}, so it is the folder of another command; pass another --runs"
        )


def train_all(
    folder: Path, recipes: dict[str, Recipe], finished: set[str], nproc: int
) -> tuple[dict[str, int], bool]:
    """Train each run in a separate process, because training sets process-wide state.

    Args:
        finished: of check_runs(); these are left out.

    Returns:
        Exit codes of the runs that failed, and whether a stop was requested.
    """
    folder.mkdir(parents=True, exist_ok=True)
    failed = {}
    with Stop(folder / "stop") as stop:
        for number, (name, recipe) in enumerate(recipes.items(), 1):
            if stop.requested():
                break
            state = " is finished" if name in finished else ""
            say(f"== {number} of {len(recipes)}: {name}{state}", flush=True)
            if name in finished:
                continue
            code = train_one(folder / f"{name}.yaml", recipe, nproc, stop)
            if code and not stop.requested():
                failed[name] = code
        stopped = stop.requested()
    stop.file.unlink(missing_ok=True)
    return failed, stopped


def is_finished(recipe: Recipe, nproc: int) -> bool:
    """Whether the run is finished.

    Raises:
        UserError: it can neither start nor resume: its folder holds a run of another recipe or of other data,
            another process trains it, the batch is too large, all images are of one group, or the retention
            set has no split to score.
    """
    pairs, run = open_pairs(recipe), Run(recipe, World(), "--runs")
    try:
        check_batch(recipe, len(pairs), World(world_size=nproc))
        check_groups(recipe, pairs)
        check_retention(recipe)
        run.check_data(pairs.fingerprint)
        return run.is_finished
    finally:
        run.close()


def train_one(file: Path, recipe: Recipe, nproc: int, stop: Stop) -> int:
    """Write the recipe to `file` and train it; a stop request is passed on to the run.

    Returns:
        The exit code of the training process.
    """
    with atomic_file(file) as partial:
        partial.write_text(to_yaml(recipe))
    launcher = (
        ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(nproc), "-m", "--"]
        if nproc > 1
        else ["-m"]
    )
    run_stop = Path(recipe.run) / "stop"
    words = [sys.executable, *launcher, importable("train"), str(file)]
    with subprocess.Popen(words, env=environment() | {PART_OF_RUNS: "1"}) as process:
        while process.poll() is None:
            if stop.requested() and not run_stop.exists():
                run_stop.parent.mkdir(exist_ok=True)
                run_stop.touch()
            try:
                process.wait(POLL_S)
            except subprocess.TimeoutExpired:
                continue
    if stop.requested():
        run_stop.unlink(missing_ok=True)  # the run may have ended before it read the file
    return process.returncode
