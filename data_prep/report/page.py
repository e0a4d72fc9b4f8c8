"""report.html: one page that shows at a glance whether the data is sane.

Captions and paths are untrusted text: the template escapes them, and the page's policy forbids scripts and
requests.
"""

import base64
import io
import os
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable
from functools import partial
from heapq import nlargest
from pathlib import Path
from typing import NamedTuple

from PIL import Image, ImageOps

from data_prep.build.database import select, select_one
from data_prep.build.plan import Plan, PlannedImage
from data_prep.build.records import LongCaption, Reject, StoredImage, StoredRow
from data_prep.build.scan import in_order
from data_prep.build.split import SPLITS
from data_prep.html import write_page
from data_prep.images import DAMAGE, DECODER_DIED, BadImage, open_image, parse_color
from data_prep.inputs.locations import ImageLocation, read_local
from data_prep.report.summary import counted_rows
from data_prep.tables import counted

TEMPLATE = Path(__file__).with_name("report.html")
SAMPLES, EXAMPLES, LONG_CAPTIONS, PAIRS = 24, 3, 5, 30  # with 20 reasons, about 200 thumbnails
GROUPS, GROUP_IMAGES = 5, 6
THUMBNAIL_PX, THUMBNAIL_BYTES, COLUMNS = 96, 4000, 40


class Figure(NamedTuple):
    """An image on the page, with lines of text below it."""

    uri: str  # "" for no preview
    alt: str
    lines: list[str]
    is_wide: bool = False


class Group(NamedTuple):
    size: int
    images: list[PlannedImage]  # the first few


class Bar(NamedTuple):
    label: str
    count: int
    width: float  # percent
    note: str = ""


def write_report_page(path: Path, plan: Plan, summary: dict, settings: dict) -> None:
    """Write the page of a finished plan. About 200 images are read again, whatever the size of the data set.

    Args:
        summary: the content of report.json.
        settings: see data_prep.build.pipeline.SETTINGS.
    """
    inputs = [os.path.basename(source.rstrip("/")) for source in settings["inputs"]]
    more = f" and {len(inputs) - 3} more" if len(inputs) > 3 else ""
    samples, groups = _choose(plan)
    leaks = plan.leaks(PAIRS)
    rejects = _first_rejects(plan, summary["reasons"])
    figures = _Figures(plan, settings["check"])
    for images in (*samples.values(), *(group.images for group in groups)):
        figures.want(images)
    shown = [
        reject
        for reason, examples in rejects.items()
        for reject in examples
        if reason not in DECODER_DIED.values()
    ]
    figures.load(rejects=shown, leaks=leaks)
    write_page(
        path,
        TEMPLATE,
        title=f"Report on {', '.join(inputs[:3])}{more}",
        warnings=[*_of_rejects(summary), *summary["warnings"]],
        counts=[
            ("rows", summary["lines"]),
            *([("pairs", summary["rows"])] if summary["rows"] != summary["lines"] else []),
            ("= records", summary["records"]),
            ("+ rejects", summary["rejects"]),
            ("images", summary["images"]),
            ("groups", summary["groups"]),
        ],
        **_charts(summary, settings["read"]["context_length"]),
        rejects=[
            (reason, summary["reasons"][reason], [figures.of_reject(reject, inputs) for reject in examples])
            for reason, examples in rejects.items()
        ],
        n_long_captions=counted(summary["captions_truncated"], "caption"),
        long_captions=_long_captions(plan) if summary["captions_truncated"] else [],
        groups=[
            (group.images[0].group_name, group.size, group.images[0].split, figures.of_images(group.images))
            for group in groups
        ],
        n_leaks=counted(summary["leaks"], "pair"),
        leaks_note=_leaks_note(settings, len(leaks)),
        leaks=[
            {
                "difference": leak.difference,
                "figures": [figures.of_row(ordinal) for ordinal in (leak.a, leak.b)],
            }
            for leak in leaks
        ],
        samples=[
            (
                split,
                f"{len(images)} of {counted(plan.n_images[split], 'image')}, evenly spaced",
                figures.of_images(images),
            )
            for split, images in samples.items()
        ],
    )


class _Figures:
    """Thumbnails of the images on the page, made in worker processes.

    In workers, because rejected images and those of --skip-decode may never have been decoded: one that
    crashes a decoder must not end the build.
    """

    def __init__(self, plan: Plan, checking: dict):
        self.plan, self.checking = plan, checking
        self._locations: dict[int, ImageLocation] = {}
        self._uris: dict[int, str] = {}

    def want(self, images: list[PlannedImage]) -> None:
        for image in images:
            self._locations[image.ordinal] = self._locate(image.ordinal, image.image)

    def load(self, rejects: list[Reject], leaks: list) -> None:
        """Make all thumbnails."""
        for reject in rejects:
            self._locations[reject.ordinal] = self._locate(reject.ordinal, reject.image)
        for ordinal in (ordinal for leak in leaks for ordinal in (leak.a, leak.b)):
            self._locations[ordinal] = self._locate(ordinal, "")
        background, max_pixels = parse_color(self.checking["background"]), self.checking["max_pixels"]
        work = partial(_thumbnails, background=background, max_pixels=max_pixels)
        jobs = ((ordinal, [location]) for ordinal, location in self._locations.items())
        self._uris = {ordinal: uri for ordinal, (uri,) in in_order(work, jobs, 2, "")}

    def _locate(self, ordinal: int, image: str) -> ImageLocation:
        """Where the image of a row is; a row that was rejected while reading has only the path `image`."""
        for part in self.plan.parts:
            row = select_one(part.db, StoredRow, "FROM rows WHERE ordinal = :ordinal", ordinal=ordinal)
            if row:
                stored = select_one(part.db, StoredImage, "FROM images WHERE key = :key", key=row.key)
                return self.plan.locate(part, stored or row)
        return ImageLocation(self.plan.root, image)

    def of_images(self, images: list[PlannedImage]) -> list[Figure]:
        return [Figure(self._uris[image.ordinal], image.image, image.captions[:2]) for image in images]

    def of_row(self, ordinal: int) -> Figure:
        _, row = self.plan.row(ordinal)
        return Figure(self._uris[ordinal], row.image, [self.plan.split_of(ordinal), row.image])

    def of_reject(self, reject: Reject, inputs: list[str]) -> Figure:
        line = f"line {reject.line}" + (f" of {inputs[reject.input]}" if len(inputs) > 1 else "")
        lines = [text for text in (line, reject.image, reject.caption, reject.detail) if text]
        return Figure(self._uris.get(reject.ordinal, ""), reject.image, lines, is_wide=True)


def _first_rejects(plan: Plan, reasons: Iterable[str]) -> dict[str, list[Reject]]:
    """A few rejects of each reason, of rows that differ, in the order of the input."""
    query = (
        "FROM rejects WHERE ordinal IN (SELECT min(ordinal) FROM rejects WHERE reason = :reason"
        " GROUP BY input, line) ORDER BY ordinal LIMIT :limit"
    )
    databases = [plan.db, *(part.db for part in plan.parts)]
    return {
        reason: sorted(
            reject for db in databases for reject in select(db, Reject, query, reason=reason, limit=EXAMPLES)
        )[:EXAMPLES]
        for reason in reasons
    }


def _long_captions(plan: Plan) -> list[LongCaption]:
    query = "FROM long_captions ORDER BY ordinal LIMIT :limit"
    captions = (
        caption for part in plan.parts for caption in select(part.db, LongCaption, query, limit=LONG_CAPTIONS)
    )
    return sorted(captions)[:LONG_CAPTIONS]


def _choose(plan: Plan) -> tuple[dict[str, list[PlannedImage]], list[Group]]:
    """In one pass: images of each split, evenly spaced; and the largest groups."""
    samples: dict[str, list] = {split: [] for split in SPLITS}
    seen, members = dict.fromkeys(SPLITS, 0), array("i", bytes(4 * (plan.rows + 1)))
    # Candidates for the largest groups; a group that was dropped from them has fewer than `least` images.
    kept: dict[int, list] = {}
    least = 1
    for image in plan.images():
        split, group, n_images = image.split, image.group, plan.n_images[image.split]
        if (seen[split] + 1) * SAMPLES // n_images > seen[split] * SAMPLES // n_images:
            samples[split].append(image)
        seen[split] += 1
        members[group] += 1
        if members[group] >= least:
            kept.setdefault(group, []).append(image)
            del kept[group][GROUP_IMAGES:]
            if len(kept) > 1000:
                kept = {group: kept[group] for group in nlargest(100, kept, key=members.__getitem__)}
                least = 1 + min(members[group] for group in kept)
    largest = nlargest(GROUPS, kept, key=members.__getitem__)
    return samples, [Group(members[group], kept[group]) for group in largest if members[group] > 1]


def _thumbnails(
    locations: list[ImageLocation], background: tuple[int, int, int], max_pixels: int
) -> list[str]:
    return [_thumbnail(location, background, max_pixels) for location in locations]


def _thumbnail(location: ImageLocation, background: tuple[int, int, int], max_pixels: int) -> str:
    """A data URI; "" if the image is remote, outside of its root, too large or damaged."""
    try:
        if location.is_remote or isinstance(data := read_local(location), BadImage):
            return ""
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            image = open_image(data)
        if image.width * image.height > max_pixels:
            return ""
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        image = ImageOps.exif_transpose(image).convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image)
        for quality in (70, 35, 0):
            buffer = io.BytesIO()
            canvas.convert("RGB").save(buffer, "WEBP", quality=quality, method=2)
            if buffer.tell() <= THUMBNAIL_BYTES:
                break
        return f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"
    except (BadImage, *DAMAGE):
        return ""


def _of_rejects(summary: dict) -> list[str]:
    """What the terminal lists reason by reason."""
    unusable = summary["unusable"]
    messages = [f"{unusable:,} of {counted_rows(summary)} were rejected."] if unusable else []
    return messages + [
        f"Ignored: {counted(n, 'file')} ({reason}); see ignored.csv."
        for reason, n in summary["ignored"].items()
    ]


def _leaks_note(settings: dict, shown: int) -> str:
    if settings["check"]["skip_decode"] or settings["check"].get("unread"):
        return "Not searched: the images were not decoded."
    if not shown:
        return "None."
    dropped = "The first image of each pair was dropped; " if settings["split"]["drop_leaks"] else ""
    return f"{dropped}{shown} are shown, the most similar first."


def _bars(rows: Iterable[tuple]) -> list[Bar]:
    """Bars of (label, count[, note])."""
    rows = list(rows)
    largest = max([1, *(count for _, count, *_ in rows)])
    return [Bar(label, count, 100 * count / largest, *note) for label, count, *note in rows]


def _charts(summary: dict, context_length: int) -> dict[str, object]:
    """The bar charts of the page, by their name in the template."""
    by_power: Counter = Counter()
    for size, count in summary["group_images"].items():
        by_power[1 << int(size).bit_length() - 1] += count
    return {
        "splits": _bars(
            (split, counts["images"], f"{counts['captions']:,} captions, {counts['groups']:,} groups")
            for split, counts in summary["splits"].items()
        ),
        "reasons": _bars(summary["reasons"].items()),
        "fixes": _bars(summary["fixes"].items()),
        "lengths": _lengths(summary["caption_characters"], context_length),
        "sides": _bars((f"from {side} px", count) for side, count in summary["shorter_side_px"].items()),
        "group_sizes": _bars(
            (f"{'from ' * (size > 1)}{counted(size, 'image')}", count)
            for size, count in sorted(by_power.items())
        ),
    }


def _lengths(counts: dict[str, int], context_length: int) -> dict[str, object]:
    """A histogram of caption lengths in characters, with a line at the longest that is never truncated.

    Args:
        counts: captions by length, in steps of 10.
    """
    never_truncated = context_length - 2  # start and end tokens; each other token is one byte or more
    step = 10 * max(1, -(-3 * never_truncated // (20 * COLUMNS)))  # the line is in the left two thirds
    columns: Counter = Counter()
    for start, count in counts.items():
        columns[min(int(start) // step, COLUMNS - 1)] += count
    shown, largest = 1 + max([*columns, never_truncated // step]), max(columns.values())
    description = f"The tallest column is {largest:,} captions"
    description += f"; the last one is all from {step * (shown - 1)}." if shown == COLUMNS else "."
    if context_length:
        description += f" ASCII captions left of the dashed line, at {never_truncated}, are never truncated."
    return {
        "description": description,
        "columns": [
            {"height": 100 * columns[number] / largest, "start": number * step, "count": columns[number]}
            for number in range(shown)
        ],
        "ticks": [
            {"left": 100 * number / shown, "label": number * step}
            for number in range(0, shown, 1 + shown // 8)
        ],
        "limit": 100 * never_truncated / step / shown if context_length else None,
    }
