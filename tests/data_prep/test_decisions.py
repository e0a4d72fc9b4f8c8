"""build --decisions gives what editing the CSV by hand gives."""

import csv
import json
import subprocess
import sys

import pytest
from conftest import assert_mistake, call_here, environment, noise_images, tars

import data_prep.__main__
from data_prep.build.decisions import Decision, read_decisions, write_decisions
from data_prep.build.pipeline import Checking, Parallelism, Reading, Splitting, build, index, merge
from data_prep.build.split import SPLITS
from data_prep.errors import UserError
from data_prep.inputs.names import key_of
from data_prep.shards import Shards

LONG = "a caption of very many words " * 20
DECIDED = [
    ("3.png", "drop", "", ""),
    ("3.png", "edit", "caption 3", "of an image that is dropped"),
    ("4.png", "edit", "caption 4", "a better  caption"),
    ("5.png", "edit", "second of 5", LONG),
    ("6.png", "remove", "caption 6", ""),
    ("7.png", "remove", "caption 7", ""),  # its only caption, so the image is left out
    ("8.png", "add", "", "one more, with a comma"),
    ("8.png", "add", "", "and another"),
    ("10.png", "remove", "caption 10", ""),
    ("10.png", "add", "", "instead of the only one"),
]
UNUSED = [("99.png", "drop", "", ""), ("9.png", "edit", "caption 8", "that caption is of another image")]
COUNTS = {"drop": 1, "edit": 3, "remove": 3, "add": 3, "present": 0, "unused": 2, "unused_marks": 0}


def decisions_file(path, decided):
    write_decisions(path, (Decision(key_of(image), image, *rest) for image, *rest in decided))
    return str(path)


@pytest.fixture
def pairs(tmp_path):
    """40 images, of which 5 and 6 have two captions, and decisions about them."""
    path = noise_images(tmp_path, 40, groups=25)
    with open(path, "a") as file:
        # the last row is a duplicate
        file.write("5.png,second of 5,g5\n6.png,second of 6,g6\n6.png,caption 6,g6\n")
    return path, decisions_file(tmp_path / "decisions.csv", [*DECIDED, *UNUSED])


def by_hand(path, edited):
    """The CSV with DECIDED done to it in an editor."""
    with open(path, newline="") as file:
        header, *rows = csv.reader(file)
    gone = {image for image, action, *_ in DECIDED if action == "drop"}
    captions = {(image, old): new for image, action, old, new in DECIDED if action in ("edit", "remove")}
    rows += [
        [image, new, next(row[2] for row in rows if row[0] == image)]
        for image, action, _, new in DECIDED
        if action == "add"
    ]
    rows = [
        [image, captions.get((image, caption), caption), group]
        for image, caption, group in rows
        if image not in gone
    ]
    with open(edited, "w", newline="") as file:
        csv.writer(file).writerows([header, *(row for row in rows if row[1])])
    return str(edited)


READ = {"group_column": "group"}


def test_decisions_give_the_shards_of_a_csv_that_was_edited_by_hand(pairs, tmp_path, capsys):
    path, decisions = pairs
    ours = build(
        [str(path)], tmp_path / "ours", Reading(**READ, decisions=decisions), parallelism=Parallelism(1)
    )
    printed = capsys.readouterr().out
    theirs = build(
        [by_hand(path, tmp_path / "edited.csv")],
        tmp_path / "theirs",
        Reading(**READ),
        parallelism=Parallelism(1),
    )
    assert tars(tmp_path / "ours") == tars(tmp_path / "theirs")
    assert (tmp_path / "ours" / "leaks.csv").read_text() == (tmp_path / "theirs" / "leaks.csv").read_text()
    counts = ("rows", "lines", "rejects", "asked", "reasons", "decisions", "warnings")
    assert {**ours, **dict.fromkeys(counts)} == {**theirs, **dict.fromkeys(counts)}
    assert ours["asked"] == ours["rejects"] == sum(ours["reasons"].values())
    assert ours["captions_truncated"] == 1
    # 43 rows of the CSV and 3 captions that were added; of the rejects more than --max-rejects allows were
    # decided on
    assert (ours["rows"], ours["records"], ours["rejects"]) == (46, 41, 5)
    assert ours["reasons"] == {"caption removed by a decision": 4, "dropped by a decision": 1}
    assert ours["decisions"] == COUNTS
    unused, _ = read_decisions(tmp_path / "ours" / "unused_decisions.csv")
    assert [(decision.image, decision.action) for decision in unused.values()] == [
        unused[:2] for unused in UNUSED
    ]
    assert "2 decisions match no image or caption of the inputs, and were not applied; see" in printed
    assert "2 decisions match no image" in (tmp_path / "ours" / "report.html").read_text()
    assert not (tmp_path / "theirs" / "unused_decisions.csv").exists()
    with open(tmp_path / "ours" / "rejects.csv", newline="") as file:
        rejects = [(row["line"], row["path"], row["reason"]) for row in csv.DictReader(file)]
    assert ("5", "3.png", "dropped by a decision") in rejects


def test_parts_by_tasks_decide_alike(pairs, tmp_path):
    path, decisions = pairs
    read = Reading(**READ, decisions=decisions)
    build([str(path)], tmp_path / "whole", read, parallelism=Parallelism(1))
    for task in range(3):
        assert build([str(path)], tmp_path / "parts", read, parallelism=Parallelism(1, 3, task)) is None
    merge(tmp_path / "parts", processes=1)
    assert tars(tmp_path / "parts") == tars(tmp_path / "whole")
    for name in ("report.json", "rejects.csv", "unused_decisions.csv"):
        assert (tmp_path / "parts" / name).read_text() == (tmp_path / "whole" / name).read_text()


def test_all_tasks_need_the_same_decisions(pairs, tmp_path, capsys):
    path, decisions = pairs
    read = Reading(**READ, decisions=decisions)
    build([str(path)], tmp_path / "out", read, parallelism=Parallelism(1, 2, 0))
    decisions_file(tmp_path / "decisions.csv", DECIDED)
    build([str(path)], tmp_path / "out", read, parallelism=Parallelism(1, 2, 1))
    assert "another content of --decisions; run tasks" in capsys.readouterr().out
    with pytest.raises(UserError, match="1 of 2 tasks have not finished, or had other options: 0;"):
        merge(tmp_path / "out", processes=1)
    decisions_file(tmp_path / "decisions.csv", [*DECIDED, *UNUSED])
    build([str(path)], tmp_path / "out", read, parallelism=Parallelism(1, 2, 1))
    assert merge(tmp_path / "out", processes=1)["decisions"]["drop"] == 1


def test_shards_are_an_input_whose_images_keep_their_keys(pairs, tmp_path):
    """What was reviewed can be built again from the shards alone, where its inputs are gone."""
    path, decisions = pairs
    read, writing = Reading(**READ), {"images_per_shard": 9}
    build(
        [str(path)], tmp_path / "shards", read, Checking(max_rejects=1), parallelism=Parallelism(1), **writing
    )
    built = sorted(map(str, (tmp_path / "shards").rglob("*.tar")))
    build(built, tmp_path / "again", Reading(), parallelism=Parallelism(1), **writing)
    assert tars(tmp_path / "again") == tars(tmp_path / "shards")
    read = Reading(**READ, decisions=decisions)
    build(
        [str(path)],
        tmp_path / "from-csv",
        read,
        Checking(max_rejects=1),
        parallelism=Parallelism(1),
        **writing,
    )
    build(
        built, tmp_path / "from-shards", Reading(decisions=decisions), parallelism=Parallelism(1), **writing
    )
    assert tars(tmp_path / "from-shards") == tars(tmp_path / "from-csv")
    report = index(built, tmp_path / "in-place", Reading(decisions=decisions), parallelism=Parallelism(1))
    assert report["decisions"] == COUNTS
    assert captions(tmp_path / "in-place") == captions(tmp_path / "from-csv")

    # Other images of the same names: they cannot be told apart, so the second ones are rejected.
    (tmp_path / "b").mkdir()
    build(
        [str(noise_images(tmp_path / "b", 9, size=(20, 20)))],
        tmp_path / "b" / "shards",
        parallelism=Parallelism(1),
    )
    others = sorted(map(str, (tmp_path / "b" / "shards").rglob("*.tar")))
    report = build(
        [*built, *others], tmp_path / "both", check=Checking(max_rejects=0.5), parallelism=Parallelism(1)
    )
    assert report["reasons"] == {"name in two inputs": 9}
    assert captions(tmp_path / "both") == captions(tmp_path / "again")


def captions(folder):
    """Image -> its captions and a group's name, of all splits."""
    found = {}
    for split in SPLITS:
        if json.loads((folder / "manifest.json").read_text())["splits"][split]["samples"]:
            shards = Shards(folder, split)
            found |= {
                (meta := shards.meta(number))["image"]: (meta["captions"], meta["group"], split)
                for number in range(len(shards))
            }
    return found


HEADER = "key,image,action,caption,new_caption,note\n"
KEY = "0123456789abcdef"


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "its header is ''; it must be key,image,action,caption,new_caption,note"),
        ("key;image;action\n", "its header is 'key;image;action'"),
        (
            f"{HEADER}{KEY},a.png,delete,,,\n",
            ":2: unknown action 'delete'; valid actions are drop, edit, remove, add",
        ),
        (f"{HEADER}\n{KEY},a.png,drop,,,\n12,a.png,drop,,,\n", ":4: invalid key '12'; a key has 16 digits"),
        (f"{HEADER}{KEY},a.png,edit,old,,\n", ":2: edit needs a new_caption"),
        (f"{HEADER}{KEY},a.png,drop,why not,,\n", ":2: drop takes no caption, but has 'why not'"),
        (f"{HEADER}{KEY},a.png,drop,,\n", ":2: 5 cells, but the header has 6"),
        (f'{HEADER}{KEY},a.png,add,,"of two\nlines",\n{KEY},a.png,drap,,,\n', ":4: unknown action"),
        (
            f"{HEADER}{KEY},a.png,edit,old,new,\n{KEY},a.png,remove,old,,\n",
            ":3: remove 'old', but a line above says edit",
        ),
        (f'{HEADER}{KEY},a.png,drop,,,"\n', "cannot be read as a CSV in UTF-8"),
        (f"{HEADER}{KEY},a.png,add,,\xe9,\n".encode("latin-1"), "cannot be read as a CSV in UTF-8"),
        (None, "cannot be read (No such file"),
    ],
)
def test_mistakes_in_the_file_are_sentences(text, words, tmp_path):
    path = tmp_path / "decisions.csv"
    if text is not None:
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
    with pytest.raises(UserError) as caught:
        read_decisions(path)
    assert words in str(caught.value)
    assert str(path) in str(caught.value)


def test_a_file_of_decisions_is_what_a_spreadsheet_makes_of_it(tmp_path):
    decided = [
        Decision(KEY, "a, b.png", "edit", 'say "old"', "new", "why"),
        Decision(KEY, "a, b.png", "drop"),
    ]
    write_decisions(tmp_path / "a.csv", decided)
    spread = (
        "\ufeff"
        + (tmp_path / "a.csv").read_text().replace("\r\n", "\n").replace(",new,", ", new  ,")
        + ",,,,,\n"
    )
    (tmp_path / "b.csv").write_text(spread + f"{KEY},again,drop,,,the same twice\n")
    assert list(read_decisions(tmp_path / "b.csv")[0].values()) == decided


def split_of_images(folder):
    return {image: split for image, (_, _, split) in captions(folder).items()}


def test_images_keep_their_splits_as_the_warning_advises(tmp_path):
    """A removed caption lets a group fall apart, whose second half is hashed to a split of its own."""
    path = noise_images(tmp_path, 80)
    lines = path.read_text().splitlines()
    wrong = [f"{number + 40}.png,caption {number}," for number in range(40)]
    path.write_text("\n".join([*lines, *wrong]) + "\n")
    decided = [(f"{number + 40}.png", "remove", f"caption {number}", "") for number in range(40)]
    read = Reading(decisions=decisions_file(tmp_path / "decisions.csv", decided))

    def warned(out, **split) -> bool:
        splitting = Splitting(0.2, 0.2, **split)
        report = build([str(path)], tmp_path / out, read, split=splitting, parallelism=Parallelism(1))
        assert report["decisions"]["remove"] == 40
        return any("build again with --keep-splits" in warning for warning in report["warnings"])

    build([str(path)], tmp_path / "shards", split=Splitting(0.2, 0.2), parallelism=Parallelism(1))
    before = split_of_images(tmp_path / "shards")
    assert warned("moved")
    assert split_of_images(tmp_path / "moved") != before
    assert not warned("kept", keep_splits=str(tmp_path / "shards"))
    assert split_of_images(tmp_path / "kept") == before


def test_one_unused_decision_is_said_in_the_singular(tmp_path):
    path = noise_images(tmp_path, 9)
    decisions = decisions_file(tmp_path / "decisions.csv", UNUSED[:1])
    report = build([str(path)], tmp_path / "out", Reading(decisions=decisions), parallelism=Parallelism(1))
    words = "1 decision matches no image or caption of the inputs, and was not applied; see"
    assert any(words in warning for warning in report["warnings"])


def test_the_command_line_takes_them(pairs, tmp_path):
    arguments = ("build", pairs[0], "--out", tmp_path / "out", "--decisions", tmp_path / "none.csv")
    assert_mistake(
        call_here(data_prep.__main__.main, *arguments), "none.csv: cannot be read", "as review writes it"
    )
    assert not (tmp_path / "out.partial").exists()


def test_building_does_without_a_web_server():
    code = "import sys, data_prep.__main__; sys.exit(bool({'starlette', 'uvicorn'} & set(sys.modules)))"
    assert subprocess.run([sys.executable, "-c", code], env=environment(), check=False).returncode == 0
