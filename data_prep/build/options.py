"""The options of `build` and `index`, in groups."""

import os
from dataclasses import dataclass, replace

from data_prep.cores import cores
from data_prep.errors import UserError
from data_prep.images import Rules, parse_color
from data_prep.inputs.rows import Columns


@dataclass(frozen=True)
class Reading:
    """How the inputs are read; together with the inputs, this determines the rows."""

    image_column: str = "image"
    """Column of image paths, of URLs, or (in Parquet) of the images themselves."""
    caption_column: str = "caption"
    """Column of captions; in Parquet and JSONL it may contain lists. Fields of structs: `column.field`.
    Several by commas: name,synonyms."""
    group_column: str = ""
    """Column that joins images of the same thing; all images of a group are in one split."""
    split_column: str = ""
    """Column that assigns rows to train, val or test."""
    weight_column: str = ""
    """Column of weights in the training loss, 0 or more; a row whose cell is empty has 1."""
    images: str = ""
    """Folder or URL that image paths are relative to and may not leave; by default the input's folder."""
    delimiter: str = ""
    """Delimiter of a CSV; by default the one that its header shows: comma, tab, semicolon or |."""
    encoding: str = "utf-8-sig"
    """Encoding of CSV, JSONL and .txt, as Python names it: utf-8, latin-1, utf-16."""
    captions_per_txt: int = 0
    """Lines of each .txt to take, as one caption each; 0 takes all, and stops at a file of more than 20."""
    image_ext: str = ""
    """Extension of the images in tars, such as seg.png; by default, what is an image."""
    caption_ext: str = ""
    """Extension of the captions in tars and beside images; by default txt, and json in tars."""
    context_length: int = 77
    """Tokens that the model can read; longer captions are counted in the report. 0 skips counting."""
    decisions: str = ""
    """CSV of `python -m data_prep review`: images to drop, captions to change."""
    feedback: str = ""
    """Marks of `python -m eval serve --feedback`: captions to add and to remove, in train alone; with
    --keep-splits."""

    def __post_init__(self):
        for name in ("image_ext", "caption_ext"):  # .CAP is cap
            object.__setattr__(self, name, getattr(self, name).lower().removeprefix("."))

    @property
    def columns(self) -> Columns:
        return Columns(
            self.image_column,
            self.caption_column,
            self.group_column,
            self.split_column,
            weight=self.weight_column,
        )


@dataclass(frozen=True)
class Checking:
    """Which images are accepted, and how images that have to change are stored."""

    background: str = "white"
    """Color behind transparent images."""
    max_pixels: int = Rules.max_pixels
    """Reject larger images, by their header: decompression bombs."""
    min_side_px: int = Rules.min_side_px
    """Reject images with a shorter side."""
    max_aspect: float = Rules.max_aspect
    """Reject images whose longer side is more than this many times the shorter one."""
    resize_px: int = 0
    """Resize larger images to a shorter side of this; 0 keeps their size."""
    svg_px: int = Rules.svg_px
    """Shorter side at which an SVG is rendered; SVG needs the package resvg-py."""
    encode: str = "png"
    """Format of changed images: png, jpeg (quality 95) or webp (lossless, smaller and faster than png)."""
    skip_decode: bool = False
    """Do not decode images that were checked before: PNG, JPEG and WebP only; equal files share a group."""
    max_rejects: float = 0.01
    """Stop the build if more than this fraction of rows is rejected. Rows that are left out as asked, or
    repeat another row, do not count."""

    def rules(self) -> Rules:
        """The rules of data_prep.images.check.

        Raises:
            UserError: an invalid color or format, or a count where a fraction is expected.
        """
        if not 0 <= self.max_rejects <= 1:
            raise UserError(
                f"--max-rejects {self.max_rejects:g}: must be a fraction of rows, from 0 to 1; 0.05 is 5 %"
            )
        if self.encode not in ("png", "jpeg", "webp"):
            raise UserError(f"--encode {self.encode}: must be png, jpeg or webp")
        if self.svg_px < 1:
            raise UserError(f"--svg-px {self.svg_px}: must be at least 1")
        return Rules(
            parse_color(self.background),
            self.max_pixels,
            self.min_side_px,
            self.max_aspect,
            self.resize_px,
            self.encode,
            self.svg_px,
        )


@dataclass(frozen=True)
class Splitting:
    """How images are grouped and split."""

    val: float = 0.1
    """Fraction of groups for validation."""
    test: float = 0.1
    """Fraction of groups for the test."""
    seed: int = 0
    """Another seed gives another split."""
    group_by_name: bool = False
    """Group names that differ in size, number or style only: ArrowRight18.png, ArrowRight_24_N.png."""
    keep_splits: str = ""
    """Folder of earlier shards: their images keep their splits; a row that joins two splits is rejected."""
    drop_leaks: bool = False
    """Drop images of train (and val) that are near-identical to one of a later split; else only list them."""

    def check(self) -> None:
        """Raise a UserError if the fractions leave nothing for train."""
        if min(self.val, self.test) < 0 or self.val + self.test >= 1:
            raise UserError(
                f"--val {self.val} and --test {self.test}: must not be negative, and must leave a fraction"
                " for train"
            )


@dataclass(frozen=True)
class Parallelism:
    """How the work is divided."""

    processes: int = 0
    """Worker processes; 0 is one per core."""
    num_tasks: int = 0
    """Divide the work into this many tasks, then run `merge`; in a Slurm array, its size by default."""
    task: int = -1
    """Number of this task, from 0; in a Slurm array, its index by default."""

    def resolved(self) -> "Parallelism":
        """The same with the values of Slurm and of this machine filled in.

        Raises:
            UserError: the number of the task is missing or out of range.
        """
        count, index = os.environ.get("SLURM_ARRAY_TASK_COUNT"), int(os.environ.get("SLURM_ARRAY_TASK_ID", 0))
        num_tasks, task = self.num_tasks, self.task
        if self.processes < 0:
            raise UserError(f"--processes {self.processes}: must be 1 or more; 0 is one per core")
        if not num_tasks and count:
            last = int(os.environ.get("SLURM_ARRAY_TASK_MAX", int(count) - 1))
            if last != int(count) - 1:
                raise UserError(
                    f"the Slurm array has {count} tasks but ends at {last}; use --array=0-{int(count) - 1},"
                    " or pass --num-tasks"
                )
            num_tasks = int(count)
        num_tasks, task = num_tasks or 1, task if task >= 0 else index
        if not 0 <= task < num_tasks:
            raise UserError(
                f"--task {task} of --num-tasks {num_tasks}: must be a number from 0 to {num_tasks - 1}"
            )
        if self.num_tasks > 1 and self.task < 0 and "SLURM_ARRAY_TASK_ID" not in os.environ:
            raise UserError(f"--num-tasks {num_tasks}: pass --task as well, the number of this task")
        return replace(self, processes=self.processes or cores(), num_tasks=num_tasks, task=task)
