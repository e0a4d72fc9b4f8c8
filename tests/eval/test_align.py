"""A new text tower for an old index: the map is in the projection, the vectors stay, the index accepts it."""

import contextlib
import io
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import open_clip
import pytest
import torch
import torch.nn.functional as F
from conftest import TINY, assert_mistake, call_here, save_tiny
from safetensors.torch import load_file, save_file

from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.__main__ import main
from eval.align.align import verdict
from eval.align.command import align
from eval.align.fit import RIDGES, bilinear_maps, fit_map
from eval.align.fold import check_foldable, fold
from eval.bases.projections import Pairs
from eval.bases.rank import features_of_pairs
from eval.embed import Captions, Embedded, embed_images, embed_texts, load_for_eval
from eval.options import Inference
from eval.retrieval.command import retrieval
from eval.retrieval.score import evaluate_features
from eval.search.command import search
from eval.search.index import Index
from train.metrics import DIRECTIONS
from train.model.clip import Clip, load
from train.model.towers import Towers
from train.world import World

HERE, WORLD = Inference(workers=0), World()
TEXTS = ["bell", "a much longer sentence on arrows", "house outline", ""]
OTHER = {
    "embed_dim": 12,
    "vision_cfg": {**TINY["vision_cfg"], "image_size": 24, "width": 48},
    "text_cfg": {**TINY["text_cfg"], "context_length": 14, "width": 24},
}


@pytest.fixture(scope="module")
def new_model(tmp_path_factory) -> str:
    """Other widths, another image size and context than the index's model."""
    return f"local-dir:{save_tiny(tmp_path_factory.mktemp('new'), **OTHER)}"


@pytest.fixture(scope="module")
def aligned(tmp_path_factory, new_model, icon_index, icon_shards) -> tuple[Path, dict, str]:
    """The folder that the command wrote, its JSON, and what it printed."""
    folder, printed = tmp_path_factory.mktemp("aligned"), io.StringIO()
    out, found = folder / "a model", folder / "found.json"
    with contextlib.redirect_stdout(printed):
        align(icon_index, new_model, icon_shards, out, max_images=100, json=found, inference=HERE)
    return out, json.loads(found.read_text()), printed.getvalue()


def test_the_written_model_is_the_fit_and_the_old_image_tower(aligned, new_model, tiny_model, icon_shards):
    old, new, both = (
        load_for_eval(name, HERE, WORLD) for name in (tiny_model, new_model, f"local-dir:{aligned[0]}")
    )
    train, val = (
        features_of_pairs(old, Shards(icon_shards, split), 100, WORLD, HERE, text_clip=new)[0]
        for split in ("train", "val")
    )
    assert len(train.groups) == aligned[1]["n_train_images"] == 100
    fitted = fit_map(train, val)
    assert fitted.ridge == aligned[1]["ridge"]
    expected = F.normalize(embed_texts(new, TEXTS, WORLD, HERE).double() @ fitted.matrix, dim=1)
    torch.testing.assert_close(embed_texts(both, TEXTS, WORLD, HERE).double(), expected, atol=2e-6, rtol=0)
    val = Shards(icon_shards, "val")
    assert torch.equal(embed_images(both, val, WORLD, HERE), embed_images(old, val, WORLD, HERE))
    assert both.fingerprint("image") == old.fingerprint("image") != new.fingerprint("image")
    assert both.config["preprocess_cfg"] == old.config["preprocess_cfg"]


def test_search_with_the_aligned_model_is_brute_force(aligned, icon_index, tmp_path):
    name, index = f"local-dir:{aligned[0]}", Index(icon_index)
    search(icon_index, text="bell", k=7, all_variants=True, model=name, json=tmp_path / "found.json")
    found = json.loads((tmp_path / "found.json").read_text())
    query = embed_texts(load_for_eval(name, HERE, WORLD), ["bell"], WORLD, HERE)[0].double()
    order = (torch.from_numpy(index.features.astype(np.float64)) @ query).argsort(
        descending=True, stable=True
    )
    assert [result["number"] for result in found["results"]] == order[:7].tolist()
    assert found["model"] == name


def test_the_ends_are_those_of_retrieval(aligned, tiny_model, new_model, icon_shards, tmp_path):
    out, result, printed = aligned
    for name, model in zip((tiny_model, f"local-dir:{out}", new_model), result["models"], strict=True):
        with contextlib.redirect_stdout(io.StringIO()):
            retrieval(name, icon_shards, json=tmp_path / "one.json", inference=HERE)
        one = json.loads((tmp_path / "one.json").read_text())
        assert one.items() >= {key: model[key] for key in ("metrics", "intervals", "weights_sha256")}.items()
    old, new_text, new = (model["metrics"]["text_to_image/R@10"] for model in result["models"])
    assert result["aligned_from_old"]["text_to_image/R@10"][0] == pytest.approx(new_text - old)
    if new > old:
        assert old + result["gain_kept"] * (new - old) == pytest.approx(new_text)
    else:
        assert result["gain_kept"] is None
    assert verdict(result) in printed
    gain = {"text_to_image/R@10": [0.2, 0.1, 0.3, 0.01]}
    less = {"text_to_image/R@10": [-0.2, -0.3, -0.1, 0.01]}
    kept = result | {"new_from_old": gain, "aligned_from_old": gain, "gain_kept": 0.834}
    assert verdict(kept).startswith("83 % of the gain in R@10")
    assert f"--model 'local-dir:{out}'" in verdict(kept)
    assert "embed all images again" in verdict(kept | {"aligned_from_old": less})
    assert "keep the old one" in verdict(kept | {"new_from_old": less})


def test_an_index_takes_its_image_tower_and_no_other(aligned, new_model, icon_index, tiny_model, tmp_path):
    index, name = Index(icon_index), f"local-dir:{aligned[0]}"
    with pytest.raises(UserError, match="their features do not compare"):
        index.model(new_model)
    changed = shutil.copytree(aligned[0], tmp_path / "changed")
    weights = load_file(changed / "open_clip_model.safetensors")
    weights["visual.proj"][0, 0] += 1e-3
    save_file(weights, changed / "open_clip_model.safetensors")
    # an index of an earlier version does not know its image tower
    shutil.copytree(icon_index, tmp_path / "earlier")
    del index.manifest["image_tower_sha256"]
    (tmp_path / "earlier" / "manifest.json").write_text(json.dumps(index.manifest))
    for each in (Index(icon_index), Index(tmp_path / "earlier")):
        assert each.model(name).fingerprint() == load(name).fingerprint()
        with pytest.raises(UserError, match="their features do not compare"):
            each.model(f"local-dir:{changed}")


def test_the_map_is_the_least_squares_solution_of_all_scores():
    """Brute force: each score of a caption and an image is an equation, and so is each penalised number."""
    generator = torch.Generator().manual_seed(0)
    texts, images = (torch.randn(n, d, generator=generator).double() for n, d in ((7, 4), (5, 3)))
    owned, ridge = [[0, 1], [2], [3, 4, 5], [6], [2]], 0.3
    image_of, text_of = np.array([(image, text) for image, own in enumerate(owned) for text in own]).T
    given, a, b = texts[text_of], (ridge * len(text_of) / 4) ** 0.5, (ridge * 5 / 3) ** 0.5
    eyes = [torch.eye(d, dtype=torch.float64) for d in (4, 3)]
    rows = [(given, images), (a * eyes[0], images), (given, b * eyes[1]), (a * eyes[0], b * eyes[1])]
    right = torch.zeros(len(text_of), 5, dtype=torch.float64)
    right[np.arange(len(text_of)), image_of] = 1
    equations = torch.cat([torch.kron(*pair) for pair in rows])
    wanted = torch.cat([right.flatten(), torch.zeros(len(equations) - right.numel(), dtype=torch.float64)])
    solution = torch.linalg.lstsq(equations, wanted).solution.reshape(4, 3)
    pairs = Pairs(images.float(), texts.float(), owned, np.arange(5))
    torch.testing.assert_close(bilinear_maps(pairs, [ridge])[0], solution, atol=1e-5, rtol=1e-5)


def test_the_ridge_is_the_best_one_on_val():
    """Texts of the new model that are a linear map away from the images, with noise."""
    generator = torch.Generator().manual_seed(0)
    there = torch.randn(8, 12, generator=generator)

    def drawn(n: int) -> Pairs:
        images = F.normalize(torch.randn(n, 8, generator=generator), dim=1)
        texts = F.normalize(images @ there + torch.randn(n, 12, generator=generator), dim=1)
        return Pairs(images, texts, [[number] for number in range(n)], np.arange(n))

    train, val = drawn(30), drawn(200)

    def mean_reciprocal_rank(ridge: float) -> float:
        texts = F.normalize(val.text_features @ bilinear_maps(train, [ridge])[0].float(), dim=1)
        evaluated = evaluate_features(Embedded(val.image_features, texts, one_each), val.groups, WORLD)
        return sum(evaluated["metrics"][f"{direction}/MRR"] for direction in DIRECTIONS)

    everyone = np.arange(200)
    one_each = Captions(list(map(str, everyone)), everyone, everyone, everyone, everyone)
    by_ridge = {ridge: mean_reciprocal_rank(ridge) for ridge in RIDGES}
    assert fit_map(train, val).ridge == max(by_ridge, key=by_ridge.get)
    assert max(by_ridge.values()) > min(by_ridge.values()) + 0.05


@pytest.mark.parametrize("bias", [False, True])
def test_a_linear_projection_takes_the_map_too(tiny_model, bias, tmp_path):
    """As SigLIP's tower ends: in a Linear, with a bias, of a text tower with weights of its own."""
    text = {**OTHER["text_cfg"], "proj_type": "linear", "proj_bias": bias}
    config = {**OTHER, "text_cfg": text, "custom_text": True, "init_logit_bias": -10}
    torch.manual_seed(2)
    model = open_clip.CustomTextCLIP(**{name: config[name] for name in config if name != "custom_text"})
    old = load(tiny_model)
    new = Clip(
        "new", Towers(model, (0.5,) * 3, (0.5,) * 3), old.tokenizer, {**old.config, "model_cfg": config}
    )
    check_foldable(old, new)
    matrix = torch.randn(12, 16, dtype=torch.float64)
    fold(old, new, matrix, tmp_path)
    both = load_for_eval(f"local-dir:{tmp_path}", HERE, WORLD)
    tokens = both.tokenizer(TEXTS)
    with torch.inference_mode():
        expected = F.normalize(new.towers.eval().text_features(tokens).double() @ matrix, dim=1)
        torch.testing.assert_close(both.towers.text_features(tokens).double(), expected, atol=2e-6, rtol=0)
    assert both.fingerprint("image") == old.fingerprint("image")
    assert both.towers.logit_bias == -10


def test_mistakes(aligned, icon_index, icon_shards, tiny_model, new_model, tmp_path):
    def refused(*words: str, index=icon_index, model=new_model, data=icon_shards, options=()) -> None:
        out = ["--out", tmp_path / "out", "--workers", 0, *options]
        assert_mistake(call_here(main, "align", index, model, "--data", data, *out), *words)
        assert not (tmp_path / "out").exists()

    refused("no index there", index=tmp_path / "none")
    refused("holds shards, not an index", index=icon_shards)
    refused("manifest.json", data=tmp_path)
    refused("no samples in split 'none'", options=("--split", "none"))
    refused("--split train: the map is fitted on it", options=("--split", "train"))
    refused("--max-images 0", options=("--max-images", 0))
    refused("exists already", options=("--out", aligned[0]))
    (tmp_path / "quick").mkdir()
    quick = f"local-dir:{save_tiny(tmp_path / 'quick', quick_gelu=True)}"
    refused("has GELU", "has QuickGELU", model=quick)
    none = SimpleNamespace(name="none", towers=SimpleNamespace(model=torch.nn.Linear(1, 1)))
    with pytest.raises(UserError, match="class Linear"):
        check_foldable(load(tiny_model), none)
