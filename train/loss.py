"""The contrastive losses over the global batch, of which each rank holds its own rows.

same_group decides how pairs of a batch that share a group (images of one thing) or a caption count for each
other.
Where pairs have weights, as in GCL (Zhu et al. 2024), the loss is the weighted mean over the global batch:
sum(w_i * loss_i) / sum(w_i), where loss_i is half that of image i with all texts and half that of text i with
all images. A pair of weight 0 adds no loss of its own, and is still among what other pairs are compared with.
To add a loss: a function here, in LOSSES, and its name in train.recipe.Recipe.loss.
"""

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

from data_prep.errors import UserError
from train.model.clip import Clip
from train.recipe import Recipe
from train.world import World

# of Towers' outputs, Batch.ids, world, and weights=Batch.weights
Loss = Callable[..., torch.Tensor]
COLUMNS = 1024  # texts that siglip_loss scores at once


def loss_of(recipe: Recipe) -> Loss:
    """The loss of a recipe.

    The mean of all ranks' losses is the loss of one process that holds the whole batch. With gradients
    averaged over ranks, as DDP does, this also holds for the gradients, those of logit_scale and logit_bias
    included.
    """
    return functools.partial(LOSSES[recipe.loss], same_group=recipe.same_group)


def train_logit_bias(clip: Clip, loss: str) -> None:
    """Train the model's logit_bias only where the loss uses it; DDP would wait for its gradient otherwise.

    Raises:
        UserError: the loss is siglip, and the model has none.
    """
    if (logit_bias := clip.towers.logit_bias) is not None:
        logit_bias.requires_grad_(loss == "siglip")
    elif loss == "siglip":
        raise UserError(
            f"{clip.name}: has no logit_bias, which --loss siglip needs; pass --loss clip, or a model that"
            " was trained with it, such as ViT-B-16-SigLIP2:webli (for random weights, init_logit_bias: -10"
            " in the model_cfg)"
        )


def clip_loss(
    outputs: Sequence[torch.Tensor],
    ids: torch.Tensor,
    world: World,
    same_group: str = "negative",
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Symmetric cross-entropy of this rank's pairs against all pairs, fp32 [] (Radford et al. 2021, figure
    3).

    Args:
        outputs: image_features and text_features, fp32 [b, d], L2-normed, of this rank; logit_scale, fp32 [],
            exponentiated. A logit_bias is ignored: a softmax does not change by it.
        ids: int64 [b, 2], Batch.ids of the same pairs.
        weights: fp32 [b], Batch.weights; None for equal ones.
        same_group: "negative": pairs like any other. "positive": the target is uniform over the pair itself
            and those that share an id with it (L_out of Khosla et al. 2020, equation 2, across the two towers
            as in UniCL, Yang et al. 2022).
    """
    labels = torch.arange(len(ids), device=ids.device) + world.rank * len(ids)
    if same_group == "positive":
        positive = _positives(ids, world.gather(ids), labels, same_group)
        labels = positive / positive.sum(1, keepdim=True)
    shares = None if weights is None else _shares(weights, world.gather(weights))
    halves = [_cross_entropy(logits, labels, shares) for logits in _similarities(outputs, world)]
    return (halves[0] + halves[1]) / 2


def _similarities(outputs: Sequence[torch.Tensor], world: World) -> Iterator[torch.Tensor]:
    """Logits of this rank's images and all texts, then of its texts and all images: twice fp32 [b, n].

    Args:
        outputs: as in clip_loss.
    """
    image_features, text_features, logit_scale, *_ = outputs
    width, device = image_features.shape[1], image_features.device
    # One collective for both towers, so that all ranks meet in the same order in the backward pass too.
    all_features = world.gather(torch.cat([image_features, text_features], dim=1))
    all_image_features, all_text_features = all_features[:, :width], all_features[:, width:]
    for features, columns in ((image_features, all_text_features), (text_features, all_image_features)):
        with fp32_products("highest", device):  # logits reach 100; TF32 would move them by a tenth
            logits = logit_scale * features @ columns.T
        yield logits


def siglip_loss(
    outputs: Sequence[torch.Tensor],
    ids: torch.Tensor,
    world: World,
    same_group: str = "negative",
    weights: torch.Tensor | None = None,
) -> torch.Tensor:
    """Sigmoid loss of this rank's images with the texts of all ranks, fp32 [] (Zhai et al. 2023, equation 1).

    Texts are scored in blocks, and again for the gradient, so memory holds one block of logits at a time.

    Args:
        outputs, ids, weights: as in clip_loss, and logit_bias, fp32 [].
        same_group: "negative" or "positive": the target of pairs that share an id.
    """
    image_features, text_features, logit_scale, logit_bias = outputs
    all_text_features, all_ids = world.gather(text_features), world.gather(ids)
    own = torch.arange(len(ids), device=ids.device) + world.rank * len(ids)
    all_weights = None if weights is None else world.gather(weights)
    total = image_features.new_zeros(())
    for start in range(0, len(all_ids), COLUMNS):
        texts = slice(start, start + COLUMNS)
        positive = _positives(ids, all_ids[texts], own - start, same_group)
        block = (image_features, all_text_features[texts], logit_scale, logit_bias, positive)
        if weights is not None:  # a score is of a pair's image and of another's text
            both = (weights[:, None] + all_weights[texts]) / 2
            block += (_shares(both, all_weights),)
        total = total + checkpoint(_sigmoid_sum, *block, use_reentrant=False, preserve_rng_state=False)
    return total / len(ids)


LOSSES = {"clip": clip_loss, "siglip": siglip_loss}


def _sigmoid_sum(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    positive: torch.Tensor,
    shares: torch.Tensor | None = None,
) -> torch.Tensor:
    # in here, so that it holds in the recomputation too
    with fp32_products("highest", image_features.device):
        logits = logit_scale * image_features @ text_features.T + logit_bias
    each = F.logsigmoid(torch.where(positive, logits, -logits))
    return -(each if shares is None else shares * each).sum()


def _cross_entropy(logits: torch.Tensor, labels: torch.Tensor, shares: torch.Tensor | None) -> torch.Tensor:
    if shares is None:
        return F.cross_entropy(logits, labels)
    return (shares * F.cross_entropy(logits, labels, reduction="none")).mean()


def _shares(weights: torch.Tensor, all_weights: torch.Tensor) -> torch.Tensor:
    """Weights, scaled so that those of the global batch have a mean of 1; 0 where all of these are 0."""
    total = all_weights.sum()
    return torch.where(total > 0, weights / total, 0) * len(all_weights)


def _positives(
    ids: torch.Tensor, column_ids: torch.Tensor, own: torch.Tensor, same_group: str
) -> torch.Tensor:
    """Which columns are positives of each row, bool [b, n].

    Args:
        own: int64 [b], the column of each row's own pair; out of range where that is in another block.
    """
    if same_group == "positive":
        return (ids[:, None] == column_ids).any(2)
    return own[:, None] == torch.arange(len(column_ids), device=own.device)


@contextlib.contextmanager
def fp32_products(precision: str, device: torch.device) -> Iterator[None]:
    """fp32 matrix products on a GPU: "high" uses TF32 (10 bits of mantissa), "highest" all 23 bits."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(before if device.type == "cpu" else precision)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
