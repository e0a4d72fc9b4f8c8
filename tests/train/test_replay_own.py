"""replay: own holds the features of the training images, and replay_texts those of a file's sentences."""

import shutil

import pytest
import torch
from runs import assert_bit_equal, checkpoint, fit_on_ranks, metrics, no_validation, recipe, trained

from data_prep.errors import UserError
from data_prep.shards import Shards
from train.data.augment import Augmentation
from train.data.captions import caption
from train.data.loader import TrainPairs
from train.data.order import Order
from train.loop import fit
from train.model.clip import load
from train.recipe import Optim, parse
from train.retain.base import frozen_copy
from train.retain.replay import Replay, read_texts
from train.world import World

SENTENCES = ["a dog sleeps", "two boats, a harbour", "snow on a mountain", "bread", "a red car"]
OWN = {"replay": "own", "replay_weight": 2.0, "workers": 0}


@pytest.fixture(scope="module")
def sentences(tmp_path_factory):
    file = tmp_path_factory.mktemp("sentences") / "general.txt"
    file.write_bytes("\r\n".join(["\ufeffa dog sleeps ", *SENTENCES[1:3], "", *SENTENCES[3:]]).encode())
    return file


def moved(clip):
    with torch.no_grad():
        for parameter in clip.towers.parameters():
            parameter += 0.05 * torch.sin(100 * parameter)
    clip.towers.zero_grad()
    return clip.towers


@pytest.mark.parametrize("texts", [[], SENTENCES], ids=["images", "images and sentences"])
def test_gradient_equals_the_formula(tiny_model, icon_shards, tmp_path, texts):
    """Of the same positions of the training stream, read in batches of a quarter; without sentences, nothing
    reaches the text tower.
    """
    plan = recipe(tiny_model, icon_shards, tmp_path, **OWN)
    base = frozen_copy(load(tiny_model).towers, plan, torch.device("cpu"))
    pairs, clip = Shards(icon_shards, "train"), load(tiny_model)
    results = []
    for micro_batch_size in (6, 4):
        replay = Replay(pairs, texts, base, clip := load(tiny_model), plan, World(), 48, 480)
        loss = replay.backward(moved(clip), micro_batch_size)
        results.append((loss, {name: each.grad for name, each in clip.towers.named_parameters()}))

    stream = TrainPairs(
        pairs, Order(pairs.shard_sizes, 6, plan.seed), clip.image_size, plan.augment, plan.captions
    )
    chosen = [stream[position] for position in range(12, 18)]
    rows = torch.tensor([pair.augment_row for pair in chosen])
    images = torch.stack([pair.image for pair in chosen]).permute(0, 3, 1, 2)
    images = Augmentation(plan.augment).apply(images, rows)
    drawn = [
        caption(texts[pair.patch_seed % 5], plan.captions, pair.patch_seed) if texts else pair.caption
        for pair in chosen
    ]
    assert len(set(drawn)) > 2
    tokens, towers = clip.tokenize(drawn), moved(load(tiny_model))
    expected = (towers.image_features(images) - base.image_features(images)).pow(2).sum(1).mean()
    if texts:
        expected = expected + (towers.text_features(tokens) - base.text_features(tokens)).pow(2).sum(1).mean()
    (2 * expected).backward()
    assert expected > 0.01
    wanted = {name: each.grad for name, each in towers.named_parameters()}
    assert (wanted["model.text_projection"] is not None) == bool(texts)
    largest = max(gradient.abs().max().item() for gradient in wanted.values() if gradient is not None)
    for loss, gradients in results:
        torch.testing.assert_close(loss, expected.detach(), rtol=1e-5, atol=0)
        for name, gradient in wanted.items():
            if gradient is None:
                assert gradients[name] is None or not gradients[name].any(), name
            else:
                torch.testing.assert_close(gradients[name], gradient, rtol=1e-4, atol=1e-6 * largest)


def test_resumed_equals_uninterrupted_on_moved_files(tiny_model, icon_shards, sentences, tmp_path):
    options = {"epochs": 1, "keep_checkpoints": 9, "replay_texts": str(sentences), **OWN, "workers": 1}
    whole = trained(recipe(tiny_model, icon_shards, tmp_path / "whole", **options), no_validation).folder
    parts = shutil.copytree(whole, tmp_path / "parts", symlinks=True)
    for samples in (96, 120, 144):
        shutil.rmtree(checkpoint(parts, samples))
    (parts / "status.json").unlink()
    options |= {"replay_texts": str(shutil.copy(sentences, tmp_path / "moved.txt")), "workers": 0}
    trained(recipe(tiny_model, icon_shards, parts, **options), no_validation)
    assert_bit_equal(whole, parts)


@pytest.mark.parametrize("with_texts", [False, True], ids=["images", "images and sentences"])
def test_two_ranks_have_the_curve_of_one_process(tiny_model, icon_shards, sentences, tmp_path, with_texts):
    # a small eps would make a step of the rounding noise that the replay gradient of unseen words is at first
    options = {"epochs": 1, "save_every_minutes": 9, "optim": Optim(lr=1e-3, eps=1e-4), **OWN}
    options |= {"replay_texts": str(sentences)} if with_texts else {}
    plans = [recipe(tiny_model, icon_shards, tmp_path / name, **options) for name in ("one", "two")]
    trained(plans[0], no_validation)
    fit_on_ranks(plans[1], 2)
    one, two = (
        [line["train/replay_loss"] for line in metrics(tmp_path / name) if "train/replay_loss" in line]
        for name in ("one", "two")
    )
    assert one[0] < 1e-12 < 1e-6 < min(one[1:])
    assert one == pytest.approx(two, rel=2e-4, abs=1e-9)


def test_mistakes(tiny_model, icon_shards, sentences, tmp_path):
    (tmp_path / "empty.txt").write_text(" \n\n")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    for name, words in (
        ("nowhere.txt", r"cannot be read \(No such file"),
        ("empty.txt", "has no sentence"),
        ("latin.txt", "not in UTF-8"),
    ):
        with pytest.raises(UserError, match=f"{name}: {words}"):
            read_texts(str(tmp_path / name))
    assert read_texts(str(sentences))[0] == SENTENCES
    words = ["--model", "m", "--data", "d", "--run", "r", "--replay-texts", "f"]
    with pytest.raises(UserError, match=r"--replay-texts f: needs --replay SHARDS, or --replay own"):
        parse(words)
    with pytest.raises(UserError, match=r"--replay own: a locked image tower forgets nothing"):
        parse([*words[:6], "--replay", "own", "--lock", "image"])
    options = {"epochs": 1, "save_every_minutes": 9, "replay_texts": str(sentences), **OWN}
    trained(recipe(tiny_model, icon_shards, tmp_path / "run", **options), no_validation)
    (tmp_path / "run" / "status.json").unlink()
    (tmp_path / "other.txt").write_text("another sentence")
    for changes, words in (
        ({"replay_texts": ""}, r"no --replay-texts: not the sentences that .* the old --replay-texts"),
        ({"replay_texts": str(tmp_path / "other.txt")}, r"other\.txt: not the sentences"),
        ({"replay": str(icon_shards)}, "not the shards that .* the old --replay"),
    ):
        with pytest.raises(UserError, match=words):
            fit(
                recipe(tiny_model, icon_shards, tmp_path / "run", **options | changes), World(), no_validation
            )
