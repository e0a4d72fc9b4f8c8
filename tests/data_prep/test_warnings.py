"""What deserves attention is on the terminal and on the page, and its advice works when it is followed."""

import csv
import json
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
from conftest import call_here, noise_images
from markupsafe import escape
from PIL import Image, ImageDraw

import data_prep.__main__
from data_prep.build.options import Checking, Parallelism, Reading, Splitting
from data_prep.build.pipeline import build
from data_prep.errors import UserError

ONE = Parallelism(1)


def command(monkeypatch, capsys, *arguments) -> list[str]:
    """The warnings of a command."""
    monkeypatch.setattr(
        "sys.argv", ["python -m data_prep", "build", *map(str, arguments), "--processes", "1"]
    )
    data_prep.__main__.main()
    lines = capsys.readouterr().out.splitlines()
    return [line.removeprefix("warning: ") for line in lines if line.startswith("warning: ")]


def advice(warning: str) -> list[str]:
    """The options that a warning tells to build with."""
    return shlex.split(re.search(r"(?:build again with|or pass) ((?:--[\w-]+(?: [\d.]+)? ?)+)", warning)[1])


def report_of(out: Path) -> dict:
    return json.loads((out / "report.json").read_text())


def twins(folder: Path, n: int = 40) -> Path:
    """Pairs of images that differ in a pixel, so that many pairs are in two splits."""
    rng = np.random.default_rng(0)
    with open(folder / "twins.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["image", "caption"])
        for number in range(n):
            small = Image.fromarray(rng.integers(0, 256, (6, 6, 3), dtype=np.uint8))
            image = small.resize((48, 48), Image.BICUBIC)
            for twin in range(2):
                image.putpixel((5, 5), (twin * 200, 0, 0))
                image.save(folder / f"{number}-{twin}.png")
                writer.writerow([f"{number}-{twin}.png", f"image {number} number {twin}"])
    return folder / "twins.csv"


def test_leaks_are_dropped_as_advised(tmp_path, monkeypatch, capsys):
    path, out = twins(tmp_path), tmp_path / "out"
    (warning,) = command(monkeypatch, capsys, path, "--out", out)
    assert f"{report_of(out)['leaks']} near-identical pairs across splits (leaks.csv)" in warning
    assert advice(warning) == ["--drop-leaks", "--overwrite"]
    assert command(monkeypatch, capsys, path, "--out", out, *advice(warning)) == []
    report = report_of(out)
    # Far more than --max-rejects, and no defect: it was asked for.
    assert report["asked"] == report["rejects"] == report["reasons"]["near-identical to held-out"] > 0.05 * 80
    assert report["records"] + report["rejects"] == report["rows"] == 80
    assert "rows were rejected" not in (out / "report.html").read_text()
    assert len((out / "rejects.csv").read_text().splitlines()) == 1 + report["rejects"]  # nothing is lost


def test_what_was_asked_hides_no_defect(tmp_path, capsys):
    path = twins(tmp_path)
    path.write_text(path.read_text() + "none.png,one\nnot.png,two\n")
    with pytest.raises(
        UserError, match=r"2 of 82 rows cannot be used \(2\.4%\).*\n +2 x missing file\n"
    ) as e:
        build([str(path)], tmp_path / "out", split=Splitting(drop_leaks=True), parallelism=ONE)
    assert "near-identical" not in str(e.value)
    assert "the first is line 82, 'none.png'" in str(e.value)
    (_, enough) = advice(str(e.value))
    build(
        [str(path)],
        tmp_path / "out",
        check=Checking(max_rejects=float(enough)),
        split=Splitting(drop_leaks=True),
        parallelism=ONE,
    )
    printed = capsys.readouterr().out
    asked = report_of(tmp_path / "out")["asked"]
    assert f"{asked + 2} rejects, {asked} of them as asked" in printed
    assert f"  left out: {asked} x near-identical to held-out" in printed
    assert "  rejected: 2 x missing file" in printed


def test_repeated_rows_do_not_count_as_unusable(tmp_path, capsys):
    path = noise_images(tmp_path, 20)
    path.write_text(path.read_text() + "0.png,caption 0,\n" * 3)
    report = build([str(path)], tmp_path / "out", check=Checking(max_rejects=0), parallelism=ONE)
    assert (report["rows"], report["records"], report["reasons"]) == (23, 20, {"duplicate row": 3})
    assert "  left out: 3 x duplicate row" in capsys.readouterr().out
    assert "rows were rejected" not in (tmp_path / "out" / "report.html").read_text()
    assert len((tmp_path / "out" / "rejects.csv").read_text().splitlines()) == 1 + 3  # they are listed


def test_an_empty_split_is_filled_as_advised(tmp_path, monkeypatch, capsys):
    path, out = noise_images(tmp_path, 30, groups=4), tmp_path / "out"
    options = [path, "--out", out, "--group-column", "group"]
    warnings = command(monkeypatch, capsys, *options)
    empty = next(warning for warning in warnings if "is empty: 4 groups only" in warning)
    warnings = command(monkeypatch, capsys, *options, *advice(empty))
    assert not any("is empty" in warning for warning in warnings)
    assert all(counts["images"] for counts in report_of(out)["splits"].values())
    # Two groups cannot fill three splits, whatever the seed.
    path = noise_images(tmp_path, 30, groups=2)
    warnings = command(monkeypatch, capsys, *options, "--overwrite")
    assert any("is empty: 2 groups only; it needs more data" in warning for warning in warnings)
    # An empty split that was asked for is no surprise.
    warnings = command(monkeypatch, capsys, *options, "--overwrite", "--val", "0", "--test", "0")
    assert not any("is empty" in warning for warning in warnings)


def test_one_group_holds_most_images(tmp_path, capsys):
    lines = noise_images(tmp_path, 220, groups=40).read_text().splitlines()
    lines = [
        lines[0],
        *(re.sub("g\\d+$", "giant", line) if at < 140 else line for at, line in enumerate(lines[1:])),
    ]
    (tmp_path / "pairs.csv").write_text("\n".join(lines) + "\n")
    read = Reading(group_column="group")
    report = build([str(tmp_path / "pairs.csv")], tmp_path / "out", read, parallelism=ONE)
    printed = capsys.readouterr().out
    split = report["largest_group"]["split"]
    assert report["largest_group"] == {"name": "giant", "images": 140, "split": split}
    giant = f"warning: The group “giant” has 140 of 220 images (63.6%), all in {split}"
    assert giant in printed
    assert "--group-column group" in printed
    shares = {name: counts["images"] / 220 for name, counts in report["splits"].items()}
    for name in ("val", "test"):
        is_far = not 0.05 <= shares[name] <= 0.2
        assert (f"warning: {name} has {shares[name]:.1%} of the images, not 10.0%" in printed) == (
            is_far and shares[name] > 0
        )
    # The page begins with the same sentences.
    page = (tmp_path / "out" / "report.html").read_text()
    for warning in report["warnings"]:
        assert escape(warning) in page


def test_truncated_captions(tmp_path, capsys):
    path = noise_images(tmp_path, 30)
    path.write_text(path.read_text().replace("caption 7,", "one word and another " * 20 + ","))
    build([str(path)], tmp_path / "out", parallelism=ONE)
    words = "1 caption (3.3%) will be truncated: longer than the --context-length of 77 tokens"
    assert words in capsys.readouterr().out


def test_the_most_common_caption_is_named(tmp_path, capsys):
    """An empty cell that another program wrote as a word is seen so."""
    path = noise_images(tmp_path, 130)
    lines = path.read_text().splitlines()
    for at in range(1, 61):
        lines[at] = f"{at - 1}.png,NaN,"
    for at in range(61, 112):
        lines[at] = f"{at - 1}.png,icon,"
    path.write_text("\n".join(lines) + "\n")
    build([str(path)], tmp_path / "out", parallelism=ONE)
    words = "2 captions of more than 50 images each: too general to group images by; “NaN” is of the most"
    assert f"{words} images, 60." in capsys.readouterr().out


def test_transparent_images_and_the_background_that_shows_them(tmp_path, capsys):
    """White drawings on nothing, and images of nothing at all."""
    path = noise_images(tmp_path, 10)
    for name in ("a", "b", "c"):
        image = Image.new("RGBA", (20, 20))
        if name != "c":
            ImageDraw.Draw(image).rectangle((3, 3, 9, 12 + (name == "b")), "white")
        image.save(tmp_path / f"{name}.png")
    path.write_text(path.read_text() + "".join(f"{name}.png,thing {name},\n" for name in "abc"))
    arguments = [path, "--out", tmp_path / "out", "--processes", 1]
    result = call_here(data_prep.__main__.main, "build", *arguments)
    for words in (
        "2 x blank on the background",
        "1 x wholly transparent",
        "2 images with transparency are one color on the --background white: pass another --background.",
        "1 image is wholly transparent: no --background shows anything",
    ):
        assert words in result.stderr, result.stderr
    check = Checking(background="#404040", max_rejects=0.1)
    report = build([str(path)], tmp_path / "out", check=check, parallelism=ONE)
    assert report["reasons"] == {"wholly transparent": 1}
    assert "warning: 1 image is wholly transparent" in capsys.readouterr().out


def test_max_rejects_is_a_fraction(tmp_path):
    path = noise_images(tmp_path, 10)
    with pytest.raises(UserError, match="--max-rejects 5: must be a fraction of rows, from 0 to 1"):
        build([str(path)], tmp_path / "out", check=Checking(max_rejects=5))
    path.write_text("image,caption\nnone.png,nothing\n")
    with pytest.raises(UserError, match="none of the 1 rows can be used") as caught:
        build([str(path)], tmp_path / "out", check=Checking(max_rejects=1), parallelism=ONE)
    assert "--max-rejects" not in str(caught.value)
