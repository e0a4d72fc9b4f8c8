"""The harness runs, and both trainers compute the same; how fast they are is judged in benchmarks/, not here."""

import json
import signal
import sys

import pytest
import torch
from conftest import assert_mistake, call, call_here, noise_images
from PIL import Image

import train.bench.__main__
from data_prep.build.pipeline import Parallelism, Reading, Splitting, build
from data_prep.errors import Fault
from train.bench import peer as bench_peer
from train.bench.__main__ import OutOfMemory, in_fresh_process
from train.bench.timing import PARTS, Stepper
from train.recipe import Recipe


@pytest.fixture(scope="module")
def noise_shards(tmp_path_factory) -> str:
    """16 square pictures, one caption each, in train alone."""
    folder = tmp_path_factory.mktemp("noise")
    build(
        [str(noise_images(folder, 16, size=(16, 16)))],
        folder / "shards",
        Reading(),
        split=Splitting(0, 0),
        parallelism=Parallelism(1),
        min_shards=1,
    )
    return str(folder / "shards")


def test_every_option_in_one_call(noise_shards, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(bench_peer, "TURNS", 1)
    monkeypatch.setattr(bench_peer, "WAYS", {"cpu": [["--grad-checkpointing"]]})
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = {
        "global_batch_size": 16,
        "micro_batch_size": 8,
        "precision": "fp32",
        "activation_checkpointing": "none",
        "workers": 1,
        "steps": 1,
    }
    # A crop of all of a square picture is the picture: 16 of them are the same batch in both trainers.
    options |= {"augment.color_jitter_prob": 0, "augment.gray_scale_prob": 0, "sweep": True, "peer": True}
    options |= {
        "plot": tmp_path / "rows.png",
        "profile": tmp_path / "trace.json",
        "data": noise_shards,
        "model": tiny_model,
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    monkeypatch.setattr("sys.argv", ["bench", *arguments, "--augment.scale", "1.0", "1.0"])
    train.bench.__main__.main()
    *table, line = capsys.readouterr().out.strip().splitlines()
    found = json.loads(line)

    steps = {(row["micro_batch_size"], row["memory"]): row for row in found["steps"]}
    assert list(steps) == [(size, mode) for mode in ("none", "checkpoint") for size in (8, 16)]
    for row in steps.values():
        assert sum(row[f"{part}_s"] for part in PARTS) == pytest.approx(row["step_s"])
        assert row["pairs_per_s"] * row["step_s"] == pytest.approx(16)
        assert min(row[f"{part}_s"] for part in PARTS) > 0
        assert row["share_of_peak"] == pytest.approx(
            row["pairs_per_s"] * found["gflop_per_pair"] / found["matmul_tflop_per_s"] / 1e3
        )
    ours, theirs = found["whole_path"]
    assert (ours["trainer"], theirs["trainer"], theirs["options"]) == (
        "ours",
        "open_clip_train",
        "--grad-checkpointing",
    )
    # The same weights, pixels and tokens; their log has five digits.
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-4)
    for row in ours, theirs:
        assert 0 < row["slowest"] <= row["pairs_per_s"] <= row["fastest"]
        assert row["peak_memory_gb"] > 0.1
    assert sum(text.startswith("| step:") for text in table) == 4
    assert sum(text.startswith("| whole path:") for text in table) == 2
    assert Image.open(tmp_path / "rows.png").size > (600, 100)
    names = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert sum(name.startswith("Optimizer.step") for name in names) == 2


def test_the_plain_call_on_the_demo(icon_shards, monkeypatch, capsys):
    flags = ["--global_batch_size", "16", "--micro_batch_size", "8", "--steps", "1"]
    monkeypatch.setattr("sys.argv", ["bench", "train/recipes/demo.yaml", "--data", str(icon_shards), *flags])
    train.bench.__main__.main()
    *table, line = capsys.readouterr().out.strip().splitlines()
    found = json.loads(line)
    (row,) = found["steps"]
    assert (found["batch"], row["micro_batch_size"], row["memory"], found["whole_path"]) == (
        16,
        8,
        "none",
        [],
    )
    # 4 + 1 blocks of 12 width² weights, 17 and 8 or 12 tokens, and the two projections; attention's products
    # come on top.
    image, projections = 17 * 4 * 12 * 160**2 + 16 * 3 * 8**2 * 160, 160 * 128 + 128 * 128
    short, whole = (2 * 3 * (image + length * 12 * 128**2 + projections) / 1e9 for length in (8, 12))
    assert short < found["gflop_per_pair"] < 1.1 * whole
    assert found["loader_samples_per_s"] > 0
    assert any(line.startswith("| step: micro_batch_size 8, memory none") for line in table)


def test_steps_are_those_of_training(noise_shards, tiny_model):
    """The weights after two steps of the harness are not those before, and its parts are marked as often as
    they ran.
    """
    step = Stepper(
        Recipe(
            tiny_model,
            noise_shards,
            "",
            global_batch_size=16,
            micro_batch_size=8,
            precision="fp32",
            workers=0,
        )
    )
    before = torch.cat([weight.detach().flatten().clone() for weight in step.towers.parameters()])
    for _ in range(2):
        step()
    after = torch.cat([weight.detach().flatten() for weight in step.towers.parameters()])
    assert (before != after).float().mean() > 0.5
    assert step.samples == 32
    parts = [part for part, _, _ in step.spans]
    assert {part: parts.count(part) for part in parts} == {
        "forward": 8,
        "data": 2,
        "forward and backward": 2,
        "optimizer": 2,
    }


@pytest.mark.parametrize(
    ("function", "argument"), [(torch.empty, 1 << 58), (signal.raise_signal, signal.SIGKILL)]
)
def test_too_little_memory_is_a_row_and_not_the_end(function, argument):
    with pytest.raises(OutOfMemory):
        in_fresh_process(function, argument)
    assert in_fresh_process(abs, -1) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--global_batch_size", 999], ["999", "fewer than one batch"]),
        (["--steps", 0], ["--steps 0", "at least 1"]),
        (
            ["--peer", True, "--workers", 1, "--micro_batch_size", 9],
            ["--micro_batch_size 9", "divisor of --global_batch_size 16"],
        ),
        (["--peer", True, "--workers", 99], ["a shard per worker", "pass --workers"]),
        (["--sweeps", True], ["--sweep"]),
    ],
)
def test_mistakes_are_told_before_anything_is_measured(noise_shards, tiny_model, flags, words):
    result = call_here(
        train.bench.main, "--model", tiny_model, "--data", noise_shards, "--global_batch_size", 16, *flags
    )
    assert_mistake(result, *words)


def test_a_trainer_that_breaks_is_a_fault_with_what_it_said(tmp_path):
    words = [sys.executable, "-c", "raise LookupError('no such thing')"]
    command = bench_peer.Command("theirs", "", words, tmp_path / "log", lambda line: None)
    with pytest.raises(Fault, match="LookupError: no such thing"):
        bench_peer.run(command, tmp_path)


def test_the_harnesses_of_data_prep_run(tmp_path):
    result = call("benchmarks.planner", "--rows", 2000, "--folder", tmp_path)
    assert [line.split("|")[3].strip() for line in result.stdout.splitlines()[2:]] == [
        "imports alone",
        "reading rows",
        "keeping made-up results",
        "plan, images, report",
    ]
    options = ["--icons", 20, "--photos", 4, "--folder", tmp_path, "--only"]
    for only in ("ours", "GNU tar"):
        assert f"| {only}" in call("benchmarks.data_prep", *options, only).stdout
