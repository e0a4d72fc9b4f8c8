"""A recipe is a file of flags: YAML keys and typed flags are the same names, checked by one parser.

    train/recipes/demo.yaml  ->  --model demo-vit:none --optim.lr 1e-3 ...  +  what was typed  ->  Recipe

What was typed comes last and wins. The merged recipe is written into the run, and is itself a recipe.
"""

import dataclasses
import difflib
import typing
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar

import tyro
import yaml

from data_prep.errors import UserError

RECIPES = Path(__file__).parent / "recipes"


@dataclass(frozen=True)
class Optim:
    """AdamW with a linear warm-up and a cosine decay to zero."""

    lr: float = 5e-6
    """Peak learning rate. Fine-tuning wants 1e-6 to 3e-5; from random weights 1e-3."""
    warmup: float = 0.05
    """Fraction of the run in which the rate rises to its peak."""
    weight_decay: float = 0.2
    """On matrices alone: not on biases, norms, positional embeddings or logit_scale."""
    beta1: float = 0.9
    beta2: float = 0.98
    eps: float = 1e-6
    clip: float = 1.0
    """Largest norm of the gradient of the global batch."""
    layer_decay: float = 1.0
    """The rate of each block is that of the next one times this, down from each tower's output: what is
    general moves least. 0.65 to 0.9 is usual; 1.0: all alike."""
    image_lr: float = 1.0
    """Rate of the image tower, as a factor of lr."""
    text_lr: float = 1.0
    """Rate of the text tower, as a factor of lr."""


@dataclass(frozen=True)
class Augment:
    scale: tuple[float, float] = (0.9, 1.0)
    """Part of the picture's area that a random crop keeps: least, most."""
    color_jitter: tuple[float, float, float, float] = (0.2, 0.2, 0.1, 0.0)
    """Strength in brightness, contrast, saturation, hue."""
    color_jitter_prob: float = 0.7
    """How often the jitter is applied; a coin of its own."""
    gray_scale_prob: float = 0.2
    """How often all color is removed; a coin of its own."""
    flip_prob: float = 0.0
    """How often left and right change places. A flipped arrow, letter or hand is another one, and its caption
    then lies.
    """
    blur_prob: float = 0.0
    """How often a Gaussian blur of 0.1 to 2 pixels is applied."""
    downscale_prob: float = 0.0
    """How often the picture is reduced, to a quarter of the model's size at the least, and enlarged again:
    queries are often thumbnails.
    """
    theme_prob: float = 0.0
    """How often black and white become another dark and light pair, half of the time with the light one as
    ink, as in a dark theme. For icons and drawings; a photo would become a negative, and on dark the colors
    of a picture become their complements."""
    place_prob: float = 0.0
    """How often the picture lies, at 0.4 to 1 of its size, somewhere on a plain ground of its border's color,
    as in a screenshot.
    """


@dataclass(frozen=True)
class Captions:
    """What of a sample's captions the model is shown."""

    pick: Literal["any", "first"] = "any"
    """any: another of a sample's captions each time. first: always its first, as tools do that know of one;
    for comparisons.
    """
    tag_dropout: float = 0.0
    """How often each tag of a caption like "home, house, building" is left out, so that each is learned alone
    too; one stays.
    """
    templates: tuple[str, ...] = ()
    """Sentences around captions, as "an icon of {}" "{}": one is drawn each time. For names and tags that are
    asked for in sentences.
    """


@dataclass(frozen=True)
class Recipe:
    """Everything that decides a run. The defaults are those of the seed recipe, recipes/spectrum_icons.yaml."""

    model: str
    """NAME:PRETRAINED (ViT-L-14:laion2b_s32b_b82k; ViT-B-32:none for random weights), hf-hub:ID,
    local-dir:PATH, or a run.
    """
    data: str
    """Folder of shards, made by: python -m data_prep build."""
    run: str
    """Run folder to write; if it holds an unfinished run of this recipe, that is resumed."""
    epochs: int = 40
    batch: int = 384
    """Pairs in one optimizer step, over all ranks and micro batches."""
    micro_batch_size: int | Literal["auto"] = "auto"
    """Pairs that one GPU holds at once; smaller needs less memory and gives the same gradients. auto: as many
    as fit.
    """
    precision: Literal["bf16", "fp32"] = "bf16"
    """bf16: autocast, with fp32 weights and loss. fp32: on a GPU, the towers' products are TF32's."""
    memory: Literal["none", "selective", "checkpoint", "auto"] = "auto"
    """What the backward pass computes again to need less memory: nothing; norms and activations (three fifths
    of the memory, compiled); every block (an eighth, for a third more time). auto: the first that fits."""
    patch_dropout: float = 0.0
    """Part of each picture's patches that steps leave out, the blank ones first; the last tenth of the run
    leaves out none.
    """
    compile: Literal["yes", "no", "auto"] = "auto"
    """Compile the blocks of the towers; auto: on a GPU."""
    compress_gradients: bool = False
    """Ranks exchange gradients in bf16: half the traffic, for slow networks between nodes; not exact."""
    loss: Literal["clip", "siglip"] = "clip"
    """clip: each picture chooses among the batch's texts, and each text among its pictures. siglip: a yes or
    no for each two of them; it wants a model with a logit_bias, as SigLIP's are, and small batches do with
    it."""
    mates: Literal["negatives", "masked", "positives"] = "negatives"
    """Pairs of a batch that share a group or a caption: pushed apart as any others (negatives), not compared
    (masked), or drawn together (positives)."""
    spread_mates: bool = False
    """Keep the pictures of one group far from each other in the order of an epoch, so that they seldom meet
    in a batch.
    """
    lock: Literal["none", "image", "text"] = "none"
    """A tower that stays as it is, and costs no memory for its gradients; the other one learns to fit it."""
    l2_sp: float = 0.0
    """Each step takes every weight lr * this of its way back to the model it began as, so that none strays
    further than about 1 / this: 100 lets weights move freely, 10000 hardly. 0: no pull."""
    replay: str = ""
    """Folder of shards whose pairs the model shall not forget: each step holds its features of some of them
    to those that it began with.
    """
    replay_weight: float = 1.0
    """Weight of that distance beside the loss."""
    optim: Optim = field(default_factory=Optim)
    augment: Augment = field(default_factory=Augment)
    captions: Captions = field(default_factory=Captions)
    lora_rank: int = 0
    """Train W + B A in place of each matrix W, with B and A of this rank alone (LoRA): less memory for
    moments, less is forgotten, and it wants ten times the rate. What is given away has W + B A in place of W.
    0 trains W."""
    ema: float = 0.0
    """Decay of a moving average of the weights, 0.9998 for one over 5000 steps, shorter at the beginning; 0
    keeps none. Validated too.
    """
    mixtures: tuple[float, ...] = ()
    """Shares, as 0.5 0.7, of the trained weights (of their average, with ema) in mixtures with the first
    (WiSE-FT), validated too.
    """
    best_metric: str = "val/mean/R@1"
    """Metric of a validation by which the weights to use are chosen; of ranks the lowest, of all others the
    highest.
    """
    control: str = ""
    """Folder of shards of what the model must not forget; its val split, or test, is scored as control/ at
    each validation.
    """
    max_retention_drop: float = 1.0
    """What chosen weights may lose of the first weights' retention/mean/R@1, 0.005 for half a point; where all
    lose more, the least loser.
    """
    patience_epochs: int = 0
    """End after as many epochs in a row without a new best; this cuts the end of the cosine, where much is
    gained. 0 never ends early.
    """
    seed: int = 0
    workers: int = 4
    """Processes per rank that read and augment pictures; 0 does it in the training process."""
    log_every_steps: int = 10
    save_every_minutes: float = 15.0
    """A checkpoint is written after each epoch, and when the last one is older than this."""
    keep: int = 2
    """Newest checkpoints to keep, beside the best one."""
    max_nonfinite_steps: int = 10
    """Steps in a row without a finite loss and gradient, after which the run goes back to its last
    checkpoint, once.
    """
    timeout_minutes: float = 10.0
    """A rank that is silent for longer ends the run; the same command goes on from the last checkpoint."""


# What may differ between the parts of one run: it changes no number, or by rounding alone (the last three).
# The place of data and replay is free, their content is not; train.run.folder compares that.
RESUME_SAFE = (
    "run",
    "data",
    "replay",
    "workers",
    "log_every_steps",
    "save_every_minutes",
    "keep",
    "max_nonfinite_steps",
    "timeout_minutes",
)
RESUME_SAFE += ("micro_batch_size", "memory", "compile")


AnyRecipe = TypeVar("AnyRecipe", bound=Recipe)


def parse(arguments: list[str], schema: type[AnyRecipe] = Recipe) -> AnyRecipe:
    """The recipe of a command line: `[RECIPE.yaml] [--flag value ...]`; tyro prints help and mistakes, and
    exits.

    Args:
        schema: Recipe, or one with flags of its command beside.

    Raises:
        UserError: no such recipe file, or a key in it that no recipe has.
    """
    flags = []
    if arguments and not arguments[0].startswith("-"):
        flags, arguments = flags_of(Path(arguments[0])), arguments[1:]
    recipe = tyro.cli(
        schema,
        args=[*flags, *arguments],
        prog="python -m train RECIPE.yaml",
        config=(tyro.conf.FlagConversionOff,),
        use_underscores=True,
    )
    _check_values(recipe)
    return recipe


def flags_of(path: Path) -> list[str]:
    """The YAML recipe at `path` as flags: {optim: {lr: 1e-5}} -> ["--optim.lr", "1e-5"]."""
    try:
        values = yaml.safe_load(path.read_text())
    except (FileNotFoundError, IsADirectoryError):
        shipped = ", ".join(f"train/recipes/{recipe.name}" for recipe in sorted(RECIPES.glob("*.yaml")))
        raise UserError(f"{path}: no such recipe file; the project has {shipped}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise UserError(f"{path}: not readable as YAML ({' '.join(str(error).split())})") from None
    if not isinstance(values, dict):
        raise UserError(f"{path}: a recipe is a list of `key: value` lines, this is not")
    return _flatten(values, Recipe, path, "")


def _flatten(values: dict, schema: type, path: Path, prefix: str) -> list[str]:
    types = typing.get_type_hints(schema)
    flags = []
    for key, value in values.items():
        if key not in types:
            near = difflib.get_close_matches(str(key), types, n=1)
            hint = f"perhaps you meant '{prefix}{near[0]}'" if near else f"it can be {', '.join(types)}"
            raise UserError(f"{path}: a recipe has no key '{prefix}{key}'; {hint}")
        if dataclasses.is_dataclass(types[key]):
            if not isinstance(value, dict):
                raise UserError(
                    f"{path}: '{prefix}{key}' holds keys of its own"
                    f" ({', '.join(typing.get_type_hints(types[key]))}), not {value!r}"
                )
            flags += _flatten(value, types[key], path, f"{prefix}{key}.")
        else:
            items = value if isinstance(value, list) else [value]
            flags += [f"--{prefix}{key}", *map(str, items)]
    return flags


def _check_values(recipe: Recipe) -> None:
    for name, value, least in (
        ("epochs", recipe.epochs, 1),
        ("batch", recipe.global_batch_size, 2),
        ("micro_batch_size", 1 if recipe.micro_batch_size == "auto" else recipe.micro_batch_size, 1),
        ("workers", recipe.workers, 0),
        ("log_every_steps", recipe.log_every_steps, 1),
        ("keep", recipe.keep_checkpoints, 1),
        ("max_nonfinite_steps", recipe.max_nonfinite_steps, 1),
        ("patience_epochs", recipe.patience_epochs, 0),
        ("lora_rank", recipe.lora_rank, 0),
    ):
        if value < least:
            raise UserError(f"--{name} {value}: at least {least} is wanted")
    if not 0 <= recipe.patch_dropout < 1:
        raise UserError(
            f"--patch_dropout {recipe.patch_dropout}: a part of the patches is wanted, 0.5 for half of them,"
            " below 1"
        )
    if not 0 <= recipe.ema < 1:
        raise UserError(f"--ema {recipe.ema}: a decay below 1 is wanted, as 0.9998, or 0 for no average")
    names = [f"{share:.2f}" for share in recipe.wise_ft]
    if not all(0 < share < 1 for share in recipe.wise_ft) or len(set(names)) < len(names):
        raise UserError(
            f"--wise_ft {' '.join(map(str, recipe.wise_ft))}: shares between 0 and 1 are wanted, each"
            " hundredth at most once"
        )
    if not 0 <= recipe.max_retention_drop <= 1 or (
        recipe.max_retention_drop < 1 and not recipe.retention_set
    ):
        raise UserError(
            f"--max_retention_drop {recipe.max_retention_drop}: a part of 1 is wanted, as 0.005, with --retention_set SHARDS to"
            " lose it on"
        )
    if recipe.activation_checkpointing == "selective" and recipe.compile == "no":
        raise UserError(
            "--activation_checkpointing selective: only compiled blocks can do that; pass --compile yes, or --activation_checkpointing full"
        )
    if not 0 <= recipe.optim.warmup_fraction < 1:
        raise UserError(
            f"--optim.warmup_fraction {recipe.optim.warmup_fraction}: a fraction of the run is wanted, 0.05 for a twentieth,"
            " below 1"
        )
    if not 0 < recipe.optim.layer_decay <= 1:
        raise UserError(
            f"--optim.layer_decay {recipe.optim.layer_decay}: a layer's rate as a part of the next one's is"
            " wanted, as 0.8"
        )
    for name, factor in (("image", recipe.optim.image_lr), ("text", recipe.optim.text_lr)):
        if factor <= 0:
            raise UserError(
                f"--optim.{name}_lr {factor}: a factor above 0 is wanted; to train nothing of that tower:"
                f" --lock {name}"
            )
    for name, weight in (("l2_sp", recipe.l2_sp), ("replay_weight", recipe.replay_weight)):
        if weight < 0:
            raise UserError(f"--{name} {weight}: 0 for none, or a weight above is wanted")
    if recipe.lock == "image" and recipe.patch_dropout:
        raise UserError(
            "--lock image: a tower that stays as it is drops no patches; leave out --patch_dropout, or --lock"
        )
    for name, value in dataclasses.asdict(recipe.augment).items():
        if name.endswith("_prob") and not 0 <= value <= 1:
            raise UserError(
                f"--augment.{name} {value}: how often is wanted, from 0 for never to 1 for always"
            )
    least, most = recipe.augment.scale
    if not 0 < least <= most <= 1:
        raise UserError(
            f"--augment.scale {least} {most}: two parts of the area are wanted, the smaller first, as 0.9 1.0"
        )
    if min(recipe.augment.color_jitter) < 0 or recipe.augment.color_jitter[3] > 0.5:
        strengths = " ".join(map(str, recipe.augment.color_jitter))
        raise UserError(
            f"--augment.color_jitter {strengths}: strengths from 0 on are wanted, and the last, hue, at"
            " most 0.5"
        )
    if not 0 <= recipe.captions.tag_dropout < 1:
        raise UserError(
            f"--captions.tag_dropout {recipe.captions.tag_dropout}: how often is wanted, from 0 for never,"
            " below 1"
        )
    for template in recipe.captions.templates:
        if template.count("{}") != 1:
            raise UserError(
                f"--captions.templates {template!r}: one {{}} is wanted, where the caption belongs, as in 'an"
                " icon of {}'"
            )


def plain(recipe: Recipe) -> Recipe:
    """The recipe without what a command has beside it; see parse()."""
    return Recipe(**{field.name: getattr(recipe, field.name) for field in dataclasses.fields(Recipe)})


def to_yaml(recipe: Recipe) -> str:
    return yaml.safe_dump(dataclasses.asdict(recipe), sort_keys=False)


def differences(old: Recipe, new: Recipe) -> list[str]:
    """The keys that change what a run computes, and differ: "optim.lr: 1e-05 before, 2e-05 now"."""
    before, now = leaves(dataclasses.asdict(old)), leaves(dataclasses.asdict(new))
    return [
        f"{key}: {before[key]} before, {now[key]} now"
        for key in now
        if key not in RESUME_SAFE and before[key] != now[key]
    ]


def leaves(values: dict, prefix: str = "") -> dict:
    """{"optim": {"lr": 1e-5}} -> {"optim.lr": 1e-5}."""
    found = {}
    for key, value in values.items():
        found |= leaves(value, f"{prefix}{key}.") if isinstance(value, dict) else {f"{prefix}{key}": value}
    return found
