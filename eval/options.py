"""Options that several commands of eval share; light, so that --help imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from data_prep.errors import UserError

# A split of shards; one that they lack is reported by data_prep.shards with the splits that they have.
Split = Annotated[str, tyro.conf.arg(metavar="SPLIT")]


@dataclass(frozen=True)
class Inference:
    """How models are run. No figure depends on batch_size or workers.

    Attributes:
        batch_size: Images embedded at once.
        workers: Processes that read images; 0 reads them in the main process.
        precision: Of the models. Features are always compared in fp32.
    """

    batch_size: int = 64
    workers: int = 2
    precision: Literal["bf16", "fp32"] = "fp32"

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: must be at least 1")
        if self.workers < 0:
            raise UserError(f"--workers {self.workers}: must be at least 0")


@dataclass(frozen=True)
class LabelledTable:
    """How labelled images are read, where they are a table: as `data_prep build` reads it.

    Attributes:
        image_column: Column of a table with the image paths, or with the images themselves.
        label_column: Column of a table or of shards with the label.
        images: Folder or URL that the image paths of a table are relative to; by default the table's folder.
        encoding: Encoding of CSV and JSONL, as Python names it: utf-8, latin-1, utf-16.
        delimiter: Delimiter of a CSV; by default the one that its header shows.
    """

    image_column: str = "image"
    label_column: str = "label"
    images: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    encoding: str = "utf-8-sig"
    delimiter: str = ""


INFERENCE, TABLE = Inference(), LabelledTable()
