"""What tests of training share: a recipe of a few steps, what a run has logged and saved, and faults."""

import json
import multiprocessing
import os
import socket
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from conftest import ROOT, command, environment
from safetensors.torch import load_file

import train.step
from data_prep.shards import sha256_of
from eval.validation import validator
from train.data.shares import Sets
from train.loop import fit
from train.recipe import Augment, Captions, Optim, Recipe, to_yaml
from train.retain.select import Validate
from train.run.folder import Run
from train.world import World, joined_world

WEIGHTS = "open_clip_model.safetensors"
CANDIDATES = {"ema": 0.9, "wise_ft": (0.3, 0.7)}  # "trained", "ema", "wise_ft 0.30" and "wise_ft 0.70"


def recipe(model: str, data: Path | Sets, run: Path | str, **changes) -> Recipe:
    """24 steps in 4 epochs, a checkpoint after each step; every random operation is in use."""
    options = {
        "epochs": 4,
        "global_batch_size": 24,
        "micro_batch_size": 12,
        "precision": "fp32",
        "activation_checkpointing": "none",
        "workers": 1,
        "log_every_steps": 1,
        "save_every_minutes": 0.0,
        "augment": Augment(flip_prob=0.3, blur_prob=0.3, downscale_prob=0.3),
        "captions": Captions(tag_dropout=0.3, templates=("an icon of {}", "{}")),
        "optim": Optim(lr=1e-3, warmup_fraction=0.2),
    }
    data = data if isinstance(data, dict) else str(data)
    return Recipe(model, data, str(run), **(options | changes))


def flags(plan: Recipe, file: Path) -> list[str]:
    """The arguments of `call` that train `plan`, which is written to `file`."""
    file.write_text(to_yaml(plan))
    return ["train", str(file)]


def launch(arguments: list[str], ranks: int) -> subprocess.Popen:
    """A command of ours, in a process group of its own; `ranks` as in command()."""
    return subprocess.Popen(
        command(*arguments, ranks=ranks),
        cwd=ROOT,
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )


def until_logged(process: subprocess.Popen, run: Path, text: str) -> None:
    """Wait until the process has written `text` to the run's metrics.jsonl."""
    log, deadline = run / "metrics.jsonl", time.monotonic() + 120
    while not log.is_file() or text not in log.read_text():
        assert process.poll() is None, process.communicate()[0]
        assert time.monotonic() < deadline, f"{log} has no {text}"
        time.sleep(0.005)


def no_validation(clip, world) -> dict[str, float]:
    """As validator() gives where shards have no val split."""
    return {}


def trained(plan: Recipe, validate: Validate | None = None) -> Run:
    """The finished run of `plan`, trained in this process.

    Args:
        validate: None for that of eval, as `python -m train` has it.
    """
    run = fit(plan, World(), validate or validator(plan, World()))
    assert run.is_finished
    return run


def metrics(run: Path) -> list[dict]:
    """The lines of metrics.jsonl, without what depends on the clock."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{name: value for name, value in line.items() if not name.startswith("time/")} for line in lines]


def status_of(run: Path) -> dict:
    return json.loads((run / "status.json").read_text())


def nonfinite_steps(run: Path) -> list[dict]:
    """The lines of nonfinite_steps.jsonl."""
    return [json.loads(line) for line in (run / "nonfinite_steps.jsonl").read_text().splitlines()]


def checkpoint(run: Path, samples: int) -> Path:
    """The folder of the checkpoint after `samples` pairs."""
    return run / "checkpoints" / f"samples-{samples:012d}"


def newest(run: Path) -> Path:
    """The folder of the newest checkpoint."""
    return max((run / "checkpoints").glob("samples-*"))


def exported(checkpoint: Path) -> dict[str, torch.Tensor]:
    """The weights that a checkpoint exports."""
    return load_file(checkpoint / WEIGHTS)


def state_of(checkpoint: Path) -> dict:
    return json.loads((checkpoint / "state.json").read_text())


def assert_equal_weights(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> None:
    """Bit for bit."""
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        assert torch.equal(tensor, two[name]), name


def assert_bit_equal(run: Path, other: Path) -> None:
    """Two runs end with the same weights, moments, log and best checkpoint."""
    assert newest(run).name == newest(other).name
    assert sha256_of(newest(run) / WEIGHTS) == sha256_of(newest(other) / WEIGHTS)
    moments, others = (torch.load(newest(path) / "optimizer.pt", weights_only=True) for path in (run, other))
    assert moments["param_groups"] == others["param_groups"]
    assert moments["state"].keys() == others["state"].keys()
    for number, values in moments["state"].items():
        assert_equal_weights(values, others["state"][number])
    assert metrics(run) == metrics(other)
    assert (run / "checkpoints" / "best").readlink() == (other / "checkpoints" / "best").readlink()


def poison(monkeypatch, is_bad: Callable[[int], bool]) -> None:
    """Make the gradient infinite in the steps for which `is_bad(pairs seen before the step)`."""
    real = train.step.backward

    def poisoned(state, batch):
        loss = real(state, batch)
        if is_bad(state.samples):
            state.clip.towers.model.visual.proj.grad[0, 0] = float("inf")
        return loss

    monkeypatch.setattr(train.step, "backward", poisoned)


def fit_on_ranks(plan: Recipe, ranks: int, bad_steps: Sequence[int] = ()) -> str:
    """Train `plan` in `ranks` processes that find each other as torchrun's do; what they printed.

    They are forks of a process that has imported torch and everything else, which saves seconds for each.

    Args:
        bad_steps: the last rank's gradient is NaN in the steps that begin after so many pairs.
    """
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(["runs"])
    before = dict(os.environ)
    os.environ |= {"OMP_NUM_THREADS": "1", "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}"}
    try:  # the first start of a process starts the one that forks, with this environment
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        output = Path(plan.run).with_suffix(".output")
        output.write_text("")
        arguments = [(plan, rank, ranks, port, output, tuple(bad_steps)) for rank in range(ranks)]
        processes = [context.Process(target=_rank, args=each) for each in arguments]
        for process in processes:
            process.start()
    finally:
        os.environ.clear()
        os.environ |= before
    for process in processes:
        process.join(120)
        process.kill()
    assert [process.exitcode for process in processes] == [0] * ranks, output.read_text()
    return output.read_text()


def _rank(plan: Recipe, rank: int, ranks: int, port: int, output: Path, bad_steps: tuple[int, ...]) -> None:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(ranks)}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "HF_HUB_OFFLINE": "1"}
    sys.stdout = sys.stderr = open(output, "a", buffering=1)  # noqa: SIM115 until the process ends
    multiprocessing.set_start_method("fork", force=True)  # of loader workers, as elsewhere on Linux
    torch.set_num_threads(1)
    real = train.step.backward

    def faulty(state, batch):
        if state.samples not in bad_steps or rank != ranks - 1:
            return real(state, batch)
        parameter = state.clip.towers.model.logit_scale
        hook = parameter.register_hook(lambda gradient: gradient * float("nan"))  # before DDP reduces
        try:
            return real(state, batch)
        finally:
            hook.remove()

    train.step.backward = faulty
    try:
        with joined_world() as world:
            fit(plan, world, validator(plan, world))
    except Exception:  # noqa: BLE001 it is printed
        traceback.print_exc()
        os._exit(1)  # the other ranks end because this one is gone
