"""Small files that would become large: compressed tables and tars, long lines, headers of gigabytes."""

import bz2
import gzip
import io
import lzma
import tarfile

import pytest
from conftest import noise_images

from data_prep.build.pipeline import Parallelism, build
from data_prep.errors import UserError
from data_prep.inputs import opened
from data_prep.inputs.formats import read
from data_prep.inputs.rows import Columns
from data_prep.inputs.tars import tar_samples

PACKED = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
ROW = b"a.png,a\n"


def tar_of(data: bytes, name: str = "a.txt") -> bytes:
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as archive:
        member = tarfile.TarInfo(name)
        member.size = len(data)
        archive.addfile(member, io.BytesIO(data))
    return buffer.getvalue()


BOMBS = {
    "rows.csv": b"image,caption\n" + ROW * 400_000,
    "rows.jsonl": b'{"image": "a.png", "caption": "a"}\n' * 300_000,
    "rows.tsv": b"image\tcaption\n" + b"a.png\ta\n" * 400_000,
    "member.tar": tar_of(bytes(8_000_000)),
}


@pytest.mark.parametrize("packing", PACKED)
@pytest.mark.parametrize("name", BOMBS)
def test_what_a_compressed_file_becomes_is_bounded(name, packing, tmp_path, monkeypatch):
    monkeypatch.setattr(opened, "FREE_BYTES", 1 << 20)
    path = tmp_path / f"{name}{packing}"
    path.write_bytes(PACKED[packing](BOMBS[name]))
    with pytest.raises(UserError, match=rf"{name}\{packing}: becomes more than 200 times its size"):
        for _ in read(str(path), Columns()):
            pass


@pytest.mark.parametrize("packing", PACKED)
def test_an_ordinary_table_is_read_compressed(packing, tmp_path):
    table = noise_images(tmp_path, 8)
    path = tmp_path / f"table.csv{packing}"
    path.write_bytes(PACKED[packing](table.read_bytes()))
    reports = [
        build([str(source)], tmp_path / name, parallelism=Parallelism(1))
        for source, name in ((table, "a"), (path, "b"))
    ]
    assert reports[0]["records"] == reports[1]["records"] == 8


@pytest.mark.parametrize("name", ["one.csv", "one.csv.gz", "one.jsonl", "later.csv", "later.jsonl.gz"])
def test_a_line_is_bounded(name, tmp_path, monkeypatch):
    monkeypatch.setattr(opened, "MAX_LINE", 1 << 16)
    start = b'{"image": "a", "caption": "b"}\n' if "jsonl" in name else b"image,caption\na,b\n"
    data = (start if name.startswith("later") else b"") + b"x" * (1 << 20)
    path = tmp_path / name
    path.write_bytes(gzip.compress(data) if name.endswith("gz") else data)
    with pytest.raises(UserError, match=rf"{name}:\d: a line of more than 65,536 characters"):
        list(read(str(path), Columns()))


@pytest.mark.parametrize("kind", [tarfile.XHDTYPE, tarfile.XGLTYPE, tarfile.GNUTYPE_LONGNAME])
def test_a_sparse_tar_that_claims_gigabytes_is_one_sentence(kind, tmp_path):
    header = tarfile.TarInfo("claims")
    header.type, header.size = kind, 2 << 30
    path = tmp_path / "a.tar"
    with open(path, "wb") as file:
        file.write(header.tobuf(tarfile.GNU_FORMAT))
        file.truncate(2 << 30)
    with pytest.raises(UserError, match=r"a\.tar: cannot be read \(a header of 2,147,483,648 bytes"):
        list(read(str(path), Columns()))


def test_a_member_that_claims_an_exabyte_ends_a_tar_at_once(tmp_path):
    """tarfile would read ten kilobytes 10^14 times, each time nothing."""
    about = tarfile.TarInfo("a.png")
    about.size = 1 << 60
    header = about.tobuf(tarfile.GNU_FORMAT)
    (tmp_path / "a.tar").write_bytes(header + b"x" * 1024)
    with open(tmp_path / "a.tar", "rb") as file, pytest.raises(tarfile.ReadError, match="unexpected end"):
        list(tar_samples(file))
    about.name = "a.unknown"  # passed over, not read
    (tmp_path / "a.tar").write_bytes(about.tobuf(tarfile.GNU_FORMAT) + b"x" * 1024)
    with open(tmp_path / "a.tar", "rb") as file, pytest.raises(tarfile.ReadError, match="unexpected end"):
        list(tar_samples(file))
