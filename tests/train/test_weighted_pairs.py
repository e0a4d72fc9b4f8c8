"""Weights of pairs, from shards into runs; equal weights change no bit."""

import csv
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from conftest import ICONS
from ranks_script import global_batch, train_state
from runs import assert_bit_equal, exported, newest, no_validation, trained
from runs import recipe as small_recipe

from data_prep.build.pipeline import Parallelism, build
from data_prep.errors import UserError
from data_prep.shards import Shards
from train.data.loader import TrainPairs, train_loader
from train.data.order import Order
from train.model.clip import load
from train.recipe import Augment, Captions, Recipe
from train.step import backward, train_step
from train.world import World


def test_a_step_of_weight_zero_is_finite(tiny_model):
    state = train_state(load(tiny_model))
    batch = global_batch()._replace(weights=torch.zeros(16))
    assert backward(state, batch) == 0
    values = train_step(state, batch)
    assert values["train/loss"] == values["train/grad_norm"] == 0
    assert state.guard.flush() == []
    assert all(parameter.isfinite().all() for parameter in state.clip.towers.parameters())


def weighted_shards(icon_folder: Path, out: Path, weight) -> Path:
    """The icons' shards with a weight for each row of their CSV, by its number."""
    with open(icon_folder / "icons.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    table = out.with_suffix(".csv")
    with open(table, "w", newline="") as file:
        writer = csv.DictWriter(file, [*rows[0], "weight"])
        writer.writeheader()
        writer.writerows(row | {"weight": weight(number)} for number, row in enumerate(rows))
    reading = replace(ICONS, weight_column="weight", images=str(icon_folder))
    build([str(table)], out, reading, parallelism=Parallelism(1), images_per_shard=40, min_shards=1)
    return out


@pytest.fixture(scope="module")
def uneven(icon_folder, tmp_path_factory) -> Path:
    return weighted_shards(
        icon_folder, tmp_path_factory.mktemp("uneven") / "shards", lambda number: number % 4 / 2
    )


def test_a_batch_has_the_weight_of_each_caption(tiny_model, uneven):
    shards = Shards(uneven, "train")
    assert shards.weight_range == (0.0, 1.5)
    order = Order(shards.shard_sizes, 48, 0)
    pairs = TrainPairs(shards, order, (16, 16), Augment(), Captions())
    batch = next(train_loader(pairs, load(tiny_model).tokenize, 0, 48, World(), 0))
    assert (batch.weights.dtype, batch.weights.shape) == (torch.float32, (48,))
    for position in range(48):
        sample = shards.read(order.sample_at(position))
        weight = sample.weights[sample.captions.index(pairs[position].caption)]
        assert batch.weights[position] == torch.tensor(weight / 1.5)
    assert torch.equal(torch.cat([chunk.weights for chunk in batch.split(20)]), batch.weights)
    assert torch.equal(batch.to(torch.device("cpu")).weights, batch.weights)


def short(model: str, data: Path, run: Path, **changes) -> Recipe:
    return small_recipe(model, data, run, **({"epochs": 1, "global_batch_size": 48} | changes))


@pytest.mark.usefixtures("one_thread")
def test_equal_weights_train_the_same_bits(tiny_model, icon_folder, icon_shards, tmp_path):
    even = weighted_shards(icon_folder, tmp_path / "shards", lambda number: 0.3)
    runs = [
        trained(short(tiny_model, data, tmp_path / name), no_validation).folder
        for name, data in (("without", icon_shards), ("with", even))
    ]
    assert_bit_equal(*runs)


@pytest.mark.usefixtures("one_thread")
def test_weights_count_and_resumed_equals_uninterrupted(tiny_model, uneven, icon_shards, tmp_path):
    """Ranks and micro batches: test_step.py."""
    whole = trained(short(tiny_model, uneven, tmp_path / "whole", keep_checkpoints=20), no_validation).folder
    plain = trained(short(tiny_model, icon_shards, tmp_path / "plain"), no_validation).folder
    assert not torch.equal(*(exported(newest(run))["visual.proj"] for run in (whole, plain)))
    parts = shutil.copytree(whole, tmp_path / "parts", symlinks=True)
    for _ in range(2):
        shutil.rmtree(newest(parts))
    (parts / "status.json").unlink()
    trained(short(tiny_model, uneven, parts, keep_checkpoints=20), no_validation)
    assert_bit_equal(whole, parts)


def test_weights_that_are_all_zero_are_refused(tiny_model, icon_folder, tmp_path):
    shards = weighted_shards(icon_folder, tmp_path / "zero", lambda number: 0)
    with pytest.raises(UserError, match="zero, train: all weights are 0"):
        trained(short(tiny_model, shards, tmp_path / "run"), no_validation)
