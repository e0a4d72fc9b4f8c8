"""Marks of results: clicks and keys on the page become lines of a JSONL, and those captions of train."""

import contextlib
import csv
import json

import fuzz
import pytest
import webdataset
from browser import expect, opened, overflow_px
from conftest import assert_mistake, call_here, noise_images, tars
from test_serve import ask, running

import data_prep.__main__
import eval.__main__
from data_prep.build.decisions import read_decisions
from data_prep.build.options import Checking, Parallelism, Reading, Splitting
from data_prep.build.pipeline import build
from data_prep.errors import UserError
from data_prep.inputs.names import key_of
from data_prep.marks import MAX_TEXT, Mark, MarkLog, read_marks
from eval.search.index import Index
from eval.search.serve import app, open_columns
from train.model.clip import public_name

TEXT = "bell outline"
EXAMPLE = Mark("2026-01-02T03:04:05+00:00", "a bell", key_of("1.png"), "1.png", "right", "ViT-B-32:x", "0123")


@pytest.fixture(scope="module")
def columns(icon_index, narrow_index):
    return open_columns([icon_index, narrow_index])


def pressed(page) -> list[tuple]:
    """(column, position, mark) of the marks that cards show."""
    found = page.locator("li .marks [aria-pressed=true]").evaluate_all(
        "all => all.map((one) => [one.closest('li').firstChild.dataset, one.dataset.mark])"
    )
    return [(data["column"], data["position"], mark) for data, mark in found]


def lines(path) -> list[tuple[str, str]]:
    return [(mark.key, mark.mark) for mark in read_marks(path)[0]]


def test_marks_by_mouse_and_by_key_are_in_the_file_and_on_the_page_again(
    browser, columns, icon_index, tmp_path
):
    path = tmp_path / "marks.jsonl"
    with running(app(columns, marks=MarkLog(path))) as url:
        rows = ask(url, "/api/search", {"text": TEXT})[2]
        keys = [rows["images"][str(hit["number"])]["key"] for hit in rows["results"][1]]
        with opened(
            browser, f"{url}/#text=bell%20%20outline", viewport={"width": 390, "height": 800}
        ) as page:
            cards = page.locator(".card[data-column='1']")
            marks = page.locator("li:has(.card[data-column='1'])")
            said = [(keys[0], "right"), (keys[1], "wrong"), (keys[1], "right"), (keys[1], "")]
            marks.nth(0).get_by_role("button", name="right").click()
            expect(cards.nth(0)).to_be_focused()
            page.keyboard.press("ArrowRight")
            for key in "wrr":
                page.keyboard.press(key)
            page.keyboard.press("ArrowRight")
            page.keyboard.press("Enter")
            page.keyboard.press("w")
            dialog = page.get_by_role("dialog")
            expect(dialog.get_by_role("button", name="wrong")).to_have_attribute("aria-pressed", "true")
            dialog.get_by_role("button", name="right").click()
            expect(dialog.get_by_role("button", name="wrong")).to_have_attribute("aria-pressed", "false")
            page.keyboard.press("Escape")
            page.evaluate("marking")  # until the server has answered all
            assert lines(path) == [*said, (keys[2], "wrong"), (keys[2], "right")]
            before = pressed(page)
            assert {("1", "0", "right"), ("1", "2", "right")} <= set(before)
            assert overflow_px(page) == 0
            page.reload()
            expect(cards.first).to_be_visible()
            assert pressed(page) == before
            page.locator("#text").press("r")
            page.goto(f"{url}/#like=3")
            expect(page.locator("#query-image")).to_be_visible()
            expect(page.locator(".marks")).to_have_count(0)
            page.locator(".card").first.press("r")
            page.evaluate("marking")
            assert len(lines(path)) == 6
            page.goto(f"{url}/#text=bell%20outline")
            expect(cards.first).to_be_visible()
            whole = path.read_bytes()
            path.unlink()
            path.mkdir()
            cards.nth(0).press("w")
            expect(page.get_by_role("alert")).to_contain_text("cannot be written (Is a directory)")
            assert pressed(page) == before
            path.rmdir()
            path.write_bytes(whole)
        first = json.loads(path.read_text().splitlines()[0])
        clip, row = columns[1].clip, next(iter(Index(icon_index).rows([rows["results"][1][0]["number"]])))
        assert first.pop("time").endswith("+00:00")
        assert first == {
            "text": TEXT,
            "key": row["key"],
            "path": row["path"],
            "mark": "right",
            "model": public_name(clip.name),
            "model_sha256": clip.fingerprint()[:16],
        }
        with pytest.raises(UserError, match="another search page writes to it"):
            MarkLog(path)
        refused = call_here(eval.__main__.main, "serve", icon_index, "--feedback", path, "--port", 0)
        assert_mistake(refused, f"{path}: another search page writes to it", "--feedback")
    MarkLog(path).close()  # the server has let it go


def test_requests_that_mark_nothing(columns, tmp_path):
    path, mark = tmp_path / "marks.jsonl", {"text": TEXT, "number": 0, "column": 0, "mark": "right"}
    with running(app(columns, marks=MarkLog(path))) as url:
        for change, words in (
            ({"text": " "}, "text: must be"),
            ({"text": "\ud800"}, "text: must be"),
            ({"text": "x" * (MAX_TEXT + 1)}, "text: must be"),
            ({"text": "\0"}, "contains a NUL"),
            ({"number": -1}, "number: must be"),
            ({"column": 2}, "column: must be"),
            ({"mark": "good"}, 'mark: must be "right", "wrong" or ""'),
            ({"note": ""}, "'note': no such field"),
        ):
            status, _, answer = ask(url, "/api/mark", {**mark, **change})
            assert (status, words in answer["error"]) == (400, True), answer
        assert ask(url, "/api/mark", {"text": TEXT})[0] == 400
        assert ask(url, "/api/mark", mark, {"origin": "http://evil.example"})[0] == 403
        assert ask(url, "/api/mark", json.dumps(mark).encode(), {"content-type": "text/plain"})[0] == 415
        assert ask(url, "/api/mark", {**mark, "mark": ""})[0] == 200  # it has none
        assert path.read_bytes() == b""
    with running(app(columns, "0.0.0.0", MarkLog(path))) as url:
        assert ask(url, "/api/about")[0] == ask(url, "/api/mark", mark)[0] == 403  # without the token
    with running(app(columns)) as url:
        assert "restart `eval serve` with --feedback" in ask(url, "/api/mark", mark)[2]["error"]
        assert "marks" not in ask(url, "/api/about")[2] | ask(url, "/api/search", {"text": TEXT})[2]


def test_whatever_is_sent_the_file_can_be_read(columns, memory_folder):
    path, sent = memory_folder / "marks.jsonl", {"text": TEXT, "number": 0, "column": 0, "mark": "right"}
    with contextlib.closing(MarkLog(path)) as log:
        ask, headers = fuzz.Asked(app(columns, marks=log)), [(b"content-type", b"application/json")]

        def act(body: bytes) -> None:
            assert ask("POST", "/api/mark", headers=headers, body=body)[0] in (200, 400, 413)

        fuzz.check(fuzz.FEW, fuzz.json_files(sent), act, valid=[json.dumps(sent).encode()])
    assert lines(path)


def test_a_line_is_appended_to_what_an_editor_left(tmp_path):
    path = tmp_path / "marks.jsonl"
    log = MarkLog(path)
    log.add(EXAMPLE)
    whole = path.read_text()
    path.unlink()
    path.write_text(whole.rstrip("\n"))
    log.add(EXAMPLE._replace(mark="wrong"))
    log.close()
    assert read_marks(path)[0] == [EXAMPLE, EXAMPLE._replace(mark="wrong")]


GOOD = json.dumps(EXAMPLE._asdict())


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "no mark (Expecting"),
        ("[]", "it is a list, not an object"),
        ('{"text": "x"}', "time is missing"),
        (GOOD.replace('"right"', '"good"'), "mark is not valid ('good')"),
        (GOOD.replace("a bell", " "), "text or key is empty"),
        (GOOD.replace("a bell", "x" * (MAX_TEXT + 1)), "text has 2,001 characters; at most 2,000"),
        (GOOD.replace("a bell", "\\u0000"), "text contains a NUL"),
        (GOOD.replace("a bell", "\\ud800"), "surrogates not allowed"),
        (GOOD.replace('"1.png"', "NaN"), "NaN is no number"),
    ],
)
def test_a_line_that_is_no_mark_is_named(line, words, tmp_path):
    path = tmp_path / "marks.jsonl"
    path.write_text(f"{GOOD}\n\n{line}\n")
    for read in (read_marks, MarkLog):
        with pytest.raises(UserError) as caught:
            read(path)
        assert str(caught.value).startswith(f"{path}:3: no mark (")
        assert words in str(caught.value)
        assert str(caught.value).endswith("fix or remove this line")


@pytest.mark.parametrize("count", fuzz.COUNTS)
def test_foreign_bytes_end_in_a_sentence(count, memory_folder):
    def act(data: bytes) -> None:
        (memory_folder / "marks.jsonl").write_bytes(data)
        read_marks(memory_folder / "marks.jsonl")

    fuzz.check(count, fuzz.json_files(EXAMPLE._asdict()), act, valid=[GOOD.encode()])


SPLIT = Splitting(0.2, 0.2)


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """40 images with a caption each, their shards, and the images of each split."""
    folder = tmp_path_factory.mktemp("pairs")
    path = noise_images(folder, 40)
    built(path, folder / "shards")
    images = {split: list(captions(folder / "shards", split)) for split in ("train", "val", "test")}
    assert all(images.values())
    return path, folder / "shards", images


def built(path, out, split=SPLIT, **read) -> dict:
    return build([str(path)], out, Reading(**read), Checking(), split, Parallelism(1), min_shards=1)


def captions(shards, split) -> dict[str, list[str]]:
    """Image -> captions, as webdataset reads the tars."""
    found = sorted(map(str, (shards / split).glob("*.tar")))
    samples = webdataset.WebDataset(found, shardshuffle=False).decode()
    return {sample["json"]["image"]: sample["json"]["captions"] for sample in samples}


def marked(path, *marks) -> str:
    """A file of marks, each (image, text, mark)."""
    with contextlib.closing(MarkLog(path)) as log:
        for image, text, mark in marks:
            log.add(EXAMPLE._replace(key=key_of(image), path=image, text=text, mark=mark))
    return str(path)


def test_marks_change_captions_of_train_alone(pairs, tmp_path, capsys):
    path, shards, images = pairs
    (a, b, c, d, e, *_), (held_out, *_) = images["train"], images["test"]
    own = {image: f"caption {image.partition('.')[0]}" for image in (a, b, c, d, e, held_out)}
    feedback = marked(
        tmp_path / "marks.jsonl",
        (a, "a new  text", "right"),
        (b, "a new text", "right"),  # now a and b share a caption, and so a group
        (b, own[b], "right"),  # has it already
        (c, own[c], "wrong"),  # its only caption: the image is left out
        (d, own[d], "wrong"),
        (d, "another text", "right"),
        (e, own[e], "wrong"),
        (e, own[e], "right"),  # the last mark counts
        (e, "not a caption", "wrong"),
        (e, "taken back", "right"),
        (e, "taken back", ""),
        (e, own[held_out].title() + ".", "right"),
        (e, "\u200b", "right"),
        (held_out, "for the test", "right"),
        (held_out, own[held_out], "wrong"),
        ("unknown.png", "a new text", "right"),
    )
    kept = Splitting(SPLIT.val, SPLIT.test, keep_splits=str(shards))
    report = built(path, tmp_path / "out", kept, feedback=feedback)
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    rows = [row for row in rows if row[0] not in (c, d)]
    rows += [[image, text, ""] for image, text in ((a, "a new text"), (b, "a new text"), (d, "another text"))]
    with open(path.with_name("edited.csv"), "w", newline="") as file:
        csv.writer(file).writerows([header, *rows])
    built(path.with_name("edited.csv"), tmp_path / "by-hand", kept)
    ours, before = captions(tmp_path / "out", "train"), captions(shards, "train")
    assert ours == captions(tmp_path / "by-hand", "train")
    assert ours == {name: texts for name, texts in before.items() if name != c} | {
        a: [own[a], "a new text"],
        b: [own[b], "a new text"],
        d: ["another text"],
    }
    held_out_tars = {name: sha for name, sha in tars(shards).items() if not name.startswith("train")}
    assert len(held_out_tars) == 2
    assert held_out_tars.items() <= tars(tmp_path / "out").items()
    counts = {"drop": 0, "edit": 0, "remove": 2, "add": 3, "present": 2, "unused": 0, "unused_marks": 6}
    assert report["decisions"] == counts
    unused, _ = read_decisions(tmp_path / "out" / "unused_decisions.csv")
    assert sorted(decision.note for decision in unused.values()) == [
        "feedback: right, a caption of val or test",
        "feedback: right, an image of test",
        "feedback: right, no such image in --keep-splits",
        "feedback: right, nothing visible",
        "feedback: wrong",
        "feedback: wrong, an image of test",
    ]
    printed = capsys.readouterr().out
    assert "9 results are right, 4 wrong; not used: 2 x an image of test" in printed
    assert "2 captions to add are there already" in printed
    # The next round: with the shards of this one, the same marks give the same tars.
    again = Splitting(SPLIT.val, SPLIT.test, keep_splits=str(tmp_path / "out"))
    built(path, tmp_path / "again", again, feedback=feedback)
    assert tars(tmp_path / "again") == tars(tmp_path / "out")


def test_marks_that_say_nothing_change_no_byte(pairs, tmp_path):
    path, shards, (image, *_) = *pairs[:2], pairs[2]["train"]
    feedback = marked(tmp_path / "marks.jsonl", (image, "a text", "right"), (image, "a text", ""))
    built(
        path, tmp_path / "out", Splitting(SPLIT.val, SPLIT.test, keep_splits=str(shards)), feedback=feedback
    )
    assert tars(tmp_path / "out") == tars(shards)


def test_a_persons_decision_wins(pairs, tmp_path):
    path, shards, (image, *_) = *pairs[:2], pairs[2]["train"]
    own = f"caption {image.partition('.')[0]}"
    decisions = tmp_path / "decisions.csv"
    header = "key,image,action,caption,new_caption,note\n"
    decisions.write_text(f"{header}{key_of(image)},{image},edit,{own},better,\n")
    feedback = marked(tmp_path / "marks.jsonl", (image, own, "right"), (image, "a text", "right"))
    kept = Splitting(SPLIT.val, SPLIT.test, keep_splits=str(shards))
    report = built(path, tmp_path / "out", kept, feedback=feedback, decisions=str(decisions))
    assert captions(tmp_path / "out", "train")[image] == ["better", "a text"]
    assert (report["decisions"]["edit"], report["decisions"]["unused_marks"]) == (1, 1)


def test_the_splits_must_be_kept(pairs, tmp_path):
    arguments = ("build", pairs[0], "--out", tmp_path / "out", "--feedback", marked(tmp_path / "m.jsonl"))
    assert_mistake(call_here(data_prep.__main__.main, *arguments), "pass --keep-splits as well")
    assert not (tmp_path / "out.partial").exists()
