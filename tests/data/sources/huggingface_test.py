import io
from pathlib import Path
import pickle
import subprocess
import sys

import fsspec
import numpy as np
from PIL import Image
import pytest

from declip_jax.data.sources.base import BadSample
from declip_jax.data.sources.huggingface import from_huggingface, open_huggingface
from declip_jax.data.storage import files

datasets = pytest.importorskip("datasets")
COUNT = 5


def png(index: int) -> bytes:
  file = io.BytesIO()
  Image.new("RGB", (5, 4), (index, 0, 0)).save(file, "PNG")
  return file.getvalue()


FEATURES = {
  "image": datasets.Image(),
  "second": datasets.Image(),
  "jpg": datasets.Value("binary"),
  "caption": datasets.Value("string"),
  "captions": datasets.Sequence(datasets.Value("string")),
  "title": datasets.Value("string"),
  "label": datasets.ClassLabel(names=["cat", "dog"]),
  "coarse": datasets.ClassLabel(names=["pet"]),
  "class_id": datasets.Value("int32"),
}


def make(*names: str) -> "datasets.Dataset":
  """Records whose index follows from any of their columns."""
  values = {
    "image": [{"bytes": png(index), "path": None} for index in range(COUNT)],
    "second": [{"bytes": png(100 + index), "path": None} for index in range(COUNT)],
    "jpg": [b"bytes %d" % index for index in range(COUNT)],
    "caption": [f" caption {index} é\n" for index in range(COUNT)],
    "captions": [["", *(f"text {index}.{j}" for j in range(index))] for index in range(COUNT)],
    "title": [f"title {index}" for index in range(COUNT)],
    "label": [index % 2 for index in range(COUNT - 1)] + [None],
    "coarse": [0] * COUNT,
    "class_id": list(range(COUNT)),
  }
  features = datasets.Features({name: FEATURES[name] for name in names})
  return datasets.Dataset.from_dict({name: values[name] for name in names}, features=features)


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
  folder = tmp_path_factory.mktemp("huggingface")
  make("image", "caption", "label").save_to_disk(folder / "one")
  splits = {"train": make("image", "caption", "label"), "test": make("image", "title", "label").select([3, 1])}
  datasets.DatasetDict(splits).save_to_disk(folder / "splits")
  return folder


def test_image_caption_and_label_of_a_saved_data_set(folder):
  for location in (f"{folder}/one", f"{folder}/splits:train"):
    source = open_huggingface(location)
    assert (len(source), source.classnames, source.skipped) == (COUNT, ("cat", "dog"), {})
    assert source.name == f"huggingface:{location}"
    assert source[np.int64(3)] == {
      "image": png(3),
      "captions": ("caption 3 é",),
      "label": 1,
      "id": f"huggingface:{location}, example 3",
    }
    assert source[COUNT - 1]["label"] == -1
  for index in (-1, COUNT):
    with pytest.raises(IndexError, match=f"no example {index}, there are {COUNT}"):
      source[index]


def test_splits(folder):
  source = open_huggingface(f"{folder}/splits:test")
  assert [example["captions"] for example in source] == [("title 3",), ("title 1",)]
  with pytest.raises(ValueError, match=r"no split None; .*\['train', 'test'\].*PATH:SPLIT"):
    open_huggingface(f"{folder}/splits")
  with pytest.raises(ValueError, match=r"no split 'val'; .*\['train', 'test'\]"):
    open_huggingface(f"{folder}/splits:val")
  with pytest.raises(ValueError, match="has no splits; open PATH"):
    open_huggingface(f"{folder}/one:train")
  with pytest.raises(FileNotFoundError, match=r"datasets\.load_dataset\(\"NAME\"\)\.save_to_disk"):
    open_huggingface(f"{folder}/none")
  with pytest.raises(ValueError, match=r"bad location.*\?image=\.\.&caption=\.\.&label=\.\."):
    open_huggingface(f"{folder}/one?captain=x")


@pytest.mark.slow
def test_pickles_small_and_works_in_another_process(folder):
  source = open_huggingface(f"{folder}/one")
  pickled = pickle.dumps(source)
  assert len(pickled) < 500
  script = "import pickle, sys; source = pickle.load(sys.stdin.buffer); print(source[2])"
  out = subprocess.run([sys.executable, "-c", script], input=pickled, capture_output=True, check=True).stdout
  assert out.decode().strip() == str(source[2])
  at_hand = from_huggingface(datasets.load_from_disk(folder / "one"))
  assert len(pickle.dumps(at_hand)) < 5000
  assert pickle.loads(pickle.dumps(at_hand))[2] == {**source[2], "id": "dataset, example 2"}


@pytest.mark.parametrize("formatted", ["numpy", "arrow"])
def test_formats_and_subsets_of_a_data_set_in_memory(formatted):
  dataset = make("image", "caption", "label").select([4, 2, 0]).with_format(formatted)
  assert [example["captions"] for example in from_huggingface(dataset)] == [
    (f"caption {index} é",) for index in (4, 2, 0)
  ]
  transformed = dataset.with_transform(lambda batch: {"nothing": [0] * len(batch["image"])})
  assert from_huggingface(transformed)[1]["image"] == png(2)


def test_lists_of_captions_and_several_columns():
  dataset = make("image", "captions", "title")
  with pytest.raises(ValueError, match=r"caption could be any of \['captions', 'title'\].*\?caption=captions,title"):
    from_huggingface(dataset)
  assert from_huggingface(dataset, caption="captions")[2]["captions"] == ("text 2.0", "text 2.1")
  assert from_huggingface(dataset, caption="captions,title")[1]["captions"] == ("text 1.0", "title 1")
  assert from_huggingface(dataset, caption="")[1]["captions"] == ()


def test_columns_go_by_name_and_then_by_type():
  assert from_huggingface(make("second", "title"))[1]["image"] == png(101)
  assert from_huggingface(make("image", "second", "title"))[1]["image"] == png(1)
  assert from_huggingface(make("image", "second", "title"), image="second")[1]["image"] == png(101)
  assert from_huggingface(make("jpg", "title"))[1]["image"] == b"bytes 1"
  assert from_huggingface(make("image", "coarse")).classnames == ("pet",)
  source = from_huggingface(make("image", "class_id"))
  assert ([example["label"] for example in source], source.classnames) == (list(range(COUNT)), ())
  assert from_huggingface(make("image", "title", "label"), label="")[1]["label"] == -1


def test_columns_that_are_missing_or_unclear_are_named():
  with pytest.raises(ValueError, match=r"no column 'title' for the image.*\['image'\]"):
    from_huggingface(make("image", "title"), image="title")
  with pytest.raises(ValueError, match=r"which column is the image\?.*\{'caption'"):
    from_huggingface(make("caption"))
  with pytest.raises(ValueError, match="which column is the caption or label"):
    from_huggingface(make("image"))
  with pytest.raises(ValueError, match=r"dataset\['train'\]"):
    from_huggingface(datasets.DatasetDict(train=make("image", "caption")))
  with pytest.raises(ValueError, match="without streaming"):
    from_huggingface(make("image", "caption").to_iterable_dataset())


def test_images_in_files(tmp_path):
  (tmp_path / "0.png").write_bytes(png(0))
  paths = [str(tmp_path / "0.png"), str(tmp_path / "1.png"), None]
  dataset = datasets.Dataset.from_dict({"image": paths, "text": ["a", "b", "c"]})
  source = from_huggingface(dataset.cast_column("image", datasets.Image()))
  assert source[0]["image"] == png(0)
  for index in (1, 2):
    with pytest.raises(BadSample, match=f"dataset, example {index}: ") as error:
      source[index]
    assert error.value.kind == "missing file"


def save(folder: Path, columns: dict[str, list], **features: object) -> str:
  known = datasets.Features(features) if features else None
  datasets.Dataset.from_dict(columns, features=known).save_to_disk(folder)
  return str(folder)


IMAGES = [{"bytes": png(index), "path": None} for index in range(3)]
TEXT = datasets.Value("string")


def test_labels_that_are_texts_are_classes_in_alphabetical_order(tmp_path):
  path = save(tmp_path, {"image": IMAGES, "label": ["dog", "cat", "nan"]}, image=datasets.Image(), label=TEXT)
  source = open_huggingface(path)
  assert source.classnames == ("cat", "dog")
  assert [example["label"] for example in source] == [1, 0, -1]
  assert pickle.loads(pickle.dumps(source)).classnames == ("cat", "dog")


@pytest.mark.parametrize(
  ("values", "feature"),
  [
    ([[{"raw": "one"}, {"raw": "two"}]], datasets.List({"raw": TEXT})),
    ([{"raw": ["one", "two"]}], datasets.Features({"raw": datasets.List(TEXT)})),
    (["['one', 'two']"], TEXT),
  ],
)
def test_captions_in_objects_and_lists(values, feature):
  features = datasets.Features({"image": datasets.Image(), "sentences": feature})
  dataset = datasets.Dataset.from_dict({"image": IMAGES[:1], "sentences": values}, features=features)
  assert from_huggingface(dataset)[0]["captions"] == ("one", "two")


def test_numbered_captions():
  dataset = datasets.Dataset.from_dict({"jpg": [b"x"], "caption_0": ["a"], "caption_1": ["b"]})
  assert from_huggingface(dataset)[0]["captions"] == ("a", "b")


def test_an_example_without_caption_or_image_is_a_bad_sample(tmp_path):
  columns = {"image": [*IMAGES, None], "caption": ["a", None, "NULL", "d"]}
  source = open_huggingface(save(tmp_path, columns, image=datasets.Image(), caption=TEXT))
  assert source[0]["captions"] == ("a",)
  for index, kind in [(1, "no caption"), (2, "no caption"), (3, "missing file")]:
    with pytest.raises(BadSample, match=f"example {index}") as error:
      source[index]
    assert error.value.kind == kind


def test_lists_of_images_are_rejected_with_what_to_do():
  features = datasets.Features({"images": datasets.List(datasets.Image()), "caption": TEXT})
  dataset = datasets.Dataset.from_dict({"images": [IMAGES], "caption": ["x"]}, features=features)
  with pytest.raises(ValueError, match=r"'images' has lists of images: keep one of each with dataset\.map"):
    from_huggingface(dataset)


def test_paths_in_a_saved_data_set_stay_below_its_folder_or_root(tmp_path):
  (tmp_path / "0.png").write_bytes(png(0))
  for name, path in (("absolute", str(tmp_path / "0.png")), ("relative", "0.png"), ("url", "memory://x/0.png")):
    folder = save(tmp_path / name, {"image_path": [path], "text": ["x"]})
    with pytest.raises(FileNotFoundError, match="no readable image among 1 tried"):
      open_huggingface(folder)
    if name != "url":
      assert open_huggingface(f"{folder}?root={tmp_path}")[0]["image"] == png(0)
  assert open_huggingface(f"{tmp_path}/absolute?allow=outside")[0]["image"] == png(0)
  dataset = datasets.load_from_disk(tmp_path / "absolute")
  assert from_huggingface(dataset)[0]["image"] == png(0)


def test_the_stamp_follows_images_that_are_files(tmp_path):
  folder = save(tmp_path / "set", {"image": ["0.png", "gone.png"], "text": ["a", "b"]})
  (tmp_path / "set" / "0.png").write_bytes(png(0))
  before = open_huggingface(folder)
  assert open_huggingface(folder).stamp == before.stamp
  (tmp_path / "set" / "0.png").write_bytes(png(1) + b" ")
  assert open_huggingface(folder).stamp != before.stamp
  assert pickle.loads(pickle.dumps(before)).stamp == before.stamp  # workers agree with the process that opened it


def test_a_data_set_whose_files_are_elsewhere_is_rejected(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  folder = Path(save(tmp_path / "set", {"jpg": [b"x"], "text": ["x"]}))
  (file,) = folder.glob("*.arrow")
  file.rename(tmp_path / file.name)
  state = (folder / "state.json").read_text()
  (folder / "state.json").write_text(state.replace(file.name, f"../{file.name}"))
  with pytest.raises(ValueError, match=f"{file.name} is not below"):
    open_huggingface(str(folder))
  upload(tmp_path, "memory://hostile")
  with pytest.raises(ValueError, match=rf"\.\./{file.name} leads outside memory://hostile/set"):
    open_huggingface("memory://hostile/set")
  assert not list((tmp_path / "cache").rglob(file.name))


def test_a_missing_package_is_named_with_its_install_command(monkeypatch):
  monkeypatch.setitem(sys.modules, "datasets", None)
  with pytest.raises(ModuleNotFoundError, match=r"datasets .*pip install .*\[huggingface\]"):
    open_huggingface("/data")


def upload(folder: Path, url: str) -> None:
  memory = fsspec.filesystem("memory")
  memory.store.clear()
  memory.pipe({f"{url}/{path.relative_to(folder)}": path.read_bytes() for path in folder.rglob("*") if path.is_file()})


def test_at_urls(folder, tmp_path, monkeypatch):
  def read(path, *given):
    requests.append(path)
    return read_before(path, *given)

  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
  upload(folder, "memory://saved")
  read_before, requests = files.read, []
  monkeypatch.setattr(files, "read", read)
  for location in ("one", "splits:test"):
    local, remote = open_huggingface(f"{folder}/{location}"), open_huggingface(f"memory://saved/{location}")
    assert remote.stamp == local.stamp
    assert len(remote) == len(local) > 0
    assert [{**example, "id": ""} for example in remote] == [{**example, "id": ""} for example in local]
    assert pickle.loads(pickle.dumps(remote))[1] == remote[1]
  copied = [path for path in requests if path.endswith(".arrow")]
  assert len(copied) == 2  # once, and no other split
  with pytest.raises(ValueError, match=r"no split None; .*\['train', 'test'\].*PATH:SPLIT"):
    open_huggingface("memory://saved/splits")
  with pytest.raises(FileNotFoundError, match=r"memory://saved/none.*save_to_disk"):
    open_huggingface("memory://saved/none")


def test_the_stamp_follows_the_data_also_at_urls(tmp_path, monkeypatch):
  monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
  seen = {}
  for count in (3, 4):
    make("image", "caption").select(range(count)).save_to_disk(tmp_path / f"{count}")
    upload(tmp_path / f"{count}", "memory://one")
    remote = open_huggingface("memory://one")
    assert len(remote) == count
    assert remote.stamp == open_huggingface(f"{tmp_path}/{count}").stamp
    seen[remote.stamp] = count
  assert len(seen) == 2
  assert len(list((tmp_path / "cache" / "declip_jax" / "copies").iterdir())) == 1


def test_several_labels_and_groups(tmp_path):
  names = datasets.ClassLabel(names=["cat", "dog", "cow"])
  columns = {
    "image": [{"bytes": png(index), "path": None} for index in range(3)],
    "kinds": [[0, 2], [], [1]],
    "cat": [1, 0, -1],
    "dog": [False, True, None],
    "region": ["Europe", "Africa", None],
    "year": [2001, 2002, 2003],
    "label": [0, 1, 2],
  }
  features = {"image": datasets.Image(), "kinds": datasets.Sequence(names), "cat": datasets.Value("int8")}
  features |= {"dog": datasets.Value("bool"), "region": datasets.Value("string"), "year": datasets.Value("int64")}
  features |= {"label": names}
  datasets.Dataset.from_dict(columns, features=datasets.Features(features)).save_to_disk(tmp_path / "set")
  source = pickle.loads(pickle.dumps(open_huggingface(f"{tmp_path}/set?labels=kinds&group=region,year")))
  assert source.classnames == ("cat", "dog", "cow")
  assert [example["labels"].tolist() for example in source] == [[1, -1, 1], [-1, -1, -1], [-1, 1, -1]]
  assert [example["groups"]["region"] for example in source] == [1, 0, -1]
  assert source[0]["groups"]["year"] == 2001
  assert source[0]["label"] == -1
  source = open_huggingface(f"{tmp_path}/set?labels=cat,dog")
  assert source.classnames == ("cat", "dog")
  assert [example["labels"].tolist() for example in source] == [[1, -1], [-1, 1], [0, 0]]
  assert not {"labels", "groups"} & open_huggingface(f"{tmp_path}/set")[0].keys()
  with pytest.raises(ValueError, match="no column 'country' for group"):
    open_huggingface(f"{tmp_path}/set?group=country")
