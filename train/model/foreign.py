"""What a stranger's model may ask for: an allow-list of its configuration, and no code of its folder.

open_clip passes parts of open_clip_config.json on to timm and transformers, which can load code that is
beside a model or on the hub. So a configuration is checked before a library opens anything that it names.
"""

import dataclasses
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
from open_clip.coca_model import MultimodalCfg
from open_clip.hf_configs import arch_dict
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from data_prep.errors import UserError

MODEL_KEYS = {"embed_dim", "vision_cfg", "text_cfg", "multimodal_cfg", "quick_gelu", "custom_text", "pad_id"}
MODEL_KEYS |= {"init_logit_scale", "init_logit_bias", "nonscalar_logit_scale"}
TOWERS = {"vision_cfg": CLIPVisionCfg, "text_cfg": CLIPTextCfg, "multimodal_cfg": MultimodalCfg}
# Options of a tower that open_clip passes on unread: to HFTokenizer, to an activation and to a norm.
PASSED_ON = {
    "tokenizer_kwargs": {"clean", "strip_sep_token", "language"},
    "act_kwargs": {"approximate"},
    "norm_kwargs": {"eps", "elementwise_affine", "bias"},
}
# Keys with which transformers loads code or kernels, from the folder or from the hub.
CODE_KEYS = ("auto_map", "custom_pipelines", "attn_implementation", "_attn_implementation")
CODE_KEYS += ("experts_implementation", "_experts_implementation", "kernel_config", "quantization_config")
MAX_VOCABULARY_BYTES = 1 << 28
TRANSFORMERS_FILES = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
MAX_CONFIG_BYTES = 16 << 20  # a configuration has some kB, with added tokens a few MB


def check_model_cfg(file: Path, model_cfg: dict) -> None:
    """Check the keys of an open_clip_config.json's model_cfg, and that its image tower is one of timm's own.

    Raises:
        UserError: a key or an image tower that is not on the list.
    """
    _check_keys(file, "model_cfg", model_cfg, MODEL_KEYS)
    for name, kind in TOWERS.items():
        tower = model_cfg.get(name)
        if tower is None and name == "multimodal_cfg":
            continue
        _check_keys(file, name, tower, {field.name for field in dataclasses.fields(kind)})
        for key, known in PASSED_ON.items():
            if tower.get(key) is not None:
                _check_keys(file, f"{name}.{key}", tower[key], known)
    timm_name = model_cfg["vision_cfg"].get("timm_model_name")
    # timm itself would follow hf-hub:NAME and local-dir:PATH.
    if timm_name is not None and not (isinstance(timm_name, str) and timm.is_model(timm_name)):
        raise UserError(
            f"{file}: timm_model_name is {timm_name!r}; it must be the name of an architecture of timm, as"
            " timm.list_models() has them"
        )


def _check_keys(file: Path, name: str, value: object, known: set[str]) -> None:
    if not isinstance(value, dict):
        raise UserError(f"{file}: {name} is {type(value).__name__}; it must be an object with keys")
    if unknown := sorted(set(value) - known):
        code = ", which would run code of the model's folder" if "trust_remote_code" in unknown else ""
        raise UserError(
            f"{file}: {name} has {', '.join(map(repr, unknown[:5]))}{code}; a model's configuration may have"
            f" {', '.join(sorted(known))}; remove it, and look at what else is in the folder"
        )


def check_folder(folder: Path) -> None:
    """Check the files of transformers in a folder: a text tower's, a tokenizer's, a CLIPModel's.

    Raises:
        UserError: one asks for code or kernels to be loaded, or is not readable.
    """
    for name in TRANSFORMERS_FILES:
        if (file := folder / name).is_file():
            check_transformers(str(file), read_object(file))


def check_tower(name: str) -> None:
    """Check the configuration of a Hugging Face text tower, a folder or a name on the hub.

    Raises:
        UserError: it asks for code or kernels to be loaded, or is of a type that open_clip cannot use.
        OSError: there is none, or no network.
    """
    from transformers import PretrainedConfig

    config, _ = PretrainedConfig.get_config_dict(name)
    check_transformers(name, config)
    if config.get("model_type") not in arch_dict:
        raise UserError(
            f"{name}: a text tower of the type {config.get('model_type')!r}; it must be one of"
            f" {', '.join(arch_dict)}"
        )


def check_transformers(name: str, config: dict) -> None:
    """Check a configuration of transformers, and those within it.

    Raises:
        UserError: it asks for code or kernels to be loaded.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        if found := [key for key in CODE_KEYS if part.get(key) is not None]:
            raise UserError(
                f"{name}: has {', '.join(found)}, which would load code that is not part of transformers;"
                " such models are not opened. Remove it if the model does not need it"
            )


def read_object(file: Path, max_bytes: int = MAX_CONFIG_BYTES) -> dict:
    """A JSON file that holds an object.

    Raises:
        UserError: it is none, or too large for a configuration.
    """
    try:
        if (size := file.stat().st_size) > max_bytes:
            raise UserError(f"{file}: has {size:,} bytes; it may have {max_bytes:,}")
        content = json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{file}: cannot be read as JSON ({error})") from None
    if not isinstance(content, dict):
        raise UserError(f"{file}: must be a JSON object")
    return content


@contextmanager
def no_remote_code() -> Iterator[None]:
    """transformers does not ask on the terminal whether to run a model's code: the answer is no."""
    try:
        from transformers import dynamic_module_utils
    except ImportError:
        yield
        return
    before = dynamic_module_utils.TIME_OUT_REMOTE_CODE
    dynamic_module_utils.TIME_OUT_REMOTE_CODE = 0
    try:
        yield
    finally:
        dynamic_module_utils.TIME_OUT_REMOTE_CODE = before
