"""The search page in a real browser: it shows the server's answers, and works with keys, touch and images."""

import base64
import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path

import pytest
from browser import expect, opened, overflow_px, screenshot
from conftest import noise_image, noise_images, png
from PIL import Image
from playwright.sync_api import Page
from test_indexing import empty_index
from test_serve import ask, running

from data_prep.build.pipeline import Parallelism, Reading, Splitting, build
from eval.options import Inference
from eval.search.command import embed
from eval.search.index import Index
from eval.search.serve import app, open_columns
from train.model.clip import public_name

EVIL = '<img src=x onerror="document.title=1"><script>document.title=2</script> & "quoted"'


@pytest.fixture(scope="module")
def both(icon_index, narrow_index) -> Iterator[str]:
    with running(app(open_columns([icon_index, narrow_index]))) as url:
        yield url


@pytest.fixture(scope="module")
def evil(tmp_path_factory, tiny_model) -> Iterator[str]:
    """Twelve images in four groups, with captions and columns that are HTML."""
    folder = tmp_path_factory.mktemp("evil")
    with (
        open(noise_images(folder, 12, groups=4), newline="") as plain,
        open(folder / "evil.csv", "w", newline="") as file,
    ):
        writer = csv.writer(file)
        for at, (image, caption, group) in enumerate(csv.reader(plain)):
            writer.writerow(
                [
                    image,
                    caption.replace("caption ", f"{EVIL} "),
                    group,
                    f"<i>{at % 2}</i>" if at else "<b>kind</b>",
                ]
            )
    build(
        [str(folder / "evil.csv")],
        folder / "shards",
        Reading(group_column="group"),
        split=Splitting(0, 0),
        parallelism=Parallelism(1),
        min_shards=1,
    )
    embed(tiny_model, folder / "shards", folder / "index", inference=Inference(workers=0))
    with running(app(open_columns([folder / "index"]))) as url:
        yield url


def numbers(page: Page, column: int = 0) -> list[int]:
    """The images in a column, in order."""
    cards = page.locator(f".card[data-column='{column}']")
    expect(page.locator("#status")).to_contain_text("Top")
    return [int(number) for number in cards.evaluate_all("cards => cards.map((card) => card.dataset.number)")]


def answered(url: str, body: dict) -> list[list[int]]:
    return [
        [hit["number"] for hit in hits] for hits in ask(url, "/api/search", {"k": 24, **body})[2]["results"]
    ]


def search(page: Page, text: str) -> None:
    page.locator("#text").fill(text)
    page.keyboard.press("Enter")
    expect(page).to_have_title(f"{text} - search images")


def focused(page: Page) -> list[str]:
    return page.evaluate("[document.activeElement.dataset.column, document.activeElement.dataset.position]")


def show(page: Page, how: str, data: bytes, name: str = "drawn.png") -> None:
    """Drop or paste an image, with the events of a browser."""
    page.evaluate(
        """([how, data, name]) => {
            const transfer = new DataTransfer();
            transfer.items.add(new File([Uint8Array.from(atob(data), (sign) => sign.charCodeAt(0))], name, {
            type: "image/png" })); const more = { bubbles: true, cancelable: true, dataTransfer: transfer,
            clipboardData: transfer }; document.body.dispatchEvent(how === "paste" ? new ClipboardEvent(how,
            more) : new DragEvent(how, more));
        }""",
        [how, base64.b64encode(data).decode(), name],
    )


def test_a_sentence_shows_what_each_model_finds_and_back_works(browser, both, icon_index, narrow_index):
    with opened(browser, both) as page:
        expect(page.locator("#examples button").first).to_be_visible()
        for text in ("bell outline", "arrow"):
            search(page, text)
            assert [numbers(page, 0), numbers(page, 1)] == answered(both, {"text": text})
        names = [public_name(Index(folder).manifest["model"]) for folder in (icon_index, narrow_index)]
        expect(page.locator("section h2")).to_have_text(names)
        expect(page.locator("section > p")).to_have_text(["index icons", "index narrow"])
        # decode() waits for an image, and fails if it cannot be loaded.
        page.locator(".card img").evaluate_all("all => Promise.all(all.map((image) => image.decode()))")
        shared = page.url
        page.go_back()
        expect(page.locator("#text")).to_have_value("bell outline")
        assert numbers(page) == answered(both, {"text": "bell outline"})[0]
    with opened(browser, shared) as page:
        assert [numbers(page, 0), numbers(page, 1)] == answered(both, {"text": "arrow"})


def test_models_are_named_by_their_runs(browser, tuned_run, icon_shards, tmp_path):
    run, few = tuned_run[0], Inference(workers=0)
    for name, model in (("a", run), ("b", f"local-dir:{run}/checkpoints/best")):
        embed(str(model), icon_shards, tmp_path / name, "val", inference=few)
    for folders, names in ((["a"], ["run"]), (["a", "b"], ["run (a)", "run (b)"])):
        columns = open_columns([tmp_path / folder for folder in folders])
        with running(app(columns)) as url, opened(browser, f"{url}/#text=bell") as page:
            expect(page.locator("section h2")).to_have_text(names)


def test_the_empty_page_offers_captions_and_images(browser, both):
    about = ask(both, "/api/about")[2]
    numbers_of = [sample["number"] for sample in about["samples"]]
    assert (len(numbers_of), len(set(numbers_of))) == (32, 32)
    with opened(browser, both, viewport={"width": 1200, "height": 800}) as page:
        cards = page.locator("#columns .card")
        expect(cards).to_have_count(32)
        expect(page.locator("#text")).to_be_focused()
        for key, place in (("ArrowDown", "0"), ("ArrowRight", "1"), ("ArrowRight", "2"), ("ArrowLeft", "1")):
            page.keyboard.press(key)
            assert focused(page) == ["samples", place]
        page.keyboard.press("Enter")
        assert numbers(page) == answered(both, {"like": numbers_of[1]})[0]
        page.go_back()
        expect(cards).to_have_count(32)
        page.locator("#examples button").first.click()
        assert numbers(page) == answered(both, {"text": about["examples"][0]})[0]


def test_filters_variants_and_more(browser, both):
    name, ((value, count), *_) = next(iter(ask(both, "/api/about")[2]["filters"].items()))
    with opened(browser, both) as page:
        search(page, "bell")
        page.get_by_role("button", name="More", exact=True).click()
        expect(page.locator(".card[data-column='0']")).to_have_count(48)
        assert numbers(page) == answered(both, {"text": "bell", "k": 48})[0]
        page.get_by_label(name).select_option(index=1)
        expect(page.locator("#status")).to_contain_text(f"{count} of ")
        assert numbers(page) == answered(both, {"text": "bell", "filters": [f"{name}={value}"]})[0]
        page.get_by_label("group variants").uncheck()
        expect(page).to_have_url(re.compile("grouped=false"))
        expect(page.get_by_text(re.compile(r"\+\d+ variant"))).to_have_count(0)
        expect(page.locator("#columns")).not_to_have_class("loading")
        assert (
            numbers(page)
            == answered(both, {"text": "bell", "filters": [f"{name}={value}"], "grouped": False})[0]
        )
        page.reload()
        expect(page.get_by_label(name)).to_have_value("0")
        expect(page.get_by_label("group variants")).not_to_be_checked()


def test_words_that_must_match(browser, both):
    text = '"arrow" bell'
    with opened(browser, both, viewport={"width": 390, "height": 800}) as page:
        search(page, text)
        with_words = answered(both, {"text": text})
        assert [numbers(page, 0), numbers(page, 1)] == with_words
        expect(page.locator(".card").first).to_contain_text("arrow")
        page.locator(".card").first.click()
        dialog = page.get_by_role("dialog")
        expect(dialog.get_by_role("heading", name="Words that match")).to_be_visible()
        page.keyboard.press("Escape")
        assert overflow_px(page) == 0
        page.get_by_label("part numbers").uncheck()
        expect(page).to_have_url(re.compile("vectors_only=true"))
        expect(page.locator(".word")).to_have_count(0)
        by_vectors = answered(both, {"text": text, "vectors_only": True})
        assert [numbers(page, 0), numbers(page, 1)] == by_vectors != with_words
        page.reload()
        expect(page.get_by_label("part numbers")).not_to_be_checked()


@pytest.mark.parametrize("how", ["drop", "paste", "choose"])
def test_search_by_an_image(browser, both, how):
    drawn = png(noise_image())
    _, _, found = ask(both, "/api/search?k=24", drawn, {"content-type": "image/png"})
    with opened(browser, both) as page:
        expect(page.locator("#examples button").first).to_be_visible()
        if how == "choose":
            page.locator("#file").set_input_files(
                {"name": "drawn.png", "mimeType": "image/png", "buffer": drawn}
            )
        else:
            show(page, how, drawn)
        expect(page.locator("#query-image")).to_contain_text("drawn.png")
        assert [numbers(page, 0), numbers(page, 1)] == [
            [hit["number"] for hit in hits] for hits in found["results"]
        ]
        assert (
            page.locator("#query-image img").evaluate(
                "async (image) => { await image.decode(); return image.naturalWidth; }"
            )
            == 48
        )
        page.reload()
        expect(page.get_by_role("alert")).to_contain_text("choose the image again")


def test_mistakes_are_shown_as_messages(browser, both):
    with opened(browser, both) as page:
        search(page, "bell")
        show(page, "drop", b"no image", "notes.txt")
        expect(page.get_by_role("alert")).to_contain_text("the image: not an image")
        expect(page.locator(".card")).to_have_count(0)
        search(page, "bell")
        expect(page.get_by_role("alert")).to_be_hidden()
        page.goto(f"{both}/#text=bell&filter=colour%3Dred")
        expect(page.get_by_role("alert")).to_contain_text("no column 'colour'")
        page.evaluate("about.limits.bytes = 100")
        show(page, "drop", png(noise_image()))
        expect(page.get_by_role("alert")).to_contain_text("use a smaller file")


def test_details_and_more_like_this(browser, both):
    with opened(browser, both) as page:
        search(page, "bell outline")
        found = ask(both, "/api/search", {"text": "bell outline"})[2]
        at = [hit["number"] for hit in found["results"][1]][2]
        page.locator(".card[data-column='1']").nth(2).click()
        row, dialog = found["images"][str(at)], page.get_by_role("dialog")
        for text in (row["key"], *row["captions"], *filter(None, row["columns"].values()), "rank 3, cosine"):
            expect(dialog).to_contain_text(text)
        dialog.get_by_role("button", name="More like this").click()
        expect(page.locator("#query-image")).to_contain_text(row["captions"][0])
        assert [numbers(page, 0), numbers(page, 1)] == answered(both, {"like": at})
        expect(dialog).to_be_hidden()
        page.go_back()
        expect(page.locator("#query-image")).to_be_hidden()
        assert [numbers(page, 0), numbers(page, 1)] == answered(both, {"text": "bell outline"})


def test_keys(browser, both):
    with opened(browser, f"{both}/#text=bell", viewport={"width": 1200, "height": 800}) as page:
        first = numbers(page)
        page.locator("#grouped").focus()
        page.keyboard.press("/")
        expect(page.locator("#text")).to_be_focused()
        for key, place in (
            ("ArrowDown", "0"),
            ("ArrowRight", "1"),
            ("ArrowRight", "2"),
            ("ArrowLeft", "1"),
            ("ArrowDown", None),
            ("ArrowUp", "1"),
        ):
            page.keyboard.press(key)
            assert place is None or focused(page) == ["0", place]
        for _ in range(4):
            page.keyboard.press("ArrowRight")
        assert focused(page)[0] == "1"  # over into the other model's column
        page.locator(".card").first.focus()
        page.keyboard.press("Enter")
        expect(page.get_by_role("dialog")).to_be_visible()
        page.keyboard.press("ArrowRight")
        expect(page.get_by_role("dialog").locator("img")).to_have_attribute(
            "src", re.compile(rf"/thumbnail/{first[1]}\?")
        )
        page.keyboard.press("Escape")
        expect(page.get_by_role("dialog")).to_be_hidden()
        # The dialog's close event, which moves the focus on, follows its disappearance.
        expect(page.locator(".card[data-column='0'][data-position='1']")).to_be_focused()
        page.locator(".card").first.focus()
        page.keyboard.press("ArrowUp")
        expect(page.locator("#text")).to_be_focused()


def test_captions_are_shown_as_text(browser, evil):
    about = ask(evil, "/api/about")[2]
    assert EVIL in json.dumps(about["examples"]).replace('\\"', '"')
    with opened(browser, evil, viewport={"width": 390, "height": 800}) as page:
        expect(page.locator("#examples button").first).to_contain_text(EVIL)
        search(page, "noise")
        assert numbers(page) == answered(evil, {"text": "noise"})[0]
        expect(page.get_by_text("+2 variants")).to_have_count(4)
        page.locator(".card").first.click()
        expect(page.get_by_role("dialog")).to_contain_text(EVIL)
        expect(page.get_by_role("dialog")).to_contain_text("<b>kind</b>")
        page.get_by_label("Close").click()
        page.get_by_label("<b>kind</b>").select_option(index=2)
        expect(page.locator("#status")).to_contain_text("6 of 12")
        assert page.title() == "noise - search images"
        assert page.locator("script, b, i").count() == 2
        assert overflow_px(page) == 0


def test_an_empty_index_says_so(browser, icon_index, tmp_path):
    with (
        running(app(open_columns([empty_index(icon_index, tmp_path / "empty")]))) as url,
        opened(browser, url) as page,
    ):
        expect(page.get_by_role("status")).to_have_text("This index holds no images.")
        expect(page.locator("#text")).to_be_disabled()
        expect(page.get_by_role("button", name="Search")).to_be_disabled()
        show(page, "drop", png(noise_image()))
        expect(page.locator("#query-image")).to_be_hidden()


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_a_phone_scrolls_one_way_and_a_screenshot_is_small(browser, both, scheme, tmp_path: Path):
    with opened(
        browser, f"{both}/#text=bell", viewport={"width": 390, "height": 800}, color_scheme=scheme
    ) as page:
        numbers(page)
        assert overflow_px(page) == 0
        page.locator(".card").first.click()
        assert overflow_px(page) == 0
        page.keyboard.press("Escape")
        screenshot(page, tmp_path / "page.png")
    assert (tmp_path / "page.png").stat().st_size < 200_000
    shot = Image.open(tmp_path / "page.png").convert("L")
    assert (shot.size, shot.getpixel((2, 2)) > 128) == ((390, 800), scheme == "light")
