"""How to use an exported folder, as text with code; and the very code, run on files.

use.md -> text for a place (a folder, or USER/NAME on the hub) -> its blocks of Python -> run on each file

A snippet must answer for a file as people have it (transparent, rotated) what it answers for the image that
training sees, stored as plain RGB.
"""

import json
import re
import tempfile
from pathlib import Path

import jinja2
import torch
from PIL import ImageColor

from data_prep.images import WHITE
from train.export.reference import File, max_difference
from train.model.preprocessing import CONFIG_FILE
from train.model.source import folder_options

TEMPLATE = Path(__file__).with_name("use.md")
FILE = '"image.png"'
LABELS = ["a bell", "a house"]
BOUND = 1e-5  # of probabilities and cosines: the pixels are equal, so the answers are


def use(record: dict, place: str) -> str:
    """How to load the model and open an image with each library, as Markdown.

    Args:
        record: the content of export.json, or as much of it as is known.
        place: a folder, or USER/NAME on the hub.
    """
    background = record.get("background", WHITE)
    environment = jinja2.Environment(undefined=jinja2.StrictUndefined)
    environment.filters["quoted"] = lambda text: json.dumps(text, ensure_ascii=False)
    template = environment.from_string(TEMPLATE.read_text(encoding="utf-8"))
    scheme = "local-dir" if Path(place).exists() else "hf-hub"
    model = f"{scheme}:{place}"
    text = template.render(
        place=place,
        open_clip=model,
        text_tower=bool(folder_options(model)),
        config=str(Path(place) / CONFIG_FILE),
        background="white" if background == WHITE else background,
        rgb=list(ImageColor.getrgb(background)),
        formats={file["format"] for file in record["files"].values()},
        half=record["dtype"] != "fp32",
    )
    return text.strip()


def blocks(text: str, language: str = "python") -> list[str]:
    """The code of the fenced blocks in a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", text, flags=re.MULTILINE | re.DOTALL)


def library_of(code: str) -> str:
    """The library that a block shows; "pipeline" for that of transformers."""
    if "pipeline(" in code:
        return "pipeline"
    return re.search(r"^(?:import|from) (open_clip|sentence_transformers|transformers)", code, re.MULTILINE)[
        1
    ]


def run(code: str, paths: list[Path]) -> list[torch.Tensor]:
    """What a block prints for each file, as float64 tensors.

    Everything before the first line that names "image.png" runs once: it loads the model.
    """
    lines = code.splitlines()
    first = next(number for number, line in enumerate(lines) if FILE in line)
    printed: list[object] = []
    names: dict[str, object] = {"print": printed.append}
    exec("\n".join(lines[:first]), names)
    for path in paths:
        exec("\n".join(lines[first:]).replace(FILE, repr(str(path))), names)
    return [_numbers(value) for value in printed]


def compare(text: str, files: list[File], expected: torch.Tensor) -> dict[str, dict[str, float]]:
    """Run each block of Python on files and on the images that training sees.

    Args:
        text: of use(), for a folder.
        expected: float [files, 2], the probabilities of the two captions of the blocks by the model itself.

    Returns:
        By library: `files`, the largest difference between a file and its image; and `open_clip`, that
        between the block's answer and `expected`, which has no bound where another library resizes.
    """
    result = {}
    with tempfile.TemporaryDirectory() as folder:
        paths = [Path(folder) / f"file-{number}" for number in range(len(files))]
        plain = [Path(folder) / f"plain-{number}.png" for number in range(len(files))]
        for file, path, image in zip(files, paths, plain, strict=True):
            path.write_bytes(file.data)
            file.image.save(image)
        for code in blocks(text):
            answers = run(code, [*paths, *plain])
            of_files, of_images = torch.stack(answers).split(len(files))
            result[library_of(code)] = {"files": max_difference(of_files, of_images)}
            if library_of(code) != "sentence_transformers":  # prints cosines
                result[library_of(code)]["probabilities"] = max_difference(of_files, expected)
    return result


def _numbers(value: object) -> torch.Tensor:
    """What a block printed: an array [1, 2], or the pipeline's answers, which are sorted by score."""
    if isinstance(value, list):
        value = [
            answer["score"] for answer in sorted(value, key=lambda answer: LABELS.index(answer["label"]))
        ]
    return torch.as_tensor(value).double().flatten()
