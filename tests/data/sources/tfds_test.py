from collections.abc import Iterable
import io
import json
import os
from pathlib import Path
import pickle
import shutil
import subprocess
import sys
from typing import Any

import fsspec
import numpy as np
from PIL import Image
import pytest
import tensorflow_datasets as tfds
from tensorflow_datasets.core import file_adapters
import tf_files

from declip_jax.data import sources
from declip_jax.data.sources.tfds import open_tfds
from declip_jax.data.storage import files

COUNT = 6
MODULE = "tiny"  # TFDS needs importlib_resources, which it does not declare, to prepare what a package's module defines


def png(index: int) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (5, 4), (index, 0, 0)).save(file, "PNG")
  return file.getvalue()


class Tiny(tfds.core.GeneratorBasedBuilder):
  """Six records whose index follows from any of their features."""

  __module__ = MODULE
  VERSION = tfds.core.Version("1.0.0")
  FEATURES = {
    "image": tfds.features.Image(shape=(None, None, 3)),
    "caption": tfds.features.Text(),
    "file_name": tfds.features.Text(),
    "label": tfds.features.ClassLabel(names=["cat", "dog"]),
  }

  def _info(self) -> tfds.core.DatasetInfo:
    return tfds.core.DatasetInfo(builder=self, features=tfds.features.FeaturesDict(dict(self.FEATURES)))

  def _split_generators(self, dl_manager):
    return {"train": self._generate_examples()}

  def _generate_examples(self):
    for i in range(COUNT):
      texts = [f"text {i}.{j}" for j in range(i)]
      values = {
        "image": io.BytesIO(png(i)),
        "picture": io.BytesIO(png(i)),
        "second": io.BytesIO(png(0)),
        "caption": f"  caption {i} é\n",
        "captions": ["", *texts],
        "title": f"title {i}",
        "comments": [{"text": text, "likes": 0} for text in texts],
        "file_name": f"{i}.png",
        "label": i % 2,
        "coarse": 0,
        "objects": [{"size": 0, "pixel_coords": np.array([0, 0, 8.2 + i], np.float32)} for _ in range(3 + i)],
        "labels": [0, 1],
        "labels_no_difficult": [i % 2],
        "label_x_position": 5 * i,
        "region": i,
      }
      yield i, {name: values[name] for name in self.FEATURES}


class Captions(Tiny):
  __module__ = MODULE
  FEATURES = {"picture": Tiny.FEATURES["image"], "captions": tfds.features.Sequence(tfds.features.Text())}


class Strings(Tiny):
  """Captions as COCO's data set declares them in TFDS, and other strings."""

  __module__ = MODULE
  FEATURES = {
    "image": Tiny.FEATURES["image"],
    "captions": tfds.features.Sequence(np.str_),
    "title": np.str_,
    "comments": tfds.features.Sequence({"text": np.str_, "likes": np.int64}),
  }


class Unclear(Tiny):
  __module__ = MODULE
  FEATURES = {
    "image": tfds.features.Image(),
    "second": tfds.features.Image(),
    "title": tfds.features.Text(),
    "comments": tfds.features.Sequence({"text": tfds.features.Text(), "likes": np.int64}),
    "coarse": tfds.features.ClassLabel(num_classes=2),
  }


class Wordless(Tiny):
  __module__ = MODULE
  FEATURES = {"image": tfds.features.Image(), "file_name": tfds.features.Text()}


class Objects(Tiny):
  __module__ = MODULE
  FEATURES = {
    "image": tfds.features.Image(),
    "objects": tfds.features.Sequence(
      {
        "size": tfds.features.ClassLabel(names=["small", "large"]),
        "pixel_coords": tfds.features.Tensor(shape=(3,), dtype=np.float32),
      }
    ),
    "labels": tfds.features.Sequence(tfds.features.ClassLabel(names=["cat", "dog"])),
    "labels_no_difficult": tfds.features.Sequence(tfds.features.ClassLabel(names=["cat", "dog"])),
    "label_x_position": tfds.features.ClassLabel(num_classes=32),
    "region": np.int64,
  }


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> dict[str, str]:
  """The prepared folder of each data set above."""
  root = tmp_path_factory.mktemp("tfds")
  builders = {cls.__name__: cls(data_dir=root) for cls in (Tiny, Captions, Strings, Unclear, Wordless, Objects)}
  for builder in builders.values():
    builder.download_and_prepare(file_format="array_record")
  return {name: str(builder.data_dir) for name, builder in builders.items()}


def records(source: sources.Source) -> dict[bytes, sources.Example]:
  """By image, since TFDS shuffles when it writes."""
  return {example["image"]: example for example in map(source.__getitem__, range(len(source)))}


def test_image_caption_and_label(folders):
  source = sources.open_source(f"tfds:{folders['Tiny']}:train")
  assert (len(source), source.classnames, source.skipped) == (COUNT, ("cat", "dog"), {})
  assert source[2]["id"] == "tiny/1.0.0/train:2"
  found = records(source)
  for i in range(COUNT):
    assert found[png(i)]["captions"] == (f"caption {i} é",)
    assert found[png(i)]["label"] == i % 2


def test_sequence_of_captions_without_label(folders):
  source = open_tfds(f"{folders['Captions']}:train")
  found = records(source)
  assert source.classnames == ()
  assert found[png(0)]["captions"] == ()
  assert found[png(3)]["captions"] == ("text 3.0", "text 3.1", "text 3.2")
  assert found[png(3)]["label"] == -1


def test_captions_that_are_plain_strings(folders):
  folder = folders["Strings"]
  with pytest.raises(ValueError, match=r"could be any of \['captions', 'comments/text', 'title'\]"):
    open_tfds(f"{folder}:train")
  for key in ("captions", "comments/text"):
    found = records(open_tfds(f"{folder}:train?caption={key}"))
    assert {image: example["captions"] for image, example in found.items()} == {
      png(i): tuple(f"text {i}.{j}" for j in range(i)) for i in range(COUNT)
    }
  found = records(open_tfds(f"{folder}:train?caption=title"))
  assert [found[png(i)]["captions"] for i in range(COUNT)] == [(f"title {i}",) for i in range(COUNT)]


def write_tfrecord(cls: type, path: os.PathLike[str], iterator: Iterable[tuple[Any, bytes]]) -> None:
  """In place of TFDS's writer, which needs TensorFlow."""
  tf_files.write(Path(path), [example for _, example in iterator])


@pytest.fixture(scope="module")
def several(tmp_path_factory) -> Path:
  """Data sets of three files, in each format."""
  root = tmp_path_factory.mktemp("several")
  config = tfds.download.DownloadConfig(num_shards=3)
  with pytest.MonkeyPatch.context() as patch:
    patch.setattr(file_adapters.TfRecordFileAdapter, "write_examples", classmethod(write_tfrecord))
    for kind in ("tfrecord", "array_record"):
      Several(data_dir=root / kind).download_and_prepare(file_format=kind, download_config=config)
  return root


@pytest.mark.parametrize("split", ["train", "train[2:-1]", "train[5:]+train[:3]"])
def test_files_of_tfds_default_format(several, split):
  expected = open_tfds(f"{several}/array_record/several/1.0.0:{split}")
  source = open_tfds(f"{several}/tfrecord/several/1.0.0:{split}")
  assert len(list(Path(f"{several}/tfrecord/several/1.0.0").glob("*.tfrecord-*"))) == 3
  assert list(source) == list(expected)
  assert source.classnames == ("cat", "dog")
  pickled = pickle.dumps(source)
  assert len(pickled) < 1000
  assert pickle.loads(pickled)[1] == expected[1]


def test_damage_of_tfrecord_files_loses_only_its_records(several, tmp_path):
  folder = shutil.copytree(f"{several}/tfrecord/several/1.0.0", tmp_path / "several" / "1.0.0")
  shutil.rmtree(folder / ".declip_jax", ignore_errors=True)
  expected = list(open_tfds(f"{folder}:train"))
  first, second, _ = sorted(folder.glob("*.tfrecord-*"))
  flipped = bytearray(first.read_bytes())
  flipped[100] ^= 1
  first.write_bytes(flipped)
  second.write_bytes(second.read_bytes()[:-1])
  source, bad = open_tfds(f"{folder}:train"), {}
  for index, example in enumerate(expected):
    try:
      assert source[index] == example
    except sources.BadSample as error:
      bad[index] = error
  assert {index: error.kind for index, error in bad.items()} == {0: "damaged record", 11: "damaged record"}
  assert all(f":train: record {index}: " in str(error) for index, error in bad.items())


def test_tfrecord_files_at_urls_are_read_in_ranges(several, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  folder = f"{several}/tfrecord/several/1.0.0"
  upload(folder, "memory://tfds/several")
  local, remote = open_tfds(f"{folder}:train"), open_tfds("memory://tfds/several:train")
  assert list(remote) == list(local)
  assert not [*tmp_path.glob("**/copies/**/*.tfrecord*")]


def test_subsets_of_splits(folders):
  where = folders["Tiny"]
  whole = [example["image"] for example in open_tfds(f"{where}:train")]
  assert [example["image"] for example in open_tfds(f"{where}:train[1:3]")] == whole[1:3]
  assert [example["image"] for example in open_tfds(f"{where}:train[50%:]+train[:2]")] == whole[3:] + whole[:2]
  with pytest.raises(ValueError, match=r"'test'.*\['train'\]"):
    open_tfds(f"{where}:test")


def test_a_choice_that_is_not_clear_is_an_error_that_names_it(folders):
  where = folders["Unclear"]
  with pytest.raises(ValueError, match=r"could be any of \['comments/text', 'title'\].*\?caption=comments/text"):
    open_tfds(f"{where}:train")
  with pytest.raises(ValueError, match=r"no caption 'coarse', choose from \['comments/text', 'title'\]"):
    open_tfds(f"{where}:train?caption=coarse")
  found = records(open_tfds(f"{where}:train?caption=comments/text&image=image"))
  assert found[png(2)]["captions"] == ("text 2.0", "text 2.1")
  (example, *_) = open_tfds(f"{where}:train?caption=title&image=second")
  assert example["image"] == png(0)


def test_derived_labels_and_groups(folders):
  where = folders["Objects"]
  source = open_tfds(f"{where}:train?label=clevr/count_all&group=region,label_x_position")
  found = records(pickle.loads(pickle.dumps(source)))
  assert source.classnames == ("3", "4", "5", "6", "7", "8", "9", "10")
  assert [found[png(i)]["label"] for i in range(COUNT)] == [*range(COUNT)]
  assert found[png(2)]["groups"] == {"region": 2, "label_x_position": 10}
  found = records(open_tfds(f"{where}:train?label=clevr/closest_object_distance"))
  assert [found[png(i)]["label"] for i in range(3)] == [1, 3, 5]
  assert "groups" not in found[png(0)]
  source = open_tfds(f"{where}:train?label=voc/labels")
  assert source.classnames == ("cat", "dog")
  found = records(source)
  assert found[png(0)]["labels"].tolist() == [1, 0]
  assert found[png(1)]["labels"].tolist() == [0, 1]
  assert found[png(1)]["label"] == -1
  (example, *_) = open_tfds(f"{where}:train?label=dsprites/x_position")
  assert example["image"].shape == (4, 5, 3)


def test_unknown_labels_and_groups(folders):
  where = folders["Objects"]
  with pytest.raises(ValueError, match=r"'kitti/closest_vehicle_distance' needs objects/type, objects/location"):
    open_tfds(f"{where}:train?label=kitti/closest_vehicle_distance")
  with pytest.raises(ValueError, match=r"'clevr/count' is not known.*did you mean clevr/count_all"):
    open_tfds(f"{where}:train?label=clevr/count")
  with pytest.raises(ValueError, match=r"no group 'objects', choose from \['label_x_position', 'region'\]"):
    open_tfds(f"{where}:train?label=voc/labels&group=objects")


def test_none_is_a_choice(folders):
  where = folders["Tiny"]
  assert {example["captions"] for example in open_tfds(f"{where}:train?caption=")} == {()}
  assert open_tfds(f"{where}:train?caption=").classnames == ("cat", "dog")
  assert {example["label"] for example in open_tfds(f"{where}:train?label=")} == {-1}
  assert {(example["captions"], example["label"]) for example in open_tfds(f"{where}:train?caption=&label=")} == {
    ((), -1)
  }
  with pytest.raises(ValueError, match=r"no caption 'a\+b%20c', choose from"):
    open_tfds(f"{where}:train?caption=a+b%20c")


def test_neither_caption_nor_label_is_an_error(folders):
  with pytest.raises(ValueError, match=r"neither caption nor label.*texts: \['file_name'\]"):
    open_tfds(f"{folders['Wordless']}:train")
  assert records(open_tfds(f"{folders['Wordless']}:train?caption=file_name"))[png(1)]["captions"] == ("1.png",)


def test_by_name(folders, monkeypatch):
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(Path(folders["Tiny"]).parents[1]))
  for location in ("tiny:train", "tiny:1.0.0:train[:4]"):
    source = pickle.loads(pickle.dumps(open_tfds(location)))
    assert source[1]["captions"] == open_tfds(f"{folders['Tiny']}:train")[1]["captions"]
  assert len(source) == 4


def test_unprepared_and_unknown_data_sets(tmp_path, monkeypatch):
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
  with pytest.raises(FileNotFoundError, match="not prepared") as error:
    open_tfds("tiny:train")
  exec(str(error.value).split("\n")[1].strip())  # the line that the message gives
  assert len(open_tfds("tiny:train")) == COUNT
  with pytest.raises(FileNotFoundError, match=r"dataset_info\.json"):
    open_tfds(f"{tmp_path}/tiny:train")
  with pytest.raises(ValueError, match="no data set 'tyni'"):
    open_tfds("tyni:train")
  for location in ("tiny", "tiny:", ":train", "tiny:train?captain=title"):
    with pytest.raises(ValueError, match="bad location.*NAME:SPLIT"):
      open_tfds(location)


def test_files_of_other_kinds_are_named(folders, tmp_path):
  folder = tmp_path / "tiny" / "1.0.0"
  shutil.copytree(folders["Tiny"], folder)
  info = folder / "dataset_info.json"
  info.write_text(info.read_text().replace("array_record", "riegeli"))
  with pytest.raises(FileNotFoundError, match=r"only the formats riegeli; .*\n.*array_record"):
    open_tfds(f"{folder}:train")


def test_index_out_of_range(folders):
  source = open_tfds(f"{folders['Tiny']}:train")
  for index in (-1, COUNT):
    with pytest.raises(IndexError, match=f"no record {index}, there are {COUNT}"):
      source[index]


@pytest.mark.slow
def test_crosses_to_a_process_without_tensorflow_or_the_builder(folders):
  source = open_tfds(f"{folders['Tiny']}:train")
  assert source[0]["id"] == "tiny/1.0.0/train:0"
  pickled = pickle.dumps(source)
  assert len(pickled) < 1000
  script = (
    "import pickle, sys; source = pickle.load(sys.stdin.buffer);"
    "assert 'tensorflow_datasets' not in sys.modules; print(source[0], source.classnames);"
    "assert not {'tensorflow', 'jax'} & sys.modules.keys()"
  )
  out = subprocess.run([sys.executable, "-c", script], input=pickled, capture_output=True, check=True).stdout
  assert out.decode().strip() == f"{source[0]} {source.classnames}"


def test_a_damaged_record_is_a_bad_sample(folders, tmp_path):
  folder = tmp_path / "tiny" / "1.0.0"
  shutil.copytree(folders["Tiny"], folder)
  (file,) = folder.glob("*array_record*")
  whole, source = file.read_bytes(), open_tfds(f"{folder}:train")
  place = whole.index(b"IDAT") if b"IDAT" in whole else len(whole) // 2
  file.write_bytes(whole[:place] + bytes([whole[place] ^ 0xFF]) + whole[place + 1 :])
  bad = {}
  for index in range(COUNT):
    try:
      assert source[index]["image"].startswith(b"\x89PNG")
    except sources.BadSample as error:
      bad[index] = error
  assert 0 < len(bad) < COUNT
  assert {error.kind for error in bad.values()} == {"damaged record"}
  assert all(f":train: record {index}" in str(error) for index, error in bad.items())


def upload(folder: str, url: str) -> fsspec.AbstractFileSystem:
  memory = fsspec.filesystem("memory")
  memory.store.clear()
  memory.pipe({f"{url}/{path.name}": path.read_bytes() for path in Path(folder).iterdir() if path.is_file()})
  return memory


class Several(Tiny):
  """Three files."""

  __module__ = MODULE

  def _generate_examples(self):
    for i in range(3 * COUNT):
      values = {"image": io.BytesIO(png(i)), "caption": f"caption {i}", "file_name": f"{i}.png", "label": i % 2}
      yield i, values


@pytest.mark.parametrize(("kind", "split"), [("array_record", "train[2:]+train[:2]"), ("parquet", "train")])
def test_at_urls(tmp_path, monkeypatch, kind, split):
  def read(path, *given):
    requests.append(path.rpartition("/")[2])
    return read_before(path, *given)

  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  config = tfds.download.DownloadConfig(num_shards=3)
  builder = Several(data_dir=tmp_path)
  builder.download_and_prepare(file_format=kind, download_config=config)
  folder = str(builder.data_dir)
  memory = upload(folder, "memory://tfds/several")
  read_before, requests = files.read, []
  monkeypatch.setattr(files, "read", read)
  local, remote = open_tfds(f"{folder}:{split}"), open_tfds(f"memory://tfds/several/:{split}")
  assert (remote.name, remote.classnames) == (f"tfds:memory://tfds/several/:{split}", ("cat", "dog"))
  assert len(remote) == len(local) == 3 * COUNT
  assert remote[3 * COUNT - 1] == local[3 * COUNT - 1]
  shards = [name for name in requests if kind in name]
  assert len(shards) == (1 if kind == "array_record" else 3)
  assert list(remote) == list(local)
  unpickled = pickle.loads(pickle.dumps(remote))
  assert len(pickle.dumps(remote)) < 1000
  assert unpickled[0] == local[0]
  assert len([name for name in requests if kind in name]) == 3  # once each
  (changed,) = sorted(Path(folder).glob("*-00000-of-00003*"))
  memory.pipe(f"/tfds/several/{changed.name}", changed.read_bytes())
  again = open_tfds("memory://tfds/several:train")
  assert again.stamp != remote.stamp
  with pytest.raises(FileNotFoundError, match=r"memory://tfds/none .*prepare it with"):
    open_tfds("memory://tfds/none:train")
  if kind == "parquet":
    with pytest.raises(ValueError, match="whole splits, not 'train.:50%.'; use heldout:"):
      open_tfds(f"{folder}:train[:50%]")


def test_a_file_that_cannot_be_copied_loses_only_its_records(folders, tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  memory = upload(folders["Tiny"], "memory://tfds/tiny")
  source = open_tfds("memory://tfds/tiny:train")
  (shard,) = Path(folders["Tiny"]).glob("*array_record*")
  memory.rm(f"/tfds/tiny/{shard.name}")
  with pytest.raises(sources.BadSample, match="record 2: .*no such file") as error:
    source[2]
  assert error.value.kind == "missing file"


def test_the_stamp_follows_the_files(folders, tmp_path):
  folder = tmp_path / "tiny" / "1.0.0"
  shutil.copytree(folders["Tiny"], folder)
  before = open_tfds(f"{folder}:train").stamp
  assert open_tfds(f"{folder}:train").stamp == before
  (file,) = folder.glob("*array_record*")
  os.utime(file, ns=(1, 1))
  assert open_tfds(f"{folder}:train").stamp != before


FEATURE = "tensorflow_datasets.core.features.text_feature.Text"


def hostile(folder: str, path: Path, change) -> Path:
  """A copy of a prepared folder with changed features."""
  shutil.copytree(folder, path)
  features = path / "features.json"
  features.write_text(change(features.read_text()))
  return path


def legacy(features: str) -> str:
  """The form of TFDS before 4.5, in which a text may contain the features within."""
  inside = json.dumps({"features": {"caption": {"pythonClassName": "evil_module.Evil", "text": {}}}})
  proto = "tensorflow_datasets.FeaturesDict"
  name = "tensorflow_datasets.core.features.features_dict.FeaturesDict"
  return json.dumps({"type": name, "content": inside, "proto_cls": proto})


@pytest.mark.parametrize("change", [lambda text: text.replace(FEATURE, "evil_module.Evil", 1), legacy])
@pytest.mark.parametrize("by_name", [False, True])
def test_no_module_that_a_folder_names_is_imported(folders, tmp_path, monkeypatch, change, by_name):
  (tmp_path / "evil_module.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w').close()")
  monkeypatch.syspath_prepend(str(tmp_path))
  monkeypatch.delitem(sys.modules, "evil_module", raising=False)
  folder = hostile(folders["Tiny"], tmp_path / "strange" / "1.0.0", change)
  monkeypatch.setattr(tfds.core.constants, "DATA_DIR", str(tmp_path))
  with pytest.raises(ValueError, match=r"evil_module\.Evil, which is not one of TFDS"):
    open_tfds("strange:train" if by_name else f"{folder}:train")
  assert not (tmp_path / "ran").exists()
  assert tfds.features.FeatureConnector.cls_from_name(FEATURE) is tfds.features.Text
  with pytest.raises(ValueError, match="Unrecognized FeatureConnector type"):
    tfds.features.FeatureConnector.cls_from_name("evil_module.Evil")
  assert (tmp_path / "ran").exists()  # TFDS itself would have imported it


def test_no_file_outside_of_the_folder_is_read(folders, tmp_path):
  folder = tmp_path / "tiny" / "1.0.0"
  shutil.copytree(folders["Tiny"], folder)
  (file,) = folder.glob("*array_record*")
  file.rename(tmp_path / "tiny" / file.name)
  info = json.loads((folder / "dataset_info.json").read_text())
  info["splits"][0]["filepathTemplate"] = "../{DATASET}-{SPLIT}.{FILEFORMAT}-{SHARD_X_OF_Y}"
  (folder / "dataset_info.json").write_text(json.dumps(info))
  with pytest.raises(ValueError, match=r"is not below .*1\.0\.0"):
    open_tfds(f"{folder}:train")
