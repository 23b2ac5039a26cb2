import io
import json
from pathlib import Path
import tarfile

import fsspec
import numpy as np
from PIL import Image
import pytest

from declip_jax.data import inspect
from declip_jax.data.inspect import guess, look, main
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


def test_what_is_there_is_told(shards, capsys):
  assert main([str(shards / "s.tar")]) == 0
  lines = capsys.readouterr().out.splitlines()
  told = {line[:13].strip(): line[13:] for line in lines[1:]}
  assert lines[0] == f"webdataset:{shards}/s.tar"
  assert told["samples"] == "10, of which 10 were looked at"
  assert told["fields"] == "image, captions (75.0%), label (25.0%)"
  assert told["images"] == "7 JPEG, 1 PNG"
  assert told["width"] == "40 to 100, median 44"  # of 40 to 46 and 100: 43.5
  assert told["height"] == "20 to 300, median 20"
  assert told["captions"] == "0 to 5, median 1 a sample"
  assert told["characters"] == "2 to 319, median 5"  # of 2 3 3 4 5 5 5 5 5 319
  assert told["tokens"].startswith("3 to 82, median ")
  assert "10.0% of the captions have more than 77" in told["tokens"]
  assert told["classes"] == "2 names: cat, hot dog"
  assert told["seen"] == "2, 1 to 1, median 1 times each"
  assert told["bad"] == "2 of 10 (20.0%)"
  assert any("s.tar:8: " in line for line in lines)
  assert any("s.tar:9: " in line for line in lines)


def test_the_samples_are_drawn_at_random_but_always_the_same():
  source = open_scenes("test/1000/16")
  indices = [sample.index for sample in look(source, 50)[0]]
  assert indices == [sample.index for sample in look(source, 50)[0]]
  assert len(set(indices)) == 50
  assert 300 < np.mean(indices) < 700
  assert [sample.index for sample in look(source, 2000)[0]] == list(range(1000))


def test_a_contact_sheet_is_drawn(shards, tmp_path, capsys):
  assert main([str(shards), "--sheet", str(tmp_path / "sheets" / "s.png"), "--samples", "10"]) == 0
  with Image.open(tmp_path / "sheets" / "s.png") as sheet:
    pixels = np.asarray(sheet.convert("RGB"))
  assert pixels.shape[1] > 6 * 224
  assert (pixels == 200).all(-1).sum() > 8 * 200 * 70  # eight grey pictures
  assert main(["scenes:test/30/16", "--sheet", str(tmp_path / "many.png")]) == 0
  assert "many.png" in capsys.readouterr().out


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


@pytest.mark.parametrize(("splits", "split"), [(["test", "train"], "train"), (["validation"], "validation")])
def test_a_folder_of_tfds_is_recognised(tmp_path, splits, split):
  touch(tmp_path, "toy-train.array_record-00000-of-00001", "features.json")
  (tmp_path / "dataset_info.json").write_text(json.dumps({"splits": [{"name": name} for name in splits]}))
  assert guess(str(tmp_path)) == f"tfds:{tmp_path}:{split}"
  assert guess(f"{tmp_path}/toy-train.array_record-00000-of-00001") == f"tfds:{tmp_path}:{split}"


def test_a_folder_of_hugging_face_is_recognised(tmp_path):
  touch(tmp_path, "train/state.json", "train/dataset_info.json", "train/data-00000-of-00001.arrow")
  assert guess(f"{tmp_path}/train/") == f"huggingface:{tmp_path}/train"
  (tmp_path / "dataset_dict.json").write_text('{"splits": ["test", "train"]}')
  assert guess(str(tmp_path)) == f"huggingface:{tmp_path}:train"


def test_a_spec_and_a_url():
  assert guess("scenes:test/10") == "scenes:test/10"
  assert guess("heldout:1%:webdataset:/x/*.tar") == "heldout:1%:webdataset:/x/*.tar"
  fsspec.filesystem("memory").pipe("/bucket/data/s.tar", b"")
  assert guess("memory://bucket/data/*.tar") == "webdataset:memory://bucket/data/*.tar"
  assert guess("memory://bucket/data/") == guess("memory://bucket/data") == "webdataset:memory://bucket/data/*.tar"
  fsspec.filesystem("memory").pipe("/bucket/images/1.jpg", b"")
  assert guess("memory://bucket/images") == "folder:memory://bucket/images"
  fsspec.filesystem("memory").pipe("/bucket/other/a.bin", b"")
  with pytest.raises(ValueError, match=r"memory://bucket/other: no data set is recognised, there is 1 \.bin"):
    guess("memory://bucket/other")
  with pytest.raises(FileNotFoundError, match="no file matches memory://bucket/nowhere"):
    guess("memory://bucket/nowhere")


def test_a_file_url_is_a_local_path(tmp_path):
  touch(tmp_path, "a.tar")
  assert guess(f"file://{tmp_path}") == f"webdataset:{tmp_path}/*.tar"
  assert guess(f"file://{tmp_path}/a.tar") == f"webdataset:file://{tmp_path}/a.tar"


def test_a_folder_with_brackets(tmp_path):
  touch(tmp_path, "[x]/a.tar")
  spec = guess(f"{tmp_path}/[x]")
  assert spec == f"webdataset:{tmp_path}/[x]/*.tar"
  assert guess(spec.partition(":")[2]) == spec


def test_an_unknown_kind_is_told_with_the_known_ones(tmp_path, monkeypatch):
  monkeypatch.chdir(tmp_path)
  touch(tmp_path, "semi.csv", "odd:name.csv")
  with pytest.raises(ValueError, match=r"tabel:semi\.csv: no kind 'tabel' of source .*kinds are scenes, .*table"):
    guess("tabel:semi.csv")
  assert guess("odd:name.csv") == "table:odd:name.csv"


def test_an_interrupt_is_one_line(monkeypatch, capsys):
  def interrupted(*_):
    raise KeyboardInterrupt

  monkeypatch.setattr(inspect, "look", interrupted)
  assert main(["scenes:test/10"]) == 130
  assert capsys.readouterr().err == "interrupted\n"


@pytest.mark.parametrize(
  ("names", "path", "message"),
  [
    ([], "x.tar", "no file matches .*x.tar; in .*: nothing"),
    ([], "", "no data set is recognised, there is nothing; give KIND:LOCATION, where KIND is one of scenes"),
    (["a.bin", "b.bin", "c", "d/e.txt"], "", "there is 2 .bin, 1 no suffix, 1 folders; give"),
    (["a.tar", "b.csv"], "*", "no data set is recognised, there is 1 .tar, 1 .csv"),
    (["a.jpg"], "a.jpg", "there is 1 .jpg"),
    (["a.tar.gz"], "a.tar.gz", "there is 1 .gz"),
    (["dataset_info.json"], "", "dataset_info.json is of no prepared data set"),
  ],
)
def test_what_is_not_recognised_is_told_in_one_line(tmp_path, capsys, names, path, message):
  touch(tmp_path, *names)
  with pytest.raises((ValueError, FileNotFoundError), match=message):
    guess(f"{tmp_path}/{path}")
  assert main([f"{tmp_path}/{path}"]) == 1
  printed = capsys.readouterr()
  assert printed.out == ""
  assert printed.err.startswith("error: ")
  assert printed.err.count("\n") == 1


def test_bad_arguments(capsys):
  with pytest.raises(SystemExit, match="2"):
    main(["scenes:test/10", "--samples=0"])
  assert "--samples=0: expected at least 1" in capsys.readouterr().err


def test_bad_samples_do_not_stop_it(tmp_path, capsys):
  with tarfile.open(tmp_path / "s.tar", "w") as tar:
    tar.addfile(tarfile.TarInfo("0.jpg"))
  assert main([f"{tmp_path}/s.tar"]) == 0
  assert "1 of 1 (100.0%)" in capsys.readouterr().out
  assert main([f"{tmp_path}/s.tar", f"--sheet={tmp_path}/s.png"]) == 1
  assert "no sample to draw" in capsys.readouterr().err
