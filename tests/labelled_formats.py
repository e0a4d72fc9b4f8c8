"""The same labelled images in every format that eval.classify.labelled reads, as published."""

import json
from pathlib import Path

import numpy as np
import pyarrow as pa
from conftest import png
from PIL import Image
from pyarrow import parquet
from scipy.io import savemat

CLASSES = ["Acura Integra", "BMW M3", "Fiat 500"]
COUNTS = (7, 4, 9)


def labelled_images(seed: int = 0) -> list[tuple[int, bytes]]:
    """(label, PNG) of noise around a color of the class, one of them see-through."""
    rng = np.random.default_rng(seed)
    found = []
    for label, count in enumerate(COUNTS):
        for number in range(count):
            pixels = rng.integers(0, 160, (14, 20, 3))
            pixels[..., label] += 90
            image = Image.fromarray(pixels.astype(np.uint8))
            if number == 1:
                image.putalpha(Image.fromarray(rng.integers(0, 256, (14, 20), dtype=np.uint8)))
            found.append((label, png(image)))
    return found


def as_folder(
    folder: Path, found: list[tuple[int, bytes]], classes: list[str] = CLASSES, split: str = ""
) -> Path:
    for number, (label, data) in enumerate(found):
        place = folder / split / classes[label]
        place.mkdir(parents=True, exist_ok=True)
        (place / f"{number:05d}.png").write_bytes(data)
    return folder


def as_csv(folder: Path, found: list[tuple[int, bytes]]) -> Path:
    (folder / "images").mkdir(parents=True)
    for number, (_, data) in enumerate(found):
        (folder / "images" / f"{number}.png").write_bytes(data)
    lines = [f"images/{number}.png,{CLASSES[label]}" for number, (label, _) in enumerate(found)]
    (folder / "labels.csv").write_text("\n".join(["image,label", *lines]) + "\n")
    return folder / "labels.csv"


def as_parquet(path: Path, found: list[tuple[int, bytes]], **options) -> Path:
    """With the schema metadata of the hub's library: {"info": {"features": {column: {"_type": "ClassLabel",
    ...}}}}.
    """
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", kind), ("label", pa.int64())],
        {b"huggingface": json.dumps({"info": {"features": features}}).encode()},
    )
    images = [{"bytes": data, "path": f"{number}.png"} for number, (_, data) in enumerate(found)]
    table = pa.table(
        {"image": pa.array(images, kind), "label": pa.array([label for label, _ in found], pa.int64())},
        schema,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, **options)
    return path


def as_cars(folder: Path, found: list[tuple[int, bytes]]) -> Path:
    """cars_train/00001.png ..., and devkit/ with the structs of the original (labels there are 1-based)."""
    (folder / "cars_train").mkdir(parents=True)
    (folder / "devkit").mkdir()
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    rows = np.zeros((1, len(found)), dtype=[(name, object) for name in fields])
    for number, (label, data) in enumerate(found):
        name = f"{number + 1:05d}.png"
        (folder / "cars_train" / name).write_bytes(data)
        rows[0, number] = (*(np.array([[value]], np.uint16) for value in (1, 1, 20, 14, label + 1)), name)
    savemat(folder / "devkit" / "cars_train_annos.mat", {"annotations": rows})
    names = np.empty((1, len(CLASSES)), object)
    names[0] = CLASSES
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    return folder
