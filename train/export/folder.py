"""A model becomes one folder for open_clip and transformers; it is kept if it equals the model.

MODEL -> hidden folder beside FOLDER -> loaded back from its files -> compared with MODEL -> renamed to FOLDER
"""

import json
from dataclasses import dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import open_clip
import torch
from packaging.requirements import Requirement
from PIL import Image

from data_prep.atomic import atomic_folder
from data_prep.errors import UserError
from data_prep.shards import Shards, sha256_of
from data_prep.tables import markdown_table
from train.export import to_onnx, to_transformers
from train.export.reference import Outputs, Samples, max_difference, outputs, samples
from train.model.clip import Clip
from train.model.source import folder_options
from train.recipe import flags_of, parse

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RECORD = "export.json"
TRANSFORMERS = ("transformers>=5.17",)
ONNX = ("onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22")
PACKAGES = ("torch", "open_clip_torch", "transformers", "onnx", "onnxruntime")
FEATURES = ("image_features", "text_features")
# In units of eps. Rounding changes each product by about eps / 2, and these errors accumulate with the root
# of the depth: 0.1 to 0.3 were measured with random weights. The margin is for trained weights.
ROUNDING_BOUND = 8


@dataclass
class Comparison:
    """What was written so far and how far it is from the model, by format: open_clip, transformers, onnx."""

    folder: Path
    files: dict[str, list[str]] = field(default_factory=dict)
    differences: dict[str, dict] = field(default_factory=dict)
    bounds: dict[str, dict[str, float]] = field(default_factory=dict)

    def add_files(self, file_format: str) -> None:
        """Count the files that are new in the folder to `file_format`."""
        known = {name for names in self.files.values() for name in names}
        self.files[file_format] = sorted(
            path.name for path in self.folder.iterdir() if path.name not in known
        )

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


def export(clip: Clip, out: Path, dtype: str = "fp32", onnx: bool = False, data: Path | None = None) -> dict:
    """Write a model as one folder, load it back and compare.

    Args:
        clip: on the CPU, in fp32.
        out: a folder that does not exist, or that is replaced.
        data: shards to take images and captions from; synthetic ones by default.

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
    inputs = samples(data)
    print(f"export: compares {clip.name} on {inputs.source}", flush=True)
    pixels = torch.stack([clip.preprocess(image) for image in inputs.images])
    tokens = clip.tokenizer(inputs.captions)
    with atomic_folder(out) as folder:
        comparison = Comparison(folder)
        print("export: writes the open_clip files and loads them back", flush=True)
        model, expected = _write_open_clip(clip, comparison, dtype, inputs.images[0], pixels, tokens)
        if onnx:
            print("export: writes the onnxruntime files and loads them back", flush=True)
            _write_onnx(model, comparison, pixels, tokens, expected)
        del model  # before transformers loads its own, so that memory holds two models and not three
        if not reason:
            print("export: writes the transformers files and loads them back", flush=True)
            _write_transformers(clip, comparison, dtype, inputs, pixels, tokens, expected)
        comparison.check(clip.name)
        record = {  # it is published, so it contains no paths
            "weights_sha256": clip.fingerprint(),
            "dtype": dtype,
            "compared_on": inputs.source,
            "differences": comparison.differences,
            "bounds": comparison.bounds,
            "open_clip_only": reason,
            "packages": {package: _version(package) for package in PACKAGES},
            "files": {
                name: _entry(folder / name, file_format)
                for file_format, names in comparison.files.items()
                for name in names
            },
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def require(*packages: str) -> None:
    """Raise UserError unless these packages, given as in requirements.txt, are installed."""
    for requirement in map(Requirement, packages):
        installed = _version(requirement.name)
        if not installed or not requirement.specifier.contains(installed, prereleases=True):
            quoted = " ".join(f'"{package}"' for package in packages)
            raise UserError(
                f"this export needs {requirement}, {installed or 'none'} is installed (training does not need"
                f" it): pip install {quoted}"
            )


def shards_of(run: Path | None) -> Path | None:
    """The shards that a run was trained on; None if `run` is no run, or they are gone or have changed."""
    if run is None or not (run / "recipe.yaml").is_file():
        return None
    data = Path(parse(flags_of(run / "recipe.yaml")).data)
    if not (data / "manifest.json").is_file():
        return None
    fingerprint = json.loads((run / "environment.json").read_text())["data_fingerprint"]
    return data if Shards(data, "train").fingerprint == fingerprint else None


def table(record: dict) -> str:
    """The files with their size, sha256 and largest difference, then notes on what was compared."""
    rows = []
    for file_format in ("open_clip", "transformers", "onnx"):
        measured = record["differences"].get(file_format, {})
        largest = max((measured[name] for name in ("weights", *FEATURES) if name in measured), default=0)
        for name, file in record["files"].items():
            if file["format"] == file_format:
                difference = f"{largest:.2g}" if name.endswith((".safetensors", ".onnx")) else ""
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
    return notes


def snippets(record: dict, place: str) -> str:
    """Python that loads the model from `place`, a folder or USER/NAME on the hub, by each library."""
    scheme = "local-dir" if Path(place).exists() else "hf-hub"
    lines = [
        "import open_clip",
        f'model, _, preprocess = open_clip.create_model_and_transforms("{scheme}:{place}")',
        f'tokenizer = open_clip.get_tokenizer("{scheme}:{place}")',
    ]
    if not record["open_clip_only"]:
        lines += [
            "",
            "from transformers import CLIPModel, CLIPProcessor",
            f'model = CLIPModel.from_pretrained("{place}")',
            f'processor = CLIPProcessor.from_pretrained("{place}")',
        ]
    return "\n".join(lines)


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


def _write_onnx(
    model: torch.nn.Module,
    comparison: Comparison,
    pixels: torch.Tensor,
    tokens: torch.Tensor,
    expected: Outputs,
) -> None:
    to_onnx.write(model, comparison.folder, pixels, tokens)
    comparison.add_files("onnx")
    comparison.differences["onnx"] = to_onnx.compare(comparison.folder, pixels, tokens, expected)
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
    comparison.differences["transformers"] = to_transformers.compare(
        comparison.folder, clip, inputs, pixels, tokens, expected
    )
    comparison.bounds["transformers"] = to_transformers.bounds(clip)


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
    model, _, preprocess = open_clip.create_model_and_transforms(name, **folder_options(name))
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


def _entry(path: Path, file_format: str) -> dict:
    return {"format": file_format, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count / 1e3:,.1f} kB"
