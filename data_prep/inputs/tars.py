"""WebDataset tars of any origin, read sample by sample; nothing is extracted to disk."""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

import fsspec

from data_prep.errors import UserError
from data_prep.inputs.names import Problem, key_of
from data_prep.inputs.rows import Input, Row, check_text
from data_prep.inputs.storage import IMAGE_EXTENSIONS
from data_prep.inputs.texts import rows_of_txt

# Keys of KEY.json that our own tars store elsewhere, or that say nothing about the image.
KNOWN = {"caption", "captions", "key", "image", "sha256", "width", "height", "group", "columns"}


def read_tar(tar: Input) -> Iterator[Row]:
    """The rows of a tar, one per caption; `line` is the number of the sample.

    Raises:
        UserError: it cannot be read.
    """
    try:
        with fsspec.open(tar.source, "rb", compression="infer") as file:
            for number, sample in enumerate(tar_samples(file), 1):
                yield from _rows_of_sample(tar, number, sample)
    except (OSError, tarfile.TarError, EOFError) as error:
        raise UserError(f"{tar.source}: cannot be read ({str(error).strip()})") from None


def _rows_of_sample(tar: Input, number: int, sample: "TarSample") -> Iterator[Row]:
    name = f"{tar.label}/{sample.key}"
    if sample.problem:
        yield Row(number, name, problem=sample.problem)
        return
    image, group = sample.name_and_group()
    if image and key_of(image) == sample.key:
        # A tar of ours: its images keep their names, and so their keys and groups.
        name, group = image, "" if group == f"image:{image}" else group
    else:
        group = ""
    row = Row(
        number,
        name,
        group=group,
        label=sample.label(tar.columns.label) if tar.columns.label else "",
        columns=sample.columns(),
        data=sample.image.data,
        offset=sample.image.offset,
    )
    if tar.columns.caption and (txt := sample.txt(tar.columns.caption)) is not None:
        yield from rows_of_txt(tar, row, f"{name}.txt", txt)
        return
    for caption in (sample.captions(tar.columns.caption) if tar.columns.caption else None) or [""]:
        yield check_text(row._replace(caption=caption))


class TarMember(NamedTuple):
    data: bytes
    offset: int  # of the data in the tar


@dataclass
class TarSample:
    """Adjacent members that share a name up to the last dot.

    Attributes:
        key: that name.
        members: by extension.
        problem: why it is not one image with texts.
    """

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    problem: Problem | None = None
    image: TarMember | None = None

    def txt(self, column: str) -> bytes | None:
        """The .txt, if its lines are the captions. img2dataset writes one caption both there and as the key
        `column` of the .json, which tells that its line breaks separate no captions.
        """
        if "txt" not in self.members or isinstance(self._json.get("captions"), list):
            return None
        is_one = self._text("txt").split() == _if_text(self._json.get(column)).split() != []
        return None if is_one else self.members["txt"].data

    def captions(self, column: str) -> list[str]:
        """The captions of data_prep's own .json; else the key `column` of the .json."""
        if isinstance(self._json.get("captions"), list):
            return [_if_text(caption) for caption in self._json["captions"]]
        return [_if_text(self._json.get(column))]

    def label(self, column: str) -> str:
        """The column that data_prep kept in the .json; else the key of that name; else the .cls."""
        for values in (self._json.get("columns"), self._json):
            if isinstance(values, dict) and isinstance(values.get(column), (str, int, float)):
                return str(values[column])
        return self._text("cls").strip() if "cls" in self.members else ""

    def name_and_group(self) -> tuple[str, str]:
        """The image's name and group according to data_prep's own .json."""
        return _if_text(self._json.get("image")), _if_text(self._json.get("group"))

    def columns(self) -> str:
        """All other keys of the .json, as JSON."""
        if isinstance(self._json.get("columns"), dict):
            values = self._json["columns"]
        else:
            values = {
                key: value
                for key, value in self._json.items()
                if key not in KNOWN and isinstance(value, (str, int, float))
            }
        return json.dumps(values, ensure_ascii=False, sort_keys=True) if values else ""

    @cached_property
    def _json(self) -> dict:
        try:
            values = json.loads(self.members["json"].data) if "json" in self.members else {}
        except ValueError:
            return {}
        return values if isinstance(values, dict) else {}

    def _text(self, extension: str) -> str:
        return self.members[extension].data.decode("utf-8", "surrogateescape")


def _if_text(value) -> str:
    return value if isinstance(value, str) else ""


def tar_samples(file) -> Iterator[TarSample]:
    """The samples of an open tar, in order; one that cannot be used has a problem."""
    seen: set[str] = set()
    sample = None
    with tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            if member.isdir():
                continue
            key, extension = os.path.splitext(member.name)
            if sample and sample.key != key:
                yield _complete(sample, seen)
                sample = None
            sample = sample or TarSample(key)
            extension = extension[1:].lower()
            if key.startswith("/") or ".." in key.replace("\\", "/").split("/"):
                sample.problem = Problem("path outside of the tar", member.name)
            elif not member.isfile():
                sample.problem = Problem("not a regular file", f"{member.name} is a link or a device")
            elif extension in sample.members:
                sample.problem = Problem("repeated member", member.name)
            else:
                data = archive.extractfile(member).read()
                sample.members[extension] = TarMember(data, member.offset_data)
    if sample:
        yield _complete(sample, seen)


def _complete(sample: TarSample, seen: set[str]) -> TarSample:
    """Set the sample's image, or its problem.

    Args:
        seen: keys of the samples before; this one is added.
    """
    images = [extension for extension in sample.members if f".{extension}" in IMAGE_EXTENSIONS]
    if sample.key in seen:
        sample.problem = Problem("members not adjacent", "other members are between those of this key")
    elif not sample.problem and len(images) != 1:
        reason = "several images in a sample" if images else "no image in the sample"
        sample.problem = Problem(reason, "it has " + ", ".join(sample.members))
    elif images:
        sample.image = sample.members[images[0]]
    seen.add(sample.key)
    return sample
