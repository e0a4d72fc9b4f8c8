"""The page of clusters: a map beside a list that scrolls, at any width; and the number of clusters."""

import json

import pytest
from browser import expect, opened, overflow_px
from conftest import noise_images
from test_cluster import blobs

from eval.cluster.clusters import best_k
from eval.cluster.command import cluster
from eval.options import Inference
from eval.search.command import embed


@pytest.mark.parametrize(
    ("silhouettes", "chosen"),
    [
        ({2: 0.10, 7: 0.155, 8: 0.150, 64: 0.130}, 8),  # near the best, not only within some distance
        ({2: 0.128, 10: 0.127, 45: 0.152, 64: 0.1545}, 64),
        ({2: 0.9, 3: 0.86, 4: 0.5}, 3),
        ({2: -0.2, 3: -0.1, 4: -0.101}, 4),
        ({}, 1),
    ],
)
def test_k_is_near_the_best_silhouette(silhouettes, chosen):
    assert best_k(silhouettes) == chosen


def box(locator) -> dict:
    return locator.bounding_box()


def test_the_list_scrolls_beside_the_map(browser, tmp_path):
    index = blobs(tmp_path / "index", k=24, each=20, captions=[[f"thing {at % 24}"] for at in range(480)])
    cluster(index, tmp_path / "page.html", k=24, json=tmp_path / "all.json")
    url = (tmp_path / "page.html").as_uri()
    with opened(browser, url, viewport={"width": 1280, "height": 900}) as page:
        side, listed = box(page.locator(".map")), box(page.locator(".list"))
        assert listed["x"] > side["x"] + side["width"]
        assert listed["height"] == pytest.approx(side["height"], abs=1)  # as high as the map, however many
        assert page.locator("ol").evaluate("list => list.scrollHeight > 2 * list.clientHeight")
        # The cluster of a point is brought into view in the list; the page stays where it is.
        page.locator("canvas").focus()
        for _ in range(4):
            page.keyboard.press("ArrowDown")
        page.keyboard.press("Enter")
        pressed = page.locator("ol button[aria-pressed=true]")
        expect(pressed).to_have_count(1)
        item, inside = box(pressed), box(page.locator("ol"))
        assert inside["y"] - 1 <= item["y"] <= inside["y"] + inside["height"] - item["height"] + 1
        assert page.evaluate("scrollY") == 0
        page.keyboard.press("Escape")
        page.locator("ol button").last.click()
        expect(page.locator("#all")).to_be_visible()
    with opened(browser, url, viewport={"width": 390, "height": 844}) as page:
        assert overflow_px(page) == 0
        listed, drawn = box(page.locator(".list")), box(page.locator("canvas"))
        assert listed["y"] > drawn["y"] + drawn["height"]
        assert listed["height"] <= 0.75 * 844 + 1


def test_near_duplicates_have_file_names(browser, tmp_path, tiny_model):
    (tmp_path / "in" / "deep").mkdir(parents=True)
    noise_images(tmp_path / "in", 12)
    long = tmp_path / "in" / "deep" / ("a-name-without-a-break" * 6 + ".png")
    (tmp_path / "in" / "3.png").rename(long)
    embed(tiny_model, tmp_path / "in", tmp_path / "index", inference=Inference(workers=0))
    cluster(tmp_path / "index", tmp_path / "page.html", k=2, threshold=-1, json=tmp_path / "all.json")
    assert json.loads((tmp_path / "all.json").read_text())["near_duplicates"]["pairs"] == 66
    with opened(browser, (tmp_path / "page.html").as_uri(), viewport={"width": 390, "height": 844}) as page:
        names = page.locator("figcaption b").all_inner_texts()
        known = {str(path.relative_to(tmp_path / "in")) for path in (tmp_path / "in").rglob("*.png")}
        assert len(names) == 60
        assert set(names) <= known
        assert f"deep/{long.name}" in names
        assert overflow_px(page) == 0
        page.locator("canvas").focus()
        page.keyboard.press("ArrowRight")
        assert any(name in page.locator("#card small").inner_text() for name in known)
