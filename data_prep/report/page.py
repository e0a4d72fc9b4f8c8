"""report.html: one self-contained page on which someone sees at a glance whether the data is sane.

Captions and paths are text by strangers: escaped wherever they stand, and the page may run and fetch nothing.
"""

import base64
import html
import io
import os
import warnings
from array import array
from collections import Counter
from collections.abc import Iterable, Iterator
from functools import partial
from heapq import nlargest
from pathlib import Path

from PIL import Image, ImageOps

from data_prep.atomic import atomic_file
from data_prep.build.groups import MAX_SHARERS
from data_prep.build.plan import Plan
from data_prep.build.records import Picture
from data_prep.build.scan import Source, in_order, read_local
from data_prep.build.split import SPLITS
from data_prep.images import DAMAGE, FORMATS, BadImage, parse_color

SHEET, EXAMPLES, CUTS, PAIRS, GROUPS, GROUP_SHOWN = 24, 3, 5, 30, 5, 6  # with 20 reasons, 222 thumbnails
THUMBNAIL_PX, THUMBNAIL_BYTES, COLUMNS = 96, 4000, 40

PAGE = """<!doctype html>
<html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:; style-src 'unsafe-inline'">
<title>What became of {title}</title>
<style>
 :root {{ color-scheme: light dark; --bar: #3b7dc4; --warn: #a84300; --fine: #137a3f; }}
 @media (prefers-color-scheme: dark) {{ :root {{ --bar: #6ea8e0; --warn: #ffa766; --fine: #63c98b; }} }}
 body {{ font: 15px/1.45 system-ui, sans-serif; max-width: 66rem; margin: 2rem auto; padding: 0 1rem; overflow-wrap: anywhere; }}
 h2 {{ font-size: 1.2rem; margin: 2.2rem 0 .5rem; }} h3 {{ font-size: 1rem; margin: 1.2rem 0 .5rem; }} p {{ margin: .5rem 0; }}
 small {{ font-weight: normal; }} small, dt, figcaption, .none {{ opacity: .8; }} code {{ unicode-bidi: isolate; }}
 .said, .pair, img, .none {{ border: 1px solid #8885; border-radius: .5rem; box-sizing: border-box; }}
 .said {{ list-style: none; padding: .8rem 1rem; border-left: .4rem solid var(--warn); }} .said:has(.fine) {{ border-color: var(--fine); }}
 .said li {{ padding-left: 1.6em; text-indent: -1.6em; }} .said li::before {{ content: "\\26a0\\fe0e\\a0 "; color: var(--warn); }}
 .said .fine::before {{ content: "\\2713\\a0 "; color: var(--fine); }} dl {{ display: flex; flex-wrap: wrap; gap: .3rem 2rem; }}
 dd {{ margin: 0; font-size: 1.5rem; }} table {{ border-collapse: collapse; width: 100%; max-width: 44rem; }}
 th, td {{ padding: .1rem .8rem .1rem 0; text-align: left; font-weight: normal; overflow-wrap: normal; }} .bar {{ width: 40%; }}
 th + td {{ text-align: right; }} .bar i {{ display: block; height: .8rem; background: var(--bar); }}
 .columns {{ position: relative; display: flex; align-items: flex-end; height: 9rem; margin: .6rem 0 2rem; border-bottom: 1px solid; }}
 .columns i {{ flex: 1; margin-right: 1px; background: var(--bar); }} .columns b, .columns span {{ position: absolute; }}
 .columns b {{ height: 100%; border-left: 2px dashed var(--warn); }} .columns span {{ top: 100%; font-size: .75rem; }}
 .row {{ display: flex; flex-wrap: wrap; gap: .6rem; }} .pair {{ padding: .4rem; }} .pair div {{ display: flex; gap: .4rem; }}
 figure {{ margin: 0; width: 7rem; }} .wide {{ display: flex; gap: .6rem; width: 20rem; max-width: 100%; }} .wide .none {{ display: none; }}
 img, .none {{ width: 6.4rem; height: 6.4rem; flex: none; object-fit: contain; background: #fff; color: #333; }}
 .none {{ display: grid; place-items: center; font-size: .75rem; }} figcaption {{ font-size: .75rem; min-width: 0; }}
</style>
<h1>What became of {title}</h1>
{body}
</html>
"""


def write_page(path: Path, plan: Plan, summary: dict, begun: dict) -> None:
    """Write the page of a finished plan; about 200 pictures are read again for it, whatever the number of
    images.
    """
    names = [os.path.basename(each.rstrip("/")) for each in begun["inputs"]]
    title = _text(", ".join(names[:3]) + (f" and {len(names) - 3} more" if names[3:] else ""))
    page = PAGE.format(title=title, body="\n".join(_sections(plan, summary, begun, names)))
    with atomic_file(path) as partial_file:
        partial_file.write_text(page, encoding="utf-8", errors="replace")


def _sections(plan: Plan, summary: dict, begun: dict, names: list[str]) -> Iterator[str]:
    check, (sheets, groups) = begun["check"], _choose(plan)
    leaks = [(share, [(side, plan.image_of(side)[2]) for side in pair]) for *pair, share in plan.leaks(PAIRS)]
    query = (
        "SELECT ordinal, input, line, image, detail FROM rejects WHERE reason = ? ORDER BY ordinal LIMIT"
        f" {EXAMPLES}"
    )
    databases = [plan.db, *(part.db for part in plan.parts)]
    rejects = {
        reason: sorted(row for db in databases for row in db.execute(query, [reason]))[:EXAMPLES]
        for reason in summary["reasons"]
    }

    wanted = {
        image.ordinal: ""
        for images in (*sheets.values(), *(images for _, images in groups))
        for image in images
    }
    wanted |= {row[0]: row[3] for rows in rejects.values() for row in rows} | {
        side: "" for _, sides in leaks for side, _ in sides
    }
    jobs = ((ordinal, [_find(plan, ordinal, image)]) for ordinal, image in wanted.items())
    work = partial(_thumbnail, background=parse_color(check["background"]), max_pixels=check["max_pixels"])
    # In workers: rejected and trusted files may never have been decoded, and one that kills a decoder must
    # not end the build.
    thumbnails = {ordinal: uri for ordinal, (uri,) in in_order(work, jobs, 2, "")}

    def figure(ordinal: int, alt: str, *lines: str, kind: str = "") -> str:
        shown = (
            f'<img src="{uri}" alt="{_text(alt)}">'
            if (uri := thumbnails[ordinal])
            else "<div class=none>no preview</div>"
        )
        return (
            "<figure"
            f' class="{kind}">{shown}<figcaption>{"<br>".join(_text(line) for line in lines if line)}</figcaption></figure>'
        )

    def row(images: list) -> str:
        return (
            "<div"
            f" class=row>{''.join(figure(image.ordinal, image.image, *image.captions[:2]) for image in images)}</div>"
        )

    yield _warnings(summary, begun, groups)
    numbers = {
        "rows": "rows",
        "records": "= records",
        "rejects": "+ rejects",
        "images": "images",
        "groups": "groups",
    }
    yield (
        f"<dl>{''.join(f'<div><dt>{text}<dd>{summary[name]:,}</div>' for name, text in numbers.items())}</dl>"
    )
    yield "<h2>Images of each split</h2>"
    yield _bars(
        (split, n["images"], f"{n['captions']:,} captions, {n['groups']:,} groups")
        for split, n in summary["splits"].items()
    )
    yield f"<h2>Rows that cannot be used</h2>{_bars(summary['reasons'].items()) or '<p>None.'}"
    for reason, rows in rejects.items():
        yield f"<h3>{_text(reason)} <small>{summary['reasons'][reason]:,}</small></h3><div class=row>"
        for ordinal, at, line, image, detail in rows:
            yield figure(
                ordinal,
                image,
                f"line {line}" + (f" of {names[at]}" if names[1:] else ""),
                image,
                detail,
                kind="wide",
            )
        yield "</div>"
    yield f"<h2>What was put right</h2>{_bars(summary['fixes'].items()) or '<p>Nothing.'}"
    yield _lengths(summary["caption_characters"], begun["read"]["context_length"])
    if summary["captions_cut"]:
        yield f"<p>{_many(summary['captions_cut'], 'caption')} will be cut; the first:<ul>"
        query = f"SELECT ordinal, line, tokens, caption FROM cut ORDER BY ordinal LIMIT {CUTS}"
        for _, line, tokens, caption in sorted(row for part in plan.parts for row in part.db.execute(query))[
            :CUTS
        ]:
            yield f"<li>line {line}, {tokens:,} tokens: {_text(caption, 300)}"
        yield "</ul>"
    sides = [(f"from {side} px", count) for side, count in summary["shorter_side_px"].items()]
    yield f"<h2>Shorter side of the images</h2>{_bars(sides) or '<p>Not known: nothing was decoded.'}"
    sizes: Counter = Counter()
    for size, count in summary["group_images"].items():
        sizes[1 << int(size).bit_length() - 1] += count
    labeled = [
        (f"{'from ' * (size > 1)}{_many(size, 'image')}", count) for size, count in sorted(sizes.items())
    ]
    yield f"<h2>Groups by their number of images</h2>{_bars(labeled)}"
    yield "<p>Images of a group count as the same thing, and stay in one split. " + (
        "The largest:" if groups else "None has two."
    )
    for size, images in groups:
        yield (
            f"<h3><code>{_text(images[0].group_name)}</code> <small>{size:,} images, in"
            f" {images[0].split}</small></h3>{row(images)}"
        )
    yield (
        "<h2>Near-identical pictures in different splits"
        f" <small>{_many(summary['leaks'], 'pair')}</small></h2>"
    )
    dropped = "The first of each was left out; " if begun["split"]["drop_leaks"] else ""
    found = f"{dropped}{len(leaks)} are shown, the most alike first." if leaks else "None."
    yield f"<p>{'Not looked for: nothing was decoded.' if check['trust'] else found}<div class=row>"
    for share, sides in leaks:
        both = (figure(side, image, plan.split_of(side), image) for side, image in sides)
        yield (
            f"<div class=pair><small>{share:.1%} of what is seen"
            f" differs</small><div>{''.join(both)}</div></div>"
        )
    yield "</div>"
    for split, images in sheets.items():
        yield (
            f"<h2>{split} <small>{len(images)} of {_many(plan.n_images[split], 'image')}, evenly"
            f" spread</small></h2>{row(images)}"
        )


def _choose(plan: Plan) -> tuple[dict[str, list], list[tuple[int, list]]]:
    """In one pass: images of each split, evenly spread; and the largest groups, each with its size and a few
    images.
    """
    sheets: dict[str, list] = {split: [] for split in SPLITS}
    seen, members = dict.fromkeys(SPLITS, 0), array("i", bytes(4 * (plan.rows + 1)))
    # Groups that are among the largest so far; those that were dropped have fewer than `least` images.
    kept: dict[int, list] = {}
    least = 1
    for image in plan.images():
        split, group, all_of_it = image.split, image.group, plan.n_images[image.split]
        if (seen[split] + 1) * SHEET // all_of_it > seen[split] * SHEET // all_of_it:
            sheets[split].append(image)
        seen[split] += 1
        members[group] += 1
        if members[group] >= least:
            kept.setdefault(group, []).append(image)
            del kept[group][GROUP_SHOWN:]
            if len(kept) > 1000:
                kept = {group: kept[group] for group in nlargest(100, kept, key=members.__getitem__)}
                least = 1 + min(members[group] for group in kept)
    return sheets, [
        (members[group], kept[group])
        for group in nlargest(GROUPS, kept, key=members.__getitem__)
        if members[group] > 1
    ]


def _find(plan: Plan, ordinal: int, image: str) -> Source:
    """Where the picture of a row is; a row that was rejected as it was read has only the path `image`."""
    for part in plan.parts:
        row = part.db.execute(
            "SELECT key, image, held, at, size FROM rows WHERE ordinal = ?", (ordinal,)
        ).fetchone()
        if row:
            stored = part.db.execute(
                "SELECT key, image, held, at, size FROM pictures WHERE key = ?", row[:1]
            ).fetchone()
            return plan.place(part, Picture(*(stored or row)))
    return Source(plan.root, image)


def _thumbnail(sources: list[Source], background: tuple[int, int, int], max_pixels: int) -> list[str]:
    """A data URI for the one source; empty where it is no local file below its root, has too many pixels, or
    is damaged.
    """
    try:
        if sources[0].is_remote or isinstance(data := read_local(sources[0]), BadImage):
            return [""]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # max_pixels decides
            image = Image.open(io.BytesIO(data), formats=FORMATS)
        if image.width * image.height > max_pixels:
            return [""]
        image.thumbnail((THUMBNAIL_PX, THUMBNAIL_PX))
        image = ImageOps.exif_transpose(image).convert("RGBA")
        canvas = Image.new("RGBA", image.size, (*background, 255))
        canvas.alpha_composite(image)
        for quality in (70, 35, 0):
            buffer = io.BytesIO()
            canvas.convert("RGB").save(buffer, "WEBP", quality=quality, method=2)
            if buffer.tell() <= THUMBNAIL_BYTES:
                break
        return [f"data:image/webp;base64,{base64.b64encode(buffer.getvalue()).decode()}"]
    except (Image.DecompressionBombError, *DAMAGE):
        return [""]


def _text(value: str, most: int = 160) -> str:
    """`value` as HTML, shortened."""
    return html.escape(value if len(value) <= most else f"{value[: most - 1]}…")


def _many(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"


def _warnings(summary: dict, begun: dict, groups: list[tuple[int, list]]) -> str:
    """What deserves a look, in plain words, as a list; or that nothing does."""
    said, images, splitting = [], summary["images"], begun["split"]
    if begun["check"]["trust"]:
        said.append(
            "Nothing was decoded (--trust): damaged or near-identical pictures, and sizes, are not known."
        )
    if summary["rejects"]:
        said.append("{rejects:,} of {rows:,} rows cannot be used.".format(**summary))
    for split, counts in summary["splits"].items():
        wanted, share = splitting.get(split, 0), counts["images"] / images
        if not counts["images"]:
            said.append(f"{split} is empty.")
        elif (
            images >= 200
            and not begun["read"]["split_column"]
            and wanted
            and not wanted / 2 <= share <= 2 * wanted
        ):
            said.append(
                f"{split} has {share:.1%} of the images, not {wanted:.1%}: there are few groups, or very"
                " large ones."
            )
    if unused := summary["decisions"]["unused"]:
        said.append(
            f"{_many(unused, 'decision')} fit no image or caption of the inputs, and changed nothing: see"
            " unused_decisions.csv."
        )
    if summary["captions_cut"]:
        said.append(
            f"{_many(summary['captions_cut'], 'caption')} will be cut: longer than the model can read."
        )
    if summary["leaks"] and not splitting["drop_leaks"]:
        said.append(
            f"{_many(summary['leaks'], 'near-identical pair')} across splits, which flatter the numbers; see"
            " --drop-leaks."
        )
    for size, (image, *_) in groups[:1]:
        if size >= 20 and size >= min(images / 20, 1000):
            name = _text(image.group_name)
            said.append(
                f"One group, <code>{name}</code>, has {size:,} images ({size / images:.1%}): is the group"
                " column the right one?"
            )
    shared = {what[:-1]: count for what, count in summary["shared_by_too_many"].items() if count}
    said += [
        f"{_many(n, what)} of more than {MAX_SHARERS} images each: too general to tell them apart."
        for what, n in shared.items()
    ]
    return f"<ul class=said>{''.join(f'<li>{one}' for one in said) or '<li class=fine>Nothing suspicious was found.'}</ul>"


def _bars(rows: Iterable[tuple]) -> str:
    """A table of (label, count[, note]) with bars; empty where there are no rows."""
    lines, rows = [], list(rows)
    for label, count, *note in rows:
        width = 100 * count / max(1, *(row[1] for row in rows))
        end = "".join(f"<td>{text}" for text in note)
        lines.append(
            f"<tr><th scope=row>{_text(label)}<td>{count:,}<td class=bar><i"
            f' style="width:{width:.1f}%"></i>{end}'
        )
    return f"<table>{''.join(lines)}</table>" if lines else ""


def _lengths(counts: dict[str, int], context_length: int) -> str:
    """How long captions are, as columns, with a line at the length that can always be read."""
    free = context_length - 2  # a start and an end; each other token stands for one byte or more
    step = 10 * max(1, -(-3 * free // (20 * COLUMNS)))  # the line stands in the left two thirds
    columns: Counter = Counter()
    for start, count in counts.items():
        columns[min(int(start) // step, COLUMNS - 1)] += count
    shown, most = 1 + max([*columns, free // step]), max(columns.values())
    bars = (
        f'<i style="height:{100 * columns[at] / most:.1f}%" title="from {at * step}: {columns[at]:,}"></i>'
        for at in range(shown)
    )
    ticks = (
        f'<span style="left:{100 * at / shown:.1f}%">{at * step}</span>'
        for at in range(0, shown, 1 + shown // 8)
    )
    line = f'<b style="left:{100 * free / step / shown:.1f}%"></b>' if context_length else ""
    said = f"The tallest column is {most:,} captions" + (
        f"; the last one is all from {step * (shown - 1)}." if shown == COLUMNS else "."
    )
    said += f" Left of the dashed line, at {free}, captions in ASCII are never cut." if context_length else ""
    chart = f'<div class=columns role=img aria-label="{said}">{"".join(bars)}{"".join(ticks)}{line}</div>'
    return f"<h2>Length of captions, in characters</h2><p>{said}{chart}"
