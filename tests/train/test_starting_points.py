"""What people have is trained, evaluated and exported: each family of models, each program's folder."""

import json
import shutil
from pathlib import Path

import open_clip
import pytest
import torch
from conftest import save_tiny
from runs import newest, recipe, trained
from starting_points import save_model, tokenizer
from transformers import CLIPConfig, CLIPModel

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.embed import embed
from eval.options import Inference
from train.export.folder import export
from train.model.activation_memory import apply_checkpointing
from train.model.clip import load
from train.world import World

FAMILIES = ("roberta", "xlm-roberta", "bert", "siglip", "coca")
TRANSFORMERS = ("config.json", "model.safetensors", "preprocessor_config.json", "vocab.json", "merges.txt")
TRANSFORMERS += ("tokenizer.json", "tokenizer_config.json")


@pytest.mark.parametrize("family", FAMILIES)
def test_each_family_trains_evaluates_and_exports(family, icon_shards, tmp_path):
    """With micro_batch_size and activation_checkpointing as they are by default."""
    model = save_model(tmp_path / "base", family)
    options = {"micro_batch_size": "auto", "activation_checkpointing": "auto", "epochs": 1, "workers": 0}
    options |= {"loss": "siglip"} if family == "siglip" else {}
    trained(recipe(model, icon_shards, tmp_path / "run", **options))
    shutil.move(tmp_path / "run", tmp_path / "moved")
    for made in tmp_path.glob("base*"):  # a text tower's folder too
        shutil.rmtree(made)
    clip = load(str(tmp_path / "moved"))
    before = embed(clip, Shards(icon_shards, "val"), World(), Inference(16, 0))
    assert torch.isfinite(before.image_features).all()
    record = export(clip, tmp_path / "out")
    assert record["differences"]["open_clip"]["text_features"] == 0
    shutil.rmtree(tmp_path / "moved")
    again = embed(
        load(f"local-dir:{tmp_path / 'out'}"), Shards(icon_shards, "val"), World(), Inference(16, 0)
    )
    assert torch.equal(before.image_features, again.image_features)
    assert torch.equal(before.text_features, again.text_features)
    assert str(tmp_path) not in (tmp_path / "out" / "open_clip_config.json").read_text()


def test_a_text_tower_opens_in_open_clip_from_its_folder_and_from_the_hub(tmp_path, monkeypatch):
    """hf_model_name is a path from the working folder there, or a name on the hub."""
    clip = load(save_model(tmp_path / "base", "bert"))
    (tmp_path / "saved").mkdir()
    clip.save(tmp_path / "saved")
    text_cfg = json.loads((tmp_path / "saved" / "open_clip_config.json").read_text())["model_cfg"]["text_cfg"]
    assert text_cfg["hf_model_name"] == text_cfg["hf_tokenizer_name"] == "."
    shutil.rmtree(tmp_path / "base-bert")
    monkeypatch.chdir(tmp_path / "saved")
    model = open_clip.create_model("local-dir:.").eval()
    tokens = open_clip.get_tokenizer("local-dir:.")(["a bell"])
    clip.towers.eval()
    assert torch.equal(tokens, clip.tokenizer(["a bell"]))
    assert torch.equal(model.encode_text(tokens), clip.towers.model.encode_text(tokens))


def test_a_repository_with_its_own_text_tower_loads(hub, tmp_path):
    clip = load(save_model(tmp_path / "base", "roberta"))
    (tmp_path / "saved").mkdir()
    clip.save(tmp_path / "saved")
    hub.put("me/clip", {path.name: path.read_bytes() for path in (tmp_path / "saved").iterdir()})
    for made in tmp_path.glob("base*"):
        shutil.rmtree(made)
    assert load("hf-hub:me/clip").fingerprint() == clip.fingerprint()


def transformers_files(folder: Path) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in TRANSFORMERS if (folder / name).is_file()}


@pytest.fixture
def transformers_folder(quick, tmp_path) -> Path:
    """The files of CLIPModel alone, of an OpenAI-shaped model."""
    folder = tmp_path / "clip-vit"
    folder.mkdir()
    for name, content in transformers_files(quick[1]).items():
        (folder / name).write_bytes(content)
    return folder


def test_a_folder_of_transformers_is_the_same_model(transformers_folder, quick, tmp_path):
    clip, original = load(f"local-dir:{transformers_folder}"), load(quick[0])
    assert clip.fingerprint() == original.fingerprint()
    assert clip.config["model_cfg"]["quick_gelu"]
    assert clip.config["preprocess_cfg"] == original.config["preprocess_cfg"]
    captions = ["a bell", "an arrow that points to the left"]
    assert torch.equal(clip.tokenize(captions), original.tokenize(captions))
    clip.towers.eval()
    model = CLIPModel.from_pretrained(transformers_folder).eval()
    tokens = clip.tokenizer(captions)
    expected = model.get_text_features(input_ids=tokens).pooler_output
    torch.testing.assert_close(clip.towers.model.encode_text(tokens), expected, rtol=0, atol=1e-5)
    # and back
    export(clip, tmp_path / "out")
    written = json.loads((tmp_path / "out" / "config.json").read_text())
    assert CLIPConfig.from_dict(written).text_config.hidden_act == "quick_gelu"
    (transformers_folder / "pytorch_model.bin").write_bytes(b"")
    torch.save(model.state_dict(), transformers_folder / "pytorch_model.bin")
    (transformers_folder / "model.safetensors").unlink()
    assert load(f"local-dir:{transformers_folder}").fingerprint() == original.fingerprint()


def test_a_folder_of_transformers_is_trained(transformers_folder, icon_shards, tmp_path):
    run = trained(
        recipe(f"local-dir:{transformers_folder}", icon_shards, tmp_path / "run", epochs=1, workers=0)
    )
    assert open_clip.create_model(f"local-dir:{newest(run.folder)}").visual.image_size == (32, 32)


def test_a_repository_of_transformers_loads(transformers_folder, quick, hub):
    hub.put("openai/clip", transformers_files(transformers_folder))
    assert load("hf-hub:openai/clip").fingerprint() == load(quick[0]).fingerprint()


def test_an_own_vocabulary_is_read_by_its_own_tokenizer(transformers_folder, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer.json", "tokenizer_config.json"):
        (transformers_folder / name).unlink(missing_ok=True)
    tokenizer().save_pretrained(transformers_folder)
    clip = load(f"local-dir:{transformers_folder}")
    assert clip.tokenizer(["a bell"]).shape == (1, 77)
    assert clip.tokenizer(["a bell"])[0, :4].tolist() == [*tokenizer()(["a bell"]).input_ids[0]]
    (tmp_path / "saved").mkdir()
    clip.save(tmp_path / "saved")
    again = load(f"local-dir:{tmp_path / 'saved'}")
    assert torch.equal(again.tokenizer(["a house"]), clip.tokenizer(["a house"]))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model_type": "siglip"}, r"type 'siglip', which is not read; use .*hf-hub:timm/ViT-B-16-SigLIP"),
        (
            {"model_type": "chinese_clip"},
            r"'chinese_clip', which is not read; use a folder of transformers' CLIPModel",
        ),
        ({"projection_dim": 7}, r"is \[16, \d+\]; its config.json says \[7, \d+\]|\[\d+, 7\]"),
    ],
)
def test_another_folder_of_transformers_is_one_sentence(changes, message, transformers_folder):
    file = transformers_folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))
    with pytest.raises(UserError, match=message):
        load(f"local-dir:{transformers_folder}")


def test_a_file_of_transformers_is_sent_to_its_folder(transformers_folder):
    with pytest.raises(UserError, match=f"transformers' names.*use local-dir:{transformers_folder}"):
        load(f"ViT-B-32:{transformers_folder / 'model.safetensors'}")


def test_a_text_tower_of_transformers_recomputes_only_when_asked(tmp_path):
    """open_clip's HFTextEncoder.set_grad_checkpointing(False) switches it on."""
    model = load(save_model(tmp_path / "base", "roberta")).towers.model
    for mode in ("full", "none"):
        apply_checkpointing(model, mode, compiled=False)
        assert model.text.transformer.is_gradient_checkpointing == (mode == "full")
        assert model.visual.transformer.grad_checkpointing == (mode == "full")


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"model_cfg": {}}', '{"model_cfg": {"text_cfg": 3}}'])
def test_a_folder_with_another_config_is_one_sentence(content, tmp_path):
    save_tiny(tmp_path)
    (tmp_path / "open_clip_config.json").write_text(content)
    with pytest.raises(UserError, match=r"open_clip_config.json: (damaged|cannot be read)"):
        load(f"local-dir:{tmp_path}")


def test_a_folder_that_asks_to_run_its_code_is_refused(tmp_path, hub):
    """open_clip passes tokenizer_kwargs to AutoTokenizer.from_pretrained."""
    save_model(tmp_path / "base", "siglip")
    file = tmp_path / "base" / "open_clip_config.json"
    config = json.loads(file.read_text())
    config["model_cfg"]["text_cfg"]["tokenizer_kwargs"] = {"trust_remote_code": True}
    file.write_text(json.dumps(config))
    hub.put("me/clip", {path.name: path.read_bytes() for path in file.parent.iterdir()})
    for name in (f"local-dir:{file.parent}", "hf-hub:me/clip"):
        with pytest.raises(UserError, match="trust_remote_code"):
            load(name)
