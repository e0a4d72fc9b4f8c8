"""The contrastive losses over the global batch, of which each rank holds its own rows; and what they make of
same_group.

Mates are two pairs of a batch that share a group (drawings of one thing) or a caption: each one's text fits
the other's picture."""

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

Loss = Callable[
    [Sequence[torch.Tensor], torch.Tensor, World], torch.Tensor
]  # of what Towers gives, ids, world
COLUMNS = 1024  # texts that siglip_loss scores at once


def loss_of(recipe: Recipe) -> Loss:
    """The loss that a recipe asks for.

    The mean of all ranks' losses is the loss of one process that holds the whole batch; with gradients
    averaged over ranks, as DDP does, so are the gradients, those of logit_scale and logit_bias included."""
    return functools.partial(
        {"clip": clip_loss, "siglip": siglip_loss}[recipe.loss], same_group=recipe.same_group
    )


def train_logit_bias(clip: Clip, loss: str) -> None:
    """Train the model's logit_bias where the loss has one; a softmax does not change by it, and DDP would
    wait for its gradient.

    Raises:
        UserError: the loss is siglip, and the model has none.
    """
    if (logit_bias := clip.towers.logit_bias) is not None:
        logit_bias.requires_grad_(loss == "siglip")
    elif loss == "siglip":
        raise UserError(
            f"{clip.name}: no logit_bias, which --loss siglip adds to every logit; pass --loss clip, or a"
            " model that was trained so, as ViT-B-16-SigLIP2:webli (for random weights: init_logit_bias: -10"
            " in the model_cfg)"
        )


def clip_loss(
    outputs: Sequence[torch.Tensor], ids: torch.Tensor, world: World, same_group: str = "negative"
) -> torch.Tensor:
    """The symmetric cross-entropy of this rank's pairs against all pairs, fp32 [] (Radford et al. 2021,
    figure 3).

    Args:
        outputs: image_features and text_features, fp32 [b, d], L2-normed, this rank's, in the same order;
            logit_scale, fp32 [], already exponentiated; a logit_bias is not looked at, no softmax changes by
            it.
        ids: int64 [b, 2], train.data.loader.Batch's, of the same pairs.
        same_group: "negative": pairs like any other. "ignore": left out of the softmax. "positive": the target
            is uniform over the pair itself and its same_group (L_out of Khosla et al. 2020, equation 2, across the
            two towers as in Yang et al. 2022, UniCL).
    """
    image_features, text_features, logit_scale, *_ = outputs
    width, device = image_features.shape[1], image_features.device
    # One collective for both towers, so that all ranks meet in the same order backward as well.
    everything = world.gather(torch.cat([image_features, text_features], dim=1))
    all_image_features, all_text_features = everything[:, :width], everything[:, width:]
    labels, left_out = (
        torch.arange(len(image_features), device=device) + world.rank * len(image_features),
        None,
    )
    if same_group != "negative":
        is_positive, left_out = _relations(ids, world.gather(ids), labels, same_group)
        if same_group == "positive":
            labels = is_positive / is_positive.sum(1, keepdim=True)
    halves = []
    for features, columns in ((image_features, all_text_features), (text_features, all_image_features)):
        with fp32_products("highest", device):  # logits reach 100, and TF32 would move them by a tenth
            logits = logit_scale * features @ columns.T
        halves.append(
            F.cross_entropy(logits if left_out is None else logits.masked_fill(left_out, -torch.inf), labels)
        )
    return (halves[0] + halves[1]) / 2


def siglip_loss(
    outputs: Sequence[torch.Tensor], ids: torch.Tensor, world: World, same_group: str = "negative"
) -> torch.Tensor:
    """A yes or no for each of this rank's pictures with each text of all ranks, fp32 [] (Zhai et al. 2023,
    equation 1, algorithm 1).

    Blocks of texts are scored one after another, and again for the gradient, so memory holds one of them at a
    time.

    Args:
        outputs, ids: as clip_loss has them, and logit_bias, fp32 [].
        same_group: "negative": answered with no, as any other two. "ignore": not asked about. "positive":
            answered with yes.
    """
    image_features, text_features, logit_scale, logit_bias = outputs
    all_text_features, all_ids = world.gather(text_features), world.gather(ids)
    own = torch.arange(len(ids), device=ids.device) + world.rank * len(ids)
    total = image_features.new_zeros(())
    for start in range(0, len(all_ids), COLUMNS):
        some = slice(start, start + COLUMNS)
        block = (
            image_features,
            all_text_features[some],
            logit_scale,
            logit_bias,
            ids,
            all_ids[some],
            own - start,
            same_group,
        )
        total = total + checkpoint(_sigmoid_sum, *block, use_reentrant=False, preserve_rng_state=False)
    return total / len(ids)


def _sigmoid_sum(
    image_features: torch.Tensor,
    text_features: torch.Tensor,
    logit_scale: torch.Tensor,
    logit_bias: torch.Tensor,
    ids: torch.Tensor,
    text_ids: torch.Tensor,
    own: torch.Tensor,
    same_group: str,
) -> torch.Tensor:
    with fp32_products(
        "highest", image_features.device
    ):  # here, so that it holds when this is computed again
        logits = logit_scale * image_features @ text_features.T + logit_bias
    is_positive, left_out = _relations(ids, text_ids, own, same_group)
    losses = -F.logsigmoid(torch.where(is_positive, logits, -logits))
    return (losses if left_out is None else losses.masked_fill(left_out, 0)).sum()


def _relations(
    ids: torch.Tensor, column_ids: torch.Tensor, own: torch.Tensor, same_group: str
) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Which columns each row is to be near to, and which the loss leaves out, bool [b, n]; None for no
    column.

    Args:
        own: int64 [b], the column of each row's own pair; one that is not there matches none.
    """
    is_own = own[:, None] == torch.arange(len(column_ids), device=own.device)
    if same_group == "negative":
        return is_own, None
    are_mates = (ids[:, None] == column_ids).any(2)
    return (are_mates, None) if same_group == "positive" else (is_own, are_mates & ~is_own)


@contextlib.contextmanager
def fp32_products(precision: str, device: torch.device) -> Iterator[None]:
    """fp32 matrix products of a GPU in here: "high" by tensor cores (TF32, 10 bits of mantissa), "highest"
    with all 23.
    """
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(precision if device.type == "cuda" else before)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
