"""A folder of images: each line of the .txt file beside an image is a caption."""

import os
from collections.abc import Iterator

from data_prep.inputs.locations import ImageLocation, read_local
from data_prep.inputs.names import Problem
from data_prep.inputs.rows import Input, Row
from data_prep.inputs.storage import IMAGE_EXTENSIONS, walk
from data_prep.inputs.texts import rows_of_txt


def read_folder(folder: Input) -> Iterator[Row]:
    """The rows of every image below the folder, in sorted order; `line` is the number of the image."""
    number, captions = 0, 0
    for path in walk(folder.source):
        stem, extension = os.path.splitext(path)
        if extension.lower() not in IMAGE_EXTENSIONS:
            continue
        number += 1
        image = os.path.relpath(path, folder.source)
        row, name = Row(number, image), os.path.relpath(f"{stem}.txt", folder.source)
        text = read_local(ImageLocation(folder.source, name))
        if isinstance(text, bytes):
            for captioned in rows_of_txt(folder, row, f"{stem}.txt", text):
                captions += 1
                yield captioned
        elif os.path.lexists(f"{stem}.txt"):
            yield row._replace(problem=Problem("unreadable caption file", f"{name}: {text}"))
        else:
            yield row._replace(problem=Problem("no caption file", f"{name} does not exist"))
    if captions > number:
        print(f"{folder.source}: each line of a .txt is a caption: {captions} captions of {number} images")
