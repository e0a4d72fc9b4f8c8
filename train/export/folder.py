"""A model becomes one folder for open_clip, transformers and others; it is kept if it equals the model.

MODEL -> hidden folder beside FOLDER -> loaded back from its files -> compared with MODEL -> renamed to FOLDER

Compared are features, of images and captions of the user's, and what the snippets of the model card answer
for the user's own files, transparent and rotated ones among them.
"""

import re
from collections import Counter
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from open_clip.transform import PreprocessCfg, image_transform_v2
from packaging.requirements import Requirement
from PIL import Image

from data_prep.atomic import atomic_folder, write_json
from data_prep.below import file_below
from data_prep.errors import UserError
from data_prep.images import WHITE
from data_prep.shards import Shards, sha256_of
from data_prep.store.remote import is_url
from data_prep.strict_json import read_json
from data_prep.tables import markdown_table
from data_prep.terminal import say
from train.data.shares import shares_of
from train.export import int8, snippets, to_onnx, to_sentence_transformers, to_transformers
from train.export.int8 import Recall
from train.export.reference import File, Outputs, Samples, max_difference, outputs, samples
from train.model.clip import Clip, create
from train.model.preprocessing import CONFIG_FILE
from train.model.source import HERE, read_config
from train.recipe import flags_of, parse
from train.run.records import read_environment

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RECORD = "export.json"
TRANSFORMERS = ("transformers>=5.17",)
SENTENCE_TRANSFORMERS = ("sentence-transformers>=5.1",)
ONNX = ("onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22")
PACKAGES = ("torch", "open_clip_torch", "transformers", "sentence-transformers", "onnx", "onnxruntime")
FORMATS = ("open_clip", "transformers", "sentence_transformers", "onnx")
TEXT_KEYS = ("hf_model_name", "hf_tokenizer_name")
FEATURES = ("image_features", "text_features")
# Of export.json.
SHAPE = {
    "files": {str: {"format": str, "bytes": int, "sha256": str}},
    "dtype": lambda dtype: dtype in tuple(DTYPES),
    "differences": {str: {str: (float, type(None))}},
    "weights_sha256?": str,
    "background?": lambda color: isinstance(color, str) and bool(re.fullmatch("#[0-9a-f]{6}", color)),
    "compared_files?": {str: int},
    "in_folder?": [lambda key: key in TEXT_KEYS],
    "int8?": {"n_images": int, "min_cosine?": float, "fp32": {str: float}, "int8": {str: float}},
}
# In units of eps. Rounding changes each product by about eps / 2, and these errors accumulate with the root
# of the depth: 0.1 to 0.3 were measured with random weights. The margin is for trained weights.
ROUNDING_BOUND = 8


@dataclass
class Comparison:
    """What was written so far and how far it is from the model, by format, and by "library, snippet"."""

    folder: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    differences: dict[str, dict] = field(default_factory=dict)
    bounds: dict[str, dict[str, float]] = field(default_factory=dict)

    def add_files(self, file_format: str) -> None:
        """Count the files that are new in the folder to `file_format`."""
        known = {name for names in self.files.values() for name in names}
        files = (path for path in self.folder.rglob("*") if path.is_file())
        names = (path.relative_to(self.folder).as_posix() for path in files)
        self.files[file_format] = sorted(name for name in names if name not in known)

    def check(self, name: str) -> None:
        """Raise UserError if a difference is above its bound.

        Args:
            name: of the model.
        """
        failed = [
            f"{kind} {quantity} by {self.differences[kind][quantity]:.3g} (at most {bound:.3g})"
            for kind, limits in self.bounds.items()
            for quantity, bound in limits.items()
            if not self.differences[kind][quantity] <= bound
        ]
        if failed:
            raise UserError(
                f"{name}: the exported files are not the same model, they differ in {'; '.join(failed)};"
                " nothing was kept"
            )


def export(
    clip: Clip,
    out: Path,
    dtype: str = "fp32",
    onnx: bool = False,
    data: Path | None = None,
    recall: Recall | None = None,
) -> dict:
    """Write a model as one folder, load it back and compare.

    Args:
        clip: on the CPU, in fp32.
        out: a folder that does not exist, or that is replaced.
        data: shards to take images, captions and files from; synthetic ones by default.
        recall: measures what int8 costs on `data`, if `onnx`.

    Returns:
        The content of out/export.json: files with their sha256, and the largest measured differences.

    Raises:
        UserError: a package is missing, the dtype cannot hold the weights, or what was written is not the
            same model; then nothing is kept.
    """
    reason = _reason_for_open_clip_only(clip)
    if onnx:
        require(*ONNX)
    clip.towers.eval()
    inputs = samples(data, clip.background)
    say(f"export: compares {clip.name} on {inputs.source}", flush=True)
    pixels = torch.stack([clip.preprocess(image) for image in inputs.images])
    tokens = clip.tokenizer(inputs.captions)
    with atomic_folder(out, "export") as folder:
        comparison = Comparison(folder)
        say("export: writes the open_clip files and loads them back", flush=True)
        model, expected = _write_open_clip(clip, comparison, dtype, inputs.images[0], pixels, tokens)
        answers = _answers(clip, model, inputs.files)
        if onnx:
            say("export: writes the onnxruntime files and loads them back", flush=True)
            _write_onnx(clip, model, comparison, inputs.captions, pixels, tokens, expected)
        del model  # before transformers loads its own, so that memory holds two models and not three
        if not reason:
            say("export: writes the transformers files and loads them back", flush=True)
            _write_transformers(clip, comparison, dtype, inputs, pixels, tokens, expected)
        comparison.check(clip.name)
        record = {  # it is published, so it contains no paths
            "weights_sha256": clip.fingerprint(),
            "dtype": dtype,
            "background": clip.config["preprocess_cfg"].get("background", WHITE),
            "compared_on": inputs.source,
            "compared_files": dict(Counter(file.kind for file in inputs.files)),
            "differences": comparison.differences,
            "bounds": comparison.bounds,
            "open_clip_only": reason,
            "in_folder": _in_folder(folder),
            "packages": {package: _version(package) for package in PACKAGES},
            "files": {
                name: _entry(folder / name, file_format)
                for file_format, names in comparison.files.items()
                for name in names
            },
        }
        say("export: runs the snippets of the model card on your files", flush=True)
        _run_snippets(comparison, record, inputs.files, answers)
        comparison.check(clip.name)
        if onnx and data and recall:
            say(f"export: measures what int8 costs, on up to {int8.N_IMAGES} images", flush=True)
            record["int8"] = int8.compare(clip, folder, data, recall)
        write_json(folder / RECORD, record)
    return record


def read_record(folder: Path) -> dict:
    """The content of FOLDER/export.json.

    Raises:
        UserError: it is damaged, or names a file that is not in the folder.
    """
    record = read_json(folder / RECORD, SHAPE, "export the model again: python -m train.export MODEL --out X")
    for name in record["files"]:
        file_below(folder, name)
    return record


def require(*packages: str) -> None:
    """Raise UserError unless these packages, given as in requirements.txt, are installed."""
    for package in packages:
        if not is_installed(package):
            requirement = Requirement(package)
            quoted = " ".join(f'"{package}"' for package in packages)
            raise UserError(
                f"this export needs {requirement}, {_version(requirement.name) or 'none'} is installed"
                f" (training does not need it): pip install {quoted}"
            )


def is_installed(package: str) -> bool:
    """Whether a package, given as in requirements.txt, is installed."""
    requirement = Requirement(package)
    installed = _version(requirement.name)
    return bool(installed) and requirement.specifier.contains(installed, prereleases=True)


def shards_of(run: Path | None, number: int = 0) -> Path | str | None:
    """The shards that a run was trained on; None if `run` is no run, or they are gone or have changed.

    A relative path is looked for in the working folder, and in the folders that the run is in.

    Args:
        number: of the data set, where there are several; they are validated and compared on the first.
    """
    if run is None or not (run / "recipe.yaml").is_file():
        return None
    names = [*shares_of(parse(flags_of(run / "recipe.yaml")).data)]
    fingerprints = read_environment(run).get("data_fingerprint", "").split()
    if len(names) != len(fingerprints):
        return None
    name, fingerprint = names[number], fingerprints[number]
    if is_url(name):
        return name if _has(name, fingerprint) else None
    for data in (folder / name for folder in (Path(), *run.resolve().parents)):
        if (data / "manifest.json").is_file() and _has(data, fingerprint):
            return data
    return None


def _has(data: Path | str, fingerprint: str) -> bool:
    """Whether the shards in a place are those of a run."""
    try:
        return Shards(data, "train").fingerprint == fingerprint
    except UserError:  # something else that has the name, or a store that refuses
        return False


def table(record: dict) -> str:
    """The files with their size, sha256 and largest difference, then notes on what was compared."""
    rows = []
    for file_format in FORMATS:
        measured = record["differences"].get(file_format, {})
        largest = max((measured[name] for name in ("weights", *FEATURES) if name in measured), default=0)
        for name, file in record["files"].items():
            if file["format"] == file_format:
                has_weights = name.endswith((".safetensors", ".onnx")) and to_onnx.QUANTIZED not in name
                difference = f"{largest:.2g}" if has_weights else ""
                rows.append([file_format, name, _size(file["bytes"]), file["sha256"][:12], difference])
    columns = ("format", "file", "size", "sha256", "largest difference of features")
    return "\n".join([markdown_table(columns, rows), *_notes(record)])


def _notes(record: dict) -> list[str]:
    notes = [f"compared on {record['compared_on']}"]
    if record["dtype"] != "fp32":
        rounding = max(record["differences"]["rounding"][name] for name in FEATURES)
        notes.append(
            f"rounding the weights to {record['dtype']} changes features by up to {rounding:.2g}; the"
            " differences above are relative to the rounded model"
        )
    if differences := record["differences"].get("transformers"):
        notes.append(
            f"transformers' preprocessing: pixels differ by up to {differences['pixels']:.2g} with its Pillow"
            f" backend, {differences['pixels_torchvision']:.2g} with torchvision, its default; with the"
            f" default, the cosine of image features is at least {differences['from_images_min_cosine']:.4f}"
        )
        if differences["captions_cleaned"]:
            notes.append(
                f"{differences['captions_cleaned']} captions contain curly quotes, HTML entities or similar:"
                " open_clip cleans them (ftfy), transformers does not, so clean them before you use"
                " transformers"
            )
    if record["open_clip_only"]:
        notes.append(f"for open_clip only: {record['open_clip_only']}")
    elif "sentence_transformers" not in record["differences"]:
        quoted = f'"{SENTENCE_TRANSFORMERS[0]}"'
        notes.append(f"without files for sentence-transformers, which is not installed: pip install {quoted}")
    kinds = ", ".join(f"{count} {kind}" for kind, count in record["compared_files"].items())
    notes.append(
        f"the snippets of the model card answer for image files ({kinds}) what they answer for the images"
        f" that training sees; transparent parts are on {record['background']}"
    )
    if "int8" in record:
        notes.append(int8.sentence(record["int8"]))
    return notes


def _write_open_clip(
    clip: Clip,
    comparison: Comparison,
    dtype: str,
    image: Image.Image,
    pixels: torch.Tensor,
    tokens: torch.Tensor,
) -> tuple[torch.nn.Module, Outputs]:
    """Write and load back open_clip's files.

    Returns:
        open_clip's model of the files, in fp32, and its outputs, which the other formats must equal.
    """
    clip.save(comparison.folder, DTYPES[dtype])
    comparison.add_files("open_clip")
    model, differences = _read_back(clip, comparison.folder, dtype, image)
    original, expected = outputs(clip.towers.model, pixels, tokens), outputs(model, pixels, tokens)
    if dtype == "fp32":
        differences |= original.differences(expected)
    else:
        comparison.differences["rounding"] = original.differences(expected)
        bound = ROUNDING_BOUND * torch.finfo(DTYPES[dtype]).eps
        comparison.bounds["rounding"] = dict.fromkeys(FEATURES, bound)
    comparison.differences["open_clip"] = differences
    comparison.bounds["open_clip"] = dict.fromkeys(differences, 0.0)
    return model, expected


def _answers(clip: Clip, model: torch.nn.Module, files: list[File]) -> torch.Tensor:
    """float [files, 2], the probabilities of the snippets' captions by a model, for the images that training
    sees.
    """
    pixels = torch.stack([clip.preprocess(file.image) for file in files])
    return outputs(model, pixels, clip.tokenizer(snippets.LABELS)).logits.softmax(dim=1)


def _run_snippets(comparison: Comparison, record: dict, files: list[File], answers: torch.Tensor) -> None:
    text = snippets.use(record, str(comparison.folder))
    for library, differences in snippets.compare(text, files, answers).items():
        bounded = ("files", "probabilities") if library == "open_clip" else ("files",)
        comparison.differences[f"{library}, snippet"] = differences
        comparison.bounds[f"{library}, snippet"] = dict.fromkeys(bounded, snippets.BOUND)


def _write_onnx(
    clip: Clip,
    model: torch.nn.Module,
    comparison: Comparison,
    captions: list[str],
    pixels: torch.Tensor,
    tokens: torch.Tensor,
    expected: Outputs,
) -> None:
    to_onnx.write(model, comparison.folder, pixels, tokens)
    comparison.add_files("onnx")
    short = [clip.tokenize([caption]) for caption in captions]
    comparison.differences["onnx"] = to_onnx.compare(comparison.folder, pixels, tokens, short, expected)
    comparison.bounds["onnx"] = dict.fromkeys(comparison.differences["onnx"], to_onnx.BOUND)


def _write_transformers(
    clip: Clip,
    comparison: Comparison,
    dtype: str,
    inputs: Samples,
    pixels: torch.Tensor,
    tokens: torch.Tensor,
    expected: Outputs,
) -> None:
    to_transformers.write(clip, comparison.folder, DTYPES[dtype])
    comparison.add_files("transformers")
    comparison.differences["transformers"], from_images = to_transformers.compare(
        comparison.folder, clip, inputs, pixels, tokens, expected
    )
    comparison.bounds["transformers"] = to_transformers.bounds(clip)
    if is_installed(*SENTENCE_TRANSFORMERS):
        say("export: writes the sentence-transformers files and loads them back", flush=True)
        to_sentence_transformers.write(comparison.folder)
        comparison.add_files("sentence_transformers")
        captions = [clip.tokenizer.clean_fn(caption) for caption in inputs.captions]
        measured = to_sentence_transformers.compare(
            comparison.folder, inputs.images, captions, from_images, expected
        )
        comparison.differences["sentence_transformers"] = measured
        bound = to_sentence_transformers.BOUND
        comparison.bounds["sentence_transformers"] = dict.fromkeys(measured, bound)


def _reason_for_open_clip_only(clip: Clip) -> str:
    """Why transformers files cannot be written, as a sentence; empty if they can."""
    unsupported = to_transformers.unsupported_settings(clip)
    if not unsupported:
        require(*TRANSFORMERS)
        unsupported = to_transformers.unsupported_weights(clip)
    if not unsupported:
        return ""
    more = f" and {len(unsupported) - 3} more" if len(unsupported) > 3 else ""
    return f"transformers' CLIPModel and CLIPProcessor do not support {', '.join(unsupported[:3])}{more}"


def _read_back(
    clip: Clip, folder: Path, dtype: str, image: Image.Image
) -> tuple[torch.nn.Module, dict[str, float]]:
    """open_clip's model of the written files, and how far its weights and pixels are from the original's."""
    name = f"local-dir:{folder}"
    model = create(name)
    preprocess = image_transform_v2(PreprocessCfg(**model.visual.preprocess_cfg), is_train=False)
    loaded, original = model.eval().state_dict(), clip.weights(DTYPES[dtype])
    assert set(loaded) == set(original), set(loaded) ^ set(original)
    for name, tensor in original.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{clip.name}: {name} is not finite in {dtype} (the largest fp16 number is 65,504); pass"
                " --dtype bf16 or fp32; nothing was kept"
            )
    return model, {
        "weights": max(max_difference(loaded[name], tensor) for name, tensor in original.items()),
        "pixels": max_difference(preprocess(image), clip.preprocess(image)),
    }


def _in_folder(folder: Path) -> list[str]:
    """The keys of text_cfg that name the folder itself: its text tower or tokenizer is of Hugging Face's."""
    text = read_config(folder / CONFIG_FILE)["model_cfg"]["text_cfg"]
    return [key for key in TEXT_KEYS if text.get(key) == HERE]


def _entry(path: Path, file_format: str) -> dict:
    return {"format": file_format, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count / 1e3:,.1f} kB"
