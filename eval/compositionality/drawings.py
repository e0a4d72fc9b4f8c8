"""Drawings of shapes with known captions, for counting, binding and relations: a function of the seed."""

import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np
from PIL import Image, ImageDraw

from train.data.order import random_bits

COLORS = {
    "red": (214, 40, 40),
    "green": (34, 139, 34),
    "blue": (30, 80, 220),
    "yellow": (240, 200, 0),
    "purple": (128, 0, 160),
    "black": (0, 0, 0),
}
SHAPES = {"circle": 0, "square": 4, "triangle": 3}  # corners
NUMBERS = ("one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
RELATIONS = {"to the left of": (-1, 0), "to the right of": (1, 0), "above": (0, -1), "below": (0, 1)}
SIZE_PX, SUPERSAMPLING = 224, 4
GAP_PX = 5  # least distance of two shapes
TOTAL_AREA = 7000  # of all shapes of a drawing with a constant total area, in pixels
PAIR_AREA = 2000  # of each shape of a pair, in pixels


@dataclass(frozen=True)
class Shape:
    kind: str
    color: str
    area: float  # pixels
    x: float
    y: float

    @property
    def radius(self) -> float:
        """Of the circumscribed circle, pixels."""
        corners = SHAPES[self.kind]
        return math.sqrt(self.area / (corners / 2 * math.sin(2 * math.pi / corners) if corners else math.pi))


@dataclass(frozen=True)
class Pair:
    """Two scenes and their captions; captions[i] is correct for scenes[i] and wrong for the other."""

    scenes: list[list[Shape]]
    captions: list[str]
    kind: str  # "binding" or one of RELATIONS


@dataclass(frozen=True)
class Count:
    """A scene for counting; `constant` is "total area" or "shape area"."""

    scene: list[Shape]
    n: int
    constant: str

    @property
    def captions(self) -> list[str]:
        """One caption for each of NUMBERS."""
        kind = self.scene[0].kind
        return [f"{number} {kind}{'' if number == 'one' else 's'}" for number in NUMBERS]


def render(scene: list[Shape]) -> Image.Image:
    """RGB, SIZE_PX x SIZE_PX, on white."""
    image = Image.new("RGB", (SIZE_PX * SUPERSAMPLING, SIZE_PX * SUPERSAMPLING), "white")
    pen = ImageDraw.Draw(image)
    for shape in scene:
        x, y, radius, corners = (
            shape.x * SUPERSAMPLING,
            shape.y * SUPERSAMPLING,
            shape.radius * SUPERSAMPLING,
            SHAPES[shape.kind],
        )
        turn = math.pi / 4 if corners == 4 else -math.pi / 2  # squares are upright, triangles point up
        if corners:
            angles = (turn + 2 * math.pi * corner / corners for corner in range(corners))
            pen.polygon(
                [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles],
                fill=COLORS[shape.color],
            )
        else:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[shape.color])
    return image.reduce(SUPERSAMPLING)


def _uniform(*entropy: int) -> Iterator[float]:
    """An infinite stream of floats in [0, 1), a function of `entropy` alone."""
    block = 0
    while True:
        yield from (random_bits(64, *entropy, block) >> np.uint64(11)) * 2.0**-53
        block += 1


def _pick(random: Iterator[float], items: Iterable[str]) -> str:
    return list(items)[int(next(random) * len(items))]


def _scatter(random: Iterator[float], n: int, radius: float) -> list[tuple[float, float]]:
    """n random places; circles of `radius` around them are at least GAP_PX apart."""
    edge = radius + GAP_PX
    while True:
        places: list[tuple[float, float]] = []
        for _ in range(200):  # tries, before all places are drawn again
            place = tuple(edge + next(random) * (SIZE_PX - 2 * edge) for _ in range(2))
            if all(math.dist(place, other) >= 2 * radius + GAP_PX for other in places):
                places.append(place)
            if len(places) == n:
                return places


def counting(n: int, seed: int) -> list[Count]:
    """n drawings for each number 1 to 10 and each thing that is constant, so 20 n; kind and color do not
    depend on the number.
    """
    drawings = []
    for constant in ("total area", "shape area"):
        is_total = constant == "total area"
        for index in range(n):
            kind, color = list(SHAPES)[index % len(SHAPES)], _pick(_uniform(seed, 0, index), COLORS)
            for count in range(1, 11):
                area = TOTAL_AREA / (count if is_total else 10)
                radius = Shape(kind, color, area, 0, 0).radius
                places = _scatter(_uniform(seed, 1, index, count, int(is_total)), count, radius)
                scene = [Shape(kind, color, area, *place) for place in places]
                drawings.append(Count(scene, count, constant))
    return drawings


def binding(n: int, seed: int) -> list[Pair]:
    """n pairs: two shapes in two colors, and the same shapes at the same places with the colors swapped."""
    pairs = []
    for index in range(n):
        random = _uniform(seed, 2, index)
        kinds, colors = _two(random, SHAPES), _two(random, COLORS)
        places = _scatter(random, 2, max(Shape(kind, "", PAIR_AREA, 0, 0).radius for kind in kinds))
        scenes, captions = [], []
        for a, b in (colors, colors[::-1]):
            scenes.append(
                [Shape(kinds[0], a, PAIR_AREA, *places[0]), Shape(kinds[1], b, PAIR_AREA, *places[1])]
            )
            captions.append(f"a {a} {kinds[0]} and a {b} {kinds[1]}")
        pairs.append(Pair(scenes, captions, "binding"))
    return pairs


def relations(n: int, seed: int) -> list[Pair]:
    """n pairs, the four relations in turn: two shapes in one color, and the same with places swapped."""
    pairs = []
    for index in range(n):
        random = _uniform(seed, 3, index)
        kinds, color = _two(random, SHAPES), _pick(random, COLORS)
        relation, (dx, dy) = list(RELATIONS.items())[index % len(RELATIONS)]
        apart = 40 + 12 * next(random)  # of each from the middle, pixels
        margin = GAP_PX + max(Shape(kind, color, PAIR_AREA, 0, 0).radius for kind in kinds)
        x, y = (SIZE_PX / 2 + (2 * next(random) - 1) * (SIZE_PX / 2 - apart - margin) for _ in range(2))
        places = [(x + sign * apart * dx, y + sign * apart * dy) for sign in (1, -1)]
        scenes = [
            [Shape(kind, color, PAIR_AREA, *place) for kind, place in zip(kinds, order, strict=True)]
            for order in (places, places[::-1])
        ]
        pairs.append(Pair(scenes, [f"a {a} {relation} a {b}" for a, b in (kinds, kinds[::-1])], relation))
    return pairs


def _two(random: Iterator[float], items: Iterable[str]) -> tuple[str, str]:
    """Two different items."""
    first = _pick(random, items)
    return first, _pick(random, [item for item in items if item != first])
