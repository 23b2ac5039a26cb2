"""Tests of the layout of CLIP_benchmark, with shards as its webdataset_builder.py writes them."""

import io
import json
import logging
import os
from pathlib import Path
import pickle
import tarfile

import fsspec
import numpy as np
import pytest

from declip_jax.data import sources
from declip_jax.data.guess import guesses
from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.clip_benchmark import open_clip_benchmark
from declip_jax.data.sources.webdataset import open_webdataset
from declip_jax.data.storage import remote


def npy(values: list[float], dtype: type = np.float32) -> bytes:
  file = io.BytesIO()
  np.save(file, np.array(values, dtype))
  return file.getvalue()


def tar(samples: list[dict[str, bytes]]) -> bytes:
  file = io.BytesIO()
  with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as archive:
    for index, fields in enumerate(samples):
      for suffix, contents in fields.items():
        info = tarfile.TarInfo(f"s{index:07d}.{suffix}")
        info.size = len(contents)
        archive.addfile(info, io.BytesIO(contents))
  return file.getvalue()


def write(root: str, shards: list[list[dict[str, bytes]]], split: str = "test", **texts: str) -> str:
  """Writes a data set to a path or URL; `texts` are the files of its root, without .txt."""
  contents = {f"{split}/{number}.tar": tar(shard) for number, shard in enumerate(shards)}
  contents |= {f"{split}/nshards.txt": f"{len(shards)}\n".encode()}
  contents |= {f"{name}.txt": text.encode() for name, text in texts.items()}
  for name, data in contents.items():
    with fsspec.open(f"{root}/{name}", "wb", auto_mkdir=True) as file:
      file.write(data)
  return root


@pytest.fixture(params=["path", "url"])
def root(request, tmp_path: Path) -> str:
  return str(tmp_path / "set") if request.param == "path" else f"memory://clip_benchmark/{tmp_path.name}"


def test_classification(root: str, monkeypatch: pytest.MonkeyPatch):
  shards = [[{"cls": b"1", "webp": b"one"}, {"cls": b"0", "webp": b"two"}], [{"cls": b"2", "png": b"three"}]]
  names = {
    "classnames": "cat\n\ndog\n",
    "zeroshot_classification_templates": "a {c}.\nthe {c}\n",
  }
  write(root, shards, **names)
  monkeypatch.setattr(remote, "listing", lambda *given: pytest.fail("a server need not list its files"))
  source = sources.open_source(f"clip_benchmark:{root}?split=test")
  assert isinstance(source, sources.Source)
  assert [(example["image"], example["label"]) for example in source] == [(b"one", 1), (b"two", 0), (b"three", 2)]
  assert source.classnames == ("cat", "", "dog")
  assert source.templates == ("a {}.", "the {}")
  assert "labels" not in source[0]
  assert "groups" not in source[0]
  again = pickle.loads(pickle.dumps(source))
  assert again[2] == source[2]
  assert again.templates == source.templates
  assert len(pickle.dumps(source)) < 1000


def test_more_than_ten_shards_are_in_the_order_of_their_numbers(tmp_path: Path):
  shards = [[{"cls": str(number).encode(), "jpg": b"x"}] for number in range(11)]
  source = open_clip_benchmark(write(str(tmp_path), shards, split="train") + "?split=train")
  assert [example["label"] for example in source] == [*range(11)]


def test_several_labels(root: str):
  shards = [[{"jpg": b"x", "npy": npy([1, 0, 1])}, {"jpg": b"y", "npy": npy([0, 0, 1], np.int64)}]]
  source = open_clip_benchmark(write(root, shards, classnames="a\nb\nc\n", dataset_type="multilabel\n"))
  assert [example["labels"].tolist() for example in source] == [[1, -1, 1], [-1, -1, 1]]
  assert source[0]["labels"].dtype == np.int8
  assert source[0]["label"] == -1


def test_names_that_fit_no_sample_are_an_error_of_the_whole_source(tmp_path: Path):
  shards = [[{"jpg": b"x", "npy": npy([1, 0, 1])}, {"jpg": b"y", "npy": npy([0, 0, 1])}]]
  root = write(str(tmp_path), shards, classnames="a\nb\n", dataset_type="multilabel")
  with pytest.raises(ValueError, match=r"labels for 3 classes, but classnames.txt has 2 names"):
    open_clip_benchmark(root)
  (tmp_path / "classnames.txt").write_text("a\nb\nc\n")
  assert open_clip_benchmark(root)[0]["labels"].tolist() == [1, -1, 1]


def test_captions(root: str):
  text = "first\\nwith a break\nsecond\nthird\n"
  shards = [[{"jpg": b"x", "txt": text.encode()}]]
  source = open_clip_benchmark(write(root, shards, dataset_type="retrieval\n", classnames="not used\n"))
  assert source[0]["captions"] == ("first with a break", "second", "third")
  assert source.classnames == ()
  assert source.templates == ()


def test_groups(root: str, caplog):
  shards = [[{"cls": b"0", "npy": npy([3, 7, 0], np.int64), "jpg": b"x"}]]
  write(root, shards, classnames="a\n")
  assert open_clip_benchmark(f"{root}?group=region,year")[0]["groups"] == {"region": 3, "year": 7}
  with caplog.at_level(logging.WARNING):
    assert "groups" not in open_clip_benchmark(root)[0]
  assert "&group=" in caplog.text
  with pytest.raises(BadSample, match="whole numbers for a, b, c, d"):
    open_clip_benchmark(f"{root}?group=a,b,c,d")[0]


def test_bad_samples(tmp_path: Path):
  bad = [npy([1, 0]), npy([1, 2, 0]), npy([np.nan, 0, 0]), b"no numpy", npy([1, 0, 1])[:-1]]
  objects = io.BytesIO()
  np.save(objects, np.array([os.getcwd, 1, 2], object), allow_pickle=True)
  bad += [objects.getvalue(), npy([1, 0, 1]).replace(b"(3,)", b"(9" + b"9" * 30 + b",)"), npy([1]).replace(b"(", b"{")]
  shards = [[{"jpg": b"x", "npy": data} for data in bad] + [{"jpg": b"x"}]]
  source = open_clip_benchmark(write(str(tmp_path), shards, classnames="a\nb\nc", dataset_type="multilabel"))
  for index in range(len(source)):
    with pytest.raises(BadSample, match="npy"):
      source[index]
  write(str(tmp_path / "single"), [[{"jpg": b"x", "txt": b"caption"}]])
  with pytest.raises(BadSample, match=r"no \.cls"):
    open_clip_benchmark(str(tmp_path / "single"))[0]


def test_wrong_layouts(tmp_path: Path):
  root = write(str(tmp_path), [[{"cls": b"0", "jpg": b"x"}]])
  with pytest.raises(FileNotFoundError, match=r"train/nshards\.txt"):
    open_clip_benchmark(f"{root}?split=train")
  with pytest.raises(ValueError, match="splt"):
    open_clip_benchmark(f"{root}?splt=test")
  (tmp_path / "dataset_type.txt").write_text("retrieval")
  with pytest.raises(ValueError, match="group=region.*retrieval"):
    open_clip_benchmark(f"{root}?group=region")
  (tmp_path / "dataset_type.txt").write_text("segmentation")
  with pytest.raises(ValueError, match=r"dataset_type\.txt: 'segmentation'.*classification, multilabel, retrieval"):
    open_clip_benchmark(root)
  (tmp_path / "dataset_type.txt").unlink()
  (tmp_path / "test/nshards.txt").write_text("two")
  with pytest.raises(ValueError, match=r"nshards\.txt: 'two'"):
    open_clip_benchmark(root)
  for number in ("0", "-1", "100001", "20000000", "9" * 5000):
    (tmp_path / "test/nshards.txt").write_text(number)
    with pytest.raises(ValueError, match=rf"nshards\.txt: '{number[:50]}.*at most 100,000"):
      open_clip_benchmark(root)
  (tmp_path / "test/nshards.txt").write_text("2")
  with pytest.raises(FileNotFoundError, match=r"1\.tar"):
    open_clip_benchmark(root)
  write(str(tmp_path), [[{"cls": b"1", "jpg": b"x"}, {"cls": b"2", "jpg": b"x"}]], classnames="a\nb")
  with pytest.raises(ValueError, match="1 to 2"):
    open_clip_benchmark(root)


def test_pages_of_the_hub_are_their_files(monkeypatch):
  from declip_jax.data.sources import clip_benchmark

  hub = "https://huggingface.co/datasets/clip-benchmark/wds_vtab-pets"
  for place in (hub, f"{hub}/tree/main", f"{hub}/resolve/main"):
    assert clip_benchmark._files_of(place) == f"{hub}/resolve/main"
  assert clip_benchmark._files_of("https://example.org/a/tree/main") == "https://example.org/a/tree/main"


def test_stamp_changes_with_what_is_read(tmp_path: Path):
  root = write(str(tmp_path), [[{"cls": b"0", "npy": npy([1]), "jpg": b"x"}]], classnames="a")
  single = open_clip_benchmark(root)
  assert single.stamp == open_clip_benchmark(root).stamp != open_clip_benchmark(f"{root}?group=g").stamp
  (tmp_path / "classnames.txt").write_text("b")
  assert open_clip_benchmark(root).stamp != single.stamp
  (tmp_path / "dataset_type.txt").write_text("multilabel")
  assert open_clip_benchmark(root).stamp != single.stamp


def test_webdataset_names_this_source_for_what_it_does_not_read(tmp_path: Path, caplog):
  root = write(str(tmp_path), [[{"jpg": b"x", "npy": npy([1, 0])}]], dataset_type="multilabel")
  with caplog.at_level(logging.WARNING):
    open_webdataset(f"{root}/test/0.tar")
  assert f"clip_benchmark:{root}?split=test" in caplog.text


def test_folders_are_recognised(tmp_path: Path, monkeypatch):
  names = {"classnames": "a", "zeroshot_classification_templates": "{c}"}
  root = write(str(tmp_path / "set"), [[{"cls": b"0", "jpg": b"x"}]], **names)
  write(root, [[{"cls": b"0", "jpg": b"x"}]], split="train")
  assert guesses(root) == [f"clip_benchmark:{root}?split=train", f"clip_benchmark:{root}?split=test"]
  monkeypatch.chdir(f"{root}/test")
  assert guesses(".") == [f"clip_benchmark:{root}?split=test"]
  assert json.loads(json.dumps(guesses(f"{root}/test/"))) == [f"clip_benchmark:{root}?split=test"]
