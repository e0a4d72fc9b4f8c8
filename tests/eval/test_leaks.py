"""Near-duplicates across splits are listed."""

import csv

import pytest
import torch
from conftest import call, png
from PIL import Image

from data_prep.build.pipeline import Parallelism, Reading, Splitting, build
from data_prep.build.split import SPLITS
from data_prep.shards import Shards
from eval.options import Inference
from eval.retrieval.command import leaks
from eval.retrieval.leaks import nearest


def test_nearest_in_chunks_is_nearest(monkeypatch):
    torch.manual_seed(0)
    images, train = (torch.nn.functional.normalize(torch.randn(n, 8), dim=1) for n in (37, 50))
    whole = (images @ train.T).max(1)
    for chunk in (1, 10, 64):
        cosines, numbers = nearest(images, train, chunk)
        assert numbers.tolist() == whole.indices.tolist()
        torch.testing.assert_close(cosines, whole.values)


@pytest.mark.parametrize("ranks", [0, 2])
def test_twins_across_splits_are_listed(tiny_model, tmp_path, ranks, capsys):
    lines = ["image,caption"]
    for number in range(30):
        torch.manual_seed(number)
        image = Image.fromarray(torch.randint(0, 256, (3, 3, 3), dtype=torch.uint8).numpy()).resize(
            (32, 32), Image.BICUBIC
        )
        for twin in range(2):
            image.putpixel((1, 1), (twin, 0, 0))
            (tmp_path / f"{number}-{twin}.png").write_bytes(png(image))
            lines.append(f"{number}-{twin}.png,image {number} number {twin}")
    (tmp_path / "a.csv").write_text("\n".join(lines) + "\n")
    build(
        [str(tmp_path / "a.csv")],
        tmp_path / "out",
        Reading(),
        split=Splitting(val=0.3, test=0.1),
        parallelism=Parallelism(1),
    )
    places = {}
    for split in SPLITS:
        shards = Shards(tmp_path / "out", split)
        places |= {shards.read(number).meta["image"]: split for number in range(len(shards))}
    arguments = ["--data", tmp_path / "out", "--csv", tmp_path / "new" / "leaks.csv", "--threshold", 0.99999]
    if ranks:
        printed = call("eval", "leaks", tiny_model, *arguments, "--workers", 0, ranks=ranks).stdout
    else:
        options = {"threshold": 0.99999, "inference": Inference(workers=0)}
        leaks(tiny_model, tmp_path / "out", tmp_path / "new" / "leaks.csv", **options)
        printed = capsys.readouterr().out
    assert "images of val" in printed
    with open(tmp_path / "new" / "leaks.csv") as file:
        rows = list(csv.DictReader(file))
    found = {(row["image"], row["train_image"]) for row in rows}
    expected = set()
    for number in range(30):
        for a, b in ((0, 1), (1, 0)):
            if places[f"{number}-{a}.png"] != "train" and places[f"{number}-{b}.png"] == "train":
                expected.add((f"{number}-{a}.png", f"{number}-{b}.png"))
    assert len(expected) > 3
    assert expected <= found
    assert [row["cosine"] for row in rows] == sorted((row["cosine"] for row in rows), reverse=True)
