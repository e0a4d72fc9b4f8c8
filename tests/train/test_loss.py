"""Our losses are open_clip's and the definition's, whatever is made of same_group; and same_group are who they should
be.
"""

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
from train.data.loader import TrainPairs, caption_number, train_loader
from train.data.order import Order
from train.loss import COLUMNS, clip_loss, loss_of, siglip_loss, train_logit_bias
from train.model.clip import load
from train.recipe import Augment, Captions, Recipe
from train.world import World

MATES = ("negative", "ignore", "positive")


def made_up(n: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    """Features, a scale and a bias; leaves with gradients to come."""
    generator = torch.Generator().manual_seed(0)
    features = [
        F.normalize(torch.randn(n, 8, generator=generator, dtype=torch.float64), dim=1) for _ in range(2)
    ]
    return [
        tensor.to(dtype).requires_grad_() for tensor in (*features, torch.tensor(14.3), torch.tensor(-7.1))
    ]


def strangers(n: int) -> torch.Tensor:
    return torch.arange(2 * n).view(n, 2)


def related(n: int = 12) -> torch.Tensor:
    """Groups of several, and captions of several that cross them."""
    return torch.stack([torch.arange(n) // 3, 100 + torch.arange(n) % 7], dim=1)


def assert_same(loss: torch.Tensor, ours: list, expected: torch.Tensor, theirs: list, **tolerance) -> None:
    loss.backward()
    expected.backward()
    torch.testing.assert_close(loss, expected, check_dtype=False, **tolerance)
    for tensor, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(tensor.grad, other.grad, check_dtype=False, **tolerance)


def test_loss_and_gradients_equal_open_clips():
    ours, theirs = made_up(12)[:3], made_up(12)[:3]
    assert_same(clip_loss(ours, strangers(12), World()), ours, open_clip.ClipLoss()(*theirs), theirs)


@pytest.mark.parametrize("n", [12, COLUMNS + 77])
def test_siglips_loss_and_gradients_equal_open_clips(n):
    """Of one block of texts, and of two."""
    ours, theirs = made_up(n), made_up(n)
    tolerance = {"rtol": 2e-5, "atol": 1e-7}
    assert_same(
        siglip_loss(ours, strangers(n), World()),
        ours,
        open_clip.loss.SigLipLoss()(*theirs),
        theirs,
        **tolerance,
    )


def clip_by_hand(outputs: list[torch.Tensor], mate: list[list[bool]], same_group: str) -> torch.Tensor:
    logits, losses = outputs[2] * outputs[0] @ outputs[1].T, []
    for scores in (logits, logits.T):
        for i, row in enumerate(scores):
            seen = [j for j in range(len(row)) if i == j or same_group != "ignore" or not mate[i][j]]
            wanted = [j for j in range(len(row)) if i == j or (same_group == "positive" and mate[i][j])]
            losses.append(
                -sum(row[j] - torch.stack([row[k] for k in seen]).logsumexp(0) for j in wanted) / len(wanted)
            )
    return sum(losses) / len(losses)


def siglip_by_hand(outputs: list[torch.Tensor], mate: list[list[bool]], same_group: str) -> torch.Tensor:
    logits, total = outputs[2] * outputs[0] @ outputs[1].T + outputs[3], 0
    for i, row in enumerate(logits):
        for j, logit in enumerate(row):
            if i == j or not mate[i][j] or same_group != "ignore":
                sign = 1 if i == j or (same_group == "positive" and mate[i][j]) else -1
                total = total + torch.log(1 + torch.exp(-sign * logit))
    return total / len(logits)


@pytest.mark.parametrize("same_group", MATES)
@pytest.mark.parametrize(
    ("loss", "by_hand", "n_outputs"), [(clip_loss, clip_by_hand, 3), (siglip_loss, siglip_by_hand, 4)]
)
def test_what_is_made_of_mates_is_the_definition(loss, by_hand, n_outputs, same_group):
    ids = related()
    mate = [
        [i != j and (a[0] == b[0] or a[1] == b[1]) for j, b in enumerate(ids.tolist())]
        for i, a in enumerate(ids.tolist())
    ]
    assert sum(map(sum, mate)) == 34
    ours, theirs = made_up(12)[:n_outputs], made_up(12, torch.float64)[:n_outputs]
    assert_same(
        loss(ours, ids, World(), same_group),
        ours,
        by_hand(theirs, mate, same_group),
        theirs,
        rtol=1e-5,
        atol=1e-6,
    )


@pytest.mark.parametrize("loss", [clip_loss, siglip_loss])
def test_without_mates_all_is_one_and_with_them_it_is_not(loss):
    outputs = made_up(12)
    alone, together = (
        [loss(outputs, ids, World(), same_group) for same_group in MATES]
        for ids in (strangers(12), related())
    )
    torch.testing.assert_close(alone, [alone[0]] * 3)
    assert torch.equal(together[0], alone[0])
    assert len({round(value.item(), 3) for value in together}) == 3


def test_a_recipe_names_its_loss_and_siglip_wants_a_bias(tiny_model, tmp_path):
    recipe, outputs, ids = Recipe("m", "d", "r"), made_up(12), related()
    assert torch.equal(loss_of(recipe)(outputs, ids, World()), clip_loss(outputs, ids, World()))
    other = loss_of(replace(recipe, loss="siglip", same_group="ignore"))
    assert torch.equal(other(outputs, ids, World()), siglip_loss(outputs, ids, World(), "ignore"))
    with pytest.raises(UserError, match=r"no logit_bias.*pass --loss clip, or a model .*SigLIP"):
        train_logit_bias(load(tiny_model), "siglip")
    clip = load(f"local-dir:{save_tiny(tmp_path, init_logit_bias=-10.0)}")
    for loss in ("clip", "siglip"):
        train_logit_bias(clip, loss)
        assert clip.towers.model.logit_bias.requires_grad == (loss == "siglip")


def test_a_batch_carries_groups_and_captions(tiny_model, icon_shards):
    shards = Shards(icon_shards, "train")
    order = Order(shards.shard_sizes, 48, 0)
    pairs = TrainPairs(shards, order, (16, 16), Augment(), Captions())
    batch = next(train_loader(pairs, load(tiny_model).tokenize, 0, 48, World(), 0))
    assert (batch.ids.dtype, batch.ids.shape) == (torch.int64, (48, 2))
    np.testing.assert_array_equal(
        batch.ids[:, 0], [shards.groups[order.sample_at(position)] for position in range(48)]
    )
    assert batch.ids[:, 1].tolist() == [caption_number(pairs[position][1]) for position in range(48)]


def test_a_captions_number_is_that_of_its_words_and_of_every_version():
    assert caption_number(" Arrow\n  LEFT") == caption_number("arrow left") == EXPECTED
    assert caption_number("arrow right") != EXPECTED
    assert 0 <= EXPECTED < 2**63
    assert math.log2(max(caption_number(str(number)) for number in range(100))) > 60


EXPECTED = 1855899454054532512
