"""WebDataset tars of any origin, read sample by sample; nothing is extracted to disk."""

import lzma
import os
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from typing import NamedTuple

from data_prep.errors import UserError
from data_prep.inputs.cells import field_of
from data_prep.inputs.cells import kind_of as kind_of_cell
from data_prep.inputs.locations import MAX_BYTES
from data_prep.inputs.names import Problem, key_of
from data_prep.inputs.opened import open_bytes
from data_prep.inputs.rows import Ignore, Input, Row, captions_of, check_text, ignore_nothing, with_weight
from data_prep.inputs.storage import IMAGE_EXTENSIONS, SIDE_EXTENSIONS, SYSTEM_FILE, is_system_file
from data_prep.inputs.texts import rows_of_txt
from data_prep.signatures import HEAD_BYTES, kind_of
from data_prep.store.reader import StoreReader
from data_prep.store.remote import file_at
from data_prep.strict_json import parse_json, strict_json

MAX_PENDING = 64  # samples of one name up to the first dot that are held in memory
SIGNATURE_BYTES = 16  # for images.signature_of
MAX_EMPTY_READS = 100  # at the end of a tar
# Members that hold what the next member's header has no room for: names, and attributes (POSIX pax, GNU tar).
EXTENDED = (tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.SOLARIS_XHDTYPE)
EXTENDED += (tarfile.GNUTYPE_LONGNAME, tarfile.GNUTYPE_LONGLINK)
MAX_EXTENDED_BYTES = 1 << 20
TEXTS = {"txt", "json", "cls"}  # extensions of what describes an image
# Keys of KEY.json that our own tars store elsewhere, or that say nothing about the image.
KNOWN = {"caption", "captions", "weights", "key", "image", "sha256", "width", "height", "group", "columns"}


def read_tar(tar: Input) -> Iterator[Row]:
    """The rows of a tar, one per caption; `line` is the number of the sample.

    Raises:
        UserError: it cannot be read, or not to its end.
    """
    number, sample = 0, None
    extensions = (tar.image_ext, tar.caption_ext)
    try:
        with open_bytes(tar.source) if tar.fetched is None else _stored(tar) as file:
            samples = tar_samples(file, *extensions, tar.ignore, heads_only=tar.fetched is not None)
            for number, sample in enumerate(samples, 1):
                yield from _rows_of_sample(tar, number, sample)
    except (OSError, tarfile.TarError, EOFError, zlib.error, lzma.LZMAError) as error:
        after = f", after {number} samples, the last of them {sample.key}" if sample else ""
        raise UserError(
            f"{tar.source}: cannot be read ({str(error).strip()}{after}); get or write it again, or omit it"
        ) from None


@contextmanager
def _stored(tar: Input) -> Iterator[StoreReader]:
    store, name = file_at(tar.source)
    if (size := store.size(name)) is None:
        raise UserError(f"{tar.source}: no such file; check the URL")
    reader = StoreReader(store, name, size)
    yield reader
    tar.fetched.update(requests=reader.requests, bytes=reader.fetched_bytes)


def _rows_of_sample(tar: Input, number: int, sample: "TarSample") -> Iterator[Row]:
    name = f"{tar.label}/{sample.key}"
    if sample.problem:
        yield Row(number, name, problem=sample.problem)
        return
    image, group = sample.name_and_group()
    if image and key_of(image) == sample.key:
        # A tar of ours: its images keep their names, and so their keys and groups.
        name, group = image, "" if group == f"image:{image}" else group
    else:
        group = ""
    row = Row(
        number,
        name,
        group=group,
        label=sample.label(tar.columns.label) if tar.columns.label else "",
        columns=sample.columns(),
        data=sample.image.data if tar.fetched is None else sample.image.data[:SIGNATURE_BYTES],
        offset=sample.image.offset,
        length=None if tar.fetched is None else sample.image.size,
    )
    if tar.columns.weight:
        row = with_weight(row, sample.cell(tar.columns.weight))
    if tar.columns.caption:
        yield from _captioned(tar, row, sample)
    else:
        yield check_text(row)


def _captioned(tar: Input, row: Row, sample: "TarSample") -> Iterator[Row]:
    """One row per caption: the lines of a text, or the texts in a .json."""
    text, captions = sample.captions(tar.columns.captions, tar.caption_ext)
    if text is not None:
        yield from rows_of_txt(tar, row, f"{row.image}.{tar.caption_ext or 'txt'}", text)
    elif not captions:
        hint = "" if tar.caption_ext else "; see --caption-ext and --caption-column"
        detail = f"the sample has {', '.join(sample.members)}{hint}"
        yield check_text(row._replace(problem=Problem("empty caption", detail)))
    for column, caption, weight in captions:
        captioned = row if weight is None else with_weight(row, weight)
        if caption is None or isinstance(caption, str):
            yield check_text(captioned._replace(caption=caption or ""))
        else:
            detail = kind_of_cell(caption, "caption", column or tar.columns.caption)
            yield captioned._replace(problem=Problem("caption is not text", detail))


class TarCaption(NamedTuple):
    """A caption of a sample.

    Attributes:
        column: that it is from, if there are several; else "".
        weight: the cell of its weight, if data_prep wrote one.
    """

    column: str
    caption: object
    weight: object = None


class TarMember(NamedTuple):
    data: bytes  # or its first HEAD_BYTES
    offset: int  # of the data in the tar
    size: int


@dataclass
class TarSample:
    """Adjacent members that share a name up to the last dot, or up to the first; see _merged().

    Attributes:
        key: that name.
        members: by extension.
        problem: why it is not one image with texts.
    """

    key: str
    members: dict[str, TarMember] = field(default_factory=dict)
    problem: Problem | None = None
    image: TarMember | None = None

    def captions(self, columns: list[str], extension: str = "") -> tuple[bytes | None, list[TarCaption]]:
        """A text whose lines are the captions; or a list of captions from a .json: the list `captions` of
        data_prep's own, else a column, which may be a text or a list, else the .json is the list.

        A .txt comes before all but data_prep's list and several columns. If it repeats the caption of the
        .json, as img2dataset writes it, it is one caption: line breaks in it separate none.

        Args:
            extension: of the member with the captions; "" for txt and json.
        """
        values = _parsed(self.members.get(extension if extension.endswith("json") else "json"))
        text = self.members.get(extension or "txt") if not extension.endswith("json") else None
        captions = field_of(values, columns[0]) if isinstance(values, dict) else values
        if isinstance(values, dict) and isinstance(values.get("captions"), list) and not extension:
            return None, _own_captions(values)
        if len(columns) > 1 and isinstance(values, dict):
            of_columns = [TarCaption(*found) for found in captions_of(values, columns) if found[0]]
            if of_columns:
                return None, of_columns
        if text and not (isinstance(captions, str) and captions.split() == _decoded(text).split() != []):
            return text.data, []
        if extension and not text and not extension.endswith("json"):
            return None, []
        captions = captions if isinstance(captions, list) else [captions] if captions else []
        return None, [TarCaption("", caption) for caption in captions]

    def cell(self, column: str) -> object:
        """The column that data_prep kept in the .json; else the key of that name; None if there is none."""
        kept = self._json.get("columns")
        return kept[column] if isinstance(kept, dict) and column in kept else field_of(self._json, column)

    def label(self, column: str) -> str:
        """The column that data_prep kept in the .json; else the key of that name; else the .cls."""
        for values in (self._json.get("columns"), self._json):
            if isinstance(values, dict) and isinstance(values.get(column), (str, int, float)):
                return str(values[column])
        return _decoded(self.members["cls"]).strip() if "cls" in self.members else ""

    def name_and_group(self) -> tuple[str, str]:
        """The image's name and group according to data_prep's own .json."""
        return _if_text(self._json.get("image")), _if_text(self._json.get("group"))

    def columns(self) -> str:
        """All other keys of the .json, as JSON."""
        if isinstance(self._json.get("columns"), dict):
            values = self._json["columns"]
        else:
            values = {
                key: value
                for key, value in self._json.items()
                if key not in KNOWN and isinstance(value, (str, int, float))
            }
        values = {key: value for key, value in values.items() if value == value}  # no NaN, as in a table
        return strict_json(values, ensure_ascii=False, sort_keys=True) if values else ""

    @cached_property
    def _json(self) -> dict:
        values = _parsed(self.members.get("json"))
        return values if isinstance(values, dict) else {}

    def is_whole(self, texts: set[str]) -> bool:
        """Whether it has members of `texts`, extensions, and others."""
        return bool(texts & self.members.keys()) and bool(self.members.keys() - texts)


def _own_captions(values: dict) -> list[TarCaption]:
    """The captions in a .json of data_prep's own, with their weights, where it has them."""
    captions, weights = values["captions"], values.get("weights")
    if not isinstance(weights, list) or len(weights) != len(captions):
        weights = [None] * len(captions)
    return [TarCaption("", *each) for each in zip(captions, weights, strict=True)]


def _parsed(member: TarMember | None):
    """The value of a JSON member; None if there is none."""
    try:
        return parse_json(member.data) if member else None
    except ValueError:
        return None


def _decoded(member: TarMember) -> str:
    return member.data.decode("utf-8-sig", "surrogateescape")


def _if_text(value) -> str:
    return value if isinstance(value, str) else ""


class _Header(tarfile.TarInfo):
    """A header that must be whole: tarfile takes a damaged one, or none, for the end of the tar."""

    @classmethod
    def frombuf(cls, buf: bytes, encoding: str, errors: str) -> "_Header":
        header = super().frombuf(buf, encoding, errors)
        if header.type in EXTENDED and header.size > MAX_EXTENDED_BYTES:  # tarfile reads them as one
            raise tarfile.ReadError(
                f"a header of {header.size:,} bytes; a long name or its attributes have at most"
                f" {MAX_EXTENDED_BYTES:,}"
            )
        return header

    @classmethod
    def fromtarfile(cls, archive: tarfile.TarFile) -> "_Header":
        offset = archive.fileobj.tell()
        try:
            return super().fromtarfile(archive)
        except tarfile.EOFHeaderError:  # a block of zeros, see _check_end
            raise
        except (tarfile.EmptyHeaderError, tarfile.TruncatedHeaderError):
            what = "it ends without the two blocks of zeros that end a tar" if offset else "not a tar"
        # tarfile takes the numbers of a sparse member, in four notations, for numbers
        except (tarfile.HeaderError, ValueError, OverflowError) as error:
            what = f"no header of a member, {error}" if offset else "not a tar"
        raise tarfile.ReadError(f"byte {offset}: {what}")


def _check_end(archive: tarfile.TarFile) -> None:
    """A tar ends in two blocks of zeros or more, and nothing else (POSIX pax, "ustar Interchange Format").

    Raises:
        tarfile.ReadError: it does not, so members may be lost.
    """
    stream = archive.fileobj  # after the first block of zeros
    offset = stream.tell()
    if len(block := stream.read(tarfile.BLOCKSIZE)) < tarfile.BLOCKSIZE:
        raise tarfile.ReadError(f"byte {offset}: it ends without the second of the two blocks of zeros")
    while block:
        if rest := block.lstrip(b"\0"):
            raise tarfile.ReadError(
                f"byte {offset + len(block) - len(rest)}: something follows the zeros that end a tar: members"
                " overwritten by zeros, or another tar; join tars by: tar -A -f A.tar B.tar"
            )
        offset += len(block)
        block = stream.read(1 << 20)


class _Ending:
    """A stream that ends a reader which goes on and on at its end.

    To pass over a member, tarfile reads as many blocks as its header claims, for hours where that is an
    exabyte, and looks at what it got only then.
    """

    def __init__(self, file):
        self.file, self.empty_reads = file, 0

    def read(self, size: int) -> bytes:
        data = self.file.read(size)
        self.empty_reads += not data
        if self.empty_reads > MAX_EMPTY_READS:
            raise tarfile.ReadError("unexpected end of data")
        return data


def tar_samples(
    file,
    image_ext: str = "",
    caption_ext: str = "",
    ignore: Ignore = ignore_nothing,
    heads_only: bool = False,
) -> Iterator[TarSample]:
    """The samples of an open tar, in order; one that cannot be used has a problem.

    Args:
        image_ext, caption_ext, ignore: see Input.
        heads_only: seek in `file`, and read no more than the first bytes of what is no text.

    Raises:
        tarfile.TarError: the tar is damaged.
    """
    seen: set[str] = set()
    texts = TEXTS | ({caption_ext} - {""})
    opened = {"fileobj": file, "mode": "r:"} if heads_only else {"fileobj": _Ending(file), "mode": "r|"}
    with tarfile.open(**opened, tarinfo=_Header) as archive:
        for sample in _grouped(archive, image_ext, texts, ignore, heads_only):
            if sample.problem or _choose_image(sample, image_ext, texts, sample.key in seen):
                yield sample
            else:
                extension = next(iter(sample.members))
                ignore("no image beside it", f"{sample.key}.{extension}" if extension else sample.key)
            seen.add(sample.key)
        _check_end(archive)


def _grouped(
    archive: tarfile.TarFile, image_ext: str, texts: set[str], ignore: Ignore, heads_only: bool
) -> Iterator[TarSample]:
    """Adjacent members as samples."""
    extensions = sorted({*texts, image_ext} - {""}, key=len, reverse=True)
    pending: list[TarSample] = []  # of one name up to the first dot
    for member in archive:
        if member.isdir():
            continue
        if is_system_file(member.name):
            ignore(SYSTEM_FILE, member.name)
            continue
        key, extension = _split(member.name, extensions)
        sample = next((sample for sample in pending if sample.key == key), None)
        if sample is None:
            shared = _first_dot(key)
            is_other = pending and _first_dot(pending[0].key) != shared
            # What is whole needs no other member, unless s.seg.png may belong to s.png.
            are_whole = all(sample.is_whole(texts) and sample.key != shared for sample in pending)
            if is_other or are_whole or len(pending) >= MAX_PENDING:
                yield from _merged(pending, texts)
                pending = []
            sample = TarSample(key)
            pending.append(sample)
        _add(archive, sample, member, extension, heads_only and extension not in texts)
    yield from _merged(pending, texts)


def _split(name: str, extensions: list[str]) -> tuple[str, str]:
    """Key and extension of a member: up to the last dot, or before one of `extensions`."""
    for extension in extensions:
        if name.lower().endswith(f".{extension}"):
            return name[: -len(extension) - 1], extension
    key, extension = os.path.splitext(name)
    return key, extension[1:].lower()


def _first_dot(key: str) -> str:
    folder, slash, name = key.rpartition("/")
    return folder + slash + name.partition(".")[0]


def _add(
    archive: tarfile.TarFile, sample: TarSample, member: tarfile.TarInfo, extension: str, head_only: bool
) -> None:
    """Read a member, or its head, into its sample; or set the sample's problem."""
    if member.name.startswith("/") or ".." in member.name.replace("\\", "/").split("/"):
        sample.problem = Problem("path outside of the tar", member.name)
    elif not member.isfile() or member.issparse():
        sample.problem = Problem("not a regular file", f"{member.name} is a link, a device or a sparse file")
    elif member.size > MAX_BYTES:
        sample.problem = Problem("file too large", f"{member.name} has {member.size} bytes")
    elif extension in sample.members:
        sample.problem = Problem("repeated member", member.name)
    else:
        try:
            data = archive.extractfile(member).read(HEAD_BYTES if head_only else -1)
        except tarfile.ReadError as error:
            raise tarfile.ReadError(f"byte {member.offset}: {error} of {member.name}") from None
        sample.members[extension] = TarMember(data, member.offset_data, member.size)


def _merged(samples: list[TarSample], texts: set[str]) -> Iterator[TarSample]:
    """The samples of one name up to the first dot.

    What is not whole (s.seg.png) belongs to the sample of that name (s.jpg, s.txt), as in webdataset. Where
    there is none, and of what is whole, the last dot counts: Cancel_20.5.png and Cancel_20.6.png, each with
    its .txt, are two images.
    """
    base = next((sample for sample in samples if sample.key == _first_dot(sample.key)), None)
    own = [
        sample
        for sample in samples
        if base is None or sample is base or sample.is_whole(texts) or sample.problem
    ]
    for sample in samples:
        if sample not in own:
            for extension, member in sample.members.items():
                base.members.setdefault(f"{sample.key[len(base.key) + 1 :]}.{extension}", member)
    yield from own


def _choose_image(sample: TarSample, image_ext: str, texts: set[str], is_seen: bool) -> bool:
    """Set the image of a sample, or its problem.

    Args:
        is_seen: there was a sample of this key before.

    Returns:
        Whether it is a sample at all: a single member without an image, a README, is none.
    """
    if image_ext:
        images = [image_ext] if image_ext in sample.members else []
    else:
        images = _images(sample.members, texts)
    if is_seen:
        sample.problem = Problem("members not adjacent", "other members are between those of this key")
    elif len(images) == 1:
        sample.image = sample.members[images[0]]
    elif images or len(sample.members) > 1:
        reason = "several images in a sample" if images else "no image in the sample"
        sample.problem = Problem(reason, f"it has {', '.join(sample.members)}; see --image-ext")
    return bool(sample.problem or sample.image)


def _images(members: dict[str, TarMember], texts: set[str]) -> list[str]:
    """Extensions of the members that are images: by name; else by content; else what may be a damaged one."""
    if named := [extension for extension in members if f".{extension}" in IMAGE_EXTENSIONS]:
        return named
    kinds = {
        extension: kind_of(member.data[:HEAD_BYTES])
        for extension, member in members.items()
        if extension not in texts and f".{extension}" not in SIDE_EXTENSIONS
    }
    images = [extension for extension, kind in kinds.items() if kind and kind.is_image]
    return images or (list(kinds) if len(members) > 1 else [])
