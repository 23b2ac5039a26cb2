"""Tests of data files."""

from pathlib import Path

import pytest

from declip_jax.evals import catalogue
from declip_jax.evals.catalogue import suite
from declip_jax.evals.data_files import Splits, parse_data, print_data, read_data

TEXT = """
# Evaluation
food101   = tfds:food101:validation | tfds:food101:train
cifar100  = tfds:cifar100:test?label=label
dtd=tfds:dtd:test|tfds:dtd:train|tfds:dtd:validation
own/mine  = folder:/data/mine/test
"""


def test_lines(tmp_path: Path):
  path = tmp_path / "sets.txt"
  path.write_text(TEXT)
  assert read_data(path) == {
    "food101": Splits("tfds:food101:validation", "tfds:food101:train"),
    "cifar100": Splits("tfds:cifar100:test?label=label"),
    "dtd": Splits("tfds:dtd:test", "tfds:dtd:train", "tfds:dtd:validation"),
    "own/mine": Splits("folder:/data/mine/test"),
  }


@pytest.mark.parametrize(
  ("line", "message"),
  [
    ("foods101 = folder:/x", r"sets:2: .*'foods101'.*did you mean food101"),
    ("food101", r"sets:2: 'food101': expected KEY = TEST"),
    ("= folder:/x", r"sets:2: .*expected KEY"),
    ("food101 =", r"sets:2: food101.*test, ''"),
    ("food101 = foldr:/x", r"sets:2: food101.*'foldr:/x'.*did you mean folder"),
    ("food101 = folder:/x | webdataset:", r"sets:2: food101.*train, 'webdataset:'"),
    ("food101 = folder:/x | | folder:/z", r"sets:2: food101 has a source for val, but none for train"),
    ("food101 = folder:/a | folder:/b | folder:/c | folder:/d", r"sets:2: food101 has 4 sources"),
    ("cifar10 = folder:/y", r"sets:2: cifar10 is already defined"),
  ],
)
def test_wrong_lines(line: str, message: str):
  with pytest.raises(ValueError, match=message):
    parse_data(f"cifar10 = folder:/x\n{line}\n", "sets")


def test_empty_file():
  with pytest.raises(ValueError, match="sets: no data set"):
    parse_data("# nothing\n", "sets")


def lines(text: str) -> dict[str, str]:
  """The lines of data sets by key, without padding."""
  pairs = (line.partition("=") for line in text.splitlines() if not line.startswith("#"))
  return {key.strip(): value.strip() for key, _, value in pairs}


def test_published_copies():
  hub = "clip_benchmark:https://huggingface.co/datasets/clip-benchmark"
  text = print_data("clip_benchmark")
  found = lines(text)
  assert found["pets"] == (
    f"{hub}/wds_vtab-pets/resolve/main?split=test | {hub}/wds_vtab-pets/resolve/main?split=train"
  )
  assert found["flickr30k"] == f"{hub}/wds_flickr30k/resolve/main?split=test"
  assert "# birdsnap: not in clip_benchmark" in text.splitlines()
  assert "# imagenet_on_r: the line of imagenet serves it" in text.splitlines()
  assert set(parse_data(text, "printed")) == set(found)
  text = print_data("datacomp", suites=[suite("datacomp38")])
  line = "# winogavil: not in datacomp; its files: winogavil = winogavil:FOLDER/winogavil_dataset.csv"
  assert line in text.splitlines()
  found = lines(text)
  assert len(found) == 37  # without retrieval, which DataComp reads elsewhere
  assert "/wds_geode_test/" in found["geode"]
  assert found["fmow"] == (
    "clip_benchmark:https://huggingface.co/datasets/djghosh/wds_wilds-fmow_test/resolve/main"
    "?split=test&group=region,year,y"
  )


def test_prepared_data_sets(tmp_path: Path):
  assert lines(print_data("tfds"))["food101"] == "tfds:food101:validation | tfds:food101:train"
  assert len(parse_data(print_data("tfds", suites=[suite("vtab")]), "printed")) == 19
  for name in ("food101/1.0.0", "food101/2.0.0", "food101/10.0.0", "sun397/tfds/4.0.0"):
    (tmp_path / name).mkdir(parents=True)
  text = print_data("tfds", str(tmp_path), [suite("clip27"), suite("vtab")])
  assert lines(text)["food101"].startswith(f"tfds:{tmp_path}/food101/10.0.0:validation | ")
  assert lines(text)["sun397"].startswith(f"tfds:{tmp_path}/sun397/tfds/4.0.0:test | ")
  assert f"# cifar10: no prepared version in {tmp_path}/cifar10" in text.splitlines()


def test_folders(tmp_path: Path):
  for name in ("food101/test", "food101/train", "cifar10/train", "flickr30k"):
    (tmp_path / name).mkdir(parents=True)
  (tmp_path / "flickr30k/dataset_flickr30k.json").touch()
  (tmp_path / "winogavil").mkdir()
  (tmp_path / "winogavil/winogavil_dataset.csv").touch()
  found = lines(print_data("folder", f"{tmp_path}/"))
  assert found == {
    "food101": f"folder:{tmp_path}/food101/test | folder:{tmp_path}/food101/train",
    "flickr30k": f"coco:{tmp_path}/flickr30k/dataset_flickr30k.json?split=test",
    "winogavil": f"winogavil:{tmp_path}/winogavil/winogavil_dataset.csv",
  }
  (tmp_path / "wds_vtab-pets").mkdir()
  assert set(lines(print_data("clip_benchmark", str(tmp_path)))) == {"pets"}


def test_wrong_kinds():
  with pytest.raises(ValueError, match="--print_data=tdfs: .*did you mean tfds"):
    print_data("tdfs")
  with pytest.raises(ValueError, match="folder"):
    print_data("folder")


def test_every_data_set_has_a_line():
  for kind in ("tfds", "clip_benchmark", "datacomp"):
    text = print_data(kind).splitlines()
    assert len(text) == len(catalogue.keys()) + 2
