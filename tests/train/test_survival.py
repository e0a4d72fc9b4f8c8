"""Nothing stops a run: what goes wrong is left out or named, and the last whole checkpoint is never lost."""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import time
from pathlib import Path

import pytest
from conftest import ROOT, assert_mistake, call, command, environment
from test_loop import assert_bit_equal, flags, metrics, newest, no_validation, recipe

from data_prep.errors import Fault, Fenced, UserError
from train.loop import fit
from train.recipe import parse
from train.run.folder import Run
from train.world import World


def test_another_number_of_ranks_and_another_micro_batch_go_on_with_the_same_batches(
    tiny_model, icon_shards, tmp_path
):
    """Stopped on one, resumed on two ranks with chunks: the curve is that of one process that nothing
    happened to.
    """
    curves = []
    for name in ("whole", "parts"):
        run = tmp_path / name
        plan = recipe(tiny_model, icon_shards, run, epochs=2, workers=0, micro_batch_size=24)
        scores = iter(range(9))

        def stop(clip, world, run=run, scores=scores):
            if next(scores) == 1 and run.name == "parts":
                (run / "stop").touch()
            return {}

        fit(plan, World(), stop)
        if name == "parts":
            assert json.loads((run / "status.json").read_text())["state"] == "stopped"
            arguments = flags(
                recipe(tiny_model, icon_shards, run, epochs=2, workers=0, micro_batch_size=5),
                tmp_path / "recipe.yaml",
            )
            assert "is finished" in call(*arguments, ranks=2).stdout
        curves.append([line["train/loss"] for line in metrics(run) if "train/loss" in line])
    assert len(curves[0]) == len(curves[1]) == 12
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def wait_for(condition, process: subprocess.Popen) -> None:
    deadline = time.monotonic() + 120
    while not condition():
        assert process.poll() is None, process.stdout.read()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def start(arguments: list[str], ranks: int = 0, **more) -> subprocess.Popen:
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.STDOUT, "text": True, "start_new_session": True}
    return subprocess.Popen(command(*arguments, ranks=ranks), cwd=ROOT, env=environment(**more), **pipes)


def test_the_second_process_on_a_run_is_refused(tiny_model, icon_shards, tmp_path):
    run = tmp_path / "run"
    arguments = flags(recipe(tiny_model, icon_shards, run, epochs=500), tmp_path / "recipe.yaml")
    first = start(arguments)
    wait_for(lambda: list(run.glob("checkpoints/samples-*")), first)
    assert_mistake(
        call(*arguments, expect=2), "another process writes to this run", f"process {first.pid}", "touch"
    )
    (run / "stop").touch()
    assert "stopped after" in first.communicate(timeout=60)[0]
    assert first.returncode == 0
    assert not (run / "stop").exists()
    first = start(arguments)  # the lock ended with the process
    seen = json.loads((run / "status.json").read_text())["samples"]
    wait_for(lambda: json.loads((run / "status.json").read_text())["state"] == "running", first)
    os.killpg(first.pid, signal.SIGKILL)
    first.wait()
    (run / "stop").touch()  # before the next begins: it is not lost
    assert "stopped after" in call(*arguments).stdout
    assert json.loads((run / "status.json").read_text())["samples"] > seen


def test_an_attempt_that_was_replaced_writes_nothing(tiny_model, icon_shards, tmp_path, monkeypatch):
    run, seen = tmp_path / "run", []
    plan = recipe(
        tiny_model, icon_shards, run, epochs=2, workers=0, save_every_minutes=9
    )  # no checkpoint is being written meanwhile
    monkeypatch.setenv("RUN_ATTEMPT", "job 7.0")
    monkeypatch.setattr("train.run.lock.FENCED_S", 0)

    def validate(clip, world):
        seen.append(
            {
                path: path.read_bytes()
                for path in run.rglob("*")
                if path.is_file() and "tensorboard" not in path.parts
            }
        )
        if len(seen) == 2:
            (run / "attempt").write_text("job 7.1\n")
        return {"val/mean/R@1": 0.5}

    with pytest.raises(Fenced, match=r"attempt job 7\.1 has taken over from this one, job 7\.0"):
        fit(plan, World(), validate)
    left = {
        path: path.read_bytes()
        for path in run.rglob("*")
        if path.is_file() and "tensorboard" not in path.parts
    }
    assert left == {**seen[1], run / "attempt": b"job 7.1\n"}
    monkeypatch.setenv("RUN_ATTEMPT", "job 7.1")
    assert fit(plan, World(), no_validation).is_finished


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 1 MB, where one can be had."""
    place = tmp_path / "small"
    place.mkdir()
    if subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1m", "tmpfs", str(place)], capture_output=True, check=False
    ).returncode:
        pytest.skip("a small file system cannot be mounted here (not root)")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


def test_a_full_disk_is_named_and_loses_no_checkpoint(tiny_model, icon_shards, small_disk, tmp_path):
    run = small_disk / "run"
    small = recipe(tiny_model, icon_shards, run, workers=0, keep_checkpoints=1)
    arguments = flags(small, tmp_path / "recipe.yaml")
    result = call(*arguments, ranks=2, expect=1)
    for words in (
        "cannot be written",
        "No space left on device",
        "the last whole checkpoint is safe",
        "make room",
    ):
        assert words in result.stderr
    assert result.stderr.count("\nerror: ") == 1, (
        result.stderr
    )  # both ranks ended with it, and neither lost the other
    assert not [words for words in ("is silent", "lost the others", "on rank 1") if words in result.stderr]
    assert not [path for path in (run / "checkpoints").iterdir() if "partial" in path.name]
    whole = sorted((run / "checkpoints").glob("samples-*")) if (run / "checkpoints").is_dir() else []
    subprocess.run(["mount", "-o", "remount,size=200m,ro", str(small_disk)], check=True)
    assert_mistake(call(*arguments, expect=1), "Read-only file system", "run the same command again")
    subprocess.run(["mount", "-o", "remount,rw", str(small_disk)], check=True)
    assert "is finished" in call(*arguments).stdout
    assert len(whole) <= 1


def test_a_shard_that_vanishes_is_named(tiny_model, icon_shards, tmp_path):
    shards = shutil.copytree(icon_shards, tmp_path / "shards")

    def validate(clip, world):
        shutil.rmtree(shards / "train")
        return {}

    for workers in (0, 1):
        plan = recipe(tiny_model, shards, tmp_path / f"run-{workers}", workers=workers)
        with pytest.raises(Fault, match=r"a shard cannot be read any more \(.*No such file.*train-\d+\.tar"):
            fit(plan, World(), validate)
        shutil.copytree(icon_shards / "train", shards / "train")


def test_a_worker_that_was_killed_is_named(tiny_model, icon_shards, tmp_path):
    run = tmp_path / "run"
    process = start(flags(recipe(tiny_model, icon_shards, run, epochs=500), tmp_path / "recipe.yaml"))
    wait_for(lambda: list(run.glob("checkpoints/samples-*")), process)
    (worker,) = children(process.pid)
    os.kill(worker, signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert process.returncode == 1
    assert "\nerror: a worker process that reads images was killed" in said
    assert said.rstrip().endswith("run the same command again to resume")
    assert "lower --workers" in said


def children(pid: int) -> list[int]:
    return list(map(int, Path(f"/proc/{pid}/task/{pid}/children").read_text().split()))


def rank(pid: int, number: int) -> int | None:
    """The process of a rank that torchrun, which is `pid`, has started."""
    for child in children(pid):
        with contextlib.suppress(OSError):
            if f"RANK={number}" in Path(f"/proc/{child}/environ").read_text().split("\0"):
                return child
    return None


def test_a_silent_rank_is_named(tiny_model, icon_shards, tmp_path):
    run = tmp_path / "run"
    plan = recipe(tiny_model, icon_shards, run, epochs=500, workers=0, timeout_minutes=0.1)
    process = start(flags(plan, tmp_path / "recipe.yaml"), ranks=2)
    wait_for(lambda: list(run.glob("checkpoints/samples-*")), process)
    second = rank(process.pid, 1)
    os.kill(second, signal.SIGSTOP)
    wait_for(lambda: rank(process.pid, 0) is None, process)
    os.kill(second, signal.SIGKILL)
    said = process.communicate(timeout=60)[0]
    assert "rank 1 of 2 (from 0) is silent: it was killed, hangs, or its node is gone" in said
    assert "training goes on from its last checkpoint" in said


def test_a_rank_that_is_killed_is_started_again(tiny_model, icon_shards, tmp_path):
    """torchrun starts all ranks anew; the weights at the end are those of a run that nothing happened to."""
    runs = [tmp_path / "a", tmp_path / "b"]
    for run in runs:
        arguments = flags(recipe(tiny_model, icon_shards, run, epochs=3), tmp_path / "recipe.yaml")
        line = command(*arguments, ranks=2)
        line[line.index("--standalone") : line.index("--standalone") + 1] = [
            "--standalone",
            "--max-restarts",
            "1",
        ]
        process = subprocess.Popen(
            line, cwd=ROOT, env=environment(), stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        if run == runs[1]:
            wait_for(lambda run=run: list(run.glob("checkpoints/samples-*")), process)
            os.kill(rank(process.pid, 0), signal.SIGKILL)
        said = process.communicate(timeout=120)[0]
        assert process.returncode == 0, said
    assert "going on after" in said
    assert_bit_equal(*runs)


def test_status_says_where_a_run_stands(tiny_model, icon_shards, tmp_path, monkeypatch):
    monkeypatch.setattr("train.run.folder.BEAT_S", 0)
    run, seen = tmp_path / "run", []

    def look(self, samples, **values):
        honest(self, samples, **values)
        seen.append(json.loads((run / "status.json").read_text()))
        assert (
            seen[-1]["checkpoint"] is None
            or (run / "checkpoints" / seen[-1]["checkpoint"] / "state.json").is_file()
        )

    honest = Run.beat
    monkeypatch.setattr(Run, "beat", look)
    fit(recipe(tiny_model, icon_shards, run, epochs=2, workers=0), World(), no_validation)
    assert [status["samples"] for status in seen] == [
        line["samples"] for line in metrics(run) if "train/loss" in line
    ]
    assert seen[5]["state"] == "running"
    assert seen[5]["step"] == 6
    assert seen[5]["checkpoint"] in (
        "samples-000000000096",
        "samples-000000000120",
    )  # which may be on its way to the disk
    assert seen[5]["pairs_per_s"] > 0
    assert seen[0]["eta_s"] >= 0


def test_a_damaged_newest_checkpoint_is_named_and_passed_over(tiny_model, icon_shards, tmp_path, capsys):
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", epochs=2, workers=0, keep_checkpoints=3)
    fit(plan, World(), no_validation)
    (tmp_path / "run" / "status.json").unlink()
    with open(newest(tmp_path / "run") / "optimizer.pt", "r+b") as file:
        file.truncate(1000)
    assert Run(plan, World()).samples == 264
    assert "samples-000000000288 is damaged (optimizer.pt)" in capsys.readouterr().err
    scores = iter((0.1, 0.2, 0.3))
    best = recipe(tiny_model, icon_shards, tmp_path / "best", epochs=2, workers=0, keep_checkpoints=1)
    run = fit(best, World(), lambda clip, world: {"val/mean/R@1": next(scores)})
    shutil.copytree(newest(run.folder), run.folder / "checkpoints" / "samples-000000000264")
    damaged = newest(run.folder) / "state.json"
    state = json.loads(damaged.read_text()) | {
        "samples": 264,
        "score": None,
        "best": 0.2,
        "best_checkpoint": "samples-000000000144",
    }
    (run.folder / "checkpoints" / "samples-000000000264" / "state.json").write_text(json.dumps(state))
    damaged.write_text("{")
    (run.folder / "status.json").unlink()
    fit(best, World(), no_validation)
    assert (run.folder / "checkpoints" / "best").is_dir()  # the one it named is gone
    with pytest.raises(UserError, match="--max_nonfinite_steps 0"):
        parse([*flags(plan, tmp_path / "a.yaml")[1:], "--max_nonfinite_steps", "0"])
