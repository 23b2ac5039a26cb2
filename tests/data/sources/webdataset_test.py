from collections import Counter
from collections.abc import Iterator
import concurrent.futures
import io
import json
import os
from pathlib import Path
import pickle
import tarfile
import time
from typing import BinaryIO

import fsspec
import numpy as np
import pytest

from declip_jax.data import sources
from declip_jax.data.sources import webdataset
from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.webdataset import open_webdataset
from declip_jax.data.storage import files, indexes, jobs, patterns, shard_indexes, tars
from declip_jax.reporting import progress

LONG = "folder " + "ü" * 60 + "/" + "n" * 90  # more than 100 characters and 255 bytes
BIG = bytes(range(256)) * 5


def write_tar(path: Path, files: dict[str, bytes], format: int = tarfile.PAX_FORMAT) -> Path:
  with tarfile.open(path, "w", format=format) as tar:
    for name, contents in files.items():
      info = tarfile.TarInfo(name)
      info.size = len(contents)
      tar.addfile(info, io.BytesIO(contents))
  return path


def samples(*keys: str, **fields: bytes) -> dict[str, bytes]:
  """Files of samples that have an image and a text besides `fields`, all different."""
  files = {}
  for key in keys:
    files |= {f"{key}.jpg": f"image {key}".encode() + BIG, f"{key}.txt": f"caption {key}".encode()}
    files |= {f"{key}.{suffix}": contents for suffix, contents in fields.items()}
  return files


def captions(tmp_path: Path, files: dict[str, bytes]) -> tuple[str, ...]:
  return open_webdataset(str(write_tar(tmp_path / "one.tar", {"0.jpg": b"x", **files})))[0]["captions"]


@pytest.mark.parametrize("format", [tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_equals_tarfile(tmp_path, format):
  keys = ["0", "a/0", "./b/0", "é/ü ñ", "x" * 96, "d" * 90 + "/" + "e" * 70]
  keys += [LONG] if format != tarfile.USTAR_FORMAT else []
  path = write_tar(tmp_path / "s.tar", samples(*keys, cls=b"3\n", npy=b"not used"), format)
  source = open_webdataset(str(path))
  assert len(source) == len(keys)
  with tarfile.open(path) as tar:
    for key, example in zip(keys, source, strict=True):
      assert example["image"] == tar.extractfile(f"{key}.jpg").read()
      assert example["captions"] == (tar.extractfile(f"{key}.txt").read().decode(),)
      assert (example["label"], example["id"]) == (3, f"s.tar:{key}")


def test_only_regular_visible_files_make_samples(tmp_path):
  with tarfile.open(tmp_path / "s.tar", "w", pax_headers={"comment": "a global header"}) as tar:
    for name, kind in [("d.d", tarfile.DIRTYPE), ("0.jpg", b"0"), ("._0.txt", b"0"), ("README", b"0"), ("0.txt", b"0")]:
      info = tarfile.TarInfo(name)
      info.type, info.size = kind, 5 if kind == b"0" else 0
      tar.addfile(info, io.BytesIO(b"hello"))
    link = tarfile.TarInfo("1.jpg")
    link.type, link.linkname, link.size = tarfile.LNKTYPE, "0.jpg", 5
    tar.addfile(link)
    tar.addfile(tarfile.TarInfo("1.txt"))
  source = open_webdataset(str(tmp_path / "s.tar"))
  assert [example["captions"] for example in source] == [("hello",)]
  assert source.skipped == {"missing file": 1}


def test_sizes_in_base_256_and_headers_without_magic(tmp_path):
  path = write_tar(tmp_path / "s.tar", samples("0"), tarfile.USTAR_FORMAT)
  tar = bytearray(path.read_bytes())
  tar[124:136] = b"\x80" + (len(BIG) + 7).to_bytes(11, "big")
  tar[257:265] = bytes(8)
  tar[148:156] = b" " * 8
  tar[148:156] = f"{sum(tar[:512]):06o}\0 ".encode()
  path.write_bytes(tar)
  assert open_webdataset(str(path))[0]["image"] == b"image 0" + BIG


@pytest.mark.parametrize(
  ("files", "expected"),
  [
    ({"0.txt": b" a dog\n", "0.json": b'{"caption": "a cat"}'}, ("a dog",)),
    ({"0.txt": b"a dog", "0.json": b'{"captions": ["a cat", " ", "", "cats "]}'}, ("a cat", "cats")),
    ({"0.txt": b"a dog", "0.json": b'{"caption": ["a cat"]}'}, ("a cat",)),
    ({"0.txt": b"a dog", "0.json": b'{"captions": []}'}, ("a dog",)),
    ({"0.txt": b" \n", "0.json": b'{"caption": null, "text": "a cat"}'}, ("a cat",)),
    ({"0.json": b'["a cat", "cats"]', "0.cls": b"1"}, ("a cat", "cats")),
    ({"0.json": b'"a cat"', "0.cls": b"1"}, ("a cat",)),
    ({"0.json": b"[1]", "0.cls": b"\xef\xbb\xbf1"}, ()),
    ({"0.json": b'{"caption": [{"raw": "a cat"}]}'}, ("a cat",)),
    ({"0.json": b'{"captions": {"de": "eine Katze", "en": "a cat"}}'}, ("a cat",)),
    ({"0.txt": b"None", "0.json": b'{"caption": "nan"}', "0.cls": b"1"}, ()),
    ({"0.txt": b"a dog", "0.json": b'{"comments": ["a cat"], "title": "a cat"}'}, ("a dog",)),
    ({"0.json": b'{"Alt Text": " a cat ", "url": "x", "key": "0"}'}, ("a cat",)),
    ({"0.json": b'{"sentences": ["a cat", "cats"]}'}, ("a cat", "cats")),
    ({"0.json": b'{"caption_0": "a cat", "caption_1": "cats"}'}, ("a cat", "cats")),
    ({"0.json": b'{"title": "a cat", "description": "it sits"}'}, ()),
    ({"0.txt": b"a dog", "0.json": b""}, ("a dog",)),
    ({"0.txt": b"a dog", "0.json": b'{"caption": "a c'}, ("a dog",)),
    ({"0.cls": b"1", "0.json": b"{"}, ()),
    ({"0.JPG.TXT": b"a dog"}, ("a dog",)),
    ({"0.caption": b"a dog", "0.txt": b" "}, ("a dog",)),
    ({"0.txt": b"a\x0cdog\nand a\xe2\x80\xa8cat"}, ("a\x0cdog\nand a\u2028cat",)),
    ({"0.txt": "un caf\xe9".encode("utf-16")}, ("un caf\xe9",)),
    ({"0.txt": b"\xef\xbb\xbfa dog"}, ("a dog",)),
    ({"0.json": '{"caption": "caf\xe9"}'.encode("cp1252")}, ("caf\xe9",)),
    ({"0.txt": "caf\N{LATIN SMALL LETTER E WITH ACUTE}".encode("latin1")}, ("café",)),
  ],
)
def test_which_caption_is_used(tmp_path, files, expected):
  assert captions(tmp_path, files) == expected


@pytest.mark.parametrize("suffix", ["jpg", "JPEG", "png", "webp", "avif", "tif"])
def test_image_suffixes(tmp_path, suffix):
  source = open_webdataset(str(write_tar(tmp_path / "s.tar", {f"a.{suffix}": b"pixels", "a.cls": b"0"})))
  assert source[0] == {"image": b"pixels", "captions": (), "label": 0, "id": "s.tar:a"}


OBJECT = b'{"caption": "c", "alt": ["a", "b"], "score": 3}'
ALL = {"1.jpg": b"x", "1.right.png": b"y", "1.txt": b"t", "1.alt.txt": b"u\nv", "1.json": OBJECT}


@pytest.mark.parametrize(
  ("query", "image", "captions"),
  [
    ("", b"x", ("t",)),
    ("?caption=alt", b"x", ("a", "b")),
    ("?caption=alt.txt", b"x", ("u\nv",)),
    ("?caption=.alt.TXT,caption", b"x", ("u\nv", "c")),
    ("?caption=", b"x", ()),
    ("?image=right.png", b"y", ("t",)),
    ("?image=.right.PNG&caption=txt,alt", b"y", ("t", "a", "b")),
    ("?image=left.png,right.png", b"y", ("t",)),
  ],
)
def test_image_and_captions_can_be_chosen(tmp_path, query, image, captions):
  path = write_tar(tmp_path / "s.tar", ALL)
  (example,) = source = open_webdataset(f"{path}{query}")
  assert (example["image"], example["captions"]) == (image, captions)
  assert pickle.loads(pickle.dumps(source))[0] == example


def test_choices_that_do_not_exist_are_errors(tmp_path):
  path = write_tar(tmp_path / "s.tar", ALL | {"2.jpg": b"z", "2.json": b'{"alt": {"x": 1}}', "3.jpg": b"z"})
  with pytest.raises(ValueError, match=r"caption=title: .*\.jpg.*'caption', 'alt', 'score'"):
    open_webdataset(f"{path}?caption=title")
  with pytest.raises(ValueError, match=r"no usable sample .*expected \.left\.png after"):
    open_webdataset(f"{path}?image=left.png")
  with pytest.raises(ValueError, match="bad location"):
    open_webdataset(f"{path}?label=cls")
  assert len(open_webdataset(f"{path}?image=right.png")) == 1
  source = open_webdataset(f"{path}?caption=alt")
  with pytest.raises(BadSample, match=r"s\.tar:2: .*expected a caption") as error:
    source[1]
  assert error.value.kind == "damaged record"
  assert source[2]["captions"] == ()


def test_samples_without_image_are_skipped_and_counted(tmp_path):
  files = samples("0", "1") | {"2.txt": b"x", "3.npy": b"x", "4.seg.png": b"x"}
  source = open_webdataset(str(write_tar(tmp_path / "s.tar", files)))
  assert [example["id"] for example in source] == ["s.tar:0", "s.tar:1"]
  assert source.skipped == {"missing file": 3}


def test_images_alone_are_samples(tmp_path):
  files = {"0.jpg": b"zero", "1.png": b"one", "1.npy": b"x", "2.jpg": b"two", "2.txt": b" "}
  source = open_webdataset(str(write_tar(tmp_path / "s.tar", files)))
  assert [example["image"] for example in source] == [b"zero", b"one", b"two"]
  assert {(example["captions"], example["label"]) for example in source} == {((), -1)}
  assert source.skipped == {}


@pytest.mark.parametrize(
  ("member", "kept", "captions", "skipped"),
  [
    ("2.txt", 512 + 8, 2, {"damaged record": 1}),  # within the text
    ("2.txt", 512, 2, {"damaged record": 1}),  # after the header of the text
    ("2.txt", 100, 2, {"damaged record": 1}),  # within that header: it cannot be recognised as its text
    ("2.jpg", 512 + 700, 2, {"damaged record": 1}),
    ("2.jpg", 100, 1, {"damaged record": 1}),  # nor can sample 1 be recognised as complete
    ("2.jpg", 0, 2, {}),
  ],
)
def test_truncated_shard_keeps_whole_samples(tmp_path, member, kept, captions, skipped):
  path = write_tar(tmp_path / "s.tar", samples("0", "1", "2"))
  with tarfile.open(path) as tar:
    end = tar.getmember(member).offset + kept
  path.write_bytes(path.read_bytes()[:end])
  source = open_webdataset(str(path))
  assert [example["captions"] for example in source] == [("caption 0",), ("caption 1",), ()][:captions]
  assert source.skipped == skipped


@pytest.mark.parametrize("format", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_truncated_long_name(tmp_path, format):
  path = write_tar(tmp_path / "s.tar", samples("0", "1", LONG), format)
  with tarfile.open(path) as tar:
    start, end = tar.getmember("1.txt").offset + 1024, tar.getmember(f"{LONG}.jpg").offset_data
  tar = path.read_bytes()
  for cut, kept in [(start + 100, ["0"]), (start + 600, ["0"]), (end - 100, ["0"]), (end + 1, ["0", "1"])]:
    path.write_bytes(tar[:cut])
    source = open_webdataset(str(path))
    assert [example["id"] for example in source] == [f"s.tar:{key}" for key in kept]
    assert source.skipped == {"damaged record": 1}


def overwrite(path: Path, member: str, noise: bytes) -> int:
  """Overwrites the header of a member with noise; returns its offset."""
  with tarfile.open(path) as tar:
    offset = tar.getmember(member).offset
  tar = bytearray(path.read_bytes())
  tar[offset : offset + len(noise)] = noise
  path.write_bytes(tar)
  return offset


def test_a_shard_that_is_not_a_tar_is_an_error_with_shard_and_offset(tmp_path):
  path = write_tar(tmp_path / "s.tar", samples("0", "1"))
  overwrite(path, "0.jpg", b"\xff" * 512)
  with pytest.raises(ValueError, match=r"s\.tar, byte 0: no tar header"):
    open_webdataset(str(path))


def test_a_damaged_or_empty_shard_is_counted_and_does_not_affect_others(tmp_path, caplog):
  for shard in range(4):
    write_tar(tmp_path / f"{shard}.tar", samples(*(f"{shard} {key}" for key in "abcd")))
  offset = overwrite(tmp_path / "1.tar", "1 c.jpg", b"\xff" * 60_000)
  (tmp_path / "2.tar").write_bytes(b"")
  source = open_webdataset(f"{tmp_path}/*.tar")
  keys = ["0 a", "0 b", "0 c", "0 d", "1 a", "3 a", "3 b", "3 c", "3 d"]  # 1 b cannot be recognised as complete
  assert [example["id"].partition(":")[2] for example in source] == keys
  assert all(len(example["captions"]) == 1 for example in source)
  assert source.skipped == {"damaged record": 2}
  first, second = (record.getMessage() for record in caplog.records)
  assert f"1.tar, byte {offset}: no tar header" in first
  assert "the samples before it are used: 1" in first
  assert "2.tar, no sample in its 0 bytes" in second


def test_a_repeated_suffix_starts_a_sample(tmp_path):
  with tarfile.open(tmp_path / "s.tar", "w") as tar:
    for name, contents in [("a.jpg", b"0"), ("a.jpg", b"1"), ("a.txt", b"one"), ("a.txt", b"two"), ("a.jpg", b"2")]:
      info = tarfile.TarInfo(name)
      info.size = len(contents)
      tar.addfile(info, io.BytesIO(contents))
  source = open_webdataset(str(tmp_path / "s.tar"))
  assert [(example["image"], example["captions"]) for example in source] == [
    (b"0", ()), (b"1", ("one",)), (b"2", ("two",))
  ]  # fmt: skip


def test_suffixes_are_reported_where_no_sample_has_an_image(tmp_path):
  path = write_tar(tmp_path / "s.tar", {"img.v1.0.jpg": b"x", "other.v1.0.jpg": b"x", "other.txt": b"x"})
  with pytest.raises(ValueError, match=r"no usable sample .* have \.v1\.0\.jpg, \.txt; expected \.jpg .*first dot"):
    open_webdataset(str(path))


def test_indexing_shows_its_progress(tmp_path, monkeypatch, capfd):
  def slow(path, size, images):
    time.sleep(0.3 * path.endswith("1.tar"))
    return scan(path, size, images)

  scan = webdataset._scan
  monkeypatch.setattr(webdataset, "_scan", slow)
  monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
  for shard in range(3):
    write_tar(tmp_path / f"{shard}.tar", samples(str(shard)))
  assert len(open_webdataset(f"{tmp_path}/*.tar")) == 3
  lines = capfd.readouterr().err.splitlines()
  assert f"{tmp_path}/*.tar" in lines[-1]
  assert "/3 shards" in lines[-1]
  assert len(lines) < 5


def test_the_stamp_follows_the_shards(tmp_path):
  path = write_tar(tmp_path / "s.tar", samples("0"))
  before = open_webdataset(str(path)).stamp
  assert open_webdataset(str(path)).stamp == before
  write_tar(path, samples("1"))
  assert open_webdataset(str(path)).stamp != before


def test_the_stamp_follows_classnames_txt(tmp_path):
  path, seen = write_tar(tmp_path / "s.tar", samples("0")), []
  for names in ("cat\ndog\n", "dog\ncat\n"):
    (tmp_path / "classnames.txt").write_text(names)
    seen.append(open_webdataset(str(path)))
  assert seen[0].stamp != seen[1].stamp
  assert pickle.loads(pickle.dumps(seen[0])).stamp == seen[0].stamp  # although the file has changed


@pytest.mark.parametrize("kept", [0, 50, 140, -3])
def test_a_damaged_index_is_named_and_built_again(tmp_path, kept, caplog):
  path = write_tar(tmp_path / "s.tar", samples("0", "1"))
  open_webdataset(str(path))
  (index,) = (tmp_path / ".declip_jax").glob("*.npy")
  whole = index.read_bytes()
  index.write_bytes(whole[:kept])
  assert len(open_webdataset(str(path))) == 2
  assert f"{index} is not used, and is built again" in caplog.text
  assert index.read_bytes() == whole


@pytest.mark.parametrize("size", [b"-0000001000\0", b"\xff" * 12])
def test_an_impossible_size_is_an_error_not_an_endless_loop(tmp_path, size):
  path = write_tar(tmp_path / "s.tar", samples("0"))
  tar = bytearray(path.read_bytes())
  tar[124:136] = size
  path.write_bytes(tar)
  with pytest.raises(ValueError, match=r"s\.tar, byte 0: a member of -?\d+ bytes"):
    open_webdataset(str(path))


def test_no_usable_sample_is_an_error(tmp_path):
  with pytest.raises(ValueError, match=r"no usable sample \(shards: 1, .*missing file"):
    open_webdataset(str(write_tar(tmp_path / "s.tar", {"a.txt": b"x"})))


def test_patterns(tmp_path):
  for shard in range(8, 12):
    write_tar(tmp_path / f"train-{shard:03d}.tar", samples(str(shard)))

  def ids(pattern: str) -> list[str]:
    return [example["id"].partition(":")[2] for example in open_webdataset(str(tmp_path / pattern))]

  assert ids("train-*.tar") == ["8", "9", "10", "11"]
  assert ids("train-{009..010}.tar") == ["9", "10"]
  assert ids(f"train-{{011..011}}.tar::{tmp_path}/train-00?.tar") == ["11", "8", "9"]
  with pytest.raises(FileNotFoundError, match=r"no file matches .*train-012\.tar; in .*train-008\.tar"):
    ids("train-{008..012}.tar")
  with pytest.raises(FileNotFoundError, match=r"val-\*\.tar; in .*train-011\.tar"):
    ids("val-*.tar")
  with pytest.raises(FileNotFoundError, match=r"train-011\.tar"):
    ids("")
  with pytest.raises(ValueError, match=r"range \{3\.\.1\} is empty"):
    ids("{3..1}.tar")


def test_index_is_reused_and_follows_its_shards(tmp_path):
  path = write_tar(tmp_path / "s.tar", samples("0"))
  assert len(open_webdataset(str(path))) == 1
  (index,) = (tmp_path / ".declip_jax").glob("*.npy")
  before = index.stat().st_mtime_ns
  assert len(open_webdataset(str(path))) == 1
  assert index.stat().st_mtime_ns == before
  write_tar(path, samples("a", "b"))
  assert [example["id"] for example in open_webdataset(str(path))] == ["s.tar:a", "s.tar:b"]
  stamp = path.stat().st_mtime_ns
  write_tar(path, samples("c", "d"))  # the same size
  os.utime(path, ns=(stamp, stamp + 1))
  assert open_webdataset(str(path))[1]["captions"] == ("caption d",)


@pytest.mark.parametrize("number", range(6))
def test_a_shard_that_changes_while_open_loses_only_samples(tmp_path, number):
  path = write_tar(tmp_path / "s.tar", samples("0", "1"))
  source = open_webdataset(str(path))
  tar = path.read_bytes()
  other = write_tar(tmp_path / "other.tar", samples("a" * 200, "b" * 200)).read_bytes()
  mixed = tar.replace(b"1.jpg", b"2.jpg")  # two samples instead of one
  cut = tar[: tar.index(b"caption 1") + 4]
  changed = [tar[:300], tar[:2000], b"\xff" * len(tar), other[: len(tar)], mixed, cut]
  path.write_bytes(changed[number])  # in place, with no new index
  with pytest.raises(BadSample, match="s.tar, sample at byte .*changed since it was indexed") as error:
    source[1]
  assert error.value.kind == "damaged record"


def test_a_replaced_shard_is_read_again(tmp_path):
  path = write_tar(tmp_path / "s.tar", samples("0"))
  before = open_webdataset(str(path))
  assert before[0]["id"] == "s.tar:0"
  write_tar(tmp_path / "new", samples("a", "b")).replace(path)
  assert [example["id"] for example in open_webdataset(str(path))] == ["s.tar:a", "s.tar:b"]


def test_a_missing_shard_loses_its_samples(tmp_path):
  for shard in range(2):
    write_tar(tmp_path / f"{shard}.tar", samples(str(shard)))
  source = open_webdataset(f"{tmp_path}/*.tar")
  (tmp_path / "0.tar").unlink()
  with pytest.raises(BadSample, match=r"0\.tar, sample at byte 0: .*No such file") as error:
    source[0]
  assert error.value.kind == "missing file"
  assert source[1]["captions"] == ("caption 1",)


def test_the_index_of_read_only_shards_goes_to_the_user_cache(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  (tmp_path / ".declip_jax").write_text("a file where the folder would be")
  path = write_tar(tmp_path / "s.tar", samples("0"))
  for _ in range(2):
    assert len(open_webdataset(str(path))) == 1
  assert len(list((tmp_path / "cache" / "declip_jax").glob("*.npy"))) == 1
  monkeypatch.setenv("XDG_CACHE_HOME", str(path))
  write_tar(path, samples("0", "1"))
  with pytest.raises(OSError, match="XDG_CACHE_HOME"):
    open_webdataset(str(path))


def test_pickles_small_however_many_shards(tmp_path):
  for shard in range(150):  # more than may be open
    write_tar(tmp_path / f"{shard:03d}.tar", samples(f"{shard} a", f"{shard} b"))
  source = open_webdataset(f"{tmp_path}/*.tar")
  order = np.random.default_rng(0).permutation(len(source))
  expected = [source[index] for index in order]
  pickled = pickle.dumps(source)
  assert len(pickled) < 1000
  assert [pickle.loads(pickled)[index] for index in order] == expected
  assert [example["captions"] for example in source][::2] == [(f"caption {shard} a",) for shard in range(150)]
  assert len(os.listdir("/proc/self/fd") if os.path.isdir("/proc/self/fd") else ()) < 400


def test_classnames_and_bad_fields(tmp_path):
  fields = {"a": b"1", "b": b"2", "c": b"one", "d": b"-1", "f": b"9" * 5000}
  files = {f"{key}.{suffix}": text for key, cls in fields.items() for suffix, text in [("png", b"x"), ("cls", cls)]}
  files |= {"e.png": b"x", "e.json": b"{"}
  path = write_tar(tmp_path / "s.tar", files)
  assert open_webdataset(str(path)).classnames == ()
  (tmp_path / "classnames.txt").write_text("dog\nhot dog\n")
  source = pickle.loads(pickle.dumps(open_webdataset(str(path))))
  assert source.classnames == ("dog", "hot dog")
  assert (source[0]["label"], source[3]["label"]) == (1, -1)
  for index, kind, message in [
    (1, "no label", "s.tar:b: bad .cls b'2'.* -1 to 1"),
    (2, "damaged record", "s.tar:c: bad .cls"),
    (4, "damaged record", "s.tar:f: "),
    (5, "damaged record", "s.tar:e: bad .json"),
  ]:
    with pytest.raises(BadSample, match=message) as error:
      source[index]
    assert error.value.kind == kind


@pytest.mark.parametrize("suffix", ["jpg", "txt"])
def test_a_member_of_40_gigabytes_costs_only_its_sample(tmp_path, suffix):
  before = {"a.jpg": b"a", "b.jpg": b"b"} if suffix == "txt" else {"a.jpg": b"a"}
  path, size = write_tar(tmp_path / "s.tar", before), 40 * 2**30
  with path.open("r+b") as file:
    file.seek(1024 * len(before))
    info = tarfile.TarInfo(f"b.{suffix}")
    info.size = size
    file.write(info.tobuf(tarfile.GNU_FORMAT))
    file.seek(size, io.SEEK_CUR)  # takes no space
    last = tarfile.TarInfo("c.jpg")
    last.size = 1
    file.write(last.tobuf() + b"c".ljust(512, b"\0") + bytes(1024))
  source = open_webdataset(str(path))
  assert [source[index]["image"] for index in (0, 2)] == [b"a", b"c"]
  with pytest.raises(BadSample, match="s.tar, sample at byte 1024: .* bytes are more than") as error:
    source[1]
  assert error.value.kind == "too large"


def test_labels_that_count_from_1_are_rejected(tmp_path):
  for shard, labels in enumerate(["12", "3"]):
    files = {f"{label}.{suffix}": text for label in labels for suffix, text in [("cls", label.encode()), ("jpg", b"x")]}
    write_tar(tmp_path / f"{shard}.tar", files)
  (tmp_path / "classnames.txt").write_text("ant\nbee\ncat\n")
  with pytest.raises(ValueError, match=r"labels in \.cls are 1 to 3, but .* 3 lines of classnames\.txt"):
    open_webdataset(f"{tmp_path}/*.tar")
  assert [example["label"] for example in open_webdataset(f"{tmp_path}/0.tar")] == [1, 2]
  (tmp_path / "classnames.txt").write_text("none\nant\nbee\ncat\n")
  assert open_webdataset(f"{tmp_path}/*.tar")[2]["label"] == 3


@pytest.mark.parametrize("marker", ["dataset_type.txt", "test/dataset_type.txt", "test/nshards.txt"])
def test_the_layout_of_clip_benchmark(tmp_path, marker):
  (tmp_path / "test").mkdir()
  path = write_tar(tmp_path / "test" / "0.tar", {"0.webp": b"x", "0.txt": b"one\n two\r\n\nthree", "0.cls": b"0"})
  (tmp_path / "classnames.txt").write_text("ant\n")
  assert open_webdataset(str(path))[0]["captions"] == ("one\n two\r\n\nthree",)
  (tmp_path / marker).write_text("retrieval\n")
  source = pickle.loads(pickle.dumps(open_webdataset(str(path))))
  assert source[0]["captions"] == ("one", "two", "three")
  assert source.classnames == ("ant",)


@pytest.mark.parametrize(
  ("files", "message"),
  [
    ({"0.npy": b"x"}, "no captions found, its samples have .jpg, .npy; captions are read from .txt, .caption, or from"),
    ({"0.json": b'{"legend": "x", "url": 1}'}, ".json of s.tar:0 has the keys 'legend', 'url'"),
    ({"1.jpg": b"x", "1.json": b'{"legend": "x"}'}, ".json of s.tar:1 has the keys 'legend'"),
    ({"0.json": b"{"}, "no captions found, its samples have .jpg, .json; captions"),
    ({"0.txt": b"x", "photo 2.0.jpg": b"x"}, "samples without an image have .0.jpg; a suffix starts at the first dot"),
    (
      {"1.jpg": b"x", "0.txt": b"x", "1.txt": b"x"},
      "members of 2 samples are elsewhere in their shard; sort",
    ),
    ({"0.cls": b"1"}, ""),
    ({}, ""),
  ],
)
def test_missing_captions_and_images_are_reported_at_each_start(tmp_path, caplog, files, message):
  path = write_tar(tmp_path / "s.tar", {"0.jpg": b"x", **files})
  for _ in range(2):
    caplog.clear()
    open_webdataset(str(path))
    assert bool(caplog.records) == bool(message)
    assert message in caplog.text


def test_what_follows_the_end_of_a_shard_costs_no_sample(tmp_path, caplog):
  path = write_tar(tmp_path / "s.tar", samples("0", "1"))
  path.write_bytes(path.read_bytes() + write_tar(tmp_path / "t.tar", samples("1", "2")).read_bytes() + b"junk")
  source = open_webdataset(str(path))
  assert [example["captions"] for example in source] == [("caption 0",), ("caption 1",), ("caption 1",), ("caption 2",)]
  assert source.skipped == {"damaged record": 1}
  assert "s.tar, byte 20480: the data after the end of the tar is not another tar" in caplog.text


def test_samples_with_sparse_members_are_counted_and_reported(tmp_path, caplog):
  path = write_tar(tmp_path / "s.tar", samples("0", "1", "2"), tarfile.GNU_FORMAT)
  tar = bytearray(path.read_bytes())
  with tarfile.open(path) as opened:
    tar[opened.getmember("1.jpg").offset + 156] = ord("S")
  path.write_bytes(tar)
  source = open_webdataset(str(path))
  assert [example["id"] for example in source] == ["s.tar:0", "s.tar:2"]
  assert source.skipped == {"damaged record": 1}
  assert "not used: 1 sample with sparse files" in caplog.text


def test_index_out_of_range(tmp_path):
  source = open_webdataset(str(write_tar(tmp_path / "s.tar", samples("0"))))
  for index in (-1, 1):
    with pytest.raises(IndexError, match=f"no sample {index}, there are 1"):
      source[index]


def test_open_source(tmp_path):
  path = write_tar(tmp_path / "s.tar", samples("0", json=json.dumps({"captions": ["one", "two"]}).encode()))
  source = sources.open_source(f"webdataset:{path}")
  assert source.name == f"webdataset:{path}"
  assert source[0]["captions"] == ("one", "two")
  for spec in ("files:/data", r"C:\data", "webdataset", "webdataset:", ""):
    with pytest.raises(ValueError, match="expected KIND:LOCATION, where KIND is one of scenes, webdataset,"):
      sources.open_source(spec)


@pytest.fixture
def bucket(tmp_path, monkeypatch) -> Iterator[fsspec.AbstractFileSystem]:
  """An empty memory:// and a separate cache folder for the indexes."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  memory = fsspec.filesystem("memory")
  memory.store.clear()
  yield memory
  memory.store.clear()


@pytest.mark.parametrize("pattern", ["s-*.tar", "s-{0..2}.tar"])
def test_shards_at_urls_equal_local_ones(tmp_path, bucket, pattern):
  for shard in range(3):
    path = write_tar(tmp_path / f"s-{shard}.tar", samples(f"{shard} a", LONG, cls=b"1"))
    bucket.pipe(f"/bucket/data/s-{shard}.tar", path.read_bytes())
  bucket.pipe("/bucket/data/classnames.txt", b"dog\ncat\n")
  (tmp_path / "classnames.txt").write_text("dog\ncat\n")
  local, remote = open_webdataset(f"{tmp_path}/{pattern}"), open_webdataset(f"memory://bucket/data/{pattern}")
  assert list(remote) == list(local)
  assert remote.classnames == local.classnames == ("dog", "cat")
  assert len(list((tmp_path / "cache" / "declip_jax").glob("*.npy"))) == 1
  bucket.pipe("/bucket/data/s-1.tar", b"")
  with pytest.raises(BadSample, match="s-1.tar, sample at byte"):
    remote[2]
  bucket.rm("/bucket/data/s-1.tar")
  with pytest.raises(BadSample, match="s-1.tar, sample at byte .*no such file") as error:
    remote[2]
  assert error.value.kind == "missing file"
  write_tar(tmp_path / "s-1.tar", samples("new"))
  bucket.pipe("/bucket/data/s-1.tar", (tmp_path / "s-1.tar").read_bytes())
  assert [example["id"] for example in open_webdataset(f"memory://bucket/data/{pattern}")][2:3] == ["s-1.tar:new"]


def test_indexing_a_url_does_not_download_large_images(tmp_path, bucket, monkeypatch):
  large = {f"{key}.{suffix}": bytes(size) for key in range(4) for suffix, size in [("jpg", 5_000_000), ("txt", 10)]}
  bucket.pipe("/large.tar", write_tar(tmp_path / "large.tar", large).read_bytes())
  small = {f"{key}.{suffix}": bytes(size) for key in range(50) for suffix, size in [("jpg", 20_000), ("txt", 10)]}
  bucket.pipe("/small.tar", write_tar(tmp_path / "small.tar", small).read_bytes())
  requests = []
  read = files.read
  monkeypatch.setattr(files, "read", lambda path, start=0, size=None: requests.append(size) or read(path, start, size))
  assert len(open_webdataset("memory://large.tar")) == 4
  assert sum(requests) < 6 * 2**20  # of 20 MB
  requests.clear()
  assert len(open_webdataset("memory://small.tar")) == 50
  assert len(requests) == 2  # of 1 MiB, for 1.1 MB


def test_an_interrupted_index_is_built_again(tmp_path, monkeypatch):
  path = write_tar(tmp_path / "s.tar", samples("0", "1"))
  monkeypatch.setattr(files, "commit", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
  with pytest.raises(KeyboardInterrupt):
    open_webdataset(str(path))
  monkeypatch.undo()
  assert list((tmp_path / ".declip_jax").iterdir()) == []
  assert len(open_webdataset(str(path))) == 2


@pytest.fixture
def many(tmp_path) -> str:
  """50 shards of one to three samples, some of them damaged, empty or with a sample that has no image."""
  (tmp_path / "many").mkdir()
  for shard in range(50):
    members = samples(*(f"{shard} {key}" for key in range(1 + shard % 3))) | ({"x.txt": b"x"} if shard % 7 == 3 else {})
    path = write_tar(tmp_path / "many" / f"{shard:02d}.tar", members)
    if shard % 11 == 5:
      path.write_bytes(path.read_bytes()[:700])
  (tmp_path / "many" / "20.tar").write_bytes(b"")
  return f"{tmp_path}/many/*.tar"


def indexed(location: str) -> bytes:
  """The bytes of the index; everything else in its folder is gone."""
  open_webdataset(location)
  (index,) = (Path(location).parent / ".declip_jax").iterdir()
  contents = bytes(indexes.contents(index))
  index.unlink()
  return contents


@pytest.mark.slow
def test_an_index_does_not_depend_on_who_builds_it(many, monkeypatch):
  def failing(file: BinaryIO, *_) -> None:
    raise AssertionError(f"{file.name} should be scanned by another process")

  monkeypatch.setattr(shard_indexes, "_GROUP", 64)
  alone = indexed(many)
  scans = [webdataset._scan(path, os.path.getsize(path), ("jpg",)) for path in patterns.expand(many)]
  spans = [(number, *span) for number, scan in enumerate(scans) for span in scan.spans.tolist()]
  np.testing.assert_array_equal(np.load(io.BytesIO(alone)), spans)
  skipped = {"missing file": 6, "damaged record": 6}
  about = json.loads(alone[np.load(io.BytesIO(alone)).nbytes + 128 :])
  assert (about["shards"], about["skipped"]) == (patterns.expand(many), skipped)
  monkeypatch.setattr(shard_indexes, "_GROUP", 3)
  assert indexed(many) == alone
  monkeypatch.setattr(shard_indexes, "_ALONE", 0)
  monkeypatch.setattr(jobs, "cores", lambda: 1)
  assert indexed(many) == alone
  monkeypatch.setattr(jobs, "cores", lambda: 2)
  monkeypatch.setattr(tars, "members", failing)  # in this process
  assert indexed(many) == alone


def test_a_build_that_was_interrupted_continues(many, monkeypatch):
  def scanning(path, size, images):
    scanned[path] += 1
    if len(scanned) > most:
      raise KeyboardInterrupt
    return scan(path, size, images)

  monkeypatch.setattr(shard_indexes, "_GROUP", 3)
  whole = indexed(many)
  scan, scanned, most = webdataset._scan, Counter(), 25
  monkeypatch.setattr(webdataset, "_scan", scanning)
  with pytest.raises(KeyboardInterrupt):
    open_webdataset(many)
  folder = Path(many).parent / ".declip_jax"
  ((left),) = folder.iterdir()  # the folder of job files
  made = [int(part.name) for part in left.iterdir() if not part.name.startswith(".")]
  kept = {path for number in made for path in patterns.expand(many)[3 * number : 3 * number + 3]}
  assert 15 < len(kept) <= 25
  scanned.clear()
  most = 50
  assert indexed(many) == whole
  assert scanned.keys() == set(patterns.expand(many)) - kept
  assert set(scanned.values()) == {1}


def test_job_files_of_other_shards_are_ignored_and_deleted_after_a_day(many, monkeypatch):
  monkeypatch.setattr(shard_indexes, "_GROUP", 3)
  with monkeypatch.context() as patch:
    patch.setattr(shard_indexes, "_join", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
    with pytest.raises(KeyboardInterrupt):
      open_webdataset(many)
  ((left),) = (Path(many).parent / ".declip_jax").iterdir()
  write_tar(Path(many).parent / "07.tar", samples("new"))
  os.utime(left, (time.time() - 3600 * 25,) * 2)
  assert [example["id"] for example in open_webdataset(many)].count("07.tar:new") == 1
  assert not left.exists()


def test_builders_that_share_a_folder_share_the_work(many, monkeypatch):
  def scanning(path, size, images):
    scanned[path] += 1
    time.sleep(0.01)
    return scan(path, size, images)

  monkeypatch.setattr(shard_indexes, "_GROUP", 1)
  whole = indexed(many)
  scan, scanned = webdataset._scan, Counter()
  monkeypatch.setattr(webdataset, "_scan", scanning)
  with concurrent.futures.ThreadPoolExecutor(3) as pool:
    sources = list(pool.map(open_webdataset, [many] * 3))
  assert len({source.stamp for source in sources}) == 1
  (index,) = (Path(many).parent / ".declip_jax").iterdir()
  assert bytes(indexes.contents(index)) == whole
  assert len(scanned) == 50
  assert scanned.total() < 90  # of 150


@pytest.mark.slow
def test_this_process_indexes_shards_that_others_cannot_read(many, bucket, monkeypatch, caplog):
  for path in patterns.expand(many):
    bucket.pipe(f"/bucket/{Path(path).name}", Path(path).read_bytes())
  monkeypatch.setattr(shard_indexes, "_ALONE", 0)
  monkeypatch.setattr(jobs, "cores", lambda: 2)
  local, remote = open_webdataset(many), open_webdataset("memory://bucket/*.tar")
  assert list(remote) == list(local)
  assert "so this process repeats its job: FileNotFoundError" in caplog.text
