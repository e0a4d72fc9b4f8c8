"""A model becomes one folder that open_clip and transformers both load, proven equal before it takes its
name.

python -m train.export runs/icons --out exported
    a run's best checkpoint; compared on pictures of its own validation split
python -m train.export ViT-B-32:laion2b_s34b_b79k --out exported --dtype fp16 --data data/icons/shards --onnx
    True any MODEL; half the bytes; for onnxruntime as well

MODEL -> written to a hidden folder beside FOLDER -> loaded back from its files -> compared -> renamed to
FOLDER"""

import json
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Annotated, Literal

import open_clip
import torch
import tyro
from packaging.requirements import Requirement

from data_prep.atomic import atomic_folder, check_replaceable
from data_prep.errors import UserError
from data_prep.shards import Shards, read_manifest, sha256_of
from train.export import to_onnx, to_transformers
from train.export.reference import max_difference, outputs, samples
from train.model.clip import Clip, load
from train.recipe import flags_of, parse

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
RECORD = "export.json"
TRANSFORMERS = ("transformers>=5.17",)
ONNX = ("onnx>=1.18", "onnxscript>=0.5", "onnxruntime>=1.22")
PACKAGES = ("torch", "open_clip_torch", "transformers", "onnx", "onnxruntime")
# Rounding moves every product by about eps / 2, and features by the random walk of all these, in the root of
# the depth.
ROUNDING_BOUND = (
    8  # times eps: 0.1 to 0.3 were measured with random weights, and trained ones may be less kind
)


def export(clip: Clip, out: Path, dtype: str = "fp32", onnx: bool = False, data: Path | None = None) -> dict:
    """What stands in out/export.json: files with their sha256, and the largest differences that were
    measured.

    Args:
        clip: on the CPU, in fp32.
        out: a folder that does not exist, or is to be replaced.
        data: folder of shards to take pictures and captions from; drawn ones without.

    Raises:
        UserError: a package is missing, the dtype cannot hold the weights, or what was written is not the
            same model; then nothing is left behind.
    """
    reason = _reason_for_open_clip_alone(clip)
    if onnx:
        require(*ONNX)
    clip.towers.eval()
    asked = samples(data)
    print(f"export: asking {clip.name} about {asked.source}", flush=True)
    pixels, tokens = (
        torch.stack([clip.preprocess(picture) for picture in asked.pictures]),
        clip.tokenizer(asked.captions),
    )
    original = outputs(clip.towers.model, pixels, tokens)
    differences, bounds, files = {}, {}, {}
    with atomic_folder(out) as folder:
        print("export: writing for open_clip, and asking what was written", flush=True)
        clip.save(folder, DTYPES[dtype])
        files["open_clip"] = _new_files(folder, files)
        model, differences["open_clip"] = _read_back(clip, folder, dtype, asked.pictures[0])
        expected = outputs(model, pixels, tokens)
        if dtype == "fp32":
            differences["open_clip"] |= original.differences(expected)
        else:
            differences["rounding"] = original.differences(expected)
            bound = ROUNDING_BOUND * torch.finfo(DTYPES[dtype]).eps
            bounds["rounding"] = {"image_features": bound, "text_features": bound}
        bounds["open_clip"] = dict.fromkeys(differences["open_clip"], 0.0)
        if onnx:
            print("export: the same for onnxruntime", flush=True)
            to_onnx.write(model, folder, pixels, tokens)
            files["onnx"] = _new_files(folder, files)
            differences["onnx"] = to_onnx.compare(folder, pixels, tokens, expected)
            bounds["onnx"] = dict.fromkeys(differences["onnx"], to_onnx.BOUND)
        del model  # before transformers' comes, so that memory holds two models and not three
        if not reason:
            print("export: the same for transformers", flush=True)
            to_transformers.write(clip, folder, DTYPES[dtype])
            files["transformers"] = _new_files(folder, files)
            differences["transformers"] = to_transformers.compare(
                folder, clip, asked, pixels, tokens, expected
            )
            bounds["transformers"] = to_transformers.bounds(clip)
        _check(clip.name, differences, bounds)
        record = {
            "weights_sha256": clip.fingerprint(),  # and no paths: this is published
            "dtype": dtype,
            "compared_on": asked.source,
            "differences": differences,
            "bounds": bounds,
            "open_clip_alone": reason,
            "packages": {package: _version(package) for package in PACKAGES},
            "files": {name: _entry(folder / name, kind) for kind, names in files.items() for name in names},
        }
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
    return record


def require(*packages: str) -> None:
    """Refuse to go on without these packages, given as in requirements.txt."""
    for requirement in map(Requirement, packages):
        found = _version(requirement.name)
        if not found or not requirement.specifier.contains(found, prereleases=True):
            quoted = " ".join(f'"{package}"' for package in packages)
            raise UserError(
                f"{requirement} is wanted for this, {found or 'none'} is installed; training does without:"
                f" pip install {quoted}"
            )


def data_of(run: Path | None) -> Path | None:
    """The shards that a run was trained on, if `run` is one, and they are still where they were, and what
    they were.
    """
    if run is None or not (run / "recipe.yaml").is_file():
        return None
    data = Path(parse(flags_of(run / "recipe.yaml")).data)
    if not (data / "manifest.json").is_file():
        return None
    fingerprint = json.loads((run / "environment.json").read_text())["data_fingerprint"]
    return data if Shards(data, "train").fingerprint == fingerprint else None


def table(record: dict) -> str:
    """Files with their size, sha256 and largest difference; then what was compared, and what differs for
    good.
    """
    lines = [f"{'format':14}{'file':30}{'size':>12}  {'sha256':14}largest difference of features"]
    for kind in ("open_clip", "transformers", "onnx"):
        measured = record["differences"].get(kind, {})
        largest = max(
            (
                value
                for name, value in measured.items()
                if name in ("weights", "image_features", "text_features")
            ),
            default=0,
        )
        for name, file in record["files"].items():
            if file["format"] == kind:
                said = f"{largest:.2g}" if name.endswith((".safetensors", ".onnx")) else ""
                lines.append(
                    f"{kind:14}{name:30}{_size(file['bytes']):>12}  {file['sha256'][:12]:14}{said}".rstrip()
                )
    lines.append(f"compared on {record['compared_on']}")
    if record["dtype"] != "fp32":
        rounding = max(
            record["differences"]["rounding"][name] for name in ("image_features", "text_features")
        )
        lines.append(
            f"rounding the weights to {record['dtype']} moved features by up to {rounding:.2g}; the"
            " differences above are from there on"
        )
    if found := record["differences"].get("transformers"):
        lines.append(
            f"transformers' preprocessing: pixels within {found['pixels']:.2g} by its Pillow backend,"
            f" {found['pixels_torchvision']:.2g} by torchvision, its default, with which image features keep"
            f" a cosine of {found['from_pictures_least_cosine']:.4f} or more"
        )
        if found["captions_cleaned"]:
            lines.append(
                f"{found['captions_cleaned']} of the captions have curly quotes, entities or the like, which"
                " open_clip repairs (ftfy) and transformers does not: repair them before you ask"
                " transformers"
            )
    if record["open_clip_alone"]:
        lines.append(f"for open_clip alone: {record['open_clip_alone']}")
    return "\n".join(lines)


def snippets(record: dict, place: str) -> str:
    """Three lines for each library that load the model from `place`, a folder or USER/NAME on the hub."""
    scheme = "local-dir" if Path(place).exists() else "hf-hub"
    lines = [
        "import open_clip",
        f'model, _, preprocess = open_clip.create_model_and_transforms("{scheme}:{place}")',
        f'tokenizer = open_clip.get_tokenizer("{scheme}:{place}")',
    ]
    if not record["open_clip_alone"]:
        lines += [
            "",
            "from transformers import CLIPModel, CLIPProcessor",
            f'model = CLIPModel.from_pretrained("{place}")',
            f'processor = CLIPProcessor.from_pretrained("{place}")',
        ]
    return "\n".join(lines)


def command(
    model: Annotated[str, tyro.conf.Positional],
    out: Path,
    dtype: Literal["fp32", "fp16", "bf16"] = "fp32",
    data: Path | None = None,
    onnx: bool = False,
    overwrite: bool = False,
) -> None:
    """Writes a model as one folder for open_clip and transformers, loads both back, and proves them equal.

    Args:
        model: NAME:PRETRAINED, hf-hub:ID, local-dir:PATH or a run folder (its best checkpoint).
        out: Folder to write.
        dtype: Of the weights in the files; the halves take half the bytes, and what rounding costs is
            printed.
        data: Folder of shards to compare on; a run's own if it is still there, else drawn pictures.
        onnx: Also write image.onnx and text.onnx, for onnxruntime.
        overwrite: Replace a folder that this command wrote before.
    """
    check_replaceable(out, RECORD, overwrite)
    if data := data or data_of(Path(model)):
        read_manifest(data)  # before the model, which takes longer
    record = export(load(model), out, dtype, onnx, data)
    print(
        f"{table(record)}\n\n{snippets(record, str(out))}\n\nwritten: {out}; all of the above stands in"
        f" {out / RECORD}"
    )


def _reason_for_open_clip_alone(clip: Clip) -> str:
    """Why there will be no transformers files, as a sentence; empty if there will be."""
    odd = to_transformers.odd_settings(clip)
    if not odd:
        require(*TRANSFORMERS)
        odd = to_transformers.odd_weights(clip)
    more = f" and {len(odd) - 3} more" if len(odd) > 3 else ""
    return (
        f"transformers' CLIPModel and CLIPProcessor have no place for {', '.join(odd[:3])}{more}"
        if odd
        else ""
    )


def _read_back(clip: Clip, folder: Path, dtype: str, picture) -> tuple[torch.nn.Module, dict[str, float]]:
    """open_clip's own model of what was written, and how far its weights, pixels and config are from the
    original's.
    """
    model, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    again, wanted = model.eval().state_dict(), clip.weights(DTYPES[dtype])
    assert set(again) == set(wanted), set(again) ^ set(wanted)
    for name, tensor in wanted.items():
        if not torch.isfinite(tensor).all():
            raise UserError(
                f"{clip.name}: {name} is not finite in {dtype}; fp16 ends at 65,504, so pass --dtype bf16 or"
                " fp32; nothing was written"
            )
    weights = max(max_difference(again[name], tensor) for name, tensor in wanted.items())
    return model, {
        "weights": weights,
        "pixels": max_difference(preprocess(picture), clip.preprocess(picture)),
    }


def _check(name: str, differences: dict, bounds: dict) -> None:
    """Refuse an export that is further from the model than is allowed."""
    failed = [
        f"{kind} {what} by {differences[kind][what]:.3g} (at most {bound:.3g})"
        for kind, limits in bounds.items()
        for what, bound in limits.items()
        if not differences[kind][what] <= bound
    ]
    if failed:
        raise UserError(
            f"{name}: what was written is not the same model, it differs in {'; '.join(failed)}; nothing is"
            " left of it"
        )


def _new_files(folder: Path, known: dict[str, list[str]]) -> list[str]:
    old = {name for names in known.values() for name in names}
    return sorted(path.name for path in folder.iterdir() if path.name not in old)


def _entry(path: Path, kind: str) -> dict:
    return {"format": kind, "bytes": path.stat().st_size, "sha256": sha256_of(path)}


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _size(count: int) -> str:
    return f"{count / 1e6:,.1f} MB" if count >= 100_000 else f"{count / 1e3:,.1f} kB"


def main() -> None:
    if len(sys.argv) == 1:
        print(__doc__.strip())
        return
    tyro.cli(
        command, prog="python -m train.export", description=__doc__, config=(tyro.conf.FlagConversionOff,)
    )
