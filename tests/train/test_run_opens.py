"""A run's folder is a model, for our commands and for open_clip as local-dir:RUN."""

import os

import open_clip
import torch
from runs import CANDIDATES, assert_equal_weights, exported, newest, recipe, trained
from starting_points import save_model

from train.model.clip import load
from train.run.checkpoint import link_best

FEW = {"workers": 0, "keep_checkpoints": 99, "save_every_minutes": 99.0, "log_every_steps": 99}


def scored(*values: float):
    """A validation with these values of R@1, one after the other."""
    left = iter(values)
    return lambda clip, world: dict.fromkeys(
        ("val/mean/R@1", "val/image_to_text/R@1", "val/text_to_image/R@1"), next(left)
    )


def test_open_clip_loads_the_best_weights_from_the_runs_folder(tiny_model, icon_shards, tmp_path):
    run = trained(recipe(tiny_model, icon_shards, tmp_path / "run", **FEW), scored(0.0, 0.2, 0.9, 0.5, 0.4))
    best = (run.folder / "checkpoints" / "best").resolve()
    assert best != newest(run.folder)
    name = f"local-dir:{run.folder}"
    assert_equal_weights(open_clip.create_model(name).state_dict(), exported(best))
    assert open_clip.create_model(name).visual.preprocess_cfg["mean"] == [0.5, 0.4, 0.3]
    assert open_clip.get_tokenizer(name).context_length == 10
    assert (
        load(name).fingerprint()
        == load(str(run.folder)).fingerprint()
        == load(f"local-dir:{best}").fingerprint()
    )
    # when another becomes the best, the names follow at once
    link_best(run.folder / "checkpoints", newest(run.folder).name)
    assert_equal_weights(open_clip.create_model(name).state_dict(), exported(newest(run.folder)))


def test_a_run_holds_the_model_alone_beside_its_own_files(tiny_model, icon_shards, tmp_path):
    """With EMA and WiSE-FT, checkpoints hold more weights than the exported ones."""
    run = trained(recipe(tiny_model, icon_shards, tmp_path / "run", epochs=1, **FEW, **CANDIDATES))
    links = {path.name: os.readlink(path) for path in run.folder.iterdir() if path.is_symlink()}
    names = ("open_clip_config.json", "open_clip_model.safetensors")
    assert links == {name: f"checkpoints/best/{name}" for name in names}


def test_an_older_run_gets_its_names_when_it_is_resumed_and_opens_before(tiny_model, icon_shards, tmp_path):
    plan = recipe(tiny_model, icon_shards, tmp_path / "run", epochs=1, **FEW)
    run = trained(plan)
    for path in run.folder.iterdir():
        if path.is_symlink():
            path.unlink()
    assert load(f"local-dir:{run.folder}").fingerprint() == load(str(run.folder)).fingerprint()
    (run.folder / "status.json").unlink()
    trained(plan)
    open_clip.create_model(f"local-dir:{run.folder}")


def test_a_runs_tokenizer_is_in_its_folder(icon_shards, tmp_path):
    run = trained(
        recipe(save_model(tmp_path / "base", "siglip"), icon_shards, tmp_path / "run", epochs=1, workers=0)
    )
    tokens = open_clip.get_tokenizer(f"local-dir:{run.folder}")(["a bell"])
    assert torch.equal(tokens, load(str(run.folder)).tokenizer(["a bell"]))
    open_clip.create_model(f"local-dir:{run.folder}")
