"""Other people's WebDataset tars, read sample by sample; nothing is ever extracted."""

import json
import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

# What tars of ours say in other places, or what says nothing about the image.
KNOWN = {"caption", "captions", "key", "image", "sha256", "width", "height", "group", "columns"}


@dataclass
class TarSample:
    """Neighboring members that share a name up to their last dot.

    Attributes:
        key: that name.
        members: extension -> bytes, and offset in the tar.
        problem: reason and detail, where it is not one image with texts.
    """

    key: str
    members: dict[str, tuple[bytes, int]]
    problem: tuple[str, str] | None = None
    image: bytes = b""
    image_at: int = 0

    def captions(self, column: str) -> list[str]:
        """Of the .json that data_prep writes, else the .txt, else the caption `column` of the .json, as
        img2dataset writes.
        """
        if isinstance(self._json.get("captions"), list):
            return [_word(caption) for caption in self._json["captions"]]
        if "txt" in self.members:
            return [self.members["txt"][0].decode("utf-8", "surrogateescape")]
        return [_word(self._json.get(column))]

    def name_and_group(self) -> tuple[str, str]:
        """What the .json that data_prep writes calls the image, and its group."""
        return _word(self._json.get("image")), _word(self._json.get("group"))

    def columns(self) -> str:
        """What else the .json says, as JSON."""
        if isinstance(self._json.get("columns"), dict):
            found = self._json["columns"]
        else:
            found = {
                key: value
                for key, value in self._json.items()
                if key not in KNOWN and isinstance(value, (str, int, float))
            }
        return json.dumps(found, ensure_ascii=False, sort_keys=True) if found else ""

    @cached_property
    def _json(self) -> dict:
        try:
            found = json.loads(self.members.get("json", (b"{}", 0))[0])
        except ValueError:
            return {}
        return found if isinstance(found, dict) else {}


def _word(value) -> str:
    return value if isinstance(value, str) else ""


def tar_samples(file, image_extensions: set[str]) -> Iterator[TarSample]:
    """Samples of a tar that is open for reading, in order; what cannot be one has its problem named."""
    seen, sample = set(), None
    with tarfile.open(fileobj=file, mode="r|") as archive:
        for member in archive:
            if member.isdir():
                continue
            key, extension = os.path.splitext(member.name)
            if sample and sample.key != key:
                yield _whole(sample, seen, image_extensions)
                sample = None
            sample = sample or TarSample(key, {})
            extension = extension[1:].lower()
            if key.startswith("/") or ".." in key.replace("\\", "/").split("/"):
                sample.problem = ("path outside of the tar", member.name)
            elif not member.isfile():
                sample.problem = ("not a regular file", f"{member.name} is a link or a device")
            elif extension in sample.members:
                sample.problem = ("repeated member", member.name)
            else:
                sample.members[extension] = (archive.extractfile(member).read(), member.offset_data)
    if sample:
        yield _whole(sample, seen, image_extensions)


def _whole(sample: TarSample, seen: set[str], image_extensions: set[str]) -> TarSample:
    images = [extension for extension in sample.members if f".{extension}" in image_extensions]
    if sample.key in seen:
        sample.problem = ("members not adjacent", "its name stood before, with other members between")
    elif not sample.problem and len(images) != 1:
        reason = "several images in a sample" if images else "no image in the sample"
        sample.problem = (reason, "it has " + ", ".join(sample.members))
    elif images:
        sample.image, sample.image_at = sample.members[images[0]]
    seen.add(sample.key)
    return sample
