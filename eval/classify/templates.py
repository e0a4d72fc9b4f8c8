"""What classes are called, and what is said around their names: open_clip's lists for photographs, some for
other pictures, or files.
"""

import difflib
import json
from collections.abc import Callable
from pathlib import Path

import open_clip

from data_prep.errors import UserError

DOMAINS = {
    "plain": ["{}"],
    "icons": [
        "{}",
        "{} icon",
        "an icon of {}",
        "a pictogram of {}",
        "a user interface icon for {}",
        "a black icon of {} on white",
    ],
    "products": [
        "{}",
        "a product photo of {}",
        "{} on a white background",
        "{}, as shown in a catalogue",
        "a photo of {} for sale",
    ],
    "cars": ["a photo of a {}.", "a photo of the {}.", "a photo of my {}.", "a parked {}.", "the {}, a car."],
}


def read_templates(templates: str) -> list[Callable[[str], str]]:
    """Functions from a class name to a sentence.

    Args:
        templates: openai (80, those of Radford et al. 2021 for ImageNet), simple (7 of them), plain, icons,
            products, cars, or a text file with a line for each, in which {} stands for the name.

    Raises:
        UserError: it is none of them, or a line lacks {}.
    """
    if templates in ("openai", "simple"):
        return list(
            open_clip.OPENAI_IMAGENET_TEMPLATES
            if templates == "openai"
            else open_clip.SIMPLE_IMAGENET_TEMPLATES
        )
    if templates in DOMAINS:
        return [_filler(line) for line in DOMAINS[templates]]
    choice = ["openai", "simple", *DOMAINS]
    if not Path(templates).is_file():
        near = difflib.get_close_matches(templates, choice, n=1)
        raise UserError(
            f"--templates {templates}: no such file or list; {f'perhaps {near[0]}, ' if near else ''}one of"
            f" {', '.join(choice)}"
        )
    lines = read_lines(Path(templates))
    for number, line in lines:
        if "{}" not in line:
            raise UserError(
                f"{templates}:{number}: {line!r} has no {{}}; write {{}} where the class name belongs"
            )
    return [_filler(line) for _, line in lines]


def _filler(line: str) -> Callable[[str], str]:
    return lambda name: line.replace("{}", name)


def read_lines(path: Path) -> list[tuple[int, str]]:
    """The lines that are not empty, with their numbers.

    Raises:
        UserError: it cannot be read, or is empty.
    """
    try:
        lines = [
            (number, line.strip())
            for number, line in enumerate(path.read_text(encoding="utf-8-sig").splitlines(), 1)
            if line.strip()
        ]
    except (OSError, UnicodeError) as error:
        raise UserError(
            f"{path}: cannot be read as text in UTF-8 ({error}); write one entry per line"
        ) from None
    if not lines:
        raise UserError(f"{path}: empty; write one entry per line")
    return lines


def read_names(names: str, classes: list[str]) -> list[str]:
    """A name for each class; see --names. Underscores of the data's own names become spaces.

    Raises:
        UserError: the file does not fit the classes.
    """
    if not names:
        return [name.replace("_", " ") for name in classes]
    if names == "imagenet":
        titles = list(open_clip.IMAGENET_CLASSNAMES)
    elif names.endswith(".json"):
        given = read_map(Path(names))
        if missing := [name for name in classes if name not in given]:
            raise UserError(
                f"{names}: no name for {len(missing)} of {len(classes)} classes, as {missing[0]!r}; add them"
            )
        titles = [given[name] for name in classes]
    else:
        titles = [line for _, line in read_lines(Path(names))]
    if len(titles) != len(classes):
        raise UserError(
            f"--names {names}: {len(titles)} names for {len(classes)} classes; one for each, in their order,"
            " is wanted"
        )
    return titles


def read_map(path: Path) -> dict[str, str]:
    try:
        given = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); an object of texts is wanted") from None
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise UserError(f'{path}: not an object of texts; one like {{"siamese": "cat"}} is wanted')
    return given
