"""What is written is what was there when it was asked for, whatever training does meanwhile; and nobody
leaves before it is whole.
"""

import copy
import json
import threading
import time

import pytest
import torch
from safetensors.torch import load_file
from test_loop import metrics, newest, no_validation, recipe
from torch import nn

from data_prep.errors import Fault, Fenced
from train.loop import fit
from train.model.clip import Clip
from train.run.async_writer import AsyncWriter, Snapshot
from train.world import World


@pytest.fixture
def trained() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose forward changes its buffers, and AdamW with moments, one of whose parameters never had a
    gradient.
    """
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4, dtype=torch.float64))
    model[2].requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters()}, {"params": [*model[1].parameters(), *model[2].parameters()]}],
        fused=True,
    )
    step(model, optimizer)
    return model, optimizer


def forward(model: nn.Module) -> torch.Tensor:
    return model[1](model[0](torch.randn(5, 8))).square().sum()


def step(model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    forward(model).backward()
    optimizer.step()
    optimizer.zero_grad()


def assert_equal(one, two) -> None:
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            assert_equal(one[name], two[name])
    elif isinstance(one, list):
        assert_equal(dict(enumerate(one)), dict(enumerate(two)))
    else:
        assert torch.equal(one, two) if torch.is_tensor(one) else one == two


def test_what_is_written_is_of_the_moment_it_was_asked_for(trained):
    model, optimizer = trained
    writer, written, go_on = AsyncWriter(), [], threading.Event()
    writer.allocate(model, optimizer)

    def write(weights, moments):
        assert go_on.wait(60)
        written.append(copy.deepcopy((weights, moments)))

    expected = []
    for _ in range(2):  # the second time into the same memory
        expected.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
        writer.begin(model, optimizer, write)
        for _ in range(3):  # training goes on before anything is written
            loss = forward(model)
            loss.backward()
            writer.wait_for_snapshot()
            optimizer.param_groups[0]["lr"] /= 2
            optimizer.step()
        go_on.set()
        writer.wait()
        go_on.clear()
    for (weights, moments), (expected_weights, expected_moments) in zip(written, expected, strict=True):
        assert_equal(weights, dict(expected_weights))
        assert_equal(moments, expected_moments)
    assert not torch.equal(expected[0][0]["0.weight"], expected[1][0]["0.weight"])
    assert writer.new_times().keys() == {"time/save_write_s"}


def test_a_forward_may_come_before_the_copy_and_memory_is_taken_once(trained):
    model, optimizer = trained
    snapshot = Snapshot(model, optimizer)
    taken = {key: tensor.data_ptr() for key, tensor in snapshot.buffers.items()}
    expected = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    copy_both = snapshot.begin(model, optimizer)
    forward(model).backward()
    assert not torch.equal(model[1].running_mean, expected[0]["1.running_mean"])
    weights, moments = copy_both()
    assert_equal(weights, dict(expected[0]))
    assert_equal(moments, expected[1])
    scalars = {key for key, tensor in snapshot.buffers.items() if key not in taken and tensor.dim() == 0}
    assert snapshot.buffers.keys() - taken.keys() == scalars
    assert all(snapshot.buffers[key].data_ptr() == place for key, place in taken.items())


def test_without_memory_for_a_copy_training_waits(trained, capsys):
    model, optimizer = trained
    optimizer.add_param_group(
        {"params": [nn.Parameter(torch.zeros(1).expand(1 << 50))]}
    )  # 4 million GB, if they were copied
    writer, written = AsyncWriter(), []
    writer.allocate(model, optimizer)
    assert "warning: no memory for a copy of weights and moments" in capsys.readouterr().err
    writer.begin(model, optimizer, lambda weights, moments: written.append(copy.deepcopy((weights, moments))))
    assert_equal(written[0][0], model.state_dict())
    assert_equal(written[0][1], optimizer.state_dict())


def slow(monkeypatch, before) -> None:
    """From now on weights are written after `before()`, in the writer's thread."""
    honest = Clip.save

    def save(*arguments):
        before()
        honest(*arguments)

    monkeypatch.setattr(Clip, "save", save)


def test_a_stop_and_the_end_wait_for_the_checkpoint(tiny_model, icon_shards, tmp_path, monkeypatch):
    slow(monkeypatch, lambda: time.sleep(0.3))
    run = tmp_path / "run"
    plan = recipe(tiny_model, icon_shards, run, epochs=3, workers=0, save_every_minutes=9)

    def stop(clip, world):
        (run / "stop").touch()
        return {}

    for state, samples, validate in (("stopped", 24, stop), ("finished", 432, no_validation)):
        fit(plan, World(), validate)
        status = json.loads((run / "status.json").read_text())
        assert (status["state"], status["checkpoint"]) == (state, f"samples-{samples:012d}")
        assert newest(run).name == status["checkpoint"]
        assert (run / "checkpoints" / "best").readlink().name == status["checkpoint"]
    timed = [
        json.loads(line)
        for line in (run / "metrics.jsonl").read_text().splitlines()
        if "time/save_write_s" in line
    ]
    assert timed  # of the first epoch's at the latest in the third, since the second one waits for it
    assert all(line["time/save_write_s"] >= 0.3 for line in timed)
    assert not any(
        "save" in name for line in metrics(run) for name in line
    )  # not a function of the recipe and the data


def test_a_checkpoint_that_cannot_be_written_ends_the_run_with_the_last_whole_one(
    tiny_model, icon_shards, tmp_path, monkeypatch
):
    """The folder of the second checkpoint is taken away while it is written; training had gone on, and the
    same command does.
    """
    run, saves = tmp_path / "run", []

    def fail_second():
        saves.append(1)
        if len(saves) == 2:
            (partial,) = (run / "checkpoints").glob(".samples-*.partial")
            partial.rename(tmp_path / "gone")

    slow(monkeypatch, fail_second)
    plan = recipe(tiny_model, icon_shards, run, epochs=1, workers=0)
    with pytest.raises(
        Fault,
        match=(
            r"samples-000000000048: cannot be written .*the last whole checkpoint is safe"
            r" \(.*samples-000000000024\)"
        ),
    ):
        fit(plan, World(), no_validation)
    assert newest(run).name == "samples-000000000024"
    assert json.loads((run / "status.json").read_text())["checkpoint"] in (None, "samples-000000000024")
    (run / "checkpoints" / ".samples-000000000030.partial").mkdir()  # as a kill leaves it
    assert fit(plan, World(), no_validation).is_finished
    assert not list((run / "checkpoints").glob("*.partial"))
    whole = fit(
        recipe(tiny_model, icon_shards, tmp_path / "whole", epochs=1, workers=0, save_every_minutes=9),
        World(),
        no_validation,
    )
    one, two = (load_file(newest(path) / "open_clip_model.safetensors") for path in (run, whole.folder))
    assert_equal(one, two)
    assert metrics(run) == metrics(whole.folder)


def test_an_attempt_that_is_replaced_while_it_writes_leaves_nothing(
    tiny_model, icon_shards, tmp_path, monkeypatch
):
    run, saves = tmp_path / "run", []
    monkeypatch.setenv("RUN_ATTEMPT", "job 7.0")
    monkeypatch.setattr("train.run.lock.FENCED_S", 0)

    def replace_at_second():
        saves.append(1)
        if len(saves) == 2:
            (run / "attempt").write_text("job 7.1\n")

    slow(monkeypatch, replace_at_second)
    with pytest.raises(Fenced, match=r"attempt job 7\.1 has taken over from this one, job 7\.0"):
        fit(recipe(tiny_model, icon_shards, run, epochs=1, workers=0), World(), no_validation)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best", "samples-000000000024"}
