"""An export with a Hugging Face text tower opens on another machine: from its folder, and from the hub."""

import json
import shutil
from pathlib import Path

import onnxruntime
import torch
import torch.nn.functional as F
from conftest import noise_image
from hub import Hub
from starting_points import save_model

import train.publish.__main__ as publish
from train.export.folder import export
from train.export.snippets import LABELS, blocks, run, use
from train.model.clip import load


def answer(clip, image) -> torch.Tensor:
    """The probabilities of the snippets' captions."""
    with torch.no_grad():
        model = clip.towers.eval().model
        image_features = model.encode_image(clip.preprocess(image)[None], normalize=True)
        text_features = model.encode_text(clip.tokenizer(LABELS), normalize=True)
        logits = model.logit_scale.exp() * image_features @ text_features.T
        return logits.softmax(dim=1)[0].double()


def test_it_opens_where_the_base_is_not(hub, tmp_path):
    """One hub for both families: transformers keeps the address of the first one that it asked."""
    for family in ("roberta", "siglip"):
        (tmp_path / family).mkdir()
        _opens_elsewhere(family, hub, tmp_path / family)


def _opens_elsewhere(family: str, hub: Hub, tmp_path: Path) -> None:
    image = noise_image(32, 32)
    image.save(tmp_path / "image.png")
    (tmp_path / "home").mkdir()
    clip = load(save_model(tmp_path / "home" / "base", family))
    expected = answer(clip, image)
    record = export(clip, tmp_path / "home" / "out")
    moved = tmp_path / "elsewhere" / "model"
    shutil.copytree(tmp_path / "home" / "out", moved)
    shutil.rmtree(tmp_path / "home")
    for path in moved.rglob("*.json"):
        assert str(tmp_path) not in path.read_text(), path
    assert torch.equal(answer(load(f"local-dir:{moved}"), image), expected)
    (code,) = blocks(use(record, str(moved)))
    torch.testing.assert_close(run(code, [tmp_path / "image.png"])[0], expected, rtol=0, atol=1e-6)

    for repo in (f"me/{family}", f"me/{family}-again"):  # the same folder, twice
        publish.publish(str(moved), repo, yes=True)
        repository = hub.repos[repo]
        config = json.loads(repository.commits[repository.head]["open_clip_config.json"])
        assert config["model_cfg"]["text_cfg"]["hf_tokenizer_name"] == repo
        (code,) = blocks(use(record, repo))
        assert "text_cfg" not in code
        torch.testing.assert_close(run(code, [tmp_path / "image.png"])[0], expected, rtol=0, atol=1e-6)
    assert torch.equal(answer(load(f"local-dir:{moved}"), image), expected)  # still opens as a folder


def test_its_onnx_takes_the_whole_context(tmp_path):
    clip = load(save_model(tmp_path / "base", "bert"))
    export(clip, tmp_path / "out", onnx=True)
    session = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "text_model.onnx")
    ids = clip.tokenizer(["a bell", "a house and a tree", "arrow left"])
    mask = torch.ones_like(ids)
    (features,) = session.run(None, {"input_ids": ids.numpy(), "attention_mask": mask.numpy()})
    with torch.no_grad():
        expected = F.normalize(clip.towers.eval().model.encode_text(ids), dim=-1)
    torch.testing.assert_close(torch.from_numpy(features), expected, rtol=0, atol=1e-5)
