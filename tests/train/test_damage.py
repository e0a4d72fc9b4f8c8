"""A sample that is damaged ends the run, or another takes its place: the same for any number of ranks and
resumes.
"""

import gc
import json
import os
import re
import shutil
import signal

import numpy as np
import pytest
import torch
from conftest import assert_mistake, call_here
from damage import as_an_older_build, flip
from runs import (
    assert_bit_equal,
    fit_on_ranks,
    flags,
    launch,
    metrics,
    newest,
    no_validation,
    recipe,
    status_of,
    trained,
    until_logged,
)
from sweeps import call_main

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.validation import validator
from train.__main__ import main
from train.data.loader import Skipped, TrainPairs, train_loader
from train.data.sets import open_pairs, order_of
from train.loop import fit
from train.world import World

BATCH = 24
DAMAGED = (5, 6, 40, 41, 100)


@pytest.fixture(scope="module")
def damaged(icon_shards, tmp_path_factory):
    """Shards with one bit of the images of some samples changed."""
    folder = shutil.copytree(icon_shards, tmp_path_factory.mktemp("damaged") / "shards")
    for number in DAMAGED:
        flip(Shards(folder, "train"), number)
    return folder


def pairs_of(plan, skip=True) -> TrainPairs:
    pairs = open_pairs(plan)
    return TrainPairs(pairs, order_of(plan, pairs), (16, 16), plan.augment, plan.captions, skip)


def skipped_in(run) -> list[dict]:
    return [json.loads(line) for line in (run / "damaged.jsonl").read_text().splitlines()]


def test_the_sample_in_the_same_place_of_a_later_batch_is_read_instead(damaged, icon_shards):
    whole, stream = pairs_of(recipe("m", icon_shards, "r")), pairs_of(recipe("m", damaged, "r"))
    end, replaced = 3 * stream.order.samples_per_epoch, 0
    for position in range(end):
        read = position
        while (number := stream.order.sample_at(read)) in DAMAGED:
            read, replaced = read + BATCH, replaced + 1
        pair = stream[position]
        assert pair.group == whole.shards.groups[number]
        assert len(pair.skipped) == (read - position) / BATCH
        assert stream.key_at(position, {stream.shards.key(each) for each in DAMAGED}) == whole.shards.key(
            number
        )
        if read == position:
            assert torch.equal(pair.image, whole[position].image)
    assert replaced >= 2 * len(DAMAGED)


@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks_read_what_one_reads(damaged, ranks):
    stream = pairs_of(recipe("m", damaged, "r"))
    tokenize = lambda texts: torch.zeros(len(texts), 4, dtype=torch.long)  # noqa: E731

    def read(rank: int, world_size: int) -> tuple[list, list[Skipped]]:
        skipped: list[Skipped] = []
        workers = 1 if rank else 0
        batches = train_loader(stream, tokenize, BATCH, 7 * BATCH, World(rank, world_size), workers, skipped)
        return [
            (batch.images, batch.ids, batch.augment_rows, batch.patch_seeds) for batch in batches
        ], skipped

    alone, found = read(0, 1)
    assert found
    parts = [read(rank, ranks) for rank in range(ranks)]
    assert sorted(each for _, skipped in parts for each in skipped) == sorted(found)
    for step, batch in enumerate(alone):
        for number, tensor in enumerate(batch):
            assert torch.equal(torch.cat([batches[step][number] for batches, _ in parts]), tensor)


def test_several_sets_keep_their_shares(damaged, icon_shards):
    plan = recipe("m", {str(icon_shards): 0.5, str(damaged): 0.5}, "r")
    stream = pairs_of(plan)
    first = len(stream.shards.parts[0])
    for position in range(stream.order.samples_per_epoch):
        number, sample, skipped = stream._read(position)
        planned = stream.order.sample_at(position)
        assert (number < first) == (planned < first)
        assert bool(skipped) == (planned - first in DAMAGED)
        assert sample == stream.shards.read(number)


def test_killed_and_resumed_equals_uninterrupted_on_one_rank_and_on_two(tiny_model, damaged, tmp_path):
    options = {"on_damage": "skip", "epochs": 2, "micro_batch_size": 12}
    whole = tmp_path / "whole"
    fit_on_ranks(recipe(tiny_model, damaged, whole, **options), 1)
    found = skipped_in(whole)
    pairs = Shards(damaged, "train")
    assert sorted(line["key"] for line in found) == sorted(map(pairs.key, DAMAGED))
    assert {line["found"] for line in found} == {
        "altered since it was built (its hash differs from the index's)"
    }
    killed = recipe(tiny_model, damaged, tmp_path / "killed", **options)
    process = launch(flags(killed, tmp_path / "killed.yaml"), 0)
    until_logged(process, tmp_path / "killed", f'"samples": {found[1]["samples"] + BATCH}')
    os.killpg(process.pid, signal.SIGKILL)
    process.wait(60)
    assert status_of(tmp_path / "killed")["state"] == "running"
    assert newest(tmp_path / "killed").name > "samples-000000000000"
    fit_on_ranks(killed, 1)
    assert_bit_equal(tmp_path / "killed", whole)
    assert skipped_in(tmp_path / "killed") == found
    assert metrics(whole)[-2]["train/damaged_samples"] == len(DAMAGED)
    fit_on_ranks(recipe(tiny_model, damaged, tmp_path / "two", **options), 2)
    assert skipped_in(tmp_path / "two") == found
    curves = [
        [line["train/loss"] for line in metrics(run) if "train/loss" in line]
        for run in (tmp_path / "two", whole)
    ]
    assert curves[0] == pytest.approx(curves[1], rel=1e-5)


def test_damage_ends_the_run_which_resumes_without_the_sample(tiny_model, damaged, tmp_path, capfd):
    plan = recipe(tiny_model, damaged, tmp_path / "run", epochs=2)
    arguments = flags(plan, tmp_path / "recipe.yaml")
    result = call_here(main, *arguments[1:])
    assert_mistake(
        result, ": altered since it was built (", "or train without such samples: --on-damage skip"
    )
    assert re.search(r"\.tar: sample (\w{16}): ", result.stderr)[1] in map(
        Shards(damaged, "train").key, DAMAGED
    )
    gc.collect()  # which releases the lock
    call_main(main, *arguments[1:], "--on-damage", "skip")
    assert "skipped for damage: 5 samples; " in capfd.readouterr().out
    assert status_of(tmp_path / "run")["state"] == "finished"
    assert len(skipped_in(tmp_path / "run")) == len(DAMAGED)


def test_replayed_pairs_are_replaced_too(tiny_model, damaged, icon_shards, tmp_path):
    options = {"replay": str(damaged), "epochs": 4, "workers": 0, "on_damage": "skip"}
    trained(recipe(tiny_model, icon_shards, tmp_path / "run", **options), no_validation)
    found = skipped_in(tmp_path / "run")
    assert found
    assert {line["key"] for line in found} <= {*map(Shards(damaged, "train").key, DAMAGED)}


def test_a_damaged_validation_image_ends_the_run(tiny_model, icon_shards, tmp_path):
    folder = shutil.copytree(icon_shards, tmp_path / "shards")
    flip(Shards(folder, "val"), 2)
    plan = recipe(tiny_model, folder, tmp_path / "run", on_damage="skip")
    with pytest.raises(UserError, match=r"val-000000\.tar: sample \w{16}: altered") as caught:
        fit(plan, World(), validator(plan, World()))
    assert "--on-damage" not in str(caught.value)


def test_shards_without_a_whole_sample_end_the_run(icon_shards, tmp_path):
    folder = shutil.copytree(icon_shards, tmp_path / "shards")
    stream = pairs_of(recipe("m", folder, "r"))
    for tar in folder.glob("train/*.tar"):
        tar.write_bytes(bytes(tar.stat().st_size))
    with pytest.raises(
        UserError, match=r"altered since .*, and so are the 100 samples in its place; restore"
    ):
        stream[0]
    for tar in folder.glob("train/*.tar"):
        tar.write_bytes(b"")
    with pytest.raises(UserError, match="ends before byte"):
        stream[0]


def test_an_older_build_is_hashed_before_the_first_step(tiny_model, damaged, tmp_path):
    folder = as_an_older_build(shutil.copytree(damaged, tmp_path / "shards"))
    plan = recipe(tiny_model, folder, tmp_path / "run", on_damage="skip")
    with pytest.raises(UserError, match=r"train-\d+\.tar: altered since it was built \(its sha256"):
        fit(plan, World(), no_validation)
    assert not (tmp_path / "run").exists()
    assert np.array_equal(Shards(folder, "train").groups, Shards(damaged, "train").groups)
