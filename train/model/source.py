"""What the name of a MODEL means: an architecture with a tag or file, a repository, a folder or a run."""

import difflib
import re
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from shlex import quote

import open_clip
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import EntryNotFoundError, LocalEntryNotFoundError

from data_prep.errors import UserError
from data_prep.images import WHITE
from train.model.foreign import check_folder, check_model_cfg, check_preprocessing, read_object
from train.model.preprocessing import CONFIG_FILE, KEYS, other_activation, preprocessing_of, split_name
from train.model.transformers_clip import FILES as TRANSFORMERS_FILES
from train.model.transformers_clip import is_transformers
from train.model.weights import architectures_of, clip_state, read_weights

MODELS = Path(__file__).parent / "configs"  # architectures of ours, in open_clip's format
WEIGHTS_FILE = "open_clip_model.safetensors"  # beside CONFIG_FILE
TEXT_CONFIG_FILE = "config.json"  # of a Hugging Face text tower
HERE = "."  # as hf_model_name: the tower is in the folder of the model
NOTATION = (
    "a MODEL is NAME:PRETRAINED (ViT-L-14:laion2b_s32b_b82k; ViT-B-32:none for random weights), NAME:FILE"
    " (weights of that architecture), hf-hub:ID, local-dir:PATH or a run folder"
)

open_clip.add_model_config(MODELS)


@dataclass(frozen=True)
class Source:
    """What a MODEL's name means.

    Attributes:
        identifier: for open_clip: an architecture, hf-hub:ID or local-dir:FOLDER.
        tag: of published weights.
        file: of weights, of the architecture `identifier`.
        preprocess: that of the tag or file; None where a folder has its own.
        folder: of transformers' CLIPModel.
        note: what was concluded about a file, to be said when it is loaded.
    """

    identifier: str
    tag: str | None = None
    file: Path | None = None
    preprocess: dict | None = None
    folder: Path | None = None
    note: str = ""

    @property
    def has_weights(self) -> bool:
        return bool(self.tag or self.file or self.folder or ":" in self.identifier)


def source_of(name: str) -> Source:
    """Find out what a MODEL's name means, without loading it.

    Raises:
        UserError: it is the name of no model.
    """
    scheme, _, place = name.partition(":")
    folder = Path(place if scheme == "local-dir" else name)
    if (folder / "recipe.yaml").is_file():
        return Source(f"local-dir:{_checkpoint_of_run(folder)}")
    if scheme == "local-dir" and is_transformers(folder):
        return Source(name, folder=folder)
    if scheme in ("local-dir", "hf-hub"):
        return Source(name)
    return _parse_name(name)


def check_models(names: Iterable[str]) -> None:
    """Refuse what is the name of no model, before the first of several is evaluated. Whether the hub has one,
    and whether its files are whole, is seen when it is loaded.

    Raises:
        UserError: see source_of(); or a folder is missing.
    """
    for name in names:
        scheme, _, place = source_of(name).identifier.partition(":")
        if scheme == "local-dir" and not Path(place).is_dir():
            raise UserError(f"{name}: there is no folder {place}; {advice(name)}")


def path_in(name: str) -> tuple[str, str, str] | None:
    """What is before, in and after the path of this machine in a MODEL's name; None without a path."""
    scheme, colon, rest = name.partition(":")
    if scheme == "local-dir":
        return f"{scheme}:", rest, ""
    if Path(name).is_dir():  # a run
        return "", name, ""
    if colon and scheme != "hf-hub" and (found := split_name(rest)):
        after = f"@{found[1]}" if found[1] else ""
        return f"{scheme}:", rest.removesuffix(after), after
    return None


def _parse_name(name: str) -> Source:
    """NAME:PRETRAINED, with the preprocessing of the tag or file."""
    architecture, colon, pretrained = name.partition(":")
    if architecture not in open_clip.list_models():
        raise UserError(f"{name}: {_no_architecture(architecture, name)}")
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not colon or not pretrained:
        choice = ", ".join(tags) or "none"
        raise UserError(
            f"{name}: names no weights; use {architecture}:none for random ones, {architecture}:FILE, or"
            f" {architecture}:TAG, with TAG one of {choice}"
        )
    if pretrained == "none":
        return Source(architecture)
    if found := split_name(pretrained):
        preprocessing = preprocessing_of(architecture, *found)
        activation = "QuickGELU" if open_clip.get_model_config(architecture).get("quick_gelu") else "GELU"
        note = f"{name}: {preprocessing} ({preprocessing.source}); activation of {architecture}: {activation}"
        return Source(architecture, file=found[0], preprocess=preprocessing.config, note=note)
    if pretrained not in tags:
        path = pretrained.rpartition("@")[0] or pretrained  # FILE@NAME
        file = f" and there is no file {path}" if "/" in path or "." in path else ""
        raise UserError(
            f"{name}: {architecture} has no weights {pretrained!r}{file}; it has {', '.join(tags) or 'none'}"
        )
    tag = open_clip.get_pretrained_cfg(architecture, pretrained)
    quick = bool(open_clip.get_model_config(architecture).get("quick_gelu"))
    if bool(tag.get("quick_gelu")) != quick:
        # open_clip only warns, and the features are wrong (open_clip#771).
        raise UserError(
            f"{name}: these weights were trained with another activation; use"
            f" {other_activation(architecture)}:{pretrained}"
        )
    return Source(architecture, pretrained, preprocess={key: tag[key] for key in KEYS if key in tag})


def _no_architecture(architecture: str, name: str) -> str:
    """What to use in place of a name that is no architecture of open_clip."""
    path = Path(name)
    if path.is_dir():
        known = (path / CONFIG_FILE).is_file() or is_transformers(path)
        return f"a folder; use local-dir:{name}" if known else f"a folder without a model; {NOTATION}"
    if path.is_file():
        fitting = architectures_of(clip_state(read_weights(path), path))
        names = " or ".join(f"{fit}:{name}" for fit in fitting[:3]) or f"NAME:{name}"
        return f"a file of weights; write their architecture before it: {names}"
    near = difflib.get_close_matches(architecture, open_clip.list_models(), n=1)
    return f"no model {architecture!r}; " + (f"did you mean {near[0]!r}? " if near else "") + NOTATION


def asks_hub(source: Source, weights: bool) -> bool:
    """Whether loading may ask the hub: for weights, or for what a Hugging Face text tower needs."""
    if source.identifier.startswith("hf-hub:") or (source.tag and weights):
        return True
    if source.identifier.startswith("local-dir:"):
        folder = Path(source.identifier.removeprefix("local-dir:"))
        if source.folder or not (folder / CONFIG_FILE).is_file() or folder_options(source.identifier):
            return False
        return "hf_model_name" in config_of(source.identifier)["model_cfg"]["text_cfg"]
    text = open_clip.get_model_config(source.identifier)["text_cfg"]
    return "hf_model_name" in text or "hf_tokenizer_name" in text


def on_disk(source: Source) -> Source:
    """hf-hub: as the folder of its download, where open_clip itself cannot open it: another revision than the
    newest, a model of transformers, or a Hugging Face text tower whose configuration is in the repository.
    """
    if not source.identifier.startswith("hf-hub:"):
        return source
    model_id, _, revision = source.identifier.removeprefix("hf-hub:").partition("@")
    patterns = ["*.json", "*.txt", "*.model", WEIGHTS_FILE]
    try:
        config = hf_hub_download(model_id, CONFIG_FILE, revision=revision or None)
        text = read_config(Path(config))["model_cfg"]["text_cfg"]
        own = {text.get(key) for key in ("hf_model_name", "hf_tokenizer_name")} & {HERE, model_id}
        if not revision and not own:
            return source
    except LocalEntryNotFoundError:  # no network; it is an EntryNotFoundError too
        raise
    except EntryNotFoundError:
        patterns = TRANSFORMERS_FILES
    folder = Path(snapshot_download(model_id, revision=revision or None, allow_patterns=patterns))
    return Source(f"local-dir:{folder}", folder=folder if is_transformers(folder) else None)


def not_in_the_cache(name: str, source: Source, part: str, offline: bool) -> UserError:
    fetched = f"{source.identifier}:none" if source.file else name
    text = {} if ":" in source.identifier else open_clip.get_model_config(source.identifier)["text_cfg"]
    if part:
        missing = f"{part} {text.get('hf_tokenizer_name', '')}".strip()
    elif not source.tag and "hf_model_name" in text:
        missing = f"the configuration of its text tower, {text['hf_model_name']},"
    else:
        missing = ""
    return UserError(
        f"{name}: {f'{missing} is ' if missing else ''}not in the cache ({constants.HF_HUB_CACHE}), and the"
        f" hub cannot be reached{' with HF_HUB_OFFLINE=1' if offline else ''}; where there is a network, fill"
        f" the cache with: python -m train.fetch {quote(fetched)}"
    )


def advice(name: str) -> str:
    if name.startswith("local-dir:"):
        return (
            f"it must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}, one of transformers' CLIPModel, or a"
            " run; a file of weights is NAME:FILE"
        )
    return "check the name and the network" + (
        f"; with HF_HUB_OFFLINE=1, run python -m train.fetch {quote(name)} before"
        if constants.HF_HUB_OFFLINE
        else ""
    )


def _checkpoint_of_run(run: Path) -> Path:
    best = run / "checkpoints" / "best"
    if not best.is_dir():
        raise UserError(
            f"{run}: the run has no checkpoint yet; resume it with: python -m train"
            f" {quote(str(run / 'recipe.yaml'))}"
        )
    return best


def folder_options(identifier: str) -> dict:
    """What open_clip.create_model needs beside local-dir:FOLDER, where that holds a Hugging Face text tower.

    open_clip takes hf_model_name for a path from the working folder, or for a name on the hub; a folder that
    Clip.save() wrote has the tower's configuration in its config.json.
    """
    scheme, _, place = identifier.partition(":")
    if scheme != "local-dir" or not (Path(place) / CONFIG_FILE).is_file():
        return {}
    text = config_of(identifier)["model_cfg"]["text_cfg"]
    if "hf_model_name" not in text or not (Path(place) / TEXT_CONFIG_FILE).is_file():
        return {}
    return {"text_cfg": {**text, "hf_model_name": place, "hf_model_pretrained": False}}


def model_cfg_of(identifier: str) -> dict:
    return config_of(identifier)["model_cfg"] if ":" in identifier else open_clip.get_model_config(identifier)


def background_of(source: Source) -> str:
    """`#rrggbb` on which a model was trained to see transparent images; white where nothing says so."""
    preprocess = source.preprocess
    if ":" in source.identifier and not source.folder:
        preprocess = config_of(source.identifier).get("preprocess_cfg")
    background = str((preprocess or {}).get("background"))
    return background if re.fullmatch("#[0-9a-fA-F]{6}", background) else WHITE


def config_of(identifier: str) -> dict:
    """open_clip_config.json of a local-dir: or hf-hub: model that was just loaded, so it is in the cache."""
    scheme, _, place = identifier.partition(":")
    file = hf_hub_download(place, CONFIG_FILE) if scheme == "hf-hub" else Path(place) / CONFIG_FILE
    return read_config(Path(file))


def read_config(file: Path) -> dict:
    """An open_clip_config.json, with what transformers reads beside it checked.

    Raises:
        UserError: it is none, or asks for what is not on the list of train.model.foreign.
    """
    config = read_object(file)
    try:
        config["model_cfg"]["vision_cfg"], config["model_cfg"]["text_cfg"], config["model_cfg"]["embed_dim"]
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{file}: cannot be read as open_clip's configuration of a model"
            f" ({type(error).__name__}: {error}); it must be JSON with model_cfg, and embed_dim, vision_cfg"
            " and text_cfg in it"
        ) from None
    check_model_cfg(file, config["model_cfg"])
    check_preprocessing(file, config.get("preprocess_cfg"))
    check_folder(file.parent)
    return config
