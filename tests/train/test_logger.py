"""What a run logs: data waits are reported once, with the fix; files end at the checkpoint resumed from."""

import json
from types import SimpleNamespace

import pytest
import torch
from runs import metrics, recipe

from data_prep.cores import cores_per_rank
from train.run.logger import Logger, crop_hint, data_wait_hint, reopened
from train.setup import setup
from train.world import World


def test_the_hint_fits_the_machine(monkeypatch):
    assert (
        data_wait_hint(0.071, workers=4, cores=16)
        == "data wait is 7 % of the step time; pass --workers 8 (16 cores per rank, --workers is 4)"
    )
    of_store = data_wait_hint(0.3, workers=2, cores=8, urls=["s3://bucket/icons"])
    assert "shards come from s3://bucket/icons: with --cache-gb for all of them" in of_store
    assert "pass --workers 1 " in data_wait_hint(0.3, workers=0, cores=2)
    assert "pass --workers 6 " in data_wait_hint(0.3, workers=4, cores=6)
    assert "all 4 cores per rank have a worker" in data_wait_hint(0.3, workers=4, cores=4)
    cores = cores_per_rank()
    monkeypatch.setenv("LOCAL_WORLD_SIZE", str(2 * cores))
    assert cores_per_rank() == 1


@pytest.fixture
def log(tiny_model, icon_shards, tmp_path, monkeypatch):
    """The log of a run that takes no steps; `clock` is its time, in seconds."""
    plan = recipe(tiny_model, icon_shards, tmp_path, workers=0, log_every_steps=2)
    clock = SimpleNamespace(now=0.0)
    monkeypatch.setattr("train.run.logger.time", SimpleNamespace(perf_counter=lambda: clock.now))
    ignore = SimpleNamespace(
        recipe=plan,
        folder=tmp_path,
        lock=SimpleNamespace(check=lambda: None),
        writer=SimpleNamespace(new_times=dict),
        write_progress=lambda *_, **values: None,
    )
    with Logger(ignore, setup(plan, None, World())) as log:
        log.clock = clock
        yield log


def steps(log: Logger, waits: list[float]):
    """Take steps of one second, of which each batch takes so much to arrive; yields after each."""

    def batches():
        for wait in waits:
            log.clock.now += wait
            yield None

    for number, _ in enumerate(log.timed(batches())):
        log.clock.now += 1 - waits[number]
        log.state.samples += 24
        log.step({"train/loss": torch.tensor(1.5), "train/lr": 0.1})
        yield number


def test_a_data_wait_is_reported_once_and_not_for_the_first_line(log):
    printed = []
    log.say = printed.append
    for number in steps(log, [0.9, 0.9, 0.04, 0.04, 0.07, 0.07, 0.5, 0.5]):
        assert len(printed) == (number >= 5), number
    assert "data wait is 7 % of the step time" in printed[0]


def test_a_gain_by_cropping_is_reported_once_and_only_where_it_is_clear(log):
    printed = []
    log.say = printed.append
    for low, expected in ((-0.01, 0), (0.0, 0), (0.002, 1), (0.003, 0)):
        printed.clear()
        log.validation({"val/center_crop/R@1_gain": 0.022, "val/center_crop/R@1_gain_low": low})
        assert sum("try larger crops than augment.scale 0.9 1.0" in line for line in printed) == expected, low
    assert "2.2 points higher" in crop_hint(0.022, (0.7, 1.0))
    assert "margins" in crop_hint(0.022, (1.0, 1.0))


def test_a_line_holds_the_values_of_its_step_and_the_speed_since_the_last_line(log, tmp_path):
    list(steps(log, [0.25] * 5))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["samples"] for line in lines] == [48, 96]
    for line in lines:
        assert (line["train/loss"], line["train/lr"]) == (1.5, 0.1)
        assert line["time/pairs_per_s"] == pytest.approx(24)
        assert line["time/data_wait_share"] == pytest.approx(0.25)
    log.write({"train/grad_norm": float("nan")})
    assert metrics(tmp_path)[-1] == {"samples": 120, "train/grad_norm": None}  # NaN is not JSON


def test_a_reopened_file_ends_at_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"samples": 24}\n{"samples": 48}\n{"samples": 72}\n{"samp')
    with reopened(path, 48) as file:
        file.write('{"samples": 96}\n')
    assert path.read_text() == '{"samples": 24}\n{"samples": 48}\n{"samples": 96}\n'
    reopened(path, 0).close()
    assert path.read_text() == ""
