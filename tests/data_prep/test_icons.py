"""The demo's data: icons.csv and the images."""

import csv

import numpy as np
from PIL import Image

from data_prep.icons import all_glyphs, icons


def test_icons_are_black_on_transparent_and_named(icon_folder):
    with open(icon_folder / "icons.csv") as file:
        rows = list(csv.DictReader(file))
    assert list(rows[0]) == ["file_path", "caption", "group", "set"]
    sizes = set()
    for row in rows:
        image = Image.open(icon_folder / row["file_path"])
        values = np.asarray(image)
        assert image.mode == "RGBA"
        assert values[..., :3].max() == 0
        assert values[..., 3].min() == 0 < values[..., 3].max()
        assert row["caption"].replace(" ", "").isalnum()
        sizes.add(image.size)
    assert len(sizes) > 3


def test_the_same_seed_draws_the_same(icon_folder, tmp_path):
    icons(tmp_path / "again", limit=240)
    for path in icon_folder.rglob("*.*"):
        assert path.read_bytes() == (tmp_path / "again" / path.relative_to(icon_folder)).read_bytes()


def test_style_variants_share_a_group_and_logos_are_left_out():
    glyphs = all_glyphs()
    assert len(glyphs) > 10_000
    group_of = {(glyph.font, name): glyph.group for glyph in glyphs for name in glyph.names}
    assert (
        group_of["materialdesignicons6", "camera-front-variant"]
        == group_of["materialdesignicons6", "camera-front"]
    )
    assert len({group_of["phosphor", f"bell{style}"] for style in ("", "-bold", "-fill", "-thin")}) == 1
    assert (
        group_of["fontawesome6-solid", "bell"]
        == group_of["remixicon", "bell-line"]
        == group_of["phosphor", "bell"]
    )
    assert not any("facebook" in name or name.endswith("-logo") for _, name in group_of)
