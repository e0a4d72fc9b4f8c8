"""The same images with labels in every format that eval.classify.labelled reads, as published."""

import io
import json
import tarfile
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
    """(label, PNG) of noise around a color of the class; one of each class has transparency."""
    rng = np.random.default_rng(seed)
    images = []
    for label, count in enumerate(COUNTS):
        for number in range(count):
            pixels = rng.integers(0, 160, (14, 20, 3))
            pixels[..., label] += 90
            image = Image.fromarray(pixels.astype(np.uint8))
            if number == 1:
                image.putalpha(Image.fromarray(rng.integers(0, 256, (14, 20), dtype=np.uint8)))
            images.append((label, png(image)))
    return images


def as_folder(
    folder: Path, images: list[tuple[int, bytes]], classes: list[str] = CLASSES, split: str = ""
) -> Path:
    for number, (label, data) in enumerate(images):
        class_folder = folder / split / classes[label]
        class_folder.mkdir(parents=True, exist_ok=True)
        (class_folder / f"{number:05d}.png").write_bytes(data)
    return folder


def as_csv(folder: Path, images: list[tuple[int, bytes]]) -> Path:
    (folder / "images").mkdir(parents=True)
    for number, (_, data) in enumerate(images):
        (folder / "images" / f"{number}.png").write_bytes(data)
    lines = [f"images/{number}.png,{CLASSES[label]}" for number, (label, _) in enumerate(images)]
    (folder / "labels.csv").write_text("\n".join(["image,label", *lines]) + "\n")
    return folder / "labels.csv"


def as_parquet(path: Path, images: list[tuple[int, bytes]], **options) -> Path:
    """With a ClassLabel in the schema, as the library `datasets` writes it."""
    features = {"image": {"_type": "Image"}, "label": {"names": CLASSES, "_type": "ClassLabel"}}
    image_type = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
    schema = pa.schema(
        [("image", image_type), ("label", pa.int64())],
        {b"huggingface": json.dumps({"info": {"features": features}}).encode()},
    )
    cells = [{"bytes": data, "path": f"{number}.png"} for number, (_, data) in enumerate(images)]
    table = pa.table(
        {"image": pa.array(cells, image_type), "label": pa.array([label for label, _ in images], pa.int64())},
        schema,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    parquet.write_table(table, path, **options)
    return path


def as_cars(folder: Path, images: list[tuple[int, bytes]]) -> Path:
    """cars_train/00001.png ..., and devkit/ with the structs of the original, with classes from 1."""
    (folder / "cars_train").mkdir(parents=True)
    (folder / "devkit").mkdir()
    fields = ["bbox_x1", "bbox_y1", "bbox_x2", "bbox_y2", "class", "fname"]
    rows = np.zeros((1, len(images)), dtype=[(name, object) for name in fields])
    for number, (label, data) in enumerate(images):
        name = f"{number + 1:05d}.png"
        (folder / "cars_train" / name).write_bytes(data)
        rows[0, number] = (*(np.array([[value]], np.uint16) for value in (1, 1, 20, 14, label + 1)), name)
    savemat(folder / "devkit" / "cars_train_annos.mat", {"annotations": rows})
    names = np.empty((1, len(CLASSES)), object)
    names[0] = CLASSES
    savemat(folder / "devkit" / "cars_meta.mat", {"class_names": names})
    return folder


def as_table(folder: Path, images: list[tuple[int, bytes]], extension: str) -> Path:
    """A format of data_prep.inputs.formats, with columns image, caption and label, or with the images."""
    table = folder / f"table{extension}"
    as_csv(folder, images)
    rows = [
        {"image": f"images/{number}.png", "caption": f"caption {number}", "label": CLASSES[label]}
        for number, (label, _) in enumerate(images)
    ]
    if extension in (".jsonl", ".ndjson", ".json"):
        table.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif extension == ".parquet":
        parquet.write_table(pa.Table.from_pylist(rows), table)
    elif extension == ".tar":
        with tarfile.open(table, "w") as archive:
            for number, row in enumerate(rows):
                _add(archive, f"{number:05d}.png", images[number][1])
                _add(archive, f"{number:05d}.json", json.dumps(row).encode())
    else:
        delimiter = "\t" if extension == ".tsv" else ","
        lines = [delimiter.join(rows[0]), *(delimiter.join(row.values()) for row in rows)]
        table.write_text("\n".join(lines) + "\n")
    return table


def _add(archive: tarfile.TarFile, name: str, data: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(data)
    archive.addfile(member, io.BytesIO(data))
