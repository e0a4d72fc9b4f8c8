"""A recipe is a file of flags: YAML keys and typed flags are the same names, checked by one parser.

    train/recipes/demo.yaml  ->  --model demo-vit:none --optim.lr 1e-3 ...  +  typed flags  ->  Recipe

Typed flags come last and win. The merged recipe is written into the run, and is itself a recipe.
"""

import dataclasses
import difflib
import os
import re
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Annotated, Literal, TypeVar

import tyro
import yaml

from data_prep.cli import CONFIG
from data_prep.errors import UserError
from data_prep.store.remote import is_url
from data_prep.terminal import safe
from train.data.shares import Data, Sets, are_valid, shares_of, to_words

RECIPES = Path(__file__).parent / "recipes"

# Keys as help shows them.
Model = Annotated[str, tyro.conf.arg(metavar="MODEL")]
Shards = Annotated[str, tyro.conf.arg(metavar="SHARDS")]
Run = Annotated[str, tyro.conf.arg(metavar="RUN")]


FLAG = re.compile("--|-(?!inf|nan)[A-Za-z]")  # what the parser does not take for a value
OWN = "own"  # as the value of replay: the training pairs
SKIP = "skip"  # as the value of on_damage
MAX_YAML_CHARACTERS, MAX_YAML_DEPTH, MAX_ALIASES = 1 << 18, 20, 20


@dataclass(frozen=True)
class Optim:
    """AdamW with a linear warm-up and a cosine decay to zero."""

    lr: float = 5e-6
    """Peak learning rate. Usual: 1e-6 to 3e-5 for fine-tuning, 1e-3 from random weights."""
    warmup_fraction: float = 0.05
    """Fraction of the run in which the learning rate rises to its peak."""
    weight_decay: float = 0.2
    """Applies to matrices; not to biases, norms, positional embeddings or logit_scale."""
    betas: tuple[float, float] = (0.9, 0.98)
    eps: float = 1e-6
    max_grad_norm: float = 1.0
    """Gradients of the global batch are clipped to this norm."""


@dataclass(frozen=True)
class Augment:
    scale: tuple[float, float] = (0.9, 1.0)
    """Smallest and largest fraction of the image's area that a random crop keeps."""
    color_jitter: tuple[float, float, float, float] = (0.2, 0.2, 0.1, 0.0)
    """Strength in brightness, contrast, saturation, hue."""
    color_jitter_prob: float = 0.7
    """Probability of colour jitter (independent)."""
    gray_scale_prob: float = 0.2
    """Probability of grayscale (independent)."""
    flip_prob: float = 0.0
    """Probability of a horizontal flip. Leave at 0 when captions depend on left and right."""
    blur_prob: float = 0.0
    """Probability of a Gaussian blur with a sigma of 0.1 to 2 pixels."""
    downscale_prob: float = 0.0
    """Probability of reducing the image, to a quarter of the model's size at the least, and enlarging it
    again: useful when queries are thumbnails or screenshots."""


@dataclass(frozen=True)
class Captions:
    """Which caption of a sample the model sees, and in which form."""

    sample: Literal["random", "first"] = "random"
    """random: one of the sample's captions, drawn anew each epoch. first: always its first caption."""
    tag_dropout: float = 0.0
    """Probability of dropping each tag of a comma-separated caption ("home, house, building"); at least one
    stays.
    """
    templates: tuple[str, ...] = ()
    """Templates around captions, as "an icon of {}" "{}"; one is drawn each time."""


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run. The defaults are those of train/recipes/spectrum_icons.yaml."""

    model: Model
    """NAME:PRETRAINED (ViT-L-14:laion2b_s32b_b82k; ViT-B-32:none for random weights), NAME:FILE (weights of
    that architecture), hf-hub:ID, local-dir:PATH, or a run folder."""
    data: Data
    """Folder of shards, made by: python -m data_prep build. Or several, each with its share of every batch,
    as icons=0.7 general=0.3 (in YAML a mapping). An epoch is then one of the first, which alone is validated;
    the others have epochs of their own."""
    run: Run
    """Run folder to write. An unfinished run of the same recipe in it is resumed."""
    epochs: int = 40
    global_batch_size: int = 384
    """Pairs per optimizer step, over all ranks and micro batches."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Pairs that one rank computes at once; smaller values need less memory. auto: as many as fit."""
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast, with fp32 weights and loss. fp32: on a GPU, matrix products of the towers use TF32."""
    activation_checkpointing: Literal["none", "selective", "full", "auto"] = "auto"
    """What the backward pass recomputes to save memory. none: nothing. selective: norms and activations
    (three fifths of the memory; needs compiled blocks). full: every block (an eighth, and a third more time).
    auto: the first that fits."""
    patch_dropout: float = 0.0
    """Fraction of an image's patches that training leaves out, blank ones first; none in the last tenth of
    the run.
    """
    compile: Literal["always", "never", "auto"] = "auto"
    """Compile the blocks of both towers. auto: on a GPU."""
    deterministic: bool = False
    """Give the same weights bit for bit when a run is repeated or resumed on a GPU, more slowly. Without it,
    they are equal to rounding; order and data are exact with and without it."""
    loss: Literal["clip", "siglip"] = "clip"
    """clip: softmax over the global batch. siglip: a sigmoid for each image and text; needs a model with a
    logit_bias."""
    same_group: Literal["negative", "positive"] = "negative"
    """How pairs of a batch that share a group or a caption count for each other: as negatives, or as
    positives (multi-positive InfoNCE)."""
    lock: Literal["none", "image", "text"] = "none"
    """Freeze one tower (LiT); the other adapts to it."""
    l2_sp: float = 0.0
    """L2-SP: after each step, pull every weight towards its initial value by lr times this. 100 is weak,
    10000 is strong; 0 disables."""
    replay: Shards = ""
    """Folder of shards with general pairs. Each step distills the initial model's features of some of them,
    so that less is forgotten. own: the images of the training pairs, for lack of general pairs."""
    replay_texts: str = ""
    """File of general sentences, one per line, in UTF-8. They take the place of the captions that are
    replayed."""
    replay_weight: float = 1.0
    """Weight of the replay loss beside the contrastive loss."""
    optim: Optim = field(default_factory=Optim)
    augment: Augment = field(default_factory=Augment)
    captions: Captions = field(default_factory=Captions)
    lora_rank: int = 0
    """LoRA rank; 0 disables. Adapts linear layers and attention; other weights, visual.proj and
    text_projection among them, stay frozen. Exports contain the merged weights. Use about ten times the
    learning rate."""
    ema: float = 0.0
    """Decay of an exponential moving average of the weights, such as 0.9998; 0 disables. It is validated too.
    """
    wise_ft: tuple[float, ...] = ()
    """WiSE-FT: alphas such as 0.5 0.7. (1 - alpha) * initial + alpha * trained weights (the EMA, if there is
    one) are validated too. 0 is the initial weights: nothing worse is exported."""
    best_metric: str = "val/mean/R@1"
    """Validation metric that selects the exported weights."""
    retention_set: Shards = ""
    """Folder of shards with what the model must not forget; scored as retention/ at each validation."""
    max_retention_drop: float = 1.0
    """Largest drop of retention/mean/R@1 that exported weights may have, 0.005 for half a point. If every
    candidate exceeds it, the one that drops least is exported."""
    seed: int = 0
    groups_fraction: float = 1.0
    """Fraction of the training groups that is used. The seed decides which; a smaller fraction is a part of a
    larger one. python -m train.forecast sets it."""
    cache_dir: str = ""
    """Folder of this machine for shards of a URL, shared by all processes. Default: ~/.cache/cliptune/shards.
    """
    cache_gb: float = 0.0
    """Most that the shards in it may take, in 10^9 bytes; 0: half of what is free on its disk."""
    workers: int = 4
    """Processes per rank that read and crop images; 0 reads in the training process."""
    log_every_steps: int = 10
    log: tuple[Literal["tensorboard", "trackio", "wandb"], ...] = ("tensorboard",)
    """What shows the curves: TensorBoard, Trackio, Weights & Biases. RUN/metrics.jsonl is always written."""
    save_every_minutes: float = 15.0
    """A checkpoint is written after each epoch, and when the last one is older than this."""
    keep_checkpoints: int = 2
    """Newest checkpoints to keep, beside the best one."""
    max_nonfinite_steps: int = 10
    """Consecutive steps with a non-finite loss or gradient after which the run rolls back to its last
    checkpoint, once."""
    on_damage: Literal["stop", "skip"] = "stop"
    """What happens when a training sample is damaged (its hash differs from the index's). stop: the run ends.
    skip: another sample takes its place, and RUN/damaged.jsonl lists it."""
    timeout_minutes: float = 10.0
    """A rank that is silent for longer ends the run; the same command resumes from the last checkpoint."""


# Keys that may change when a run is resumed: they change no number, or only by rounding (the last four); with
# on_damage a run goes on that would end. The paths of data, replay and replay_texts may change, their content
# may not (Run.check_data).
RESUME_SAFE = (
    "run",
    "data",
    "replay",
    "replay_texts",
    "cache_dir",
    "cache_gb",
    "workers",
    "log_every_steps",
    "log",
    "save_every_minutes",
    "keep_checkpoints",
)
RESUME_SAFE += ("max_nonfinite_steps", "on_damage", "timeout_minutes")
RESUME_SAFE += ("micro_batch_size", "activation_checkpointing", "compile", "deterministic")


Options = TypeVar("Options")


def parse(arguments: list[str], prog: str = "python -m train RECIPE", guide: str | None = None) -> Recipe:
    """Parse a command line, `[RECIPE] [--flag value ...]`; tyro prints help and mistakes, and exits.

    Args:
        prog: start of the usage line.
        guide: text above the options in --help; the schema's docstring by default.

    Raises:
        UserError: no such recipe file, an unknown key in it, or a value out of range.
    """
    recipe = tyro.cli(Recipe, args=_as_flags(arguments), prog=prog, description=guide)
    _check_values(recipe)
    return recipe


def parse_with(options: type[Options], arguments: list[str], prog: str, guide: str) -> tuple[Options, Recipe]:
    """Parse a command's own options and a recipe; --help lists the command's own options alone.

    Args:
        options: dataclass of the command's options.
        prog, guide: see parse().

    Raises:
        UserError: see parse().
    """
    if {"-h", "--help"} & set(arguments):
        tyro.cli(options, args=["--help"], prog=prog, description=guide, config=CONFIG)
    own = Annotated[options, tyro.conf.arg(name=""), tyro.conf.FlagCreatePairsOff]
    both = dataclasses.make_dataclass(
        "Both", [("own", own), ("recipe", Annotated[Recipe, tyro.conf.arg(name="")])], frozen=True
    )
    parsed = tyro.cli(both, args=_as_flags(arguments), prog=prog)
    _check_values(parsed.recipe)
    return parsed.own, parsed.recipe


def _as_flags(arguments: list[str]) -> list[str]:
    """The command line with the recipe file, where the first argument is one, replaced by its flags."""
    if {"-h", "--help"} & set(arguments):
        return ["--help"]  # with any recipe, or with the word RECIPE as the usage line has it
    if arguments and not arguments[0].startswith("-"):
        file = recipe_file(arguments[0])
        return [*flags_of(file), *_run_of(file), *arguments[1:]]
    if arguments and not any(argument.partition("=")[0] == "--model" for argument in arguments):
        raise UserError(
            f"no RECIPE: the first argument must be a file, or one of these names: {_names()}; without a"
            " RECIPE, --model is required"
        )
    return arguments


def _names() -> str:
    return ", ".join(recipe.stem for recipe in sorted(RECIPES.glob("*.yaml")))


def _run_of(file: Path) -> list[str]:
    """--run with the folder of a recipe file that is in a run; a copied or moved run's names the old one."""
    is_in_run = file.name == "recipe.yaml" and any(
        os.path.lexists(file.parent / name) for name in ("checkpoints", "environment.json", "status.json")
    )
    return ["--run", str(file.parent)] if is_in_run else []


def recipe_file(recipe: str | Path) -> Path:
    """The file of a recipe that is typed as a path, or as the name of one of the project: "icons"."""
    named = RECIPES / f"{recipe}.yaml"
    by_name = len(Path(recipe).parts) == 1 and named.is_file() and not Path(recipe).is_file()
    return named if by_name else Path(recipe)


class _Loader(yaml.SafeLoader):
    """A SafeLoader that refuses a key that is given twice, of which YAML's would silently take the last."""

    def compose_mapping_node(self, anchor: str | None) -> yaml.MappingNode:
        node, first = super().compose_mapping_node(anchor), {}
        for key, _ in node.value:
            before = first.setdefault((key.tag, key.value), key) if isinstance(key, yaml.ScalarNode) else key
            if before is not key:
                lines = (before.start_mark.line + 1, key.start_mark.line + 1)
                raise ValueError(
                    f"{key.value!r:.40} is given twice, in lines {lines[0]} and {lines[1]}; remove one"
                )
        return node


def read_yaml(path: Path) -> object:
    """The content of a small YAML file of a person's or a stranger's.

    Raises:
        OSError, yaml.YAMLError, ValueError, RecursionError: it is none, too large, nested too deeply, has
            a key twice, or many aliases, with which a few lines become gigabytes when they are written.
    """
    with open(path, encoding="utf-8") as file:
        text = file.read(MAX_YAML_CHARACTERS + 1)
    if len(text) > MAX_YAML_CHARACTERS:
        raise ValueError(f"more than {MAX_YAML_CHARACTERS:,} characters")
    depth = aliases = 0
    for event in yaml.parse(text):  # lazily: a deep file takes PyYAML minutes to the end
        depth += isinstance(event, yaml.CollectionStartEvent) - isinstance(event, yaml.CollectionEndEvent)
        aliases += isinstance(event, yaml.AliasEvent)
        if depth > MAX_YAML_DEPTH or aliases > MAX_ALIASES:
            raise ValueError(f"more than {MAX_YAML_DEPTH} levels, or more than {MAX_ALIASES} aliases (*name)")
    return yaml.load(text, _Loader)


def flags_of(path: Path) -> list[str]:
    """The YAML recipe at `path` as flags: {optim: {lr: 1e-5}} -> ["--optim.lr", "1e-5"]."""
    try:
        values = read_yaml(path)
    except (FileNotFoundError, IsADirectoryError):
        raise UserError(
            f"{path}: no such recipe file; pass a file, or one of these names: {_names()}"
        ) from None
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: must be a list of `key: value` lines")
    return _flatten(values, Recipe, path, "")


def _flatten(values: dict, schema: type, path: Path, prefix: str) -> list[str]:
    types = typing.get_type_hints(schema)
    flags = []
    for key, value in values.items():
        if key not in types:
            near = difflib.get_close_matches(str(key), types, n=1)
            hint = (
                f"did you mean '{prefix}{near[0]}'?"
                if near
                else f"valid keys: {', '.join(types)}; remove it if an older version wrote this file"
            )
            raise UserError(f"{path}: unknown key '{prefix}{key}'; {hint}")
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise UserError(
                    f"{path}: '{prefix}{key}' must be a group of keys"
                    f" ({', '.join(typing.get_type_hints(types[key]))}), not {value!r}"
                )
            flags += _flatten(value, types[key], path, f"{prefix}{key}.")
        else:
            flags += _flag(types[key], f"{prefix}{key}", value, path)
    return flags


def switch(key: str, on: bool) -> str:
    """A boolean key as typed: "--augment.key", or "--augment.no-key"."""
    section, dot, name = key.rpartition(".")
    return f"--{key}" if on else f"--{section}{dot}no-{name}"


def _flag(type_: object, key: str, value: object, path: Path) -> list[str]:
    """A key and its value as typed: a boolean becomes a switch, --key or --no-key."""
    if type_ is bool:
        if not isinstance(value, bool):
            raise UserError(f"{path}: {key}: {value!r} must be true or false")
        return [switch(key, value)]
    if type_ == Sets and isinstance(value, dict):
        if len(value) == 1 and str(*value.values()) not in ("1", "1.0"):
            raise UserError(f"{path}: {key}: {value}: shares must sum to 1")
        value = to_words(value)
    items = [str(item) for item in (value if isinstance(value, list) else [value])]
    for item in items:
        if FLAG.match(item):
            raise UserError(f"{path}: {key}: {item!r} begins like a flag, which a value must not")
        if (text := safe(item)) != item:  # the parser prints values as they are
            raise UserError(f"{path}: {key}: '{text}' must be of printable characters")
    return [f"--{key}", *items]


AT_LEAST = {"epochs": 1, "global_batch_size": 2, "workers": 0, "log_every_steps": 1, "keep_checkpoints": 1}
AT_LEAST |= {"cache_gb": 0}
AT_LEAST |= {"max_nonfinite_steps": 1, "lora_rank": 0, "l2_sp": 0, "replay_weight": 0}
AT_LEAST |= {"seed": 0, "optim.lr": 0, "optim.weight_decay": 0, "optim.eps": 0}
# torch, numpy and JSON of other programs take seeds up to this; more workers only fill the memory.
AT_MOST = {"seed": (1 << 63) - 1, "workers": 1024}
ABOVE_ZERO = ("optim.max_grad_norm", "timeout_minutes")
BELOW_ONE = ("patch_dropout", "ema", "captions.tag_dropout")
BELOW_ONE += ("optim.warmup_fraction",)


def _check_values(recipe: Recipe) -> None:
    """Check that a recipe's values are in range and fit each other.

    Raises:
        UserError: names all values that are not, each with what is valid.
    """
    values = leaves(dataclasses.asdict(recipe))
    alphas = {f"{alpha:.2f}" for alpha in recipe.wise_ft}
    smallest, largest = recipe.augment.scale
    rules = [(key, values[key] >= least, f"must be at least {least}") for key, least in AT_LEAST.items()]
    rules += [(key, values[key] <= most, f"must be at most {most}") for key, most in AT_MOST.items()]
    rules += [(key, values[key] > 0, "must be above 0") for key in ABOVE_ZERO]
    rules += [(key, 0 <= values[key] < 1, "must be at least 0 and below 1") for key in BELOW_ONE]
    rules += [
        (key, 0 <= value <= 1, "must be a probability from 0 to 1")
        for key, value in values.items()
        if key.endswith("_prob")
    ]
    rules += [
        (
            "micro_batch_size",
            recipe.micro_batch_size == "auto" or recipe.micro_batch_size >= 1,
            "must be auto or at least 1",
        ),
        (
            "wise_ft",
            all(0 <= alpha < 1 for alpha in recipe.wise_ft) and len(alphas) == len(recipe.wise_ft),
            "alphas must be at least 0 and below 1, and differ in their second decimal",
        ),
        ("run", not is_url(recipe.run), "must be a folder of this machine, not a URL"),
        ("cache_dir", not is_url(recipe.cache_dir), "must be a folder of this machine, not a URL"),
        ("data", are_valid(recipe.data), "shares of different folders must be above 0 and sum to 1"),
        (
            "replay",
            recipe.replay != OWN or bool(recipe.replay_texts) or recipe.lock != "image",
            "a locked image tower forgets nothing; pass --replay-texts FILE too, or leave out --lock",
        ),
        (
            "replay_texts",
            not recipe.replay_texts or bool(recipe.replay),
            "needs --replay SHARDS, or --replay own",
        ),
        ("groups_fraction", 0 < recipe.groups_fraction <= 1, "must be above 0 and at most 1"),
        ("max_retention_drop", 0 <= recipe.max_retention_drop <= 1, "must be from 0 to 1"),
        (
            "max_retention_drop",
            recipe.max_retention_drop == 1 or bool(recipe.retention_set),
            "needs --retention-set SHARDS, on which the drop is measured",
        ),
        (
            "activation_checkpointing",
            recipe.activation_checkpointing != "selective" or recipe.compile != "never",
            "needs compiled blocks; pass --compile always, or --activation-checkpointing full",
        ),
        (
            "lock",
            recipe.lock != "image" or not recipe.patch_dropout,
            "a locked image tower drops no patches; leave out --patch-dropout or --lock",
        ),
        (
            "optim.betas",
            all(0 <= beta < 1 for beta in recipe.optim.betas),
            "both must be at least 0 and below 1",
        ),
        (
            "augment.scale",
            0 < smallest <= largest <= 1,
            "must be two fractions of the area, the smaller first, such as 0.9 1.0",
        ),
        (
            "augment.color_jitter",
            min(recipe.augment.color_jitter) >= 0 and recipe.augment.color_jitter[3] <= 0.5,
            "strengths must be at least 0, and hue, the last, at most 0.5",
        ),
        (
            "captions.templates",
            all(template.count("{}") == 1 for template in recipe.captions.templates),
            "each template must contain {} once, such as 'an icon of {}'",
        ),
    ]
    problems = [f"{flag(key, values[key])}: {rule}" for key, holds, rule in rules if not holds]
    if problems:
        raise UserError("; ".join(problems))


def flag(key: str, value: object) -> str:
    """A key and its value as a person types them: "--optim.max-grad-norm 1.0"."""
    if isinstance(value, dict):
        words = to_words(value)
    else:
        words = map(str, value if isinstance(value, (tuple, list)) else [value])
    return f"--{key.replace('_', '-')} {' '.join(words)}"


def plain(recipe: Recipe) -> Recipe:
    """The recipe without the flags of a command; see parse()."""
    return Recipe(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)})


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """Keys that change what a run computes and differ: "optim.lr: 1e-05 before, 2e-05 now"."""
    before, now = (leaves(dataclasses.asdict(recipe)) for recipe in (old, new))
    changed = [key for key in now if key not in RESUME_SAFE and before[key] != now[key]]
    shares = [[*shares_of(recipe.data).values()] for recipe in (old, new)]
    if shares[0] != shares[1]:  # folders may have moved
        changed.append("data")
        before["data"], now["data"] = (" ".join(to_words(recipe.data)) for recipe in (old, new))
    return [f"{key}: {before[key]} before, {now[key]} now" for key in changed]


def leaves(values: dict, prefix: str = "") -> dict:
    """{"optim": {"lr": 1e-5}} -> {"optim.lr": 1e-5}. The shares of `data` are one value."""
    found = {}
    for key, value in values.items():
        is_group = isinstance(value, dict) and key != "data"
        found |= leaves(value, f"{prefix}{key}.") if is_group else {f"{prefix}{key}": value}
    return found
