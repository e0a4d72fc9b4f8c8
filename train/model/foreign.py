"""What a stranger's model may ask for: an allow-list of its configuration, and no code of its folder.

open_clip passes parts of open_clip_config.json on to timm and transformers, which can load code that is
beside a model or on the hub. So a configuration is checked before a library opens anything that it names.
"""

import dataclasses
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import timm
from open_clip.coca_model import MultimodalCfg
from open_clip.hf_configs import arch_dict
from open_clip.hf_model import _POOLERS
from open_clip.model import CLIPTextCfg, CLIPVisionCfg

from data_prep.errors import UserError
from data_prep.strict_json import read_json

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
MAX_PARAMETERS = 10_000_000_000  # twice the largest model of open_clip
MAX_PATCHES = 1 << 16  # of an image
WEIGHTS_SUFFIXES = (".safetensors", ".bin", ".pt", ".pth")
MAX_VOCABULARY_BYTES = 1 << 28
TRANSFORMERS_FILES = ("config.json", "tokenizer_config.json", "preprocessor_config.json")
MAX_CONFIG_BYTES = 16 << 20  # a configuration has some kB, with added tokens a few MB
Rule = tuple[str, Callable[[object], bool]]  # what a value must be, in words and as a function


def _whole(least: int, most: int) -> Rule:
    return (
        f"a whole number from {least} to {most:,}",
        lambda value: type(value) is int and least <= value <= most,
    )


def _number(least: float, most: float) -> Rule:
    return (
        f"a number from {least:g} to {most:g}",
        lambda value: type(value) in (int, float) and least <= value <= most,
    )


def _one_of(*values: object) -> Rule:
    # 1 == True, and a list is in no set
    return f"one of {', '.join(map(repr, values))}", lambda value: any(
        type(value) is type(each) and value == each for each in values
    )


def _list_of(n: int, rule: Rule) -> Rule:
    return (
        f"a list of {n}, each {rule[0]}",
        lambda value: isinstance(value, (list, tuple)) and len(value) == n and all(map(rule[1], value)),
    )


def _or(*rules: Rule) -> Rule:
    return ", or ".join(words for words, _ in rules), lambda value: any(holds(value) for _, holds in rules)


SWITCH: Rule = ("true or false", lambda value: isinstance(value, bool))
TEXT: Rule = ("a text", lambda value: isinstance(value, str))
ANY_NUMBER = _number(-1e6, 1e6)
SIDE, LAYERS, WIDTH, TOKEN = _whole(1, 4096), _whole(1, 200), _whole(1, 16384), _whole(0, 2_000_000)
HEADS, QUERIES = _whole(1, 1024), _whole(1, 65536)
# Values of a model_cfg by their key, in whichever tower; keys of TOWERS that are not here are switches.
VALUES: dict[str, Rule] = {
    "embed_dim": WIDTH,
    "init_logit_scale": ANY_NUMBER,
    "init_logit_bias": ANY_NUMBER,
    "layers": LAYERS,
    "width": WIDTH,
    "head_width": WIDTH,
    "heads": HEADS,
    "dim_head": WIDTH,
    "mlp_ratio": _number(0.01, 64),
    "patch_size": SIDE,
    "image_size": _or(SIDE, _list_of(2, SIDE)),
    "context_length": _whole(1, 8192),
    "vocab_size": _whole(1, 2_000_000),
    "pad_id": TOKEN,
    "eos_id": TOKEN,
    "n_queries": QUERIES,
    "attn_pooler_queries": QUERIES,
    "attn_pooler_heads": HEADS,
    "ls_init_value": ANY_NUMBER,
    "patch_dropout": _number(0, 0.99),
    "attentional_pool": _or(SWITCH, _one_of("parallel", "cascade")),
    "pos_embed_type": _one_of("learnable", "sin_cos_2d"),
    "block_type": _one_of("default", "custom"),
    "proj_type": _one_of("linear", "none"),
    "timm_model_name": TEXT,
    "timm_pool": TEXT,  # which of them a model has, timm checks
    "timm_proj": _one_of("linear", "mlp", "none", ""),
    "timm_drop": _number(0, 1),
    "timm_drop_path": _number(0, 1),
    "hf_model_name": TEXT,
    "hf_tokenizer_name": TEXT,
    "hf_proj_type": _one_of("linear", "mlp"),
    "hf_pooler_type": _one_of(*_POOLERS),
    "tokenizer_mode": TEXT,
    "clean": _one_of("canonicalize", "lower", "whitespace"),
    "language": TEXT,
    "approximate": _one_of("none", "tanh"),
    "eps": _number(1e-12, 1),
}
# Values that differ by tower. A list of layers is a ResNet's.
OF_TOWER: dict[str, dict[str, Rule]] = {
    "vision_cfg": {"pool_type": _one_of("tok", "avg"), "layers": _or(LAYERS, _list_of(4, LAYERS))},
    "text_cfg": {"pool_type": _one_of("first", "last", "argmax", "eos")},
    "multimodal_cfg": {"pool_type": TEXT},  # not read
}
# Keys that may be null, beside those whose default is.
NULLABLE = {"patch_size", "timm_pool", "timm_proj", "hf_proj_type", "hf_pooler_type"}
# Sizes in a config.json of transformers, under the names of its architectures; other keys are not checked.
OF_TRANSFORMERS: dict[str, Rule] = {
    **dict.fromkeys(("hidden_size", "d_model", "d_kv", "embedding_size", "projection_dim"), _whole(0, 16384)),
    **dict.fromkeys(("intermediate_size", "d_ff", "encoder_ffn_dim", "decoder_ffn_dim"), _whole(0, 1 << 17)),
    **dict.fromkeys(("num_hidden_layers", "num_layers", "encoder_layers", "decoder_layers"), _whole(0, 200)),
    **dict.fromkeys(("num_attention_heads", "num_heads", "encoder_attention_heads"), _whole(0, 1024)),
    "vocab_size": _whole(0, 2_000_000),
    "type_vocab_size": _whole(0, 2_000_000),
    "max_position_embeddings": _whole(0, 1 << 20),
    "image_size": _or(_whole(0, 4096), _list_of(2, SIDE)),
    "patch_size": _or(_whole(0, 4096), _list_of(2, SIDE)),
}
COLOUR = _whole(0, 255)
PREPROCESSING: dict[str, Rule] = {
    "mode": _one_of("RGB"),
    "mean": _list_of(3, _number(-1000, 1000)),
    "std": _list_of(3, _number(1e-6, 1000)),
    "interpolation": _one_of("bicubic", "bilinear", "random"),
    "resize_mode": _one_of("shortest", "longest", "squash"),
    "fill_color": _or(COLOUR, _list_of(3, COLOUR)),
}


def check_model_cfg(file: Path, model_cfg: dict) -> None:
    """Check the keys and values of an open_clip_config.json's model_cfg, before anything of these sizes is
    allocated, and that its image tower is one of timm's own.

    Raises:
        UserError: a key, a value or an image tower that is not on the list, or sizes of a model that is too
            large.
    """
    _check_keys(file, "model_cfg", model_cfg, MODEL_KEYS)
    towers = {name: model_cfg.get(name) for name in TOWERS}
    if towers["multimodal_cfg"] is None:
        del towers["multimodal_cfg"]
    for name, tower in towers.items():
        fields = {field.name: field.default for field in dataclasses.fields(TOWERS[name])}
        _check_keys(file, name, tower, set(fields))
        null = NULLABLE | {key for key, default in fields.items() if default is None}
        own = {key: value for key, value in tower.items() if key not in PASSED_ON}
        _check_values(file, name, own, VALUES | OF_TOWER[name], null)
        for key, known in PASSED_ON.items():
            if tower.get(key) is not None:
                _check_keys(file, f"{name}.{key}", tower[key], known)
                _check_values(file, f"{name}.{key}", tower[key], VALUES, set())
    own = {key: value for key, value in model_cfg.items() if key not in TOWERS}
    _check_values(file, "model_cfg", own, VALUES, set(own) - {"embed_dim"})
    timm_name = model_cfg["vision_cfg"].get("timm_model_name")
    # timm itself would follow hf-hub:NAME and local-dir:PATH.
    if timm_name is not None and not timm.is_model(timm_name):
        raise UserError(
            f"{file}: timm_model_name is {timm_name!r}; it must be the name of an architecture of timm, as"
            " timm.list_models() has them"
        )
    _check_size(file, model_cfg)


def check_preprocessing(file: Path, config: object) -> None:
    """Check the values of a preprocess_cfg; null is open_clip's default.

    Raises:
        UserError: one is not valid.
    """
    if config is not None and not isinstance(config, dict):
        raise UserError(f"{file}: preprocess_cfg is {config!r:.40}; it must be an object with keys")
    known = {key: value for key, value in (config or {}).items() if key in PREPROCESSING}
    _check_values(file, "preprocess_cfg", known, PREPROCESSING, set(known))


def _check_values(file: Path | str, name: str, values: dict, rules: dict[str, Rule], null: set[str]) -> None:
    for key, value in values.items():
        words, holds = rules.get(key, SWITCH)
        if not (holds(value) or (value is None and key in null)):
            raise UserError(f"{file}: {name}{name and '.'}{key} is {value!r:.40}; it must be {words}")


def _check_size(file: Path, model_cfg: dict) -> None:
    """Check that a model of valid sizes is none that no memory holds, or that its own file cannot be."""
    vision = {**dataclasses.asdict(CLIPVisionCfg()), **model_cfg["vision_cfg"]}
    is_plain = not vision["timm_model_name"] and isinstance(vision["layers"], int)
    if is_plain and vision["patch_size"] is None:
        raise UserError(f"{file}: vision_cfg.patch_size is null; it must be {SIDE[0]}")
    size = vision["image_size"]
    sides = size if isinstance(size, (list, tuple)) else (size, size)
    patches = math.prod(side // vision["patch_size"] for side in sides) if is_plain else 1
    if not 1 <= patches <= MAX_PATCHES:
        raise UserError(
            f"{file}: images of {' x '.join(map(str, sides))} have {patches:,} patches of"
            f" {vision['patch_size']}; image_size and patch_size must make 1 to {MAX_PATCHES:,}"
        )
    n = _parameters(model_cfg)
    if n + patches * vision["width"] > MAX_PARAMETERS:
        raise UserError(
            f"{file}: describes a model of {n / 1e9:,.0f} billion parameters; layers, width, vocab_size and"
            f" mlp_ratio must make at most {MAX_PARAMETERS / 1e9:.0f} billion"
        )
    beside = [each for each in file.parent.glob("*") if each.suffix in WEIGHTS_SUFFIXES and each.is_file()]
    weights = [each.stat().st_size for each in beside]
    if weights and n > sum(weights):  # a parameter has at least one byte
        raise UserError(
            f"{file}: describes a model of {n:,} parameters at the least, and the weights beside it have"
            f" {sum(weights):,} bytes; use the configuration that belongs to them"
        )


def _parameters(model_cfg: dict) -> int:
    """The parameters in the matrices of open_clip's own towers; those of timm and transformers count as 0."""
    n = 0
    for name, kind in TOWERS.items():
        if (given := model_cfg.get(name)) is None:
            continue
        tower = {**dataclasses.asdict(kind()), **given}
        width, layers = tower["width"], tower["layers"]
        if tower.get("timm_model_name") or tower.get("hf_model_name"):
            continue
        if isinstance(layers, (list, tuple)):  # bottlenecks of 1x1, 3x3 and 1x1 convolutions
            n += sum(17 * count * (width << stage) ** 2 for stage, count in enumerate(layers))
        else:
            n += int(layers * width**2 * (4 + 2 * tower["mlp_ratio"]))
        if name == "text_cfg":
            n += tower["vocab_size"] * width
    return n


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
        UserError: it asks for code or kernels to be loaded, or for sizes that no model has.
    """
    for part in (config, *(value for value in config.values() if isinstance(value, dict))):
        sizes = {key: value for key, value in part.items() if key in OF_TRANSFORMERS}
        _check_values(name, "", sizes, OF_TRANSFORMERS, set(sizes))
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
    fix = "it must be a JSON object, as whoever published the model has it"
    return read_json(file, dict, fix, max_bytes, is_ours=False)


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
