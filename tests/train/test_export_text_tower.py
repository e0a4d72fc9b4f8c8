"""An export with a Hugging Face text tower opens on another machine: from its folder, and from the hub."""

import json
import shutil

import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import noise_image
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


@pytest.mark.parametrize("family", ["roberta", "siglip"])
def test_it_opens_where_the_base_is_not(family, hub, tmp_path):
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

    for repo in ("me/tower", "me/again"):  # the same folder, twice
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
