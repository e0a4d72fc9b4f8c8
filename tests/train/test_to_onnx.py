"""The towers in onnxruntime: open_clip's features at any batch size and length, in one file or two, and what
int8 costs.
"""

import json

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
import torch.nn.functional as F
from conftest import save_tiny

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.embed import embed
from eval.options import Inference
from eval.retrieval.score import evaluate_features
from eval.validation import features_metrics
from train.export import int8, to_onnx
from train.export.folder import export, table
from train.model.clip import load
from train.world import World

TIMM = {"timm_model_name": "test_vit", "timm_pool": "token", "image_size": 160}
FILES = {
    f"onnx/{tower}{suffix}.onnx" for tower in ("vision_model", "text_model") for suffix in ("", "_quantized")
}


@pytest.mark.parametrize(
    ("changes", "in_one_file"), [({"quick_gelu": True}, True), ({"vision_cfg": TIMM}, False)]
)
def test_features_are_open_clips_at_any_batch_size_and_length(changes, in_one_file, tmp_path, monkeypatch):
    monkeypatch.setattr(to_onnx, "ONE_FILE_BYTES", 2e9 if in_one_file else 0)
    save_tiny(tmp_path, **changes)
    clip, out = load(f"local-dir:{tmp_path}"), tmp_path / "out"
    record = export(clip, out, onnx=True)
    written = {name for name, file in record["files"].items() if file["format"] == "onnx"}
    assert written >= FILES
    assert (written == FILES) == in_one_file
    assert max(record["differences"]["onnx"].values()) <= 1e-5
    assert "onnx/vision_model.onnx" in table(record)
    clip.towers.eval()
    vision, text = (
        onnxruntime.InferenceSession(out / f"onnx/{name}_model.onnx") for name in ("vision", "text")
    )
    assert [given.name for given in vision.get_inputs()] == ["pixel_values"]
    assert [given.name for given in text.get_inputs()] == ["input_ids", "attention_mask"]
    for batch in (1, 5):
        pixels = torch.rand(batch, 3, *clip.image_size)
        captions = [f"a brick, number {number}" for number in range(batch)]
        ids = clip.tokenizer(captions)
        with torch.no_grad():
            expected_images = F.normalize(clip.towers.model.encode_image(pixels), dim=-1)
            expected_texts = F.normalize(clip.towers.model.encode_text(ids), dim=-1)
        (images,) = vision.run(["image_embeds"], {"pixel_values": pixels.numpy()})
        end = int(ids.argmax(dim=1).max()) + 1
        for length in (ids.shape[1], end):  # the mask changes nothing, nor does padding
            given = {
                "input_ids": ids[:, :length].numpy(),
                "attention_mask": np.zeros((batch, length), np.int64),
            }
            (texts,) = text.run(["text_embeds"], given)
            np.testing.assert_allclose(texts, expected_texts.numpy(), rtol=0, atol=1e-5)
        assert images.dtype == np.float32
        np.testing.assert_allclose(images, expected_images.numpy(), rtol=0, atol=1e-5)


def test_a_wrong_tower_is_noticed(tiny_model, tmp_path, monkeypatch):
    # not L2-normed
    monkeypatch.setattr(
        to_onnx._Vision, "forward", lambda tower, pixel_values: tower.model.encode_image(pixel_values)
    )
    with pytest.raises(UserError, match="onnx image_features by"):
        export(load(tiny_model), tmp_path / "out", onnx=True)
    assert not list(tmp_path.iterdir())


def test_a_text_tower_that_sees_padding_takes_the_whole_context(tmp_path):
    """As SigLIP's: not causal, the last token is pooled."""
    text = {"context_length": 10, "vocab_size": 49408, "width": 16, "heads": 2, "layers": 1}
    save_tiny(tmp_path, text_cfg={**text, "no_causal_mask": True, "pool_type": "last"})
    record = export(load(f"local-dir:{tmp_path}"), tmp_path / "out", onnx=True)
    assert record["open_clip_only"]
    session = onnxruntime.InferenceSession(tmp_path / "out" / "onnx" / "text_model.onnx")
    assert session.get_inputs()[0].shape == ["batch", 10]


def test_what_int8_costs_is_evals_figure(quick, icon_shards, tmp_path):
    clip = load(quick[0])
    record = export(clip, tmp_path / "out", onnx=True, data=icon_shards, recall=features_metrics)
    measured = record["int8"]
    shards = Shards(icon_shards, "val")
    embedded = embed(clip, shards, World(), Inference(workers=0))
    metrics = evaluate_features(embedded, shards.groups, World())["metrics"]
    assert measured["n_images"] == len(shards)
    assert measured["fp32"] == {name: metrics[name] for name in int8.NAMES}
    assert 0.9 < measured["min_cosine"] < 0.999999
    assert f"among {len(shards)} images; the cosine to fp32 is at least 0.9" in table(record)
    assert "image to text R@1, 5, 10 " in table(record)
    assert json.loads((tmp_path / "out" / "export.json").read_text()) == record


def test_int8_is_a_quarter_of_the_size(quick, tmp_path):
    """Of what has weights: all multiplications with a weight, and the token embedding."""
    export(load(quick[0]), tmp_path / "out", onnx=True)
    folder = tmp_path / "out" / "onnx"
    assert (folder / "text_model_quantized.onnx").stat().st_size < 0.3 * (
        folder / "text_model.onnx"
    ).stat().st_size
    for name in ("vision_model", "text_model"):
        graph = onnx.load(folder / f"{name}_quantized.onnx").graph
        weights = {
            tensor.name for tensor in graph.initializer if len(tensor.dims) == 2 and tensor.data_type == 1
        }
        left = [node.op_type for node in graph.node if weights & {*node.input}]
        assert not {"MatMul", "Gemm"} & {*left}
