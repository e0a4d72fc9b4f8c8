"""The whole path in turns, ours and open_clip_train's: loader, augmentation, step, on one model, batch and
data.

Every run is its own process and starts from the same folder of random weights. Progress is read from each
trainer's log; the time is when a line appears, because neither trainer waits for the GPU before it reads the
clock. A window is what is between two lines; the first windows are left out, and the median is over all
others in all turns. CPU seconds are of the
whole process tree: on a shared machine they say more than the clock.
"""

import contextlib
import dataclasses
import functools
import inspect
import itertools
import json
import os
import re
import resource
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple

import torch
from open_clip.transform import AugmentationCfg

from data_prep.errors import Fault, UserError, exit_on_user_error
from data_prep.rooms import environment, importable
from data_prep.shards import Shards, shard_file
from data_prep.store.remote import absolute_place, is_url
from data_prep.terminal import say
from train.device import OUT_OF_MEMORY
from train.loop import fit
from train.model.clip import load
from train.recipe import Recipe, flag, parse, to_yaml
from train.world import World

WARMUP_LINES, WINDOWS = 2, 5
POLL_S = 0.005
WAYS = {"cpu": ("plain", "grad-checkpointing")}  # to run open_clip_train, where none are asked for
WAYS["cuda"] = (*WAYS["cpu"], "torchcompile", "torchcompile+grad-checkpointing")
THEIR_LINE = re.compile(
    r"Train Epoch: 0 \[ *(\d+)/.*?Data \(t\): ([\d.]+) Batch \(t\): ([\d.]+).*? Loss: ([\d.]+)"
)
PEAK = re.compile(r"^peak memory ([\d.]+) GB$", re.MULTILINE)


class Line(NamedTuple):
    samples: int
    data_share: float  # of the time since the line before
    loss: float


class Mark(NamedTuple):
    """When a line appeared."""

    time_s: float
    cpu_s: float
    line: Line


class Command(NamedTuple):
    trainer: str
    options: str
    words: list[str]
    log: Path
    read: Callable[[str], Line | None]
    stop_file: Path | None = None


def whole_path(
    recipe: Recipe, steps: int, device: torch.device, folder: Path, turns: int, ways: Sequence[str]
) -> list[dict]:
    """A row for ours, and one for each of `ways`.

    Args:
        recipe: Its weights are not used: both trainers begin with the same random ones.
        steps: optimizer steps that a turn measures, in five windows.
        folder: for the model, and for what the runs write.
        ways: flags of open_clip_train, joined by "+", or "plain"; those of WAYS where there are none.

    Raises:
        Fault: a run failed, and not for lack of memory.
    """
    every = max(1, steps // WINDOWS)
    model, original = folder / "model", load(recipe.model, weights=False)
    recipe = dataclasses.replace(
        recipe, model=f"local-dir:{model}", data=absolute_place(recipe.data), log_every_steps=every
    )
    theirs = their_words(recipe, (WARMUP_LINES + WINDOWS) * every + 1, device)
    model.mkdir()
    original.save(model)
    found: dict[tuple[str, str], list[dict]] = {}
    flags = [[f"--{flag}" for flag in way.split("+") if flag != "plain"] for way in ways or WAYS[device.type]]
    for turn in range(turns):
        for number, extra in enumerate([None, *flags]):
            place = folder / f"{turn}-{number}"
            place.mkdir()
            command = our_command(recipe, place) if extra is None else their_command(theirs, extra, place)
            results = found.setdefault((command.trainer, command.options), [])
            if {} not in results:  # one that ran out of memory would do so again
                results.append(run(command, place))
                result = results[-1] or "out of memory"
                say(f"{command.trainer} {command.options} {turn + 1} of {turns}: {result}", file=sys.stderr)
    return [_row(*key, results) for key, results in found.items()]


def check_peer(recipe: Recipe) -> None:
    """Check that open_clip_train can run the recipe.

    Raises:
        UserError: it cannot.
    """
    if not isinstance(recipe.data, str):
        raise UserError(
            f"{flag('data', recipe.data)}: open_clip_train cannot give data sets shares of a batch; leave out"
            " --peer, or pass one folder"
        )
    tars, chunk = len(Shards(recipe.data, "train").entries), their_chunk(recipe)
    if tars < recipe.workers:
        raise UserError(
            f"{recipe.data}: {tars} shards, and open_clip_train needs one per worker; pass --workers {tars}"
        )
    if recipe.global_batch_size % chunk:
        raise UserError(
            f"--micro-batch-size {chunk}: open_clip_train needs equal chunks; pass a divisor of"
            f" --global-batch-size {recipe.global_batch_size}"
        )


def our_command(recipe: Recipe, folder: Path) -> Command:
    recipe = dataclasses.replace(recipe, run=str(folder / "run"), epochs=1_000_000)
    (folder / "recipe.yaml").write_text(to_yaml(recipe))
    words = [sys.executable, "-m", importable("train.bench.peer"), "ours", str(folder / "recipe.yaml")]
    return Command("ours", "", words, folder / "run" / "metrics.jsonl", _our_line, folder / "run" / "stop")


def their_command(words: list[str], extra: list[str], folder: Path) -> Command:
    return Command(
        "open_clip_train",
        " ".join(extra),
        [*words, *extra],
        folder / "none" / "bench" / "out.log",
        _their_line,
    )


def their_words(recipe: Recipe, steps: int, device: torch.device) -> list[str]:
    """The command line of open_clip_train for `recipe`, without its checkpoints, in one epoch of `steps`."""
    if is_url(recipe.data):
        raise UserError(f"{recipe.data}: open_clip_train is compared on shards of this machine; copy some")
    tars = [str(shard_file(Path(recipe.data), entry)) for entry in Shards(recipe.data, "train").entries]
    chunk = their_chunk(recipe)
    optim, augment = recipe.optim, recipe.augment
    flags = {
        "model": recipe.model,
        "device": device.type,
        "precision": {"bf16": "amp_bf16", "fp32": "fp32"}[recipe.precision],
        "train-data": "::".join(tars),
        "dataset-type": "webdataset",
        "train-num-samples": steps * recipe.global_batch_size,
        "epochs": 1,
        "batch-size": chunk,
        "accum-freq": recipe.global_batch_size // chunk,
        "workers": recipe.workers,
        "lr": optim.lr,
        "beta1": optim.betas[0],
        "beta2": optim.betas[1],
        "eps": optim.eps,
        "wd": optim.weight_decay,
        "grad-clip-norm": optim.max_grad_norm,
        "warmup": 1,
        "seed": recipe.seed,
        "log-every-n-steps": recipe.log_every_steps,
        "logs": "none",  # writes its log, and no checkpoint
        "name": "bench",
    }
    words = [sys.executable, "-m", importable("train.bench.peer"), "theirs"]
    words += [word for name, value in flags.items() for word in (f"--{name}", str(value))]
    known = AugmentationCfg.__dataclass_fields__  # ours are more, and switched off unless a recipe says so
    augment = {name: value for name, value in dataclasses.asdict(augment).items() if name in known}
    return [*words, "--aug-cfg", *(f"{name}={value}".replace(" ", "") for name, value in augment.items())]


def their_chunk(recipe: Recipe) -> int:
    size = recipe.global_batch_size
    return size if recipe.micro_batch_size == "auto" else min(size, recipe.micro_batch_size)


def run(command: Command, folder: Path) -> dict:
    """One turn: pairs/s of its "windows", and what else a row wants; {} if memory was too little."""
    marks: list[Mark] = []
    printed, size = folder / "printed.txt", 0
    with open(printed, "w") as output:  # open_clip_train writes its log into the current folder
        process = subprocess.Popen(
            command.words, cwd=folder, env=environment(), stdout=output, stderr=subprocess.STDOUT
        )
    try:
        ended = False
        while not ended:
            ended = process.poll() is not None
            if command.log.is_file() and command.log.stat().st_size > size:
                now, cpu, text = time.perf_counter(), cpu_s(process.pid), command.log.read_text()
                size = len(text.encode())
                lines = [line for line in map(command.read, text.splitlines(keepends=True)) if line]
                marks += [Mark(now, cpu, line) for line in lines[len(marks) :]]
                if command.stop_file and len(marks) > WARMUP_LINES + WINDOWS:
                    command.stop_file.touch()
            time.sleep(POLL_S)
    finally:
        process.kill()
        process.wait()
    text = printed.read_text()
    if process.returncode == -9 or any(sign in text for sign in OUT_OF_MEMORY):
        return {}
    if process.returncode or len(marks) <= WARMUP_LINES + WINDOWS:
        raise Fault(
            f"{' '.join(command.words)}\nended with {process.returncode} after {len(marks)} lines of its"
            f" log:\n{text[-2000:]}"
        )
    first, marks = marks[0].line, marks[WARMUP_LINES : WARMUP_LINES + WINDOWS + 1]
    return {
        "windows": [
            (end.line.samples - start.line.samples) / (end.time_s - start.time_s)
            for start, end in itertools.pairwise(marks)
        ],
        "cpu_s_per_pair": (
            (marks[-1].cpu_s - marks[0].cpu_s) / (marks[-1].line.samples - marks[0].line.samples)
        ),
        "data_share": statistics.mean(mark.line.data_share for mark in marks[1:]),
        "first_loss": first.loss,
        "peak_memory_gb": float(PEAK.search(text)[1]),
    }


def _row(trainer: str, options: str, turns: list[dict]) -> dict:
    row = {"trainer": trainer, "options": options}
    if {} in turns:
        return {**row, "pairs_per_s": None, "peak_memory_gb": None}
    windows = [speed for turn in turns for speed in turn["windows"]]
    return {
        **row,
        "pairs_per_s": statistics.median(windows),
        "slowest": min(windows),
        "fastest": max(windows),
        "cpu_s_per_pair": statistics.median(turn["cpu_s_per_pair"] for turn in turns),
        "data_share": statistics.median(turn["data_share"] for turn in turns),
        "first_loss": turns[0]["first_loss"],
        "peak_memory_gb": max(turn["peak_memory_gb"] for turn in turns),
    }


def _our_line(line: str) -> Line | None:
    values = json.loads(line) if line.endswith("\n") else {}
    return (
        Line(values["samples"], values["time/data_wait_share"], values["train/loss"])
        if "train/loss" in values
        else None
    )


def _their_line(line: str) -> Line | None:
    found = THEIR_LINE.search(line) if line.endswith("\n") else None
    return (
        Line(int(found[1]), float(found[2]) / max(float(found[3]), 1e-3), float(found[4])) if found else None
    )


def cpu_s(pid: int) -> float:
    """CPU seconds of a process and of all that it started, so far."""
    total = 0.0
    with contextlib.suppress(OSError):  # it has just ended
        for children in Path(f"/proc/{pid}/task").glob("*/children"):
            total += sum(map(cpu_s, map(int, children.read_text().split())))
        user, system = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[11:13]
        total += (int(user) + int(system)) / os.sysconf("SC_CLK_TCK")
    return total


def peak_memory_gb() -> float:
    """Of this process so far: the GPU allocator's, or the largest resident size."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 1e9
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main() -> None:
    """One run of one trainer, for whole_path: `ours RECIPE.yaml`, or `theirs` and open_clip_train's flags."""
    trainer, *arguments = sys.argv[1:]
    if trainer == "ours":
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        # the peer does not validate either
        fit(parse(arguments), World(device=device), lambda clip, world: {})
    else:
        import open_clip_train.data
        import open_clip_train.main

        expander = open_clip_train.data.tar_file_expander
        if "eof_value" in inspect.signature(expander).parameters:
            # webdataset 1.0 marks the end of a shard by an empty sample, a KeyError in open_clip_train 3.3.
            open_clip_train.data.tar_file_expander = functools.partial(expander, eof_value=None)
        open_clip_train.main.main(arguments)
    say(f"\npeak memory {peak_memory_gb():.3f} GB", flush=True)


if __name__ == "__main__":
    exit_on_user_error(main)
