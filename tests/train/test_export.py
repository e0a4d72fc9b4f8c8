"""An export that is loaded back equals the model, or nothing is kept; half precision is the rounded model."""

import json
import shutil

import open_clip
import pytest
import torch
from conftest import ROOT, TINY, assert_mistake, call_here, noise_image, save_tiny
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from data_prep.shards import Shards
from train.export import __main__ as command
from train.export import folder as exporting
from train.export import to_transformers
from train.export.folder import export, table
from train.export.snippets import use
from train.model.clip import load
from train.recipe import Recipe, to_yaml


def test_open_clip_loads_it_bit_equal(quick):
    name, out, record = quick
    clip = load(name)
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{out}")
    for key, tensor in clip.towers.model.state_dict().items():
        assert torch.equal(model.state_dict()[key], tensor), key
    assert torch.equal(preprocess(noise_image(50, 41)), clip.preprocess(noise_image(50, 41)))
    assert record["weights_sha256"] == clip.fingerprint() == load(f"local-dir:{out}").fingerprint()
    assert record["differences"]["open_clip"] == dict.fromkeys(
        ["weights", "pixels", "image_features", "text_features", "logits"], 0
    )


def test_snippets_name_the_folder_or_the_repository(quick):
    _, out, record = quick
    assert f"local-dir:{out}" in use(record, str(out))
    assert '"hf-hub:me/mine"' in use(record, "me/mine")
    assert 'SentenceTransformer("me/mine")' in use(record, "me/mine")


@pytest.mark.parametrize("dtype", ["fp16", "bf16"])
def test_half_precision_holds_the_rounded_weights(quick, dtype, tmp_path):
    from transformers import CLIPModel

    torch_dtype = exporting.DTYPES[dtype]
    record = export(load(quick[0]), tmp_path / "out", dtype)
    for file in ("open_clip_model.safetensors", "model.safetensors"):
        assert {
            x.dtype for name, x in load_file(tmp_path / "out" / file).items() if name != "logit_scale"
        } == {torch_dtype}
    rounded = load(f"local-dir:{tmp_path / 'out'}").towers.model.state_dict()
    for name, tensor in load(quick[0]).towers.model.state_dict().items():
        assert torch.equal(rounded[name], tensor.to(torch_dtype).float() if tensor.dim() else tensor), name
    assert record["differences"]["open_clip"] == {"weights": 0, "pixels": 0}
    assert record["differences"]["transformers"]["image_features"] <= 1e-5
    assert (
        0
        < record["differences"]["rounding"]["image_features"]
        <= record["bounds"]["rounding"]["image_features"]
    )
    assert CLIPModel.from_pretrained(tmp_path / "out").dtype == torch_dtype


def test_weights_that_a_dtype_cannot_hold_are_refused(quick, tmp_path):
    clip = load(quick[0])
    clip.towers.model.visual.proj.data[0, 0] = 1e6
    with pytest.raises(UserError, match=r"visual\.proj is not finite in fp16"):
        export(clip, tmp_path / "out", "fp16")
    assert not list(tmp_path.iterdir())


def test_a_wrong_activation_is_noticed_and_nothing_is_kept(quick, monkeypatch, tmp_path):
    right = to_transformers.config_of

    def wrong(clip, dtype):
        config = right(clip, dtype)
        config.vision_config.hidden_act = "gelu"
        return config

    monkeypatch.setattr(to_transformers, "config_of", wrong)
    with pytest.raises(UserError, match=r"transformers image_features by 0\.\d+ \(at most 1e-05\)"):
        export(load(quick[0]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("setting", ["image_mean", "resample"])
def test_a_wrong_preprocessing_is_noticed(quick, monkeypatch, tmp_path, setting):
    right = to_transformers._image_processor

    def wrong(clip):
        processor = right(clip)
        setattr(processor, setting, {"image_mean": [0.48, 0.4, 0.3], "resample": 2}[setting])
        return processor

    monkeypatch.setattr(to_transformers, "_image_processor", wrong)
    with pytest.raises(UserError, match="pixels by"):
        export(load(quick[0]), tmp_path / "out")


def test_a_wrong_tokenizer_is_noticed(quick, monkeypatch, tmp_path):
    right = to_transformers._tokenizer

    def wrong(clip):
        clip.tokenizer.bpe_ranks = dict(list(clip.tokenizer.bpe_ranks.items())[:1000])
        return right(clip)

    monkeypatch.setattr(to_transformers, "_tokenizer", wrong)
    with pytest.raises(
        UserError,
        match=r"CLIPTokenizer reads 'a red brick' as \[49406, .*, 49407\], open_clip as \[49406, 320, ",
    ):
        export(load(quick[0]), tmp_path / "out")
    assert not list(tmp_path.iterdir())


def test_a_timm_tower_is_exported_for_open_clip_only(tmp_path):
    vision = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}
    save_tiny(tmp_path, vision_cfg=vision)
    record = export(load(f"local-dir:{tmp_path}"), tmp_path / "out")
    assert set(record["files"]) == {"open_clip_config.json", "open_clip_model.safetensors"}
    note = (
        "for open_clip only: transformers' CLIPModel and CLIPProcessor do not support"
        " vision_cfg.timm_model_name = 'test_vit'"
    )
    assert note in table(record)
    assert "CLIPModel" not in use(record, str(tmp_path / "out"))
    assert record["differences"]["open_clip"]["image_features"] == 0


def test_coca_is_exported_for_open_clip_only(tmp_path):
    vision = {**TINY["vision_cfg"], "attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True}
    text = {**TINY["text_cfg"], "embed_cls": True, "output_tokens": True}
    config = {"embed_dim": 16, "vision_cfg": vision, "text_cfg": text}
    config["multimodal_cfg"] = {
        "context_length": 10,
        "vocab_size": 49408,
        "width": 16,
        "heads": 2,
        "layers": 1,
        "attn_pooler_heads": 2,
    }
    model = open_clip.CoCa(**config)
    model.text_decoder.text_projection.data.zero_()  # open_clip leaves it uninitialised
    save_file(model.state_dict(), tmp_path / "open_clip_model.safetensors")
    (tmp_path / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": {**config, "custom_text": True}, "preprocess_cfg": {}})
    )
    record = export(load(f"local-dir:{tmp_path}"), tmp_path / "out")
    assert "multimodal_cfg" in record["open_clip_only"]
    assert record["differences"]["open_clip"]["text_features"] == 0


def test_a_run_is_compared_on_its_own_data(tiny_model, icon_shards, tmp_path, monkeypatch, capsys):
    run, out = tmp_path / "run", tmp_path / "out"
    (run / "checkpoints" / "best").mkdir(parents=True)
    load(tiny_model).save(run / "checkpoints" / "best")
    (run / "recipe.yaml").write_text(to_yaml(Recipe(model=tiny_model, data=str(icon_shards), run=str(run))))
    (run / "environment.json").write_text(
        json.dumps({"data_fingerprint": Shards(icon_shards, "train").fingerprint})
    )
    monkeypatch.setattr("sys.argv", ["train.export", str(run), "--out", str(out)])
    command.main()
    printed = capsys.readouterr().out
    assert f"compared on 16 images and captions of the val split of {icon_shards.name} (" in printed
    assert f'create_model_and_transforms("local-dir:{out}")' in printed
    record = json.loads((out / "export.json").read_text())
    assert record["weights_sha256"] == load(tiny_model).fingerprint()
    assert str(tmp_path) not in (out / "export.json").read_text()
    assert (
        max(record["differences"]["transformers"][name] for name in ("image_features", "text_features"))
        <= 1e-6
    )
    assert_mistake(call_here(command.main, run, "--out", out), str(out), "exists", "--overwrite")
    (run / "recipe.yaml").write_text(
        to_yaml(Recipe(model=tiny_model, data=str(tmp_path / "gone"), run=str(run)))
    )
    assert exporting.shards_of(run) is None
    shutil.rmtree(run / "checkpoints")  # so that the command ends here
    call_here(command.main, run, "--out", tmp_path / "other")
    assert f"the run's data {tmp_path / 'gone'} is not here, or has changed" in capsys.readouterr().out
    # A relative path, from another folder than the run was trained in.
    monkeypatch.chdir(out)
    (run / "recipe.yaml").write_text(to_yaml(Recipe(model=tiny_model, data="my shards", run="run")))
    (run.parent / "my shards").symlink_to(icon_shards)
    assert exporting.shards_of(run) == run.parent / "my shards"


def test_mistakes_are_sentences(tiny_model, tmp_path, monkeypatch):
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "file").touch()
    refused = call_here(command.main, tiny_model, "--out", tmp_path / "other", "--overwrite")
    assert_mistake(refused, "no .made.json", "not deleted")
    assert_mistake(
        call_here(command.main, tiny_model, "--out", tmp_path / "out", "--data", tmp_path), "no manifest.json"
    )
    for missing, arguments in (("transformers", []), ("onnxruntime", ["--onnx"])):
        with monkeypatch.context() as patch:
            patch.setattr(
                exporting, "_version", lambda package, gone=missing: None if package == gone else "99"
            )
            result = call_here(command.main, tiny_model, "--out", tmp_path / "out", *arguments)
        assert_mistake(result, missing, "none is installed", "training does not need it", "pip install")
    with monkeypatch.context() as patch:
        patch.setattr(exporting, "_version", lambda package: "4.57.1")
        assert_mistake(call_here(command.main, tiny_model, "--out", tmp_path / "out"), "4.57.1 is installed")
    assert not (tmp_path / "out").exists()


def test_the_packages_are_those_of_the_requirements():
    files = [path.read_text().splitlines() for path in ROOT.glob("requirements*.txt")]
    lines = {line.split("  #")[0] for file in files for line in file}
    assert {*exporting.TRANSFORMERS, *exporting.SENTENCE_TRANSFORMERS, *exporting.ONNX} <= lines


def test_a_full_disk_is_a_sentence(quick, small_disk):
    """The error is of safetensors: no OSError."""
    result = call_here(command.main, quick[0], "--out", small_disk / "out", expect=1)
    assert_mistake(result, f"No space left on device: '{small_disk / 'out'}'", "run the same command again")
    assert not any(small_disk.iterdir())
