"""Bad inputs of every kind: no crash, and each row is rejected with a named reason or its image is fixed."""

import csv
import io
import json
import os

import evil
import numpy as np
import pytest
from PIL import Image

from data_prep.build.pipeline import Checking, Parallelism, Reading, build
from data_prep.build.scan import Checks, in_order
from data_prep.build.split import SPLITS
from data_prep.shards import Shards


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("evil")
    source, reasons, expected = evil.make(folder)
    read = Reading(split_column="split", images=str(folder / "images"))
    report = build(
        [str(source)], folder / "out", read, Checking(max_rejects=1.0), parallelism=Parallelism(processes=2)
    )
    return folder / "out", report, reasons, expected


def samples(out):
    for split in SPLITS:
        shards = Shards(out, split)
        yield from ((split, shards.read(number)) for number in range(len(shards)))


def test_every_row_is_accounted_for(built):
    out, report, reasons, _ = built
    assert len(reasons) > 60
    with open(out / "rejects.csv", encoding="utf-8", newline="") as file:
        found = {int(row["line"]): row["reason"] for row in csv.DictReader(file)}
    assert found == reasons
    assert report["records"] + report["rejects"] == report["rows"]
    assert report["rejects"] == sum(report["reasons"].values()) == len(reasons)
    captions = [caption for _, sample in samples(out) for caption in sample.captions]
    assert len(captions) == report["records"]
    assert {"NA", "null", "None", "two lines", "<script>alert('x')</script>"} < set(captions)
    assert report["captions_truncated"] == 1


def test_every_image_that_can_be_used_is_in_and_opaque(built):
    out, report, _, expected = built
    found = {sample.meta["image"]: sample for _, sample in samples(out)}
    assert found.keys() == expected.keys()
    images = out.parent / "images"
    for name, fix in expected.items():
        image = Image.open(io.BytesIO(found[name].image))
        assert (image.mode, getattr(image, "n_frames", 1)) == ("RGB", 1), name
        assert np.ptp(np.asarray(image)) > 0, name
        if fix is None:
            assert found[name].image == (images / name).read_bytes(), name
        else:
            assert report["fixes"][fix], name
    assert all("." not in sample.key for sample in found.values())
    assert {split for split, sample in samples(out) if sample.meta["image"] == "twice.png"} == {"train"}


def test_pages_are_decodable_by_what_training_uses(built):
    from train.data.decode import decode

    for _, sample in samples(built[0]):
        assert decode(sample.image).size == (sample.meta["width"], sample.meta["height"])


class Crash(Checks):
    """A decoder that takes its process with it."""

    def __call__(self, sources):
        if 7 in sources:
            os._exit(139)
        return [source * 2 for source in sources]


def test_a_decoder_that_crashes_loses_one_image():
    jobs = [(start, list(range(start, start + 4))) for start in range(0, 40, 4)]
    found = list(in_order(Crash(None), iter(jobs), 2, "crashed"))
    assert found == [
        (start, ["crashed" if number == 7 else number * 2 for number in numbers]) for start, numbers in jobs
    ]


def test_the_report_is_json(built):
    assert json.loads((built[0] / "report.json").read_text()) == built[1]
