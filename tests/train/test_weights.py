"""A file of weights loads whatever wrote it, or one sentence says what it is; nothing in it is executed."""

import argparse
import os
import pathlib

import numpy as np
import open_clip
import pytest
import torch
from conftest import TINY
from open_clip_train.params import parse_args
from runs import assert_equal_weights
from safetensors.torch import save_file
from torch import nn

from data_prep.errors import UserError
from train.model.clip import load
from train.model.weights import architectures_of

WITH_OPTIMIZER = {"lr": 1e-3}


@pytest.fixture(scope="module")
def model() -> nn.Module:
    torch.manual_seed(3)
    return open_clip.create_model("demo-vit")


def prefixed(model: nn.Module, prefix: str) -> dict:
    return {f"{prefix}{name}": tensor for name, tensor in model.state_dict().items()}


def trained(model: nn.Module, content: dict) -> dict:
    """As trainers save: beside the weights, moments and the numpy and argparse objects of their settings."""
    optimizer = torch.optim.AdamW(model.parameters(), **WITH_OPTIMIZER)
    return {"epoch": 5, "name": "x", "optimizer": optimizer.state_dict(), "best": np.float64(0.5), **content}


CASES = {
    "bare": lambda model: model.state_dict(),
    "open_clip_train on one process": lambda model: trained(model, {"state_dict": model.state_dict()}),
    "open_clip_train under DDP": lambda model: trained(model, {"state_dict": prefixed(model, "module.")}),
    "open_clip_train, compiled": lambda model: {"state_dict": prefixed(model, "_orig_mod.")},
    "compiled under DDP": lambda model: {"state_dict": prefixed(model, "module._orig_mod.")},
    "Lightning": lambda model: {
        "pytorch-lightning_version": "2.4.0",
        "hyper_parameters": argparse.Namespace(lr=1e-3, folder=pathlib.PurePosixPath("/data")),
        "state_dict": prefixed(model, "model.") | {"loss.weight": torch.ones(3)},
    },
    "model_state_dict": lambda model: {"model_state_dict": model.state_dict(), "step": 7},
    "args": lambda model: trained(
        model, {"args": parse_args(["--train-data", "x"]), "model": model.state_dict()}
    ),
    "DeepSpeed": lambda model: {"module": model.state_dict(), "args": argparse.Namespace(lr=1.0)},
    "a whole module": lambda model: model,
    "a whole module in a dict": lambda model: {"model": model, "epoch": 3},
    "half": lambda model: {name: t.half() for name, t in model.state_dict().items()},
    "attn_mask of older versions": lambda model: {**model.state_dict(), "attn_mask": torch.zeros(77, 77)},
    "blocks compiled": lambda model: {
        name.replace("resblocks.0.", "resblocks.0._orig_mod."): t for name, t in model.state_dict().items()
    },
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_of_another_program_loads(case, model, tmp_path):
    torch.save(CASES[case](model), tmp_path / "epoch_5.pt")
    loaded = load(f"demo-vit:{tmp_path / 'epoch_5.pt'}@openai").towers.model.state_dict()
    expected = model.state_dict()
    if case == "half":
        expected = {name: tensor.half().float() for name, tensor in expected.items()}
    assert_equal_weights(loaded, expected)


def test_the_format_before_torch_1_6_loads(model, tmp_path):
    content = {"state_dict": prefixed(model, "module."), "epoch": 3}
    torch.save(content, tmp_path / "file.pt", _use_new_zipfile_serialization=False)
    loaded = load(f"demo-vit:{tmp_path / 'file.pt'}@openai")
    assert_equal_weights(loaded.towers.model.state_dict(), model.state_dict())


def test_safetensors_with_prefixes_load(model, tmp_path):
    save_file(prefixed(model, "module."), tmp_path / "file.safetensors")
    loaded = load(f"demo-vit:{tmp_path / 'file.safetensors'}@siglip")
    assert_equal_weights(loaded.towers.model.state_dict(), model.state_dict())
    assert loaded.config["preprocess_cfg"]["resize_mode"] == "squash"


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_nothing_in_a_file_is_executed(model, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"state_dict": model.state_dict(), "extra": Evil()}, "evil.pt")
    with pytest.raises(UserError, match=r"evil.pt: cannot be read as weights") as raised:
        load("demo-vit:evil.pt@openai")
    assert "weights_only" not in str(raised.value)
    torch.save(
        {"state_dict": model.state_dict(), "extra": Evil()}, "old.pt", _use_new_zipfile_serialization=False
    )
    with pytest.raises(UserError, match=r"old.pt: cannot be read as weights") as raised:
        load("demo-vit:old.pt@openai")
    assert "weights_only" not in str(raised.value)
    assert not (tmp_path / "executed").exists()


def written(path: pathlib.Path, content: bytes) -> pathlib.Path:
    path.write_bytes(content)
    return path


MISTAKES = {
    "another architecture": (
        lambda model: open_clip.CLIP(**TINY).state_dict(),
        r"holds no weights of demo-vit: .* in the file and .* in demo-vit",
    ),
    "an adapter": (
        lambda model: {"base_model.model.visual.proj.lora_A.weight": torch.ones(2, 2)},
        r"no weights of a whole CLIP, but base_model.*merged first",
    ),
    "one tower": (
        lambda model: model.visual.state_dict(),
        r"no weights of a whole CLIP, but (class|pos).* and \d+ more",
    ),
    "two models": (
        lambda model: prefixed(model, "student.") | prefixed(model, "teacher."),
        r"several models \('student.', 'teacher.'\)",
    ),
    "a part": (
        lambda model: {name: t for name, t in model.state_dict().items() if "ln_final" not in name},
        r"the file lacks ln_final.weight, ln_final.bias; the file is incomplete",
    ),
    "moments": (lambda model: {"optimizer": {"state": {}}}, "no weights of a whole CLIP, but no tensor"),
    "a number": (lambda model: 7, "no weights of a whole CLIP, but no tensor"),
}


@pytest.mark.parametrize("case", MISTAKES)
def test_what_is_no_weights_of_the_architecture_is_one_sentence(case, model, tmp_path):
    content, message = MISTAKES[case]
    torch.save(content(model), tmp_path / "file.pt")
    with pytest.raises(UserError, match=message):
        load(f"demo-vit:{tmp_path / 'file.pt'}@openai")


@pytest.mark.parametrize("name", ["file.pt", "file.safetensors"])
@pytest.mark.parametrize("content", [b"hello", b"PK\3\4" + bytes(99)])
def test_a_damaged_file_is_one_sentence(name, content, tmp_path):
    with pytest.raises(UserError, match=f"{name}: cannot be read as weights") as raised:
        load(f"demo-vit:{written(tmp_path / name, content)}@openai")
    assert "weights_only" not in str(raised.value)


def test_an_empty_or_missing_file_and_nan_are_one_sentence(model, tmp_path):
    (tmp_path / "empty.pt").touch()
    with pytest.raises(UserError, match=r"empty.pt: the file is empty"):
        load(f"demo-vit:{tmp_path / 'empty.pt'}@openai")
    with pytest.raises(UserError, match=r"there is no file no/such.pt; it has"):
        load("demo-vit:no/such.pt@openai")
    state = {name: t.clone() for name, t in model.state_dict().items()}
    state["ln_final.bias"][3], state["visual.proj"][0, 0] = torch.nan, torch.inf
    torch.save(state, tmp_path / "file.pt")
    with pytest.raises(UserError, match=r"NaN or infinity in 2 of \d+ tensors \(.*visual.proj"):
        load(f"demo-vit:{tmp_path / 'file.pt'}@openai")


def test_a_cut_file_is_one_sentence(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "file.pt")
    content = (tmp_path / "file.pt").read_bytes()
    with pytest.raises(UserError, match="cannot be read as weights"):
        load(f"demo-vit:{written(tmp_path / 'file.pt', content[:-1000])}@openai")


def test_a_torchscript_program_is_not_run(tmp_path):
    torch.jit.save(torch.jit.script(nn.Linear(2, 2)), str(tmp_path / "ViT-B-32.pt"))
    with pytest.raises(UserError, match=r"a TorchScript program.*ViT-B-32-quickgelu:openai"):
        load(f"demo-vit:{tmp_path / 'ViT-B-32.pt'}@openai")


def test_a_file_of_another_architecture_says_which_it_fits(model, tmp_path):
    torch.save(model.state_dict(), tmp_path / "file.pt")
    with pytest.raises(UserError, match=rf"they fit demo-vit:{tmp_path}/file.pt"):
        load(f"ViT-S-32:{tmp_path / 'file.pt'}@openai")
    with torch.device("meta"):
        for name in ("ViT-B-16", "ViT-L-14-336", "ViT-B-32-256"):
            fitting = architectures_of(open_clip.CLIP(**open_clip.get_model_config(name)).state_dict())
            assert name in fitting
            assert all(fit.startswith(name) for fit in fitting), fitting


def test_custom_text_is_renamed_both_ways(model, tmp_path, monkeypatch):
    """--force-custom-text of open_clip_train."""
    config = open_clip.get_model_config("demo-vit")
    custom = open_clip.CustomTextCLIP(**config)
    torch.save(custom.state_dict(), tmp_path / "custom.pt")
    loaded = load(f"demo-vit:{tmp_path / 'custom.pt'}@openai").towers.model
    assert torch.equal(loaded.text_projection, custom.text.text_projection)
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "custom", {**config, "custom_text": True})
    torch.save(model.state_dict(), tmp_path / "plain.pt")
    loaded = load(f"custom:{tmp_path / 'plain.pt'}@openai").towers.model
    assert torch.equal(loaded.text.text_projection, model.text_projection)


def test_another_image_size_is_interpolated_as_in_open_clip(model, tmp_path, monkeypatch, capsys):
    config = open_clip.get_model_config("demo-vit")
    larger = {**config, "vision_cfg": {**config["vision_cfg"], "image_size": 64}}
    monkeypatch.setitem(open_clip.factory._MODEL_CONFIGS, "larger", larger)
    torch.save(model.state_dict(), tmp_path / "file.pt")
    loaded = load(f"larger:{tmp_path / 'file.pt'}@openai").towers.model
    expected = open_clip.create_model("larger", str(tmp_path / "file.pt"))
    assert torch.equal(loaded.visual.positional_embedding, expected.visual.positional_embedding)
    assert "visual.positional_embedding is interpolated from" in capsys.readouterr().err
