"""TFRecord files with the features that TFDS, img2dataset and others write."""

from collections import Counter
from collections.abc import Iterator
import gzip
import io
import multiprocessing
import os
from pathlib import Path
import pickle
import time

import fsspec
import numpy as np
from PIL import Image
import pytest
import tf_files

from declip_jax.data import sources
from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.tfrecord import open_tfrecord
from declip_jax.data.storage import files, indexes, shard_indexes

COUNT = 6


def png(number: int) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (8, 8), (number, 0, 0)).save(file, "PNG")
  return file.getvalue()


def img2dataset(number: int) -> bytes:
  """A record as its TFRecordSampleWriter makes it."""
  return tf_files.message(
    jpg=png(number),
    txt=f" caption {number} dög",
    caption=f" caption {number} dög",
    key=f"{number:09d}",
    url=f"https://a.b/{number}.jpg",
    status="success",
    error_message="",
    width=8,
    exif="{}",
    aesthetic=5.5,
  )


@pytest.fixture
def folder(tmp_path: Path) -> Path:
  """Two files, of four and two records."""
  tf_files.write(tmp_path / "00000.tfrecord", map(img2dataset, range(4)))
  tf_files.write(tmp_path / "00001.tfrecord", map(img2dataset, range(4, COUNT)))
  return tmp_path


def test_records_of_img2dataset(folder):
  source = sources.open_source(f"tfrecord:{folder}/*.tfrecord")
  assert isinstance(source, sources.Source)
  assert len(source) == COUNT
  assert [example["image"] for example in source] == [png(number) for number in range(COUNT)]
  assert [example["captions"] for example in source] == [(f"caption {number} dög",) for number in range(COUNT)]
  assert {example["label"] for example in source} == {-1}
  assert (source.classnames, source.skipped, source.left_out) == ((), {}, {})
  assert source[0]["id"] == "00000.tfrecord, record at byte 0"
  for index in (-1, COUNT):
    with pytest.raises(IndexError, match=f"no record {index}, there are {COUNT}"):
      source[index]


@pytest.mark.parametrize(
  ("features", "query", "captions", "label"),
  [
    ({"image": b"x", "label": 1}, "", (), 1),  # TFDS's cifar10
    ({"image": b"x", "captions": ["a", "b", " "], "image__filename": "a.jpg"}, "", ("a", "b"), -1),  # flickr30k
    ({"image": b"x", "captions__text": ["a"], "captions__id": [7], "objects__label": [1, 2]}, "", ("a",), -1),  # coco
    ({"image__encoded": b"x", "image__caption": "a", "image__format": "png"}, "", ("a",), -1),
    ({"webp": b"x", "caption": "a", "original_width": 8, "original_height": 9}, "", ("a",), -1),  # clip-jax
    ({"webp": b"x", "text": "a", "title": "b"}, "?caption=title", ("b",), -1),
    ({"webp": b"x", "text": "a", "title": "b"}, "?caption=text,title", ("a", "b"), -1),
    ({"jpg": b"x", "caption_0": "a", "caption_1": "b"}, "", ("a", "b"), -1),
    ({"image": b"y", "second": b"x", "caption": "a", "label": 3}, "?image=second&label=", ("a",), -1),
    ({"image": b"x", "caption": "a", "label": [1, 0, 1]}, "", ("a",), -1),  # not a class
    ({"image": b"x", "caption": "a", "label": []}, "", ("a",), -1),
    ({"image": b"x", "fine": 2, "coarse": 1}, "?label=coarse", (), 1),
    ({"image": b"x"}, "?caption=", (), -1),
    ({"image": b"x", "caption": "caf\u00e9".encode("latin-1")}, "", ("café",), -1),
  ],
)
def test_features_are_recognised_or_chosen(tmp_path, features, query, captions, label):
  tf_files.write(tmp_path / "a.tfrecord", [tf_files.message(**features)])
  (example,) = open_tfrecord(f"{tmp_path}/a.tfrecord{query}")
  assert (example["image"], example["captions"], example["label"]) == (b"x", captions, label)


@pytest.mark.parametrize(
  ("features", "query", "message"),
  [
    ({"pixels": b"x", "caption": "a"}, "", r"which feature is the image\?.*'caption' \(bytes\), 'pixels' \(bytes\)"),
    ({"image": b"x", "words": "a"}, "", r"which feature is the caption or label\?"),
    ({"image": b"x", "text": "a", "title": "b"}, "", "the caption could be any of"),
    ({"jpg": b"x", "png": b"y", "caption": "a"}, "", "the image could be any of"),
    ({"image": b"x", "caption": "a"}, "?caption=text", "no column 'text' for the caption"),
    ({"image": b"x", "caption": 3}, "?caption=caption", "caption=caption: a feature of integer, expected bytes"),
    ({"image": b"x", "score": 0.5}, "?label=score", "label=score: a feature of floats, expected integer or bytes"),
    ({"image": b"x", "label": "dog"}, "?label=label", "label=label: names of classes; .*classnames.txt"),
    ({"image": b"x", "caption": "a"}, "?captain=text", "bad location"),
  ],
)
def test_choices_that_are_not_clear_are_errors(tmp_path, features, query, message):
  tf_files.write(tmp_path / "a.tfrecord", [tf_files.message(**features)])
  with pytest.raises(ValueError, match=message):
    open_tfrecord(f"{tmp_path}/a.tfrecord{query}")


def test_records_that_differ_from_the_first_are_bad_samples_with_a_name(tmp_path):
  odd = {
    "missing file": [{"caption": "a"}, {"image": [], "caption": "a"}],
    "damaged record": [
      {"image": 3, "caption": "a"},
      {"image": [b"x", b"y"], "caption": "a"},
      {"image": b"x", "caption": 5},
      {"image": b"x", "caption": 0.5},
      {"image": b"x", "label": [0, 1]},
      {"image": b"x", "label": -2},
    ],
    "no label": [{"image": b"x", "label": 2}, {"image": b"x", "label": "bird"}],
  }
  kinds = [kind for kind, listed in odd.items() for _ in listed]
  messages = [tf_files.message(**features) for listed in odd.values() for features in listed]
  first = tf_files.message(image=b"x", caption="a", label=1)
  named = tf_files.message(image=b"x", caption="nan", label=" dog")
  path = tf_files.write(tmp_path / "a.tfrecord", [*[first] * 16, *messages, b"not a message", named])
  (tmp_path / "classnames.txt").write_text("cat\ndog\n")
  source = open_tfrecord(str(path))
  assert source.classnames == ("cat", "dog")
  for index, kind in enumerate([*kinds, "damaged record"], 16):
    with pytest.raises(BadSample, match=r"^a\.tfrecord, record at byte \d+: ") as error:
      source[index]
    assert error.value.kind == kind, index
  last = source[len(source) - 1]
  assert (last["captions"], last["label"]) == ((), 1)


def test_a_flipped_byte_loses_one_record(folder):
  path = folder / "00000.tfrecord"
  contents = bytearray(path.read_bytes())
  contents[contents.index(b"caption 2")] ^= 1
  path.write_bytes(contents)
  source = open_tfrecord(f"{folder}/*.tfrecord")
  with pytest.raises(BadSample, match=r"00000\.tfrecord, record at byte \d+: the data do not match") as error:
    source[2]
  assert error.value.kind == "damaged record"
  assert [source[index]["image"] for index in (1, 3, 5)] == [png(1), png(3), png(5)]


def test_files_that_are_cut_off_keep_their_whole_records_and_are_counted(folder, caplog):
  first, second = folder / "00000.tfrecord", folder / "00001.tfrecord"
  first.write_bytes(first.read_bytes()[:-1])
  source = open_tfrecord(f"{folder}/*.tfrecord")
  assert [example["image"] for example in source] == [png(number) for number in (0, 1, 2, 4, 5)]
  assert source.skipped == pickle.loads(pickle.dumps(source)).skipped == {"damaged record": 1}
  assert f"{first}, byte " in caplog.text
  second.write_bytes(gzip.compress(second.read_bytes()))
  with pytest.raises(ValueError, match=f"no record in 1 file; {second}, byte 0: compressed with gzip"):
    open_tfrecord(str(second))
  second.write_bytes(b"")
  with pytest.raises(ValueError, match="no record in 1 file"):
    open_tfrecord(str(second))
  second.write_bytes(b"PK\3\4" * 10)
  with pytest.raises(ValueError, match="byte 0: .*not a TFRecord file"):
    open_tfrecord(str(second))
  tf_files.write(second, [b"something else"])
  with pytest.raises(ValueError, match=r"not a tf\.train\.Example"):
    open_tfrecord(str(second))


def test_a_record_that_is_too_large_or_whose_file_is_gone_is_a_bad_sample(folder, monkeypatch):
  source = open_tfrecord(f"{folder}/*.tfrecord")
  monkeypatch.setattr(files.read, "__defaults__", (0, None, 100))
  with pytest.raises(BadSample, match=r"00001\.tfrecord, record at byte 0: .* more than 100") as error:
    source[4]
  assert error.value.kind == "too large"
  monkeypatch.undo()
  (folder / "00001.tfrecord").unlink()
  files._OPEN.forget(str(folder / "00001.tfrecord"))
  with pytest.raises(BadSample) as error:
    source[4]
  assert error.value.kind == "missing file"


def test_a_large_hole_in_a_file_takes_no_time(tmp_path):
  path = tf_files.write(tmp_path / "a.tfrecord", [img2dataset(0)])
  os.truncate(path, 2**40)
  started = time.process_time()
  assert len(open_tfrecord(str(path))) == 1
  assert time.process_time() - started < 1


def test_pickles_small_and_follows_its_files(folder):
  source = open_tfrecord(f"{folder}/*.tfrecord")
  assert len(pickle.dumps(source)) < 700
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    assert pool.apply(source.__getitem__, (5,)) == source[5]
  tf_files.write(folder / "new", [img2dataset(9)]).replace(folder / "00000.tfrecord")
  changed = open_tfrecord(f"{folder}/*.tfrecord")
  assert changed.stamp != source.stamp
  assert [example["image"] for example in changed] == [png(9), png(4), png(5)]


@pytest.fixture
def bucket(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[fsspec.AbstractFileSystem]:
  """The files of `folder` in memory://bucket, with a separate cache folder."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
  memory = fsspec.filesystem("memory")
  memory.store.clear()
  for path in folder.glob("*.tfrecord"):
    memory.pipe(f"/bucket/{path.name}", path.read_bytes())
  yield memory
  memory.store.clear()


def test_files_at_urls_equal_local_ones_and_are_read_in_ranges(folder, bucket, monkeypatch):
  def read(path, start=0, size=None, *given):
    requests.append(size)
    return read_before(path, start, size, *given)

  local, remote = open_tfrecord(f"{folder}/*.tfrecord"), open_tfrecord("memory://bucket/*.tfrecord")
  assert list(remote) == list(local)
  read_before, requests = files.read, []
  monkeypatch.setattr(files, "read", read)
  assert remote[3] == local[3]
  assert len(requests) == 2
  assert all(size < 1000 for size in requests)


@pytest.mark.parametrize("mutations", [60, pytest.param(2000, marks=pytest.mark.slow)])
def test_no_damage_gives_other_samples(folder, monkeypatch, mutations):
  monkeypatch.setattr(os, "fsync", lambda descriptor: None)
  path, rng = folder / "00000.tfrecord", np.random.default_rng(0)
  whole, expected = path.read_bytes(), {png(number) for number in range(4)}
  kinds, lost = Counter[str](), 0
  for number in range(mutations):
    changed, place = bytearray(whole), int(rng.integers(len(whole)))
    length = int(rng.integers(1, 64))
    way = number % 5
    if way == 0:
      changed[place] ^= 1 << rng.integers(8)
    elif way == 1:
      changed[place : place + length] = rng.bytes(length)
    elif way == 2:
      changed[place : place + 8] = int(rng.choice([0, 2**31 - 1, 2**62, 2**63 - 1])).to_bytes(8, "little")
    elif way == 3:
      del changed[place : place + length]
    else:
      changed[place:place] = changed[place // 2 : place // 2 + length]
    path.write_bytes(changed)
    try:
      source = open_tfrecord(str(path))
    except ValueError:  # the first record has no length, or no record remains
      lost += 1
      continue
    for index in range(len(source)):
      try:
        assert source[index]["image"] in expected, number
        kinds["none"] += 1
      except BadSample as error:
        kinds[error.kind] += 1
  assert kinds.keys() == {"none", "damaged record"}
  assert lost < mutations / 2
  assert kinds["none"] > mutations


def test_an_index_that_is_damaged_is_built_again(folder, caplog):
  open_tfrecord(f"{folder}/*.tfrecord")
  (index,) = (folder / ".declip_jax").iterdir()
  index.write_bytes(index.read_bytes()[:-9])
  assert len(open_tfrecord(f"{folder}/*.tfrecord")) == COUNT
  assert "is not used, and is built again" in caplog.text
  index.write_bytes(b"x")
  indexes.seal(index, index.stem)
  with pytest.raises(ValueError, match=r"damaged index"):
    shard_indexes.read(index)
