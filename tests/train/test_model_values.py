"""Each value of a stranger's open_clip_config.json is valid, or one sentence at once."""

import copy
import json
import math
import time

import open_clip
import pytest
import torch
from safetensors.torch import save_file
from starting_points import save_model

from data_prep.errors import UserError
from train.model.clip import load
from train.model.foreign import _parameters, check_preprocessing

VISION = {"image_size": 16, "layers": 1, "width": 32, "head_width": 16, "patch_size": 8}
TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}
PREPROCESS = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}
CONFIG = {
    "model_cfg": {"embed_dim": 16, "vision_cfg": VISION, "text_cfg": TEXT},
    "preprocess_cfg": PREPROCESS,
}
NAN = float("nan")

CASES = [  # place, value, what the sentence says
    ("model_cfg.embed_dim", 0, "model_cfg.embed_dim is 0; it must be a whole number from 1 to 16,384"),
    ("model_cfg.embed_dim", True, "model_cfg.embed_dim is True"),
    ("model_cfg.quick_gelu", "yes", "model_cfg.quick_gelu is 'yes'; it must be true or false"),
    ("model_cfg.init_logit_scale", NAN, "init_logit_scale is nan; it must be a number from"),
    ("vision_cfg.patch_size", 0, "vision_cfg.patch_size is 0; it must be a whole number from 1 to 4,096"),
    ("vision_cfg.patch_size", None, "vision_cfg.patch_size is null; it must be a whole number"),
    ("vision_cfg.patch_size", 17, "images of 16 x 16 have 0 patches of 17"),
    ("vision_cfg.head_width", 0, "vision_cfg.head_width is 0; it must be a whole number from 1"),
    (
        "vision_cfg.layers",
        "4",
        "vision_cfg.layers is '4'; it must be a whole number from 1 to 200, or a list of 4",
    ),
    ("vision_cfg.layers", 10**9, "vision_cfg.layers is 1000000000; it must be"),
    (
        "vision_cfg.width",
        4 * 10**6,
        "vision_cfg.width is 4000000; it must be a whole number from 1 to 16,384",
    ),
    ("vision_cfg.width", None, "vision_cfg.width is None"),
    (
        "vision_cfg.image_size",
        10**6,
        "vision_cfg.image_size is 1000000; it must be a whole number from 1 to 4,096",
    ),
    ("vision_cfg.image_size", [16, 0], r"vision_cfg.image_size is \[16, 0\]; it must be .* a list of 2"),
    ("vision_cfg.patch_dropout", 7, "vision_cfg.patch_dropout is 7; it must be a number from 0 to 0.99"),
    (
        "vision_cfg.mlp_ratio",
        1e9,
        "vision_cfg.mlp_ratio is 1000000000.0; it must be a number from 0.01 to 64",
    ),
    (
        "vision_cfg.attentional_pool",
        "evil",
        "attentional_pool is 'evil'; it must be true or false, or one of",
    ),
    ("vision_cfg.pool_type", "evil", "vision_cfg.pool_type is 'evil'; it must be one of 'tok', 'avg'"),
    ("vision_cfg.norm_kwargs", {"eps": "x"}, "vision_cfg.norm_kwargs.eps is 'x'; it must be a number"),
    (
        "text_cfg.pool_type",
        "evil",
        "text_cfg.pool_type is 'evil'; it must be one of 'first', 'last', 'argmax', 'eos'",
    ),
    (
        "text_cfg.act_kwargs",
        {"approximate": "x"},
        "act_kwargs.approximate is 'x'; it must be one of 'none', 'tanh'",
    ),
    (
        "text_cfg.vocab_size",
        10**10,
        "text_cfg.vocab_size is 10000000000; it must be a whole number from 1 to 2,000,000",
    ),
    ("text_cfg.vocab_size", 10**4000, "text_cfg.vocab_size is 1000"),
    (
        "text_cfg.context_length",
        10**8,
        "text_cfg.context_length is 100000000; it must be a whole number from 1 to 8,192",
    ),
    ("text_cfg.hf_tokenizer_name", ["x"], r"hf_tokenizer_name is \['x'\]; it must be a text"),
    ("preprocess_cfg", [1], r"preprocess_cfg is \[1\]; it must be an object"),
    (
        "preprocess_cfg.mean",
        [1, 2],
        r"preprocess_cfg.mean is \[1, 2\]; it must be a list of 3, each a number",
    ),
    ("preprocess_cfg.mean", [NAN] * 3, r"preprocess_cfg.mean is \[nan, nan, nan\]; it must be a list of 3"),
    (
        "preprocess_cfg.std",
        [0, 0, 0],
        r"preprocess_cfg.std is \[0, 0, 0\]; it must be a list of 3, each a number from 1e-06",
    ),
    (
        "preprocess_cfg.interpolation",
        "evil",
        "interpolation is 'evil'; it must be one of 'bicubic', 'bilinear'",
    ),
    (
        "preprocess_cfg.resize_mode",
        "x",
        "resize_mode is 'x'; it must be one of 'shortest', 'longest', 'squash'",
    ),
    ("preprocess_cfg.mode", "L", "preprocess_cfg.mode is 'L'; it must be one of 'RGB'"),
]


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    """A folder with a valid model of open_clip."""
    folder = tmp_path_factory.mktemp("model")
    save_file(open_clip.CLIP(**CONFIG["model_cfg"]).state_dict(), folder / "open_clip_model.safetensors")
    return folder


def write(folder, place: str = "", value: object = None) -> str:
    config = copy.deepcopy(CONFIG)
    *outer, key = (
        "model_cfg." + place if place.split(".")[0] in ("vision_cfg", "text_cfg") else place
    ).split(".")
    inner = config
    for name in outer:
        inner = inner[name]
    if place:
        inner[key] = value
    (folder / "open_clip_config.json").write_text(json.dumps(config))
    return f"local-dir:{folder}"


@pytest.mark.parametrize(("place", "value", "sentence"), CASES, ids=[place for place, _, _ in CASES])
def test_each_invalid_value_is_one_sentence_at_once(place, value, sentence, model):
    name = write(model, place, value)
    begin = time.monotonic()
    with pytest.raises(UserError, match=sentence):
        load(name)
    assert time.monotonic() - begin < 10  # some would take for ever
    write(model)
    assert load(name).image_size == (16, 16)


def test_valid_sizes_make_no_model_that_no_memory_holds(model):
    config = copy.deepcopy(CONFIG)
    config["model_cfg"]["vision_cfg"] |= {"layers": 200, "width": 16384}
    (model / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=r"of 644 billion parameters; .* at most 10 billion"):
        load(f"local-dir:{model}", weights=False)
    config["model_cfg"]["vision_cfg"] |= {"layers": 24, "width": 1024}
    (model / "open_clip_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match="parameters at the least, and the weights beside it have"):
        load(f"local-dir:{model}")


@pytest.mark.parametrize("name", ["ViT-B-32", "RN50", "ViT-L-14-CLIPA", "coca_ViT-B-32"])
def test_the_count_of_parameters_is_most_of_them_and_not_more(name):
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        made = open_clip.CoCa if "multimodal_cfg" in config else open_clip.CustomTextCLIP
        options = {key: value for key, value in config.items() if key != "custom_text"}
        n = sum(map(torch.numel, made(**options).parameters()))
    assert 0.7 * n < _parameters(config) <= n


def test_the_preprocessing_of_all_published_weights_is_valid(tmp_path):
    for name, tag in open_clip.list_pretrained():
        check_preprocessing(tmp_path / name, open_clip.get_pretrained_cfg(name, tag))
    for valid in (None, {}, {"mean": None, "size": [3, 9, 9]}, {"fill_color": 0}, {"mean": (math.pi,) * 3}):
        check_preprocessing(tmp_path, valid)


@pytest.mark.parametrize("key", ["hidden_size", "num_hidden_layers", "vocab_size", "max_position_embeddings"])
def test_sizes_of_a_text_tower_of_transformers_are_bounded(key, tmp_path):
    name = save_model(tmp_path / "model", "bert")
    load(name)
    config = next(file for file in tmp_path.rglob("config.json") if key in json.loads(file.read_text()))
    config.write_text(json.dumps(json.loads(config.read_text()) | {key: 10**9}))
    with pytest.raises(UserError, match=f": {key} is 1000000000; it must be a whole number from 0 to"):
        load(name)
