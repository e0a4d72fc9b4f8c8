"""The contrastive loss over the global batch, of which each rank holds its own rows."""

import torch
import torch.nn.functional as F

from train.world import World


def clip_loss(image_features: torch.Tensor, text_features: torch.Tensor, logit_scale: torch.Tensor, world: World) -> torch.Tensor:
    """The symmetric cross-entropy of this rank's pairs against all pairs (Radford et al. 2021, figure 3).

    Each rank scores its rows against the gathered columns. The mean of all ranks' losses is the loss of one process
    that holds the whole batch; with gradients averaged over ranks, as DDP does, so are the gradients, logit_scale's
    included.

    Args:
        image_features: fp32 [b, d], L2-normed, this rank's.
        text_features: fp32 [b, d], L2-normed, in the same order.
        logit_scale: fp32 [], already exponentiated.
    """
    width = image_features.shape[1]
    # One collective for both towers, so that all ranks meet in the same order backward as well.
    everything = world.gather(torch.cat([image_features, text_features], dim=1))
    all_image_features, all_text_features = everything[:, :width], everything[:, width:]
    labels = torch.arange(len(image_features), device=image_features.device) + world.rank * len(image_features)
    image_to_text = F.cross_entropy(logit_scale * image_features @ all_text_features.T, labels)
    text_to_image = F.cross_entropy(logit_scale * text_features @ all_image_features.T, labels)
    return (image_to_text + text_to_image) / 2
