"""Clip: a model with its preprocessing and tokenizer, from a name, the hub, a folder or a run.

All that knows open_clip's insides is here.
"""

import hashlib
import json
import os
import re
import shutil
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path

import open_clip
import torch
from huggingface_hub import constants
from huggingface_hub.errors import HfHubHTTPError
from open_clip.hf_model import HFTextEncoder
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import ImageColor
from safetensors.torch import save_file
from torch import nn
from torchvision.transforms import Compose, Normalize, PILToTensor

from data_prep.errors import UserError
from data_prep.images import WHITE
from data_prep.masked import one_line
from data_prep.terminal import say
from train.model.foreign import check_tower, no_remote_code
from train.model.hub import wants_network, without_retries
from train.model.preprocessing import CONFIG_FILE, KEYS
from train.model.source import (
    HERE,
    TEXT_CONFIG_FILE,
    WEIGHTS_FILE,
    Source,
    advice,
    asks_hub,
    background_of,
    folder_options,
    model_cfg_of,
    not_in_the_cache,
    on_disk,
    source_of,
)
from train.model.text import trimmer
from train.model.towers import Towers, tower_of
from train.model.transformers_clip import load_tokenizer, load_transformers, open_clip_config
from train.model.weights import DAMAGED, check_finite, load_weights

HUB_ID = re.compile(r"[\w-][\w.-]*(/[\w.-]+)?")


@dataclass
class Clip:
    """A model with its preprocessing and tokenizer, and what is needed to save it.

    Attributes:
        towers: the model; `towers.model` is open_clip's own.
        tokenizer: list of captions -> int64 [n, L].
        config: {"model_cfg", "preprocess_cfg"}, as in open_clip_config.json, and in preprocess_cfg the
            `background`, `#rrggbb`: transparent images are composited on it. open_clip ignores it.
    """

    name: str
    towers: Towers
    tokenizer: Callable[[list[str]], torch.Tensor]
    config: dict

    @property
    def preprocess(self) -> Compose:
        """open_clip's own evaluation transform: PIL -> fp32 [3, H, W], normalised."""
        return image_transform_v2(PreprocessCfg(**self.towers.model.visual.preprocess_cfg), is_train=False)

    @property
    def eval_transform(self) -> Compose:
        """preprocess without normalisation: PIL RGB -> uint8 [3, H, W]; Towers normalises on the device."""
        *steps, _to_tensor, normalize = self.preprocess.transforms
        assert isinstance(normalize, Normalize), normalize
        return Compose([*steps, PILToTensor()])

    @property
    def background(self) -> tuple[int, int, int]:
        """The RGB on which the model wants transparent images composited."""
        return ImageColor.getrgb(self.config["preprocess_cfg"].get("background", WHITE))[:3]

    @property
    def image_size(self) -> tuple[int, int]:
        size = self.towers.model.visual.image_size
        return (size, size) if isinstance(size, int) else tuple(size)

    @property
    def tokenize(self) -> Callable[[list[str]], torch.Tensor]:
        """The tokenizer, with padding trimmed where that is exact: captions -> int64 [n, L]."""
        return trimmer(self.towers.model, self.tokenizer)

    def fingerprint(self, tower: str = "") -> str:
        """sha256 of the weights, which identifies the model of a result whatever its file was called.

        Args:
            tower: "image" or "text", for the weights of that tower alone.
        """
        sha = hashlib.sha256()
        for name, tensor in sorted(self.towers.model.state_dict().items()):
            if tower and tower_of(name) != tower:
                continue
            sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
            sha.update(
                tensor.detach().cpu().contiguous().view(torch.uint8).numpy()
                if tensor.dim()
                else repr(tensor.item()).encode()
            )
        return sha.hexdigest()

    def weights(
        self, dtype: torch.dtype = torch.float32, state: dict[str, torch.Tensor] | None = None
    ) -> dict[str, torch.Tensor]:
        """The weights as they are saved: in `dtype`, except logit_scale, of which bf16 would make 98.9 of
        100.

        Args:
            state: a state_dict of towers.model from another time, to use in place of the present one.
        """
        state = {
            name: tensor.detach().cpu() for name, tensor in (state or self.towers.model.state_dict()).items()
        }
        return {
            name: tensor.to(dtype).contiguous() if tensor.is_floating_point() and tensor.dim() else tensor
            for name, tensor in state.items()
        }

    def save(
        self, folder: Path, dtype: torch.dtype = torch.float32, state: dict[str, torch.Tensor] | None = None
    ) -> None:
        """Write a folder that open_clip loads as `local-dir:FOLDER`; `state` as in weights()."""
        config = {**self.config, "model_cfg": _portable(self.config["model_cfg"])}
        (folder / CONFIG_FILE).write_text(json.dumps(config, indent=2) + "\n")
        save_file(self.weights(dtype, state), folder / WEIGHTS_FILE)
        # safetensors makes files that only their owner can read
        shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
        if hasattr(self.tokenizer, "save_pretrained"):  # a Hugging Face tokenizer
            self.tokenizer.save_pretrained(folder)
        text = getattr(self.towers.model, "text", None)
        if isinstance(text, HFTextEncoder):
            text.config.to_json_file(folder / TEXT_CONFIG_FILE)


def load(name: str, *, weights: bool = True, seed: int = 0) -> Clip:
    """Load a MODEL, in fp32 on the CPU.

    Args:
        name: NAME:PRETRAINED, NAME:FILE, hf-hub:ID, local-dir:PATH, or a run folder (its best checkpoint).
        weights: False gives the architecture and preprocessing with random weights, and downloads nothing.
        seed: of random weights.

    Raises:
        UserError: no such model, tag or folder; no network for a download; weights of another architecture or
            activation, or that are not finite; a file whose preprocessing is not known.
    """
    source = source_of(name)
    if source.note and os.environ.get("RANK", "0") == "0":
        say(source.note, file=sys.stderr)
    offline = constants.HF_HUB_OFFLINE
    with torch.random.fork_rng(devices=[]), without_retries(asks_hub(source, weights)):
        torch.manual_seed(seed)
        try:
            source = on_disk(source)
            if source.folder:
                model, tokenizer, model_cfg = _of_transformers(source.folder, weights)
            else:
                model, tokenizer, model_cfg = _of_open_clip(source, weights)
            background = background_of(source)
            if source.file and weights:
                load_weights(model, source.identifier, source.file)
        except (OSError, HfHubHTTPError, *DAMAGED) as error:
            if wants_network(error):
                part = "its tokenizer" if isinstance(error, NoTokenizer) else ""
                raise not_in_the_cache(name, source, part, offline) from None
            if "trust_remote_code" in str(error):
                raise UserError(
                    f"{name}: needs code of the model's folder or repository, which is never run; use a model"
                    " that open_clip and transformers open without it"
                ) from None
            reason = one_line(error, 600) or type(error).__name__  # an assertion may have no message
            raise UserError(f"{name}: cannot be loaded: {reason}; {advice(name)}") from None
    if weights and source.has_weights:
        check_finite(model, name)
    preprocess = model.visual.preprocess_cfg
    config = {
        "model_cfg": model_cfg,
        "preprocess_cfg": {key: preprocess[key] for key in KEYS} | {"background": background},
    }
    towers = Towers(model, preprocess["mean"], preprocess["std"], tokenizer.context_length)
    return Clip(name, towers, tokenizer, config)


class NoTokenizer(OSError):
    """The model can be opened, its tokenizer cannot."""


def create(identifier: str, tag: str | None = None, **options) -> nn.Module:
    """open_clip.create_model(), after what the model's configuration asks for was checked.

    Args:
        identifier, tag: of a Source.
        options: for create_model().

    Raises:
        UserError: it asks for more than train.model.foreign allows.
    """
    folder = Path(identifier.removeprefix("local-dir:"))
    if identifier.startswith("local-dir:") and not (folder / CONFIG_FILE).is_file():
        raise FileNotFoundError(f"{folder} has no {CONFIG_FILE}")
    own, text = folder_options(identifier), model_cfg_of(identifier)["text_cfg"]
    if ":" in identifier and (tower := own.get("text_cfg", text).get("hf_model_name")):
        check_tower(tower)
    with no_remote_code():
        return open_clip.create_model(identifier, tag, **own, **options)


def create_tokenizer(identifier: str) -> Callable:
    """open_clip.get_tokenizer(), which opens a Hugging Face tokenizer without its code.

    Raises:
        NoTokenizer: it cannot be opened.
    """
    text = model_cfg_of(identifier)["text_cfg"]
    options = {"trust_remote_code": False} if text.get("hf_tokenizer_name") else {}
    try:
        with no_remote_code():
            return open_clip.get_tokenizer(identifier, **options)
    except (OSError, *DAMAGED) as error:
        raise NoTokenizer(str(error)) from error


def _of_open_clip(source: Source, weights: bool) -> tuple[nn.Module, Callable, dict]:
    model = create(
        source.identifier,
        source.tag if weights else None,
        load_weights=weights,
        require_pretrained=weights and source.has_weights and not source.file,
        pretrained_text=False,
        force_preprocess_cfg=source.preprocess,
    )
    return model, create_tokenizer(source.identifier), model_cfg_of(source.identifier)


def _of_transformers(folder: Path, weights: bool) -> tuple[nn.Module, Callable, dict]:
    model_cfg, preprocessing = open_clip_config(folder)
    model = load_transformers(folder, model_cfg) if weights else open_clip.CLIP(**model_cfg)
    size = {"size": model.visual.image_size}
    open_clip.model.set_model_preprocess_cfg(model, asdict(PreprocessCfg()) | size | preprocessing.config)
    return model, load_tokenizer(folder, model_cfg), model_cfg


def public_name(model: str) -> str:
    """A MODEL without the folders of this machine: "local-dir:/home/me/base" -> "base", "runs/icons" ->
    "icons".
    """
    scheme, colon, rest = model.partition(":")
    if scheme == "hf-hub":
        return rest
    path = Path(rest if colon else model)
    if path.parent.name == "checkpoints":  # of a run
        path = path.parent.parent
    return f"{scheme}:{path.name}" if colon and scheme != "local-dir" else path.name


def _portable(model_cfg: dict) -> dict:
    """model_cfg without paths of this machine: a text tower and tokenizer that are in the folder itself."""
    text = dict(model_cfg["text_cfg"])
    for key in ("hf_model_name", "hf_tokenizer_name"):
        if key in text and not HUB_ID.fullmatch(text[key]):
            text[key] = HERE
    return {**model_cfg, "text_cfg": text}
