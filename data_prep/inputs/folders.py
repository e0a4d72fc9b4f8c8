"""A folder of images: each line of the .txt file beside an image is a caption."""

import os
import stat
from collections.abc import Iterator

from data_prep.inputs.locations import ImageLocation, read_local
from data_prep.inputs.names import Problem
from data_prep.inputs.rows import Ignore, Input, Row, ignore_nothing
from data_prep.inputs.storage import IMAGE_EXTENSIONS, SIDE_EXTENSIONS, walk
from data_prep.inputs.texts import rows_of_txt
from data_prep.signatures import HEAD_BYTES, kind_of
from data_prep.terminal import say


def read_folder(folder: Input) -> Iterator[Row]:
    """The rows of every image below the folder, in sorted order; `line` is the number of the image."""
    extension, captions, number = folder.caption_ext or "txt", 0, 0
    for number, image in enumerate(images_below(folder.source, extension, folder.ignore), 1):
        row, name = Row(number, image), f"{os.path.splitext(image)[0]}.{extension}"
        text = read_local(ImageLocation(folder.source, name))
        if isinstance(text, bytes):
            for captioned in rows_of_txt(folder, row, os.path.join(folder.source, name), text):
                captions += 1
                yield captioned
        elif os.path.lexists(os.path.join(folder.source, name)):
            yield row._replace(problem=Problem("unreadable caption file", f"{name}: {text}"))
        else:
            hint = "" if folder.caption_ext else "; see --caption-ext"
            yield row._replace(problem=Problem("no caption file", f"{name} does not exist{hint}"))
    if captions > number:
        say(
            f"{folder.source}: each line of a .{extension} is a caption:"
            f" {captions} captions of {number} images"
        )


def images_below(folder: str, caption_ext: str = "txt", ignore: Ignore = ignore_nothing) -> Iterator[str]:
    """The images below a folder, in sorted order, as paths relative to it.

    An image is what begins like one, whatever its name; what is named like one; and any other file that has a
    caption, so that it is rejected and not lost.

    Args:
        ignore: is called with the reason and path of every other file.
    """
    parent, names = None, []
    for path in walk(folder, ignore):
        if os.path.dirname(path) != parent:
            yield from _images_in(folder, names, caption_ext, ignore)
            parent, names = os.path.dirname(path), []
        names.append(os.path.relpath(path, folder))
    yield from _images_in(folder, names, caption_ext, ignore)


def _images_in(folder: str, names: list[str], caption_ext: str, ignore: Ignore) -> Iterator[str]:
    """See images_below.

    Args:
        names: of all files in one folder, in sorted order.
    """
    ending = f".{caption_ext}"
    captioned = {name.removesuffix(ending) for name in names if name.endswith(ending)}
    images = {name for name in names if _is_image(os.path.join(folder, name), caption_ext)}
    without_image = captioned - {os.path.splitext(name)[0] for name in images}
    images |= {
        name for name in names if _may_be_image(name, ending) and os.path.splitext(name)[0] in without_image
    }
    stems = {os.path.splitext(name)[0] for name in images}
    for name in names:
        if name in images:
            yield name
        elif not name.endswith(ending):
            ignore("not an image", name)
        elif name.removesuffix(ending) not in stems:
            ignore("caption without an image", name)


def _may_be_image(name: str, caption_ending: str) -> bool:
    return os.path.splitext(name)[1].lower() not in SIDE_EXTENSIONS and not name.endswith(caption_ending)


def _is_image(path: str, caption_ext: str) -> bool:
    extension = os.path.splitext(path)[1].lower()
    if extension in IMAGE_EXTENSIONS or extension == f".{caption_ext}":
        return extension != f".{caption_ext}"
    try:
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0))  # a named pipe must not block
    except OSError:
        return False
    try:
        is_file = stat.S_ISREG(os.fstat(descriptor).st_mode)
        kind = kind_of(os.read(descriptor, HEAD_BYTES)) if is_file else None
    finally:
        os.close(descriptor)
    return kind is not None and kind.is_image
