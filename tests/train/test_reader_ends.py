"""What ends a process that reads images is named, and its exit code tells Slurm whether a retry may help."""

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from conftest import ROOT, environment
from runs import flags, recipe
from torch.utils.data import Dataset

from data_prep.errors import Fault, UserError, end_of_reader
from train.data.loader import loader
from train.loop import fit
from train.world import World


def truncate(shard: Path) -> None:
    os.truncate(shard, 100)


def overwrite(shard: Path) -> None:
    with open(shard, "r+b") as file:  # its size stays the same
        file.write(os.urandom(shard.stat().st_size))


@pytest.mark.parametrize("workers", [0, 1])
@pytest.mark.parametrize("damage", [truncate, overwrite])
def test_a_shard_that_is_damaged_in_mid_run_is_named(tiny_model, icon_shards, tmp_path, workers, damage):
    shards = shutil.copytree(icon_shards, tmp_path / "shards")

    def validate(clip, world):
        for shard in (shards / "train").glob("*.tar"):
            damage(shard)
        return {}

    plan = recipe(tiny_model, shards, tmp_path / "run", workers=workers)
    found = r"train-\d+\.tar: sample \w{16}: (altered since it was built|ends before byte \d+)"
    with pytest.raises(UserError, match=rf"{found}.*; restore this file.*--on-damage skip") as caught:
        fit(plan, World(), validate)
    assert caught.value.exit_code == 2  # another attempt would end in the same way
    assert "Traceback" not in str(caught.value)


class Ends(Dataset):
    """Its workers end in a way."""

    def __init__(self, act: Callable):
        self.act = act

    def __getitem__(self, number: int) -> torch.Tensor:
        return self.act()


def _signalled(number: int) -> Callable:
    def act() -> None:
        signal.signal(number, signal.SIG_DFL) if number != signal.SIGKILL else None
        os.kill(os.getpid(), number)

    return act


def _bug() -> None:
    raise RuntimeError("a bug")


def _gone() -> None:
    raise FileNotFoundError(2, "No such file or directory", "train-000000.tar")


@pytest.mark.parametrize(
    ("act", "words"),
    [
        (_signalled(signal.SIGKILL), "was killed (DataLoader worker"),
        (_signalled(signal.SIGBUS), "no room in /dev/shm ("),
        (_signalled(signal.SIGSEGV), "was ended by a signal from outside, or crashed (DataLoader worker"),
        (_bug, ""),
    ],
    ids=["kill", "bus", "segmentation", "bug"],
)
def test_each_end_of_a_worker_has_its_own_sentence(act, words):
    with pytest.raises(RuntimeError) as caught:
        list(loader(Ends(act), [[0], [1]], 1, World()))
    assert words in end_of_reader(caught.value), str(caught.value)
    assert bool(words) == bool(end_of_reader(caught.value))


def test_a_file_that_is_gone_may_come_back():
    for workers in (0, 1):
        with pytest.raises(
            Fault, match=r"can no longer be read \(.*No such file.*train-000000\.tar"
        ) as caught:
            list(loader(Ends(_gone), [[0], [1]], workers, World()))
        assert caught.value.exit_code == 1


def with_little_shared_memory(*words: str) -> subprocess.CompletedProcess:
    """Run a command where /dev/shm has 64 kB; the test is skipped where that cannot be."""
    script = 'mount -t tmpfs -o size=64k tmpfs /dev/shm && exec "$@"'
    if subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", "true"], capture_output=True, check=False
    ).returncode:
        pytest.skip("/dev/shm cannot be replaced here (not root)")
    return subprocess.run(
        ["unshare", "-m", "sh", "-c", script, "sh", *words],
        cwd=ROOT,
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
    )


def test_full_shared_memory_is_named(tiny_model, icon_shards, tmp_path):
    """As where something else fills it after the start: room is taken for what is not there."""
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", workers=1, global_batch_size=96)
    code = (
        "import sys, train.__main__, train.data.loader as loader; from data_prep.errors import *;"
        " loader.free_shared_bytes = lambda: 1e12; sys.argv[1:] = sys.argv[2:];"
        " exit_on_user_error(train.__main__.main)"
    )
    ended = with_little_shared_memory(sys.executable, "-c", code, *flags(plan, tmp_path / "recipe.yaml"))
    assert ended.returncode == 1, ended.stderr
    assert "found no room in /dev/shm (" in ended.stderr
    assert "  File" not in ended.stderr  # the worker may be killed while it prints the head of a traceback


def test_too_little_shared_memory_is_not_used():
    code = (
        "import torch; from train.data.loader import loader; from train.world import World;"
        " images = [torch.full([30_000], number) for number in range(3)];"
        " batches = loader(images, [[0], [1], [2]], 2, World(), batch_bytes=240_000);"
        " print([batch[0, 0].item() for batch in batches])"
    )
    ended = with_little_shared_memory(sys.executable, "-c", code)
    assert ended.stdout == "[0, 1, 2]\n", ended.stderr
    assert "/dev/shm has little room for batches of 0.2 MB: no worker reads, but the process" in ended.stderr
