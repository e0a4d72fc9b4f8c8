"""`eval bases`: models in the order of what their features can become, not of how they are aligned."""

import json

import numpy as np
import torch
import torch.nn.functional as F
from conftest import assert_mistake, call_here

from data_prep.shards import Shards
from eval.__main__ import main
from eval.bases.command import bases
from eval.bases.projections import Pairs, Projections, fit, score
from eval.bases.rank import rank_bases, verdict
from eval.embed import embed, load_for_eval
from eval.options import Inference
from eval.retrieval.score import QueryScores, evaluate_features
from train.world import World

N, WIDTH = 200, 8


def pairs_with(noise: float, rotation: torch.Tensor) -> Pairs:
    """Images near their texts, and the texts rotated: nothing is found as it is, all by a matrix."""
    generator = torch.Generator().manual_seed(0)
    texts = F.normalize(torch.randn(N, WIDTH, generator=generator), dim=1)
    images = F.normalize(texts + noise * torch.randn(N, WIDTH, generator=generator), dim=1)
    return Pairs(images, texts @ rotation, [[number] for number in range(N)], np.arange(N))


def test_a_rotation_between_the_towers_is_undone():
    rotation, _ = torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(1)))
    aligned, rotated = pairs_with(0.05, torch.eye(WIDTH)), pairs_with(0.05, rotation)
    everyone, as_it_is = np.arange(N), Projections(torch.eye(WIDTH), torch.eye(WIDTH), 0)
    assert score(as_it_is, aligned, everyone) > 0.8
    assert score(as_it_is, rotated, everyone) < 0.1
    fitted = fit(rotated)
    assert fitted.steps > 0
    assert score(fitted, rotated, everyone) > 0.5
    assert all(map(torch.equal, fitted[:2], fit(rotated)[:2]))


def test_what_cannot_be_fitted_is_left_as_it_is():
    """Captions without relation to the images: no round is better on held-out groups, or hardly."""
    pairs = pairs_with(0.1, torch.eye(WIDTH))
    shuffled = pairs._replace(texts=[[(7 * number + 3) % N] for number in range(N)])
    assert score(fit(shuffled), shuffled, np.arange(N)) < 0.2
    one = pairs._replace(
        image_features=pairs.image_features[:1], texts=pairs.texts[:1], groups=np.zeros(1, np.int64)
    )
    assert torch.equal(fit(one).image, torch.eye(WIDTH))


def test_the_command_agrees_with_retrieval(tiny_model, tuned_run, icon_shards, tmp_path, capsys):
    """The zero-shot figure of each model is retrieval's; the order is that of the fitted figures."""
    run, out, inference, world = str(tuned_run[0]), tmp_path / "bases.json", Inference(workers=0), World()
    bases((tiny_model, run), icon_shards, max_images=64, json=out, inference=inference)
    shown = capsys.readouterr().out
    result = json.loads(out.read_text())
    names = [base["model"] for base in result["bases"]]
    assert sorted(names) == sorted([tiny_model, run])
    scores = [base["fitted"]["metrics"]["mean/R@1"] for base in result["bases"]]
    assert scores == sorted(scores, reverse=True)
    assert result["bases"][0]["from_best"] is None
    shards = Shards(icon_shards, "val")
    for base in result["bases"]:
        clip = load_for_eval(base["model"], inference, world)
        expected = evaluate_features(embed(clip, shards, world, inference), shards.groups, world)["metrics"]
        assert {name: base["zero_shot"]["metrics"][name] for name in expected} == expected
        assert np.isclose(base["zero_shot_R@1"][0], expected["mean/R@1"])
        assert base["n_train_images"] == min(64, len(Shards(icon_shards, "train")))
        assert base["model"] in shown
    assert f"Start with {names[0]}." in shown


def test_a_base_that_is_as_good_and_faster_is_named():
    rng = np.random.default_rng(0)
    hits, groups = rng.integers(0, 2, 200).astype(float), np.arange(200)
    directions = ("image_to_text", "text_to_image")

    def scored(values: np.ndarray) -> QueryScores:
        return QueryScores({f"{name}/R@1": values for name in directions}, dict.fromkeys(directions, groups))

    def result(name: str, values: np.ndarray, speed: float) -> dict:
        figures = {"metrics": {"mean/R@1": float(values.mean())}}
        return {"model": name, "zero_shot": figures, "fitted": figures, "embed_images_per_s": speed}

    other = hits.copy()
    other[np.flatnonzero(hits)[0]] = 0  # one hit of two hundred less
    none = np.zeros(200)
    given = {"big": (hits, 10), "small": (other, 30), "bad": (none, 90)}
    ranked = rank_bases(
        [result(name, *each) for name, each in given.items()],
        [dict.fromkeys(("zero_shot", "fitted"), scored(values)) for values, _ in given.values()],
    )["bases"]
    assert [base["model"] for base in ranked] == ["big", "small", "bad"]
    assert verdict(ranked) == (
        "Start with big. small cannot be told from it on this data, and is 3.0 times as fast."
    )


def test_mistakes(tiny_model, icon_shards):
    assert_mistake(call_here(main, "bases", "--data", icon_shards), "no MODEL given")
    assert_mistake(
        call_here(main, "bases", tiny_model, "--data", icon_shards, "--max-images", 0), "--max-images 0"
    )
    on_train = call_here(main, "bases", tiny_model, "--data", icon_shards, "--split", "train")
    assert_mistake(on_train, "--split train: the matrices are fitted to that split")


def test_one_model_is_not_ranked():
    assert verdict([{"model": "only", "fitted_R@1": [0.5, 0.4, 0.6]}]).startswith(
        "One model cannot be ranked"
    )
