"""A site finds in a real browser, from a plain static server in a sub-path, what search and serve find."""

import gzip
import json
import re
import shutil
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import open_clip
import pytest
import torch
from browser import expect, opened, overflow_px
from conftest import noise_image, png
from PIL import Image
from playwright.sync_api import Page
from test_serve_page import EVIL, numbers, search

from benchmarks.site import served
from data_prep import npm
from data_prep.errors import Fault, UserError
from eval.classify.features import open_image
from eval.search import site as site_module
from eval.search.command import compress, site
from eval.search.index import Index
from eval.search.nearest import Nearest
from eval.search.query import image_query, text_query
from eval.search.serve import Column, Search, results_of
from eval.search.words import Words, exact_words, indexed, tokens, top

pytest.importorskip("onnxruntime", reason="needs requirements-export.txt")
ODD_TEXTS = [
    "A  Photo, of the CAT's 2x4 (blue)!",
    "schräg, l’été, 日本語 ½ 👍 ﬁne ＬＯＵＤ “quoted” ‚low‘ …",
    "cafe\u0301 \u00a0 tab\tand\u2028line \ufeffmark soft\u00adhyphen zero\u200bwidth",
    "R&amp;amp;D &lt;b&gt; &EACUTE; &eacute; &notit; &amp &copy2024 &#233; &#x1F600; &#128; &#0; &bogus;",
    "&constructor; &toString constructor",
    "a < b &amp; c &hellip;",
    "they'll we've I'm it's 'd don't DON'T İstanbul ΣΊΣΥΦΟΣ ß ǅ",
    "१२३ 3½ x² ①② 🏳️‍🌈 e\u0301\u0323 \x1b[31mred\x1b[0m \x85 bell\x07",
    "<start_of_text> within <end_of_text>",
    "one line that is longer than what the model reads " * 12,
    "!!! ... ---___--- $%^&*() [] {} \\ / | ~ `",
    "   ",
]


@pytest.fixture(scope="module")
def packages(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("packages")
    try:
        npm.fetch(folder, {name: version for name, (version, *_) in site_module.PACKAGES.items()})
    except (UserError, Fault) as error:
        pytest.skip(f"npm fetches no packages here: {error!s:.100}")
    return folder


@pytest.fixture(scope="module")
def indexes(tmp_path_factory, icon_index, narrow_index) -> list[Index]:
    """One that is compressed, as the site's second; and as the first one that is not."""
    small = tmp_path_factory.mktemp("small") / "small"
    compress(narrow_index, small, dims=6)
    return [Index(icon_index), Index(small)]


@pytest.fixture(scope="module")
def built(tmp_path_factory, indexes, packages) -> Path:
    out = tmp_path_factory.mktemp("host") / "a path" / "site"
    site([index.folder for index in indexes], out, with_images=True, packages=packages)
    return out


@pytest.fixture(scope="module")
def url(built):
    with served(built.parents[1]) as host:
        yield f"{host}/a%20path/site/"


def answer(page: Page, query: dict, **options) -> dict:
    """What the page's api answers."""
    return page.evaluate(
        "([query, options]) => api.search(query, options)",
        [query, {"k": 10, "filters": [], "grouped": True, **options}],
    )


def test_sentences_find_what_search_finds(browser, url, indexes):
    texts = ["bell outline", "arrow", "a red house with two windows"]
    expected = [Nearest(index).top(text_query(index.model(), texts), 10) for index in indexes]
    with opened(browser, url) as page:
        for at, text in enumerate(texts):
            search(page, text)
            shown = [numbers(page, 0), numbers(page, 1)]
            results = answer(page, {"text": text})["results"]
            for column, hits in enumerate(results):
                exact = expected[column][at]
                assert [hit["number"] for hit in hits] == shown[column][:10]
                assert len({hit["number"] for hit in hits} & {hit.number for hit in exact}) >= 9
                # Rounded weights and codes move a cosine by less than this.
                assert [hit["score"] for hit in hits] == pytest.approx([hit.score for hit in exact], abs=0.01)
        page.locator(".card img").evaluate_all("all => Promise.all(all.map((image) => image.decode()))")


def test_exact_words_come_first_as_in_search(browser, url, indexes):
    names = [
        "bell",
        "arrow",
        '"bell"',
        "“Arrow Left” in 2d",
        "AX-4711/2 of M8x30",
        "front_ÄX-9.png --- ",
        *ODD_TEXTS,
    ]
    texts = ['"bell"', 'a house "arrow"', '"arrow bell"', '"bell" "no such word"', "nothing-4711", "bell"]
    with opened(browser, url) as page:
        found = page.evaluate(
            """async (texts) => {
              const { tokens, indexed, exactWords } = await import("./words.js");
              return texts.map((text) => [tokens(text), indexed(text), exactWords(text)]);
            }""",
            names,
        )
        assert found == [[list(tokens(text)), list(indexed(text)), exact_words(text)] for text in names]
        for text in texts:
            for options in ({}, {"grouped": False, "vectors_only": True}, {"grouped": False, "k": 24}):
                answered = answer(page, {"text": text}, **options)
                results, words = answered["results"], None if "vectors_only" in options else Words(indexes[0])
                assert answered["unknown"] == (words.unknown(text) if words else [])
                for index, hits in zip(indexes, results, strict=True):
                    features = text_query(index.model(), [text])
                    [exact] = top(
                        Nearest(index), words, features, [text], options.get("k", 10), None, not options
                    )
                    # Rounding moves cosines, so images with the same words may change places.
                    assert [tuple(hit["words"]) for hit in hits] == [hit.words for hit in exact]
                    assert [hit["score"] for hit in hits] == pytest.approx(
                        [hit.score for hit in exact], abs=0.01
                    )


def test_images_filters_and_variants_are_those_of_serve(browser, url, indexes):
    small = indexes[1]
    column = Column(small, None, ThreadPoolExecutor(1), Words(small))
    (name, ((value, _), *_)) = next(iter(small.choices().items()))
    with opened(browser, url) as page:
        for like in (0, 7, len(small) - 1):
            for options in ({}, {"grouped": False}, {"filters": [f"{name}={value}"], "k": 24}):
                found = answer(page, {"like": like}, **options)
                filters = tuple(options.get("filters", ()))
                exact = results_of([column], Search(like=like, **{"k": 10, **options, "filters": filters}))
                assert found["searched"] == exact["searched"]
                assert [
                    (hit["number"], hit["variants"], pytest.approx(hit["score"], abs=1e-5))
                    for hit in exact["results"][0]
                ] == [(hit["number"], hit["variants"], hit["score"]) for hit in found["results"][1]]
                assert {**found["images"], **json.loads(json.dumps(exact["images"]))} == found["images"]
        page.goto(f"{url}#like=7")
        page.locator(".card").nth(1).click()
        page.get_by_role("dialog").get_by_role("button", name="More like this").click()
        expect(page.locator("#query-image img")).to_have_attribute("src", re.compile("^blob:"))
        page.goto(f"{url}#like=7&filter=colour%3Dred")
        expect(page.get_by_role("alert")).to_contain_text("no column 'colour'")


def chosen(page: Page, data: bytes) -> None:
    page.locator("#file").set_input_files({"name": "chosen.png", "mimeType": "image/png", "buffer": data})
    expect(page.locator("#query-image")).to_contain_text("chosen.png")


def test_an_image_finds_what_serve_finds(browser, url, indexes, icon_folder):
    data, small = (icon_folder / indexes[0].paths[40]).read_bytes(), indexes[1]
    with opened(browser, url) as page:
        expect(page.locator(".card").first).to_be_visible()
        chosen(page, data)
        shown = numbers(page, 1)
        found = page.evaluate(
            """(k) => ["grouped", ""].map((grouped) => api.search(
              { image: [...uploads.values()][0] }, { k, filters: [], grouped: !!grouped }))
              .reduce(async (before, answer) => [...await before, (await answer).results[1]], [])""",
            24,
        )
    assert [hit["number"] for hit in found[0]] == shown
    query = image_query(small.model(), data, "icon")
    (scores,), (order,) = Nearest(small).nearest(query, len(small))
    exact = dict(zip(order.tolist(), scores.tolist(), strict=True))
    # Of random weights, all cosines are nearly equal: what rounding may change is a share of their range.
    tolerance = float(scores[0] - scores[-1]) / 20
    assert tolerance > 1e-5
    assert [hit["score"] for hit in found[1]] == pytest.approx(
        [exact[hit["number"]] for hit in found[1]], abs=tolerance
    )
    assert [exact[hit["number"]] for hit in found[1]] == pytest.approx(scores[:24].tolist(), abs=tolerance)


def test_pixels_are_those_of_open_clip(browser, url, indexes):
    photo = noise_image().resize((301, 200))
    photo.putalpha(Image.linear_gradient("L").resize(photo.size))
    data, clip = png(photo), indexes[0].model()
    with opened(browser, url) as page:
        expect(page.locator(".card").first).to_be_visible()
        chosen(page, data)
        made = page.evaluate(
            """async () => {
              const { preprocess } = await import("./image.js");
              const site = await (await fetch("site.json")).json();
              return [...await preprocess([...uploads.values()][0], site.models[0].preprocess)];
            }"""
        )
    pixels = clip.preprocess(open_image(data, "photo", clip.background)).flatten()
    # Browsers round transparent colors otherwise than Pillow, by one of 255 steps.
    step = 1 / 255 / min(clip.config["preprocess_cfg"]["std"])
    assert (torch.tensor(made) - pixels).abs().max() < 1.01 * step


def test_tokens_are_those_of_open_clip(browser, url):
    with opened(browser, url) as page:
        for length in (77, 12):
            expected = open_clip.tokenizer.SimpleTokenizer(context_length=length)(ODD_TEXTS)
            found = page.evaluate(
                """async ([texts, length]) => {
                  const load = async (name) => (await fetch(name)).json();
                  const { makeTokenizer } = await import("./text.js");
                  const parts = [await load("tokenizer.json"), await load("text.json")];
                  const tokens = makeTokenizer(...parts);
                  return texts.map((text) => tokens(text, length));
                }""",
                [ODD_TEXTS, length],
            )
            for text, tokens, ids in zip(ODD_TEXTS, expected.tolist(), found, strict=True):
                assert ids + [0] * (length - len(ids)) == tokens, text


def test_captions_are_text_and_a_phone_scrolls_one_way(browser, built, tmp_path):
    folder = shutil.copytree(built, tmp_path / "sub" / "site")
    images = json.loads(gzip.decompress((folder / "images.bin").read_bytes()))
    images["captions"] = [[EVIL, "second"] for _ in images["captions"]]
    images["columns"] = {"<b>kind</b>": [f"<i>{number}</i>" for number in range(len(images["key"]))]}
    # As a server sends it that takes the file for a compressed encoding.
    (folder / "images.bin").write_text(json.dumps(images))
    with (
        served(tmp_path) as host,
        opened(browser, f"{host}/sub/site/#like=3", viewport={"width": 390, "height": 800}) as page,
    ):
        assert len(numbers(page)) == 24
        assert overflow_px(page) == 0
        page.locator(".card").first.click()
        for text in (EVIL, "<b>kind</b>", "<i>"):
            expect(page.get_by_role("dialog")).to_contain_text(text)
        assert page.locator("script").count() == 2
        assert page.locator("b, i").count() == 0
        assert overflow_px(page) == 0


def test_a_page_from_a_file_says_what_to_do(browser, built):
    context = browser.new_context()
    page = context.new_page()
    page.goto((built / "index.html").as_uri())
    expect(page.get_by_role("alert")).to_contain_text("python -m http.server")
    context.close()


def test_what_cannot_be_a_site_is_refused(built, indexes, packages, tmp_path, monkeypatch):
    folder = indexes[1].folder
    with pytest.raises(UserError, match="exists already"):
        site([folder], built, packages=packages)
    clip = indexes[1].model()
    monkeypatch.setattr(clip, "tokenizer", open_clip.tokenizer.SimpleTokenizer(clean="canonicalize"))
    with pytest.raises(UserError, match="has a tokenizer of its own"):
        site_module.check_tokenizer(indexes[1], clip)
    for archive in shutil.copytree(packages, tmp_path / "packages").iterdir():
        archive.write_bytes(archive.read_bytes() + b"\0")
    with pytest.raises(UserError, match="sha512 is not that of the pinned version"):
        site([folder], tmp_path / "site", packages=tmp_path / "packages")
    assert not (tmp_path / "site").exists()
