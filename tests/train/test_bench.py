"""The benchmark runs, times the loop's own step, and both trainers compute the same; how fast they are is
measured in benchmarks/, not here.
"""

import json
import signal
import sys
from dataclasses import replace

import pytest
import torch
from conftest import TINY, assert_mistake, call, call_here, noise_images, save_tiny
from PIL import Image

from data_prep.build.options import Parallelism, Reading, Splitting
from data_prep.build.pipeline import build
from data_prep.errors import Fault
from train.bench import peer
from train.bench.__main__ import main
from train.bench.rows import OutOfMemory, in_fresh_process
from train.bench.timing import COUNTED_PAIRS, PARTS, Stepper, flop_per_pair, graphs, measure_step
from train.recipe import Optim, Recipe


@pytest.fixture(scope="module")
def noise_shards(tmp_path_factory) -> str:
    """16 square images with one caption each, all in train."""
    folder = tmp_path_factory.mktemp("noise")
    csv, split = noise_images(folder, 16, size=(16, 16)), Splitting(0, 0)
    build([str(csv)], folder / "shards", Reading(), split=split, parallelism=Parallelism(1), min_shards=1)
    return str(folder / "shards")


@pytest.mark.slow
def test_every_option_in_one_call(noise_shards, tiny_model, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    options = {
        "global-batch-size": 16,
        "precision": "fp32",
        "workers": 1,
        "steps": 1,
        "turns": 1,
        "ways": "grad-checkpointing",
        # 16 of 16 images, uncropped and unchanged, are the same batch in both trainers
        "augment.color-jitter-prob": 0,
        "augment.gray-scale-prob": 0,
        "plot": tmp_path / "rows.png",
        "profile": tmp_path / "trace.json",
        "data": noise_shards,
        "model": tiny_model,
    }
    arguments = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    arguments += ["--augment.scale", "1.0", "1.0", "--sweep", "--peer"]
    monkeypatch.setattr("sys.argv", ["bench", *arguments])
    main()
    *table, line = capsys.readouterr().out.strip().splitlines()
    result = json.loads(line)

    rows = {(row["micro_batch_size"], row["activation_checkpointing"]): row for row in result["steps"]}
    assert list(rows) == [(size, mode) for mode in ("none", "full") for size in (8, 16)]
    for row in rows.values():
        assert sum(row[f"{part}_s"] for part in PARTS) == pytest.approx(row["step_s"])
        assert row["pairs_per_s"] * row["step_s"] == pytest.approx(16)
        assert min(row[f"{part}_s"] for part in PARTS) > 0
        assert row["share_of_peak"] == pytest.approx(
            row["pairs_per_s"] * result["gflop_per_pair"] / result["matmul_tflop_per_s"] / 1e3
        )
    ours, theirs = result["whole_path"]
    assert (ours["trainer"], theirs["trainer"]) == ("ours", "open_clip_train")
    assert theirs["options"] == "--grad-checkpointing"
    # the same weights, pixels and tokens; open_clip_train logs five digits
    assert ours["first_loss"] == pytest.approx(theirs["first_loss"], rel=1e-4)
    for row in ours, theirs:
        assert 0 < row["slowest"] <= row["pairs_per_s"] <= row["fastest"]
        assert row["peak_memory_gb"] > 0.1
    assert sum(text.startswith("| step:") for text in table) == 4
    assert sum(text.startswith("| whole path:") for text in table) == 2
    assert Image.open(tmp_path / "rows.png").size > (600, 100)
    names = [event["name"] for event in json.loads((tmp_path / "trace.json").read_text())["traceEvents"]]
    assert sum(name.startswith("Optimizer.step") for name in names) == 2


def test_the_documented_call(icon_shards, monkeypatch, capsys):
    flags = ["--global-batch-size", "16", "--micro-batch-size", "8", "--steps", "1", "--workers", "0"]
    monkeypatch.setattr("sys.argv", ["bench", "train/recipes/demo.yaml", "--data", str(icon_shards), *flags])
    main()
    *table, line = capsys.readouterr().out.strip().splitlines()
    result = json.loads(line)
    row, full = result["steps"]  # the captions as they are, and as long as the context
    assert (result["global_batch_size"], row["micro_batch_size"]) == (16, 8)
    assert row["tokens"][0] % 8 == 0
    assert row["tokens"][1] < full["tokens"][0] == full["tokens"][1] == result["context_length"]
    assert full["share_of_peak"] / full["pairs_per_s"] > row["share_of_peak"] / row["pairs_per_s"]
    assert (row["activation_checkpointing"], result["whole_path"]) == ("none", [])
    # 4 + 1 blocks of 12 width^2 weights, 17 and 8 or 12 tokens, and the two projections; attention's products
    # come on top
    image, projections = 17 * 4 * 12 * 160**2 + 16 * 3 * 8**2 * 160, 160 * 128 + 128 * 128
    short, whole = (2 * 3 * (image + length * 12 * 128**2 + projections) / 1e9 for length in (8, 12))
    assert short < result["gflop_per_pair"] < 1.1 * whole
    assert result["loader_samples_per_s"] > 0
    assert any(text.startswith("| step: micro_batch_size 8, activation_checkpointing none") for text in table)


@pytest.fixture(scope="module")
def counted(noise_shards, tmp_path_factory) -> Recipe:
    """A recipe whose FLOP are nearly all in four blocks of width 64 with 64 patches; see block_flop()."""
    vision = {"image_size": 32, "patch_size": 4, "width": 64, "head_width": 32, "layers": 4}
    folder = save_tiny(tmp_path_factory.mktemp("wide"), vision_cfg=vision)
    return Recipe(f"local-dir:{folder}", noise_shards, "", precision="fp32")


@pytest.fixture(scope="module")
def plain_flop(counted) -> float:
    return flop_per_pair(counted)


def block_flop(tokens: int, width: int = 64, layers: int = 4) -> int:
    """FLOP of the blocks' forward: products with 12 width^2 weights, and the two products of attention."""
    return layers * (24 * tokens * width**2 + 4 * tokens**2 * width)


def test_flop_of_a_plain_step(plain_flop):
    """A forward, and a backward of twice as much."""
    assert plain_flop == pytest.approx(3 * block_flop(1 + 64), rel=0.02)


def test_patch_dropout_removes_the_flop_of_the_dropped_patches(counted, plain_flop):
    removed = plain_flop - flop_per_pair(replace(counted, patch_dropout=0.5))
    assert removed == pytest.approx(3 * (block_flop(1 + 64) - block_flop(1 + 32)), rel=0.01)


def test_a_locked_tower_has_no_backward(counted, plain_flop):
    image, text = (plain_flop - flop_per_pair(replace(counted, lock=tower)) for tower in ("image", "text"))
    assert image == pytest.approx(2 * block_flop(1 + 64), rel=0.02)
    assert text == pytest.approx(2 * block_flop(8, 16, 1), rel=0.05)


def test_replay_adds_a_third(counted, plain_flop):
    """On a quarter of the pairs, a forward of the initial model and a forward and backward of the model."""
    added = flop_per_pair(replace(counted, replay=counted.data)) - plain_flop
    assert added == pytest.approx(plain_flop / 3, rel=0.02)


def test_lora_adds_the_products_of_its_matrices(counted, plain_flop):
    """And removes the gradients of the patch embedding and of the first block's input: little of either."""
    low, high = (flop_per_pair(replace(counted, lora_rank=rank)) for rank in (4, 16))
    assert low != plain_flop
    assert low == pytest.approx(plain_flop, rel=0.03)
    # B A, and its gradients for B and for A; once per step
    per_rank = 3 * 2 * (4 * 12 * 64**2 + 12 * 16**2) / COUNTED_PAIRS
    assert high - low == pytest.approx(12 * per_rank, rel=0.05)


def test_steps_are_those_of_training(noise_shards, tiny_model):
    """Two steps change the weights, and each part is timed as often as it runs."""
    options = {"global_batch_size": 16, "micro_batch_size": 8, "precision": "fp32", "workers": 0}
    # the benchmark's run is so long that a warm-up would hardly change a weight
    step = Stepper(Recipe(tiny_model, noise_shards, "", optim=Optim(warmup_fraction=0.0), **options))
    parameters = list(step.state.towers.parameters())
    before = torch.cat([weight.detach().flatten().clone() for weight in parameters])
    for _ in range(2):
        step()
    after = torch.cat([weight.detach().flatten() for weight in parameters])
    assert (before != after).float().mean() > 0.5
    assert step.state.samples == 32
    parts = [part for part, _, _ in step.spans]
    counts = {"forward": 8, "data": 2, "forward and backward": 2, "optimizer": 2}
    assert {part: parts.count(part) for part in parts} == counts


def test_no_timed_step_compiles(noise_shards, tmp_path, monkeypatch):
    """The fifth step, the first that is timed, compiles all again, as captions of a new length may do."""
    model = f"local-dir:{save_tiny(tmp_path, text_cfg={**TINY['text_cfg'], 'layers': 2})}"
    compile_in_place, take_step, found = torch.nn.Module.compile, Stepper.__call__, []
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self: compile_in_place(self, backend="eager"))

    def step(self):
        if len(found) == 4:
            torch.compiler.reset()
        before = graphs()
        take_step(self)
        found.append(graphs() > before)

    monkeypatch.setattr(Stepper, "__call__", step)
    options = {"global_batch_size": 16, "micro_batch_size": 16, "activation_checkpointing": "none"}
    options |= {"precision": "fp32", "workers": 0, "compile": "always"}
    row = measure_step(Recipe(model, noise_shards, "", **options), 1)
    torch.compiler.reset()
    assert found == [True, False, False, False, True, False]
    assert row["compiled"] == 0


@pytest.mark.parametrize(
    ("function", "argument"), [(torch.empty, 1 << 58), (signal.raise_signal, signal.SIGKILL)]
)
def test_too_little_memory_is_reported_and_does_not_end_the_benchmark(function, argument):
    with pytest.raises(OutOfMemory):
        in_fresh_process(function, argument)
    assert in_fresh_process(abs, -1) == 1


@pytest.mark.parametrize(
    ("flags", "words"),
    [
        (["--global-batch-size", 999], ["999", "fewer than one batch"]),
        (["--steps", 0], ["--steps 0", "at least 1"]),
        (["--peer", "--turns", 0], ["--turns 0", "at least 1"]),
        (["--ways", "torchcompile"], ["--ways", "pass --peer"]),
        (["--peer", "--ways", "fast"], ["fast", "torchcompile"]),
        (
            ["--peer", "--workers", 1, "--micro-batch-size", 9],
            ["--micro-batch-size 9", "divisor of --global-batch-size 16"],
        ),
        (["--peer", "--workers", 99], ["one per worker", "pass --workers"]),
        (["--sweeps"], ["--sweep"]),
    ],
)
def test_mistakes_are_reported_before_anything_is_measured(noise_shards, tiny_model, flags, words):
    options = ["--model", tiny_model, "--data", noise_shards, "--global-batch-size", 16]
    assert_mistake(call_here(main, *options, *flags), *words)


def test_a_trainer_that_fails_is_a_fault_with_its_output(tmp_path):
    words = [sys.executable, "-c", "raise LookupError('no such thing')"]
    command = peer.Command("theirs", "", words, tmp_path / "log", lambda line: None)
    with pytest.raises(Fault, match="LookupError: no such thing"):
        peer.run(command, tmp_path)


@pytest.mark.slow
def test_the_benchmarks_of_data_prep_run(tmp_path):
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
