import contextlib
import io
import json
from pathlib import Path
import re
import shlex
import subprocess
import sys
import tarfile
import traceback
from types import SimpleNamespace

import fsspec
import numpy as np
from PIL import Image
from PIL.PngImagePlugin import PngInfo
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from declip_jax import config_files
from declip_jax.data import images as image_ops
from declip_jax.data import inspect
from declip_jax.data.guess import guess, guess_test, guesses, read_as, short_name
from declip_jax.data.inspect import describe, draw, read_samples
from declip_jax.data.sources import open_source
from declip_jax.data.sources.scenes import open_scenes

LONG = "dog " * 80  # a token each


def encoded(width: int, height: int, format: str) -> bytes:
  file = io.BytesIO()
  Image.fromarray(np.full((height, width, 3), 200, np.uint8)).save(file, format)
  return file.getvalue()


@pytest.fixture
def shards(tmp_path) -> Path:
  """Ten samples in a tar: eight good ones, two of them without a caption and one with five, and two bad ones."""
  files = {f"{key}.jpg": encoded(40 + key, 20, "JPEG") for key in range(7)} | {"7.png": encoded(100, 300, "PNG")}
  files |= {f"{key}.txt": b"a dog" for key in (0, 1, 2, 3)}
  files |= {"4.json": json.dumps({"captions": ["one", "two", "three", "four", LONG]}).encode()}
  files |= {"5.cls": b"1", "6.txt": b"\xe5\x8c\x97\xe4\xba\xac", "6.cls": b"0"}
  files |= {"8.jpg": b"", "8.txt": b"x", "9.jpg": encoded(9, 9, "JPEG")[:200], "9.txt": b"x"}
  with tarfile.open(tmp_path / "s.tar", "w") as tar:
    for name in sorted(files):
      info = tarfile.TarInfo(name)
      info.size = len(files[name])
      tar.addfile(info, io.BytesIO(files[name]))
  (tmp_path / "classnames.txt").write_text("cat\nhot dog\n")
  return tmp_path


def described(path: object, num_samples: int = 1000) -> str:
  source = open_source(guess(str(path)))
  return describe(source, *read_samples(source, num_samples))


def test_samples_are_described(shards):
  lines = described(shards / "s.tar").splitlines()
  found = {line[:13].strip(): line[13:] for line in lines[1:]}
  assert lines[0] == f"webdataset:{shards}/s.tar"
  assert found["samples"] == "10, 10 of them tried"
  assert found["fields"] == "image, captions (75.0%), label (25.0%)"
  assert found["images"] == "7 JPEG, 1 PNG"
  assert found["width"] == "40 to 100, median 44"  # of 40 to 46 and 100: 43.5
  assert found["height"] == "20 to 300, median 20"
  assert found["captions"] == "0 to 5, median 1 per sample"
  assert found["characters"] == "2 to 319, median 5"  # of 2 3 3 4 5 5 5 5 5 319
  assert found["tokens"].startswith("3 to 82, median ")
  assert "ViT-Nano/8@32px cuts off 10.0% of the captions, after 24" in found["tokens"]
  assert found["classes"] == "2 names: cat, hot dog"
  assert found["seen"] == "2, 1 to 1, median 1 per class"
  assert found["bad"] == "2 of 10 (20.0%)"
  assert any("s.tar:8: " in line for line in lines)
  assert any("s.tar:9: " in line for line in lines)


@pytest.mark.parametrize(
  ("captions", "expected"),
  [
    (["a dog"] * 9 + ["a Red dog"], {"colours": "10.0%"}),
    (["a dog"] * 90 + ["a red dog"] * 9 + ["reddish"], {}),
    (["a dog"] * 99 + ["a dog on the left"], {"sides": "1.0%"}),
    (["a red dog on the right", "a dog"], {"colours": "50.0%", "sides": "50.0%"}),
  ],
)
def test_views_that_change_what_captions_name_are_reported(captions, expected):
  samples = [inspect.Sample(0, "PNG", 9, 9, 9, (caption,), (5,), -1, ()) for caption in captions]
  fields = {"name": "x:y", "classnames": (), "skipped": {}, "left_out": {}}
  source = type("Source", (), {**fields, "__len__": lambda _: 100})()
  lines = describe(source, samples, []).splitlines()
  found = {line[:13].strip(): (line[13:], following) for line, following in zip(lines, lines[1:], strict=False)}
  assert {name: found[name][0].split()[2].rstrip(",") for name in ("colours", "sides") if name in found} == expected
  if "colours" in expected:
    recipes = found["colours"][0].split("views of ")[1].rstrip(";").split(", ")
    assert {"declip", "filip", "clip_color"} <= {*recipes}
    assert not {"clip", "slip", "simclr"} & {*recipes}  # the views that SLIP changes are not contrasted with texts
  if "sides" in expected:
    assert found["sides"][1].endswith("--config.data.flip_probability=0.0")


@pytest.mark.parametrize("data", ["pairs.csv", "my pairs.csv?root=/data", "table:/d/a.csv", "'"])
def test_the_command_to_train_reads_the_same_data(data):
  words = shlex.split(inspect.training_command(data))
  assert words[:3] == ["python", "-m", "declip_jax.train"]
  (config,) = [word.removeprefix("--config=") for word in words if word.startswith("--config=")]
  get_config = config_files.load_module("pretrain").get_config
  assert config_files._arguments(get_config, *config.split(":", 1))["data"] == data


@pytest.mark.parametrize(("bad", "allowed"), [(0.05, None), (0.06, "0.15"), (0.5, "0.55"), (0.99, "1")])
def test_the_command_to_train_allows_for_more_bad_samples_than_the_default(bad, allowed):
  words = shlex.split(inspect.training_command("pairs.csv", bad))
  found = [word.partition("=")[2] for word in words if word.startswith("--config.data.max_bad=")]
  assert found == ([allowed] if allowed else [])


def test_a_path_in_place_of_a_spec_is_an_error_that_names_the_way_to_the_spec(shards):
  with pytest.raises(ValueError, match=r"s\.tar.*declip_jax\.data\.inspect"):
    open_source(f"{shards}/s.tar")


def test_a_path_with_a_comma_needs_a_config_file():
  words = shlex.split(inspect.training_command("a,b.csv"))
  assert words == ["python", "-m", "declip_jax.new", "my_config.py", "--data", "a,b.csv"]


def test_labels_and_groups_are_fields(tmp_path):
  (tmp_path / "1.png").write_bytes(encoded(8, 8, "PNG"))
  (tmp_path / "t.csv").write_text("image,cat,dog,region\n1.png,1,0,Asia\n")
  source = open_source(f"table:{tmp_path}/t.csv?labels=cat,dog&group=region")
  text = describe(source, *read_samples(source, 1))
  assert "fields       image, labels, groups" in text.splitlines()
  assert "classes      2 names: cat, dog" in text.splitlines()


def test_folders_next_to_a_table_may_be_nested_deeper_than_python_recurses(tmp_path):
  (tmp_path / ("d/" * 200)).mkdir(parents=True)
  (tmp_path / "t.csv").write_text("image,caption\nmissing.jpg,a\n")
  before = sys.getrecursionlimit()
  sys.setrecursionlimit(len(traceback.extract_stack()) + 100)
  try:
    assert guess(str(tmp_path / "t.csv")).startswith(f"table:{tmp_path}/t.csv")
  finally:
    sys.setrecursionlimit(before)


def test_files_that_belong_to_no_sample_are_counted(tmp_path):
  for name in ("1.jpg", "2.jpg"):
    (tmp_path / name).write_bytes(encoded(8, 8, "JPEG"))
  touch(tmp_path, "3.HEIC", "4.HEIC", "5.jxl")
  assert "left out     3 files: 2 .HEIC, 1 .jxl" in described(tmp_path).splitlines()


def test_the_samples_are_drawn_at_random_but_always_the_same():
  source = open_scenes("test/1000/16")
  indices = [sample.index for sample in read_samples(source, 50)[0]]
  assert indices == [sample.index for sample in read_samples(source, 50)[0]]
  assert len(set(indices)) == 50
  assert 300 < np.mean(indices) < 700
  assert [sample.index for sample in read_samples(source, 2000)[0]] == list(range(1000))


def test_the_limit_of_pixels_can_be_set(shards):
  _, bad = read_samples(open_source(f"webdataset:{shards}/s.tar"), 100, max_pixels=20 * 45)
  assert sum(error.kind == "too many pixels" for error in bad) == 2


def test_a_contact_sheet_is_drawn(shards, tmp_path):
  source = open_source(guess(str(shards)))
  draw(source, *read_samples(source, 10), tmp_path / "sheets" / "s.png")
  with Image.open(tmp_path / "sheets" / "s.png") as sheet:
    pixels = np.asarray(sheet.convert("RGB"))
  assert pixels.shape[1] == 1000
  assert (pixels == 200).all(-1).sum() > 8 * 140 * 40  # eight grey images


def test_a_contact_sheet_has_captions_classes_and_bad_samples(shards, tmp_path, monkeypatch):
  drawn = []
  monkeypatch.setattr(inspect.pictures, "plot_tiles", lambda title, tiles, path: drawn.extend([title, *tiles]))
  source = open_source(guess(str(shards)))
  draw(source, *read_samples(source, 10), tmp_path / "s.png")
  title, *tiles = drawn
  assert title == f"{source.name}: 10 samples, 10 of them tried, 2 of these bad"
  texts = [(tile.name, tile.text) for tile in tiles if tile.picture is not None]
  assert texts[4:7] == [("", "one"), ("hot dog", ""), ("cat", "北京")]
  assert len(texts) == 8
  assert [tile.text.split(": ")[0] for tile in tiles if tile.picture is None] == ["s.tar:8", "s.tar:9"]


@pytest.mark.slow
def test_a_full_contact_sheet_is_drawn(tmp_path):
  source = open_scenes("test/30/16")
  draw(source, *read_samples(source, 30), tmp_path / "many.png")
  assert (tmp_path / "many.png").stat().st_size > 10_000


def touch(folder: Path, *names: str) -> None:
  for name in names:
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_text("[" if name == "list.json" else "{}")


@pytest.mark.parametrize(
  ("names", "path", "spec"),
  [
    (["a.tar"], "a.tar", "webdataset:a.tar"),
    (["a-0.tar", "a-1.tar"], "a-{0..1}.tar", "webdataset:a-{0..1}.tar"),
    (["0.tar", "1.tar", "0.parquet", "0_stats.json"], "", "webdataset:*.tar"),  # img2dataset
    (["data-00000-of-00001.array_record", "dataset.json", "classnames.txt"], "", "arrayrecord:*.array_record"),
    (["00000.tfrecord", "00000.parquet", "00000_stats.json"], "", "tfrecord:*.tfrecord"),  # img2dataset
    (["x.tfrecord-00000-of-00002", "x.tfrecord-00001-of-00002"], "", "tfrecord:*.tfrecord-*"),
    (["x.tfrecord-00000-of-00002"], "x.tfrecord-00000-of-00002", "tfrecord:x.tfrecord-00000-of-00002"),
    (["ABC.tfrec"], "ABC.tfrec", "tfrecord:ABC.tfrec"),  # Kaggle
    (["a/x.tfrecords", "b/x.tfrecords"], "", "tfrecord:*/*.tfrecords"),
    (["a.csv"], "a.csv", "table:a.csv"),
    (["a.tsv.gz"], "a.tsv.gz", "table:a.tsv.gz"),
    (["a.jsonl", "b.jsonl", "c.csv"], "", "table:*.jsonl"),
    (["a.parquet"], "*.parquet", "table:*.parquet"),
    (["captions.json"], "captions.json", "coco:captions.json"),
    (["list.json"], "list.json", "table:list.json"),
    (["captions.json", "README"], "", "coco:captions.json"),
    (["rows.json.gz"], "rows.json.gz", "table:rows.json.gz"),
    (["dog/1.JPG", "cat/2.png"], "", "folder:"),
    (["a/b/c/1.jpg", "a/b/captions.json"], "", "folder:"),
    (["1.webp", "notes.json"], "", "folder:"),
    (["1.jpg", "metadata.csv"], "", "table:*.csv"),
    (["a/1.avif"], "", "folder:"),
    (["a/1.ppm"], "", "folder:"),
  ],
)
def test_a_bare_path_is_recognised(tmp_path, names, path, spec):
  touch(tmp_path, *names)
  kind, _, location = spec.partition(":")
  expected = f"{kind}:{tmp_path}/{location}".rstrip("/")
  assert guess(f"{tmp_path}/{path}") == expected


LINES = "image,caption\n1.jpg,one\n2.jpg,two\n"
OBJECTS = '{"file_name": "1.jpg", "text": "one"}\n'


@pytest.mark.parametrize(
  ("files", "specs"),
  [
    ({"captions.txt": LINES, "README.txt": "x", "Images/2.jpg": ""}, ["table:@/captions.txt?root=@/Images"]),  # Kaggle
    ({"results.csv": LINES, "a/images/1.jpg": ""}, ["table:@/*.csv?root=@/a/images"]),
    (
      {"00000.parquet": "", "00000_stats.json": "{}", "00000/000.jpg": "", "00000/000.txt": "x", "00000/000.json": ""},
      ["folder:@"],  # img2dataset, format "files"
    ),
    ({"train/0.tar": "", "test/0.tar": "", "docs/x.md": ""}, ["webdataset:@/train/*.tar", "webdataset:@/test/*.tar"]),
    (
      {"test/nshards.txt": "1", "test/0.tar": "", "train/nshards.txt": "1", "train/0.tar": "", "classnames.txt": "a"},
      ["clip_benchmark:@?split=train", "clip_benchmark:@?split=test"],
    ),
    ({"part-0/0.tar": "", "part-1/0.tar": ""}, ["webdataset:@/*/*.tar"]),
    ({"a/b/0.tar": "", "c/0.tar": ""}, ["webdataset:@/**/*.tar"]),
    ({"[x]/a/0.tar": "", "[x]/b/c/0.tar": ""}, ["webdataset:@/**/*.tar"]),
    ({"shards/0.tar": ""}, ["webdataset:@/shards/*.tar"]),
    (
      {"toy-train-0.tar": "", "toy-train-1.tar": "", "toy-val-0.tar": "", "toy-0.tar": ""},
      ["webdataset:@/toy-train*.tar", "webdataset:@/toy-0.tar", "webdataset:@/toy-val*.tar"],
    ),
    ({"test.csv": LINES, "train.csv": LINES, "1.jpg": ""}, ["table:@/train*.csv", "table:@/test*.csv"]),
    (
      {f"{split}/{name}": text for split in ("val", "train") for name, text in [("m.jsonl", OBJECTS), ("1.jpg", "")]},
      ["table:@/train/*.jsonl", "table:@/val/*.jsonl"],
    ),
    ({"train/m.jsonl": OBJECTS.replace("1.jpg", "train/1.jpg"), "train/1.jpg": ""}, ["table:@/train/*.jsonl?root=@"]),
    ({"m.json": f"[{OBJECTS.replace('1', 'train/1')}]", "train/1.jpg": ""}, ["table:@/m.json"]),
    ({"val2017/cat/1.jpg": "", "train2017/cat/1.jpg": ""}, ["folder:@/train2017", "folder:@/val2017"]),
    ({"train/1.jpg": "", "bus/1.jpg": ""}, ["folder:@"]),  # classes
    ({"A.TAR": "", "B.TAR": ""}, ["webdataset:@/*.TAR"]),
    ({"A.TAR": "", "b.tar": ""}, ["webdataset:@/*.TAR::@/*.tar"]),
    ({"DATA.CSV": LINES, "1.JPG": ""}, ["table:@/*.CSV"]),
    (  # COCO
      {"annotations/captions_train2017.json": "{}", "annotations/captions_val2017.json": "{}"}
      | {"annotations/instances_val2017.json": "{}", "train2017/1.jpg": "", "val2017/2.jpg": ""},
      ["coco:@/annotations/captions_train2017.json", "coco:@/annotations/captions_val2017.json"],
    ),
    (
      {
        "annotations/captions_train2017.json": "{}",
        "annotations/captions_val2017.json": "{}",
        "images/val2017/2.jpg": "",
      },
      ["coco:@/annotations/captions_val2017.json"],
    ),
    ({"x/results.csv": LINES, "x/x/1.jpg": ""}, ["table:@/x/*.csv?root=@/x/x"]),  # Kaggle's Flickr30k
    ({"x/captions.txt": LINES, "x/Images/1.jpg": ""}, ["table:@/x/captions.txt?root=@/x/Images"]),
    ({"x/metadata.csv": LINES, "x/1.jpg": ""}, ["table:@/x/*.csv"]),
    ({"x/metadata.csv": LINES, "x/1.jpg": "", "y/1.jpg": ""}, ["folder:@"]),
    ({"labels.csv": "a,b\n1,2\n", "cat/1.jpg": "", "dog/2.jpg": ""}, ["folder:@"]),
    ({"labels.csv": "a,b\n1,2\n", "images/1.jpg": ""}, ["table:@/*.csv"]),  # which names the columns it has
    (
      {"data/train-0.parquet": "", "data/test-0.parquet": ""},
      ["table:@/data/train*.parquet", "table:@/data/test*.parquet"],
    ),
    (  # of the hub, converted to Parquet by its server
      {"default/train/0000.parquet": "", "default/train/0001.parquet": "", "default/test/0000.parquet": ""},
      ["table:@/default/train/*.parquet", "table:@/default/test/*.parquet"],
    ),
    (
      {"a/train-0.parquet": "", "b/train-0.parquet": "", "b/test-0.parquet": "", "README.md": ""},
      ["table:@/a/*.parquet::@/b/train*.parquet", "table:@/b/test*.parquet"],
    ),
  ],
)
def test_a_folder_is_recognised(tmp_path, files, specs):
  for name, text in files.items():
    (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / name).write_text(text)
  assert guesses(f"{tmp_path}/") == [spec.replace("@", str(tmp_path)) for spec in specs]


def test_a_repository_of_parquet_in_the_cache_of_the_hub(tmp_path):
  """Its files are links to those in blobs."""
  for commit in ("c0", "c1"):
    for split in ("test", "train"):
      rows = [{"image": {"bytes": bytes([number]), "path": None}, "text": f"{commit} {number}"} for number in range(3)]
      blob, link = f"blobs/{commit}{split}", tmp_path / f"snapshots/{commit}/data/{split}-00000-of-00001.parquet"
      touch(tmp_path, blob, f"snapshots/{commit}/README.md", f"snapshots/{commit}/data/x")
      link.with_name("x").unlink()
      pq.write_table(pa.Table.from_pylist(rows), tmp_path / blob)
      link.symlink_to(f"../../../{blob}")
  touch(tmp_path, "refs/x")
  with pytest.raises(ValueError, match="2 snapshots, none of the branch main; choose one: c0, c1"):
    guesses(str(tmp_path))
  (tmp_path / "refs" / "main").write_text("c1")
  data = f"{tmp_path}/snapshots/c1/data"
  specs = [f"table:{data}/{split}-00000-of*.parquet" for split in ("train", "test")]
  assert guesses(str(tmp_path)) == guesses(f"{tmp_path}/snapshots/c1") == specs
  assert [example["captions"] for example in open_source(specs[0])] == [(f"c1 {number}",) for number in range(3)]


@pytest.mark.parametrize(
  ("path", "spec"),
  [
    ("captions.txt?encoding=latin-1", "table:@/captions.txt?encoding=latin-1&root=@/Images"),
    ("captions.txt?root=other", "table:@/captions.txt?root=other"),
    ("?caption=", "table:@/captions.txt?caption=&root=@/Images"),
    ("a?b=c.csv", "table:@/a?b=c.csv"),  # a file
  ],
)
def test_options_that_a_message_advises_can_follow_a_plain_path(tmp_path, path, spec):
  touch(tmp_path, "Images/1.jpg", "a?b=c.csv")
  (tmp_path / "captions.txt").write_text(LINES)
  if path.startswith("?"):
    (tmp_path / "a?b=c.csv").unlink()
  assert guess(f"{tmp_path}/{path}") == spec.replace("@", str(tmp_path))


def test_a_folder_at_a_url_with_folders_of_splits(tmp_path):
  fsspec.filesystem("memory").pipe({"/splits/set/train/0.tar": b"", "/splits/set/test/0.tar": b""})
  memory = "webdataset:memory://splits/set"
  assert guesses("memory://splits/set") == [f"{memory}/train/*.tar", f"{memory}/test/*.tar"]


@pytest.mark.parametrize(("splits", "split"), [(["test", "train"], "train"), (["validation"], "validation")])
def test_a_tfds_folder_is_recognised(tmp_path, splits, split):
  touch(tmp_path, "toy-train.array_record-00000-of-00001", "features.json")
  (tmp_path / "dataset_info.json").write_text(json.dumps({"splits": [{"name": name} for name in splits]}))
  assert guess(str(tmp_path)) == f"tfds:{tmp_path}:{split}"
  assert guess(f"{tmp_path}/toy-train.array_record-00000-of-00001") == f"tfds:{tmp_path}:{split}"


def test_a_hugging_face_folder_is_recognised(tmp_path):
  touch(tmp_path, "train/state.json", "train/dataset_info.json", "train/data-00000-of-00001.arrow")
  assert guess(f"{tmp_path}/train/") == f"huggingface:{tmp_path}/train"
  (tmp_path / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
  assert guess(str(tmp_path)) == f"huggingface:{tmp_path}:train"


def test_evaluations_prefer_the_split_for_tests(tmp_path, capsys):
  (tmp_path / "dataset_dict.json").write_text('{"splits": ["validation", "train", "extra"]}')
  assert guesses(str(tmp_path)) == [f"huggingface:{tmp_path}:{split}" for split in ("train", "validation", "extra")]
  assert guess_test(str(tmp_path)) == f"huggingface:{tmp_path}:validation"
  (tmp_path / "dataset_dict.json").unlink()
  touch(tmp_path, "train-0.tar", "test-0.tar")
  spec = f"webdataset:{tmp_path}/test*.tar"
  assert (guess_test(str(tmp_path)), guess_test(spec), capsys.readouterr().err) == (spec, spec, "")
  assert read_as(str(tmp_path), "--zero_shot", guess_test) == read_as(spec, "--zero_shot", guess_test) == spec
  assert capsys.readouterr().err == f"--zero_shot {tmp_path} is read as {spec}\n"


@pytest.mark.parametrize(
  ("spec", "name"),
  [
    ("folder:/data/pets/test", "pets/test"),
    ("folder:/data/pets/", "pets"),
    ("table:/data/pairs.csv?root=/data/images", "pairs"),
    ("webdataset:/data/cc3m/test-{0000..0009}.tar", "cc3m/test"),
    ("webdataset:/data/flickr8k/*.tar::/data/more/*.tar", "flickr8k"),
    ("clip_benchmark:/data/wds_vtab-pets?split=test", "wds_vtab-pets"),
    ("heldout:10%,5000:table:gs://bucket/pairs.v2.parquet", "heldout/pairs"),
    ("tfds:food101:validation", "tfds:food101:validation"),
    ("scenes:heldout/40/24", "scenes:heldout/40/24"),
  ],
)
def test_the_name_of_data(spec, name):
  assert short_name(spec) == name


def test_a_spec_and_a_url():
  assert guess("scenes:test/10") == "scenes:test/10"
  assert guess("heldout:1%:webdataset:/x/*.tar") == "heldout:1%:webdataset:/x/*.tar"
  fsspec.filesystem("memory").pipe("/bucket/data/s.tar", b"")
  assert guess("memory://bucket/data/*.tar") == "webdataset:memory://bucket/data/*.tar"
  assert guess("memory://bucket/data/") == guess("memory://bucket/data") == "webdataset:memory://bucket/data/*.tar"
  fsspec.filesystem("memory").pipe("/bucket/images/1.jpg", b"")
  assert guess("memory://bucket/images") == "folder:memory://bucket/images"
  fsspec.filesystem("memory").pipe("/bucket/other/a.bin", b"")
  with pytest.raises(ValueError, match=r"memory://bucket/other: .*1 \.bin"):
    guess("memory://bucket/other")
  with pytest.raises(FileNotFoundError, match="no file matches memory://bucket/nowhere"):
    guess("memory://bucket/nowhere")


def test_the_query_of_a_web_address_does_not_hide_its_suffix(monkeypatch):
  monkeypatch.setattr("declip_jax.data.storage.patterns.expand", lambda location: [location])
  url = "https://hub.example/data/train.parquet?download=true"
  assert guess(url) == f"table:{url}"


def test_a_file_url_is_a_local_path(tmp_path):
  touch(tmp_path, "a.tar")
  assert guess(f"file://{tmp_path}") == f"webdataset:{tmp_path}/*.tar"
  assert guess(f"file://{tmp_path}/a.tar") == f"webdataset:file://{tmp_path}/a.tar"


def test_a_folder_with_brackets(tmp_path):
  touch(tmp_path, "[x]/a.tar")
  spec = guess(f"{tmp_path}/[x]")
  assert spec == f"webdataset:{tmp_path}/[x]/*.tar"
  assert guess(spec.partition(":")[2]) == spec
  touch(tmp_path, "{y}/a/0.tar", "{y}/b/0.tar")
  assert guess(f"{tmp_path}/{{y}}") == f"webdataset:{tmp_path}/{{y}}/a/*.tar::{tmp_path}/{{y}}/b/*.tar"


def test_an_unknown_kind_is_reported_with_the_known_ones(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  touch(tmp_path, "semi.csv", "odd:name.csv")
  with pytest.raises(ValueError, match=r"tabel:semi\.csv: 'tabel' is not a kind of source; .*scenes, .*table"):
    guess("tabel:semi.csv")
  assert guess("odd:name.csv") == "table:odd:name.csv"


@pytest.mark.parametrize(
  ("names", "path", "message"),
  [
    ([], "x.json", "no file matches .*x.json; in .*: nothing"),
    ([], "", "found nothing; give KIND:LOCATION, where KIND is one of scenes"),
    (["a.bin", "b.bin", "c", "d/e.txt"], "", "found 2 .bin, 1 no suffix, 1 folders; give"),
    (["a.tar", "b.csv"], "*", "found 1 .tar, 1 .csv"),
    (["a.jpg"], "a.jpg", "found 1 .jpg"),
    (["a.HEIC", "b.jxl"], "", r"found 1 .HEIC, 1 .jxl; .HEIC, .jxl is not read: convert these images"),
    (["a.tar.gz"], "a.tar.gz", "found 1 .gz"),
    (["dataset_info.json"], "", "dataset_info.json lists no splits"),
  ],
)
def test_an_unrecognised_path_is_an_error_of_one_line(tmp_path, names, path, message):
  touch(tmp_path, *names)
  with pytest.raises((ValueError, FileNotFoundError), match=message) as error:
    guess(f"{tmp_path}/{path}")
  assert "\n" not in str(error.value)


def test_a_compressed_table_is_unpacked_first(tmp_path):
  touch(tmp_path, "captions.csv.zip")
  with pytest.raises(ValueError, match=r"captions\.csv\.zip: expected a table, .*; unpack it first"):
    open_source(guess(f"{tmp_path}/captions.csv.zip"))


def test_the_format_of_a_png_with_a_large_text_is_known(tmp_path):
  about = PngInfo()
  about.add_text("Comment", "x" * 2**21, zip=True)
  Image.new("RGB", (8, 8)).save(tmp_path / "0.png", pnginfo=about)
  assert re.search("images +1 PNG", described(tmp_path))


def test_bad_samples_do_not_stop_it(tmp_path):
  with tarfile.open(tmp_path / "s.tar", "w") as tar:
    tar.addfile(tarfile.TarInfo("0.jpg"))
  assert "1 of 1 (100.0%)" in described(tmp_path / "s.tar")
  source = open_source(guess(f"{tmp_path}/s.tar"))
  with pytest.raises(ValueError, match=r"s\.tar has no good sample"):
    draw(source, *read_samples(source, 10), tmp_path / "s.png")


@pytest.mark.parametrize("images", [[b""], [b"", encoded(9, 9, "PNG")]])
def test_the_command_fails_if_every_sample_is_bad(tmp_path, monkeypatch, capsys, images):
  monkeypatch.setattr(inspect.flags, "FLAGS", SimpleNamespace(samples=10, sheet=None, max_pixels=image_ops.MAX_PIXELS))
  for number, image in enumerate(images):
    (tmp_path / f"{number}.png").write_bytes(image)
  with (
    pytest.raises(ValueError, match=r"no usable sample among 1 tried; the first: 0\.png: ")
    if len(images) == 1
    else (contextlib.nullcontext())
  ):
    inspect._command([str(tmp_path)])
  assert f"1 of {len(images)} (" in capsys.readouterr().out


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
  command = [sys.executable, "-m", "declip_jax.data.inspect", *arguments]
  return subprocess.run(command, capture_output=True, text=True, check=False)


def test_the_command(shards):
  done = run(str(shards), "--samples=5")
  assert (done.returncode, done.stderr) == (0, "")
  assert done.stdout.startswith(f"webdataset:{shards}/*.tar\n")
  assert done.stdout.endswith(f"{inspect.training_command(str(shards))}\n")
  done = run(str(shards), "--samples=0")
  assert (done.returncode, done.stdout) == (2, "")
  assert "samples=0" in done.stderr
  assert len(done.stderr.splitlines()) == 1


@pytest.mark.slow
def test_the_command_ends_with_one_line_and_exit_code_2(tmp_path):
  for arguments in ([], [str(tmp_path)], [str(tmp_path), "more"]):
    done = run(*arguments)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr.startswith("error: ")
    assert len(done.stderr.splitlines()) == 1


def test_more_bad_samples_than_training_accepts_are_named(shards):
  assert "training stops if more than 5% are bad" in described(shards / "s.tar")
