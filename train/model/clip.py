"""Clip: a model with its preprocessing and tokenizer, from a name, the hub, a folder or a run.

All that knows open_clip's insides is here.
"""

import difflib
import hashlib
import json
import logging
import re
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import open_clip
import torch
from huggingface_hub import constants, hf_hub_download, snapshot_download
from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError
from open_clip.transform import PreprocessCfg, image_transform_v2
from PIL import ImageColor
from safetensors.torch import save_file
from torchvision.transforms import Compose, Normalize, PILToTensor

from data_prep.errors import UserError
from data_prep.images import WHITE
from train.model.text import trimmer
from train.model.towers import Towers

MODELS = Path(__file__).parent / "configs"  # architectures of ours, in open_clip's format
# What open_clip reads for local-dir: and hf-hub:.
CONFIG_FILE, WEIGHTS_FILE = ("open_clip_config.json", "open_clip_model.safetensors")
NOTATION = (
    "a MODEL is NAME:PRETRAINED (ViT-L-14:laion2b_s32b_b82k; ViT-B-32:none for random weights), hf-hub:ID,"
    " local-dir:PATH or a run folder"
)

open_clip.add_model_config(MODELS)


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

    def fingerprint(self) -> str:
        """sha256 of the weights, which identifies the model of a result whatever its file was called."""
        sha = hashlib.sha256()
        for name, tensor in sorted(self.towers.model.state_dict().items()):
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
        (folder / CONFIG_FILE).write_text(json.dumps(self.config, indent=2) + "\n")
        save_file(self.weights(dtype, state), folder / WEIGHTS_FILE)
        # safetensors makes files that only their owner can read
        shutil.copymode(folder / CONFIG_FILE, folder / WEIGHTS_FILE)
        if hasattr(self.tokenizer, "save_pretrained"):  # a Hugging Face tokenizer
            self.tokenizer.save_pretrained(folder)


def load(name: str, *, weights: bool = True, seed: int = 0) -> Clip:
    """Load a MODEL, in fp32 on the CPU.

    Args:
        name: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH, or a run folder (its best checkpoint).
        weights: False gives the architecture and preprocessing with random weights, and downloads nothing.
        seed: of random weights.

    Raises:
        UserError: no such model, tag or folder; no network for a download; weights of another architecture or
            activation.
    """
    if (Path(name) / "recipe.yaml").is_file():
        name = f"local-dir:{_checkpoint_of_run(Path(name))}"
    if name.startswith(("hf-hub:", "local-dir:")):
        identifier, pretrained, options = name, None, {}
        model_cfg = None
    else:
        identifier, pretrained, options = _parse_name(name)
        model_cfg = open_clip.get_model_config(identifier)
        if not weights:
            pretrained = None
    wants_weights = weights and not name.endswith(":none")
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        # open_clip warns of random weights even where they were asked for.
        logging.disable(logging.NOTSET if wants_weights else logging.WARNING)
        try:
            if name.startswith("hf-hub:") and "@" in name:
                identifier = _at_revision(name)
            model = open_clip.create_model(
                identifier,
                pretrained,
                load_weights=weights,
                require_pretrained=wants_weights,
                pretrained_text=False,
                **options,
            )
            tokenizer = open_clip.get_tokenizer(identifier)
        except (OSError, RuntimeError, ValueError, KeyError, HfHubHTTPError) as error:
            if _wants_network(error):
                raise UserError(
                    f"{name}: not in the cache ({constants.HF_HUB_CACHE}), and the hub cannot be reached"
                    f"{' with HF_HUB_OFFLINE=1' if constants.HF_HUB_OFFLINE else ''}; where there is a"
                    f" network, fill the cache with: python -m train.fetch {name}"
                ) from None
            raise UserError(
                f"{name}: cannot be loaded: {' '.join(str(error).split())[:600]}; {_advice(name)}"
            ) from None
        finally:
            logging.disable(logging.NOTSET)
    background = WHITE
    if model_cfg is None:
        published = _config_of(identifier)
        model_cfg, background = published["model_cfg"], _background_of(published)
    preprocess = model.visual.preprocess_cfg
    config = {
        "model_cfg": model_cfg,
        "preprocess_cfg": {key: preprocess[key] for key in ("mean", "std", "interpolation", "resize_mode")}
        | {"background": background},
    }
    return Clip(name, Towers(model, preprocess["mean"], preprocess["std"]), tokenizer, config)


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


def _parse_name(name: str) -> tuple[str, str | None, dict]:
    """NAME:PRETRAINED -> architecture, tag or file, options that give the tag's preprocessing."""
    architecture, colon, pretrained = name.partition(":")
    known = open_clip.list_models()
    if architecture not in known:
        near = difflib.get_close_matches(architecture, known, n=1)
        raise UserError(
            f"{name}: no model {architecture!r}; "
            + (f"did you mean {near[0]!r}? " if near else "")
            + NOTATION
        )
    tags = open_clip.list_pretrained_tags_by_model(architecture)
    if not colon or not pretrained:
        choice = ", ".join(tags) or "none"
        raise UserError(
            f"{name}: names no weights; use {architecture}:none for random ones, or {architecture}:TAG, with"
            f" TAG one of {choice}"
        )
    if pretrained == "none":
        return architecture, None, {}
    if Path(pretrained).is_file():
        return architecture, pretrained, {}
    if pretrained not in tags:
        raise UserError(
            f"{name}: {architecture} has no weights {pretrained!r}; it has {', '.join(tags) or 'none'}"
        )
    tag = open_clip.get_pretrained_cfg(architecture, pretrained)
    quick = bool(open_clip.get_model_config(architecture).get("quick_gelu"))
    if bool(tag.get("quick_gelu")) != quick:
        # open_clip only warns, and the features are wrong (open_clip#771).
        other = architecture.removesuffix("-quickgelu") if quick else f"{architecture}-quickgelu"
        raise UserError(
            f"{name}: these weights were trained with another activation; use {other}:{pretrained}"
        )
    return (
        architecture,
        pretrained,
        {
            "force_preprocess_cfg": {
                key: tag[key] for key in ("mean", "std", "interpolation", "resize_mode") if key in tag
            }
        },
    )


def _advice(name: str) -> str:
    if name.startswith("local-dir:"):
        return f"it must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}"
    return "check the name and the network" + (
        f"; with HF_HUB_OFFLINE=1, run python -m train.fetch {name} before"
        if constants.HF_HUB_OFFLINE
        else ""
    )


def _wants_network(error: BaseException | None) -> bool:
    """Whether the hub could not be reached; open_clip wraps the error that says so."""
    while error and not isinstance(error, LocalEntryNotFoundError):
        error = error.__context__
    return error is not None


def _checkpoint_of_run(run: Path) -> Path:
    best = run / "checkpoints" / "best"
    if not best.is_dir():
        raise UserError(
            f"{run}: the run has no checkpoint yet; resume it with: python -m train {run / 'recipe.yaml'}"
        )
    return best


def _at_revision(name: str) -> str:
    """hf-hub:ID@REVISION as the local-dir: of its download; open_clip loads only the newest revision."""
    model_id, _, revision = name.removeprefix("hf-hub:").partition("@")
    patterns = ["*.json", "*.txt", "*.model", WEIGHTS_FILE]
    return f"local-dir:{snapshot_download(model_id, revision=revision, allow_patterns=patterns)}"


def _config_of(identifier: str) -> dict:
    """open_clip_config.json of a local-dir: or hf-hub: model that was just loaded, so it is in the cache."""
    scheme, _, place = identifier.partition(":")
    file = hf_hub_download(place, CONFIG_FILE) if scheme == "hf-hub" else Path(place) / CONFIG_FILE
    return json.loads(Path(file).read_text())


def _background_of(config: dict) -> str:
    """`#rrggbb` of an open_clip_config.json; white where it has none, as models of others."""
    background = (config.get("preprocess_cfg") or {}).get("background")
    return background if re.fullmatch("#[0-9a-fA-F]{6}", str(background)) else WHITE
