"""The page for people: a sentence or a picture finds pictures, by one model or by several side by side.

    text, picture, or the number of a picture -> features, by each index's model -> Nearest -> results, a list
    per index

The indexes are of one corpus: keys, columns and thumbnails are those of the first. eval/serve.html is what a
    browser gets.
"""

import asyncio
import hashlib
import json
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import numpy as np
import torch
import tyro
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from data_prep import web
from data_prep.errors import UserError
from data_prep.web import Refused
from eval.search.index import Index
from eval.search.nearest import Nearest
from eval.search.query import filter_rows, image_query, text_query
from train.model.clip import Clip, public_name

PAGE = Path(__file__).with_name("serve.html")
MAX_K, MAX_TEXT, MAX_FILTERS, MAX_JSON_BYTES = 100, 2000, 20, 1 << 20
TEXTS_KEPT, SEARCHES_AT_ONCE, EXAMPLES = 4096, 32, 4
NOTHING = "This index holds no pictures."


def serve(
    indexes: Annotated[tuple[Path, ...], tyro.conf.Positional],
    model: tuple[str, ...] = (),
    host: str = web.LOOPBACK[0],
    port: int = 8000,
    approximate: bool = False,
) -> None:
    """Search in a browser: sentences and pictures find pictures, with several models side by side.

    Args:
        indexes: Folders that `embed` wrote, each of the same data by another model; each gets a column of
            results.
        model: Where the models are now, one for each index; by default where they were when the indexes were
            made.
        host: Address to listen on; 0.0.0.0 lets in everybody who reaches this machine.
        port: 0 takes a free one.
        approximate: Search an inverted file, made on the first use; for more than a million pictures.
    """
    web.serve(app(open_columns(indexes, model, approximate), host), host, port, "search page")


class Column:
    """One index with its model: a column of results.

    Args:
        clip: None where the index is empty.
        forward: one thread in which models run, first come, first served; shared by all columns. So there is
            one forward at a time, which has all cores, one uploaded picture in memory at its full size, and
            one pool of torch's threads.
    """

    def __init__(
        self, index: Index, clip: Clip | None, forward: ThreadPoolExecutor, approximate: bool = False
    ):
        self.index, self.clip, self.forward, self.nearest = index, clip, forward, Nearest(index, approximate)
        if clip:
            clip.towers.eval()
        self._known: dict[str, torch.Tensor] = {}
        self._waiting: deque[str] = deque()
        if len(index):
            self.nearest.top(
                self.like(0), 1
            )  # what is made on the first use is made before threads ask for it

    def text(self, text: str) -> torch.Tensor:
        """text_features fp32 [1, d]. Texts that came while the model was busy go through it together; the
        latest are kept.
        """
        self._waiting.append(text)
        return self.forward.submit(self._text, text).result()

    def _text(self, text: str) -> torch.Tensor:
        texts = [*(self._waiting.popleft() for _ in range(len(self._waiting))), text]
        new = list(dict.fromkeys(each for each in texts if each not in self._known))
        if new:
            self._known |= zip(new, text_query(self.clip, new).split(1), strict=True)
        features = self._known[text] = self._known.pop(text)  # now the youngest
        while len(self._known) > TEXTS_KEPT:
            del self._known[next(iter(self._known))]
        return features

    def picture(self, data: bytes) -> torch.Tensor:
        """image_features fp32 [1, d] of a picture's file.

        Raises:
            UserError: it is none, is damaged, or has too many pixels.
        """
        return self.forward.submit(image_query, self.clip, data, "the picture").result()

    def like(self, number: int) -> torch.Tensor:
        """image_features fp32 [1, d] of a picture of the index."""
        return torch.from_numpy(self.index.features[[number]].astype(np.float32))


def open_columns(
    folders: Sequence[Path], models: Sequence[str] = (), approximate: bool = False
) -> list[Column]:
    """The indexes with their models; mistakes that cost nothing to find are found before a model is loaded.

    Raises:
        UserError: there is no index, one is of another corpus, or a model is not the one that made its index.
    """
    if not folders:
        raise UserError(
            "no INDEX given; make one with: python -m eval embed MODEL --data SHARDS --out INDEX, and serve"
            " that"
        )
    if models and len(models) != len(folders):
        raise UserError(
            f"--model names {len(models)} models for {len(folders)} indexes; one for each is wanted, in their"
            " order, or none"
        )
    indexes = [Index(folder) for folder in folders]
    for index in indexes[1:]:
        if not index.same_corpus(indexes[0]):
            raise UserError(
                f"{index.folder}: holds other pictures than {indexes[0].folder} ({len(index)} and"
                f" {len(indexes[0])}), so their results cannot stand side by side; embed the same --data with"
                " both models, or serve each on a --port of its own"
            )
    forward = ThreadPoolExecutor(1, thread_name_prefix="forward")
    clips = [
        index.model(name) if len(index) else None
        for index, name in zip(indexes, models or [""] * len(indexes), strict=True)
    ]
    return [Column(index, clip, forward, approximate) for index, clip in zip(indexes, clips, strict=True)]


@dataclass(frozen=True)
class Asked:
    """A search: one of text, picture and like is given."""

    text: str | None = None
    picture: bytes | None = None
    like: int | None = None
    k: int = 24
    filters: tuple[str, ...] = ()
    grouped: bool = True


def is_text(value) -> bool:
    return isinstance(value, str) and not any(
        0xD800 <= ord(sign) < 0xE000 for sign in value
    )  # half a sign: no UTF-8 has it


# name -> what holds of a good value, and what is wanted, in words
FIELDS: dict[str, tuple[Callable, str]] = {
    "text": (
        lambda value: is_text(value) and value.strip() and len(value) <= MAX_TEXT,
        f"a text of 1 to {MAX_TEXT} characters",
    ),
    "like": (lambda value: type(value) is int, "the number of a picture"),
    "k": (lambda value: type(value) is int and 1 <= value <= MAX_K, f"a whole number from 1 to {MAX_K}"),
    "filters": (
        lambda value: type(value) is list and len(value) <= MAX_FILTERS and all(map(is_text, value)),
        f"a list of at most {MAX_FILTERS} texts, each COLUMN=VALUE",
    ),
    "grouped": (lambda value: type(value) is bool, "true or false"),
}


def checked(given: dict, n: int, picture: bytes | None = None) -> Asked:
    """What was asked for, every field of it as it has to be.

    Raises:
        Refused: one is not; it is named.
    """
    if not n:
        raise Refused(NOTHING)
    for name, value in given.items():
        if name not in FIELDS:
            raise Refused(f"{name!r:.80}: no such field; there are {', '.join(FIELDS)}")
        good, wanted = FIELDS[name]
        if not good(value):
            raise Refused(f"{name}: {wanted} is wanted, not {json.dumps(value):.80}")
    if ("text" in given) + ("like" in given) + (picture is not None) != 1:
        raise Refused(
            "one thing to search for is wanted: text, like (the number of a picture), or a picture as the"
            " request's body"
        )
    if not 0 <= given.get("like", 0) < n:
        raise Refused(f"like: pictures are numbered from 0 to {n - 1}, there is no {given['like']}")
    return Asked(**{**given, "filters": tuple(given.get("filters", ()))}, picture=picture)


async def read(request: Request, n: int) -> Asked:
    """The search of a request: JSON, or a picture as the body with k, filter (any number of them) and grouped
    in the address.

    Raises:
        Refused: it is none.
    """
    if request.headers.get("content-type", "").partition(";")[0].strip().lower() == "application/json":
        try:
            given = json.loads(await web.body(request, MAX_JSON_BYTES))
        except (ValueError, RecursionError) as error:
            raise Refused(f"the request is not readable as JSON ({error!s:.80})") from None
        if not isinstance(given, dict):
            raise Refused(f"a JSON object is wanted, with text or like; not {json.dumps(given):.80}")
        return checked(given, n)
    given = dict(request.query_params.items())
    given.pop("filter", None)
    if filters := request.query_params.getlist("filter"):
        given["filters"] = filters
    if given.get("k", "").isdecimal() and len(given["k"]) < 10:
        given["k"] = int(given["k"])
    given["grouped"] = {"true": True, "false": False}.get(given.get("grouped", "true"), given.get("grouped"))
    return checked(given, n, await web.body(request))


def answer(columns: Sequence[Column], asked: Asked) -> dict:
    """What is found: {"searched": pictures that may be found, "results": per index a list of hits,
    "pictures": number -> row}.

    A hit has "number", "score" (cosine) and "variants" (eval.search.nearest.Hit). To `like`, the picture
    itself is no answer, and where variants are grouped none of its group is.

    Raises:
        UserError: a filter of no column, or no picture was sent.
    """
    first = columns[0].index
    rows = filter_rows(first, asked.filters)
    if asked.like is not None:
        other = np.arange(len(first)) != asked.like
        if asked.grouped:
            other = first.group_of != first.group_of[asked.like]
        rows = other if rows is None else rows & other
    found = []
    for column in columns:
        if asked.text is not None:
            features = column.text(asked.text)
        else:
            features = column.like(asked.like) if asked.picture is None else column.picture(asked.picture)
        found.append(column.nearest.top(features, asked.k, rows, asked.grouped)[0])
    numbers = sorted({hit.number for hits in found for hit in hits} | ({asked.like} - {None}))
    return {
        "searched": len(first) if rows is None else int(rows.sum()),
        "results": [[hit._asdict() for hit in hits] for hits in found],
        "pictures": {row["number"]: row for row in first.rows(numbers)},
    }


def about(columns: Sequence[Column]) -> dict:
    """What the page shows before anything was asked: the models, what can be filtered by, captions to try,
    and the limits.
    """
    first = columns[0].index
    rows = first.rows(np.linspace(0, len(first) - 1, min(len(first), EXAMPLES)).astype(int).tolist())
    return {
        "n": len(first),
        "said": "" if len(first) else NOTHING,
        "indexes": [
            {"name": column.index.name, "model": public_name(column.index.manifest["model"])}
            for column in columns
        ],
        "filters": first.choices(),
        "examples": list(dict.fromkeys(row["captions"][0] for row in rows if row["captions"])),
        "version": hashlib.sha256(json.dumps(first.manifest, sort_keys=True).encode()).hexdigest()[:16],
        "most": {"k": MAX_K, "text": MAX_TEXT, "bytes": web.MAX_BODY_BYTES},
    }


def app(columns: Sequence[Column], host: str = web.LOOPBACK[0]) -> Starlette:
    """The page and its API: GET /api/about, POST /api/search, GET /thumbnail/N?v=VERSION.

    Searches wait for the model in threads of their own, so that thumbnails never wait behind them.
    """
    index, known = columns[0].index, about(columns)
    threads = ThreadPoolExecutor(SEARCHES_AT_ONCE, thread_name_prefix="search")

    async def tell(_: Request) -> Response:
        return JSONResponse(known, headers={"cache-control": "no-store"})

    async def search(request: Request) -> Response:
        asked = await read(request, len(index))
        return JSONResponse(await asyncio.get_running_loop().run_in_executor(threads, answer, columns, asked))

    async def thumbnail(request: Request) -> Response:
        number = request.path_params["number"]
        if not (number.isdecimal() and len(number) < 16 and int(number) < len(index)):
            raise Refused(f"no picture {number:.20}; there are {len(index)}", 404)
        # The same address may show another index tomorrow: only one that names its version is kept.
        kept = (
            "public, max-age=31536000, immutable"
            if request.query_params.get("v") == known["version"]
            else "no-store"
        )
        return Response(
            index.thumbnail(int(number)), media_type="image/webp", headers={"cache-control": kept}
        )

    routes = [
        Route("/api/about", tell),
        Route("/api/search", search, methods=["POST"]),
        Route("/thumbnail/{number}", thumbnail),
    ]
    return web.application(PAGE, routes, host)
