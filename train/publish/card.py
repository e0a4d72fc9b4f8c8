"""The model card: every figure comes from a file; what no file contains is left out.

RUN (recipe, environment, metrics) + SHARDS (manifest, report) + results of eval (JSON) + images ->
FOLDER/README.md, FOLDER/images/

The text is in card.md. Files and models are named without local folders.
"""

import itertools
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
from data_prep.shards import read_manifest
from data_prep.strict_json import read_json
from data_prep.tables import markdown_table
from train.data.shares import Sets, shares_of, to_words
from train.export.folder import FEATURES, FORMATS, read_record, shards_of
from train.export.snippets import use
from train.metrics import DIRECTIONS, METRICS, title_of
from train.model.clip import CONFIG_FILE, WEIGHTS_FILE, load, public_name
from train.model.source import read_config
from train.publish.card_tables import Table, read_tables
from train.recipe import RESUME_SAFE, flags_of, leaves, parse, to_yaml
from train.retain.select import EMA, TRAINED
from train.run.records import read_environment, read_metrics, read_state

TEMPLATE = Path(__file__).parent / "card.md"
IMAGES, CURVE = "images", "validation.png"
EVAL_RESULTS = ".eval_results"
# Of report.json.
REPORT = {"rows": int, "rejects": int, "splits": {str: dict.fromkeys(("images", "captions", "groups"), int)}}
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
    record = read_record(folder)
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
        if name in measured["int8"] and name.rpartition("/")[2] in METRICS
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
    """The keys of RUN/recipe.yaml, with the defaults of those that it lacks.

    Raises:
        UserError: it is no recipe.
    """
    recipe = parse([*flags_of(run / "recipe.yaml"), "--run", str(run)])
    return yaml.safe_load(to_yaml(recipe))


def base_of(model: str) -> str:
    """The MODEL that the first run of a chain started from."""
    seen = []
    while (Path(model) / "recipe.yaml").is_file():
        flags = flags_of(Path(model) / "recipe.yaml")
        if "--model" not in flags or model in seen:
            why = "names a run that started from it" if seen else "names no model"
            raise UserError(f"{model}: its recipe.yaml {why}; restore it from a copy")
        seen.append(model)
        model = flags[flags.index("--model") + 1]
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
    replayed = ("replay", "replay_texts")
    folders = {key: Path(recipe[key]).name for key in (*replayed, "retention_set") if recipe.get(key)}
    if len(sets := public_sets(recipe["data"])) > 1:
        folders["data"] = " ".join(to_words(sets))
    values = leaves(recipe | folders | {"model": public_name(recipe["model"])})
    shown = [
        key
        for key in values
        if key not in RESUME_SAFE or (key in replayed and values[key]) or (key == "data" and key in folders)
    ]
    rows = [[key, f"`{values[key]}`"] for key in shown if values[key] != ""]
    return markdown_table(("key", "value"), rows)


def public_sets(data: Sets) -> dict[str, float]:
    """Shares by the folders' own names, which are numbered where they are the same."""
    names = [Path(folder).name for folder in shares_of(data)]
    numbered = [f"{name} {n}" if names.count(name) > 1 else name for n, name in enumerate(names, 1)]
    return dict(zip(numbered, shares_of(data).values(), strict=True))


def weights_of(folder: Path) -> str:
    """The fingerprint of the exported model, by which results of eval are matched."""
    return read_record(folder).get("weights_sha256") or load(f"local-dir:{folder}").fingerprint()


def model_facts(folder: Path) -> dict:
    """Facts of the model, from the exported files."""
    config = read_config(folder / CONFIG_FILE)["model_cfg"]
    with safe_open(folder / WEIGHTS_FILE, "pt") as weights:
        names = weights.keys()  # safe_open gives no dict to iterate over
        parameters = sum(math.prod(weights.get_slice(name).get_shape()) for name in names)
    record, differences = read_record(folder), {}
    for file_format in FORMATS:
        measured = record["differences"].get(file_format, {})
        if values := [measured[name] for name in FEATURES if measured.get(name) is not None]:
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
    """Facts of the training data, of the first of several sets; its sha256 alone if the shards are gone or
    have changed.
    """
    shares = public_sets(recipe_of(run)["data"])
    sha256 = read_environment(run).get("data_fingerprint", "").split()
    facts = {"sha256": " ".join(sha256[:1]), "sets": []}
    folders = [shards_of(run, number) for number in range(len(shares))]
    sources = [list(read_manifest(folder).get("inputs", {})) if folder else [] for folder in folders]
    matches = [re.match(r"hf://datasets/([^/@]+/[^/@]+)", source) for source in itertools.chain(*sources)]
    facts["hub_datasets"] = [match[1] for match in matches if match]
    if len(shares) > 1:
        facts["sets"] = [
            {"name": name, "percent": f"{100 * share:g} %", "sha256": digest}
            for (name, share), digest in itertools.zip_longest(shares.items(), sha256, fillvalue="")
        ]
    if (folder := folders[0]) is None:
        return facts
    inputs = sources[0]
    names = [re.split(r"[?#]", source.rstrip("/"))[0].rsplit("/", 1)[-1] for source in inputs]
    facts |= {"inputs": names[:5], "more_inputs": max(0, len(names) - 5)}
    if (folder / "report.json").is_file():
        report = read_json(folder / "report.json", REPORT, "build the shards again")
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
    environment, best = read_environment(run), run / "checkpoints" / "best"
    try:
        state = read_state(best.resolve())
    except (OSError, ValueError) as error:
        raise UserError(f"{best}: damaged ({error}); restore the run from a copy") from None
    device, ranks = environment.get("device", "unknown device"), environment.get("world_size", 1)
    if device == "cpu":
        device = f"CPU with {environment.get('threads', 'unknown')} threads"
    packages = environment.get("packages", {})
    facts = {
        "device": f"{ranks} x {device}",
        "packages": ", ".join(
            f"{name} {packages[name]}" for name in ("torch", "open_clip_torch") if name in packages
        ),
        "weights": weights_in_words(state.get("weights") or TRAINED),
        "samples": f"{state['samples']:,}",
        "commit": (environment.get("git_commit") or "")[:12],
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
    return f"WiSE-FT, alpha {weights.rpartition(' ')[2]}"


def _log(run: Path) -> list[dict]:
    return read_metrics(run / "metrics.jsonl")


def seconds_of_steps(log: list[dict]) -> float:
    """Duration of the logged steps, waiting for data included, validation and checkpoints excluded."""
    seconds, before = 0.0, 0
    for line in log:
        if line.get("time/pairs_per_s"):
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
        recalls = [line.get(f"val/{direction}/R@1") for line in lines]
        values = [math.nan if recall is None else 100 * recall for recall in recalls]
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
