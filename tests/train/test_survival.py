"""What a run survives: other numbers of ranks, full disks, kills, damage. Faults are named, and the last
whole checkpoint is never lost.
"""

import contextlib
import gc
import json
import multiprocessing
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_mistake, call, call_here, command, environment
from runs import (
    assert_bit_equal,
    checkpoint,
    fit_on_ranks,
    flags,
    metrics,
    newest,
    no_validation,
    recipe,
    state_of,
    status_of,
    trained,
)

import train.loop
from data_prep.errors import Fault, Fenced, UserError
from train.__main__ import main
from train.loop import fit
from train.run.folder import Run
from train.world import World


def stop_at_first(run: Path):
    """A validation that asks for a stop when it is called with the initial weights."""

    def validate(clip, world):
        (run / "stop").touch()
        return {}

    return validate


def test_resumed_on_other_ranks_and_in_other_chunks_has_the_same_curve(tiny_model, icon_shards, tmp_path):
    """Stopped on one rank, resumed on two, in chunks of another size."""
    options = {"epochs": 2, "workers": 0, "save_every_minutes": 9}
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    trained(recipe(tiny_model, icon_shards, whole, micro_batch_size=24, **options), no_validation)
    plan = recipe(tiny_model, icon_shards, parts, micro_batch_size=24, **options)
    fit(plan, World(), stop_at_first(parts))
    assert (status_of(parts)["state"], status_of(parts)["samples"]) == ("stopped", 24)
    fit_on_ranks(recipe(tiny_model, icon_shards, parts, micro_batch_size=5, **options), 2)
    curves = [[line["train/loss"] for line in metrics(run) if "train/loss" in line] for run in (whole, parts)]
    assert len(curves[0]) == len(curves[1]) == 12
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


HOLD_LOCK = """
import pathlib, sys
from train.run.lock import RunLock
lock = RunLock(pathlib.Path(sys.argv[1]))
lock.acquire()
print("locked", flush=True)
sys.stdin.read()
"""


def test_a_run_has_one_process_at_a_time(tiny_model, icon_shards, tmp_path):
    """A killed process releases its lock, and a stop request from before a start is not lost."""
    run = tmp_path / "run"
    plan = recipe(tiny_model, icon_shards, run, epochs=2, workers=0)
    fit(plan, World(), stop_at_first(run))
    assert not (run / "stop").exists()
    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    holder = subprocess.Popen([sys.executable, "-c", HOLD_LOCK, str(run)], cwd=ROOT, **pipes)
    try:
        assert holder.stdout.readline() == "locked\n"
        message = rf"another process writes to this run \(host .*, process {holder.pid}\).*touch {run}/stop"
        with pytest.raises(UserError, match=message):
            fit(plan, World(), no_validation)
    finally:
        holder.kill()
        holder.communicate()
    samples = status_of(run)["samples"]
    (run / "stop").touch()
    assert not fit(plan, World(), no_validation).is_finished
    assert status_of(run)["samples"] == samples + 24
    assert not (run / "stop").exists()


def files_of(run: Path) -> dict[Path, bytes]:
    paths = [path for path in run.rglob("*") if path.is_file() and "tensorboard" not in path.parts]
    return {path: path.read_bytes() for path in paths}


def test_an_attempt_that_was_replaced_writes_nothing(tiny_model, icon_shards, tmp_path, monkeypatch):
    run, before = tmp_path / "run", []
    # without a checkpoint that is being written meanwhile
    plan = recipe(tiny_model, icon_shards, run, epochs=2, workers=0, save_every_minutes=9)
    monkeypatch.setenv("RUN_ATTEMPT", "job 7.0")
    monkeypatch.setattr("train.run.lock.FENCED_S", 0)

    def validate(clip, world):
        before.append(files_of(run))
        if len(before) == 2:
            (run / "attempt").write_text("job 7.1\n")
        return {"val/mean/R@1": 0.5}

    with pytest.raises(Fenced, match=r"attempt job 7\.1 has replaced this one \(job 7\.0\)"):
        fit(plan, World(), validate)
    assert files_of(run) == {**before[1], run / "attempt": b"job 7.1\n"}
    monkeypatch.setenv("RUN_ATTEMPT", "job 7.1")
    assert fit(plan, World(), no_validation).is_finished


@pytest.mark.parametrize("ranks", [1, pytest.param(2, marks=pytest.mark.slow)])
def test_a_full_disk_is_named_and_loses_no_checkpoint(tiny_model, icon_shards, small_disk, tmp_path, ranks):
    run = small_disk / "run"
    plan = recipe(tiny_model, icon_shards, run, workers=0, keep_checkpoints=1, epochs=2)
    arguments = flags(plan, tmp_path / "recipe.yaml")
    if ranks == 1:
        errors = call_here(main, *arguments[1:], expect=1).stderr
        gc.collect()  # closes RUN/lock, as the end of a process does; an open file would prevent the remount
    else:
        errors = call(*arguments, ranks=2, expect=1).stderr
    for words in ("cannot be written", "No space left on device", "last whole checkpoint", "Make room"):
        assert words in errors
    assert status_of(run)["state"] == "failed"
    assert errors.count("\nerror: ") == 1, errors  # both ranks end with it, and neither loses the other
    assert not [words for words in ("is silent", "lost the others", "on rank 1") if words in errors]
    checkpoints = list((run / "checkpoints").iterdir())
    assert not [path for path in checkpoints if "partial" in path.name]
    assert len([path for path in checkpoints if path.name.startswith("samples-")]) <= 1
    subprocess.run(["mount", "-o", "remount,size=200m,ro", str(small_disk)], check=True)
    assert_mistake(call_here(main, *arguments[1:], expect=1), "Read-only file system")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    trained(plan)


def test_a_shard_that_vanishes_is_named(tiny_model, icon_shards, tmp_path):
    shards = shutil.copytree(icon_shards, tmp_path / "shards")

    def validate(clip, world):
        shutil.rmtree(shards / "train")
        return {}

    for workers in (0, 1):
        plan = recipe(tiny_model, shards, tmp_path / f"run-{workers}", workers=workers)
        with pytest.raises(Fault, match=r"can no longer be read \(.*No such file.*train-\d+\.tar"):
            fit(plan, World(), validate)
        shutil.copytree(icon_shards / "train", shards / "train")


def test_a_worker_that_was_killed_is_named(tiny_model, icon_shards, tmp_path, monkeypatch):
    """In this process: torch reports it from whatever the main process does at that moment."""
    real, before = train.loop.train_step, set(multiprocessing.active_children())

    def train_step(state, batch):
        if state.samples == 48:
            (worker,) = set(multiprocessing.active_children()) - before
            os.kill(worker.pid, signal.SIGKILL)
        return real(state, batch)

    monkeypatch.setattr("train.loop.train_step", train_step)
    run = tmp_path / "run"
    arguments = flags(recipe(tiny_model, icon_shards, run, epochs=500), tmp_path / "recipe.yaml")
    errors = call_here(main, *arguments[1:], expect=1).stderr
    assert "a worker process that reads images was killed" in errors
    assert "lower --workers" in errors
    assert newest(run).name >= "samples-000000000048"


def test_status_names_progress_and_a_checkpoint_that_exists(tiny_model, icon_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("train.run.folder.STATUS_EVERY_S", 0)
    run, statuses = tmp_path / "run", []
    real = Run.write_progress

    def write_progress(self, samples, **values):
        real(self, samples, **values)
        status = status_of(run)
        if status["checkpoint"]:
            assert (run / "checkpoints" / status["checkpoint"] / "state.json").is_file()
        statuses.append(status)

    monkeypatch.setattr(Run, "write_progress", write_progress)
    fit(recipe(tiny_model, icon_shards, run, epochs=2, workers=0), World(), no_validation)
    assert [status["samples"] for status in statuses] == [
        line["samples"] for line in metrics(run) if "train/loss" in line
    ]
    sixth = statuses[5]
    assert (sixth["state"], sixth["step"]) == ("running", 6)
    # that of the step before may still be being written
    assert sixth["checkpoint"] in ("samples-000000000096", "samples-000000000120")
    assert sixth["pairs_per_s"] > 0
    assert statuses[0]["eta_s"] >= 0


def test_a_damaged_newest_checkpoint_is_skipped(tiny_model, icon_shards, tmp_path, capsys):
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", epochs=2, workers=0, keep_checkpoints=3)
    run = trained(plan, no_validation).folder
    (run / "status.json").unlink()
    with open(newest(run) / "optimizer.pt", "r+b") as file:
        file.truncate(1000)
    assert Run(plan, World()).samples == 264
    assert "samples-000000000288 is damaged (optimizer.pt)" in capsys.readouterr().err


def test_a_best_checkpoint_that_is_gone_is_replaced(tiny_model, icon_shards, tmp_path):
    """The newest checkpoint is damaged; the one before names a best one that was pruned for it."""
    scores = iter((0.1, 0.2, 0.3))
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", epochs=2, workers=0, keep_checkpoints=1)
    run = fit(plan, World(), lambda clip, world: {"val/mean/R@1": next(scores)}).folder
    older = shutil.copytree(newest(run), checkpoint(run, 264))
    damaged = checkpoint(run, 288) / "state.json"
    values = {"samples": 264, "score": None, "best": [True, 0.2], "best_checkpoint": "samples-000000000144"}
    state = {name: value for name, value in state_of(damaged.parent).items() if name != "state_sha256"}
    (older / "state.json").write_text(json.dumps(state | values))  # as of an earlier version
    damaged.write_text("{")
    (run / "status.json").unlink()
    fit(plan, World(), no_validation)
    assert (run / "checkpoints" / "best").is_dir()


# ---- kills, which need processes of their own


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(arguments: list[str], *torchrun: str) -> subprocess.Popen:
    """A run on two ranks; `torchrun` are further options of torchrun."""
    words = command(*arguments, ranks=2)
    place = words.index("--standalone")
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    words = [*words[:place], *torchrun, *words[place:]]
    return subprocess.Popen(words, cwd=ROOT, env=environment(), **pipes)


def rank_of(torchrun: int, number: int) -> int | None:
    """The process of a rank."""
    for child in map(int, Path(f"/proc/{torchrun}/task/{torchrun}/children").read_text().split()):
        with contextlib.suppress(OSError):
            if f"RANK={number}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
                return child
    return None


@pytest.mark.slow
def test_a_silent_rank_is_named(tiny_model, icon_shards, tmp_path):
    run = tmp_path / "run"
    plan = recipe(tiny_model, icon_shards, run, epochs=500, workers=0, timeout_minutes=0.1)
    process = start(flags(plan, tmp_path / "recipe.yaml"))
    wait_for(lambda: list(run.glob("checkpoints/samples-*")), process)
    second = rank_of(process.pid, 1)
    os.kill(second, signal.SIGSTOP)
    wait_for(lambda: rank_of(process.pid, 0) is None, process)
    os.kill(second, signal.SIGKILL)
    output = process.communicate(timeout=60)[0]
    assert "rank 1 of 2 (from 0) is silent: it was killed, hangs, or its node is gone" in output
    assert "run the same command again to resume from the last checkpoint" in output


@pytest.mark.slow
def test_a_rank_that_is_killed_is_restarted(tiny_model, icon_shards, tmp_path):
    """torchrun restarts all ranks; the final weights are those of an uninterrupted run."""
    runs = [tmp_path / "whole", tmp_path / "killed"]
    fit_on_ranks(recipe(tiny_model, icon_shards, runs[0], epochs=3), 2)
    plan = recipe(tiny_model, icon_shards, runs[1], epochs=3)
    process = start(flags(plan, tmp_path / "recipe.yaml"), "--max-restarts", "1")
    wait_for(lambda: list(runs[1].glob("checkpoints/samples-*")), process)
    os.kill(rank_of(process.pid, 0), signal.SIGKILL)
    output = process.communicate(timeout=120)[0]
    assert process.returncode == 0, output
    assert "resuming after" in output
    assert_bit_equal(*runs)
