"""The model card: every figure in it comes from a file, and what no file says is left out.

RUN (recipe, environment, metrics) + SHARDS (manifest, report) + results of eval (JSON) + pictures ->
FOLDER/README.md, FOLDER/pictures/

The words are in card.md. Names of files and models are shown without the folders that they lie in on this
machine."""

import json
import math
import re
import shutil
from pathlib import Path

import open_clip
import yaml
from huggingface_hub import ModelCard, ModelCardData
from matplotlib.figure import Figure
from safetensors import safe_open

from data_prep.atomic import atomic_file
from data_prep.errors import UserError
from train.export.folder import data_of
from train.model.clip import CONFIG_FILE, WEIGHTS_FILE, load, public_name
from train.publish.card_tables import DIRECTIONS, markdown_table, read_tables
from train.recipe import RESUME_SAFE
from train.retain.select import EMA, TRAINED

TEMPLATE = Path(__file__).parent / "card.md"
PICTURES, CURVE = "pictures", "validation.png"
SHOWN_PICTURES = (".png", ".jpg", ".jpeg", ".svg", ".webp", ".gif")


def write_card(
    folder: Path,
    repo: str,
    run: Path | None = None,
    results: tuple[Path, ...] = (),
    pictures: tuple[Path, ...] = (),
    dataset: tuple[str, ...] = (),
    license: str = "",
) -> str:
    """Write the card of an exported folder, and the pictures that it shows.

    Args:
        repo: USER/NAME, where it will be loaded from.
        results: JSON of `python -m eval retrieval --json` or of `python -m eval compare`.
        dataset: hub data sets beside those that the shards were made of.
        license: as the hub writes it; "" leaves it out.

    Returns:
        The card.

    Raises:
        UserError: a result or a picture cannot be read, or is of other weights.
    """
    recipe = recipe_of(run) if run else {}
    data = data_facts(run) if run else {}
    tables = read_tables(results, weights_of(folder)) if results else []
    base = base_of(recipe["model"]) if run else ""
    base_model = hub_id(base)
    datasets = sorted({*dataset, *data.get("hub_datasets", [])})
    measured = [each for table in tables for each in table.eval_results(datasets)]
    metadata = ModelCardData(
        license=license or None,
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=datasets or None,
        tags=["clip", "open_clip", "image-text-retrieval"],
        model_name=repo.split("/")[1] if measured else None,
        eval_results=measured or None,
    )
    card = ModelCard.from_template(
        metadata,
        template_path=str(TEMPLATE),
        repo=repo,
        name=repo.split("/")[1],
        model=model_facts(folder),
        base=public_name(base),
        from_random=base.endswith(":none"),
        recipe=recipe_table(recipe),
        data=data,
        training=training_facts(run) if run else {},
        results=[table.markdown() for table in tables],
        has_control=any(table.is_control for table in tables),
        pictures=gather_pictures(folder, run, pictures),
        in_transformers=(folder / "config.json").is_file(),
    )
    text = re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"
    with atomic_file(folder / "README.md") as partial:
        partial.write_text(text, encoding="utf-8")
    return text


def recipe_of(run: Path) -> dict:
    return yaml.safe_load((run / "recipe.yaml").read_text())


def base_of(model: str) -> str:
    """The MODEL that a chain of runs began with."""
    while (Path(model) / "recipe.yaml").is_file():
        model = recipe_of(Path(model))["model"]
    return model


def hub_id(model: str) -> str | None:
    """The repository that a MODEL comes from, where open_clip knows one: ViT-L-14:laion2b_s32b_b82k has
    USER/NAME of LAION's.
    """
    if model.startswith("hf-hub:"):
        return model.removeprefix("hf-hub:").partition("@")[0]
    name, _, tag = model.partition(":")
    return open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "").rpartition("/")[0] or None


def recipe_table(recipe: dict) -> str:
    """The keys that decide what a run computes."""
    leaves = {}
    for key, value in recipe.items():
        if key not in RESUME_SAFE:
            leaves |= (
                {f"{key}.{name}": each for name, each in value.items()}
                if isinstance(value, dict)
                else {key: value}
            )
    if leaves:
        leaves["model"] = public_name(leaves["model"])
        leaves |= {
            key: Path(recipe[key]).name for key in ("replay", "control") if recipe.get(key)
        }  # no folders of this machine
    return (
        markdown_table([["key", "value"], *([name, f"`{value}`"] for name, value in leaves.items())])
        if leaves
        else ""
    )


def weights_of(folder: Path) -> str:
    """The fingerprint of the model that an export is of, which results of eval carry too."""
    return (
        json.loads((folder / "export.json").read_text()).get("weights_sha256")
        or load(f"local-dir:{folder}").fingerprint()
    )


def model_facts(folder: Path) -> dict:
    """What the exported files say of the model."""
    config = json.loads((folder / CONFIG_FILE).read_text())["model_cfg"]
    with safe_open(folder / WEIGHTS_FILE, "pt") as weights:
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in weights.keys())  # noqa: SIM118 not a dict
    record = json.loads((folder / "export.json").read_text())
    differences = {}
    for kind, found in record.get("differences", {}).items():
        if values := [found[name] for name in ("image_features", "text_features") if name in found]:
            differences[kind] = f"{max(values):.2g}"
    least_cosine = record.get("differences", {}).get("transformers", {}).get("from_pictures_least_cosine")
    return {
        "from_pictures_least_cosine": f"{least_cosine:.4f}" if least_cosine else "",
        "dtype": record.get("dtype", "fp32"),
        "differences": differences,
        "parameters": f"{parameters / 1e6:.1f} million",
        "embed_dim": config["embed_dim"],
        "image_size": config["vision_cfg"].get("image_size", 224),
        "context_length": config["text_cfg"].get("context_length", 77),
    }


def data_facts(run: Path) -> dict:
    facts = {"sha256": json.loads((run / "environment.json").read_text())["data_fingerprint"]}
    if (folder := data_of(run)) is None:
        return facts
    manifest = json.loads((folder / "manifest.json").read_text(encoding="utf-8"))
    inputs = list(manifest["inputs"])
    hub = [found[1] for source in inputs if (found := re.match(r"hf://datasets/([^/@]+/[^/@]+)", source))]
    names = [re.split(r"[?#]", source.rstrip("/"))[0].rsplit("/", 1)[-1] for source in inputs]
    facts |= {"hub_datasets": hub, "inputs": names[:5], "more_inputs": max(0, len(names) - 5)}
    if (folder / "report.json").is_file():
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        rows = [
            [name, *(f"{counts[kind]:,}" for kind in ("images", "captions", "groups"))]
            for name, counts in report["splits"].items()
        ]
        facts |= {"rows": f"{report['rows']:,}", "rejects": f"{report['rejects']:,}"}
        facts["splits"] = markdown_table([["split", "images", "captions", "groups"], *rows])
    return facts


def training_facts(run: Path) -> dict:
    """Pairs seen, the machine, and how long the steps took."""
    environment = json.loads((run / "environment.json").read_text())
    device, ranks = environment["device"], environment["world_size"]
    facts = {
        "device": (
            f"{ranks} x {device}"
            if device != "cpu"
            else f"{ranks} x CPU with {environment['threads']} threads"
        )
    }
    facts["packages"] = ", ".join(
        f"{name} {environment['packages'][name]}" for name in ("torch", "open_clip_torch")
    )
    state = json.loads((run / "checkpoints" / "best" / "state.json").read_text())
    facts["weights"] = {TRAINED: "", EMA: "a moving average over the steps"}.get(
        name := state.get("weights", TRAINED), f"a {name}"
    )
    facts |= {"samples": f"{state['samples']:,}", "commit": (environment["git_commit"] or "")[:12]}
    if seconds := seconds_of_steps(_log(run)):
        unit, size = next(
            (unit, size)
            for unit, size in (("hours", 3600), ("minutes", 60), ("seconds", 1))
            if seconds >= size or size == 1
        )
        facts["time"] = f"{seconds / size:.1f} {unit}"
    return facts


def _log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def seconds_of_steps(log: list[dict]) -> float:
    """What the logged steps took, waiting for data included: validation, checkpoints and what was done twice
    are not in it.
    """
    seconds, before = 0.0, 0
    for line in log:
        if "time/pairs_per_s" in line:
            seconds += (line["samples"] - before) / line["time/pairs_per_s"]
            before = line["samples"]
    return seconds


def gather_pictures(folder: Path, run: Path | None, pictures: tuple[Path, ...]) -> list[str]:
    """Put the curve of validation and the given files into FOLDER/pictures, and nothing else; their names."""
    shutil.rmtree(folder / PICTURES, ignore_errors=True)
    (folder / PICTURES).mkdir()
    names = [CURVE] if run and draw_curve(_log(run), folder / PICTURES / CURVE) else []
    for path in pictures:
        if path.suffix.lower() not in SHOWN_PICTURES or not path.is_file():
            raise UserError(f"--pictures {path}: {', '.join(SHOWN_PICTURES)} files are wanted")
        if (name := re.sub(r"[^\w.-]", "-", path.name)) in names:
            raise UserError(f"--pictures {path}: there is another {name}; rename one")
        shutil.copyfile(path, folder / PICTURES / name)
        names.append(name)
    if not names:
        (folder / PICTURES).rmdir()
    return names


def draw_curve(log: list[dict], path: Path) -> bool:
    """R@1 on the validation split over the run; False where there were no two validations to join by a line."""
    lines = [line for line in log if "val/image_to_text/R@1" in line]
    if len(lines) < 2:
        return False
    figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for direction in DIRECTIONS[:2]:
        values = [100 * line[f"val/{direction}/R@1"] for line in lines]
        axes.plot(
            [line["samples"] for line in lines],
            values,
            marker="o",
            markersize=3,
            label=direction.replace("_", " "),
        )
    axes.set(xlabel="pairs seen", ylabel="R@1 on the validation split, %", ylim=(0, None))
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, metadata={"Software": None})  # the same log gives the same bytes
    return True
