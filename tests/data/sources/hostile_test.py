"""Lists with a record that no reader should trust: it is counted and named, and the rest of the list is used."""

import gzip
import json
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tiers import slow_except

from declip_jax.data.sources import open_source, table
from declip_jax.data.storage import bounded, parquet, parquet_pages

DEEP = "[" * 50_000


def write(path: Path, text: str) -> Path:
  if path.suffix == ".gz":
    path.write_bytes(gzip.compress(text.encode(), 1))
  else:
    path.write_text(text)
  return path


@pytest.fixture
def root(tmp_path: Path) -> Path:
  for name in ("a", "b"):
    (tmp_path / f"{name}.jpg").write_bytes(name.encode())
  return tmp_path


def record(name: str, **fields: object) -> str:
  return json.dumps({"image": f"{name}.jpg", "caption": f"caption {name}", **fields})


LONG = "x" * 2**20
RECORDS = {
  "a long line": (
    "t.csv",
    ["image,caption", "a.jpg,caption a", f"c.jpg,{LONG}", "b.jpg,caption b"],
    "more than 524,288",
  ),
  "a long quoted line": (
    "t.csv",
    ["image,caption", "a.jpg,caption a", f'c.jpg,"{LONG}', "b.jpg,caption b"],
    "more than 524,288",
  ),
  "a long line in a gzip": ("t.jsonl.gz", [record("a"), record("c", text=LONG), record("b")], "more than 524,288"),
  "a nested line": ("t.jsonl", [record("a"), f'{{"image": {DEEP}', record("b")], "nested too deeply"),
  "a nested element": (
    "t.json",
    [f"[{record('a')},", f'{{"image": "\\"]", "x": {DEEP}"{{\\\\"{"]" * 50_000}}},', f"{record('b')}]"],
    "nested too deeply",
  ),
  "a nested element without an end": ("t.json", [f"[{record('a')},{record('b')},", DEEP], "the rest is not read"),
  "a number of 5,000 digits": (
    "t.jsonl",
    [record("a"), f'{{"image": "c.jpg", "caption": {"9" * 5000}}}', record("b", width=10**30)],
    "expected a caption",
  ),
  "a label of 5,000 digits": (
    "t.jsonl",
    [record("a", label=0), f'{{"image": "c.jpg", "caption": "c", "label": {"9" * 5000}}}', record("b", label=1)],
    "label",
  ),
}


@pytest.mark.parametrize("case", RECORDS)
def test_a_hostile_record_is_counted_and_named(case: str, root: Path, caplog: pytest.LogCaptureFixture) -> None:
  name, lines, message = RECORDS[case]
  source = open_source(f"table:{write(root / name, chr(10).join(lines))}")
  assert [example["captions"] for example in source] == [("caption a",), ("caption b",)]
  assert source.skipped == {"damaged record": 1}
  assert message in caplog.text


LARGE = "x" * 2**20
BOMBS = {  # a column with a large value in each of 256 rows, stored once, and how many samples are left
  "captions": (
    {"image": ["a.jpg", *["c.jpg"] * 256, "b.jpg"], "caption": ["caption a", *[LARGE] * 256, "caption b"]},
    2,
  ),
  "lists": ({"image": ["a.jpg", "c.jpg", "b.jpg"], "captions": [["caption a"], [LARGE] * 256, ["caption b"]]}, 2),
  "paths": ({"image": ["a.jpg", *[LARGE] * 256, "b.jpg"], "caption": ["caption a", *["c"] * 256, "caption b"]}, 2),
  "images": ({"image": [b"a", *[LARGE.encode()] * 256, b"b"], "caption": ["caption a", *["c"] * 256, "caption b"]}, 3),
  "structs": (
    {
      "image": [{"bytes": text.encode(), "path": None} for text in ("a", *[LARGE] * 256, "b")],
      "caption": ["caption a", *["c"] * 256, "caption b"],
    },
    3,
  ),
  "JSON": (
    {
      "image": ["a.jpg", *["c.jpg"] * 256, "b.jpg"],
      "caption": pa.array(["caption a", *[LARGE] * 256, "caption b"], pa.json_()),
    },
    2,
  ),
}
BOMBS["differences"] = BOMBS["captions"]
DIFFERENCES = {"use_dictionary": False, "column_encoding": {"caption": "DELTA_BYTE_ARRAY"}}


@pytest.mark.parametrize("case", slow_except(("captions", "images", "lists"), BOMBS))
def test_values_that_a_dictionary_repeats_take_bounded_memory(
  case: str, root: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
  """A file of a few kilobytes, decoded at once, would take 256 MiB here, and any amount with larger values."""
  monkeypatch.setattr(parquet, "_BYTES", 2**22)
  columns, count = BOMBS[case]
  how = DIFFERENCES if case == "differences" else {}
  pq.write_table(pa.table(columns), root / "t.parquet", compression="zstd", **how)
  assert (root / "t.parquet").stat().st_size < 20_000
  used = pa.proxy_memory_pool(pool := pa.default_memory_pool())
  pa.set_memory_pool(used)
  try:
    source = open_source(f"table:{root / 't.parquet'}")
  finally:
    pa.set_memory_pool(pool)
  assert used.max_memory() < 2**25
  samples = [source[number] for number in range(len(source))]
  assert [samples[number]["captions"][0] for number in (0, -1)] == ["caption a", "caption b"]
  assert len(samples) == count
  if count == 2:
    assert source.skipped == {"damaged record": 1 if case == "lists" else 256}
    assert "524,288" in caplog.text


@pytest.mark.parametrize("version", ["1.0", "2.0"])
def test_a_page_that_would_take_too_much_memory_is_not_decompressed(
  version: str, root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
  table = pa.table({"image": ["a.jpg", "b.jpg"], "caption": ["caption a", "x" * 2**22]})
  how = {"compression": "zstd", "use_dictionary": False, "data_page_version": version}
  pq.write_table(table, root / "t.parquet", write_statistics=False, **how)
  monkeypatch.setattr(parquet_pages, "_LARGE", 2**21)
  used = pa.proxy_memory_pool(pool := pa.default_memory_pool())
  pa.set_memory_pool(used)
  try:
    with pytest.raises(ValueError, match=r"t\.parquet: .* a page of 'caption' has [\d,]+ bytes and 4,19\d,\d\d\d once"):
      open_source(f"table:{root / 't.parquet'}")
  finally:
    pa.set_memory_pool(pool)
  assert used.max_memory() < 2**20
  assert len(open_source(f"table:{root / 't.parquet'}?caption=")) == 2  # whose column is not read


def test_rows_of_parquet_are_bounded_by_the_size_of_the_file(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  table = pa.table({"image": ["a.jpg"] * 100_000, "caption": ["caption a"] * 100_000})
  pq.write_table(table, root / "t.parquet", compression="zstd")
  monkeypatch.setattr(parquet, "_FEW_VALUES", 100)
  with pytest.raises(ValueError, match=r"t\.parquet: .*100,000 rows, expected at most \d\d,\d\d\d"):
    open_source(f"table:{root / 't.parquet'}")


def test_lists_that_may_repeat_a_value_without_limit_are_not_read(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
  table = pa.table({"image": ["a.jpg"], "captions": pa.array([[LARGE] * 256])})
  encoding = {"captions.list.element": "DELTA_BYTE_ARRAY"}
  pq.write_table(table, root / "t.parquet", compression="zstd", use_dictionary=False, column_encoding=encoding)
  monkeypatch.setattr(parquet, "_BYTES", 2**22)
  with pytest.raises(
    ValueError, match=r"lists in 'captions\.list\.element' may repeat a value of 1,0\d\d,\d\d\d bytes"
  ):
    open_source(f"table:{root / 't.parquet'}")


def test_a_damaged_header_of_a_page_is_an_error_of_one_line(root: Path) -> None:
  pq.write_table(pa.table({"image": ["a.jpg"] * 9, "caption": ["x"] * 9}), root / "t.parquet")
  data = bytearray((root / "t.parquet").read_bytes())
  for start in (4, 8, 12):
    data[start : start + 4] = b"\xff" * 4
    (root / "t.parquet").write_bytes(data)
    with pytest.raises(ValueError, match=r"t\.parquet: ") as error:
      open_source(f"table:{root / 't.parquet'}")
    assert "\n" not in str(error.value)


def test_an_irrelevant_number_of_5000_digits_does_no_harm(root: Path) -> None:
  line = f'{{"image": "a.jpg", "caption": "caption a", "width": {"9" * 5000}}}'
  assert open_source(f"table:{write(root / 't.jsonl', line)}")[0]["captions"] == ("caption a",)
  content = f'{{"images": [{{"id": 1, "file_name": "a.jpg", "area": {"9" * 5000}}}], "annotations": ['
  content += '{"image_id": 1, "caption": "caption a"}]}'
  assert open_source(f"coco:{write(root / 'captions.json', content)}")[0]["captions"] == ("caption a",)


def test_a_deeply_nested_value_costs_only_its_record_of_coco(root: Path, caplog: pytest.LogCaptureFixture) -> None:
  nested = DEEP + '"]\\"{"' + "]" * 50_000
  images = [f'{{"id": {number}, "file_name": "{name}.jpg"}}' for number, name in enumerate("abc")]
  images[1] = images[1].replace("}", f', "area": {nested}}}')
  captions = [f'{{"image_id": {number}, "caption": "caption {name}"}}' for number, name in enumerate("abc")]
  captions[2] = f'{{"image_id": 2, "caption": {nested}}}'
  content = f'{{"images": [{", ".join(images)}], "annotations": [{", ".join(captions)}]}}'
  source = open_source(f"coco:{write(root / 'captions.json', content)}")
  assert [example["captions"] for example in source] == [("caption a",), ("caption b",)]
  assert source.skipped == {"no caption": 1}
  assert "captions.json: values nested too deeply, which count as missing: 2" in caplog.text


def test_nested_annotations_are_an_error_of_one_line(root: Path) -> None:
  path = write(root / "captions.json", '{"images": [], "annotations": ' + DEEP)
  with pytest.raises(ValueError, match=r"captions\.json: not JSON: nested too deeply"):
    open_source(f"coco:{path}")


def test_what_exceeds_the_longest_line_is_skipped(tmp_path: Path) -> None:
  path = write(tmp_path / "t.txt", f"first\n{'é' * 3_000_000}\n{'y' * 10}\n{'z' * 11}")
  with path.open("rb") as file:
    lines = list(bounded.Lines(file, "utf-8", 10))
  assert lines == ["first\n", "é" * 11, "y" * 10 + "\n", "z" * 11]


@pytest.mark.parametrize("kind", ["table", "coco"])
def test_a_list_opens_though_many_of_its_images_are_missing(kind: str, tmp_path: Path) -> None:
  """The first, the middle, the last and every other one in between: an even spacing would find none."""
  there = [number for number in range(101) if number % 2 and number != 50]
  for number in there:
    (tmp_path / f"{number}.jpg").write_bytes(b"an image")
  if kind == "table":
    lines = ["image,caption", *(f"{number}.jpg,picture {number}" for number in range(101))]
    path = write(tmp_path / "t.csv", "\n".join(lines))
  else:
    images = [{"id": number, "file_name": f"{number}.jpg"} for number in range(101)]
    captions = [{"image_id": number, "caption": f"picture {number}"} for number in range(101)]
    path = write(tmp_path / "c.json", json.dumps({"images": images, "annotations": captions}))
  source = open_source(f"{kind}:{path}")
  assert len(source) == 101
  assert source[1]["image"] == b"an image"


@pytest.mark.parametrize("name", ["t.csv.gz", "t.jsonl.gz"])
def test_blank_lines_are_skipped_and_too_many_are_counted(root: Path, monkeypatch: pytest.MonkeyPatch, name: str):
  monkeypatch.setattr(table, "_BLANK_LINES", 100)
  head, first, second = (
    ("image,caption\n", "a.jpg,caption a\n", "b.jpg,caption b\n")
    if ".csv" in name
    else ("", record("a") + "\n", record("b") + "\n")
  )
  for blank, skipped in ((100, {}), (101, {"damaged record": 1})):
    source = open_source(
      f"table:{write(root / name, head + first + ' ' * 9 + blank * chr(10) + second + blank * chr(10))}"
    )
    assert [source[index]["captions"] for index in range(len(source))] == [("caption a",), ("caption b",)][
      : 2 - len(skipped)
    ]
    assert source.skipped == skipped
