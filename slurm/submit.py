"""Training on a cluster: one run, a chain of jobs for it, or a sweep over recipes and values.

RUN/slurm/train.sbatch    the submitted script        RUN/slurm/train-JOB.log   log of a job and its restarts
RUN/slurm/recipe.yaml     the recipe at submission    RUN/slurm/jobs            numbers of the run's jobs
"""

import shutil
from pathlib import Path
from shlex import quote
from typing import Annotated

import tyro

from data_prep.cli import File, RecipeFile, Rest, Run, Runs
from data_prep.errors import UserError
from data_prep.rooms import importable
from data_prep.store.remote import is_url
from data_prep.tables import counted
from data_prep.terminal import say
from slurm.queue import active_jobs, record_job
from slurm.script import LOGS, Resources, assign, assign_list, render_script, sbatch, write_script
from slurm.site import SITE, read_site
from train.data.shares import Data, Sets, absolute, shares_of, to_words
from train.recipe import Recipe, parse, recipe_file
from train.tune.grid import expand_grid

JobNumbers = Annotated[tuple[str, ...], tyro.conf.arg(metavar="JOB [JOB ...]")]
Stage = Annotated[str, tyro.conf.arg(metavar="FOLDER")]
TrainModule = tyro.conf.Suppress[tyro.conf.Fixed[str]]  # tests submit a module with injected faults


def submit(
    recipe: Annotated[RecipeFile, tyro.conf.Positional],
    run: Run,
    data: Data,
    resources: Resources = Resources(),  # noqa: B008 frozen
    after: JobNumbers = (),
    chain: int = 1,
    stage: Stage = "",
    site: File = SITE,
    dry_run: bool = False,
    flags: Rest = (),
    module: TrainModule = "train",
) -> list[str]:
    """Submit a training run; after time limits, preemption, lost nodes and crashes it is requeued and
    resumes, until it is finished.

    Words after `--` are passed to the training. The same command submits an unfinished run again; it resumes
    from its last checkpoint.

      python -m slurm submit train/recipes/spectrum_icons.yaml --run runs/mine --data shards --nodes 2
          --time 12:00:00 -- --optim.lr 1e-5 --micro-batch-size 32

    Args:
        recipe: YAML recipe, or the name of one of the project; the job reads a copy of it.
        run: Run folder; scripts and logs are in RUN/slurm.
        data: Folder of shards, or several with their shares: icons=0.7 general=0.3. With --after it may be
            created by an earlier job.
        after: Numbers of jobs that must succeed first.
        chain: Number of jobs, each of which resumes when the previous one reached its time limit; for
            clusters where a job may not requeue itself.
        stage: Folder on each node's own disk to copy the shards to before training, such as '$TMPDIR'.
        site: Settings of the cluster; see slurm/site.yaml.
        dry_run: Write and print the script without submitting it.

    Returns:
        The jobs' numbers.
    """
    resources.check()
    if chain < 1:
        raise UserError(f"--chain {chain}: must be at least 1")
    cluster, run, data = read_site(site), run.absolute(), absolute(data)
    check_training(recipe, run, data, resources, flags, data_may_be_missing=bool(after))
    if not dry_run:
        check_no_active_jobs(run)
    settings = [
        *run_settings(run, copy_recipe(recipe, run), flags),
        *common_settings(data, stage, module, requeue=chain == 1),
    ]
    path = run / LOGS / "train.sbatch"
    write_script(render_script("train.sbatch", "train", run / LOGS, resources, cluster, settings), path)
    if not dry_run:
        reset_stop(run)
    numbers: list[str] = []
    for link in range(chain):
        # afterany: a job that is stopped by its time limit ends with 75, and afterok would cancel the rest.
        previous, dependency = (numbers[-1:], "afterany") if link else (list(after), "afterok")
        number = sbatch(path, previous, dependency, dry_run)
        numbers.append(f"{number}{link + 1}" if dry_run else number)
        if not dry_run:
            record_job(run, number, "train")
    if dry_run:
        return numbers
    say(f"# state: python -m slurm status {quote(str(run))}")
    stop = quote(str(run / "stop"))
    say(f"# to stop it with a checkpoint: touch {stop}, or: scancel {' '.join(numbers)}")
    return numbers


def sweep(
    recipes: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="RECIPE [RECIPE ...]")],
    runs: Runs,
    data: Data,
    vary: Annotated[
        tyro.conf.UseAppendAction[tuple[str, ...]], tyro.conf.arg(metavar="KEY=VALUE[,VALUE ...]")
    ] = (),
    resources: Resources = Resources(),  # noqa: B008 frozen
    at_once: int = 0,
    after: JobNumbers = (),
    stage: Stage = "",
    site: File = SITE,
    dry_run: bool = False,
    flags: Rest = (),
    module: TrainModule = "train",
) -> str:
    """Submit a job array: one run for each recipe and combination of values, each requeued and resumed as by
    `submit`.

    Words after `--` are passed to each training. A table of the results: python -m train.sweep --table RUNS

      python -m slurm sweep train/recipes/icons.yaml --runs runs/sweep --data shards
          --vary optim.lr=1e-5,3e-5 --vary seed=0,1

    Args:
        recipes: YAML recipes.
        runs: Folder of the runs; each run folder is named by its recipe and values.
        data: Folder of shards, or several with their shares.
        vary: A recipe key and its values. Given several times, every combination is a run.
        at_once: Largest number of runs at the same time; 0 is no limit.
        after: Numbers of jobs that must succeed first.
        stage: Folder on each node's own disk to copy the shards to before training, such as '$TMPDIR'.
        site: Settings of the cluster; see slurm/site.yaml.
        dry_run: Write and print the script without submitting it.

    Returns:
        The array's number.
    """
    resources.check()
    if not recipes:
        raise UserError("python -m slurm sweep: no recipe; pass at least one")
    cluster, runs, data = read_site(site), runs.absolute(), absolute(data)
    tasks, folders = [], []
    for number, (name, (recipe, values)) in enumerate(expand_grid(list(recipes), list(vary)).items()):
        run, all_flags = runs / name, (*flags, *values)
        check_training(Path(recipe), run, data, resources, all_flags, data_may_be_missing=bool(after))
        if not dry_run:
            check_no_active_jobs(run)
        folders.append(run)
        settings = run_settings(run, copy_recipe(Path(recipe), run), all_flags)
        tasks.append(f"{number}) {'; '.join(settings)} ;;")
    settings = [
        "case $SLURM_ARRAY_TASK_ID in",
        *tasks,
        "esac",
        *common_settings(data, stage, module, requeue=True),
    ]
    array = f"0-{len(tasks) - 1}{f'%{at_once}' if at_once else ''}"
    path = runs / LOGS / "sweep.sbatch"
    script = render_script("train.sbatch", "sweep", runs / LOGS, resources, cluster, settings, array)
    write_script(script, path)
    if dry_run:
        return sbatch(path, list(after), dry_run=True)
    for run in folders:
        reset_stop(run)
    number = sbatch(path, list(after))
    for task, run in enumerate(folders):
        record_job(run, f"{number}_{task}", "train")
    say(f"# {counted(len(folders), 'run')}; state of one: python -m slurm status {quote(str(folders[0]))}")
    say(f"# table of the results: python -m train.sweep --table {quote(str(runs))}")
    return number


def check_training(
    recipe: Path,
    run: Path,
    data: Sets,
    resources: Resources,
    flags: tuple[str, ...],
    data_may_be_missing: bool,
) -> Recipe:
    """The recipe as the job will read it, so that mistakes are found before the job waits in the queue.

    Raises:
        UserError: the recipe is invalid, does not fit the number of ranks, or there are no shards.
    """
    parsed = parse([str(recipe), "--data", *to_words(data), "--run", str(run), *flags])
    ranks = resources.nodes * resources.ranks_per_node
    if parsed.global_batch_size % ranks:
        raise UserError(
            f"--global-batch-size {parsed.global_batch_size}: must be a multiple of the {ranks} ranks"
            f" ({resources.nodes} nodes x {resources.ranks_per_node})"
        )
    from data_prep.shards import has_manifest  # imports numpy, which is slow

    missing = [] if data_may_be_missing else [each for each in shares_of(data) if not has_manifest(each)]
    if missing:
        raise UserError(
            f"{', '.join(missing)}: no manifest.json, so not a folder of shards; build it, or pass the job"
            " that builds it with --after"
        )
    return parsed


def check_no_active_jobs(run: Path) -> None:
    """Raises UserError where jobs of the run are in the queue: two would train in one folder."""
    if jobs := active_jobs(run):
        raise UserError(
            f"{run}: has jobs in the queue, {', '.join(jobs)}; wait for them, or: scancel {' '.join(jobs)}"
        )


def run_settings(run: Path, recipe: Path, flags: tuple[str, ...]) -> list[str]:
    """Lines of bash: what differs between the runs of a sweep."""
    return [assign("RUN", run), assign("RECIPE", recipe), assign_list("FLAGS", list(flags))]


def common_settings(data: Sets, stage: str, module: str, requeue: bool) -> list[str]:
    """Lines of bash: what the runs of a sweep share.

    Raises:
        UserError: data behind a URL cannot be staged.
    """
    if stage and (urls := [folder for folder in shares_of(data) if is_url(folder)]):
        raise UserError(
            f"--stage {stage}: {urls[0]} is fetched by the training itself; pass -- --cache-dir {stage}"
        )
    return [
        assign_list("DATA", to_words(data)),
        f'STAGE="{stage}"',  # in double quotes, so that $TMPDIR is expanded on the node
        assign("MODULE", importable(module)),
        assign("REQUEUE", "yes" if requeue else "no"),
    ]


def copy_recipe(recipe: Path, run: Path) -> Path:
    """Copy the recipe into the run folder: a later edit of the original must not change a waiting job."""
    original, copy = recipe_file(recipe), run / LOGS / "recipe.yaml"
    copy.parent.mkdir(parents=True, exist_ok=True)
    if original.absolute() != copy:
        shutil.copyfile(original, copy)
    return copy


def reset_stop(run: Path) -> None:
    """A new submission means to resume: discard an old stop request and the count of crashes."""
    for path in (run / "stop", run / LOGS / "attempts_without_progress"):
        path.unlink(missing_ok=True)
