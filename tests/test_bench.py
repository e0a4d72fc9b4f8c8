"""The harness runs and its line is JSON; what it measures is judged in benchmarks/, not here."""

import json

import pytest
from conftest import assert_mistake, call, call_here

import train.bench


def test_bench_prints_a_table_and_one_line_of_json(icon_shards):
    result = call("train.bench", "train/recipes/demo.yaml", "--data", icon_shards, "--batch", 16, "--micro_batch", 8, "--workers", 1)
    *table, line = result.stdout.strip().splitlines()
    values = json.loads(line)
    assert len(table) == len(values)
    assert (values["batch"], values["micro_batch"]) == (16, 8)
    for name in ("step_s", "pairs_per_s", "peak_memory_gb", "loader_samples_per_s"):
        assert values[name] > 0
    assert values["pairs_per_s"] * values["step_s"] == pytest.approx(16)
    too_large = call_here(train.bench.main, "train/recipes/demo.yaml", "--data", icon_shards, "--batch", 999)
    assert_mistake(too_large, "fewer than one batch")


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
