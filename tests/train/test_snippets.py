"""What the model card shows is run before an export gets its name, on files as people have them."""

import io
import shutil

import numpy as np
import pytest
from conftest import noise_image
from PIL import Image

from data_prep.build.options import Checking, Parallelism, Reading, Splitting
from data_prep.build.pipeline import build
from data_prep.errors import UserError
from data_prep.shards import Shards
from train.export import reference, snippets
from train.export.folder import _answers, export, table
from train.export.snippets import blocks, compare, library_of, run, use
from train.model.clip import load

WHITE = (255, 255, 255)


def people_have(folder) -> None:
    """Files whose pixels depend on how they are opened, and a table of them."""
    rgb = [noise_image(24, 20).rotate(90 * turn, expand=True) for turn in range(4)]
    see_through = rgb[0].convert("RGBA")
    see_through.putalpha(Image.linear_gradient("L").resize(see_through.size))
    see_through.save(folder / "see through.png")
    palette = rgb[1].quantize(16)
    palette.info["transparency"] = 3
    palette.save(folder / "palette.gif", transparency=3)
    exif = Image.Exif()
    exif[0x0112] = 8
    rgb[2].save(folder / "turned.jpg", exif=exif.tobytes(), quality=95)
    rgb[3].convert("CMYK").save(folder / "print.jpg")
    gray_alpha = rgb[0].convert("LA")
    gray_alpha.putalpha(128)
    gray_alpha.save(folder / "gray.png")
    levels = np.random.default_rng(0).integers(0, 65536, (20, 24)).astype(np.uint16)
    Image.fromarray(levels).save(folder / "scan.png")
    rgb[1].save(folder / "plain.png")
    names = sorted(path.name for path in folder.iterdir())
    (folder / "pairs.csv").write_text("image,caption\n" + "".join(f"{name},a {name}\n" for name in names))


@pytest.fixture(scope="module")
def of_people(tmp_path_factory):
    folder = tmp_path_factory.mktemp("people")
    people_have(folder)
    splitting, checking = Splitting(val=0.0, test=0.0), Checking(background="#ff8000")
    build([str(folder / "pairs.csv")], folder / "shards", Reading(), checking, splitting, Parallelism(1))
    return folder / "shards"


def test_the_files_are_the_users_and_transparent_ones_come_first(icon_shards):
    """The drawn icons are black on transparent."""
    files = reference.samples(icon_shards, WHITE).files
    assert [file.kind for file in files] == ["original"] * 4 + ["transparent", "rotated"]
    for file in files[:5]:
        assert Image.open(io.BytesIO(file.data)).has_transparency_data
        assert "transparency" in file.fixes
    assert files[5].fixes == ("orientation",)


def test_every_file_of_people_is_opened_as_training_sees_it(quick, of_people, monkeypatch):
    monkeypatch.setattr(reference, "N_FILES", 10)
    files = reference.samples(of_people, (255, 128, 0)).files
    kinds = [file.fixes for file in files if file.kind == "original"]
    assert len(kinds) == 6  # all but the 16-bit scan, which Pillow alone does not scale
    name, out, record = quick
    text = use(record | {"background": "#ff8000"}, str(out))
    assert {library_of(code) for code in blocks(text)} == {
        "open_clip",
        "transformers",
        "pipeline",
        "sentence_transformers",
    }
    clip = load(name)
    answers = _answers(clip, clip.towers.eval().model, files)
    assert answers.std(dim=0).max() > 1e-3  # the answers depend on the file
    differences = compare(text, files, answers)
    for library, measured in differences.items():
        assert measured["files"] <= 1e-6, library
    assert differences["open_clip"]["probabilities"] <= 1e-6
    assert max(measured.get("probabilities", 0) for measured in differences.values()) < 0.05


def test_originals_that_are_gone_or_have_changed_are_not_used(of_people, tmp_path, monkeypatch):
    monkeypatch.setattr(reference, "N_FILES", 10)
    folder = shutil.copytree(of_people.parent, tmp_path / "copy")
    shards = Shards(folder / "shards", "train")
    shards.manifest["read"]["images"] = str(folder)
    noise_image(24, 20).save(folder / "see through.png")
    (folder / "gray.png").unlink()
    (folder / "plain.png").write_bytes(b"no image")
    fixes = [file.fixes for file in reference.original_files(shards)]
    assert len(fixes) == 3
    shards.manifest["read"]["images"] = str(tmp_path / "gone")
    assert reference.original_files(shards) == []


def test_a_snippet_that_ignores_transparency_is_noticed(quick, icon_shards, tmp_path, monkeypatch):
    wrong = tmp_path / "use.md"
    right = snippets.TEMPLATE.read_text()
    composite = next(line for line in right.splitlines() if line.startswith("image = Image.alpha_composite"))
    wrong.write_text(right.replace(composite, 'image = image.convert("RGB")'))
    monkeypatch.setattr(snippets, "TEMPLATE", wrong)
    with pytest.raises(UserError, match=r"open_clip, snippet files by 0\.\d+ .*pipeline, snippet files by"):
        export(load(quick[0]), tmp_path / "out", data=icon_shards)
    assert [path.name for path in tmp_path.iterdir()] == ["use.md"]


def test_a_missing_rotation_is_noticed(quick, tmp_path, monkeypatch):
    wrong = tmp_path / "use.md"
    wrong.write_text(snippets.TEMPLATE.read_text().replace("ImageOps.exif_transpose(", "("))
    monkeypatch.setattr(snippets, "TEMPLATE", wrong)
    with pytest.raises(UserError, match="snippet files by"):
        export(load(quick[0]), tmp_path / "out")


def test_the_note_says_which_files(quick):
    _, _, record = quick
    assert record["compared_files"] == {"transparent": 1, "rotated": 1}
    assert "for image files (1 transparent, 1 rotated)" in table(record)
    assert record["background"] == "#ffffff"


def test_a_place_with_quotes_is_text(quick, tmp_path):
    _, out, record = quick
    odd = tmp_path / 'a "b" {{ c }}'
    odd.symlink_to(out)
    noise_image().save(tmp_path / "0.png")
    for code in blocks(use(record, str(odd)))[:1]:
        assert run(code, [tmp_path / "0.png"])[0].shape == (2,)
