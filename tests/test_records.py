"""Every row is a record or a reject with its line; nothing is swallowed."""

import os

import pytest

from data_prep.errors import UserError
from data_prep.records import pair, read_rows


def write(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "a.csv"
    path.write_bytes(text.encode(encoding))
    return path


def test_cells_are_text_and_lines_are_the_files(tmp_path):
    path = write(tmp_path, 'file,caption\na.png,null\n\nb.png,"two\nlines"\nc.png,NA\n"d.png",\n007.png,1.50\ne.png\n')
    rows = [(row.line, row.image, row.caption) for row in read_rows(path, "file", "caption")]
    assert rows == [
        (2, "a.png", "null"),
        (4, "b.png", "two\nlines"),
        (6, "c.png", "NA"),
        (7, "d.png", ""),
        (8, "007.png", "1.50"),
        (9, "e.png", ""),
    ]


def test_delimiter_encoding_and_byte_order_mark(tmp_path):
    path = write(tmp_path, "caption;file\nCafé;a.png\n", "latin-1")
    assert read_rows(path, "file", "caption", delimiter=";", encoding="latin-1")[0].caption == "Café"
    assert read_rows(write(tmp_path, "\ufefffile,caption\na,b\n"), "file", "caption")[0].image == "a"
    with pytest.raises(UserError, match="--encoding"):
        read_rows(write(tmp_path, "file,caption\na.png,Café\n", "latin-1"), "file", "caption")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "empty"),
        ("file,caption\n", "no rows"),
        ("file,caption,caption\na,b,c\n", "'caption' more than once"),
        ("file,text\na,b\n", "no column 'caption'; it has 'file', 'text'"),
        ("file,caption\na.png,a red, round brick\n", "line 2.*quote captions"),
        ('file,caption\na.png,"never closed\nb.png,b\n', "EOF inside string"),
    ],
)
def test_a_csv_that_cannot_be_used_is_explained(tmp_path, text, message):
    with pytest.raises(UserError, match=message):
        read_rows(write(tmp_path, text), "file", "caption")


def test_a_missing_csv_and_a_folder_are_explained(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "none.csv", "file", "caption")
    with pytest.raises(UserError, match="cannot be read"):
        read_rows(tmp_path, "file", "caption")


def test_rows_join_by_image_and_every_other_row_is_a_reject(tmp_path):
    images = tmp_path / "images"
    (images / "sub").mkdir(parents=True)
    for name in ("a.png", "b.png", "sub/c.png"):
        (images / name).touch()
    (tmp_path / "secret.png").touch()
    os.symlink(tmp_path / "secret.png", images / "link.png")
    lines = [
        "file,caption,group",
        "a.png,first,g1",
        "./a.png,  second   caption ,g1",  # the same file: a second caption
        "a.png,first,g1",
        "a.png,third,g2",
        "b.png, ,g1",
        ",no path,g1",
        "../secret.png,escapes,g1",
        f"{tmp_path}/secret.png,absolute escape,g1",
        "link.png,link escape,g1",
        "none.png,missing,g1",
        f"{images}/sub/c.png,absolute inside,",
    ]
    rows = read_rows(write(tmp_path, "\n".join(lines)), "file", "caption", "group")
    pictures, rejects = pair(rows, images)
    assert [(picture.rows[0].image, picture.captions, picture.group) for picture in pictures] == [
        ("a.png", ["first", "second caption"], "g1"),
        ("sub/c.png", ["absolute inside"], "image:sub/c.png"),
    ]
    assert {reject.line: reject.reason for reject in rejects} == {
        4: "duplicate row",
        5: "conflicting group",
        6: "empty caption",
        7: "no image path",
        8: "outside of the images folder",
        9: "outside of the images folder",
        10: "outside of the images folder",
        11: "missing file",
    }
    assert sum(len(picture.rows) for picture in pictures) + len(rejects) == len(rows)
