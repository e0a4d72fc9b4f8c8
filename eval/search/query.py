"""The pictures of an index that are nearest to a sentence or to another picture, as a table, JSON or CSV."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import numpy as np
import pyarrow.compute as pc
import torch
import tyro

from data_prep.atomic import atomic_file
from data_prep.build.scan import Source, read_local
from data_prep.errors import UserError
from data_prep.images import BadImage
from eval.classify.features import picture_of, read_file
from eval.embed import embed_texts
from eval.options import INFERENCE
from eval.retrieval.score import write_json
from eval.search.index import Index, not_empty
from eval.search.nearest import Hit, Nearest
from train.model.clip import Clip
from train.world import World

BATCH_COLUMNS = ["query", "rank", "score", "number", "key", "caption", "variants", "problem"]
QUERIES_AT_ONCE = 256


def text_query(clip: Clip, texts: Sequence[str]) -> torch.Tensor:
    """text_features fp32 [q, d], L2-normed, on the CPU."""
    return embed_texts(clip, list(texts), World(device=clip.towers.mean.device), INFERENCE).cpu()


def image_query(clip: Clip, data: bytes, what: str) -> torch.Tensor:
    """image_features fp32 [1, d] of an encoded picture, L2-normed, on the CPU.

    Raises:
        UserError: it cannot be used: damaged, blank, or with too many pixels (which its header tells); `what`
            names it.
    """
    pixels = clip.eval_transform(picture_of(data, what))[None]
    with torch.inference_mode():
        return clip.towers.image_features(pixels.to(clip.towers.mean.device)).cpu()


def filter_rows(index: Index, filters: Sequence[str]) -> np.ndarray | None:
    """bool [n], the pictures that have all of "column=value"; None where there is no filter.

    Raises:
        UserError: no such column, or no picture has all of these values.
    """
    rows = np.ones(len(index), bool)
    for each in filters:
        column, equals, value = each.partition("=")
        if not equals:
            raise UserError(
                f"filter {each!r}: COLUMN=VALUE is wanted; the columns are"
                f" {', '.join(index.columns) or 'none'}"
            )
        rows &= pc.fill_null(pc.equal(index.values(column), value), False).to_numpy()
        if not rows.any():
            known = dict(index.choices()).get(column, [])
            having = f"; {column} has {', '.join(name for name, _ in known[:12])}" if known else ""
            raise UserError(f"filter {each!r}: no picture of {index.name} is left{having}")
    return rows if filters else None


def search(
    index: Annotated[Path, tyro.conf.Positional],
    text: str = "",
    image: Path | None = None,
    batch: Path | None = None,
    out: Path | None = None,
    k: int = 10,
    filter: tuple[str, ...] = (),
    grouped: bool = True,
    json: Path | None = None,
    approximate: bool = False,
    model: str = "",
) -> None:
    """Finds pictures by a sentence or by a picture: the k nearest by cosine, variants of one thing joined.

    Args:
        index: Folder that `python -m eval embed` made.
        text: A sentence to search by.
        image: A picture to search by.
        batch: CSV of many queries, with a column text, or image (paths below the CSV's folder), or both.
        out: CSV for what --batch finds.
        k: Pictures to find.
        filter: COLUMN=VALUE, several if wanted; only pictures that have all of them are searched.
        grouped: False shows the variants of one thing beside each other.
        json: File to write what was found to.
        approximate: Use an index of cells, made on first use: for more than a million pictures. Its recall is
            measured and printed.
        model: Where the model is now, if it is not where it was.
    """
    if bool(text) + (image is not None) + (batch is not None) != 1:
        raise UserError("one of --text, --image and --batch is wanted")
    if (batch is None) != (out is None):
        raise UserError(
            "--batch and --out belong together: queries are read from the one, what they find is written to"
            " the other"
        )
    if k < 1:
        raise UserError(f"--k {k}: at least 1 is wanted")
    opened = not_empty(Index(index))
    rows, data = filter_rows(opened, filter), read_file(image, "--image") if image else b""
    queries = list(read_batch(batch)) if batch else []
    nearest, clip = Nearest(opened, approximate), opened.model(model)
    clip.towers.eval()
    if approximate:
        print(
            f"approximate index: recall@10 {nearest.recall():.3f} of an exact search, by pictures drawn at"
            " random"
        )
    if batch:
        print(write_batch(out, batch.parent, queries, opened, nearest, clip, k, rows, grouped))
        return
    features = text_query(clip, [text]) if text else image_query(clip, data, f"--image {image}")
    hits = nearest.top(features, k, rows, grouped)[0]
    found = described(opened, hits)
    print(table(found))
    if json:
        asked = {"text": text} if text else {"image": str(image)}
        write_json(
            json,
            {
                "index": str(index),
                "model": opened.manifest["model"],
                **asked,
                "filter": list(filter),
                "found": found,
            },
        )


def described(index: Index, hits: Sequence[Hit]) -> list[dict]:
    """Of each hit: rank (1-based), score, variants, and what Index.rows says of it."""
    rows = index.rows([hit.number for hit in hits])
    return [
        {"rank": rank, "score": hit.score, "variants": hit.variants, **row}
        for rank, (hit, row) in enumerate(zip(hits, rows, strict=True), 1)
    ]


def table(found: list[dict]) -> str:
    lines = ["rank   cosine  variants  picture and captions"]
    for one in found:
        captions = "; ".join(one["captions"])
        lines.append(
            f"{one['rank']:>4}  {one['score']:7.4f}  {one['variants']:>8}  {one['key']}  {captions[:90]}"
        )
    return "\n".join(lines)


def read_batch(path: Path) -> Iterator[tuple[str, str]]:
    """(text, "") or ("", image) of each row.

    Raises:
        UserError: it cannot be read, or has neither column.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"text", "image"} & set(reader.fieldnames or ()):
                raise UserError(
                    f"{path}: has columns {reader.fieldnames or 'none'}; one called text or image is wanted"
                )
            for row in reader:
                text, image = (row.get("text") or "").strip(), (row.get("image") or "").strip()
                yield ("", image) if image and not text else (text, "")
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a CSV in UTF-8 ({error}); write it as one") from None


def write_batch(
    out: Path,
    root: Path,
    queries: list,
    index: Index,
    nearest: Nearest,
    clip: Clip,
    k: int,
    rows: np.ndarray | None,
    grouped: bool,
) -> str:
    """Write a CSV of what each query finds, a line per picture; a query that cannot be asked has one line
    with its problem.
    """
    failed = 0
    with atomic_file(out) as partial, open(partial, "w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, BATCH_COLUMNS, extrasaction="ignore")
        writer.writeheader()
        for start in range(0, len(queries), QUERIES_AT_ONCE):
            part = queries[start : start + QUERIES_AT_ONCE]
            features = batch_features(clip, root, part)
            good = [each for each in features if isinstance(each, torch.Tensor)]
            hits = iter(nearest.top(torch.stack(good), k, rows, grouped) if good else [])
            for query, each in zip(part, features, strict=True):
                if isinstance(each, str):
                    failed += 1
                    writer.writerow({"query": "".join(query), "problem": each})
                    continue
                for one in described(index, next(hits)):
                    caption = one["captions"][0] if one["captions"] else ""
                    writer.writerow(
                        {**one, "query": "".join(query), "score": f"{one['score']:.6f}", "caption": caption}
                    )
    problems = f"; {failed} cannot be asked, the column problem says why" if failed else ""
    return f"{len(queries) - failed} of {len(queries)} queries asked{problems}: {out}"


def batch_features(clip: Clip, root: Path, queries: list[tuple[str, str]]) -> list[torch.Tensor | str]:
    """Of each query its features fp32 [d], or why it has none."""
    texts = [text for text, _ in queries if text]
    by_text = iter(text_query(clip, texts) if texts else ())
    return [next(by_text) if text else image_features(clip, root, image) for text, image in queries]


def image_features(clip: Clip, root: Path, image: str) -> torch.Tensor | str:
    data = read_local(Source(str(root), image)) if image else BadImage("neither text nor image")
    if isinstance(data, BadImage):
        return data.reason
    try:
        return image_query(clip, data, image)[0]
    except UserError as error:
        return str(error)
