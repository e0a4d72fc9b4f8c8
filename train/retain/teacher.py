"""A teacher: on the training pairs, similarities approach those of a frozen model, larger or earlier.

    teacher_weight * (KL of each image's softmax over all texts + KL of each text's over all images) / 2

from the teacher's softmax to the model's, over the global batch, each with its own logit_scale. This is the
contrastive relational distillation of CLIP-KD (Yang et al. 2024, arXiv:2307.12732). No feature is
compared with the other model's, so their widths may differ.
"""

import torch
import torch.nn.functional as F

from data_prep.errors import UserError
from train.data.augment import Augmentation
from train.data.loader import Batch
from train.device import use_bf16
from train.loss import Loss, similarities
from train.model.clip import Clip, load
from train.recipe import Recipe
from train.world import World

TEXT = "a red house beside a lake, "


def load_teacher(recipe: Recipe, clip: Clip, *, weights: bool) -> Clip:
    """The teacher of `clip`, on the CPU.

    Args:
        weights: as in train.model.clip.load.

    Raises:
        UserError: there is no such model, or the batch's tokens, which are those of `clip`, are not its own.
    """
    teacher = load(recipe.teacher, weights=weights, seed=recipe.seed)
    for text in (TEXT, 100 * TEXT):  # the longer one fills any context
        if not torch.equal(teacher.tokenize([text]), clip.tokenize([text])):
            raise UserError(
                f"--teacher {teacher.name}: has another tokenizer or context length than {clip.name}; pass a"
                " teacher with the same ones"
            )
    return teacher


class Teacher:
    """The frozen teacher, on the device."""

    def __init__(self, clip: Clip, recipe: Recipe, world: World):
        self.towers = clip.towers.to(world.device).requires_grad_(False).eval()
        self.towers.bf16 = use_bf16(recipe.precision, world.device)
        self.size, self.weight, self.world = clip.image_size, recipe.teacher_weight, world

    def beside(self, loss: Loss, chunks: list[Batch], augmentation: Augmentation) -> Loss:
        """`loss` and the weighted divergence of a batch from the teacher's similarities.

        Args:
            chunks: this rank's pairs. The teacher sees them as the model does, resized where its images have
                another size, and in its own normalisation.
        """
        with torch.no_grad():
            outputs = [self.towers(self._images(chunk, augmentation), chunk.tokens) for chunk in chunks]
            image_features, text_features, (logit_scale, *_), *_ = zip(*outputs, strict=True)
            taught = torch.cat(image_features), torch.cat(text_features), logit_scale
            targets = [logits.log_softmax(1) for logits in similarities(taught, self.world)]

        def both(outputs: list[torch.Tensor], *others, **weights) -> torch.Tensor:
            divergences = [
                F.kl_div(logits.log_softmax(1), target, log_target=True, reduction="batchmean")
                for logits, target in zip(similarities(outputs, self.world), targets, strict=True)
            ]
            return loss(outputs, *others, **weights) + self.weight * sum(divergences) / 2

        return both

    def _images(self, chunk: Batch, augmentation: Augmentation) -> torch.Tensor:
        images = augmentation.apply(chunk.images, chunk.augment_rows)
        if images.shape[2:] == self.size:
            return images
        return F.interpolate(images, self.size, mode="bicubic", antialias=True).clamp(0, 1)
