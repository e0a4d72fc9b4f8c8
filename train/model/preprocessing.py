"""The preprocessing that a file of weights was trained with: what is beside it says so, or its tags agree.

FILE@NAME      that of a tag of the architecture, of openai or siglip, or of a JSON file: the user says it
FILE           open_clip_config.json beside it
               params.txt of open_clip_train, beside checkpoints/
               that of all tags of the architecture, if they have the same
               else the question, with the answers
"""

import ast
import dataclasses
import json
import math
from dataclasses import dataclass
from pathlib import Path

import open_clip
from open_clip.model import CLIPTextCfg, CLIPVisionCfg
from open_clip.transform import PreprocessCfg

from data_prep.errors import UserError
from data_prep.strict_json import load_json, problem_of
from train.model.foreign import MAX_CONFIG_BYTES, check_preprocessing

CONFIG_FILE = "open_clip_config.json"
KEYS = ("mean", "std", "interpolation", "resize_mode")
DEFAULTS = {key: dataclasses.asdict(PreprocessCfg())[key] for key in KEYS}
NAMED = {
    "openai": DEFAULTS,
    "siglip": {"mean": (0.5,) * 3, "std": (0.5,) * 3, "interpolation": "bicubic", "resize_mode": "squash"},
}
# Settings that change no feature: where a tokenizer or a tower was downloaded from.
NEUTRAL = ("hf_tokenizer_name", "hf_model_name", "hf_model_pretrained", "timm_model_pretrained")


@dataclass(frozen=True)
class Preprocessing:
    """mean, std, interpolation, resize_mode, background where it is known; and where they are from."""

    config: dict
    source: str

    def __str__(self) -> str:
        mean, std = (", ".join(f"{value:.4g}" for value in self.config[key]) for key in ("mean", "std"))
        words = f"mean {mean}; std {std}; {self.config['interpolation']}; {self.config['resize_mode']}"
        return f"{words}; background {self.config['background']}" if "background" in self.config else words


def split_name(pretrained: str) -> tuple[Path, str] | None:
    """FILE or FILE@NAME as the file and the name ("" without one); None if there is no such file."""
    if Path(pretrained).is_file():
        return Path(pretrained), ""
    file, at, name = pretrained.rpartition("@")
    return (Path(file), name) if at and Path(file).is_file() else None


def preprocessing_of(architecture: str, file: Path, name: str = "") -> Preprocessing:
    """The preprocessing of a file of weights.

    Args:
        name: what the user wrote after @, "" for nothing.

    Raises:
        UserError: it is not known, or what is beside the file says that it is of another architecture.
    """
    if name:
        return _named(architecture, file, name)
    if (beside := file.parent / CONFIG_FILE).is_file():
        return _of_config(architecture, file, beside)
    for params in (file.parent / "params.txt", file.parent.parent / "params.txt"):
        if params.is_file() and (found := _of_params(architecture, file, params)):
            return found
    tags = _tags(architecture)
    if tags and all(config == next(iter(tags.values())) for config in tags.values()):
        return Preprocessing(next(iter(tags.values())), f"as all published weights of {architecture} have it")
    raise _question(architecture, file, tags)


def _named(architecture: str, file: Path, name: str) -> Preprocessing:
    tags = _tags(architecture)
    if name in tags:
        return Preprocessing(tags[name], f"of {architecture}:{name}")
    if name in open_clip.list_pretrained_tags_by_model(architecture):
        other = other_activation(architecture)
        raise UserError(f"{file}@{name}: {name} has another activation; use {other}:{file}@{name}")
    if name in NAMED:
        return Preprocessing(NAMED[name], f"of {name}")
    if name.endswith(".json") and Path(name).is_file():
        return Preprocessing(_read(Path(name)), f"of {name}")
    raise _question(architecture, file, tags, f"there is no preprocessing {name!r}")


def _question(architecture: str, file: Path, tags: dict[str, dict], problem: str = "") -> UserError:
    why = (
        f"the published weights of {architecture} differ in it" if tags else "there are no published weights"
    )
    problem = problem or f"its preprocessing is not known: no {CONFIG_FILE} is beside it, and {why}"
    choices = {**NAMED, **tags}
    distinct: dict[str, list[str]] = {}
    for name, config in choices.items():
        distinct.setdefault(str(Preprocessing(config, "")), []).append(name)
    answers = "; ".join(f"@{names[-1]} ({config})" for config, names in distinct.items())
    return UserError(
        f"{architecture}:{file}: {problem}; write what it was trained with after the file, as"
        f" {architecture}:{file}@NAME, with NAME a tag or a JSON file such as {CONFIG_FILE}: {answers}"
    )


def _tags(architecture: str) -> dict[str, dict]:
    """The preprocessing of the published weights that have the architecture's activation, by their tags."""
    quick = bool((open_clip.get_model_config(architecture) or {}).get("quick_gelu"))
    tags = {
        tag: open_clip.get_pretrained_cfg(architecture, tag)
        for tag in open_clip.list_pretrained_tags_by_model(architecture)
    }
    return {
        tag: {key: config.get(key, DEFAULTS[key]) for key in KEYS}
        for tag, config in tags.items()
        if bool(config.get("quick_gelu")) == quick
    }


def _read(path: Path) -> dict:
    """preprocess_cfg of an open_clip_config.json, or a JSON file that holds it alone."""
    try:
        content = load_json(path, dict, MAX_CONFIG_BYTES, is_ours=False)
        config = content.get("preprocess_cfg", content)
        read = {key: config.get(key) or DEFAULTS[key] for key in KEYS}
        for key in ("mean", "std"):
            read[key] = [float(value) for value in read[key]]
            assert len(read[key]) == 3
            assert all(map(math.isfinite, read[key]))
    except (OSError, ValueError, TypeError, AttributeError, AssertionError, OverflowError):
        raise UserError(
            f'{path}: holds no preprocessing; it must be JSON such as {{"mean": [0.5, 0.5, 0.5], "std": [0.5,'
            ' 0.5, 0.5], "interpolation": "bicubic", "resize_mode": "shortest"}'
        ) from None
    check_preprocessing(path, read)
    return read | ({"background": config["background"]} if "background" in config else {})


def _of_config(architecture: str, file: Path, beside: Path) -> Preprocessing:
    preprocessing = Preprocessing(_read(beside), f"of {beside}")
    model_cfg = load_json(beside, dict, MAX_CONFIG_BYTES, is_ours=False).get("model_cfg")
    if model_cfg and (
        problem := problem_of(model_cfg, {"vision_cfg?": dict, "text_cfg?": dict}, "model_cfg")
    ):
        raise UserError(f"{beside}: {problem}; restore it, or write the preprocessing after the file: @NAME")
    differences = _differences(model_cfg, open_clip.get_model_config(architecture)) if model_cfg else []
    if differences:
        raise UserError(
            f"{architecture}:{file}: {beside} says {differences[0][0]}, {architecture} has"
            f" {differences[0][1]}; use local-dir:{file.parent}"
            + (f", or {other_activation(architecture)}:{file}" if "quick_gelu" in differences[0][0] else "")
        )
    return preprocessing


def _differences(one: dict, two: dict) -> list[tuple[str, str]]:
    """Settings in which two model_cfg differ, as ("quick_gelu true", "quick_gelu false")."""
    flat = [_flat(config) for config in (one, two)]
    return [
        (f"{key} = {flat[0].get(key)}", f"{flat[1].get(key)}")
        for key in sorted(flat[0] | flat[1])
        if flat[0].get(key) != flat[1].get(key) and key.rpartition(".")[2] not in NEUTRAL
    ]


def _flat(config: dict) -> dict[str, str]:
    """A model_cfg with open_clip's defaults, in one level; values as JSON."""
    towers = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg}
    flat = {"quick_gelu": "false"}
    for key, value in config.items():
        settings = {key: value}
        if key in towers:
            defaults = dataclasses.asdict(towers[key]())
            settings = {f"{key}.{name}": setting for name, setting in {**defaults, **value}.items()}
        flat |= {name: json.dumps(setting) for name, setting in settings.items() if setting is not None}
    return {name: value for name, value in flat.items() if name != "custom_text" or value != "false"}


def _of_params(architecture: str, file: Path, params: Path) -> Preprocessing | None:
    """What open_clip_train was started with; None if it took the preprocessing of a folder or of the hub."""
    lines = params.read_text(encoding="utf-8", errors="replace").splitlines()
    values = {name: value for name, colon, value in (line.partition(": ") for line in lines) if colon}
    model, tag = values.get("model", "").replace("/", "-"), values.get("pretrained", "")
    if "image_mean" not in values or ":" in model:
        return None
    quick = bool((open_clip.get_model_config(model) or {}).get("quick_gelu"))
    if values.get("force_quick_gelu") == "True" and not quick:
        model = other_activation(model)
    if model != architecture:
        raise UserError(f"{architecture}:{file}: {params} says that it is of {model}; use {model}:{file}")
    published = open_clip.get_pretrained_cfg(model, tag) if tag else None
    config = {key: (published or {}).get(key, DEFAULTS[key]) for key in KEYS}
    for key in KEYS:
        given = values.get(f"image_{key}", "None")
        if given != "None":
            config[key] = _tuple_of(given) if key in ("mean", "std") else given
    check_preprocessing(params, config)
    return Preprocessing(config, f"of {params}")


def _tuple_of(text: str) -> object:
    """What a Python literal says; the text itself where it is none, which no mean and std is."""
    try:
        return ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return text


def other_activation(architecture: str) -> str:
    plain = architecture.removesuffix("-quickgelu")
    return plain if plain != architecture else f"{architecture}-quickgelu"
