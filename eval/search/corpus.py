"""The images of a corpus by number, with their metadata: of a folder of shards, or of any folder of images.

Both kinds have `place`, a description for people, and a `sha256` that identifies them. read() returns an
image in RGB and {"key", "path", "split", "group", "captions", "columns"}, or raises BadImage; "path" is the
image's path in its source, relative to the folder or URL of images.
"""

import hashlib
import io
import json
import os
from pathlib import Path

import torch
from PIL import Image
from torch.utils.data import Dataset

from data_prep.errors import UserError
from data_prep.images import BadImage
from data_prep.inputs.folders import images_below
from data_prep.inputs.locations import ImageLocation, read_local
from data_prep.inputs.texts import txt_captions
from data_prep.shards import Joined, Shards, read_manifest
from data_prep.store.remote import is_url
from eval.classify.features import in_rgb
from train.data.decode import decode
from train.model.clip import Clip

THUMBNAIL_PX = 192
WHITE = (255, 255, 255)


class ShardsCorpus(Joined):
    """All splits of a folder of shards, or one; their images were checked by the build."""

    def __init__(self, folder: Path | str, split: str):
        splits = [name for name, entry in read_manifest(folder)["splits"].items() if entry["samples"]]
        super().__init__([Shards(folder, name) for name in ([split] if split else splits)])
        if not self.parts:
            raise UserError(f"{folder}: no samples in any split; build the shards again")
        self.place = f"{folder}, {split}" if split else str(folder)
        self.sha256 = hashlib.sha256(f"{self.parts[0].fingerprint} {split}".encode()).hexdigest()

    def read(self, number: int, background: tuple[int, int, int] = WHITE) -> tuple[Image.Image, dict]:
        """An image that the build has composited on the shards' own background."""
        shards, position = self.locate(number)
        sample = shards.read(position)
        metadata = {
            "key": sample.key,
            "path": sample.path,
            "split": shards.split,
            "group": int(shards.groups[position]),
            "captions": sample.captions,
            "columns": sample.meta.get("columns", {}),
        }
        return decode(sample.image), metadata

    def key(self, number: int) -> str:
        shards, position = self.locate(number)
        return shards.key(position)

    def path(self, number: int) -> str:
        shards, position = self.locate(number)
        return shards.meta(position).get("image", "")


class FolderCorpus:
    """All images below a folder, sorted by path; the lines of a .txt beside an image are its captions."""

    def __init__(self, folder: Path):
        self.folder, self.place = str(folder), str(folder)
        self.names = list(images_below(str(folder)))
        if not self.names:
            raise UserError(f"{folder}: no images in it; pass a folder of shards or of images")
        stats = [os.stat(folder / name) for name in self.names if (folder / name).exists()]
        # Paths, sizes and times identify the corpus: hashing the contents would read everything twice.
        identity = json.dumps([self.names, [(stat.st_size, stat.st_mtime_ns) for stat in stats]])
        self.sha256 = hashlib.sha256(identity.encode()).hexdigest()

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int, background: tuple[int, int, int] = WHITE) -> tuple[Image.Image, dict]:
        name = self.names[number]
        image = in_rgb(read_local(ImageLocation(self.folder, name)), background)
        text = read_local(ImageLocation(self.folder, f"{os.path.splitext(name)[0]}.txt"))
        lines = [] if isinstance(text, BadImage) else txt_captions(text)
        captions = [line.strip().encode("utf-8", "replace").decode() for line in lines]
        metadata = {"key": name, "path": name, "split": "", "group": number}
        return image, {**metadata, "captions": captions, "columns": {}}

    def key(self, number: int) -> str:
        return self.names[number]

    path = key


Corpus = ShardsCorpus | FolderCorpus


class CorpusImages(Dataset):
    """(uint8 [3, H, W], thumbnail, metadata) by number; (None, reason, {"key", "path"}) if unreadable."""

    def __init__(self, corpus: Corpus, clip: Clip):
        self.shards = corpus if isinstance(corpus, Joined) else None
        self.corpus, self.transform, self.background = corpus, clip.eval_transform, clip.background

    def __getitem__(self, number: int) -> tuple[torch.Tensor | None, bytes | str, dict]:
        try:
            image, metadata = self.corpus.read(number, self.background)
        except BadImage as bad:
            return None, str(bad), {"key": self.corpus.key(number), "path": self.corpus.path(number)}
        return self.transform(image), thumbnail(image), metadata


def thumbnail(image: Image.Image) -> bytes:
    """A WebP of an image in RGB, its longer side at most THUMBNAIL_PX."""
    small, buffer = image.copy(), io.BytesIO()
    # Of a photo of 640 x 480 pixels in 2.3 ms, where Pillow's default filter takes 3.9
    small.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX), Image.Resampling.HAMMING, reducing_gap=1.5)
    small.save(buffer, "WEBP", quality=80, method=2)
    return buffer.getvalue()


def collate(samples: list[tuple]) -> tuple[torch.Tensor | None, list[tuple]]:
    """uint8 [b, 3, H, W] of the readable images; (thumbnail or reason, metadata) of all images."""
    pixels = [image for image, *_ in samples if image is not None]
    return torch.stack(pixels) if pixels else None, [(small, metadata) for _, small, metadata in samples]


def open_corpus(data: Path | str, split: str) -> Corpus:
    """The images of a folder; behind a URL, of shards.

    Raises:
        UserError: No such folder or split, or no images in it.
    """
    if is_url(data):
        return ShardsCorpus(data, split)
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder; pass a folder of shards or of images")
    if (data / "manifest.json").is_file():
        return ShardsCorpus(data, split)
    if split:
        raise UserError(f"--split {split}: {data} is not a folder of shards and has no splits; omit --split")
    return FolderCorpus(data)
