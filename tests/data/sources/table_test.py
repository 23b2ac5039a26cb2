from concurrent.futures import ThreadPoolExecutor
import csv
import gzip
import json
import os
from pathlib import Path
import pickle
import subprocess
import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.table import open_table
from declip_jax.data.storage import files
from declip_jax.reporting import progress


def write_images(folder: Path, *names: str) -> None:
  """Files whose contents are their names."""
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(contents(name))


def contents(name: str) -> bytes:
  return f"image {name}".encode() * 100


def write(path: Path, *lines: str) -> str:
  path.write_text("\n".join(lines) + "\n", "utf-8")
  return str(path)


def write_json(path: Path, *records: object) -> str:
  return write(path, *map(json.dumps, records))


def captions(location: str) -> list[tuple[str, ...]]:
  return [example["captions"] for example in map(open_table(location).__getitem__, range(len(open_table(location))))]


@pytest.mark.parametrize("separator", [",", "\t", ";", "|"])
@pytest.mark.parametrize("quoting", [csv.QUOTE_MINIMAL, csv.QUOTE_ALL])
@pytest.mark.parametrize("end", ["\n", "\r\n"])
def test_separators_and_quotes_are_read_as_csv_writes_them(tmp_path, separator, quoting, end):
  texts = ["a dog", 'a "big" dog, tab\tsemi;pipe|', "two\nlines", "  ünïcödé 犬 ", '5" long', ""]
  names = [f"{number} bild,ü;.jpg" for number in range(len(texts))]
  with open(tmp_path / "t.csv", "w", newline="", encoding="utf-8") as file:
    writer = csv.writer(file, delimiter=separator, quoting=quoting, lineterminator=end)
    writer.writerows([["Number", "File Name", "Caption"], *zip(range(len(texts)), names, texts, strict=True)])
  write_images(tmp_path, *names)
  source = open_table(str(tmp_path / "t.csv"))
  assert source.skipped == {"no caption": 1}
  assert [example["captions"] for example in source] == [(text.strip(),) for text in texts[:-1]]
  assert [example["image"] for example in source] == [contents(name) for name in names[:-1]]
  assert [example["id"] for example in source] == [f"t.csv:{line}" for line in (2, 3, 4, 6, 7)]


def test_an_unbalanced_quote_affects_only_its_own_line(tmp_path):
  lines = ["filepath\ttitle", '0.jpg\t"quoted" and more', '1.jpg\t"never closed', "2.jpg\tpla\rin", '3.jpg\t3" and 4"']
  write_images(tmp_path, *(f"{number}.jpg" for number in range(5)))
  source = open_table(write(tmp_path / "t.tsv", *lines, '4.jpg\t"never closed either'))
  assert [example["captions"][0] for example in source] == [line.split("\t")[1] for line in lines[1:]] + [
    '"never closed either'
  ]
  assert source.skipped == {}


def test_quotes_after_a_space_and_quotes_that_span_columns(tmp_path):
  write_images(tmp_path, "a.jpg")
  assert captions(write(tmp_path / "a.csv", "image, caption", 'a.jpg, "hello, world"')) == [("hello, world",)]
  path = write(tmp_path / "b.tsv", "title\ttext\timage", '"open\tclosed"\ta.jpg')
  assert captions(f"{path}?caption=title,text") == [('"open', 'closed"')]


def test_a_label_is_enough(tmp_path):
  write_images(tmp_path, "a.jpg", "b.jpg")
  source = open_table(write(tmp_path / "t.csv", "image,caption,label", "a.jpg,,1", "b.jpg,,"))
  assert [(example["captions"], example["label"]) for example in source] == [((), 1)]
  assert source.skipped == {"no caption": 1}
  source = open_table(write(tmp_path / "u.csv", "image,class", "a.jpg,dog", "b.jpg,cat"))
  assert [(example["captions"], example["label"]) for example in source] == [((), 1), ((), 0)]
  assert source.classnames == ("cat", "dog")


def test_broken_lines_are_counted_and_located(tmp_path, caplog):
  write_images(tmp_path, "0.jpg", "8.jpg")
  lines = ["image,caption", "0.jpg,first", "1.jpg", "", "2.jpg,a,b", "3\0.jpg,nul", ",no path", "6.jpg, ", "8.jpg,last"]
  source = open_table(write(tmp_path / "t.csv", *lines))
  assert [(example["captions"][0], example["id"]) for example in source] == [("first", "t.csv:2"), ("last", "t.csv:9")]
  assert source.skipped == {"damaged record": 4, "no caption": 1}
  path = tmp_path / "t.csv"
  for message in (f"{path}:3: 1 fields, but 2 columns", f"{path}:5: 3 fields", f"{path}:7: expected a path"):
    assert message in caplog.text


def test_broken_json_lines_are_counted_and_located(tmp_path, caplog):
  write_images(tmp_path, "a.jpg")
  good = '{"filename": "a.jpg", "caption": "first"}'
  bad = ['{"filename": "a.jp', "[1, 2]", '{"caption": "no name"}', '{"filename": "a.jpg", "caption": {"x": 1}}']
  bad += [
    '{"filename": "a\\u0000.jpg", "caption": "x"}',
    '{"filename": "\\ud800", "caption": "x"}',
    '{"filename": "a"}',
  ]
  source = open_table(write(tmp_path / "t.jsonl", good, *bad, good.replace("first", "last \\ud800")))
  assert captions(str(tmp_path / "t.jsonl")) == [("first",), ("last ?",)]
  assert source.skipped == {"damaged record": 6, "no caption": 1}
  for message in (
    "t.jsonl:2: bad JSON",
    "t.jsonl:3: expected a JSON object",
    "t.jsonl:4: expected a path for the image",
  ):
    assert message in caplog.text


def test_metadata_of_declip(tmp_path):
  # JSON lines in a .json file, paths relative to a folder elsewhere, as clip_dataset.py of DeCLIP reads them.
  write_images(tmp_path / "images", "x/0.jpg", "1.jpg", "2.jpg")
  write_json(
    tmp_path / "meta.json",
    {"filename": "x/0.jpg", "caption": "a cat", "url": "http://x/0", "label": 1, "label_name": "cat"},
    {"filename": "1.jpg", "caption": [" a dog ", "", "a hound"], "url": "http://x/1", "label": 0, "label_name": "dog"},
    {"filename": "2.jpg", "caption": "what?", "url": "http://x/2"},
  )
  source = open_table(f"{tmp_path}/meta.json?root={tmp_path}/images")
  assert [example["captions"] for example in source] == [("a cat",), ("a dog", "a hound"), ("what?",)]
  assert [example["label"] for example in source] == [1, 0, -1]
  assert source.classnames == ("dog", "cat")
  assert source[0]["image"] == contents("x/0.jpg")


def test_an_array_of_objects_in_pieces(tmp_path, monkeypatch):
  write_images(tmp_path, *(f"{number}.jpg" for number in range(20)))
  records = [{"image": f"{number}.jpg", "caption": [f"ü {number}", "]}"]} for number in range(20)]
  expected = [tuple(record["caption"]) for record in records]
  monkeypatch.setattr("declip_jax.data.sources.table._CHUNK", 37)
  (tmp_path / "a.json").write_text(json.dumps(records, indent=1))
  assert captions(f"{tmp_path}/a.json") == expected
  (tmp_path / "a.json").write_text(json.dumps(records, ensure_ascii=False)[:-20])
  source = open_table(f"{tmp_path}/a.json")
  assert [example["captions"] for example in source] == expected[:-1]
  assert source.skipped == {"damaged record": 1}
  assert source[3]["id"] == "a.json:3"


@pytest.mark.parametrize(
  ("value", "expected"),
  [
    ("plain", ("plain",)),
    (["one", None, " ", "two "], ("one", "two")),
    ('["one", "two"]', ("one", "two")),
    ('["look" she said]', ('["look" she said]',)),
    ('[1, "two"]', ('[1, "two"]',)),
  ],
)
def test_forms_of_captions(tmp_path, value, expected):
  write_images(tmp_path, "a.jpg")
  assert captions(write_json(tmp_path / "t.jsonl", {"image": "a.jpg", "text": value})) == [expected]


def test_several_columns_and_neighbouring_lines_are_captions_of_one_image(tmp_path):
  write_images(tmp_path, "a.jpg", "b.jpg")
  lines = ["a.jpg| 0| one| x", "a.jpg| 1| two| y", "b.jpg| 0| three|", "a.jpg| 2| four| z"]
  path = write(tmp_path / "t.csv", "image_name| number| title| description", *lines)
  assert captions(f"{path}?caption=title") == [("one", "two"), ("three",), ("four",)]
  assert captions(f"{path}?caption=title,description") == [("one", "x", "two", "y"), ("three",), ("four", "z")]


def test_columns_that_are_missing_or_unclear_are_named(tmp_path):
  path = write(tmp_path / "t.csv", "url,title,description", "a.jpg,b,c")
  with pytest.raises(
    ValueError, match=r"t\.csv: the caption could be any of \['title', 'description'\].*\?caption=title"
  ):
    open_table(path)
  with pytest.raises(
    ValueError, match=r"t\.csv: which column is the image.*\['url', 'title', 'description'\].*\?image="
  ):
    open_table(f"{path}?caption=title")
  with pytest.raises(ValueError, match=r"no column 'file' for the image.*\['url', 'title', 'description'\]"):
    open_table(f"{path}?image=file")
  with pytest.raises(ValueError, match=r"bad location.*\?image=\.\.&caption=\.\."):
    open_table(f"{path}?captain=title")
  with pytest.raises(ValueError, match=r"which column is the caption or label\?.*\['image', 'width'\]"):
    open_table(write(tmp_path / "n.csv", "image,width", "a.jpg,3"))
  with pytest.raises(ValueError, match=r"t\.xls: expected a table"):
    open_table(write(tmp_path / "t.xls", "x"))
  with pytest.raises(FileNotFoundError, match=r"no file matches .*u\.csv.*t\.csv"):
    open_table(str(tmp_path / "u.csv"))
  with pytest.raises(ValueError, match=r"no usable sample, skipped \{'damaged record': 1\}"):
    open_table(write(tmp_path / "e.csv", "image,caption", "a.jpg"))


def test_named_columns_determine_the_separator_and_none_is_allowed(tmp_path):
  write_images(tmp_path, "a.jpg")
  path = write(tmp_path / "t.csv", "Bild;Text, kurz, 100 % + gut;Klasse", "a.jpg;hallo;3")
  (example,) = open_table(f"{path}?image=Bild&caption=Text, kurz, 100 % + gut&label=Klasse")
  assert example == {"image": contents("a.jpg"), "captions": ("hallo",), "label": 3, "id": "t.csv:2"}
  (example,) = open_table(f"{path}?image=Bild&caption=&label=")
  assert (example["captions"], example["label"]) == ((), -1)


@pytest.mark.parametrize(
  ("values", "labels", "classnames"),
  [
    (["2", "0", ""], [2, 0, -1], ()),
    (["2.0", "0.0", ""], [2, 0, -1], ()),
    (["dog", "cat", "dog"], [1, 0, 1], ("cat", "dog")),
    (["10", "9", "cat"], [0, 1, 2], ("10", "9", "cat")),
    (["-1", "1", ""], [-1, 1, -1], ()),
    (["-1.0", "1.0", "-5"], [-1, 1, -1], ()),
    (["-1.00", "dog", "-5"], [-1, 0, -1], ("dog",)),
  ],
)
def test_labels_are_numbers_or_names(tmp_path, values, labels, classnames):
  write_images(tmp_path, "0.jpg", "1.jpg", "2.jpg")
  lines = [f"{number}.jpg,x,{value}" for number, value in enumerate(values)]
  source = open_table(write(tmp_path / "t.csv", "path,text,label", *lines))
  assert [example["label"] for example in source] == labels
  assert source.classnames == classnames


def test_a_fraction_is_not_a_label(tmp_path, caplog):
  write_images(tmp_path, "a.jpg")
  source = open_table(write(tmp_path / "t.csv", "path,text,label", "a.jpg,x,2", "a.jpg,y,1.5", "a.jpg,z,-.5"))
  assert [(example["captions"], example["label"]) for example in source] == [(("x",), 2)]
  assert source.skipped == {"damaged record": 2}
  assert "t.csv:3: expected a whole number or a name for the label in 'label', got '1.5'" in caplog.text


def test_names_of_numbered_labels_from_a_column_or_classnames_txt(tmp_path):
  write_images(tmp_path, "0.jpg")
  path = write(tmp_path / "t.csv", "path,class_id,class_name", "0.jpg,2,cat", "0.jpg,0,dog")
  assert open_table(path).classnames == ("dog", "", "cat")
  path = write(tmp_path / "u.csv", "path,class_id", "0.jpg,1")
  write(tmp_path / "classnames.txt", "dog", "hot dog")
  assert open_table(path).classnames == ("dog", "hot dog")
  write(tmp_path / "classnames.txt", "dog")
  with pytest.raises(ValueError, match="label 1, but only 1 class names"):
    open_table(path)


def test_parquet_with_paths(tmp_path):
  write_images(tmp_path, "a.jpg", "b.jpg")
  table = {"path": ["a.jpg", "b.jpg"], "captions": [["one", "two"], ["three"]], "label": [4, None], "x": [0, 0]}
  pq.write_table(pa.table(table), tmp_path / "t.parquet")
  source = open_table(str(tmp_path / "t.parquet"))
  assert source[0] == {"image": contents("a.jpg"), "captions": ("one", "two"), "label": 4, "id": "t.parquet:0"}
  assert source[1] == {"image": contents("b.jpg"), "captions": ("three",), "label": -1, "id": "t.parquet:1"}


@pytest.mark.parametrize("struct", [False, True])
def test_parquet_with_images(tmp_path, struct):
  write_images(tmp_path, "elsewhere.jpg")
  images = [os.urandom(number) for number in range(1, 200)]
  values = [{"bytes": image, "path": None} for image in images] if struct else images
  values = [*values, {"bytes": None, "path": "elsewhere.jpg"} if struct else None]
  table = {"jpg": values, "caption": [f"caption {number}" for number in range(200)]}
  pq.write_table(pa.table(table), tmp_path / "t.parquet", row_group_size=30)
  source = open_table(str(tmp_path / "t.parquet"))
  (tmp_path / "t.parquet").rename(tmp_path / "away")
  assert source.skipped == ({} if struct else {"damaged record": 1})
  assert [example["image"] for example in source] == images + ([contents("elsewhere.jpg")] if struct else [])
  assert [source[number]["captions"] for number in (0, 63, 64, 198)] == [
    ("caption 0",),
    ("caption 63",),
    ("caption 64",),
    ("caption 198",),
  ]


def test_several_tables_each_with_its_own_folder_and_separator(tmp_path):
  for number, separator in enumerate(",\t"):
    write_images(tmp_path / str(number), "a.jpg")
    write(tmp_path / str(number) / "t.csv", f"image{separator}caption", f"a.jpg{separator}caption {number}")
    (tmp_path / str(number) / "a.jpg").write_bytes(b"%d" % number)
  source = open_table(f"{tmp_path}/*/t.csv")
  assert [(example["image"], example["captions"]) for example in source] == [
    (b"0", ("caption 0",)),
    (b"1", ("caption 1",)),
  ]
  assert len(open_table(f"{tmp_path}/1/t.csv::{tmp_path}/0/t.csv")) == 2


def test_compressed_and_utf_16_tables(tmp_path):
  write_images(tmp_path, "ä.jpg")
  text = "image\tcaption\r\nä.jpg\tgrün\r\n"
  (tmp_path / "t.tsv.gz").write_bytes(gzip.compress(text.encode()))
  (tmp_path / "u.txt").write_text(text, "utf-16")
  (tmp_path / "b.csv").write_text(text, "utf-8-sig")
  for name in ("t.tsv.gz", "u.txt", "b.csv"):
    (example,) = open_table(str(tmp_path / name))
    assert (example["image"], example["captions"]) == (contents("ä.jpg"), ("grün",)), name


@pytest.mark.parametrize(
  ("name", "text", "line"),
  [
    ("t.csv", "image,caption\na.jpg,x\nb.jpg,café\nc.jpg,über\n", 3),
    ("t.csv", "café,image,caption\n", 1),
    ("t.csv", "image,caption\n" + "a.jpg,x\n" * 20_000 + "b.jpg,café\n", 20_002),
    ("t.jsonl", '{"image": "a.jpg", "caption": "x"}\n{"image": "b.jpg", "caption": "café"}\n', 2),
    ("t.json", '[\n{"image": "a.jpg", "caption": "x"},\n{"image": "b.jpg", "caption": "é"}]', 3),
  ],
  ids=["csv", "header", "long csv", "lines", "array"],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_text_in_another_encoding_is_an_error_that_names_the_byte(tmp_path, name, text, line, compressed):
  content = text.encode("latin-1")
  path = tmp_path / (f"{name}.gz" if compressed else name)
  path.write_bytes(gzip.compress(content) if compressed else content)
  place = f"{path}:{line}: byte {content.index(0xE9)} of the file, 0xe9, is not utf-8; "
  with pytest.raises(ValueError, match=rf"^{place}.*\?encoding=latin-1"):
    open_table(str(path))


def test_the_encoding_that_is_given(tmp_path):
  write_images(tmp_path, "caf\u00e9.jpg")
  (tmp_path / "t.csv").write_bytes("image,caption\ncafé.jpg,5 € café\n".encode("cp1252"))
  assert captions(f"{tmp_path}/t.csv?encoding=cp1252") == [("5 € café",)]
  assert captions(f"{tmp_path}/t.csv?encoding=latin-1") == [("5 \x80 café",)]  # and not the index of the other
  with pytest.raises(ValueError, match=r"t\.csv:2: byte 17 of the file, 0xe9, is not ascii"):
    open_table(f"{tmp_path}/t.csv?encoding=ascii")
  for name in ("klingon", "hex"):
    with pytest.raises(ValueError, match=rf"t\.csv: .*{name}"):
      open_table(f"{tmp_path}/t.csv?encoding={name}")


def test_utf_16_that_ends_in_the_middle_of_a_character(tmp_path):
  content = "image,caption\na.jpg,x\n".encode("utf-16")
  (tmp_path / "t.csv").write_bytes(content[:-1])
  with pytest.raises(ValueError, match=rf"t\.csv:2: byte {len(content) - 2} of the file, 0x0a, is not utf-16"):
    open_table(f"{tmp_path}/t.csv")


def parquet(count: int) -> bytes:
  file = pa.BufferOutputStream()
  pq.write_table(pa.table({"path": ["a.jpg"] * count, "text": [f"caption {n}" for n in range(count)]}), file)
  return file.getvalue().to_pybytes()


@pytest.mark.parametrize(
  ("name", "content"),
  [
    ("t.csv.gz", gzip.compress(np.random.default_rng(0).bytes(5000).hex().encode())[:-20]),
    ("t.csv.gz", gzip.compress(b"image,caption\n" + b"a.jpg,x\n" * 5000)[:-20]),
    ("t.csv.gz", gzip.compress(b"image,caption\na.jpg,x\n")[:-8] + bytes(8)),
    ("t.csv.gz", gzip.compress(b"image,caption\na.jpg,x\n")[:10] + bytes(range(255, 0, -1))),
    ("t.jsonl.gz", b'{"image": "a.jpg", "caption": "x"}\n'),
    ("t.parquet", parquet(100)[:-12] + b"\xff" * 4 + parquet(100)[-8:]),
    ("t.parquet", parquet(100)[:4] + b"\xff" * 40 + parquet(100)[44:]),
    ("t.parquet", parquet(100)[:-100]),
    ("t.parquet", b""),
  ],
  ids=["cut header", "cut", "checksum", "deflate", "no gzip", "footer", "page header", "cut parquet", "empty"],
)
def test_damaged_files_are_errors_of_one_line_that_name_them(tmp_path, name, content):
  write_images(tmp_path, "a.jpg")
  (tmp_path / name).write_bytes(content)
  with pytest.raises(ValueError, match=rf"^{tmp_path}/{name}: cannot be read: .") as error:
    open_table(f"{tmp_path}/{name}")
  assert "\n" not in str(error.value)


@pytest.mark.parametrize("content", [b"", b"ARROW1", bytes(5000), None], ids=["empty", "short", "zeros", "cut"])
def test_a_damaged_index_is_an_error_that_names_it(tmp_path, content):
  write_images(tmp_path, "a.jpg")
  path = write(tmp_path / "t.csv", "image,caption", "a.jpg,x")
  open_table(path)
  (index,) = (tmp_path / ".declip_jax").iterdir()
  index.write_bytes(index.read_bytes()[:-10] if content is None else content)
  with pytest.raises(ValueError, match=rf"its index {index} is damaged: .*delete it") as error:
    open_table(path)
  assert "\n" not in str(error.value)
  index.unlink()
  assert len(open_table(path)) == 1


def test_indexing_shows_its_progress(tmp_path, monkeypatch, capsys):
  monkeypatch.setattr(progress, "_QUIET_SECONDS", 0.0)
  monkeypatch.setattr(progress, "_LOG_SECONDS", 0.0)
  write_images(tmp_path, "a.jpg")
  path = write(tmp_path / "t.csv", "image,caption,label", *(f"a.jpg,x,{number}" for number in range(100)))
  open_table(path)
  last = capsys.readouterr().err.splitlines()[-1]
  assert f"table:{path}" in last
  assert " 100 samples" in last
  open_table(path)
  assert capsys.readouterr().err == ""


def test_a_missing_image_is_a_bad_sample_and_all_missing_an_error_at_once(tmp_path):
  write_images(tmp_path, "1.jpg")
  path = write(tmp_path / "t.csv", "image,caption", "0.jpg,a", "1.jpg,b", "foo://x/2.jpg,c")
  source = open_table(path)
  for index in (0, 2):
    with pytest.raises(BadSample, match=rf"t\.csv:{index + 2}: .*{index}\.jpg|foo") as error:
      source[index]
    assert error.value.kind == "missing file"
  for index in (-1, 3):
    with pytest.raises(IndexError, match=f"no sample {index}, there are 3"):
      source[index]
  with pytest.raises(FileNotFoundError, match=r"none of 3 images .*t\.csv:2.*elsewhere/0\.jpg.*\?root="):
    open_table(f"{path}?root={tmp_path}/elsewhere")


def test_table_and_images_at_urls(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  memory = fsspec.filesystem("memory")
  memory.pipe("/table/t.csv", b"image,caption\na.jpg,relative\nmemory://other/b.jpg,a URL\n")
  memory.pipe({"/table/a.jpg": b"a", "/other/b.jpg": b"b", "/root/a.jpg": b"c"})
  assert [example["image"] for example in open_table("memory://table/t.csv")] == [b"a", b"b"]
  assert [example["image"] for example in open_table("memory://table/*.csv?root=memory://root/")] == [b"c", b"b"]


def test_a_table_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
  write_images(tmp_path, "a.jpg")
  lines = [f"a.jpg,caption {number},{number % 7}" for number in range(20_000)]
  path = write(tmp_path / "t.csv", "image,caption,label", *lines)
  source = open_table(path)
  opened = []
  open_stream = files.open_stream
  monkeypatch.setattr(files, "open_stream", lambda path: opened.append(path) or open_stream(path))
  again = open_table(path)
  assert (len(again), opened) == (20_000, [])
  for index in (0, 4095, 4096, 17_777, 19_999):
    assert (
      source[index]
      == again[index]
      == {
        "image": contents("a.jpg"),
        "captions": (f"caption {index}",),
        "label": index % 7,
        "id": f"t.csv:{index + 2}",
      }
    )
  order = np.random.default_rng(0).integers(20_000, size=2000)
  with ThreadPoolExecutor(8) as pool:
    assert [example["captions"] for example in pool.map(source.__getitem__, order)] == [
      (f"caption {i}",) for i in order
    ]
  assert len(list((tmp_path / ".declip_jax").iterdir())) == 1
  write(tmp_path / "t.csv", "image,caption,label", "a.jpg,new,0")
  assert [example["captions"] for example in open_table(path)] == [("new",)]
  assert opened == [path]


def test_pickles_small_and_works_in_another_process(tmp_path):
  write_images(tmp_path, "a.jpg")
  source = open_table(
    write(tmp_path / "t.csv", "image,caption", *(f"a.jpg,{number}," for number in range(3)), "a.jpg,x")
  )
  assert source.name == f"table:{tmp_path}/t.csv"
  pickled = pickle.dumps(source)
  assert len(pickled) < 500
  script = (
    "import pickle, sys; source = pickle.load(sys.stdin.buffer); print(source[0], source.skipped, 'jax' in sys.modules)"
  )
  out = subprocess.run([sys.executable, "-c", script], input=pickled, capture_output=True, check=True).stdout
  assert out.decode().strip() == f"{source[0]} {source.skipped} False"


def test_files_that_are_not_what_their_names_say(tmp_path):
  for name, content in [
    ("t.parquet", b"no parquet"),
    ("t.jsonl", b"image,caption\na,b\n"),
    ("t.csv", b"\n"),
    ("u.json", b""),
  ]:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=name.replace(".", r"\.") + ": "):
      open_table(str(tmp_path / name))
