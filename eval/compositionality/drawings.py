"""Pictures of shapes whose captions are known: what counting, binding and relations are asked about. Drawn,
not downloaded.
"""

import math
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
SIZE, FINER, GAP = (
    224,
    4,
    5,
)  # of a picture in pixels; drawn this much larger first; least distance of two shapes
TOTAL_AREA, PAIR_AREA = (
    7000,
    2000,
)  # of all shapes in a picture that holds it constant, and of each of a pair, in pixels
# Words whose exchange says little; a swap goes over them.


@dataclass(frozen=True)
class Shape:
    kind: str
    color: str
    area: float  # pixels
    x: float
    y: float

    @property
    def radius(self) -> float:
        """Of the circle around it, pixels."""
        corners = SHAPES[self.kind]
        return math.sqrt(self.area / (corners / 2 * math.sin(2 * math.pi / corners) if corners else math.pi))


@dataclass(frozen=True)
class Pair:
    """Two scenes and their captions, by number: captions[i] is right for scenes[i] and wrong for the other."""

    scenes: list[list[Shape]]
    captions: list[str]
    kind: str  # "binding" or one of RELATIONS


@dataclass(frozen=True)
class Count:
    """A scene for counting; `held` is what is constant, "total area" or "shape area"."""

    scene: list[Shape]
    n: int
    held: str

    @property
    def captions(self) -> list[str]:
        """One caption for each of NUMBERS."""
        return [f"{number} {self.scene[0].kind}{'s' if at else ''}" for at, number in enumerate(NUMBERS)]


def render(scene: list[Shape]) -> Image.Image:
    """RGB, SIZE x SIZE, on white."""
    image = Image.new("RGB", (SIZE * FINER, SIZE * FINER), "white")
    pen = ImageDraw.Draw(image)
    for shape in scene:
        x, y, radius, corners = shape.x * FINER, shape.y * FINER, shape.radius * FINER, SHAPES[shape.kind]
        turn = math.pi / 4 if corners == 4 else -math.pi / 2  # squares lie flat, triangles point up
        if corners:
            angles = (turn + 2 * math.pi * at / corners for at in range(corners))
            pen.polygon(
                [(x + radius * math.cos(angle), y + radius * math.sin(angle)) for angle in angles],
                fill=COLORS[shape.color],
            )
        else:
            pen.ellipse((x - radius, y - radius, x + radius, y + radius), fill=COLORS[shape.color])
    return image.reduce(FINER)


def _uniform(*entropy: int):
    """Endless floats in [0, 1), a function of `entropy` alone."""
    block = 0
    while True:
        yield from (random_bits(64, *entropy, block) >> np.uint64(11)) * 2.0**-53
        block += 1


def _pick(random, items):
    return list(items)[int(next(random) * len(items))]


def _scatter(random, n: int, radius: float) -> list[tuple[float, float]]:
    """n places at random, no two circles of `radius` around them closer than GAP."""
    edge = radius + GAP
    while True:
        places: list[tuple[float, float]] = []
        for _ in range(200):
            place = tuple(edge + next(random) * (SIZE - 2 * edge) for _ in range(2))
            if all(math.dist(place, other) >= 2 * radius + GAP for other in places):
                places.append(place)
            if len(places) == n:
                return places


def counting(n: int, seed: int) -> list[Count]:
    """n pictures for each number 1 to 10 and each of the two things held, so 20 n; kinds and colors do not
    depend on the number.
    """
    pictures = []
    for held in ("total area", "shape area"):
        for at in range(n):
            random = _uniform(seed, 0, at)
            kind, color = list(SHAPES)[at % len(SHAPES)], _pick(random, COLORS)
            for count in range(1, 11):
                area = TOTAL_AREA / (count if held == "total area" else 10)
                radius = Shape(kind, color, area, 0, 0).radius
                places = _scatter(_uniform(seed, 1, at, count, int(held == "total area")), count, radius)
                pictures.append(Count([Shape(kind, color, area, *place) for place in places], count, held))
    return pictures


def binding(n: int, seed: int) -> list[Pair]:
    """n pairs: two shapes in two colors, and the same shapes at the same places with the colors swapped."""
    pairs = []
    for at in range(n):
        random = _uniform(seed, 2, at)
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
    """n pairs, the four relations in turn: two shapes in one color, and the same with their places swapped."""
    pairs = []
    for at in range(n):
        random = _uniform(seed, 3, at)
        kinds, color = _two(random, SHAPES), _pick(random, COLORS)
        relation, (dx, dy) = list(RELATIONS.items())[at % len(RELATIONS)]
        apart, margin = (
            40 + 12 * next(random),
            GAP + max(Shape(kind, color, PAIR_AREA, 0, 0).radius for kind in kinds),
        )
        x, y = (SIZE / 2 + (2 * next(random) - 1) * (SIZE / 2 - apart - margin) for _ in range(2))
        places = [(x + sign * apart * dx, y + sign * apart * dy) for sign in (1, -1)]
        scenes = [
            [Shape(kind, color, PAIR_AREA, *place) for kind, place in zip(kinds, order, strict=True)]
            for order in (places, places[::-1])
        ]
        pairs.append(Pair(scenes, [f"a {a} {relation} a {b}" for a, b in (kinds, kinds[::-1])], relation))
    return pairs


def _two(random, items) -> tuple[str, str]:
    first = _pick(random, items)
    return first, _pick(random, [item for item in items if item != first])
