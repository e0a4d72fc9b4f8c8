"""The model card: every figure comes from a file; what no file contains is left out.

RUN (recipe, environment, metrics) + SHARDS (manifest, report) + results of eval (JSON) + images ->
FOLDER/README.md, FOLDER/images/

The text is in card.md. Files and models are named without local folders.
"""

import json
import math
import re
import shutil
from pathlib import Path

import open_clip
import yaml
from huggingface_hub import ModelCard, ModelCardData
from huggingface_hub.constants import ENDPOINT
from safetensors import safe_open

from data_prep.atomic import add_to_mark, atomic_file
from data_prep.errors import UserError
from data_prep.tables import markdown_table
from train.export.folder import FEATURES, FORMATS, RECORD, shards_of
from train.export.snippets import use
from train.metrics import DIRECTIONS, title_of
from train.model.clip import CONFIG_FILE, WEIGHTS_FILE, load, public_name
from train.publish.card_tables import Table, read_tables
from train.recipe import RESUME_SAFE, leaves
from train.retain.select import EMA, TRAINED

TEMPLATE = Path(__file__).parent / "card.md"
IMAGES, CURVE = "images", "validation.png"
EVAL_RESULTS = ".eval_results"
IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".svg", ".webp", ".gif")


def write_card(
    folder: Path,
    repo: str,
    run: Path | None = None,
    results: tuple[Path, ...] = (),
    images: tuple[Path, ...] = (),
    dataset: tuple[str, ...] = (),
    license: str = "",
) -> str:
    """Write the card of an exported folder, and the images that it shows.

    Args:
        repo: USER/NAME, where it will be loaded from.
        results: JSON of `python -m eval retrieval --json` or of `python -m eval compare`.
        dataset: data sets on the hub, beside those that the shards were made of.
        license: by its hub identifier; "" leaves it out.

    Returns:
        The card.

    Raises:
        UserError: a result or an image cannot be read, or a result is of other weights.
    """
    record = json.loads((folder / RECORD).read_text())
    recipe = recipe_of(run) if run else {}
    data = data_facts(run) if run else {}
    tables = read_tables(results, weights_of(folder)) if results else []
    base = base_of(recipe["model"]) if run else ""
    base_model = hub_id(base)
    datasets = sorted({*dataset, *data.get("hub_datasets", [])})
    eval_results = [result for table in tables for result in table.eval_results(datasets)]
    metadata = ModelCardData(
        license=license or None,
        library_name="open_clip",
        pipeline_tag="zero-shot-image-classification",
        base_model=base_model,
        base_model_relation="finetune" if base_model else None,
        datasets=datasets or None,
        tags=tags_of(record),
        model_name=repo.split("/")[1] if eval_results else None,
        eval_results=eval_results or None,
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
        calibration=list(filter(None, (table.calibration() for table in tables))),
        has_retention=any(table.is_retention for table in tables),
        curve=f"{IMAGES}/{CURVE}",
        images=[f"{IMAGES}/{name}" for name in gather_images(folder, run, images)],
        use=use(record, repo),
        int8=int8_table(record),
    )
    text = re.sub(r"\n{3,}", "\n\n", str(card)).rstrip() + "\n"
    write_eval_results(folder, repo, tables, datasets)
    with atomic_file(folder / "README.md") as partial:
        partial.write_text(text, encoding="utf-8")
    add_to_mark(folder, "README.md", IMAGES, EVAL_RESULTS)
    return text


def tags_of(record: dict) -> list[str]:
    """How the hub finds the model: what it is for, and the libraries that load it."""
    formats = {file["format"] for file in record["files"].values()}
    libraries = {
        "transformers": ["transformers"],
        "sentence_transformers": ["sentence-transformers", "sentence-similarity"],
        "onnx": ["onnx", *(["transformers.js"] if "transformers" in formats else [])],
    }
    tags = ["clip", "open_clip", "image-text-retrieval"]
    return tags + [tag for name, named in libraries.items() if name in formats for tag in named]


def int8_table(record: dict) -> dict:
    """`n_images` and `table`: R@k with fp32 and with int8 weights; {} if not measured."""
    if not (measured := record.get("int8")):
        return {}
    rows = [
        [title_of(name), *(f"{100 * measured[dtype][name]:.1f} %" for dtype in ("fp32", "int8"))]
        for name in measured["fp32"]
    ]
    return {"n_images": f"{measured['n_images']:,}", "table": markdown_table(("", "fp32", "int8"), rows)}


def write_eval_results(folder: Path, repo: str, tables: list[Table], datasets: list[str]) -> None:
    """Replace FOLDER/.eval_results/: the hub's format beside `model-index`, for results on a data set of the
    hub (https://huggingface.co/docs/hub/eval-results).
    """
    shutil.rmtree(folder / EVAL_RESULTS, ignore_errors=True)
    for table in tables:
        if entries := table.eval_entries(datasets, f"{ENDPOINT}/{repo}"):
            (folder / EVAL_RESULTS).mkdir(exist_ok=True)
            name = re.sub(r"[^\w.-]", "-", f"{table.folder}-{table.split}.yaml")
            text = yaml.safe_dump(entries, sort_keys=False, allow_unicode=True)
            (folder / EVAL_RESULTS / name).write_text(text, encoding="utf-8")


def recipe_of(run: Path) -> dict:
    return yaml.safe_load((run / "recipe.yaml").read_text())


def base_of(model: str) -> str:
    """The MODEL that the first run of a chain started from."""
    while (Path(model) / "recipe.yaml").is_file():
        model = recipe_of(Path(model))["model"]
    return model


def hub_id(model: str) -> str | None:
    """The hub repository of a MODEL if it has one; open_clip knows those of its NAME:PRETRAINED."""
    if model.startswith("hf-hub:"):
        return model.removeprefix("hf-hub:").partition("@")[0]
    name, _, tag = model.partition(":")
    return open_clip.get_pretrained_cfg(name, tag).get("hf_hub", "").rpartition("/")[0] or None


def recipe_table(recipe: dict) -> str:
    """The keys that decide what a run computes; "" without a recipe."""
    if not recipe:
        return ""
    # No local folders: the card is published.
    folders = {key: Path(recipe[key]).name for key in ("replay", "retention_set") if recipe.get(key)}
    values = leaves(recipe | folders | {"model": public_name(recipe["model"])})
    shown = [key for key in values if key not in RESUME_SAFE or (key == "replay" and values[key])]
    rows = [[key, f"`{values[key]}`"] for key in shown if values[key] != ""]
    return markdown_table(("key", "value"), rows)


def weights_of(folder: Path) -> str:
    """The fingerprint of the exported model, by which results of eval are matched."""
    return (
        json.loads((folder / RECORD).read_text()).get("weights_sha256")
        or load(f"local-dir:{folder}").fingerprint()
    )


def model_facts(folder: Path) -> dict:
    """Facts of the model, from the exported files."""
    config = json.loads((folder / CONFIG_FILE).read_text())["model_cfg"]
    with safe_open(folder / WEIGHTS_FILE, "pt") as weights:
        names = weights.keys()  # safe_open gives no dict to iterate over
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    record = json.loads((folder / RECORD).read_text())
    differences = {}
    for file_format in FORMATS:
        measured = record["differences"].get(file_format, {})
        if values := [measured[name] for name in FEATURES if name in measured]:
            name = "sentence-transformers" if file_format == "sentence_transformers" else file_format
            differences[name] = f"{max(values):.2g}"
    min_cosine = record["differences"].get("transformers", {}).get("from_images_min_cosine")
    return {
        "from_images_min_cosine": f"{min_cosine:.4f}" if min_cosine else "",
        "dtype": record["dtype"],
        "files": ", ".join(f"{count} {kind}" for kind, count in record.get("compared_files", {}).items()),
        "differences": differences,
        "parameters": f"{parameters / 1e6:.1f} million",
        "embed_dim": config["embed_dim"],
        "image_size": config["vision_cfg"].get("image_size", 224),
        "context_length": config["text_cfg"].get("context_length", 77),
    }


def data_facts(run: Path) -> dict:
    """Facts of the training data; its sha256 alone if the shards are gone or have changed."""
    facts = {"sha256": json.loads((run / "environment.json").read_text())["data_fingerprint"]}
    if (folder := shards_of(run)) is None:
        return facts
    inputs = list(json.loads((folder / "manifest.json").read_text(encoding="utf-8"))["inputs"])
    matches = [re.match(r"hf://datasets/([^/@]+/[^/@]+)", source) for source in inputs]
    names = [re.split(r"[?#]", source.rstrip("/"))[0].rsplit("/", 1)[-1] for source in inputs]
    facts["hub_datasets"] = [match[1] for match in matches if match]
    facts |= {"inputs": names[:5], "more_inputs": max(0, len(names) - 5)}
    if (folder / "report.json").is_file():
        report = json.loads((folder / "report.json").read_text(encoding="utf-8"))
        columns = ("images", "captions", "groups")
        rows = [
            [split, *(f"{counts[column]:,}" for column in columns)]
            for split, counts in report["splits"].items()
        ]
        facts |= {"rows": f"{report['rows']:,}", "rejects": f"{report['rejects']:,}"}
        facts["splits"] = markdown_table(("split", *columns), rows)
    return facts


def training_facts(run: Path) -> dict:
    """Pairs seen, exported weights, machine and training time."""
    environment = json.loads((run / "environment.json").read_text())
    state = json.loads((run / "checkpoints" / "best" / "state.json").read_text())
    device, ranks = environment["device"], environment["world_size"]
    if device == "cpu":
        device = f"CPU with {environment['threads']} threads"
    facts = {
        "device": f"{ranks} x {device}",
        "packages": ", ".join(
            f"{name} {environment['packages'][name]}" for name in ("torch", "open_clip_torch")
        ),
        "weights": weights_in_words(state.get("weights", TRAINED)),
        "samples": f"{state['samples']:,}",
        "commit": (environment["git_commit"] or "")[:12],
    }
    if seconds := seconds_of_steps(_log(run)):
        units = (("hours", 3600), ("minutes", 60), ("seconds", 1))
        unit, size = next((unit, size) for unit, size in units if seconds >= size or size == 1)
        facts["time"] = f"{seconds / size:.1f} {unit}"
    return facts


def weights_in_words(weights: str) -> str:
    """Exported weights that are not the trained ones: "ema", "wise_ft 0.50" -> "WiSE-FT, alpha 0.50"."""
    if weights in (TRAINED, EMA):
        return {TRAINED: "", EMA: "exponential moving average (EMA)"}[weights]
    return f"WiSE-FT, alpha {weights.split()[-1]}"


def _log(run: Path) -> list[dict]:
    return [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]


def seconds_of_steps(log: list[dict]) -> float:
    """Duration of the logged steps, waiting for data included, validation and checkpoints excluded."""
    seconds, before = 0.0, 0
    for line in log:
        if "time/pairs_per_s" in line:
            seconds += (line["samples"] - before) / line["time/pairs_per_s"]
            before = line["samples"]
    return seconds


def check_images(images: tuple[Path, ...]) -> None:
    """Raise UserError for a file that the card cannot show."""
    for path in images:
        if path.suffix.lower() not in IMAGE_SUFFIXES or not path.is_file():
            raise UserError(f"--images {path}: must be an existing file, {', '.join(IMAGE_SUFFIXES)}")


def gather_images(folder: Path, run: Path | None, images: tuple[Path, ...]) -> list[str]:
    """Replace FOLDER/images by the validation curve and the given files.

    Returns:
        File names in FOLDER/images.
    """
    shutil.rmtree(folder / IMAGES, ignore_errors=True)
    (folder / IMAGES).mkdir()
    names = [CURVE] if run and draw_curve(_log(run), folder / IMAGES / CURVE) else []
    for path in images:
        check_images((path,))  # again: it may have been in the folder that is replaced
        if (name := re.sub(r"[^\w.-]", "-", path.name)) in names:
            raise UserError(f"--images {path}: another image is called {name}; rename one")
        shutil.copyfile(path, folder / IMAGES / name)
        names.append(name)
    if not names:
        (folder / IMAGES).rmdir()
    return names


def draw_curve(log: list[dict], path: Path) -> bool:
    """Draw R@1 on the validation split over the run; False, and no file, with fewer than two validations."""
    from matplotlib.figure import Figure

    lines = [line for line in log if "val/image_to_text/R@1" in line]
    if len(lines) < 2:
        return False
    figure = Figure(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    axes = figure.subplots()
    for direction in DIRECTIONS:
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
    figure.savefig(path, metadata={"Software": None})  # so that the same log gives the same bytes
    return True
