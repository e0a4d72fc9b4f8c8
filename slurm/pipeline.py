"""The whole path as one submission: each job waits for the one before it, and is cancelled if that one fails.

captions -> prepare (array) -> merge -> train (chain) -> evaluate -> publish
"""

import shlex
from dataclasses import replace
from pathlib import Path
from typing import Annotated

import tyro

from data_prep.errors import UserError
from slurm.queue import add_job
from slurm.script import LOGS, Shape, assign, assign_list, sbatch, script, write
from slurm.site import SITE, Site, read_site
from slurm.submit import check_training, submit


def job(
    name: Annotated[str, tyro.conf.Positional],
    folder: Path,
    shape: Shape = Shape(gpus=0, time="04:00:00"),  # noqa: B008 frozen
    array: str = "",
    after: list[str] = [],  # noqa: B006 tyro copies it
    resumes: bool = False,
    site: Path = SITE,
    dry_run: bool = False,
    flags: tyro.conf.Suppress[tyro.conf.Fixed[tuple[str, ...]]] = (),
) -> str:
    """Submits any other command of the project; it follows `--`, without `python -m`.

    python -m slurm job eval --folder runs/mine --gpus 8 -- eval retrieval runs/mine --data shards --split
    test --json out.json

    With GPUs it is run by torchrun, a process for each; without, by one Python.

    Args:
        name: What the job is called; the script is FOLDER/slurm/NAME.sbatch.
        folder: Where script and logs go; a run folder for example.
        array: Indices of an array, 0-31: for data_prep build, each task prepares a part.
        after: Numbers of jobs that have to succeed before.
        resumes: The command goes on where it was killed, as data_prep build does; so it is requeued at its
            time limit.
        site: What the cluster wants; see slurm/site.yaml.
        dry_run: Write the script and print it, and submit nothing.

    Returns:
        The job's number.
    """
    shape.check()
    if not flags:
        raise UserError("no command: write it after --, as in: -- eval retrieval runs/mine --data shards")
    return _submit(
        name, folder.absolute(), shape, read_site(site), list(flags), after, array, resumes, dry_run
    )


def pipeline(
    inputs: Annotated[list[str], tyro.conf.Positional],
    recipe: str,
    run: Path,
    data: Path,
    build: str = "",
    tasks: int = 32,
    shape: Shape = Shape(),  # noqa: B008
    prepare_time: str = "08:00:00",
    chain: int = 1,
    stage: str = "",
    split: str = "test",
    publish: str = "",
    site: Path = SITE,
    dry_run: bool = False,
    flags: tyro.conf.Suppress[tyro.conf.Fixed[tuple[str, ...]]] = (),
    module: tyro.conf.Suppress[tyro.conf.Fixed[str]] = "train",
) -> list[str]:
    """Submits preparation, merge, training, evaluation and publishing at once; each begins when the one
    before succeeded.

    The same command again does what is missing: shards that are there are used, parts that were prepared are
    kept, and training goes on from its last checkpoint. What follows `--` is given to the training.

    Args:
        inputs: What `python -m data_prep build` takes: CSV files, tars, folders, URLs.
        recipe: YAML recipe of the training.
        run: Run folder; scripts and logs of all jobs lie in RUN/slurm, the numbers in RUN/test.json.
        data: Folder of shards to make.
        build: Options of the build, in quotes: "--image-column file --caption-column text".
        tasks: The preparation is cut in so many tasks of an array.
        prepare_time: Time limit of one of these, and of the merge.
        chain: So many training jobs, for clusters where a job may not requeue itself.
        stage: Folder on each node's own disk to copy the shards to before training.
        split: What to evaluate on: val or test; "" does not evaluate.
        publish: Options of `python -m train.publish RUN`, in quotes: "--repo ME/MODEL --license mit"; "" does
            not publish.
        site: What the cluster wants; see slurm/site.yaml.
        dry_run: Write the scripts and print them, and submit nothing.

    Returns:
        The jobs' numbers, in their order.
    """
    shape.check()
    if tasks < 1:
        raise UserError(f"--tasks {tasks}: at least 1 is wanted")
    cluster, run, data = read_site(site), run.absolute(), data.absolute()
    check_training(recipe, run, data, shape, flags, data_comes_later=True)
    alone, last, numbers = Shape(gpus=0, time=prepare_time), [], []

    def then(
        name: str, job_shape: Shape, words: list, array: str = "", resumes: bool = False, site: Site = cluster
    ) -> None:
        last[:] = [
            _submit(name, run, job_shape, site, [str(word) for word in words], last, array, resumes, dry_run)
        ]
        numbers.extend(last)

    if (data / "manifest.json").is_file():
        print(f"# {data}: made already")
    else:
        places = [source if "://" in source else Path(source).absolute() for source in inputs]
        words = [
            "data_prep",
            "build",
            *places,
            "--out",
            data,
            "--processes",
            cluster.cpus_per_gpu,
            *shlex.split(build),
        ]
        then("prepare", alone, words, f"0-{tasks - 1}" if tasks > 1 else "", resumes=True)
        if tasks > 1:
            then(
                "merge",
                alone,
                ["data_prep", "merge", data, "--processes", cluster.cpus_per_gpu],
                resumes=True,
            )
    trained = submit(recipe, run, data, shape, list(last), chain, stage, site, dry_run, flags, module)
    numbers += trained
    last = trained[-1:]
    if split:
        out = ["--json", run / f"{split}.json", "--page", run / f"{split}.html"]
        then(
            "eval",
            Shape(1, shape.gpus, prepare_time),
            ["eval", "retrieval", run, "--data", data, "--split", split, *out],
        )
    if publish:
        results = ["--results", run / f"{split}.json"] if split else []
        online = replace(cluster, environment={**cluster.environment, "HF_HUB_OFFLINE": "0"})
        then("publish", alone, ["train.publish", run, *results, *shlex.split(publish)], site=online)
    return numbers


def _submit(
    name: str,
    folder: Path,
    shape: Shape,
    site: Site,
    words: list[str],
    after: list[str],
    array: str,
    resumes: bool,
    dry_run: bool,
) -> str:
    settings = [
        assign("RESUMES", "yes" if resumes else "no"),
        assign("TORCHRUN", "yes" if shape.gpus else "no"),
        assign_list("COMMAND", words),
    ]
    path = folder / LOGS / f"{name}.sbatch"
    write(script("job.sbatch", name, folder / LOGS, shape, site, settings, array), path)
    number = sbatch(path, after, dry_run=dry_run)
    if not dry_run:
        add_job(folder, number, name)
    return number
