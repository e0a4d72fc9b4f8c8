"""What a file is, by its first bytes and not by its name."""

import re
import zlib
from typing import NamedTuple

HEAD_BYTES = 8192  # enough of a file for `kind_of`


class Kind(NamedTuple):
    """
    Attributes:
        name: of the format, as people say it.
        is_image: images.check can decode it, for HEIC and SVG with a package that may have to be installed.
        fix: what to do with a file that is no image, if that is known.
    """

    name: str
    is_image: bool = False
    fix: str = ""


# Patterns of the start of a file. Formats that Pillow decodes have the names that Pillow gives them.
_IMAGES = {
    rb"\x89PNG\r\n\x1a\n": "PNG",
    rb"\xff\xd8": "JPEG",
    rb"RIFF.{4}WEBP": "WEBP",
    rb"GIF8[79]a": "GIF",
    rb"BM.{4}\0{4}": "BMP",
    rb"II[\x2a\x2b]\0|MM\0[\x2a\x2b]": "TIFF",
    rb"\0\0\x01\0[^\0]\0": "ICO",
    rb"\0\0\0\x0cjP  \r\n\x87\n|\xff\x4f\xff\x51": "JPEG2000",
    rb".{4}ftyp(?:avif|avis)|.{4}ftyp(?:mif1|msf1|miaf).{4}(?:.{4})*?(?:avif|avis)": "AVIF",
    rb".{4}ftyp(?:heic|heix|heim|heis|hevc|hevx|mif1|msf1)": "HEIF",
}
_OTHERS = {
    rb"%PDF-": "PDF",
    rb"%!PS|\xc5\xd0\xd3\xc6": "PostScript (EPS)",
    rb"8BPS": "Photoshop (PSD)",
    rb"gimp xcf": "GIMP (XCF)",
    rb"\0\0\0\x0cJXL \r\n\x87\n|\xff\x0a": "JPEG XL",
    rb"icns": "ICNS",
    rb"\0\0\x02\0[^\0]\0": "CUR",
    rb"\x76\x2f\x31\x01": "OpenEXR",
    rb"#\?RADIANCE|#\?RGBE": "Radiance HDR",
    rb"DDS ": "DDS",
    rb"P[1-7]\s": "PNM (PBM, PGM, PPM)",
    rb"qoif": "QOI",
    rb"\x0a[\0-\x05]\x01[\x01\x02\x04\x08]": "PCX",
    rb"/\* XPM \*/": "XPM",
    rb"\xd7\xcd\xc6\x9a|\x01\0\x09\0": "WMF",
    rb"\x01\0\0\0.{36} EMF": "EMF",
    rb"AT&TFORM": "DjVu",
    rb"SIMPLE  =": "FITS",
    rb".{128}DICM": "DICOM",
    rb"FUJIFILMCCD-RAW": "camera raw (RAF)",
    rb".{4}ftypcrx": "camera raw (CR3)",
    rb".{4}ftyp": "video (MP4, MOV)",
    rb"\x1aE\xdf\xa3": "video (WebM, Matroska)",
    rb"RIFF.{4}AVI ": "video (AVI)",
    rb"PK\x03\x04": "ZIP",
    rb"Rar!": "RAR",
    rb"7z\xbc\xaf": "7-Zip",
    rb"\x7fELF|MZ.{58}": "a program",
}
_IMAGE_PATTERNS = {re.compile(pattern, re.DOTALL): Kind(name, True) for pattern, name in _IMAGES.items()}
_OTHER_PATTERNS = {re.compile(pattern, re.DOTALL): Kind(name) for pattern, name in _OTHERS.items()}

SVG = Kind("SVG", True)
_HTML = Kind("HTML page", fix="it is what a server answered instead of the image")
_LFS = Kind("Git LFS pointer", fix="get the image by: git lfs pull")
_ANNEX = Kind("git-annex pointer", fix="get the image by: git annex get")
_UTF16 = (b"\xff\xfe", b"\xfe\xff")
_GZIP = b"\x1f\x8b"


def kind_of(head: bytes) -> Kind | None:
    """The kind of a file; None if it is not known.

    Args:
        head: the file, or at least its first HEAD_BYTES.
    """
    for patterns in (_IMAGE_PATTERNS, _OTHER_PATTERNS):
        for pattern, kind in patterns.items():
            if pattern.match(head[:256]):
                return kind
    return SVG if head.startswith(_GZIP) and _is_svgz(head) else _kind_of_text(head)


def _kind_of_text(head: bytes) -> Kind | None:
    if head.startswith(_UTF16):
        text = head[: HEAD_BYTES // 2 * 2].decode("utf-16", "replace")
    else:
        text = head[:HEAD_BYTES].decode("utf-8-sig", "replace")
    text = text.lstrip("\ufeff \t\r\n").lower()
    if text.startswith("version https://git-lfs.github.com/spec/"):
        return _LFS
    if text.startswith("/annex/objects/"):
        return _ANNEX
    if not text.startswith("<"):
        return Kind("JSON") if re.match(r'\{\s*"|\[\s*[\[{"]', text) else None
    text = re.sub(r"<!--.*?(-->|$)", "", text, flags=re.DOTALL)  # drawing programs begin with a long one
    root = re.search(r"<(?:[a-z]+:)?([a-z]\w*)[\s/>]", text)
    if text.startswith("<!doctype html") or (root and root[1] in ("html", "head", "body")):
        return _HTML
    if (root and root[1] == "svg") or re.match(r"(<\?xml[^>]*>\s*)?<!doctype svg", text):
        return SVG
    return Kind("XML") if text.startswith("<?xml") else None


def _is_svgz(head: bytes) -> bool:
    """Whether gzip data begins with an SVG."""
    try:
        start = zlib.decompressobj(wbits=31).decompress(head, HEAD_BYTES)
    except zlib.error:
        return False
    return not start.startswith(_GZIP) and _kind_of_text(start) == SVG
