import json
from pathlib import Path
import pickle
import tracemalloc
import zipfile

import fsspec
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_jax.data.sources import yfcc
from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.yfcc import open_yfcc

RECORDS = [(1234567, "a title", "a description"), (1234568, " ", "only a description"), (98000001, "ünïcödé", None)]
RECORDS += [(5, "", "")]


def photo(index: int) -> bytes:
  return f"photo {index}".encode() * index if index < 1000 else f"photo {index}".encode() * 300


def write_zips(root: Path, *indices: int, method: int = zipfile.ZIP_STORED) -> None:
  for index in indices:
    digits = f"{index:08d}"
    path = root / "images" / digits[:2] / f"{digits[2:5]}.zip"
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "a", method) as archive:
      archive.writestr(f"{digits[5:]}.jpg", photo(index))


def write_list(path: Path) -> str:
  if path.suffix == ".pkl":
    path.write_bytes(pickle.dumps(RECORDS))
  elif path.suffix == ".jsonl":
    path.write_text(
      "\n".join(json.dumps(dict(zip(["index", "title", "description"], r, strict=True))) for r in RECORDS)
    )
  elif path.suffix == ".tsv":
    lines = ["\t".join(str(text or "") for text in record) for record in [("index", "title", "description"), *RECORDS]]
    path.write_text("\n".join(lines))
  else:
    columns = zip(*RECORDS, strict=True)
    pq.write_table(pa.table(dict(zip(["index", "title", "description"], columns, strict=True))), path)
  return str(path)


@pytest.mark.parametrize("suffix", [".pkl", ".jsonl", ".tsv", ".parquet"])
@pytest.mark.parametrize("method", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED])
def test_photos_with_titles_and_descriptions(tmp_path, suffix, method):
  path = write_list(tmp_path / f"yfcc15m{suffix}")
  write_zips(tmp_path, 1234567, 1234568, 98000001, method=method)
  source = open_yfcc(path)
  assert list(source) == [
    {
      "image": photo(1234567),
      "captions": ("a title", "a description"),
      "label": -1,
      "id": f"yfcc15m{suffix}:1234567",
    },
    {"image": photo(1234568), "captions": ("only a description",), "label": -1, "id": f"yfcc15m{suffix}:1234568"},
    {"image": photo(98000001), "captions": ("ünïcödé",), "label": -1, "id": f"yfcc15m{suffix}:98000001"},
  ]
  assert source.skipped == {"no caption": 1}
  assert len(pickle.dumps(source)) < 500
  assert pickle.loads(pickle.dumps(source))[1] == source[1]


def test_root_and_missing_photos(tmp_path):
  path = write_list(tmp_path / "yfcc15m.pkl")
  write_zips(tmp_path / "data", 1234567)
  source = open_yfcc(f"{path}?root={tmp_path}/data")
  assert source[0]["image"] == photo(1234567)
  with pytest.raises(BadSample, match=r"yfcc15m\.pkl:1234568: .*images/01/234\.zip has no member 568\.jpg") as error:
    source[1]
  assert error.value.kind == "missing file"
  with pytest.raises(BadSample, match=r"98/000\.zip") as error:
    source[2]
  assert error.value.kind == "missing file"
  with pytest.raises(FileNotFoundError, match=r"no readable image among 3 tried.*images/01/234\.zip.*\?root="):
    open_yfcc(path)


def test_a_photo_with_a_wrong_checksum_is_a_damaged_image(tmp_path):
  source_path = write_list(tmp_path / "yfcc15m.pkl")
  write_zips(tmp_path, 1234567, 1234568)
  source = open_yfcc(source_path)
  path = tmp_path / "images" / "01" / "234.zip"
  whole = path.read_bytes()
  path.write_bytes(whole[:40] + bytes([whole[40] ^ 255]) + whole[41:])
  with pytest.raises(BadSample, match=r"yfcc15m\.pkl:1234567: .*567\.jpg") as error:
    source[0]
  assert error.value.kind == "damaged image"


class Malicious:
  def __reduce__(self):
    return Path.touch, (Path("executed"),)


def test_a_pickle_with_code_is_rejected(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
    (tmp_path / "bad.pkl").write_bytes(pickle.dumps([(1, "a", Malicious())], protocol))
    with pytest.raises(ValueError, match=r"bad\.pkl: expected a pickled list.*names .*could run any code"):
      open_yfcc("bad.pkl")
  assert not (tmp_path / "executed").exists()


@pytest.mark.parametrize("content", [b"", b"\x80\x04.", pickle.dumps({"a": 1}), pickle.dumps(RECORDS)[:-20]])
def test_a_damaged_pickle_is_an_error(tmp_path, content):
  (tmp_path / "bad.pkl").write_bytes(content)
  with pytest.raises(ValueError, match=r"bad\.pkl: expected a"):
    open_yfcc(f"{tmp_path}/bad.pkl")


def test_bad_records_are_counted(tmp_path, caplog):
  write_zips(tmp_path, 7)
  records = [(7, "a", "b"), (-1, "a", "b"), (10**8, "a", "b"), ("x", "a", "b"), (8, "a"), None, (9, 1, "b")]
  (tmp_path / "l.pkl").write_bytes(pickle.dumps(records))
  source = open_yfcc(f"{tmp_path}/l.pkl")
  assert [example["image"] for example in source] == [photo(7)]
  assert source.skipped == {"damaged record": 6}
  assert f"{tmp_path}/l.pkl:2: expected an index below 100000000, got 100000000" in caplog.text
  (tmp_path / "l.csv").write_text("index,title\n7,a\n")
  with pytest.raises(
    ValueError, match=r"expected the columns index, title, description; the columns are \['index', 'title'\]"
  ):
    open_yfcc(f"{tmp_path}/l.csv")


def test_at_urls(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  memory = fsspec.filesystem("memory")
  write_zips(tmp_path, 1234567)
  memory.pipe("/yfcc/images/01/234.zip", (tmp_path / "images/01/234.zip").read_bytes())
  memory.pipe("/yfcc/yfcc15m.pkl", pickle.dumps(RECORDS))
  assert open_yfcc("memory://yfcc/yfcc15m.pkl")[0]["image"] == photo(1234567)


def test_lists_in_another_encoding(tmp_path):
  write_zips(tmp_path, 7)
  (tmp_path / "l.tsv").write_bytes(b"index\ttitle\tdescription\n7\tcaf\xe9\tx\n")
  with pytest.raises(ValueError, match=r"l\.tsv:2: byte 29 of the file, 0xe9, is not utf-8.*\?encoding=latin-1"):
    open_yfcc(f"{tmp_path}/l.tsv")
  assert open_yfcc(f"{tmp_path}/l.tsv?encoding=latin-1")[0]["captions"] == ("café", "x")


HOSTILE = {
  "a text of 2 GB": b"\x80\x02X\xff\xff\xff\x7f.",
  "a frame without end": b"\x80\x04\x95" + b"\xff" * 7 + b"\x7f.",
  "a place far out in the memo": b"\x80\x02]r\xff\xff\xff\x7f.",
  "an array of 2 GB": b"\x80\x05\x96\xff\xff\xff\x7f" + bytes(4) + b".",
  "a mark that is missing": b"\x80\x02t.",
  "nothing to duplicate": b"2.",
  "a number of 2 GB": b"\x80\x02\x8b\xff\xff\xff\x7f.",
  "a tuple to fill": b"\x80\x02)Na.",
  "a persistent id": b"Pid\n.",
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_pickle_is_an_error(tmp_path, case):
  (tmp_path / "bad.pkl").write_bytes(HOSTILE[case])
  tracemalloc.start()
  with pytest.raises(ValueError, match=r"bad\.pkl: expected a"):
    open_yfcc(f"{tmp_path}/bad.pkl")
  assert tracemalloc.get_traced_memory()[1] < 2**24
  tracemalloc.stop()


def test_hostile_records_are_counted(tmp_path):
  """Nested more deeply than Python recurses, records that contain themselves, and numbers of any size."""
  write_zips(tmp_path, 7)
  endless = ["a", "b"]
  endless.append(endless)
  plain = [(7, "a", "b"), (10**6000, "a", "b"), ("9" * 6000, "a", "b"), (8, 10**6000, "b"), endless, (9, endless, "b")]
  nested = pickle.dumps(plain, 4)[:-2] + b")" + b"\x85" * 100_000 + b"e."  # one more element of the list
  (tmp_path / "l.pkl").write_bytes(nested)
  source = open_yfcc(f"{tmp_path}/l.pkl")
  assert [example["captions"] for example in source] == [("a", "b")]
  assert source.skipped == {"damaged record": 6}


def test_a_pickle_that_repeats_long_texts_is_bounded(tmp_path, monkeypatch):
  monkeypatch.setattr(yfcc, "LONGEST", 1000)
  write_zips(tmp_path, 1, 2)
  path, text, laughs = tmp_path / "yfcc15m.pkl", "x" * 600, ["x"] * 2
  for _ in range(60):
    laughs = [laughs, laughs]
  path.write_bytes(pickle.dumps([(1, text, "short"), (2, text, text), (3, laughs, ""), (4, None, float("nan"))]))
  source = open_yfcc(str(path))
  assert [example["captions"] for example in source] == [(text, "short")]
  assert source.skipped == {"damaged record": 2, "no caption": 1}
  for count, repeated in ((6, True), (7, False)):
    path.write_bytes(pickle.dumps([(1, text, "")] * count))
    if repeated:
      assert len(open_yfcc(str(path))) == count
  with pytest.raises(ValueError, match=r"yfcc15m\.pkl:6: texts of more than 4,000 characters, 4 times"):
    open_yfcc(str(path))
