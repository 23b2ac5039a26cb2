from concurrent.futures import ThreadPoolExecutor
import csv
import gzip
import json
import os
from pathlib import Path
import pickle
import re
import shlex
import subprocess
import sys

import fsspec
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_jax.data.sources import lists
from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.table import open_table
from declip_jax.data.storage import files, remote
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


SWALLOWED = [
  ("\t", "image", 2, ["a dog", '"Untitled, 1998', "a cat", 'a monitor of 27"', "a car", '"Alone at sea']),
  ("\t", "image", 0, ["a dog", '"Untitled, 1998', "a cat", 'a monitor of 27"', "a car"]),
  (",", "image", 1, ['"Untitled 1998', "a cat", 'a monitor of 27"', '"" and ""', 'the "end"']),
  (",", "index", 1, ["a dog", '"Untitled 1998', "a cat", 'a monitor of 27"']),
  (";", "key", 2, ["a dog", '"Untitled 1998', "a cat", 'a monitor of 27"']),
]


@pytest.mark.parametrize(("separator", "kind", "place", "texts"), SWALLOWED)
def test_a_quote_that_a_later_line_closes_swallows_no_line(tmp_path, separator, kind, place, texts):
  name = {"image": "{}.jpg", "index": "{}", "key": "id_{}"}[kind]
  names = [name.format(number) for number in range(len(texts))]
  write_images(tmp_path, *names)
  rows = [[f"x{number}", name] for number, name in enumerate(names)]
  for row, text in zip(rows, texts, strict=True):
    row.insert(place, text)
  header = ["other", "image"]
  header.insert(place, "caption")
  source = open_table(write(tmp_path / "t.csv", separator.join(header), *map(separator.join, rows)))
  assert [example["captions"] for example in source] == [(text,) for text in texts]
  assert source.skipped == {}


@pytest.mark.parametrize("separator", ["\t", ",", "; "])
def test_a_quote_swallows_no_line_if_names_of_images_have_no_suffix(tmp_path, separator):
  names, texts = ["cat", "x-1", "red dog", "7", "k", "big_fish"], ["a cat", '"tall one', "red", "fish", '27"', "end"]
  write_images(tmp_path, *names)
  lines = map(separator.join, [("image", "caption"), *zip(names, texts, strict=True)])
  source = open_table(write(tmp_path / "t.csv", *lines))
  assert [example["captions"] for example in source] == [(text,) for text in texts]
  assert source.skipped == {}


@pytest.mark.parametrize("name", ["cat", "x-1", "red dog"])
@pytest.mark.parametrize(
  "text", ["one\ntwo, three", "red,\nviolets are blue,\nend", "about\n1,000 people", "a\n, b", "a\n\nb, c\nd"]
)
def test_texts_of_several_lines_with_commas_after_names_without_suffix(tmp_path, name, text):
  write_images(tmp_path, name, "dog")
  lines = ["image,caption", "dog,first", f'{name},"{text}"', "dog,last"]
  assert captions(write(tmp_path / "t.csv", *lines)) == [("first", "last"), (text,)]


@pytest.mark.parametrize("text", ["A crowd\n1,000 people in it", "A crowd of\n12,500", "of\n1,000 to\n2,000 people"])
def test_numbers_with_a_comma_do_not_end_a_text_of_several_lines_after_numbers(tmp_path, text):
  write_images(tmp_path, "17", "18", "19")
  lines = ["image,caption", "17,first", f'18,"{text}"', "19,last"]
  assert captions(write(tmp_path / "t.csv", *lines)) == [("first",), (text,), ("last",)]


def test_a_comma_between_two_numbers_of_a_record_groups_no_digits(tmp_path):
  write_images(tmp_path, "17", "18", "19")
  lines = ["image,label,caption", '17,300,"big screen', "18,301,a dog", '19,302,a screen of 27"']
  assert captions(write(tmp_path / "t.csv", *lines)) == [('"big screen',), ("a dog",), ('a screen of 27"',)]


def test_quoted_fields_may_span_lines_that_are_not_records(tmp_path):
  write_images(tmp_path, "0.jpg", "1.jpg", "2.jpg")
  lines = ["image,caption", '0.jpg,"one', 'two, three"', '1.jpg,"a, b', "", 'c"', '2.jpg,"x ""y"" z"']
  assert captions(write(tmp_path / "t.csv", *lines)) == [("one\ntwo, three",), ("a, b\n\nc",), ('x "y" z',)]


@pytest.mark.parametrize(
  "lines",
  [
    ["caption,image", '"two', 'lines",0.jpg', "plain,1.jpg"],
    ["caption,image", '"two', 'lines","0.jpg"', '"plain","1.jpg"'],
    ["caption,image", "plain,1.jpg", '"two', 'lines",0.jpg'],
    ["caption,image,width", '"two', 'lines",0.jpg,8', "plain,1.jpg,8"],
    ["id,caption,image", '0,"two', 'lines",0.jpg', "1,plain,1.jpg"],
    ["caption\timage", '"two', 'lines"\t0.jpg', "plain\t1.jpg"],
  ],
)
def test_a_caption_of_two_lines_before_the_image_is_one(tmp_path, lines):
  write_images(tmp_path, "0.jpg", "1.jpg")
  source = open_table(write(tmp_path / f"t.{'tsv' if chr(9) in lines[0] else 'csv'}", *lines))
  assert sorted(example["captions"] for example in source) == [("plain",), ("two\nlines",)]
  assert not source.skipped


def test_commas_in_the_first_line_of_a_caption_before_the_image_do_not_end_it(tmp_path):
  write_images(tmp_path, "0.jpg", "1.jpg")
  lines = ["id,caption,image", '1,"a red car,', 'parked, near a house",0.jpg', '2,"x', "y, z", 'w",1.jpg']
  assert captions(write(tmp_path / "t.csv", *lines)) == [("a red car,\nparked, near a house",), ("x\ny, z\nw",)]


def test_a_line_with_a_separator_after_its_open_quote_is_the_only_one_lost(tmp_path):
  write_images(tmp_path, *(f"{number}.jpg" for number in range(4)))
  lines = ["image,caption", "0.jpg,a dog", '1.jpg,"Untitled, 1998', "2.jpg,a cat", '3.jpg,a monitor of 27"']
  source = open_table(write(tmp_path / "t.csv", *lines))
  assert [example["captions"] for example in source] == [("a dog",), ("a cat",), ('a monitor of 27"',)]
  assert source.skipped == {"damaged record": 1}


def test_quotes_after_backslashes(tmp_path):
  write_images(tmp_path, "0.jpg", "1.jpg", "2.jpg")
  lines = ["image,caption", '0.jpg,"a \\"big\\" dog, brown"', '1.jpg,"the \\"best\\""', '2.jpg,"C:\\dir, x"']
  assert captions(write(tmp_path / "t.csv", *lines)) == [('a "big" dog, brown',), ('the "best"',), ("C:\\dir, x",)]


def test_lines_without_names_are_read_with_those_that_are_given(tmp_path):
  write_images(tmp_path, "0.jpg", "1.jpg")
  path = write(tmp_path / "t.tsv", "0.jpg\ta red, square", "1.jpg\ta green; square")
  with pytest.raises(ValueError, match=r"t\.tsv: its first line is a record.*\?names=image,caption"):
    open_table(path)
  source = open_table(f"{path}?names=image,caption")
  assert [example["captions"] for example in source] == [("a red, square",), ("a green; square",)]
  assert source[1]["id"] == "t.tsv:2"
  with pytest.raises(ValueError, match=r"t\.tsv: 3 names, \['image', 'caption', 'label'\], but 2 fields"):
    open_table(f"{path}?names=image,caption,label")
  with pytest.raises(ValueError, match="only lines of text lack names"):
    open_table(f"{write_json(tmp_path / 'j.jsonl', {'image': '0.jpg', 'caption': 'x'})}?names=image,caption")


def test_numbered_captions_of_flickr8k(tmp_path):
  write_images(tmp_path, "0.jpg", "1.jpg")
  path = write(tmp_path / "token.txt", *(f"{image}.jpg#{n}\ttext {image}.{n} ." for n in (0, 1) for image in (0, 1)))
  assert captions(f"{path}?names=image,caption") == [("text 0.0 .", "text 0.1 ."), ("text 1.0 .", "text 1.1 .")]


@pytest.mark.parametrize("header", ["caption,caption", "caption_0,caption_1", "caption,caption.1", "Text,text 2"])
def test_captions_in_columns_of_one_name(tmp_path, header):
  write_images(tmp_path, "a.jpg")
  assert captions(write(tmp_path / "t.csv", f"image,{header}", "a.jpg,one,two")) == [("one", "two")]


def test_equal_names_elsewhere(tmp_path):
  write_images(tmp_path, "a.jpg")
  with pytest.raises(ValueError, match=r"t\.csv: 2 columns are called 'image'"):
    open_table(write(tmp_path / "t.csv", "image,image,caption", "a.jpg,a.jpg,x"))
  path = write(tmp_path / "t.jsonl", '{"image": "a.jpg", "caption": "one", "caption": "two"}')
  assert captions(path) == [("one", "two")]
  table = pa.table([["a.jpg"], ["one"], ["two"]], names=["image", "caption", "caption"])
  pq.write_table(table, tmp_path / "t.parquet")
  assert captions(f"{tmp_path}/t.parquet") == [("one", "two")]


@pytest.mark.parametrize("value", ["nan", "NULL", "\\N", "None", "<NA>", " "])
def test_values_that_say_that_there_is_none(tmp_path, value):
  write_images(tmp_path, "0.jpg", "1.jpg", "2.jpg")
  lines = ["image,caption,label", f"0.jpg,{value},1", f"1.jpg,x,{value}", f"{value},y,2", f"2.jpg,{value},{value}"]
  source = open_table(write(tmp_path / "t.csv", *lines))
  assert [(example["captions"], example["label"]) for example in source] == [((), 1), (("x",), -1)]
  assert source.skipped == {"damaged record": 1, "no caption": 1}


def test_not_a_number_in_json_and_parquet(tmp_path):
  write_images(tmp_path, "0.jpg", "1.jpg")
  path = write(tmp_path / "t.jsonl", '{"image": "0.jpg", "text": NaN, "label": NaN}', '{"image": "1.jpg", "text": "x"}')
  assert captions(path) == [("x",)]


def test_a_column_of_scores_that_is_called_label(tmp_path, caplog):
  write_images(tmp_path, "0.jpg", "1.jpg")
  for values in (["0.91", "0.87"], ["1e-05", ".5"]):
    path = write(
      tmp_path / "t.csv", "image,caption,label", *(f"{n}.jpg,c{n},{value}" for n, value in enumerate(values))
    )
    source = open_table(path)
    assert [(example["captions"], example["label"]) for example in source] == [(("c0",), -1), (("c1",), -1)]
    assert f"'label' has no labels, such as '{values[0]}'" in caplog.text
    with pytest.raises(ValueError, match=rf"skipped.*the first: .*t\.csv:2: expected a whole number.*{values[0]}"):
      open_table(f"{path}?label=label")
  rows = ({"image": f"{n}.jpg", "caption": "x", "labels": [0, n]} for n in range(2))
  assert [example["label"] for example in open_table(write_json(tmp_path / "t.jsonl", *rows))] == [-1, -1]


@pytest.mark.parametrize("label", ["2147483648", "9" * 5000])
def test_a_label_that_is_larger_than_any_class_is_a_damaged_record(tmp_path, label):
  write_images(tmp_path, "0.jpg", "1.jpg")
  source = open_table(write(tmp_path / "t.csv", "image,caption,label", "0.jpg,x,7", f"1.jpg,y,{label}"))
  assert [example["label"] for example in source] == [7]
  assert source.skipped == {"damaged record": 1}


def test_lines_of_one_image_in_any_order_are_one_sample(tmp_path):
  write_images(tmp_path, *(f"{number}.jpg" for number in range(6)))
  lines = [f"{image}.jpg,caption {n} of {image}" for n in range(5) for image in range(6)]
  source = open_table(write(tmp_path / "t.csv", "image,caption", *lines))
  assert [example["captions"] for example in source] == [
    tuple(f"caption {n} of {image}" for n in range(5)) for image in range(6)
  ]
  assert [example["id"] for example in source] == [f"t.csv:{image + 2}" for image in range(6)]
  assert len(list((tmp_path / ".declip_jax").iterdir())) == 1


def test_images_in_parquet_are_joined_by_their_bytes_and_labels_keep_them_apart(tmp_path):
  images = [b"a", b"b", b"a", b"b", b"a"]
  table = {"image": images, "caption": ["0", "1", "2", "3", "4"], "label": [0, 1, 0, 1, 1]}
  pq.write_table(pa.table(table), tmp_path / "t.parquet")
  found = [(example["image"], example["captions"], example["label"]) for example in open_table(f"{tmp_path}/t.parquet")]
  assert found == [(b"a", ("0", "2"), 0), (b"b", ("1", "3"), 1), (b"a", ("4",), 1)]


def test_keys_that_agree_by_chance_do_not_join_images(tmp_path, monkeypatch):
  monkeypatch.setattr("declip_jax.data.sources.lists._key", lambda *_: 1)
  write_images(tmp_path, "0.jpg", "1.jpg")
  path = write(tmp_path / "t.csv", "image,caption", "0.jpg,a", "1.jpg,b", "0.jpg,c")
  assert captions(path) == [("a", "c"), ("b",)]


def test_class_names_in_the_schema_of_parquet(tmp_path):
  features = {"image": {"_type": "Image"}, "label": {"names": ["red", "green", "blue"], "_type": "ClassLabel"}}
  metadata = {"huggingface": json.dumps({"info": {"features": features}})}
  table = pa.table({"image": [b"0", b"1"], "label": [2, 0]})
  pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "0.parquet")
  source = open_table(f"{tmp_path}/0.parquet")
  assert (source.classnames, [example["label"] for example in source]) == (("red", "green", "blue"), [2, 0])
  features["label"]["names"] = ["red"]
  metadata = {"huggingface": json.dumps({"info": {"features": features}})}
  pq.write_table(table.replace_schema_metadata(metadata), tmp_path / "1.parquet")
  with pytest.raises(ValueError, match="label 2, but only 1 class names"):
    open_table(f"{tmp_path}/1.parquet")
  with pytest.raises(ValueError, match=r"1\.parquet and .*0\.parquet have other names of classes"):
    open_table(f"{tmp_path}/*.parquet")


@pytest.mark.parametrize(
  ("content", "message"),
  [
    (b"PK\x03\x04" + bytes(60), "a zip archive"),
    (b"PAR1" + bytes(60), "Parquet; its name should end with"),
    (b"\x28\xb5\x2f\xfd" + bytes(60), "zstd"),
    (b"<!DOCTYPE html><html>", "a web page"),
  ],
)
def test_files_that_are_not_tables_are_named(tmp_path, content, message):
  (tmp_path / "t.csv").write_bytes(content)
  with pytest.raises(ValueError, match=rf"t\.csv: .*{message}"):
    open_table(f"{tmp_path}/t.csv")


def test_a_compressed_table_without_the_suffix_is_read(tmp_path):
  write_images(tmp_path, "0.jpg")
  (tmp_path / "t.csv").write_bytes(gzip.compress(b"image,caption\n0.jpg,x\n"))
  assert captions(f"{tmp_path}/t.csv") == [("x",)]


def test_the_query_of_a_web_address_is_not_ours():
  place = "https://hub.example/data/train.parquet"
  legal = ("image", "caption")
  assert lists.parse(f"{place}?download=true", legal) == (f"{place}?download=true", {})
  assert lists.parse(f"{place}?download=true&image=jpg&x=y", legal) == (f"{place}?download=true&x=y", {"image": "jpg"})
  for location in (f"{place}?captoin=x", "/data/t.csv?download=true"):
    with pytest.raises(ValueError, match="bad location"):
      lists.parse(location, legal)


def test_some_missing_images_do_not_close_a_table(tmp_path):
  write_images(tmp_path, *(f"{number}.jpg" for number in range(101) if number not in (0, 50, 100)))
  source = open_table(write(tmp_path / "t.csv", "image,caption", *(f"{n}.jpg,picture {n}" for n in range(101))))
  assert len(source) == 101


@pytest.mark.parametrize(
  ("path", "advice"),
  [
    ("/content/drive/0.jpg", "the path is absolute, and another root does not change that"),
    ("C:\\\\images\\\\0.jpg", "the path is one of Windows"),
    ("images\\\\0.jpg", "the path is one of Windows"),
    ("~/0.jpg", "~ in a list is not the home folder"),
    ("train/0.jpg", r"it is in (\S+): give \?root=\1$"),
    ("1.jpg", r"give the folder of the images as \?root=FOLDER"),
  ],
)
def test_advice_for_missing_images_helps(tmp_path, path, advice):
  write_images(tmp_path / "set", "train/0.jpg")
  (tmp_path / "set" / "tables").mkdir()
  location = write_json(tmp_path / "set" / "tables" / "t.jsonl", {"image": path.replace("\\\\", "\\"), "text": "x"})
  with pytest.raises(FileNotFoundError, match=advice) as error:
    open_table(location)
  if "FOLDER" in advice:
    (tmp_path / "other").mkdir()
    with pytest.raises(FileNotFoundError, match=r"root=\S+/other is not the folder that the paths .* are relative to$"):
      open_table(f"{location}?root={tmp_path}/other")
  if "root=/" in str(error.value):
    assert len(open_table(f"{location}?root={str(error.value).rpartition('root=')[2]}")) == 1


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


def test_captions_without_text_are_no_captions(tmp_path):
  write_images(tmp_path, *(f"{number}.jpg" for number in range(6)))
  texts = ["\u200b", "&nbsp;", "<|endoftext|>", ["\ufeff", "a dog"], ["&nbsp;", "\u200b"], "!"]
  source = open_table(
    write_json(tmp_path / "t.jsonl", *({"image": f"{n}.jpg", "text": t} for n, t in enumerate(texts)))
  )
  assert [example["captions"] for example in source] == [("a dog",), ("!",)]
  assert source.skipped == {"no caption": 4}


def test_broken_lines_are_counted_and_located(tmp_path, caplog):
  write_images(tmp_path, "0.jpg", "8.jpg")
  lines = ["image,caption", "0.jpg,first", "1.jpg", "", "2.jpg,a,b", "3\0.jpg,nul", ",no path", "6.jpg, ", "8.jpg,last"]
  source = open_table(write(tmp_path / "t.csv", *lines))
  assert [(example["captions"][0], example["id"]) for example in source] == [("first", "t.csv:2"), ("last", "t.csv:9")]
  assert source.skipped == {"damaged record": 4, "no caption": 1}
  path = tmp_path / "t.csv"
  for message in (f"{path}:3: 1 field, but 2 columns", f"{path}:5: 3 fields", f"{path}:7: expected a path"):
    assert message in caplog.text


def test_broken_json_lines_are_counted_and_located(tmp_path, caplog):
  write_images(tmp_path, "a.jpg", "b.jpg")
  good = '{"filename": "a.jpg", "caption": "first"}'
  bad = ['{"filename": "a.jp', "[1, 2]", '{"caption": "no name"}', '{"filename": "a.jpg", "caption": {"x": 1}}']
  bad += [
    '{"filename": "a\\u0000.jpg", "caption": "x"}',
    '{"filename": "\\ud800", "caption": "x"}',
    '{"filename": "a"}',
  ]
  source = open_table(
    write(tmp_path / "t.jsonl", good, *bad, good.replace("a.jpg", "b.jpg").replace("first", "last \\ud800"))
  )
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
    ("['one', \"it's\"]", ("one", "it's")),
    ("['one' 'two'\n 'three']", ("one", "two", "three")),
    ("('one', 'two')", ("one", "two")),
    ("[u'one', None, nan]", ("one",)),
    (r'["\ud83d\ude00", "\u00e9\n"]', ("\N{GRINNING FACE}", "\xe9")),
    ("('one')", ("('one')",)),
    ("['one' and", ("['one' and",)),
    ([{"raw": "one"}, {"raw": "two"}], ("one", "two")),
    ('[1, "two"]', ('[1, "two"]',)),
  ],
)
def test_forms_of_captions(tmp_path, value, expected):
  write_images(tmp_path, "a.jpg")
  assert captions(write_json(tmp_path / "t.jsonl", {"image": "a.jpg", "text": value})) == [expected]


def test_an_empty_list_is_not_a_caption(tmp_path):
  write_images(tmp_path, "a.jpg", "b.jpg")
  path = write(tmp_path / "t.csv", "image,caption", "a.jpg,x", "b.jpg,[]")
  assert (captions(path), open_table(path).skipped) == ([("x",)], {"no caption": 1})


def test_several_columns_and_lines_are_captions_of_one_image(tmp_path):
  write_images(tmp_path, "a.jpg", "b.jpg")
  lines = ["a.jpg| 0| one| x", "a.jpg| 1| two| y", "b.jpg| 0| three|", "a.jpg| 2| four| z"]
  path = write(tmp_path / "t.csv", "image_name| number| title| description", *lines)
  assert captions(f"{path}?caption=title") == [("one", "two", "four"), ("three",)]
  assert captions(f"{path}?caption=title,description") == [("one", "x", "two", "y", "four", "z"), ("three",)]


def test_urls_of_images_are_refused_with_the_command_that_downloads_them(tmp_path, monkeypatch):
  monkeypatch.setattr(remote, "read_range", lambda *_: pytest.fail("a request"))
  laion = pa.Table.from_pylist(
    [{"URL": f"https://a.example/{i}.jpg", "TEXT": "a cat", "pwatermark": 0.5} for i in range(3)]
  )
  pq.write_table(laion, tmp_path / "a b-0.parquet")
  pq.write_table(laion, tmp_path / "a b-1.parquet")
  path = f"{tmp_path}/a b-0.parquet"
  with pytest.raises(ValueError, match="allow=https") as error:
    open_table(path)
  (command,) = re.findall(r"download them with (img2dataset .*) \(pip", str(error.value))
  words = shlex.split(command)
  options = dict(zip(words[1::2], words[2::2], strict=True))
  wanted = {"url_list": path, "input_format": "parquet", "url_col": "URL", "caption_col": "TEXT"}
  assert options.items() >= {f"--{name}": value for name, value in wanted.items()}.items()
  assert f"open webdataset:{options['--output_folder']}/*.tar" in str(error.value)
  with pytest.raises(ValueError, match=f"--url_list {tmp_path} --input_format"):
    open_table(f"{tmp_path}/*.parquet")
  assert not list(tmp_path.glob(".declip_jax/*"))
  tsv = write(tmp_path / "t.tsv", "image\tcaption", *[f"http://a.example/{i}.jpg\ta" for i in range(3)])
  with pytest.raises(ValueError, match="--input_format tsv --url_col image --caption_col caption"):
    open_table(f"{tsv}?allow=ftp")


def test_urls_of_images_that_the_spec_allows_are_read(tmp_path, monkeypatch):
  monkeypatch.setattr(remote, "read_range", lambda url, *_: url.encode())
  monkeypatch.setattr(remote, "is_private", lambda host: False)
  path = write(tmp_path / "t.csv", "url,caption", "https://a.example/1.jpg,a", "https://a.example/2.jpg,b")
  assert [example["image"] for example in open_table(f"{path}?allow=https")] == [
    b"https://a.example/1.jpg",
    b"https://a.example/2.jpg",
  ]


def test_columns_that_are_missing_or_unclear_are_named(tmp_path):
  path = write(tmp_path / "t.csv", "link,title,description", "a.jpg,b,c")
  with pytest.raises(
    ValueError, match=r"t\.csv: the caption could be any of \['title', 'description'\].*\?caption=title"
  ):
    open_table(path)
  with pytest.raises(
    ValueError, match=r"t\.csv: which column is the image.*\['link', 'title', 'description'\].*\?image="
  ):
    open_table(f"{path}?caption=title")
  with pytest.raises(ValueError, match=r"no column 'file' for the image.*\['link', 'title', 'description'\]"):
    open_table(f"{path}?image=file")
  with pytest.raises(ValueError, match=r"bad location.*\?image=\.\.&caption=\.\."):
    open_table(f"{path}?captain=title")
  with pytest.raises(ValueError, match=r"which column is the caption or label\?.*\['image', 'width'\]"):
    open_table(write(tmp_path / "n.csv", "image,width", "a.jpg,3"))
  with pytest.raises(ValueError, match=r"t\.xls: expected a table"):
    open_table(write(tmp_path / "t.xls", "x"))
  with pytest.raises(FileNotFoundError, match=r"no file matches .*u\.csv.*t\.csv"):
    open_table(str(tmp_path / "u.csv"))
  with pytest.raises(ValueError, match=r"no usable sample; skipped 1: damaged record; the first: "):
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


def test_the_stamp_follows_classnames_txt(tmp_path):
  write_images(tmp_path, "0.jpg")
  path = write(tmp_path / "t.csv", "path,label", "0.jpg,1")
  stamps = []
  for names in (["cat", "dog"], ["dog", "cat"]):
    write(tmp_path / "classnames.txt", *names)
    stamps.append(open_table(path).stamp)
    assert open_table(path).stamp == stamps[-1]
  assert stamps[0] != stamps[1]


def test_labels_and_names_may_both_be_numbered_from_1(tmp_path):
  write_images(tmp_path, "1.jpg", "2.jpg", "3.jpg")
  path = write(tmp_path / "t.csv", "path,label", "1.jpg,1", "3.jpg,3", "2.jpg,2")
  write(tmp_path / "classnames.txt", "3: cow", "1: cat", "2: dog")
  source = pickle.loads(pickle.dumps(open_table(path)))
  assert [source.classnames[example["label"]] for example in source] == ["cat", "cow", "dog"]
  write(tmp_path / "u.csv", "path,label", "1.jpg,0", "3.jpg,2")  # here the lines are only counted from 1
  source = open_table(f"{tmp_path}/u.csv")
  assert [source.classnames[example["label"]] for example in source] == ["cat", "cow"]
  write(tmp_path / "v.csv", "path,label", "1.jpg,1", "2.jpg,2")
  with pytest.raises(
    ValueError, match=r"classnames\.txt: .* 1 to 3, but the labels are 1 to 2, and could be .* from 0"
  ):
    open_table(f"{tmp_path}/v.csv")
  write(tmp_path / "classnames.txt", "0: nothing", "1: cat", "2: dog")
  source = open_table(f"{tmp_path}/v.csv")
  assert [source.classnames[example["label"]] for example in source] == ["cat", "dog"]


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
    ("t.json", '[\n{"image": "a.jpg", "caption": "x"},\n{"image": "b.jpg", "caption": "é"}]', 3),
  ],
  ids=["csv", "header", "long csv", "array"],
)
@pytest.mark.parametrize("compressed", [False, True])
def test_text_in_another_encoding_is_an_error_that_names_the_byte(tmp_path, name, text, line, compressed):
  content = text.encode("latin-1")
  path = tmp_path / (f"{name}.gz" if compressed else name)
  path.write_bytes(gzip.compress(content) if compressed else content)
  place = f"{path}:{line}: byte {content.index(0xE9)} of the file, 0xe9, is not utf-8; "
  with pytest.raises(ValueError, match=rf"^{place}.*\?encoding=latin-1"):
    open_table(str(path))


def test_a_byte_that_is_not_utf_8_costs_one_line_of_json(tmp_path):
  write_images(tmp_path, "a.jpg", "b.jpg", "c.jpg")
  lines = [f'{{"image": "{name}.jpg", "caption": "{text}"}}\n' for name, text in ("ax", "bé", "cü")]
  (tmp_path / "t.jsonl").write_bytes(b"".join(map(str.encode, lines, ["utf-8", "cp1252", "utf-8"])))
  source = open_table(f"{tmp_path}/t.jsonl")
  assert [example["captions"] for example in source] == [("x",), ("ü",)]
  assert source.skipped == {"damaged record": 1}
  (tmp_path / "t.jsonl").write_text(lines[1], "cp1252")
  with pytest.raises(ValueError, match=r"t\.jsonl: .* 0xe9 is not utf-8; .*\?encoding=latin-1"):
    open_table(f"{tmp_path}/t.jsonl")
  assert captions(f"{tmp_path}/t.jsonl?encoding=latin-1") == [("é",)]


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


@pytest.mark.parametrize(("written", "given"), [("utf-8-sig", "utf-8"), ("utf-8", "UTF8"), ("utf-16", "utf-16-le")])
def test_a_byte_order_mark_is_skipped_in_the_encoding_that_is_given(tmp_path, written, given):
  write_images(tmp_path, "a.jpg")
  (tmp_path / "t.csv").write_text("image,caption\na.jpg,é\n", written)
  assert captions(f"{tmp_path}/t.csv?encoding={given}") == [("é",)]


def test_paths_that_begin_with_the_folder_itself(tmp_path):
  write_images(tmp_path, "1.jpg", ".2.jpg")
  lines = ["image,caption", "1.jpg,a", ".2.jpg,b", "./1.jpg,c", ".//./1.jpg#0,d"]
  assert captions(write(tmp_path / "t.csv", *lines)) == [("a", "c", "d"), ("b",)]


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


@pytest.mark.parametrize("suffix", [".csv.gz", ".parquet"])
def test_damaged_files_among_several_are_counted_and_passed_over(tmp_path, caplog, suffix):
  write_images(tmp_path, "a.jpg", "b.jpg")
  whole = parquet(1) if suffix == ".parquet" else gzip.compress(b"path,text\na.jpg,caption 0\n")
  many = gzip.compress(b"path,text\nb.jpg,kept\n" + b"".join(b"b.jpg,%d\n" % number for number in range(20_000)))
  cut = parquet(100)[:4] + b"\xff" * 40 + parquet(100)[44:] if suffix == ".parquet" else many[:-200]
  for number, content in enumerate([cut, whole, whole]):
    (tmp_path / f"{number}{suffix}").write_bytes(content)
  source = open_table(f"{tmp_path}/*{suffix}")
  assert source.skipped == {"damaged record": 1}
  assert [example["captions"][0] for example in source] == ["kept"] * (suffix != ".parquet") + ["caption 0"]
  assert f"{tmp_path}/0{suffix}: cannot be read" in caplog.text
  for number in range(3):
    (tmp_path / f"{number}{suffix}").write_bytes(cut)
  with pytest.raises(ValueError, match=f"^{tmp_path}/0{suffix}: cannot be read"):
    open_table(f"{tmp_path}/*{suffix}")


@pytest.mark.parametrize("content", [b"", b"\x96\x00\x02", bytes(5000), None], ids=["empty", "short", "zeros", "cut"])
def test_a_damaged_index_is_named_and_built_again(tmp_path, content, caplog):
  write_images(tmp_path, "a.jpg")
  path = write(tmp_path / "t.csv", "image,caption", "a.jpg,x")
  open_table(path)
  (index,) = (tmp_path / ".declip_jax").iterdir()
  whole = index.read_bytes()
  index.write_bytes(whole[:-10] if content is None else content)
  assert len(open_table(path)) == 1
  assert f"{index} is not used, and is built again" in caplog.text
  assert index.read_bytes() == whole


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
  for index, kind in [(0, "missing file"), (2, "not allowed")]:
    with pytest.raises(BadSample, match=rf"t\.csv:{index + 2}: .*{index}\.jpg") as error:
      source[index]
    assert error.value.kind == kind
  for index in (-1, 3):
    with pytest.raises(IndexError, match=f"no sample {index}, there are 3"):
      source[index]
  with pytest.raises(
    FileNotFoundError, match=r"no readable image among 3 .*t\.csv:2.*elsewhere/0\.jpg.*elsewhere is not a folder"
  ):
    open_table(f"{path}?root={tmp_path}/elsewhere")


def test_table_and_images_at_urls(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  memory = fsspec.filesystem("memory")
  memory.pipe("/table/t.csv", b"image,caption\na.jpg,relative\nmemory://other/b.jpg,a URL\n")
  memory.pipe({"/table/a.jpg": b"a", "/other/b.jpg": b"b", "/root/a.jpg": b"c"})
  assert [example["image"] for example in open_table("memory://table/t.csv?allow=memory")] == [b"a", b"b"]
  assert [example["image"] for example in open_table("memory://table/*.csv?root=memory://root/&allow=memory")] == [
    b"c",
    b"b",
  ]


def test_a_table_is_read_once_and_again_when_it_changes(tmp_path, monkeypatch):
  write_images(tmp_path, "a.jpg")
  lines = [f"a.jpg,caption {number},{number}" for number in range(20_000)]
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
        "label": index,
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


def test_a_file_of_noise_is_no_table_in_any_encoding(tmp_path):
  (tmp_path / "x.csv").write_bytes(b"\xd0\r\x01\xff" * 50)
  with pytest.raises(ValueError, match=r"x\.csv:1: byte 0 .* is not utf-8; .* as in table:.*x\.csv\?encoding=latin-1"):
    open_table(str(tmp_path / "x.csv"))
  with pytest.raises(ValueError, match=r"x\.csv:1 is not a line of a table: "):
    open_table(f"{tmp_path}/x.csv?encoding=latin-1")


def test_several_labels_and_groups(tmp_path):
  write_images(tmp_path, "0.jpg", "1.jpg", "2.jpg")
  lines = ["image,cat,dog,region,year,label", "0.jpg,1,0,Europe,2001,0", "1.jpg,1.0,-1,Africa,,1", "2.jpg,,1,,2003,1"]
  path = write(tmp_path / "t.csv", *lines)
  source = open_table(f"{path}?labels=cat,dog&group=region,year")
  assert source.classnames == ("cat", "dog")
  again = pickle.loads(pickle.dumps(source))
  assert [example["labels"].tolist() for example in again] == [[1, -1], [1, 0], [0, 1]]
  assert again[0]["labels"].dtype == np.int8
  expected = [{"region": 1, "year": 2001}, {"region": 0, "year": -1}, {"region": -1, "year": 2003}]
  assert [example["groups"] for example in again] == expected
  assert [example["label"] for example in again] == [-1, -1, -1]
  plain = open_table(path)
  assert [example["label"] for example in plain] == [0, 1, 1]
  assert not {"labels", "groups"} & plain[0].keys()
  assert "labels" not in open_table(f"{path}?group=region")[0]
  with pytest.raises(ValueError, match=r"no column 'bird' for labels"):
    open_table(f"{path}?labels=cat,bird")
  with pytest.raises(ValueError, match=r"no column 'country' for group"):
    open_table(f"{path}?group=country")


def test_a_label_of_several_that_is_no_sign_is_a_damaged_record(tmp_path):
  write_images(tmp_path, "0.jpg", "1.jpg")
  path = write(tmp_path / "t.csv", "image,cat,dog", "0.jpg,1,0", "1.jpg,2,0")
  assert open_table(f"{path}?labels=cat,dog").skipped == {"damaged record": 1}


def test_the_captions_of_one_image_are_bounded_wherever_its_lines_are(tmp_path, monkeypatch):
  monkeypatch.setattr(lists, "LONGEST", 12)
  shown = []
  monkeypatch.setattr(lists.progress.Bar, "update", lambda bar, count=1: shown.append(count))
  write_images(tmp_path, "0.jpg", "1.jpg")
  source = open_table(write(tmp_path / "t.csv", "image,caption", *(f"{n % 2}.jpg,text{n}" for n in range(8))))
  assert [example["captions"] for example in source] == [("text0", "text2"), ("text1", "text3")]
  assert source.skipped == {"damaged record": 4}
  assert sum(shown) == 16  # lines that were read, then joined
