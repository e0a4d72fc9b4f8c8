"""Data preparation, training, evaluation and publishing as one submission. Each job waits for the previous
one, and is cancelled if that one fails.

captions -> prepare (array) -> merge -> train (chain) -> eval -> publish
"""

import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.cli import File, Folder, RecipeFile, Rest, Run, Shards
from data_prep.errors import UserError
from data_prep.rooms import ROOMS, importable
from data_prep.store.remote import absolute_place
from data_prep.terminal import say
from slurm.queue import record_job
from slurm.script import LOGS, Resources, assign, assign_list, render_script, sbatch, write_script
from slurm.site import SITE, Site, read_site
from slurm.submit import JobNumbers, Stage, TrainModule, check_training, submit

Options = Annotated[str, tyro.conf.arg(metavar="'OPTIONS'")]


def job(
    name: Annotated[str, tyro.conf.Positional, tyro.conf.arg(metavar="NAME")],
    folder: Folder,
    resources: Resources = Resources(gpus=0, time="04:00:00"),  # noqa: B008 frozen
    array: Annotated[str, tyro.conf.arg(metavar="INDICES")] = "",
    after: JobNumbers = (),
    resumes: bool = False,
    site: File = SITE,
    dry_run: bool = False,
    flags: Rest = (),
) -> str:
    """Submit any other command of the project. It follows `--`, as after `cliptune` or after `python -m`.

    With GPUs, torchrun starts one process for each; without, it is one Python process.

      python -m slurm job eval --folder runs/mine --gpus 8 -- eval retrieval runs/mine --data shards
          --json runs/mine/test.json

    Args:
        name: Name of the job; its script is FOLDER/slurm/NAME.sbatch.
        folder: Folder of the script and the log, such as a run folder.
        array: Indices of a job array, such as 0-31: each task of data_prep build prepares a part.
        after: Numbers of jobs that must succeed first.
        resumes: The command resumes after a kill, as data_prep build does; it is requeued at its time limit.
        site: Settings of the cluster; see slurm/site.yaml.
        dry_run: Write and print the script without submitting it.

    Returns:
        The job's number.
    """
    resources.check()
    if not flags:
        raise UserError(
            "python -m slurm job: no command; pass it after --, as in: -- eval retrieval RUN --data SHARDS"
        )
    return submit_command(
        flags,
        name,
        folder.absolute(),
        resources,
        read_site(site),
        after,
        array=array,
        resumes=resumes,
        dry_run=dry_run,
    )


def pipeline(
    inputs: Annotated[tuple[str, ...], tyro.conf.Positional, tyro.conf.arg(metavar="INPUT [INPUT ...]")],
    recipe: RecipeFile,
    run: Run,
    data: Shards,
    build: Options = "",
    tasks: int = 32,
    resources: Resources = Resources(),  # noqa: B008 frozen
    prepare_time: Annotated[str, tyro.conf.arg(metavar="TIME")] = "08:00:00",
    chain: int = 1,
    stage: Stage = "",
    split: str = "test",
    publish: Options = "",
    site: File = SITE,
    dry_run: bool = False,
    flags: Rest = (),
    module: TrainModule = "train",
) -> list[str]:
    """Submit data preparation, training, evaluation and publishing at once; each job starts after the
    previous one succeeded.

    Words after `--` are passed to the training. The same command does only what is missing: finished shards
    are used, prepared parts are kept, and training resumes from its last checkpoint.

      python -m slurm pipeline captions.csv --recipe train/recipes/spectrum_icons.yaml --run runs/mine
          --data shards --build "--image-column file --caption-column text" --nodes 2
          --publish "--repo ME/MODEL --license mit"

    Args:
        inputs: Input of `python -m data_prep build`: CSV files, tars, folders, URLs.
        recipe: YAML recipe of the training.
        run: Run folder; scripts and logs of all jobs are in RUN/slurm, results in RUN/test.json.
        data: Folder of shards to build.
        build: Options of `python -m data_prep build`, in quotes.
        tasks: Number of array tasks that share the preparation.
        prepare_time: Time limit of each of these tasks, of the merge, the evaluation and publishing.
        chain: Number of training jobs, for clusters where a job may not requeue itself.
        stage: Folder on each node's own disk to copy the shards to before training, such as '$TMPDIR'.
        split: Split to evaluate on, val or test; "" skips the evaluation.
        publish: Options of `python -m train.publish`, in quotes; "" does not publish.
        site: Settings of the cluster; see slurm/site.yaml.
        dry_run: Write and print the scripts without submitting them.

    Returns:
        The jobs' numbers, in order.
    """
    resources.check()
    if not inputs:
        raise UserError("python -m slurm pipeline: no input; pass a CSV of captions, tars, folders or URLs")
    if tasks < 1:
        raise UserError(f"--tasks {tasks}: must be at least 1")
    cluster, run, data = read_site(site), run.absolute(), absolute_place(data)
    check_training(recipe, run, data, resources, flags, data_may_be_missing=True)
    cpu_only, numbers = Resources(gpus=0, time=prepare_time), []

    def submit_next(
        name: str, words: list, needs: Resources = cpu_only, site: Site = cluster, **options
    ) -> None:
        number = submit_command(words, name, run, needs, site, numbers[-1:], dry_run=dry_run, **options)
        numbers.append(number)

    from data_prep.shards import has_manifest  # imports numpy, which is slow

    if has_manifest(data):
        say(f"# {data}: exists, not built again")
    else:
        processes = ["--processes", cluster.cpus_per_gpu]
        sources = [source if "://" in source else Path(source).absolute() for source in inputs]
        words = ["data_prep", "build", *sources, "--out", data, *processes, *shlex.split(build)]
        submit_next("prepare", words, array=f"0-{tasks - 1}" if tasks > 1 else "", resumes=True)
        if tasks > 1:
            submit_next("merge", ["data_prep", "merge", data, *processes], resumes=True)
    after = tuple(numbers[-1:])
    numbers += submit(recipe, run, data, resources, after, chain, stage, site, dry_run, flags, module)
    if split:
        out = ["--json", run / f"{split}.json", "--page", run / f"{split}.html"]
        words = ["eval", "retrieval", run, "--data", data, "--split", split, *out]
        submit_next("eval", words, replace(resources, nodes=1, time=prepare_time))
    if publish:
        results = ["--results", run / f"{split}.json"] if split else []
        online = replace(cluster, environment={**cluster.environment, "HF_HUB_OFFLINE": "0"})
        words = [
            "train.publish",
            run,
            *results,
            *shlex.split(publish),
            "--yes",
        ]  # a job has no terminal to ask on
        submit_next("publish", words, site=online)
    return numbers


def submit_command(
    words: Sequence[object],
    name: str,
    folder: Path,
    resources: Resources,
    site: Site,
    after: Sequence[str] = (),
    array: str = "",
    resumes: bool = False,
    dry_run: bool = False,
) -> str:
    """Submit one command of the project, as typed after `cliptune` or `python -m`; see `job`.

    Returns:
        The job's number.
    """
    settings = [
        assign("RESUMES", "yes" if resumes else "no"),
        assign("TORCHRUN", "yes" if resources.gpus else "no"),
        assign_list("COMMAND", module_and_arguments(words)),
    ]
    path = folder / LOGS / f"{name}.sbatch"
    write_script(render_script("job.sbatch", name, folder / LOGS, resources, site, settings, array), path)
    number = sbatch(path, list(after), dry_run=dry_run)
    if not dry_run:
        record_job(folder, number, name)
    return number


def module_and_arguments(words: Sequence[object]) -> list:
    """What follows `python -m` in a job: a module of a room as it is typed, else a command of `cliptune`."""
    name = str(words[0])
    if name in ROOMS or "." in name:
        return [importable(name), *words[1:]]
    return [*([] if name == "cliptune" else ["cliptune"]), *words]
