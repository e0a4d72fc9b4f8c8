"""The pure parts of benchmarks.quality: what is asked was never trained on, arms are what they are called,
tables tell the truth.
"""

import csv
import dataclasses
import io
import json
import re
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks import quality_data, quality_icons, quality_wrong
from benchmarks.quality import ARMS, OURS, RATES, SEED_RECIPE, words_of
from benchmarks.quality_clipart import colour_images
from benchmarks.quality_data import DOMAIN_B, captioned, concept, is_held_out, questions
from benchmarks.quality_icons import LEAST, PACKAGES, archive, drawn, phosphor_tags, synonyms
from benchmarks.quality_table import SHOWN, differences, figures, mixtures
from data_prep import npm
from data_prep.build.split import split_of
from data_prep.errors import UserError
from data_prep.icons import charmap, font_files
from eval.retrieval.intervals import mean_interval, paired_difference
from eval.retrieval.score import QueryScores
from train.recipe import leaves, parse

WORDS = [f"word {number}" for number in range(40)]


@pytest.fixture(scope="module")
def rows(icon_folder) -> list[dict]:
    with open(icon_folder / "icons.csv", newline="") as file:
        return [row | {"domain": "B" if row["set"] in DOMAIN_B else "A"} for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def known(rows) -> dict:
    """Five of forty words for every icon, so that each word belongs to icons of train and of test."""
    rng = np.random.default_rng(0)
    return {(row["set"], concept(row)): list(rng.choice(WORDS, 5, replace=False)) for row in rows}


def test_no_question_and_no_held_out_icon_is_trained_on(rows, known):
    of_split = {
        split: [row for row in captioned(rows, known, "B") if row[4] == split]
        for split in ("train", "val", "test")
    }
    trained = {
        part for _, name, more, *_ in of_split["train"] for text in (name, more) for part in text.split(", ")
    }
    names = {name for split in ("val", "test") for _, name, *_ in of_split[split]}
    captions = {text for found in of_split.values() for _, *texts, _, _ in found for text in texts if text}
    asked = questions(rows, known, captions)
    new = {word for word in asked if is_held_out(word)}
    assert len(new) > 5
    assert len(set(asked) - new) > 5
    assert not set(asked) & captions
    assert not new & (trained | names)
    assert trained & set(WORDS), "synonyms that are not held out are trained on"
    assert not any(is_held_out(word) for word in trained & set(WORDS))
    assert not any("," in caption for caption in names), "test icons have their names alone"
    assert not any(more for split in ("val", "test") for _, _, more, *_ in of_split[split])
    groups = {split: {group for *_, group, _ in found} for split, found in of_split.items()}
    assert not groups["train"] & groups["test"]
    assert not groups["val"] & (groups["test"] | groups["train"])
    set_of, group_of = ({row["file_path"]: row[name] for row in rows} for name in ("set", "group"))
    for word, files in asked.items():
        for file in files:
            assert set_of[file] in DOMAIN_B
            assert file in {row[0] for row in of_split["test"]}
            members = [row for row in rows if row["group"] == group_of[file] and row["set"] in DOMAIN_B]
            assert any(word in known[row["set"], concept(row)] for row in members)
    a = {row[0] for row in captioned(rows, known, "A")}
    assert a.isdisjoint(row[0] for found in of_split.values() for row in found)
    assert len(a) + sum(len({row[0] for row in found}) for found in of_split.values()) == len(
        {row["file_path"] for row in rows}
    )


def test_a_held_out_synonym_that_is_a_name_is_not_asked():
    word = next(word for word in WORDS if is_held_out(word))
    group = next(
        f"g{at}" for at in range(100) if split_of(f"g{at}", **quality_data.SPLITS["B"], seed=1) == "test"
    )
    row = {
        "file_path": "phosphor/x.png",
        "caption": "x bold",
        "group": group,
        "set": "phosphor",
        "domain": "B",
    }
    known = {("phosphor", "x"): [word]}
    assert questions([row], known, set()) == {word: ["phosphor/x.png"]}
    assert questions([row], known, {word}) == {}
    namesake = {**row, "caption": word}
    assert questions([row, namesake], known, set()) == {}


def packed(folder: Path, name: str, *contents: str | bytes) -> None:
    with tarfile.open(archive(folder, name), "w:gz") as tar:
        for member, content in zip(PACKAGES[name][1], contents, strict=True):
            data = content.encode() if isinstance(content, str) else content
            about = tarfile.TarInfo(f"package/{member}")
            about.size = len(data)
            tar.addfile(about, io.BytesIO(data))


def test_words_and_fonts_come_from_packages(tmp_path, monkeypatch):
    phosphor = """const n = [{ name: "acorn", pascal_name: "Acorn", categories: [e.N],
        tags: ["*new*", "nut"], codepoint: 1 },
      { name: "airplane-tilt", pascal_name: "AirplaneTilt", alias: { name: "plane", pascal_name: "Plane" },
        categories: [], tags: ["Vehicles", "air port"] },
      { name: "plain", pascal_name: "Plain", categories: [], tags: [] }];"""
    tags = ["Vehicles", "air port"]
    assert phosphor_tags(phosphor) == {"acorn": ["nut"], "airplane-tilt": tags, "plane": tags, "plain": []}
    font = font_files()["phosphor"]
    home, star, umbrella = (ord(charmap(font)[name]) for name in ("house", "star", "umbrella"))
    packed(tmp_path, "@phosphor-icons/core", phosphor)
    packed(tmp_path, "@mdi/svg", json.dumps([{"name": "access-point", "aliases": ["wireless"]}]))
    tabler = {
        "home-2": {
            "tags": ["House", 2],
            "styles": {"outline": {"unicode": f"{home:x}"}, "filled": {"unicode": f"{star:x}"}},
        },
        "brand-x": {"tags": [], "styles": {"outline": {"unicode": f"{star:x}"}}},
        "vary": {"tags": [], "styles": {"filled": {"unicode": "fe0f"}}},
    }
    packed(tmp_path, "@tabler/icons", json.dumps(tabler))
    packed(tmp_path, "@tabler/icons-webfont", font.read_bytes(), font.read_bytes())
    packed(
        tmp_path,
        "lucide-static",
        json.dumps({"umbrella": ["rain"]}),
        json.dumps({"umbrella": umbrella}),
        font.read_bytes(),
    )
    with pytest.raises(UserError, match="cannot be read"):
        synonyms(tmp_path)
    packed(
        tmp_path,
        "@fortawesome/fontawesome-free",
        json.dumps({"house": {"search": {"terms": ["abode", "-", "Main_place"]}}}),
    )
    with pytest.raises(UserError, match="words for 1 icons of fontawesome6-solid, not 1800 or more"):
        synonyms(tmp_path)
    monkeypatch.setattr(quality_icons, "LEAST", dict.fromkeys(LEAST, 1))
    assert synonyms(tmp_path) == {
        ("fontawesome6-solid", "house"): ["abode", "main place"],
        ("fontawesome6-regular", "house"): ["abode", "main place"],
        ("materialdesignicons6", "access point"): ["wireless"],
        ("phosphor", "acorn"): ["nut"],
        ("phosphor", "airplane tilt"): ["vehicles", "air port"],
        ("phosphor", "plane"): ["vehicles", "air port"],
        ("phosphor", "plain"): [],
        ("tabler", "home 2"): ["house", "2"],
        ("tabler", "brand x"): [],
        ("tabler", "vary"): [],
        ("lucide", "umbrella"): ["rain"],
    }
    packed(tmp_path, "bootstrap-icons", json.dumps({"star-fill": star}), font.read_bytes())
    rows = drawn(tmp_path, tmp_path / "icons")
    assert [(row["set"], row["caption"], row["group"]) for row in rows] == [
        ("tabler", "home 2", "home 2"),
        ("tabler", "home 2 filled", "home 2"),
        ("lucide", "umbrella", "umbrella"),
        ("bootstrap", "star fill", "star"),
    ]
    assert [concept(row) for row in rows] == ["home 2", "home 2", "umbrella", "star fill"]
    images = [Image.open(tmp_path / "icons" / row["file_path"]) for row in rows]
    assert all(image.getextrema()[3] == (0, 255) for image in images), "each shows something"


def test_names_and_words_of_images_in_colour(tmp_path):
    share = tmp_path / "debian/usr/share"
    about = "<dc:title id='x'>{}</dc:title><rdf:Bag><rdf:li>{}</rdf:li><rdf:li>hash</rdf:li></rdf:Bag>"
    files = {
        "openclipart/png/animals/dog_ann_01.png": "",
        "openclipart/svg/animals/dog_ann_01.svg": about.format("Bored Dog_01", "Mammal"),
        "openclipart/png/special/blue.png": "",
        **{f"openclipart/png/icons/edit-copy{at}.png": "" for at in range(4)},
        **{f"openclipart/svg/icons/edit-copy{at}.svg": about.format("A theme", "action") for at in range(4)},
        "tuxpaint/stamps/food/fruit/lemon.png": "",
        "tuxpaint/stamps/food/fruit/lemon.txt": "A lemon.\nde.utf8=Eine Zitrone.\n",
        "icons/oxygen/base/48x48/places/trash-full.png": "",
        "icons/oxygen/base/16x16/places/trash-full.png": "",
    }
    for name, text in files.items():
        (share / name).parent.mkdir(parents=True, exist_ok=True)
        (share / name).write_text(text)
    (share / "icons/oxygen/base/48x48/places/bin.png").symlink_to("trash-full.png")
    rows, known = colour_images(tmp_path / "debian")
    assert known == {
        ("clipart", "bored dog"): ["mammal"],
        ("clipart", "edit copy"): ["action"],
        ("stamps", "a lemon"): ["food", "fruit"],
        ("oxygen", "trash full"): ["bin"],
    }
    assert len(rows) == 1 + 4 + 1 + 1
    assert all((tmp_path / row["file_path"]).is_file() and row["group"] == row["caption"] for row in rows)
    assert {row["domain"] for row in rows if row["set"] == "oxygen"} == {"B"}


def test_without_npm_the_packages_are_named(tmp_path, monkeypatch):
    monkeypatch.setattr(npm.shutil, "which", lambda name: None)
    with pytest.raises(UserError, match="npm pack @fortawesome/fontawesome-free"):
        quality_icons.fetch(tmp_path / "packages")


def recipe_of(arm: str) -> dict:
    """What an arm trains with, over common values: NAME.NAME -> value."""
    return leaves(dataclasses.asdict(parse([SEED_RECIPE, "--data", "d", "--run", "r", *map(str, ARMS[arm])])))


def test_an_arm_lacks_what_it_is_called_after_and_no_more():
    ours, seed = recipe_of("ours"), recipe_of("the seed's recipe")
    for name, words in OURS.items():
        arm, keys = (
            recipe_of(f"ours without {name}"),
            {word[2:].replace("-", "_") for word in map(str, words) if word.startswith("--")},
        )
        assert {key for key in arm if arm[key] != ours[key]} <= keys
        assert {key: arm[key] for key in keys} == {key: seed[key] for key in keys}
    assert {name.partition("@")[0] for name in RATES} <= set(ARMS)


def test_arms_with_pairs_of_a_have_them_in_their_batches_or_replay_them(tmp_path):
    arms = {
        name: parse([SEED_RECIPE, "--data", str(tmp_path / "B"), "--run", "r", *words_of(name, tmp_path)])
        for name in ARMS
        if ARMS[name] is not None
    }
    mixture = {str(tmp_path / "B"): 0.8, str(tmp_path / "A"): 0.2}
    fifth = "ours with a fifth of each batch from A"
    assert {name for name, plan in arms.items() if plan.data == mixture} == {
        fifth,
        f"{fifth} instead of replay",
    }
    folders = {plan.data for plan in arms.values() if isinstance(plan.data, str)}
    names = ("B", quality_data.WEIGHTED, *quality_wrong.PLACES)
    assert folders == {str(tmp_path / name) for name in names}
    replayed = {name: plan.replay for name, plan in arms.items()}
    assert replayed[fifth] == replayed["ours"] == str(tmp_path / "A")
    assert replayed[f"{fifth} instead of replay"] == replayed["ours without replay"] == ""


def test_exchanged_captions_are_of_another_group_and_all_others_stay():
    rows = [
        {
            "file": f"{group}-{style}",
            "name": f"name {group} {style} {which}",
            "synonyms": "",
            "group": str(group),
        }
        for group in range(20)
        for style in range(2)
        for which in range(1 + group % 2)
    ]
    rows = [row | {"split": "test" if row["group"] == "7" else "train"} for row in rows]
    changed, wrong = quality_wrong.exchanged(rows, 0.2)
    assert len(wrong) == 8  # of 38 images
    assert sorted(row["name"] for row in changed) == sorted(row["name"] for row in rows)
    for row in changed:
        group, style = row["name"].split()[1:3]
        assert row["file"].startswith(f"{row['group']}-")
        assert (row["group"] != group) == (row["file"] in wrong)
        assert row["file"] in wrong or row["file"] == f"{group}-{style}"
        assert row["split"] == ("test" if row["group"] == "7" else "train")


def scored(seed: int) -> QueryScores:
    rng = np.random.default_rng(seed)
    sizes = {
        "image_to_text": 40,
        "text_to_image": 12,
        "queries_to_image": 9,
        "new_words": 5,
        "degraded": 40,
        "image_to_image": 30,
    }
    sizes |= {"A_image_to_text": 25, "A_text_to_image": 20}
    groups = {name: np.arange(size) // 3 for name, size in sizes.items()}
    return QueryScores(
        {f"{name}/R@1": rng.integers(0, 2, size).astype(float) for name, size in sizes.items()}, groups
    )


def test_the_tables_say_what_was_scored():
    seeds = [scored(1), scored(2)]
    for title, names in (
        ("group R@1", ("image_to_text", "text_to_image")),
        ("unseen captions", ("queries_to_image",)),
    ):
        values, _ = SHOWN[title](seeds[0])
        assert values.mean() == pytest.approx(
            np.mean([seeds[0].values[f"{name}/R@1"].mean() for name in names])
        )
    table = figures({"base": [scored(0)], "ours": seeds}).splitlines()
    cells = dict(zip(SHOWN, table[3].strip("| ").split(" | ")[1:], strict=True))
    both = np.mean([queries.values["degraded/R@1"] for queries in seeds], axis=0)
    value, low, high = (100 * each for each in mean_interval(both, seeds[0].groups["degraded"]))
    least, most = sorted(100 * queries.values["degraded/R@1"].mean() for queries in seeds)
    assert cells["degraded images"] == f"{value:.1f} [{low:.1f}, {high:.1f}; {least:.1f} to {most:.1f}]"

    rows = differences({"base": [scored(0)], "ours": seeds, "same": seeds}, "ours").splitlines()[2:]
    cells = rows[1].strip("| ").split("|")[1:]
    assert len(cells) == len(SHOWN)
    assert all(re.fullmatch(r" *\+0\.0 \[-[\d.]+, \+[\d.]+\] p 1 *", cell) for cell in cells)
    value, low, high, p = paired_difference(
        both, scored(0).values["degraded/R@1"], seeds[0].groups["degraded"]
    )
    assert f"| {100 * value:+.1f} [{100 * low:+.1f}, {100 * high:+.1f}] p {p:.2g} |" in rows[0]


def test_the_part_of_the_gain_is_of_the_means_over_seeds():
    points = [
        [
            {"share": 0.0, "B": 0.1, "A": 0.5},
            {"share": 0.5, "B": 0.3, "A": 0.5},
            {"share": 1.0, "B": 0.4, "A": 0.3},
        ]
    ] * 2
    points[1] = [{**point, "B": point["B"] + 0.1} for point in points[1]]
    cells = [cell.strip() for cell in mixtures(points).splitlines()[3].strip("| ").split("|")]
    assert cells == ["0.5", "35.0", "67 %", "50.0", "+0.0"]
