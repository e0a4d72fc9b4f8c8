"""TensorBoard, Trackio and Weights & Biases, offline: they show the numbers of metrics.jsonl, each once, also
after a crash.
"""

import json
import struct
from collections import defaultdict
from collections.abc import Iterator
from pathlib import Path

import pytest
from conftest import assert_mistake, call_here
from runs import flags, metrics, recipe, trained
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

import train.step
from train.__main__ import main
from train.run import trackers
from train.run.trackers import check_installed, tensorboard_tag

trackio = pytest.importorskip("trackio")
wandb = pytest.importorskip("wandb")

Curves = dict[str, list[tuple[int, float]]]


@pytest.fixture(scope="module")
def run(tiny_model, icon_shards, tmp_path_factory) -> Path:
    """A run with all trackers that crashed in its second epoch, was resumed, and is finished."""
    folder = tmp_path_factory.mktemp("tracked")
    plan = recipe(
        tiny_model,
        icon_shards,
        folder / "run",
        epochs=2,
        save_every_minutes=60.0,
        workers=0,
        log=("tensorboard", "trackio", "wandb"),
    )
    real, steps = train.step.backward, []

    def crashing(state, batch):
        steps.append(state.samples)
        if len(steps) == 10:
            raise RuntimeError("a crash")
        return real(state, batch)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("WANDB_MODE", "offline")
        for module in ("trackio", "trackio.utils", "trackio.sqlite_storage"):
            patch.setattr(f"{module}.TRACKIO_DIR", folder / "trackio")
        patch.setattr("train.step.backward", crashing)
        with pytest.raises(RuntimeError, match="a crash"):
            trained(plan)
        trained(plan)
    assert len(steps) > len(set(steps)) == len(metrics(folder / "run")) - 3  # three validations
    return folder / "run"


def expected(run: Path) -> Curves:
    curves = defaultdict(list)
    for line in metrics(run):
        for name, value in line.items():
            if name != "samples":
                curves[name].append((line["samples"], pytest.approx(value, rel=1e-6)))
    return curves


def without_times(curves: Curves) -> Curves:
    return {name: points for name, points in curves.items() if not name.startswith("time/")}


def test_tensorboard_shows_loss_and_validation_first_and_by_instance_apart(run):
    events = EventAccumulator(str(run / "tensorboard"), size_guidance={"scalars": 0}).Reload()
    tags = sorted(events.Tags()["scalars"])
    assert tags[0] == "1_loss/train/loss"
    assert tags[1].startswith("2_validation/val/")
    groups = list(dict.fromkeys(tag.split("/")[0] for tag in tags))
    assert groups == ["1_loss", "2_validation", "5_training", "6_by_instance", "7_time"]
    curves = {tag.partition("/")[2]: [(e.step, e.value) for e in events.Scalars(tag)] for tag in tags}
    assert without_times(curves) == expected(run)
    for name, tag in {
        "ema/val/mean/R@1": "4_other_weights/ema/val/mean/R@1",
        "retention/mean/R@1": "3_retention/retention/mean/R@1",
        "ema/val/instance/image_to_text/R@1": "6_by_instance/ema/val/instance/image_to_text/R@1",
    }.items():
        assert tensorboard_tag(name) == tag


def test_trackio_continues_the_curves(run):
    from trackio.sqlite_storage import SQLiteStorage

    with pytest.MonkeyPatch.context() as patch:
        for module in ("trackio", "trackio.utils", "trackio.sqlite_storage"):
            patch.setattr(f"{module}.TRACKIO_DIR", run.parent / "trackio")
        [name] = SQLiteStorage.get_runs("cliptune")
        logs = SQLiteStorage.get_logs("cliptune", name)
        config = SQLiteStorage.get_run_config("cliptune", name)
    assert name.startswith("run-")
    assert config["optim.lr"] == 1e-3
    curves = defaultdict(list)
    for log in logs:
        for key, value in log.items():
            if key not in ("timestamp", "step"):
                curves[key].append((log["step"], value))
    assert without_times(curves) == expected(run)


def test_wandb_continues_the_curves_of_one_run(run):
    files = sorted(run.glob("wandb/offline-run-*/run-*.wandb"))
    assert len(files) == 2  # one for each start, of one run
    assert len({file.name for file in files}) == 1
    curves = defaultdict(list)
    for file in files:
        for line in wandb_history(file):
            for name, value in line.items():
                if name != "samples" and not name.startswith("_"):
                    curves[name].append((line["samples"], value))
    assert without_times(curves) == expected(run)


def wandb_history(path: Path) -> Iterator[dict]:
    """What was logged to an offline run: records in LevelDB's log format, in blocks of 32 KiB."""
    from wandb.proto.wandb_internal_pb2 import Record

    data, start, whole = path.read_bytes(), 7, b""  # a header of 7 bytes
    while start + 7 <= len(data):
        if 32768 - start % 32768 < 7:
            start += 32768 - start % 32768
            continue
        _, length, kind = struct.unpack_from("<IHB", data, start)
        whole += data[start + 7 : start + 7 + length]
        start += 7 + length
        if kind in (1, 4):  # a whole record, or the last part of one
            record = Record.FromString(whole)
            whole = b""
            if record.HasField("history"):
                items = record.history.item
                yield {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in items}


def test_what_is_not_installed_is_off_and_named_when_asked_for(
    tiny_model, icon_shards, tmp_path, monkeypatch
):
    real = trackers.importlib.util.find_spec
    monkeypatch.setattr(
        trackers.importlib.util, "find_spec", lambda name: None if name == "trackio" else real(name)
    )
    check_installed(["tensorboard", "wandb"])
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", log=("tensorboard", "trackio"))
    mistake = call_here(main, *flags(plan, tmp_path / "plan.yaml")[1:])
    assert_mistake(mistake, "trackio not installed; pip install trackio, or pass --log tensorboard")
    assert not (tmp_path / "run").exists()


def test_a_key_that_wandb_lacks_is_one_sentence(tiny_model, icon_shards, tmp_path, monkeypatch):
    for name in ("WANDB_API_KEY", "WANDB_MODE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    wandb.teardown()  # it has read the environment of the tests above
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", epochs=1, workers=0, log=("wandb",))
    mistake = call_here(main, *flags(plan, tmp_path / "plan.yaml")[1:])
    assert_mistake(mistake, "--log wandb: ", "run `wandb login`, or set WANDB_MODE=offline")
