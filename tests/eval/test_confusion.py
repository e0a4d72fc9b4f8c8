"""Caption confusion equals brute force, and is exactly at chance for a collapsed model."""

import itertools
import json
import math
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import TINY, save_tiny

import train.model.clip
from data_prep.build.pipeline import Parallelism, Reading, Splitting, build
from data_prep.errors import NotFinite, UserError
from data_prep.shards import Shards
from data_prep.tables import text_of
from eval.compare.command import confusion
from eval.compare.confusion import answer, count, heatmap, questions, read_columns, result_of
from eval.compare.confusion_page import confusion_parts, write_confusion_page
from eval.compare.draws import column_of, draw, drawn_accuracy, expected_accuracy
from eval.options import Inference
from train.world import World


def unit(*shape: int, seed: int = 0) -> torch.Tensor:
    return torch.nn.functional.normalize(
        torch.randn(*shape, generator=torch.Generator().manual_seed(seed)), dim=-1
    )


def plain(n: int, per_group: int = 1):
    """n images, each with a caption of its own."""
    groups = np.arange(n) // per_group
    return (
        column_of("caption", [[f"text {at:03d}"] for at in range(n)], groups),
        [f"key{at}" for at in range(n)],
        groups,
    )


@pytest.mark.parametrize("k", [1, 2, 3, 6])
def test_the_closed_form_is_the_mean_over_all_subsets(k):
    """Of 6 wrong captions, G above and E tied, for every G and E."""
    for above, tied in ((G, E) for G in range(7) for E in range(7 - G)):
        kinds = [1] * above + [0] * tied + [-1] * (6 - above - tied)
        draws = [0 if 1 in drawn else 1 / (1 + drawn.count(0)) for drawn in itertools.combinations(kinds, k)]
        found = expected_accuracy(np.array([above]), np.array([tied]), np.array([6]), k)
        assert found[0] == pytest.approx(np.mean(draws), abs=1e-12)
    ratios = [math.comb(6 - above, k) / math.comb(6, k) for above in range(7)]
    np.testing.assert_allclose(
        expected_accuracy(np.arange(7), np.zeros(7, int), np.full(7, 6), k), ratios, atol=1e-12
    )


def test_the_closed_form_is_stable_where_binomials_are_not():
    wrong = np.array([200_000] * 3)
    found = expected_accuracy(np.array([0, 1, 0]), np.array([0, 0, 200_000]), wrong, 1000)
    np.testing.assert_allclose(found, [1, 1 - 1000 / 200_000, 1 / 1001], rtol=1e-9)


def test_draws_are_distinct_uniform_and_never_of_the_own_group():
    column, keys, _ = plain(12, per_group=3)
    seen = np.zeros((12, 12))
    for seed in range(400):
        for at, drawn in enumerate(draw(column, keys, 4, seed)):
            assert len(set(drawn.tolist())) == 4
            assert not set(drawn.tolist()) & set(column.own[at].tolist())
            seen[at, drawn] += 1
    assert (np.sort(seen, 1)[:, :3] == 0).all()
    others = np.sort(seen, 1)[:, 3:]
    assert abs(others - 400 * 4 / 9).max() < 5 * math.sqrt(400 * 4 / 9 * 5 / 9), others


def test_draws_depend_on_seed_and_key_and_not_on_the_order():
    column, keys, groups = plain(30)
    texts = [[column.texts[at]] for at in column.first]
    drawn = draw(column, keys, 5, seed=3)
    order = np.random.default_rng(0).permutation(30)
    moved = column_of("caption", [texts[at] for at in order], groups[order])
    assert (draw(moved, [keys[at] for at in order], 5, seed=3) == drawn[order]).all()
    assert (draw(column, keys, 5, seed=4) != drawn).any()
    assert (draw(column, [f"other{at}" for at in range(30)], 5, seed=3) != drawn).any()


def test_fewer_captions_than_k_are_all_drawn():
    column, keys, _ = plain(4)
    assert [sorted(row.tolist()) for row in draw(column, keys, 5, 0)] == [
        [-1, -1, *sorted({0, 1, 2, 3} - {at})] for at in range(4)
    ]
    features = torch.ones(4, 4) / 2
    assert drawn_accuracy(features, features, column.first, draw(column, keys, 5, 0)).tolist() == [1 / 4] * 4
    assert expected_accuracy(np.zeros(4, int), np.full(4, 3), column.n_wrong, 5) == pytest.approx([1 / 4] * 4)


@pytest.mark.parametrize("k", [1, 4, 9])
def test_a_collapsed_model_is_exactly_at_chance_and_a_perfect_one_right(k):
    column, keys, _ = plain(24, per_group=2)
    drawn = draw(column, keys, k, 0)
    same, perfect = unit(1, 8).expand(24, 8).contiguous(), torch.eye(24)
    for features, accuracy in ((same, 1 / (k + 1)), (perfect, 1.0)):
        found = count(features, features, column, World(), tile=7)
        assert drawn_accuracy(features, features, column.first, drawn).tolist() == [accuracy] * 24
        np.testing.assert_allclose(
            expected_accuracy(found.above, found.tied, column.n_wrong, k), accuracy, rtol=1e-14
        )
    # all alike, so no hub
    assert count(same, same, column, World()).wrong_firsts == pytest.approx([22 / 24] * 24)
    assert count(perfect, perfect, column, World()).wrong_firsts.sum() == 0


def test_counts_equal_brute_force_and_many_draws_agree_with_the_closed_form():
    groups = np.array([0, 0, 1, 2, 2, 3, 4, 5, 6, 6, 7, 8, 9])
    texts = [[f"t{at}"] for at in range(13)]
    # shared in a group, missing, shared between groups
    texts[4], texts[5], texts[12] = (["t3", "t0"], [], ["t2"])
    column = column_of("caption", texts, groups)
    images, captions = unit(13, 4), unit(len(column.texts), 4, seed=1)
    captions[3] = captions[7]
    scores = (images @ captions.T).numpy()
    found, wrong_firsts = count(images, captions, column, World(), tile=5), np.zeros(len(column.texts))
    for at in np.flatnonzero(column.first >= 0):
        wrong = [text for text in range(len(column.texts)) if text not in column.own[at]]
        lead = scores[at, wrong] - scores[at, column.first[at]]
        assert (found.above[at], found.tied[at]) == ((lead > 1e-6).sum(), (abs(lead) <= 1e-6).sum())
        top = [text for text in range(len(column.texts)) if scores[at, text] >= scores[at].max() - 1e-6]
        for text in top:
            wrong_firsts[text] += (text not in column.own[at]) / len(top)
    assert found.wrong_firsts == pytest.approx(wrong_firsts)
    assert column.n_wrong[5] == 0
    scored = np.flatnonzero(column.n_wrong)
    keys = [f"key{at}" for at in range(13)]
    draws = [
        drawn_accuracy(images[scored], captions, column.first[scored], draw(column, keys, 3, seed)[scored])
        for seed in range(1500)
    ]
    expected = expected_accuracy(found.above[scored], found.tied[scored], column.n_wrong[scored], 3)
    assert abs(np.mean(draws, 0) - expected).max() < 4.5 * 0.5 / math.sqrt(1500)
    assert abs(np.mean(draws) - expected.mean()) < 4.5 * 0.5 / math.sqrt(1500 * len(scored))


def test_rows_of_a_heatmap_are_the_softmax_over_captions():
    images, captions = unit(5, 8), unit(5, 8, seed=1)
    cells = heatmap(images, captions, 100.0)
    np.testing.assert_allclose(cells.sum(1), 1, atol=1e-12)
    raw = np.exp(100 * (images.double() @ captions.double().T).numpy())
    np.testing.assert_allclose(cells, raw / raw.sum(1, keepdims=True))


@pytest.fixture(scope="module")
def with_short_captions(icon_folder, tmp_path_factory):
    """Icons with a second column of texts; some of them lack it."""
    folder = tmp_path_factory.mktemp("short")
    shutil.copytree(icon_folder, folder / "icons")
    header, *rows = (folder / "icons" / "icons.csv").read_text().splitlines()
    at = header.split(",").index("caption")
    rows = [
        f"{row},{row.split(',')[at].split()[0] + ' <b>' if number % 5 else ''}"
        for number, row in enumerate(rows)
    ]
    (folder / "icons" / "icons.csv").write_text("\n".join([header + ",short_caption", *rows]) + "\n")
    reading = Reading(image_column="file_path", caption_column="caption", group_column="group")
    build(
        [str(folder / "icons" / "icons.csv")],
        folder / "shards",
        reading,
        split=Splitting(val=0.9, test=0.0),
        parallelism=Parallelism(1),
    )
    return folder / "shards"


def test_two_models_on_two_columns(tiny_model, with_short_captions, tmp_path, capsys):
    save_tiny(tmp_path, embed_dim=TINY["embed_dim"] + 8)
    other, options = (
        f"local-dir:{tmp_path}",
        {"columns": ("caption", "short_caption"), "inference": Inference(workers=0)},
    )
    confusion(
        (tiny_model, other),
        with_short_captions,
        "val",
        json=tmp_path / "a.json",
        page=tmp_path / "a.html",
        **options,
    )
    confusion(
        (other,),
        with_short_captions,
        "val",
        json=tmp_path / "b.json",
        **{**options, "inference": Inference(13, 0)},
    )
    printed, result = capsys.readouterr().out, json.loads((tmp_path / "a.json").read_text())
    shards = Shards(with_short_captions, "val")
    alone = json.loads((tmp_path / "b.json").read_text())["models"][0]
    # the same draw
    assert alone["columns"]["caption"]["accuracy"] == result["models"][1]["columns"]["caption"]["accuracy"]
    assert result["data_sha256"] == shards.fingerprint
    assert (
        alone["weights_sha256"]
        == result["models"][1]["weights_sha256"]
        != result["models"][0]["weights_sha256"]
    )
    assert result["n_images"] == result["columns"]["caption"]["n_scored"] == len(shards)
    having = sum(bool(shards.read(at).meta["columns"].get("short_caption")) for at in range(len(shards)))
    assert result["columns"]["short_caption"]["n_scored"] == having < len(shards)
    without = [
        shards.key(at) for at in range(len(shards)) if not shards.meta(at)["columns"].get("short_caption")
    ]
    assert result["columns"]["short_caption"]["without_text"] == without
    assert f"{len(without)} images without a text are not scored: {without[0]}" in printed
    for model in result["models"]:
        assert model["logit_scale"] == pytest.approx(1 / 0.07)
        np.testing.assert_allclose(np.sum(model["heatmap"], 1), 1)
        for column in ("caption", "short_caption"):
            for value, low, high in (scores.values() for scores in model["columns"][column].values()):
                assert 0 <= low <= value <= high <= 1
            assert f"{100 * model['columns'][column]['accuracy']['value']:.1f} %" in printed
    page = (tmp_path / "a.html").read_text()
    assert page.count("<td style") == 2 * 12 * 12
    assert not re.search(r"(src|href)=\"(?!data:|#)|url\((?!#)|@import|<script", page)


def test_the_page_escapes_what_it_shows(with_short_captions, tmp_path):
    shards = Shards(with_short_captions, "val")
    asked = questions(shards, read_columns(shards, ("short_caption",)), 3, 0)
    column = asked.columns[0]
    answers = [
        answer("<i>&", unit(len(shards), 8), [unit(len(column.texts), 8, seed=1)], 10.0, asked, World())
    ]
    write_confusion_page(tmp_path / "a.html", result_of(answers, asked, "here", 3, 0), asked.shards)
    page = (tmp_path / "a.html").read_text()
    assert "<b>" not in page
    assert "<i>" not in page
    assert "&lt;b&gt;" in page
    assert "&lt;i&gt;&amp;" in page
    assert "chance" in text_of(confusion_parts(result_of(answers, asked, "here", 3, 0)))


def test_mistakes_are_sentences(tiny_model, icon_folder, icon_shards, tmp_path):
    with pytest.raises(UserError, match=r"--columns short: no text in this column.*can be caption"):
        confusion((tiny_model,), icon_shards, columns=("short",))
    with pytest.raises(UserError, match="no MODEL given"):
        confusion((), icon_shards)
    with pytest.raises(UserError, match="--k 0: must be at least 1"):
        confusion((tiny_model,), icon_shards, k=0)
    column = column_of(
        "caption", [["a"]] * len(Shards(icon_shards, "val")), np.zeros(len(Shards(icon_shards, "val")), int)
    )
    with pytest.raises(UserError, match="belongs to one group"):
        questions(Shards(icon_shards, "val"), [column], 1, 0)


def test_features_that_are_not_finite_name_the_sample(tiny_model, icon_shards, monkeypatch):
    def broken(name, *_):
        clip = load(name)
        clip.towers.model.text_projection.data[:] = torch.nan
        return clip

    load = train.model.clip.load
    monkeypatch.setattr("eval.compare.confusion.load_for_eval", broken)
    with pytest.raises(NotFinite, match="that of caption"):
        confusion((tiny_model,), icon_shards, inference=Inference(workers=0))
