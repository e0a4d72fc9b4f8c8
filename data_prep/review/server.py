"""The page on which people look through a data set before it is trained on, and decide: drop this picture,
say that better.

Each decision is in the CSV before it is answered; `build --decisions` applies them. review.html is what a
browser gets."""

import io
import json
import threading
from collections.abc import Callable
from pathlib import Path

from PIL import Image, ImageOps
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from data_prep import web
from data_prep.build.decisions import KEY, WANTS, Decision, tidy
from data_prep.errors import UserError
from data_prep.images import DAMAGE, EXTENSIONS
from data_prep.review.decision_store import Book
from data_prep.review.gallery import Gallery
from data_prep.shards import read_manifest
from data_prep.web import Refused

PAGE = Path(__file__).with_name("page.html")
PAGE_GROUPS, PAGE_PICTURES, PAGE_DECISIONS = 48, 60, 100
MARKED = 100  # pictures of a group, at most, whose decisions are counted on its tile
SEARCH_S = 0.5  # of one request: the page asks on and says how far it is
MIN_PX, MAX_PX = 32, 1024
DECODING = threading.BoundedSemaphore(4)  # pictures in memory at their full size


class Review:
    """The routes of the page over one folder of shards."""

    def __init__(self, shards: Path, decisions: Path):
        manifest = read_manifest(shards)
        self.shards, self.max_pixels = shards, manifest["check"]["max_pixels"]
        self.splits = {
            name: Gallery(shards, name, entry["shards"])
            for name, entry in manifest["splits"].items()
            if entry["samples"]
        }
        if not self.splits:
            raise UserError(f"{shards}: no samples in any split; there is nothing to look at")
        self.book = Book(decisions)

    def routes(self) -> list[Route]:
        asked = {"about": self.about, "groups": self.groups, "group": self.group, "decisions": self.decisions}
        told = {"decide": self.decide, "take_back": self.take_back, "undo": self.undo}
        return [
            *(Route(f"/api/{name}", _answer(what)) for name, what in asked.items()),
            *(Route(f"/api/{name}", _do(what), methods=["POST"]) for name, what in told.items()),
            Route("/picture/{split}/{number:int}", self.picture),
        ]

    def about(self, _: Request) -> dict:
        """What there is, and how far the indexes have been read."""
        splits = {}
        for name, gallery in self.splits.items():
            known = gallery.groups()
            splits[name] = {
                "pictures": len(gallery),
                "looked_at": known.looked_at,
                "groups": len(known.listed(False, 1)),
            }
        return {"shards": str(self.shards), "splits": splits, **self.book.state()}

    def groups(self, request: Request) -> dict:
        """A page of groups. Those that hold a text are looked for as long as a request may take; `next` is
        where to go on.
        """
        gallery, asked = self._gallery(request.query_params.get("split")), request.query_params
        at, least, text = (
            _number(asked, "at"),
            _number(asked, "least"),
            " ".join(asked.get("text", "").split()),
        )
        known = gallery.groups()
        if KEY.fullmatch(text.lower()):
            tiles = self._tiles_of(text.lower())
            return {
                "groups": tiles,
                "next": None,
                "of": len(tiles),
                "looked_at": sum(len(each) for each in self.splits.values()),
            }
        if not text and asked.get("several") != "1":
            listed = known.listed(asked.get("sort") == "size", least)
            tiles = [self._tile(gallery, int(group)) for group in listed[at : at + PAGE_GROUPS]]
            more = at + PAGE_GROUPS if at + PAGE_GROUPS < len(listed) else None
            return {"groups": tiles, "next": more, "of": len(listed), "looked_at": known.looked_at}
        found: dict[int, int] = {}
        for end, group in gallery.search(text, asked.get("several") == "1", at, SEARCH_S):
            at = end
            if group is not None and len(known.members(group)) >= least:
                found.setdefault(group, at - 1)
            if len(found) == PAGE_GROUPS:
                break
        tiles = [self._tile(gallery, group, number) for group, number in found.items()]
        return {"groups": tiles, "next": at if at < len(gallery) else None, "of": None, "looked_at": at}

    def _tile(self, gallery: Gallery, group: int, number: int | None = None) -> dict:
        """A group by one of its pictures, by default the first, and how many of them were decided about."""
        members = gallery.groups().members(group)
        number = int(members[0]) if number is None else number
        decided = [self.book.of(gallery.key(each)) for each in members[:MARKED]]
        dropped = sum(any(each.action == "drop" for each in one) for one in decided)
        tile = {"split": gallery.split, "group": group, "pictures": max(1, len(members)), "number": number}
        meta = gallery.meta(number)
        counts = {"dropped": dropped, "changed": sum(map(bool, decided)) - dropped}
        return {**tile, **counts, "image": meta["image"], "captions": meta["captions"][:2]}

    def _tiles_of(self, key: str) -> list[dict]:
        """The group of the picture with this key, by that picture; none where it was not met."""
        found = [(each, number) for each in self.splits.values() if (number := each.find(key)) is not None]
        return [self._tile(each, each.meta(number)["group_number"], number) for each, number in found]

    def group(self, request: Request) -> dict:
        """A page of a group's pictures, each with all of its captions and what was decided."""
        gallery = self._gallery(request.query_params.get("split"))
        at, group = _number(request.query_params, "at"), _number(request.query_params, "group")
        known = gallery.groups()
        members = known.members(group)
        shown = [self._picture(gallery, int(number)) for number in members[at : at + PAGE_PICTURES]]
        complete = known.looked_at == len(gallery)
        more = at + PAGE_PICTURES if at + PAGE_PICTURES < len(members) else None
        return {
            "pictures": shown,
            "next": more,
            "of": len(members),
            "complete": complete,
            "looked_at": known.looked_at,
        }

    def _picture(self, gallery: Gallery, number: int) -> dict:
        meta = gallery.meta(number)
        decided = self.book.of(meta["key"])
        changed = {each.caption: each.new_caption for each in decided if each.action in ("edit", "remove")}
        return {
            "split": gallery.split,
            "number": number,
            **{name: meta.get(name) for name in ("key", "image", "width", "height", "group", "columns")},
            "dropped": any(each.action == "drop" for each in decided),
            "captions": [
                {"caption": each, "new": changed.get(each)} for each in meta["captions"]
            ],  # "" is removed, None as it was
            "added": [each.new_caption for each in decided if each.action == "add"],
        }

    def decisions(self, request: Request) -> dict:
        """The decisions, the latest first."""
        at = _number(request.query_params, "at")
        latest = [each._asdict() for each in self.book.latest(at, PAGE_DECISIONS)]
        state = self.book.state()
        return {
            "latest": latest,
            "next": at + PAGE_DECISIONS if at + PAGE_DECISIONS < state["decisions"] else None,
            **state,
        }

    def decide(self, told: dict) -> dict:
        """Decide about a picture of a split by its number; its key must be that which the page shows."""
        gallery, number = self._gallery(told.get("split")), told.get("number")
        if not isinstance(number, int) or not 0 <= number < len(gallery):
            raise Refused(f"{gallery.split} has no picture {number!r}", 404)
        meta = gallery.meta(number)
        if told.get("key") != meta["key"]:
            raise Refused("the shards are not those that this page shows; load it again", 409)
        decision = _decision({**told, "image": meta["image"]})
        if decision.caption and decision.caption not in meta["captions"]:
            raise Refused(f"this picture has no caption {decision.caption!r}")
        if decision.new_caption and decision.new_caption in {decision.caption, *self._captions(meta)}:
            raise Refused(f"this picture has the caption {decision.new_caption!r} already")
        self.book.decide(decision)
        return {"picture": self._picture(gallery, number), **self.book.state()}

    def _captions(self, meta: dict) -> set[str]:
        """What a picture's captions are by now."""
        decided = self.book.of(meta["key"])
        gone = {each.caption for each in decided if each.caption}
        return {each for each in meta["captions"] if each not in gone} | {
            each.new_caption for each in decided if each.new_caption
        }

    def take_back(self, told: dict) -> dict:
        decision = _decision(told)
        self.book.take_back(decision.about)
        return {"tiles": self._tiles_of(decision.key), **self.book.state()}

    def undo(self, _: dict) -> dict:
        return {"tiles": self._tiles_of(self.book.undo()), **self.book.state()}

    def picture(self, request: Request) -> Response:
        """A picture as WebP of at most `px` pixels on its longer side, exact where it is not larger."""
        gallery, number = self._gallery(request.path_params["split"]), request.path_params["number"]
        if not 0 <= number < len(gallery):
            raise Refused(f"{gallery.split} has no picture {number}", 404)
        px = min(MAX_PX, max(MIN_PX, _number(request.query_params, "px")))
        with DECODING:
            data = webp(gallery.image(number), px, self.max_pixels)
        return Response(data, media_type="image/webp", headers={"cache-control": "private, max-age=600"})

    def _gallery(self, split: str | None) -> Gallery:
        if split not in self.splits:
            raise Refused(f"there is no split {split!r}; there are {', '.join(self.splits)}", 404)
        return self.splits[split]


def app(shards: Path, decisions: Path, host: str = web.LOOPBACK[0]) -> Starlette:
    """The page over `shards`, which writes to the file `decisions`."""
    return web.application(PAGE, Review(shards, decisions).routes(), host)


def webp(data: bytes, px: int, max_pixels: int) -> bytes:
    """A stored picture for the page.

    Raises:
        Refused: it cannot be decoded, as may be where shards were built with --trust.
    """
    try:
        image = Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS))
        if image.width * image.height > max_pixels:
            raise Refused("this picture has too many pixels to be shown", 404)
        is_larger = max(image.size) > px
        image.draft("RGB", (px, px))
        image.thumbnail((px, px))
        image = ImageOps.exif_transpose(image)
        buffer = io.BytesIO()
        options = {"quality": 85, "method": 2} if is_larger else {"lossless": True, "method": 0}
        image.convert("RGBA" if image.has_transparency_data else "RGB").save(buffer, "WEBP", **options)
        return buffer.getvalue()
    except (Image.DecompressionBombError, *DAMAGE) as error:
        raise Refused(f"this picture cannot be decoded ({error})", 404) from None


def _decision(told: dict) -> Decision:
    cells = [told.get(name, "") for name in Decision._fields[:-1]]
    if not all(isinstance(cell, str) for cell in cells):
        raise Refused("text is wanted for each of a decision's cells")
    decision = tidy(*cells, "")
    if decision.action in WANTS and WANTS[decision.action][1] and not decision.new_caption:
        raise Refused("the caption is empty; to have none, remove it")
    if problem := decision.problem():
        raise Refused(problem)
    return decision


def _number(asked, name: str) -> int:
    text = asked.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise Refused(f"{name} is {text!r}; a number is wanted")
    return int(text)


def _answer(what: Callable[[Request], dict]) -> Callable:
    def answer(request: Request) -> Response:
        return JSONResponse(what(request))

    return answer


def _do(what: Callable[[dict], dict]) -> Callable:
    async def do(request: Request) -> Response:
        web.same_origin(request)
        try:
            told = json.loads(await web.body(request, 1 << 20))
        except ValueError:
            raise Refused("JSON is wanted") from None
        if not isinstance(told, dict):
            raise Refused("a JSON object is wanted")
        return JSONResponse(await run_in_threadpool(what, told))

    return do
