"""The review page with a list of suspects: they come first, in the list's order, each with its reason."""

import csv

import pytest
from browser import expect, opened, overflow_px
from test_review import reviewing, wait_for_indexes

from data_prep.errors import UserError
from data_prep.review.server import Review
from data_prep.shards import Shards
from data_prep.suspects import COLUMNS, Suspect, read_suspects


def listed(path, rows: list[dict]):
    with open(path, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    return path


def test_suspects_come_first(icon_shards, tmp_path, browser):
    shards = Shards(icon_shards, "train")
    one, two, third = 40, 7, 90
    about = {"score": "1.0", "image": "x"}
    rows = [
        {"key": shards.key(one), "reason": "does not fit", "caption": "<b>bell</b>", **about},
        {
            "key": shards.key(two),
            "reason": "same thing",
            "caption": "house",
            "other_key": shards.key(third),
            "other": "home",
            **about,
        },
        {"key": "0" * 16, "reason": "fits many", "caption": "of another data set", **about},
    ]
    suspects = read_suspects(listed(tmp_path / "suspects.csv", rows))
    with reviewing(icon_shards, tmp_path / "decisions.csv", suspects) as server:
        wait_for_indexes(server)
        answer = server.get_json("api/groups", split="train", sort="suspects")
        assert [tile["number"] for tile in answer["groups"]] == [one, two]
        assert [tile["reason"] for tile in answer["groups"]] == ["does not fit", "same thing"]
        assert [tile["group"] for tile in answer["groups"]] == [
            int(shards.groups[one]),
            int(shards.groups[two]),
        ]
        assert answer["next"] is None
        images = server.get_json("api/group", split="train", group=int(shards.groups[two]))["images"]
        notes = {image["number"]: image["suspects"] for image in images}
        assert [note["other"] for note in notes[two]] == ["home"]
        with opened(browser, server.url, viewport={"width": 390, "height": 800}) as page:
            expect(page.locator("#gallery .tile")).to_have_count(2)
            expect(page.locator("#gallery .tile i").first).to_have_text("does not fit")
            page.locator("#gallery .tile").nth(1).click()
            expect(page.locator("#detail")).to_contain_text("same thing: house and")
            assert overflow_px(page) <= 0
            page.get_by_role("button", name="home", exact=True).click()
            expect(page.locator("#status")).to_have_text("the image with this key")
            expect(page.locator("#text")).to_have_value(shards.key(third))
            page.locator("#decisions").evaluate("(button) => button.click()")  # under the open group
            options = f"--keep-splits {icon_shards} --decisions {tmp_path / 'decisions.csv'}"
            expect(page.locator("#list code")).to_have_text(f"python -m data_prep build … {options}")
            assert overflow_px(page) <= 0


def test_another_table_is_no_list(tmp_path):
    with pytest.raises(UserError, match=r"line 2: expected the columns key, reason"):
        read_suspects(listed(tmp_path / "a.csv", [{"key": "not a key"}]))
    (tmp_path / "b.csv").write_text("image,caption\na.png,a\n")
    with pytest.raises(UserError, match=r"make the list with: python -m eval suspects"):
        read_suspects(tmp_path / "b.csv")
    with pytest.raises(UserError, match="cannot be read"):
        read_suspects(tmp_path / "none.csv")


def test_a_list_without_an_image_is_no_list(tmp_path):
    with pytest.raises(
        UserError, match=r"a\.csv: has only its header, so no image is listed; review without"
    ):
        read_suspects(listed(tmp_path / "a.csv", []))
    (tmp_path / "b.csv").touch()
    with pytest.raises(
        UserError, match=r"b\.csv: is empty, so no image is listed; .* python -m eval suspects"
    ):
        read_suspects(tmp_path / "b.csv")


def test_a_list_of_other_shards_is_refused_and_what_is_not_in_them_is_counted(icon_shards, tmp_path, capsys):
    about = [Suspect("does not fit", "bell", "", "")]
    others = {f"{number:016x}": about for number in range(3)}
    with pytest.raises(UserError, match=r"none of its 3 images is in .*, so the list is of other shards"):
        Review(icon_shards, tmp_path / "decisions.csv", others)
    assert not (tmp_path / "decisions.csv").exists()
    here = [Shards(icon_shards, split).key(5) for split in ("val", "train")]
    review = Review(icon_shards, tmp_path / "decisions.csv", others | dict.fromkeys(here, about))
    review.store.close()
    assert review.suspect_keys == here
    assert f"of its 5 images, 3 are not in {icon_shards}, and left out" in capsys.readouterr().out
