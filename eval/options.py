"""Options that several commands of eval share; light, so that --help imports no torch."""

from dataclasses import dataclass
from typing import Annotated, Literal

import tyro

from data_prep.cores import cores_per_rank
from data_prep.errors import UserError

MOST_READERS = 16  # read 3,500 images a second, more than one GPU embeds with ViT-L/14

# A split of shards; one that they lack is reported by data_prep.shards with the splits that they have.
Split = Annotated[str, tyro.conf.arg(metavar="SPLIT")]


@dataclass(frozen=True)
class Inference:
    """How models are run. No figure depends on batch_size or workers.

    Attributes:
        batch_size: Images embedded at once.
        workers: Processes that read images; 0 reads them in the main process. auto: one per core, 16 at most.
        precision: Of the models. auto: bf16 on a GPU, fp32 on a CPU. Features are always compared in fp32.
        cache_dir: Folder of this machine for shards of a URL. Default: ~/.cache/cliptune/shards.
        cache_gb: Most that the shards in it may take, in 10^9 bytes; 0: half of what is free on its disk.
    """

    batch_size: int = 64
    workers: int | Literal["auto"] = "auto"
    precision: Literal["auto", "bf16", "fp32"] = "auto"
    cache_dir: Annotated[str, tyro.conf.arg(metavar="FOLDER")] = ""
    cache_gb: float = 0.0

    def __post_init__(self):
        if self.batch_size < 1:
            raise UserError(f"--batch-size {self.batch_size}: must be at least 1")
        if self.workers != "auto" and self.workers < 0:
            raise UserError(f"--workers {self.workers}: must be auto or at least 0")
        if self.cache_gb < 0:
            raise UserError(f"--cache-gb {self.cache_gb:g}: must be at least 0")
        if self.cache_dir or self.cache_gb:
            from data_prep.store.cache import choose  # imports numpy, which is slow

            choose(self.cache_dir, self.cache_gb)  # for all that this process opens

    @property
    def readers(self) -> int:
        """The number of workers."""
        return min(MOST_READERS, cores_per_rank()) if self.workers == "auto" else self.workers


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
