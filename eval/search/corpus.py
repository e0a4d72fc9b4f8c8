"""Pictures by number, with what is known of each: of a folder of shards, or of any folder of pictures.

Both kinds have `place`, for people, and a `sha256` of what they are; read() gives a picture in RGB and
{"key", "split", "group", "captions", "columns"}, or raises BadImage."""

import hashlib
import io
import json
import os
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch.utils.data import Dataset

from data_prep.build.scan import Source, read_local
from data_prep.errors import UserError
from data_prep.images import BadImage
from data_prep.inputs.sources import IMAGE_EXTENSIONS, walk
from data_prep.shards import Shards, read_manifest
from eval.classify.features import checked
from train.data.decode import decode
from train.model.clip import Clip

THUMBNAIL_PX = 192


class ShardsCorpus:
    """All splits of a folder of shards, or one; they were checked when they were built."""

    def __init__(self, folder: Path, split: str):
        having = [name for name, entry in read_manifest(folder)["splits"].items() if entry["samples"]]
        self.parts = [Shards(folder, name) for name in ([split] if split else having)]
        if not self.parts:
            raise UserError(f"{folder}: no samples in any split; build the shards again")
        self.ends = np.cumsum([len(part) for part in self.parts])
        self.place = f"{folder}, {split}" if split else str(folder)
        self.sha256 = hashlib.sha256(f"{self.parts[0].fingerprint} {split}".encode()).hexdigest()

    def __len__(self) -> int:
        return int(self.ends[-1])

    def _at(self, number: int) -> tuple[Shards, int]:
        part = int(np.searchsorted(self.ends, number, side="right"))
        return self.parts[part], number - int(self.ends[part]) + len(self.parts[part])

    def read(self, number: int) -> tuple[Image.Image, dict]:
        shards, at = self._at(number)
        sample = shards.read(at)
        known = {
            "key": sample.key,
            "split": shards.split,
            "group": int(shards.groups[at]),
            "captions": sample.captions,
        }
        return decode(sample.image), {**known, "columns": sample.meta.get("columns", {})}

    def key(self, number: int) -> str:
        shards, at = self._at(number)
        return shards.key(at)


class FolderCorpus:
    """All pictures below a folder, in order of their paths; the lines of a .txt beside one are its captions."""

    def __init__(self, folder: Path):
        self.folder, self.place = str(folder), str(folder)
        self.names = [
            os.path.relpath(path, folder)
            for path in walk(str(folder))
            if path.lower().endswith(tuple(IMAGE_EXTENSIONS))
        ]
        if not self.names:
            raise UserError(
                f"{folder}: no pictures in it ({', '.join(sorted(IMAGE_EXTENSIONS))}); shards or a folder of"
                " pictures are wanted"
            )
        seen = [os.stat(folder / name) for name in self.names if (folder / name).exists()]
        known = json.dumps([self.names, [(each.st_size, each.st_mtime_ns) for each in seen]])
        self.sha256 = hashlib.sha256(known.encode()).hexdigest()  # of paths, sizes and times, not of contents

    def __len__(self) -> int:
        return len(self.names)

    def read(self, number: int) -> tuple[Image.Image, dict]:
        name = self.names[number]
        picture = decode(checked(read_local(Source(self.folder, name))))
        beside = read_local(Source(self.folder, f"{os.path.splitext(name)[0]}.txt"))
        lines = [] if isinstance(beside, BadImage) else beside.decode("utf-8-sig", "replace").splitlines()
        captions = [line.strip() for line in lines if line.strip()]
        return picture, {"key": name, "split": "", "group": number, "captions": captions, "columns": {}}

    def key(self, number: int) -> str:
        return self.names[number]


Corpus = ShardsCorpus | FolderCorpus


class Pictures(Dataset):
    """(uint8 [3, H, W] or None, thumbnail or why there is no picture, metadata) by number."""

    def __init__(self, corpus: Corpus, clip: Clip):
        self.corpus, self.transform = corpus, clip.eval_transform

    def __getitem__(self, number: int) -> tuple[torch.Tensor | None, bytes | str, dict]:
        try:
            picture, known = self.corpus.read(number)
        except BadImage as bad:
            return None, str(bad), {"key": self.corpus.key(number)}
        return self.transform(picture), thumbnail(picture), known


def thumbnail(picture: Image.Image) -> bytes:
    """A WebP of a picture in RGB, no larger than THUMBNAIL_PX."""
    picture, buffer = picture.copy(), io.BytesIO()
    picture.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
    picture.save(buffer, "WEBP", quality=80, method=2)
    return buffer.getvalue()


def together(samples: list[tuple]) -> tuple[torch.Tensor | None, list[tuple]]:
    """Collates Pictures: uint8 [b, 3, H, W] of those that can be read, and for all (thumbnail or reason,
    metadata).
    """
    pixels = [each for each, *_ in samples if each is not None]
    return torch.stack(pixels) if pixels else None, [(one, known) for _, one, known in samples]


def corpus_at(data: Path, split: str) -> Corpus:
    """The pictures of a folder.

    Raises:
        UserError: no such folder or split, or no pictures in it.
    """
    if not data.is_dir():
        raise UserError(f"--data {data}: no such folder; a folder of shards or of pictures is wanted")
    if (data / "manifest.json").is_file():
        return ShardsCorpus(data, split)
    if split:
        raise UserError(
            f"--split {split}: {data} has no splits, as it is no folder of shards; leave that out"
        )
    return FolderCorpus(data)
