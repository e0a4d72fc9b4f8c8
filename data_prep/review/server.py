"""The server of the review page: look through a data set before it is trained on, drop images, edit captions.

Each decision is in the CSV before the request is answered; `build --decisions` applies them. page.html is the
page itself.
"""

import io
import threading
from collections.abc import Callable, Mapping
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from data_prep import web
from data_prep.build.decisions import ACTIONS, KEY, Decision, normalized
from data_prep.errors import UserError
from data_prep.images import DAMAGE, EXTENSIONS, BadImage, Rules, check_parts
from data_prep.review.decision_store import DecisionStore
from data_prep.review.gallery import Gallery
from data_prep.shards import read_manifest
from data_prep.signatures import kind_of
from data_prep.suspects import Suspect
from data_prep.tables import are, counted
from data_prep.terminal import say
from data_prep.web import Refused

PAGE = Path(__file__).with_name("page.html")
PAGE_GROUPS, PAGE_IMAGES, PAGE_DECISIONS = 48, 60, 100
COUNTED_IMAGES = 100  # of a group, at most, whose decisions are counted on its tile
SEARCH_S = 0.5  # per request; the page then asks for the rest, and shows how far the search is
MIN_PX, MAX_PX = 32, 1024
DECODING = threading.BoundedSemaphore(4)  # images in memory at full size
MAX_JSON_BYTES = 1 << 20


class Review:
    """The routes of the page over one folder of shards."""

    def __init__(self, shards: Path, decisions: Path, suspects: dict[str, list[Suspect]]):
        manifest = read_manifest(shards)
        self.shards, self.max_pixels = shards, manifest.get("check", {}).get("max_pixels", Rules.max_pixels)
        self.splits = {
            name: Gallery(shards, name, entry["shards"])
            for name, entry in manifest["splits"].items()
            if entry["samples"]
        }
        if not self.splits:
            raise UserError(f"{shards}: no samples in any split, so there is nothing to review")
        self.suspects = self._known(suspects) if suspects else {}
        self.suspect_keys = list(self.suspects)
        self.store = DecisionStore(decisions)

    def _known(self, suspects: dict[str, list[Suspect]]) -> dict[str, list[Suspect]]:
        """Those of images that are in the shards.

        Raises:
            UserError: none is, or an index cannot be read.
        """
        numbers = np.array([int(key, 16) for key in suspects], np.uint64)
        is_here = np.zeros(len(numbers), bool)
        for gallery in self.splits.values():
            is_here |= np.isin(numbers, gallery.all_keys())
        listed, missing = counted(len(suspects), "image"), int((~is_here).sum())
        if missing == len(suspects):
            raise UserError(
                f"--suspects: none of its {listed} is in {self.shards}, so the list is of other shards;"
                " review those, or make a list of these: python -m eval suspects MODEL --data"
                f" {self.shards} --csv FILE"
            )
        if missing:
            left_out = f"{missing:,} {are(missing)} not in {self.shards}, and left out"
            say(f"--suspects: of its {listed}, {left_out}")
        return {key: rows for (key, rows), here in zip(suspects.items(), is_here, strict=True) if here}

    def routes(self) -> list[Route]:
        get = {"status": self.status, "groups": self.groups, "group": self.group, "decisions": self.decisions}
        post = {"decide": self.decide, "remove": self.remove, "undo": self.undo}
        return [
            *(Route(f"/api/{name}", _get(method)) for name, method in get.items()),
            *(Route(f"/api/{name}", _post(method), methods=["POST"]) for name, method in post.items()),
            Route("/image/{split}/{number:int}", self.image),
        ]

    def status(self, _: Request) -> dict:
        """The splits, how far their indexes have been read, and the state of the decisions."""
        splits = {}
        for name, gallery in self.splits.items():
            groups = gallery.groups()
            splits[name] = {
                "images": len(gallery),
                "n_read": groups.n_images,
                "groups": len(groups.listed(False, 1)),
            }
        return {
            "shards": str(self.shards),
            "splits": splits,
            "suspects": len(self.suspects),
            **self.store.state(),
        }

    def groups(self, request: Request) -> dict:
        """A page of groups: all, those that match a search, or that of one key.

        A search ends after SEARCH_S. `next` is where the following request starts; `total` is None for a
        search.
        """
        query = request.query_params
        gallery, start, min_images = (
            self._gallery(query.get("split")),
            _number(query, "start"),
            _number(query, "min_images"),
        )
        text, several = " ".join(query.get("text", "").split()), query.get("several") == "1"
        if KEY.fullmatch(text.lower()):
            tiles = self._tiles_of(text.lower())
            n_read = sum(len(gallery) for gallery in self.splits.values())
            return {"groups": tiles, "next": None, "total": len(tiles), "n_read": n_read}
        if text or several:
            return self._search(gallery, text, several, start, min_images)
        if query.get("sort") == "suspects":
            return self._suspects(gallery, start)
        groups = gallery.groups()
        listed = groups.listed(query.get("sort") == "size", min_images)
        end = start + PAGE_GROUPS
        return {
            "groups": [self._tile(gallery, int(group)) for group in listed[start:end]],
            "next": end if end < len(listed) else None,
            "total": len(listed),
            "n_read": groups.n_images,
        }

    def _suspects(self, gallery: Gallery, start: int) -> dict:
        """A page of the list of suspects: the groups of those images that are in this split."""
        end = start + PAGE_GROUPS
        numbers = [
            number for key in self.suspect_keys[start:end] if (number := gallery.find(key)) is not None
        ]
        return {
            "groups": [
                self._tile(gallery, gallery.meta(number)["group_number"], number) for number in numbers
            ],
            "next": end if end < len(self.suspect_keys) else None,
            "total": len(self.suspect_keys),
            "n_read": gallery.groups().n_images,
        }

    def _search(self, gallery: Gallery, text: str, several: bool, start: int, min_images: int) -> dict:
        groups, numbers, end = gallery.groups(), {}, start
        for end, group in gallery.search(text, several, start, SEARCH_S):
            if group is not None and len(groups.members(group)) >= min_images:
                numbers.setdefault(group, end - 1)
            if len(numbers) == PAGE_GROUPS:
                break
        return {
            "groups": [self._tile(gallery, group, number) for group, number in numbers.items()],
            "next": end if end < len(gallery) else None,
            "total": None,
            "n_read": end,
        }

    def _tile(self, gallery: Gallery, group: int, number: int | None = None) -> dict:
        """A group, shown by one of its images, and how many images have decisions.

        Args:
            number: of the image; by default the first.
        """
        members = gallery.groups().members(group)
        number = int(members[0]) if number is None else number
        decided = [self.store.of(gallery.key(member)) for member in members[:COUNTED_IMAGES]]
        dropped = sum(any(decision.action == "drop" for decision in of_image) for of_image in decided)
        meta = gallery.meta(number)
        return {
            "split": gallery.split,
            "group": group,
            "n_images": max(1, len(members)),
            "number": number,
            "dropped": dropped,
            "changed": sum(map(bool, decided)) - dropped,
            "image": meta["image"],
            "captions": meta["captions"][:2],
            "reason": next((suspect.reason for suspect in self.suspects.get(meta["key"], ())), ""),
        }

    def _tiles_of(self, key: str) -> list[dict]:
        """The group of the image with this key; empty if the image has not been read."""
        matches = [
            (gallery, number) for gallery in self.splits.values() if (number := gallery.find(key)) is not None
        ]
        return [
            self._tile(gallery, gallery.meta(number)["group_number"], number) for gallery, number in matches
        ]

    def group(self, request: Request) -> dict:
        """A page of a group's images, each with all captions and decisions."""
        gallery = self._gallery(request.query_params.get("split"))
        start, group = _number(request.query_params, "start"), _number(request.query_params, "group")
        groups = gallery.groups()
        members = groups.members(group)
        end = start + PAGE_IMAGES
        return {
            "images": [self._image(gallery, int(number)) for number in members[start:end]],
            "next": end if end < len(members) else None,
            "total": len(members),
            "complete": groups.n_images == len(gallery),
            "n_read": groups.n_images,
        }

    def _image(self, gallery: Gallery, number: int) -> dict:
        meta = gallery.meta(number)
        decisions = self.store.of(meta["key"])
        new_captions = {
            decision.caption: decision.new_caption
            for decision in decisions
            if decision.action in ("edit", "remove")
        }
        return {
            "split": gallery.split,
            "number": number,
            **{name: meta.get(name) for name in ("key", "image", "width", "height", "group", "columns")},
            "dropped": any(decision.action == "drop" for decision in decisions),
            # new: "" for a removed caption, None for an unchanged one
            "captions": [
                {"caption": caption, "new": new_captions.get(caption)} for caption in meta["captions"]
            ],
            "suspects": [suspect._asdict() for suspect in self.suspects.get(meta["key"], ())],
            "added": [decision.new_caption for decision in decisions if decision.action == "add"],
        }

    def decisions(self, request: Request) -> dict:
        """A page of decisions, the latest first."""
        start = _number(request.query_params, "start")
        latest = [decision._asdict() for decision in self.store.latest(start, PAGE_DECISIONS)]
        state, end = self.store.state(), start + PAGE_DECISIONS
        return {"latest": latest, "next": end if end < state["decisions"] else None, **state}

    def decide(self, payload: dict) -> dict:
        """Save a decision about an image, given by split and number; the key is compared with the shards'."""
        gallery, number = self._gallery(payload.get("split")), payload.get("number")
        if not isinstance(number, int) or not 0 <= number < len(gallery):
            raise Refused(f"{gallery.split} has no image {number!r}", 404)
        meta = gallery.meta(number)
        if payload.get("key") != meta["key"]:
            raise Refused("the shards have changed since this page was loaded; reload the page", 409)
        decision = _decision({**payload, "image": meta["image"]})
        if decision.caption and decision.caption not in meta["captions"]:
            raise Refused(f"this image has no caption {decision.caption!r}")
        if decision.new_caption and decision.new_caption in {decision.caption, *self._captions(meta)}:
            raise Refused(f"this image already has the caption {decision.new_caption!r}")
        self.store.decide(decision)
        return {"image": self._image(gallery, number), **self.store.state()}

    def _captions(self, meta: dict) -> set[str]:
        """The captions of an image after all decisions."""
        decisions = self.store.of(meta["key"])
        replaced = {decision.caption for decision in decisions if decision.caption}
        return {caption for caption in meta["captions"] if caption not in replaced} | {
            decision.new_caption for decision in decisions if decision.new_caption
        }

    def remove(self, payload: dict) -> dict:
        """Remove a decision."""
        decision = _decision(payload)
        self.store.remove(decision.subject)
        return {"tiles": self._tiles_of(decision.key), **self.store.state()}

    def undo(self, _: dict) -> dict:
        """Undo the last change since the server started."""
        return {"tiles": self._tiles_of(self.store.undo()), **self.store.state()}

    def image(self, request: Request) -> Response:
        """An image as WebP of at most `px` pixels on its longer side; lossless if it is not resized."""
        gallery, number = self._gallery(request.path_params["split"]), request.path_params["number"]
        if not 0 <= number < len(gallery):
            raise Refused(f"{gallery.split} has no image {number}", 404)
        px = min(MAX_PX, max(MIN_PX, _number(request.query_params, "px")))
        with DECODING:
            data = webp(gallery.image(number), px, self.max_pixels)
        return Response(data, media_type="image/webp", headers={"cache-control": "private, max-age=600"})

    def _gallery(self, split: str | None) -> Gallery:
        if not isinstance(split, str) or split not in self.splits:
            raise Refused(f"no split {split!r}; the splits are {', '.join(self.splits)}", 404)
        return self.splits[split]


def app(
    shards: Path,
    decisions: Path,
    host: str = web.LOOPBACK[0],
    suspects: dict[str, list[Suspect]] | None = None,
) -> Starlette:
    """The page over `shards`, which writes to the file `decisions`; with a list, its images are first."""
    review = Review(shards, decisions, suspects or {})
    return web.application(PAGE, review.routes(), host, is_private=True, on_end=review.store.close)


def webp(data: bytes, px: int, max_pixels: int) -> bytes:
    """A stored image as the page shows it.

    Raises:
        Refused: it cannot be decoded, which can happen if the shards were built with --skip-decode.
    """
    try:
        if kind := kind_of(data):
            check_parts(data, kind.name)
        image = Image.open(io.BytesIO(data), formats=tuple(EXTENSIONS))
        if image.width * image.height > max_pixels:
            raise Refused("this image has too many pixels to show", 404)
        is_larger = max(image.size) > px
        image.draft("RGB", (px, px))
        image.thumbnail((px, px))
        image = ImageOps.exif_transpose(image)
        buffer = io.BytesIO()
        options = {"quality": 85, "method": 2} if is_larger else {"lossless": True, "method": 0}
        image.convert("RGBA" if image.has_transparency_data else "RGB").save(buffer, "WEBP", **options)
        return buffer.getvalue()
    except (BadImage, Image.DecompressionBombError, *DAMAGE) as error:
        raise Refused(f"this image cannot be decoded ({error})", 404) from None


def _decision(payload: dict) -> Decision:
    cells = {name: payload.get(name, "") for name in Decision._fields if name != "note"}
    if not all(isinstance(cell, str) for cell in cells.values()):
        raise Refused(f"{', '.join(cells)} must be strings")
    decision = normalized(Decision(**cells))
    if decision.action in ACTIONS and ACTIONS[decision.action].new_caption and not decision.new_caption:
        raise Refused("the caption is empty; to have no caption, remove it")
    if problem := decision.problem():
        raise Refused(problem)
    return decision


def _number(query: Mapping[str, str], name: str) -> int:
    text = query.get(name, "0")
    if not (text.isascii() and text.isdigit() and len(text) < 16):
        raise Refused(f"{name} is {text!r}; it must be a number")
    return int(text)


def _get(method: Callable[[Request], dict]) -> Callable:
    def answer(request: Request) -> Response:
        return JSONResponse(method(request))

    return answer


def _post(method: Callable[[dict], dict]) -> Callable:
    async def answer(request: Request) -> Response:
        web.require_json(request)
        payload = await web.json_body(request, MAX_JSON_BYTES)
        return JSONResponse(await run_in_threadpool(method, payload))

    return answer
