"""SIGTERM and SIGINT end a run with a checkpoint, wherever they arrive: the process, its group, torchrun."""

import contextlib
import os
import signal
import subprocess
import sys

import pytest
from conftest import ROOT, environment
from runs import flags, launch, newest, recipe, state_of, status_of, until_logged

from train.run.stop import Stop


@pytest.mark.parametrize(
    ("ranks", "whom", "number"),
    [
        (0, "process", signal.SIGTERM),
        (0, "group", signal.SIGTERM),
        (0, "group", signal.SIGINT),
        (2, "process", signal.SIGTERM),
        pytest.param(2, "group", signal.SIGINT, marks=pytest.mark.slow),
    ],
    ids=lambda value: getattr(value, "name", str(value)),
)
def test_a_signal_saves_a_checkpoint(tiny_model, icon_shards, tmp_path, ranks, whom, number):
    run = tmp_path / "run"
    plan = recipe(tiny_model, icon_shards, run, workers=2, epochs=400, save_every_minutes=60)
    process = launch(flags(plan, tmp_path / "recipe.yaml"), ranks)
    until_logged(process, run, "train/loss")
    (os.kill if whom == "process" else os.killpg)(process.pid, number)
    output, _ = process.communicate(timeout=60)
    status = status_of(run)
    assert status["state"] == "stopped", output
    assert state_of(newest(run))["samples"] == status["samples"] > 0
    assert "stopped after" in output
    assert "killed" not in output
    if ranks == 0:
        assert process.returncode == 0, output
        assert "Traceback" not in output


def test_signals_of_one_request_are_one(tmp_path, monkeypatch):
    """As of timeout(1), which signals its child and then its group. A later one has its usual effect."""
    # a shell without job control starts what it puts into the background with SIGINT ignored
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with Stop(tmp_path / "stop") as stop:
        assert not stop.requested()
        for number in (signal.SIGTERM, signal.SIGTERM, signal.SIGINT):
            signal.raise_signal(number)
        assert stop.requested()
        monkeypatch.setattr("train.run.stop.ONE_REQUEST_S", 0)
        with pytest.raises(KeyboardInterrupt):
            signal.raise_signal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)


LEFT_AT_EXIT = """
import multiprocessing, sys
from data_prep.shards import Shards
from eval.embed import EvalImages
from train.data.loader import loader
from train.model.clip import load
from train.world import World

def rank(shards):
    transform = load("demo-vit:none").eval_transform
    global batches
    batches = loader(EvalImages(Shards(shards, "train"), transform), [[n] for n in range(40)], 2, World())
    next(batches)
    raise SystemExit(3)

if __name__ == "__main__" and sys.argv[2] == "itself":
    rank(sys.argv[1])
elif __name__ == "__main__":
    process = multiprocessing.get_context("spawn").Process(target=rank, args=(sys.argv[1],))
    process.start()
    process.join()
    raise SystemExit(process.exitcode)
"""


@pytest.mark.parametrize("whose", ["itself", "a child of multiprocessing"])
def test_workers_that_are_left_at_exit_do_not_hold_the_process(icon_shards, tmp_path, whose):
    """As when another rank is lost: the exception still refers to the loader."""
    (tmp_path / "left.py").write_text(LEFT_AT_EXIT)
    line = [sys.executable, str(tmp_path / "left.py"), str(icon_shards), whose]
    process = subprocess.Popen(line, cwd=ROOT, env=environment(), start_new_session=True)
    try:
        assert process.wait(timeout=60) == 3
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
