"""Every page in a real browser, at 1280 and at 390 px, light and dark: nothing scrolls sideways, and all text
has enough contrast.
"""

import contextlib
import io
import itertools
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from browser import expect, low_contrast, opened, overflow_px, sideways_scrollers
from labelled_formats import as_folder, labelled_images
from test_serve import running

from data_prep.review.server import app as review_app
from data_prep.shards import Shards
from data_prep.tables import Table, text_of
from eval.classify.command import linear_probe, zeroshot
from eval.cluster.command import cluster
from eval.compare.command import confusion
from eval.compare.page import comparison_table, remarks
from eval.compositionality.command import compositionality
from eval.embed import embed, load_for_eval
from eval.options import Inference
from eval.report.images import thumbnail
from eval.report.names import display_names, with_display_names
from eval.retrieval.command import retrieval
from eval.retrieval.page import THUMBNAIL_PX, random_queries
from eval.search.serve import app as search_app
from eval.search.serve import open_columns
from train.world import World

PAGES = ("report", "retrieval", "compare", "confusion", "compositionality", "zeroshot", "probe", "cluster")
SERVED = ("search", "start", "review")
DETAILS = {"search": ".card", "review": ".tile", "cluster": "ol button"}  # what opens more on a click
LONG = "a_class_whose_name_is_so_long_that_no_phone_shows_it_on_one_line"


@pytest.fixture(scope="module")
def pages(tmp_path_factory, tiny_model, tuned_run, icon_shards, icon_index, narrow_index) -> Iterator[dict]:
    """The url of each page: those of a tiny model on the drawn icons."""
    folder, few = tmp_path_factory.mktemp("pages"), Inference(workers=0)
    run, comparison = tuned_run
    urls = {
        "report": (icon_shards / "report.html").as_uri(),
        "compare": (comparison.parent / "compare.html").as_uri(),
    }
    before, data = folder / "before.json", {"data": icon_shards, "inference": few}
    for split in ("train", "test"):
        as_folder(
            folder / "labelled", labelled_images(len(split)), ["Acura", "BMW [1972, M3]", LONG], split=split
        )
    with contextlib.redirect_stdout(io.StringIO()):
        retrieval(tiny_model, json=before, **data)
        retrieval(
            str(run), against=before, page=folder / "retrieval.html", slice="set", robustness=True, **data
        )
        confusion((tiny_model, str(run)), page=folder / "confusion.html", **data)
        compositionality(str(run), n=1, page=folder / "compositionality.html", **data)
        zeroshot((str(run),), folder / "labelled", out=folder / "zeroshot", inference=few)
        probe = {"cache": folder / "cache", "page": folder / "probe.html", "inference": few}
        linear_probe(str(run), folder / "labelled", **probe)
        cluster(icon_index, folder / "cluster.html", k=5)
    (folder / "zeroshot.html").write_bytes(next((folder / "zeroshot").glob("*.html")).read_bytes())
    for name in PAGES:
        urls.setdefault(name, (folder / f"{name}.html").as_uri())
    with (
        running(search_app(open_columns([icon_index, narrow_index]))) as search,
        running(review_app(icon_shards, folder / "decisions.csv")) as review,
    ):
        yield urls | {"search": f"{search}/#text=bell", "start": f"{search}/", "review": f"{review}/"}


def test_a_row_shows_the_relevant_image_and_eight_found_ones(browser, pages, tuned_run, icon_shards):
    shards, clip = Shards(icon_shards, "test"), load_for_eval(str(tuned_run[0]), Inference(), World())
    embedded = embed(clip, shards, World(), Inference(workers=0))
    queries = random_queries(embedded, shards)
    for query in queries:  # of those that are relevant, the one that scores highest
        text = embedded.captions.texts.index(query.caption)
        scores = embedded.image_features @ embedded.text_features[text]
        groups = embedded.captions.group_of[embedded.captions.text_of == text]
        relevant = np.isin(shards.groups, groups)
        assert query.rank == 1 + int((scores > scores[torch.from_numpy(relevant)].max()).sum())
        assert any(query.relevant == thumbnail(shards, n, THUMBNAIL_PX) for n in np.flatnonzero(relevant))
    with opened(browser, pages["retrieval"], viewport={"width": 1280, "height": 844}) as page:
        rows = page.locator(".query")
        expect(rows).to_have_count(len(queries))
        for width, n_rows in ((1280, 1), (390, 2)):
            page.set_viewport_size({"width": width, "height": 844})
            tops = page.locator(".query .grid figure").evaluate_all("all => all.map((one) => one.offsetTop)")
            lines = [tops[start : start + 8] for start in range(0, len(tops), 8)]
            assert [len(set(line)) for line in lines] == [n_rows] * len(queries)
        for row, query in zip(rows.all(), queries, strict=True):
            expect(row.locator("h3")).to_have_text(query.caption)
            expect(row.locator(":scope > figure")).to_have_text(f"rank {query.rank}")
            hits = [result.hit for result in query.results]
            assert row.locator(".grid figure").evaluate_all("all => all.map((one) => one.className)") == [
                "hit" if hit else "" for hit in hits
            ]
            assert hits[: query.rank].count(True) == (query.rank <= len(hits))


def test_tables_of_a_page_hold_what_the_terminal_prints(browser, pages, tuned_run):
    result = json.loads(tuned_run[1].read_text())
    models = with_display_names(result["models"])
    assert [model["model"] for model in models] == [Path(result["models"][0]["model"]).name, "run"]
    table = comparison_table(models)
    assert table.columns[1:] == [models[0]["model"], "run", "difference", "p"]
    assert {len(row) for row in table.rows} == {5}
    value, low, high, p = models[1]["differences"]["text_to_image/R@1"]
    row = next(row for row in table.rows if row[0] == "text to image, R@1")
    assert row[3:] == [f"{100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}]", f"{p:.2g}"]
    with opened(browser, pages["compare"], viewport={"width": 1280, "height": 844}) as page:
        shown = page.locator("table").first.locator("tr").all()
        cells = [[cell.inner_text().strip() for cell in row.locator("th, td").all()] for row in shown]
    assert cells == [list(line) for line in (table.columns, *table.rows)]


def test_a_remark_where_calibration_got_worse():
    def model(name: str, error: float) -> dict:
        return {"model": name, "metrics": {"calibration_error": error}}

    base, same, worse = model("base", 0.05), model("same", 0.055), model("tuned", 0.31)
    assert remarks([base, same]) == []
    (remark,) = remarks([base, same, worse])
    assert "tuned is worse: its calibration error (ECE) is 31.0 %, that of base 5.0 %" in remark


def test_models_are_named_by_their_runs():
    models = ["demo-vit:none", "runs/icons", "runs/mine/checkpoints/best", "hf-hub:a/b", "local-dir:/x/base/"]
    assert display_names(models) == ["demo-vit:none", "icons", "mine", "a/b", "base"]
    assert display_names(["a/icons", "b/icons", "c"]) == ["a/icons", "b/icons", "c"]


def test_a_table_knows_whether_it_fits_a_phone():
    interval = "10.1 % [8.3, 12.2]"
    assert not Table(
        ["R@k among many", "chance", "base", "tuned"], [["R@1", "0.2 %", interval, interval]]
    ).is_wide
    assert Table(["", "base", "tuned", "difference", "p"], [["R@1", *[interval] * 3, "0.0005"]]).is_wide
    assert not Table(["", "a", "b"], [["R@1", LONG, LONG]]).is_wide
    assert (
        text_of(["a", "", Table(["b", "c"], [["d", "e"]])])
        == "a\n\n| b   |   c |\n| --- | --: |\n| d   |   e |"
    )


@pytest.mark.parametrize("name", [*PAGES, *SERVED])
def test_a_page_fits_and_can_be_read(browser, pages, name):
    with opened(browser, pages[name]) as page:
        for width, scheme in itertools.product((1280, 390), ("light", "dark")):
            page.set_viewport_size({"width": width, "height": 844})
            page.emulate_media(color_scheme=scheme)
            page.wait_for_load_state("networkidle")
            assert page.locator("img").count() > 3 or name == "probe"
            problems = (overflow_px(page), sideways_scrollers(page), low_contrast(page))
            assert problems == (0, [], []), (width, scheme)
        if name in DETAILS:
            page.locator(DETAILS[name]).first.click()
            for scheme in ("light", "dark"):
                page.emulate_media(color_scheme=scheme)
                assert (overflow_px(page), sideways_scrollers(page), low_contrast(page)) == (0, [], []), (
                    scheme
                )
