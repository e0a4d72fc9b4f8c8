"""Both towers of an open_clip model in one forward, the same for training and evaluation."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from train.model.attention import pack_attention
from train.model.patch_dropout import PatchDropout
from train.model.text import encode_text

# torch's, open_clip's, timm's, Hugging Face's
DROPOUT_RATES = ("p", "prob", "drop_prob", "dropout", "attn_drop_p")


class Towers(nn.Module):
    """An open_clip model whose features are fp32 and L2-normed.

    Args:
        model: any open_clip model with encode_image, encode_text and logit_scale; its attention is packed.
        mean, std: per channel, of the model's preprocessing.
        context_length: tokens of a caption, as the tokenizer makes them; that of the model by default, which
            for Hugging Face's towers is the number of positions.
    """

    def __init__(
        self,
        model: nn.Module,
        mean: tuple[float, ...],
        std: tuple[float, ...],
        context_length: int | None = None,
    ):
        super().__init__()
        pack_attention(model)
        self.model = model
        self.context_length = context_length or model.context_length
        self.register_buffer("mean", torch.tensor(mean).view(3, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(3, 1, 1), persistent=False)
        self.bf16 = False
        self._locked: list[nn.Module] = []  # stay in evaluation mode

    def lock(self, tower: str) -> None:
        """Freeze the "image" or "text" tower, BatchNorm statistics included (LiT, Zhai et al. 2022); "none"
        does nothing.

        open_clip's own lock_image_tower and lock_text_tower leave the projections of timm's and Hugging
        Face's towers trainable, and either let BatchNorm statistics change or replace the layer, which
        renames weights.
        """
        for name, parameter in self.model.named_parameters():
            if tower_of(name) == tower:
                parameter.requires_grad_(False)
        self._locked = [child for name, child in self.model.named_children() if tower_of(name) == tower]
        self.train(self.training)

    def train(self, mode: bool = True) -> "Towers":
        super().train(mode)
        for module in self._locked:
            module.eval()
        return self

    def forward(
        self, images: torch.Tensor, tokens: torch.Tensor, patch_seeds: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, ...]:
        """image_features, text_features, logit_scale (exponentiated), and logit_bias if the model has one.

        The scalars are returned, and not read as parameters by the loss, because DDP reduces the gradients
        only of what the forward used.
        """
        scalars = [self.model.logit_scale.exp(), *([] if self.logit_bias is None else [self.logit_bias])]
        return self.image_features(images, patch_seeds), self.text_features(tokens), *scalars

    @property
    def patch_dropout(self) -> PatchDropout | None:
        """The one that PatchDropout.install() put into the image tower."""
        module = getattr(self.model.visual, "patch_dropout", None)
        return module if isinstance(module, PatchDropout) else None

    @property
    def vocab_size(self) -> int:
        return getattr(self.model, "vocab_size", None) or self.model.text.vocab_size  # CoCa's is the tower's

    @property
    def logit_bias(self) -> nn.Parameter | None:
        return getattr(self.model, "logit_bias", None)

    def image_features(self, images: torch.Tensor, patch_seeds: torch.Tensor | None = None) -> torch.Tensor:
        """[b, 3, H, W], uint8 or fp32 in 0 to 1 -> fp32 [b, d], L2-normed.

        Args:
            patch_seeds: int64 [b], where patches are dropped.
        """
        if not images.is_floating_point():
            images = images.to(torch.float32, memory_format=torch.contiguous_format) / 255
        pixels = (images - self.mean) / self.std
        if self.patch_dropout and patch_seeds is not None:
            self.patch_dropout.remember(pixels, patch_seeds)
        with self._autocast(images.device):
            features = self.model.encode_image(pixels)
        return F.normalize(features.float(), dim=-1)

    def text_features(self, tokens: torch.Tensor) -> torch.Tensor:
        """int64 [b, L], trimmed or whole (see Clip.tokenize) -> fp32 [b, d], L2-normed."""
        with self._autocast(tokens.device):
            features = encode_text(self.model, tokens)
        return F.normalize(features.float(), dim=-1)

    @torch.no_grad()
    def clamp_logit_scale(self) -> None:
        """Keep the temperature at or above 1/100 (Radford et al. 2021, section 2.5)."""
        self.model.logit_scale.clamp_(0, math.log(100))

    def _autocast(self, device: torch.device) -> torch.autocast:
        return torch.autocast(device.type, torch.bfloat16, enabled=self.bf16)


def batch_dependent_layers(towers: Towers) -> list[str]:
    """What makes a sample's features in training depend on its chunk: "BatchNorm (visual)", "dropout (text)".

    With these, results depend on micro_batch_size and on the number of ranks. Patch dropout of ours is not
    among them: its masks depend on the sample alone. Layers in evaluation mode (a locked tower) are not
    either.
    """
    kinds = set()
    for name, module in towers.model.named_modules():
        tower = tower_of(f"{name}.")
        if not module.training:
            continue
        if isinstance(module, nn.modules.batchnorm._BatchNorm):
            kinds.add(f"BatchNorm ({tower})")
        elif not isinstance(module, PatchDropout) and any(
            isinstance(rate := getattr(module, attribute, None), float) and rate > 0
            for attribute in DROPOUT_RATES
        ):
            kinds.add(f"dropout ({tower})")
    return sorted(kinds)


def tower_of(name: str) -> str:
    """ "image" or "text", or "" for logit_scale and logit_bias, by the name of a parameter of an open_clip
    model.
    """
    if name.startswith("logit_"):
        return ""
    return "image" if name.split(".")[0] == "visual" else "text"
