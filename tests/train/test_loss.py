"""The losses equal open_clip's and their definitions, and a batch has the right ids for same_group."""

import math
from dataclasses import replace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny

from data_prep.errors import UserError
from data_prep.shards import Shards
from train.data.loader import TrainPairs, caption_id, train_loader
from train.data.order import Order
from train.loss import COLUMNS, clip_loss, loss_of, siglip_loss, train_logit_bias
from train.model.clip import load
from train.recipe import Augment, Captions, Recipe
from train.world import World

SAME_GROUP = ("negative", "positive")
LOSSES = {"clip": clip_loss, "siglip": siglip_loss}


def random_outputs(n: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Features of n pairs, a logit_scale and a logit_bias, as leaves."""
    generator = torch.Generator().manual_seed(0)
    features = [
        F.normalize(torch.randn(n, 8, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)
    ]
    outputs = (*features, torch.tensor(14.3), torch.tensor(-7.1))
    return [tensor.to(dtype).requires_grad_() for tensor in outputs]


def distinct_ids(n: int) -> torch.Tensor:
    return torch.arange(2 * n).view(n, 2)


def shared_ids(n: int = 12) -> torch.Tensor:
    """Groups of several pairs, and captions of several pairs that cross the groups."""
    return torch.stack([torch.arange(n) // 3, 100 + torch.arange(n) % 7], dim=1)


def assert_same(loss, outputs: list, expected, expected_outputs: list, **tolerance) -> None:
    """Two losses and their gradients."""
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, check_dtype=False, **tolerance)
    for output, other in zip(outputs, expected_outputs, strict=True):
        torch.testing.assert_close(output.grad, other.grad, check_dtype=False, **tolerance)


def test_clip_loss_equals_open_clips():
    ours, theirs = random_outputs(12)[:3], random_outputs(12)[:3]
    assert_same(clip_loss(ours, distinct_ids(12), World()), ours, open_clip.ClipLoss()(*theirs), theirs)


@pytest.mark.parametrize("n", [12, COLUMNS + 77])
def test_siglip_loss_equals_open_clips(n):
    """With one block of texts and with two."""
    ours, theirs = random_outputs(n), random_outputs(n)
    loss, expected = siglip_loss(ours, distinct_ids(n), World()), open_clip.loss.SigLipLoss()(*theirs)
    assert_same(loss, ours, expected, theirs, rtol=2e-5, atol=1e-7)


def clip_by_definition(outputs: list[torch.Tensor], positives: list[list[int]]) -> torch.Tensor:
    """Args:
    positives: for each pair the columns of its positives, itself among them.
    """
    logits, losses = outputs[2] * outputs[0] @ outputs[1].T, []
    for scores in (logits, logits.T):
        for row, columns in zip(scores, positives, strict=True):
            losses.append(-sum(row[j] - row.logsumexp(0) for j in columns) / len(columns))
    return sum(losses) / len(losses)


def siglip_by_definition(outputs: list[torch.Tensor], positives: list[list[int]]) -> torch.Tensor:
    logits, total = outputs[2] * outputs[0] @ outputs[1].T + outputs[3], 0
    for row, columns in zip(logits, positives, strict=True):
        for j, logit in enumerate(row):
            total = total + torch.log(1 + torch.exp(logit * (-1 if j in columns else 1)))
    return total / len(logits)


@pytest.mark.parametrize("same_group", SAME_GROUP)
@pytest.mark.parametrize(
    ("loss", "definition", "n_outputs"),
    [(clip_loss, clip_by_definition, 3), (siglip_loss, siglip_by_definition, 4)],
)
def test_losses_equal_their_definitions(loss, definition, n_outputs, same_group):
    ids = shared_ids()
    positives = [
        [j for j, b in enumerate(ids.tolist()) if a[0] == b[0] or a[1] == b[1]] for a in ids.tolist()
    ]
    assert sum(map(len, positives)) == 12 + 34
    if same_group == "negative":
        positives = [[i] for i in range(12)]
    ours, exact = random_outputs(12)[:n_outputs], random_outputs(12, torch.float64)[:n_outputs]
    loss, expected = loss(ours, ids, World(), same_group), definition(exact, positives)
    assert_same(loss, ours, expected, exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_same_group_matters_only_where_pairs_share_an_id(loss):
    outputs = random_outputs(12)
    distinct, shared = (
        [loss(outputs, ids, World(), same_group) for same_group in SAME_GROUP]
        for ids in (distinct_ids(12), shared_ids())
    )
    torch.testing.assert_close(distinct[0], distinct[1])
    assert torch.equal(shared[0], distinct[0])
    assert abs(shared[0] - shared[1]) > 1e-2


def losses_of_pairs(name: str, outputs: list[torch.Tensor], ids: torch.Tensor, same_group: str):
    """[n]: half of what image i is asked about all texts, and half of what text i is about all images."""
    logits = outputs[2] * outputs[0] @ outputs[1].T + (outputs[3] if name == "siglip" else 0)
    positive = (ids[:, None] == ids).any(2) if same_group == "positive" else torch.eye(len(ids)).bool()
    if name == "siglip":
        each = torch.log(1 + torch.exp(torch.where(positive, -logits, logits)))
        return (each.sum(1) + each.sum(0)) / 2
    targets = positive / positive.sum(1, keepdim=True)
    each = [-(targets * (rows - rows.logsumexp(1, keepdim=True))).sum(1) for rows in (logits, logits.T)]
    return (each[0] + each[1]) / 2


@pytest.mark.parametrize("same_group", ["negative", "positive"])
@pytest.mark.parametrize("name", LOSSES)
def test_the_loss_is_the_weighted_mean_over_pairs(name, same_group):
    weights = torch.tensor([1, 0, 0.5, 0.25, 1, 0, 0.1, 0.2, 0.3, 1, 0.7, 0.6])
    outputs, exact = random_outputs(12), random_outputs(12, torch.float64)
    loss = LOSSES[name](outputs, shared_ids(), World(), same_group, weights)
    pairs = losses_of_pairs(name, exact, shared_ids(), same_group)
    expected = (weights * pairs).sum() / weights.sum()
    torch.testing.assert_close(loss.double(), expected, rtol=1e-5, atol=1e-6)
    loss.backward()
    expected.backward()
    for output, other in zip(outputs[: 3 + (name == "siglip")], exact, strict=False):
        torch.testing.assert_close(output.grad.double(), other.grad, rtol=1e-5, atol=1e-6)


def test_weights_count_in_every_block_of_texts():
    n = COLUMNS + 7
    ids, weights = torch.arange(2 * n).view(n, 2), torch.arange(n) / n
    outputs = random_outputs(n, torch.float64)
    pairs = losses_of_pairs("siglip", outputs, ids, "negative")
    loss = siglip_loss(outputs, ids, World(), weights=weights)
    torch.testing.assert_close(loss, (weights * pairs).sum() / weights.sum(), check_dtype=False)


@pytest.mark.parametrize("name", LOSSES)
def test_a_batch_of_weight_zero_changes_nothing(name):
    outputs = random_outputs(12)
    loss = LOSSES[name](outputs, shared_ids(), World(), weights=torch.zeros(12))
    loss.backward()
    assert loss == 0
    assert all(output.grad is None or not output.grad.any() for output in outputs)


def test_a_recipe_names_its_loss():
    recipe, outputs, ids = Recipe("m", "d", "r"), random_outputs(12), shared_ids()
    assert torch.equal(loss_of(recipe)(outputs, ids, World()), clip_loss(outputs, ids, World()))
    other = loss_of(replace(recipe, loss="siglip", same_group="positive"))
    assert torch.equal(other(outputs, ids, World()), siglip_loss(outputs, ids, World(), "positive"))


def test_siglip_needs_a_logit_bias_and_alone_trains_it(tiny_model, tmp_path):
    with pytest.raises(UserError, match=r"no logit_bias.*pass --loss clip, or a model .*SigLIP"):
        train_logit_bias(load(tiny_model), "siglip")
    clip = load(f"local-dir:{save_tiny(tmp_path, init_logit_bias=-10.0)}")
    for loss in ("clip", "siglip"):
        train_logit_bias(clip, loss)
        assert clip.towers.model.logit_bias.requires_grad == (loss == "siglip")


def test_a_batch_has_group_and_caption_ids(tiny_model, icon_shards):
    shards = Shards(icon_shards, "train")
    order = Order(shards.shard_sizes, 48, 0)
    pairs = TrainPairs(shards, order, (16, 16), Augment(), Captions())
    batch = next(train_loader(pairs, load(tiny_model).tokenize, 0, 48, World(), 0))
    assert (batch.ids.dtype, batch.ids.shape) == (torch.int64, (48, 2))
    groups = [shards.groups[order.sample_at(position)] for position in range(48)]
    np.testing.assert_array_equal(batch.ids[:, 0], groups)
    assert batch.ids[:, 1].tolist() == [caption_id(pairs[position].caption) for position in range(48)]


def test_a_batch_has_a_patch_seed_for_each_pair(tiny_model, icon_shards):
    """A function of the position, whatever the batch size: distinct, and not negative."""
    shards = Shards(icon_shards, "train")
    seeds = []
    for batch_size in (48, 24):
        order = Order(shards.shard_sizes, batch_size, 0)
        pairs = TrainPairs(shards, order, (16, 16), Augment(), Captions())
        batches = train_loader(pairs, load(tiny_model).tokenize, 0, 48, World(), 0)
        seeds.append(torch.cat([batch.patch_seeds for batch in batches]))
    assert torch.equal(*seeds)
    assert seeds[0].dtype == torch.int64
    assert seeds[0].min() >= 0
    assert len(seeds[0].unique()) == 48


def test_a_caption_id_ignores_case_and_spaces():
    """Its value is fixed: runs that are resumed with another version of the code depend on it."""
    assert caption_id(" Arrow\n  LEFT") == caption_id("arrow left") == 1855899454054532512
    assert caption_id("arrow right") != caption_id("arrow left")
    ids = [caption_id(str(number)) for number in range(100)]
    assert 0 <= min(ids) < max(ids) < 2**63
    assert math.log2(max(ids)) > 60
