"""Which tower a parameter is of, and how many layers lie between it and that tower's output: what rates and
locks go by.

embeddings  ->  block 0  ->  ...  ->  block n - 1  ->  norm, projection
  n + 1           n                       1                  0
"""

import re

from open_clip.hf_model import HFTextEncoder
from open_clip.model import CLIP
from open_clip.modified_resnet import ModifiedResNet
from open_clip.timm_model import TimmModel
from open_clip.transformer import TextTransformer, VisionTransformer
from timm.models import group_parameters
from torch import nn

from data_prep.errors import UserError
from train.model.clip import Towers

# What open_clip's towers call their layers, in the form in which timm's trunks tell theirs. What matches
# neither comes last.
RESBLOCKS = r"transformer\.resblocks\.(\d+)"
TEXT = {"stem": "token_embedding|positional_embedding|cls_emb", "blocks": RESBLOCKS}
LAYERS = {
    VisionTransformer: {"stem": "conv1|class_embedding|positional_embedding|ln_pre", "blocks": RESBLOCKS},
    TextTransformer: TEXT,
    CLIP: TEXT,  # which has its text tower's parts beside the image tower
    ModifiedResNet: {"stem": r"(?:conv|bn)\d", "blocks": r"layer(\d+)\.(\d+)"},
    HFTextEncoder: {
        "stem": r"transformer\.(?:[a-z_]+\.)*?(?:[a-z_]*embed[a-z_]*|shared)\.",
        "blocks": r"transformer\.(?:[a-z_]+\.)*?(?:layers?|block)\.(\d+)",
    },
}


def tower_of(name: str) -> str:
    """ "image" or "text", or "" for logit_scale, by the name of a parameter or submodule of an open_clip
    model.
    """
    if name.startswith("logit_"):
        return ""
    return "image" if name.split(".")[0] == "visual" else "text"


def lock(towers: Towers, tower: str) -> None:
    """Let the "image" or the "text" tower stay as it is: no parameter is trained, and no BatchNorm counts
    (LiT, Zhai et al. 2022).

    open_clip's own lock_image_tower and lock_text_tower leave the projection of timm's and Hugging Face's
    towers free, and let statistics go on, or take BatchNorm's place with a layer that has other names in a
    checkpoint."""
    for name, parameter in towers.model.named_parameters():
        if tower_of(name) == tower:
            parameter.requires_grad_(False)
    towers.locked = [child for name, child in towers.model.named_children() if tower_of(name) == tower]
    towers.train(towers.training)


def depths(model: nn.Module) -> dict[str, int]:
    """For each parameter of an open_clip model's towers, the layers between it and its tower's output; see
    above.

    Raises:
        UserError: it is not known in which order a tower has its layers.
    """
    text = ("text.", model.text) if hasattr(model, "text") else ("", model)
    numbers = {
        tower: _numbered(prefix, part)
        for tower, prefix, part in (("image", "visual.", model.visual), ("text", *text))
    }
    return {
        name: max(numbers[tower_of(name)].values()) - number
        for found in numbers.values()
        for name, number in found.items()
    }


def _numbered(prefix: str, tower: nn.Module) -> dict[str, int]:
    """The number of the layer of each parameter of a tower, from 0 at the input; `prefix` is the tower's name
    in the model.
    """
    if isinstance(tower, TimmModel) and hasattr(tower.trunk, "group_matcher"):
        numbers = group_parameters(tower.trunk, tower.trunk.group_matcher(coarse=False), reverse=True)
        head = {
            f"{prefix}head.{name}": max(numbers.values()) + 1 for name, _ in tower.head.named_parameters()
        }
        return {f"{prefix}trunk.{name}": number for name, number in numbers.items()} | head
    layers = next((layers for kind, layers in LAYERS.items() if isinstance(tower, kind)), None)
    if layers is None or not any(re.match(layers["blocks"], name) for name, _ in tower.named_parameters()):
        raise UserError(
            f"--optim.layer_decay: in which order a {type(getattr(tower, 'trunk', tower)).__name__} has its"
            " layers is not known here; leave it at 1.0, or give the towers rates of their own:"
            " --optim.image_lr, --optim.text_lr"
        )
    numbers = group_parameters(tower, layers, reverse=True)
    return {prefix + name: number for name, number in numbers.items() if prefix or tower_of(name) == "text"}
