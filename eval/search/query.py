"""Queries to an index: sentences and images find the nearest images, as a table, JSON or CSV."""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from data_prep.errors import UserError
from data_prep.images import BadImage
from data_prep.inputs.locations import ImageLocation, read_local
from data_prep.sheets import write_csv
from data_prep.tables import markdown_table
from eval.classify.features import open_image
from eval.embed import embed_texts
from eval.options import INFERENCE
from eval.search.index import Index
from eval.search.nearest import Hit, Nearest
from eval.search.words import Words, top
from train.model.clip import Clip
from train.world import World

CSV_COLUMNS = ["query", "rank", "score", "number", "key", "path", "caption", "variants", "words", "problem"]
QUERIES_AT_ONCE, SHOWN_CHARACTERS = 256, 90


class TextOrImage(NamedTuple):
    """One query of a CSV: a text, or the path of an image; both are empty in an empty row."""

    text: str
    image: str


class Searcher(NamedTuple):
    """An opened index with its model, and the options of a search.

    Attributes:
        rows: bool [n], the images to search; None for all.
        grouped: Return only the best image of each group.
        words: What exact words of texts are compared with; None for vectors alone.
    """

    index: Index
    clip: Clip
    nearest: Nearest
    k: int
    rows: np.ndarray | None
    grouped: bool
    words: Words | None = None

    def find(self, features: torch.Tensor, texts: Sequence[str]) -> list[list[dict]]:
        """Results for each query; see described().

        Args:
            features: fp32 [q, d].
            texts: Of each query; "" for an image.
        """
        hits = top(self.nearest, self.words, features, texts, self.k, self.rows, self.grouped)
        return [described(self.index, of_query) for of_query in hits]


def text_query(clip: Clip, texts: Sequence[str]) -> torch.Tensor:
    """text_features fp32 [q, d], L2-normed, on the CPU."""
    return embed_texts(clip, list(texts), World(device=clip.towers.mean.device), INFERENCE).cpu()


def image_query(clip: Clip, data: bytes, name: str) -> torch.Tensor:
    """image_features fp32 [1, d] of an encoded image, L2-normed, on the CPU.

    Args:
        name: What error messages call the image.

    Raises:
        UserError: The image is damaged, blank, or has too many pixels according to its header.
    """
    return pixels_query(clip, clip.eval_transform(open_image(data, name, clip.background)))


def pixels_query(clip: Clip, pixels: torch.Tensor) -> torch.Tensor:
    """image_features fp32 [1, d] of a preprocessed image, uint8 [3, H, W]; L2-normed, on the CPU."""
    with torch.inference_mode():
        return clip.towers.image_features(pixels[None].to(clip.towers.mean.device)).cpu()


def described(index: Index, hits: Sequence[Hit]) -> list[dict]:
    """Each hit as {"rank" (from 1), "score", "variants", "words", and the fields of Index.rows}."""
    rows = index.rows([hit.number for hit in hits])
    return [
        {"rank": rank, "score": hit.score, "variants": hit.variants, "words": list(hit.words), **row}
        for rank, (hit, row) in enumerate(zip(hits, rows, strict=True), 1)
    ]


def table(results: list[dict]) -> str:
    """Results for the terminal."""
    rows = []
    for result in results:
        captions = "; ".join(result["captions"])[:SHOWN_CHARACTERS]
        score, variants = f"{result['score']:.4f}", str(result["variants"])
        image, words = result["path"] or result["key"], ", ".join(result["words"])
        rows.append([str(result["rank"]), image, captions, words, score, variants])
    columns = ["rank", "image", "captions", "words", "cosine", "variants"]
    if any(result["words"] for result in results):
        return markdown_table(columns, rows, left=4)
    columns, *rows = [row[:3] + row[4:] for row in (columns, *rows)]
    return markdown_table(columns, rows, left=3)


def read_queries(path: Path) -> Iterator[TextOrImage]:
    """The queries of a CSV with a column text or image; in a row with both, the text counts.

    Raises:
        UserError: The file cannot be read, or has neither column.
    """
    try:
        with open(path, newline="", encoding="utf-8-sig") as file:
            reader = csv.DictReader(file)
            if not {"text", "image"} & set(reader.fieldnames or ()):
                columns = ", ".join(reader.fieldnames or ()) or "none"
                raise UserError(f"{path}: must have a column text or image; its columns are {columns}")
            for row in reader:
                text, image = (row.get("text") or "").strip(), (row.get("image") or "").strip()
                yield TextOrImage(text, "" if text else image)
    except (OSError, UnicodeError, csv.Error) as error:
        raise UserError(f"{path}: cannot be read as a UTF-8 CSV ({error}); convert it to one") from None


def write_results(searcher: Searcher, queries: Sequence[TextOrImage], root: Path, out: Path) -> str:
    """Write a CSV with a row for each result; a failed query has one row with its problem.

    Args:
        root: Folder of the image paths.

    Returns:
        A summary for the terminal.
    """
    failed = []
    rows = _result_rows(searcher, queries, root, failed)
    write_csv(out, CSV_COLUMNS, ([row.get(column, "") for column in CSV_COLUMNS] for row in rows))
    problems = f"; {len(failed)} failed, see the column problem" if failed else ""
    return f"{len(queries) - len(failed)} of {len(queries)} queries answered{problems}: {out}"


def _result_rows(
    searcher: Searcher, queries: Sequence[TextOrImage], root: Path, failed: list[str]
) -> Iterator[dict]:
    """Rows of CSV_COLUMNS; the names of queries without results are appended to `failed`."""
    for start in range(0, len(queries), QUERIES_AT_ONCE):
        part = queries[start : start + QUERIES_AT_ONCE]
        features = query_features(searcher.clip, root, part)
        valid = [at for at, tensor in enumerate(features) if isinstance(tensor, torch.Tensor)]
        texts = [part[at].text for at in valid]
        results = iter(searcher.find(torch.stack([features[at] for at in valid]), texts) if valid else [])
        for query, tensor in zip(part, features, strict=True):
            name = query.text or query.image
            if isinstance(tensor, str):
                failed.append(name)
                yield {"query": name, "problem": tensor}
                continue
            for result in next(results):
                caption = result["captions"][0] if result["captions"] else ""
                shown = {"score": f"{result['score']:.6f}", "words": ", ".join(result["words"])}
                yield {**result, **shown, "query": name, "caption": caption}


def query_features(clip: Clip, root: Path, queries: Sequence[TextOrImage]) -> list[torch.Tensor | str]:
    """The features fp32 [d] of each query, or the reason why it has none."""
    texts = [query.text for query in queries if query.text]
    by_text = iter(text_query(clip, texts) if texts else ())
    return [next(by_text) if query.text else _image_features(clip, root, query.image) for query in queries]


def _image_features(clip: Clip, root: Path, image: str) -> torch.Tensor | str:
    data = read_local(ImageLocation(str(root), image)) if image else BadImage("neither text nor image")
    if isinstance(data, BadImage):
        return data.reason
    try:
        return image_query(clip, data, image)[0]
    except UserError as error:
        return str(error)
