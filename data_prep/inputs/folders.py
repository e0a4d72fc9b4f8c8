"""A folder of images: each line of the .txt file beside an image is a caption."""

import os
from collections.abc import Iterator
from pathlib import Path

from data_prep.inputs.names import Problem
from data_prep.inputs.rows import Input, Row, check_text
from data_prep.inputs.storage import IMAGE_EXTENSIONS, walk


def read_folder(folder: Input) -> Iterator[Row]:
    """The rows of every image below the folder, in sorted order; `line` is the number of the image."""
    number = 0
    for path in walk(folder.source):
        stem, extension = os.path.splitext(path)
        if extension.lower() not in IMAGE_EXTENSIONS:
            continue
        number += 1
        image = os.path.relpath(path, folder.source)
        try:
            captions = Path(stem + ".txt").read_bytes().decode("utf-8-sig", "surrogateescape").splitlines()
        except FileNotFoundError:
            detail = f"{os.path.basename(stem)}.txt does not exist"
            yield Row(number, image, problem=Problem("no caption file", detail))
            continue
        for caption in [line for line in captions if line.strip()] or [""]:
            yield check_text(Row(number, image, caption))
