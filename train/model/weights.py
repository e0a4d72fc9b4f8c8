"""A file of weights, whatever wrote it, becomes the state dict of an open_clip model.

FILE -> tensors by name -> the names of a CLIP (no module., _orig_mod., model.) -> checked -> in the model

Nothing that a file names is executed or imported: what torch does not know as data becomes an Inert object.
"""

import pickle
import re
import struct
import sys
import zipfile
from pathlib import Path

import open_clip
import torch
from open_clip.convert import convert_state_dict
from open_clip.factory import load_checkpoint
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from data_prep.errors import UserError
from data_prep.masked import masked
from data_prep.terminal import say

State = dict[str, torch.Tensor]
BIG_VISION = (".npz", ".npy")  # Google's SigLIP
# Where trainers keep the weights in what they save: open_clip_train and Lightning, many others, DeepSpeed.
WRAPPERS = ("state_dict", "model_state_dict", "model", "module", "weights")
# What wrappers put before names: DDP, torch.compile, Lightning and others.
PREFIX = re.compile(r"(module\.|_orig_mod\.|model\.|clip_model\.|clip\.|net\.)*")
ANCHOR = "logit_scale"  # each CLIP has it, so what is before it in a file is the prefix of all names
NO_WEIGHTS = ("input_resolution", "context_length", "vocab_size")  # of OpenAI's files
SHOWN = 3
# What the readers of safetensors and of pickles raise for bytes that are neither.
DAMAGED = (SafetensorError, pickle.UnpicklingError, zipfile.BadZipFile, RuntimeError, ValueError, EOFError)
DAMAGED += (KeyError, IndexError, TypeError, AttributeError, AssertionError, ArithmeticError, struct.error)


class Inert(dict):
    """What a pickled object of an unknown class becomes: its attributes are read, its code is not."""

    def __init__(self, *arguments, **options):
        pass

    def __setstate__(self, state: object) -> None:
        if isinstance(state, dict):
            self.__dict__.update(state)


def load_weights(model: nn.Module, architecture: str, file: Path) -> None:
    """Load a file of weights into an open_clip model of random ones.

    Args:
        architecture: the model's name, for messages.

    Raises:
        UserError: the file cannot be read, or holds weights of another architecture.
    """
    if file.suffix in BIG_VISION:
        try:
            load_checkpoint(model, str(file))
        except (KeyError, ValueError, AttributeError, RuntimeError, AssertionError) as error:
            raise UserError(f"{file}: no weights of {architecture} by big_vision ({_short(error)})") from None
        return
    given = clip_state(read_weights(file), file)
    state = _as_model(model, given)
    target = model.state_dict()
    resized = _resize_positions(model, state)
    wrong = [
        f"{name} is {list(state[name].shape)} in the file and {list(tensor.shape)} in {architecture}"
        for name, tensor in target.items()
        if name in state and state[name].shape != tensor.shape
    ]
    if missing := [name for name in target if name not in state]:
        wrong.append(f"the file lacks {_some(missing)}")
    if unexpected := [name for name in state if name not in target]:
        wrong.append(f"{architecture} has no {_some(unexpected)}")
    if wrong:
        more = f" and {len(wrong) - SHOWN} more" if len(wrong) > SHOWN else ""
        raise UserError(
            f"{file}: holds no weights of {architecture}: {'; '.join(wrong[:SHOWN])}{more};"
            f" {_fitting(given, file, architecture)}"
        )
    model.load_state_dict(state)
    for sentence in resized:
        say(f"warning: {file}: {sentence}", file=sys.stderr)


def check_finite(model: nn.Module, name: str) -> None:
    """Check loaded weights: later, the error would name an image or a caption.

    Args:
        name: of the MODEL, for the message.

    Raises:
        UserError: a tensor holds NaN or infinity.
    """
    state = model.state_dict()
    if bad := [key for key, tensor in state.items() if not tensor.isfinite().all()]:
        raise UserError(
            f"{name}: its weights hold NaN or infinity in {len(bad)} of {len(state)} tensors"
            f" ({_some(bad)}), as after a training that diverged; use an earlier checkpoint, or other weights"
        )


def read_weights(file: Path) -> State:
    """The tensors in a file (safetensors, or torch's .pt, .pth, .bin, .ckpt) by their names in it.

    Raises:
        UserError: the file is damaged, or holds something else.
    """
    if not file.stat().st_size:
        raise UserError(f"{file}: the file is empty; copy or download it again")
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        content = _unpickled(file)
    except (OSError, *DAMAGED) as error:  # a damaged zip seeks to before its beginning
        raise UserError(
            f"{file}: cannot be read as weights ({_short(error)}); it must be a .safetensors file or what"
            " torch.save has written of a state_dict"
        ) from None
    for wrapper in WRAPPERS:
        if isinstance(content, dict) and isinstance(content.get(wrapper), (dict, Inert)):
            content = content[wrapper]
    return _tensors(content)


def _unpickled(file: Path) -> object:
    """What torch.save wrote, read with weights_only; unknown classes are Inert and run nothing."""
    if zipfile.is_zipfile(file):
        with zipfile.ZipFile(file) as archive:
            if any(name.endswith("/constants.pkl") for name in archive.namelist()):
                raise UserError(
                    f"{file}: a TorchScript program, which is not run here; for OpenAI's own models use"
                    " ViT-B-32-quickgelu:openai, else save its weights alone:"
                    " torch.save(torch.jit.load(FILE).state_dict(), 'weights.pt')"
                )
        unknown = torch.serialization.get_unsafe_globals_in_checkpoint(file)
    else:
        unknown = []  # torch's format before 1.6, of which it does not tell the classes
    with torch.serialization.safe_globals([(Inert, name) for name in unknown]):
        return torch.load(file, map_location="cpu", weights_only=True)


def _tensors(content: object, prefix: str = "") -> State:
    """The tensors of a state dict, or of a whole module whose class is Inert."""
    if isinstance(content, Inert):
        parts = [content.__dict__.get(part) or {} for part in ("_parameters", "_buffers", "_modules")]
        skipped = content.__dict__.get("_non_persistent_buffers_set") or ()
        content = {name: value for part in parts for name, value in part.items() if name not in skipped}
    if not isinstance(content, dict):
        return {}
    found: State = {}
    for name, value in content.items():
        if torch.is_tensor(value):
            found[f"{prefix}{name}"] = value.detach()
        elif isinstance(value, Inert):
            found |= _tensors(value, f"{prefix}{name}.")
    return found


def clip_state(weights: State, file: Path) -> State:
    """The weights of the one CLIP among a file's tensors, by its own names.

    Raises:
        UserError: there is none, or several.
    """
    weights = {name.replace("_orig_mod.", ""): tensor for name, tensor in weights.items()}
    prefixes = [
        name.removesuffix(ANCHOR) for name in weights if name == ANCHOR or name.endswith(f".{ANCHOR}")
    ]
    if not prefixes:
        names = _some(list(weights)) if weights else "no tensor"
        raise UserError(
            f"{file}: holds no weights of a whole CLIP, but {names}; a file must have both towers and"
            " logit_scale (adapters such as LoRA's must be merged first)"
        )
    usual = [prefix for prefix in prefixes if PREFIX.fullmatch(prefix)]
    chosen = usual if len(prefixes) > 1 else prefixes
    if len(chosen) != 1:
        raise UserError(
            f"{file}: holds several models ({', '.join(repr(prefix) for prefix in prefixes)}); save the one"
            " that is meant alone: torch.save(model.state_dict(), FILE)"
        )
    prefix = chosen[0]
    state = {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}
    if left := [name for name in weights if not name.startswith(prefix)]:
        say(f"{file}: {len(left)} tensors are of no CLIP and not used: {_some(left)}", file=sys.stderr)
    if any(name.startswith(("vision_model.", "text_model.")) for name in state):
        raise UserError(
            f"{file}: has transformers' names of weights; with its config.json and preprocessor_config.json"
            f" beside it, use local-dir:{file.parent}"
        )
    return {name: tensor for name, tensor in state.items() if name not in NO_WEIGHTS}


def _as_model(model: nn.Module, state: State) -> State:
    """What open_clip's load_checkpoint() changes in an older or foreign state dict."""
    state = dict(convert_state_dict(model, state))
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    if "text.positional_embedding" in state and not hasattr(model, "text"):  # --force-custom-text
        state = {name.removeprefix("text."): tensor for name, tensor in state.items()}
    for name in ("logit_scale", "logit_bias"):
        parameter = getattr(model, name, None)
        if parameter is not None and name in state and state[name].numel() == 1:
            state[name] = state[name].reshape(parameter.shape)
    if getattr(model, "logit_bias", None) is not None and "logit_bias" not in state:
        state["logit_bias"] = torch.zeros_like(model.logit_bias)
    target = model.state_dict()
    return {name: tensor for name, tensor in state.items() if _is_weight(name, target)}


def _is_weight(name: str, target: State) -> bool:
    """Not a table of positions or a mask, which older versions saved and newer ones compute."""
    return name in target or not name.endswith(("position_ids", "attn_mask"))


def _resize_positions(model: nn.Module, state: State) -> list[str]:
    """Interpolate positional embeddings of another image size or context, as open_clip does; says which."""
    before = {name: list(tensor.shape) for name, tensor in state.items() if "positional_embedding" in name}
    try:
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    except (RuntimeError, AssertionError, AttributeError, ValueError):
        return []  # other widths; the comparison of shapes names them
    return [
        f"{name} is interpolated from {shape} to {list(state[name].shape)}"
        for name, shape in before.items()
        if list(state[name].shape) != shape
    ]


def architectures_of(state: State) -> list[str]:
    """open_clip's architectures of plain ViTs and text towers that have the shapes of a state dict."""
    need = ("visual.conv1.weight", "visual.positional_embedding", "visual.proj")
    text = "text." if "text.token_embedding.weight" in state else ""
    texts = [f"{text}{name}" for name in ("positional_embedding", "token_embedding.weight")]
    if not all(name in state for name in (*need, *texts)):
        return []
    (width, _, patch, _), (positions, _), (_, embed_dim) = (state[name].shape for name in need)
    (context, text_width), (vocabulary, _) = (state[name].shape for name in texts)
    layers, text_layers = (
        sum(bool(re.fullmatch(rf"{tower}transformer\.resblocks\.\d+\.ln_1\.weight", name)) for name in state)
        for tower in (r"visual\.", re.escape(text))
    )
    sizes = (embed_dim, width, patch, layers, context, text_width, vocabulary, text_layers)
    fitting = []
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name)
        vision = {"width": 768, "layers": 12, "patch_size": 16, "image_size": 224, **config["vision_cfg"]}
        texts = {"width": 512, "layers": 12, "context_length": 77, "vocab_size": 49408, **config["text_cfg"]}
        if "timm_model_name" in vision or "hf_model_name" in texts or isinstance(vision["layers"], list):
            continue
        own = [config["embed_dim"], *(vision[key] for key in ("width", "patch_size", "layers"))]
        own += [texts[key] for key in ("context_length", "width", "vocab_size", "layers")]
        n_patches = (vision["image_size"] // patch) ** 2 if isinstance(vision["image_size"], int) else 0
        if tuple(own) == sizes and positions - n_patches in (0, 1):
            fitting.append(name)
    return fitting


def _fitting(state: State, file: Path, tried: str) -> str:
    fitting = architectures_of(state)
    if names := [name for name in fitting if name != tried]:
        return f"they fit {' or '.join(f'{name}:{file}' for name in names[:SHOWN])}"
    if fitting:
        return "the file is incomplete, or was changed; use another copy of it"
    return "use the name of the architecture that they were trained with, or local-dir: with its config"


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more


def _short(error: Exception) -> str:
    """The first sentence of an error: torch adds advice to switch off weights_only, which is not followed."""
    return re.split(r"\. |\n", masked(str(error)).strip())[0][:200] or type(error).__name__
