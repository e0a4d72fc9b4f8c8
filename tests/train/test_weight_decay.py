"""Weight decay reaches matrices alone, in towers of every kind: open_clip's, timm's and Hugging Face's."""

import open_clip
import pytest
from conftest import TINY
from torch import nn
from transformers import BertConfig, BertModel

from train.model.towers import Towers, batch_dependent_layers
from train.optim import build_optimizer, undecayed_names
from train.recipe import Optim

TIMM = {"timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear", "image_size": 224}
EXEMPT = {
    "vit_tiny_patch16_224": ("cls_token", "pos_embed"),
    "swin_tiny_patch4_window7_224": ("relative_position_bias_table",),
}


def undecayed_matrices(model: nn.Module) -> set[str]:
    exempt = undecayed_names(model)
    return {name for name, parameter in model.named_parameters() if name in exempt and parameter.ndim >= 2}


@pytest.mark.parametrize("architecture", EXEMPT)
def test_timm_towers_say_what_does_not_decay(architecture):
    model = open_clip.CustomTextCLIP(16, {**TIMM, "timm_model_name": architecture}, TINY["text_cfg"])
    image = [name for name in undecayed_matrices(model) if name.startswith("visual.")]
    assert image
    assert all(name.endswith(EXEMPT[architecture]) for name in image)


def test_position_embeddings_of_hugging_face_text_towers_do_not_decay():
    config = BertConfig(hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16)
    assert undecayed_matrices(BertModel(config)) == {"embeddings.position_embeddings.weight"}


def test_the_optimizer_has_all_parameters_once(tiny_model):
    from train.model.clip import load

    towers = load(tiny_model).towers
    decayed, others = build_optimizer(towers, Optim(weight_decay=0.3)).param_groups
    assert (decayed["weight_decay"], others["weight_decay"]) == (0.3, 0.0)
    ids = [id(parameter) for group in (decayed, others) for parameter in group["params"]]
    assert sorted(ids) == sorted(id(parameter) for parameter in towers.model.parameters())


def test_towers_whose_samples_depend_on_each_other_are_known(tiny_model):
    from train.model.clip import load

    def layers(name: str) -> list[str]:
        return batch_dependent_layers(load(name).towers.train())

    assert layers(tiny_model) == []
    assert layers("RN50:none") == ["BatchNorm (image)"]
    swin = open_clip.CustomTextCLIP(
        16, {**TIMM, "timm_model_name": "swin_tiny_patch4_window7_224"}, TINY["text_cfg"]
    )
    towers = Towers(swin, (0.5,) * 3, (0.5,) * 3).train()
    assert batch_dependent_layers(towers) == ["dropout (image)"]  # timm's stochastic depth
    towers.lock("image")
    assert batch_dependent_layers(towers) == []
