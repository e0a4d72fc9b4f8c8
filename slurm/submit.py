"""Training on a cluster: one run, a chain of jobs for it, or a sweep over recipes and values.

RUN/slurm/train.sbatch     what was submitted           RUN/slurm/train-JOB.log    what the job said, restarts included
RUN/slurm/recipe.yaml      the recipe as it was then    RUN/slurm/jobs             numbers of the run's jobs
"""

import shutil
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.errors import UserError
from slurm.queue import add_job, unfinished
from slurm.script import LOGS, Shape, assign, assign_list, sbatch, script, write
from slurm.site import SITE, read_site
from train.recipe import Recipe, parse
from train.tune.grid import expand_grid


def submit(
    recipe: Annotated[str, tyro.conf.Positional],
    run: Path,
    data: Path,
    shape: Shape = Shape(),  # noqa: B008 frozen
    after: list[str] = [],  # noqa: B006 tyro copies it
    chain: int = 1,
    stage: str = "",
    site: Path = SITE,
    dry_run: bool = False,
    flags: tyro.conf.Suppress[tyro.conf.Fixed[tuple[str, ...]]] = (),
    module: tyro.conf.Suppress[tyro.conf.Fixed[str]] = "train",
) -> list[str]:
    """Submits a training that survives time limits, preemption, lost nodes and crashes, and goes on until it
    is finished.

    What follows `--` is given to the training: ... --nodes 2 -- --optim.lr 1e-5 --micro_batch_size 32
    The same command again, when no job of the run is left, goes on with it.

    Args:
        recipe: YAML recipe; a copy of it is what the job reads.
        run: Run folder; scripts and logs lie in RUN/slurm.
        data: Folder of shards; with --after it may come to be later.
        after: Numbers of jobs that have to succeed before.
        chain: So many jobs, each going on where the one before it was stopped by its time limit: for clusters
            where a job may not requeue itself.
        stage: Folder on each node's own disk to copy the shards to before training, '$TMPDIR' for example.
        site: What the cluster wants; see slurm/site.yaml.
        dry_run: Write the script and print it, and submit nothing.

    Returns:
        The jobs' numbers.
    """
    shape.check()
    if chain < 1:
        raise UserError(f"--chain {chain}: at least 1 is wanted")
    cluster, run, data = read_site(site), run.absolute(), data.absolute()
    check_training(recipe, run, data, shape, flags, bool(after))
    if dry_run is False and (jobs := unfinished(run)):
        raise UserError(
            f"{run}: has jobs in the queue, {', '.join(jobs)}; wait for them, or: scancel {' '.join(jobs)}"
        )
    settings = [*place(run, copied(recipe, run), flags), *common(data, stage, module, requeue=chain == 1)]
    path = run / LOGS / "train.sbatch"
    write(script("train.sbatch", "train", run / LOGS, shape, cluster, settings), path)
    if not dry_run:
        begin_anew(run)
    numbers: list[str] = []
    for link in range(chain):
        number = sbatch(path, numbers[-1:] if link else after, "afterany" if link else "afterok", dry_run)
        numbers.append(f"{number}{link + 1}" if dry_run else number)
        if not dry_run:
            add_job(run, numbers[-1], "train")
    if not dry_run:
        print(f"# where it stands: python -m slurm status {run}")
        print(f"# to stop it, with a checkpoint: touch {run}/stop, or: scancel {' '.join(numbers)}")
    return numbers


def sweep(
    recipes: Annotated[list[str], tyro.conf.Positional],
    runs: Path,
    data: Path,
    vary: tyro.conf.UseAppendAction[list[str]] = [],  # noqa: B006
    shape: Shape = Shape(),  # noqa: B008
    at_once: int = 0,
    after: list[str] = [],  # noqa: B006
    stage: str = "",
    site: Path = SITE,
    dry_run: bool = False,
    flags: tyro.conf.Suppress[tyro.conf.Fixed[tuple[str, ...]]] = (),
    module: tyro.conf.Suppress[tyro.conf.Fixed[str]] = "train",
) -> str:
    """Submits one array: a run for each recipe and each combination of values, each as tough as one from
    `submit`.

    What they reached, in one table: python -m train.sweep --table RUNS

    Args:
        recipes: YAML recipes.
        runs: Folder to make the run folders in, each named by its recipe and values.
        data: Folder of shards.
        vary: A key and its values: --vary optim.lr=1e-5,3e-5 --vary seed=0,1 makes four runs of each recipe.
        at_once: At most so many at a time; 0 is no limit.
        after: Numbers of jobs that have to succeed before.
        stage: Folder on each node's own disk to copy the shards to before training.
        site: What the cluster wants; see slurm/site.yaml.
        dry_run: Write the script and print it, and submit nothing.

    Returns:
        The array's number.
    """
    shape.check()
    cluster, runs, data = read_site(site), runs.absolute(), data.absolute()
    tasks, folders = [], []
    for number, (name, (recipe, values)) in enumerate(expand_grid(recipes, vary).items()):
        run, all_flags = runs / name, (*flags, *values)
        check_training(recipe, run, data, shape, all_flags, bool(after))
        if not dry_run and (jobs := unfinished(run)):
            raise UserError(
                f"{run}: has jobs in the queue, {', '.join(jobs)}; wait for them, or: scancel"
                f" {' '.join(jobs)}"
            )
        folders.append(run)
        tasks.append(f"{number}) {'; '.join(place(run, copied(recipe, run), all_flags))} ;;")
    settings = ["case $SLURM_ARRAY_TASK_ID in", *tasks, "esac", *common(data, stage, module, requeue=True)]
    array = f"0-{len(tasks) - 1}{f'%{at_once}' if at_once else ''}"
    path = runs / LOGS / "sweep.sbatch"
    write(script("train.sbatch", "sweep", runs / LOGS, shape, cluster, settings, array), path)
    if dry_run:
        return sbatch(path, after, dry_run=True)
    for run in folders:
        begin_anew(run)
    number = sbatch(path, after)
    for task, run in enumerate(folders):
        add_job(run, f"{number}_{task}", "train")
    print(f"# {len(folders)} runs; where one stands: python -m slurm status {folders[0]}")
    print(f"# what they reached, in one table: python -m train.sweep --table {runs}")
    return number


def check_training(
    recipe: str, run: Path, data: Path, shape: Shape, flags: tuple[str, ...], data_comes_later: bool
) -> Recipe:
    """The recipe as the job will read it; mistakes are found here, and not after a night in the queue."""
    parsed = parse([recipe, "--data", str(data), "--run", str(run), *flags])
    ranks = shape.nodes * shape.ranks_per_node
    if parsed.global_batch_size % ranks:
        raise UserError(
            f"--global_batch_size {parsed.global_batch_size} cannot be shared evenly by {ranks} ranks ({shape.nodes} nodes x"
            f" {shape.ranks_per_node})"
        )
    if not data_comes_later and not (data / "manifest.json").is_file():
        raise UserError(
            f"{data}: no manifest.json, so no shards; make them, or name the job that does with --after"
        )
    return parsed


def place(run: Path, recipe: Path, flags: tuple[str, ...]) -> list[str]:
    return [assign("RUN", run), assign("RECIPE", recipe), assign_list("FLAGS", list(flags))]


def common(data: Path, stage: str, module: str, requeue: bool) -> list[str]:
    # left in double quotes, so that $TMPDIR is the node's
    return [
        assign("DATA", data),
        f'STAGE="{stage}"',
        assign("MODULE", module),
        assign("REQUEUE", "yes" if requeue else "no"),
    ]


def copied(recipe: str, run: Path) -> Path:
    """The recipe beside the run: to edit the original does not change a job that waits."""
    copy = run / LOGS / "recipe.yaml"
    copy.parent.mkdir(parents=True, exist_ok=True)
    if Path(recipe).absolute() != copy:
        shutil.copyfile(recipe, copy)
    return copy


def begin_anew(run: Path) -> None:
    """A person wants the run to go on: an old stop, and old crashes, no longer count."""
    for path in (run / "stop", run / LOGS / "fruitless"):
        path.unlink(missing_ok=True)
