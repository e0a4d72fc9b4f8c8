"""An image within shards that cannot be decoded, as --skip-decode lets in, is named by its sample."""

from pathlib import Path

import evil
import pytest
from conftest import noise_images
from runs import recipe

from data_prep.build.pipeline import Checking, Parallelism, Reading, Splitting, build
from data_prep.errors import UserError
from data_prep.shards import Shards
from eval.options import Inference
from eval.report.images import thumbnail
from eval.search.index import Index
from eval.search.indexing import make_index
from train.export.reference import decoded_samples
from train.loop import fit
from train.world import World

NAMES = {"bomb.png": "too many pixels", "bomb.jpg": "too many pixels", "half.jpg": "damaged image"}


@pytest.fixture(params=NAMES)
def shards(request, tmp_path) -> tuple[Path, str, str]:
    table = noise_images(tmp_path, 48)
    (tmp_path / "7.png").write_bytes(evil.BAD_FILES[request.param][0])
    folder = tmp_path / "shards"
    build(
        [str(table)],
        folder,
        Reading(),
        Checking(skip_decode=True),
        Splitting(val=0, test=0),
        Parallelism(1),
        min_shards=1,
    )
    opened = Shards(folder, "train")
    (number,) = (number for number in range(48) if opened.meta(number)["image"] == "7.png")
    return folder, opened.key(number), NAMES[request.param]


def test_it_is_named_by_whatever_decodes_it(tiny_model, shards, tmp_path):
    folder, key, reason = shards
    opened = Shards(folder, "train")
    (number,) = (number for number in range(48) if opened.key(number) == key)
    plans = [
        recipe(tiny_model, folder, tmp_path / f"run{workers}", epochs=1, workers=workers)
        for workers in (0, 1)
    ]
    for act in (
        *(lambda plan=plan: fit(plan, World(), lambda *_: {}) for plan in plans),
        lambda: thumbnail(opened, number),
        lambda: list(decoded_samples(opened, [number])),
    ):
        with pytest.raises(UserError, match=rf"sample {key} \(7\.png\): {reason}.*--skip-decode") as caught:
            act()
        assert "Traceback" not in str(caught.value)


def test_an_index_lists_it(tiny_model, shards, tmp_path):
    folder, key, reason = shards
    make_index(tiny_model, folder, tmp_path / "index", "", False, Inference(workers=0), World())
    assert len(Index(tmp_path / "index")) == 47
    assert f"{key},7.png,{reason}" in (tmp_path / "index" / "unreadable.csv").read_text().replace('"', "")
