"""The search page: a sentence or an image finds images, by one model or by several side by side.

    text, image, or number of an image -> features, by each index's model -> Nearest -> hits, per index

An uploaded image is decoded in a child process with limits of time and memory, and its search waits for it
without holding up the others.
The indexes are of one corpus: keys, columns and thumbnails come from the first. The page is serve.html.
"""

import asyncio
import hashlib
import json
import queue
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from datetime import datetime, timezone
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from data_prep import web
from data_prep.errors import UserError
from data_prep.images import BadImage, child_decoder, rgb
from data_prep.marks import MAX_TEXT, NONE, RIGHT, WRONG, Mark, MarkLog
from data_prep.web import Refused
from eval.classify.features import RULES
from eval.search.index import NO_IMAGES, Index, filter_rows, open_indexes
from eval.search.nearest import Nearest
from eval.search.query import pixels_query, text_query
from eval.search.words import Words, top
from train.model.clip import Clip, public_name

PAGE = Path(__file__).with_name("serve.html")
MAX_K, MAX_FILTERS, MAX_JSON_BYTES = 100, 20, 1 << 20
TEXTS_KEPT, SEARCHES_AT_ONCE, EXAMPLES, SAMPLES = 4096, 32, 4, 32
UPLOADS_AT_ONCE, UPLOAD_SECONDS = 2, 10  # images that are decoded at once; CPU time for each


class Column:
    """One index with its model: a column of results.

    Args:
        clip: None if the index is empty.
        forward: One thread in which models run, shared by all columns. So one forward runs at a time, on all
            cores.
        words: What exact words of texts are compared with, shared by all columns.
    """

    def __init__(
        self,
        index: Index,
        clip: Clip | None,
        forward: ThreadPoolExecutor,
        words: Words,
        approximate: bool = False,
    ):
        self.index, self.clip, self.forward, self.words = index, clip, forward, words
        self.nearest = Nearest(index, approximate)
        self._cached: dict[str, torch.Tensor] = {}  # by text, the least recently used first
        self._waiting: deque[str] = deque()
        if len(index):
            self.nearest.top(self.like(0), 1)  # makes what is made on first use, before threads need it

    def text(self, text: str) -> torch.Tensor:
        """text_features fp32 [1, d], cached. Texts that arrive while the model is busy form one batch."""
        self._waiting.append(text)
        return self.forward.submit(self._text, text).result()

    def _text(self, text: str) -> torch.Tensor:
        texts = [*(self._waiting.popleft() for _ in range(len(self._waiting))), text]
        new = list(dict.fromkeys(text for text in texts if text not in self._cached))
        if new:
            self._cached |= zip(new, text_query(self.clip, new).split(1), strict=True)
        features = self._cached[text] = self._cached.pop(text)  # move to the end
        while len(self._cached) > TEXTS_KEPT:
            del self._cached[next(iter(self._cached))]
        return features

    def image(self, pixels: torch.Tensor) -> torch.Tensor:
        """image_features fp32 [1, d] of an image, uint8 [3, H, W], see Uploads."""
        return self.forward.submit(pixels_query, self.clip, pixels).result()

    def like(self, number: int) -> torch.Tensor:
        """image_features fp32 [1, d] of an image of the index."""
        return torch.from_numpy(self.index.as_queries([number]))


class Uploads:
    """Decodes uploaded images, each in one of a few child processes.

    Attributes:
        threads: The threads in which decoded() is called; as many as there are children, so at most so many
            images are in memory at their full size.
    """

    def __init__(self):
        self.threads = ThreadPoolExecutor(UPLOADS_AT_ONCE, thread_name_prefix="upload")
        self._children = [child_decoder(UPLOAD_SECONDS, RULES) for _ in range(UPLOADS_AT_ONCE)]
        self._idle = queue.SimpleQueue()
        for child in self._children:
            self._idle.put(child)

    def decoded(self, data: bytes, columns: Sequence[Column]) -> list[torch.Tensor]:
        """uint8 [3, H, W] of a file, for the model of each column.

        Raises:
            UserError: It is not an image, damaged, has too many pixels, or takes too much time or memory.
        """
        images: dict[tuple, Image.Image] = {}  # by background
        child = self._idle.get()
        try:
            for background in dict.fromkeys(column.clip.background for column in columns):
                pixels = rgb(data, replace(RULES, background=background), child)
                images[background] = Image.fromarray(pixels)
        except BadImage as bad:
            raise UserError(f"the image: {bad}; use another image") from None
        finally:
            self._idle.put(child)
        return [column.clip.eval_transform(images[column.clip.background]) for column in columns]

    def end(self) -> None:
        self.threads.shutdown(wait=False, cancel_futures=True)
        for child in self._children:
            child.end()


def open_columns(
    folders: Sequence[Path], models: Sequence[str] = (), approximate: bool = False
) -> list[Column]:
    """The indexes with their models; everything that is cheap to check is checked before a model is loaded.

    Raises:
        UserError: There is no index, one is of another corpus, or a model is not the one of its index.
    """
    indexes = open_indexes(folders, models)
    forward = ThreadPoolExecutor(1, thread_name_prefix="forward")
    clips = [
        index.model(name) if len(index) else None
        for index, name in zip(indexes, models or [""] * len(indexes), strict=True)
    ]
    words = Words(indexes[0])
    words.prepare()
    return [
        Column(index, clip, forward, words, approximate) for index, clip in zip(indexes, clips, strict=True)
    ]


@dataclass(frozen=True)
class Search:
    """A request: exactly one of text, image and like is given."""

    text: str | None = None
    image: bytes | None = None
    like: int | None = None
    k: int = 24
    filters: tuple[str, ...] = ()
    grouped: bool = True
    vectors_only: bool = False


def is_text(value) -> bool:
    # A lone surrogate, which JSON can hold, has no UTF-8.
    return isinstance(value, str) and not any(0xD800 <= ord(sign) < 0xE000 for sign in value)


# Field -> whether a value is valid, and what is valid, in words.
Fields = dict[str, tuple[Callable, str]]
FIELDS: Fields = {
    "text": (
        lambda value: is_text(value) and value.strip() and len(value) <= MAX_TEXT,
        f"a text of 1 to {MAX_TEXT} characters",
    ),
    "like": (lambda value: type(value) is int, "the number of an image"),
    "k": (lambda value: type(value) is int and 1 <= value <= MAX_K, f"a whole number from 1 to {MAX_K}"),
    "filters": (
        lambda value: type(value) is list and len(value) <= MAX_FILTERS and all(map(is_text, value)),
        f"a list of at most {MAX_FILTERS} texts, each COLUMN=VALUE",
    ),
    "grouped": (lambda value: type(value) is bool, "true or false"),
    "vectors_only": (lambda value: type(value) is bool, "true or false"),
}


def check_fields(fields: dict, known: Fields) -> None:
    """Raises:
    Refused: A field is unknown or not valid; it is named.
    """
    for name, value in fields.items():
        if name not in known:
            raise Refused(f"{name!r:.80}: no such field; the fields are {', '.join(known)}")
        is_valid, valid = known[name]
        if not is_valid(value):
            raise Refused(f"{name}: must be {valid}, not {json.dumps(value):.80}")


def checked(fields: dict, n: int, image: bytes | None = None) -> Search:
    """The request, with valid fields.

    Args:
        n: Number of images in the index.

    Raises:
        Refused: A field is not valid; it is named.
    """
    if not n:
        raise Refused(NO_IMAGES)
    check_fields(fields, FIELDS)
    if ("text" in fields) + ("like" in fields) + (image is not None) != 1:
        raise Refused("pass one of: text, like (the number of an image), or an image as the request's body")
    if not 0 <= fields.get("like", 0) < n:
        raise Refused(f"like: must be from 0 to {n - 1}, not {fields['like']}")
    return Search(**{**fields, "filters": tuple(fields.get("filters", ()))}, image=image)


def mark_of(fields: dict, index: Index, models: Sequence[tuple[str, str]]) -> Mark:
    """The mark of a request: {"text", "number" of the image, "column" that found it, "mark"}.

    Args:
        models: name and sha256 of each column's model.

    Raises:
        Refused: A field is missing or not valid; it is named.
    """
    known: Fields = {
        "text": FIELDS["text"],
        "number": (lambda value: type(value) is int and 0 <= value < len(index), "the number of an image"),
        "column": (lambda value: type(value) is int and 0 <= value < len(models), "the number of an index"),
        "mark": (lambda value: value in (RIGHT, WRONG, NONE), f'"{RIGHT}", "{WRONG}" or ""'),
    }
    check_fields(dict.fromkeys(known) | fields, known)
    (row,) = index.rows([fields["number"]])
    return Mark(
        datetime.now(timezone.utc).isoformat(timespec="seconds"),
        " ".join(fields["text"].split()),
        row["key"],
        row["path"],
        fields["mark"],
        *models[fields["column"]],
    )


async def read(request: Request, n: int) -> Search:
    """The search of a request: JSON, or an image as the body, with k, filter and grouped in the URL.

    Raises:
        Refused: The request is not valid.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        return checked(await web.json_body(request, MAX_JSON_BYTES), n)
    fields = dict(request.query_params.items())
    fields.pop("filter", None)
    if filters := request.query_params.getlist("filter"):
        fields["filters"] = filters
    if fields.get("k", "").isdecimal() and len(fields["k"]) < 10:
        fields["k"] = int(fields["k"])
    grouped = fields.get("grouped", "true")
    fields["grouped"] = {"true": True, "false": False}.get(grouped, grouped)
    return checked(fields, n, await web.body(request))


def results_of(columns: Sequence[Column], search: Search, pixels: Sequence[torch.Tensor] = ()) -> dict:
    """{"searched": number of images searched, "unknown": exact words that no image has, "results": hits per
    index, "images": number -> row}.

    A hit has "number", "score" (cosine), "variants" and "words" (eval.search.nearest.Hit). Results of `like`
    exclude the image itself, and its group if variants are grouped.

    Args:
        pixels: uint8 [3, H, W] of search.image, for each column.

    Raises:
        UserError: A filter names no column, or no image matches all filters.
    """
    first = columns[0].index
    rows = filter_rows(first, search.filters)
    if search.like is not None:
        if search.grouped:
            others = first.group_of != first.group_of[search.like]
        else:
            others = np.arange(len(first)) != search.like
        rows = others if rows is None else rows & others
    results, text = [], search.text or ""
    words = None if search.vectors_only else columns[0].words
    for number, column in enumerate(columns):
        if search.text is not None:
            features = column.text(search.text)
        elif search.image is not None:
            features = column.image(pixels[number])
        else:
            features = column.like(search.like)
        results += top(column.nearest, words, features, [text], search.k, rows, search.grouped)
    numbers = sorted({hit.number for hits in results for hit in hits} | ({search.like} - {None}))
    return {
        "searched": len(first) if rows is None else int(rows.sum()),
        "unknown": [] if words is None else words.unknown(text),
        "results": [[hit._asdict() for hit in hits] for hits in results],
        "images": {row["number"]: row for row in first.rows(numbers)},
    }


def about(indexes: Sequence[Index], models: Sequence[str] = ()) -> dict:
    """What the page shows before the first search: models, filters, example captions and images, limits.

    Args:
        models: Of the indexes, if others than those that made them answer.
    """
    first = indexes[0]
    examples, samples = (
        first.rows(np.linspace(0, len(first) - 1, min(len(first), n)).astype(int).tolist())
        for n in (EXAMPLES, SAMPLES)
    )
    names = list(map(public_name, models or [index.manifest["model"] for index in indexes]))
    return {
        "n": len(first),
        "message": "" if len(first) else NO_IMAGES,
        "indexes": [
            {"name": index.name, "model": name if names.count(name) == 1 else f"{name} ({index.name})"}
            for index, name in zip(indexes, names, strict=True)
        ],
        "filters": first.choices(),
        "examples": list(dict.fromkeys(row["captions"][0] for row in examples if row["captions"])),
        "samples": samples,
        "version": hashlib.sha256(json.dumps(first.manifest, sort_keys=True).encode()).hexdigest()[:16],
        "limits": {"k": MAX_K, "text": MAX_TEXT, "bytes": web.MAX_BODY_BYTES},
    }


def app(columns: Sequence[Column], host: str = web.LOOPBACK[0], marks: MarkLog | None = None) -> Starlette:
    """The page and its API: GET /api/about, POST /api/search, POST /api/mark, GET /thumbnail/N?v=VERSION.

    Searches wait for the model in their own threads, so thumbnails do not wait for searches; and uploads are
    decoded in theirs, so other searches do not wait for them.

    Args:
        marks: Where marks of results go; without it, they are refused. With it, results of a text have
            "marks", by number of the image, and the app is private as data_prep.web.application has it.
    """
    index, models = columns[0].index, [column.clip.name for column in columns if column.clip]
    page_data = about([column.index for column in columns], models)
    if marks:
        page_data["marks"] = True
        fingerprints = [
            (public_name(column.clip.name), column.clip.fingerprint()[:16])
            for column in columns
            if column.clip
        ]
    threads, uploads = ThreadPoolExecutor(SEARCHES_AT_ONCE, thread_name_prefix="search"), Uploads()

    async def get_about(_: Request) -> Response:
        return JSONResponse(page_data, headers={"cache-control": "no-store"})

    async def post_search(request: Request) -> Response:
        search, pixels = await read(request, len(index)), ()
        loop = asyncio.get_running_loop()
        try:
            if search.image is not None:
                pixels = await loop.run_in_executor(uploads.threads, uploads.decoded, search.image, columns)
            answer = await loop.run_in_executor(threads, results_of, columns, search, pixels)
        except asyncio.CancelledError:  # the server stops, and has waited a while for this
            raise Refused("the server was stopped", 503) from None
        if marks and search.text is not None:
            known, images = marks.of(search.text), answer["images"].items()
            answer["marks"] = {number: mark for number, row in images if (mark := known.get(row["key"]))}
        return JSONResponse(answer)

    async def post_mark(request: Request) -> Response:
        if not marks:
            raise Refused("marks are off; restart `eval serve` with --feedback FILE.jsonl", 403)
        web.require_json(request)
        fields = await web.json_body(request, MAX_JSON_BYTES)
        mark = await run_in_threadpool(mark_of, fields, index, fingerprints)
        await run_in_threadpool(marks.add, mark)
        return JSONResponse({"mark": mark.mark})

    def on_end() -> None:
        uploads.end()
        if marks:
            marks.close()

    async def get_thumbnail(request: Request) -> Response:
        number = request.path_params["number"]
        if not (number.isdecimal() and len(number) < 16 and int(number) < len(index)):
            raise Refused(f"no image {number:.20}; the index has {len(index)}", 404)
        # Tomorrow the same address may serve another index: only a URL with the version may be cached.
        versioned = request.query_params.get("v") == page_data["version"]
        cache = "public, max-age=31536000, immutable" if versioned else "no-store"
        return Response(
            index.thumbnail(int(number)), media_type="image/webp", headers={"cache-control": cache}
        )

    routes = [
        Route("/api/about", get_about),
        Route("/api/search", post_search, methods=["POST"]),
        Route("/api/mark", post_mark, methods=["POST"]),
        Route("/thumbnail/{number}", get_thumbnail),
    ]
    return web.application(PAGE, routes, host, is_private=bool(marks), on_end=on_end)
