"""A file of weights gets the preprocessing that it was trained with, or the question which that is."""

import json
from pathlib import Path
from types import SimpleNamespace

import open_clip
import pytest
import torch
from conftest import save_tiny

from data_prep.errors import UserError
from data_prep.images import WHITE
from train.model.clip import load
from train.model.preprocessing import DEFAULTS, preprocessing_of

HALVES = [0.5, 0.5, 0.5]


@pytest.fixture
def demo(tmp_path):
    """demo-vit's weights in a folder without a config."""
    file = tmp_path / "logs" / "checkpoints" / "epoch_5.pt"
    file.parent.mkdir(parents=True)
    torch.save(open_clip.create_model("demo-vit").state_dict(), file)
    return file


def write_config(folder, **changes) -> None:
    model_cfg = {**open_clip.get_model_config("demo-vit"), **changes}
    preprocess = {"mean": HALVES, "std": HALVES, "interpolation": "bilinear", "resize_mode": "squash"}
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess})
    )


def test_the_config_beside_the_file_is_used_and_printed(demo, capsys):
    write_config(demo.parent)
    clip = load(f"demo-vit:{demo}")
    expected = {"mean": HALVES, "std": HALVES, "interpolation": "bilinear", "resize_mode": "squash"}
    assert clip.config["preprocess_cfg"] == {**expected, "background": WHITE}
    assert clip.towers.mean.flatten().tolist() == HALVES
    printed = capsys.readouterr().err
    assert "mean 0.5, 0.5, 0.5; std 0.5, 0.5, 0.5; bilinear; squash" in printed
    assert "open_clip_config.json" in printed
    assert "activation of demo-vit: GELU" in printed


def test_one_checkpoint_has_the_same_features_by_both_names(tiny_model, monkeypatch):
    """local-dir:FOLDER and NAME:FOLDER/open_clip_model.safetensors."""
    folder = tiny_model.removeprefix("local-dir:")
    config = json.loads(Path(folder, "open_clip_config.json").read_text())["model_cfg"]
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "tiny", config)
    by_file, by_folder = load(f"tiny:{folder}/open_clip_model.safetensors"), load(tiny_model)
    assert by_file.config == by_folder.config
    assert by_file.fingerprint() == by_folder.fingerprint()


def test_the_background_beside_the_file_is_used(demo, capsys):
    write_config(demo.parent)
    config = json.loads((demo.parent / "open_clip_config.json").read_text())
    config["preprocess_cfg"]["background"] = "#102030"
    (demo.parent / "open_clip_config.json").write_text(json.dumps(config))
    assert load(f"demo-vit:{demo}").background == (16, 32, 48)
    assert "squash; background #102030" in capsys.readouterr().err


def test_another_activation_beside_the_file_is_an_error(demo):
    write_config(demo.parent, quick_gelu=True)
    with pytest.raises(UserError, match=r"says quick_gelu = true, demo-vit has false; use local-dir:"):
        load(f"demo-vit:{demo}")


def test_the_tags_of_an_architecture_are_used_where_they_agree(tmp_path):
    mobile = preprocessing_of("MobileCLIP-S1", tmp_path / "epoch_5.pt")
    assert mobile.config["mean"] == (0, 0, 0)
    assert mobile.config["interpolation"] == "bilinear"
    siglip = preprocessing_of("ViT-B-16-SigLIP2", tmp_path / "epoch_5.pt")
    assert siglip.config == {
        "mean": (0.5,) * 3,
        "std": (0.5,) * 3,
        "interpolation": "bicubic",
        "resize_mode": "squash",
    }
    # dfn5b squashes, but it has another activation
    assert preprocessing_of("ViT-H-14", tmp_path / "epoch_5.pt").config["resize_mode"] == "shortest"


def test_an_unknown_preprocessing_is_asked_for(tmp_path, demo, capsys):
    with pytest.raises(UserError, match=r"ViT-L-14 differ.*ViT-L-14:.*@NAME.*@laion2b_s32b_b82k \(mean 0.5"):
        preprocessing_of("ViT-L-14", tmp_path / "epoch_5.pt")
    with pytest.raises(UserError, match=r"not known.*no published weights.*@openai .*@siglip"):
        load(f"demo-vit:{demo}")
    assert load(f"demo-vit:{demo}@openai").config["preprocess_cfg"]["std"] == DEFAULTS["std"]
    assert "of openai" in capsys.readouterr().err
    (tmp_path / "own.json").write_text('{"mean": [0.1, 0.2, 0.3], "std": [1, 1, 1]}')
    preprocess = load(f"demo-vit:{demo}@{tmp_path / 'own.json'}").config["preprocess_cfg"]
    assert preprocess == {**DEFAULTS, "mean": [0.1, 0.2, 0.3], "std": [1, 1, 1], "background": WHITE}
    tag = preprocessing_of("ViT-L-14", demo, "laion2b_s32b_b82k")
    assert tag.config["mean"] == tuple(HALVES)
    with pytest.raises(UserError, match=r"openai has another activation; use ViT-L-14-quickgelu:"):
        preprocessing_of("ViT-L-14", demo, "openai")
    with pytest.raises(UserError, match=r"there is no preprocessing 'nothing'"):
        preprocessing_of("ViT-L-14", demo, "nothing")


def params(demo, **changes) -> None:
    """params.txt as open_clip_train writes it."""
    values = {"image_interpolation": None, "image_mean": None, "image_resize_mode": None, "image_std": None}
    values |= {"force_quick_gelu": False, "model": "demo-vit", "name": "x", "pretrained": ""}
    arguments = SimpleNamespace(**(values | changes))
    lines = [f"{name}: {getattr(arguments, name)}\n" for name in sorted(vars(arguments))]
    (demo.parent.parent / "params.txt").write_text("".join(lines))


def test_params_of_open_clip_train_are_read(demo):
    params(demo, image_mean=HALVES, image_interpolation="bilinear")
    found = preprocessing_of("demo-vit", demo)
    assert found.config == {**DEFAULTS, "mean": HALVES, "interpolation": "bilinear"}
    assert found.source.endswith("params.txt")
    params(demo, model="ViT-L-14", pretrained="laion2b_s32b_b82k")
    assert preprocessing_of("ViT-L-14", demo).config["mean"] == tuple(HALVES)
    with pytest.raises(UserError, match=r"params.txt says that it is of ViT-L-14; use ViT-L-14:"):
        load(f"demo-vit:{demo}")
    params(demo, model="ViT-B-32", force_quick_gelu=True)
    with pytest.raises(UserError, match="it is of ViT-B-32-quickgelu; use ViT-B-32-quickgelu:"):
        preprocessing_of("ViT-B-32", demo)


@pytest.mark.parametrize(
    "mean", ["[1, 2", "[1, 2]", "[0.5, 'x', 0.5]", "__import__('os').getpid()", "(" * 999]
)
def test_invalid_values_in_params_are_one_sentence(mean, demo):
    params(demo, image_mean=mean)
    with pytest.raises(UserError, match=r"params.txt: preprocess_cfg.mean is .* a list of 3, each a number"):
        preprocessing_of("demo-vit", demo)


def test_a_folder_and_a_file_without_their_prefix_are_explained(tmp_path, demo):
    save_tiny(tmp_path)
    with pytest.raises(UserError, match=f"a folder; use local-dir:{tmp_path}"):
        load(str(tmp_path))
    with pytest.raises(
        UserError, match=f"a file of weights; write their architecture before it: demo-vit:{demo}"
    ):
        load(str(demo))
