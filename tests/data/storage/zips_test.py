from pathlib import Path
import struct
import zipfile

import fsspec
import pytest

from declip_jax.data.storage import files
from declip_jax.data.storage.zips import DamagedMember, read_member


def write_zip(path: Path, members: dict[str, bytes], method: int = zipfile.ZIP_STORED) -> str:
  with zipfile.ZipFile(path, "w", method) as archive:
    for name, data in members.items():
      archive.writestr(name, data)
  return str(path)


@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_BZIP2])
def test_members_equal_zipfile(tmp_path, method):
  # Names within names and within contents, so that a search for the bytes of a name would find the wrong place.
  members = {
    "10001.jpg": b"x",
    "001.jpg2": b"",
    "001.jpg": b"001.jpg" * 50,
    "0/001.jpg": b"PK\1\2 001.jpg",
    "e.jpg": b"",
  }
  path = write_zip(tmp_path / "z.zip", members, method)
  with zipfile.ZipFile(path, "a") as archive:
    archive.comment = b"a comment, 001.jpg"
  for name, data in members.items():
    assert read_member(path, name) == data
  for name in ("01.jpg", "jpg", "002.jpg"):
    with pytest.raises(FileNotFoundError, match=f"no member {name}"):
      read_member(path, name)


@pytest.mark.parametrize("change", ["zip64", "many", "prefix", "extra"])
def test_unusual_zips_equal_zipfile(tmp_path, monkeypatch, change):
  members = {f"{number:03d}.jpg": b"%d" % number for number in range(5000 if change == "many" else 10)}
  monkeypatch.setattr(zipfile, "ZIP64_LIMIT", 0 if change == "zip64" else zipfile.ZIP64_LIMIT)
  path = tmp_path / "z.zip"
  with zipfile.ZipFile(path, "w") as archive:
    for name, data in members.items():
      info = zipfile.ZipInfo(name)
      info.extra = struct.pack("<HH", 0xCAFE, 1000) + bytes(1000) if change == "extra" else b""
      archive.writestr(info, data)
  if change == "prefix":
    path.write_bytes(b"#!/bin/sh" * 100 + path.read_bytes())
  for name in list(members)[:: len(members) // 5]:
    assert read_member(str(path), name) == members[name]


def test_damage_is_found(tmp_path):
  for method in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED):
    path = Path(write_zip(tmp_path / f"{method}.zip", {"000.jpg": b"a photo " * 100}, method))
    whole = path.read_bytes()
    path.write_bytes(whole[:40] + bytes([whole[40] ^ 255]) + whole[41:])
    with pytest.raises(DamagedMember, match=f"{path}, 000.jpg"):
      read_member(str(path), "000.jpg")
    path.write_bytes(whole[:-30])
    with pytest.raises(ValueError, match=r"\.zip, 000\.jpg: File is not a zip file"):
      read_member(str(path), "000.jpg")


def test_the_size_of_a_zip_at_a_url_is_requested_once(tmp_path, monkeypatch):
  members = {f"{number:03d}.jpg": b"%d" % number for number in range(5)}
  memory, url = fsspec.filesystem("memory"), "memory://yfcc/images/00/077.zip"
  memory.pipe(url, Path(write_zip(tmp_path / "z.zip", members)).read_bytes())
  asked, stamp = [], files.stamp
  monkeypatch.setattr(files, "stamp", lambda path: asked.append(path) or stamp(path))
  for name, data in members.items():
    assert read_member(url, name) == data
  assert asked == [url]
  more = {**members, "005.jpg": b"x" * 1000}
  memory.pipe(url, Path(write_zip(tmp_path / "z.zip", more)).read_bytes())
  for name, data in more.items():
    assert read_member(url, name) == data  # though it has another size now
