"""The search page as a folder of static files: any web server serves it, and the browser runs the text tower.

    SITE/index.html          serve.html, its api replaced by site.js
    SITE/site.js, text.js    what serve.py and the tokenizer do; image.js: the
                             preprocessing; words.js: the exact words
    SITE/site.json           what the page shows first, and the models
    SITE/images.bin          gzip of JSON: the metadata of all images
    SITE/thumbnails/N.bin    PACK_IMAGES thumbnails: their sizes, uint32 each, then the WebPs
    SITE/models/N/codes.bin  int8 [n, dims]; axes.bin fp32 [d, dims]; text.onnx, image.onnx
    SITE/tokenizer.json, text.json, tokenizers.js, onnxruntime.js, onnxruntime.wasm, LICENSE.*

The codes are those of `python -m eval compress`; of an index that is not compressed, of all its dimensions.
"""

import gzip
import html
import tempfile
from collections.abc import Sequence
from functools import reduce
from pathlib import Path

import ftfy.fixes
import numpy as np
from ftfy.chardata import HTML_ENTITIES
from open_clip.tokenizer import SimpleTokenizer

from data_prep import npm
from data_prep.atomic import atomic_folder
from data_prep.errors import UserError
from data_prep.progress import progress
from data_prep.strict_json import strict_json
from data_prep.tables import counted, markdown_table
from data_prep.terminal import say
from data_prep.web import SECURITY_HEADERS
from eval.search.compress import parts, principal_axes, projection, quantized
from eval.search.index import NO_IMAGES, Index, open_indexes
from eval.search.serve import PAGE, about
from eval.search.tower import LEAST_OVERLAP, Tower, write_image_tower, write_text_tower
from train.export.folder import ONNX, require
from train.model.clip import Clip
from train.model.text import causal_tower

PACK_IMAGES = 64  # of some hundred bytes each: a search of 24 images fetches about a megabyte at most
# npm package -> version, sha512 of its archive, and the files of it that the site has, by their names there.
PACKAGES = {
    "onnxruntime-web": (
        "1.30.0",
        "q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ==",
        {
            "onnxruntime.js": "dist/ort.wasm.bundle.min.mjs",
            "onnxruntime.wasm": "dist/ort-wasm-simd-threaded.wasm",
        },
    ),
    "@huggingface/tokenizers": (
        "0.2.0",
        "LidMHe1FpcSYH4vcSjXooda34pC0M8m1gmDOv7SQi6Iv+ib1zX7J3sHBCC9/3FPCkn2k1b55FneVqMRxrr99pg==",
        {"tokenizers.js": "dist/tokenizers.min.mjs", "LICENSE.tokenizers": "LICENSE"},
    ),
}
# Of the site -> of this folder.
SCRIPTS = {"site.js": "site.js"} | {f"{name}.js": f"site_{name}.js" for name in ("text", "image", "words")}
API = """
"use strict";
const module = import("./site.js").catch(() => {
  throw new Error(location.protocol !== "file:"
    ? "site.js cannot be loaded; copy the whole folder of the site."
    : "A page from a file cannot load the index. In its folder, run: python -m http.server");
});
const api = {
  about: async () => (await module).about(),
  search: async (query, options) => (await module).search(query, options),
  thumbnail: async (number) => (await module).thumbnail(number),
};
"""
# As the served page has it, with scripts of the folder, and WebAssembly. A <meta> cannot forbid frames.
POLICY = (
    SECURITY_HEADERS["content-security-policy"]
    .replace("script-src", "script-src 'self' 'wasm-unsafe-eval'")
    .replace("; frame-ancestors 'none'", "")
)


def write_site(
    folders: Sequence[Path], out: Path, models: Sequence[str], with_images: bool, packages: Path | None
) -> None:
    """Write the folder; see eval.search.command.site.

    Raises:
        UserError: There is no index, it is empty, its tokenizer is not CLIP's, or a package is missing.
    """
    require(*ONNX)
    indexes = open_indexes(folders, models)
    first = indexes[0]
    if not len(first):
        raise UserError(f"{first.folder}: {NO_IMAGES}")
    names = models or [""] * len(indexes)
    clips = [index.model(name) for index, name in zip(indexes, names, strict=True)]
    for index, clip in zip(indexes, clips, strict=True):
        check_tokenizer(index, clip)
        if with_images:
            check_preprocessing(index, clip)
    with atomic_folder(out, "site") as folder:
        copy_packages(folder, packages)
        for name, source in SCRIPTS.items():
            (folder / name).write_bytes(PAGE.with_name(source).read_bytes())
        (folder / "index.html").write_text(page(PAGE.read_text(encoding="utf-8")), encoding="utf-8")
        write_json(folder / "tokenizer.json", tokenizer_json(clips[0].tokenizer))
        write_json(folder / "text.json", text_tables(clips[0].tokenizer))
        write_images(first, folder / "images.bin")
        write_thumbnails(first, folder / "thumbnails")
        described = []
        for number, (index, clip) in enumerate(zip(indexes, clips, strict=True)):
            described.append(write_model(index, clip, with_images, folder / "models" / str(number)))
        shown = about(indexes, [clip.name for clip in clips])
        shown["limits"]["bytes"] *= with_images  # 0: no search by image
        size = sum(
            path.stat().st_size for path in [*folder.glob("onnx*"), *folder.glob("models/*/text.onnx")]
        )
        shown["message"] = f"The first sentence loads the model, {size / 1e6:.0f} MB."
        write_json(folder / "site.json", {"about": shown, "pack_images": PACK_IMAGES, "models": described})
        say(sizes(folder), flush=True)
    say(f"{counted(len(first), 'image')}: {out}    try it: python -m http.server --directory {out}")


def check_tokenizer(index: Index, clip: Clip) -> None:
    """Raises:
    UserError: The page cannot make the model's tokens.
    """
    tokenizer = clip.tokenizer
    usual = SimpleTokenizer()
    if (
        type(tokenizer) is not SimpleTokenizer
        or tokenizer.encoder != usual.encoder
        or tokenizer.reduction_fn is not None
        or tokenizer.clean_fn is not usual.clean_fn
    ):
        raise UserError(
            f"{index.folder}: {clip.name} has a tokenizer of its own ({type(tokenizer).__name__}); a site can"
            " be made for models with the tokenizer of CLIP; use python -m eval serve for this one"
        )


def check_preprocessing(index: Index, clip: Clip) -> None:
    """Raises:
    UserError: The page cannot make the model's pixels.
    """
    config, (height, width) = clip.towers.model.visual.preprocess_cfg, clip.image_size
    mode, interpolation = config["resize_mode"], config["interpolation"]
    if height != width or mode not in ("shortest", "squash") or interpolation not in ("bicubic", "bilinear"):
        raise UserError(
            f"{index.folder}: {clip.name} reads images of {width} x {height} pixels, {mode}, {interpolation};"
            " the page makes squares, shortest or squash, bicubic or bilinear: leave out --with-images"
        )


def write_json(path: Path, value: dict) -> None:
    path.write_text(strict_json(value, ensure_ascii=False, separators=(",", ":")), encoding="utf-8")


def page(served: str) -> str:
    """index.html: the served page with the policy as a <meta>, and with API."""
    head, charset, rest = served.partition('<meta charset="utf-8">')
    before, start, body = rest.partition('<script id="api">')
    _, end, after = body.partition("</script>")
    policy = f'<meta http-equiv="content-security-policy" content="{html.escape(POLICY)}">'
    return "".join([head, charset, policy, before, start, API, end, after])


def copy_packages(folder: Path, packages: Path | None) -> None:
    """The files of PACKAGES, from archives in a folder, or fetched by npm."""
    with tempfile.TemporaryDirectory() as temporary:
        place = packages or Path(temporary)
        archives = npm.fetch(place, {name: version for name, (version, *_) in PACKAGES.items()})
        for archive, (_, sha512, members) in zip(archives, PACKAGES.values(), strict=True):
            for target, data in zip(members, npm.read(archive, list(members.values()), sha512), strict=True):
                (folder / target).write_bytes(data)


def tokenizer_json(tokenizer: SimpleTokenizer) -> dict:
    """A tokenizer.json of the Hugging Face format, without normalization, which text.js does."""
    special = [
        {"id": number, "content": tokenizer.decoder[number], "special": True, "normalized": False}
        | dict.fromkeys(("single_word", "lstrip", "rstrip"), False)
        for number in tokenizer.all_special_ids
    ]
    split = {
        "type": "Split",
        "pattern": {"Regex": tokenizer.pat.pattern},
        "behavior": "Removed",
        "invert": True,
    }
    return {
        "version": "1.0",
        "added_tokens": special,
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                split,
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": None,
        "model": {
            "type": "BPE",
            "end_of_word_suffix": "</w>",
            "vocab": tokenizer.encoder,
            "merges": [" ".join(pair) for pair in sorted(tokenizer.bpe_ranks, key=tokenizer.bpe_ranks.get)],
        },
    }


def text_tables(tokenizer: SimpleTokenizer) -> dict:
    """What site_text.js cleans a text by: the tables of ftfy and of Python's html.

    "characters" is what ftfy makes of single characters, "numbers" the character references that
    html.unescape does not take as the code point of their number.
    """
    fixers = (
        ftfy.fixes.fix_c1_controls,
        ftfy.fixes.fix_latin_ligatures,
        ftfy.fixes.fix_character_width,
        ftfy.fixes.uncurl_quotes,
        ftfy.fixes.fix_line_breaks,
        ftfy.fixes.remove_control_chars,
    )
    signs = (chr(code) for code in range(0x110000) if not 0xD800 <= code < 0xE000)
    fixed = ((sign, reduce(lambda text, fix: fix(text), fixers, sign)) for sign in signs)
    codes = [*range(0x100), *range(0xFDD0, 0xFDF0)]
    codes += [plane + low for plane in range(0, 0x110000, 0x10000) for low in (0xFFFE, 0xFFFF)]
    references = ((code, html.unescape(f"&#{code};")) for code in codes)
    return {
        "start": tokenizer.sot_token_id,
        "end": tokenizer.eot_token_id,
        "strict_entities": HTML_ENTITIES,
        "entities": html.entities.html5,
        "numbers": {str(code): text for code, text in references if text != chr(code)},
        "characters": {sign: text for sign, text in fixed if text != sign},
    }


def write_images(index: Index, path: Path) -> None:
    rows = index.rows(range(len(index)))
    columns = [name for name in index.columns if name != "split"]
    table = {name: [row[name] for row in rows] for name in ("key", "path", "split", "group", "captions")}
    table["columns"] = {name: [row["columns"][name] for row in rows] for name in columns}
    text = strict_json(table, ensure_ascii=False, separators=(",", ":"))
    path.write_bytes(gzip.compress(text.encode(), 9, mtime=0))


def write_thumbnails(index: Index, folder: Path) -> None:
    folder.mkdir()
    starts = range(0, len(index), PACK_IMAGES)
    for pack, start in enumerate(progress(starts, desc="thumbnails", unit="pack", delay=1)):
        images = [index.thumbnail(number) for number in range(start, min(start + PACK_IMAGES, len(index)))]
        head = np.array([len(images), *map(len, images)], "<u4")
        head[0] = len(head)
        (folder / f"{pack}.bin").write_bytes(b"".join([head.tobytes(), *images]))


def write_model(index: Index, clip: Clip, with_images: bool, folder: Path) -> dict:
    """The codes of an index and the towers of its model; what site.js needs to know of them."""
    folder.mkdir(parents=True)
    if index.projection:
        by, codes = index.projection, index.stored
    else:
        axes = principal_axes(index)
        by = projection(index, axes, len(axes))
        codes = np.concatenate([quantized(index.decoded(rows), by) for rows in parts(index)])
        say(
            f"{index.folder}: not compressed, so all {len(axes)} dimensions are in the site, at int8;"
            " python -m eval compress makes fewer of them"
        )
    (folder / "codes.bin").write_bytes(codes.tobytes())
    (folder / "axes.bin").write_bytes(by.matrix.astype("<f4").tobytes())
    tower = write_text_tower(clip, index, folder / "text.onnx")
    say(described("text tower", tower, index), flush=True)
    preprocess, image_tower = {}, None
    if with_images:
        image_tower = write_image_tower(clip, index, folder / "image.onnx")
        say(described("image tower", image_tower, index), flush=True)
        preprocess = clip.towers.model.visual.preprocess_cfg
        preprocess = {name: preprocess[name] for name in ("mean", "std", "interpolation", "resize_mode")}
        background = "rgb({}, {}, {})".format(*clip.background)
        preprocess |= {"size": clip.image_size[0], "background": background}
    return {
        "dims": len(by.scales),
        "scales": by.scales.tolist(),
        "context_length": clip.tokenizer.context_length,
        "is_causal": causal_tower(clip.towers.model) is not None,
        "preprocess": preprocess,
    }


def described(name: str, tower: Tower, index: Index) -> str:
    kept = "" if tower.weights == "int8" else f"; with all at int8 it is below {100 * LEAST_OVERLAP:.0f} %"
    return (
        f"{index.folder}: {name} with layers at {tower.weights}: its top 10 are"
        f" {100 * tower.overlap:.1f} % those of the model, in {tower.n_queries} queries{kept}"
    )


PARTS = {
    "page and scripts": ("index.html", "*.js", "LICENSE.*"),
    "onnxruntime": ("*.wasm",),
    "tokenizer": ("tokenizer.json", "text.json"),
    "index: codes and axes": ("models/*/*.bin",),
    "index: captions, paths, columns": ("images.bin", "site.json"),
    "text tower": ("models/*/text.onnx",),
    "image tower": ("models/*/image.onnx",),
    "thumbnails": ("thumbnails/*.bin",),
}


def sizes(folder: Path) -> str:
    """A table of the parts, with their files and bytes."""
    rows, total = [], 0
    for part, patterns in PARTS.items():
        files = [path for pattern in patterns for path in folder.glob(pattern)]
        size = sum(path.stat().st_size for path in files)
        rows.append([part, str(len(files)), f"{size / 1e6:.2f}"])
        total += size
    rows.append(["all", str(sum(int(row[1]) for row in rows)), f"{total / 1e6:.2f}"])
    return markdown_table(["part", "files", "MB"], rows, left=1)
