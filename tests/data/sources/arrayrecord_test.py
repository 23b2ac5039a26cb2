from collections.abc import Iterator
import concurrent.futures
import multiprocessing
from pathlib import Path
import pickle
import resource

from array_record.python import array_record_module
import fsspec
import msgpack
import numpy as np
import pytest
import tf_files

from declip_jax.data import sources
from declip_jax.data.sources import arrayrecord
from declip_jax.data.sources.arrayrecord import WRITER_OPTIONS, open_arrayrecord, open_reader, pack
from declip_jax.data.sources.base import BadSample, Example
from declip_jax.data.storage import files


def example(key: int) -> Example:
  image = np.random.default_rng(key).bytes(1000 + key)
  return Example(image=image, captions=("un café", f"number {key}")[: key % 3], label=key % 4 - 1, id=f"s.tar:{key}")


def write(path: Path, records: list[bytes], options: str = WRITER_OPTIONS) -> Path:
  writer = array_record_module.ArrayRecordWriter(str(path), options)
  for record in records:
    writer.write(record)
  writer.close()
  return path


@pytest.fixture
def folder(tmp_path) -> Path:
  """Three files, one of them empty, with 60 records together."""
  for number, keys in enumerate([range(25), range(0), range(25, 60)]):
    write(tmp_path / f"data-{number:05d}-of-00003.array_record", [pack(example(key)) for key in keys])
  return tmp_path


def test_records_come_back_as_they_were(folder):
  source = sources.open_source(f"arrayrecord:{folder}/*.array_record")
  assert source.name == f"arrayrecord:{folder}/*.array_record"
  assert len(source) == 60
  assert list(source) == [example(key) for key in range(60)]
  assert source.classnames == ()
  assert source.skipped == {}
  for index in (-1, 60):
    with pytest.raises(IndexError, match=f"no record {index}, there are 60"):
      source[index]


def test_several_labels_and_groups_come_back(tmp_path):
  labels, groups = np.array([1, 0, -1], np.int8), {"region": 2, "year": -1}
  records = [pack({**example(1), "labels": labels, "groups": groups}), pack({**example(2), "labels": labels})]
  first, second = open_arrayrecord(str(write(tmp_path / "a.array_record", records)))
  assert first["labels"].dtype == np.int8
  assert (first.pop("labels").tolist(), first) == ([1, 0, -1], {**example(1), "groups": groups})
  assert second.keys() == {*example(2), "labels"}


def test_a_record_is_a_plain_map(folder):
  reader = array_record_module.ArrayRecordReader(str(folder / "data-00002-of-00003.array_record"))
  expected = {**example(26), "captions": list(example(26)["captions"])}
  assert msgpack.unpackb(reader.read([1])[0]) == expected
  assert "group_size:1," in reader.writer_options_string()
  assert "uncompressed" in reader.writer_options_string()


def test_pickles_small_and_reads_in_a_spawned_process_and_in_threads(folder):
  source = open_arrayrecord(f"{folder}/*.array_record")
  expected = [source[key] for key in range(60)]
  assert len(pickle.dumps(source)) < 500
  with multiprocessing.get_context("spawn").Pool(1) as pool:
    assert pool.apply(source.__getitem__, (33,)) == expected[33]
  order = np.random.default_rng(0).integers(60, size=2000).tolist()
  with concurrent.futures.ThreadPoolExecutor(8) as pool:
    assert list(pool.map(source.__getitem__, order)) == [expected[key] for key in order]


def test_a_flipped_byte_loses_one_record(folder):
  path = folder / "data-00000-of-00003.array_record"
  contents = bytearray(path.read_bytes())
  contents[contents.index(example(7)["image"][:100]) + 500] ^= 1
  path.write_bytes(contents)
  source = open_arrayrecord(f"{folder}/*.array_record")
  for key in range(60):
    if key == 7:
      with pytest.raises(BadSample, match="data-00000-of-00003.array_record, record 7: .*mismatch") as error:
        source[key]
      assert error.value.kind == "damaged record"
    else:
      assert source[key] == example(key)


def test_a_record_that_is_too_large_is_bad_and_named(tmp_path, monkeypatch):
  records = [{**example(key), "image": bytes(size)} for key, size in ((3, 10), (6, 100_000))]
  source = open_arrayrecord(str(write(tmp_path / "a.array_record", list(map(pack, records)), "group_size:1,zstd:3")))
  monkeypatch.setattr(files, "MAX_BYTES", 100_000)
  assert source[0]["image"] == bytes(10)
  with pytest.raises(BadSample, match=r"a\.array_record, record 1: 100,\d\d\d bytes") as error:
    source[1]
  assert error.value.kind == "too large"


def test_a_label_that_is_not_among_the_classes_is_named(tmp_path):
  write(tmp_path / "a.array_record", [msgpack.packb({"image": b"x", "captions": [], "label": 2, "id": ""})])
  (tmp_path / "classnames.txt").write_text("dog\ncat\n")
  with pytest.raises(BadSample, match="a.array_record, record 0: class 2, expected -1 to 1, the last line") as error:
    open_arrayrecord(f"{tmp_path}/a.array_record")[0]
  assert error.value.kind == "no label"


@pytest.mark.parametrize(
  "record",
  [
    b"",
    b"no msgpack",
    msgpack.packb([1, 2]),
    msgpack.packb({"image": b"x"}),
    msgpack.packb({"image": "x", "captions": [], "label": 0, "id": ""}),
    msgpack.packb({"image": b"x", "captions": [b"x"], "label": 0, "id": ""}),
    msgpack.packb({"image": b"x", "captions": [], "label": -2, "id": ""}),
    msgpack.packb({"image": b"x", "captions": [], "label": 0, "id": ""})[:-1] + b"\xff",
  ],
)
def test_a_record_of_another_kind_is_bad_and_named(tmp_path, record):
  write(tmp_path / "a.array_record", [pack(example(0)), record])
  (tmp_path / "classnames.txt").write_text("dog\ncat\n")
  source = open_arrayrecord(f"{tmp_path}/a.array_record")
  assert source.classnames == ("dog", "cat")
  assert source[0] == example(0)
  with pytest.raises(BadSample, match="a.array_record, record 1: ") as error:
    source[1]
  assert error.value.kind == "damaged record"


@pytest.mark.parametrize("kept", [0, 100, 20_000])
def test_a_file_that_was_cut_off_is_counted_and_passed_over(folder, kept, caplog):
  first, second, third = (folder / f"data-{number:05d}-of-00003.array_record" for number in range(3))
  third.write_bytes(third.read_bytes()[:kept])
  source = open_arrayrecord(f"{folder}/*.array_record")
  assert list(source) == [example(key) for key in range(25)]
  assert source.skipped == pickle.loads(pickle.dumps(source)).skipped == {"damaged record": 1}
  assert f"{third}: not a complete ArrayRecord file" in caplog.text
  first.write_bytes(first.read_bytes()[:kept])
  second.write_bytes(b"")
  with pytest.raises(ValueError, match=f"^{first}: not a complete ArrayRecord file"):
    open_arrayrecord(f"{folder}/*.array_record")


def test_files_are_counted_again_when_they_change(folder):
  location = f"{folder}/*.array_record"
  assert len(open_arrayrecord(location)) == 60
  (counts,) = (folder / ".declip_jax").iterdir()
  before = counts.stat().st_mtime_ns
  assert len(open_arrayrecord(location)) == 60
  assert counts.stat().st_mtime_ns == before
  write(folder / "data-00001-of-00003.array_record", [pack(example(99))])
  source = open_arrayrecord(location)
  assert len(source) == 61
  assert source[25] == example(99)


def test_a_missing_file_loses_its_records(folder):
  source = open_arrayrecord(f"{folder}/*.array_record")
  (folder / "data-00000-of-00003.array_record").unlink()
  with pytest.raises(BadSample, match="data-00000-of-00003.array_record, record 3: ") as error:
    source[3]
  assert error.value.kind == "missing file"
  assert source[30] == example(30)


def test_files_that_cannot_be_opened_are_errors(tmp_path):
  with pytest.raises(FileNotFoundError, match="no file matches"):
    open_arrayrecord(f"{tmp_path}/*.array_record")
  write(tmp_path / "a.array_record", [])
  with pytest.raises(ValueError, match="no record in 1 file"):
    open_arrayrecord(f"{tmp_path}/*.array_record")


def test_halves_of_surrogate_pairs_become_question_marks(tmp_path):
  broken = Example(image=b"x", captions=("a \ud83d dog",), label=np.int64(1), id="\udcff.tar:0")
  write(tmp_path / "a.array_record", [pack(broken)])
  found = open_arrayrecord(f"{tmp_path}/a.array_record")[0]
  assert found == Example(image=b"x", captions=("a ? dog",), label=1, id="?.tar:0")


def test_a_damaged_index_is_named_and_built_again(folder, caplog):
  open_arrayrecord(f"{folder}/*.array_record")
  (index,) = (folder / ".declip_jax").glob("*.json")
  for contents in (b"", index.read_bytes()[:-4], b"[1]", b"{}", b"\xff"):
    index.write_bytes(contents)
    caplog.clear()
    assert len(open_arrayrecord(f"{folder}/*.array_record")) == 60
    assert f"{index} is not used, and is built again" in caplog.text


def test_half_of_the_descriptors_are_used_for_open_files(monkeypatch):
  for limit, expected in [(1024, 512), (100, 128), (10**6, 500_000), (resource.RLIM_INFINITY, 2**16)]:
    monkeypatch.setattr(resource, "getrlimit", lambda _, limit=limit: (limit, limit))
    assert arrayrecord._most_readers() == expected


def test_a_file_is_opened_once_for_all_sources_and_again_after_a_change(folder, monkeypatch):
  opened, source = [], open_arrayrecord(f"{folder}/*.array_record")
  other = open_arrayrecord(f"{folder}/*.array_record")
  monkeypatch.setattr(arrayrecord, "open_reader", lambda path: opened.append(path) or open_reader(path))
  assert [source[3], other[4]] == [example(3), example(4)]
  assert len(opened) == 1
  write(folder / "new", [pack(example(99))]).replace(folder / "data-00000-of-00003.array_record")
  changed = open_arrayrecord(f"{folder}/*.array_record")
  assert changed.stamp != source.stamp
  assert changed[0] == example(99)


def message(key: int) -> bytes:
  return tf_files.message(image=example(key)["image"], captions=[f"one {key}", "two"], title="t", label=key % 2)


def test_records_that_are_tf_examples(tmp_path):
  path = write(tmp_path / "a.array_record", [b"\n damaged", *map(message, range(3))])
  (tmp_path / "classnames.txt").write_text("cat\ndog\n")
  source = open_arrayrecord(f"{path}?caption=captions")
  assert source.classnames == ("cat", "dog")
  assert source[2] == Example(image=example(1)["image"], captions=("one 1", "two"), label=1, id=f"{path}, record 2")
  assert pickle.loads(pickle.dumps(source))[2] == source[2]
  with pytest.raises(BadSample, match=r"a\.array_record, record 0: ") as error:
    source[0]
  assert error.value.kind == "damaged record"
  assert open_arrayrecord(f"{path}?caption=title&label=")[1]["captions"] == ("t",)
  with pytest.raises(ValueError, match=r"a\.array_record: the caption could be any of \['captions', 'title'\]"):
    open_arrayrecord(str(path))
  with pytest.raises(ValueError, match="no column 'text' for the caption"):
    open_arrayrecord(f"{path}?caption=text")
  ours = write(tmp_path / "b.array_record", [pack(example(1))])
  with pytest.raises(ValueError, match=r"b\.array_record\?caption=text: its records are those of data\.convert"):
    open_arrayrecord(f"{ours}?caption=text")


@pytest.fixture
def bucket(folder, monkeypatch) -> Iterator[fsspec.AbstractFileSystem]:
  """The files of `folder` in memory://bucket, with a separate cache folder."""
  monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
  memory = fsspec.filesystem("memory")
  memory.store.clear()
  for path in folder.glob("*.array_record"):
    memory.pipe(f"/bucket/{path.name}", path.read_bytes())
  yield memory
  memory.store.clear()


def test_files_at_urls_are_counted_by_their_footers_and_copied_on_demand(folder, bucket, monkeypatch):
  def read(path, start=0, size=None, **limit):
    requests.append((path.rpartition("/")[2][:10], size))
    return read_before(path, start, size, **limit)

  write(folder / "big", [pack({**example(key), "image": bytes(10**6)}) for key in range(3)])
  bucket.pipe("/bucket/data-00003-of-00003.array_record", (folder / "big").read_bytes())
  read_before, requests = files.read, []
  monkeypatch.setattr(files, "read", read)
  monkeypatch.setattr(arrayrecord, "_TAIL", 2**15)  # shorter than any footer: reads more
  source = open_arrayrecord("memory://bucket/*.array_record")
  assert len(source) == 63
  asked = [size for name, size in requests if name == "data-00003"]
  assert asked == [2**15, 2**17]  # of 3 MB
  requests.clear()
  assert source[26] == example(26)
  assert {name for name, _ in requests} == {"data-00002"}
  requests.clear()
  assert [pickle.loads(pickle.dumps(source))[key] for key in range(25, 60)] == [example(key) for key in range(25, 60)]
  assert requests == []
  assert [source[key] for key in range(60)] == [example(key) for key in range(60)]
  assert len(pickle.dumps(source)) < 500


def test_the_features_of_files_at_urls_are_recognised_by_their_ends(folder, bucket, monkeypatch):
  monkeypatch.setattr(arrayrecord, "_TAIL", 2**14)
  local = write(folder / "large", [tf_files.message(jpg=bytes(10**5), caption=f"{key}") for key in range(9)])
  bucket.pipe("/bucket/large.array_record", local.read_bytes())
  sizes, read_before = [], files.read
  monkeypatch.setattr(files, "read", lambda *given, **limit: sizes.append(given[2]) or read_before(*given, **limit))
  source = open_arrayrecord("memory://bucket/large.array_record")
  assert sizes[-1] < local.stat().st_size / 2
  assert [found["captions"] for found in source] == [(f"{key}",) for key in range(9)]


def test_a_changed_file_at_a_url_is_copied_again(folder, bucket):
  name, location = "data-00000-of-00003.array_record", "memory://bucket/*.array_record"
  before = open_arrayrecord(location)
  late = open_arrayrecord("memory://bucket/data-0000[02]*")
  assert before[3] == example(3)
  bucket.pipe(f"/bucket/{name}", write(folder / "new", [pack(example(99))] * 25).read_bytes())
  after = open_arrayrecord(location)
  assert after.stamp != before.stamp
  assert after[3] == example(99)
  copies = list((folder / "cache" / "declip_jax" / "copies").glob(f"*/{name}"))
  assert len(copies) == 1  # the copy of the previous state is gone
  arrayrecord._reader.cache_clear()
  with pytest.raises(BadSample, match=f"{name}, record 3: .*changed since it was opened") as error:
    late[3]
  assert error.value.kind == "missing file"


def test_a_url_that_is_not_an_array_record_is_named(folder, bucket):
  bucket.pipe("/bucket/data-00001-of-00003.array_record", b"x" * 200_000)
  with pytest.raises(ValueError, match="^memory:///?bucket/data-00001-of-00003.array_record"):
    open_arrayrecord("memory://bucket/data-00001*.array_record")
