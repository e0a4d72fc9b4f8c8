"""Batches that are read ahead fit into shared memory, through which workers pass them."""

import math

import pytest
import torch
from runs import metrics, no_validation, recipe, trained
from torch.utils.data import Dataset

from train.data import loader as loader_module
from train.data.loader import free_shared_bytes, loader, read_ahead
from train.world import World

GB = 1e9
BATCH = 8192 * (3 * 224 * 224 + 2048)  # 1.25 GB


@pytest.mark.parametrize(
    ("workers", "batch_bytes", "free", "expected"),
    [
        (12, BATCH, 125.2 * GB, (12, 4)),  # 49 batches in half of it
        (12, BATCH, 64 * GB, (12, 2)),
        (12, BATCH, 24 * GB, (8, 1)),  # without a bound: 59 GB
        (12, BATCH, 5.2 * GB, (1, 1)),
        (12, BATCH, 4 * GB, (0, 0)),  # one batch in use and none to read ahead
        (4, BATCH // 128, 64 * 2**20, (2, 1)),  # 64 images, in the shared memory of many containers
        (4, 0, 0, (4, 4)),  # of unknown size
        (4, BATCH, math.inf, (4, 4)),  # not in files
        (0, BATCH, 64 * GB, (0, 0)),
    ],
)
def test_what_is_read_ahead_fits(workers, batch_bytes, free, expected, capsys):
    readers, batches = read_ahead(workers, batch_bytes, free, warn=True)
    assert (readers, batches) == expected
    assert not batch_bytes or not readers or (readers * batches + 1) * batch_bytes <= free / 2
    assert ("/dev/shm has little room" in capsys.readouterr().err) == (readers < workers)


def test_a_warning_comes_once(capsys):
    for _ in range(3):
        read_ahead(7, BATCH, 5.2 * GB, warn=True)
    read_ahead(7, BATCH, 6 * GB, warn=False)
    assert capsys.readouterr().err == (
        "warning: /dev/shm has little room for batches of 1,249.9 MB: 1 of 7 workers read; give the machine"
        " or container more shared memory\n"
    )


def test_ranks_share_it(monkeypatch):
    alone = free_shared_bytes()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert free_shared_bytes() == pytest.approx(alone / 4, rel=0.05)


class Numbers(Dataset):
    def __getitem__(self, number: int) -> torch.Tensor:
        return torch.tensor([number])


@pytest.mark.parametrize("batches", [1, 3])
def test_no_more_workers_start_than_there_are_batches(monkeypatch, batches):
    started = []
    real = loader_module.DataLoader
    monkeypatch.setattr(
        loader_module,
        "DataLoader",
        lambda *given, **options: started.append(options) or real(*given, **options),
    )
    found = list(loader(Numbers(), [[number] for number in range(batches)], 2, World()))
    assert torch.cat(found).flatten().tolist() == list(range(batches))
    assert [options["num_workers"] for options in started] == [min(2, batches)]


def test_what_is_read_ahead_changes_no_number(tiny_model, icon_shards, tmp_path, monkeypatch):
    runs = {}
    for free in (0.0, math.inf):
        monkeypatch.setattr(loader_module, "free_shared_bytes", lambda free=free: free)
        plan = recipe(tiny_model, icon_shards, tmp_path / str(free), epochs=1, workers=2)
        runs[free] = metrics(trained(plan, no_validation).folder)
    assert runs[0.0] == runs[math.inf]
