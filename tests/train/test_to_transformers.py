"""CLIPModel of the exported files: the same features by every class, the same tokens; unsupported models."""

import json
from pathlib import Path

import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, noise_image, save_tiny

from data_prep.shards import sha256_of
from train.export import to_transformers
from train.export.folder import export, table
from train.model.clip import Clip, load
from train.model.towers import Towers

CAPTIONS = [
    "a red brick",
    "A  RED   Brick!",
    "it's 2x4, isn't it? don't",
    "hello!!! a_b-c/d 1234567890",
    "café cafe\u0301 x\u00a0y",
    "emoji 😀👍🏽 日本語 テスト नमस्ते İstanbul straße",
    "½ ² Ⅷ",
    "a\nb\tc",
    "",
    "…—–",
    "word " * 100,
    "über-" * 60,
]
CLEANED = [
    "a &amp; b &lt;c&gt;",
    "it’s “quoted”",
    "ﬁne",
    "ＦＵＬＬ width",
    "ΣΑΣ",
    "mojibake cafÃ©",
    "&amp;amp;lt;",
    "control\x07bell",
]
VISION, TEXT = TINY["vision_cfg"], TINY["text_cfg"]


def features(output) -> torch.Tensor:
    """L2-normed; get_*_features returns a tensor in transformers 4 and an output object in 5."""
    return F.normalize(getattr(output, "pooler_output", output).float(), dim=-1)


def until_end(rows: list[list[int]]) -> list[list[int]]:
    return [list(row)[: list(row).index(49407) + 1] for row in rows]


def set_preprocess(folder: Path, **changes) -> None:
    config = json.loads((folder / "open_clip_config.json").read_text())
    config["preprocess_cfg"] |= changes
    (folder / "open_clip_config.json").write_text(json.dumps(config))


def test_transformers_gives_the_same_features_through_every_class(quick):
    from transformers import AutoModelForZeroShotImageClassification, AutoProcessor, CLIPModel, CLIPProcessor

    name, out, _ = quick
    clip = load(name)
    clip.towers.eval()
    for model_class, processor_class in (
        (CLIPModel, CLIPProcessor),
        (AutoModelForZeroShotImageClassification, AutoProcessor),
    ):
        model, loading = model_class.from_pretrained(out, output_loading_info=True)
        assert not any(loading.values()), loading
        assert (type(model), model.dtype) == (CLIPModel, torch.float32)
        texts = processor_class.from_pretrained(out)(
            text=CAPTIONS, padding=True, truncation=True, return_tensors="pt"
        )
        pixels = clip.preprocess(noise_image())[None]
        with torch.no_grad():
            expected_image = F.normalize(clip.towers.model.encode_image(pixels), dim=-1)
            expected_text = F.normalize(clip.towers.model.encode_text(clip.tokenizer(CAPTIONS)), dim=-1)
            output = model(**texts, pixel_values=pixels)
            zero_padded = model.get_text_features(clip.tokenizer(CAPTIONS))
        assert (output.image_embeds - expected_image).abs().max() <= 1e-6
        assert (output.text_embeds - expected_text).abs().max() <= 1e-6
        assert (features(zero_padded) - expected_text).abs().max() <= 1e-6
        scale = clip.towers.model.logit_scale.exp()
        assert (output.logits_per_image - scale * expected_image @ expected_text.T).abs().max() <= 1e-5


def test_the_config_says_what_the_model_is(quick):
    _, out, record = quick
    config = json.loads((out / "config.json").read_text())
    assert (config["model_type"], config["architectures"], config["projection_dim"]) == (
        "clip",
        ["CLIPModel"],
        16,
    )
    vision, text = config["vision_config"], config["text_config"]
    assert vision["hidden_act"] == text["hidden_act"] == "quick_gelu"
    assert (vision["num_attention_heads"], vision["image_size"], vision["patch_size"]) == (2, 32, 8)
    assert (
        text["num_attention_heads"],
        text["max_position_embeddings"],
        text["bos_token_id"],
        text["eos_token_id"],
    ) == (2, 77, 49406, 49407)
    preprocess = json.loads((out / "preprocessor_config.json").read_text())
    assert (preprocess["image_mean"], preprocess["image_std"]) == ([0.5, 0.4, 0.3], [0.5, 0.25, 0.2])
    assert (preprocess["size"], preprocess["resample"], preprocess["do_center_crop"]) == (
        {"shortest_edge": 32},
        3,
        True,
    )
    assert json.loads((out / "export.json").read_text()) == record
    files = {path for path in out.rglob("*") if path.is_file()}
    on_disk = {path.relative_to(out).as_posix() for path in files} - {"export.json", ".made.json"}
    assert on_disk == set(record["files"])
    for name, file in record["files"].items():
        assert (file["sha256"], file["bytes"]) == (sha256_of(out / name), (out / name).stat().st_size)


@pytest.mark.parametrize("length", [77, 10])
def test_token_ids_are_open_clips(quick, tiny_model, length, tmp_path):
    from transformers import AutoTokenizer, CLIPProcessor, CLIPTokenizer

    name, out, record = quick
    if length == 10:
        name, out = tiny_model, tmp_path / "out"
        record = export(load(name), out)
    reference = load(name).tokenizer
    assert reference(["x"]).shape == (1, length)
    expected = until_end(reference(CAPTIONS).tolist())
    assert max(map(len, expected)) == length
    for tokenizer in (
        CLIPTokenizer.from_pretrained(out),
        AutoTokenizer.from_pretrained(out),
        CLIPProcessor.from_pretrained(out).tokenizer,
    ):
        assert tokenizer.model_max_length == length
        assert tokenizer(CAPTIONS, truncation=True).input_ids == expected
        assert tokenizer(
            [reference.clean_fn(caption) for caption in CLEANED], truncation=True
        ).input_ids == until_end(reference(CLEANED).tolist())
    assert record["differences"]["transformers"]["text_features"] <= 1e-6


def test_captions_that_open_clip_cleans_are_counted(quick, monkeypatch, tmp_path):
    monkeypatch.setattr("train.export.reference.FIXED_CAPTIONS", ["plain", "it's", *CLEANED])
    record = export(load(quick[0]), tmp_path / "out")
    assert record["differences"]["transformers"]["captions_cleaned"] == len(CLEANED)
    assert "8 captions contain curly quotes" in table(record)


def test_the_snippets_of_a_model_card_run_in_fp16(quick):
    """As the LEGO model's card shows: load in half precision, embed, classify, and the pipeline."""
    from transformers import CLIPModel, CLIPProcessor, pipeline

    name, out, _ = quick
    model = CLIPModel.from_pretrained(out, torch_dtype=torch.float16)
    processor = CLIPProcessor.from_pretrained(out)
    assert model.dtype == torch.float16
    image, labels = noise_image(), ["a red brick", "a blue plate", "a wheel"]
    inputs = processor(text=labels, images=image, return_tensors="pt", padding=True)
    with torch.no_grad():
        text = features(
            model.get_text_features(input_ids=inputs.input_ids, attention_mask=inputs.attention_mask)
        )
        images = features(model.get_image_features(pixel_values=inputs.pixel_values.half()))
        probabilities = model(**inputs).logits_per_image.softmax(dim=1)[0]
    clip = load(name)
    clip.towers.eval()
    with torch.no_grad():
        expected_image, expected_text, scale = clip.towers(
            clip.eval_transform(image)[None], clip.tokenizer(labels)
        )
    assert (text * expected_text).sum(dim=1).min() > 0.9999
    assert (images * expected_image).sum() > 0.999
    expected = (scale * expected_image @ expected_text.T).softmax(dim=1)[0]
    torch.testing.assert_close(probabilities.float(), expected.detach(), rtol=0, atol=0.01)
    ask = pipeline("zero-shot-image-classification", model=str(out))
    answer = {
        label["label"]: label["score"]
        for label in ask(image, candidate_labels=labels, hypothesis_template="{}")
    }
    torch.testing.assert_close(
        torch.tensor([answer[label] for label in labels]), expected.detach(), rtol=0, atol=0.01
    )


@pytest.mark.parametrize("preprocess", [{"resize_mode": "squash"}, {"interpolation": "bilinear"}])
def test_other_preprocessing_is_exported(preprocess, tmp_path):
    save_tiny(tmp_path)
    set_preprocess(tmp_path, **preprocess)
    record = export(load(f"local-dir:{tmp_path}"), tmp_path / "out")
    assert record["differences"]["transformers"]["pixels"] <= 1e-6
    assert record["differences"]["open_clip"]["pixels"] == 0


def test_one_crop_in_four_is_shifted_by_a_pixel(quick):
    """open_clip rounds half of an odd number to even, transformers down, as `compare` documents."""
    from transformers import CLIPImageProcessorPil

    name, out, _ = quick
    clip, processor = load(name), CLIPImageProcessorPil.from_pretrained(out)
    for more in range(8):
        wide = noise_image(32 + more, 32)
        ours, exported = clip.preprocess(wide), processor(wide, return_tensors="pt").pixel_values[0]
        if more % 4 == 3:
            ours, exported = ours[..., :-1], exported[..., 1:]
        torch.testing.assert_close(exported, ours, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("changes", "setting"),
    [
        ({"vision_cfg": {**VISION, "pool_type": "avg"}}, "vision_cfg.pool_type = 'avg'"),
        ({"vision_cfg": {**VISION, "no_ln_pre": True}}, "vision_cfg.no_ln_pre = True"),
        ({"vision_cfg": {**VISION, "attentional_pool": True}}, "vision_cfg.attentional_pool = True"),
        ({"vision_cfg": {**VISION, "ls_init_value": 0.1}}, "vision_cfg.ls_init_value = 0.1"),
        ({"vision_cfg": {**VISION, "act_kwargs": {"approximate": "tanh"}}}, "vision_cfg.act_kwargs"),
        ({"vision_cfg": {**VISION, "image_size": [16, 24]}}, "image_size = [16, 24]"),
        (
            {"vision_cfg": {**VISION, "layers": [1, 1, 1, 1], "image_size": 32}},
            "vision_cfg.layers = [1, 1, 1, 1]",
        ),
        ({"text_cfg": {**TEXT, "no_causal_mask": True}}, "text_cfg.no_causal_mask = True"),
        ({"text_cfg": {**TEXT, "pool_type": "last"}}, "text_cfg.pool_type = 'last'"),
        ({"text_cfg": {**TEXT, "proj_bias": True}}, "text_cfg.proj_bias = True"),
        ({"init_logit_bias": -10}, "init_logit_bias = -10"),
    ],
)
def test_unsupported_settings_are_named(changes, setting, tmp_path):
    save_tiny(tmp_path, **changes)
    assert setting in " ".join(to_transformers.unsupported_settings(load(f"local-dir:{tmp_path}")))


def test_unsupported_weights_are_named(tiny_model):
    clip = load(tiny_model)
    assert to_transformers.unsupported_settings(clip) == to_transformers.unsupported_weights(clip) == []
    clip.towers.model.visual.extra = torch.nn.Parameter(torch.zeros(3))
    assert to_transformers.unsupported_weights(clip) == ["visual.extra [3]"]


@pytest.mark.parametrize("name", ["ViT-L-14", "ViT-B-32-quickgelu", "ViT-H-14", "ViT-B-16-plus-240"])
def test_known_architectures_fit(name):
    """Names and shapes only: these have hundreds of millions of weights."""
    config = open_clip.get_model_config(name)
    with torch.device("meta"):
        model = open_clip.CLIP(**config)
    towers = Towers(model, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    clip = Clip(
        name,
        towers,
        open_clip.get_tokenizer(name),
        {"model_cfg": config, "preprocess_cfg": {"resize_mode": "shortest"}},
    )
    assert to_transformers.unsupported_settings(clip) == to_transformers.unsupported_weights(clip) == []


def test_other_supported_settings(tmp_path):
    """Another norm eps, a narrow MLP, another head width, patch dropout, another initial temperature."""
    vision = {**VISION, "head_width": 8, "mlp_ratio": 2.0, "norm_kwargs": {"eps": 1e-2}, "patch_dropout": 0.5}
    save_tiny(
        tmp_path, vision_cfg=vision, text_cfg={**TEXT, "norm_kwargs": {"eps": 1e-3}}, init_logit_scale=3.0
    )
    record = export(load(f"local-dir:{tmp_path}"), tmp_path / "out")
    assert record["open_clip_only"] == ""
    assert record["differences"]["transformers"]["image_features"] <= 1e-6


def test_longest_edge_resizing_is_for_open_clip_only(tmp_path):
    save_tiny(tmp_path)
    set_preprocess(tmp_path, resize_mode="longest")
    assert (
        "resize_mode = 'longest'" in export(load(f"local-dir:{tmp_path}"), tmp_path / "out")["open_clip_only"]
    )
