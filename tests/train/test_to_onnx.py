"""The towers in onnxruntime: the same features as open_clip's at any batch size, in one file or two."""

import numpy as np
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny

from data_prep.errors import UserError
from train.export import to_onnx
from train.export.folder import export, table
from train.model.clip import load

TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}


@pytest.mark.parametrize(
    ("changes", "in_one_file"), [({"quick_gelu": True}, True), ({"vision_cfg": TIMM}, False)]
)
def test_features_are_open_clips_at_any_batch_size(changes, in_one_file, tmp_path, monkeypatch):
    monkeypatch.setattr(to_onnx, "ONE_FILE_BYTES", 2e9 if in_one_file else 0)
    save_tiny(tmp_path, **changes)
    clip, out = load(f"local-dir:{tmp_path}"), tmp_path / "out"
    record = export(clip, out, onnx=True)
    written = {name for name, file in record["files"].items() if file["format"] == "onnx"}
    assert written == {"image.onnx", "text.onnx"} | (
        set() if in_one_file else {"image.onnx.data", "text.onnx.data"}
    )
    assert max(record["differences"]["onnx"].values()) <= 1e-5
    assert "image.onnx" in table(record)
    clip.towers.eval()
    image_session = onnxruntime.InferenceSession(out / "image.onnx")
    text_session = onnxruntime.InferenceSession(out / "text.onnx")
    for batch in (1, 5):
        pixels = torch.rand(batch, 3, *clip.image_size)
        ids = clip.tokenizer([f"a brick, number {number}" for number in range(batch)])
        with torch.no_grad():
            expected = [
                F.normalize(x, dim=-1)
                for x in (clip.towers.model.encode_image(pixels), clip.towers.model.encode_text(ids))
            ]
        features = image_session.run(["features"], {"pixels": pixels.numpy()})
        features += text_session.run(["features"], {"tokens": ids.numpy()})
        for exported, reference in zip(features, expected, strict=True):
            assert exported.dtype == np.float32
            np.testing.assert_allclose(exported, reference.numpy(), rtol=0, atol=1e-5)


def test_a_wrong_tower_is_noticed(tiny_model, tmp_path, monkeypatch):
    # not L2-normed
    monkeypatch.setattr(
        to_onnx._Tower, "forward", lambda tower, inputs: getattr(tower.model, tower.encode)(inputs)
    )
    with pytest.raises(UserError, match="onnx image_features by"):
        export(load(tiny_model), tmp_path / "out", onnx=True)
    assert not list(tmp_path.iterdir())
