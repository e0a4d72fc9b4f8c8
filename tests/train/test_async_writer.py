"""A checkpoint holds what was there when it was requested, whatever training does meanwhile; a stop and the
end of a run wait until it is whole.
"""

import copy
import json
import threading
import time

import pytest
import torch
from runs import assert_equal_weights, exported, metrics, newest, no_validation, recipe, status_of, trained
from torch import nn

from data_prep.errors import Fault, Fenced
from train.loop import fit
from train.model.clip import Clip
from train.run.async_writer import AsyncWriter, Snapshot
from train.world import World


@pytest.fixture
def model_and_optimizer() -> tuple[nn.Module, torch.optim.Optimizer]:
    """A model whose forward changes buffers, and AdamW with moments; one parameter never had a gradient."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 4, dtype=torch.float64))
    model[2].requires_grad_(False)
    optimizer = torch.optim.AdamW(
        [{"params": model[0].parameters()}, {"params": [*model[1].parameters(), *model[2].parameters()]}],
        fused=True,
    )
    forward(model).backward()
    optimizer.step()
    optimizer.zero_grad()
    return model, optimizer


def forward(model: nn.Module) -> torch.Tensor:
    return model[1](model[0](torch.randn(5, 8))).square().sum()


def assert_equal(one, two) -> None:
    """Nested state_dicts, bit for bit."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for name in one:
            assert_equal(one[name], two[name])
    elif isinstance(one, list):
        assert_equal(dict(enumerate(one)), dict(enumerate(two)))
    else:
        assert torch.equal(one, two) if torch.is_tensor(one) else one == two


def test_the_state_at_the_request_is_written(model_and_optimizer):
    model, optimizer = model_and_optimizer
    writer, written, may_write = AsyncWriter(), [], threading.Event()
    writer.allocate(model, optimizer)

    def write(weights, moments):
        assert may_write.wait(60)
        written.append(copy.deepcopy((weights, moments)))

    expected = []
    for _ in range(2):  # the second time into the same memory
        expected.append(copy.deepcopy((model.state_dict(), optimizer.state_dict())))
        writer.begin(model, optimizer, write)
        for _ in range(3):  # training continues before anything is written
            forward(model).backward()
            writer.wait_for_snapshot()
            optimizer.param_groups[0]["lr"] /= 2
            optimizer.step()
        may_write.set()
        writer.wait()
        may_write.clear()
    for (weights, moments), (expected_weights, expected_moments) in zip(written, expected, strict=True):
        assert_equal(weights, dict(expected_weights))
        assert_equal(moments, expected_moments)
    assert not torch.equal(expected[0][0]["0.weight"], expected[1][0]["0.weight"])
    assert writer.new_times().keys() == {"time/save_write_s"}


def test_a_forward_may_run_before_the_copy_and_memory_is_allocated_once(model_and_optimizer):
    model, optimizer = model_and_optimizer
    snapshot = Snapshot(model, optimizer)
    addresses = {key: tensor.data_ptr() for key, tensor in snapshot.buffers.items()}
    expected = copy.deepcopy((model.state_dict(), optimizer.state_dict()))
    copy_both = snapshot.begin(model, optimizer)
    forward(model).backward()
    assert not torch.equal(model[1].running_mean, expected[0]["1.running_mean"])
    weights, moments = copy_both()
    assert_equal(weights, dict(expected[0]))
    assert_equal(moments, expected[1])
    added = snapshot.buffers.keys() - addresses.keys()
    assert all(snapshot.buffers[key].dim() == 0 for key in added)
    assert all(snapshot.buffers[key].data_ptr() == address for key, address in addresses.items())


def test_training_waits_where_memory_for_a_copy_is_missing(model_and_optimizer, capsys):
    model, optimizer = model_and_optimizer
    huge = nn.Parameter(torch.zeros(1).expand(1 << 50))  # 4 million GB, if it were copied
    optimizer.add_param_group({"params": [huge]})
    writer, written = AsyncWriter(), []
    writer.allocate(model, optimizer)
    assert "warning: not enough memory to copy weights and moments" in capsys.readouterr().err
    writer.begin(model, optimizer, lambda weights, moments: written.append(copy.deepcopy((weights, moments))))
    assert_equal(written[0][0], model.state_dict())
    assert_equal(written[0][1], optimizer.state_dict())


def before_saving(monkeypatch, action) -> None:
    """Call `action()` before weights are written, in the writer's thread."""
    real = Clip.save

    def save(*arguments):
        action()
        real(*arguments)

    monkeypatch.setattr(Clip, "save", save)


def test_a_stop_and_the_end_wait_for_the_checkpoint(tiny_model, icon_shards, tmp_path, monkeypatch):
    before_saving(monkeypatch, lambda: time.sleep(0.3))
    run = tmp_path / "run"
    plan = recipe(tiny_model, icon_shards, run, epochs=3, workers=0, save_every_minutes=9)

    def stop(clip, world):
        (run / "stop").touch()
        return {}

    for state, samples, validate in (("stopped", 24, stop), ("finished", 432, no_validation)):
        fit(plan, World(), validate)
        status = status_of(run)
        assert (status["state"], status["checkpoint"]) == (state, f"samples-{samples:012d}")
        assert newest(run).name == status["checkpoint"]
        assert (run / "checkpoints" / "best").readlink().name == status["checkpoint"]
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    write_s = [line["time/save_write_s"] for line in lines if "time/save_write_s" in line]
    assert write_s  # the second epoch's save waits for the first one's, so the third epoch logs it
    assert min(write_s) >= 0.3
    # the names of all other values are functions of the recipe and the data
    assert not any("save" in name for line in metrics(run) for name in line)


def test_a_failed_write_ends_the_run_with_the_last_whole_checkpoint(
    tiny_model, icon_shards, tmp_path, monkeypatch
):
    """The second checkpoint's folder is moved away while it is written; the same command then resumes."""
    run, saves = tmp_path / "run", []

    def fail_second():
        saves.append(1)
        if len(saves) == 2:
            (partial,) = (run / "checkpoints").glob(".samples-*.partial")
            partial.rename(tmp_path / "gone")

    before_saving(monkeypatch, fail_second)
    plan = recipe(tiny_model, icon_shards, run, epochs=1, workers=0)
    message = r"samples-000000000048: cannot be written .*whole checkpoint \(.*samples-000000000024\)"
    with pytest.raises(Fault, match=message):
        fit(plan, World(), no_validation)
    assert newest(run).name == "samples-000000000024"
    assert status_of(run)["checkpoint"] in (None, "samples-000000000024")
    (run / "checkpoints" / ".samples-000000000030.partial").mkdir()  # as a kill leaves it
    trained(plan, no_validation)
    assert not list((run / "checkpoints").glob("*.partial"))
    options = {"epochs": 1, "workers": 0, "save_every_minutes": 9}
    whole = trained(recipe(tiny_model, icon_shards, tmp_path / "whole", **options), no_validation).folder
    assert_equal_weights(exported(newest(run)), exported(newest(whole)))
    assert metrics(run) == metrics(whole)


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

    before_saving(monkeypatch, replace_at_second)
    with pytest.raises(Fenced, match=r"attempt job 7\.1 has replaced this one \(job 7\.0\)"):
        fit(recipe(tiny_model, icon_shards, run, epochs=1, workers=0), World(), no_validation)
    assert {path.name for path in (run / "checkpoints").iterdir()} == {"best", "samples-000000000024"}
