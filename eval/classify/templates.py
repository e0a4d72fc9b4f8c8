"""Class names and sentences around them: open_clip's templates, some for other domains, or files."""

import difflib
from collections.abc import Callable
from pathlib import Path

import open_clip

from data_prep.errors import UserError
from data_prep.strict_json import parse_json

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
            products, cars, or a text file with a template per line, where {} is replaced by the name.

    Raises:
        UserError: It is none of these, or a line has no {}.
    """
    if templates == "openai":
        return list(open_clip.OPENAI_IMAGENET_TEMPLATES)
    if templates == "simple":
        return list(open_clip.SIMPLE_IMAGENET_TEMPLATES)
    if templates in DOMAINS:
        return [_filler(line) for line in DOMAINS[templates]]
    if not Path(templates).is_file():
        choices = ["openai", "simple", *DOMAINS]
        near = difflib.get_close_matches(templates, choices, n=1)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"--templates {templates}: no such file or list; {hint}It can be {', '.join(choices)}"
        )
    lines = read_lines(Path(templates))
    for number, line in lines:
        if "{}" not in line:
            raise UserError(
                f"{templates}:{number}: {line!r} has no {{}}; write {{}} in place of the class name"
            )
    return [_filler(line) for _, line in lines]


def _filler(line: str) -> Callable[[str], str]:
    return lambda name: line.replace("{}", name)


def read_lines(path: Path) -> list[tuple[int, str]]:
    """(line number, text) of the lines that are not empty.

    Raises:
        UserError: The file cannot be read, or is empty.
    """
    try:
        texts = path.read_text(encoding="utf-8-sig").splitlines()
    except (OSError, UnicodeError) as error:
        raise UserError(f"{path}: cannot be read as UTF-8 text ({error}); write one entry per line") from None
    lines = [(number, line.strip()) for number, line in enumerate(texts, 1) if line.strip()]
    if not lines:
        raise UserError(f"{path}: is empty; write one entry per line")
    return lines


def read_names(names: str, classes: list[str]) -> list[str]:
    """A name for each class, from the option --names; underscores in the data's own names become spaces.

    Raises:
        UserError: The names do not match the classes.
    """
    if not names:
        return [name.replace("_", " ") for name in classes]
    if names == "imagenet":
        class_names = list(open_clip.IMAGENET_CLASSNAMES)
    elif names.endswith(".json"):
        given = read_map(Path(names))
        if missing := [name for name in classes if name not in given]:
            raise UserError(
                f"{names}: {len(missing)} of {len(classes)} classes lack a name: {missing[0]!r}, ...; add it"
            )
        class_names = [given[name] for name in classes]
    else:
        class_names = [line for _, line in read_lines(Path(names))]
    if len(class_names) != len(classes):
        raise UserError(
            f"--names {names}: {len(class_names)} names for {len(classes)} classes; give one per class, in"
            " their order"
        )
    return class_names


def read_map(path: Path) -> dict[str, str]:
    """A JSON object of texts.

    Raises:
        UserError: The file is not one.
    """
    example = 'write an object of texts, such as {"siamese": "cat"}'
    try:
        given = parse_json(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError) as error:
        raise UserError(f"{path}: cannot be read as JSON ({error}); {example}") from None
    if not isinstance(given, dict) or not all(isinstance(value, str) for value in given.values()):
        raise UserError(f"{path}: not an object of texts; {example}")
    return given
