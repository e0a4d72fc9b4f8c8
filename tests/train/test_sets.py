"""Several data sets in one run: shares of every batch, an order and groups of their own, and a run that is
exact in all that a run of one set is exact in.
"""

import itertools
import pickle
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import assert_mistake, build_icons, call_here
from runs import (
    assert_bit_equal,
    checkpoint,
    exported,
    fit_on_ranks,
    metrics,
    newest,
    no_validation,
    recipe,
    trained,
)

import train.__main__
from data_prep.errors import UserError
from data_prep.shards import Shards
from train.bench.peer import check_peer
from train.data.loader import TrainPairs, caption_id, train_loader
from train.data.order import Order
from train.data.sets import DataSets, MixedOrder, open_pairs, order_of
from train.data.shares import Sets, first_of, from_words, pairs_of, to_words
from train.export.folder import shards_of
from train.loop import fit
from train.publish.card import data_facts, recipe_of, recipe_table
from train.recipe import differences, parse, to_yaml
from train.run.records import read_environment
from train.tune.sweep import is_finished
from train.tune.table import results
from train.world import World

BASE = ["--model", "a:none", "--run", "r"]
SIZES = [np.array([7, 40, 3, 25]), np.array([20, 11])]


@pytest.fixture(scope="module")
def general(icon_folder, tmp_path_factory):
    """A second data set: the same icons in another split and order, of which about 100 are in train."""
    folder = tmp_path_factory.mktemp("general") / "shards"
    build_icons(icon_folder, folder, seed=1, val=0.3, test=0.3)
    return folder


@pytest.fixture
def mixed(icon_shards, general) -> dict[str, float]:
    return {str(icon_shards): 0.7, str(general): 0.3}  # 17 and 7 of 24


# ---- the value of `data`


def test_yaml_and_flags_are_one_value(tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text("data:\n  shards/icons: 0.7\n  a=b: 3e-1\n")
    expected = {"shards/icons": 0.7, "a=b": 0.3}
    assert parse([str(file), *BASE]).data == expected
    typed = parse([*BASE, "--data", "shards/icons=0.7", "a=b=0.3"])
    assert typed.data == expected
    assert parse([str(file), *BASE, "--data", "d"]).data == "d"
    assert parse([*BASE, "--data", "x", "--data", "shards/icons=0.7", "a=b=0.3"]) == typed
    file.write_text(to_yaml(typed))
    assert parse([str(file)]) == typed
    assert "data:\n  shards/icons: 0.7\n  a=b: 0.3\n" in file.read_text()


@pytest.mark.parametrize("folder", ["d", "lr=1e-5", "a=1", "a b=0.5/c", "=0.5"])
def test_one_word_is_a_folder_whatever_it_looks_like(tmp_path, folder):
    typed = parse([*BASE, "--data", folder])
    assert typed.data == folder
    (tmp_path / "a.yaml").write_text(to_yaml(typed))
    assert parse([str(tmp_path / "a.yaml")]) == typed
    (tmp_path / "a.yaml").write_text(to_yaml(typed).replace(f"data: {folder}", f"data: {{'{folder}': 1}}"))
    assert parse([str(tmp_path / "a.yaml")]) == typed


@pytest.mark.parametrize(
    ("words", "rule"),
    [
        ("a=0.7 b=0.4", "--data a=0.7 b=0.4: shares of different folders must be above 0 and sum to 1"),
        ("a=1.5 b=-0.5", "of different folders must be above 0 and sum to 1"),
        ("a=1 b=0", "of different folders must be above 0 and sum to 1"),
        ("a=0.5 a/=0.5", "of different folders must be above 0 and sum to 1"),
        ("a=nan b=1", "of different folders must be above 0 and sum to 1"),
        ("a b", "--data a: has no share, and of several data sets each must"),
        ("a=0.5 b", "--data b: has no share"),
        ("a=0.5 =0.5", "--data =0.5: has no share"),
        ("a=0.5 a=0.5", "--data a: is named twice"),
        ("", "must be a folder of shards, or several with shares"),
    ],
)
def test_a_mistake_in_the_shares_is_reported(words, rule):
    said = call_here(train.__main__.main, "demo", *BASE, "--data", *words.split())
    assert_mistake(said, *rule.split())


@pytest.mark.parametrize(("data", "said"), [("{a: 0.5}", "shares must sum to 1"), ("{}", "must be a folder")])
def test_a_mistake_in_a_recipe_file_is_reported(tmp_path, data, said):
    (tmp_path / "a.yaml").write_text(f"data: {data}\n")
    assert_mistake(call_here(train.__main__.main, tmp_path / "a.yaml", *BASE), *said.split())


def test_a_batch_has_the_nearest_whole_numbers_of_pairs():
    """Largest remainder; the sum is the batch."""
    assert pairs_of("d", 24) == {"d": 24}
    assert [*pairs_of({"a": 0.8, "b": 0.2}, 128).values()] == [102, 26]
    assert [*pairs_of({"a": 0.29, "b": 0.71}, 100).values()] == [29, 71]
    assert [*pairs_of({"a": 1 / 3, "b": 1 / 3, "c": 1 / 3}, 128).values()] == [43, 43, 42]
    for shares in itertools.product((0.1, 0.15, 1 / 3, 0.5), repeat=2):
        data: Sets = {"a": shares[0], "b": shares[1] * (1 - shares[0])}
        data["c"] = 1 - sum(data.values())
        for batch in (2, 7, 24, 384, 4097):
            pairs = pairs_of(data, batch)
            assert sum(pairs.values()) == batch
            assert all(abs(n - data[folder] * batch) < 1 for folder, n in pairs.items())


def test_words_are_read_as_they_are_written():
    for data in ("a=b", {"a=b": 0.25, "c d": 0.75}):
        assert from_words(to_words(data)) == data


# ---- order and pairs


def test_each_set_has_its_share_of_every_batch_and_an_order_of_its_own():
    order = MixedOrder(SIZES, [7, 3], seed=5)
    samples = [order.sample_at(position) for position in range(10 * 40)]
    batches = np.array(samples).reshape(-1, 10)
    assert ((batches < 75).sum(1) == 7).all()
    assert (order.steps_per_epoch, order.samples_per_epoch, order.n_samples) == (10, 100, 106)
    first = [number for number in samples if number < 75]
    alone = Order(SIZES[0], 7, 5)  # the first set is read as if it were alone
    assert first == [alone.sample_at(position) for position in range(7 * 40)]
    second = [number - 75 for number in samples if number >= 75]
    for epoch in range(4):  # 10 steps of 3 pairs, of 31
        assert len({*second[30 * epoch : 30 * (epoch + 1)]}) == 30
    assert {*second} == {*range(31)}
    assert second[:30] != second[30:60]


def test_sets_of_the_same_size_are_not_read_in_the_same_order():
    order = MixedOrder([SIZES[0], SIZES[0]], [5, 5], seed=0)
    samples = [order.sample_at(position) for position in range(100)]
    assert [n for n in samples if n < 75] != [n - 75 for n in samples if n >= 75]


def test_the_order_is_a_function_of_seed_and_position():
    order = MixedOrder(SIZES, [7, 3], seed=5)
    again = pickle.loads(pickle.dumps(order))  # as a loader worker gets it
    positions = [399, 0, 57, 200, 13]
    expected = [MixedOrder(SIZES, [7, 3], seed=5).sample_at(position) for position in positions]
    assert [order.sample_at(position) for position in positions] == expected
    assert [again.sample_at(position) for position in positions] == expected
    assert order.numbers(np.array(positions)).tolist() == expected
    assert [MixedOrder(SIZES, [7, 3], seed=6).sample_at(position) for position in positions] != expected


def test_the_order_is_fixed():
    """A stored run resumes in it, so a change here is a change of the format."""
    order = MixedOrder([np.array([3, 4]), np.array([5])], [2, 1], seed=0)
    assert [order.sample_at(position) for position in range(9)] == [2, 7, 0, 1, 9, 6, 4, 10, 3]


def test_every_part_of_a_batch_has_about_its_share():
    """Ranks and micro batches are consecutive pairs of a batch."""
    order = MixedOrder([np.array([300]), np.array([100]), np.array([90])], [60, 25, 15], seed=0)
    sets = np.searchsorted([300, 400, 490], [order.sample_at(place) for place in range(100)], side="right")
    for parts in (2, 4, 5, 10):
        for part in sets.reshape(parts, -1):
            assert np.abs(np.bincount(part, minlength=3) - np.array([60, 25, 15]) / parts).max() <= 1.01


def test_groups_of_two_sets_differ_and_captions_do_not(icon_shards, general, mixed, tmp_path):
    plan = recipe("m", mixed, "r")
    pairs = open_pairs(plan)
    assert isinstance(pairs, DataSets)
    sets = [Shards(folder, "train") for folder in mixed]
    n = len(sets[0])
    assert len(pairs) == n + len(sets[1])
    for number, (shards, own) in ((0, (sets[0], 0)), (n - 1, (sets[0], n - 1)), (n + 3, (sets[1], 3))):
        assert pairs.read(number) == shards.read(own)
        assert pairs.key(number) == shards.key(own)
        assert pairs.locate(number)[0].folder == shards.folder
    assert {*sets[0].groups} & {*sets[1].groups}  # the same numbers
    assert not {*pairs.groups[:n]} & {*pairs.groups[n:]}
    for part, shards in ((pairs.groups[:n], sets[0]), (pairs.groups[n:], sets[1])):
        same = shards.groups[:, None] == shards.groups
        assert np.array_equal(part[:, None] == part, same)
    order = order_of(plan, pairs)
    stream = TrainPairs(pairs, order, (16, 16), plan.augment, plan.captions)
    captions = [(stream[position].caption, order.sample_at(position) < n) for position in range(240)]
    both = {text for text, first in captions if first} & {text for text, first in captions if not first}
    assert both  # some icons are in both sets, and a batch's ids say that their captions are the same
    tokenize = lambda texts: torch.zeros(len(texts), 4, dtype=torch.long)  # noqa: E731
    ids = torch.cat([batch.ids for batch in train_loader(stream, tokenize, 0, 240, World(), 0)])
    assert [int(each) for each in ids[:, 1]] == [caption_id(text) for text, _ in captions]
    assert [int(each) for each in ids[:, 0]] == [int(pairs.groups[order.sample_at(p)]) for p in range(240)]


# ---- runs

SHORT = {"epochs": 2, "keep_checkpoints": 20, "workers": 0, "same_group": "positive"}


@pytest.fixture(scope="module")
def whole(tiny_model, icon_shards, general, tmp_path_factory):
    """An uninterrupted run of both sets, with validations."""
    data = {str(icon_shards): 0.7, str(general): 0.3}
    plan = recipe(tiny_model, data, tmp_path_factory.mktemp("whole") / "run", **SHORT)
    return trained(plan).folder


def test_one_set_with_share_1_gives_the_bits_of_a_folder(tiny_model, icon_shards, tmp_path):
    for name, data in (("folder", str(icon_shards)), ("share", {str(icon_shards): 1.0})):
        plan = recipe(tiny_model, data, tmp_path / name, **SHORT | {"epochs": 1})
        trained(plan, no_validation)
    assert_bit_equal(tmp_path / "folder", tmp_path / "share")


def test_resumed_equals_uninterrupted(whole, tiny_model, mixed, tmp_path):
    """In the first epoch of both sets, with loader workers and with the second set in another place."""
    parts = shutil.copytree(whole, tmp_path / "parts", symlinks=True)
    samples = int(newest(whole).name.removeprefix("samples-"))
    assert samples == 2 * 9 * 24  # 162 icons, 17 at a time; the 92 of the second set end after 13 steps
    for step in range(14):
        shutil.rmtree(checkpoint(parts, samples - 24 * step))
    (parts / "status.json").unlink()
    icons, general = mixed
    moved = {icons: 0.7, str(shutil.copytree(general, tmp_path / "moved")): 0.3}
    trained(recipe(tiny_model, moved, parts, **SHORT | {"workers": 2}))
    assert_bit_equal(whole, parts)


def test_two_ranks_and_chunks_equal_one_process(whole, tiny_model, mixed, tmp_path):
    """Neither 17 nor 7 pairs can be divided by 2, and chunks have 5 of 12 pairs."""
    plan = recipe(tiny_model, mixed, tmp_path / "two", **SHORT | {"micro_batch_size": 5})
    fit_on_ranks(plan, 2)
    curves = [
        [{name: line[name] for name in line if name.startswith("train/")} for line in metrics(folder)]
        for folder in (whole, tmp_path / "two")
    ]
    for line, other in zip(*curves, strict=True):
        assert line == pytest.approx(other, rel=2e-5, abs=1e-9)
    weights, others = (exported(newest(folder)) for folder in (whole, tmp_path / "two"))
    assert all(torch.allclose(tensor, others[name], atol=1e-4) for name, tensor in weights.items())


def test_both_sets_are_said_at_the_start(tiny_model, mixed, tmp_path, capsys):
    plan = recipe(tiny_model, mixed, tmp_path / "run", **SHORT | {"epochs": 1})
    trained(plan, no_validation)
    icons, general = (re.escape(folder) for folder in mixed)
    said = capsys.readouterr().out
    n, other = (len(Shards(folder, "train")) for folder in mixed)
    epochs = (n // 17) / (other // 7)
    first, second = "a share of 0.708, not 0.7", "a share of 0.292, not 0.3"
    assert re.search(rf"{icons}: 17 of 24 pairs of each batch \({first}\), 1.0 epochs of {n} images", said)
    expected = rf"{general}: 7 of 24 pairs of each batch \({second}\), {epochs:.1f} epochs of {other} images"
    assert re.search(expected, said), said


def test_validation_and_the_exported_weights_are_of_the_first_set(whole, icon_shards):
    lines = [line for line in metrics(whole) if "val/mean/R@1" in line]
    assert [line["samples"] for line in lines] == [0, 216, 432]
    assert shards_of(whole) == icon_shards
    plan = parse([str(whole / "recipe.yaml")])
    assert first_of(plan.data) == str(icon_shards)
    said = train.__main__.summary(fit(plan, World(), no_validation))
    assert f"eval retrieval {whole} --data {icon_shards} --split test" in said


def test_a_run_does_not_resume_with_other_sets_or_shares(
    whole, tiny_model, icon_shards, general, mixed, tmp_path
):
    run = shutil.copytree(whole, tmp_path / "run", symlinks=True)
    (run / "status.json").unlink()

    def resume(data: Sets) -> str:
        with pytest.raises(UserError) as error:
            fit(recipe(tiny_model, data, run, **SHORT), World(), no_validation)
        return str(error.value)

    icons, other = str(icon_shards), str(general)
    copy = str(shutil.copytree(icon_shards, tmp_path / "copy"))
    assert resume({icons: 0.7, copy: 0.3}).startswith(f"{copy}: not the shards that {run} was started with")
    assert resume({other: 0.7, copy: 0.3}).startswith(f"{other}, {copy}: not the shards that")
    before = f"data: {icons}=0.7 {other}=0.3 before"
    assert f"{before}, {other}=0.3 {icons}=0.7 now" in resume({other: 0.3, icons: 0.7})
    assert f"{before}, {icons}=0.8 {other}=0.2 now" in resume({icons: 0.8, other: 0.2})
    assert f"{before}, {icons} now" in resume(icons)
    plan = recipe(tiny_model, {icons: 0.7, copy: 0.3}, run, **SHORT)
    with pytest.raises(UserError, match="not the shards that"):  # a sweep asks before it starts
        is_finished(plan, 1)
    plan = parse([str(run / "recipe.yaml")])
    assert plan.data == mixed
    assert differences(plan, plan) == []


@pytest.mark.parametrize(
    ("shares", "batch", "said"),
    [
        ((0.99, 0.01), 24, "its share of 0.01 is none of the 24 pairs of a batch; pass a larger share"),
        ((0.1, 0.9), 200, r"\d+ training images are fewer than the 180 that each batch takes of them"),
        ((0.95, 0.05), 240, "162 training images are fewer than the 228 that each batch takes"),
    ],
)
def test_a_set_that_cannot_fill_its_part_is_named(
    tiny_model, icon_shards, general, tmp_path, shares, batch, said
):
    data = dict(zip((str(icon_shards), str(general)), shares, strict=True))
    plan = recipe(tiny_model, data, tmp_path / "run", global_batch_size=batch)
    with pytest.raises(UserError, match=said):
        fit(plan, World(), no_validation)
    plan = recipe(tiny_model, {str(icon_shards): 0.5, str(tmp_path / "no"): 0.5}, tmp_path / "run")
    with pytest.raises(UserError, match=r"no: no manifest\.json"):
        fit(plan, World(), no_validation)
    assert not (tmp_path / "run").exists()


# ---- who else reads the recipe


def test_records_and_card_name_all_sets(whole, mixed, tmp_path):
    fingerprints = [Shards(folder, "train").fingerprint for folder in mixed]
    assert read_environment(whole)["data_fingerprint"].split() == fingerprints
    assert [str(shards_of(whole, number)) for number in (0, 1)] == [*mixed]
    facts = data_facts(whole)
    assert facts["sha256"] == fingerprints[0]
    expected = [("shards 1", "70 %", fingerprints[0]), ("shards 2", "30 %", fingerprints[1])]
    assert [(each["name"], each["percent"], each["sha256"]) for each in facts["sets"]] == expected
    assert facts["inputs"] == ["icons.csv"]
    table = recipe_table(recipe_of(whole))
    assert re.search(r"\| data +\| `shards 1=0\.7 shards 2=0\.3` ", table), table
    assert str(tmp_path.parent) not in table


def test_a_table_of_runs_has_a_column_of_shares(tmp_path):
    recipes = {
        name: parse([*BASE, "--data", *words.split()])
        for name, words in (("a", "b=0.7 c=0.3"), ("b", "b=0.8 c=0.2"), ("c", "b"))
    }
    varied = {row["run"]: row["varied"] for row in results(tmp_path, recipes)}
    assert varied == {"a": {"shares": "0.7 0.3"}, "b": {"shares": "0.8 0.2"}, "c": {"shares": "1.0"}}


def test_open_clip_train_is_not_measured_on_several_sets(mixed):
    with pytest.raises(UserError, match="open_clip_train cannot give data sets shares of a batch"):
        check_peer(recipe("m", mixed, "r"))
