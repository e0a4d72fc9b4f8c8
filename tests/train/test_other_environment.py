"""A resume under other conditions says that its weights are not those of an uninterrupted run."""

import json
from pathlib import Path

import pytest
import torch
from runs import recipe, trained

from data_prep.atomic import write_json
from train.loop import fit
from train.run.folder import OTHER_WEIGHTS
from train.run.records import other_rounding
from train.world import World


@pytest.fixture
def stopped(tmp_path, tiny_model, icon_shards, one_thread, capsys):
    """A run that has ended after its first step."""
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", epochs=1, global_batch_size=48, workers=0)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "stop").touch()
    assert not fit(plan, World(), lambda *_: {}).is_finished
    capsys.readouterr()
    return plan


def test_another_number_of_threads_is_said(stopped, capsys):
    torch.set_num_threads(2)
    trained(stopped)
    assert (
        f"warning: resuming with another number of threads (1 before, 2 now); {OTHER_WEIGHTS}\n"
        in capsys.readouterr().err
    )


def test_the_same_conditions_are_not(stopped, capsys):
    trained(stopped)
    assert "resuming with" not in capsys.readouterr().err


def test_another_processor_and_library_are_said(stopped, capsys):
    file = Path(stopped.run) / "environment.json"
    environment = json.loads(file.read_text())
    cpu, packages = environment["cpu"], {**environment["packages"], "torch": "1.0"}
    write_json(file, {**environment, "cpu": "VAX, DEFAULT", "packages": packages})
    trained(stopped)
    printed = capsys.readouterr().err
    assert f"another processor (VAX, DEFAULT before, {cpu} now), another torch (1.0 before, " in printed


def test_what_numbers_depend_on():
    now = {"device": "cpu", "cpu": "a", "threads": 1, "world_size": 1, "cuda": None, "rocm": None}
    now |= {"packages": {"torch": "2"}, "python": "3.11"}
    assert other_rounding({}, now) == other_rounding(now, now) == []  # of an earlier version, and the same
    assert other_rounding({**now, "python": "3.10", "packages": 1}, now) == []
    on_gpu = {**now, "device": "H100"}
    assert other_rounding({**on_gpu, "threads": 9, "cpu": "b"}, on_gpu) == []
    assert other_rounding({**on_gpu, "device": "A100", "world_size": 8}, on_gpu) == [
        "device (A100 before, H100 now)",
        "number of ranks (8 before, 1 now)",
    ]
